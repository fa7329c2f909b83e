"""Weights under other people's names: timm's, Microsoft's, older ones, and back to timm."""

import re

import pytest
import torch
from torch import nn
from torchvision import models

from nets import get_model
from nets._foreign import TABLES, best_fit, translate
from nets._weights import load_matching, load_weights
from tests.helpers import same

# torchvision's name, timm's, the pictures' size: the smallest of each family, then those whose
# scores take long.
SMALLEST = """densenet121 densenet121 64; resnet18 resnet18 64; convnext_tiny convnext_tiny 64"""
REST = """
swin_t swin_tiny_patch4_window7_224 224; vit_b_32 vit_base_patch32_224 224;
inception_v3 inception_v3 80; resnet34 resnet34 64; resnet50 resnet50 64;
resnet101 resnet101 64; resnet152 resnet152 64; resnext50_32x4d resnext50_32x4d 64;
resnext101_32x8d resnext101_32x8d 64; resnext101_64x4d resnext101_64x4d 64;
wide_resnet50_2 wide_resnet50_2 64; wide_resnet101_2 wide_resnet101_2 64;
densenet161 densenet161 64; densenet169 densenet169 64; densenet201 densenet201 64;
convnext_small convnext_small 64; convnext_base convnext_base 64;
convnext_large convnext_large 64; swin_s swin_small_patch4_window7_224 224;
swin_b swin_base_patch4_window7_224 224; vit_b_16 vit_base_patch16_224 224;
vit_b_16 deit_base_patch16_224 224; vit_l_16 vit_large_patch16_224 224;
vit_l_32 vit_large_patch32_224 224; vit_h_14 vit_huge_patch14_224 224"""
PAIRS = [line.split() for line in f"{SMALLEST};{REST}".split(";")]
SLOW = {line.split()[0] for line in REST.split(";")}


@torch.no_grad()
def random_weights(model, size):
    """Every scale, bias, table and statistic of `model` becomes a value of its own, the scores stay
    near one.
    """
    for name, value in model.state_dict().items():
        small = value.dim() <= 1 or re.search("table|embed|token|scale", name)
        if small and value.is_floating_point() and "running" not in name:
            value.add_(torch.randn_like(value) * 0.1)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        model.train()(torch.randn(4, 3, size, size))
    return model.eval()


@pytest.fixture
def timm():
    return pytest.importorskip("timm")


@torch.no_grad()
def check_scores(theirs, ours, size, path, capsys):
    """timm's network's file, loaded as model_path is, gives timm's scores."""
    random_weights(theirs, size)
    torch.save(
        {"state_dict": dict(sorted(theirs.state_dict().items()))}, path
    )  # the order says nothing
    assert load_matching(ours, load_weights(path), "timm.pth") == []
    path.unlink()
    out = capsys.readouterr().out
    assert "WARNING" not in out and re.search(
        r"(\d+) of \1 tensors loaded, from \1 of the file", out
    )
    pictures = torch.randn(2, 3, size, size)
    given = pictures
    if isinstance(
        ours, models.Inception3
    ):  # it turns ImageNet's normalisation into that of timm's itself
        mean, std = (
            torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        given = (pictures * std + mean - 0.5) / 0.5
    expected, scores = theirs(given), ours.eval()(pictures)
    assert expected.std() > 1e-2 and (scores - expected).abs().max() < 1e-3 * max(
        1, expected.abs().max()
    )


@pytest.mark.parametrize(
    "ours, theirs, size",
    [
        pytest.param(*pair, id=pair[1], marks=[pytest.mark.slow] * (pair[0] in SLOW))
        for pair in PAIRS
    ],
)
def test_scores_of_timm(timm, ours, theirs, size, tmp_path, capsys):
    torch.manual_seed(0)
    ours = get_model(ours, 5, [int(size), int(size)])
    check_scores(
        timm.create_model(theirs, num_classes=5), ours, int(size), tmp_path / "timm.pth", capsys
    )


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_scores_of_small_transformers(timm, family, tmp_path, capsys):
    """The same for transformers of few channels, as the real ones take long."""
    torch.manual_seed(0)
    if family == "vit":
        ours = models.VisionTransformer(
            64, 16, num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5
        )
        theirs = timm.models.VisionTransformer(
            64, 16, depth=3, num_heads=2, embed_dim=32, mlp_ratio=2, num_classes=5
        )
        return check_scores(theirs, ours, 64, tmp_path / "timm.pth", capsys)
    ours = small_swin()
    theirs = timm.models.SwinTransformer(
        img_size=224,
        window_size=7,
        embed_dim=16,
        depths=[2, 2, 3, 2],
        num_heads=[1, 2, 4, 8],
        num_classes=5,
    )
    check_scores(theirs, ours, 224, tmp_path / "timm.pth", capsys)


def test_names_of_timm(timm, monkeypatch):
    """Where scores take long, without memory: each tensor finds its place in its shape."""
    empty = torch.empty
    for ours, theirs, size in PAIRS[len(SMALLEST.split(";")) :][:3]:
        with torch.device("meta"):
            state = timm.create_model(theirs, num_classes=5).state_dict()
        with monkeypatch.context() as without:
            without.setattr(
                torch,
                "empty",
                lambda *shape, **options: empty(*shape, **{**options, "device": "meta"}),
            )
            model = get_model(ours, 5, [int(size), int(size)]).to("meta")
        named = best_fit(model, state)[0]
        assert all(named[k].shape == v.shape for k, v in model.named_parameters()), ours


@pytest.mark.parametrize(
    "name", ["vit_b_32", "swin_t", "swin_v2_t", "convnext_tiny", "densenet121"]
)
def test_names_of_torchvision_stay(name):
    with torch.device("meta"):
        model = models.get_model(name)
    assert isinstance(model, tuple(TABLES)) and list(translate(model, model.state_dict())) == list(
        model.state_dict()
    )


# Microsoft's names, and other spellings of them


def microsofts(state, depths):
    """torchvision's Swin under Microsoft's names, with the buffers that its files hold as well."""
    names = [
        ("features.0.0.", "patch_embed.proj."),
        ("features.0.2.", "patch_embed.norm."),
        *((f"features.{2 * i + 2}.", f"layers.{i}.downsample.") for i in range(3)),
        *(
            (f"features.{2 * i + 1}.{j}.", f"layers.{i}.blocks.{j}.")
            for i in range(4)
            for j in range(depths[i])
        ),
    ]
    written = {}
    for key, value in state.items():
        for ours, theirs in names:
            if key.startswith(ours):
                key = theirs + key[len(ours) :].replace("mlp.0.", "mlp.fc1.").replace(
                    "mlp.3.", "mlp.fc2."
                )
                break
        written[key] = value.view(49, 49) if key.endswith("relative_position_index") else value
    written["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    return written


def small_swin():
    torch.manual_seed(0)
    return models.SwinTransformer(
        [4, 4], 16, [2, 2, 3, 2], [1, 2, 4, 8], window_size=[7, 7], num_classes=5
    ).eval()


@torch.no_grad()
def test_microsofts_swin(tmp_path, capsys):
    source, target = random_weights(small_swin(), 64), small_swin()
    torch.save({"model": microsofts(source.state_dict(), [2, 2, 3, 2])}, tmp_path / "swin.pth")
    assert load_matching(target, load_weights(tmp_path / "swin.pth"), "swin.pth") == []
    out = capsys.readouterr().out
    assert "WARNING" not in out
    pictures = torch.randn(2, 3, 100, 64)
    assert torch.equal(source(pictures), target(pictures))


def test_swin_with_another_window(capsys):
    """Its tables of positions are for that window alone."""
    state = microsofts(small_swin().state_dict(), [2, 2, 3, 2])
    tables = [key for key in state if key.endswith("relative_position_bias_table")]
    state.update({key: torch.zeros(529, state[key].shape[1]) for key in tables})
    assert len(load_matching(small_swin(), state, "window 12")) == len(tables) == 9
    assert "WARNING: the file lacks 9 tensors of the backbone" in capsys.readouterr().out


def small_vit(size=64):
    torch.manual_seed(0)
    return models.VisionTransformer(
        size, 16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5
    )


def test_vit_of_another_size(capsys):
    source, target = random_weights(small_vit(), 64), small_vit(96)
    timms = {}
    for key, value in source.state_dict().items():
        for ours, theirs in (
            ("class_token", "cls_token"),
            ("encoder.pos_embedding", "pos_embed"),
            ("conv_proj", "patch_embed.proj"),
            ("encoder.layers.encoder_layer_", "blocks."),
            ("encoder.ln", "norm"),
            ("heads.head", "head"),
            ("ln_", "norm"),
            ("self_attention.in_proj_", "attn.qkv."),
            ("self_attention.out_", "attn."),
            ("mlp.0", "mlp.fc1"),
            ("mlp.3", "mlp.fc2"),
        ):
            key = key.replace(ours, theirs)
        timms[key] = value
    assert "blocks.0.attn.qkv.weight" in timms and load_matching(target, timms, "vit") == []
    expected = models.vision_transformer.interpolate_embeddings(96, 16, source.state_dict())[
        "encoder.pos_embedding"
    ]
    assert torch.equal(target.encoder.pos_embedding, expected)
    distilled = {**timms, "pos_embed": torch.zeros(1, 18, 32), "dist_token": torch.zeros(1, 1, 32)}
    assert load_matching(target, distilled, "distilled") == ["encoder.pos_embedding"]
    assert "WARNING: the file lacks 1 tensors of the backbone" in capsys.readouterr().out


def test_a_table_of_another_kind_of_number():
    """What is resized is not read as floats either."""
    state = small_vit().state_dict()
    whole = {**state, "encoder.pos_embedding": state["encoder.pos_embedding"].to(torch.int8)}
    assert load_matching(small_vit(96), whole, "int8") == ["encoder.pos_embedding"]


def test_older_files_of_torchvision():
    """Published ones too.

    ViT's MLP had other names, and without a version mark MNASNet refuses to load at all.
    """
    source = random_weights(small_vit(), 64).state_dict()
    old = {
        re.sub(r"mlp\.([03])\.", lambda m: f"mlp.linear_{1 + int(m[1]) // 3}.", k): v
        for k, v in source.items()
    }
    target = small_vit()
    assert (
        old.keys() != source.keys()
        and load_matching(target, old, "old") == []
        and same(target.state_dict(), source)
    )
    source = get_model("mnasnet0_5", 3, [32, 32]).state_dict()
    target = get_model("mnasnet0_5", 3, [32, 32])
    older = {k: v for k, v in source.items() if not k.endswith("num_batches_tracked")}
    assert load_matching(target, older, "old") == [] and torch.equal(
        target.layers[0].weight, source["layers.0.weight"]
    )


def test_metas_convnext(capsys):
    torch.manual_seed(0)
    block = models.convnext.CNBlockConfig
    source, target = (
        models.ConvNeXt(
            [block(8, 16, 2), block(16, 24, 1), block(24, 32, 2), block(32, None, 1)], num_classes=5
        ).eval()
        for _ in range(2)
    )
    random_weights(source, 64)
    written = {}
    for key, value in source.state_dict().items():
        for ours, theirs in (
            (r"features\.0\.(\d)", r"downsample_layers.0.\1"),
            (r"classifier\.0", "norm"),
            (r"classifier\.2", "head"),
            (r"block\.0", "dwconv"),
            (r"block\.2", "norm"),
            (r"block\.3", "pwconv1"),
            (r"block\.5", "pwconv2"),
            ("layer_scale", "gamma"),
        ):
            key = re.sub(ours, theirs, key)
        key = re.sub(r"features\.([246])", lambda m: f"downsample_layers.{int(m[1]) // 2}", key)
        key = re.sub(r"features\.([1357])", lambda m: f"stages.{int(m[1]) // 2}", key)
        written[key] = value.flatten() if key.endswith("gamma") else value
    assert load_matching(target, written, "meta") == [] and same(
        source.state_dict(), target.state_dict()
    )
