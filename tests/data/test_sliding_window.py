"""Sliding windows: equal to MONAI's, and to the network itself on one window."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_notes.data.sliding_window import (
    sliding_window,
    window_starts,
    window_weights,
)
from attn_notes.foundations.checks import InputError

WINDOW = (8, 6, 8)
SIDES = {
    "one window": (8, 6, 8),
    "larger": (11, 13, 20),
    "smaller": (5, 3, 8),
    "both": (4, 17, 9),
}


def network():
    """It sees the whole of a window, and has three classes."""
    torch.manual_seed(0)
    layers = torch.nn.Conv3d(2, 3, 3, padding=1), torch.nn.InstanceNorm3d(3)
    return torch.nn.Sequential(*layers).double()


def volumes(sides, rows=2):
    random = torch.Generator().manual_seed(0)
    return torch.randn(rows, 2, *sides, generator=random, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("overlap", [0.5, 0.25])
def test_equal_to_monai(sides, overlap):
    monai = pytest.importorskip("monai.inferers").sliding_window_inference
    x, net = volumes(sides), network()
    found = sliding_window(net, x, WINDOW, overlap, batch_size=3)
    expected = monai(x, WINDOW, 5, net, overlap, mode="gaussian")
    assert found.shape == (2, 3, *sides)
    assert (found - expected).abs().max() < 1e-12


@torch.no_grad()
def test_one_window_is_the_network_itself():
    x, net = volumes(WINDOW), network()
    assert (sliding_window(net, x, WINDOW) - net(x)).abs().max() < 1e-14
    inner = volumes((4, 6, 8))  # padded on both sides, and cut out again
    padded = torch.nn.functional.pad(inner, (0, 0, 0, 0, 2, 2))
    found = sliding_window(net, inner, WINDOW)
    assert torch.allclose(found, net(padded)[:, :, 2:6])


@torch.no_grad()
def test_what_does_not_depend_on_the_window_stays_as_it_is():
    x = volumes((19, 7, 23))
    assert torch.allclose(sliding_window(torch.sin, x, WINDOW), x.sin())


@torch.no_grad()
def test_windows_come_some_at_a_time():
    sizes, x = [], volumes((12, 6, 8))
    sliding_window(lambda w: sizes.append(len(w)) or w, x, WINDOW, batch_size=3)
    assert sizes == [3, 1]  # two windows in each of two volumes


@given(n=st.integers(1, 70), window=st.integers(1, 40), percent=st.integers(0, 99))
def test_windows_cover_an_axis(n, window, percent):
    starts = window_starts(n, window, percent / 100)
    covered = {i for start in starts for i in range(start, start + window)}
    assert covered == set(range(max(n, window))) and starts == sorted(set(starts))


@pytest.mark.parametrize("window", [(7,), (4, 9), (16, 16, 16)], ids=str)
def test_weights(window):
    weights = window_weights(window)
    assert weights.shape == window and 1e-3 <= weights.min() <= weights.max() <= 1
    assert torch.equal(weights, weights.flip(*range(len(window))))
    if window == (7,):
        expected = torch.exp(-((torch.arange(7) - 3) ** 2) / (2 * (7 / 8) ** 2))
        assert torch.allclose(weights, expected.clamp_min(1e-3))


WRONG = {
    "an image": ("volumes", {"volumes": torch.zeros(1, 2, 8, 8)}),
    "a list": ("volumes", {"volumes": [torch.zeros(2, 8, 8, 8)]}),
    "whole numbers": ("volumes", {"volumes": torch.zeros(1, 2, 8, 8, 8).int()}),
    "two sides": ("window", {"window": (8, 8)}),
    "an empty window": ("window", {"window": (8, 0, 8)}),
    "no step": ("overlap", {"overlap": 1.0}),
    "an empty batch": ("batch_size", {"batch_size": 0}),
    "logits of another size": ("predict", {"predict": lambda x: x[..., :-1]}),
    "one answer for a window": ("predict", {"predict": lambda x: x.mean((2, 3, 4))}),
}


@pytest.mark.no_shapes
@pytest.mark.parametrize("name, given", WRONG.values(), ids=WRONG)
def test_bad_input(name, given):
    whole = {"predict": torch.sin, "volumes": torch.zeros(1, 2, 9, 8, 8)}
    whole |= {"window": (8, 8, 8), **given}
    with pytest.raises(InputError, match=rf"^{name}: expected .*got"):
        sliding_window(**whole)
