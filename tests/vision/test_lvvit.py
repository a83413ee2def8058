"""LV-ViT: equal to its definition, the authors' files, MixToken, what is refused."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attn_notes as an
from attn_notes.foundations.checks import (
    CheckpointError,
    CheckpointWarning,
    ConfigError,
    InputError,
)
from attn_notes.vision.lvvit import SIZES, LVViT, LVViTConfig, LVViTOutput, mix_tokens
from attn_notes.zoo.factory import count_parameters, create_model

LAYOUTS = Path(__file__).parent / "layouts"
SMALL = LVViTConfig(
    img_size=24,
    patch_size=4,
    in_chans=2,
    num_classes=5,
    embed_dim=12,
    depth=3,
    num_heads=3,
    mlp_ratio=2.5,
    stem_width=6,
)
SCALES = pytest.mark.parametrize("scale", [1.0, 2.0, 3.0])


def small(seed=0, **change):
    torch.manual_seed(seed)
    model = LVViT(replace(SMALL, **change)).double().eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    for key, b in model.named_buffers():
        if "running" in key:
            b += torch.rand_like(b)
    return model


def images(rows=3, sides=(24, 24), seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, *sides, generator=random, dtype=torch.float64)


# ---- the sizes


@pytest.mark.parametrize("name", SIZES)
def test_counts_and_products(name):
    c, info = SIZES[name], an.model_info(name)
    d, h, k, w = (
        c.embed_dim,
        int(c.embed_dim * c.mlp_ratio),
        c.num_classes,
        c.stem_width,
    )
    n, half = (c.img_size // c.patch_size) ** 2, c.patch_size // 2
    stem = c.in_chans * 49 * w + 2 * 9 * w * w
    counted = stem + 6 * w + (w * half**2 + 1) * d + d + (n + 1) * d + 2 * d
    counted += c.depth * (4 * d * d + d + 2 * d * h + h + d + 4 * d) + 2 * (d + 1) * k
    products = stem * (c.img_size // 2) ** 2 + n * w * half**2 * d + (n + 1) * d * k
    products += c.depth * (n + 1) * (4 * d * d + 2 * d * h + 2 * (n + 1) * d)
    model = create_model(name, device="meta").eval()
    assert count_parameters(model) == counted == info.parameters
    with FlopCounterMode(display=False) as flops:
        model(torch.empty(1, *info.input_size, device="meta"))
    assert flops.get_total_flops() == 2 * products == 2 * info.macs
    if said := info.reported.get("parameters"):
        assert f"{counted / 1e6:.2f}M" == said


# ---- equal to its definition


def by_definition(model, x, box=None):
    """The two heads, written out of the model's weights."""
    c, w = model.config, dict(model.named_parameters()) | dict(model.named_buffers())
    for i, stride in ((0, 2), (3, 1), (6, 1)):
        key = f"stem.layers.{i}.weight"
        x = F.conv2d(x, w[key], None, stride, w[key].shape[-1] // 2)
        norm = [w[f"stem.layers.{i + 1}.{n}"] for n in ("running_mean", "running_var",
                                                      "weight", "bias")]  # fmt: skip
        x = F.batch_norm(x, *norm, training=model.training, momentum=0.0).relu()
    half = c.patch_size // 2
    x = F.conv2d(x, w["stem.projection.weight"], w["stem.projection.bias"], half)
    b, d, rows, columns = x.shape
    z = [[x[i, :, r, s] for r in range(rows) for s in range(columns)] for i in range(b)]
    inside = lambda t: (
        box is not None
        and (box[0] <= t // columns < box[2] and box[1] <= t % columns < box[3])
    )
    swap = lambda z: [
        [z[-1 - i if inside(t) else i][t] for t in range(rows * columns)]
        for i in range(b)
    ]
    x = torch.stack([torch.stack([w["class_token"], *row]) for row in swap(z)])
    x = x + w["positions.weight"]
    for i in range(c.depth):
        at = lambda name, i=i: w[f"encoder.layers.{i}.{name}"]
        y = F.layer_norm(x, (d,), at("norm1.weight"), at("norm1.bias"))
        q, k, v = (y @ at("attention.in_proj_weight").mT).chunk(3, -1)
        heads = []
        for parts in zip(*(a.chunk(c.num_heads, -1) for a in (q, k, v)), strict=True):
            q, k, v = parts
            heads.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)
        y = F.linear(torch.cat(heads, -1), at("attention.out_proj.weight"),
                     at("attention.out_proj.bias"))  # fmt: skip
        x = x + y / c.residual_scale
        y = F.layer_norm(x, (d,), at("norm2.weight"), at("norm2.bias"))
        y = F.gelu(F.linear(y, at("feed_forward.linear1.weight"),
                            at("feed_forward.linear1.bias")))  # fmt: skip
        y = F.linear(y, at("feed_forward.linear2.weight"),
                     at("feed_forward.linear2.bias"))  # fmt: skip
        x = x + y / c.residual_scale
    x = F.layer_norm(x, (d,), w["encoder.norm.weight"], w["encoder.norm.bias"])
    tokens = F.linear(x[:, 1:], w["token_head.weight"], w["token_head.bias"])
    back = torch.stack([torch.stack(row) for row in swap([*map(list, tokens)])])
    return F.linear(x[:, 0], w["head.weight"], w["head.bias"]), back


@SCALES
@pytest.mark.parametrize("box", [None, (1, 0, 4, 5)], ids=["", "mixed"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_equal_to_its_definition(scale, box, training):
    """Outputs, and gradients of a loss of all of them."""
    model, x = small(residual_scale=scale).train(training), images()
    whole, tokens = by_definition(model, x, box)
    expected = [whole, tokens]
    if not training:
        expected = [whole + 0.5 * tokens.max(1).values] if box is None else [whole]
    output = model(x, box=box)
    found = [output.logits, output.token_logits] if training else [output]
    if not training and box is not None:
        found = [model.head(model.forward_features(x, box)[:, 0])]
    weights = dict(model.named_parameters())
    grads = []
    for some in (found, expected):
        total = sum((a * (i + a.detach().sin())).sum() for i, a in enumerate(some))
        own = torch.autograd.grad(total, weights.values(), allow_unused=True)
        grads.append(own)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < 1e-10 and a.abs().max() > 0.1
    for key, a, b in zip(weights, *grads, strict=True):
        assert (a is None) == (b is None), key
        assert a is None or (a - b).abs().max() < 1e-10, key


def test_mixing_twice_is_no_mixing():
    x, box = torch.randn(5, 6, 7, 3), (1, 2, 4, 7)
    mixed = mix_tokens(x, box)
    assert torch.equal(mixed[0, 1:4, 2:], x[4, 1:4, 2:])
    assert torch.equal(mixed[0, 4:], x[0, 4:]) and torch.equal(mixed[2], x[2])
    assert torch.equal(mix_tokens(mixed, box), x) and mix_tokens(x, None) is x


def test_a_whole_box_exchanges_the_images_and_their_answers():
    """All patches are the other's; the class token sees the other image."""
    model, x = small().train(), images(4)
    whole, mixed = model(x), model(x, box=(0, 0, 6, 6))
    assert torch.allclose(mixed.logits, whole.logits.flip(0))
    assert torch.allclose(mixed.token_logits, whole.token_logits)
    assert isinstance(whole, LVViTOutput) and [*whole] == ["logits", "token_logits"]


def test_a_row_of_a_batch_is_an_image_by_itself():
    model, x = small(), images(3)
    assert torch.allclose(model(x)[1], model(x[1:2])[0], atol=1e-12)
    assert torch.allclose(model(x.flip(0)), model(x).flip(0), atol=1e-12)


@pytest.mark.parametrize("sides", [(24, 24), (32, 20), (4, 48)], ids=str)
def test_other_sizes(sides):
    model = small()
    output = model.train()(images(sides=sides))
    n = sides[0] * sides[1] // 16
    assert output.token_logits.shape == (3, n, 5) and output.logits.shape == (3, 5)


def test_without_the_second_head_and_without_classes():
    plain = small(token_labelling=False)
    plain.load_state_dict(small().state_dict(), strict=False)
    both = small()
    states = both.forward_features(images())
    assert torch.equal(plain(images()), both.head(states[:, 0]))
    assert plain.train()(images()).shape == (3, 5)
    bare = small(num_classes=0)
    assert torch.equal(bare(images()), bare.forward_features(images())[:, 0])


def test_the_start_of_the_authors_code():
    torch.manual_seed(0)
    model = LVViT(replace(SIZES["lvvit_small"], depth=2))
    for name, value in model.named_parameters():
        if "norm" in name or name.startswith("stem"):
            continue
        assert (
            (value == 0).all()
            if name.endswith("bias")
            else (abs(value.std() - 0.02) < 0.002)
        ), name
    assert not [key for key, _ in model.named_parameters() if "in_proj_bias" in key]


# ---- files


def official_file(path, change=None):
    """A file with the keys and shapes of the authors' LV-ViT-S, as timm's script
    wrote it."""
    layout = json.loads((LAYOUTS / "lvvit.json").read_text())["lvvit_s"]
    random = torch.Generator().manual_seed(0)
    state = {
        f"module.{key}": torch.rand(shape, generator=random) * 0.05
        for key, shape in layout.items()
    }
    state |= {key: torch.tensor(7) for key in state if key.endswith("tracked")}
    state = change(state) if change else state
    torch.save({"epoch": 309, "arch": "lvvit_s", "state_dict": state}, path)
    return state


def test_the_authors_file(tmp_path):
    path = tmp_path / "lvvit_s-26M-224-83.3.pth.tar"
    state = official_file(path)
    with warnings.catch_warnings(action="error"):
        model = create_model("lvvit_small", path)
    own = model.state_dict()
    assert not model.not_loaded and len(own) == len(state)
    pairs = {
        "class_token": "cls_token",
        "positions.weight": "pos_embed",
        "stem.layers.3.weight": "patch_embed.conv2.weight",
        "stem.layers.7.running_var": "patch_embed.bn3.running_var",
        "stem.projection.bias": "patch_embed.proj.bias",
        "encoder.layers.15.attention.in_proj_weight": "blocks.15.attn.qkv.weight",
        "encoder.layers.15.feed_forward.linear2.bias": "blocks.15.mlp.fc2.bias",
        "encoder.norm.weight": "norm.weight",
        "head.weight": "head.weight",
        "token_head.weight": "aux_head.weight",
    }
    for ours, theirs in pairs.items():
        value = state[f"module.{theirs}"]
        assert torch.equal(own[ours], value.reshape(own[ours].shape)), ours


def test_the_authors_file_in_other_models(tmp_path):
    path = tmp_path / "lvvit.pth.tar"
    state = official_file(path)
    with pytest.warns(CheckpointWarning, match="from 14 x 14 to 24 x 24 patches"):
        larger = create_model("lvvit_small", path, img_size=384)
    assert larger.positions.weight.shape == (577, 384)
    with pytest.warns(CheckpointWarning, match="head"):
        other = create_model("lvvit_small", path, num_classes=7)
    assert other.head.weight.shape == other.token_head.weight.shape == (7, 384)
    with pytest.warns(CheckpointWarning, match="token_head"):
        one = create_model("lvvit_small", path, token_labelling=False)
    assert torch.equal(one.head.bias, state["module.head.bias"])
    official_file(path, lambda s: {k: v for k, v in s.items() if "conv3" not in k})
    with pytest.raises(CheckpointError, match=r"stem\.layers\.6\.weight"):
        create_model("lvvit_small", path)


# ---- what is refused


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "given, said",
    [
        ({"images": images(sides=(22, 24))}, "images: expected sides that are mult"),
        ({"images": images()[:, :1]}, "images: expected"),
        ({"images": images()[0]}, "images: expected"),
        ({"images": images(), "box": (0, 0, 7, 2)}, r"box: expected .* within 6 x 6"),
        ({"images": images(), "box": (3, 0, 2, 2)}, "box: expected top, left"),
        ({"images": images(), "box": (0, 1)}, r"box: expected .* got \(0, 1\)"),
    ],
    ids=["sides", "channels", "one image", "outside", "turned", "half a box"],
)
def test_bad_input(given, said):
    with pytest.raises(InputError, match=said):
        small()(**given)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"patch_size": 3}, "patch_size"),
        ({"img_size": 26}, "img_size"),
        ({"num_heads": 5}, "num_heads"),
        ({"residual_scale": 0.0}, "residual_scale"),
    ],
    ids=str,
)
def test_bad_sizes(change, said):
    with pytest.raises(ConfigError, match=said):
        replace(SMALL, **change)


def test_the_book_model_tells_photographs():
    from attn_notes.data.tasks import load_task
    from attn_notes.zoo.registry import weights_folder

    model = create_model("lvvit_book", pretrained=True)
    task = load_task(weights_folder("lvvit_book"))
    assert task.evaluate(model)["accuracy"] > 0.6
    assert isinstance(model.token_head, nn.Linear)
