"""Faster and Mask R-CNN on Swin: equal to torchvision's own on the same backbone and
weights; labels moved in one place; files of the authors; bad input."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import (
    paste_masks_in_image,
    project_masks_on_boxes,
)
from torchvision.ops import MultiScaleRoIAlign

import attn_notes as an
from attn_notes.detection.swin_rcnn import SIZES, SwinRCNN
from attn_notes.detection.swin_rcnn_formats import background_first
from attn_notes.detection.swin_rcnn_parts import (
    SwinRCNNConfig,
    make_pool,
    paste_masks,
    pool_given,
)
from attn_notes.training.recipes import make_optimizer
from attn_notes.zoo.factory import count_parameters, create_model

LAYOUTS = Path(__file__).parent / "layouts"
SMALL = SwinRCNNConfig(  # of another size in every respect
    num_classes=3,
    masks=True,
    embed_dim=8,
    depths=(2, 1, 2),
    num_heads=(1, 2, 2),
    window_size=3,
    mlp_ratio=2.0,
    drop_path_rate=0.0,
    hidden_size=12,
    box_size=20,
    mask_layers=2,
    anchor_scale=3,
    box_cells=4,
    mask_cells=6,
    rpn_samples=32,
    box_samples=16,
    candidates=60,
    proposals=25,
    detections=9,
    score_threshold=0.02,
)
LOSSES = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}


def shake(model, seed=0):
    """Noise on every weight, so that scores and boxes differ."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def small(**change):
    return shake(SwinRCNN(replace(SMALL, **change)).double().eval())


def images(sides=((64, 64), (50, 70)), seed=0):
    random = torch.Generator().manual_seed(seed)
    made = (torch.randn(3, *side, generator=random) for side in sides)
    return [image.double() for image in made]


def objects(some, classes=3, masks=True):
    """Two objects in each image, and none in the last."""
    found = []
    for i, image in enumerate(some):
        h, w = image.shape[1:]
        n = 2 if i + 1 < len(some) else 0
        boxes = torch.tensor([[3.0, 5.0, w / 2, h - 9.0], [w / 3, 4.0, w - 2.0, 30.0]])
        target = {"boxes": boxes[:n], "labels": torch.tensor([classes - 1, 0])[:n]}
        if masks:
            pixels = torch.zeros(n, h, w, dtype=torch.bool)
            for mask, (x0, y0, x1, y1) in zip(
                pixels, boxes.int().tolist()[:n], strict=True
            ):
                mask[y0:y1, x0:x1] = True
            target["masks"] = pixels
        found.append(target)
    return found


class Pyramid(nn.Module):
    """Backbone and FPN as torchvision wants them: a dict of maps."""

    def __init__(self, model):
        super().__init__()
        self.model, self.out_channels = [model], SMALL.hidden_size

    def forward(self, x):
        return self.model[0].pyramid(x)


def theirs(model, **transform):
    """torchvision's own detector with the weights of ours."""
    c = model.config
    names, k = ["0", "1", "2"], c.num_classes + 1
    side = 7 * c.patch_size * c.anchor_scale // 4
    level = {"canonical_scale": side * 4, "canonical_level": 4}
    sides = tuple((c.anchor_scale * s,) for s in (4, 8, 16, 32))
    given = dict(
        rpn_anchor_generator=AnchorGenerator(sides, ((0.5, 1.0, 2.0),) * 4),
        box_roi_pool=MultiScaleRoIAlign(names, c.box_cells, 0, **level),
        box_head=TwoMLPHead(c.hidden_size * c.box_cells**2, c.box_size),
        box_predictor=FastRCNNPredictor(c.box_size, k),
        rpn_pre_nms_top_n_train=c.candidates,
        rpn_pre_nms_top_n_test=c.candidates // 2,
        rpn_post_nms_top_n_train=c.proposals,
        rpn_post_nms_top_n_test=c.proposals,
        rpn_batch_size_per_image=c.rpn_samples,
        box_batch_size_per_image=c.box_samples,
        box_score_thresh=c.score_threshold,
        box_detections_per_img=c.detections,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        size_divisible=16,
        **({"min_size": 50, "max_size": 70} | transform),
    )
    made = FasterRCNN
    if c.masks:
        made, width = MaskRCNN, c.hidden_size
        given |= dict(
            mask_roi_pool=MultiScaleRoIAlign(names, c.mask_cells, 0, **level),
            mask_head=MaskRCNNHeads(width, (width,) * c.mask_layers, 1),
            mask_predictor=MaskRCNNPredictor(width, width, k),
        )
    reference = made(Pyramid(model), **given).double()
    state = model.state_dict()
    own = {n: x for n, x in state.items() if n.startswith(("rpn.", "roi_heads."))}
    reference.load_state_dict(own)
    return reference


@pytest.fixture(params=[True, False], ids=["mask", "faster"])
def pair(request):
    model = small(masks=request.param)
    return model, theirs(model)


# ---- equal to torchvision


def masks_of_boxes(model):
    """The masks that the heads give, before they are pasted, of each call."""
    kept = []
    model.roi_heads.register_forward_hook(
        lambda _, given, answer: kept.extend(one.get("masks") for one in answer[0])
    )
    return kept


def test_detections_equal_torchvision(pair):
    """An image of the transform's size and one padded beside it; masks as the head
    gives them, in cells of their boxes."""
    model, reference = pair
    some = images(((50, 70), (50, 64)))
    cells = masks_of_boxes(model), masks_of_boxes(reference)
    with torch.no_grad():
        expected, found = reference.eval()(some), model(some)
    assert sum(len(one["boxes"]) for one in found) > 4
    for a, b, own, other in zip(found, expected, *cells, strict=True):
        assert a.keys() == b.keys()
        assert torch.equal(a["labels"] + 1, b["labels"])  # 0 is theirs for background
        for key in ("boxes", "scores"):
            assert (a[key] - b[key]).abs().max() < 1e-10, key
        if "masks" in a:
            assert a["masks"].shape == b["masks"].shape
            assert (own - other).abs().max() < 1e-10


def test_losses_and_gradients_equal_torchvision(pair):
    model, reference = pair
    some = images(((50, 70), (50, 64), (50, 70)))
    wanted = objects(some, masks=model.config.masks)
    moved = [
        {**t, "labels": t["labels"] + 1, "boxes": t["boxes"].double()} for t in wanted
    ]
    grads = []
    for detector, targets in ((model, wanted), (reference, moved)):
        # of what is drawn to learn from; their transform draws too
        detector.rpn.register_forward_pre_hook(lambda *_: torch.manual_seed(3) and None)
        model.zero_grad(), reference.zero_grad()
        losses = detector.train()(some, targets=targets)
        sum(losses.values()).backward()
        heads = {
            n: p.grad for n, p in detector.named_parameters() if "backbone" not in n
        }
        body = [p.grad.clone() for p in model.backbone.parameters()]
        grads.append((losses, heads, body))
    (own, mine, body), (other, yours, theirs_body) = grads
    assert own.keys() == other.keys() >= LOSSES
    assert max(abs(own[k] - other[k]).item() for k in own) < 1e-10
    shared = [n for n in mine if not n.startswith("fpn.")]
    assert max((mine[n] - yours[n]).abs().max().item() for n in shared) < 1e-10
    gaps = [(a - b).abs().max() for a, b in zip(body, theirs_body, strict=True)]
    assert max(gaps) < 1e-10 and max(a.abs().max() for a in body) > 0


def test_torchvisions_resizing_gives_the_same_as_resizing_before():
    """Its transform takes the image to its size, and the boxes back."""
    model = small()
    reference = theirs(model, min_size=50, max_size=70).eval()
    (large,) = images(((100, 140),))
    with torch.no_grad():
        (expected,) = reference([large])
        resized = nn.functional.interpolate(
            large[None], (50, 70), mode="bilinear", align_corners=False
        )
        (found,) = model(resized)
    assert torch.equal(found["labels"] + 1, expected["labels"])
    assert (2 * found["boxes"] - expected["boxes"]).abs().max() < 1e-10


# ---- masks and their pixels


def strokes():
    """Boxes and true masks of rings that are two pixels wide, of many sizes, some at
    the edge of the image."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    boxes, masks = [], []
    for i, side in enumerate((6, 9, 13, 18, 25, 40)):
        for x0, y0 in ((0, 64 - side), (3 * i, 2 * i), (64 - side, 5)):
            inside = (x >= x0) & (x < x0 + side) & (y >= y0) & (y < y0 + side)
            middle = (x >= x0 + 2) & (x < x0 + side - 2)
            middle &= (y >= y0 + 2) & (y < y0 + side - 2)
            masks.append(inside & ~middle)
            boxes.append([x0, y0, x0 + side, y0 + side])
    return torch.tensor(boxes).float(), torch.stack(masks)


@pytest.mark.parametrize("cells, least", [(14, 0.8), (28, 0.95)])
def test_true_masks_cut_and_pasted_are_true(cells, least):
    """What the head learns, pasted, is the mask; torchvision's pasting is not."""
    boxes, masks = strokes()
    numbers = torch.arange(len(masks))
    cut = project_masks_on_boxes(masks, boxes, numbers, cells)[:, None]

    def overlap(paste):
        pasted = paste(cut, boxes, (64, 64))[:, 0] >= 0.5
        return (pasted & masks).sum((1, 2)) / (pasted | masks).sum((1, 2))

    small = boxes[:, 2] - boxes[:, 0] <= 25  # two pixels are a cell and more
    assert overlap(paste_masks)[small].min() > least
    gained = overlap(paste_masks) - overlap(paste_masks_in_image)
    assert gained[small].mean() > 0.15


def test_pasting_is_interpolation_inside_the_box():
    """A mask that rises evenly from left to right does so in the image."""
    cells = (torch.arange(10).double() + 0.5) / 10
    mask = cells.expand(1, 1, 10, 10)
    boxes = torch.tensor([[3.0, 5.0, 23.0, 15.0]]).double()
    (pasted,) = paste_masks(mask, boxes, (20, 30))[0]
    rising = (torch.arange(3, 23).double() - 3) / 20
    wanted = rising.clamp(0.05, 0.95).expand(10, 20)
    assert (pasted[5:15, 3:23] - wanted).abs().max() < 1e-12
    pasted[5:15, 3:23] = 0
    assert not pasted.any()
    none = paste_masks(mask[:0], boxes[:0], (20, 30))
    assert none.shape == (0, 1, 20, 30)


def test_a_perfect_detector_scores_a_hundred():
    from attn_notes.detection.swin_rcnn_evidence import scenes_task

    task, numbers = scenes_task(), range(40)
    found, rendered = [], []
    for one in task.truth("valid", numbers):
        n, boxes = len(one["labels"]), one["boxes"].float()
        one = one | {"scores": torch.ones(n)}
        cut = project_masks_on_boxes(one["masks"], boxes, torch.arange(n), 28)
        pasted = paste_masks(cut[:, None], boxes, (64, 64))[:, 0] >= 0.5
        found.append(one)
        rendered.append(one | {"masks": pasted})
    for answers, least in ((found, 1.0), (rendered, 0.99)):
        said = task.scores("valid", [task.summary("valid", numbers, answers)])
        assert said["AP"] == 1.0 and said["mask_AP"] >= least


def test_the_maps_are_swins_and_the_sums_of_the_definition():
    model = small()
    (image,) = images(((64, 48),))
    with torch.no_grad():
        C = model.backbone.forward_pyramid(image[None])
        found = model.pyramid(image[None])
        P, total = [None] * 3, None
        for i in (2, 1, 0):
            lateral = model.fpn.inner_blocks[i](C[i])
            if total is not None:  # nearest: every value four times
                total = total.repeat_interleave(2, 2).repeat_interleave(2, 3)
            total = lateral if total is None else lateral + total
            P[i] = model.fpn.layer_blocks[i](total)
    assert [*found] == ["0", "1", "2", "pool"]
    for name, own in zip(found, (*P, P[2][:, :, ::2, ::2]), strict=True):
        assert (found[name] - own).abs().max() < 1e-10


def test_boxes_given_are_pooled_as_boxes_found():
    c, maps = SMALL, {}
    torch.manual_seed(0)
    for i, stride in enumerate(c.strides):
        maps[str(i)] = torch.randn(2, 5, 192 // stride, 192 // stride).double()
    corners = 40 * torch.rand(2, 30, 2)
    boxes = torch.cat([corners, corners + 2 + 150 * torch.rand(2, 30, 2)], 2).double()
    pool = make_pool(c, 5)
    expected = pool(maps, [*boxes], [(192, 192)] * 2)
    assert torch.equal(pool_given(pool, maps, boxes), expected)
    levels = pool.map_levels([boxes.flatten(0, 1)])
    side = boxes[..., 2:] - boxes[..., :2]
    by_hand = (side.prod(-1).sqrt() / (7 * 4 * 3 // 4)).log2().floor().clamp(0, 2)
    assert torch.equal(levels, by_hand.flatten().long())
    assert levels.unique().tolist() == [0, 1, 2]


def test_given_boxes_get_the_scores_that_found_ones_have():
    """The last stage again, on its own proposals."""
    model = small(proposals=9)
    (image,) = images(((64, 64),))
    kept = []
    model.roi_heads.register_forward_pre_hook(lambda _, args: kept.append(args[1]))
    with torch.no_grad():
        (found,) = model([image])
        said = model([image], proposals=torch.stack(kept[0]))
    scores = said.class_logits[0].softmax(-1)[:, 1:]
    best = scores.max()
    assert (found["scores"].max() - best).abs() < 1e-12
    assert said.mask_logits.shape == (1, 9, 4, 12, 12)


# ---- invariants


def test_company_changes_nothing():
    model, some = small(), images(((64, 64), (50, 70), (31, 40)))
    with torch.no_grad():
        together = model(some)
        alone = [model([image])[0] for image in some]
    h, w = (max(x.shape[i] for x in some) for i in (1, 2))
    assert (h, w) == (64, 70)
    for a, b in zip(together, alone, strict=True):
        if len(a["boxes"]) and a["boxes"].shape == b["boxes"].shape:
            assert a["masks"].shape == b["masks"].shape
    only = torch.stack([some[0]] * 3)
    with torch.no_grad():
        for one in model(only):
            for key, value in alone[0].items():
                assert torch.allclose(one[key], value, atol=1e-12)


def test_a_mask_is_a_list_of_images():
    model, some = small(), images()
    batch = torch.zeros(2, 3, 64, 70, dtype=torch.float64)
    mask = torch.zeros(2, 64, 70, dtype=torch.bool)
    for i, image in enumerate(some):
        batch[i, :, : image.shape[1], : image.shape[2]] = image
        mask[i, : image.shape[1], : image.shape[2]] = True
    with torch.no_grad():
        for a, b in zip(model(batch, mask), model(some), strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)
            inside = a["masks"].shape[-2:]
            assert inside in {(64, 64), (50, 70)}
            ends = torch.tensor(inside[::-1]).repeat(2)
            assert (a["boxes"] >= 0).all() and (a["boxes"] <= ends).all()


def test_every_parameter_learns_and_tables_do_not_decay():
    model, some = small().train(), images()
    torch.manual_seed(0)
    sum(model(some, targets=objects(some)).values()).backward()
    still = [k for k, p in model.named_parameters() if not p.grad.abs().max() > 0]
    assert not still
    _, spared = make_optimizer(
        model, an.model_info("mask_rcnn_swin_tiny").recipes["paper"]
    ).param_groups
    ids = {id(p) for p in spared["params"]}
    assert id(model.backbone.stages[0].blocks.layers[0].position_bias.table) in ids
    assert id(model.fpn.inner_blocks[0][0].weight) not in ids


def test_mixed_precision_keeps_boxes_in_32_bits():
    model, (image,) = small().float(), images(((64, 64),))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = model([image.float()])
        objectness, deltas = model.rpn.head([torch.zeros(1, 12, 4, 4)])
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    assert objectness[0].dtype == deltas[0].dtype == torch.float32


# ---- the sizes


def test_counts_and_products():
    for name, c in SIZES.items():
        info = an.model_info(name)
        model = create_model(name, device="meta").eval()
        assert count_parameters(model) == info.parameters
        given = {k: x.to("meta") for k, x in SwinRCNN.example_inputs(c, 1).items()}
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            model(**given)
        assert flops.get_total_flops() // 2 == info.macs
        if "parameters" in info.reported:
            assert f"{info.parameters / 1e6:.0f}M" == info.reported["parameters"]
    mask, faster = (
        an.model_info(f"{kind}_rcnn_swin_tiny").parameters
        for kind in ("mask", "faster")
    )
    head = 4 * (9 * 256 * 256 + 256) + (4 * 256 * 256 + 256) + 81 * 257
    assert mask - faster == head


def test_the_authors_settings():
    c, recipe = SwinRCNNConfig(), an.model_info("mask_rcnn_swin_tiny").recipes["paper"]
    assert (recipe.learning_rate, recipe.weight_decay) == (1e-4, 0.05)
    assert (recipe.batch_size, recipe.max_steps) == (16, 36 * 118_272 // 16)
    assert c.strides == (4, 8, 16, 32) and c.anchor_scale == 8
    model = create_model("mask_rcnn_swin_tiny", device="meta")
    assert model.rpn.anchor_generator.sizes == tuple((32 * 2**i,) for i in range(5))
    assert model.roi_heads.box_roi_pool.canonical_scale == 56  # 224 at stride 16
    assert model.roi_heads.box_coder.weights == (10.0, 10.0, 5.0, 5.0)


# ---- files


def test_saved_and_read_back(tmp_path):
    model, some = small().float(), [x.float() for x in images()]
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        again = create_model("mask_rcnn_swin_tiny", tmp_path)
    assert again.config == model.config
    for a, b in zip(again(some), model(some), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_faster_from_mask_and_back(tmp_path):
    """The parts that the other has not are said, and left."""
    mask = small().float()
    mask.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        faster = create_model("faster_rcnn_swin_tiny", tmp_path, masks=False)
    assert not faster.roi_heads.has_mask() and len(said) <= 1
    assert torch.equal(
        faster.rpn.head.cls_logits.weight, mask.rpn.head.cls_logits.weight
    )


WIDTHS = {96: 12, 192: 24, 384: 48, 768: 96, 288: 36, 576: 72, 1152: 144, 2304: 288}
WIDTHS |= {1536: 192, 3072: 384, 256: 8, 12544: 392, 1024: 16}


def test_the_authors_files(tmp_path):
    """Every name and shape of the released network, its widths small; a Swin alone."""
    keys = json.loads((LAYOUTS / "mask_rcnn_swin.json").read_text())["keys"]
    torch.manual_seed(0)
    state = {}
    for key, shape in keys.items():
        counted = "relative_position_index" in key
        shape = shape if counted else [WIDTHS.get(n, n) for n in shape]
        state[key] = torch.zeros(shape).long() if counted else torch.rand(shape) + 0.1
    torch.save({"meta": {"epoch": 36}, "state_dict": state}, tmp_path / "mask.pth")
    narrow = dict(embed_dim=12, hidden_size=8, box_size=16)
    with warnings.catch_warnings(action="error"):
        model = create_model("mask_rcnn_swin_tiny", tmp_path / "mask.pth", **narrow)
    assert not model.not_loaded
    heads = model.roi_heads
    said, own = state["roi_head.bbox_head.fc_cls.bias"], heads.box_predictor.cls_score
    assert torch.equal(own.bias[0], said[80]) and torch.equal(own.bias[1:], said[:80])
    of_boxes = heads.box_predictor.bbox_pred.weight
    assert torch.equal(of_boxes[4:], state["roi_head.bbox_head.fc_reg.weight"])
    assert not of_boxes[:4].any()
    first, last = (model.backbone.norms[0], model.backbone.norm)
    assert torch.equal(first.weight, state["backbone.norm0.weight"])
    assert torch.equal(last.weight, state["backbone.norm3.weight"])
    body = {
        k.removeprefix("backbone."): v
        for k, v in state.items()
        if k.startswith("backbone.") and not k.startswith("backbone.norm")
    }
    body |= {f"norm.{k}": state[f"backbone.norm3.{k}"] for k in ("weight", "bias")}
    torch.save({"model": body}, tmp_path / "swin.pth")
    with pytest.warns(an.CheckpointWarning, match="fpn"):
        alone = create_model("faster_rcnn_swin_tiny", tmp_path / "swin.pth", **narrow)
    assert torch.equal(alone.backbone.norm.weight, last.weight)


def test_background_is_moved():
    state = {
        "a.box_predictor.cls_score.bias": torch.arange(4.0),
        "a.mask_predictor.mask_fcn_logits.weight": torch.ones(3, 2, 1, 1),
    }
    moved = background_first(state)
    assert moved["a.box_predictor.cls_score.bias"].tolist() == [3, 0, 1, 2]
    assert moved["a.mask_predictor.mask_fcn_logits.weight"].shape == (4, 2, 1, 1)


# ---- bad input


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop(), "one for each image"),
        (lambda t: t[0].pop("masks"), r"targets\[0\]: expected boxes, labels, masks"),
        (lambda t: t[0].update(boxes=torch.zeros(3, 4)), "expected boxes"),
        (lambda t: t[0].update(labels=torch.tensor([1, 3])), "labels from 0 to 2"),
        (lambda t: t[0]["boxes"].fill_(2.0), "x0 < x1"),
        (lambda t: t[0].update(masks=torch.zeros(2, 9, 9).bool()), "expected masks"),
    ],
    ids=["few", "no masks", "boxes", "labels", "empty", "masks"],
)
def test_bad_targets(change, words):
    some = images()
    targets = objects(some)
    change(targets)
    with pytest.raises(an.InputError, match=words) as caught:
        small().train()(some, targets=targets)
    assert "; got" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "given",
    [[], [torch.zeros(1, 8, 8)], torch.zeros(2, 1, 64, 64), "image"],
    ids=["none", "one channel", "batch", "text"],
)
def test_bad_images(given):
    with pytest.raises(
        an.InputError, match=r"^images(\[0\])?: expected .*; got|tensor"
    ):
        small()(given)


@pytest.mark.no_shapes
def test_no_targets_in_training():
    with pytest.raises(an.InputError, match="targets: expected one for each image"):
        small().train()(images())


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "change", [dict(depths=()), dict(num_heads=(3, 2, 2)), dict(rpn_samples=1)], ids=str
)
def test_bad_configurations(change):
    with pytest.raises(an.ConfigError, match=f"{next(iter(change))}: expected .*; got"):
        replace(SMALL, **change)
