import errno
import os
import pickle
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy.stats import ks_2samp
from torch.utils.data import DataLoader
from torchvision.transforms import RandomResizedCrop, v2

from utils.dataloader import AUGMENTATIONS, DataGenerator, EpochSampler, detection_collate
from utils.errors import UserError
from utils.pictures import MEAN, STD, centre_box, normalize, random_box, read_crop
from utils.sample_data import DEFAULT_PATHS, SHAPES, data_paths, draw_set
from utils.workers import batches_of, ignore_signals


def photo(width, height, seed=0):
    """Smooth structure at many scales, as photos have."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for cells in (4, 16, 64, 128):
        noise = rng.normal(size=(cells, cells, 3))
        for c in range(3):
            total[..., c] += np.asarray(Image.fromarray(noise[..., c].astype(np.float32)).resize((width, height), 3)) / cells ** .5
    return Image.fromarray((128 + 60 * total).clip(0, 255).astype(np.uint8))


def whole(height, width):
    return 0, 0, height, width


def plain(path, box, shape):
    top, left, height, width = box
    image = Image.open(path).convert("RGB")
    return v2.functional.pil_to_tensor(v2.functional.resized_crop(image, top, left, height, width, list(shape))).float()


@pytest.mark.parametrize("size, allowed", [((500, 375), 2), ((3264, 2448), 4), ((1200, 1600), 4)])
@pytest.mark.parametrize("decoder", ["torchvision's where it pays", "Pillow's alone"])
def test_crops_match_the_plain_pipeline(tmp_path, monkeypatch, size, allowed, decoder):
    if decoder == "Pillow's alone":
        monkeypatch.setattr("utils.pictures.decode_jpeg", None)
    photo(*size).save(tmp_path / "photo.jpg", quality=90)
    rng = random.Random(0)
    for box in [random_box(rng, 0.08, size[1], size[0]) for _ in range(8)] + [centre_box((224, 224), 0.875, size[1], size[0])]:
        ours = read_crop(tmp_path / "photo.jpg", (224, 224), lambda h, w: box)
        assert ours.shape == (224, 224, 3) and ours.dtype == torch.uint8
        theirs = plain(tmp_path / "photo.jpg", box, (224, 224))
        limit = allowed if min(box[2:]) >= 448 else 2
        assert (ours.permute(2, 0, 1).float() - theirs).abs().mean() <= limit, box


def test_reduced_decoding_keeps_the_resolution(tmp_path, monkeypatch):
    photo(1600, 1200).save(tmp_path / "photo.jpg")
    seen = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *args, box=None, **options: (
        seen.append((box[2] - box[0], box[3] - box[1])), resize(self, size, *args, box=box, **options))[1])
    for side in (448, 500, 896, 1000, 1200):
        read_crop(tmp_path / "photo.jpg", (224, 224), lambda h, w: (0, 0, side, side))
        assert min(seen[-1]) >= 224 and min(seen[-1]) < 448
    read_crop(tmp_path / "photo.jpg", (64, 224), lambda h, w: (0, 0, 1200, 470))
    assert seen[-1][0] >= 224 and seen[-1][1] >= 64


def corner_picture(width, height):
    """Red top left, green top right, blue bottom left, white bottom right."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle([0, 0, width // 2, height // 2], (255, 0, 0))
    draw.rectangle([width // 2, 0, width, height // 2], (0, 255, 0))
    draw.rectangle([0, height // 2, width // 2, height], (0, 0, 255))
    return image


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(60, 40), (900, 600)])
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_exif_orientation(tmp_path, orientation, size, ending):
    upright = corner_picture(*size)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that the camera's position made
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"turned.{ending}", exif=exif)
    seen = []
    crop = read_crop(tmp_path / f"turned.{ending}", (40, 60), lambda h, w: seen.append((w, h)) or (0, 0, h, w)).float()
    assert seen == [size]
    for (y, x), colour in {(5, 5): (255, 0, 0), (5, 54): (0, 255, 0), (34, 5): (0, 0, 255), (34, 54): (255,) * 3}.items():
        assert (crop[y, x] - torch.tensor(colour)).abs().max() < 60


GRADIENT = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))


@pytest.mark.parametrize("kind", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "I", "F", "YCbCr", "16-bit png", "L jpeg",
                                  "CMYK jpeg", "gif", "webp", "bmp", "P transparent", "tiny"])
@pytest.mark.parametrize("decoder", ["torchvision's where it pays", "Pillow's alone"])
def test_every_kind_of_picture(tmp_path, monkeypatch, kind, decoder):
    if decoder == "Pillow's alone":
        monkeypatch.setattr("utils.pictures.decode_jpeg", None)
    grey = Image.fromarray(GRADIENT)
    rgb = grey.convert("RGB")
    files = {"L": ("a.png", grey), "1": ("a.png", grey.convert("1")), "P": ("a.png", rgb.quantize(256)),
             "RGBA": ("a.png", rgb.convert("RGBA")), "LA": ("a.png", grey.convert("LA")),
             "CMYK": ("a.tif", rgb.convert("CMYK")), "I;16": ("a.tif", Image.fromarray(GRADIENT.astype(np.uint16) * 257)),
             "I": ("a.tif", Image.fromarray(GRADIENT.astype(np.int32) * 257)),
             "F": ("a.tif", Image.fromarray(GRADIENT.astype(np.float32) / 255)), "YCbCr": (None, rgb.convert("YCbCr")),
             "16-bit png": ("a.png", Image.fromarray(GRADIENT.astype(np.uint16) * 257)), "L jpeg": ("a.jpg", grey),
             "CMYK jpeg": ("a.jpg", rgb.convert("CMYK")), "gif": ("a.gif", grey), "webp": ("a.webp", rgb),
             "bmp": ("a.bmp", rgb), "P transparent": ("a.gif", grey.convert("P")), "tiny": ("a.png", Image.new("L", (1, 1)))}
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
        assert (crop.mean(2)[:, 2:] - torch.from_numpy(GRADIENT.astype(np.float32))[:, 2:]).abs().max() < 8


def test_random_boxes_are_torchvisions():
    rng = random.Random(0)
    for height, width in ((375, 500), (100, 900), (900, 100)):
        ours = np.array([random_box(rng, 0.08, height, width) for _ in range(4000)])
        theirs = np.array([RandomResizedCrop.get_params(torch.empty(3, height, width), [0.08, 1.0], [3 / 4, 4 / 3])
                           for _ in range(4000)])
        assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all() and ours.min() >= 0
        for part in range(4):
            assert ks_2samp(ours[:, part], theirs[:, part]).statistic < 0.05


def test_transparency_is_white():
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert read_crop(image, (8, 8), whole).min() == 255


def test_normalize():
    images = torch.randint(0, 256, (2, 3, 5, 6), dtype=torch.uint8)
    expected = v2.Normalize(MEAN, STD)(images / 255)
    for layout in (torch.channels_last, torch.contiguous_format):
        ours = normalize(images.contiguous(memory_format=layout), "cpu")
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5, check_stride=False)
        assert ours.is_contiguous(memory_format=layout)


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
        return DataGenerator(lines, (32, 40), True, augmentation, 0.5, seed=seed)[epoch, index][0]
    first = picture(1, 2, 3)
    assert first.shape == (32, 40, 3) and first.dtype == torch.uint8 and torch.equal(first, picture(1, 2, 3))
    assert any(not torch.equal(first, picture(1, epoch, 3)) for epoch in range(3, 12))
    assert any(not torch.equal(first, picture(seed, 2, 3)) for seed in range(2, 12))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_change_nothing(lines, context):
    data = DataGenerator(lines, (32, 32), True, "trivial", 0.5)
    def batches(**options):
        sampler = EpochSampler(len(data), 4, seed=3)
        sampler.set_epoch(2)
        return list(DataLoader(data, 4, sampler=sampler, collate_fn=detection_collate, worker_init_fn=ignore_signals, **options))
    expected = batches(num_workers=0)
    assert len(expected) == 5
    for ours, theirs in zip(batches(num_workers=2, multiprocessing_context=context), expected, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        assert ours[0].dtype == torch.uint8 and ours[0].is_contiguous(memory_format=torch.channels_last)


def test_lines_are_shared_tensors(lines):
    data = DataGenerator(lines, (32, 32))
    assert [data.name(i) for i in range(len(data))] == [line.rstrip("\n") for line in lines]
    assert data.source.packed.is_shared() and data.source.ends.is_shared()
    assert not any(isinstance(v, (list, np.ndarray)) and len(v) > 10 for v in vars(data).values())


def test_a_list_of_pictures_is_a_data_set_as_well():
    data = DataGenerator([(photo(40, 30), 0), (np.zeros((20, 20), np.uint8), 1)], (16, 16), random=False)
    assert len(data) == 2 and [data[i][1] for i in (0, 1)] == [0, 1] and data[1][0].shape == (16, 16, 3)


@pytest.mark.parametrize("number, batch, world", [(100, 10, 1), (103, 8, 2), (64, 64, 4), (127, 64, 2), (1000, 48, 3)])
def test_sampler_visits(number, batch, world):
    samplers = [EpochSampler(number, batch, rank, world, seed=5) for rank in range(world)]
    alone = EpochSampler(number, batch, seed=5)
    left_out = []
    for epoch in range(6):
        for sampler in [alone, *samplers]:
            sampler.set_epoch(epoch)
        shares = [[index for _, index in sampler] for sampler in samplers]
        assert all(len(share) == len(sampler) == number // batch * batch // world for share, sampler in zip(shares, samplers))
        visited = [index for share in shares for index in share]
        assert len(set(visited)) == len(visited) == number // batch * batch
        order = [index for _, index in alone]
        local = batch // world
        for step in range(number // batch):  # the same pictures in the same step, however many processes
            assert sorted(order[step * batch:(step + 1) * batch]) == sorted(
                index for share in shares for index in share[step * local:(step + 1) * local])
        left_out.append(set(range(number)) - set(visited))
        alone.set_epoch(epoch, 1)
        assert [index for _, index in alone] == order[batch:]
    assert all(not a & b for a, b in zip(left_out, left_out[1:]))


@pytest.mark.parametrize("number, world", [(10, 1), (11, 2), (1, 4), (7, 3)])
def test_validation_counts_every_picture_once(number, world):
    shares = [[index for _, index in EpochSampler(number, 4 * world, rank, world, shuffle=False)] for rank in range(world)]
    assert sorted(sum(shares, [])) == list(range(number))
    assert [len(EpochSampler(number, 4 * world, rank, world, shuffle=False)) for rank in range(world)] == list(map(len, shares))


@pytest.mark.parametrize("workers", [0, 2])
def test_crops_that_do_not_change_are_read_once(tmp_path, workers):
    """Also by workers, who share them; what is random stays so, and nothing differs."""
    lines = [f"{i % 3};{tmp_path / f'{i}.png'}" for i in range(20)]
    for i, line in enumerate(lines):
        photo(40, 30, i).save(line.partition(";")[2])
    def epochs(data, number):
        sampler = EpochSampler(len(data), 4, shuffle=data.random, seed=1)
        loader = DataLoader(data, 4, sampler=sampler, num_workers=workers, collate_fn=detection_collate,
                            worker_init_fn=ignore_signals, persistent_workers=workers > 0)
        for epoch in number:
            sampler.set_epoch(epoch)
            yield from batches_of(loader)
    plain, cached = (DataGenerator(lines, (24, 24), True, seed=3, cache_mb=size) for size in (0, 1))
    expected, first = list(epochs(plain, range(3))), epochs(cached, range(3))
    got = [next(first) for _ in range(len(lines) // 4)]
    assert cached.share_cached() == 1 and not plain.share_cached()
    for line in lines:
        os.remove(line.partition(";")[2])
    got += first
    assert all(torch.equal(a, b) for old, new in zip(expected, got, strict=True) for a, b in zip(old[:2], new[:2]))
    assert not any(batch[2] for batch in got) and len({flip.numpy().tobytes() for flip, _, _ in got}) == len(got)


def test_the_cache_has_its_limits(lines, monkeypatch):
    data = DataGenerator(lines, (300, 300), False, cache_mb=1)  # room for three
    kept = [data[i] for i in range(len(lines))]
    assert data.share_cached() == 3 / len(lines) and all(image.is_contiguous() for image, _, _ in kept)
    data.source = None
    assert all(torch.equal(data[i][0], kept[i][0]) and data[i][1] == kept[i][1] for i in range(3))
    assert not len(pickle.loads(pickle.dumps(DataGenerator(lines, (8, 8), cache_mb=1))).cache.class_ids)  # spawned workers have none
    for augmentation in AUGMENTATIONS:
        fixed = DataGenerator(lines, (8, 8), True, augmentation, cache_mb=1)
        fixed[0, 0]
        assert bool(fixed.share_cached()) == (augmentation in ("none", "flip"))
    def no_memory(*size):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")
    monkeypatch.setattr("mmap.mmap", no_memory)
    data = DataGenerator(lines, (8, 8), False, cache_mb=1)
    assert torch.equal(data[0][0], data[0][0]) and not data.share_cached()


def test_an_unreadable_picture_is_not_cached(tmp_path):
    data = DataGenerator([f"1;{tmp_path / 'later.png'}"], (8, 8), False, cache_mb=1)
    assert data[0][0] is None and data[0][2] and not data.share_cached()
    Image.new("RGB", (9, 9), "red").save(tmp_path / "later.png")
    assert data[0][0] is not None and data[0][1] == 1 and data.share_cached() == 1


def test_dataset_travels_to_other_processes(lines):
    data = pickle.loads(pickle.dumps(DataGenerator(["0;x\n"], (8, 8))))
    assert data.name(0) == "0;x"


def test_unreadable(lines, tmp_path):
    (tmp_path / "zero.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no picture")
    whole_file = open(lines[0].strip().partition(";")[2], "rb").read()
    (tmp_path / "cut.jpg").write_bytes(whole_file[:len(whole_file) // 2])
    bad = [f"2;{tmp_path / name}\n" for name in ("zero.jpg", "text.jpg", "cut.jpg", "vanished.png")]
    data = DataGenerator(lines + bad, (32, 32), True)
    for index in range(20, 24):
        image, class_id, unreadable = data[1, index]
        assert image.shape == (32, 32, 3) and unreadable[0][0] == index
        again = data[1, index]
        assert torch.equal(image, again[0]) and class_id == again[1]
    images, targets, unreadable = detection_collate([DataGenerator(bad + lines, (32, 32), False)[i] for i in range(6)])
    assert len(images) == len(targets) == 2 and [index for index, _ in unreadable] == [0, 1, 2, 3]
    images, targets, _ = detection_collate([DataGenerator(bad, (32, 32), False)[0]])
    assert len(images) == len(targets) == 0


def test_decompression_bomb(tmp_path, monkeypatch, lines):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    image, _, unreadable = DataGenerator(lines[:1], (8, 8), random=False)[0]
    assert image is None and "Bomb" in unreadable[0][1]


def test_sample_set(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.sample_data.TRAIN", 40)
    monkeypatch.setattr("utils.sample_data.TEST", 20)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        draw_set(tmp_path / folder)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == 63 and len(SHAPES) >= 10
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


@pytest.mark.parametrize("place", ["a full disk", "a read-only disk"])
def test_the_sample_cannot_be_drawn(tmp_path, monkeypatch, place):
    """One sentence, and nothing left behind."""
    monkeypatch.chdir(tmp_path)
    def fail(*where, **options):
        number = errno.ENOSPC if place == "a full disk" else errno.EROFS
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr("utils.sample_data.draw_set" if place == "a full disk" else "tempfile.mkdtemp", fail)
    with pytest.raises(UserError, match="model_data.*(No space left|Read-only)"):
        data_paths(*DEFAULT_PATHS)
    assert not list(Path("model_data").iterdir())


def test_the_sample_may_be_drawn_by_two_at_once(tmp_path, monkeypatch):
    """The later one takes what the earlier has moved into place."""
    monkeypatch.chdir(tmp_path)
    def draw(folder):
        Path("model_data/shapes").mkdir()
        Path("model_data/shapes/train.txt").write_text("the other one's")
    monkeypatch.setattr("utils.sample_data.draw_set", draw)
    assert Path(data_paths(*DEFAULT_PATHS)[1]).read_text() == "the other one's"
    assert [path.name for path in Path("model_data").iterdir()] == ["shapes"]


def test_the_sample_is_no_task_for_a_linear_classifier(tmp_path):
    from sklearn.linear_model import LogisticRegression
    draw_set(tmp_path)
    def load(split):
        rows = [line.partition(";") for line in (tmp_path / f"{split}.txt").read_text().splitlines()]
        pictures = [Image.open(tmp_path / path.split("shapes/")[1]).reduce(2) for _, _, path in rows]
        return np.stack([np.asarray(p, np.float32).ravel() / 255 - 0.5 for p in pictures]), [int(c) for c, _, _ in rows]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 60 iterations are enough to see that it does not learn
        model = LogisticRegression(max_iter=60, C=0.01).fit(*load("train"))
    assert 0.1 < model.score(*load("test")) < 0.5
