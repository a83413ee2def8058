"""One check for every value: what an annotation allows, what it becomes, and what is
said of the rest."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Int
from torch import Tensor

from attn_notes.foundations.checks import (
    ConfigError,
    InputError,
    check_fields,
    checked,
)
from attn_notes.foundations.generation import beam_search, greedy_search, sample
from attn_notes.foundations.values import (
    NonNegative,
    Positive,
    Range,
    Rate,
    Size,
    TokenId,
    convert,
    in_words,
    plain,
)

ENDLESS: list = []
ENDLESS.append(ENDLESS)


@pytest.mark.parametrize(
    "value, hint, becomes",
    [
        (3, int, 3),
        (np.int64(3), Size, 3),
        (np.uint8(3), Size | None, 3),
        (torch.tensor(3), Size, 3),
        (None, Size | None, None),
        (0, Rate, 0),
        (np.float32(0.5), Rate, 0.5),
        (Fraction(1, 2), Rate, 0.5),
        (np.bool_(True), bool, True),
        ([2, 2], tuple[Size, ...], (2, 2)),
        (np.array([2, 2]), tuple[Size, ...], (2, 2)),
        (range(1, 3), tuple[int, int], (1, 2)),
        ([[1], [2]], tuple[tuple[int, ...], ...], ((1,), (2,))),
        ("relu", Literal["relu", "gelu"], "relu"),
        (np.int64(2), Literal[2, 4], 2),
        ({"a": np.float64(2)}, Mapping[str, float], {"a": 2.0}),
        ({"a": range(2)}, Mapping, {"a": [0, 1]}),
        ([1, "a"], tuple, (1, "a")),
        (ENDLESS, Any, ENDLESS),
        (7, Size | tuple[Size, Size], 7),
        ([7, 7], Size | tuple[Size, Size], (7, 7)),
    ],
)
def test_what_an_annotation_allows(value, hint, becomes):
    found = convert(value, hint)
    assert found == becomes and repr(found) == repr(becomes)


@pytest.mark.parametrize(
    "value, hint",
    [
        *[(x, int) for x in (True, 3.0, "3", None, [3], np.float64(3), 3j, b"3")],
        *[(x, float) for x in (True, "3", None, math.nan, -math.inf, 10**400, 1j)],
        *[(x, bool) for x in (0, 1, "false", None, np.int64(1))],
        *[(x, str) for x in (None, 3, b"x", ["x"])],
        *[(x, Size) for x in (0, -1, 2**40, torch.tensor(1.0), torch.ones(1).long())],
        (torch.empty((), device="meta"), Size),
        (1, Rate),
        (0, Positive),
        (-1e-9, NonNegative),
        ("GELU", Literal["relu", "gelu"]),
        (["relu"], Literal["relu", "gelu"]),
        (1, Literal["relu", True]),
        *[(x, tuple[int, ...]) for x in ("12", {1, 2}, {1: 2}, 3, None, iter([1]))],
        ([1, True], tuple[int, ...]),
        ([1], tuple[int, int]),
        (ENDLESS, tuple[int, ...]),
        ({3: 1.0}, Mapping[str, float]),
        ({"a": math.nan}, Mapping[str, float]),
        ([("a", 1)], Mapping[str, float]),
        ("3", int | Int[Tensor, "b"] | None),
    ],
    ids=lambda x: repr(x).split(" object at ")[0],
)
def test_what_it_does_not_allow(value, hint):
    @checked(InputError)
    def function(field: hint = None):
        return field

    with pytest.raises(InputError, match="^field: expected .*; got ") as caught:
        function(value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "hint, words",
    [
        (Size | None, "a whole number from 1 to 1,000,000,000, or None"),
        (Rate, "a number from 0 to below 1"),
        (Positive, "a finite number above 0"),
        (NonNegative, "a finite number of at least 0"),
        (Annotated[float, Range(0, 1, above=True)], "a number from above 0 to 1"),
        (Annotated[int, Range(high=3)], "a whole number of at most 3"),
        (Literal["relu", "gelu"], "one of relu, gelu"),
        (tuple[bool, ...], "a tuple, each True or False"),
        (tuple[int, str], "a tuple of 2: a whole number, a text"),
        (Mapping[str, Rate], "a mapping: a text to a number from 0 to below 1"),
        (int | Int[Tensor, "b"], "a whole number, or a torch.Tensor"),
    ],
)
def test_in_words(hint, words):
    assert in_words(hint) == words


@given(st.integers(-5, 5), st.floats(-5, 5), st.floats(-5, 5), st.booleans())
def test_a_range_is_what_it_says(x, low, high, open_end):
    ends = (
        (low < x or (x == low and not open_end)),
        (x < high or (x == high and not open_end)),
    )
    assert (x in Range(low, high, open_end, open_end)) == all(ends)
    assert (x in Range(low, above=open_end)) == ends[0]
    assert (x in Range(high=high, below=open_end)) == ends[1]


def test_plain_numbers():
    given = {"a": np.arange(2), "b": (np.float32(1), True), "c": range(2), "d": "text"}
    assert plain(given) == {"a": [0, 1], "b": (1.0, True), "c": [0, 1], "d": "text"}


@dataclass(frozen=True)
class Config:
    vocab_size: Size = 10
    depths: tuple[Size, ...] = (2, 2)
    window_size: Size | tuple[Size, Size] = 7
    pad_token_id: TokenId | None = None
    eos_token_id: TokenId = 2

    def __post_init__(self):
        check_fields(self, "model: ")


@pytest.mark.no_shapes
def test_fields_are_kept_as_the_annotation_wants_them():
    config = Config(np.int32(5), [1, 2], range(1, 3))
    assert repr(config) == repr(Config(5, (1, 2), (1, 2))) and hash(config)
    for field, value in [
        ("vocab_size", 2.0),
        ("depths", [1, "2"]),
        ("window_size", (7, 7, 7)),
        ("pad_token_id", 10),
        ("eos_token_id", 1.5),
        ("eos_token_id", None),
    ]:
        with pytest.raises(ConfigError, match=rf"^model: {field}: expected .*; got"):
            Config(**{field: value})


def test_arguments():
    @checked(InputError)
    def function(x, size: Size, *more: int, rate: Rate = 0.5, **options: str):
        "What it does."
        return x, size, more, rate, options

    assert function.__doc__ == "What it does."
    assert function(None, np.int8(3), "a", b=4) == (None, 3, ("a",), 0.5, {"b": 4})
    with pytest.raises(InputError, match=re.escape("rate: expected a number from 0")):
        function(1, 2, rate=2)
    with pytest.raises(TypeError, match="missing a required argument: 'size'"):
        function(1)


@pytest.mark.no_shapes
@pytest.mark.parametrize("search", [greedy_search, beam_search, sample])
@pytest.mark.parametrize(
    "name, odd", [("eos_token_id", 1.5), ("eos_token_id", -1), ("pad_token_id", None)]
)
def test_searches_take_no_odd_ids(search, name, odd):
    ids = {"eos_token_id": 2, "pad_token_id": 0, name: odd}
    with pytest.raises(InputError, match=f"^{name}: expected a whole number"):
        search(len, None, torch.ones(1, 1).long(), **ids, max_new_tokens=3)
