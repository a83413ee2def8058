"""Every example is in one batch an epoch, padding is masked, a batch is shared."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_notes.data.batching import (
    BucketBatchSampler,
    RaggedArray,
    collate_pairs,
    pad_ids,
    padding_share,
)
from attn_notes.foundations.checks import ConfigError, InputError

ROWS = st.lists(
    st.lists(st.integers(4, 50), min_size=1, max_size=9), min_size=1, max_size=6
)
LENGTHS = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=60
)


@given(ROWS)
def test_padding_is_masked(rows):
    ids, mask = pad_ids(rows)
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    assert [
        row[m].tolist() for row, m in zip(ids, mask, strict=True)
    ] == rows and not ids[~mask].any()


@given(ROWS)
def test_target_is_one_step_ahead(rows):
    batch = collate_pairs([(row, row[::-1]) for row in rows])
    for target_in, target_out, mask, row in zip(
        batch["decoder_input_ids"],
        batch["labels"],
        batch["decoder_attention_mask"],
        rows,
        strict=True,
    ):
        assert target_in[mask].tolist() == [1, *row[::-1]] and target_out[
            mask
        ].tolist() == [*row[::-1], 2]
        assert (target_out[~mask] == -100).all()
    assert batch["attention_mask"].sum() == sum(map(len, rows))


def test_an_empty_target_is_only_its_end():
    batch = collate_pairs([([5], [])])
    assert batch["decoder_input_ids"].tolist() == [[1]] and batch[
        "labels"
    ].tolist() == [[2]]


def test_padding_share():
    assert padding_share([collate_pairs([([4, 4], [4]), ([4, 4], [4])])]) == 0
    assert padding_share(
        [collate_pairs([([4, 4, 4, 4], [4]), ([4, 4], [4])])]
    ) == pytest.approx(2 / 12)


@given(LENGTHS, st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_has_every_example_once(lengths, size, seed, epoch):
    for sampler in (
        BucketBatchSampler(lengths, batch_size=size, seed=seed),
        BucketBatchSampler(lengths, max_tokens=20 + size, seed=seed),
    ):
        batches = sampler.epoch(epoch)
        assert sorted(np.concatenate(batches)) == list(range(len(lengths))) and all(
            len(batch) for batch in batches
        )


@given(LENGTHS, st.integers(20, 60))
def test_max_tokens_holds(lengths, max_tokens):
    for rows in BucketBatchSampler(lengths, max_tokens=max_tokens).epoch():
        assert len(rows) * np.asarray(lengths)[rows].max() <= max_tokens


@given(LENGTHS, st.integers(1, 9), st.integers(1, 4))
def test_processes_share_a_batch(lengths, size, world_size):
    sampler = BucketBatchSampler(lengths, batch_size=size)
    shards = [list(sampler.shard(3, rank, world_size)) for rank in range(world_size)]
    assert len({len(shard) for shard in shards}) == 1
    for whole, parts in zip(sampler.epoch(3), zip(*shards, strict=True), strict=True):
        assert sorted(whole) == sorted(np.concatenate(parts))


def test_epochs_differ_and_repeat():
    lengths = np.arange(200) % 17 + 1
    flat = lambda seed, epoch: np.concatenate(
        BucketBatchSampler(lengths, batch_size=8, seed=seed).epoch(epoch)
    ).tolist()
    assert (
        flat(0, 1) == flat(0, 1)
        and flat(0, 1) != flat(0, 2)
        and flat(0, 1) != flat(1, 1)
    )


def test_like_lengths_stand_together():
    lengths = np.random.default_rng(0).integers(1, 40, 2_000)
    spread = lambda pool: np.mean(
        [
            np.ptp(lengths[rows])
            for rows in BucketBatchSampler(lengths, batch_size=32, pool=pool).epoch()
        ]
    )
    assert spread(16) < spread(1) / 5


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "arguments, error",
    [
        (dict(lengths=[], batch_size=2), InputError),
        (dict(lengths=[3], batch_size=2, max_tokens=4), ConfigError),
        (dict(lengths=[3]), ConfigError),
        (dict(lengths=[3], batch_size=0), ConfigError),
        (dict(lengths=[3, 9], max_tokens=8), InputError),
    ],
)
def test_bad_batches(arguments, error):
    with pytest.raises(error):
        BucketBatchSampler(**arguments)


@pytest.mark.no_shapes
def test_bad_rows():
    for rows in ([], [[4], []]):
        with pytest.raises(InputError, match="row"):
            pad_ids(rows)
    with pytest.raises(InputError):
        collate_pairs([([], [4])])
    with pytest.raises(ConfigError, match="rank"):
        next(BucketBatchSampler([1], batch_size=1).shard(rank=2, world_size=2))


def test_dtypes():
    batch = collate_pairs([([4], [5])])
    assert {name: value.dtype for name, value in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.bool,
        "decoder_input_ids": torch.int64,
        "decoder_attention_mask": torch.bool,
        "labels": torch.int64,
    }


@given(st.lists(st.lists(st.integers(0, 99), max_size=6), max_size=12))
def test_a_ragged_array_is_its_rows(rows):
    array = RaggedArray.from_rows(iter(rows))
    assert [array[i].tolist() for i in range(len(array))] == rows
    assert [row.tolist() for row in array] == rows  # an index too far ends a loop
    assert array.lengths.tolist() == [len(row) for row in rows]
    assert array.values.dtype == np.int32 and array.offsets.dtype == np.int64
    assert array.nbytes == 4 * sum(map(len, rows)) + 8 * (len(rows) + 1)
    with pytest.raises(IndexError):
        array[len(rows)]


def test_rows_are_views_and_ids_fit():
    array = RaggedArray.from_rows([[1, 2], [2**31 - 1]])
    assert array[0].base is not None and array[1].tolist() == [2**31 - 1]
    with pytest.raises(InputError):
        RaggedArray.from_rows([[2**31]])


def test_what_is_padded_is_not_looked_for():
    """A real token with the id of the padding stays a token, and has its label."""
    batch = collate_pairs([([0, 5], [0, 0]), ([5], [7])])
    assert batch["attention_mask"].tolist() == [[True, True], [True, False]]
    assert batch["labels"].tolist() == [[0, 0, 2], [7, 2, -100]]


def test_arrays_make_the_same_batch_as_lists():
    pairs = [([4, 5, 6], [7]), ([8], []), ([9, 4], [5, 5, 5])]
    arrays = [tuple(np.array(side, np.int32) for side in pair) for pair in pairs]
    lists, found = collate_pairs(pairs), collate_pairs(arrays)
    assert all(torch.equal(lists[name], found[name]) for name in lists)


def test_the_order_is_what_it_was():
    """Stored experiments replay only if batches come in the same order as ever."""
    lengths = np.random.default_rng(5).integers(1, 30, (40, 2))
    by_rows = BucketBatchSampler(lengths, batch_size=8, seed=3).epoch(2)
    by_tokens = BucketBatchSampler(lengths, max_tokens=90, seed=3).epoch(2)
    assert [int(rows[0]) for rows in by_rows] == [35, 13, 8, 24, 26]
    assert [rows.tolist() for rows in by_tokens][:3] == [
        [12, 33, 31],
        [18, 27, 30],
        [24, 36, 14],
    ]


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "make",
    [
        lambda: pad_ids([["a"]]),
        lambda: pad_ids([[1.5]]),
        lambda: pad_ids(3),
        lambda: pad_ids([[2**70]]),
        lambda: pad_ids([[[1]], [[2]]]),
        lambda: collate_pairs([([1],)]),
        lambda: collate_pairs([([1], [2], [3])]),
        lambda: collate_pairs([("ab", "cd")]),
        lambda: collate_pairs([(None, [1])]),
        lambda: BucketBatchSampler([1, 2], "2"),
        lambda: BucketBatchSampler([1, 2], 2.5),
        lambda: BucketBatchSampler([float("nan")], 2),
        lambda: BucketBatchSampler([-1, 2], max_tokens=4),
        lambda: BucketBatchSampler(["a"], 2),
        lambda: BucketBatchSampler(None, 2),
        lambda: BucketBatchSampler([1, 2], 2, seed=-1),
        lambda: BucketBatchSampler([1, 2], 2).epoch(-1),
        lambda: padding_share([]),
    ],
)
def test_what_is_no_row_of_ids_no_length_no_number(make):
    with pytest.raises((ConfigError, InputError), match="expected") as caught:
        make()
    assert "\n" not in str(caught.value)
