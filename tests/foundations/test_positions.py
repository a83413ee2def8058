"""Positions: the paper's table, offsets, and what happens at its end."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_notes.foundations.checks import ConfigError, InputError
from attn_notes.foundations.positions import (
    LearnedPositions,
    SinusoidalPositions,
    sinusoidal_table,
)


@given(st.integers(1, 50), st.integers(1, 16).map(lambda half: 2 * half))
def test_table_is_the_formula(n, d):
    table = sinusoidal_table(n, d)
    assert table.shape == (n, d) and table.dtype == torch.float32
    for p, c in {(0, 0), (n - 1, d - 1), (n // 2, d // 2), (n - 1, 0)}:
        angle = p / 10000 ** (2 * (c // 2) / d)
        assert (
            abs(table[p, c].item() - (math.cos(angle) if c % 2 else math.sin(angle)))
            < 1e-6
        )


def test_distance_alone_decides_the_product():
    products = sinusoidal_table(200, 64).double()
    products = products @ products.T
    for k in (0, 1, 17, 199):
        diagonal = products.diagonal(k)
        assert (diagonal - diagonal[0]).abs().max() < 1e-4


@given(
    st.integers(1, 12).map(lambda half: 2 * half),
    st.integers(1, 20),
    st.integers(0, 20),
    st.integers(0, 40),
)
def test_a_step_is_one_rotation(d, n, start, k):
    "The rows k places on are R_k times the rows, with one R_k for all places; and they begin at the angle zero."
    positions = SinusoidalPositions(d, 100)
    angle = k * 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    c, s = angle.cos(), angle.sin()
    turn = torch.block_diag(
        *torch.stack([torch.stack([c, s], -1), torch.stack([-s, c], -1)], -2)
    )
    assert torch.allclose(
        positions(n, offset=start).double() @ turn.T,
        positions(n, offset=start + k).double(),
        atol=1e-5,
    )
    assert torch.equal(positions(1), torch.tensor([[0.0, 1.0] * (d // 2)]))


@pytest.mark.parametrize("kind", [SinusoidalPositions, LearnedPositions])
def test_offsets_join(kind):
    positions = kind(8, 20)
    assert torch.equal(
        torch.cat([positions(5), positions(1, offset=5), positions(14, offset=6)]),
        positions.weight,
    )


def test_what_is_stored():
    assert list(SinusoidalPositions(8, 20).state_dict()) == [] and list(
        LearnedPositions(8, 20).state_dict()
    ) == ["weight"]
    assert sum(
        p.numel() for p in LearnedPositions(8, 20).parameters()
    ) == 160 and not list(SinusoidalPositions(8, 20).parameters())


def test_buffers_follow_the_module():
    positions = SinusoidalPositions(8, 20)
    assert (
        positions.double()(3).dtype == torch.float64
        and positions.to("meta")(3).device.type == "meta"
    )
    with torch.device("meta"):
        assert SinusoidalPositions(8, 20).weight.device.type == "meta"


@pytest.mark.no_shapes
@pytest.mark.parametrize("kind", [SinusoidalPositions, LearnedPositions])
@pytest.mark.parametrize("n, offset", [(21, 0), (1, 20), (0, 0), (3, -1)])
def test_places_outside_the_table(kind, n, offset):
    with pytest.raises(
        InputError, match=f"expected places within 0 to 19; got {n} from {offset} on"
    ):
        kind(8, 20)(n, offset)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "call",
    [
        lambda: sinusoidal_table(4, 7),
        lambda: SinusoidalPositions(7, 4),
        lambda: SinusoidalPositions(8, 0),
        lambda: LearnedPositions(0, 4),
        lambda: LearnedPositions(8, -1),
    ],
)
def test_bad_configuration(call):
    with pytest.raises(ConfigError):
        call()
