import ast
import gzip
import json

import numpy as np

from tests import bench_elpv, fashion
from tests.bench_runs import Results
from tests.bench_tools import REFERENCES, Reference, user_environment


def test_references_know_nothing_of_this_project():
    names = set()
    for file in REFERENCES.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
    assert "torch" in names and not names & {"utils", "nets", "train", "tests"}


def test_a_reference_has_a_users_environment(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert not [name for name in user_environment() if name.startswith(("GOMP_", "OMP_"))]
    with Reference(
        "loops.py", kind="forward", network="squeezenet1_1", batch=1, steps=1
    ) as forward:
        assert forward() > 0 and forward() > 0


def test_a_finished_run_is_not_measured_again(tmp_path):
    key = dict(part="p", system="s", epochs=1, seed=0)
    first = Results(tmp_path / "r.json").once(
        key, lambda: dict(top1=0.5, best_top1=0.6, wall=1.0, images_per_second=9.0)
    )
    assert Results(tmp_path / "r.json").once(key, None) == first
    assert json.loads((tmp_path / "r.json").read_text()) == [first]


def test_fashion_pictures(tmp_path):
    rng = np.random.default_rng(0)
    for name, labels in (("train", [0, 1, 0, 0]), ("t10k", [1, 0])):
        images = rng.integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", np.uint8(labels))):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (tmp_path / f"{name}-{kind}-ubyte.gz").write_bytes(
                gzip.compress(head + array.tobytes())
            )
    assert np.array_equal(fashion.read_idx(tmp_path / "t10k-images-idx3-ubyte.gz"), images)
    pictures = fashion.write_pictures(tmp_path / "p", 2, fashion.CLASSES[:2], tmp_path)
    assert sorted(str(p.relative_to(pictures)) for p in pictures.rglob("*.png")) == [
        "test/t_shirt/00001.png",
        "test/trouser/00000.png",
        "train/t_shirt/00000.png",
        "train/t_shirt/00002.png",
        "train/trouser/00001.png",
    ]


def test_a_split_takes_the_same_share_of_each_class():
    labels = np.array([0] * 80 + [1] * 20)
    indices = np.arange(10, 100)
    left, taken = bench_elpv.split(indices, labels, 1 / 5, seed=0)
    assert np.bincount(labels[taken]).tolist() == [14, 4]
    assert sorted([*left, *taken]) == indices.tolist()
    again = bench_elpv.split(indices, labels, 1 / 5, seed=1)[1]
    assert len(again) == 18 and again.tolist() != taken.tolist()
