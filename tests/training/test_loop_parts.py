"""Pieces of the loop by themselves, and what several processes do, without starting
any: a stand-in adds up as if the other process had had the same."""

import json
import multiprocessing
import os
import signal
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_toys import RECIPE as WITH_WORKERS
from test_toys import Augmented
from torch import nn
from toys import toy
from training_toy import RECIPE, Toy, ToyModel, serve, toy_loss, toy_model

from attn_notes.foundations.checks import CheckpointError
from attn_notes.training import loop, stream
from attn_notes.training.checkpoints import load_checkpoint
from attn_notes.training.history import RunFiles
from attn_notes.training.learner import Learner, WeightAverage, mean_loss
from attn_notes.training.loop import train
from attn_notes.training.processes import Processes, make_accelerator
from attn_notes.training.recipes import Recipe
from attn_notes.training.stream import Share, ignore_interrupts

SHORT = replace(RECIPE, max_steps=4, ema_decay=None, evaluate_every=None)


def weights(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


# several processes


class Twins(Processes):
    """Two processes that always have the same, of which this is one."""

    def __init__(self, rank):
        self.rank, self.world_size, self.closed = rank, 2, 0

    def total(self, values):
        return [2 * value for value in values]

    def gather(self, items):
        return [*items, *items]

    def close(self):
        self.closed += 1


@pytest.fixture
def as_second(monkeypatch):
    """Runs of one process that takes itself for the second of two."""
    made = []

    def make(rank, world_size):
        assert (rank, world_size) == (0, 1)
        made.append(Twins(rank=1))
        return made[-1]

    monkeypatch.setattr(loop, "Processes", make)
    return made


def test_the_second_process_has_its_rows_and_its_random_numbers(as_second):
    """Every second row; dropout from the seed plus one; the sum of the gradients of
    two, which the wrapper would halve."""
    recipe = Recipe(
        optimizer="sgd", learning_rate=0.1, max_steps=1, batch_size=8, seed=3
    )
    model = toy_model(0.3)
    (row,) = train(model, Toy(), recipe, progress=False)
    assert as_second[0].closed == 1
    by_hand, task = toy_model(0.3), Toy()
    task.setup(recipe)
    mine = task.batches(0)[0][1::2]
    batch = task.collate([task.dataset("train")[int(i)] for i in mine])
    torch.manual_seed(recipe.seed + 1)
    loss = toy_loss(task, by_hand, batch)
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
    loss.backward()
    torch.optim.SGD(by_hand.parameters(), lr=recipe.lr(1)).step()
    # counts of both divide the loss of one, times two processes
    torch.testing.assert_close(weights(model), weights(by_hand), rtol=1e-5, atol=1e-7)


def test_shares_are_the_batch_and_an_empty_one_counts_nothing():
    task = Toy(10)
    task.setup(replace(RECIPE, batch_size=4))
    rows = task.batches(0)[2]
    assert len(rows) == 2
    parts = [stream._Shares(task, 3, rank, 3)[0, 2, rows] for rank in range(3)]
    assert [part.empty for part in parts] == [False, False, True]
    assert [part.place for part in parts] == [(0, 2)] * 3
    for part, i in zip(parts, [0, 1, 0], strict=True):
        assert part.batch["input_ids"].tolist() == [task.ids[int(rows[i])].tolist()]
    count = sum((task.ids[int(i)] != 0).sum().item() for i in rows)
    assert sum(part.counts["token"] for part in parts) == count
    assert parts[2].counts == {"token": 0.0}
    scales = {"a": 0.5, "b": 2.0}
    terms = {
        "b": (torch.tensor(5.0, requires_grad=True), 1.0),
        "a": (torch.tensor(3.0, requires_grad=True), 10.0),
    }
    loss, values = mean_loss(terms, scales, empty=False)
    assert loss.item() == 25 and values.tolist() == [25, 1.5, 10]
    assert loss.requires_grad and not values.requires_grad
    loss, values = mean_loss(terms, scales, empty=True)
    assert values.tolist() == [0, 0, 0] and loss.requires_grad


def test_examples_draw_by_seed_epoch_place_and_process():
    task = Augmented()
    task.setup(WITH_WORKERS)

    def drawn(seed, rank, epoch, position):
        share = stream._Shares(task, seed, rank, 2)[epoch, position, [5, 5, 6, 6]]
        return tuple(share.batch["x"][0].tolist())

    places = [
        (s, r, e, p) for s in (0, 1) for r in (0, 1) for e in (0, 1) for p in (0, 1)
    ]
    found = [drawn(*place) for place in places]
    assert len(set(found)) == 16 and found == [drawn(*place) for place in places]


def test_processes_alone_and_together(monkeypatch):
    alone = Processes()
    assert (alone.rank, alone.world_size, alone.group) == (0, 1, None)
    assert alone.total([1, 2.5]) == [1, 2.5] and alone.gather([3]) == [3]
    alone.close()
    d, done = torch.distributed, []

    def gather(lists, mine, group):
        lists[:] = [["other"], mine]
        done.append(("gather", group))

    def reduce(values, group):
        values += 1
        done.append(("reduce", group))

    for name, function in {
        "new_group": lambda backend: f"group of {backend}",
        "all_reduce": reduce,
        "all_gather_object": gather,
        "destroy_process_group": lambda group: done.append(("close", group)),
    }.items():
        monkeypatch.setattr(d, name, function)
    for backend, group in (("nccl", "group of gloo"), ("gloo", None)):
        done.clear()
        monkeypatch.setattr(d, "get_backend", lambda backend=backend: backend)
        pair = Processes(1, 2)
        assert (pair.rank, pair.world_size, pair.group) == (1, 2, group)
        assert pair.total([1, 1e9 + 0.25]) == [2, 1e9 + 1.25]  # in double precision
        assert pair.gather(["mine"]) == ["other", "mine"]
        pair.close()
        closed = [("close", group)] if group else []
        assert done == [("reduce", group), ("gather", group), *closed]


def test_only_the_first_process_writes(tmp_path):
    finished = []

    def accelerator(first):
        tracker = SimpleNamespace(finish=lambda: finished.append(first))
        return SimpleNamespace(
            is_main_process=first,
            trackers=[tracker],
            log=lambda *_, **__: None,
            init_trackers=lambda *_, **__: None,
        )

    second = RunFiles(tmp_path, accelerator(False))
    assert second.open(0, 1) == []
    second.write({"step": 1})
    second.save({})
    second.close()
    assert not list(tmp_path.iterdir())
    first = RunFiles(tmp_path, accelerator(True))
    assert first.open(0, 1) == []
    first.write({"step": 1})
    first.save({"step": 1})
    first.close()
    assert finished == [False, True] and first.metrics.closed
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert second.open(state["metrics"], 2) == [{"step": 1}]
    nowhere = RunFiles(None, accelerator(True))
    assert nowhere.open(0, 1) == []
    nowhere.write({"step": 1})
    nowhere.save({})
    nowhere.close()


def test_a_run_of_two_processes_is_resumed_by_two(tmp_path, as_second, monkeypatch):
    train(toy_model(), Toy(), SHORT, tmp_path, progress=False)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert len(state["random"]) == 2 and len(as_second) == 1
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="made by 2 processes.*got 1"):
        train(toy_model(), Toy(), SHORT, tmp_path, resume=True, progress=False)


def test_gradients_are_exchanged_once_a_step():
    task, model = toy("counting")
    kept = []

    class Counting:
        device, scaler = torch.device("cpu"), None

        def prepare(self, *things):
            return things

        @contextmanager
        def no_sync(self, model):
            kept.append(True)
            yield
            kept.append(False)

        def backward(self, loss):
            kept.append("backward")
            loss.backward()

    task.setup(replace(RECIPE, batch_size=4))
    recipe = replace(SHORT, max_grad_norm=None)
    learner = Learner(model, task, recipe, Counting())
    shares = [stream._Shares(task, 0, 0, 1)[0, i, task.batches(0)[i]] for i in range(3)]
    learner.update(shares, Processes())
    assert kept == [True, "backward", False, True, "backward", False, "backward"]
    assert learner.step == 1 and learner.lr == recipe.lr(1)
    kept.clear()
    learner.update(shares[:1], Processes())
    assert kept == ["backward"]


# the accelerator


def test_what_accelerate_is_told(tmp_path, monkeypatch):
    import accelerate

    told = []

    class Told:
        device = torch.device("cpu")

        def __init__(self, **options):
            told.append(options)

    monkeypatch.setattr(accelerate, "Accelerator", Told)
    for available in (False, True):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda a=available: a)
        make_accelerator(replace(SHORT, mixed_precision="bf16"), tmp_path)
        make_accelerator(SHORT, None)
    assert [t["cpu"] for t in told] == [True, True, False, False]
    assert [t["mixed_precision"] for t in told] == ["bf16", "no"] * 2
    assert [t["log_with"] for t in told] == ["tensorboard", None] * 2
    assert told[0]["project_dir"] == tmp_path


def test_memory_is_pinned_for_a_gpu_only(monkeypatch):
    opened = []
    original = stream.BatchStream.open

    def opening(self, pin_memory=False):
        opened.append(pin_memory)
        return original(self)

    monkeypatch.setattr(stream.BatchStream, "open", opening)
    train(toy_model(), Toy(), SHORT, progress=False)
    assert opened == [False]
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)
    share = Share((0, 0), {"x": [torch.zeros(2)], "name": "a"}, {"x": 2.0}, False)
    pinned = share.pin_memory()
    assert pinned.batch["x"][0].tolist() == [1, 1] and pinned.batch["name"] == "a"
    assert (pinned.place, pinned.counts, pinned.empty) == ((0, 0), {"x": 2.0}, False)


def test_workers_do_not_hear_ctrl_c_and_end_with_the_run():
    before = signal.getsignal(signal.SIGINT)
    try:
        ignore_interrupts(0)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    children = set(multiprocessing.active_children())
    recipe = replace(WITH_WORKERS, max_steps=2, num_workers=1, evaluate_every=None)
    train(nn.Linear(4, 1), Augmented(), recipe, progress=False)
    assert set(multiprocessing.active_children()) == children


# averages, files, places


@pytest.mark.parametrize("decay", [None, 0.75])
def test_the_average_of_weights_and_the_newest_buffers(decay):
    model = nn.BatchNorm1d(2)
    average = WeightAverage(model, decay)
    seen = []
    for i in range(1, 4):
        with torch.no_grad():
            model.weight.fill_(float(i))
            model.running_mean.fill_(10.0 * i)
            model.num_batches_tracked.fill_(i)
        average.update(model)
        seen.append(average.module.weight[0].item())
    expected = [1, 1.5, 2] if decay is None else [1, 1.25, 1.6875]
    assert seen == pytest.approx(expected)
    assert average.module.running_mean[0] == 30 and average.count == 3
    assert average.module.num_batches_tracked == 3
    again = WeightAverage(nn.BatchNorm1d(2), decay)
    again.load_state_dict(average.state_dict())
    average.update(model)
    again.update(model)
    assert torch.equal(average.module.weight, again.module.weight)
    assert model.weight[0] == 3  # the model's own are untouched


def test_rows_are_on_the_disk_before_the_checkpoint_that_counts_them(
    tmp_path, monkeypatch
):
    synced, replaced = [], os.replace
    original = os.fsync

    def fsync(number):
        synced.append(os.readlink(f"/proc/self/fd/{number}").rpartition("/")[2])
        original(number)

    def replace_(old, new):
        state = torch.load(old, weights_only=True)
        known = (tmp_path / "metrics.jsonl").read_bytes()[: state["metrics"]]
        assert len(known) == state["metrics"] and "metrics.jsonl" in synced
        steps = [json.loads(line)["step"] for line in known.splitlines()]
        assert steps == list(range(1, state["step"] + (state["row"] is None)))
        synced.clear()
        replaced(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace_)
    train(toy_model(), Toy(), RECIPE, tmp_path, progress=False)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match="shorter than its checkpoint"):
        train(toy_model(), Toy(), RECIPE, tmp_path, resume=True, progress=False)


def test_time_goes_on_where_it_stopped(tmp_path, monkeypatch):
    clock = [100.0]

    def tick():
        clock[0] += 1
        return clock[0]

    monkeypatch.setattr(loop.time, "perf_counter", tick)

    class Dying(Toy):
        def evaluate(self, *_):
            raise MemoryError

    with pytest.raises(MemoryError):
        train(toy_model(), Dying(), RECIPE, tmp_path, progress=False)
    clock[0] = 7000.0
    history = train(toy_model(), Toy(), RECIPE, tmp_path, resume=True, progress=False)
    seconds = [row["seconds"] for row in history]
    assert seconds == sorted(seconds) and 0 < seconds[0] and seconds[-1] < 40


def test_epochs_count_on_and_places_begin_anew():
    class Listening(Toy):
        asked = []

        def batches(self, epoch):
            self.asked.append(epoch)
            return super().batches(epoch)

    task = Listening(20)
    recipe = replace(SHORT, max_steps=8)  # an epoch has 3 batches
    run = loop.Run(toy_model(), task, recipe)
    places = []
    with loop._opened(run, None):
        for _ in range(8):
            run.update()
            places.append((run.stream.epoch, run.stream.position))
    assert places == [(e, p) for e in range(3) for p in (1, 2, 3)][:8]
    assert task.asked == [0, 1, 2]
    first, second = (list(serve(task, recipe, epoch)) for epoch in (0, 1))
    assert not torch.equal(first[0]["input_ids"], second[0]["input_ids"])


def test_one_term_may_be_called_loss():
    class Named(Toy):
        def counts(self, batch):
            return {"loss": super().counts(batch)["token"]}

        def loss(self, model, batch):
            return {"loss": super().loss(model, batch)["token"]}

    named = train(toy_model(), Named(), SHORT, progress=False)
    plain = train(toy_model(), Toy(), SHORT, progress=False)
    assert [row["loss"] for row in named] == [row["loss"] for row in plain]
    assert named[0].keys() == {"step", "loss", "lr", "seconds"}


def test_the_bar_is_for_the_eyes(capsys, monkeypatch):
    made = []

    class Bar(loop.tqdm):
        def __init__(self, *arguments, **options):
            made.append(options)
            super().__init__(*arguments, **{**options, "disable": True})

        def update(self, n=1):
            made.append(n)

    monkeypatch.setattr(loop, "tqdm", Bar)
    train(toy_model(), Toy(), SHORT, progress=True)
    train(toy_model(), Toy(), SHORT, progress=False)
    options = [o for o in made if isinstance(o, dict)]
    assert [o["disable"] for o in options] == [False, True]
    assert (options[0]["total"], options[0]["initial"]) == (4, 0)
    assert made.count(1) == 8


def test_a_model_without_a_configuration_trains():
    class Bare(ToyModel):
        config = None

    torch.manual_seed(1)
    history = train(Bare(), Toy(), SHORT, progress=False)
    assert len(history) == 4
