"""The cache of keys and values: the same as putting everything side by side, without copying it at every word."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_notes.foundations.cache import KeyValueCache
from attn_notes.foundations.checks import InputError
from attn_notes.foundations.search import reorder_state

PIECES = st.lists(st.integers(1, 30), min_size=1, max_size=6)


def words(n, b=2, h=3, c=4, seed=0, dtype=torch.float64):
    "Keys and values of n words, cut out of a larger product as `MultiHeadAttention.project` leaves them."
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(b, n, 2, h, c, generator=generator)
        .to(dtype)
        .permute(2, 0, 3, 1, 4)
        .unbind(0)
    )


@given(PIECES, st.integers(1, 3), st.integers(0, 99))
def test_pieces_come_back_as_one(pieces, b, seed):
    k, v = words(sum(pieces), b, seed=seed)
    cache, end = KeyValueCache(), 0
    for new in zip(k.split(pieces, 2), v.split(pieces, 2)):
        got = cache.append(*new)
        end += new[0].shape[2]
        assert (
            cache.length == end
            and torch.equal(got[0], k[:, :, :end])
            and torch.equal(got[1], v[:, :, :end])
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_type_and_device_are_those_of_the_words(dtype):
    assert {x.dtype for x in KeyValueCache().append(*words(3, dtype=dtype))} == {dtype}
    assert {
        x.device.type for x in KeyValueCache().append(*(x.to("meta") for x in words(3)))
    } == {"meta"}


def test_what_comes_back_is_a_view_and_is_seldom_moved():
    "A thousand words, one by one: written in place, copied a few times each and not once for every later word."
    cache, (k, v), copied = KeyValueCache(), words(1000, 1, 1, 2), 0
    rooms = [None]
    for t in range(1000):
        got = cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        assert [x.data_ptr() for x in got] == [
            cache.keys.data_ptr(),
            cache.values.data_ptr(),
        ]
        if cache.keys is not rooms[-1]:
            rooms.append(cache.keys)  # kept, so that no address comes twice
            copied += t
    assert len(rooms) < 25 and copied < 6 * 1000
    assert cache.keys.shape[2] <= 1.5 * 1000


@given(PIECES, st.lists(st.integers(0, 2), min_size=1, max_size=7), st.integers(0, 99))
def test_reorder_picks_rows(pieces, rows, seed):
    "Any rows, in any order, more or fewer than there were; and it goes on from them."
    n, index = sum(pieces), torch.tensor(rows)
    k, v = words(n + 2, 3, seed=seed)
    cache = KeyValueCache()
    cache.append(k[:, :, :n], v[:, :, :n])
    cache = reorder_state({"past": (cache,)}, index)["past"][0]
    assert isinstance(cache, KeyValueCache) and cache.length == n
    got = cache.append(*(torch.full_like(x[index, :, n:], 7.0) for x in (k, v)))
    for found, x in zip(got, (k, v)):
        assert (
            torch.equal(found[:, :, :n], x[index, :, :n])
            and (found[:, :, n:] == 7).all()
        )


@pytest.mark.parametrize("index", [[2, 0, 1], [1, 1, 0], [0, 1, 2]])
def test_as_many_rows_stay_in_their_room(index):
    cache, (k, v) = KeyValueCache(), words(5, b=3)
    cache.append(k, v)
    before = cache.keys.data_ptr(), cache.values.data_ptr()
    cache = cache.reorder(torch.tensor(index))
    assert (cache.keys.data_ptr(), cache.values.data_ptr()) == before
    assert torch.equal(cache.keys[:, :, :5], k[index]) and torch.equal(
        cache.values[:, :, :5], v[index]
    )


def test_reorder_of_an_empty_cache_is_empty():
    cache = KeyValueCache().reorder(torch.tensor([0, 0, 1]))
    assert cache.length == 0 and cache.append(*words(2, b=3))[0].shape == (3, 3, 2, 4)


@pytest.mark.no_shapes
@pytest.mark.parametrize("other", [dict(b=1), dict(h=2), dict(c=5)])
def test_words_of_another_shape_are_refused(other):
    cache, (k, v) = KeyValueCache(), words(5)
    cache.append(k, v)
    with pytest.raises(
        InputError,
        match=r"^cache: expected keys .* that go on from \(2, 3, 5, 4\); got \(.*1, .*\)$",
    ):
        cache.append(*words(1, **other))
    assert cache.length == 5 and torch.equal(cache.keys[:, :, :5], k)  # left as it was
