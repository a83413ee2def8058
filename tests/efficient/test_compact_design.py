"""Compact design: costs in closed form against torch's counter, the space of designs
against a plain enumeration, and the convolutional stem against a naive convolution."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import attn_notes as an
from attn_notes.efficient.compact_design import (
    ConvStemViT,
    SearchSpace,
    possible_designs,
    stem_macs,
    vit_macs,
    vit_parameters,
)
from attn_notes.foundations.checks import ConfigError, InputError
from attn_notes.vision.vit import SIZES, PatchEmbedding, ViT, ViTConfig
from attn_notes.zoo.factory import count_parameters

SMALL = ViTConfig(
    img_size=16,
    patch_size=4,
    in_chans=2,
    num_classes=5,
    embed_dim=12,
    depth=2,
    num_heads=2,
    mlp_ratio=3.0,
)
WIDTHS = (6, 10)


def counted(model, config):
    """Multiply-adds by torch's counter, which sees all of attention on meta tensors."""
    shape = (1, config.in_chans, config.img_size, config.img_size)
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model.eval()(torch.empty(shape, device="meta"))
    return flops.get_total_flops() / 2


def stemmed(config=SMALL, widths=WIDTHS):
    """In double precision, with noise on every weight and every running statistic."""
    torch.manual_seed(0)
    model = ConvStemViT(config, widths).double()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data += 0.2 * torch.rand_like(tensor)
    return model.eval()


def images(rows=2, side=16):
    random = torch.Generator().manual_seed(1)
    return torch.randn(rows, 2, side, side, generator=random, dtype=torch.float64)


# ---- what a design costs


@pytest.mark.parametrize("name", [n for n, c in SIZES.items() if not c.resnet_layers])
def test_costs_of_the_published_sizes(name):
    info = an.model_info(name)
    assert vit_macs(info.config) == info.macs
    assert vit_parameters(info.config) == info.parameters


@settings(max_examples=10)
@given(
    st.sampled_from([1, 2, 5]),
    st.sampled_from([6, 10, 18]),
    st.integers(1, 3),
    st.sampled_from([0.5, 1.3, 4.0]),
    st.sampled_from([0, 1, 7]),
    st.sampled_from(["token", "avg"]),
    st.sampled_from([None, 1, 9, 10]),
)
def test_costs_against_the_counters(patch, width, depth, ratio, classes, pool, hidden):
    config = ViTConfig(
        img_size=10,
        patch_size=patch,
        in_chans=2,
        num_classes=classes,
        global_pool=pool,
        embed_dim=width,
        depth=depth,
        num_heads=2,
        mlp_ratio=ratio,
        representation_size=hidden,
    )
    with torch.device("meta"):
        model = ViT(config)
    assert vit_macs(config) == counted(model, config)
    assert vit_parameters(config) == count_parameters(model)


@settings(max_examples=8)
@given(st.sampled_from([2, 4, 8]), st.integers(1, 9), st.sampled_from([3, 12]))
def test_costs_of_the_stem(patch, wide, width):
    config = replace(SMALL, patch_size=patch, embed_dim=width, num_heads=1)
    widths = tuple(wide + i for i in range({2: 1, 4: 2, 8: 3}[patch]))
    with torch.device("meta"):
        model = ConvStemViT(config, widths)
    assert model.macs() == counted(model, config)
    assert counted(model.patch_embedding, config) == stem_macs(config, widths)


# ---- the designs at equal cost

CHOICES = {
    "patch_size": (2, 4),
    "embed_dim": (8, 12, 15, 16),
    "depth": (1, 2, 3, 4),
    "num_heads": (2, 4),
}


@pytest.mark.parametrize("most", [None, 4000])
def test_the_space_is_what_an_enumeration_finds(most):
    space = SearchSpace(SMALL, CHOICES, tolerance=0.2, max_parameters=most)
    wanted = []
    for patch, width, depth, heads in product(*CHOICES.values()):
        if width % heads:
            continue
        sizes = dict(zip(CHOICES, (patch, width, depth, heads), strict=True))
        config = replace(SMALL, **sizes)
        close = abs(vit_macs(config) / vit_macs(SMALL) - 1) <= 0.2
        if close and vit_parameters(config) <= (most or 10**9):
            wanted.append(config)
    assert list(space.configs) == wanted and SMALL in wanted
    assert 1 < len(wanted) < len(possible_designs(SMALL, CHOICES))
    assert len(SearchSpace(SMALL, CHOICES, tolerance=0.2).configs) >= len(wanted)


def test_draws():
    space = SearchSpace(SMALL, CHOICES, tolerance=0.2)
    size = len(space.configs)
    everything = space.draw(size, seed=3)
    assert set(everything) == set(space.configs) and everything != [*space.configs]
    assert space.draw(3, seed=3) == everything[:3]
    assert space.draw(size, seed=4) != everything


def test_a_budget_of_ones_own():
    twice = SearchSpace(SMALL, CHOICES, macs=2 * vit_macs(SMALL), tolerance=0.1)
    assert SMALL not in twice.configs
    for config in twice.configs:
        assert abs(vit_macs(config) / vit_macs(SMALL) - 2) <= 0.2


HYBRID = replace(SMALL, patch_size=4, resnet_layers=(1,))


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: vit_macs(HYBRID), "resnet_layers: expected none"),
        (lambda: vit_parameters(HYBRID), "resnet_layers: expected none"),
        (lambda: ConvStemViT(HYBRID, WIDTHS), "resnet_layers: expected none"),
        (lambda: ConvStemViT(SMALL, (6,)), "widths: .* got 1 and a patch of 4"),
        (lambda: ConvStemViT(SMALL, ()), "widths: .* got 0"),
        (lambda: ConvStemViT(SMALL, (6, 0)), "widths: expected a tuple"),
        (lambda: SearchSpace(SMALL, {"deth": (1,)}), "did you mean 'depth'"),
        (lambda: SearchSpace(SMALL, {"depth": ()}), "within 3% of .* got 0"),
        (lambda: SearchSpace(SMALL, {"depth": (1, "2")}), "choices, depth: expected"),
        (lambda: SearchSpace(SMALL, [("depth", (1,))]), "choices: expected a mapping"),
        (lambda: SearchSpace("vit", {"depth": (1,)}), "base: expected"),
        (lambda: SearchSpace(SMALL, {"depth": (2,)}, tolerance=1.5), "tolerance"),
        (lambda: SearchSpace(SMALL, {"depth": (1,)}), r"got 1, off by \d\d%"),
        (lambda: SearchSpace(SMALL, {"embed_dim": (7,)}), "got 0, off by 100%"),
        (lambda: SearchSpace(SMALL, {"depth": (2,)}).draw(2), "count: expected at mo"),
        (lambda: SearchSpace(SMALL, {"depth": (2,)}).draw(0), "count: expected a who"),
    ],
)
def test_bad_input(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


# ---- the convolutional stem


def convolve(x, weight):
    """A 3 x 3 convolution of stride 2 with a ring of zeros, pixel by pixel."""
    b, _, height, width = x.shape
    padded = torch.zeros(b, x.shape[1], height + 2, width + 2, dtype=x.dtype)
    padded[:, :, 1:-1, 1:-1] = x
    rows = [
        torch.stack(
            [
                (padded[:, None, :, y : y + 3, z : z + 3] * weight).sum((2, 3, 4))
                for z in range(0, width, 2)
            ],
            -1,
        )
        for y in range(0, height, 2)
    ]
    return torch.stack(rows, -2)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_stem_equals_a_naive_one(training):
    stem, x = stemmed().patch_embedding.train(training), images()
    state = {key: value.clone() for key, value in stem.state_dict().items()}
    found, naive = stem(x), x
    for i in (0, 3):
        naive = convolve(naive, state[f"layers.{i}.weight"])
        mean, var = (
            state[f"layers.{i + 1}.running_{name}"] for name in ("mean", "var")
        )
        if training:
            mean, var = naive.mean((0, 2, 3)), naive.var((0, 2, 3), unbiased=False)
        naive = (naive - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        scale, shift = state[f"layers.{i + 1}.weight"], state[f"layers.{i + 1}.bias"]
        naive = (naive * scale[:, None, None] + shift[:, None, None]).clamp(min=0)
    matrix = state["projection.weight"][:, :, 0, 0]
    tokens = naive.flatten(2).mT @ matrix.T + state["projection.bias"]
    assert (found - tokens).abs().max() < 1e-10 and found.abs().max() > 0.1


def test_it_stands_in_for_the_patches():
    x = images(side=24)
    assert stemmed().patch_embedding(x).shape == (2, 36, 12)
    assert PatchEmbedding(4, 2, 12).double()(x).shape == (2, 36, 12)


def test_what_a_token_sees():
    """Of a patch of 4 x 4 pixels its own, and three more above and to the left."""
    stem, x = stemmed().patch_embedding, images(1).requires_grad_()
    (slope,) = torch.autograd.grad(stem(x)[0, 2 * 4 + 1].sum(), x)
    seen = slope[0].abs().sum(0).nonzero()
    assert seen.min(0).values.tolist() == [5, 1]
    assert seen.max(0).values.tolist() == [11, 7]


def test_the_model():
    model, x = stemmed(), images(3)
    logits = model(x)
    assert logits.shape == (3, 5)
    assert (model(x[1:2]) - logits[1:2]).abs().max() < 1e-12
    assert model(images(side=24)).isfinite().all()
    logits.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())
    again = ConvStemViT(SMALL, WIDTHS).double().eval()
    assert torch.equal(again(x), torch.zeros(3, 5).double())  # the head begins at zero
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), logits)
    with torch.no_grad(), an.record_attention(model) as maps:
        assert (model(x) - logits).abs().max() < 1e-12
    assert [m.shape for m in maps.values()] == [(3, 2, 17, 17)] * 2


@pytest.mark.no_shapes
def test_images_that_do_not_fit():
    with pytest.raises(InputError, match="multiples of 4"):
        stemmed()(images(side=18))
