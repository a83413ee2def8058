"""The encoder-decoder frame, by a small model: generation, states, bad input."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import attn_notes as an
from attn_notes.foundations.checks import InputError
from attn_notes.foundations.generation import beam_search
from attn_notes.sequence.encoder_decoder import EncoderDecoder, check_pair


@dataclass(frozen=True)
class BagConfig:
    source_vocab_size: int = 20
    target_vocab_size: int = 24
    hidden_size: int = 6
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int = 2


class Bag(EncoderDecoder):
    """The mean of the source's embeddings starts a GRU."""

    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.hidden_size
        self.source = nn.Embedding(config.source_vocab_size, width)
        self.target = nn.Embedding(config.target_vocab_size, width)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.lm_head = nn.Linear(width, config.target_vocab_size)
        self.encoded = 0

    def encode(self, input_ids, attention_mask=None):
        self.encoded += 1
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
        weight = attention_mask / attention_mask.sum(1, keepdim=True)
        return {"hidden": (weight[..., None] * self.source(input_ids)).sum(1)}

    def decode(self, decoder_input_ids, state):
        outputs, last = self.rnn(self.target(decoder_input_ids), state["hidden"][None])
        return self.lm_head(outputs), {"hidden": last[0]}


def bag():
    torch.manual_seed(0)
    model = Bag(BagConfig()).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=1.0)
    return model


def sources(lengths, seed=0):
    torch.manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randint(3, 20, mask.shape) * mask, mask


@pytest.mark.parametrize("batch_size", [1, 3])
def test_example_inputs_are_keyword_arguments(batch_size):
    model = bag()
    inputs = model.example_inputs(model.config, batch_size)
    assert list(inputs) == [
        "input_ids",
        "decoder_input_ids",
        "attention_mask",
        "decoder_attention_mask",
    ]
    assert inputs["input_ids"].shape == (batch_size, 7)
    assert inputs["attention_mask"].sum(1).tolist() == [7] * (batch_size - 1) + [4]
    assert model(**inputs).shape == (batch_size, 5, 24)
    assert torch.equal(model(**inputs), model(*inputs.values()))


def test_forward_is_decode_after_encode():
    model, (source, mask) = bag(), sources((5, 3))
    target = torch.randint(3, 24, (2, 4))
    whole, state = model.decode(target, model.encode(source, mask))
    assert torch.equal(model(source, target, mask), whole)
    state, steps = model.encode(source, mask), []
    for token in target.split(1, 1):
        logits, state = model.decode(token, state)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole)


@settings(max_examples=10)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    limit=st.integers(1, 6),
    num_beams=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_a_row_alone(lengths, limit, num_beams, seed):
    """A row of a batch generates what it does alone, up to the padding after it."""
    model, (source, mask) = bag(), sources(lengths, seed)
    together = model.generate(source, mask, limit, num_beams)
    assert together.shape[1] <= limit
    for i, length in enumerate(lengths):
        alone = model.generate(source[i : i + 1, :length], None, limit, num_beams)[0]
        assert torch.equal(together[i, : len(alone)], alone)
        assert not together[i, len(alone) :].any()


def test_greedy_is_what_teacher_forcing_would_choose():
    model, (source, mask) = bag(), sources((6, 4, 1))
    tokens = model.generate(source, mask, max_new_tokens=7)
    shifted = torch.cat([torch.ones(3, 1, dtype=torch.long), tokens[:, :-1]], 1)
    ended = ((tokens == 2).cumsum(1) - (tokens == 2).long()).bool()
    chosen = model(source, shifted, mask).argmax(-1).masked_fill(ended, 0)
    assert torch.equal(chosen, tokens)


def test_greedy_is_a_beam_of_one():
    model, (source, mask) = bag(), sources((6, 4, 1))

    def step(tokens, state):
        logits, state = model.decode(tokens, state)
        return logits[:, -1], state

    prompt = torch.ones(3, 1, dtype=torch.long)
    beam = beam_search(
        step, model.encode(source, mask), prompt, 2, 0, max_new_tokens=7, num_beams=1
    )
    assert torch.equal(model.generate(source, mask, max_new_tokens=7), beam)


def test_a_beam_finds_nothing_less_likely():
    model, (source, mask) = bag(), sources((6, 4, 1, 5))

    def log_probability(tokens):
        first = torch.ones(4, 1, dtype=torch.long)
        shifted = torch.cat([first, tokens[:, :-1]], 1)
        log_p = model(source, shifted, mask).log_softmax(-1)
        chosen = log_p.gather(-1, tokens[..., None])[..., 0]
        return (chosen * (tokens != 0)).sum(1)

    greedy = model.generate(source, mask, max_new_tokens=6)
    beam = model.generate(source, mask, 6, num_beams=24**2, length_penalty=0.0)
    assert (log_probability(beam) >= log_probability(greedy) - 1e-5).all()
    assert not torch.equal(beam, greedy)


def test_it_stops():
    model, (source, mask) = bag(), sources((5, 3, 2))
    with torch.no_grad():
        model.lm_head.bias[2] = 1e3
        assert model.generate(source, mask).tolist() == [[2]] * 3
        model.lm_head.bias[2] = -1e3
        assert model.generate(source, mask, max_new_tokens=9).shape == (3, 9)
        model.lm_head.bias[0] = -1e3  # so that 0 is padding and nothing else
        limits = torch.tensor([4, 1, 2])
        tokens = model.generate(source, mask, max_new_tokens=limits)
    assert (tokens != 0).tolist() == [
        [True] * 4,
        [True, False, False, False],
        [True, True, False, False],
    ]


def test_a_state_gives_twice_the_same():
    model, (source, mask) = bag(), sources((5, 3))
    state = model.encode(source, mask)
    kept = state["hidden"].clone()
    target = torch.randint(3, 24, (2, 4))
    first, _ = model.decode(target, state)
    assert torch.equal(first, model.decode(target, state)[0])
    assert list(state) == ["hidden"] and torch.equal(state["hidden"], kept)


def test_the_source_is_encoded_once():
    model, (source, mask) = bag(), sources((5, 3))
    for num_beams in (1, 3):
        model.encoded = 0
        model.generate(source, mask, 5, num_beams)
        assert model.encoded == 1


ONES = torch.ones(2, 3, dtype=torch.long)
BAD_PAIRS = [
    dict(input_ids=torch.zeros(2, 3)),
    dict(input_ids=torch.ones(3, dtype=torch.long)),
    dict(input_ids=torch.ones(0, 3, dtype=torch.long)),
    dict(decoder_input_ids=torch.ones(3, 2, dtype=torch.long)),
    dict(decoder_input_ids=torch.ones(2, 0, dtype=torch.long)),
    dict(attention_mask=torch.ones(2, 4, dtype=torch.bool)),
    dict(attention_mask=torch.ones(2, 3)),
    dict(decoder_attention_mask=torch.ones(2, 2, dtype=torch.bool)),
]


@pytest.mark.no_shapes
@pytest.mark.parametrize("wrong", BAD_PAIRS)
def test_bad_pair(wrong):
    inputs = {"input_ids": ONES, "decoder_input_ids": ONES, **wrong}
    with pytest.raises(InputError, match=f"^{next(iter(wrong))}: expected"):
        check_pair(**inputs)
    model = bag()
    with pytest.raises(InputError) as error:
        model(**inputs)
    assert "\n" not in str(error.value) and model.encoded == 0


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "wrong",
    [
        dict(input_ids=torch.full((2, 3), 20)),
        dict(input_ids=torch.full((2, 3), -1)),
        dict(input_ids=torch.zeros(2, 3)),
        dict(attention_mask=torch.zeros(2, 3, dtype=torch.bool)),
        dict(attention_mask=torch.ones(2, 2, dtype=torch.bool)),
        dict(max_new_tokens=0),
        dict(max_new_tokens=torch.tensor([3, 0])),
        dict(max_new_tokens=torch.tensor([3])),
        dict(num_beams=0),
    ],
)
def test_bad_input_to_generate(wrong):
    """Refused before the source is encoded."""
    model = bag()
    with pytest.raises(InputError, match=next(iter(wrong))):
        model.generate(**{"input_ids": ONES, **wrong})
    assert model.encoded == 0


@pytest.mark.no_shapes
def test_a_length_penalty_below_zero():
    with pytest.raises(InputError, match="length_penalty"):
        bag().generate(ONES, num_beams=2, length_penalty=-1.0)


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_a_subclass_has_to_say_what_it_computes(method):
    with pytest.raises(NotImplementedError, match=method):
        getattr(EncoderDecoder(), method)(ONES, None)


@pytest.mark.parametrize("size", [{"vocab_size": 3}, {"max_position_embeddings": 3}])
def test_example_inputs_fit_the_smallest_models(size):
    small = {**an.model_info("transformer_tiny").tiny, **size}
    model = an.create_model("transformer_tiny", **small)
    inputs = an.example_inputs("transformer_tiny", **small)
    assert model(**inputs).isfinite().all()
