import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from attn_notes.foundations.checks import ConfigError, InputError
from attn_notes.training import experiments
from attn_notes.training.experiments import (
    experiment,
    load,
    main,
    paired_interval,
    replay,
    run,
    select,
    verdict,
    weakest,
)

numbers = st.floats(-100, 100)


def noisy(seed: int, shift: float = 0.0) -> dict:
    return {
        "score": float(np.random.default_rng(seed).normal() + shift),
        "curve": [1, 2],
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A book of its own, with nothing registered."""
    monkeypatch.setattr(experiments, "artifacts_folder", lambda: tmp_path)
    monkeypatch.setattr(experiments, "EXPERIMENTS", {})
    monkeypatch.setitem(run.__globals__, "artifacts_folder", lambda: tmp_path)
    return tmp_path


SETTINGS = [dict(shift=0.0), dict(shift=2.0)]


def test_run_stores_what_load_reads_in_the_order_of_settings_and_seeds(folder):
    rows = run("chapter", "noise", noisy, SETTINGS, [3, 1])
    assert load("chapter", "noise") == rows
    assert [(r["config"]["shift"], r["seed"]) for r in rows] == [
        (0.0, 3),
        (0.0, 1),
        (2.0, 3),
        (2.0, 1),
    ]
    assert all(
        r["metrics"] == noisy(r["seed"], **r["config"])
        and r["seconds"] >= 0
        and {"torch", "python"} <= r["versions"].keys()
        for r in rows
    )
    assert [p.name for p in (folder / "chapter").iterdir()] == ["noise.jsonl"]
    assert select(rows, "score", shift=2.0) == [
        noisy(3, 2.0)["score"],
        noisy(1, 2.0)["score"],
    ]
    with pytest.raises(InputError, match="no stored run has"):
        select(rows, "score", shift=7)


@pytest.mark.slow
def test_several_processes_store_the_same(folder):
    one = run(
        "chapter", "one", noisy_module(), [dict(low=0.0), dict(low=1.0)], range(3)
    )
    two = run(
        "chapter",
        "two",
        noisy_module(),
        [dict(low=0.0), dict(low=1.0)],
        range(3),
        workers=2,
    )
    assert [{**r, "seconds": 0} for r in one] == [{**r, "seconds": 0} for r in two]


def noisy_module():
    """A function that another process can import: tests are no modules."""
    from numpy_draws import draw

    return draw


def test_a_failing_run_leaves_the_old_results(folder):
    rows = run("chapter", "noise", noisy, SETTINGS, [0])

    def failing(seed, shift):
        if shift:
            raise MemoryError
        return {"score": 0.0}

    with pytest.raises(MemoryError):
        run("chapter", "noise", failing, SETTINGS, [0])
    assert (
        load("chapter", "noise") == rows
        and len(list((folder / "chapter").iterdir())) == 1
    )


def test_load_notices_missing_and_stale_results(folder):
    with pytest.raises(InputError, match="make experiments CHAPTER=chapter"):
        load("chapter", "noise")
    experiment("chapter", "noise", SETTINGS, [0, 1])(noisy)
    run("chapter", "noise", noisy, SETTINGS, [0, 1])
    stored, now = replay("chapter", "noise", 2)
    assert stored == now
    for settings, seeds in (
        (SETTINGS, [0, 1, 2]),
        (SETTINGS[:1], [0, 1]),
        ([dict(shift=0.0), dict(shift=2.5)], [0, 1]),
    ):
        experiment("chapter", "noise", settings, seeds)(noisy)
        with pytest.raises(InputError, match="other runs than the chapter declares"):
            load("chapter", "noise")


def test_command_runs_the_chapters_named(folder, capsys, monkeypatch):
    monkeypatch.setattr(experiments, "import_chapters", lambda chapters=(): None)
    experiment("one", "a", SETTINGS, [0])(noisy)
    experiment("one", "b", SETTINGS, [0])(noisy)
    experiment("two", "c", SETTINGS, [0])(noisy)
    main(["one", "--only", "b", "--workers", "1"])
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*.jsonl")) == [
        "one/b.jsonl"
    ]
    main(["two", "--workers", "1"])
    assert (folder / "two" / "c.jsonl").exists() and not (
        folder / "one" / "a.jsonl"
    ).exists()
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 4
        and "one/b 1/2" in lines[0]
        and "score=" in lines[0]
        and "curve" not in lines[0]
    )
    with pytest.raises(SystemExit) as caught:
        main(["three"])
    assert caught.value.code == 2


@given(
    st.lists(st.tuples(numbers, numbers), min_size=2, max_size=9),
    st.sampled_from([0.8, 0.95, 0.99]),
)
def test_paired_interval_equals_scipy(pairs, confidence):
    a, b = map(list, zip(*pairs))
    if np.ptp(np.subtract(a, b)) < 1e-6:
        return
    mean, low, high = paired_interval(a, b, confidence)
    reference = ttest_rel(a, b).confidence_interval(confidence)
    assert (low, high) == pytest.approx(
        (reference.low, reference.high), abs=1e-6, rel=1e-6
    ) and mean == pytest.approx(np.mean(a) - np.mean(b), abs=1e-9)


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=9), st.floats(0, 5))
def test_data_that_say_the_opposite_flip_the_verdict(pairs, margin):
    a, b = map(list, zip(*pairs))
    flip = {
        "confirmed": "contradicted",
        "contradicted": "confirmed",
        "not seen at this scale": "not seen at this scale",
    }
    interval, opposite = paired_interval(a, b)[1:], paired_interval(b, a)[1:]
    for expected in ("greater", "less"):
        assert (
            verdict(*opposite, margin=margin, expected=expected)
            == flip[verdict(*interval, margin=margin, expected=expected)]
        )
    assert verdict(*interval, margin=margin, expected="less") == verdict(
        *opposite, margin=margin
    )


@pytest.mark.parametrize(
    "low, high, margin, expected, said",
    [
        (0.1, 0.5, 0, "greater", "confirmed"),
        (0.1, 0.5, 0.1, "greater", "not seen at this scale"),
        (0.11, 0.5, 0.1, "greater", "confirmed"),
        (-0.1, 0.5, 0, "greater", "not seen at this scale"),
        (-0.5, -0.1, 0, "greater", "contradicted"),
        (-0.5, -0.1, 0.2, "greater", "not seen at this scale"),
        (-0.5, -0.1, 0, "less", "confirmed"),
        (0.1, 0.5, 0, "less", "contradicted"),
        (0, 0, 0, "greater", "not seen at this scale"),
        (-0.1, 0.1, 0.2, "equal", "confirmed"),
        (-0.1, 0.3, 0.2, "equal", "not seen at this scale"),
        (0.3, 0.4, 0.2, "equal", "contradicted"),
    ],
)
def test_verdicts(low, high, margin, expected, said):
    assert verdict(low, high, margin, expected) == said


def test_weakest():
    assert weakest("confirmed", "not seen at this scale") == "not seen at this scale"
    assert (
        weakest("confirmed", "contradicted", "not seen at this scale") == "contradicted"
        and weakest("confirmed") == "confirmed"
    )


@pytest.mark.no_shapes
def test_refuses():
    for a, b in (([1.0], [2.0]), ([1.0, 2.0], [1.0]), ([], [])):
        with pytest.raises(InputError, match="equal length, at least 2"):
            paired_interval(a, b)
    for arguments in ((2, 1), (0, 1, -1), (0, 1, 0, "more"), (float("nan"), 1)):
        with pytest.raises(ConfigError, match="expected greater, less or equal"):
            verdict(*arguments)


def test_one_seed_gives_the_same_run_with_any_number_of_threads(folder):
    import torch

    def threads(seed):
        return {"threads": torch.get_num_threads()}

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert (
            run("chapter", "threads", threads, [{}], [0])[0]["metrics"]
            == {"threads": 1}
            and torch.get_num_threads() == 2
        )
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_help_and_an_unknown_chapter():
    command = [sys.executable, "-m", "attn_notes.training.experiments"]
    done = subprocess.run([*command, "no-such-chapter"], capture_output=True, text=True)
    assert done.returncode == 2 and "no experiment there" in done.stderr
