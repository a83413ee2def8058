"""Scenes with digits in them: the same ones always, and boxes that fit."""

import pytest
import torch
from torchvision.ops import box_iou, masks_to_boxes

from attn_notes.data import scenes as module
from attn_notes.data.image_sets import PHOTOGRAPHS
from attn_notes.data.scenes import (
    HELD_OUT,
    digit_crops,
    scenes,
)
from attn_notes.foundations.checks import ConfigError, InputError


@pytest.fixture(scope="module")
def some():
    return scenes("train", 40)


def test_a_scene_depends_on_split_seed_and_number_alone(some):
    later = scenes("train", 2, start=7)
    assert later.images.equal(some.images[7:9])
    for name in ("boxes", "labels", "masks"):
        assert later.target(1)[name].equal(some.target(8)[name])
    others = [scenes("train", 40, seed=1), scenes("valid", 40)]
    for other in others:
        same = [a.equal(b) for a, b in zip(other.images, some.images, strict=True)]
        assert not any(same)


@pytest.mark.parametrize("size", [64, 48])
def test_boxes_are_those_of_the_pixels(size):
    made = scenes("valid", 20, size)
    assert made.images.shape == (20, 3, size, size)
    assert made.images.dtype == torch.uint8 and len(made) == 20
    for i in range(20):
        _, target = made[i]
        masks, boxes = target["masks"], target["boxes"]
        ends = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
        assert boxes.equal(ends) and 1 <= len(boxes) <= 4
        assert masks.sum(0).max() <= 1  # one pixel, one digit
        assert target["area"].equal((boxes[:, 2:] - boxes[:, :2]).prod(1))
        assert 0 <= target["labels"].min() and target["labels"].max() < 10
        assert not target["iscrowd"].any() and target["image_id"] == i


def test_small_and_large_ones_that_hardly_overlap(some):
    targets = some.targets
    sides = torch.cat([(t["boxes"][:, 3] - t["boxes"][:, 1]) for t in targets])
    assert sides.min() < 10 and sides.max() > 24
    shared = [box_iou(t["boxes"], t["boxes"]).triu(1).max() for t in targets]
    assert max(shared) < 0.2
    counts = torch.tensor([len(t["labels"]) for t in targets]).bincount()
    assert (counts[1:] > 3).all()
    assert "masks" not in targets[0]


@pytest.mark.no_shapes
def test_photographs_and_digits_are_of_one_split_alone(monkeypatch):
    seen = {"train": set(), "valid": set()}
    monkeypatch.setattr(module, "photograph", lambda name: name)
    monkeypatch.setattr(module.Image, "fromarray", lambda name: name)
    for split in seen:
        seen[split] = {*module._backgrounds.__wrapped__(split)}
    assert seen["valid"] == {*HELD_OUT} and not seen["train"] & seen["valid"]
    assert seen["train"] | seen["valid"] == {*PHOTOGRAPHS}


def test_a_digit_shows_on_what_is_below():
    """Light on dark, dark on light: at least 25 of 255 in the mean."""
    made = scenes("train", 40)
    for i in range(40):
        image, target = made[i]
        grey = image.float().mean(0)
        for mask, (x0, y0, x1, y1) in zip(
            target["masks"], target["boxes"].int().tolist(), strict=True
        ):
            part, ink = grey[y0:y1, x0:x1], mask[y0:y1, x0:x1]
            if ink.sum() > 30 and (~ink).sum() > 30:
                assert (part[ink].mean() - part[~ink].mean()).abs() > 25


def test_crops_for_a_backbone():
    images, labels = digit_crops("train", 60, 32)
    again, _ = digit_crops("train", 60, 32)
    assert images.shape == (60, 3, 32, 32) and images.equal(again)
    assert labels.min() >= 0 and labels.max() == 10 and len(labels.unique()) == 11


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "error, options",
    [
        (ConfigError, {"split": "test"}),
        (ConfigError, {"count": 0}),
        (ConfigError, {"seed": -1}),
        (ConfigError, {"start": -1}),
        (InputError, {"size": 31}),
    ],
)
def test_impossible_scenes(error, options):
    with pytest.raises(error, match=[*options][0]):
        scenes(**({"count": 1} | options))
