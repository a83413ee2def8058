"""Set prediction: the assignment is the cheapest of all, the loss is the authors', and
targets that no detector can be trained on are refused."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import generalized_box_iou, generalized_box_iou_loss

import attn_notes as an
from attn_notes.detection.set_prediction import (
    Matches,
    SetWeights,
    check_masks,
    check_targets,
    corners,
    gather_objects,
    generalized_iou,
    mask_losses,
    match,
    matching_cost,
    pad_masks,
    scored_boxes,
    set_losses,
)

SIZE = torch.tensor([[40, 60]])


def random_boxes(*shape):
    """Middle and size in shares of an image, of every overlap."""
    return torch.cat([torch.rand(*shape, 2), 0.05 + torch.rand(*shape, 2)], -1).double()


def predictions(layers=2, images=2, queries=5, classes=3, seed=0):
    torch.manual_seed(seed)
    logits = torch.randn(layers, images, queries, classes + 1).double()
    return logits, random_boxes(layers, images, queries)


def targets(*counts, classes=3, size=(40, 60), seed=0):
    torch.manual_seed(seed)
    scale = torch.tensor(size).flip(0).repeat(2)
    found = []
    for n in counts:
        start = torch.rand(n, 2).double() * 0.5
        boxes = torch.cat([start, start + 0.1 + 0.4 * torch.rand(n, 2)], -1) * scale
        found.append({"boxes": boxes, "labels": torch.randint(classes, (n,))})
    sizes = torch.tensor([size] * len(counts))
    return found, sizes, gather_objects(found, sizes)


def pairs(matches):
    return {tuple(row) for row in torch.stack(list(matches), 1).tolist()}


# ---- overlap


def test_giou_is_torchvisions_in_value_and_gradient():
    a, b = corners(random_boxes(30)), corners(random_boxes(20))
    every = generalized_iou(a[:, None], b[None])
    assert torch.equal(every, generalized_box_iou(a, b))
    assert every.min() > -1 and every.max() < 1 and (every < 0).any()
    assert torch.allclose(generalized_iou(a, a), torch.ones(30).double())
    x, y = (a[:20].clone().requires_grad_() for _ in range(2))
    (1 - generalized_iou(x, b)).sum().backward()
    generalized_box_iou_loss(y, b, "sum", eps=0).backward()
    assert (x.grad - y.grad).abs().max() < 1e-12 and x.grad.abs().max() > 1


# ---- matching


@settings(max_examples=25)
@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    seed=st.integers(0, 10**6),
    costs=st.tuples(*[st.floats(0, 5)] * 3),
)
def test_matching_is_the_cheapest_of_all_assignments(counts, seed, costs):
    weights = SetWeights(*costs)
    logits, boxes = predictions(2, len(counts), 5, seed=seed)
    _, _, objects = targets(*counts, seed=seed)
    found = match(logits, boxes, objects, weights)
    assert len(found.layer) == 2 * sum(counts)
    starts = [sum(counts[:i]) for i in range(len(counts))]
    for layer, (i, n) in itertools.product(range(2), enumerate(counts)):
        own = slice(starts[i], starts[i] + n)
        cost = matching_cost(
            logits[layer, i],
            boxes[layer, i],
            objects.labels[own],
            objects.boxes[own],
            weights,
        )
        chosen = [(q, o) for p, j, q, o in pairs(found) if (p, j) == (layer, i)]
        assert {o for _, o in chosen} == set(range(own.start, own.stop))
        assert len({q for q, _ in chosen}) == n
        total = sum(cost[q, o - starts[i]] for q, o in chosen)
        columns = range(n)
        best = min(
            sum(cost[q, o] for q, o in zip(rows, columns, strict=True))
            for rows in itertools.permutations(range(5), n)
        )
        assert float(total) == pytest.approx(float(best), abs=1e-9)


def test_matching_equals_transformers_and_gets_no_gradient():
    reference = pytest.importorskip("transformers.loss.loss_for_object_detection")
    logits, boxes = predictions(1, 3, 8)
    _, _, objects = targets(2, 0, 4)
    logits.requires_grad_(), boxes.requires_grad_()
    found = match(logits, boxes, objects)
    assert not any(x.requires_grad for x in found)
    theirs = reference.HungarianMatcher(1, 5, 2)(
        {"logits": logits[0], "pred_boxes": boxes[0]},
        [
            {"class_labels": labels, "boxes": places}
            for labels, places in zip(
                objects.labels.split(objects.counts),
                objects.boxes.split(objects.counts),
                strict=True,
            )
        ],
    )
    starts = [0, 2, 2]
    assert pairs(found) == {
        (0, i, q, starts[i] + o)
        for i, (rows, columns) in enumerate(theirs)
        for q, o in zip(rows.tolist(), columns.tolist(), strict=True)
    }


def test_the_gradient_is_that_of_the_loss_with_the_pairs_held():
    """Matching moves no gradient: a small step changes the loss by gradient times step
    as long as the pairs stay."""
    logits, boxes = predictions()
    _, _, objects = targets(2, 3)
    both = [x.clone().requires_grad_() for x in (logits, boxes)]
    held = match(*both, objects)

    def total(logits, boxes, pairs):
        return sum(set_losses(logits, boxes, objects, pairs).values())

    gradients = torch.autograd.grad(total(*both, held), both)
    step = [1e-7 * torch.randn_like(x) for x in both]
    moved = [x.detach() + s for x, s in zip(both, step, strict=True)]
    again = match(*moved, objects)
    assert pairs(again) == pairs(held)
    change = total(*moved, again) - total(logits, boxes, held)
    expected = sum((g * s).sum() for g, s in zip(gradients, step, strict=True))
    assert float(change) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_prediction_that_is_no_number_is_taken_last(bad):
    logits, boxes = predictions(1, 1, 5)
    _, _, objects = targets(4)
    boxes[0, 0, 2] = bad
    assert 2 not in match(logits, boxes, objects).query.tolist()


def test_order_of_queries_and_objects_does_not_matter():
    logits, boxes = predictions()
    found, sizes, objects = targets(3, 2)
    expected = set_losses(logits, boxes, objects, match(logits, boxes, objects))
    order = torch.tensor([3, 0, 4, 2, 1])
    turned = [{k: v.flip(0) for k, v in one.items()} for one in found]
    objects = gather_objects(turned, sizes)
    logits, boxes = logits[:, :, order], boxes[:, :, order]
    again = set_losses(logits, boxes, objects, match(logits, boxes, objects))
    torch.testing.assert_close(again, expected)


# ---- the loss


def test_the_loss_equals_transformers():
    reference = pytest.importorskip("transformers.loss.loss_for_object_detection")
    layers, images = 3, 3
    logits, boxes = predictions(layers, images, 7)
    found, _, objects = targets(2, 0, 4)
    terms = set_losses(logits, boxes, objects, match(logits, boxes, objects))
    criterion = reference.ImageLoss(
        reference.HungarianMatcher(1, 5, 2), 3, 0.1, ["labels", "boxes"]
    ).double()
    places = objects.boxes.split(objects.counts)
    rows = [
        {"class_labels": one["labels"], "boxes": box}
        for one, box in zip(found, places, strict=True)
    ]
    theirs = [
        criterion({"logits": a, "pred_boxes": b}, rows)
        for a, b in zip(logits, boxes, strict=True)
    ]
    for ours, name, factor in (
        ("class", "loss_ce", images),
        ("l1", "loss_bbox", 6),
        ("giou", "loss_giou", 6),
    ):
        expected = factor * sum(one[name] for one in theirs)
        assert float(terms[ours]) == pytest.approx(float(expected), rel=1e-7)


def test_a_batch_without_objects_still_teaches_that_there_are_none():
    logits, boxes = predictions()
    _, _, objects = targets(0, 0)
    logits.requires_grad_(), boxes.requires_grad_()
    terms = set_losses(logits, boxes, objects, match(logits, boxes, objects))
    assert not terms["l1"].any() and not terms["giou"].any()
    sum(terms.values()).backward()
    assert (logits.grad[..., -1] < 0).all() and not boxes.grad.any()


def test_no_object_weighs_a_tenth():
    logits = torch.zeros(1, 1, 4, 3).double()
    logits[..., 2, :] = torch.tensor([2.0, 0, 0])
    boxes = random_boxes(1, 1, 4)
    _, _, objects = targets(1, classes=1)
    only = Matches(*(torch.tensor([i]) for i in (0, 0, 2, 0)))
    terms = set_losses(logits, boxes, objects, only)
    p = logits[0, 0, 2].softmax(0)[0]
    expected = (-p.log() + 0.3 * torch.tensor(3.0).log()) / 1.3
    assert float(terms["class"]) == pytest.approx(float(expected), rel=1e-7)


@pytest.mark.parametrize("n", [0, 3])
def test_losses_of_masks_equal_transformers(n):
    reference = pytest.importorskip("transformers.loss.loss_for_object_detection")
    torch.manual_seed(0)
    masks = torch.randn(n, 5, 6, requires_grad=True)
    wanted = (torch.rand(n, 20, 24) > 0.7).float()
    terms = mask_losses(masks, wanted)
    terms["mask_dice"].backward()
    if not n:
        assert not any(term.any() for term in terms.values())
        return
    large = torch.nn.functional.interpolate(
        masks[:, None], (20, 24), mode="bilinear", align_corners=False
    ).flatten(1)
    dice = reference.dice_loss(large, wanted.flatten(1), 1)
    focal = reference.sigmoid_focal_loss(large, wanted.flatten(1), 1)
    torch.testing.assert_close(terms, {"mask_dice": dice, "mask_focal": focal})


def test_masks_are_padded_to_the_largest_image():
    sizes = torch.tensor([[3, 5], [4, 2]])
    found = [
        {"masks": torch.ones(2, 3, 5).bool()},
        {"masks": torch.ones(1, 4, 2).bool()},
    ]
    assert pad_masks(found, sizes).sum((1, 2)).tolist() == [15, 15, 8]
    assert pad_masks(found, sizes).shape == (3, 4, 5)


# ---- predictions


def test_boxes_in_pixels_the_best_first():
    logits, boxes = (x[0] for x in predictions(1, 2, 6))
    sizes = torch.tensor([[40, 60], [30, 20]])
    for i, found in enumerate(scored_boxes(logits, boxes, sizes)):
        assert (found["scores"].diff() <= 0).all() and found["labels"].max() < 3
        height, width = sizes[i].tolist()
        middle = boxes[i, found["queries"], :2]
        assert torch.allclose(
            (found["boxes"][:, :2] + found["boxes"][:, 2:]) / 2,
            middle * torch.tensor([width, height]),
        )
        share = logits[i].softmax(-1)[found["queries"], found["labels"]]
        assert torch.equal(share, found["scores"])


# ---- bad input


def one(boxes=((1.0, 2.0, 9.0, 8.0),), labels=(0,)):
    return [
        {
            "boxes": torch.tensor(boxes).view(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
        }
    ]


NAN = float("nan")


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "found, words",
    [
        ([], "targets: expected one for each image, 1; got 0"),
        (one(((5.0, 2, 5, 8),)), "x0 < x1 and y0 < y1 of a box; got .5.0, 2.0, 5.0"),
        (one(((5.0, 8, 9, 2),)), "x0 < x1 and y0 < y1"),
        (one(((NAN, 2, 9, 8),)), "x0 < x1 and y0 < y1"),
        (one(((1.0, 2, 62, 8),)), "boxes inside their image; got .1.0, 2.0, 62.0"),
        (one(((1.0, -3, 9, 8),)), "boxes inside their image"),
        (one(labels=(3,)), "a label from 0 to 2; got 3"),
        (one(labels=(-1,)), "a label from 0 to 2; got -1"),
        (one(((1.0, 2, 9, 8),) * 3, (0,) * 3), "at most 2 objects.*; got 3"),
        (one(labels=(0, 1)), r"boxes.*\(n, 4\), and labels"),
        ([{"boxes": torch.zeros(1, 4)}], r"boxes.*\(n, 4\), and labels"),
        ([{**one()[0], "labels": torch.zeros(1)}], "int64"),
    ],
)
def test_targets_that_no_detector_learns_from(found, words):
    with pytest.raises(an.InputError, match=words):
        check_targets(found, SIZE, num_classes=3, num_queries=2)


def test_what_is_allowed():
    check_targets(one((), ()), SIZE, 3, 2)
    check_targets(one(((0.0, 0, 60.5, 40.5),)), SIZE, 3, 2)  # rounding
    with pytest.raises(an.InputError, match=r"targets\[1\]: .*a label"):
        check_targets(one() + one(labels=(7,)), SIZE.repeat(2, 1), 3, 2)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "masks", [None, torch.zeros(1, 40, 60), torch.zeros(2, 40, 60) > 0]
)
def test_masks_that_do_not_fit(masks):
    with pytest.raises(an.InputError, match=r"targets\[0\], masks: expected a boolean"):
        check_masks([{**one()[0], "masks": masks}], SIZE)


@pytest.mark.parametrize("field", ["class_cost", "no_object_weight"])
def test_weights_below_zero(field):
    with pytest.raises(an.ConfigError, match=f"^{field}: expected a finite number"):
        SetWeights(**{field: -1.0})
