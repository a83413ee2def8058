"""Three kinds of task train through one loop: images, a list of targets, text."""

import signal
from dataclasses import replace

import pytest
import torch
from torch import nn
from toys import TOYS, Boxes, Examples, toy

from attn_notes.foundations.checks import ConfigError, InputError
from attn_notes.training.loop import train
from attn_notes.training.recipes import Recipe
from attn_notes.training.tasks import Task, TrainingTask, check_batch

RECIPE = Recipe(
    learning_rate=0.02, max_steps=9, batch_size=4, evaluate_every=3, checkpoint_every=2
)


def weights(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("name", TOYS)
def test_trains(name):
    task, model = toy(name)
    assert isinstance(task, Task) and isinstance(task, TrainingTask)
    history = train(model, task, replace(RECIPE, max_steps=30), progress=False)
    first, last = history[2], history[-1]
    metrics = {key for key in first if key.startswith("valid_")}
    terms = set(task.counts(task.collate(task.dataset("valid"))))
    assert metrics == {f"valid_{term}" for term in terms}
    assert all(last[key] < first[key] for key in metrics)
    assert terms & set(first) == (terms if len(terms) > 1 else set())
    for row in history if len(terms) > 1 else ():
        assert row["loss"] == pytest.approx(row["number"] + 5 * row["place"])


@pytest.mark.parametrize("name", TOYS)
def test_saves_resumes_and_evaluates(name, tmp_path):
    whole_task, whole = toy(name)
    expected = train(whole, whole_task, RECIPE, progress=False)
    task, model = toy(name)

    class Stopped(type(task)):
        calls = 0

        def loss(self, model, batch):
            self.calls += 1
            if self.calls == 5:
                signal.raise_signal(signal.SIGINT)
            return super().loss(model, batch)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(model, Stopped(), RECIPE, tmp_path, progress=False)
    finally:
        signal.signal(signal.SIGINT, before)
    model = TOYS[name][1]()
    history = train(model, task, RECIPE, tmp_path, resume=True, progress=False)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            model.state_dict().values(), whole.state_dict().values(), strict=True
        )
    )
    same = [{k: v for k, v in row.items() if k != "seconds"} for row in expected]
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in history] == same
    task.save(tmp_path)
    assert type(task).load(tmp_path).evaluate(model) == {
        key.removeprefix("valid_"): value
        for key, value in history[-1].items()
        if key.startswith("valid_")
    }


@pytest.mark.parametrize("name", TOYS)
def test_evaluation_shared_among_processes_is_that_of_one(name):
    task, model = toy(name)
    model.eval()
    whole, parts = task.evaluate(model), []

    def keep(mine):
        parts.extend(mine)
        return mine

    for world_size in (2, 3, 8):  # 8 processes, 7 examples: one has none
        parts.clear()
        for rank in range(world_size):
            task.evaluate(model, "valid", rank, world_size, keep)
        shared = task.evaluate(model, "valid", 0, world_size, lambda _: parts)
        assert shared == pytest.approx(whole, rel=1e-5)


@pytest.mark.no_shapes
@pytest.mark.parametrize("name", TOYS)
def test_every_tensor_of_a_batch_is_looked_at(name):
    task, model = toy(name)
    batch = task.collate(task.dataset("train")[:6])
    check_batch(batch, model.config)
    changed = 0
    leaves, spec = torch.utils._pytree.tree_flatten(batch)
    for i, leaf in enumerate(leaves):
        if not leaf.numel() or leaf.dtype == torch.bool or leaf.dim() == 0:
            continue
        wrong = torch.full_like(leaf, torch.nan if leaf.is_floating_point() else 99)
        broken = torch.utils._pytree.tree_unflatten(
            [wrong if j == i else x for j, x in enumerate(leaves)], spec
        )
        with pytest.raises(InputError, match="expected (finite|ids from 0)"):
            check_batch(broken, model.config)
        changed += 1
    assert changed >= 2


# two terms with different counts


DOUBLE = Recipe(
    optimizer="sgd", learning_rate=0.05, max_steps=6, batch_size=8, evaluate_every=2
)


def double():
    task, model = toy("boxes")
    return task, model.double()


def test_accumulated_terms_are_those_of_one_batch():
    """Of 22 images, batches of 8, 8, 6 against 4, 4 | 4, 4 | 4, 2: the boxes of the
    halves differ in number, some have none."""
    task, model = double()
    whole = train(model, task, DOUBLE, progress=False)
    task, parts_model = double()
    halves = replace(DOUBLE, batch_size=4, gradient_accumulation_steps=2)
    parts = train(parts_model, task, halves, progress=False)
    for a, b in zip(whole, parts, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == pytest.approx(
            {k: v for k, v in b.items() if k != "seconds"}, rel=1e-12
        )
    torch.testing.assert_close(
        weights(model), weights(parts_model), rtol=1e-12, atol=1e-14
    )
    naive = [r["place"] for r in whole]
    assert len(set(naive)) == len(naive) and min(naive) > 0


def test_a_step_is_the_weighted_sum_of_the_means_of_its_terms():
    task, model = double()
    recipe = replace(DOUBLE, max_steps=1)
    (row,) = train(model, task, recipe, progress=False)
    task, by_hand = double()
    task.setup(recipe)
    examples = task.dataset("train")
    batch = task.collate([examples[i] for i in task.batches(0)[0]])
    terms = task.loss(by_hand, batch)
    boxes = sum(len(target["boxes"]) for target in batch["targets"])
    loss = terms["number"][0] / 8 + 5.0 * terms["place"][0] / boxes
    loss.backward()
    torch.optim.SGD(by_hand.parameters(), lr=0.05).step()
    assert row["number"] == pytest.approx(terms["number"][0].item() / 8, rel=1e-12)
    assert row["place"] == pytest.approx(terms["place"][0].item() / boxes, rel=1e-12)
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(weights(model), weights(by_hand), rtol=1e-12, atol=0)


def test_a_term_that_counts_nothing_adds_nothing():
    class Bare(Boxes):
        def example(self, random):
            image, target = super().example(random)
            none = {"boxes": target["boxes"][:0], "labels": target["labels"][:0]}
            return image, none

    _, model = double()
    history = train(model, Bare(), DOUBLE, progress=False)
    assert all(row["place"] == 0 and row["loss"] == row["number"] for row in history)


@pytest.mark.no_shapes
def test_refuses_terms_that_do_not_fit():
    class Renamed(Boxes):
        def loss(self, model, batch):
            terms = super().loss(model, batch)
            return {"number": terms["number"], "boxes": terms["place"]}

    class Changing(Boxes):
        calls = 0

        def counts(self, batch):
            self.calls += 1
            counts = super().counts(batch)
            return counts if self.calls % 2 else {"number": counts["number"]}

    class Reserved(Boxes):
        def counts(self, batch):
            return {"loss": 1, "place": 1}

    two = replace(DOUBLE, gradient_accumulation_steps=2)
    for task, recipe, said in (
        (Renamed(), DOUBLE, "the terms that were counted, .*'place'.*got .*'boxes'"),
        (Changing(), two, "the same terms in every batch"),
        (Reserved(), DOUBLE, "other names of terms .*'loss'"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            train(toy("boxes")[1].double(), task, recipe, progress=False)
        assert "\n" not in str(caught.value)


# batches loaded by other processes


class Augmented(Examples):
    """Examples that draw random numbers as they are made."""

    kind = "augmented"

    def dataset(self, split):
        return self

    def __len__(self):
        return self.sizes["train"]

    def __getitem__(self, i):
        import random

        import numpy as np

        noise = torch.rand(3) + random.random() + np.random.rand()
        return torch.cat([torch.tensor([float(i)]), noise])

    def collate(self, examples):
        return {"x": torch.stack(examples) + torch.rand(4)}

    def counts(self, batch):
        return {"square": len(batch["x"])}

    def loss(self, model, batch):
        return {"square": (model(batch["x"]).square().sum(), 1.0)}

    def evaluate(self, model, *_):
        return {}


def augmented(recipe, folder=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.3), nn.Linear(3, 1))
    return model, train(model, Augmented(), recipe, folder, progress=False, **options)


def test_workers_load_the_same_batches_in_the_same_order(tmp_path):
    recipe = replace(RECIPE, max_steps=14)  # two epochs and a bit
    here, history = augmented(recipe)
    there, history_there = augmented(replace(recipe, num_workers=2))
    losses = [row["loss"] for row in history]
    assert losses == [row["loss"] for row in history_there] and len(set(losses)) == 14
    assert torch.equal(weights(here), weights(there))
    other, _ = augmented(replace(recipe, seed=1))
    assert not torch.equal(weights(here), weights(other))


def test_with_workers_ctrl_c_ends_at_a_step_and_the_run_goes_on(tmp_path, monkeypatch):
    import os

    recipe = replace(RECIPE, max_steps=14, num_workers=2, checkpoint_every=None)
    whole, _ = augmented(recipe)

    class Stopping(Augmented):
        calls = 0

        def loss(self, model, batch):
            self.calls += 1
            if self.calls == 8:
                os.kill(os.getpid(), signal.SIGINT)
            return super().loss(model, batch)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.3), nn.Linear(3, 1))
    try:
        with pytest.raises(KeyboardInterrupt, match="step 8"):
            train(model, Stopping(), recipe, tmp_path, progress=False)
    finally:
        signal.signal(signal.SIGINT, before)
    resumed, history = augmented(recipe, tmp_path, resume=True)
    assert torch.equal(weights(resumed), weights(whole)) and len(history) == 14


def test_augmentation_leaves_the_random_numbers_of_the_run_alone():
    """Dropout draws the same, whatever the examples draw; and numpy's and Python's
    generators are the caller's."""
    import random

    import numpy as np

    class Still(Augmented):
        def __getitem__(self, i):
            return torch.full((4,), float(i))

        def collate(self, examples):
            return {"x": torch.stack(examples)}

    class Wasteful(Still):
        def collate(self, examples):
            torch.rand(100), np.random.rand(7), random.random()
            return super().collate(examples)

    found = []
    for task in (Still(), Wasteful()):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.3), nn.Linear(3, 1))
        history = train(model, task, RECIPE, progress=False)
        found.append(
            ([row["loss"] for row in history], np.random.rand(), random.random())
        )
    assert found[0] == found[1]


# what an accelerator waits for


class Reads:
    """Counts the times that a value of a tensor is read by the program."""

    names = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")

    def __init__(self, monkeypatch):
        self.count = 0
        for name in self.names:
            monkeypatch.setattr(torch.Tensor, name, self.counting(name))

    def counting(self, name):
        original = getattr(torch.Tensor, name)

        def read(*arguments, **options):
            self.count += 1
            return original(*arguments, **options)

        return read


def test_an_accelerator_waits_every_25_steps_only(monkeypatch, tmp_path):
    """The steps of a run on the CPU that is told it is on an accelerator."""
    from attn_notes.training import loop, stream

    class Constant(Augmented):
        def batches(self, epoch):
            return [list(range(i, i + 4)) for i in range(0, 20, 4)]

    monkeypatch.setattr(stream, "check_batch", lambda *_: None)  # looks on the host
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.3), nn.Linear(3, 1))
    recipe = Recipe(
        optimizer="sgd",
        momentum=0.9,
        max_steps=70,
        batch_size=4,
        max_grad_norm=1.0,
        ema_decay=0.9,
        weight_decay=0.1,
        gradient_accumulation_steps=2,
        evaluate_every=40,
        checkpoint_every=None,
    )
    assert loop.flush_every(torch.device("cpu")) == 1
    as_on_cuda = loop.flush_every(torch.device("cuda"))
    monkeypatch.setattr(loop, "flush_every", lambda _: as_on_cuda)
    run = loop.Run(model, Constant(), recipe, tmp_path)
    with loop._opened(run, None):
        run.update()  # opens the loader
        reads, after = Reads(monkeypatch), []
        for _ in range(59):
            before = reads.count
            run.update()
            after.append((reads.count - before, len(run.history)))
        monkeypatch.undo()
    assert [i for i, (n, _) in enumerate(after, start=2) if n] == [25, 40]
    rows = [n for _, n in after]
    assert rows == [0] * 23 + [25] * 15 + [40] * 20 + [40]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", TOYS)
def test_a_gpu_is_not_waited_for(name):
    from attn_notes.training import loop

    task, model = toy(name)
    recipe = replace(RECIPE, max_steps=60, evaluate_every=None, ema_decay=0.9)
    run = loop.Run(model, task, replace(recipe, checkpoint_every=None))
    with loop._opened(run, None):
        run.update()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(20):
                run.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert run.history == []
