"""PVT: equal to transformers and to the authors' code on the same weights; attention to
a reduced map that is multi-head attention where nothing is reduced; any size of image;
and the files that it is read from."""

import json
import math
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import attn_notes as an
from attn_notes.data.tasks import load_task
from attn_notes.foundations.attention import record_attention
from attn_notes.foundations.blocks import DropPath
from attn_notes.training.recipes import make_optimizer
from attn_notes.vision import pvt_evidence as evidence
from attn_notes.vision.pvt import PVT, SIZES, PVTBlock, PVTConfig, SpatialReduction
from attn_notes.vision.pvt_formats import HF_FORMAT, OFFICIAL_FORMAT, resize_bilinear
from attn_notes.zoo.benchmark import peak_memory
from attn_notes.zoo.checkpoints import shipped_weights
from attn_notes.zoo.devices import STAND_IN, fake_device, to_stand_in
from attn_notes.zoo.factory import count_parameters, create_model

LAYOUTS = Path(__file__).parent / "layouts"
AUTHORS = json.loads((LAYOUTS / "pvt_small.json").read_text())
NAME = "pvt_tiny"
SMALL = PVTConfig(
    img_size=64,
    num_classes=5,
    embed_dims=(8, 12, 16),
    depths=(1, 2, 1),
    num_heads=(1, 2, 4),
    mlp_ratios=(2, 1, 3),
    sr_ratios=(4, 2, 1),
    conv_norm_eps=1e-6,
)
STORED = PVTConfig(  # the authors' small file
    img_size=64,
    in_chans=2,
    num_classes=3,
    embed_dims=(4, 6, 8, 8),
    depths=(1, 2, 1, 1),
    num_heads=(1, 2, 2, 4),
    mlp_ratios=(2, 2, 1, 1),
)


def shake(model, seed=0):
    """Noise on every weight: no bias is zero, no norm neutral, no head silent."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def small(config=SMALL, **change):
    """Ours in double precision, shaken, in evaluation mode."""
    torch.manual_seed(0)
    return shake(PVT(replace(config, **change)).double().eval())


def images(config=SMALL, rows=2, sides=None, seed=0):
    sides = sides or (config.img_size, config.img_size)
    random = torch.Generator().manual_seed(seed)
    shape = (rows, config.in_chans, *sides)
    return torch.randn(shape, generator=random, dtype=torch.float64)


def pixels(*shape):
    """The images for which the authors' code was run."""
    return torch.arange(math.prod(shape)).double().mul(0.7).sin().view(shape)


def saved(model, folder):
    path = folder / "weights.pth"
    torch.save(model.state_dict(), path)
    return path


# ---- the sizes


@pytest.mark.parametrize("name", SIZES)
def test_counts_and_products(name):
    info, config = an.model_info(name), SIZES[name]
    model = create_model(name, device="meta")
    assert count_parameters(model) == info.parameters
    assert info.parameters == evidence.pvt_parameters(config)
    assert info.macs == sum(evidence.pvt_macs(config).values())
    with FlopCounterMode(display=False) as flops:
        model(torch.empty(1, *info.input_size, device="meta"))
    assert flops.get_total_flops() == 2 * info.macs
    if info.reported:
        assert f"{info.parameters / 1e6:.1f}M" == info.reported["parameters"]
        assert round(info.macs / 1e9, 1) == info.reported["GMACs"]


# ---- equal to the references


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"in_chans": 1, "img_size": 96, "sr_ratios": (8, 1, 1)},
        {"embed_dims": (8,) * 4, "depths": (1,) * 4, "num_heads": (2,) * 4}
        | {"mlp_ratios": (2,) * 4, "sr_ratios": (8, 4, 2, 1)},
    ],
    ids=["3 stages", "grey", "4 stages"],
)
def test_outputs_and_gradients_equal_the_reference(change, training, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    config = replace(SMALL, **change)
    theirs = shake(evidence.reference_model(config))
    with warnings.catch_warnings(action="error"):
        model = create_model(NAME, saved(theirs, tmp_path), **asdict(config))
    assert not model.not_loaded
    model, theirs = model.double().train(training), theirs.double().train(training)
    x = images(config)
    found, expected = model(x), theirs(x).logits
    assert (found - expected).abs().max() < 1e-10 and found.abs().max() > 0.1
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (found * weights).sum().backward(), (expected * weights).sum().backward()
    grads = HF_FORMAT.apply({k: p.grad for k, p in theirs.named_parameters()}, model)
    assert set(grads) == {key for key, _ in model.named_parameters()}
    for key, p in model.named_parameters():
        assert (p.grad - grads[key]).abs().max() < 1e-10, key


def test_the_authors_code():
    """At the size of the positions, and at one for which they are interpolated."""
    with warnings.catch_warnings(action="error"):
        model = create_model(NAME, LAYOUTS / "pvt_small.pth", **asdict(STORED))
    model.double()
    for key, sides in (("logits", (64, 64)), ("larger", (96, 128))):
        expected = torch.tensor(AUTHORS[key], dtype=torch.float64).view(2, 3)
        found = model(pixels(2, 2, *sides))
        assert (found - expected).abs().max() < 1e-12 and expected.abs().max() > 0.1


def test_the_authors_pyramid_for_detection():
    model = create_model(NAME, LAYOUTS / "pvt_small.pth", **asdict(STORED)).double()
    maps = model.forward_pyramid(pixels(1, 2, 96, 128))
    for found, expected in zip(maps, AUTHORS["pyramid"], strict=True):
        assert [*found.shape] == expected["shape"]
        values = torch.tensor(expected["values"], dtype=torch.float64)
        assert (found.flatten()[::7] - values).abs().max() < 1e-10


# ---- attention to a reduced map


def test_a_ratio_of_one_is_multi_head_attention():
    block = small(sr_ratios=(1, 1, 1)).stages[1].blocks.layers[0]
    assert block.reduction is None
    theirs = nn.MultiheadAttention(12, 2, batch_first=True).double()
    theirs.load_state_dict(block.attention.state_dict())
    x = torch.randn(2, 24, 12).double()
    found, expected = block.attend(x, (4, 6)), theirs(x, x, x)[0]
    assert (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize("ratio, sides", [(2, (4, 6)), (4, (8, 4)), (3, (3, 9))])
def test_the_reduction_is_reshaping_and_a_linear_layer(ratio, sides):
    """Equation by equation: squares of tokens side by side, W^S, a norm."""
    torch.manual_seed(0)
    reduction = shake(SpatialReduction(5, ratio).double())
    x = torch.randn(2, math.prod(sides), 5).double()
    rows = []
    for i in range(0, sides[0], ratio):
        for j in range(0, sides[1], ratio):
            square = x.view(2, *sides, 5)[:, i : i + ratio, j : j + ratio]
            rows.append(square.flatten(1))
    weight = reduction.projection.weight.permute(0, 2, 3, 1).flatten(1)
    y = functional.linear(torch.stack(rows, 1), weight, reduction.projection.bias)
    assert (reduction(x, sides) - reduction.norm(y)).abs().max() < 1e-12


def test_nothing_is_lost_where_the_squares_are_uniform():
    """Equal keys count once or many times alike: with the mean for a reduction, and a
    map of R x R equal tokens, reduced attention is that to all keys."""
    config = replace(SMALL, sr_ratios=(4, 1, 1))
    block = PVTBlock(config, stage=0, drop_path=0.0).double().eval()
    mean = torch.eye(8)[:, :, None, None].expand(-1, -1, 4, 4) / 16
    block.reduction.projection.weight.data = mean.double()
    block.reduction.projection.bias.data.zero_()
    block.reduction.norm = nn.Identity()
    coarse = torch.randn(2, 2, 3, 8).double()
    fine = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2).flatten(1, 2)
    found, expected = block.attend(fine, (8, 12)), block.attention(fine)
    assert (found - expected).abs().max() < 1e-12


def test_recorded_attention_has_the_reduced_keys():
    model, x = small(), images()
    with torch.no_grad(), record_attention(model) as maps:
        found = model(x)
    shapes = [(2, 1, 256, 16), (2, 2, 64, 16), (2, 2, 64, 16), (2, 4, 17, 17)]
    assert [tuple(w.shape) for w in maps.values()] == shapes
    for weights in maps.values():
        assert torch.allclose(weights.sum(-1), torch.tensor(1.0).double())
    assert torch.allclose(found, model(x), atol=1e-12)


# ---- images of any size


@settings(max_examples=8, deadline=None)
@given(sides=st.tuples(*[st.integers(1, 90)] * 2))
def test_any_size_is_padded_to_what_patches_and_reductions_need(sides):
    model, x = small(), images(sides=sides)
    assert SMALL.multiple == 16 and PVTConfig().multiple == 32
    below, right = (-side % 16 for side in sides)
    padded = functional.pad(x, (0, right, 0, below))
    with torch.no_grad():
        assert torch.equal(model(x), model(padded))
        maps = model.forward_pyramid(x)
        alone = model(x[:1])
    h, w = padded.shape[2:]
    shapes = [(d, h // s, w // s) for d, s in ((8, 4), (12, 8), (16, 16))]
    assert [tuple(y.shape[1:]) for y in maps] == shapes
    assert torch.allclose(model(x)[:1], alone, atol=1e-12)


def test_positions_on_another_grid():
    table = torch.arange(10.0).view(10, 1)  # one, and a grid of 3 x 3 that rises
    assert resize_bilinear(table, (3, 3), 1) is table
    grid = resize_bilinear(table, (3, 6), 1)
    assert grid[0] == 0 and grid[1:].view(3, 6).diff(dim=0).allclose(torch.tensor(3.0))
    with pytest.raises(an.CheckpointError, match="a square grid of them.*got 9"):
        resize_bilinear(table[1:], (3, 3), 1)


def test_a_size_that_needs_padding_has_its_positions():
    model = small(img_size=50)  # padded to 64
    assert [len(s.positions) for s in model.stages] == [256, 64, 17]
    assert model(images(sides=(50, 50))).shape == (2, 5)


def test_the_class_token_is_of_the_last_stage():
    model, x = small(), images()
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 17, 16)
    assert torch.equal(model(x), model.head(tokens[:, 0]))
    maps = model.forward_pyramid(x)
    model.class_token.data.mul_(-1)
    assert not torch.allclose(model(x), model.head(tokens[:, 0]))
    for before, after in zip(maps, model.forward_pyramid(x), strict=True):
        assert torch.equal(before, after)
    bare = small(num_classes=0)
    assert bare(x).shape == (2, 16)


# ---- training


def test_drop_path_rises_over_all_blocks():
    model = PVT(replace(SMALL, drop_path_rate=0.3, dropout=0.1))
    rates = [m.p for m in model.modules() if isinstance(m, DropPath) and m.p]
    assert rates == pytest.approx([0.1, 0.2, 0.3])
    assert {m.p for m in model.modules() if type(m) is nn.Dropout} == {0.1}


def test_the_papers_recipe():
    model, recipe = PVT(SMALL), an.model_info(NAME).recipes["paper"]
    decayed, spared = make_optimizer(model, recipe).param_groups
    named = {id(p): key for key, p in model.named_parameters()}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    keys = {named[id(p)] for p in decayed["params"]}
    assert sum("positions" in key for key in keys) == 3  # as the authors' code decays
    assert "class_token" in {named[id(p)] for p in spared["params"]}
    assert recipe.lr(recipe.warmup_steps) == 1e-3 and recipe.label_smoothing == 0.1
    assert [c.drop_path_rate for c in SIZES.values()][:4] == [0.1, 0.1, 0.3, 0.3]


def test_gradient_checkpointing():
    model, x, grads = small().train(), images(), []
    for again in (False, True):
        for stage in model.stages:
            stage.blocks.gradient_checkpointing = again
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_fake_tensors_of_another_size():
    model = PVT(SMALL)
    with fake_device():
        to_stand_in(model)
        x = torch.empty(2, 3, 60, 46, device=STAND_IN)
        logits = model(x)
        logits.sum().backward()
    assert str(logits.device) == STAND_IN and logits.shape == (2, 5)
    assert all(p.grad is not None for p in model.parameters())


def test_channels_last():
    model, x = small(), images(sides=(60, 46))
    with torch.no_grad():
        expected = model(x)
        model.to(memory_format=torch.channels_last)
        found = model(x.to(memory_format=torch.channels_last))
    assert torch.allclose(found, expected, atol=1e-12)


# ---- bad input

WRONG = {
    "grey": torch.zeros(2, 1, 64, 64),
    "bytes": torch.zeros(2, 3, 64, 64, dtype=torch.uint8),
    "one image": torch.zeros(3, 64, 64),
    "no image": torch.zeros(0, 3, 64, 64),
    "no pixels": torch.zeros(2, 3, 0, 64),
    "a list": [torch.zeros(3, 64, 64)],
}


@pytest.mark.no_shapes
@pytest.mark.parametrize("given", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("call", ["forward", "forward_features", "forward_pyramid"])
def test_bad_images(given, call):
    with pytest.raises(an.InputError, match=r"^images: expected [^\n]*; got [^\n]*$"):
        getattr(PVT(SMALL), call)(given)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"sr_ratios": (4, 2, 2)}, "sr_ratios: expected 1 in the last stage"),
        ({"depths": (1, 1)}, "expected a number for each stage in all; got"),
        ({"num_heads": (1, 5, 4)}, "num_heads: expected a divisor of width of the st"),
        ({"sr_ratios": (0, 2, 1)}, "sr_ratios: expected"),
        ({"img_size": 0}, "img_size: expected"),
    ],
)
def test_bad_configurations(change, said):
    with pytest.raises(an.ConfigError, match=said):
        replace(SMALL, **change)


# ---- files


def test_the_authors_files(tmp_path):
    """Keys and shapes of the released files."""
    shapes = json.loads((LAYOUTS / "pvt.json").read_text())["keys"]
    state = {k: torch.full(shape, 0.01) for k, shape in shapes.items()}
    torch.save(state, tmp_path / "pvt_tiny.pth")
    with warnings.catch_warnings(action="error"):
        model = create_model(NAME, tmp_path / "pvt_tiny.pth")
    assert all((p == 0.01).all() for p in model.parameters())
    assert not model.not_loaded
    names = set(OFFICIAL_FORMAT.apply(state, model))
    assert names == {k for k, _ in model.named_parameters()}


def test_a_folder_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    theirs = shake(evidence.reference_model(SMALL)).eval()
    theirs.save_pretrained(tmp_path)
    model = create_model(NAME, tmp_path)
    assert model.config == SMALL
    x = images().float()
    assert torch.allclose(model(x), theirs(x).logits, atol=1e-5)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"model_type": "pvt_v2"}, "model_type: expected pvt; got 'pvt_v2'"),
        ({"hidden_act": "relu"}, "hidden_act: expected gelu"),
        ({"strides": [4, 2, 1, 2]}, "strides: expected"),
        ({"patch_sizes": [2, 2, 2, 2]}, "patch_sizes: expected"),
    ],
)
def test_another_model_of_transformers(change, said):
    with pytest.raises(an.ConfigError, match=said):
        HF_FORMAT.config(change)


def test_the_number_of_classes_of_transformers():
    """Of its versions the new ones store it, the old ones the names alone."""
    names = {str(i): f"class {i}" for i in range(7)}
    for stored in ({"num_labels": 7}, {"id2label": names}):
        assert HF_FORMAT.config(stored)["num_classes"] == 7


def test_saved_and_read_back(tmp_path):
    model = small().float()
    model.save_pretrained(tmp_path)
    again = create_model(NAME, tmp_path)
    assert again.config == SMALL
    assert torch.equal(again(images().float()), model(images().float()))


def test_a_checkpoint_for_another_size(tmp_path):
    """Positions interpolated once are those that the model interpolates each time."""
    model = small().float()
    model.save_pretrained(tmp_path)
    said = "positions interpolated to maps of other sides: 16 to 24, 8 to 12, 4 to 6"
    with pytest.warns(an.CheckpointWarning, match=said):
        larger = create_model(NAME, tmp_path, img_size=96)
    x = images(sides=(96, 96)).float()
    assert torch.allclose(larger(x), model(x), atol=1e-5)


@pytest.mark.parametrize("classes", [7, 0])
def test_a_checkpoint_of_another_number_of_classes(classes, tmp_path):
    sizes = dict(asdict(STORED), num_classes=classes)
    said = "re-initialized.*head.weight, head.bias" if classes else "skipped.*head"
    with pytest.warns(an.CheckpointWarning, match=said):
        model = create_model(NAME, LAYOUTS / "pvt_small.pth", **sizes)
    assert model.not_loaded == (("head.weight", "head.bias") if classes else ())


@pytest.mark.parametrize(
    "change, said",
    [
        ({"sr_ratios": (4, 4, 2, 1)}, "misshapen: stages.0.blocks.layers.0.reduction"),
        ({"depths": (1, 1, 1, 1)}, "unexpected"),
        ({"patch_size": 2}, "misshapen: stages.0.projection.weight"),
    ],
)
@pytest.mark.filterwarnings("ignore:positions interpolated")
def test_what_is_refused(change, said):
    with pytest.raises(an.CheckpointError, match=said):
        path = LAYOUTS / "pvt_small.pth"
        create_model(NAME, path, **dict(asdict(STORED), **change))


# ---- what ships, and the experiments


def test_the_shipped_weights_tell_photographs_apart():
    task = load_task(shipped_weights("pvt_book"))
    scores = task.evaluate(create_model("pvt_book", pretrained=True), "valid")
    assert scores["accuracy"] > 0.7 and "temple" in task.classes


def test_the_networks_beside_are_of_one_size():
    counts = {n: count_parameters(evidence.network(n, 0)) for n in evidence.NETWORKS}
    own = counts.pop("pvt")
    assert own == an.model_info("pvt_book").parameters
    for name in ("vit4", "vit8", "resnet"):
        assert abs(counts[name] / own - 1) < 0.05
    image = torch.randn(2, 3, 64, 64)
    assert evidence.network("resnet", 0)(image).shape == (2, 10)
    full = evidence.network("pvt all keys", 0)
    assert all(b.reduction is None for b in full.modules() if isinstance(b, PVTBlock))


@pytest.mark.parametrize("ratio", [1, 2])
def test_the_cost_of_a_layer_is_the_formula(ratio):
    found = evidence.time_attention(seed=0, ratio=ratio, side=8)
    n, m = 64, 64 // ratio**2
    dense = 64**2 * ((2 + (ratio > 1)) * n + 2 * m)
    assert found["macs"] == dense + 2 * n * m * 64 and found["seconds"] > 0


def test_a_forward_holds_no_more_than_the_library_s():
    ours, theirs, _ = evidence.pvt_pair(training=False, b=1)
    assert peak_memory(ours) <= 1.01 * peak_memory(theirs)
