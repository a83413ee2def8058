"""Swin and SwinMLP: equal to timm, torchvision, transformers and the authors' code on
the same weights; windows that are what a naive loop makes of them; any size of image;
and the files that they are read from."""

import inspect
import itertools
import json
import math
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import attn_notes as an
from attn_notes.foundations.attention import record_attention
from attn_notes.foundations.blocks import DropPath
from attn_notes.training.recipes import make_optimizer
from attn_notes.vision.swin import SIZES, PatchMerging, Swin, SwinConfig
from attn_notes.vision.swin_formats import (
    HF_FORMAT,
    OFFICIAL_FORMAT,
    TIMM_FORMAT,
    TORCHVISION_FORMAT,
)
from attn_notes.vision.swin_mlp import MLP_SIZES, SwinMLP, make_padded_windows
from attn_notes.vision.windows import PositionBias, Windows, make_windows
from attn_notes.zoo.devices import STAND_IN, fake_device, to_stand_in
from attn_notes.zoo.factory import count_parameters, create_model

LAYOUTS = Path(__file__).parent / "layouts"
SMALL = SwinConfig(
    img_size=24,
    patch_size=2,
    num_classes=5,
    embed_dim=8,
    depths=(2, 2, 1),
    num_heads=(2, 4, 1),
    window_size=3,
    mlp_ratio=1.5,
)
STORED = replace(
    SMALL, in_chans=2, num_classes=3, depths=(2, 2), num_heads=(2, 2)
)  # the files
NAME, MLP_NAME = "swin_tiny_patch4_window7_224", "swin_mlp_tiny_c24_patch4_window8_256"
both = pytest.mark.parametrize("kind", [Swin, SwinMLP])


def shake(model, seed=0):
    """Noise on every weight: no bias is zero, no norm neutral, no head silent."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def small(kind=Swin, config=SMALL, **change):
    """Ours in double precision, shaken, in evaluation mode."""
    torch.manual_seed(0)
    return shake(kind(replace(config, **change)).double().eval())


def images(config=SMALL, rows=2, sides=None, seed=0):
    sides = sides or (config.img_size, config.img_size)
    random = torch.Generator().manual_seed(seed)
    shape = (rows, config.in_chans, *sides)
    return torch.randn(shape, generator=random, dtype=torch.float64)


def pixels(*shape):
    """The images for which the authors' code was run."""
    return torch.arange(math.prod(shape)).double().mul(0.7).sin().view(shape)


# ---- the sizes

ALL_SIZES = SIZES | MLP_SIZES


@pytest.mark.parametrize("name", ALL_SIZES)
def test_counts_and_products(name):
    info, c = an.model_info(name), ALL_SIZES[name]
    mlp, m, side = name in MLP_SIZES, c.window_size, c.img_size // c.patch_size
    patch = c.in_chans * c.patch_size**2
    counted = patch * c.embed_dim + 3 * c.embed_dim
    products = side**2 * patch * c.embed_dim
    for i, (depth, heads, d) in enumerate(
        zip(c.depths, c.num_heads, c.widths, strict=True)
    ):
        if i:
            side //= 2
            counted += 4 * d + 2 * d * d  # the norm of 4C, 4C to 2C
            products += side**2 * 2 * d * d
        wide, n = int(c.mlp_ratio * d), m * m
        own = heads * n * n + heads * n if mlp else 4 * d * d + 4 * d
        own += 0 if mlp else (2 * m - 1) ** 2 * heads
        counted += depth * (own + 2 * d * wide + wide + d + 4 * d)
        for block in range(depth):
            windows = (side // m + (mlp and block % 2 == 1 and side > m)) ** 2
            mix = windows * n * n * d if mlp else side**2 * (4 * d * d + 2 * n * d)
            products += mix + side**2 * 2 * d * wide
    counted += 2 * d + (d + 1) * c.num_classes
    products += d * c.num_classes
    model = create_model(name, device="meta")
    assert count_parameters(model) == counted == info.parameters
    assert info.macs == products
    if sum(c.depths) < 24:
        with FlopCounterMode(display=False) as flops:
            model(torch.empty(1, *info.input_size, device="meta"))
        assert flops.get_total_flops() == 2 * products
    if "GMACs" in info.reported:
        assert info.macs / 1e9 == pytest.approx(info.reported["GMACs"], rel=0.01)


def test_a_window_larger_than_the_map_is_the_map():
    model = Swin(replace(SMALL, img_size=8))
    assert [stage.window_size for stage in model.stages] == [3, 2, 1]
    rows = [len(s.blocks.layers[0].position_bias.table) for s in model.stages]
    assert rows == [25, 9, 1] and model(torch.randn(1, 3, 8, 8)).shape == (1, 5)


# ---- equal to the references


def timm_reference(config, **options):
    timm = pytest.importorskip("timm")
    sizes = asdict(config)
    del sizes["dropout"], sizes["pyramid_norms"]
    return (model := shake(timm.models.SwinTransformer(**sizes, **options))), model


def torchvision_reference(config):
    from torchvision.models.swin_transformer import SwinTransformer

    model = SwinTransformer(
        patch_size=[config.patch_size] * 2,
        embed_dim=config.embed_dim,
        depths=[*config.depths],
        num_heads=[*config.num_heads],
        window_size=[config.window_size] * 2,
        mlp_ratio=config.mlp_ratio,
        stochastic_depth_prob=0.0,
        num_classes=config.num_classes,
    )
    return shake(model), model


def hf_reference(config, **options):
    transformers = pytest.importorskip("transformers")
    sizes = asdict(config)
    for ours in ("img_size", "in_chans", "num_classes", "dropout", "pyramid_norms"):
        del sizes[ours]
    stored = transformers.SwinConfig(
        image_size=config.img_size,
        num_channels=config.in_chans,
        num_labels=config.num_classes,
        **sizes | options,
    )
    model = shake(transformers.SwinForImageClassification(stored))
    return model, lambda x: model(x).logits


GREY = replace(SMALL, in_chans=1)
REFERENCES = {
    "timm": (timm_reference, SMALL, TIMM_FORMAT),
    "timm, even window": (timm_reference, replace(GREY, window_size=4), TIMM_FORMAT),
    "torchvision": (torchvision_reference, SMALL, TORCHVISION_FORMAT),
    "transformers": (hf_reference, GREY, HF_FORMAT),
}


def gradients_agree(model, found, theirs, expected, fmt):
    """To 1e-10, of a loss for every weight."""
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    grads = fmt.apply({k: p.grad for k, p in theirs.named_parameters()}, model)
    assert set(grads) == {key for key, _ in model.named_parameters()}
    for key, p in model.named_parameters():
        assert (p.grad - grads[key]).abs().max() < 1e-10, key


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("make, config, fmt", REFERENCES.values(), ids=REFERENCES)
def test_outputs_and_gradients_equal_the_reference(
    make, config, fmt, training, tmp_path
):
    theirs, call = make(config)
    with warnings.catch_warnings(action="error"):
        model = create_model(NAME, saved(theirs, tmp_path), **asdict(config))
    assert not model.not_loaded
    model, theirs = model.double().train(training), theirs.double().train(training)
    x = images(config)
    found, expected = model(x), call(x)
    assert (found - expected).abs().max() < 1e-10 and found.abs().max() > 0.1
    gradients_agree(model, found, theirs, expected, fmt)


@pytest.mark.parametrize(
    "make, sides",
    [
        (hf_reference, (23, 31)),  # pixels and maps are padded
        (hf_reference, (40, 26)),
        (torchvision_reference, (40, 26)),
        (torchvision_reference, (6, 34)),  # maps of 3, 2 and 1 rows
    ],
)
def test_odd_sizes_equal_the_reference(make, sides, tmp_path):
    theirs, call = make(SMALL)
    model = create_model(NAME, saved(theirs, tmp_path), **asdict(SMALL)).double()
    theirs.double().eval()
    x, fmt = images(sides=sides), HF_FORMAT
    found, expected = model(x), call(x)
    assert (found - expected).abs().max() < 1e-10
    fmt = HF_FORMAT if make is hf_reference else TORCHVISION_FORMAT
    gradients_agree(model, found, theirs, expected, fmt)


@pytest.mark.slow
def test_the_tiny_size_equals_timm(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model(NAME, drop_path_rate=0.0).eval()
    for p in theirs.parameters():
        p.data += 0.02 * torch.randn_like(p)
    model = create_model(NAME, saved(theirs, tmp_path))
    x = torch.randn(1, 3, 224, 224)
    found, expected = model(x), theirs(x)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    found.square().sum().backward(), expected.square().sum().backward()
    grads = {key: p.grad for key, p in theirs.named_parameters()}
    for key, value in TIMM_FORMAT.apply(grads, model).items():
        gap = model.get_parameter(key).grad - value
        assert gap.norm() < 1e-4 * value.norm(), key


AUTHORS = json.loads((LAYOUTS / "swin_small.json").read_text())


@pytest.mark.parametrize("name, key", [(NAME, "swin"), (MLP_NAME, "swin_mlp")])
def test_the_authors_code(name, key):
    with warnings.catch_warnings(action="error"):
        model = create_model(name, LAYOUTS / f"{key}_small.pth", **asdict(STORED))
    expected = torch.tensor(AUTHORS[key], dtype=torch.float64).view(2, 3)
    found = model.double()(pixels(2, 2, 24, 24))
    assert (found - expected).abs().max() < 1e-12 and expected.abs().max() > 0.1


def test_the_authors_pyramid_for_detection():
    """A norm on every map, of an image whose maps are padded to windows."""
    stored = AUTHORS["pyramid"]
    sizes = dict(asdict(STORED), num_classes=0, pyramid_norms=True)
    with pytest.warns(an.CheckpointWarning, match="norms.0.weight|head"):
        model = create_model(NAME, LAYOUTS / "swin_small.pth", **sizes)
    model.double().norms[0].weight.data = torch.tensor(stored["norm0.weight"]).double()
    maps = model.forward_pyramid(pixels(1, 2, *stored["sides"]))
    for found, expected in zip(maps, stored["maps"], strict=True):
        assert [*found.shape] == expected["shape"]
        values = torch.tensor(expected["values"], dtype=torch.float64)
        assert (found.flatten()[::7] - values).abs().max() < 1e-10


# ---- windows


@settings(max_examples=20)
@given(
    sides=st.tuples(*[st.integers(1, 13)] * 2),
    size=st.integers(1, 5),
    shifted=st.booleans(),
)
@pytest.mark.parametrize("make", [make_windows, make_padded_windows])
def test_every_token_has_one_place(make, sides, size, shifted):
    windows = make(*sides, size, shifted)
    x = torch.randn(2, math.prod(sides), 3)
    parts = windows.partition(x)
    assert torch.equal(windows.reverse(parts), x)
    assert parts.shape[1:] == (size**2, 3)
    assert torch.allclose(parts.abs().sum(), x.abs().sum())  # the rest is zero


def ragged_attention(block, x, size, shifted):
    """The shifted windows as they are in the map, window by window of any size: each
    token attends to those of its own, with the bias of their offset."""
    table, out = block.position_bias.table, torch.zeros_like(x)

    def cuts(side):
        first = size // 2 if shifted and side > size else size
        at = [0, *range(first, side, size), side]
        return list(zip(at, at[1:], strict=False))

    for top, bottom in cuts(x.shape[1]):
        for left, right in cuts(x.shape[2]):
            part = x[:, top:bottom, left:right]
            rows, columns = torch.arange(bottom - top), torch.arange(right - left)
            place = torch.cartesian_prod(rows, columns)
            dy, dx = (place[:, None] - place + size - 1).unbind(-1)
            bias = table[(2 * size - 1) * dy + dx].permute(2, 0, 1)[None]
            y = block.attention(part.flatten(1, 2), bias=bias)
            out[:, top:bottom, left:right] = y.view(part.shape)
    return out


@pytest.mark.parametrize("windows", [(3, 4), (2, 2), (1, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("size", [3, 4])
def test_equal_to_ragged_windows(windows, shifted, size):
    """A side that has one window is not shifted."""
    sides = [n * size for n in windows]
    stage = small(window_size=size, img_size=48).stages[0]
    block, x = stage.blocks.layers[int(shifted)], torch.randn(2, *sides, 8).double()
    cut = stage.windows(*sides, x.device)[int(shifted)]
    found = block.attend(x.flatten(1, 2), cut).unflatten(1, sides)
    expected = ragged_attention(block, x, size, shifted)
    assert (found - expected).abs().max() < 1e-12


def test_bias_of_every_pair():
    bias = PositionBias(window_size=3, num_heads=2)
    for q in range(9):
        for k in range(9):
            row = 5 * (q // 3 - k // 3 + 2) + q % 3 - k % 3 + 2
            assert torch.equal(bias()[:, q, k], bias.table[row])


def test_merging_is_slicing_and_concatenation():
    merging, x = shake(PatchMerging(3).double()), torch.randn(2, 6, 4, 3).double()
    parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
    expected = merging.reduction(merging.norm(torch.cat(parts, -1)))
    assert torch.allclose(merging(x), expected, atol=1e-12)
    assert merging(x[:, :5, :3]).shape == (2, 3, 2, 6)
    padded = functional.pad(x[:, :5, :3], (0, 0, 0, 1, 0, 1))
    assert torch.allclose(merging(x[:, :5, :3]), merging(padded), atol=1e-12)


def test_the_grouped_convolution_is_a_matrix_a_head():
    block = small(SwinMLP).stages[0].blocks.layers[0]
    windows, x = make_padded_windows(6, 6, 3), torch.randn(2, 36, 8).double()
    tokens = windows.partition(x)
    heads = tokens.unflatten(-1, (2, 4))
    matrices = block.spatial_mlp.weight.view(2, 9, 9)
    mixed = torch.einsum("hnm,bmhc->bnhc", matrices, heads)
    mixed = mixed + block.spatial_mlp.bias.view(2, 9).T[:, :, None]
    expected = windows.reverse(mixed.flatten(2))
    assert torch.allclose(block.mix(x, windows), expected, atol=1e-12)


# ---- what changes nothing


@both
@settings(max_examples=5)
@given(seed=st.integers(0, 999))
def test_company_changes_nothing(kind, seed):
    model, x = small(kind), images(sides=(14, 23), rows=3, seed=seed)
    with torch.no_grad():
        together = model(x)
        for i in range(3):
            assert torch.allclose(model(x[i : i + 1])[0], together[i], atol=1e-12)


@both
def test_features_pyramid_and_logits(kind):
    model, x = small(kind), images(sides=(30, 17))
    features = model.forward_features(x)
    assert features.shape == (2, 4, 3, 32)
    assert torch.equal(model(x), model.head(features.mean((1, 2))))
    maps = model.forward_pyramid(x)
    assert [y.shape[1:] for y in maps] == [(8, 15, 9), (16, 8, 5), (32, 4, 3)]
    assert torch.equal(maps[-1], features.permute(0, 3, 1, 2))
    bare = small(kind, num_classes=0)
    bare.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(bare(x), features.mean((1, 2)))
    normed = Swin(replace(SMALL, pyramid_norms=True, num_classes=0))
    more = sum(2 * d for d in SMALL.widths[:-1]) - 5 * 33
    if kind is Swin:
        assert count_parameters(normed) == count_parameters(model) + more
    for y in normed.forward_pyramid(x):
        assert y.mean(1).abs().max() < 1e-5 and abs(y.std() - 1) < 0.1
    sum(y.square().sum() for y in normed.forward_pyramid(x)).backward()
    assert all(p.grad is not None for p in normed.parameters())


def test_recorded_attention():
    model, x = small(), images()
    with torch.no_grad(), record_attention(model) as maps:
        found = model(x)
    assert len(maps) == sum(SMALL.depths)
    shapes = [(2 * 16, 2, 9, 9)] * 2 + [(2 * 4, 4, 9, 9)] * 2 + [(2, 1, 9, 9)]
    assert [w.shape for w in maps.values()] == shapes
    for weights in maps.values():
        assert torch.allclose(weights.sum(-1), torch.tensor(1.0).double())
    assert torch.allclose(found, model(x), atol=1e-12)


def test_nothing_crosses_what_the_roll_made_neighbours():
    """Hidden by -100, as the authors do it: exp(-100) of a weight is left."""
    stage = small().float().stages[0]
    block, x = stage.blocks.layers[1], torch.randn(1, 144, 8, requires_grad=True)
    windows = stage.windows(12, 12, x.device)[1]
    block.attend(x, windows).view(12, 12, 8)[0, 0].sum().backward()
    reached = x.grad.view(12, 12, 8).abs().sum(-1) > 1e-30
    assert reached[0, 0] and not reached[3:].any() and not reached[:, 3:].any()


@both
def test_drop_path_rises_over_all_blocks(kind):
    model = kind(replace(SMALL, drop_path_rate=0.4, dropout=0.1))
    rates = [m.p for m in model.modules() if isinstance(m, DropPath) and m.p]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert {m.p for m in model.modules() if type(m) is nn.Dropout} == {0.1}
    attention = [m for m in model.modules() if type(m).__name__.startswith("Scaled")]
    assert all(m.dropout == 0 for m in attention)


def test_the_papers_recipe():
    model, info = Swin(SMALL), an.model_info(NAME)
    recipe = info.recipes["paper"]
    decayed, spared = make_optimizer(model, recipe).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    named = {id(p): key for key, p in model.named_parameters()}
    for p in decayed["params"]:
        key = named[id(p)]
        assert key.endswith("weight") and "norm" not in key
    assert sum("table" in named[id(p)] for p in spared["params"]) == 5
    assert recipe.lr(recipe.warmup_steps) == 1e-3 and recipe.label_smoothing == 0.1
    assert recipe.lr(recipe.max_steps) == pytest.approx(1e-5)
    assert [SIZES[n].drop_path_rate for n in [*SIZES][:3]] == [0.2, 0.3, 0.5]
    tuned = info.recipes["fine_tuning"]
    assert tuned.lr(1) == tuned.lr(tuned.max_steps) == 1e-5


@pytest.mark.slow
def test_the_papers_recipe_under_torchrun(tmp_path):
    """Two steps of two processes, with all its augmentation; and what it has saved."""
    pytest.importorskip("timm")
    random = numpy.random.default_rng(0)
    for split, name in itertools.product(("train", "val"), ("cats", "dogs")):
        (tmp_path / "data" / split / name).mkdir(parents=True)
        for i in range(3):
            pixels = random.integers(0, 255, (40, 49, 3), numpy.uint8)
            path = tmp_path / "data" / split / name / f"{i}.png"
            Image.fromarray(pixels).save(path)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--standalone", "-m", "attn_notes.cli", "train", NAME, "--recipe", "paper"),
        *("--max-steps", "2", "--data", "imagenet"),
        *("--data-dir", str(tmp_path / "data"), "--output", str(tmp_path / "run")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    model = create_model(NAME, tmp_path / "run")
    assert model.config == replace(SIZES[NAME], num_classes=2)


# ---- any size, any device


def test_windows_are_made_once_a_size():
    model = small()
    stage = model.stages[0]
    with torch.no_grad():
        model(images()), model(images(sides=(26, 20)))
        first = stage.windows(12, 12, torch.device("cpu"))
        before = model(images())
        assert stage.windows(12, 12, torch.device("cpu")) is first
        model.stages[0].blocks.layers[1].position_bias.table.data.mul_(2)
        assert not torch.allclose(model(images()), before)  # the bias is not kept
        for side in range(12, 60, 2):
            model(images(sides=(side, side)))
    assert len(stage._windows) == stage.kept
    assert not any("window" in key for key in model.state_dict())


@both
def test_fake_tensors_leave_no_trace(kind):
    model = kind(SMALL)
    with fake_device():
        to_stand_in(model)
        x = torch.empty(2, 3, 30, 23, device=STAND_IN)
        model(x).sum().backward()
    assert not any(stage._windows for stage in model.stages)


@both
@pytest.mark.slow
@pytest.mark.no_shapes
def test_compiled_and_exported_at_another_size(kind, monkeypatch):
    for method in ("partition", "reverse"):  # torch.compile can not look through
        plain = inspect.unwrap(getattr(Windows, method))  # the checking of shapes
        monkeypatch.setattr(Windows, method, plain)
    model, x = small(kind).float(), images(sides=(30, 23)).float()
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
        assert torch.allclose(exported(x), model(x), atol=1e-5)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for some in (images().float(), x):
            assert torch.allclose(compiled(some), model(some), atol=1e-5)


@both
def test_under_autocast(kind):
    model, x = small(kind).float(), images(sides=(30, 23)).float()
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x)
    found.float().sum().backward()
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@both
def test_channels_last(kind):
    model, x = small(kind), images(sides=(26, 24))
    with torch.no_grad():
        expected = model(x)
        model.to(memory_format=torch.channels_last)
        found = model(x.to(memory_format=torch.channels_last))
    assert torch.allclose(found, expected, atol=1e-12)


@both
def test_gradient_checkpointing(kind):
    model, x = small(kind).train(), images(sides=(26, 24))
    grads = []
    for again in (False, True):
        for stage in model.stages:
            stage.blocks.gradient_checkpointing = again
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---- bad input

WRONG = {
    "grey": torch.zeros(2, 1, 24, 24),
    "bytes": torch.zeros(2, 3, 24, 24, dtype=torch.uint8),
    "one image": torch.zeros(3, 24, 24),
    "no image": torch.zeros(0, 3, 24, 24),
    "less than a patch": torch.zeros(2, 3, 1, 24),
    "no pixels": torch.zeros(2, 3, 0, 24),
    "sparse": torch.zeros(2, 3, 24, 24).to_sparse(),
    "a list": [torch.zeros(3, 24, 24)],
}


@pytest.mark.no_shapes
@pytest.mark.parametrize("given", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("call", ["forward", "forward_features", "forward_pyramid"])
def test_bad_images(given, call):
    with pytest.raises(an.InputError, match=r"^images: expected .*; got .*") as caught:
        getattr(small(), call)(given)
    assert "\n" not in str(caught.value)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "change",
    [
        dict(num_heads=(2, 3, 1)),
        dict(num_heads=(2, 4)),
        dict(num_heads=(), depths=()),
        dict(depths=(2, 0, 1)),
        dict(window_size=0),
        dict(mlp_ratio=0.0),
        dict(drop_path_rate=1.0),
        dict(num_classes=-1),
        dict(pyramid_norms=1),
    ],
    ids=str,
)
def test_bad_configurations(change):
    with pytest.raises(an.ConfigError, match=f"{next(iter(change))}: expected .*; got"):
        replace(SMALL, **change)


# ---- files


def saved(model, folder):
    path = folder / "weights.pth"
    torch.save(model.state_dict(), path)
    return path


@both
def test_saved_and_read_back(kind, tmp_path):
    model = small(kind).float()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        again = create_model(NAME if kind is Swin else MLP_NAME, tmp_path)
    assert again.config == model.config
    assert torch.equal(again(images().float()), model(images().float()))


def test_a_folder_of_transformers(tmp_path):
    theirs, call = hf_reference(SMALL, hidden_dropout_prob=0.25, drop_path_rate=0.3)
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        model = create_model(NAME, tmp_path)
    assert model.config == replace(SMALL, dropout=0.25, drop_path_rate=0.3)
    theirs.eval()
    x = images().float()
    assert torch.allclose(model(x), call(x), atol=1e-5)


HF_OLD = (  # as files on the hub have it, and as this version has it in memory
    (".attention.relative_position_bias.", ".attention.self."),
    (".attention.q_proj.", ".attention.self.query."),
    (".attention.k_proj.", ".attention.self.key."),
    (".attention.v_proj.", ".attention.self.value."),
    (".attention.o_proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)


def test_old_names_of_transformers(tmp_path):
    theirs, call = hf_reference(SMALL)
    state = theirs.state_dict()
    for new, before in HF_OLD:
        assert any(new in key for key in state)
        state = {key.replace(new, before): v for key, v in state.items()}
    index = "swin.encoder.layers.0.blocks.0.attention.self.relative_position_index"
    state |= {index: torch.zeros(9, 9).long()}
    torch.save(state, tmp_path / "weights.pth")
    with warnings.catch_warnings(action="error"):
        model = create_model(NAME, tmp_path / "weights.pth", **asdict(SMALL))
    theirs.eval()
    x = images().float()
    assert torch.allclose(model(x), call(x), atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        dict(hidden_act="relu"),
        dict(qkv_bias=False),
        dict(model_type="swinv2"),
        dict(use_absolute_embeddings=True),
        dict(layer_norm_eps=1e-12),
    ],
)
def test_another_model_of_transformers(change, tmp_path):
    theirs, _ = hf_reference(SMALL)
    theirs.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | change))
    with pytest.raises(an.CheckpointError, match=f"{next(iter(change))}: expected"):
        create_model(NAME, tmp_path)


def test_a_folder_of_timm(tmp_path):
    theirs, call = timm_reference(SMALL)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    kept = ("patch_size", "embed_dim", "depths", "num_heads", "window_size")
    sizes = {key: asdict(SMALL)[key] for key in (*kept, "mlp_ratio")}
    stored = {
        "architecture": NAME,
        "num_classes": 5,
        "num_features": 32,
        "global_pool": "avg",
        "model_args": sizes,
        "pretrained_cfg": {"input_size": [3, 24, 24], "crop_pct": 0.9},
    }
    (tmp_path / "config.json").write_text(json.dumps(stored))
    model = create_model(NAME, tmp_path)
    assert model.config == replace(SMALL, drop_path_rate=0.2)  # the name's
    theirs.eval()
    assert torch.allclose(model(images().float()), call(images().float()), atol=1e-5)


@pytest.mark.parametrize("name", [NAME, MLP_NAME])
def test_the_authors_files(name, tmp_path):
    """Keys and shapes of the released files, with what they compute beside."""
    key = "swin" if name == NAME else "swin_mlp"
    shapes = json.loads((LAYOUTS / f"{key}.json").read_text())["keys"]
    state = {k: torch.full(shape, 0.01) for k, shape in shapes.items()}
    assert key == "swin_mlp" or sum("attn_mask" in k for k in state) == 5
    torch.save({"model": state, "epoch": 299}, tmp_path / "swin.pth")
    with warnings.catch_warnings(action="error"):
        model = create_model(name, tmp_path / "swin.pth")
    assert all((p == 0.01).all() for p in model.parameters())
    names = set(OFFICIAL_FORMAT.apply(state, model))
    assert names == {k for k, _ in model.named_parameters()}


def test_a_checkpoint_for_another_window(tmp_path):
    """Tables interpolated as the authors' load_pretrained does it."""
    path, sizes = saved(small().float(), tmp_path), dict(asdict(SMALL), window_size=6)
    said = "relative positions interpolated from windows of 3 x 3 to 6 x 6"
    with pytest.warns(an.CheckpointWarning, match=said):
        model = create_model(NAME, path, **sizes | {"img_size": 48})
    assert not model.not_loaded
    old = small().float().stages[0].blocks.layers[1].position_bias.table.detach()
    image = old.T.reshape(1, 2, 5, 5)
    new = functional.interpolate(image, size=(11, 11), mode="bicubic")
    found = model.stages[0].blocks.layers[1].position_bias.table
    assert torch.equal(found, new.view(2, 121).T)
    back = found.view(11, 11, 2)[5, 5]  # the middle, offset (0, 0), stays
    assert torch.allclose(back, old.view(5, 5, 2)[2, 2], atol=1e-6)


@pytest.mark.parametrize("classes", [7, 0])
def test_a_checkpoint_of_another_number_of_classes(classes, tmp_path):
    theirs, _ = timm_reference(SMALL)
    path, sizes = saved(theirs, tmp_path), dict(asdict(SMALL), num_classes=classes)
    said = "re-initialized.*head.weight, head.bias" if classes else "skipped.*head"
    with pytest.warns(an.CheckpointWarning, match=said):
        model = create_model(NAME, path, **sizes)
    assert model.not_loaded == (("head.weight", "head.bias") if classes else ())


@pytest.mark.filterwarnings("ignore:relative positions interpolated")
def test_what_is_refused(tmp_path):
    path = saved(small().float(), tmp_path)
    for change, said in (
        (dict(patch_size=4), "misshapen: patch_embedding.weight"),
        (dict(depths=(2, 1, 1)), "unexpected"),
        (dict(num_heads=(4, 4, 1)), "position_bias.table"),
    ):
        with pytest.raises(an.CheckpointError, match=said):
            create_model(NAME, path, **dict(asdict(SMALL), **change))
    state = small().float().state_dict()
    state["stages.0.blocks.layers.0.position_bias.table"] = torch.zeros(24, 2)
    torch.save(state, path)
    with pytest.raises(an.CheckpointError, match="of a square window; got shape"):
        create_model(NAME, path, **asdict(SMALL))
    with pytest.raises(an.CheckpointError, match="unexpected|missing"):
        create_model(MLP_NAME, saved(small().float(), tmp_path), **asdict(SMALL))


def test_every_name_trains_small():
    for name in ALL_SIZES:
        tiny = dict(an.model_info(name).tiny)
        model = create_model(name, **tiny)
        inputs = an.example_inputs(name, **tiny)
        assert model(**inputs).shape == (2, tiny["num_classes"])
