"""The digits that the small DeiT learned, its teacher, and what a student is asked."""

import pytest
import torch
from torch.testing import assert_close

from attn_notes import create_model
from attn_notes.data.tasks import load_task
from attn_notes.training.recipes import Recipe
from attn_notes.vision.deit_training_evidence import (
    CAREFUL,
    WAYS,
    cosines,
    digits,
    load_teacher,
    percent,
    student,
)
from attn_notes.zoo.checkpoints import shipped_weights

NAME = "deit_book_distilled"


def batch_of(parts, epoch=0, **options):
    task = digits(parts, **options)
    task.setup(Recipe(batch_size=30))
    torch.manual_seed(0)
    numbers = task.batches(epoch)[0]
    return task, numbers, task.collate([task.dataset("train")[int(i)] for i in numbers])


def test_the_shipped_weights_tell_digits_apart():
    task, model = load_task(shipped_weights(NAME)), create_model(NAME, pretrained=True)
    assert task.evaluate(model, "valid")["accuracy"] > 0.8
    assert len(task.dataset("train")) == 300
    assert percent(load_teacher(), task) > 95


def test_mixed_labels_are_shares_and_held_out_digits_are_as_they_are():
    task, numbers, batch = batch_of(CAREFUL)
    assert_close(batch["labels"].sum(-1), torch.ones(len(numbers)))
    assert ((batch["labels"] > 0).sum(-1) == 2).any()
    again = [task.collate([task.dataset("valid")[0]])["images"] for _ in range(2)]
    assert torch.equal(*again)
    assert batch_of(())[2]["labels"].shape == (30,)


def test_repeated_digits_stand_three_times_in_a_batch_each_distorted_by_itself():
    _, numbers, batch = batch_of(("repeated",))
    assert len(numbers) == 30 and numbers[:10] == numbers[10:20] == numbers[20:]
    assert not torch.equal(batch["images"][:10], batch["images"][10:20])


@pytest.mark.parametrize("way", WAYS)
def test_what_each_way_asks_of_the_two_heads(way):
    task, _, batch = batch_of((), learns_from=way)
    model = student(0, "token" in way, ()).train()
    terms = task.loss(model, batch)
    sum(loss * weight for loss, weight in terms.values()).backward()
    assert ("distillation" in terms) == ("labels" not in way)
    assert model.head.weight.grad.abs().max() > 0
    if "token" in way:
        assert model.distillation_head.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in load_teacher().parameters())


def test_a_teacher_that_is_right_asks_for_the_label(monkeypatch):
    task, _, batch = batch_of((), learns_from="hard, token")
    alone, _, _ = batch_of((), learns_from="labels, two tokens")
    model, labels = student(0, True, ()).train(), batch["labels"]
    teacher = task.teacher.model
    monkeypatch.setattr(teacher, "forward", lambda images: torch.eye(10)[labels])
    terms = task.loss(model, batch)
    total = sum(loss * weight for loss, weight in terms.values())
    assert_close(total, alone.loss(model, batch)["class"][0])


def test_tokens_that_are_one_have_a_cosine_of_one():
    model = student(0, True, ()).eval()
    images = torch.randn(3, 1, 28, 28)
    assert abs(cosines(model, images)[0]) < 0.7
    model.distillation_token.data = model.class_token.data.clone()
    model.positions.weight.data[1] = model.positions.weight.data[0]
    assert cosines(model, images) == [1.0] * 3
