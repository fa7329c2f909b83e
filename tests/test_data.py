import ast
import errno
import json
import os
import re
import shutil
import time
import warnings
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from tests.helpers import (
    data_of,
    default_settings,
    make_data,
    make_project,
    make_run,
    run_of,
    train,
)
from utils import dataloader
from utils.dataloader import AUGMENTATIONS, DataGenerator, detection_collate
from utils.fit import fingerprint_of, fit_one_epoch
from utils.loss_history import LossHistory
from utils.pictures import centre_box, normalize, random_box, read_crop
from utils.plumbing.errors import UserError
from utils.plumbing.lists import DEFAULT_PATHS
from utils.plumbing.processes import count_workers, describe_device, prepare_worker
from utils.plumbing.sample import SAMPLE, find_lists
from utils.plumbing.shapes import SHAPES, draw_set
from utils.sampler import EpochSampler
from utils.steps import Steps, uninterrupted

NAMES = "classes_path", "train_annotation_path", "test_annotation_path"


def photo(width, height, seed=0):
    """Smooth structure at many scales, as photos have."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for cells in (4, 16, 64, 128):
        noise = rng.normal(size=(cells, cells, 3))
        for c in range(3):
            total[..., c] += (
                np.asarray(
                    Image.fromarray(noise[..., c].astype(np.float32)).resize((width, height), 3)
                )
                / cells**0.5
            )
    return Image.fromarray((128 + 60 * total).clip(0, 255).astype(np.uint8))


def whole(height, width):
    return 0, 0, height, width


def plain(path, box, shape):
    top, left, height, width = box
    image = Image.open(path).convert("RGB")
    return v2.functional.pil_to_tensor(
        v2.functional.resized_crop(image, top, left, height, width, list(shape))
    ).float()


@pytest.mark.parametrize("size, allowed", [((500, 375), 2), ((3264, 2448), 4), ((1200, 1600), 4)])
@pytest.mark.parametrize("decoder", ["torchvision's where it pays", "Pillow's alone"])
def test_crops_match_the_plain_pipeline(tmp_path, monkeypatch, size, allowed, decoder):
    if decoder == "Pillow's alone":
        monkeypatch.setattr("utils.pictures.decode_jpeg", None)
    photo(*size).save(tmp_path / "photo.jpg", quality=90)
    torch.manual_seed(0)
    boxes = [random_box(0.08, size[1], size[0]) for _ in range(8 if size == (500, 375) else 3)]
    for box in [*boxes, centre_box((224, 224), 0.875, size[1], size[0])]:
        ours = read_crop(tmp_path / "photo.jpg", (224, 224), lambda h, w: box)
        assert ours.shape == (224, 224, 3) and ours.dtype == torch.uint8
        theirs = plain(tmp_path / "photo.jpg", box, (224, 224))
        limit = allowed if min(box[2:]) >= 448 else 2
        assert (ours.permute(2, 0, 1).float() - theirs).abs().mean() <= limit, box


def test_reduced_decoding_keeps_the_resolution(tmp_path, monkeypatch):
    photo(1600, 1200).save(tmp_path / "photo.jpg")
    seen = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda self, size, *args, box=None, **options: (
            seen.append((box[2] - box[0], box[3] - box[1])),
            resize(self, size, *args, box=box, **options),
        )[1],
    )
    for side in (448, 500, 896, 1000, 1200):
        read_crop(tmp_path / "photo.jpg", (224, 224), lambda h, w: (0, 0, side, side))
        assert min(seen[-1]) >= 224 and min(seen[-1]) < 448
    read_crop(tmp_path / "photo.jpg", (64, 224), lambda h, w: (0, 0, 1200, 470))
    assert seen[-1][0] >= 224 and seen[-1][1] >= 64


GRADIENT = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))


@pytest.mark.parametrize(
    "kind",
    [
        "L",
        "1",
        "P",
        "RGBA",
        "LA",
        "CMYK",
        "I;16",
        "YCbCr",
        "16-bit png",
        "L jpeg",
        "CMYK jpeg",
        "gif",
        "webp",
        "bmp",
        "P transparent",
        "tiny",
    ],
)
@pytest.mark.parametrize("decoder", ["torchvision's where it pays", "Pillow's alone"])
def test_every_kind_of_picture(tmp_path, monkeypatch, kind, decoder):
    if decoder == "Pillow's alone":
        monkeypatch.setattr("utils.pictures.decode_jpeg", None)
    grey = Image.fromarray(GRADIENT)
    rgb = grey.convert("RGB")
    files = {
        "L": ("a.png", grey),
        "1": ("a.png", grey.convert("1")),
        "P": ("a.png", rgb.quantize(256)),
        "RGBA": ("a.png", rgb.convert("RGBA")),
        "LA": ("a.png", grey.convert("LA")),
        "CMYK": ("a.tif", rgb.convert("CMYK")),
        "I;16": ("a.tif", Image.fromarray(GRADIENT.astype(np.uint16) * 257)),
        "YCbCr": (None, rgb.convert("YCbCr")),
        "16-bit png": ("a.png", Image.fromarray(GRADIENT.astype(np.uint16) * 257)),
        "L jpeg": ("a.jpg", grey),
        "CMYK jpeg": ("a.jpg", rgb.convert("CMYK")),
        "gif": ("a.gif", grey),
        "webp": ("a.webp", rgb),
        "bmp": ("a.bmp", rgb),
        "P transparent": ("a.gif", grey.convert("P")),
        "tiny": ("a.png", Image.new("L", (1, 1))),
    }
    name, image = files[kind]
    if name:
        image.save(tmp_path / name, **({"transparency": 0} if kind == "P transparent" else {}))
    crop = read_crop(tmp_path / name if name else image, (64, 64), whole).float()
    assert crop.shape == (64, 64, 3)
    if kind == "tiny":
        assert crop.max() == 0
    elif kind == "1":
        assert crop[:, 32:].mean() > crop[:, :32].mean() + 80
    else:
        assert (
            crop.mean(2)[:, 2:] - torch.from_numpy(GRADIENT.astype(np.float32))[:, 2:]
        ).abs().max() < 8


def test_transparency_is_white():
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert read_crop(image, (8, 8), whole).min() == 255


def test_normalize():
    images = torch.randint(0, 256, (2, 3, 5, 6), dtype=torch.uint8)
    # ImageNet's, of red, green and blue
    expected = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(images / 255)
    for layout in (torch.channels_last, torch.contiguous_format):
        ours = normalize(images.contiguous(memory_format=layout), "cpu")
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5, check_stride=False)
        assert ours.is_contiguous(memory_format=layout)
    ours = normalize(images, "cpu", default_settings())  # train.py's constants are the same
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    grey = normalize(images, "cpu", dict(mean=[0.5, 0.5, 0.5], std=(0.25, 0.25, 0.25)))
    torch.testing.assert_close(grey, (images / 255 - 0.5) / 0.25, rtol=1e-5, atol=1e-5)
    own = images.float()  # as a fork may read them
    torch.testing.assert_close(normalize(own, "cpu"), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(own, images.float())


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures with; spaces é漢字")
    found = []
    for i in range(20):
        path = folder / f"bild {i};x.jpg"
        photo(60 + i, 50, i).save(path)
        found.append(f"{i % 3};{path}\n")
    return found


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_augmentation_is_a_function_of_seed_epoch_and_index(lines, augmentation):
    def picture(seed, epoch, index):
        torch.manual_seed(np.random.default_rng().integers(1 << 30))  # whatever came before
        return data_of(lines, (32, 40), True, augmentation, 0.5, seed=seed)[epoch, 5, index][0]

    first = picture(1, 2, 3)
    assert (
        first.shape == (32, 40, 3)
        and first.dtype == torch.uint8
        and torch.equal(first, picture(1, 2, 3))
    )
    assert any(not torch.equal(first, picture(1, epoch, 3)) for epoch in range(3, 12))
    assert any(not torch.equal(first, picture(seed, 2, 3)) for seed in range(2, 12))


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_change_nothing(lines, context):
    data = data_of(lines, (32, 32), True, "trivial", 0.5)

    def batches(**options):
        sampler = EpochSampler(len(data), 4, seed=3)
        sampler.set_epoch(2)
        return list(
            DataLoader(
                data,
                4,
                sampler=sampler,
                collate_fn=detection_collate,
                worker_init_fn=prepare_worker,
                **options,
            )
        )

    expected = batches(num_workers=0)
    assert len(expected) == 5
    for ours, theirs in zip(
        batches(num_workers=2, multiprocessing_context=context), expected, strict=True
    ):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        assert ours[0].dtype == torch.uint8 and ours[0].is_contiguous(
            memory_format=torch.channels_last
        )


def test_lines_are_tensors_and_shared_where_workers_need_it(lines):
    data = data_of(lines, (32, 32))
    assert [data.name(i) for i in range(len(data))] == [line.rstrip("\n") for line in lines]
    data = data_of(1000 * lines, (32, 32))
    assert len(ForkingPickler.dumps(data)) < 10_000  # as for a worker that is not forked
    assert not any(isinstance(v, (list, np.ndarray)) and len(v) > 10 for v in vars(data).values())


@pytest.mark.parametrize(
    "number, batch, world", [(100, 10, 1), (103, 8, 2), (64, 64, 4), (127, 64, 2), (1000, 48, 3)]
)
def test_sampler_visits(number, batch, world):
    samplers = [EpochSampler(number, batch, rank, world, seed=5) for rank in range(world)]
    alone = EpochSampler(number, batch, seed=5)
    left_out = []
    for epoch in range(6):
        for sampler in [alone, *samplers]:
            sampler.set_epoch(epoch)
        shares = [[index for _, _, index in sampler] for sampler in samplers]
        assert all(
            len(share) == len(sampler) == number // batch * batch // world
            for share, sampler in zip(shares, samplers)
        )
        visited = [index for share in shares for index in share]
        assert len(set(visited)) == len(visited) == number // batch * batch
        order = [index for _, _, index in alone]
        local = batch // world
        for step in range(
            number // batch
        ):  # the same pictures in the same step, however many processes
            assert sorted(order[step * batch : (step + 1) * batch]) == sorted(
                index for share in shares for index in share[step * local : (step + 1) * local]
            )
        left_out.append(set(range(number)) - set(visited))
        alone.set_epoch(epoch, 1)
        assert [index for _, _, index in alone] == order[batch:]
    assert all(not a & b for a, b in zip(left_out, left_out[1:]))


@pytest.mark.parametrize("number, world", [(10, 1), (11, 2), (1, 4), (7, 3)])
def test_validation_counts_every_picture_once(number, world):
    shares = [
        [index for _, _, index in EpochSampler(number, 4 * world, rank, world, shuffle=False)]
        for rank in range(world)
    ]
    assert sorted(sum(shares, [])) == list(range(number))
    assert [
        len(EpochSampler(number, 4 * world, rank, world, shuffle=False)) for rank in range(world)
    ] == list(map(len, shares))


def epochs(data, numbers=range(3), **workers):
    """All batches of some epochs."""
    sampler = EpochSampler(len(data), 4, shuffle=data.random, seed=1)
    loader = DataLoader(data, 4, sampler=sampler, collate_fn=detection_collate, **workers)
    for epoch in numbers:
        sampler.set_epoch(epoch)
        yield from loader


def same(one, other):
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1]) and one[2] == other[2]


@pytest.mark.parametrize("augmentation", ["none", "flip"])
def test_memory_changes_nothing(tmp_path, augmentation):
    """Also where pictures are unreadable; each good one is read once."""
    lines = [f"{i % 3};{tmp_path / f'{i}.png'}" for i in range(20)]
    for i, line in enumerate(lines[:-2]):
        photo(40, 30, i).save(line.partition(";")[2])
    for random in (True, False):
        plain, kept = (
            data_of(lines, (24, 24), random, augmentation, 0.3, seed=3, cache_mb=size)
            for size in (0, 1)
        )
        assert kept.in_memory and not plain.in_memory
        expected, got = list(epochs(plain)), list(epochs(kept))
        assert all(map(same, expected, got)) and any(batch[2] for batch in got)
        for path in tmp_path.iterdir():
            path.rename(path.with_suffix(".away"))
        assert all(map(same, expected, epochs(kept)))
        for path in tmp_path.iterdir():
            path.rename(path.with_suffix(".png"))


class Items(list):
    """A data set of one's own: what its items are, and are raised."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        if isinstance(item, Exception):
            raise item
        return item


@pytest.mark.parametrize(
    "setting, Cuda, in_memory, cores, processes, expected",
    [
        ("auto", False, True, 16, 1, 0),
        ("auto", False, False, 1, 1, 1),
        ("auto", False, False, 4, 1, 2),
        ("auto", True, True, 16, 1, 8),
        ("auto", True, False, 64, 4, 8),
        ("auto", True, False, 16, 4, 4),
        ("auto", True, False, 1, 2, 1),
        (0, True, False, 16, 1, 0),
        (3, False, True, 16, 1, 3),
        (14, True, True, 4, 2, 14),
    ],
)
def test_number_of_workers(monkeypatch, setting, Cuda, in_memory, cores, processes, expected):
    monkeypatch.setattr("utils.plumbing.processes.cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert count_workers(setting, Cuda, in_memory) == expected
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    if processes == 1:
        assert count_workers(setting, Cuda, in_memory) == expected


@pytest.mark.parametrize("threads, text", [(1, "CPU, 1 thread"), (2, "CPU, 2 threads")])
def test_the_header_s_device(monkeypatch, threads, text):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert describe_device(False) == text


class Slow(Items):
    """Each item takes a second of a clock."""

    def __getitem__(self, index):
        self.clock[0] += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("slow", ["reading", "reading into memory", "training"])
def test_the_epoch_s_line_says_how_long_training_waited_for_pictures(
    tmp_path, capsys, monkeypatch, slow
):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    items = [(np.full((9, 9), i, np.uint8), i % 2) for i in range(8)]
    source = Slow(items)
    source.clock = clock
    data = data_of(source, (8, 8), cache_mb=int(slow == "reading into memory"))
    options = dict(batch_size=4, collate_fn=detection_collate, drop_last=True)
    assert data.fingerprint  # reads some pictures as well, once
    gen = DataLoader(data, sampler=EpochSampler(8, 4), **options)
    val = data_of(items, (8, 8), random=False)
    gen_val = DataLoader(val, sampler=EpochSampler(8, 4, shuffle=False), **options)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    if slow == "training":
        model.register_forward_hook(lambda *parts: clock.append(clock.pop() + 6))
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    history = LossHistory(tmp_path, input_shape=(8, 8))
    fit_one_epoch(
        model,
        model,
        history,
        optimizer,
        0,
        2,
        2,
        gen,
        gen_val,
        1,
        False,
        False,
        None,
        1,
        tmp_path,
        0,
    )
    line = capsys.readouterr().out.splitlines()[-1]
    share = int(re.search(r"images/s, waited (\d+)% for pictures", line)[1])
    assert share == (40 if slow == "training" else 100)  # 8 of 20 seconds
    assert ("raise num_workers (now 0)" in line and "--shrink" in line) == (
        slow != "reading into memory"
    )


def test_waiting_counts_where_nothing_is_left_to_compute(monkeypatch):
    """A GPU that still computes loses nothing while the host waits."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    class Run(Steps):
        def is_idle(self):
            return next(idle)

        def next_request(self):
            return 0

    def fetches():
        for seconds in (1, 4, 5, 20):
            clock[0] += seconds
            yield seconds

    run = Run("logs/1")
    idle = iter([True, False, False, True])
    assert list(run.steps(fetches(), 4)) == [[1], [4], [5], [20]]
    assert run.waited == 1 + 20


class Interrupted:
    """Batches whose first wait is ended by an error, as Windows does at Ctrl-C."""

    def __init__(self):
        self.results = [1, InterruptedError(4, "Interrupted function call"), 2]

    def __iter__(self):
        return self

    def __next__(self):
        if not self.results:
            raise StopIteration
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result


def test_an_interrupted_wait_goes_on():
    assert list(uninterrupted(Interrupted())) == [1, 2]


def test_memory_keeps_a_fork_s_kind_of_picture(lines, monkeypatch):
    """Floats, or 16 bits."""
    read = dataloader.read_crop
    monkeypatch.setattr(dataloader, "read_crop", lambda *words: read(*words) / np.float32(300))
    data = data_of(lines, (8, 8), False, cache_mb=100)
    first, again = data[0][0], data[0][0]
    assert data.memory.filled[0] and again.dtype == torch.float32 and torch.equal(first, again)


def test_what_is_kept_in_memory(lines):
    size = 3 * 300 * 300 * len(lines) / 1e6
    for augmentation in AUGMENTATIONS:
        assert data_of(lines, (300, 300), True, augmentation, cache_mb=size).in_memory == (
            augmentation in ("none", "flip", "flips")
        )
        assert data_of(lines, (300, 300), False, augmentation, cache_mb=size).in_memory
    assert not data_of(lines, (300, 301), cache_mb=size).in_memory  # all of them, or none
    data = data_of(lines[:1], (300, 301), random=False)
    assert torch.equal(data[0][0], data[0][0]) and data.memory is None


@pytest.mark.parametrize(
    "context",
    ["fork", *(pytest.param(name, marks=pytest.mark.slow) for name in ("forkserver", "spawn"))],
)
def test_workers_share_what_they_have_read(tmp_path, context):
    """Each picture's file is read once, by whichever worker; the second epoch needs no file."""
    lines = [f"{i % 3};{tmp_path / f'{i}.png'}" for i in range(20)]
    for i, line in enumerate(lines[1:]):  # the first is unreadable
        photo(40, 30, i).save(line.partition(";")[2])
    expected = list(epochs(data_of(lines, (24, 24), True, "flips", seed=3), range(2)))
    data = data_of(lines, (24, 24), True, "flips", seed=3, cache_mb=1)
    data.share_memory()
    assert data.in_memory and data.memory.filled.sum() == 1
    got = []
    for number in range(2):
        workers = dict(
            num_workers=2, multiprocessing_context=context, worker_init_fn=prepare_worker
        )
        got += epochs(data, [number], **workers)
        for path in tmp_path.glob("*.png"):
            path.rename(path.with_suffix(".away"))
        assert data.memory.filled.tolist() == [0] + [1] * 19
    assert all(map(same, expected, got)) and len(got) == len(expected)


def test_without_workers_and_without_room_nothing_is_shared(lines, monkeypatch):
    data = data_of(lines, (24, 24), random=False, cache_mb=1)
    assert data[3][1] == data[3][1] == 0 and data.memory.filled.tolist()[3] == 1
    assert not data.memory.images.is_shared()
    data.share_memory()
    assert data.memory.images.is_shared() and data.in_memory
    usage = shutil.disk_usage("/")
    size = len(lines) * 24 * 24 * 3
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5 * size))
    for processes, is_room in ((1, True), (2, True), (3, False)):  # they ask at the same time
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert data.memory.has_room_to_share() == is_room
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=24 * 24 * 3 * 20))
    data = data_of(lines, (24, 24), random=False, cache_mb=1)
    data.share_memory()
    assert not data.in_memory and data[3][1] == 0 and data.memory is None


def test_own_data_without_a_readable_picture_is_not_kept():
    data = data_of(Items([OSError("gone")] * 3), (8, 8), random=False, cache_mb=1)
    data.share_memory()
    assert not data.in_memory and data[0][0] is None


def test_targets_of_other_kinds_are_not_kept_as_the_first_one(monkeypatch):
    targets = [1, 0.5, [1, 2], 3]
    monkeypatch.setattr("utils.dataloader.read_label", lambda label, number: targets[label])
    grey = np.zeros((9, 9), np.uint8)
    data = data_of([(grey, i) for i in range(4)], (8, 8), random=False, cache_mb=1)
    for _ in range(2):
        assert [data[i][1] for i in range(4)] == targets
    assert data.memory.filled.tolist() == [1, 0, 0, 1]


def test_training_refuses_a_plain_index(lines):
    with pytest.raises(UserError, match="EpochSampler"):
        data_of(lines, (8, 8))[3]
    assert data_of(lines, (8, 8), random=False)[3][0].shape == (8, 8, 3)


@pytest.mark.parametrize("augmentation", ["flip", "crop", "trivial"])
def test_a_picture_that_comes_twice_is_augmented_twice(lines, augmentation):
    data = data_of(lines, (32, 32), True, augmentation)
    assert len({data[0, place, 7][0].numpy().tobytes() for place in range(12)}) > 1


@pytest.mark.parametrize(
    "label",
    [
        0.5,
        1.0,
        np.float32(1),
        [1, 0],
        (1,),
        "one",
        None,
        True,
        torch.tensor([1, 0]),
        torch.tensor(0.5),
        2,
        -1,
        np.int64(2),
    ],
)
def test_a_label_that_is_no_class_id_is_a_sentence(label):
    grey = np.zeros((9, 9), np.uint8)
    data = data_of(Items([(grey, 1), (grey, label)]), (8, 8), random=False, num_classes=2)
    assert data[0][1] == 1
    for ask in (lambda: data[1], data.class_ids):
        with pytest.raises(
            UserError, match="picture 1 of the data set: .*(whole number|outside 0 … 1)"
        ):
            ask()


@pytest.mark.parametrize("random", [True, False])
@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        TypeError("x"),
        IndexError("x"),
        AttributeError("x"),
        ValueError("x"),
        ZeroDivisionError(),
        RuntimeError("x"),
        AssertionError(),
        MemoryError(),
        OSError(errno.EMFILE, "Too many open files"),
    ],
)
def test_a_data_sets_own_mistake_is_no_broken_picture(error, random):
    data = data_of(Items([(np.zeros((9, 9), np.uint8), 1), error]), (8, 8), random)
    with pytest.raises(type(error)) as caught:
        data[0, 0, 1]
    assert caught.value is error


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("gone"),
        OSError("image file is truncated"),
        SyntaxError("broken PNG file"),
        EOFError(),
        Image.DecompressionBombError("too large"),
    ],
)
def test_what_reading_a_picture_raises_is_a_broken_picture(error):
    source = Items([(np.zeros((9, 9), np.uint8), 1), error])
    image, target, unreadable = data_of(source, (8, 8), random=False)[1]
    assert image is None and target is None and [index for index, _ in unreadable] == [1]
    assert data_of(source, (8, 8))[0, 0, 1][1] == 1


def test_a_broken_picture_counts_once_where_it_is_drawn_in_its_own_place():
    items = Items((np.zeros((9, 9), np.uint8), 0) for _ in range(4))
    items[2] = OSError("cut short")
    data = data_of(items, (8, 8))
    assert all(len(data[epoch, 0, 2][2]) == 1 for epoch in range(40))


def test_too_little_memory_is_no_broken_picture(lines, monkeypatch):
    def short(*words):
        raise MemoryError

    monkeypatch.setattr("utils.pictures.open_picture", short)
    with pytest.raises(MemoryError):
        data_of(lines, (8, 8))[0, 0, 0]


def test_class_ids():
    """As items say them, also where a transform changes what `targets` says."""

    class Transformed(Items):
        targets, target_transform = [0, 1, 2], None

    grey = np.zeros((9, 9), np.uint8)
    source = Transformed([(grey, 2), (grey, 1), (grey, 0)])
    assert data_of(source, (8, 8)).class_ids().tolist() == [0, 1, 2]
    source.target_transform = lambda label: 2 - label
    assert data_of(source, (8, 8)).class_ids().tolist() == [2, 1, 0]
    source.target_transform, source.transforms = None, lambda picture, label: (picture, 2 - label)
    assert data_of(source, (8, 8)).class_ids().tolist() == [2, 1, 0]
    ids = data_of(["1;a", "0;b"], (8, 8), num_classes=2).class_ids()
    assert ids.tolist() == [1, 0] and ids.dtype == np.int64


def test_the_class_of_an_unreadable_picture_is_unknown():
    items = Items([(np.zeros((9, 9), np.uint8), 0), OSError("cut short")])
    data = data_of(items, (8, 8))
    with pytest.raises(UserError, match="picture 1 of the data set cannot be read .*cut short"):
        data.class_ids()


@pytest.mark.parametrize("target", [[0, 1], 0.5])
def test_class_weights_of_other_targets_are_refused(target, monkeypatch):
    monkeypatch.setattr("utils.dataloader.read_label", lambda label, num_classes: target)
    data = data_of(["0;a", "1;b"], (8, 8), num_classes=2, class_weights="sqrt")
    with pytest.raises(UserError, match="class_weights = 'sqrt' is for targets that are class ids"):
        data.class_ids()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "targets, dtype",
    [
        ([1, 0], torch.int64),
        ([0.5, 1.5], torch.float32),
        ([[1, 0], [0, 0]], torch.int64),
        ([[0.5], [1.5]], torch.float32),
        ([torch.ones(3), torch.zeros(3)], torch.float32),
    ],
)
def test_targets_of_any_kind_travel(monkeypatch, workers, targets, dtype):
    monkeypatch.setattr(
        "utils.dataloader.read_label", lambda label, num_classes: targets[int(label)]
    )
    data = data_of([(np.zeros((9, 9), np.uint8), i) for i in range(2)], (8, 8), random=False)
    ((_, found, _),) = DataLoader(
        data,
        2,
        collate_fn=detection_collate,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    expected = torch.stack([torch.as_tensor(target) for target in targets])
    assert (
        torch.equal(found, expected) and found.dtype == dtype and found.is_shared() == bool(workers)
    )


def test_fingerprint(lines):
    """It names all that items depend on, and of data of one's own the content of some."""

    def of(source, *options, **more):
        return data_of(source, *options, **more).fingerprint

    base = of(lines, (32, 40), False)
    training = of(lines, (32, 40))
    assert base == of(lines, [32, 40], False, cache_mb=100) == json.loads(json.dumps(base))
    seen_by_all = dict(
        input_shape=(32, 32),
        val_crop=0.9,
        num_classes=3,
        resize="squeeze",
        mean=[0, 0, 0],
        std=[1, 1, 1],
    )
    of_training = dict(augmentation="none", random_erasing=0.1, crop_scale=0.1, seed=1)
    for name, value in {**seen_by_all, **of_training}.items():
        options = {"shape": (32, 40), name: value}
        if name == "input_shape":
            options = {"shape": value}
        changed = of(lines, **options)
        assert [key for key in training if training[key] != changed[key]] == [name]
        assert (of(lines, random=False, **options) == base) == (name in of_training)
    assert training["random"] and not base["random"]
    for other in (lines[:-1], lines[1:] + lines[:1], ["1" + lines[0][1:], *lines[1:]]):
        assert of(other, (32, 40), False)["list"] != base["list"]
    greys = [(np.full((9, 9), i, np.uint8), i) for i in range(3)]
    own = of(greys, (8, 8), False)
    assert own == of(list(greys), (8, 8), False)
    for other in (
        greys[:2],
        greys[::-1],
        [(grey, 0) for grey, _ in greys],
        [(grey + 1, label) for grey, label in greys],
    ):
        assert of(other, (8, 8), False)["list"] != own["list"]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, "tensors", "arrays in it"])
def test_targets_count_by_content(kind):
    """All of them, whatever holds them, though only some pictures are looked at."""

    def of(targets):
        data = Items([(np.zeros((9, 9), np.uint8), 0)] * len(targets))
        if kind == "tensors":
            targets = [torch.full((2000,), target) for target in targets]
        elif kind == "arrays in it":
            targets = [np.arange(5000) == 2500 + target for target in targets]
        else:
            targets = kind(targets)
        data.targets = targets
        return data_of(data, (8, 8), False).fingerprint

    targets = [0] * 3000
    assert of(targets) == of(list(targets))
    targets[1501] = 1
    assert of(targets) != of([0] * 3000)


def test_a_subclass_adds_to_its_fingerprint():
    class Sharpened(DataGenerator):
        sharpen = 1

        @property
        def fingerprint(self):
            return {**super().fingerprint, "sharpen": self.sharpen}

    class Weighted(EpochSampler):
        power = 1

        @property
        def fingerprint(self):
            return {**super().fingerprint, "power": self.power}

    def order(sharpen=1, power=1, **options):
        data, sampler = Sharpened(["0;a"], (8, 8)), Weighted(1, 1, **options)
        data.sharpen, sampler.power = sharpen, power
        return fingerprint_of(DataLoader(data, 1, sampler=sampler))

    same = order()
    assert same == order(rank=1, world_size=3)  # the number of processes changes nothing
    assert same not in (order(sharpen=2), order(power=2), order(seed=2), order(shuffle=False))


def test_unreadable(lines, tmp_path):
    (tmp_path / "zero.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no picture")
    whole_file = open(lines[0].strip().partition(";")[2], "rb").read()
    (tmp_path / "cut.jpg").write_bytes(whole_file[: len(whole_file) // 2])
    bad = [f"2;{tmp_path / name}\n" for name in ("zero.jpg", "text.jpg", "cut.jpg", "vanished.png")]
    data = data_of(lines + bad, (32, 32), True)
    for index in range(20, 24):
        image, class_id, unreadable = data[1, 0, index]
        assert image.shape == (32, 32, 3) and unreadable[0][0] == index
        again = data[1, 0, index]
        assert torch.equal(image, again[0]) and class_id == again[1]
    images, targets, unreadable = detection_collate(
        [data_of(bad + lines, (32, 32), False)[i] for i in range(6)]
    )
    assert len(images) == len(targets) == 2 and [index for index, _ in unreadable] == [0, 1, 2, 3]
    images, targets, _ = detection_collate([data_of(bad, (32, 32), False)[0]])
    assert len(images) == len(targets) == 0


def test_decompression_bomb(tmp_path, monkeypatch):
    photo(60, 50).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    image, _, unreadable = data_of([f"0;{tmp_path}/a.png"], (8, 8), random=False)[0]
    assert image is None and "Bomb" in unreadable[0][1]


def test_train_hands_every_setting_to_its_data(tmp_path):
    """What the checkpoint records of them is what they were made with."""
    settings = dict(
        input_shape=[32, 40],
        resize="'squeeze'",
        augmentation="'crop'",
        crop_scale=0.5,
        val_crop=0.75,
        random_erasing=0.125,
        seed=5,
        mean=[0.25, 0.5, 0.75],
        UnFreeze_Epoch=1,
    )
    folder = make_project(tmp_path, **settings)
    make_data(folder)
    train(folder)
    state = torch.load(run_of(folder) / "last_checkpoint.pth", weights_only=True)
    sampler, data = ast.literal_eval(state["order"])
    expected = {
        **{name: value for name, value in settings.items() if name != "UnFreeze_Epoch"},
        "resize": "squeeze",
        "augmentation": "crop",
    }
    assert {name: data[name] for name in expected} == expected and data["random"]
    assert data["num_classes"] == 3 and data["list"].startswith("48 pictures")
    assert sampler == {"number": 48, "batch_size": 8, "shuffle": True, "seed": 5}
    scored_on = state["scored_on"]
    for name in ("input_shape", "resize", "val_crop"):
        assert scored_on[name] == str(expected[name])
    assert scored_on["random"] == "False" and scored_on["list"].startswith("20 pictures")


def shape_of_an_l(width=96, height=48):
    """Black; red along the left edge, green along the bottom: told by place, in any direction."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 8, 0] = 255
    pixels[-height // 8 :, :, 1] = 255
    return Image.fromarray(pixels)


def corners(image):
    """(red, green) of (H, W, 3)'s corners: above left and right, below left and right."""
    image = image.numpy() > 128
    return [tuple(image[y, x, :2].astype(int)) for y in (0, -1) for x in (0, -1)]


L = [(1, 0), (0, 0), (1, 1), (0, 1)]  # corners of shape_of_an_l, whole


@pytest.mark.parametrize("augmentation", ["none", "crop", "trivial"])
def test_squeeze_keeps_the_whole_picture(augmentation):
    """In validation all of it; random crops have about the picture's own proportions."""
    picture = shape_of_an_l()
    source = [(picture, 0)]
    for random in (False, True):
        data = data_of(source, (32, 24), random, augmentation, resize="squeeze")
        image = data[0, 0, 0][0]
        assert image.shape == (32, 24, 3)
        if not data.random_crops:
            assert corners(image) == L
            expected = np.asarray(picture.resize((24, 32), Image.Resampling.BILINEAR)).astype(int)
            assert np.abs(image.numpy() - expected).max() <= 1
    cropped = data_of(source, (32, 24), False)[0][0]
    assert corners(cropped) == [(0, 0), (0, 0), (0, 1), (0, 1)]  # the middle alone
    torch.manual_seed(0)
    data = data_of(source, (32, 24), True, "crop", crop_scale=0.5, resize="squeeze")
    shapes = [box[3] / box[2] for box in (data.choose_box(480, 960) for _ in range(50))]
    assert 1.45 < min(shapes) < 1.8 and 2.2 < max(shapes) < 2.7
    assert data.choose_box(480, 960)[2] * data.choose_box(480, 960)[3] > 0.4 * 480 * 960


def test_val_crop_of_a_squeezed_picture():
    data = data_of([(shape_of_an_l(), 0)], (8, 8), False, val_crop=0.5, resize="squeeze")
    assert data.choose_box(48, 96) == (12, 24, 24, 48)
    assert corners(data[0][0]) == [(0, 0)] * 4


def test_wide_pictures_are_noted(tmp_path):
    """By the usual picture, from the headers alone, as they are seen."""
    sizes = [(640, 120)] * 3 + [(64, 64)] * 2
    for i, size in enumerate(sizes):
        Image.new("RGB", size).save(tmp_path / f"{i}.jpg")
    lines = [f"0;{tmp_path / f'{i}.jpg'}" for i in range(5)]
    text = data_of(lines, (64, 64)).describe_cut()
    assert "640×120" in text and "81%" in text and "--resize squeeze" in text
    assert data_of(lines, (64, 64), resize="squeeze").describe_cut() == ""
    assert data_of(lines[:1] + lines[3:], (64, 64)).describe_cut() == ""
    assert data_of(lines[:3], (24, 128)).describe_cut() == ""  # the pictures' own proportions
    for i in range(3):  # cut to the header, and turned
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (640, 120)).save(tmp_path / f"{i}.jpg", exif=exif)
        whole_file = (tmp_path / f"{i}.jpg").read_bytes()
        (tmp_path / f"{i}.jpg").write_bytes(whole_file[: whole_file.rindex(b"\xff\xda") + 14])
    assert data_of(lines[:3], (128, 24)).describe_cut() == ""
    assert "120×640" in data_of(lines[:3], (64, 64)).describe_cut()
    own = data_of([(np.zeros((20, 90, 3), np.uint8), 0), (Image.new("L", (90, 20)), 0)], (9, 9))
    assert "90×20" in own.describe_cut()
    for i in range(5):
        (tmp_path / f"{i}.jpg").write_bytes(b"\xff\xd8\xff" + bytes(i))
    assert data_of(lines, (64, 64)).describe_cut() == ""


@pytest.mark.parametrize("settings", [{}, dict(resize="squeeze"), dict(val_crop=0.5)])
def test_commands_read_pictures_as_validation_does(tmp_path, monkeypatch, settings):
    """evaluate, its sheet of mistakes and predict; export says how pictures become its input."""
    from utils import evaluate, export, predict

    monkeypatch.chdir(tmp_path)
    photo(120, 60).save("wide.png")
    Path("test.txt").write_text("0;wide.png\n1;wide.png\n")
    run = make_run("run", ["a", "b"], test_annotation_path="test.txt", **settings)
    expected = data_of(["0;wide.png"], (32, 32), False, **settings)[0][0].permute(2, 0, 1)[None]
    seen = []

    def score(model, images, targets, *rest):
        seen.append(images)
        return torch.eye(2)[: len(images)].flip(0), targets

    monkeypatch.setattr("utils.trained.score_batch", score)
    drawn = []
    sheet = evaluate.draw_contact_sheet
    monkeypatch.setattr(
        evaluate,
        "draw_contact_sheet",
        lambda images, *rest: drawn.extend(images) or sheet(images, *rest),
    )
    evaluate.evaluate(run, num_workers=0)
    predict.Classifier(run)("wide.png")
    assert torch.equal(predict.Classifier(run).read("wide.png")[0], expected)
    assert [len(images) for images in seen] == [2, 1]
    assert all(torch.equal(image, expected[0]) for images in seen for image in images)
    assert torch.equal(drawn[0].permute(2, 0, 1), expected[0])
    described = json.loads(export.describe_input(predict.Classifier(run).settings))
    assert described["resize"] == settings.get("resize", "crop")
    assert described["val_crop"] == settings.get("val_crop", 1)


def test_sample_set(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.plumbing.shapes.TRAIN", 40)
    monkeypatch.setattr("utils.plumbing.shapes.TEST", 20)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        draw_set(tmp_path / folder, SAMPLE)
    files = sorted(
        p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()
    )
    assert len(files) == 63 and len(SHAPES) >= 10
    assert all(
        (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files
    )


@pytest.mark.parametrize("place", ["a full disk", "a read-only disk"])
def test_the_sample_cannot_be_drawn(tmp_path, monkeypatch, place):
    """One sentence, and nothing left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.plumbing.sample.PROJECT", tmp_path)

    def fail(*where, **options):
        number = errno.ENOSPC if place == "a full disk" else errno.EROFS
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(
        "utils.plumbing.shapes.draw_set"
        if place == "a full disk"
        else "utils.plumbing.shapes.draft",
        fail,
    )
    with pytest.raises(UserError, match="model_data.*(No space left|Read-only)"):
        find_lists(dict(zip(NAMES, DEFAULT_PATHS)))
    assert not list(Path("model_data").iterdir())


def test_the_sample_may_be_drawn_by_two_at_once(tmp_path, monkeypatch):
    """The later one takes what the earlier has moved into place."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.plumbing.sample.PROJECT", tmp_path)

    def draw(folder, place):
        Path("model_data/shapes").mkdir()
        Path("model_data/shapes/train.txt").write_text("the other one's")

    monkeypatch.setattr("utils.plumbing.shapes.draw_set", draw)
    assert Path(find_lists(dict(zip(NAMES, DEFAULT_PATHS)))[1]).read_text() == "the other one's"
    assert [path.name for path in Path("model_data").iterdir()] == ["shapes"]


@pytest.mark.slow
def test_the_sample_is_no_task_for_a_linear_classifier(tmp_path):
    from sklearn.linear_model import LogisticRegression

    draw_set(tmp_path, SAMPLE)

    def load(split):
        rows = [
            line.partition(";") for line in (tmp_path / f"{split}.txt").read_text().splitlines()
        ]
        pictures = [
            Image.open(tmp_path / path.split("shapes/")[1]).reduce(2) for _, _, path in rows
        ]
        return np.stack([np.asarray(p, np.float32).ravel() / 255 - 0.5 for p in pictures]), [
            int(c) for c, _, _ in rows
        ]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 60 iterations are enough to see that it does not learn
        model = LogisticRegression(max_iter=60, C=0.01).fit(*load("train"))
    assert 0.1 < model.score(*load("test")) < 0.5


def test_few_of_the_sample_are_no_task_for_a_linear_classifier(tmp_path, monkeypatch):
    """Ridge regression on greys of 8 by 8, of few: what the long proof shows of them all."""
    monkeypatch.setattr("utils.plumbing.shapes.TRAIN", 600)
    monkeypatch.setattr("utils.plumbing.shapes.TEST", 200)
    draw_set(tmp_path, SAMPLE)
    sets = []
    for split in ("train", "test"):
        lines = (tmp_path / f"{split}.txt").read_text().splitlines()
        rows = [line.partition(";") for line in lines]
        pictures = [Image.open(tmp_path / path.split("shapes/")[1]) for _, _, path in rows]
        greys = [np.asarray(picture.convert("L").resize((8, 8)), float) for picture in pictures]
        inputs = np.stack(greys).reshape(len(rows), -1) / 255 - 0.5
        sets.append((inputs, np.array([int(class_id) for class_id, _, _ in rows])))
    (inputs, labels), (test_inputs, test_labels) = sets
    targets = np.eye(labels.max() + 1)[labels]
    solution = np.linalg.solve(inputs.T @ inputs + 10 * np.eye(64), inputs.T @ targets)
    assert ((test_inputs @ solution).argmax(1) == test_labels).mean() < 0.4


def test_a_data_set_travels_to_a_spawned_process(lines):
    """By pickle, with what it draws."""
    data = data_of(lines, (32, 32), True, "trivial", 0.5)
    other = ForkingPickler.loads(bytes(ForkingPickler.dumps(data)))
    for item in ((0, 0, 3), (1, 2, 5)):
        assert torch.equal(data[item][0], other[item][0]) and data[item][1:] == other[item][1:]
