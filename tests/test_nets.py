import copy
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn
from torchvision import models

import nets
from nets import get_model, head_layers, is_transformer, profile
from nets._weights import load_file, load_matching, load_weights
from tests.helpers import ROOT, environment, write_network
from utils.optimizer import fit_lr
from utils.plumbing.errors import UserError
from utils.recipe import EMA

ALL = models.list_models(module=models)
SMALLEST = {"inception_v3": 80, "maxvit_t": 224, "vit_h_14": 56}
OF_EACH_FAMILY = """alexnet convnext_tiny densenet121 efficientnet_b0 googlenet inception_v3
maxvit_t mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_x_400mf resnet18 shufflenet_v2_x0_5
squeezenet1_1 swin_t swin_v2_t vgg11 vit_b_32""".split()


@pytest.fixture
def no_memory(monkeypatch):
    """Layers get their weights on the meta device, so that ViT-H costs nothing."""
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, **options: empty(*size, **{**options, "device": "meta"})
    )


def slow_unless_quick(name):
    return pytest.param(name, marks=[pytest.mark.slow] * (name not in OF_EACH_FAMILY))


@pytest.mark.parametrize("name", map(slow_unless_quick, ALL))
def test_every_torchvision_network(name, no_memory):
    size = SMALLEST.get(name, 64)
    model = get_model(name, 7, [size, size])
    new_head = {k for k, v in model.named_parameters() if v.shape[0] == 7}  # no layer besides
    transformer = name.startswith(("vit_", "swin_", "maxvit_"))
    assert is_transformer(model) == transformer
    rates = dict(Init_lr=1e-6, Min_lr=1e-8, optimizer_type="adam")
    lowest, _ = fit_lr(rates, 1, is_transformer(model))
    assert lowest == (1e-5 if transformer else 1e-4)
    model.freeze_backbone()
    trainable = {k for k, v in model.named_parameters() if v.requires_grad}
    assert {k.rpartition(".")[0] for k in new_head} == head_layers(model)
    assert trainable >= new_head and {k.rpartition(".")[0] for k in trainable} == head_layers(model)
    model.train()
    modes = {name: module.training for name, module in model.named_modules() if name}
    assert model.training and {name for name in modes if modes[name]} == head_layers(model)
    model.Unfreeze_backbone()
    assert all(p.requires_grad for p in model.parameters()) and all(
        m.training for m in model.modules()
    )
    parameters, flops = profile(model, name, [size, size], 7)
    assert parameters == sum(p.numel() for p in model.parameters()) and flops > 0


def test_there_are_eighty():
    assert len(ALL) >= 80 and set(OF_EACH_FAMILY) <= set(ALL)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ("mobilenetv2", "mobilenet_v2"),
        ("swin_transformer_tiny", "swin_t"),
        ("swin_transformer_small", "swin_s"),
        ("swin_transformer_base", "swin_b"),
    ],
)
def test_documented_names(ours, theirs, no_memory):
    expected = models.get_model(theirs, num_classes=3).state_dict()
    assert {k: v.shape for k, v in get_model(ours, 3).state_dict().items()} == {
        k: v.shape for k, v in expected.items()
    }


def test_frozen_statistics_stay_still():
    model = get_model("resnet18", 3, [32, 32])
    model.freeze_backbone()
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(torch.randn(4, 3, 32, 32))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.Unfreeze_backbone()
    model(torch.randn(4, 3, 32, 32))
    assert not torch.equal(model.bn1.running_mean, before["bn1.running_mean"])


def own_network(monkeypatch, folder, name, source):
    """Build the network of a file in `folder`, as if it stood in nets/."""
    monkeypatch.setattr(nets, "__path__", [*nets.__path__, str(folder)])
    monkeypatch.setattr(nets, "OWN", [name])
    (folder / f"{name}.py").write_text(source)
    return get_model(name, 3, [8, 8])


FIXED = """from torch import nn


class Net(nn.Sequential):
    head_names = ["2"]


def {name}(num_classes, input_shape):
    head = nn.Sequential(nn.BatchNorm1d(192), nn.Dropout(0.5), nn.Linear(192, num_classes))
    table = nn.Linear(192, 192)
    table.weight.requires_grad_(False)
    return Net(nn.Flatten(), table, head)
"""


def test_what_a_network_has_fixed_stays_fixed(tmp_path, monkeypatch):
    """And while the backbone is frozen, a head of several layers trains as ever."""
    model = own_network(monkeypatch, tmp_path, "fixed", FIXED.format(name="fixed"))
    for _ in range(2):
        model.Unfreeze_backbone()
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained == ["1.bias", "2.0.weight", "2.0.bias", "2.2.weight", "2.2.bias"]
        model.freeze_backbone()
        model.freeze_backbone()
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained == ["2.0.weight", "2.0.bias", "2.2.weight", "2.2.bias"]
    pictures = torch.randn(16, 3, 8, 8)
    model.train()(pictures)
    assert model[2][1].training and not model[1].training and model[2][0].num_batches_tracked == 1
    model.eval()(pictures)
    assert not model[2][1].training and model[2][0].num_batches_tracked == 1


def test_a_network_with_tensors_of_five_axes():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(1, 1, 3))
    assert nets.to_device(model, "cpu") is model
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["vit_tiny", "googlenet", "maxvit_t", "mobilenetv2"])
def test_an_own_network_may_have_any_name(tmp_path, monkeypatch, name):
    model = own_network(monkeypatch, tmp_path, name, FIXED.format(name=name))
    assert type(model).__name__ == "Net" and model(torch.randn(2, 3, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_no_auxiliary_outputs(name):
    model = get_model(name, 4, [80, 80])
    for freeze in (model.Unfreeze_backbone, model.freeze_backbone):
        freeze()
        assert model.train()(torch.randn(2, 3, 80, 80)).shape == (2, 4)
    getattr(models, name)(num_classes=4, aux_logits=False, init_weights=True).load_state_dict(
        model.state_dict()
    )


def test_unknown_name_and_sizes():
    with pytest.raises(UserError, match="resnet18"):
        get_model("resnet81", 2)
    with pytest.raises(
        UserError, match=r"input_shape = .* is too small \(or of a shape that does not fit\)"
    ):
        profile(get_model("densenet121", 2, [16, 16]), "densenet121", [16, 16], 2)


def test_profile_counts_flops():
    _, flops = profile(get_model("resnet18", 1000, [224, 224]), "resnet18", [224, 224], 1000)
    assert flops == pytest.approx(2 * 1.814e9, rel=0.01)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch.hub's cache in a new folder."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def cached(hub, name, model):
    torch.save(
        model.state_dict(), hub / models.get_model_weights(name).DEFAULT.url.rpartition("/")[2]
    )


def test_pretrained(hub, capsys):
    published = models.resnet18()
    cached(hub, "resnet18", published)
    model = get_model("resnet18", 5, [64, 64], pretrained=True)
    for name, value in model.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(value, published.state_dict()[name]), name
    assert "120 of 122" in capsys.readouterr().out


class Published:
    """Weights of torchvision that want another normalisation, as efficientnet_v2_l's do."""

    transforms = models.EfficientNet_V2_L_Weights.DEFAULT.transforms

    def get_state_dict(**options):
        return models.resnet18().state_dict()


def test_pretrained_with_another_normalisation(monkeypatch, capsys):
    monkeypatch.setattr(
        models, "get_model_weights", lambda name: SimpleNamespace(DEFAULT=Published)
    )
    settings = {"mean": [0.485, 0.456, 0.406], "std": (0.5, 0.5, 0.5)}
    nets.load_pretrained(get_model("resnet18", 5, [64, 64]), "resnet18", settings)
    out = capsys.readouterr().out
    assert "WARNING" in out and "trained with mean = [0.5, 0.5, 0.5]" in out and "std" not in out
    settings["mean"] = [0.5, 0.5, 0.5]
    nets.load_pretrained(get_model("resnet18", 5, [64, 64]), "resnet18", settings)
    assert "WARNING" not in capsys.readouterr().out


def test_own_weights_with_another_normalisation(tmp_path, capsys):
    model = get_model("resnet18", 3, [32, 32])
    torch.save(model.state_dict(), tmp_path / "w.pth")
    config = {"class_names": ["a", "b", "c"], "settings": {"mean": [0.5] * 3, "std": [0.2] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = {"mean": [0.5] * 3, "std": [0.25] * 3}
    load_file(model, str(tmp_path / "w.pth"), ["a", "b", "c"], settings)
    out = capsys.readouterr().out
    assert "trained with std = [0.2, 0.2, 0.2], not [0.25, 0.25, 0.25]" in out
    assert "mean" not in out
    for other in ("x", 3, [None], [[0.5]]):  # of another program
        config["settings"]["std"] = other
        (tmp_path / "config.json").write_text(json.dumps(config))
        load_file(model, str(tmp_path / "w.pth"), ["a", "b", "c"], settings)


def test_pretrained_vit_at_another_size(hub):
    published = models.vit_b_32()
    nn.init.normal_(published.encoder.pos_embedding)
    cached(hub, "vit_b_32", published)
    model = get_model("vit_b_32", 5, [64, 64], pretrained=True)
    expected = models.vision_transformer.interpolate_embeddings(64, 32, published.state_dict())
    assert torch.equal(model.encoder.pos_embedding, expected["encoder.pos_embedding"])
    assert torch.equal(model.conv_proj.weight, published.conv_proj.weight)


def test_pretrained_without_network(hub, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match=r"(?s)resnet18-f37072fd.pth.*pretrained = False"):
        get_model("resnet18", 2, [32, 32], pretrained=True)
    with pytest.raises(UserError, match="my own|of your own|not a network"):
        get_model("my own", 2, [32, 32], pretrained=True)


def test_model_path(tmp_path, capsys):
    source, target = get_model("resnet18", 9, [32, 32]), get_model("resnet18", 4, [32, 32])
    torch.save(
        {"state_dict": {"module._orig_mod." + k: v for k, v in source.state_dict().items()}},
        tmp_path / "w.pth",
    )
    missed = load_matching(target, load_weights(tmp_path / "w.pth"), "w.pth")
    assert missed == ["fc.weight", "fc.bias"] and torch.equal(
        target.conv1.weight, source.conv1.weight
    )
    out = capsys.readouterr().out
    assert "120 of 122" in out and "normal" in out and "WARNING" not in out
    half = {k: v for k, v in source.state_dict().items() if not k.startswith("layer4")}
    load_matching(target, half, "half")
    assert "WARNING" in capsys.readouterr().out
    with pytest.raises(UserError, match="none of"):
        load_matching(target, get_model("alexnet", 4, [64, 64]).state_dict(), "w.pth")


def test_whose_head(tmp_path, capsys):
    """Weights files name no classes: a run's folder does, and otherwise it is said."""
    source = get_model("resnet18", 3, [32, 32])
    torch.save(source.state_dict(), tmp_path / "w.pth")

    def loaded(names):
        model = get_model("resnet18", 3, [32, 32])
        load_file(model, str(tmp_path / "w.pth"), names)
        out = capsys.readouterr().out
        assert (
            torch.equal(model.fc.weight, source.fc.weight)
            == ("the head is taken as it is" in out)
            != ("starts anew" in out)
        )
        return out

    assert "the head is taken as it is: its classes must be yours, in this order" in loaded(
        ["a", "b", "c"]
    )
    (tmp_path / "config.json").write_text('{"class_names": ["a", "b", "c"], "settings": {}}')
    assert "the head is taken as it is" in loaded(
        ["a", "b", "c"]
    ) and "the head is taken as it is" in loaded(None)
    for others in (["b", "a", "c"], ["x", "y", "z"]):
        assert "the head is left out, as its classes were ['a', 'b', 'c']" in loaded(others)
    torch.save({"ema": EMA(source, 0.9).state_dict()}, tmp_path / "w.pth")
    out = loaded(["x", "y", "z"])  # also where its names have others' prefix
    assert "the head is left out" in out and "'module.'" in out
    for broken in ("{", "[]", '{"classes": 3}', "[" * 100_000):
        (tmp_path / "config.json").write_text(broken)
        assert "the head is taken as it is" in loaded(["a", "b", "c"])


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.to(torch.int8), "torch.int8"),
        (lambda t: t.to(torch.int64), "torch.int64"),
        (lambda t: t.bool(), "torch.bool"),
        (lambda t: t.to(torch.complex64), "torch.complex64"),
        (lambda t: t.to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (lambda t: t.double() + 1e300, "not finite as torch.float32"),
        (lambda t: t * float("nan"), "not finite"),
    ],
)
@pytest.mark.parametrize("name", ["conv1.weight", "fc.bias", "bn1.running_var"])
def test_other_kinds_of_numbers(name, change, words):
    state = get_model("resnet18", 3, [32, 32]).state_dict()
    for other in (torch.float16, torch.bfloat16, torch.float64):
        assert (
            load_matching(
                get_model("resnet18", 3, [32, 32]), {**state, name: state[name].to(other)}, "w.pth"
            )
            == []
        )
    with pytest.raises(
        UserError, match=rf"w.pth holds weights that are not finite.*\('{name}' is torch.*\)"
    ) as caught:
        load_matching(
            get_model("resnet18", 3, [32, 32]), {**state, name: change(state[name])}, "w.pth"
        )
    assert words in str(caught.value)


def test_old_densenet_names():
    source = models.densenet121(num_classes=3).state_dict()
    old = {
        k.replace("norm1", "norm.1")
        .replace("norm2", "norm.2")
        .replace("conv1", "conv.1")
        .replace("conv2", "conv.2")
        if "denselayer" in k
        else k: v
        for k, v in source.items()
    }
    assert load_matching(get_model("densenet121", 3, [32, 32]), old, "old") == []


def test_one_of_my_own(tmp_path, monkeypatch):
    monkeypatch.setattr(nets, "__path__", [*nets.__path__, str(tmp_path)])
    monkeypatch.setattr(nets, "OWN", ["tiny_network", "maps"])
    write_network(
        tmp_path,
        "tiny_network",
        "nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)",
    )
    model = get_model("tiny_network", 6, [20, 30])
    model.freeze_backbone()
    assert [k for k, p in model.named_parameters() if p.requires_grad] == ["3.weight", "3.bias"]
    assert profile(model, "tiny_network", [20, 30], 6)[0] == 4 * 27 + 4 + 30
    with pytest.raises(
        UserError,
        match=r"\[2, 6\] for 2 pictures, not .*\[2, 5\].*num_classes",
    ):
        profile(model, "tiny_network", [20, 30], 5)
    write_network(tmp_path, "maps", "nn.Conv2d(3, num_classes, 3)")
    with pytest.raises(UserError, match=r"\[2, 5, 18, 18\] for"):
        profile(get_model("maps", 5, [20, 20]), "maps", [20, 20], 5)


@pytest.mark.parametrize("shape", [[8, 8], [9, 30], [28, 28], [64, 64], [100, 50]])
def test_resnet9(shape):
    """The network that ships: any size from 8 pixels on, any number of classes."""
    model = get_model("resnet9", 3, shape)
    assert model(torch.randn(2, 3, *shape)).shape == (2, 3) and head_layers(model) == {"head"}
    parameters, flops = profile(model, "resnet9", shape, 3)
    assert 0.9e6 < parameters < 1e6 and flops < 2.2e8
    assert 1.6e6 < profile(get_model("resnet9_wide", 3, shape), "resnet9_wide", shape, 3)[0] < 1.7e6


def test_resnet9_takes_the_largest_of_all_places():
    model = get_model("resnet9", 3, [32, 32]).eval()
    pictures = torch.randn(2, 3, 32, 32)
    places = model.body(pictures).flatten(2)
    torch.testing.assert_close(model(pictures), model.head(places.max(2).values) / 8)


def test_resnet9_halves_large_pictures_at_once():
    flops = [profile(get_model("resnet9", 3, [s, s]), "resnet9", [s, s], 3)[1] for s in (47, 48)]
    assert flops[0] > 2 * flops[1]


def test_resnet9_begins_with_small_scores():
    """Large ones have large gradients, and few pictures were then never learned.

    300 shapes, 10 epochs, stayed at chance.
    """
    for seed in range(3):
        torch.manual_seed(seed)
        loss = nn.functional.cross_entropy(
            get_model("resnet9", 10, [64, 64])(torch.randn(32, 3, 64, 64)), torch.arange(32) % 10
        )
        loss.backward()
        assert abs(loss.item() - 2.3026) < 0.3


def test_resnet9_needs_eight_pixels():
    with pytest.raises(UserError, match="8 pixels"):
        get_model("resnet9", 3, [64, 7])


def test_weights_load_into_torchvision(tmp_path):
    torch.save(get_model("resnet18", 5, [32, 32]).state_dict(), tmp_path / "w.pth")
    torchvision.models.resnet18(num_classes=5).load_state_dict(torch.load(tmp_path / "w.pth"))


@pytest.mark.parametrize("name", ["resnet9", "squeezenet1_1"])
def test_a_whole_network_can_be_pickled(name, tmp_path):
    """torch.save(model) is what many programs do, also of wrapped, copied and frozen networks."""
    model = get_model(name, 3, [32, 32])
    model.freeze_backbone()
    pictures = torch.randn(2, 3, 32, 32)
    expected = model.eval()(pictures)
    torch.save(nn.DataParallel(copy.deepcopy(model)), tmp_path / "model.pth")
    loaded = torch.load(tmp_path / "model.pth", weights_only=False).module
    assert type(loaded) is type(model) and list(loaded.state_dict()) == list(model.state_dict())
    assert torch.equal(loaded.eval()(pictures), expected)
    loaded.train()
    modes = {name: module.training for name, module in loaded.named_modules() if name}
    assert loaded.frozen and {name for name in modes if modes[name]} == head_layers(loaded)
    loaded.Unfreeze_backbone()
    assert all(p.requires_grad for p in loaded.parameters())
    if name != "resnet9":
        return
    code = (
        "import sys, torch\nmodel = torch.load(sys.argv[1], weights_only=False).module\n"
        "model.freeze_backbone()\nprint(sum(p.requires_grad for p in model.parameters()))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model.pth"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert found.stdout == "2\n", found.stderr


def test_a_network_made_of_another(tmp_path, monkeypatch):
    """A file of nets/ may begin with get_model, and name its heads."""
    monkeypatch.setattr(nets, "__path__", [*nets.__path__, str(tmp_path)])
    monkeypatch.setattr(nets, "OWN", ["two_heads"])
    (tmp_path / "two_heads.py").write_text(
        "from torch import nn\nfrom nets import get_model\n\n\n"
        "def two_heads(num_classes, input_shape):\n"
        "    model = get_model('squeezenet1_1', num_classes, input_shape)\n"
        "    model.extra = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))\n"
        "    model.head_names = ['classifier.1', 'extra']\n"
        "    return model\n"
    )
    model = get_model("two_heads", 3, [32, 32])
    model.freeze_backbone()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "classifier.1.weight",
        "classifier.1.bias",
        "extra.0.weight",
        "extra.0.bias",
        "extra.2.weight",
        "extra.2.bias",
    ]
    heads = head_layers(model)
    assert all(
        (name.rpartition(".")[0] in heads) == p.requires_grad
        for name, p in model.named_parameters()
    )


def test_a_transformer_of_ones_own():
    attention = nn.Sequential(nn.TransformerEncoderLayer(8, 2), nn.Linear(8, 3))
    assert is_transformer(attention) and not is_transformer(get_model("resnet9", 3, [32, 32]))
    attention.is_transformer = False  # its own word counts
    assert not is_transformer(attention)


def test_laying_out_changes_nothing_else():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    model = nets.to_device(nn.Conv2d(3, 4, 3), "cpu")
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.get_float32_matmul_precision() == "highest"
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "name, shape, advice",
    [
        ("vit_b_16", [64, 32], r"square pictures .* multiples of 16, .*\[32, 32\]"),
        ("vit_b_16", [60, 60], r"multiples of 16, .*\[64, 64\]"),
        ("vit_b_32", [8, 8], r"multiples of 32, .*\[32, 32\]"),
        ("vit_h_14", [224, 225], r"multiples of 14, .*\[224, 224\]"),
        ("maxvit_t", [100, 100], r"multiples of 224, .*\[224, 224\]"),
        ("maxvit_t", [224, 448], r"square .* multiples of 224, .*\[224, 224\]"),
        ("maxvit_t", [400, 500], r"multiples of 224, .*\[448, 448\]"),
    ],
)
def test_shapes_of_transformers(name, shape, advice):
    with pytest.raises(UserError, match=rf"^input_shape = .*: {name} takes .*{advice}") as caught:
        get_model(name, 2, shape)
    assert "\n" not in str(caught.value)


def test_residual_sums():
    """What comes in is added: without it nothing would be left of a picture here."""
    model = get_model("resnet9", 3, [16, 16]).eval()
    residuals = [module for module in model.modules() if type(module).__name__ == "Residual"]
    assert len(residuals) == 2
    for residual in residuals:
        pictures = torch.randn(2, residual[0][0].in_channels, 4, 4)
        inside = nn.Sequential.forward(residual, pictures)
        torch.testing.assert_close(residual(pictures), pictures + inside)
        nn.init.zeros_(residual[1][1].weight)
        assert torch.equal(residual(pictures), pictures)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_published_weights_see_their_own_pictures(name):
    """From -1 to 1: torchvision's networks turn pictures into it where they load those weights."""
    torch.manual_seed(0)
    published = getattr(models, name)(
        num_classes=4, aux_logits=False, transform_input=True, init_weights=False
    )
    ours = get_model(name, 4, [80, 80])
    ours.load_state_dict(published.state_dict())
    pictures = torch.randn(2, 3, 80, 80)
    assert torch.equal(ours.eval()(pictures), published.eval()(pictures))
