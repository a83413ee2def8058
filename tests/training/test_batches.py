"""Padding in the batches of a training loop."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from attn_notes.foundations.checks import InputError
from attn_notes.training.tasks import check_batch

CONFIG = SimpleNamespace(vocab_size=9, pad_token_id=0)
IDS = torch.tensor([[5, 6, 7], [8, 0, 0]])
BATCH = {"input_ids": IDS, "decoder_input_ids": IDS, "attention_mask": IDS != 0}


@pytest.mark.no_shapes
@pytest.mark.parametrize("name", ["attention_mask", "decoder_attention_mask"])
def test_padding_stands_on_the_right(name):
    check_batch({**BATCH, "decoder_attention_mask": IDS != 0}, CONFIG)
    with pytest.raises(InputError, match=f"^{name}: .* on the right .* row 1 has"):
        check_batch({**BATCH, name: (IDS != 0).flip(1)}, CONFIG)


@pytest.mark.no_shapes
def test_padding_in_a_source_without_a_mask_is_warned_of():
    with pytest.warns(UserWarning, match="^input_ids: padding .0. and no attention_m"):
        check_batch({**BATCH, "attention_mask": None}, CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_batch(BATCH, CONFIG)
        check_batch({"input_ids": IDS}, CONFIG)  # causal: nothing looks to the right


class Config:
    vocab_size, type_vocab_size, num_classes = 9, 2, 3
    max_position_embeddings, pad_token_id = 3, 0


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "change, said",
    [
        ({"attention_mask": IDS < 0}, "attention_mask: .* row 0 hides everything"),
        ({"input_ids": IDS + 1}, "input_ids: expected ids from 0 to 8; got 9"),
        ({"input_ids": IDS - 1}, "input_ids: expected ids from 0 to 8; got -1"),
        ({"token_type_ids": IDS}, "token_type_ids: expected ids from 0 to 1; got 8"),
        ({"input_ids": torch.ones(2, 4).long()}, "at most 3 tokens, the positions"),
        ({"labels": torch.tensor([1, 3])}, "labels: expected ids from 0 to 2; got 3"),
    ],
)
def test_the_batch_of_a_bert_that_does_not_fit(change, said):
    with pytest.raises(InputError, match=said):
        check_batch({"input_ids": IDS, "attention_mask": IDS != 0} | change, Config())
