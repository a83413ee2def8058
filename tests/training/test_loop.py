import json
import math
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn
from training_toy import RECIPE, Toy, ToyModel, serve, toy_loss, toy_model

from attn_notes.foundations.checks import CheckpointError, ConfigError, InputError
from attn_notes.training import loop
from attn_notes.training.checkpoints import (
    atomic_write,
    load_checkpoint,
    save_checkpoint,
)
from attn_notes.training.history import recording_losses, stopping_after
from attn_notes.training.loop import train
from attn_notes.training.recipes import Recipe
from attn_notes.training.tasks import check_batch, check_split

SHORT = replace(RECIPE, max_steps=6)


def run(recipe=SHORT, task=None, dropout=0.0, **options):
    model = toy_model(dropout)
    return model, train(model, task or Toy(), recipe, progress=False, **options)


def same(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def rows(folder):
    return [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def test_equals_a_loop_by_hand():
    recipe = replace(SHORT, ema_decay=None)
    model, history = run(recipe)
    by_hand, task, losses = toy_model(0.0), Toy(), []
    optimizer = torch.optim.Adam(by_hand.parameters())
    for step, batch in zip(range(1, 7), serve(task, recipe), strict=False):
        loss = toy_loss(task, by_hand, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = recipe.lr(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert [row["loss"] for row in history] == pytest.approx(losses, abs=1e-6)
    assert [row["lr"] for row in history] == [recipe.lr(s) for s in range(1, 7)]
    for a, b in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("average_over", ["tokens", "sequences"])
def test_accumulated_batches_are_one_batch(average_over):
    whole = replace(
        SHORT,
        batch_size=12,
        average_over=average_over,
        optimizer="sgd",
        learning_rate=0.1,
    )  # an epoch: 5 batches of 12, 10 of 6
    a, history_a = run(whole)
    b, history_b = run(replace(whole, batch_size=6, gradient_accumulation_steps=2))
    assert [r["loss"] for r in history_b] == pytest.approx(
        [r["loss"] for r in history_a], abs=1e-5
    )
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


def test_average_over_sequences_scales_the_gradient_by_the_mean_length():
    task, recipe = (
        Toy(),
        Recipe(optimizer="sgd", learning_rate=0.1, max_steps=1, batch_size=8),
    )
    start = toy_model(0.0)
    moved = [
        [
            b - a
            for a, b in zip(
                start.parameters(),
                run(replace(recipe, average_over=over))[0].parameters(),
                strict=True,
            )
        ]
        for over in ("tokens", "sequences")
    ]
    batch = next(serve(task, recipe))
    length = (batch["labels"] != -100).sum() / 8
    for a, b in zip(*moved, strict=True):
        torch.testing.assert_close(b, a * length, rtol=1e-3, atol=1e-5)


def test_clipping_bounds_the_norm_of_the_mean_gradient_and_keeps_its_direction():
    recipe = Recipe(optimizer="sgd", learning_rate=1.0, max_steps=1, batch_size=8)
    start = nn.utils.parameters_to_vector(toy_model(0.0).parameters())
    free, clipped, loose = (
        nn.utils.parameters_to_vector(
            run(replace(recipe, max_grad_norm=c))[0].parameters()
        )
        - start
        for c in (None, 0.05, 1e3)
    )
    assert clipped.norm().item() == pytest.approx(0.05, rel=1e-3) and free.norm() > 0.05
    assert torch.cosine_similarity(free, clipped, 0) > 0.9999
    torch.testing.assert_close(free, loose)


def test_average_of_weights():
    recipe = replace(SHORT, ema_decay=0.5, optimizer="sgd", learning_rate=0.1)
    averaged, history = run(recipe)
    expected = None
    for steps in range(1, 7):  # the schedule is the whole run's
        model = toy_model(0.0)
        task, optimizer = Toy(), torch.optim.SGD(model.parameters(), lr=0.1)
        batches = serve(task, recipe)
        for step, batch in zip(range(1, steps + 1), batches, strict=False):
            optimizer.param_groups[0]["lr"] = recipe.lr(step)
            toy_loss(task, model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        now = nn.utils.parameters_to_vector(model.parameters()).detach()
        expected = now if expected is None else 0.5 * expected + 0.5 * now
    torch.testing.assert_close(
        nn.utils.parameters_to_vector(averaged.parameters()).detach(),
        expected,
        rtol=0,
        atol=1e-5,
    )
    assert history[-1]["valid_loss"] == pytest.approx(
        Toy().evaluate(averaged)["loss"], abs=1e-5
    )


class Watching(Toy):
    """Keeps the weights that it is asked to evaluate."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def evaluate(self, model, *arguments):
        self.seen.append(
            nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        )
        return super().evaluate(model, *arguments)


def test_mean_of_the_last_weights():
    plain, averaged = Watching(), Watching()
    recipe = replace(RECIPE, ema_decay=None, evaluate_every=1)
    run(recipe, plain, dropout=0.2)
    model, history = run(
        replace(recipe, average_last=3, average_every=2), averaged, dropout=0.2
    )
    after = dict(enumerate(plain.seen, start=1))
    means = {
        step: torch.stack([after[s] for s in (8, 10, 12) if s <= step]).mean(0)
        for step in range(8, 13)
    }
    for step, seen in enumerate(
        averaged.seen, start=1
    ):  # before the first of the three: the weights themselves
        torch.testing.assert_close(
            seen, means.get(step, after[step]), rtol=0, atol=1e-6 if step >= 8 else 0
        )
    torch.testing.assert_close(
        nn.utils.parameters_to_vector(model.parameters()).detach(),
        means[12],
        rtol=0,
        atol=1e-6,
    )
    assert (after[12] - means[12]).abs().max() > 1e-3 and history[-1][
        "valid_loss"
    ] == Toy().evaluate(model)["loss"]
    last, _ = run(replace(recipe, average_last=1), dropout=0.2)
    assert torch.equal(nn.utils.parameters_to_vector(last.parameters()), after[12])


@pytest.mark.parametrize("at", [3, 8, 9, 10, 12])
def test_an_interrupted_mean_goes_on(tmp_path, at):
    recipe = replace(RECIPE, ema_decay=None, average_last=3, average_every=2)
    whole, _ = run(recipe, dropout=0.2)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, Stopping(at), dropout=0.2, output_dir=tmp_path)
    model, _ = run(recipe, dropout=0.2, output_dir=tmp_path, resume=True)
    assert same(model, whole)


def test_bf16_trains_and_leaves_the_model_as_it_was():
    full, _ = run()
    model, history = run(replace(SHORT, mixed_precision="bf16"))
    assert (
        "forward" not in vars(model)
        and "_original_forward" not in vars(model)
        and not model.training
    )
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert [r["loss"] for r in history] == pytest.approx(
        [r["loss"] for r in run()[1]], rel=0.02
    )
    assert not same(full, model)
    assert same(full, run()[0])  # the next run has full precision again


def test_history_metrics_and_tensorboard(tmp_path):
    _, history = run(output_dir=tmp_path)
    assert rows(tmp_path) == list(history)
    assert [row["step"] for row in history] == list(range(1, 7))
    steps, values = history.curve("valid_loss")
    assert steps == [5, 6] and all(map(math.isfinite, values))
    assert [row["seconds"] for row in history] == sorted(
        row["seconds"] for row in history
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == list(range(1, 7)) and [
        e.step for e in events.Scalars("valid_loss")
    ] == [5, 6]


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    assert same(run(dropout=0.3)[0], run(dropout=0.3)[0])
    assert not same(run(dropout=0.3)[0], run(replace(SHORT, seed=4), dropout=0.3)[0])


# breaking off and going on, in one process (test_resume.py kills processes)


@pytest.fixture(autouse=True)
def ctrl_c_acts():
    """Python's own handler: what was started in the background ignores Ctrl-C, and
    hands that on."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Stopping(Toy):
    """Ctrl-C while the loss of the `at`-th batch is computed, `times` times."""

    def __init__(self, at, times=1):
        super().__init__()
        self.at, self.times, self.calls = at, times, 0

    def loss(self, model, batch):
        self.calls += 1
        if self.calls == self.at:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)
        return super().loss(model, batch)


@pytest.mark.parametrize("at", [1, 4, 8, 9])  # 8 is the last batch of an epoch
def test_interrupted_run_resumes_to_the_same_weights(tmp_path, at):
    before = signal.getsignal(signal.SIGINT)
    whole, _ = run(RECIPE, dropout=0.2)
    with pytest.raises(KeyboardInterrupt, match=f"stopped after step {at}"):
        run(RECIPE, Stopping(at), dropout=0.2, output_dir=tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint.pt",
        "metrics.jsonl",
        "tensorboard",
    ]
    torch.manual_seed(99)  # neither the caller's random state
    model = ToyModel(0.2)  # nor the new model's weights matter
    history = train(model, Toy(), RECIPE, tmp_path, resume=True, progress=False)
    assert same(model, whole)
    assert (
        [row["step"] for row in history]
        == [row["step"] for row in rows(tmp_path)]
        == list(range(1, 13))
    )


def test_resuming_skips_to_its_place_in_the_data_and_a_finished_run_does_nothing(
    tmp_path,
):
    with pytest.raises(KeyboardInterrupt):
        run(RECIPE, Stopping(3), output_dir=tmp_path)
    model, history = run(RECIPE, output_dir=tmp_path, resume=True)
    task = Toy()
    task.evaluate = lambda *_, **__: pytest.fail("nothing is left to evaluate")
    again, history_again = run(RECIPE, task, output_dir=tmp_path, resume=True)
    assert task.served == 0 and history_again == history and same(model, again)


def test_the_second_ctrl_c_acts_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt) as caught:
        run(RECIPE, Stopping(5, times=2), output_dir=tmp_path)
    assert not str(caught.value)
    assert (
        load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3
    )  # the last regular one
    assert not list(tmp_path.glob(".*"))
    model, _ = run(RECIPE, output_dir=tmp_path, resume=True)
    assert same(model, run(RECIPE)[0])


def test_without_a_folder_ctrl_c_still_ends_at_a_step():
    with pytest.raises(KeyboardInterrupt, match="after step 2"):
        run(task=Stopping(2))


def test_trains_in_a_thread():
    done = []
    thread = threading.Thread(target=lambda: done.append(len(run()[1])))
    thread.start()
    thread.join()
    assert done == [6]


def test_tensorboard_has_no_step_twice(tmp_path):
    class Dying(Toy):
        def evaluate(self, *_):
            raise MemoryError

    with pytest.raises(MemoryError):
        run(
            RECIPE, Dying(), output_dir=tmp_path
        )  # at step 5; the checkpoint is of step 3
    assert len(rows(tmp_path)) == 4
    run(RECIPE, output_dir=tmp_path, resume=True)
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 13))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert [
        e.step
        for e in EventAccumulator(str(tmp_path / "tensorboard"))
        .Reload()
        .Scalars("loss")
    ] == list(range(1, 13))


# rows that are read from the device only now and then, as on an accelerator


@pytest.fixture
def every_seventh(monkeypatch):
    monkeypatch.setattr(loop, "flush_every", lambda device: 7)


def test_rows_read_later_are_the_same_rows(tmp_path, every_seventh, monkeypatch):
    _, later = run(RECIPE, dropout=0.2, output_dir=tmp_path)
    monkeypatch.undo()
    _, at_once = run(RECIPE, dropout=0.2)
    assert [{**row, "seconds": 0} for row in later] == [
        {**row, "seconds": 0} for row in at_once
    ]
    assert rows(tmp_path) == list(later)


def test_ctrl_c_reads_the_rows_that_are_still_on_the_device(tmp_path, every_seventh):
    recipe = replace(RECIPE, evaluate_every=None, checkpoint_every=None)
    with pytest.raises(KeyboardInterrupt, match="after step 4"):
        run(recipe, Stopping(4), dropout=0.2, output_dir=tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    model, history = run(recipe, dropout=0.2, output_dir=tmp_path, resume=True)
    assert [row["step"] for row in history] == list(range(1, 13))
    assert same(model, run(recipe, dropout=0.2)[0])


@pytest.mark.no_shapes
def test_a_loss_read_later_stops_the_run_before_it_is_saved(tmp_path, every_seventh):
    class Exploding(Toy):
        calls = 0

        def loss(self, model, batch):
            self.calls += 1
            loss, weight = super().loss(model, batch)["token"]
            return {"token": (loss * (math.inf if self.calls == 4 else 1), weight)}

    recipe = replace(RECIPE, evaluate_every=None)
    refused(ConfigError, "became inf at step 4", recipe, task=Exploding())
    refused(
        ConfigError,
        "became inf at step 4",
        recipe,
        task=Exploding(),
        output_dir=tmp_path,
    )
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3


@pytest.mark.no_shapes
def test_of_a_gradient_that_is_not_finite_nothing_is_learned(tmp_path):
    class Spoilt(Toy):
        """A gradient that is not finite, of a loss that is."""

        calls = 0

        def loss(self, model, batch):
            self.calls += 1
            loss, weight = super().loss(model, batch)["token"]
            if self.calls == 6:
                loss = loss + (0 * model.head.bias).sum().sqrt()
            return {"token": (loss, weight)}

    recipe = replace(RECIPE, max_grad_norm=None)
    said = "the gradient became nan at step 6"
    model = toy_model(0.0)
    refused(ConfigError, said, recipe, model, Spoilt(), output_dir=tmp_path)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 5
    with stopping_after(5):  # the weights of the last good step
        run(recipe, output_dir=tmp_path / "good")
    good = load_checkpoint(tmp_path / "good" / "checkpoint.pt")["model"]
    assert all(torch.equal(good[k], v) for k, v in model.state_dict().items())
    assert same(run(recipe, output_dir=tmp_path, resume=True)[0], run(recipe)[0])
    last = replace(recipe, max_steps=6)
    refused(ConfigError, said, last, task=Spoilt())  # also where nothing is saved


# what ends in an evaluation


def test_a_checkpoint_is_written_before_the_evaluation_of_its_step(tmp_path):
    class Failing(Watching):
        def evaluate(self, model, *arguments):
            if len(self.seen) == 1:
                raise MemoryError
            return super().evaluate(model, *arguments)

    recipe = replace(RECIPE, evaluate_every=3, checkpoint_every=3)
    with pytest.raises(MemoryError):
        run(recipe, Failing(), dropout=0.2, output_dir=tmp_path)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["step"] == state["row"]["step"] == 6 and len(rows(tmp_path)) == 5
    task = Watching()
    model, history = run(recipe, task, dropout=0.2, output_dir=tmp_path, resume=True)
    whole, expected = run(recipe, dropout=0.2)
    assert same(model, whole) and len(task.seen) == 3  # at 6, 9 and 12
    assert [{**row, "seconds": 0} for row in history] == [
        {**row, "seconds": 0} for row in expected
    ]
    assert history.curve("valid_loss")[0] == [3, 6, 9, 12]


def test_the_last_evaluation_can_be_made_up_for(tmp_path):
    class Failing(Toy):
        def evaluate(self, *_):
            raise MemoryError

    recipe = replace(RECIPE, evaluate_every=None)
    with pytest.raises(MemoryError):
        run(recipe, Failing(), dropout=0.2, output_dir=tmp_path)
    task = Toy()
    model, history = run(recipe, task, dropout=0.2, output_dir=tmp_path, resume=True)
    assert history.curve("valid_loss")[0] == [12] and task.served == 1
    assert same(model, run(recipe, dropout=0.2)[0])
    assert load_checkpoint(tmp_path / "checkpoint.pt")["row"] is None


# replays


def test_stopping_after_some_steps():
    losses = [row["loss"] for row in run(RECIPE, dropout=0.2)[1]]
    ended = []
    with stopping_after(4) as first:
        run(RECIPE, dropout=0.2)
        ended.append(True)
    assert first == losses[:4] and not ended
    with stopping_after(20) as first:  # the whole run, and nothing after it
        run(RECIPE, dropout=0.2)
        ended.append(True)
    assert first == losses and not ended
    assert len(run(SHORT)[1]) == 6  # outside the block training is as ever
    with stopping_after(2) as first:
        pass
    assert len(run(SHORT)[1]) == 6 and first == []
    with recording_losses(4) as first:
        run(RECIPE, dropout=0.2)
        run(SHORT)  # the second run is not looked at
        ended.append(True)
    assert first == losses[:4] and ended
    with recording_losses(20) as first:
        run(RECIPE, dropout=0.2)
        run(SHORT)
    assert first == losses


# what is refused


class Untouched(Toy):
    def collate(self, examples):
        raise AssertionError("work began")


def refused(error, said, recipe=SHORT, model=None, task=None, **options):
    with pytest.raises(error, match=said) as caught:
        train(
            model or toy_model(), task or Untouched(), recipe, progress=False, **options
        )
    assert "\n" not in str(caught.value)


@pytest.mark.no_shapes
def test_refuses_folders_and_checkpoints(tmp_path):
    (tmp_path / "file").write_text("")
    refused(
        ConfigError, "can not be written: File exists", output_dir=tmp_path / "file"
    )
    refused(
        ConfigError,
        "can not be written: Not a directory",
        output_dir=tmp_path / "file" / "run",
    )
    refused(ConfigError, "needs the output_dir", resume=True)
    refused(
        CheckpointError, "nothing to resume", output_dir=tmp_path / "new", resume=True
    )
    assert not (tmp_path / "new").exists()
    run(output_dir=tmp_path / "run")
    before = {
        p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()
    }
    refused(ConfigError, "holds a run already", output_dir=tmp_path / "run")
    refused(
        CheckpointError,
        "another recipe: max_steps 6 then, 5 now; seed 3 then, 4 now",
        replace(SHORT, max_steps=5, seed=4),
        output_dir=tmp_path / "run",
        resume=True,
    )
    refused(
        CheckpointError,
        "of another model",
        model=ToyModel(width=8),
        output_dir=tmp_path / "run",
        resume=True,
    )
    assert before == {
        p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()
    }
    whole = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    for content in (b"", whole[:100], whole[:-300], b"not a checkpoint"):
        (tmp_path / "run" / "checkpoint.pt").write_bytes(content)
        refused(
            CheckpointError,
            "not a readable checkpoint",
            output_dir=tmp_path / "run",
            resume=True,
        )
    save_checkpoint(tmp_path / "run" / "checkpoint.pt", {"weights": torch.ones(2)})
    refused(
        CheckpointError,
        "not a checkpoint of a run",
        output_dir=tmp_path / "run",
        resume=True,
    )
    (tmp_path / "run" / "checkpoint.pt").write_bytes(whole)
    (tmp_path / "run" / "metrics.jsonl").write_bytes(before["metrics.jsonl"][:50])
    refused(
        CheckpointError,
        "shorter than its checkpoint",
        output_dir=tmp_path / "run",
        resume=True,
    )


@pytest.mark.no_shapes
def test_ids_are_checked_against_the_vocabulary_that_they_belong_to():
    class Two:
        source_vocab_size, target_vocab_size, num_classes, type_vocab_size = 5, 7, 3, 2

    class One:
        vocab_size = 5

    sizes = {"input_ids": (5, 5), "decoder_input_ids": (7, 5), "labels": (7, 5)}
    for name, two_and_one in sizes.items():
        for config, size in zip((Two, One), two_and_one, strict=True):
            check_batch({name: torch.tensor([[size - 1, 0]])}, config())
            said = f"{name}: expected ids from 0 to {size - 1}; got {size}"
            with pytest.raises(InputError, match=said):
                check_batch({name: torch.tensor([[0, size]])}, config())
    check_batch({"labels": torch.tensor([[-100, -100]])}, One())
    with pytest.raises(InputError, match="got -1"):
        check_batch({"labels": torch.tensor([[-100, -1]])}, One())
    with pytest.raises(InputError, match="got -100"):
        check_batch({"input_ids": torch.tensor([[-100]])}, One())
    with pytest.raises(InputError, match="labels: expected ids from 0 to 2; got 3"):
        check_batch({"labels": torch.tensor([3])}, Two())
    with pytest.raises(InputError, match="token_type_ids: expected ids from 0 to 1"):
        check_batch({"token_type_ids": torch.tensor([[2]])}, Two())
    check_batch({"labels": torch.tensor([9])}, One())  # classes that nobody counted


@pytest.mark.no_shapes
def test_labels_of_tokens_are_classes_where_the_task_has_some():
    class Config:
        vocab_size, num_classes = 5, 9

    class Tagging(Toy):
        classes = tuple("abc")

    for found in (2, 8):  # a class, not a token; as many as the task or the model has
        check_batch({"labels": torch.tensor([[found, -100]])}, Config())
    check_batch({"labels": torch.tensor([[8, -100]])}, Config(), 9)
    with pytest.raises(InputError, match="labels: expected ids from 0 to 2; got 4"):
        check_batch({"labels": torch.tensor([[4, -100]])}, Config(), 3)
    said = "labels: expected ids from 0 to 2"
    with pytest.raises(InputError, match=f"valid, examples .*: {said}"):
        check_split(Tagging(), "valid")
    refused(InputError, said, task=Tagging())


@pytest.mark.no_shapes
def test_a_pickle_with_code_is_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"step": Code()}, tmp_path / "checkpoint.pt")
    refused(
        CheckpointError, "not a readable checkpoint", output_dir=tmp_path, resume=True
    )
    assert not (tmp_path / "ran").exists()


@pytest.mark.no_shapes
def test_refuses_fp16_without_a_gpu():
    if not torch.accelerator.is_available():
        refused(ConfigError, "fp16 needs a GPU", replace(SHORT, mixed_precision="fp16"))


@pytest.mark.no_shapes
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    class Exploding(Toy):
        def loss(self, model, batch):
            loss, weight = super().loss(model, batch)["token"]
            self.calls = getattr(self, "calls", 0) + 1
            return {"token": (loss * (math.nan if self.calls == 5 else 1), weight)}

    refused(
        ConfigError,
        "the loss became nan at step 5",
        RECIPE,
        model=toy_model(0.0),
        task=Exploding(),
        output_dir=tmp_path,
    )
    assert (
        len(rows(tmp_path)) == 4
        and load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3
    )
    assert same(run(RECIPE, output_dir=tmp_path, resume=True)[0], run(RECIPE)[0])


class Wrong(Toy):
    """Changes the entry `name` of every batch."""

    def __init__(self, name, change):
        super().__init__()
        self.name, self.change = name, change

    def collate(self, examples):
        batch = super().collate(examples)
        return {**batch, self.name: self.change(batch.get(self.name))}


@pytest.mark.no_shapes
def test_refuses_tasks_without_batches_or_tokens():
    class Empty(Toy):
        def batches(self, epoch):
            return [] if epoch == self.epoch else super().batches(epoch)

    class Hollow(Toy):
        def batches(self, epoch):
            return [*super().batches(epoch)[:2], []]

    for epoch, recipe in ((0, SHORT), (1, RECIPE)):
        task = Empty()
        task.epoch = epoch
        said = f"a training batch in epoch {epoch}"
        refused(InputError, said, recipe, task=task)
    refused(InputError, "examples in batch 2 of epoch 0", task=Hollow())
    silent = Wrong("labels", lambda x: torch.full_like(x, -100))
    refused(InputError, "the batch of step 1 has nothing to predict", task=silent)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "name, change, said",
    [
        ("input_ids", lambda x: x + 100, "input_ids: expected ids from 0 to 11"),
        ("input_ids", lambda x: x - 1, "input_ids: expected ids from 0"),
        ("labels", lambda x: x * 9, "labels: expected ids"),
        ("attention_mask", lambda x: x & False, "attention_mask: expected at least"),
        ("input_ids", lambda x: x[:0], "input_ids: expected at least one"),
        ("extra", lambda x: torch.tensor([[math.inf]]), "extra: expected finite"),
    ],
)
def test_refuses_values_at_the_edge(name, change, said):
    refused(InputError, said, task=Wrong(name, change))


def test_good_batches_pass():
    check_batch(next(serve(Toy(), SHORT)), ToyModel.config)
    check_batch(
        {
            "input_ids": torch.tensor([[500]]),
            "images": torch.zeros(1, 3, 2, 2),
            "labels": torch.tensor([-100]),
        }
    )


@pytest.mark.no_shapes
def test_a_batch_is_any_nesting():
    class Config:
        num_classes = 3

    def batch(**changed):
        target = {
            "boxes": torch.zeros(0, 4),
            "labels": torch.zeros(0, dtype=torch.long),
        }
        full = {"boxes": torch.rand(2, 4), "labels": torch.tensor([0, 2])}
        images = [torch.rand(3, 4, 6), torch.rand(3, 5, 2)]
        mask = torch.ones(2, 5, 6, dtype=torch.bool)
        mask[1, 3:] = False  # padding
        found = {"images": images, "mask": mask, "targets": [target, full]}
        return {**found, "names": ["a", "b"], "scale": 0.5, **changed}

    check_batch(batch(), Config())
    nan, none = torch.full((3, 2, 2), math.nan), torch.zeros(2, 5, 6, dtype=torch.bool)
    for changed, said in (
        ({"images": [torch.rand(3, 2, 2), nan]}, "images.1: expected finite"),
        ({"images": []}, "images: expected at least one element; got none"),
        ({"targets": [{"labels": torch.tensor([3])}]}, "targets.0.labels: .* 0 to 2"),
        ({"targets": [{"labels": torch.tensor([-1])}]}, "targets.0.labels: .* got -1"),
        ({"mask": none}, "mask: expected at least one True in every row; row 0"),
    ):
        with pytest.raises(InputError, match=said):
            check_batch(batch(**changed), Config())
    with pytest.raises(InputError, match="batch: expected at least one element"):
        check_batch({})


# checkpoints


def test_atomic_write_keeps_the_old_file_when_interrupted(tmp_path):
    save_checkpoint(tmp_path / "c", {"step": 1})
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(tmp_path / "c") as file:
            file.write(b"half")
            raise KeyboardInterrupt
    assert load_checkpoint(tmp_path / "c") == {"step": 1} and [
        p.name for p in tmp_path.iterdir()
    ] == ["c"]


@pytest.mark.slow
def test_importing_the_package_does_not_import_accelerate():
    code = """
import sys, attn_notes, attn_notes.training.loop, attn_notes.training.experiments
print(*{"accelerate", "scipy", "matplotlib", "tensorboard"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == ""
