"""The caches: the same as putting everything side by side, without copying it at every
token; and no state is changed by the next."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_notes.foundations.attention import MultiHeadAttention
from attn_notes.foundations.cache import CrossAttentionCache, KeyValueCache
from attn_notes.foundations.checks import InputError
from attn_notes.foundations.generation import reorder_state

PIECES = st.lists(st.integers(1, 30), min_size=1, max_size=6)


def tokens(n, b=2, h=3, c=4, seed=0, dtype=torch.float64):
    """Keys and values of n tokens, cut out of a larger product as
    `MultiHeadAttention.project` leaves them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, n, 2, h, c, generator=generator).to(dtype)
    return x.permute(2, 0, 3, 1, 4).unbind(0)


def filled(n, **options):
    "A cache of n tokens, and their keys and values."
    k, v = tokens(n, **options)
    return KeyValueCache().append(k, v)[2], k, v


def held(cache):
    """What a state gives, by adding a token that is then cut off: a copy of its keys
    and values."""
    b, h, _, c = cache._room.keys.shape
    token = torch.zeros(b, h, 1, c, dtype=cache._room.keys.dtype)
    keys, values, _ = cache.append(token, token)
    return keys[:, :, :-1].clone(), values[:, :, :-1].clone()


@given(PIECES, st.integers(1, 3), st.integers(0, 99))
def test_pieces_come_back_as_one(pieces, b, seed):
    k, v = tokens(sum(pieces), b, seed=seed)
    cache, end = KeyValueCache(), 0
    for new in zip(k.split(pieces, 2), v.split(pieces, 2), strict=True):
        keys, values, cache = cache.append(*new)
        end += new[0].shape[2]
        assert cache.length == end
        assert torch.equal(keys, k[:, :, :end]) and torch.equal(values, v[:, :, :end])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_type_and_device_are_those_of_the_tokens(dtype):
    keys, values, _ = KeyValueCache().append(*tokens(3, dtype=dtype))
    assert {keys.dtype, values.dtype} == {dtype}
    keys, values, cache = KeyValueCache().append(*(x.to("meta") for x in tokens(3)))
    assert {keys.device.type, values.device.type} == {"meta"}
    reordered = cache.reorder(torch.zeros(5, dtype=torch.long, device="meta"))
    keys, _, _ = reordered.append(*(x.to("meta") for x in tokens(1, b=5)))
    assert keys.device.type == "meta" and keys.shape == (5, 3, 4, 4)


def test_values_may_be_of_another_width_than_keys():
    k, v = tokens(3)
    _, _, cache = KeyValueCache().append(k, v[..., :2])
    keys, values, _ = cache.append(k, v[..., :2])
    assert keys.shape == (2, 3, 6, 4) and values.shape == (2, 3, 6, 2)


def test_what_comes_back_is_a_view_and_is_seldom_moved():
    """A thousand tokens, one by one: written in place, copied a few times each and not
    once for every later token."""
    cache, (k, v), rooms, copied = KeyValueCache(), tokens(1000, 1, 1, 2), [], 0
    for t in range(1000):
        keys, values, cache = cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        room = cache._room
        assert keys.data_ptr() == room.keys.data_ptr()
        assert values.data_ptr() == room.values.data_ptr()
        if not rooms or room is not rooms[-1]:
            rooms.append(room)  # kept, so that no address comes twice
            copied += t
    assert torch.equal(keys, k) and torch.equal(values, v)
    assert len(rooms) < 25 and copied < 6 * 1000
    assert cache._room.keys.shape[2] <= 1.5 * 1000


# a step never changes what the old state gives


@given(PIECES, st.integers(1, 30), st.integers(1, 30), st.integers(0, 99))
def test_two_continuations_of_one_state(pieces, first, second, seed):
    """Both go on from the same tokens, and neither sees the other's; nor does the state
    that they come from, or the views that were handed out."""
    n = sum(pieces)
    k, v = tokens(n, seed=seed)
    cache = KeyValueCache()
    for new in zip(k.split(pieces, 2), v.split(pieces, 2), strict=True):
        handed_out = cache.append(*new)
        cache = handed_out[2]
    other = [tokens(m, seed=seed + 100 + m) for m in (first, second)]
    states = [cache.append(*new) for new in other]
    again = [
        cache.append(*new) for new in reversed(other)
    ]  # the old one, once more, in another order
    expected = [
        [torch.cat(pair, 2) for pair in zip((k, v), new, strict=True)] for new in other
    ]
    for found in (states, again[::-1]):
        for (keys, values, state), (want_k, want_v) in zip(
            found, expected, strict=True
        ):
            assert torch.equal(keys, want_k) and torch.equal(values, want_v)
            assert all(map(torch.equal, held(state), (want_k, want_v)))
    assert cache.length == n and all(map(torch.equal, held(cache), (k, v)))
    assert torch.equal(handed_out[0], k) and torch.equal(handed_out[1], v)


def test_only_the_second_continuation_is_copied():
    cache, _, _ = filled(5)
    first = cache.append(*tokens(1, seed=1))
    second = cache.append(*tokens(1, seed=2))
    third = second[2].append(*tokens(1, seed=3))
    assert first[2]._room is cache._room and first[0].data_ptr() == (
        cache._room.keys.data_ptr()
    )
    assert second[2]._room is not cache._room and third[2]._room is second[2]._room


def test_a_state_can_not_be_changed():
    cache, _, _ = filled(5)
    with pytest.raises(AttributeError):
        cache.length = 3


def test_reorder_leaves_the_old_state():
    cache, k, v = filled(5, b=3)
    index = torch.tensor([2, 2, 0])
    other = cache.reorder(index)
    other.append(*tokens(1, b=3, seed=7))
    cache.append(*tokens(1, b=3, seed=8))
    assert all(map(torch.equal, held(cache), (k, v)))
    assert all(map(torch.equal, held(other), (k[index], v[index])))


@given(PIECES, st.lists(st.integers(0, 2), min_size=1, max_size=7), st.integers(0, 99))
def test_reorder_picks_rows(pieces, rows, seed):
    "Any rows, in any order, more or fewer than there were; and it goes on from them."
    n, index = sum(pieces), torch.tensor(rows)
    k, v = tokens(n + 2, 3, seed=seed)
    _, _, cache = KeyValueCache().append(k[:, :, :n], v[:, :, :n])
    cache = reorder_state({"past": (cache,)}, index)["past"][0]
    assert isinstance(cache, KeyValueCache) and cache.length == n
    *got, _ = cache.append(*(torch.full_like(x[index, :, n:], 7.0) for x in (k, v)))
    for found, x in zip(got, (k, v), strict=True):
        assert torch.equal(found[:, :, :n], x[index, :, :n])
        assert (found[:, :, n:] == 7).all()


def test_reorder_keeps_the_spare_room():
    "The next token needs no other room than that which the rows were copied to."
    cache, _, _ = filled(5, b=3)
    cache = cache.reorder(torch.tensor([1, 1, 0]))
    _, _, after = cache.append(*tokens(1, b=3))
    assert after._room is cache._room


def test_reorder_of_an_empty_cache_is_empty():
    cache = KeyValueCache().reorder(torch.tensor([0, 0, 1]))
    assert cache.length == 0
    assert cache.append(*tokens(2, b=3))[0].shape == (3, 3, 2, 4)


@pytest.mark.no_shapes
@pytest.mark.parametrize("other", [dict(b=1), dict(h=2), dict(c=5)])
def test_tokens_of_another_shape_are_refused(other):
    cache, k, v = filled(5)
    with pytest.raises(
        InputError,
        match=r"^cache: expected keys .* that go on from \(2, 3, 5, 4\), .*; got \(",
    ):
        cache.append(*tokens(1, **other))
    assert cache.length == 5 and all(map(torch.equal, held(cache), (k, v)))


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "name, change",
    [
        ("keys", lambda k, v: (k.half(), v)),
        ("values", lambda k, v: (k, v.half())),
        ("values", lambda k, v: (k, v[:1])),
        ("values", lambda k, v: (k, v[..., :1])),
    ],
)
def test_nothing_is_cast_or_spread_on_its_way_into_the_room(name, change):
    cache, k, v = filled(5)
    with pytest.raises(InputError, match=f"^cache: expected {name} "):
        cache.append(*change(*tokens(1)))
    assert cache.length == 5 and all(map(torch.equal, held(cache), (k, v)))


# cross-attention


def test_cross_attention_reads_the_same_rows_for_all_beams():
    layer, memory = MultiHeadAttention(6, 3), torch.randn(2, 5, 6)
    cache = layer.project_memory(memory)
    assert isinstance(cache, CrossAttentionCache) and cache.mask is None
    keys, values = layer.project(memory, 1, 2)
    assert torch.equal(cache.keys, keys) and torch.equal(cache.values, values)
    assert cache.reorder(torch.tensor([0, 0, 1, 1])) is cache
    assert reorder_state({"memory": cache}, torch.tensor([1, 0]))["memory"] is cache
