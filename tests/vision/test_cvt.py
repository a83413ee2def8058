"""CvT: equal to transformers and to the authors' code on the same weights; convolutions
that are what plain code makes of them; images of any size, and what tells tokens where
they are; the files that it is read from; and the networks of its trainings."""

import json
import math
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import attn_notes as an
from attn_notes.data.tasks import load_task
from attn_notes.foundations.blocks import DropPath
from attn_notes.training.recipes import make_optimizer
from attn_notes.vision import cvt_evidence as evidence
from attn_notes.vision.cvt import SIZES, CvT, CvTConfig
from attn_notes.vision.cvt_formats import HF_FORMAT, OFFICIAL_FORMAT
from attn_notes.zoo.checkpoints import fit_state
from attn_notes.zoo.factory import count_parameters, create_model
from attn_notes.zoo.registry import weights_folder

LAYOUTS = Path(__file__).parent / "layouts"
SMALL = CvTConfig(
    img_size=40,
    in_chans=2,
    num_classes=5,
    embed_dims=(8, 12, 16),
    depths=(1, 2, 3),
    num_heads=(1, 3, 2),
    mlp_ratio=1.5,
    activation="gelu",
)
STORED = replace(  # the authors' small files
    SMALL,
    img_size=32,
    num_classes=3,
    embed_dims=(4, 8),
    depths=(1, 2),
    num_heads=(1, 2),
    patch_sizes=(7, 3),
    patch_strides=(4, 2),
    patch_paddings=(2, 1),
    activation="quick_gelu",
)


def shake(model, seed=0):
    """Noise on every weight and on the averages of batch norm."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer += torch.rand_like(buffer)
    return model


def small(**change):
    """Ours in double precision, shaken, in evaluation mode."""
    return shake(CvT(replace(SMALL, **change))).double().eval()


def images(sides=(40, 40), rows=2, seed=0):
    random = torch.Generator().manual_seed(seed)
    shape = (rows, SMALL.in_chans, *sides)
    return torch.randn(shape, generator=random, dtype=torch.float64)


# ---- the sizes


@pytest.mark.parametrize("name", SIZES)
def test_counts_and_products(name):
    info, c = an.model_info(name), SIZES[name]
    channels, side, total, products = c.in_chans, c.img_size, 0, 0
    for i, (d, depth) in enumerate(zip(c.embed_dims, c.depths, strict=True)):
        size, stride, padding = c.windows[i]
        side = (side + 2 * padding - size) // stride + 1
        token = int(i == len(c.depths) - 1)
        n, m = side**2, math.ceil(side / 2) ** 2
        total += size**2 * channels * d + 3 * d + token * d
        products += n * size**2 * channels * d
        wide = int(c.mlp_ratio * d)
        total += depth * (4 * d * d + 2 * d * wide + 5 * d + wide + 4 * d + 3 * 11 * d)
        own = 9 * d * (n + 2 * m) + 2 * (n + token) * (m + token) * d
        own += (n + token) * (2 * d * d + 2 * d * wide) + (m + token) * 2 * d * d
        products, channels = products + depth * own, d
    total += 2 * d + (d + 1) * c.num_classes
    assert count_parameters(create_model(name, device="meta")) == total
    assert info.parameters == total and info.macs == products + d * c.num_classes
    if name != "cvt_w24":
        model = create_model(name, device="meta").eval()
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            model(torch.empty(1, *info.input_size, device="meta"))
        assert flops.get_total_flops() == 2 * info.macs
    if info.reported:
        assert round(total / 1e6) == int(info.reported["parameters"][:-1])
        assert info.macs / 1e9 == pytest.approx(info.reported["GMACs"], rel=0.02)


# ---- equal to the references


def hf_reference(config=SMALL):
    """transformers' classifier of these sizes, shaken."""
    pytest.importorskip("transformers")
    return shake(evidence.hf_model(config))


@pytest.fixture(scope="module")
def twins():
    """transformers' classifier and ours, with the same weights, in double precision."""
    theirs, ours = hf_reference(), CvT(SMALL)
    fit_state(ours, theirs.state_dict(), (HF_FORMAT,))
    return theirs.double(), ours.double()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("sides", [(40, 40), (33, 47), (3, 5)], ids=str)
def test_outputs_and_gradients_equal_transformers(twins, training, sides):
    theirs, ours = (model.train(training) for model in twins)
    theirs.zero_grad(), ours.zero_grad()
    x = images(sides, rows=3)
    found, expected = ours(x), theirs(x).logits
    assert (found - expected).abs().max() < 1e-10 and found.abs().max() > 0.1
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (found * weights).sum().backward(), (expected * weights).sum().backward()
    grads = {k: p.grad for k, p in theirs.named_parameters()}
    grads = HF_FORMAT.apply(grads, ours)
    assert set(grads) == {key for key, _ in ours.named_parameters()}
    for key, p in ours.named_parameters():
        assert (p.grad - grads[key]).abs().max() < 1e-10, key


def test_the_pyramid_equals_transformers(twins):
    theirs, ours = (model.eval() for model in twins)
    with torch.no_grad():
        expected = theirs(images((33, 47)), output_hidden_states=True).hidden_states
        found = ours.forward_pyramid(images((33, 47)))
    assert [y.shape[1:] for y in found] == [(8, 8, 12), (12, 4, 6), (16, 2, 3)]
    for y, x in zip(found, expected, strict=True):
        assert (y - x).abs().max() < 1e-10


@pytest.mark.slow
def test_the_small_size_equals_transformers():
    config = replace(SIZES["cvt_13"], activation="gelu", drop_path_rate=0.0)
    theirs, ours = evidence.hf_model(config).eval(), CvT(config).eval()
    fit_state(ours, theirs.state_dict(), (HF_FORMAT,))
    x = torch.randn(1, 3, 224, 224)
    found, expected = ours(x), theirs(x).logits
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_the_authors_code():
    """Logits that the authors' code gave once, from the file that it wrote."""
    stored = json.loads((LAYOUTS / "cvt_small.json").read_text())["logits"]
    with warnings.catch_warnings(action="error"):
        path = LAYOUTS / "cvt_small.pth"
        model = create_model("cvt_13", path, **asdict(STORED)).double()
    for name, expected in stored.items():
        sides = [int(side) for side in name.split(" x ")]
        pixels = torch.arange(4 * math.prod(sides)).double().mul(0.7).sin()
        found = model(pixels.view(2, 2, *sides)).flatten()
        assert (found - torch.tensor(expected).double()).abs().max() < 1e-6


# ---- what the layers are


def test_a_block_is_plain_convolutions_and_attention():
    model, x = small(), torch.randn(2, 17, 16).double()
    block = model.stages[2].blocks.layers[1]
    grid, parts = x[:, 1:].mT.unflatten(2, (4, 4)), []
    for name, stride in (("q", 1), ("k", 2), ("v", 2)):
        conv, norm = block.projections[name].conv, block.projections[name].norm
        y = functional.conv2d(grid, conv.weight, None, stride, 1, groups=16)
        y = (y - norm.running_mean.view(-1, 1, 1)) / (
            norm.running_var.view(-1, 1, 1) + norm.eps
        ).sqrt()
        y = y * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
        parts.append(torch.cat([x[:, :1], y.flatten(2).mT], 1))
    W = block.attention.in_proj_weight.chunk(3)
    b = block.attention.in_proj_bias.chunk(3)
    q, k, v = (
        functional.linear(p, w, c).unflatten(-1, (2, 8)).transpose(1, 2)
        for p, w, c in zip(parts, W, b, strict=True)
    )
    weights = (q @ k.mT / 16**0.5).softmax(-1)
    expected = block.attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
    with an.record_attention(block) as maps:
        assert (block.attend(x, (4, 4)) - expected).abs().max() < 1e-12
    (found,) = maps.values()
    assert found.shape == (2, 2, 17, 5) and torch.allclose(found, weights)


def test_recorded_attention_has_the_squeezed_keys():
    model = small()
    with torch.no_grad(), an.record_attention(model) as maps:
        model(images())
    shapes = [(2, 1, 100, 25)] + [(2, 3, 25, 9)] * 2 + [(2, 2, 10, 5)] * 3
    assert [w.shape for w in maps.values()] == shapes


def test_features_pyramid_and_logits():
    model, x = small(), images()
    features = model.forward_features(x)
    assert features.shape == (2, 10, 16)
    assert torch.equal(model(x), model.head(features[:, 0]))
    last = model.forward_pyramid(x)[-1]
    expected = model.norm(last.flatten(2).mT)
    assert torch.allclose(features[:, 1:], expected)
    bare = small(num_classes=0)
    bare.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(bare(x), features[:, 0])


def test_company_changes_nothing():
    model, x = small(), images((23, 30), rows=3)
    with torch.no_grad():
        together = model(x)
        for i in range(3):
            assert torch.allclose(model(x[i : i + 1])[0], together[i], atol=1e-12)


@pytest.mark.parametrize(
    "model, same", [("vit", True), ("plain", True), ("cvt", False)]
)
def test_without_positions_the_order_of_the_patches(model, same):
    """Nothing to a ViT, nor to CvT without its convolutions; something to CvT."""
    net = evidence.network(model, "none", seed=0).eval()
    nn.init.normal_(net.head.weight)
    x = torch.randn(1, 1, 28, 28)
    side = 7 if model == "vit" else 8  # pixels of a token of the last map
    parts = (
        x[..., : 3 * side, : 3 * side].unflatten(3, (3, side)).unflatten(2, (3, side))
    )
    y = x.clone()
    y[..., : 3 * side, : 3 * side] = parts.flip(2).flatten(4, 5).flatten(2, 3)
    assert not torch.equal(x, y)
    assert ((net(x) - net(y)).abs().max() < 1e-4) == same


def test_positions_of_the_trainings():
    """The other weights start the same; another size is interpolated."""
    placed, bare = (evidence.network("cvt", p, 0).eval() for p in ("added", "none"))
    state = {k.replace(".embedding.embedding.", ".embedding."): v
             for k, v in placed.state_dict().items()}  # fmt: skip
    table = state.pop("stages.0.embedding.positions.weight")
    assert table.shape == (49, 40) and state.keys() == bare.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in bare.state_dict().items())
    x = torch.randn(2, 1, 42, 42)
    assert (placed(x) - bare(x)).abs().max() > 1e-6
    spared = make_optimizer(placed, an.model_info("cvt_13").recipes["tiny"])
    spared = {id(p) for p in spared.param_groups[1]["params"]}
    assert id(placed.stages[0].embedding.positions.weight) in spared


# ---- training


def test_drop_path_rises_in_the_last_stage():
    model = CvT(replace(SMALL, drop_path_rate=0.4, dropout=0.1))
    rates = [m.p for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.2, 0.4])
    assert {m.p for m in model.modules() if type(m) is nn.Dropout} == {0.1}


def test_the_papers_recipe():
    info = an.model_info("cvt_13")
    recipe, model = info.recipes["paper"], CvT(SMALL)
    decayed, spared = make_optimizer(model, recipe).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    named = {id(p): key for key, p in model.named_parameters()}
    assert "stages.2.class_token" in {named[id(p)] for p in spared["params"]}
    assert all("norm" not in named[id(p)] for p in decayed["params"])
    assert recipe.lr(recipe.warmup_steps) == 2e-3 == 8 * 2.5e-4
    assert recipe.lr(recipe.max_steps) == pytest.approx(1e-5)
    larger = an.model_info("cvt_w24")
    assert larger.recipes["paper"].weight_decay == 0.1
    assert larger.config.drop_path_rate == 0.3 and larger.crop_pct is None


def test_the_shipped_weights_tell_digits_apart():
    task = load_task(weights_folder("cvt_book"))
    scores = task.evaluate(create_model("cvt_book", pretrained=True), "valid")
    assert scores["accuracy"] > 0.9 and task.classes == [*"0123456789"]


# ---- bad input

WRONG = {
    "three channels": torch.zeros(2, 3, 40, 40),
    "bytes": torch.zeros(2, 2, 40, 40, dtype=torch.uint8),
    "one image": torch.zeros(2, 40, 40),
    "no image": torch.zeros(0, 2, 40, 40),
    "too small": torch.zeros(2, 2, 2, 40),
    "a list": [torch.zeros(2, 40, 40)],
}


@pytest.mark.no_shapes
@pytest.mark.parametrize("given", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("call", ["forward", "forward_features", "forward_pyramid"])
def test_bad_images(given, call):
    with pytest.raises(an.InputError, match=r"^images: expected .*; got .*") as caught:
        getattr(CvT(SMALL), call)(given)
    assert "\n" not in str(caught.value)


def test_the_smallest_image():
    assert SMALL.min_side == 3 and CvT(SMALL).eval()(torch.randn(1, 2, 3, 3)).shape
    bare = replace(SMALL, patch_paddings=(0, 0, 0))  # 3 for 1, 7 for 3, 31 for 7
    assert bare.min_side == 31 and CvT(bare).eval()(torch.randn(1, 2, 31, 31)).shape


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "change",
    [
        dict(num_heads=(1, 5, 2)),
        dict(num_heads=(1, 3)),
        dict(depths=()),
        dict(patch_paddings=(2, 1)),
        dict(depths=(1, 0, 1)),
        dict(stride_kv=0),
        dict(activation="relu"),
        dict(drop_path_rate=1.0),
        dict(img_size=2),
    ],
    ids=str,
)
def test_bad_configurations(change):
    with pytest.raises(an.ConfigError, match=f"{next(iter(change))}: expected .*; got"):
        replace(SMALL, **change)


# ---- files


def test_saved_and_read_back(tmp_path):
    model = small().float()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        again = create_model("cvt_13", tmp_path)
    assert again.config == model.config
    assert torch.equal(again(images().float()), model(images().float()))


def test_a_folder_of_transformers(tmp_path):
    theirs = hf_reference(replace(SMALL, drop_path_rate=0.3))
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        model = create_model("cvt_13", tmp_path)
    expected = replace(SMALL, drop_path_rate=0.3, img_size=224)
    assert model.config == expected
    theirs.eval()
    x = images().float()
    assert torch.allclose(model(x), theirs(x).logits, atol=1e-5)
    stored = json.loads((tmp_path / "config.json").read_text())
    for change in (
        {"model_type": "vit"},
        {"qkv_projection_method": ["avg"] * 3},
        {"kernel_qkv": [3, 3, 5]},
        {"cls_token": [True] * 3},
        {"stride_kv": [4, 2, 1]},
    ):
        (tmp_path / "config.json").write_text(json.dumps(stored | change))
        with pytest.raises(an.CheckpointError, match=f"{next(iter(change))}.*expected"):
            create_model("cvt_13", tmp_path)


def test_the_authors_files(tmp_path):
    """Keys and shapes of the released files."""
    shapes = json.loads((LAYOUTS / "cvt.json").read_text())["keys"]
    state = {
        k: torch.zeros(s).long() if "num_b" in k else torch.full(s, 0.01)
        for k, s in shapes.items()
    }
    torch.save(state, tmp_path / "CvT-13-224x224-IN-1k.pth")
    with warnings.catch_warnings(action="error"):
        model = create_model("cvt_13", tmp_path / "CvT-13-224x224-IN-1k.pth")
    assert model.config == SIZES["cvt_13"] and not model.not_loaded
    assert all((p == 0.01).all() for p in model.parameters())
    assert set(OFFICIAL_FORMAT.apply(state, model)) == set(model.state_dict())


def test_a_head_of_other_classes_and_what_is_refused(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(small().float().state_dict(), path)
    sizes = dict(asdict(SMALL), num_classes=7)
    with pytest.warns(an.CheckpointWarning, match="re-initialized.*head.weight"):
        model = create_model("cvt_13", path, **sizes)
    assert model.not_loaded == ("head.weight", "head.bias")
    with pytest.raises(an.CheckpointError, match="misshapen|missing|unexpected"):
        create_model("cvt_13", path, **dict(asdict(SMALL), depths=(1, 1, 3)))
