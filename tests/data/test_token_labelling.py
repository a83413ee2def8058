"""Labels of every token: maps of a network, MixToken, and the loss by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attn_notes.data.image_classification import ImageClassification
from attn_notes.data.tasks import create_task, kind_of_data, load_task
from attn_notes.data.token_labelling import (
    TOKEN_WEIGHT,
    TokenLabelling,
    draw_box,
    mix_labels,
)
from attn_notes.foundations.checks import ConfigError
from attn_notes.training.loop import train
from attn_notes.training.recipes import Augmentation, Recipe
from attn_notes.training.tasks import Task
from attn_notes.zoo.factory import create_model

SMALL = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
SMALL |= {"embed_dim": 12, "depth": 1, "num_heads": 2, "stem_width": 4}


def student(**change):
    torch.manual_seed(0)
    return create_model("lvvit_book", **{**SMALL, **change}).train()


class Cnn(nn.Module):
    """A map of a quarter of the places, its mean, a linear layer."""

    def __init__(self, channels=1):
        super().__init__()
        self.map = nn.Sequential(nn.Conv2d(channels, 6, 3, 2, 1), nn.BatchNorm2d(6))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 10)

    def forward(self, images):
        return self.head(self.pool(self.map(images).relu_()).flatten(1))


def cnn():
    torch.manual_seed(1)
    return Cnn()


def labelling(teacher=None, mixed=False, **options):
    task = create_task(
        "token_labelling", "digits", teacher=teacher, augment=False, **options
    )
    task.mix_tokens = mixed
    return task


def batch_of(task, n=6):
    rows = task.dataset("train")
    return task.collate([rows[i] for i in range(0, 100 * n, 100)])


def test_it_is_a_task():
    task = labelling()
    assert isinstance(task, Task) and task.kind == "token_labelling"
    assert kind_of_data("mnist", task.kind) == task.kind


def test_the_map_is_the_networks_own_answer_place_by_place():
    task, net = labelling(cnn()), cnn().eval()
    images = batch_of(task)["images"]
    said, scores = task.annotator.look(images)
    assert torch.equal(said, net(images)) and scores.shape == (6, 10, 4, 4)
    states = net.map(images).relu()
    by_hand = torch.stack(
        [net.head(states[:, :, y, x]) for y in range(4) for x in range(4)], 1
    )
    assert torch.allclose(scores.flatten(2).mT, by_hand, atol=1e-6)
    assert torch.allclose(scores.mean((2, 3)), said, atol=1e-6)
    labels = task.annotator.labels(images, (2, 2))
    pooled = by_hand.view(6, 2, 2, 2, 2, 10).mean((2, 4)).flatten(1, 2)
    assert torch.allclose(labels, pooled.softmax(-1), atol=1e-6)
    assert not task.annotator.teacher.model._forward_hooks


@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed"])
@pytest.mark.parametrize("taught", [False, True], ids=["image", "map"])
def test_the_loss_by_hand(taught, mixed):
    """The image's label for the class token, each patch's own for its token."""
    task, net = labelling(cnn() if taught else None, mixed), student()
    task.setup(Recipe(label_smoothing=0.1))
    batch = batch_of(task)
    torch.manual_seed(4)
    found = task.loss(net, batch)
    torch.manual_seed(4)
    box = draw_box(4, 4) if mixed else None
    assert not mixed or (box[2] - box[0]) * (box[3] - box[1]) > 0
    output = net(batch["images"], box=box)
    y = F.one_hot(batch["labels"], 10).float()
    of_patches = 0.9 * y[:, None].expand(6, 16, 10) + 0.01
    if taught:
        of_patches = task.annotator.labels(batch["images"], (4, 4))
    if mixed:
        share = 1 - (box[2] - box[0]) * (box[3] - box[1]) / 16
        y = share * y + (1 - share) * y.flip(0)
    cross = lambda z, target: -(target * z.log_softmax(-1)).sum()
    expected = cross(output.logits, 0.9 * y + 0.01)
    expected += TOKEN_WEIGHT * cross(output.token_logits, of_patches) / 16
    total = sum(term * weight for term, weight in found.values())
    assert torch.allclose(total, expected, rtol=1e-5)
    assert task.counts(batch) == {"class": 6, "token": 6} and TOKEN_WEIGHT == 0.5


def test_boxes_are_those_of_cutmix():
    torch.manual_seed(0)
    boxes = torch.tensor([draw_box(8, 6) for _ in range(3000)]).double()
    top, left, bottom, right = boxes.T
    assert (top <= bottom).all() and (left <= right).all() and top.min() == 0
    assert bottom.max() == 8 and right.max() == 6
    area = ((bottom - top) * (right - left)).mean() / 48
    assert 0.2 < area < 0.4  # 1/2 of lambda, less what lies outside
    labels = mix_labels(torch.tensor([0, 1, 2]), (0, 1, 2, 4), 24, 3)
    expected = torch.tensor([[0.75, 0, 0.25], [0, 1, 0], [0.25, 0, 0.75]])
    assert torch.allclose(labels, expected)


def test_a_map_that_knows_what_is_where_teaches_it():
    """The left half of the image has the class 0, the right half 1: of the labels of
    images alone nobody could know."""

    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.map, self.head = nn.Identity(), nn.Linear(10, 10, bias=False)
            self.head.weight.data = torch.eye(10)

        def forward(self, images):
            x = torch.zeros(len(images), 10, 2, 2)
            x[:, 0, :, 0] = x[:, 1, :, 1] = 9
            return self.head(self.map(x).mean((2, 3)))

    task, net = labelling(Halves()), student()
    batch = batch_of(task)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        sum(term * w for term, w in task.loss(net, batch).values()).backward()
        optimizer.step()
    said = net(batch["images"]).token_logits.argmax(-1).unflatten(1, (4, 4))
    assert (said[:, :, :2] == 0).all() and (said[:, :, 2:] == 1).all()


def test_a_run_with_mixed_images(tmp_path):
    task, net = labelling(cnn(), True, limit=64), student()
    task.augment = True
    recipe = Recipe(
        max_steps=4,
        batch_size=16,
        warmup_steps=1,
        augmentation=Augmentation(mixup=0.8),
    )
    history = train(net, task, recipe, progress=False)
    assert {"class", "token"} <= history[0].keys()
    task.save(tmp_path)
    assert type(load_task(tmp_path)) is ImageClassification
    assert TokenLabelling.kind == "token_labelling"


def test_image_classification_teaches_both_heads():
    task, net = create_task("image_classification", "digits", augment=False), student()
    batch = batch_of(task)
    output = net(batch["images"])
    both = [
        F.cross_entropy(output.logits, batch["labels"], reduction="sum"),
        F.cross_entropy(
            output.token_logits.flatten(0, 1),
            batch["labels"].repeat_interleave(16),
            reduction="sum",
        )
        / 16,
    ]
    (found, weight) = task.loss(net, batch)["class"]
    assert weight == 1 and torch.allclose(found, sum(both) / 2, rtol=1e-5)


class NoMean(nn.Module):
    """Ends in a linear layer over all places."""

    def __init__(self):
        super().__init__()
        self.map, self.head = nn.Conv2d(1, 2, 3), nn.Linear(72, 10)

    def forward(self, images):
        return self.head(self.map(images).flatten(1))


@pytest.mark.no_shapes
@pytest.mark.parametrize("teacher", [NoMean(), nn.Flatten()], ids=["linear", "none"])
def test_networks_without_a_map_are_refused(teacher):
    with pytest.raises(ConfigError, match="teacher: expected a network that ends in"):
        labelling(teacher)


def test_models_without_a_second_head_are_refused():
    task = labelling()
    with pytest.raises(ConfigError, match="model: expected one with a head for its to"):
        train(student(token_labelling=False), task, Recipe(max_steps=1), progress=False)
