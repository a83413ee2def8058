"""Objects with their pixels: the loss of a model that makes it in its forward pass,
mask average precision, answers and their pictures."""

import numpy as np
import pytest
import torch
from detector_toys import Toy, bright
from torch import nn

from attn_notes.data.boxes import BoxPreprocessing
from attn_notes.data.detection_masks import (
    InstanceSegmentation,
    mask_precision,
    run_lengths,
    sized,
    top_segments,
)
from attn_notes.data.tasks import create_task, kind_of_data, load_task
from attn_notes.foundations.checks import ConfigError, InputError
from attn_notes.training.loop import train
from attn_notes.training.recipes import Recipe
from attn_notes.training.tasks import Task

P = BoxPreprocessing(24, 40, (0.5,) * 3, (0.5,) * 3)


class Learner(Toy):
    """Makes its loss when it is called, as torchvision's detectors do."""

    takes_targets = True
    loss_weights = {"class": 1.0, "l1": 1.0, "mask": 1.0}

    def forward(self, images, mask=None, targets=None):
        self.asked = targets
        if self.training:
            return {"sum": self.weight * sum(len(t["labels"]) for t in targets)}
        return super().forward(images, mask)

    def losses(self, outputs, targets, sizes):
        return dict.fromkeys(self.loss_weights, outputs["sum"] * len(targets))


def own(count=6):
    splits = {
        s: bright(count, seed=i, masks=True) for i, s in enumerate(("train", "valid"))
    }
    return InstanceSegmentation(["red", "yellow"], P, examples=splits)


def learner():
    model = Learner(masks=True)
    model.loss_weights = Learner.loss_weights
    return model


def batch_of(task, count=4):
    rows = task.dataset("valid")
    return task.collate([rows[i] for i in range(count)])


def test_it_is_a_task(tmp_path):
    task = own()
    assert isinstance(task, Task) and task.kind == "instance_segmentation"
    assert kind_of_data("scenes", "instance_segmentation") == task.kind
    scenes = create_task("instance_segmentation", "scenes", limit=3)
    batch = scenes.collate([scenes.dataset("train")[i] for i in range(3)])
    assert {*batch["targets"][0]} == {"boxes", "labels", "masks"}
    assert batch["targets"][0]["masks"].shape[1:] == (64, 64)
    scenes.save(tmp_path)
    assert type(load_task(tmp_path)) is InstanceSegmentation


def test_the_loss_is_made_in_training_alone():
    task, model = own(), learner()
    batch = batch_of(task)
    assert task.counts(batch) == {"class": 4, "focal": 4, "l1": 4, "giou": 4, "mask": 4}
    terms = task.loss(model.train(), batch)
    assert model.asked is batch["targets"]
    assert {k: v.item() for k, (v, w) in terms.items() if w} == dict.fromkeys(
        ("class", "l1", "mask"), 16.0
    )
    scores = task.evaluate(model.eval())
    assert model.asked is None and "loss" not in scores


def test_it_trains():
    task, model = own(), learner()
    recipe = Recipe(
        optimizer="adamw", learning_rate=1e-2, max_steps=3, batch_size=2, warmup_steps=0
    )
    history = train(model, task, recipe, progress=False)
    rows = history.curve("loss")[1]
    assert len(rows) == 3 and model.weight < 1 and rows[0] > rows[-1]


def test_scores_of_one_who_finds_all():
    """The right masks, and an empty one that is not sure."""
    scores = own().evaluate(learner().eval())
    assert scores["AP50"] == scores["mask_AP50"] == pytest.approx(1)
    assert scores["mask_AP"] == scores["mask_AP75"] == pytest.approx(1)


def test_mask_precision_by_hand():
    """Overlaps of 12/16 and of 6/16: six of the ten thresholds, and none."""
    true = torch.zeros(1, 8, 9, dtype=torch.bool)
    true[:, :4, :4] = True
    objects = [{"runs": run_lengths(true), "labels": [0], "iscrowd": [0]}]
    for rows, expected in ((3, 0.6), (1.5, 0.0)):
        mask = true.clone()
        mask[:, int(rows) :, :] = False
        if rows % 1:
            mask[:, int(rows), :2] = True
        found = [{"runs": run_lengths(mask), "labels": [0], "scores": [0.9]}]
        assert mask_precision(objects, found, 1)["mask_AP"] == pytest.approx(expected)
        found[0]["labels"] = [1]
        assert mask_precision(objects, found, 2)["mask_AP"] == pytest.approx(0)
    with pytest.raises(InputError, match="^found: expected one for each of 1 images"):
        mask_precision(objects, [], 1)


def test_run_lengths_and_back():
    from pycocotools import mask

    random = np.random.default_rng(0)
    masks = torch.from_numpy(random.random((3, 7, 5)) > 0.5)
    back = mask.decode(run_lengths(masks)).transpose(2, 0, 1)
    assert np.array_equal(back, masks.numpy())


def test_the_surest_lies_on_top():
    masks = torch.zeros(2, 2, 3, dtype=torch.bool)
    masks[0, 0], masks[1, :, 0] = True, True
    assert top_segments(masks).tolist() == [[1, 1, 1], [2, 0, 0]]
    assert top_segments(masks[:0]).tolist() == [[0] * 3] * 2
    assert sized(masks.float(), 4, 6)[0, 0].all()
    assert sized(masks[:0].float(), 4, 6).shape == (0, 4, 6)


def test_answers_with_pixels():
    task, model = own(), learner()
    images = [task.dataset("valid")[i][0] for i in range(2)]
    answers = task.predict(model, images)
    for given, answer in zip(images, answers, strict=True):
        (one,) = answer.objects
        assert one["pixels"] == int((given[0] > 0).sum())
        assert torch.equal(answer.segments > 0, given[0] > 0)
        assert answer.picture().size[0] >= 256


def test_another_kind_of_model_is_refused():
    with pytest.raises(ConfigError, match="expected a detector"):
        own().check_model(nn.Linear(1, 1))
