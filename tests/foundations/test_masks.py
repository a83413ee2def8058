"""Masks: True is allowed, and one function knows about axes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_notes.foundations.attention import ScaledDotProductAttention, attention_naive
from attn_notes.foundations.checks import InputError
from attn_notes.foundations.masks import (
    causal_mask,
    check_right_padding,
    expand_mask,
    lengths_mask,
    merge_masks,
    pad_images,
    padding_mask,
)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 9))
def test_lengths_mask_counts(lengths, n):
    mask = lengths_mask(torch.tensor(lengths), n)
    assert mask.sum(-1).tolist() == [min(length, n) for length in lengths]
    assert (mask[:, 1:] <= mask[:, :-1]).all()  # real tokens first


def test_padded_images_and_their_mask():
    images = [torch.ones(3, 5, 7), torch.ones(3, 6, 2)]
    batch, mask = pad_images(images)
    assert batch.shape == (2, 3, 6, 7) and batch.sum() == 3 * mask.sum()
    assert mask[1, :, :2].all() and not mask[1, :, 2:].any()


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
def test_a_later_token_leaves_earlier_outputs_untouched(n, past, data):
    """In the readable and in the fast form, with and without a past; not where the mask
    is multiplied."""
    changed = data.draw(st.integers(min(1, past), past + n - 1))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    q, k, v = (torch.randn(1, 2, m, 8) for m in (n, past + n, past + n))
    other_k, other_v = k.clone(), v.clone()
    other_k[:, :, changed] += 1
    other_v[:, :, changed] -= 1
    mask = causal_mask(n, past=past)[None]
    earlier = max(changed - past, 0)  # queries before the changed token
    for attend in (lambda *x: attention_naive(*x)[0], ScaledDotProductAttention()):
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


# masks joined


@given(
    st.sampled_from([None, 2, 3, 4]),
    st.booleans(),
    st.integers(1, 5),
    st.integers(0, 4),
    st.integers(0, 99),
)
def test_merged_masks_are_both(axes, is_causal, n, past, seed):
    m, generator = past + n, torch.Generator().manual_seed(seed)
    shapes = {2: (2, m), 3: (2, n, m), 4: (2, 3, n, m)}
    mask = axes and torch.rand(shapes[axes], generator=generator) > 0.5
    merged = merge_masks(mask, is_causal, n, m)
    expected = torch.ones(2, 3, n, m, dtype=torch.bool)
    if mask is not None:
        expected = expected & expand_mask(mask)
    if is_causal:
        expected = expected & causal_mask(n, past=past)
    if merged is None:
        assert expected.all()
    else:
        assert merged.ndim == 4 and merged.dtype == torch.bool
        assert torch.equal(merged.expand(2, 3, n, m), expected)
    if mask is None and (not is_causal or n == 1):
        assert merged is None  # nothing to hide: the kernel is not given a mask


def test_merged_masks_are_made_where_they_are_asked_for():
    assert merge_masks(None, True, 3, 4, "meta").device.type == "meta"


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "mask, is_causal, words",
    [
        (torch.ones(2, 3), False, "^mask: expected a boolean tensor"),
        (torch.ones(2, 4, dtype=torch.bool), False, r"n, m = 3, 5; got .*1, 1, 4\)$"),
        (torch.ones(2, 1, dtype=torch.bool), False, r"^mask: .*; got .*1, 1, 1\)$"),
        (torch.ones(2, 2, 5, dtype=torch.bool), True, r"^mask: .*\(2, 1, 2, 5\)$"),
    ],
)
def test_masks_that_do_not_fit(mask, is_causal, words):
    with pytest.raises(InputError, match=words):
        merge_masks(mask, is_causal, 3, 5)


def test_more_causal_queries_than_keys():
    with pytest.raises(InputError, match="got 3 keys and 4 queries$"):
        merge_masks(None, True, 4, 3)
    assert merge_masks(None, False, 4, 3) is None
    assert merge_masks(None, True, 1, 3) is None  # the last position may see all


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


@pytest.mark.no_shapes
def test_padding_stands_on_the_right():
    mask = lengths_mask(torch.tensor([3, 1, 0]), 3)  # hiding all is another matter
    check_right_padding(mask)
    for wrong in (mask.flip(1), torch.tensor([[True] * 3, [True, False, True]])):
        with pytest.raises(InputError, match="^source: .* right of the tokens; row 1 "):
            check_right_padding(wrong, "source")
