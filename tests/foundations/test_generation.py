"""Greedy and beam search against trying everything, against a plain beam, alone against
in company; sampling against a plain reference and by frequency."""

import copy
import itertools
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_notes.foundations.checks import InputError
from attn_notes.foundations.generation import (
    beam_search,
    greedy_search,
    max_lengths,
    reorder_state,
    sample,
    sampling_probs,
)

PAD, BOS, EOS, V = 0, 1, 2, 5
TOKENS = (EOS, 3, 4)


def tables(count, seed, scale=1.0):
    "Random models: scores of the next token given the last two, for each row."
    scores = scale * torch.randn(
        count,
        V,
        V,
        V,
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    )
    scores[..., [PAD, BOS]] = -torch.inf
    return scores


def step(tokens, state):
    both = torch.cat([state["before"], tokens], dim=1)[:, -2:]
    rows = torch.arange(len(tokens))
    logits = state["table"][rows, both[:, 0], both[:, 1]]
    return logits, {"before": both[:, 1:], "table": state["table"]}


def bos(b):
    return torch.full((b, 1), BOS)


def start(table):
    return {"before": bos(len(table)), "table": table}


def search(table, limit=4, num_beams=None, prompt=None, **options):
    prompt = bos(len(table)) if prompt is None else prompt
    if num_beams is None:
        return greedy_search(step, start(table), prompt, EOS, PAD, limit)
    return beam_search(
        step, start(table), prompt, EOS, PAD, limit, num_beams=num_beams, **options
    )


def unpadded(ids):
    return [[token for token in row if token != PAD] for row in ids.tolist()]


def log_p(sentence, table):
    logs = table.log_softmax(-1)
    tokens = [BOS, BOS, *sentence]
    triples = zip(tokens[:-2], tokens[1:-1], tokens[2:], strict=True)
    return sum(logs[a, b, c].item() for a, b, c in triples)


def score(sentence, table, alpha):
    return log_p(sentence, table) / ((5 + len(sentence)) / 6) ** alpha


def everything(limit):
    for length in range(1, limit + 1):
        for sentence in itertools.product(TOKENS, repeat=length):
            if EOS not in sentence[:-1] and (sentence[-1] == EOS or length == limit):
                yield list(sentence)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("limit", [1, 2, 4])
def test_a_wide_beam_finds_the_best_of_all(alpha, limit):
    models = tables(20, seed=limit)
    found = unpadded(search(models, limit, num_beams=40, length_penalty=alpha))
    for sentence, table in zip(found, models, strict=True):
        best = max(score(other, table, alpha) for other in everything(limit))
        assert (
            sentence in list(everything(limit))
            and abs(score(sentence, table, alpha) - best) < 1e-9
        )


def plain_beam(table, limit, k, alpha):
    "One row with Python lists: the sequence found and the number of steps taken."
    logs, beam, complete = table.log_softmax(-1), [(0.0, [])], []
    for length in range(1, limit + 1):
        longer = []
        for p, sentence in beam:
            a, b = [BOS, BOS, *sentence][-2:]
            longer += [(p + logs[a, b, c].item(), [*sentence, c]) for c in TOKENS]
        longer = sorted(longer, reverse=True)
        complete += [(p, s) for p, s in longer[:k] if s[-1] == EOS]
        beam = [(p, s) for p, s in longer if s[-1] != EOS][:k]
        value = lambda p, n: p / ((5 + n) / 6) ** alpha
        scores = sorted((value(p, len(s)) for p, s in complete), reverse=True)
        enough = len(scores) >= k and scores[k - 1] >= value(beam[0][0], length)
        if enough or (scores and scores[0] >= value(beam[0][0], limit)):
            break
    if length == limit and not enough:
        complete += beam
    return max(complete, key=lambda pair: value(pair[0], len(pair[1])))[1], length


@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=4),
    st.integers(1, 4),
    st.integers(0, 9999),
    st.sampled_from([0.0, 0.6, 1.0, 3.0]),
    st.sampled_from([0.0, -6.0]),
)
@settings(max_examples=60)
def test_a_beam_is_the_plain_beam(limits, k, seed, alpha, ending):
    """Row by row, with a limit for each, and in as many steps as the longest row takes;
    with likely and unlikely ends."""
    models = tables(len(limits), seed, scale=1.5)
    models[..., EOS] += ending
    calls = []

    def counted(tokens, state):
        calls.append(tokens.shape)
        return step(tokens, state)

    found = beam_search(
        counted,
        start(models),
        bos(len(limits)),
        EOS,
        PAD,
        torch.tensor(limits),
        num_beams=k,
        length_penalty=alpha,
    )
    plain = [
        plain_beam(t, limit, k, alpha) for t, limit in zip(models, limits, strict=True)
    ]
    assert unpadded(found) == [sentence for sentence, _ in plain]
    assert len(calls) == max(steps for _, steps in plain)
    assert calls[0] == (len(limits), 1) and set(calls[1:]) <= {(len(limits) * k, 1)}


@given(
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(0, 999),
    st.sampled_from([0.0, 1.0, 3.0]),
)
def test_a_beam_of_one_is_greedy(b, limit, seed, alpha):
    models = tables(b, seed)
    assert torch.equal(
        search(models, limit, num_beams=1, length_penalty=alpha), search(models, limit)
    )


@given(st.integers(2, 6), st.integers(1, 8), st.integers(1, 5), st.integers(0, 999))
@settings(max_examples=15)
def test_alone_as_in_company(b, limit, beams, seed):
    models = tables(b, seed)
    together = unpadded(search(models, limit, num_beams=beams))
    assert together == [
        unpadded(search(models[i : i + 1], limit, num_beams=beams))[0] for i in range(b)
    ]
    assert unpadded(search(models, limit)) == [
        unpadded(search(models[i : i + 1], limit))[0] for i in range(b)
    ]


@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=6),
    st.sampled_from([None, 1, 3]),
    st.integers(0, 999),
    st.booleans(),
    st.sampled_from([0.0, 0.6]),
)
def test_every_row_has_its_own_limit(limits, beams, seed, endless, alpha):
    """A row in company gets what it gets alone; without an end token to choose, it is
    as long as its limit."""
    models = tables(len(limits), seed)
    if endless:
        models[..., EOS] = -torch.inf
    options = {} if beams is None else {"num_beams": beams, "length_penalty": alpha}
    together = unpadded(search(models, torch.tensor(limits), **options))
    assert together == [
        unpadded(search(models[i : i + 1], limit, **options))[0]
        for i, limit in enumerate(limits)
    ]
    assert not endless or [len(sentence) for sentence in together] == limits
    assert torch.equal(
        search(models, torch.full((len(limits),), 4), **options),
        search(models, 4, **options),
    )


# tokens that the step forbids, and hypotheses that lead nowhere


def forbidding(count, seed, share):
    "Random models that forbid tokens; after some pairs of tokens, all of them."
    models, draw = tables(count, seed), torch.Generator().manual_seed(seed)
    models[torch.rand(models.shape, generator=draw) < share] = -torch.inf
    models[torch.rand(models.shape[:-1], generator=draw) < share / 2] = -torch.inf
    return models


def possible(sentence, table):
    tokens = [BOS, BOS, *sentence]
    triples = zip(tokens[:-2], tokens[1:-1], tokens[2:], strict=True)
    return all(table[triple].isfinite() for triple in triples)


@given(
    st.integers(0, 999),
    st.integers(1, 4),
    st.sampled_from([0.2, 0.5, 0.8]),
    st.sampled_from([1, 2, 3, 40]),
    st.sampled_from([0.0, 1.0]),
)
@settings(max_examples=150)
def test_what_the_step_forbids_is_never_generated(seed, limit, share, k, alpha):
    """A beam gives something wherever greedy search does, never a forbidden token; a
    wide one the best of all; both an error, and nothing else, where there is none."""
    models = forbidding(1, seed, share)
    (table,) = models
    outcomes = []
    for options in ({}, {"num_beams": k, "length_penalty": alpha}):
        try:
            (found,) = unpadded(search(models, limit, **options))
        except InputError as error:
            assert "finite number" in str(error)
            found = None
        assert found is None or possible(found, table)
        outcomes.append(found)
    greedy, beam = outcomes
    assert beam is not None or greedy is None
    sentences = [s for s in everything(limit) if possible(s, table)]
    assert beam is None or beam in sentences
    if k == 40 and sentences:
        best = max(score(other, table, alpha) for other in sentences)
        assert abs(score(beam, table, alpha) - best) < 1e-9


@given(st.integers(0, 999), st.sampled_from([None, 1, 2, 3]))
@settings(max_examples=25)
def test_a_row_that_leads_nowhere_is_no_other_rows_concern(seed, k):
    "Together as alone, or an error if one of them has none alone."
    models = forbidding(3, seed, 0.4)
    options = {} if k is None else {"num_beams": k}
    try:
        alone = [unpadded(search(models[i : i + 1], 4, **options))[0] for i in range(3)]
    except InputError:
        with pytest.raises(InputError, match="finite number"):
            search(models, 4, **options)
    else:
        assert unpadded(search(models, 4, **options)) == alone


def test_a_beam_that_leads_nowhere_falls_back_on_greedy_search():
    """Two hypotheses push the greedy one out of the beam, and then may not go on."""
    table = torch.full((1, V, V, V), -torch.inf)
    table[:, BOS, BOS, [3, 4]] = torch.tensor([0.51, 0.49]).log()
    table[:, BOS, 3, [0, 3, 4]] = torch.tensor([0.34, 0.33, 0.33]).log()
    table[:, BOS, 4, [1, 3]] = torch.tensor([0.5, 0.5]).log()
    table[:, 3, 0, EOS] = 0.0
    expected = [[3, 0, EOS]]
    assert search(table, 5).tolist() == expected
    assert search(table, 5, num_beams=2).tolist() == expected


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_nan_after_a_finished_hypothesis(k, wrong):
    "An end was likely at the first step; what the others become is not to be known."

    def step(tokens, t):
        logits = torch.tensor([-torch.inf, -torch.inf, 1.0, 1.5, 0.5])
        logits = logits.repeat(len(tokens), 1)
        logits[:, 3] += torch.where(t > 0, wrong, 0.0)
        return logits, t + 1

    start = torch.zeros(1, dtype=torch.long)
    with pytest.raises(InputError, match="NaN"):
        beam_search(step, start, bos(1), EOS, PAD, 6, k, length_penalty=3.0)


@pytest.mark.parametrize("method", [greedy_search, beam_search, sample])
@pytest.mark.parametrize("wrong", [torch.nan, -torch.inf, torch.inf])
def test_what_a_finished_row_would_become_does_not_matter(method, wrong):
    def step(tokens, t):
        sure = torch.tensor([-torch.inf, -torch.inf, 0.0, -torch.inf, -torch.inf])
        open_ = torch.tensor([-torch.inf, -torch.inf, -torch.inf, 0.0, -torch.inf])
        logits = torch.stack([sure if t[0] == 0 else sure + wrong, open_])
        return logits.repeat_interleave(len(tokens) // 2, 0), t + 1

    start = torch.zeros(2, dtype=torch.long)
    found = method(step, start, bos(2), EOS, PAD, torch.tensor([4, 3]))
    assert found.tolist() == [[EOS, PAD, PAD], [3, 3, 3]]


@pytest.mark.parametrize("method", [greedy_search, beam_search, sample])
def test_no_limit_to_speak_of(method):
    def step(tokens, t):
        logits = torch.full((len(tokens), V), -torch.inf)
        logits[:, EOS if t[0] == 4 else 3] = 0.0
        return logits, t + 1

    start = torch.zeros(2, dtype=torch.long)
    found = method(step, start, bos(2), EOS, PAD, 10**30)
    assert found.tolist() == [[3, 3, 3, 3, EOS]] * 2


METHODS = [greedy_search, beam_search, sample]


@pytest.mark.parametrize("method", METHODS)
def test_a_row_at_its_limit_does_not_keep_the_loop_going(method):
    calls = []

    def counted(tokens, state):
        calls.append(1)
        logits = torch.tensor([-torch.inf, -torch.inf, -torch.inf, 1, 2])
        return logits.expand(len(tokens), -1), state

    found = method(counted, None, bos(2), EOS, PAD, torch.tensor([5, 3]))
    assert [len(row) for row in unpadded(found)] == [5, 3] and len(calls) == 5


@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 999))
def test_form_of_the_result(beams, limit, seed):
    models = tables(4, seed)
    for ids in (
        search(models, limit),
        search(models, limit, num_beams=beams),
        sample(step, start(models), bos(4), EOS, PAD, limit),
    ):
        assert ids.dtype == torch.long and len(ids) == 4 and 1 <= ids.shape[1] <= limit
        ended = (ids == EOS).cumsum(-1)
        # padding after the end token and nowhere else
        assert ((ids == PAD) == ((ended - (ids == EOS).long()) > 0)).all()
        lengths = (ids != PAD).sum(-1)
        assert ((ended[:, -1] == 1) | (lengths == limit)).all()
        assert lengths.max() == ids.shape[1]


def test_a_wider_beam_is_no_worse_on_average():
    models = tables(100, seed=7)
    means = [
        sum(
            score(s, t, 1.0)
            for s, t in zip(
                unpadded(search(models, 5, num_beams=k)), models, strict=True
            )
        )
        for k in (1, 2, 4, 8)
    ]
    assert means == sorted(means)


def fixed(*logits):
    "A step with the same scores for every row, one row of `logits` a step."

    def step(tokens, t):
        return torch.tensor(logits)[t[0]].expand(len(tokens), -1), t + 1

    return step


def test_stops_at_the_end_token_and_at_the_limit():
    calls = []

    def counted(tokens, state):
        calls.append(tokens)
        return torch.tensor(
            [[-9.0, -9.0, 5.0 if len(calls) == 3 else -9.0, 1.0, 0.0]]
        ).expand(len(tokens), -1), state

    found = greedy_search(counted, None, bos(2), EOS, PAD, 10)
    assert found.tolist() == [[3, 3, 2]] * 2 and len(calls) == 3
    calls.clear()
    found = greedy_search(counted, None, bos(2), EOS, PAD, 2)
    assert found.tolist() == [[3, 3]] * 2 and len(calls) == 2
    assert [call.tolist() for call in calls] == [[[BOS], [BOS]], [[3], [3]]]


def test_rows_end_one_by_one():
    "What ended gets padding, also as the step's input; the other row goes on."
    calls = []

    def counted(tokens, state):
        calls.append(tokens[:, 0].tolist())
        end = torch.tensor([len(calls) == 1, len(calls) == 3])
        logits = torch.tensor([[-9.0, -9.0, -9.0, 1.0, 0.0]]).repeat(2, 1)
        return logits.masked_fill(end[:, None] & (torch.arange(V) == EOS), 5.0), state

    found = greedy_search(counted, None, bos(2), EOS, PAD, 10)
    assert found.tolist() == [[2, 0, 0], [3, 3, 2]]
    assert calls == [[BOS, BOS], [EOS, 3], [PAD, 3]]


def test_a_finished_hypothesis_is_kept():
    "A good short sequence, then others that look better for one step and end badly."
    logs = [
        [-9.0, -9.0, 0.9, 1.0, 0.95],
        [-9.0, -9.0, -9.0, 3.0, 3.0],
        [-9.0, -9.0, -9.0, 1.0, 1.0],
        [-9.0, -9.0, -9.0, 1.0, 1.0],
    ]
    ids = beam_search(
        fixed(*logs),
        torch.zeros(1, dtype=torch.long),
        bos(1),
        EOS,
        PAD,
        4,
        num_beams=3,
        length_penalty=0.0,
    )
    assert ids.tolist() == [[EOS]]


def test_copies_of_the_prompt_take_no_place_in_the_beam():
    """A hypothesis of 4 in 100 at the first step stays in a beam of two, and wins under
    a length penalty that is strong enough."""
    table = torch.full((1, V, V, V), -99.0)
    table[:, :, BOS, 3], table[:, :, BOS, 4] = 0.0, -3.2
    table[:, :, 3, EOS] = 0.0  # the likely token ends at once
    table[:, :, 4, 4] = 0.0  # the other one goes on
    found = search(table, 12, num_beams=2, length_penalty=6.0)
    assert found.tolist() == [[4] * 12]


def test_search_ends_early_when_nothing_can_win():
    calls = []

    def sure(tokens, state):
        calls.append(1)
        logits = torch.tensor([[-50.0, -50.0, 20.0, 0.0, 0.0]])
        return logits.expand(len(tokens), -1), state

    found = beam_search(sure, None, bos(3), EOS, PAD, 100, num_beams=4)
    assert found.tolist() == [[EOS]] * 3 and len(calls) == 1


@pytest.mark.parametrize("k, alpha", [(1, 1.0), (1, 0.0), (2, 0.0), (3, 0.0)])
def test_a_tie_ends_the_search(k, alpha):
    """An open hypothesis no better than what is complete is not followed: by the
    first rule for a beam of one, by the second without a length penalty."""
    calls = []

    def tied(tokens, state):
        calls.append(1)
        logits = torch.tensor([[-torch.inf, -torch.inf, 1.0, 1.0, -torch.inf]])
        return logits.expand(len(tokens), -1), state

    options = {"num_beams": k, "length_penalty": alpha}
    found = beam_search(tied, None, bos(2), EOS, PAD, 9, **options)
    assert found.tolist() == [[EOS]] * 2 and len(calls) == 1


def test_length_penalty_prefers_longer():
    models = tables(60, seed=3)
    lengths = [
        (search(models, 6, num_beams=6, length_penalty=alpha) != PAD)
        .float()
        .sum()
        .item()
        for alpha in (0.0, 1.0, 4.0)
    ]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]


def test_four_beams_and_a_length_penalty_of_one_by_default():
    models, rows = tables(300, seed=5), []

    def counted(tokens, state):
        rows.append(len(tokens))
        return step(tokens, state)

    found = beam_search(counted, start(models), bos(300), EOS, PAD, 6)
    assert set(rows) == {300, 300 * 4}
    assert torch.equal(found, search(models, 6, num_beams=4, length_penalty=1.0))
    assert not torch.equal(found, search(models, 6, num_beams=4, length_penalty=0.0))
    assert not torch.equal(found, search(models, 6, num_beams=4, length_penalty=2.0))


def test_more_beams_than_tokens():
    assert search(tables(2, 0), 3, num_beams=50).shape[0] == 2
    one = lambda tokens, state: (torch.zeros(len(tokens), 1), state)
    ids = torch.zeros(2, 1, dtype=torch.long)
    assert beam_search(one, None, ids, 5, 7, 3, num_beams=4).tolist() == [[0, 0, 0]] * 2


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_every_precision(dtype):
    "Log-probabilities are summed in float32 at least."
    models = tables(20, seed=1, scale=3).to(dtype)
    found = search(models, 5, num_beams=3)
    exact = models if dtype == torch.float64 else models.float()
    assert torch.equal(found, search(exact, 5, num_beams=3))
    drawn = sample(step, start(models), bos(20), EOS, PAD, 5)
    assert len(drawn) == 20


@pytest.mark.parametrize("method", METHODS)
def test_no_gradient_is_kept(method):
    models = tables(2, 0).requires_grad_()
    seen = []

    def watched(tokens, state):
        logits, state = step(tokens, state)
        seen.append(logits.requires_grad)
        return logits, state

    method(watched, start(models), bos(2), EOS, PAD, 3)
    assert seen and not any(seen)


# the prompt


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 999))
@settings(max_examples=25)
def test_a_prompt_is_what_was_generated_before(limit, length, seed):
    "The new tokens after a prompt are those that follow it when it is fed one by one."
    models, generator = tables(3, seed), torch.Generator().manual_seed(seed)
    models[..., EOS] = -torch.inf
    prompt = torch.randint(3, V, (3, length), generator=generator)
    state = start(models)
    for i in range(length - 1):
        _, state = step(prompt[:, [i]], state)
    for options in ({}, {"num_beams": 3}):
        method = beam_search if options else greedy_search
        fed = method(step, state, prompt[:, -1:], EOS, PAD, limit, **options)
        assert torch.equal(fed, search(models, limit, prompt=prompt, **options))
    drawn = [
        sample(step, s, p, EOS, PAD, limit, generator=generator.manual_seed(seed))
        for s, p in ((start(models), prompt), (state, prompt[:, -1:]))
    ]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("method", METHODS)
def test_the_model_sees_the_prompt_once_and_then_single_tokens(method):
    calls = []

    def counted(tokens, state):
        calls.append(tokens)
        logits = torch.tensor([-torch.inf, -torch.inf, -torch.inf, 1, 1])
        return logits.expand(len(tokens), -1), state

    prompt = torch.tensor([[BOS, 3, 4], [BOS, 4, 4]])
    found = method(counted, None, prompt, EOS, PAD, 3)
    assert torch.equal(calls[0], prompt) and found.shape == (2, 3)
    assert [call.shape[1] for call in calls] == [3, 1, 1]


@pytest.mark.parametrize("method", [greedy_search, sample])
def test_without_an_end_token_nothing_ends(method):
    logits = lambda tokens, state: (torch.tensor([[9.0, 0, 9, 0, 0]] * 2), state)
    assert method(logits, None, bos(2), None, PAD, 7).shape == (2, 7)


# sampling


def plain_probs(logits, temperature, top_k, top_p):
    "The distribution of one row, token by token."
    p = (logits / temperature).softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    kept = order[:top_k]
    total, kept_sum, nucleus = sum(p[i] for i in kept), 0.0, []
    for i in kept:
        if top_p is not None and kept_sum >= top_p:
            break
        nucleus.append(i)
        kept_sum += p[i] / total
    mass = sum(p[i] for i in nucleus)
    return [p[i] / mass if i in nucleus else 0.0 for i in range(len(p))]


@given(
    st.integers(1, 12),
    st.sampled_from([0.1, 0.7, 1.0, 2.5]),
    st.sampled_from([None, 1, 2, 3, 7, 50]),
    st.sampled_from([None, 0.01, 0.3, 0.5, 0.9, 1.0]),
    st.integers(0, 9999),
)
@settings(max_examples=150)
def test_distribution_against_a_plain_one(v, temperature, top_k, top_p, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, v, generator=generator, dtype=torch.float64)
    before = logits.clone()
    probs = sampling_probs(logits, temperature, top_k, top_p)
    expected = [plain_probs(row, temperature, top_k, top_p) for row in logits]
    assert torch.allclose(probs, torch.tensor(expected).double(), atol=1e-12)
    assert probs.dtype == torch.float64 and torch.equal(logits, before)


def test_distribution_at_its_edges():
    half = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).log()
    assert sampling_probs(half, top_p=0.5).tolist() == [
        [1, 0, 0, 0]
    ]  # reached, not passed
    assert sampling_probs(half, top_p=0.51).count_nonzero() == 2
    assert sampling_probs(half, top_k=2).count_nonzero() == 2  # of equals the first
    assert torch.equal(sampling_probs(half, top_k=4, top_p=1.0), half.exp())
    equals = sampling_probs(torch.zeros(1, 5000), top_k=3)  # the first of them
    assert equals.nonzero()[:, 1].tolist() == [0, 1, 2]
    many = torch.zeros(1, 100_000)  # rounding loses no token when all are kept
    many[0, 0] = 30.0
    assert (sampling_probs(many, top_p=1.0) > 0).all()
    cold = sampling_probs(torch.tensor([[3.0, 1e4, 1e4 + 1]]), temperature=1e-36)
    assert cold.tolist() == [[0, 0, 1]]
    assert sampling_probs(half.half(), 2.0).dtype == torch.float32
    assert sampling_probs(torch.full((1, 3), -torch.inf)).isnan().all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 2},
        {"top_p": 0.6},
        {"top_p": 1.0},
        {"temperature": 1.5, "top_k": 3, "top_p": 0.8},
    ],
)
def test_frequencies(options):
    "How often each token follows beside its probability, by chi-squared."
    logits = torch.tensor([-torch.inf, 0.1, 1.3, 0.7, -0.4, 0.2])
    rows = 20_000
    generator = torch.Generator().manual_seed(1)
    drawn = sample(
        lambda tokens, state: (logits.expand(len(tokens), -1), state),
        None,
        torch.zeros(rows, 1, dtype=torch.long),
        None,
        0,
        2,
        generator=generator,
        **options,
    )
    probs = sampling_probs(logits[None], **options)[0]
    for column in drawn.T:
        counts = column.bincount(minlength=6)
        assert (counts[probs == 0] == 0).all()
        expected = rows * probs[probs > 0]
        chi = ((counts[probs > 0] - expected).square() / expected).sum()
        assert chi < 25  # at most five degrees of freedom: 1 in 7000 by chance
    pairs = (drawn[:, 0] == drawn[:, 1]).float().mean()
    assert abs(pairs - probs.square().sum()) < 0.02  # one draw tells nothing of another


def test_sequences_have_their_probability():
    "Whole sequences are drawn as often as the product of their probabilities."
    table, rows = tables(1, seed=3), 20_000
    state = {"before": bos(rows), "table": table.expand(rows, -1, -1, -1)}
    generator = torch.Generator().manual_seed(0)
    found = unpadded(sample(step, state, bos(rows), EOS, PAD, 3, generator=generator))
    for sentence in everything(3):
        share = sum(other == sentence for other in found) / rows
        p = 2.718281828459045 ** log_p(sentence, table[0])
        assert abs(share - p) < 5 * (p * (1 - p) / rows) ** 0.5 + 1e-4


def test_generator_decides():
    models = tables(50, seed=2)
    draw = lambda seed: sample(
        step,
        start(models),
        bos(50),
        EOS,
        PAD,
        6,
        generator=None if seed is None else torch.Generator().manual_seed(seed),
    )
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    state = torch.get_rng_state()
    draw(1)
    assert torch.equal(torch.get_rng_state(), state)  # torch's own is left alone
    torch.manual_seed(5)
    first = draw(None)
    assert not torch.equal(first, draw(None))
    torch.manual_seed(5)
    assert torch.equal(first, draw(None))


def test_one_kept_token_is_greedy():
    models = tables(20, seed=4)
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-20}):
        drawn = sample(step, start(models), bos(20), EOS, PAD, 6, **options)
        assert torch.equal(drawn, search(models, 6))


# the state

Point = namedtuple("Point", "x y")


@dataclass
class Cache:
    keys: Tensor
    length: int = 3


@dataclass
class Doubling:
    "A dataclass that knows better than to be copied."

    rows: Tensor
    asked: int = 0

    def reorder(self, index):
        return Doubling(self.rows, self.asked + len(index))


@pytest.mark.parametrize("method", METHODS)
def test_states_are_never_changed(method):
    "Every state that a step got or gave is afterwards what it was."
    seen = []

    def watched(tokens, state):
        logits, new = step(tokens, state)
        for item in (tokens, logits, state, new):
            seen.append((item, copy.deepcopy(item)))
        return logits, new

    models = tables(30, seed=1)
    method(watched, start(models), bos(30), EOS, PAD, 6)
    assert len(seen) > 8
    for item, copied in seen:
        if isinstance(item, Tensor):
            assert torch.equal(item, copied)
        else:
            assert item.keys() == copied.keys()
            assert all(torch.equal(item[key], copied[key]) for key in item)


def test_hypotheses_carry_their_own_state():
    "The state of a hypothesis is made of its own tokens, whatever was reordered."

    def remembering(tokens, state):
        history = torch.cat([state["history"], tokens], dim=1)
        logits, inner = step(
            tokens, {"before": state["before"], "table": state["table"]}
        )
        assert torch.equal(inner["before"], tokens[:, -1:])
        expected = torch.cat([bos(len(tokens)), history], 1)[:, -2:]
        rows = torch.arange(len(tokens))
        again = state["table"][rows, expected[:, 0], expected[:, 1]]
        assert torch.equal(logits, again)
        return logits, {**inner, "history": history}

    models = tables(4, seed=8)
    state = {**start(models), "history": torch.empty(4, 0, dtype=torch.long)}
    found = beam_search(remembering, state, bos(4), EOS, PAD, 6, num_beams=3)
    assert torch.equal(found, search(models, 6, num_beams=3))


def test_an_object_reorders_itself():
    state = reorder_state(
        [Doubling(torch.arange(3)), {"inner": Doubling(torch.arange(3), 5)}],
        torch.tensor([2, 0]),
    )
    assert (
        state[0].asked == 2
        and state[1]["inner"].asked == 7
        and torch.equal(state[0].rows, torch.arange(3))
    )


def test_reorder_state_reaches_everything():
    rows, index = torch.arange(6).view(3, 2), torch.tensor([2, 0])
    state = {"a": [rows, None, (rows, "text")], "b": Point(rows, 5), "c": Cache(rows)}
    new = reorder_state(state, index)
    expected = rows[index]
    assert (
        torch.equal(new["a"][0], expected)
        and new["a"][1] is None
        and torch.equal(new["a"][2][0], expected)
        and new["a"][2][1] == "text"
    )
    assert isinstance(new["a"], list) and isinstance(new["a"][2], tuple)
    assert (
        isinstance(new["b"], Point)
        and torch.equal(new["b"].x, expected)
        and new["b"].y == 5
    )
    assert (
        isinstance(new["c"], Cache)
        and torch.equal(new["c"].keys, expected)
        and new["c"].length == 3
    )
    assert torch.equal(
        reorder_state(rows, torch.tensor([1]), batch_dim=1), rows[:, [1]]
    )
    assert torch.equal(state["c"].keys, rows)  # the old one is untouched


# bad input


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 1.5}, "num_beams"),
        ({"length_penalty": -1.0}, "length_penalty"),
        ({"length_penalty": float("nan")}, "length_penalty"),
        ({"limit": 0}, "max_new_tokens"),
        ({"limit": torch.tensor([3, 0])}, "max_new_tokens"),
        ({"limit": torch.tensor([3, 2, 1])}, r"shape \(2,\)"),
        ({"limit": torch.tensor([3.0, 2.0])}, "whole numbers"),
        ({"limit": torch.tensor([True, True])}, "whole numbers"),
        ({"prompt": bos(2)[:, 0]}, "prompt: expected token ids"),
        ({"prompt": bos(2).float()}, "prompt: expected token ids"),
        ({"prompt": bos(0)}, "prompt: expected at least one row"),
        ({"prompt": bos(2)[:, :0]}, "prompt: expected at least one row"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        search(tables(2, 0), **{"num_beams": 2, **options})
    if not options.keys() & {"num_beams", "length_penalty"}:
        with pytest.raises(InputError, match=message):
            search(tables(2, 0), **options)
        limit, prompt = options.get("limit", 4), options.get("prompt", bos(2))
        with pytest.raises(InputError, match=message):
            sample(step, start(tables(2, 0)), prompt, EOS, PAD, limit)


def never(tokens, state):
    raise AssertionError("the model was called")


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"temperature": 0.0},
            "temperature: expected a finite number above 0; got 0.0",
        ),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, "top_k: expected a whole number"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_p": 0.0}, "top_p: expected a number from above 0 to 1, .*; got 0.0"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
    ],
)
def test_bad_sampling_options(options, message):
    with pytest.raises(InputError, match=message):
        sample(never, None, bos(2), EOS, PAD, 4, **options)


@pytest.mark.no_shapes
def test_a_generator_of_another_device():
    here, there = torch.Generator(), bos(2).to("meta")
    with pytest.raises(InputError, match="expected one on meta; got one on cpu"):
        sample(never, None, there, EOS, PAD, 4, generator=here)


@pytest.mark.no_shapes
def test_bad_sizes_are_found_before_any_work():
    for call in (
        lambda: greedy_search(never, None, bos(1), EOS, PAD, 0),
        lambda: sample(never, None, bos(1), EOS, PAD, 0),
        lambda: beam_search(never, None, bos(1), EOS, PAD, -1),
        lambda: beam_search(never, None, bos(1), EOS, PAD, 5, num_beams=0),
    ):
        with pytest.raises(InputError, match="expected a whole number"):
            call()


def test_max_lengths():
    assert max_lengths(3, 2, "cpu").tolist() == [3, 3]
    assert max_lengths(torch.tensor([1, 4]), 2, "cpu").tolist() == [1, 4]
    assert max_lengths(torch.tensor([1, 4]), 2, "meta").device.type == "meta"


@pytest.mark.no_shapes
@pytest.mark.parametrize("method", METHODS)
def test_scores_that_are_no_numbers(method):
    broken = lambda tokens, state: (torch.full((len(tokens), V), torch.nan), state)
    with pytest.raises(InputError, match="NaN"):
        method(broken, None, bos(1), EOS, PAD, 5)
    once = iter([0.0, torch.nan, 0.0, 0.0, 0.0])  # at one step, in one row
    logits = torch.tensor([[0.0, 0.0, -torch.inf, 1.0, 1.0]] * 2)

    def partly(tokens, state):
        scores = logits.repeat_interleave(len(tokens) // 2, dim=0)
        scores[0, 3] += next(once)
        return scores, state

    with pytest.raises(InputError, match="NaN"):
        method(partly, None, bos(2), EOS, PAD, 5)
    nothing = lambda tokens, state: (torch.full((len(tokens), V), -torch.inf), state)
    with pytest.raises(InputError, match="finite number"):
        method(nothing, None, bos(1), EOS, PAD, 5)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "options",
    [
        dict(num_beams=1001),
        dict(num_beams=10**30),
        dict(num_beams=2.0),
        *(dict(length_penalty=x) for x in ("1", None, True, torch.nan, 1e9, [1])),
    ],
    ids=str,
)
def test_a_beam_that_can_not_be(options):
    (name,) = options
    with pytest.raises(InputError, match=f"^{name}"):
        beam_search(never, None, bos(1), EOS, PAD, 5, **options)


@pytest.mark.no_shapes
@pytest.mark.parametrize("options", [dict(temperature="1"), dict(top_p="1")], ids=str)
def test_texts_for_numbers(options):
    (name,) = options
    with pytest.raises(InputError, match=f"^{name}: expected a (finite )?number"):
        sample(never, None, bos(1), EOS, PAD, 5, **options)


@pytest.mark.no_shapes
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@pytest.mark.parametrize("method", METHODS)
def test_integers_that_no_embedding_takes(method):
    "And sparse or ragged prompts, and limits of such a type."
    for prompt in (
        bos(2).to(torch.uint8),
        bos(2).to(torch.uint64),
        bos(2).to_sparse(),
        torch.nested.nested_tensor([bos(1)[0], bos(1)[0]]),
    ):
        with pytest.raises(InputError, match="^prompt: expected token ids"):
            method(never, None, prompt, EOS, PAD, 5)
    limits = torch.tensor([2, 3], dtype=torch.uint64)
    with pytest.raises(InputError, match="^max_new_tokens: expected whole numbers"):
        method(never, None, bos(2), EOS, PAD, limits)


def rising(tokens, state):
    return torch.arange(5.0).repeat(len(tokens), 1), state


@pytest.mark.parametrize(
    "options", [{"temperature": 1e-300}, {"top_p": 1e-300}, {"temperature": 5e-324}]
)
def test_numbers_too_small_for_the_logits_choose_the_likeliest(options):
    prompt = torch.tensor([[1], [1]])
    drawn = sample(rising, None, prompt, None, PAD, 3, **options)
    assert torch.equal(drawn, greedy_search(rising, None, prompt, None, PAD, 3))


@pytest.mark.no_shapes
@pytest.mark.parametrize("search", [greedy_search, beam_search, sample])
@pytest.mark.parametrize("shape", [(1, 5), (2, 1, 5), (5,)])
def test_logits_of_another_shape(search, shape):
    with pytest.raises(InputError, match=r"step: expected logits of shape \(2, v\)"):
        step = lambda tokens, state: (torch.zeros(shape), state)  # noqa: E731
        search(step, None, torch.tensor([[1], [1]]), EOS, PAD, 3)


@pytest.mark.no_shapes
@pytest.mark.parametrize("search", [greedy_search, beam_search, sample])
@pytest.mark.parametrize("step", [None, "step", 3])
def test_a_step_that_is_no_function(search, step):
    with pytest.raises(InputError, match="step: expected a function; got"):
        search(step, None, torch.tensor([[1], [1]]), EOS, PAD, 3)
