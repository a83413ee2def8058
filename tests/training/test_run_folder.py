"""The folder of a run: one run has it, it is the run's own, and what could end the run
later is found before its first step."""

import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_toy import RECIPE, Toy, ToyModel, toy_model

from attn_notes.foundations.checks import CheckpointError, ConfigError, InputError
from attn_notes.training import checkpoints, history, run_folder
from attn_notes.training.checkpoints import load_checkpoint
from attn_notes.training.loop import train
from attn_notes.training.recipes import Recipe
from attn_notes.zoo.files import read_state_dict

SHORT = replace(RECIPE, max_steps=4, evaluate_every=None, checkpoint_every=2)


def run(recipe=SHORT, task=None, model=None, **options):
    model = model or toy_model()
    return model, train(model, task or Toy(), recipe, progress=False, **options)


def refused(error, said, *arguments, **options):
    with pytest.raises(error, match=said) as caught:
        run(*arguments, **options)
    assert "\n" not in str(caught.value)


def same(a, b):
    a, b = (getattr(x, "state_dict", lambda x=x: x)() for x in (a, b))
    return all(torch.equal(a[name], b[name]) for name in b)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


class Meanwhile(Toy):
    """Does something while the loss of the `at`-th batch is computed."""

    def __init__(self, at, work):
        super().__init__()
        self.at, self.work, self.calls = at, work, 0

    def loss(self, model, batch):
        self.calls += 1
        if self.calls == self.at:
            self.work()
        return super().loss(model, batch)


# one run at a time


@pytest.mark.no_shapes
@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_in_use_is_refused(tmp_path, resume):
    def second():
        said = "another run is using"
        with torch.random.fork_rng():
            refused(ConfigError, said, output_dir=tmp_path / "run", resume=resume)

    task = Meanwhile(3, second)
    model, history = run(task=task, output_dir=tmp_path / "run")
    assert task.calls == 4 and same(model, run()[0])
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3, 4]
    run(output_dir=tmp_path / "run", resume=True)  # free again


# whose folder


@dataclass(frozen=True)
class Config:
    hidden_size: int = 16
    dropout: float = 0.2
    vocab_size: int = 12


def configured(name="small", **fields):
    model = toy_model()
    model.config, model.architecture = Config(**fields), name
    return model


class Other(Toy):
    kind = "other"


def named(**data):
    task = Toy()
    task.data = data
    return task


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "said, changed",
    [
        ("model: name 'small' then, 'big' now", {"model": ("big", {})}),
        ("model: dropout 0.2 then, 0.5 now", {"model": ("small", {"dropout": 0.5})}),
        ("task: kind 'toy' then, 'other' now", {"task": Other}),
        ("task: .*examples 60 then, 50 now", {"task": lambda: Toy(50)}),
        ("task: name 'dates' then, 'words' now", {"task": lambda: named(name="words")}),
        ("recipe: seed 3 then, 4 now", {"recipe": replace(SHORT, seed=4)}),
        ("recipe: max_steps 4 then, 3", {"recipe": replace(SHORT, max_steps=3)}),
    ],
)
def test_another_run_is_not_continued(tmp_path, said, changed):
    run(SHORT, named(name="dates"), configured(), output_dir=tmp_path)
    before, model = contents(tmp_path), configured(dropout=0.2)
    name, fields = changed.get("model", ("small", {}))
    model = configured(name, **fields)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    task = changed["task"]() if "task" in changed else named(name="dates")
    recipe = changed.get("recipe", SHORT)
    said = f"the run in .* had another {said}"
    options = {"output_dir": tmp_path, "resume": True}
    refused(CheckpointError, said, recipe, task, model, **options)
    assert contents(tmp_path) == before and same(model, start)


@pytest.mark.no_shapes
def test_other_examples_are_other_data(tmp_path):
    run(output_dir=tmp_path)
    task = Toy()
    task.ids[0, 0] = task.ids[0, 0] % 11 + 1
    options = {"output_dir": tmp_path, "resume": True}
    refused(CheckpointError, "another task: hash", SHORT, task, **options)
    wide, start = ToyModel(width=8), ToyModel(width=8)
    start.load_state_dict(wide.state_dict())
    refused(CheckpointError, "of another model", SHORT, None, wide, **options)
    assert same(wide, start)


@pytest.mark.no_shapes
def test_rows_of_another_program_are_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for text in ("epoch,loss\n1,2\n", '{"epoch": 1}\n', "[1]\n", "\xff"):
        path.write_text(text)
        for resume in (False, True):
            options = {"output_dir": tmp_path, "resume": resume}
            refused(ConfigError, "metrics.jsonl of another program", **options)
        assert path.read_text() == text


@pytest.mark.no_shapes
def test_a_run_that_ended_before_its_first_checkpoint_says_what_to_do(tmp_path):
    def fail():
        raise MemoryError

    with pytest.raises(MemoryError):
        run(task=Meanwhile(2, fail), output_dir=tmp_path)
    for resume in (False, True):
        options = {"output_dir": tmp_path, "resume": resume}
        refused(ConfigError, "before its first checkpoint.*: remove", **options)
    (tmp_path / "metrics.jsonl").unlink()
    assert same(run(output_dir=tmp_path)[0], run()[0])


@pytest.mark.no_shapes
@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoint.pt", "tensorboard"])
def test_planted_links_are_not_followed(tmp_path, name):
    folder, victim = tmp_path / "run", tmp_path / "victim"
    folder.mkdir()
    victim.mkdir() if name == "tensorboard" else victim.write_text("")
    (folder / name).symlink_to(victim)
    refused(ConfigError, f"expected .*{name} to be a", output_dir=folder)
    assert victim.is_dir() or victim.read_text() == ""
    (folder / name).unlink()
    os.mkfifo(folder / name)  # whoever opens it waits forever
    refused(ConfigError, f"expected .*{name} to be a", output_dir=folder)


def test_leftovers_go(tmp_path):
    folder, victim = tmp_path / "run", tmp_path / "victim"
    (folder / ".part-abc").mkdir(parents=True)
    (tmp_path / ".run.part-abc").mkdir()
    (folder / ".part-abc" / "model.safetensors").write_text("half")
    victim.write_text("precious")
    (folder / ".checkpoint.pt.part").symlink_to(victim)
    run(output_dir=folder)
    assert {p.name for p in folder.iterdir()} == {
        "checkpoint.pt",
        "metrics.jsonl",
        "tensorboard",
    }
    assert {p.name for p in tmp_path.iterdir()} == {"run", "victim"}
    assert victim.read_text() == "precious"


def test_what_is_not_the_runs_stays(tmp_path):
    (tmp_path / ".draft.part").write_text("mine")
    (tmp_path / ".more.part").mkdir()
    run(output_dir=tmp_path)
    assert (tmp_path / ".draft.part").read_text() == "mine"
    assert (tmp_path / ".more.part").is_dir()


def test_a_task_that_goes_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    run(task=Meanwhile(1, lambda: os.chdir(tmp_path / "elsewhere")), output_dir="run")
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 4


def test_a_file_that_is_written_beside_follows_no_link(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".state.part").symlink_to(tmp_path / "victim")
    checkpoints.save_checkpoint(tmp_path / "state", {"step": 1})
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "left",
    [
        {"RANK": "1"},
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2"},
        {"LOCAL_RANK": "0"},
        {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
    ],
    ids=str,
)
def test_half_of_torchrun_in_the_environment(tmp_path, monkeypatch, left):
    if len(left) == 3:
        left = {**left, "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    refused(ConfigError, "environment: expected RANK", output_dir=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_home_is_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run(output_dir="~/run")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert run(output_dir="~/run", resume=True)[1][-1]["step"] == 4


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "changed",
    [
        {"run": None},
        {"run": {"recipe": {}, "model": {}}},
        {"step": "3"},
        {"row": 1},
        {"random": [{"cpu": torch.zeros(3)}]},
        {"random": [3]},
        {"optimizer": {}},
        {"optimizer": 3},
        {"model": {}},
        {"epoch": -1},
        {"position": -3},
        {"metrics": -1},
        {"seconds": float("nan")},
    ],
    ids=str,
)
def test_a_checkpoint_that_was_tampered_with(tmp_path, changed):
    run(output_dir=tmp_path)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    torch.save({**state, **changed}, tmp_path / "checkpoint.pt")
    refused(CheckpointError, str(tmp_path), output_dir=tmp_path, resume=True)


@pytest.mark.no_shapes
def test_an_optimizer_that_has_lost_its_moments(tmp_path):
    run(output_dir=tmp_path)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    state["optimizer"]["state"].clear()
    torch.save(state, tmp_path / "checkpoint.pt")
    longer = replace(SHORT, max_steps=6)
    said = "optimizer: expected the state of"
    refused(CheckpointError, said, longer, output_dir=tmp_path, resume=True)


@pytest.mark.no_shapes
def test_a_checkpoint_with_code_in_it_is_one_line(tmp_path):
    run(output_dir=tmp_path)
    torch.save(toy_model(), tmp_path / "checkpoint.pt")
    said = "more than tensors and plain data"
    refused(CheckpointError, said, output_dir=tmp_path, resume=True)


def test_weights_of_another_type_are_another_model(tmp_path):
    run(output_dir=tmp_path)
    longer, model = replace(SHORT, max_steps=6), toy_model().double()
    said = "torch.float32.* then, .*torch.float64.* now"
    refused(
        CheckpointError, said, longer, None, model, output_dir=tmp_path, resume=True
    )


@pytest.mark.no_shapes
def test_rows_that_were_tampered_with(tmp_path):
    run(output_dir=tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b"{", b"["))
    refused(CheckpointError, "a row a line", output_dir=tmp_path, resume=True)


# before the first step


class HeldOut(Toy):
    """Other rows in one split."""

    def __init__(self, split, rows):
        super().__init__()
        self.split, self.held_out = split, rows

    def dataset(self, split):
        return self.held_out if split == self.split else self.ids

    def loss(self, model, batch):
        raise AssertionError("a step was taken")


class Positions:
    vocab_size, max_position_embeddings = 12, 16


@pytest.mark.no_shapes
@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize(
    "change, said",
    [
        (lambda x: x[:0], "expected at least one example; got none"),
        (lambda x: torch.cat([x, x * 20]), r"examples \d+ to \d+: input_ids: .*ids"),
        (lambda x: torch.ones(40, 80).long(), "at most 16 tokens.*; got 80"),
    ],
)
def test_held_out_data_are_looked_at_first(tmp_path, split, change, said):
    task, model = HeldOut(split, change(Toy().ids)), toy_model()
    model.config = Positions
    options = {"output_dir": tmp_path / "run"}
    refused(InputError, f"{split}.*{said}", SHORT, task, model, **options)
    assert not (tmp_path / "run").exists()


def test_looking_at_them_changes_nothing(tmp_path):
    class Drawing(Toy):
        def collate(self, examples):
            self.drawn = torch.rand(1), np.random.rand()
            return super().collate(examples)

    assert same(run(task=Drawing())[0], run()[0])


@pytest.mark.parametrize(
    "value", [np.float32(0.5), torch.tensor(0.5), np.array([0.5]), 0.5, np.int64(2)]
)
def test_metrics_of_any_type(tmp_path, value):
    class Numbers(Toy):
        def evaluate(self, *arguments):
            return {"score": value}

    _, history = run(task=Numbers(), output_dir=tmp_path)
    assert type(history[-1]["valid_score"]) in (int, float)
    last = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last) == history[-1]


def test_a_metric_that_is_no_number_costs_no_run(tmp_path):
    class Wordy(Toy):
        def evaluate(self, *arguments):
            return {"score": "good"}

    with pytest.raises(ConfigError, match="valid_score: expected a number; got 'good'"):
        run(task=Wordy(), output_dir=tmp_path)
    model, history = run(output_dir=tmp_path, resume=True)
    assert same(model, run()[0]) and "valid_loss" in history[-1]


def test_a_checkpoint_stands_before_every_evaluation(tmp_path):
    class Failing(Toy):
        def evaluate(self, *arguments):
            raise MemoryError

    recipe = replace(SHORT, evaluate_every=3, checkpoint_every=None)
    with pytest.raises(MemoryError):
        run(recipe, Failing(), output_dir=tmp_path)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3
    assert same(run(recipe, output_dir=tmp_path, resume=True)[0], run(recipe)[0])


@pytest.mark.no_shapes
def test_room_for_the_checkpoints(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**6, 10**6, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.shutil, "disk_usage", lambda path: usage)
        said = r"room for 0\.\d MB in .*; got 0.0 MB"
        refused(ConfigError, said, output_dir=tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(resource, "getrlimit", lambda what: (1000, 1000))
        refused(ConfigError, "expected files of", output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    size = run_folder.checkpoint_bytes(toy_model(), SHORT)
    run(output_dir=tmp_path / "run")
    found = (tmp_path / "run" / "checkpoint.pt").stat().st_size
    assert 0.9 * size < found < size + 20_000


# disks that refuse


@pytest.mark.no_shapes
@pytest.mark.parametrize("what", ["checkpoint", "row"])
def test_a_full_disk(tmp_path, monkeypatch, what):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Rows(io.FileIO):
        def __init__(self, path, *_, **__):
            super().__init__(path, "ab")

    def fill():
        target = (torch, "save") if what == "checkpoint" else (Rows, "write")
        monkeypatch.setattr(*target, full)

    monkeypatch.setattr(history, "open", Rows, raising=False)

    said = f"{tmp_path} can not be written: No space left on device; make room"
    refused(CheckpointError, said, RECIPE, Meanwhile(8, fill), output_dir=tmp_path)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] in (5, 6)
    assert not list(tmp_path.glob(".*"))
    assert same(run(RECIPE, output_dir=tmp_path, resume=True)[0], run(RECIPE)[0])


def test_a_limit_on_the_size_of_files(tmp_path):
    """A real one, in a process of its own."""
    program = """
        import resource, sys
        from test_run_folder import *
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            run(RECIPE, Meanwhile(8, limit), output_dir=sys.argv[1])
        except CheckpointError as error:
            print(error)"""
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    here = Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=here)
    assert f"{tmp_path} can not be written: File too large" in done.stdout, done.stderr
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 6
    assert same(run(RECIPE, output_dir=tmp_path, resume=True)[0], run(RECIPE)[0])


@pytest.mark.parametrize("when", ["init_trackers", "log", "finish"])
def test_a_tracker_that_fails_fails_alone(tmp_path, monkeypatch, when):
    import accelerate
    from accelerate.tracking import TensorBoardTracker

    def fail(*_, **__):
        raise RuntimeError("no tracker today")

    owner = TensorBoardTracker if when == "finish" else accelerate.Accelerator
    monkeypatch.setattr(owner, when, fail)
    with pytest.warns(UserWarning, match="TensorBoard's .*no tracker today"):
        model, history = run(output_dir=tmp_path / "run")
    assert len(history) == 4

    def worse():
        raise MemoryError("the true one")

    with (
        pytest.warns(UserWarning, match="no tracker today"),
        pytest.raises(MemoryError, match="the true one"),
    ):
        run(task=Meanwhile(3, worse), output_dir=tmp_path / "other")


# how it ends, and goes on


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_end_saves(tmp_path, number):
    before = signal.getsignal(number)
    task = Meanwhile(3, lambda: signal.raise_signal(number))
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3"):
        run(task=task, output_dir=tmp_path)
    assert signal.getsignal(number) is before
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3
    assert same(run(output_dir=tmp_path, resume=True)[0], run()[0])


PLAIN = replace(SHORT, schedule="constant", ema_decay=None)


@pytest.mark.parametrize(
    "options",
    [{}, {"ema_decay": 0.9}, {"average_last": 2, "average_every": 1}],
    ids=str,
)
def test_a_finished_run_is_lengthened(tmp_path, options):
    recipe = replace(PLAIN, **options)
    longer = replace(recipe, max_steps=9)
    run(recipe, output_dir=tmp_path)
    model, history = run(longer, output_dir=tmp_path, resume=True)
    assert same(model, run(longer)[0])
    assert [row["step"] for row in history] == list(range(1, 10))


@pytest.mark.no_shapes
def test_a_run_is_lengthened_when_it_is_finished(tmp_path):
    task = Meanwhile(3, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        run(PLAIN, task, output_dir=tmp_path)
    options = {"output_dir": tmp_path, "resume": True}
    said = "max_steps 4 then, 9 now"
    refused(CheckpointError, said, replace(PLAIN, max_steps=9), **options)
    other = replace(PLAIN, checkpoint_every=None)  # how often to save is free
    assert same(run(other, **options)[0], run(PLAIN)[0])


@pytest.mark.no_shapes
def test_numbers_of_any_type(tmp_path):
    odd = Recipe(
        learning_rate=np.float32(0.5),
        betas=np.array([0.5, 0.75]),
        schedule="step_decay",
        schedule_options={"milestones": range(2, 4), "decay": torch.tensor(0.5)},
        max_steps=np.int64(4),
        batch_size=torch.tensor(8),
        seed=np.uint8(3),
        weight_decay=np.float64(0),
        lr_scales={"head.*": np.float16(0.5)},
        checkpoint_every=np.int32(2),
    )
    plain = Recipe(
        learning_rate=0.5,
        betas=(0.5, 0.75),
        schedule="step_decay",
        schedule_options={"milestones": [2, 3], "decay": 0.5},
        max_steps=4,
        batch_size=8,
        seed=3,
        lr_scales={"head.*": 0.5},
        checkpoint_every=2,
    )
    assert (
        odd == plain and type(odd.learning_rate) is float and odd.betas == (0.5, 0.75)
    )
    model, _ = run(odd, output_dir=tmp_path)
    assert same(run(plain, output_dir=tmp_path, resume=True)[0], model)


@pytest.mark.parametrize(
    "schedule, options",
    [
        ("constant", {}),
        ("cosine", {}),
        ("inverse_square_root", {"d_model": 16}),
        ("step_decay", {"milestones": [1]}),
        ("seq2seq_halving", {"steps_per_epoch": 1}),
    ],
)
def test_one_step_learns_something(schedule, options):
    warmup = int(schedule == "inverse_square_root")
    recipe = Recipe(
        schedule=schedule, schedule_options=options, max_steps=1, warmup_steps=warmup
    )
    assert recipe.lr(1) > 0 and not same(run(recipe)[0], toy_model())


@pytest.mark.parametrize(
    "options", [{"ema_decay": 0.5}, {"average_last": 3, "average_every": 1}], ids=str
)
def test_what_the_folder_gives_are_the_averaged_weights(tmp_path, options):
    recipe = replace(PLAIN, **options)
    model, _ = run(recipe, output_dir=tmp_path)
    assert same(model, read_state_dict(tmp_path / "checkpoint.pt"))
    raw = load_checkpoint(tmp_path / "checkpoint.pt")["model"]
    assert not same(model, raw)


def test_before_there_is_an_average_they_are_the_weights(tmp_path):
    recipe = replace(PLAIN, average_last=1)
    task = Meanwhile(2, lambda: signal.raise_signal(signal.SIGINT))
    model = toy_model()
    with pytest.raises(KeyboardInterrupt):
        run(recipe, task, model, output_dir=tmp_path)
    assert same(model, read_state_dict(tmp_path / "checkpoint.pt"))


def test_a_place_that_the_data_have_not(tmp_path):
    run(output_dir=tmp_path)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    torch.save({**state, "position": 10**6}, tmp_path / "checkpoint.pt")
    longer = replace(SHORT, max_steps=6)
    refused(CheckpointError, "position", longer, output_dir=tmp_path, resume=True)
