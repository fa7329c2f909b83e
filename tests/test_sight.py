"""What of a picture the network sees: told by pictures whose colours say where each pixel was."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from tests.helpers import data_of
from utils.dataloader import POLICIES
from utils.pictures import random_box, read_crop
from utils.recipe import Recipe
from utils.sampler import EpochSampler

SHAPE = (32, 40)  # height, width


def positions(height, width):
    """A picture in which red is a pixel's column and green its row, from 0 to 255; blue is 128."""
    pixels = np.full((height, width, 3), 128, np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).round()
    pixels[..., 1] = np.linspace(0, 255, height).round()[:, None]
    return Image.fromarray(pixels)


def draws(source, number=200, shape=SHAPE, **options):
    """The pictures that training sees of the first one of `source`, in so many epochs."""
    data = data_of(source, shape, True, **options)
    return [data[epoch, 0, 0][0] for epoch in range(number)]


def extent(seen, height, width):
    """(left, top, width, height), in shares of the whole, of what is seen of `positions`."""
    red, green = seen[..., 0].float() / 255, seen[..., 1].float() / 255
    half = 0.5 / seen.shape[1], 0.5 / seen.shape[0]
    across = (red[:, -1] - red[:, 0]).abs().mean() / (1 - 2 * half[0])
    down = (green[-1] - green[0]).abs().mean() / (1 - 2 * half[1])
    return red.mean() - across / 2, green.mean() - down / 2, across, down


@pytest.fixture(scope="module")
def picture():
    return positions(64, 80)


def kinds(pictures):
    """How many of each of the different pictures, the most frequent first."""
    texts = [picture.numpy().tobytes() for picture in pictures]
    return sorted((texts.count(text) for text in set(texts)), reverse=True)


def test_none_changes_nothing(picture):
    assert kinds(draws([(picture, 0)], augmentation="none")) == [200]


def test_flip_mirrors_every_second_picture_left_and_right(picture):
    plain = draws([(picture, 0)], 1, augmentation="none")[0]
    seen = draws([(picture, 0)], augmentation="flip")
    assert len(kinds(seen)) == 2 and 70 <= kinds(seen)[1]
    assert all(torch.equal(one, plain) or torch.equal(one, plain.flip(1)) for one in seen)


def test_flips_turn_it_upside_down_as_well(picture):
    plain = draws([(picture, 0)], 1, augmentation="none")[0]
    seen = kinds(draws([(picture, 0)], augmentation="flips"))
    assert len(seen) == 4 and seen[-1] >= 25
    wanted = [plain.flip(axes) for axes in ((), (0,), (1,), (0, 1))]
    for one in draws([(picture, 0)], 20, augmentation="flips"):
        assert any(torch.equal(one, other) for other in wanted)


@pytest.mark.parametrize("random", [True, False])
@pytest.mark.parametrize("val_crop", [1.0, 0.5])
@pytest.mark.parametrize("size", [(64, 80), (64, 160), (128, 80)])
def test_the_centre_is_seen(random, val_crop, size):
    """The largest box of the shape's proportions, times val_crop, in the middle."""
    data = data_of([(positions(*size), 0)], SHAPE, random, "none", val_crop=val_crop)
    height, width = size
    scale = min(height / 32, width / 40) * val_crop
    across, down = scale * 40 / width, scale * 32 / height
    expected = 0.5 - across / 2, 0.5 - down / 2, across, down
    assert extent(data[0, 0, 0][0], *size) == pytest.approx(expected, abs=0.02)


def test_a_squeezed_picture_is_seen_whole():
    data = data_of([(positions(64, 240), 0)], SHAPE, False, resize="squeeze")
    assert extent(data[0][0], 64, 240) == pytest.approx((0, 0, 1, 1), abs=0.02)


@pytest.mark.parametrize("smallest, least", [(0.08, 0.0), (0.6, 0.55)])
def test_random_crops_keep_their_share(picture, smallest, least):
    areas = []
    for one in draws([(picture, 0)], 120, augmentation="crop", crop_scale=smallest):
        left, top, across, down = (float(value) for value in extent(one, 64, 80))
        areas.append(across * down)
        assert min(left, top) > -0.03 and max(left + across, top + down) < 1.03
        assert 0.7 < across / down < 1.4  # of the proportions that the network sees: 80 / 64
    assert least < min(areas) and max(areas) > 0.85
    assert (min(areas) < 0.25) == (smallest == 0.08)


def test_random_crops_of_a_long_picture_are_not_stretched():
    """More than scores are, where input_shape has the picture's proportions."""
    long = positions(24, 128)
    areas = []
    for one in draws([(long, 0)], 60, (24, 128), augmentation="crop", crop_scale=0.5):
        _, _, across, down = (float(value) for value in extent(one, 24, 128))
        areas.append(across * down)
        assert 0.7 < across / down < 1.4
    assert min(areas) > 0.4 and max(areas) > 0.85


@pytest.mark.parametrize("smallest", [0.08, 0.8, 1.0])
def test_random_crops_of_wide_pictures_are_random(smallest):
    """Their share is one of the largest box that fits, or hardly any would."""
    torch.manual_seed(1)
    boxes = {random_box(smallest, 1080, 1920) for _ in range(100)}
    assert len(boxes) > 50
    assert min(height * width for _, _, height, width in boxes) > smallest * 1080**2 * 0.99


def test_random_crops_are_everywhere(picture):
    seen = [extent(one, 64, 80) for one in draws([(picture, 0)], 120, augmentation="crop")]
    lefts, tops = ([float(one[i]) for one in seen] for i in (0, 1))
    for places in (lefts, tops):
        assert min(places) < 0.1 and max(places) > 0.5
    mirrored = [
        bool(one[0, 0, 0] > one[0, -1, 0]) for one in draws([(picture, 0)], augmentation="crop")
    ]
    assert 70 <= sum(mirrored) <= 130


@pytest.mark.parametrize("ending", ["png", "jpg"])
@pytest.mark.parametrize("decoder", ["torchvision's where it pays", "Pillow's alone"])
def test_fine_stripes_become_grey(tmp_path, monkeypatch, ending, decoder):
    """Made small, a picture is averaged; taking every so-manieth pixel would leave stripes."""
    if decoder == "Pillow's alone":
        monkeypatch.setattr("utils.pictures.decode_jpeg", None)
    pixels = np.zeros((180, 180, 3), np.uint8)
    pixels[:, ::2] = 255
    path = tmp_path / f"stripes.{ending}"
    Image.fromarray(pixels).save(path, **({"quality": 95} if ending == "jpg" else {}))
    seen = read_crop(path, (50, 50), lambda height, width: (0, 0, height, width)).float()
    assert (seen - 127.5).abs().max() < 32 and abs(seen.mean() - 127.5) < 4


def test_colours_keep_their_order(tmp_path):
    for ending in ("png", "jpg"):
        Image.new("RGB", (90, 90), (200, 100, 20)).save(tmp_path / f"a.{ending}")
        seen = read_crop(tmp_path / f"a.{ending}", (30, 30), lambda h, w: (0, 0, h, w))
        assert seen.float().mean((0, 1)).tolist() == pytest.approx([200, 100, 20], abs=3)


def test_erasing_blanks_with_the_mean():
    """In about as many pictures as it is asked for, at most a third of each."""
    white = Image.new("RGB", (40, 32), "white")
    options = dict(augmentation="none", mean=[0.2, 0.4, 0.8], random_erasing=0.25)
    changed = [one for one in draws([(white, 0)], **options) if (one != 255).any()]
    assert 30 <= len(changed) <= 70
    for one in changed:
        blank = one[(one != 255).any(2)]
        assert blank.unique(dim=0).tolist() == [[51, 102, 204]]
        assert 0.01 < len(blank) / (32 * 40) < 0.36


def test_the_policies_are_torchvisions():
    assert POLICIES == {
        "trivial": v2.TrivialAugmentWide,
        "rand": v2.RandAugment,
        "auto": v2.AutoAugment,
        "aug_mix": v2.AugMix,
    }


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_changes_what_is_cropped(picture, policy):
    crops = draws([(picture, 0)], 20, augmentation="crop")
    seen = draws([(picture, 0)], 20, augmentation=policy)
    changed = [not torch.equal(one, other) for one, other in zip(seen, crops)]
    assert sum(changed) >= 10


def mixed_batches(number=60, **settings):
    torch.manual_seed(0)
    mix = Recipe({"mixup_alpha": 0.0, "cutmix_alpha": 0.0, **settings}, None, 4).mix
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 16, 16).clone()
    return [mix(images, torch.arange(4)) for _ in range(number)]


def is_pasted(images):
    """Whether every pixel is one of a picture, and not a blend."""
    return bool((images == images.round()).all())


def test_cutmix_pastes_and_mixup_blends():
    pasted = [is_pasted(images) for images, _ in mixed_batches(cutmix_alpha=1.0)]
    blended = [not is_pasted(images) for images, _ in mixed_batches(mixup_alpha=1.0)]
    both = [is_pasted(images) for images, _ in mixed_batches(mixup_alpha=1.0, cutmix_alpha=1.0)]
    assert all(pasted) and all(blended) and 15 <= sum(both) <= 45


@pytest.mark.parametrize("name", ["mixup_alpha", "cutmix_alpha"])
def test_the_shares_are_those_of_the_pixels(name):
    for images, shares in mixed_batches(**{name: 1.0}):
        seen = images.mean((1, 2, 3))
        assert torch.allclose((shares * torch.arange(4.0)).sum(1), seen, atol=1e-4)
    alphas = [float(shares.max(1).values.mean()) for _, shares in mixed_batches(**{name: 0.1})]
    assert np.mean(alphas) > 0.78  # Beta(0.1, 0.1) is near 0 or 1; even shares have 0.75


def orders(**options):
    sampler = EpochSampler(50, 8, **options)
    found = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        found.append([index for _, _, index in sampler])
    return found


def test_each_epoch_has_its_order():
    one, again, other = orders(seed=1), orders(seed=1), orders(seed=2)
    assert one == again and all(a != b for a, b in zip(one, other))
    assert one[0] != one[1] != one[2]
    assert all(len(set(order)) == 48 for order in one)
    assert len(set(one[0]) & set(one[1])) < 48  # what is left out changes as well
    assert set(one[0]) != set(other[0])
    ranks = [orders(seed=1, rank=rank, world_size=2) for rank in (0, 1)]
    for epoch in range(3):
        assert ranks[0][epoch] == one[epoch][::2] and ranks[1][epoch] == one[epoch][1::2]
    assert orders(shuffle=False) == [list(range(50))] * 3
