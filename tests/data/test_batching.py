"""Every example is in one batch an epoch, padding is masked, processes share a batch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_notes.data.batching import TokenBatches, collate_pairs, pad_ids, padding_share
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
    assert [row[m].tolist() for row, m in zip(ids, mask)] == rows and not ids[
        ~mask
    ].any()


@given(ROWS)
def test_target_is_one_step_ahead(rows):
    batch = collate_pairs([(row, row[::-1]) for row in rows])
    for target_in, target_out, mask, row in zip(
        batch["target_in"], batch["target_out"], batch["target_mask"], rows
    ):
        assert target_in[mask].tolist() == [1, *row[::-1]] and target_out[
            mask
        ].tolist() == [*row[::-1], 2]
    assert batch["source_mask"].sum() == sum(map(len, rows))


def test_an_empty_target_is_only_its_end():
    batch = collate_pairs([([5], [])])
    assert batch["target_in"].tolist() == [[1]] and batch["target_out"].tolist() == [
        [2]
    ]


def test_padding_share():
    assert padding_share([collate_pairs([([4, 4], [4]), ([4, 4], [4])])]) == 0
    assert padding_share(
        [collate_pairs([([4, 4, 4, 4], [4]), ([4, 4], [4])])]
    ) == pytest.approx(2 / 12)


@given(LENGTHS, st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_has_every_example_once(lengths, size, seed, epoch):
    for sampler in (
        TokenBatches(lengths, batch_size=size, seed=seed),
        TokenBatches(lengths, max_tokens=20 + size, seed=seed),
    ):
        batches = sampler.epoch(epoch)
        assert sorted(np.concatenate(batches)) == list(range(len(lengths))) and all(
            len(batch) for batch in batches
        )


@given(LENGTHS, st.integers(20, 60))
def test_max_tokens_holds(lengths, most):
    for rows in TokenBatches(lengths, max_tokens=most).epoch():
        assert len(rows) * np.asarray(lengths)[rows].max() <= most


@given(LENGTHS, st.integers(1, 9), st.integers(1, 4))
def test_processes_share_a_batch(lengths, size, world):
    sampler = TokenBatches(lengths, batch_size=size)
    shards = [list(sampler.shard(3, rank, world)) for rank in range(world)]
    assert len({len(shard) for shard in shards}) == 1
    for whole, parts in zip(sampler.epoch(3), zip(*shards)):
        assert sorted(whole) == sorted(np.concatenate(parts))


def test_epochs_differ_and_repeat():
    lengths = np.arange(200) % 17 + 1
    flat = lambda seed, epoch: np.concatenate(
        TokenBatches(lengths, batch_size=8, seed=seed).epoch(epoch)
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
            for rows in TokenBatches(lengths, batch_size=32, pool=pool).epoch()
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
        TokenBatches(**arguments)


@pytest.mark.no_shapes
def test_bad_rows():
    for rows in ([], [[4], []]):
        with pytest.raises(InputError, match="row"):
            pad_ids(rows)
    with pytest.raises(InputError):
        collate_pairs([([], [4])])
    with pytest.raises(ConfigError, match="rank"):
        next(TokenBatches([1], batch_size=1).shard(rank=2, world=2))


def test_dtypes():
    batch = collate_pairs([([4], [5])])
    assert {name: value.dtype for name, value in batch.items()} == {
        "source": torch.int64,
        "source_mask": torch.bool,
        "target_in": torch.int64,
        "target_mask": torch.bool,
        "target_out": torch.int64,
    }
