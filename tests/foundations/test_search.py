"""Greedy and beam search against trying everything, against each other, and alone against in company."""

import itertools
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_notes.foundations.checks import InputError
from attn_notes.foundations.search import beam_search, greedy_search, reorder_state

PAD, BOS, EOS, V = 0, 1, 2, 5
WORDS = (EOS, 3, 4)


def tables(count, seed, scale=1.0):
    "Random models: scores of the next word given the last two, for each sentence of a batch."
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


def step(last, state):
    before, table = state["before"], state["table"]
    rows = torch.arange(len(last))
    return table[rows, before, last], {"before": last, "table": table}


def start(table):
    return {"before": torch.full((len(table),), BOS), "table": table}


def search(table, limit=4, num_beams=None, **options):
    ids = (BOS, EOS, PAD, limit)
    if num_beams is None:
        return greedy_search(step, start(table), len(table), *ids)
    return beam_search(
        step, start(table), len(table), *ids, num_beams=num_beams, **options
    )


def words(ids):
    return [[word for word in row if word != PAD] for row in ids.tolist()]


def log_p(sentence, table):
    logs = table.log_softmax(-1)
    return sum(
        logs[a, b, c].item()
        for a, b, c in zip([BOS, BOS, *sentence], [BOS, *sentence], sentence)
    )


def score(sentence, table, alpha):
    return log_p(sentence, table) / ((5 + len(sentence)) / 6) ** alpha


def everything(limit):
    for length in range(1, limit + 1):
        for sentence in itertools.product(WORDS, repeat=length):
            if EOS not in sentence[:-1] and (sentence[-1] == EOS or length == limit):
                yield list(sentence)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("limit", [1, 2, 4])
def test_a_wide_beam_finds_the_best_of_all(alpha, limit):
    models = tables(20, seed=limit)
    found = words(search(models, limit, num_beams=40, length_penalty=alpha))
    for sentence, table in zip(found, models):
        best = max(score(other, table, alpha) for other in everything(limit))
        assert (
            sentence in list(everything(limit))
            and abs(score(sentence, table, alpha) - best) < 1e-9
        )


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
    together = words(search(models, limit, num_beams=beams))
    assert together == [
        words(search(models[i : i + 1], limit, num_beams=beams))[0] for i in range(b)
    ]
    assert words(search(models, limit)) == [
        words(search(models[i : i + 1], limit))[0] for i in range(b)
    ]


@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=6),
    st.sampled_from([None, 1, 3]),
    st.integers(0, 999),
    st.booleans(),
    st.sampled_from([0.0, 0.6]),
)
def test_every_row_has_its_own_bound(limits, beams, seed, endless, alpha):
    "A row in company gets what it gets alone; without an end symbol to choose, it is as long as its bound."
    models = tables(len(limits), seed)
    if endless:
        models[..., EOS] = -torch.inf
    options = {} if beams is None else {"num_beams": beams, "length_penalty": alpha}
    together = words(search(models, torch.tensor(limits), **options))
    assert together == [
        words(search(models[i : i + 1], limit, **options))[0]
        for i, limit in enumerate(limits)
    ]
    assert not endless or [len(sentence) for sentence in together] == limits
    assert torch.equal(
        search(models, torch.full((len(limits),), 4), **options),
        search(models, 4, **options),
    )


def test_a_row_at_its_bound_does_not_keep_the_search_going():
    calls = []

    def counted(last, state):
        calls.append(1)
        return torch.tensor([0.0, 0, -torch.inf, 1, 2]).expand(len(last), -1), state

    for call in (
        lambda limits: greedy_search(counted, None, 2, BOS, EOS, PAD, limits),
        lambda limits: beam_search(counted, None, 2, BOS, EOS, PAD, limits),
    ):
        calls.clear()
        assert [len(row) for row in words(call(torch.tensor([5, 3])))] == [
            5,
            3,
        ] and len(calls) == 5


@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 999))
def test_form_of_the_answer(beams, limit, seed):
    for ids in (
        search(tables(4, seed), limit),
        search(tables(4, seed), limit, num_beams=beams),
    ):
        assert (
            ids.dtype == torch.long and ids.shape[0] == 4 and 1 <= ids.shape[1] <= limit
        )
        ended = (ids == EOS).cumsum(-1)
        assert (
            (ids == PAD) == ((ended - (ids == EOS).long()) > 0)
        ).all()  # padding after the end symbol and nowhere else
        lengths = (ids != PAD).sum(-1)
        assert (
            (ended[:, -1] == 1) | (lengths == limit)
        ).all() and lengths.max() == ids.shape[1]


def test_a_wider_beam_is_no_worse_on_average():
    models = tables(100, seed=7)
    means = [
        sum(
            score(s, t, 1.0)
            for s, t in zip(words(search(models, 5, num_beams=k)), models)
        )
        for k in (1, 2, 4, 8)
    ]
    assert means == sorted(means)


def fixed(*logits):
    "A step that scores the same words at every step of the search, one row of `logits` a step."

    def step(last, t):
        return torch.tensor(logits)[t[0]].expand(len(last), -1), t + 1

    return step


def test_stops_at_the_end_symbol_and_at_the_limit():
    calls = []

    def counted(last, state):
        calls.append(last)
        return torch.tensor(
            [[-9.0, -9.0, 5.0 if len(calls) == 3 else -9.0, 1.0, 0.0]]
        ).expand(len(last), -1), state

    assert (
        greedy_search(counted, None, 2, BOS, EOS, PAD, 10).tolist() == [[3, 3, 2]] * 2
        and len(calls) == 3
    )
    calls.clear()
    assert (
        greedy_search(counted, None, 2, BOS, EOS, PAD, 2).tolist() == [[3, 3]] * 2
        and len(calls) == 2
    )
    assert calls[0].tolist() == [BOS, BOS] and calls[1].tolist() == [3, 3]


def test_a_finished_hypothesis_is_kept():
    "A good short sentence, then others that look better for one step and end badly."
    logs = [
        [-9.0, -9.0, 0.9, 1.0, 0.95],
        [-9.0, -9.0, -9.0, 3.0, 3.0],
        [-9.0, -9.0, -9.0, 1.0, 1.0],
        [-9.0, -9.0, -9.0, 1.0, 1.0],
    ]
    ids = beam_search(
        fixed(*logs),
        torch.zeros(1, dtype=torch.long),
        1,
        BOS,
        EOS,
        PAD,
        4,
        num_beams=3,
        length_penalty=0.0,
    )
    assert ids.tolist() == [[EOS]]


def test_search_ends_early_when_nothing_can_win():
    calls = []

    def sure(last, state):
        calls.append(1)
        return torch.tensor([[-50.0, -50.0, 20.0, 0.0, 0.0]]).expand(
            len(last), -1
        ), state

    assert (
        beam_search(sure, None, 3, BOS, EOS, PAD, 100, num_beams=4).tolist()
        == [[EOS]] * 3
        and len(calls) == 1
    )


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


def test_more_beams_than_words():
    assert search(tables(2, 0), 3, num_beams=50).shape[0] == 2
    one_word = beam_search(
        lambda last, state: (torch.zeros(len(last), 1), state),
        None,
        2,
        0,
        5,
        7,
        3,
        num_beams=4,
    )
    assert one_word.tolist() == [[0, 0, 0]] * 2


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_every_precision(dtype):
    low = lambda last, state: (lambda out: (out[0].to(dtype), out[1]))(
        step(last, state)
    )
    models = tables(4, seed=1, scale=3)
    assert (
        beam_search(low, start(models), 4, BOS, EOS, PAD, 5, num_beams=3).shape[0] == 4
    )


def test_no_gradient_is_kept():
    models = tables(2, 0).requires_grad_()
    seen = []

    def watched(last, state):
        logits, state = step(last, state)
        seen.append(logits.requires_grad)
        return logits, state

    beam_search(watched, start(models), 2, BOS, EOS, PAD, 3, num_beams=2)
    greedy_search(watched, start(models), 2, BOS, EOS, PAD, 3)
    assert not any(seen)


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
    "options, words",
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
    ],
)
def test_bad_options(options, words):
    options = {"num_beams": 2, **options}
    with pytest.raises(InputError, match=words):
        search(tables(2, 0), **options)
    if "limit" in options:
        with pytest.raises(InputError, match=words):
            search(tables(2, 0), options["limit"])


@pytest.mark.no_shapes
def test_bad_sizes_are_found_before_any_work():
    def never(last, state):
        raise AssertionError("the model was called")

    for call in (
        lambda: greedy_search(never, None, 0, BOS, EOS, PAD, 5),
        lambda: greedy_search(never, None, 1, BOS, EOS, PAD, 0),
        lambda: beam_search(never, None, 0, BOS, EOS, PAD, 5),
        lambda: beam_search(never, None, 1, BOS, EOS, PAD, -1),
    ):
        with pytest.raises(InputError, match="must be a whole number of at least 1"):
            call()


@pytest.mark.no_shapes
def test_scores_that_are_no_numbers():
    broken = lambda last, state: (torch.full((len(last), V), torch.nan), state)
    for call in (
        lambda: greedy_search(broken, None, 1, BOS, EOS, PAD, 5),
        lambda: beam_search(broken, None, 1, BOS, EOS, PAD, 5),
    ):
        with pytest.raises(InputError, match="NaN"):
            call()
