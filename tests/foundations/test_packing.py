"""Packing: the same numbers at the real tokens, and nothing computed at padding."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attn_notes.foundations.attention import record_attention
from attn_notes.foundations.blocks import PostNormBlock, PreNormBlock, Stack
from attn_notes.foundations.masks import lengths_mask
from attn_notes.foundations.packing import PackedTokens, run_packed
from attn_notes.zoo.factory import create_model

LENGTHS = torch.tensor([5, 1, 9, 3])


def make_stack(block):
    torch.manual_seed(0)
    return Stack([block(16, 4, 24) for _ in range(2)], torch.nn.LayerNorm(16)).double()


@pytest.mark.parametrize("side", ["left", "right", "scattered"])
@pytest.mark.parametrize("block", [PostNormBlock, PreNormBlock])
def test_packed_equals_padded_at_the_real_tokens(block, side):
    stack, x = make_stack(block), torch.randn(4, 9, 16, dtype=torch.float64)
    mask = lengths_mask(LENGTHS, 9)
    if side == "left":
        mask = mask.flip(1)
    if side == "scattered":
        mask = mask[:, torch.randperm(9)]
    packed, padded = run_packed(stack, x, mask), stack(x, mask)
    torch.testing.assert_close(packed[mask], padded[mask], rtol=0, atol=1e-12)
    assert (packed[~mask] == 0).all()


def test_gradients_are_those_of_the_real_tokens():
    stack, x = make_stack(PostNormBlock), torch.randn(4, 9, 16, dtype=torch.float64)
    mask, grads = lengths_mask(LENGTHS, 9), []
    for run in (run_packed, lambda stack, x, mask: stack(x, mask)):
        stack.zero_grad()
        run(stack, x, mask)[mask].square().sum().backward()
        grads.append([p.grad.clone() for p in stack.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_a_batch_with_little_padding_or_none_stays_as_it_is():
    stack, x = make_stack(PostNormBlock), torch.randn(4, 40, 16, dtype=torch.float64)
    mask = lengths_mask(torch.tensor([40, 38, 36, 40]), 40)
    assert torch.equal(run_packed(stack, x, mask), stack(x, mask))
    assert torch.equal(run_packed(stack, x), stack(x))


def test_pack_and_unpack_are_inverse():
    mask = torch.tensor([[True, False, True], [False, False, False]])
    packed, x = PackedTokens(mask), torch.randn(2, 3, 4, 5)
    assert packed.pack(x).shape == (1, 2, 4, 5)
    assert torch.equal(packed.unpack(packed.pack(x)), x * mask[..., None, None])


def test_generation_does_not_compute_the_padding_of_its_source():
    torch.manual_seed(0)
    model = create_model("transformer_tiny", num_hidden_layers=1).eval()
    ids, counts = torch.randint(3, 100, (8, 64)), {}
    for length in (64, 8):
        mask = lengths_mask(torch.full((8,), length), 64)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.encoder(model.embedding(ids), mask)
            before = counter.get_total_flops()
            model.encode(ids, mask)
        counts[length] = counter.get_total_flops() - 2 * before
    assert counts[8] < counts[64]


def test_a_recorded_packed_block_gives_the_maps_of_the_batch():
    stack, x = make_stack(PostNormBlock), torch.randn(4, 9, 16, dtype=torch.float64)
    mask = lengths_mask(LENGTHS, 9)
    with record_attention(stack) as padded:
        stack(x, mask)
    with record_attention(stack) as packed:
        run_packed(stack, x, mask)
    rows = mask[:, None, :, None]
    assert list(packed) == list(padded)
    for path, weights in packed.items():
        assert torch.allclose(weights * rows, padded[path] * rows)
