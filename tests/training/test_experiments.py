import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel
from training_toy import RECIPE, Toy, ToyModel

from attn_notes.foundations.checks import ConfigError, InputError
from attn_notes.training import experiments
from attn_notes.training.experiments import (
    Experiment,
    experiment,
    first_losses,
    function_hash,
    least_favourable,
    load,
    main,
    paired_interval,
    rehash,
    replay,
    run,
    select,
    shown,
    verdict,
)
from attn_notes.training.loop import train
from attn_notes.training.recipes import Recipe

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


def declare(function=noisy, settings=SETTINGS, seeds=(3, 1), name="noise"):
    experiment("chapter", name, settings, seeds)(function)
    return experiments.EXPERIMENTS["chapter", name]


def path_of(folder, name="noise"):
    return folder / "chapter" / f"{name}.jsonl"


def test_run_stores_what_load_reads_in_the_order_of_settings_and_seeds(folder):
    rows = run("chapter", "noise", declare())
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
        and r["hash"] == function_hash(noisy)
        and "losses" not in r
        for r in rows
    )
    assert [p.name for p in (folder / "chapter").iterdir()] == ["noise.jsonl"]
    assert select(rows, "score", shift=2.0) == [
        noisy(3, 2.0)["score"],
        noisy(1, 2.0)["score"],
    ]
    with pytest.raises(InputError, match="expected a stored run with"):
        select(rows, "score", shift=7)


@pytest.mark.slow
def test_several_processes_store_the_same(folder):
    settings = [dict(low=0.0), dict(low=1.0)]
    declared = Experiment(noisy_module(), tuple(settings), (0, 1, 2))
    one = run("chapter", "one", declared)
    two = run("chapter", "two", declared, workers=2)
    assert [{**r, "seconds": 0} for r in one] == [{**r, "seconds": 0} for r in two]


def noisy_module():
    """A function that another process can import: tests are no modules."""
    from numpy_draws import draw

    return draw


def counted(calls):
    """noisy, which keeps the runs that it makes."""

    def function(seed, shift=0.0):
        calls.append((shift, seed))
        return {"score": seed + shift}

    return function


def test_only_what_is_missing_is_run(folder):
    calls = []
    function = counted(calls)
    run("chapter", "noise", declare(function, SETTINGS[:1], [1]))
    rows = run("chapter", "noise", declare(function, SETTINGS[:1], [0, 1, 2]))
    assert calls == [(0.0, 1), (0.0, 0), (0.0, 2)]
    assert [row["seed"] for row in rows] == [0, 1, 2]
    run("chapter", "noise", declare(function, SETTINGS, [0, 1, 2]))
    assert calls[3:] == [(2.0, 0), (2.0, 1), (2.0, 2)]
    run("chapter", "noise", declare(function, SETTINGS, [0, 1, 2]))
    assert len(calls) == 6
    rows = run("chapter", "noise", declare(function, SETTINGS[1:], [1]))
    assert len(calls) == 6 and rows == load("chapter", "noise") and len(rows) == 1
    assert len(path_of(folder).read_text().splitlines()) == 1
    run("chapter", "noise", declare(function, SETTINGS[1:], [1]), again=True)
    assert calls[6:] == [(2.0, 1)]


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module with an experiment that writes another one over its own file."""
    path = tmp_path / "written_over.py"
    path.write_text(
        "from pathlib import Path\n\n"
        "def draw(seed, factor=2):\n"
        "    path = Path(__file__)\n"
        "    path.write_text(path.read_text().replace('factor=2', 'factor = 3'))\n"
        "    return {'score': factor * seed}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("written_over")
    sys.modules.pop("written_over")


def test_a_file_that_changes_during_the_run_changes_no_hash(
    folder, own_module, monkeypatch
):
    monkeypatch.setattr(experiments, "import_chapters", lambda chapters=(): None)
    digest = function_hash(own_module.draw)
    for name in ("a", "b"):
        experiment("chapter", name, [{}], [1, 2])(own_module.draw)
    main(["chapter", "--workers", "1"])
    rows = [json.loads(line) for name in "ab" for line in open(path_of(folder, name))]
    assert {row["hash"] for row in rows} == {digest} != {function_hash(own_module.draw)}
    assert [row["metrics"]["score"] for row in rows] == [2, 4, 2, 4]


def test_a_process_with_the_changed_file_refuses(own_module):
    digest = function_hash(own_module.draw)
    own_module.draw(1)
    experiments._hash_here.cache_clear()  # as if it were imported only now
    with pytest.raises(InputError, match="draw: expected the function .* its file has"):
        experiments._elsewhere(own_module.draw, {}, 1, digest)


def test_a_failing_run_leaves_what_is_done_and_goes_on_there(folder):
    broken, calls = [True], []

    def failing(seed, shift):
        calls.append(seed)
        if seed == 2 and broken:
            raise MemoryError
        return {"score": seed}

    declared = declare(failing, SETTINGS[:1], [0, 1, 2])
    with pytest.raises(MemoryError):
        run("chapter", "noise", declared)
    assert len(path_of(folder).read_text().splitlines()) == 2
    with pytest.raises(InputError, match="got 1 missing"):
        load("chapter", "noise")
    broken.clear()
    assert len(run("chapter", "noise", declared)) == 3 and calls == [0, 1, 2, 2]
    assert len(list((folder / "chapter").iterdir())) == 1


def test_load_notices_missing_and_stale_results(folder):
    with pytest.raises(InputError, match="make experiments CHAPTER=chapter"):
        load("chapter", "noise")
    run("chapter", "noise", declare(seeds=[0, 1]))
    stored, now = replay("chapter", "noise", 2)
    assert stored == now == noisy(0, 2.0)
    for settings, seeds in (
        (SETTINGS, [0, 1, 2]),
        (SETTINGS[:1], [0, 1]),
        ([dict(shift=0.0), dict(shift=2.5)], [0, 1]),
    ):
        declare(noisy, settings, seeds)
        with pytest.raises(InputError, match="the runs that the chapter declares"):
            load("chapter", "noise")
    declare(seeds=[1, 0])  # another order is no other run
    assert [row["seed"] for row in load("chapter", "noise")] == [1, 0, 1, 0]


def test_a_changed_function_is_refused_until_a_replay_agrees(folder, capsys):
    run("chapter", "noise", declare())

    def same(seed, shift=0.0):
        random = np.random.default_rng(seed)
        return {"curve": [1, 2], "score": float(random.normal()) + shift}

    def other(seed, shift=0.0):
        return {**noisy(seed, shift), "score": noisy(seed, shift)["score"] * 1.01}

    for function in (same, other):
        declared = declare(function)
        with pytest.raises(InputError, match="function as it is now .*rehash chapter"):
            load("chapter", "noise")
        with pytest.raises(InputError, match="got 4 of another. `rehash chapter`"):
            run("chapter", "noise", declared)
    before = path_of(folder).read_bytes()
    with pytest.raises(InputError, match="expected what is stored"):
        rehash("chapter", "noise")
    assert path_of(folder).read_bytes() == before
    declare(same)
    capsys.readouterr()
    assert rehash("chapter", "noise") == 4
    assert len(capsys.readouterr().out.splitlines()) == 2  # a seed of each setting
    rows = load("chapter", "noise")
    assert {row["hash"] for row in rows} == {function_hash(same)}
    assert [row["metrics"] for row in rows] == [
        json.loads(line)["metrics"] for line in before.splitlines()
    ]
    assert rehash("chapter", "noise") == 0
    assert run("chapter", "noise", declare(other), again=True) == load(
        "chapter", "noise"
    )


def test_every_setting_is_replayed_before_anything_is_rehashed(folder):
    run("chapter", "noise", declare())

    def wrong_for_two(seed, shift=0.0):
        return {**noisy(seed, shift), "curve": [1, 2 + (shift == 2)]}

    declare(wrong_for_two)
    before = path_of(folder).read_bytes()
    with pytest.raises(InputError, match="'shift': 2.0"):
        rehash("chapter", "noise")
    assert path_of(folder).read_bytes() == before


def train_toy(seed: int, rate: float, extra: float = 0.0) -> dict:
    torch.manual_seed(seed)
    model = ToyModel()
    recipe = replace(RECIPE, seed=seed, learning_rate=rate, max_steps=24)
    history = train(model, Toy(), recipe, progress=False)
    finished.append(seed)
    loss = history[-1]["loss"] + extra
    return {"loss": loss, "opening": first_losses(history, 10)}


finished = []


def test_runs_that_train_store_their_first_losses_and_replay_these_alone(folder):
    finished.clear()
    declared = declare(train_toy, [dict(rate=0.01), dict(rate=0.02)], [0, 1], "toy")
    rows = run("chapter", "toy", declared)
    assert all(len(row["losses"]) == 20 for row in rows) and len(finished) == 4
    assert all(row["losses"][:10] == row["metrics"]["opening"] for row in rows)
    assert rows[0]["losses"] != rows[1]["losses"]
    stored, now = replay("chapter", "toy", 3)
    assert stored == rows[3]["losses"] == pytest.approx(now, rel=1e-6)
    assert len(replay("chapter", "toy", 3, steps=5)[1]) == 5
    assert len(finished) == 4  # no replay trained to its end
    for i, step in ((0, 0), (2, 19)):
        planted = json.loads(json.dumps(rows))
        planted[i]["losses"][step] *= 1.01
        lines = "".join(json.dumps(row) + "\n" for row in planted)
        path_of(folder, "toy").write_text(lines)
        with pytest.raises(InputError, match=f"seed {rows[i]['seed']}: expected what"):
            replay("chapter", "toy", i)
        replay("chapter", "toy", 3)


def test_older_rows_hold_their_losses_among_the_metrics(folder):
    finished.clear()
    declared = declare(train_toy, [dict(rate=0.01)], [0, 1], "toy")
    rows = run("chapter", "toy", declared)
    old = [{k: v for k, v in r.items() if k not in ("hash", "losses")} for r in rows]
    path = path_of(folder, "toy")
    path.write_text("".join(json.dumps(row) + "\n" for row in old))
    with pytest.raises(InputError, match="got 2 of another"):
        load("chapter", "toy")
    assert rehash("chapter", "toy") == 2 and len(finished) == 2
    assert [len(part) for part in replay("chapter", "toy")] == [10, 10]
    old[0]["metrics"]["opening"][9] += 0.1
    path.write_text("".join(json.dumps(row) + "\n" for row in old))
    with pytest.raises(InputError, match="expected what is stored"):
        rehash("chapter", "toy")


def test_timings_are_not_replayed(folder):
    ticks = iter(range(100))

    def timed(seed):
        return {"milliseconds": next(ticks), "score": seed}

    experiment("chapter", "timed", [{}], [5], timings=["milliseconds"])(timed)
    run("chapter", "timed", experiments.EXPERIMENTS["chapter", "timed"])
    assert replay("chapter", "timed") == ({"score": 5}, {"score": 5})
    experiment("chapter", "timed", [{}], [5])(timed)
    with pytest.raises(InputError, match="milliseconds"):
        replay("chapter", "timed")


def helper(x):
    return x + RATE


RATE = 0.5
_CACHE = {}
TABLE = {"half": helper, "recipe": Recipe(max_steps=3)}


class Twice:
    """A class of this module."""

    factor = 2

    def __call__(self, x):
        return self.factor * x


def original(seed: int, n: int = 3) -> dict:
    """What it does."""
    values = [helper(seed + i) for i in range(n)]
    _CACHE[seed] = values
    try:
        total = sum(v for v in values if v > 0)
    except ValueError as error:
        raise InputError(f"{error}") from None
    return {"total": Twice()(total), "made": TABLE["half"](0)}


def same_thing(s, k: "int" = 3):
    # other names, no annotations, another docstring

    vs: list = [helper(s + j) for j in range(k)]
    _CACHE[s] = vs
    try:
        t = sum(x for x in vs if x > 0)
    except ValueError as problem:
        raise InputError(f"{problem}") from None
    return {"total": Twice()(t), "made": TABLE["half"](0)}


def test_the_hash_is_of_what_a_function_does():
    assert function_hash(original) == function_hash(same_thing)
    assert len(function_hash(original)) == 16

    def another_number(s, k=3):
        vs = [helper(s + j) for j in range(k)]
        _CACHE[s] = vs
        try:
            t = sum(x for x in vs if x > 1)
        except ValueError as problem:
            raise InputError(f"{problem}") from None
        return {"total": Twice()(t), "made": TABLE["half"](0)}

    assert function_hash(original) != function_hash(another_number)


@pytest.mark.parametrize(
    "change",
    [
        ("RATE", 0.6),
        ("helper", lambda x: x - RATE),
        ("TABLE", {"half": helper, "recipe": Recipe(max_steps=4)}),
        ("TABLE", {"half": abs, "recipe": Recipe(max_steps=3)}),
        ("Twice", type("Twice", (), {"factor": 3, "__call__": Twice.__call__})),
        ("Twice", type("Twice", (float,), dict(vars(Twice)))),
    ],
    ids=["constant", "function", "recipe", "builtin", "member", "base"],
)
def test_the_hash_follows_the_functions_classes_and_constants_of_the_module(
    change, monkeypatch
):
    before = function_hash(original)
    monkeypatch.setitem(original.__globals__, *change)
    assert function_hash(original) != before


def test_the_hash_leaves_out_what_varies(monkeypatch):
    before = function_hash(original)
    _CACHE["a"] = 1
    assert function_hash(original) == before
    monkeypatch.setitem(original.__globals__, "RATE", 0.5)
    assert function_hash(original) == before
    twin = Recipe(max_steps=3, seed=0)  # a field that has its default
    monkeypatch.setitem(TABLE, "recipe", twin)
    assert function_hash(original) == before


def even(n):
    return n == 0 or odd(n - 1)


def odd(n):
    return n > 0 and even(n - 1)


def test_the_hash_of_functions_that_call_each_other():
    assert function_hash(even) == function_hash(even) != function_hash(odd)


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


def test_command_rehashes_what_agrees_and_says_what_does_not(
    folder, capsys, monkeypatch
):
    monkeypatch.setattr(experiments, "import_chapters", lambda chapters=(): None)

    def same(seed, shift):
        return noisy(seed, shift)

    def other(seed, shift):
        return {"score": 0.0, "curve": []}

    for name in ("a", "b"):
        experiment("one", name, SETTINGS, [0])(noisy)
    main(["run", "one", "--workers", "1"])
    experiment("one", "a", SETTINGS, [0])(other)
    experiment("one", "b", SETTINGS, [0])(same)
    for command in (["one"], ["rehash", "one"]):
        with pytest.raises(SystemExit) as caught:
            main([*command, "--workers", "1"])
        assert caught.value.code == 1
    printed = capsys.readouterr()
    assert "one/b: 2 rows rehashed" in printed.out and "one/a" in printed.err
    assert len(load("one", "b")) == 2
    with pytest.raises(InputError, match="another"):
        load("one", "a")
    main(["one", "--again", "--workers", "1"])
    assert load("one", "a")[0]["metrics"] == other(0, 0.0)


@given(
    st.lists(st.tuples(numbers, numbers), min_size=2, max_size=9),
    st.sampled_from([0.8, 0.95, 0.99]),
)
def test_paired_interval_equals_scipy(pairs, confidence):
    a, b = map(list, zip(*pairs, strict=True))
    if np.ptp(np.subtract(a, b)) < 1e-6:
        return
    mean, low, high = paired_interval(a, b, confidence)
    reference = ttest_rel(a, b).confidence_interval(confidence)
    assert (low, high) == pytest.approx(
        (reference.low, reference.high), abs=1e-6, rel=1e-6
    ) and mean == pytest.approx(np.mean(a) - np.mean(b), abs=1e-9)


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=9), st.floats(0, 5))
def test_data_that_say_the_opposite_flip_the_verdict(pairs, margin):
    a, b = map(list, zip(*pairs, strict=True))
    flip = {
        "confirmed": "opposite at this scale",
        "opposite at this scale": "confirmed",
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
        (-0.5, -0.1, 0, "greater", "opposite at this scale"),
        (-0.5, -0.1, 0.2, "greater", "not seen at this scale"),
        (-0.5, -0.1, 0, "less", "confirmed"),
        (0.1, 0.5, 0, "less", "opposite at this scale"),
        (0, 0, 0, "greater", "not seen at this scale"),
        (-0.1, 0.1, 0.2, "equal", "confirmed"),
        (-0.1, 0.3, 0.2, "equal", "not seen at this scale"),
        (0.3, 0.4, 0.2, "equal", "opposite at this scale"),
    ],
)
def test_verdicts(low, high, margin, expected, said):
    assert verdict(low, high, margin, expected) == said


def test_an_interval_in_words():
    interval = paired_interval([1.0, 2.0, 3.0], [2.0, 2.0, 5.0])
    assert interval == pytest.approx((-1.0, -3.4841, 1.4841), abs=1e-4)
    assert (
        shown(interval) == "-1.0 [-3.5, +1.5]" and shown((0, 0, 1), 0) == "+0 [+0, +1]"
    )


def test_least_favourable():
    assert (
        least_favourable("confirmed", "not seen at this scale")
        == "not seen at this scale"
    )
    assert (
        least_favourable(
            "confirmed", "opposite at this scale", "not seen at this scale"
        )
        == "opposite at this scale"
        and least_favourable("confirmed") == "confirmed"
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
            run("chapter", "threads", Experiment(threads, ({},), (0,)))[0]["metrics"]
            == {"threads": 1}
            and torch.get_num_threads() == 2
        )
    finally:
        torch.set_num_threads(before)


def wait_for(what, seconds=120):
    """Until it is so; fails where it takes longer."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def is_there(group):
    """Whether any process of a group goes on."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("send", [os.killpg, os.kill], ids=["terminal", "process"])
def test_an_interrupt_stops_the_processes_and_keeps_what_is_done(tmp_path, send):
    script = Path(__file__).with_name("interrupted_run.py")
    command = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    rows, begun = tmp_path / "chapter" / "slow.jsonl", ["begun 0", "begun 1", "begun 2"]
    try:
        wait_for(lambda: rows.is_file() and (tmp_path / begun[-1]).exists())
        send(command.pid, signal.SIGINT)
        printed, said = command.communicate(timeout=20)
        wait_for(lambda: not is_there(command.pid), 5)
    finally:
        if is_there(command.pid):
            os.killpg(command.pid, signal.SIGKILL)
        command.wait()
    assert sorted(path.name for path in tmp_path.glob("begun *")) == begun
    assert command.returncode == 130 and "chapter/slow 1/6" in printed
    assert said.count("\n") == 1 and "chapter/slow: interrupted; 1 of 6" in said
    assert [json.loads(row)["seed"] for row in rows.read_text().splitlines()] == [0]


@pytest.mark.slow
def test_runs_are_stored_as_they_are_done(folder):
    from numpy_draws import wait

    settings = {"rows": str(path_of(folder)), "seconds": 20}, {"rows": "", "seconds": 0}
    rows = run("chapter", "noise", Experiment(wait, settings, (0,)), workers=2)
    assert [row["metrics"] for row in rows] == [{"there": True}, {"there": False}]


@pytest.mark.slow
def test_help_and_an_unknown_chapter():
    command = [sys.executable, "-m", "attn_notes.training.experiments"]
    done = subprocess.run([*command, "no-such-chapter"], capture_output=True, text=True)
    assert done.returncode == 2 and "no experiment there" in done.stderr
