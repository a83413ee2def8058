"""The scenes' small DETR that ships, its backbone, the Faster R-CNN beside it, and how
what they find is counted."""

import pytest
import torch
from torch.testing import assert_close

from attn_notes import create_model, model_info
from attn_notes.data.tasks import load_task
from attn_notes.detection import detr_training_evidence as evidence
from attn_notes.zoo.checkpoints import shipped_weights


@pytest.fixture(scope="module")
def few():
    task = load_task(shipped_weights("detr_tiny"))
    rows = task.dataset("valid")
    some = [rows[i] for i in range(16)]
    return task, task.collate(some), some


def test_the_shipped_weights_find_digits(few):
    task, batch, some = few
    model = create_model("detr_tiny", pretrained=True)
    sizes = torch.full((16, 2), 64)
    with torch.no_grad():
        found = model.post_process(model(batch["images"]), sizes)
    true = [target for _, target, _ in some]
    scores = evidence.average_precision(true, found, 10, task.sizes)
    assert scores["AP50"] > 0.5 and task.classes == [*"0123456789"]


def test_the_panoptic_model_has_the_shipped_detector_in_it():
    state = create_model("detr_tiny_panoptic", pretrained=True).state_dict()
    for name, value in create_model("detr_tiny", pretrained=True).state_dict().items():
        assert_close(state[name], value, atol=1e-3, rtol=1e-3)


def test_the_backbone_comes_from_the_crops_and_learns_on():
    model, state = evidence.network(0), evidence.backbone_state()
    assert_close(
        model.backbone.layer3.conv2.weight, state["backbone.layer3.conv2.weight"]
    )
    raw = evidence.network(0, pretrained=False)
    for one in (model, raw):
        assert all(p.requires_grad for p in one.parameters())
    assert model.config == raw.config == model_info("detr_tiny").config


def test_a_crop_depends_on_its_number_alone():
    (first, label), (again, _) = evidence.crop("valid", 3), evidence.crop("valid", 3)
    assert first.shape == (32, 32, 3) and (first == again).all() and 0 <= label <= 10
    assert not (first == evidence.crop("train", 3)[0]).all()


def test_faster_rcnn_is_a_detector_of_this_book(few):
    _, batch, some = few
    model, sizes = evidence.faster_rcnn(0), torch.full((16, 2), 64)
    terms = model.train().losses(model(batch["images"]), batch["targets"], sizes)
    assert terms.keys() == model.loss_weights.keys()
    sum(terms.values()).backward()
    assert model.detector.rpn.head.cls_logits.weight.grad.abs().sum() > 0
    with torch.no_grad():
        found = model.eval().post_process(model(batch["images"]), sizes)
    labels = torch.cat([one["labels"] for one in found])
    assert (
        len(found) == 16 and not len(labels) or 0 <= labels.min() <= labels.max() < 10
    )


BOXES = torch.tensor(
    [[0.0, 0, 10, 10], [1, 0, 10, 10], [0, 1, 10, 10], [30, 30, 40, 40]]
)


def said(labels, scores):
    boxes, labels = BOXES[: len(labels)], torch.tensor(labels)
    return [{"boxes": boxes, "labels": labels, "scores": torch.tensor(scores)}]


@pytest.mark.parametrize(
    "labels, scores, count, kept",
    [
        ([1, 1, 2, 1], [0.9, 0.8, 0.7, 0.6], 2, 3),
        ([1, 1, 1, 1], [0.9, 0.4, 0.3, 0.6], 0, 2),
        ([1], [0.9], 0, 1),
    ],
)
def test_duplicates_are_counted_over_classes_and_suppressed_within(
    labels, scores, count, kept
):
    found = said(labels, scores)
    assert evidence.duplicates(found) == count
    assert len(evidence.suppress(found)[0]["labels"]) == kept


def test_every_layer_of_the_decoder_says_something(few):
    task, batch, _ = few
    model = create_model("detr_tiny", pretrained=True)

    class Some:
        def split_batches(self, split):
            return [(range(16), batch)]

        outputs = staticmethod(task.outputs)

    layers = evidence.find_by_layer(model, Some())
    last = evidence.find(model, Some())
    assert len(layers) == 3 and not model.training
    for one, other in zip(layers[-1], last, strict=True):
        assert_close(one["boxes"], other["boxes"])
    assert (layers[0][0]["boxes"] - last[0]["boxes"]).abs().max() > 0.1
