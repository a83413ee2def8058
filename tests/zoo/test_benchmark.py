"""Paired timing: the median and its interval, memory, and the registered pairs."""

import pytest
import torch

from attn_notes.foundations.checks import ConfigError, InputError
from attn_notes.zoo import benchmark
from attn_notes.zoo.benchmark import (
    MEASURED,
    Benchmark,
    TimingRatio,
    attention_pair,
    evidence_modules,
    fixed_threads,
    list_pairs,
    matmul_rate,
    peak_memory,
    run_pair,
    speed_table,
    time_pair,
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
    found = time_pair(clock.work(0.3), clock.work(0.1), rounds=10)
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
    found = time_pair(clock.work(*slow), clock.work(0.1), rounds=30)
    assert found.ratio == pytest.approx(1) and found.high == pytest.approx(1)


def test_the_interval_covers_the_median_as_often_as_it_says(monkeypatch):
    clock, generator, covered = Clock(monkeypatch), torch.Generator().manual_seed(0), 0
    for _ in range(300):
        ratios = torch.randn(33, generator=generator).exp().tolist()
        found = time_pair(clock.work(*ratios), clock.work(1.0), rounds=30)
        covered += found.low <= 1 <= found.high
    assert 0.92 < covered / 300 < 0.99


@pytest.mark.no_shapes
def test_bad_questions():
    with pytest.raises(InputError, match="at least 6"):
        time_pair(lambda: None, lambda: None, rounds=3)
    with pytest.raises(InputError, match="at least 30"):
        run_pair("MultiHeadAttention vs torch.nn.MultiheadAttention", rounds=29)
    with pytest.raises(ConfigError, match="unknown benchmark"):
        run_pair("no such pair")
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
    assert matmul_rate(64, 64, 64, repeats=2) > 1e7


def measured(low, high, memory=100):
    times = TimingRatio((low + high) / 2, low, high, 1.0, 1.0)
    return Benchmark("x", times, memory, 100, 0.5, 0.5)


def test_slower_is_what_lies_above_two_percent_with_its_whole_interval():
    assert not measured(0.9, 1.5).time.slower and measured(0.9, 1.5).passed
    assert not measured(1.02, 1.03).time.slower
    assert measured(1.021, 1.03).time.slower and not measured(1.021, 1.03).passed
    assert "SLOWER" in str(measured(1.05, 1.1)) and "ok" in str(measured(0.5, 0.6))


def test_a_lead_is_claimed_by_the_upper_end():
    assert measured(0.8, 0.89).time.faster_than(0.9)
    assert not measured(0.8, 0.9).time.faster_than(0.9)
    assert not measured(0.8, 1.01).time.faster_than()


def test_more_memory_is_no_pass():
    assert measured(0.9, 1, memory=101).passed and not measured(0.9, 1, 102).passed


def test_evidence_modules_are_found_by_name(tmp_path, monkeypatch):
    (tmp_path / "paper" / "part").mkdir(parents=True)
    for name in ("__init__", "model", "b_evidence", "part/__init__", "part/a_evidence"):
        (tmp_path / "paper" / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert evidence_modules("paper") == ["paper.b_evidence", "paper.part.a_evidence"]
    assert all(name.endswith("_evidence") for name in evidence_modules())


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


def test_numbers_are_a_row_of_the_table():
    times = TimingRatio(0.5, 0.4, 0.6, 1.0, 2.0)
    numbers = Benchmark("a pair", times, 2**20, 3 * 2**20, 0.8, 0.4).numbers()
    assert tuple(numbers) == MEASURED
    row = speed_table([{"config": {"pair": "a pair"}, "metrics": numbers}])
    assert row.splitlines()[-1] == "| a pair | x0.50 [0.40, 0.60] | 1 / 3 | 80 / 40 |"
