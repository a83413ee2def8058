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
    assert_close(batch["targets"].sum(-1), torch.ones(len(numbers)))
    assert ((batch["targets"] > 0).sum(-1) == 2).any()
    again = [task.collate([task.dataset("valid")[0]])["images"] for _ in range(2)]
    assert torch.equal(*again)
    _, numbers, batch = batch_of(())
    assert torch.equal(batch["targets"].argmax(-1), batch["labels"])


def test_repeated_digits_stand_three_times_in_a_batch_each_distorted_by_itself():
    _, numbers, batch = batch_of(("repeated",))
    assert len(numbers) == 30 and numbers[:10] == numbers[10:20] == numbers[20:]
    assert not torch.equal(batch["images"][:10], batch["images"][10:20])


@pytest.mark.parametrize("way", WAYS)
def test_what_each_way_asks_of_the_two_heads(way):
    task, _, batch = batch_of(())
    task.learns_from = way
    task.teacher = None if way.startswith("labels") else load_teacher()
    model = student(0, "token" in way, ()).train()
    loss, weight = task.loss(model, batch)["class"]
    loss.backward()
    assert weight == 1 and loss > 0
    assert model.head.weight.grad.abs().max() > 0
    if "token" in way:
        assert model.distillation_head.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in load_teacher().parameters())


def test_a_teacher_that_is_right_asks_for_the_label():
    task, _, batch = batch_of(())
    model = student(0, True, ()).train()
    task.learns_from = "labels, two tokens"
    labels = task.loss(model, batch)["class"][0]

    class Right(torch.nn.Module):
        def forward(self, images):
            return 9.0 * batch["targets"]

    task.learns_from, task.teacher = "hard, token", Right()
    assert_close(task.loss(model, batch)["class"][0], labels)


def test_tokens_that_are_one_have_a_cosine_of_one():
    model = student(0, True, ()).eval()
    images = torch.randn(3, 1, 28, 28)
    assert abs(cosines(model, images)[0]) < 0.7
    model.distillation_token.data = model.class_token.data.clone()
    model.positions.weight.data[1] = model.positions.weight.data[0]
    assert cosines(model, images) == [1.0] * 3
