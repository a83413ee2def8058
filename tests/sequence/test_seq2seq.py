"""Sequence to Sequence: the four models against the papers' equations and torch's own
layers, and what must never change a result."""

import inspect
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attn_notes.foundations.attention import record_attention
from attn_notes.foundations.checks import ConfigError, InputError
from attn_notes.foundations.generation import beam_search
from attn_notes.sequence.seq2seq import (
    SEQ2SEQ_PAPER,
    AdditiveAttention,
    Encoder,
    InputFeedingRNN,
    MultiplicativeAttention,
    Seq2SeqBahdanau,
    Seq2SeqConfig,
    Seq2SeqGRU,
    Seq2SeqLSTM,
    Seq2SeqLuong,
    reverse_tokens,
)
from attn_notes.zoo.factory import count_parameters, create_model, example_inputs
from attn_notes.zoo.registry import list_models, model_info

SMALL = Seq2SeqConfig(
    source_vocab_size=23,
    target_vocab_size=31,
    embedding_size=7,
    hidden_size=10,
    num_hidden_layers=2,
    attention_size=5,
    maxout_size=6,
)
ONE_WAY, BOTH_WAYS = {"bidirectional": False}, {"bidirectional": True}
MODELS = {
    "lstm": (Seq2SeqLSTM, ONE_WAY),
    "lstm, not reversed": (Seq2SeqLSTM, {"reverse_source": False}),
    "lstm, both ways": (Seq2SeqLSTM, BOTH_WAYS),
    "gru": (Seq2SeqGRU, ONE_WAY),
    "gru, both ways": (Seq2SeqGRU, BOTH_WAYS),
    "bahdanau": (Seq2SeqBahdanau, {"bidirectional": True, "reverse_source": False}),
    "bahdanau, one way": (Seq2SeqBahdanau, ONE_WAY),
    "luong general": (Seq2SeqLuong, {}),
    "luong dot": (Seq2SeqLuong, {"score": "dot"}),
    "luong, both ways": (Seq2SeqLuong, BOTH_WAYS),
    "luong without feeding": (Seq2SeqLuong, {"input_feeding": False}),
}
every_model = pytest.mark.parametrize("cls, choices", MODELS.values(), ids=MODELS)


def build(cls, dtype=torch.float64, **choices):
    """A model with every parameter away from zero."""
    torch.manual_seed(0)
    model = cls(replace(SMALL, **choices)).to(dtype).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def batch(lengths=(6, 4, 1), length=5, seed=0):
    torch.manual_seed(seed)
    n = max(lengths)
    mask = torch.arange(n) < torch.tensor(lengths)[:, None]
    source = torch.randint(3, 23, (len(lengths), n)) * mask
    return source, torch.randint(3, 31, (len(lengths), length)), mask


def step_by_step(model, source, decoder_input_ids, mask=None):
    state, logits = model.encode(source, mask), []
    for word in decoder_input_ids.split(1, 1):
        step, state = model.decode(word, state)
        logits.append(step)
    return torch.cat(logits, 1)


@every_model
def test_teacher_forcing_equals_stepwise(cls, choices):
    model, (source, decoder_input_ids, mask) = build(cls, **choices), batch()
    logits = model(source, decoder_input_ids, mask)
    assert logits.shape == (3, 5, 31)
    torch.testing.assert_close(
        logits, step_by_step(model, source, decoder_input_ids, mask), rtol=0, atol=1e-10
    )
    torch.testing.assert_close(
        logits,
        model(
            source,
            decoder_input_ids,
            mask,
            torch.ones_like(decoder_input_ids, dtype=torch.bool),
        ),
    )


@every_model
@settings(max_examples=6)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    extra=st.integers(0, 3),
    length=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_rows_and_padding(cls, choices, lengths, extra, length, seed):
    """A batch of one equals the row of a batch; more padding, and what is in it,
    changes nothing."""
    model, (source, decoder_input_ids, mask) = (
        build(cls, **choices),
        batch(lengths, length, seed),
    )
    logits = model(source, decoder_input_ids, mask)
    for i, n in enumerate(lengths):
        torch.testing.assert_close(
            model(source[i : i + 1, :n], decoder_input_ids[i : i + 1])[0],
            logits[i],
            rtol=0,
            atol=1e-10,
        )
    wider = nn.functional.pad(source, (0, extra)), nn.functional.pad(mask, (0, extra))
    rubbish = torch.where(wider[1], wider[0], torch.randint(0, 23, wider[0].shape))
    torch.testing.assert_close(
        model(rubbish, decoder_input_ids, wider[1]), logits, rtol=0, atol=1e-10
    )


@every_model
def test_no_look_ahead(cls, choices):
    model, (source, decoder_input_ids, mask) = build(cls, **choices), batch()
    changed = decoder_input_ids.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 31
    before, after = model(source, decoder_input_ids, mask), model(source, changed, mask)
    assert torch.equal(before[:, :3], after[:, :3]) and not torch.equal(
        before[:, 3], after[:, 3]
    )


@every_model
def test_a_state_stays_as_it_was(cls, choices):
    """A step returns a new state; the old one goes on giving what it gave."""
    model, (source, target, mask) = build(cls, **choices), batch()
    state = model.encode(source, mask)
    first, _ = model.decode(target, state)
    _, after = model.decode(target[:, :2], state)
    assert torch.equal(model.decode(target, state)[0], first)
    rest = model.decode(target[:, 2:], after)[0]
    torch.testing.assert_close(rest, first[:, 2:], rtol=0, atol=1e-10)
    assert torch.equal(model.decode(target[:, 2:], after)[0], rest)


@every_model
def test_every_parameter_learns(cls, choices):
    model, (source, decoder_input_ids, mask) = build(cls, **choices), batch()
    model(source, decoder_input_ids, mask).logsumexp(-1).sum().backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.any()
        for p in model.parameters()
    )


def test_gradients():
    model, (source, decoder_input_ids, mask) = (
        build(Seq2SeqBahdanau, num_hidden_layers=1, bidirectional=True),
        batch((3, 2), 2),
    )
    names, values = zip(*model.named_parameters(), strict=True)
    loss = lambda *p: (
        torch.func.functional_call(
            model, dict(zip(names, p, strict=True)), (source, decoder_input_ids, mask)
        )
        .logsumexp(-1)
        .sum()
    )
    assert torch.autograd.gradcheck(
        loss, tuple(v.detach().requires_grad_() for v in values), fast_mode=True
    )


@every_model
def test_generate(cls, choices):
    model, (source, _, mask) = build(cls, **choices), batch()
    greedy = model.generate(source, mask, max_new_tokens=7)
    assert greedy.shape[0] == 3 and greedy.shape[1] <= 7

    def step(tokens, state):
        logits, state = model.decode(tokens, state)
        return logits[:, -1], state

    state, prompt = model.encode(source, mask), torch.ones(3, 1, dtype=torch.long)
    beam_of_one = beam_search(step, state, prompt, 2, 0, 7, num_beams=1)
    assert torch.equal(greedy, beam_of_one)
    beam = model.generate(
        source, mask, max_new_tokens=7, num_beams=3, length_penalty=0.6
    )
    for i, length in enumerate((6, 4, 1)):
        alone = model.generate(
            source[i : i + 1, :length],
            max_new_tokens=7,
            num_beams=3,
            length_penalty=0.6,
        )[0]
        assert (
            torch.equal(beam[i, : len(alone)], alone)
            and not beam[i, len(alone) :].any()
        )
    forced = model(
        source, torch.cat([torch.ones(3, 1, dtype=torch.long), greedy[:, :-1]], 1), mask
    ).argmax(-1)
    ended = ((greedy == 2).cumsum(1) - (greedy == 2).long()).bool()
    assert torch.equal(
        forced.masked_fill(ended, 0), greedy
    )  # what is written is what teacher forcing would choose


def test_generate_stops():
    model, (source, _, mask) = build(Seq2SeqLSTM), batch()
    with torch.no_grad():
        model.lm_head.bias[2] = 1e3
        assert model.generate(source, mask).tolist() == [[2]] * 3
        model.lm_head.bias[2] = -1e3
        assert model.generate(source, mask, max_new_tokens=9).shape == (3, 9)


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), width=st.integers(0, 2)
)
def test_reversal(lengths, width):
    """Only the real part is reversed, in ids and in features."""
    n = max(lengths) + width
    ids = torch.arange(1, 1 + len(lengths) * n).view(-1, n)
    mask = torch.arange(n) < torch.tensor(lengths)[:, None]
    expected = torch.stack(
        [
            torch.cat([row[:m].flip(0), row[m:]])
            for row, m in zip(ids, lengths, strict=True)
        ]
    )
    assert torch.equal(reverse_tokens(ids, mask), expected)
    features = torch.randn(*ids.shape, 3)
    assert torch.equal(
        reverse_tokens(features, mask)[0],
        torch.cat([features[0, : lengths[0]].flip(0), features[0, lengths[0] :]]),
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_outputs_stand_in_the_order_of_the_source(reverse):
    encoder = Encoder(replace(SMALL, reverse_source=reverse), "gru", 10).double()
    source, _, mask = batch()
    changed = source.clone()
    changed[0, 2] = 22 if source[0, 2] != 22 else 21
    same = (encoder(source, mask)[0] == encoder(changed, mask)[0]).all(-1)[0]
    assert same.tolist() == (
        [False] * 3 + [True] * 3 if reverse else [True] * 2 + [False] * 4
    )


def test_bidirectional_encoder_is_torchs():
    encoder = Encoder(
        replace(SMALL, bidirectional=True, reverse_source=False), "lstm", 5
    ).double()
    reference = nn.LSTM(7, 5, 2, batch_first=True, bidirectional=True).double()
    reference.load_state_dict(encoder.rnn.state_dict())
    source, _, mask = batch()
    packed = nn.utils.rnn.pack_padded_sequence(
        encoder.embedding(source), mask.sum(1), batch_first=True
    )
    outputs, (h, c) = reference(packed)
    outputs, _ = nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True)
    mine, (my_h, my_c) = encoder(source, mask)
    torch.testing.assert_close(mine, outputs, rtol=0, atol=1e-12)
    for a, b in ((my_h, h), (my_c, c)):
        torch.testing.assert_close(
            a,
            b.view(2, 2, 3, 5).permute(2, 0, 1, 3).reshape(3, 2, 10),
            rtol=0,
            atol=1e-12,
        )


def test_seq2seq_lstm_is_torchs():
    """Two torch.nn.LSTM on the same weights, the source flipped by hand."""
    model, (source, decoder_input_ids, _) = build(Seq2SeqLSTM), batch((6, 6))
    encoder, decoder = (nn.LSTM(7, 10, 2, batch_first=True).double() for _ in range(2))
    encoder.load_state_dict(model.encoder.rnn.state_dict())
    decoder.load_state_dict(model.decoder.state_dict())
    _, state = encoder(model.encoder.embedding(source.flip(1)))
    hidden, _ = decoder(model.embedding(decoder_input_ids), state)
    torch.testing.assert_close(
        model(source, decoder_input_ids), model.lm_head(hidden), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    "kind, cell, layers",
    [
        ("gru", nn.GRU, 1),
        ("gru", nn.GRU, 3),
        ("lstm", nn.LSTM, 1),
        ("lstm", nn.LSTM, 2),
    ],
)
def test_input_feeding_rnn_is_torchs(kind, cell, layers):
    mine, reference = (
        InputFeedingRNN(kind, 4, 3, 6, layers).double(),
        cell(7, 6, layers, batch_first=True).double(),
    )
    reference.load_state_dict(mine.state_dict())
    embedded, feedback = torch.randn(2, 5, 4).double(), torch.randn(2, 5, 3).double()
    state, projected, outputs = (
        (torch.zeros(2, layers, 6).double(),) * (2 if kind == "lstm" else 1),
        mine.project(embedded),
        [],
    )
    for t in range(5):
        state = mine.step(projected[:, t], feedback[:, t], state)
        outputs.append(state[0][:, -1])
    expected, _ = reference(torch.cat([embedded, feedback], -1))
    torch.testing.assert_close(torch.stack(outputs, 1), expected, rtol=0, atol=1e-12)


def test_additive_weights_against_the_equation():
    attention = AdditiveAttention(4, 6, 5).double()
    q, memory = torch.randn(2, 1, 3, 4).double(), torch.randn(2, 7, 6).double()
    mask = torch.arange(7) < torch.tensor([7, 4])[:, None]
    weights = attention.weights(q, attention.key(memory)[:, None], mask)
    W, U, v = attention.query.weight, attention.key.weight, attention.score.weight[0]
    for b, length in enumerate((7, 4)):
        for i in range(3):
            e = torch.stack(
                [
                    v @ torch.tanh(W @ q[b, 0, i] + U @ memory[b, j])
                    for j in range(length)
                ]
            )
            torch.testing.assert_close(
                weights[b, 0, i, :length], e.exp() / e.exp().sum(), rtol=0, atol=1e-12
            )
            assert not weights[b, 0, i, length:].any()


@pytest.mark.parametrize("score", ["dot", "general"])
def test_product_weights_against_the_equation(score):
    attention = MultiplicativeAttention(4, score).double()
    h, memory = torch.randn(4).double(), torch.randn(6, 4).double()
    W = attention.key.weight if score == "general" else torch.eye(4).double()
    e = torch.stack([h @ W @ m for m in memory])
    torch.testing.assert_close(
        attention.weights(
            h[None, None, None], attention.key(memory)[None, None]
        ).flatten(),
        e.exp() / e.exp().sum(),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("cls", [Seq2SeqBahdanau, Seq2SeqLuong])
def test_recorded_attention(cls):
    model, (source, decoder_input_ids, mask) = build(cls), batch()
    with record_attention(model) as maps:
        logits = model(source, decoder_input_ids, mask)
        forced = maps["attention"]
        written = model.generate(source, mask, max_new_tokens=4)
        assert maps["attention"].shape == (3, 1, written.shape[1], 6)
    torch.testing.assert_close(logits, model(source, decoder_input_ids, mask))
    assert forced.shape == (3, 1, 5, 6) and not (forced * ~mask[:, None, None]).any()
    torch.testing.assert_close(forced.sum(-1), torch.ones(3, 1, 5).double())


def test_attention_starts_uniform():
    model, (source, decoder_input_ids, mask) = Seq2SeqBahdanau(SMALL), batch()
    with record_attention(model) as maps:
        model(source, decoder_input_ids, mask)
    torch.testing.assert_close(
        maps["attention"][:, 0, 2], mask / mask.sum(1, keepdim=True)
    )


def test_counts():
    """Exact, for every registered name, and by the formulas of the papers' sizes."""
    names = list_models("seq2seq*")
    assert names == ["seq2seq_bahdanau", "seq2seq_gru", "seq2seq_lstm", "seq2seq_luong"]
    for name in names:
        assert (
            count_parameters(create_model(name, device="meta"))
            == model_info(name).parameters
        )
    assert model_info("seq2seq_lstm").parameters == 384_000_000 + 2 * 32_000 + 80_000
    gru = lambda i, h: 3 * h * (i + h + 2)
    assert model_info("seq2seq_bahdanau").parameters == (
        2 * 30_000 * 620
        + 2 * gru(620, 1000)
        + gru(620 + 2000, 1000)
        + 1000 * 1000
        + 1000
        + 1000 * (1000 + 2000 + 1)
        + (1000 + 620 + 2000 + 1) * 1000
        + 501 * 30_000
    )


def test_names():
    for name in list_models("seq2seq*"):
        tiny = dict(model_info(name).tiny)
        model = create_model(name, **tiny)
        logits = model(**example_inputs(name, **tiny))
        assert logits.shape == (2, 5, tiny["target_vocab_size"])


def test_recipe():
    assert (
        SEQ2SEQ_PAPER.lr(1) == SEQ2SEQ_PAPER.lr(5 * 93_750) == 0.7
        and SEQ2SEQ_PAPER.lr(5 * 93_750 + 1) == 0.35
    )
    assert (
        SEQ2SEQ_PAPER.max_steps == 703_125
        and SEQ2SEQ_PAPER.lr(SEQ2SEQ_PAPER.max_steps) == 0.7 / 2**5
    )


@pytest.mark.parametrize(
    "name", ["seq2seq_lstm", "seq2seq_gru", "seq2seq_bahdanau", "seq2seq_luong"]
)
def test_other_device(name):
    from attn_notes.zoo.devices import check_model

    check_model(name, device="fake", **{**model_info(name).tiny, "hidden_size": 10})


@pytest.mark.parametrize("name", ["lstm", "gru", "bahdanau", "luong general"])
def test_export(name):
    cls, choices = MODELS[name]
    model, (source, decoder_input_ids, mask) = (
        build(cls, dtype=torch.float32, num_hidden_layers=1, **choices),
        batch((4, 3), 2),
    )
    exported = torch.export.export(model, (source, decoder_input_ids, mask)).module()
    torch.testing.assert_close(
        exported(source, decoder_input_ids, mask),
        model(source, decoder_input_ids, mask),
    )


@pytest.mark.no_shapes  # the shape checks would fix the batch
@pytest.mark.parametrize("name", ["lstm", "luong general"])
def test_export_keeps_the_batch_open(name):
    cls, choices = MODELS[name]
    model, inputs = (
        build(cls, dtype=torch.float32, num_hidden_layers=1, **choices),
        batch((4, 3), 2),
    )
    rows = torch.export.Dim("rows", min=2, max=64)
    exported = torch.export.export(
        model, inputs, dynamic_shapes=({0: rows},) * 3
    ).module()
    torch.testing.assert_close(
        exported(*batch((4, 2, 1), 2)), model(*batch((4, 2, 1), 2))
    )


@every_model
def test_bfloat16_autocast(cls, choices):
    model, inputs = build(cls, dtype=torch.float32, **choices), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(*inputs)
    full = model(*inputs)
    assert (half.float() - full).abs().max() < 0.05 * full.abs().max()


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "wrong",
    [
        dict(input_ids=torch.zeros(2, 3)),
        dict(input_ids=torch.ones(3, dtype=torch.long)),
        dict(input_ids=torch.ones(0, 3, dtype=torch.long)),
        dict(decoder_input_ids=torch.ones(3, 2, dtype=torch.long)),
        dict(decoder_input_ids=torch.ones(2, 0, dtype=torch.long)),
        dict(attention_mask=torch.ones(2, 4, dtype=torch.bool)),
        dict(attention_mask=torch.ones(2, 3)),
        dict(decoder_attention_mask=torch.ones(2, 3, dtype=torch.bool)),
    ],
)
def test_bad_input(wrong):
    ones = lambda n: torch.ones(2, n, dtype=torch.long)
    with pytest.raises(InputError, match=f"^{next(iter(wrong))}: ") as error:
        build(Seq2SeqLSTM)(
            **{"input_ids": ones(3), "decoder_input_ids": ones(4), **wrong}
        )
    assert "\n" not in str(error.value)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "input_ids, options",
    [
        (torch.full((2, 3), 23), {}),
        (torch.full((2, 3), -1), {}),
        (torch.zeros(2, 3), {}),
        (torch.ones(2, 3, dtype=torch.long), {"max_new_tokens": 0}),
        (torch.ones(2, 3, dtype=torch.long), {"num_beams": 0}),
        (
            torch.ones(2, 3, dtype=torch.long),
            {"attention_mask": torch.zeros(2, 3, dtype=torch.bool)},
        ),
    ],
)
def test_bad_input_to_generate(input_ids, options):
    with pytest.raises(InputError):
        build(Seq2SeqLSTM).generate(input_ids, **options)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "choice",
    [
        {"hidden_size": 0},
        {"dropout": 1.0},
        {"score": "cosine"},
        {"num_hidden_layers": -1},
        {"source_vocab_size": 2.5},
    ],
)
def test_bad_config(choice):
    with pytest.raises(ConfigError, match=next(iter(choice))):
        replace(SMALL, **choice)


@pytest.mark.no_shapes
@pytest.mark.parametrize("cls", [Seq2SeqLSTM, Seq2SeqLuong])
def test_odd_width_in_two_directions(cls):
    with pytest.raises(ConfigError, match="hidden_size"):
        cls(replace(SMALL, bidirectional=True, hidden_size=9))


def test_the_shipped_model_translates():
    from attn_notes.data.tasks import load_task
    from attn_notes.zoo.registry import weights_folder

    folder = weights_folder("seq2seq_bahdanau")
    assert (folder / "model.safetensors").stat().st_size < 2_000_000
    model, task = create_model("seq2seq_bahdanau", pretrained=True), load_task(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert task.predict(model, ["3 days ago", "Sunday, December 16, 2040"]) == [
        "il y a 3 jours",
        "dimanche 16 décembre 2040",
    ]


@every_model
def test_own_prefix(cls, choices):
    """Marked nowhere: teacher forcing. Marked everywhere: what greedy search gives."""
    from attn_notes.sequence.seq2seq_evidence import own_prefix_logits

    model, (source, decoder_input_ids, mask) = build(cls, **choices), batch()
    decoder_input_ids[:, 0] = 1
    given = {
        "input_ids": source,
        "attention_mask": mask,
        "decoder_input_ids": decoder_input_ids,
    }
    own = torch.zeros_like(decoder_input_ids, dtype=torch.bool)
    torch.testing.assert_close(
        own_prefix_logits(model, given, own),
        model(source, decoder_input_ids, mask),
        rtol=0,
        atol=1e-10,
    )
    free = own_prefix_logits(model, given, ~own).argmax(-1)
    greedy = model.generate(source, mask, max_new_tokens=5)
    before_end = ((greedy == 2).cumsum(1) - (greedy == 2).long()) == 0
    assert torch.equal(free[:, : greedy.shape[1]][before_end], greedy[before_end])


def test_context_in_the_first_step_only():
    from attn_notes.sequence.seq2seq_evidence import FirstStepOnly

    inputs = batch()
    cho, once = build(Seq2SeqGRU), build(FirstStepOnly)
    assert count_parameters(cho) == count_parameters(once) and not torch.equal(
        cho(*inputs), once(*inputs)
    )
    state = once.encode(inputs[0], inputs[2])
    assert not state["context"].any() and torch.equal(
        state["rnn"][0], cho.encode(inputs[0], inputs[2])["rnn"][0]
    )


def test_a_state_handed_over_is_the_encoders():
    from attn_notes.sequence.seq2seq_evidence import HandedOver

    model, (source, _, mask) = build(HandedOver), batch()
    state, (_, (final,)) = model.encode(source, mask), model.encoder(source, mask)
    assert torch.equal(state["rnn"][0], final) and not state["context"].any()


def test_scheduled_sampling_goes_from_first_to_last():
    """The share of own tokens by step, and the loss of the tokens as they are read."""
    from attn_notes.sequence.seq2seq_evidence import (
        ScheduledSampling,
        joined_phrases,
        make_variant,
        own_prefix_logits,
    )
    from attn_notes.training.losses import token_cross_entropy

    task = joined_phrases()
    model = make_variant("attention", task, 0)
    batch = task.collate([task.dataset("train")[i] for i in range(4)])
    shape = batch["decoder_input_ids"].shape
    for first, last, step, share in (
        (0.0, 0.5, 0, 0.0),
        (0.0, 0.5, 50, 0.25),
        (0.0, 0.5, 400, 0.5),
        (1.0, 1.0, 3, 1.0),
    ):
        sampling = ScheduledSampling(task, first, last, 100)
        sampling.step = step
        torch.manual_seed(1)
        terms = sampling.loss(model, batch)
        torch.manual_seed(1)
        logits = own_prefix_logits(model, batch, torch.rand(shape) < share)
        expected, _ = token_cross_entropy(logits, batch["labels"])
        assert terms.keys() == sampling.counts(batch).keys()
        assert torch.equal(terms["next_token"][0], expected)
        assert sampling.step == step + 1


def test_characters_are_tokens():
    from attn_notes.sequence.seq2seq_evidence import (
        from_characters,
        to_characters,
        unit_phrases,
    )

    tokens, characters = unit_phrases("token"), unit_phrases("character")
    vocabulary = characters.target_vocab
    for pair, original in zip(
        characters.pairs("test"), tokens.pairs("test"), strict=True
    ):
        assert from_characters(pair.target) == original.target
        ids = vocabulary.encode(pair.target)
        assert len(ids) == len(original.target)
        assert from_characters(vocabulary.decode(ids)) == original.target
    assert to_characters("à 3 h") == "à ␣ 3 ␣ h"
    assert len(vocabulary) < 100 < len(tokens.target_vocab)


def test_no_experiment_writes_weights():
    from attn_notes.sequence import seq2seq_evidence
    from attn_notes.training.experiments import EXPERIMENTS

    functions = [e.function for key, e in EXPERIMENTS.items() if key[0] == "seq2seq"]
    assert len(functions) == 7
    for function in (*functions, seq2seq_evidence.train_phrases):
        assert "save" not in inspect.getsource(function)


def test_the_timed_pair_is_equal():
    from attn_notes.sequence.seq2seq_evidence import TorchSeq2Seq

    ours = Seq2SeqLSTM(SMALL)
    with torch.no_grad():
        for parameter in ours.parameters():
            nn.init.normal_(parameter, std=0.4)
    reference = TorchSeq2Seq(ours).double()  # holds ours
    source, target, _ = batch((6, 6))
    torch.testing.assert_close(
        reference(source, target), ours(source, target), rtol=0, atol=1e-12
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "variants",
        "small_start",
        "equal_time",
        "handed_over",
        "feedback",
        "phrases",
        "characters",
    ],
)
def test_stored_runs_replay(name):
    """Seed 0 of every setting gives its stored losses again."""
    from attn_notes.sequence import seq2seq_evidence  # noqa: F401, registers them
    from attn_notes.training.experiments import load, replay

    for index, row in enumerate(load("seq2seq", name)):
        if row["seed"] == 0:
            stored, now = replay("seq2seq", name, index)
            assert len(stored) == len(now) >= 10
