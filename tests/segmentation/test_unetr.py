"""UNETR: equal to MONAI on the same weights; any volume that the patch divides; what
must not change anything does not; and the files that it is read from."""

import json
import math
import warnings
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attn_notes as an
from attn_notes.foundations.attention import record_attention
from attn_notes.segmentation.unetr import SIZES, UNETR, UNETRConfig, VolumePositions
from attn_notes.segmentation.unetr_formats import MONAI_FORMAT
from attn_notes.training.recipes import make_optimizer
from attn_notes.zoo.devices import STAND_IN, fake_device, to_stand_in
from attn_notes.zoo.factory import count_parameters, create_model

LAYOUTS = Path(__file__).parent / "layouts"
SMALL = UNETRConfig(  # of another size in every respect that MONAI leaves open
    in_channels=2,
    out_channels=3,
    img_size=(32, 16, 48),
    feature_size=2,
    hidden_size=12,
    mlp_dim=20,
    num_heads=3,
)
LITTLE = replace(SMALL, img_size=(8, 8, 12), patch_size=4, num_layers=3, skips=(2,))
CUBE = replace(LITTLE, img_size=(8, 8, 8))


def shake(model, seed=0):
    """Noise on every weight: no bias is zero, no norm neutral."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def small(config=LITTLE, seed=0, **change):
    """Ours in double precision, shaken, in evaluation mode."""
    torch.manual_seed(seed)
    return shake(UNETR(replace(config, **change)).double().eval(), seed)


def volumes(config=LITTLE, rows=2, sides=None, seed=0):
    random = torch.Generator().manual_seed(seed)
    shape = (rows, config.in_channels, *(sides or config.img_size))
    return torch.randn(shape, generator=random, dtype=torch.float64)


@cache
def monai_class():
    return pytest.importorskip("monai.networks.nets").UNETR


def monai_model(config=SMALL, **options):
    sizes = asdict(config)
    for ours in ("patch_size", "num_layers", "skips"):
        del sizes[ours]
    return shake(monai_class()(**sizes, **options))


# ---- the sizes


@pytest.mark.parametrize("name", SIZES)
def test_counts_and_products(name):
    c, info = SIZES[name], an.model_info(name)
    e, f, p, k = c.hidden_size, c.feature_size, c.patch_size, c.in_channels
    n, levels = math.prod(c.grid), len(c.skips) + 1
    voxels = [math.prod(c.img_size) // 8**level for level in range(levels + 1)]
    block = 3 * e * e + e * e + 2 * e * c.mlp_dim
    parameters = (p**3 * k + 1) * e + n * e + 2 * e
    parameters += c.num_layers * (block + e + c.mlp_dim + e + 4 * e)
    macs = n * p**3 * k * e + c.num_layers * (n * block + 2 * n * n * e)

    def conv(inputs, outputs, kernel, level):  # each output voxel, or input if doubled
        nonlocal parameters, macs
        parameters += inputs * outputs * kernel
        macs += inputs * outputs * kernel * voxels[level]

    def res(inputs, outputs, level):
        conv(inputs, outputs, 27, level), conv(outputs, outputs, 27, level)
        if inputs != outputs:
            conv(inputs, outputs, 1, level)

    res(k, f, 0)
    for level in range(1, levels):
        wide = f * 2**level
        conv(e, wide, 8, levels)
        for step in range(levels - 1, level, -1):
            conv(wide, wide, 8, step), res(wide, wide, step - 1)
    for level in reversed(range(levels)):
        wide, below = f * 2**level, e if level == levels - 1 else f * 2 ** (level + 1)
        conv(below, wide, 8, level + 1), res(2 * wide, wide, level)
    conv(f, c.out_channels, 1, 0)
    parameters += c.out_channels
    model = create_model(name, device="meta")
    assert count_parameters(model) == parameters == info.parameters
    with FlopCounterMode(display=False) as flops:
        out = model(**UNETR.example_inputs(c, 1, "meta"))
    assert flops.get_total_flops() == 2 * macs == 2 * info.macs
    assert out.shape == (1, c.out_channels, *c.img_size)


def test_the_count_is_monais_but_for_norms_that_it_never_uses():
    keys = json.loads((LAYOUTS / "unetr_monai.json").read_text())["keys"]
    used = [math.prod(s) for key, s in keys.items() if "norm_cross_attn" not in key]
    assert sum(used) == an.model_info("unetr_base").parameters == 92_784_046


# ---- equal to MONAI


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("patches", ["conv", "perceptron"])
def test_outputs_and_gradients_equal_monais(patches, norm, training, tmp_path):
    config = replace(SMALL, norm_name=norm)
    theirs = monai_model(config, proj_type=patches)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    with warnings.catch_warnings(action="error"):
        model = create_model("unetr_base", tmp_path / "weights.pth", **asdict(config))
    assert not model.not_loaded
    model, theirs = model.double().train(training), theirs.double().train(training)
    x = volumes(SMALL)
    found, expected = model(x), theirs(x)
    assert (found - expected).abs().max() < 1e-10 and found.abs().max() > 0.1
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    grads = {k: p.grad for k, p in theirs.named_parameters() if p.grad is not None}
    grads = MONAI_FORMAT.apply(grads, model)
    assert set(grads) == {key for key, _ in model.named_parameters()}
    for key, p in model.named_parameters():
        assert (p.grad - grads[key]).abs().max() < 1e-10, key


def test_dropout_acts_as_often_as_in_monais():
    config, calls = replace(SMALL, dropout_rate=0.1), []
    model = UNETR(config)
    for network in (model, monai_model(config)):
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                assert module.p == 0.1
                module.register_forward_hook(lambda *_: calls.append(1))
        network(volumes(SMALL).float())
        calls.append(0)
    ours = calls.index(0)  # and within attention, where no module of ours does it
    layers = [layer for part in model.encoder.parts for layer in part.layers]
    assert [layer.attention.attention.dropout for layer in layers] == [0.1] * 12
    assert ours + 12 == len(calls) - ours - 2 == 1 + 4 * 12


# ---- any volume


@pytest.mark.parametrize("sides", [(8, 8, 12), (12, 4, 16), (4, 4, 4)], ids=str)
def test_volumes_of_any_size(sides):
    model = small()
    with torch.no_grad():
        assert model(volumes(sides=sides)).shape == (2, 3, *sides)
        states = model.encoder(volumes(sides=sides))
    assert [z.shape[2:] for z in states] == [tuple(n // 4 for n in sides)] * 2


@pytest.mark.parametrize("grid", [(2, 2, 3), (4, 2, 3), (1, 5, 6), (1, 1, 1)], ids=str)
def test_positions_of_a_grid(grid):
    positions = VolumePositions(5, (2, 2, 3))
    found = positions(grid)
    assert found.shape == (math.prod(grid), 5)
    assert (grid == (2, 2, 3)) == (found is positions.weight)
    positions.weight.data[:] = 3.0  # of a constant, the same constant
    assert torch.allclose(positions(grid), torch.tensor(3.0))
    table = torch.arange(2.0)[:, None, None].expand(2, 2, 3)  # along one axis alone
    positions.weight.data[:] = table.reshape(-1, 1)
    found = positions(grid).view(*grid, 5).detach()
    assert torch.allclose(found, found[:, :1, :1, :1].expand_as(found), atol=1e-6)


def test_positions_follow_the_weights_and_their_type():
    positions = small().encoder.positions
    with torch.no_grad():
        before = positions((3, 3, 3))
        positions.weight.data.mul_(2.0)
        assert torch.allclose(positions((3, 3, 3)), 2 * before)
    assert len(positions._shares) == 1  # 2 to 3 along two axes, 3 to 3 along one
    assert positions.float()((3, 3, 3)).dtype == torch.float32


def test_company_changes_nothing():
    model, x = small(), volumes(rows=3)
    with torch.no_grad():
        together = model(x)
        for i in range(3):
            assert torch.allclose(model(x[i : i + 1])[0], together[i], atol=1e-12)


def test_recorded_attention():
    model, x = small(), volumes(sides=(8, 4, 12))
    with torch.no_grad(), record_attention(model) as maps:
        found = model(x)
    assert [m.shape for m in maps.values()] == [(2, 3, 6, 6)] * 3
    assert torch.allclose(found, model(x), atol=1e-12)


def test_every_parameter_learns_and_positions_do_not_decay():
    model = small().train()
    model(volumes(sides=(8, 8, 8))).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())
    recipe = an.model_info("unetr_base").recipes["paper"]
    _, spared = make_optimizer(model, recipe).param_groups
    assert any(p is model.encoder.positions.weight for p in spared["params"])


def test_fake_tensors_leave_no_trace():
    model = UNETR(LITTLE)
    with fake_device():
        to_stand_in(model)
        x = torch.empty(2, 2, 12, 8, 8, device=STAND_IN)
        model(x).sum().backward()
    assert not model.encoder.positions._shares


@pytest.mark.no_shapes
def test_compiled_and_exported_at_another_size():
    model, x = small().float(), volumes(sides=(12, 8, 4)).float()
    with torch.no_grad():
        expected = model(x)
        exported = torch.export.export(model, (x,)).module()
        assert torch.allclose(exported(x), expected, atol=1e-5)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(x), expected, atol=1e-5)


def test_another_size_under_autocast_and_in_another_precision():
    model, x = small().float(), volumes(sides=(12, 8, 4))
    expected = model(x.float())
    assert torch.allclose(model(x), expected)  # float64 is brought to the weights'
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x.float())
    found.sum().backward()
    assert (found - expected).norm() < 0.1 * expected.norm()
    assert model.encoder.positions.weight.grad.dtype == torch.float32


# ---- bad input

WRONG = {
    "one channel": torch.zeros(2, 1, 8, 8, 8),
    "an image": torch.zeros(2, 2, 8, 8),
    "whole numbers": torch.zeros(2, 2, 8, 8, 8, dtype=torch.int16),
    "no volume": torch.zeros(0, 2, 8, 8, 8),
    "no voxel": torch.zeros(2, 2, 8, 0, 8),
    "a cut patch": torch.zeros(2, 2, 8, 8, 10),
    "a list": [torch.zeros(2, 8, 8, 8)],
}


@pytest.mark.no_shapes
@pytest.mark.parametrize("given", WRONG.values(), ids=WRONG)
def test_bad_volumes(given):
    with pytest.raises(an.InputError, match=r"^volumes: expected .*; got .*") as caught:
        small()(given)
    assert "\n" not in str(caught.value)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "change",
    [
        dict(patch_size=12),
        dict(patch_size=1),
        dict(num_heads=5),
        dict(img_size=(32, 16)),
        dict(skips=(4, 7)),
        dict(skips=(4, 4, 10)),
        dict(skips=(4, 7, 12)),
        dict(norm_name="layer"),
        dict(out_channels=0),
        dict(dropout_rate=1.0),
    ],
    ids=str,
)
def test_bad_configurations(change):
    sides = {"img_size": (48, 48, 48), **change}
    with pytest.raises(an.ConfigError, match=f"{next(iter(change))}: expected .*; got"):
        replace(SMALL, **sides)


# ---- files


def test_saved_and_read_back(tmp_path):
    model = small().float()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        again = create_model("unetr_base", tmp_path)
    assert again.config == model.config
    assert torch.equal(again(volumes().float()), model(volumes().float()))


OFFICIAL = {  # how the weights lie in a file
    "alone": lambda state: state,
    "of the training": lambda state: {"epoch": 9, "best_acc": 0.8, "state_dict": state},
    "with a prefix": lambda state: {
        "state_dict": {f"module.backbone.{k}": v for k, v in state.items()}
    },
}


@pytest.mark.parametrize("wrap", OFFICIAL.values(), ids=OFFICIAL)
def test_the_authors_files(wrap, tmp_path):
    """Names and shapes of the released network, the Transformer's widths small."""
    keys = json.loads((LAYOUTS / "unetr_monai.json").read_text())["keys"]
    narrow = {768: 24, 2304: 72, 3072: 48, 216: 8}
    torch.manual_seed(0)
    state = {k: torch.randn([narrow.get(n, n) for n in s]) for k, s in keys.items()}
    state = {k: v for k, v in state.items() if "norm_cross_attn" not in k}
    state["vit.patch_embedding.cls_token"] = torch.zeros(1, 1, 24)  # of older ones
    torch.save(wrap(state), tmp_path / "UNETR_model_best_acc.pth")
    sizes = dict(hidden_size=24, mlp_dim=48, num_heads=3, img_size=(32, 32, 32))
    with warnings.catch_warnings(action="error"):
        model = create_model("unetr_base", tmp_path / "UNETR_model_best_acc.pth",
                             **sizes)  # fmt: skip
    assert not model.not_loaded
    matrix = state["vit.patch_embedding.patch_embeddings.1.weight"]
    patch = torch.randn(1, 1, 16, 16, 16)
    found = nn.functional.conv3d(patch, model.encoder.patch_embedding.weight, stride=16)
    assert torch.allclose(found.flatten(), matrix @ patch.flatten(), atol=1e-3)
    block = model.encoder.parts[1].layers[2]  # the seventh
    assert torch.equal(block.norm2.bias, state["vit.blocks.6.norm2.bias"])
    conv = state["encoder2.blocks.1.1.conv2.conv.weight"]
    assert torch.equal(model.skips[0][4].conv2.weight, conv)
    conv = state["decoder3.conv_block.conv3.conv.weight"]
    assert torch.equal(model.decoder[2].block.shortcut[0].weight, conv)


def test_a_file_for_another_size(tmp_path):
    """Interpolated when it is read, as it would be in a forward pass."""
    path = tmp_path / "weights.pth"
    torch.save(small(CUBE).float().state_dict(), path)
    sizes = dict(asdict(CUBE), img_size=(12, 8, 16))
    said = "positions interpolated from 2 x 2 x 2 to 3 x 2 x 4 patches"
    with pytest.warns(an.CheckpointWarning, match=said):
        model = create_model("unetr_base", path, **sizes)
    original = create_model("unetr_base", path, **asdict(CUBE))
    x = volumes(sides=(12, 8, 16)).float()
    assert torch.allclose(model(x), original(x), atol=1e-5)


def test_a_file_of_another_number_of_classes(tmp_path):
    torch.save(small().float().state_dict(), tmp_path / "weights.pth")
    with pytest.warns(an.CheckpointWarning, match="re-initialized.*head"):
        model = create_model("unetr_base", tmp_path / "weights.pth",
                             **dict(asdict(LITTLE), out_channels=7))  # fmt: skip
    assert model.not_loaded == ("head.weight", "head.bias")


@pytest.mark.parametrize("change", [dict(in_channels=1), dict(skips=(1,))], ids=str)
def test_another_model_is_refused(change, tmp_path):
    torch.save(small().float().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(an.CheckpointError, match="does not fit UNETR"):
        create_model("unetr_base", tmp_path / "weights.pth",
                     **dict(asdict(LITTLE), **change))  # fmt: skip
