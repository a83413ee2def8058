"""Masks: True is allowed, and one function knows about axes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_notes.foundations.attention import DotProductAttend, attention_naive
from attn_notes.foundations.checks import InputError
from attn_notes.foundations.masks import (
    causal_mask,
    expand_mask,
    lengths_mask,
    padding_mask,
)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 9))
def test_lengths_mask_counts(lengths, n):
    mask = lengths_mask(torch.tensor(lengths), n)
    assert mask.sum(-1).tolist() == [min(length, n) for length in lengths]
    assert (mask[:, 1:] <= mask[:, :-1]).all()  # real tokens first


def test_padding_mask_agrees_with_lengths():
    ids = torch.tensor([[5, 6, 7], [8, 0, 0]])
    assert torch.equal(padding_mask(ids), lengths_mask(torch.tensor([3, 1]), 3))
    assert torch.equal(padding_mask(ids, pad_id=7), ids != 7)


@given(st.integers(1, 12))
def test_causal_mask_is_a_triangle(n):
    i = torch.arange(n)
    assert torch.equal(causal_mask(n), i[None] <= i[:, None])


def multiplied(q, k, v, mask):
    "The wrong way: hidden scores are set to zero."
    return (q @ k.mT * q.shape[-1] ** -0.5 * expand_mask(mask)).softmax(-1) @ v


@given(st.integers(1, 7), st.integers(0, 4), st.data())
def test_a_later_word_leaves_earlier_outputs_untouched(n, past, data):
    "In the readable and in the fast form, with and without a past; not where the mask is multiplied."
    changed = data.draw(st.integers(min(1, past), past + n - 1))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    q, k, v = (torch.randn(1, 2, m, 8) for m in (n, past + n, past + n))
    other_k, other_v = k.clone(), v.clone()
    other_k[:, :, changed] += 1
    other_v[:, :, changed] -= 1
    mask, earlier = (
        causal_mask(n, past=past)[None],
        max(changed - past, 0),
    )  # queries before the changed word
    for attend in (lambda *x: attention_naive(*x)[0], DotProductAttend()):
        before, after = attend(q, k, v, mask), attend(q, other_k, other_v, mask)
        assert torch.equal(before[:, :, :earlier], after[:, :, :earlier])
        assert not torch.equal(before[:, :, earlier:], after[:, :, earlier:])
    leak = multiplied(q, k, v, mask) - multiplied(q, other_k, other_v, mask)
    assert (leak[:, :, :earlier].abs().amax((0, 1, 3)) > 1e-4).all()


def test_masks_are_made_where_they_are_asked_for():
    assert causal_mask(3, "meta").device.type == "meta"
    assert (
        lengths_mask(torch.empty(2, dtype=torch.long, device="meta"), 4).device.type
        == "meta"
    )


def test_expand_mask_shapes():
    square = torch.rand(3, 3) > 0.5
    assert torch.equal(expand_mask(square), square[:, None, None, :])
    assert torch.equal(expand_mask(square, pairs=True), square[None, None])
    assert expand_mask(torch.ones(2, 3, 4, dtype=torch.bool)).shape == (2, 1, 3, 4)
    four = torch.ones(2, 5, 3, 4, dtype=torch.bool)
    assert expand_mask(four) is four and torch.equal(
        expand_mask(expand_mask(square)), expand_mask(square)
    )


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 3),
        torch.ones(3, dtype=torch.bool),
        torch.ones(1, 1, 1, 1, 1, dtype=torch.bool),
        [[True]],
        None,
    ],
)
def test_bad_mask(mask):
    with pytest.raises(InputError, match="^mask: expected a boolean tensor"):
        expand_mask(mask)


@pytest.mark.no_shapes
def test_bad_sizes():
    for call in (
        lambda: causal_mask(0),
        lambda: lengths_mask(torch.tensor([1]), 0),
        lambda: lengths_mask(torch.tensor([[1]]), 2),
    ):
        with pytest.raises(InputError, match="expected"):
            call()
