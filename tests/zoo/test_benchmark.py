"""Paired timing: the median and its interval, memory, and the pairs that are registered."""

import pytest
import torch

from attn_notes.foundations.checks import ConfigError, InputError
from attn_notes.zoo import benchmark
from attn_notes.zoo.benchmark import (
    Benchmark,
    Paired,
    attention_pair,
    fixed_threads,
    list_pairs,
    paired,
    peak_memory,
    product_rate,
)


class Clock:
    """A processor clock on which calls take the time they say."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(benchmark.time, "process_time", lambda: self.now)

    def work(self, *seconds):
        turns = iter(seconds * 10_000)

        def run():
            self.now += next(turns)

        return run


def test_the_ratio_is_of_processor_time(monkeypatch):
    clock = Clock(monkeypatch)
    found = paired(clock.work(0.3), clock.work(0.1), rounds=10)
    assert (
        found.ratio == pytest.approx(3)
        and found.low == pytest.approx(3)
        and found.high == pytest.approx(3)
    )
    assert (found.seconds, found.reference_seconds) == (
        pytest.approx(0.3),
        pytest.approx(0.1),
    )


def test_one_bad_round_moves_nothing(monkeypatch):
    clock = Clock(monkeypatch)
    slow = [0.1] * 33
    slow[15] = 5.0
    found = paired(clock.work(*slow), clock.work(0.1), rounds=30)
    assert found.ratio == pytest.approx(1) and found.high == pytest.approx(1)


def test_the_interval_covers_the_median_as_often_as_it_says(monkeypatch):
    clock, generator, covered = Clock(monkeypatch), torch.Generator().manual_seed(0), 0
    for _ in range(300):
        ratios = torch.randn(33, generator=generator).exp().tolist()
        found = paired(clock.work(*ratios), clock.work(1.0), rounds=30)
        covered += found.low <= 1 <= found.high
    assert 0.92 < covered / 300 < 0.99


@pytest.mark.no_shapes
def test_bad_questions():
    with pytest.raises(InputError, match="at least 6"):
        paired(lambda: None, lambda: None, rounds=3)
    with pytest.raises(ConfigError, match="unknown benchmark"):
        list_pairs(["no such pair"])


def test_memory_is_the_highest_level_and_not_the_sum():
    def twice():
        for _ in range(2):
            torch.ones(2**18)

    assert 2**20 <= peak_memory(twice) < 1.1 * 2**20


def test_threads_are_set_and_put_back():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), fixed_threads(2):
        assert torch.get_num_threads() == 2
        raise KeyError
    assert torch.get_num_threads() == before
    assert product_rate(64, 64, 64, repeats=2) > 1e7


def test_a_verdict_allows_the_noise_and_no_more():
    def passed(ratio, memory):
        return Benchmark(
            "x", Paired(ratio, ratio, ratio, 1.0, 1.0), memory, 100, 0.5, 0.5
        ).passed

    assert (
        passed(1.08, 100)
        and passed(0.5, 50)
        and not passed(1.09, 100)
        and not passed(0.5, 102)
    )


@pytest.mark.slow
def test_every_pair_computes_the_same_on_both_sides():
    assert "MultiHeadAttention vs torch.nn.MultiheadAttention" in list_pairs()
    assert list_pairs(["multihead"]) == [
        "MultiHeadAttention vs torch.nn.MultiheadAttention"
    ]
    for title in list_pairs():
        ours, reference, flops = benchmark._PAIRS[title]()
        ours(), reference()
        assert flops > 0


def test_the_attention_pair_counts_its_operations():
    from torch.utils.flop_counter import FlopCounterMode

    _, reference, flops = attention_pair(b=2, n=16, d=32, heads=4)
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        reference()
    assert counter.get_total_flops() == flops
