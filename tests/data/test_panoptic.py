"""Every pixel an object's: segments of masks, their quality, and answers."""

import json

import numpy as np
import pytest
import torch
from detector_toys import Toy, bright

from attn_notes.data.boxes import BoxPreprocessing
from attn_notes.data.panoptic import (
    PanopticSegmentation,
    merge_masks,
    panoptic_counts,
    panoptic_quality,
    segment_map,
)
from attn_notes.data.tasks import create_task, kind_of_data, load_task
from attn_notes.foundations.checks import InputError
from attn_notes.training.tasks import Task
from attn_notes.zoo.registry import model_info

P = BoxPreprocessing(24, 40, (0.5,) * 3, (0.5,) * 3)


def own(count=6):
    splits = {
        s: bright(count, seed=i, masks=True) for i, s in enumerate(("train", "valid"))
    }
    return PanopticSegmentation(["red", "yellow"], P, examples=splits)


def squares(*spans, size=12):
    """Masks (n size size) of 1 in squares, from, to, of a height."""
    masks = torch.zeros(len(spans), size, size)
    for mask, (first, last, height) in zip(masks, spans, strict=True):
        mask[first:last, first:last] = height
    return masks


def test_it_is_a_task():
    assert isinstance(own(), Task)
    assert kind_of_data("scenes", "panoptic_segmentation") == own().kind
    task = create_task("panoptic_segmentation", limit=4)
    rows = task.dataset("train")
    batch = task.collate([rows[i] for i in range(4)])
    for target in batch["targets"]:
        assert target["masks"].shape == (len(target["labels"]), 64, 64)
    objects = sum(len(target["labels"]) for target in batch["targets"])
    terms = ("l1", "giou", "mask_dice", "mask_focal")
    assert task.counts(batch) == {"class": 4, **dict.fromkeys(terms, objects)}


def test_a_pixel_is_of_the_highest_mask():
    masks = squares((0, 8, 0.8), (4, 12, 0.9), (9, 11, 0.95))
    numbers, kept = merge_masks(masks, torch.tensor([0, 1, 2]), 3)
    assert kept.tolist() == [0, 1, 2]
    assert numbers[0, 0] == 1 and numbers[5, 5] == 2 and numbers[10, 10] == 3
    assert numbers[0, 11] == 0
    filled, _ = merge_masks(masks, torch.tensor([0, 1, 2]), 3, background=False)
    assert filled.min() == 1


@pytest.mark.parametrize(
    "masks", [squares((3, 4, 0.9), (0, 8, 0.8)), squares((0, 8, 0.4), (0, 8, 0.8))]
)
def test_segments_of_few_pixels_are_dropped(masks):
    numbers, kept = merge_masks(masks, torch.tensor([0, 0]), 1)
    assert kept.tolist() == [1] and (numbers == 1).sum() == 64


def test_background_classes_are_one_segment_each():
    masks = squares((0, 4, 0.9), (6, 10, 0.9), (4, 6, 0.9))
    for label, segments in ((0, 3), (1, 2)):
        labels = torch.tensor([label, label, 0])
        numbers, kept = merge_masks(masks, labels, things=1)
        assert len(kept) == segments and numbers[0, 0] == 1
        assert (numbers[7, 7] == 1) == (label == 1)


def test_no_masks():
    numbers, kept = merge_masks(torch.zeros(0, 5, 6), torch.zeros(0).long(), 3)
    assert numbers.shape == (5, 6) and not numbers.any() and not len(kept)
    assert segment_map(torch.zeros(0, 5, 6, dtype=torch.bool)).dtype == torch.int64


def quality(found, true, labels=(0, 1), said=(0, 1)):
    pairs = (found > 0.5, said), (true > 0.5, labels)
    maps = [(segment_map(masks), torch.tensor(names)) for masks, names in pairs]
    return panoptic_quality(panoptic_counts(*maps, 3, 3))


def test_quality_by_hand():
    """One segment of two overlaps its object by 36/64, the other is of another
    class."""
    true, found = squares((0, 8, 1.0), (8, 12, 1.0)), squares((0, 6, 1.0), (8, 12, 1.0))
    assert quality(true, true) == {"PQ": 1, "SQ": 1, "RQ": 1}
    right = quality(found, true)
    assert right["RQ"] == 1 and right["PQ"] == pytest.approx((36 / 64 + 1) / 2)
    wrong = quality(found, true, said=(0, 2))  # one missed, one too many
    assert wrong["PQ"] == pytest.approx(36 / 64 / 3)
    assert quality(squares((0, 5, 1.0)), true[:1], (0,), (0,))["PQ"] == 0
    assert panoptic_quality(torch.zeros(4, 3)) == {}


def test_quality_is_that_of_torchmetrics():
    metrics = pytest.importorskip("torchmetrics.detection")
    random, counts = np.random.default_rng(0), []
    metric = metrics.PanopticQuality(
        {0, 1, 2}, {3}, allow_unknown_preds_category=True, return_per_class=True
    )
    for _ in range(5):
        pairs, maps = [], []
        first, labels = (
            random.integers(0, 4, 3),
            torch.from_numpy(random.permutation(3)),
        )
        for last in (first + 7, first + random.integers(4, 9, 3)):
            spans = [(a, b, 1.0) for a, b in zip(first, last, strict=True)]
            numbers = segment_map(squares(*spans) > 0.5)
            pairs.append((numbers, labels))
            kinds = torch.cat([torch.tensor([3]), labels])[numbers]
            maps.append(torch.stack([kinds, numbers], -1)[None])
        counts.append(panoptic_counts(*pairs, 3, 3))
        metric.update(*maps)
    expected = metric.compute()[0, :3].mean().item()
    assert panoptic_quality(sum(counts))["PQ"] == pytest.approx(expected)
    assert 0 < expected < 1


def test_scores_of_one_who_finds_all():
    scores = own().evaluate(Toy(masks=True))
    for name in ("AP50", "PQ", "SQ", "RQ"):
        assert scores[name] == pytest.approx(1)
    task = own()
    task.threshold = 0.95  # nothing is so sure
    assert task.evaluate(Toy(masks=True))["PQ"] == 0


def test_shares_of_evaluation_are_the_whole():
    task, parts, model = own(40), [], Toy(masks=True)
    whole = task.evaluate(model)
    for rank in (0, 1):
        task.evaluate(model, "valid", rank, 2, lambda mine: parts.extend(mine) or mine)
    assert task.evaluate(model, "valid", 0, 2, lambda _: parts) == whole


def test_segments_in_pixels_of_the_picture():
    task, (images, targets) = own(), bright(masks=True)
    large = images[1].repeat_interleave(2, 1).repeat_interleave(2, 2)
    (found,) = task.predict(Toy(masks=True), [large])
    (one,) = found
    true = targets[1]["masks"][0].repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert found.segments.shape == (48, 48) and found.segments.max() == 1
    assert ((found.segments == 1) != true).sum() < 0.2 * true.sum()
    assert one["pixels"] == (found.segments == 1).sum()
    assert found.picture().size == (288, 288)
    line = json.loads(task.line("a.png", found))
    assert line["objects"][0]["label"] == "yellow"
    assert not len(task.predict(Toy(masks=True), [large], threshold=0.95)[0])


def test_saved_and_loaded(tmp_path):
    task = create_task("panoptic_segmentation", "scenes", limit=5)
    task.save(tmp_path)
    assert type(load_task(tmp_path)) is PanopticSegmentation


def test_classes_of_coco_fill_the_image(tmp_path):
    info, names = (
        model_info("detr_resnet50_panoptic"),
        {str(i): f"{i}" for i in range(250)},
    )
    (tmp_path / "config.json").write_text(json.dumps({"id2label": names}))
    task = PanopticSegmentation.of_model(info, tmp_path)
    assert (task.things, task.background, len(task.classes)) == (91, False, 250)
    found = {"scores": torch.ones(2), "labels": torch.tensor([95, 95])}
    found |= {"masks": squares((0, 4, 0.3), (4, 12, 0.4)), "boxes": torch.ones(2, 4)}
    numbers, kept = task.segments(found, (12, 12), 0.5)
    assert (numbers == 1).all() and len(kept["labels"]) == 1  # all sky


@pytest.mark.no_shapes
def test_masks_that_are_none():
    images, targets = bright(2)
    for masks, said in ((None, "expected masks"), (torch.ones(1, 3, 3), "of shape")):
        more = {} if masks is None else {"masks": masks.bool()}
        given = {"train": (images, [target | more for target in targets])}
        with pytest.raises(InputError, match=f"train, example 0: .*{said}"):
            PanopticSegmentation(["red", "yellow"], P, examples=given)
