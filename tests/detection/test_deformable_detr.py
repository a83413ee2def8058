"""Deformable DETR: its sampling equal to a loop over points, the models equal to
transformers and to the authors' code on the same weights; what must not change anything
does not; and the files that it is read from."""

import json
import math
import re
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import attn_notes as an
from attn_notes.detection.deformable_attention import (
    DeformableAttention,
    Levels,
    sample_levels,
)
from attn_notes.detection.deformable_detr import (
    PAPER,
    SIZES,
    DeformableDETR,
    DeformableDETRConfig,
)
from attn_notes.detection.deformable_detr_formats import HF_FORMAT, OFFICIAL_FORMAT
from attn_notes.detection.focal_classes import best_pairs, focal_costs, focal_losses
from attn_notes.detection.set_prediction import Matches, Objects
from attn_notes.foundations.attention import record_attention
from attn_notes.foundations.masks import as_batch
from attn_notes.training.recipes import make_optimizer
from attn_notes.zoo.devices import STAND_IN, fake_device, to_stand_in
from attn_notes.zoo.factory import count_parameters, create_model

LAYOUTS = Path(__file__).parent / "layouts"
SMALL = DeformableDETRConfig(
    hidden_size=32,
    num_attention_heads=2,
    intermediate_size=20,
    encoder_layers=2,
    decoder_layers=3,
    num_queries=5,
    num_classes=4,
    dropout=0.0,
    backbone="small",
    num_feature_levels=3,
    num_points=2,
)
KINDS = {
    "plain": {},
    "refine": {"refine": True},
    "two_stage": {"refine": True, "two_stage": True},
}


def shake(model, seed=0):
    """Noise on every weight and norm, so that nothing is neutral."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                noise = 0.2 if "backbone" not in key else 0.01
                value.add_(noise * torch.rand_like(value).sub(0.5))
            if "bn3.weight" in key:  # else a deep ResNet grows and grows
                value.mul_(0.3)
    return model


def small(**change):
    """Ours in double precision, shaken, in evaluation mode."""
    torch.manual_seed(0)
    return shake(DeformableDETR(replace(SMALL, **change)).double().eval())


def images(*sizes, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *s, generator=random, dtype=torch.float64) for s in sizes]


def targets(*counts):
    torch.manual_seed(1)
    found = []
    for n in counts:
        start = 30 * torch.rand(n, 2).double()
        boxes = torch.cat([start, start + 5 + 25 * torch.rand(n, 2)], -1)
        found.append({"boxes": boxes, "labels": torch.randint(4, (n,))})
    return found


# ---- sampling


def bilinear(grid, x, y):
    """A map (h w c) between its places, zero outside; x and y count places from the
    middle of the first."""
    h, w, c = grid.shape
    total = torch.zeros(c, dtype=grid.dtype)
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(x), math.floor(x) + 1):
            if 0 <= i < h and 0 <= j < w:
                total += (1 - abs(y - i)) * (1 - abs(x - j)) * grid[i, j]
    return total


def test_sampling_is_the_sum_over_points():
    torch.manual_seed(0)
    shapes, heads, c, points = [(4, 6), (2, 3), (1, 2)], 2, 3, 2
    values = torch.randn(2, 32, heads, c).double()
    where = torch.rand(2, 5, heads, 3, points, 2).double() * 1.6 - 0.3  # some outside
    weights = torch.rand(2, 5, heads, 3, points).double()
    found = sample_levels(values, shapes, where, weights)
    expected = torch.zeros(2, 5, heads, c).double()
    for b, q, h, k in torch.cartesian_prod(*map(torch.arange, (2, 5, heads, points))):
        start = 0
        for level, (height, width) in enumerate(shapes):
            grid = values[b, start : start + height * width, h]
            x, y = where[b, q, h, level, k].tolist()
            grid = grid.view(height, width, c)
            one = bilinear(grid, x * width - 0.5, y * height - 0.5)
            expected[b, q, h] += weights[b, q, h, level, k] * one
            start += height * width
    assert (found - expected.flatten(2)).abs().max() < 1e-12


@pytest.mark.parametrize("coordinates", [2, 4])
def test_attention_equals_transformers(coordinates):
    modeling = pytest.importorskip(
        "transformers.models.deformable_detr.modeling_deformable_detr"
    )
    config = modeling.DeformableDetrConfig(d_model=16, num_feature_levels=2)
    theirs = modeling.DeformableDetrMultiscaleDeformableAttention(config, 4, 3)
    shake(theirs.double())
    ours = DeformableAttention(16, 4, 2, 3).double()
    state = {k.replace("output_", "out_"): v for k, v in theirs.state_dict().items()}
    ours.load_state_dict(state)
    shapes, torch_seed = [(3, 5), (2, 2)], torch.manual_seed(1)
    memory, q = torch.randn(2, 19, 16).double(), torch.randn(2, 7, 16).double()
    where = torch.rand(2, 7, 2, coordinates, generator=torch_seed).double()
    mask = torch.rand(2, 19) > 0.3
    found = ours(q, where, memory, Levels(shapes, mask))
    expected, _ = theirs(
        q,
        attention_mask=mask,
        encoder_hidden_states=memory,
        reference_points=where,
        spatial_shapes=torch.tensor(shapes),
        spatial_shapes_list=shapes,
    )
    assert (found - expected).abs().max() < 1e-12


def test_points_begin_in_a_direction_of_their_own():
    """Eight heads, eight directions, the k-th point k places away, all alike."""
    attention = DeformableAttention(16, 8, 2, 3)
    where, weights = attention.sampling(
        torch.randn(1, 1, 16),
        torch.full((1, 1, 1, 2), 0.5),
        Levels([(10, 20), (5, 10)]),
    )
    steps = (where[0, 0] - 0.5) * torch.tensor([[20, 10], [10, 5]])[:, None]
    assert torch.allclose(weights, torch.full_like(weights, 1 / 6))
    assert torch.allclose(steps.abs().amax(-1), torch.tensor([1.0, 2, 3]), atol=1e-5)
    assert torch.allclose(steps[:, 0], steps[:, 1], atol=1e-5)
    first = steps[:, 0, 0].round(decimals=4).tolist()
    assert len({tuple(way) for way in first}) == 8


# ---- the sizes


@pytest.mark.parametrize("name", SIZES)
def test_counts_and_products(name):
    info, model = an.model_info(name), create_model(name, device="meta")
    c, d = info.config, info.config.hidden_size
    points = c.num_attention_heads * c.num_feature_levels * c.num_points
    deformable = 3 * points * (d + 1) + 2 * (d + 1) * d
    dense = 2 * d * c.intermediate_size + c.intermediate_size + d
    counted = c.encoder_layers * (deformable + dense + 4 * d)
    counted += c.decoder_layers * (deformable + 4 * d * (d + 1) + dense + 6 * d)
    widths = [model.backbone.channels[i] for i in model.taken]
    counted += sum((w + 1) * d for w in widths) + 3 * d * c.num_feature_levels
    extra = [widths[-1], *[d] * 9][: c.num_feature_levels - len(widths)]
    counted += sum((9 * w + 1) * d for w in extra)
    if c.two_stage:
        counted += (d + 1) * d + 2 * d + (2 * d + 1) * 2 * d + 4 * d
    else:
        counted += c.num_queries * 2 * d + 2 * (d + 1)
    heads = (c.decoder_layers if c.refine else 1) + c.two_stage
    counted += heads * ((d + 1) * c.num_classes + 2 * (d + 1) * d + 4 * (d + 1))
    counted += count_parameters(model.backbone)
    assert count_parameters(model) == counted == info.parameters
    with FlopCounterMode(display=False) as flops:
        model.eval()(torch.empty(1, *info.input_size, device="meta"))
    assert flops.get_total_flops() == 2 * info.macs


def test_the_papers_recipe():
    model = create_model("deformable_detr_resnet50", device="meta")
    groups = make_optimizer(model, PAPER).param_groups
    slow = {
        name
        for name, p in model.named_parameters()
        if any(
            p is q
            for g in groups
            if g["lr"] == pytest.approx(2e-5)
            for q in g["params"]
        )
    }
    assert any("sampling_offsets" in name for name in slow)
    assert (
        "reference_points.weight" in slow and "backbone.layer2.0.conv1.weight" in slow
    )
    assert not any("attention_weights" in name or "value_proj" in name for name in slow)
    epoch = round(118_287 / 32)
    assert PAPER.max_steps == pytest.approx(50 * epoch, abs=epoch)
    before, after = PAPER.lr(39 * epoch), PAPER.lr(41 * epoch)
    assert (before, after) == pytest.approx((2e-4, 2e-5))


# ---- equal to transformers


def hf_model(kind, levels=4):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("timm")
    config = transformers.DeformableDetrConfig(
        d_model=64,  # a multiple of its 32 groups
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=20,
        decoder_ffn_dim=20,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_n_points=3,
        decoder_n_points=3,
        num_queries=5,
        two_stage_num_proposals=5,
        num_feature_levels=levels,
        with_box_refine="refine" in KINDS[kind],
        two_stage="two_stage" in KINDS[kind],
        dropout=0.0,
        id2label=dict(enumerate("abcd")),
    )
    torch.manual_seed(0)
    return shake(transformers.DeformableDetrForObjectDetection(config))


@pytest.mark.parametrize(
    "kind, levels, tolerance",
    [
        ("plain", 4, 1e-10),
        ("plain", 1, 1e-10),
        ("refine", 4, 1e-10),
        ("two_stage", 4, 1e-6),
    ],
)
def test_outputs_and_gradients_equal_transformers(kind, levels, tolerance, tmp_path):
    """Of two stages transformers encodes the proposals in 32 bits. With refinement it
    ties the class heads of all layers, and its file has the first alone."""
    theirs = hf_model(kind, levels)
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        model = create_model("deformable_detr_resnet50", tmp_path)
    assert model.config.refine == ("refine" in KINDS[kind])
    if kind == "refine":
        for head in theirs.class_embed:  # what its file says
            head.load_state_dict(model.class_heads[0].state_dict())
    model, theirs = model.double().train(), theirs.double().train()
    x = images((64, 90), (50, 70))
    padded, mask = as_batch(x)
    total = [0.0, 0.0]
    random = torch.Generator().manual_seed(1)
    for pixels, real in ((padded, mask), (padded[:1], None)):
        found = model(pixels, real)
        expected = theirs(pixels, pixel_mask=None if real is None else real.long())
        both = [(found.pred_logits, expected.logits)]
        both += [(found.pred_boxes, expected.pred_boxes)]
        if found.proposals is not None:
            seen = found.proposals["pred_logits"]
            assert (seen - expected.enc_outputs_class).abs().max() < 1e-10
        for ours, other in both:
            assert (ours - other).abs().max() < tolerance and ours.std() > 1e-3
            weights = torch.randn(ours.shape, generator=random).double()
            total = [
                t + (y * weights).sum()
                for t, y in zip(total, (ours, other), strict=True)
            ]
    for loss in total:
        loss.backward()
    if kind == "refine":
        return  # tied heads have other gradients
    grads = {k: p.grad for k, p in theirs.named_parameters() if p.grad is not None}
    grads = HF_FORMAT.apply(grads, model)
    for key, parameter in model.named_parameters():
        if parameter.grad is not None and key in grads:
            gap = (parameter.grad - grads[key]).abs().max()
            assert gap < 1e3 * tolerance * (1 + grads[key].abs().max()), key


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "detr"}, "model_type: expected deformable_detr"),
        ({"encoder_n_points": 7}, "encoder_n_points: expected 4"),
        ({"decoder_ffn_dim": 7}, "decoder_ffn_dim: expected 1024"),
        ({"focal_alpha": 0.5}, "focal_alpha: expected 0.25"),
        ({"backbone_config": {"model_type": "resnet"}}, "backbone_type"),
    ],
)
def test_folders_of_other_models(change, words):
    stored = {"d_model": 256, "decoder_n_points": 4, "backbone": "resnet50"}
    stored |= {"id2label": dict.fromkeys("abc"), "with_box_refine": True}
    values = HF_FORMAT.config(stored)
    assert (values["num_classes"], values["refine"]) == (3, True)
    with pytest.raises(an.ConfigError, match=words):
        HF_FORMAT.config(stored | change)


# ---- equal to the authors

AUTHORS = json.loads((LAYOUTS / "deformable_detr_small.json").read_text())


def authors_weights(shapes, shared):
    """The weights with which their code was run; its positions are of 32 bits."""
    state, names = {}, [*shapes]
    for key, shape in shapes.items():
        first = re.sub(r"^transformer\.decoder\.(?=class_embed|bbox_embed)", "", key)
        if shared:
            first = re.sub(r"^(class_embed|bbox_embed)\.\d+", r"\1.0", first)
        random = torch.Generator().manual_seed(names.index(first))
        x = torch.rand(math.prod(shape), dtype=torch.float64, generator=random)
        x = (12**0.5 * (x - 0.5)).view(shape)
        if len(shape) > 1:
            drawn = "query_embed" in key or "level_embed" in key
            x = x if drawn else x / x[0].numel() ** 0.5
        else:
            x = 0.1 * x + key.endswith(("weight", "running_var"))
        state[key] = x
    return state


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_losses_equal_the_authors(kind, tmp_path):
    stored = AUTHORS[kind]
    state = authors_weights(stored["keys"], kind == "plain")
    torch.save({"model": state, "epoch": 3}, tmp_path / "w.pth")
    config = DeformableDETRConfig(
        intermediate_size=20,
        encoder_layers=1,
        decoder_layers=2,
        num_queries=7,
        num_classes=20,
        dropout=0.0,
        **KINDS[kind],
    )
    with warnings.catch_warnings(action="error"):
        model = create_model(
            "deformable_detr_resnet50",
            tmp_path / "w.pth",
            dtype=torch.float64,
            **asdict(config),
        ).train()
    sizes = [(70, 100), (96, 64)]
    x = [
        torch.arange(3 * h * w).double().mul(0.3).sin().view(3, h, w) for h, w in sizes
    ]
    found = model(x)

    def same(ours, key):
        expected = torch.tensor(stored[key]).double()
        assert (ours.flatten() - expected).abs().max() < 1e-5, key

    same(found.pred_logits, "logits")
    same(found.pred_boxes, "boxes")
    same(found.aux_outputs[0]["pred_logits"][0], "first_logits")
    boxes = torch.tensor([[10.0, 20, 60, 65], [1, 2, 30, 40], [50, 10, 99, 30]])
    objects = [
        {"boxes": boxes.double(), "labels": torch.tensor([3, 0, 19])},
        {
            "boxes": torch.zeros(0, 4).double(),
            "labels": torch.zeros(0, dtype=torch.int64),
        },
    ]
    terms = model.losses(found, objects, torch.tensor(sizes))
    names = {"focal": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}
    assert terms.keys() == names.keys() == model.loss_weights.keys()
    for key, value in terms.items():
        layers = [v for k, v in stored["losses"].items() if k.startswith(names[key])]
        assert len(layers) == 2 + (kind == "two_stage")
        assert value.item() == pytest.approx(3 * sum(layers), rel=1e-5), key


@pytest.mark.parametrize("kind", KINDS)
def test_the_real_files_names_and_shapes_fit(kind, tmp_path):
    shapes = json.loads((LAYOUTS / "deformable_detr.json").read_text())
    keys = dict(shapes["plain"])
    if kind != "plain":
        keys = {k: v for k, v in keys.items() if k not in shapes[kind]["fewer"]}
        keys |= shapes[kind]["more"] | shapes[kind]["other"]
    state = {k: torch.zeros(1).expand(v) for k, v in keys.items()}
    torch.save({"model": state, "epoch": 1}, tmp_path / "w.pth")
    name = "deformable_detr_resnet50" + ("" if kind == "plain" else f"_{kind}")
    with warnings.catch_warnings(action="error"):
        model = create_model(name, tmp_path / "w.pth", device="meta")
    assert not model.not_loaded
    state = OFFICIAL_FORMAT.apply(state, model)
    assert {k: v.shape for k, v in state.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


def test_other_classes_are_skipped_and_said(tmp_path):
    torch.save(small().float().state_dict(), tmp_path / "w.pth")
    with pytest.warns(an.CheckpointWarning, match="class_heads"):
        model = create_model(
            "deformable_detr_tiny",
            tmp_path / "w.pth",
            **asdict(SMALL) | {"num_classes": 7},
        )
    assert model.not_loaded == ("class_heads.0.weight", "class_heads.0.bias")


# ---- what changes nothing


@pytest.mark.parametrize("kind", KINDS)
def test_company_of_the_same_size_changes_nothing(kind):
    model, x = small(**KINDS[kind]), images((40, 56), (40, 56), (40, 56))
    with torch.no_grad():
        together = model(x)
        batch = model(torch.stack(x), torch.ones(3, 40, 56, dtype=torch.bool))
        for key in ("pred_logits", "pred_boxes"):
            assert torch.allclose(batch[key], together[key], atol=1e-12)
            for i, one in enumerate(x):
                alone = model([one])[key][0]
                assert torch.allclose(alone, together[key][i], atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    """Of the Transformer; the convolutions see the edge of the padding."""
    model, d = small(**KINDS[kind]), SMALL.hidden_size
    shapes, real = [(8, 8), (4, 4), (2, 2)], [(6, 4), (3, 2), (1, 1)]
    masks = [torch.zeros(2, h, w, dtype=torch.bool) for h, w in shapes]
    for mask, (h, w) in zip(masks, real, strict=True):
        mask[0], mask[1, :h, :w] = True, True
    shares = torch.tensor(
        [[w / W, h / H] for (h, w), (H, W) in zip(real, shapes, strict=True)]
    )
    shares = torch.stack([torch.ones(3, 2), shares]).double()
    mask = torch.cat([m.flatten(1) for m in masks], 1)
    tokens = torch.randn(2, 84, d).double()
    noisy = torch.where(mask[..., None], tokens, 100.0)
    with torch.no_grad():
        states, boxes, _ = model.transform(tokens, Levels(shapes, mask, shares))
        again = model.transform(noisy, Levels(shapes, mask, shares))
        assert torch.allclose(states[-1], again[0][-1], atol=1e-12)
        assert torch.allclose(boxes[-1], again[1][-1], atol=1e-12)
        model._tables.clear()
        alone = model.transform(tokens[1:][mask[1:]][None], Levels(real))
    if kind != "two_stage":  # the places near the edge that propose nothing differ
        assert torch.allclose(alone[0][-1][0], states[-1][1], atol=1e-6)


def test_refinement_hands_boxes_on_without_gradient():
    model, x = small(refine=True).train(), images((48, 48))
    out = model(x)
    first = out.aux_outputs[0]["pred_boxes"]
    (grad,) = torch.autograd.grad(
        out.pred_boxes.sum(), model.box_heads[0].layers[-1].bias, allow_unused=True
    )
    assert grad is None or grad.abs().max() == 0  # of the last layer's boxes
    assert (first - out.pred_boxes).abs().max() > 1e-4


def test_tables_are_made_once_and_right():
    model, x = small(), images((40, 56))
    with torch.no_grad():
        first = model(x).pred_boxes
        assert len(model._tables) == 1
        assert torch.equal(model(x).pred_boxes, first)
        model(images((32, 32)))
        assert len(model._tables) == 2
        assert torch.equal(model(x).pred_boxes, first)


def test_recorded_attention_is_that_among_the_queries():
    """Deformable attention has no matrix over all places."""
    model, x = small(), images((48, 64))
    with torch.no_grad(), record_attention(model) as maps:
        model(x)
    assert {tuple(A.shape) for A in maps.values()} == {(1, 2, 5, 5)}
    assert len(maps) == SMALL.decoder_layers


def test_gradient_checkpointing_gives_the_same_states():
    model, x = small().train(), images((32, 32))
    weight = model.query_embedding.weight
    expected = torch.autograd.grad(model(x).pred_boxes.sum(), weight)
    for stack in (model.encoder, model.decoder):
        stack.gradient_checkpointing = True
    found = torch.autograd.grad(model(x).pred_boxes.sum(), weight)
    assert torch.allclose(found[0], expected[0], atol=1e-12)


# ---- training and predictions


def test_the_focal_cost_and_loss_by_their_formula():
    torch.manual_seed(0)
    logits = 3 * torch.randn(1, 2, 3, 4).double()
    p = logits.sigmoid()
    there = 0.25 * (1 - p) ** 2 * -p.log()
    absent = 0.75 * p**2 * -(1 - p).log()
    assert torch.allclose(focal_costs(logits), there - absent, atol=1e-12)
    boxes = torch.full((1, 2, 3, 4), 0.5).double()
    objects = Objects(torch.tensor([2, 1]), boxes[0, 0, :2], [1, 1])
    pairs = Matches(*(torch.tensor(x) for x in ([0, 0], [0, 1], [2, 0], [0, 1])))
    wanted = absent.sum() + (there - absent)[0, [0, 1], [2, 0], [2, 1]].sum()
    terms = focal_losses(logits, boxes, objects, pairs)
    assert torch.allclose(terms["focal"], wanted, atol=1e-12)
    assert float(terms["l1"]) == 0 and float(terms["giou"]) == pytest.approx(0)
    none = Objects(
        torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4).double(), [0, 0]
    )
    empty = Matches(*(torch.zeros(0, dtype=torch.int64) for _ in range(4)))
    terms = focal_losses(logits, boxes, none, empty)
    assert torch.allclose(terms["focal"], absent.sum(), atol=1e-12)


def test_the_best_pairs_first():
    logits = torch.tensor([[[0.0, 3.0], [2.0, -1.0], [-5.0, -5.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4]] * 3])
    (found,) = best_pairs(logits, boxes, torch.tensor([[10, 20]]))
    assert found["labels"].tolist() == [1, 0, 0]
    assert found["queries"].tolist() == [0, 1, 0]
    assert torch.allclose(found["scores"], torch.tensor([3.0, 2.0, 0.0]).sigmoid())
    assert torch.allclose(found["boxes"][0], torch.tensor([8.0, 3, 12, 7]))


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_two_scenes(kind):
    torch.manual_seed(0)
    model = DeformableDETR(replace(SMALL, **KINDS[kind]))
    x, sizes = torch.randn(2, 3, 64, 64), torch.tensor([[64, 64]] * 2)
    found = [one | {"boxes": one["boxes"].float()} for one in targets(2, 1)]
    optimizer, history = torch.optim.AdamW(model.parameters(), 2e-3), []
    for _ in range(40):
        terms = model.losses(model(x), found, sizes)
        loss = sum(model.loss_weights[k] * v for k, v in terms.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.7 * history[0]
    assert model.eval()(x).aux_outputs is None and model(x).proposals is None


def test_sixteen_bits():
    model = small().float()
    with torch.no_grad():
        expected = model([x.float() for x in images((64, 64))])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model([x.float() for x in images((64, 64))])
    assert (output.pred_boxes.float() - expected.pred_boxes).abs().max() < 0.05
    found = [targets(3)[0] | {"boxes": targets(3)[0]["boxes"].float()}]
    terms = model.losses(output, found, torch.tensor([[64, 64]]))
    assert {term.dtype for term in terms.values()} == {torch.float32}


def test_two_stages_in_sixteen_bits_but_for_the_choice(monkeypatch):
    """Which tokens become queries is a matter of rounding; with these held, what they
    become is not."""
    model, x = small(refine=True, two_stage=True).float(), images((64, 64))[0][None]
    kept, topk = [], torch.Tensor.topk

    def hold(scores, k):
        kept.append(topk(scores, k))
        return kept[0]

    monkeypatch.setattr(torch.Tensor, "topk", hold)
    with torch.no_grad():
        expected = model(x.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(x.float())
    assert len(kept) == 2
    assert (found.pred_boxes.float() - expected.pred_boxes).abs().max() < 0.05
    assert (found.pred_logits.float() - expected.pred_logits).abs().max() < 0.1


def test_fake_tensors_leave_no_trace():
    model = DeformableDETR(SMALL)
    with fake_device():
        to_stand_in(model)
        model(torch.empty(2, 3, 32, 32, device=STAND_IN)).pred_boxes.sum().backward()
    assert not model._tables


@pytest.mark.no_shapes
def test_exported_with_a_list_of_images():
    model = small(decoder_layers=1, encoder_layers=1).float()
    x = [one.float() for one in images((32, 40), (40, 24))]
    with torch.no_grad():
        expected = model(x).pred_boxes
        exported = torch.export.export(model, (x,)).module()
        assert torch.allclose(exported(x).pred_boxes, expected, atol=1e-5)


# ---- bad input


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "field, words",
    [
        ({"hidden_size": 36}, "groups of group norm: expected a divisor"),
        ({"num_attention_heads": 5}, "num_attention_heads: expected a divisor"),
        ({"backbone": "resnet18"}, "backbone: expected one of resnet50"),
        (
            {"backbone": "resnet50", "num_feature_levels": 2},
            "num_feature_levels: expected 1, or at least the 3 maps",
        ),
        ({"two_stage": True}, "two_stage: expected False without refine"),
        ({"dilation": True}, "dilation: expected False unless"),
        ({"num_points": 0}, "num_points: expected a whole number from 1"),
    ],
)
def test_configurations_that_do_not_fit(field, words):
    with pytest.raises(an.ConfigError, match=words):
        replace(SMALL, **field)


@pytest.mark.no_shapes
def test_input_that_does_not_fit():
    model = small(hidden_size=64, refine=True, two_stage=True)
    with pytest.raises(an.InputError, match="at least 5 tokens.*got 3"):
        model(images((4, 4)))
    with pytest.raises(an.InputError, match=r"images\[1\]: "):
        model([torch.zeros(3, 8, 8), "cat"])
    with pytest.raises(an.InputError, match="at most 5 objects.*got 6"):
        x = images((64, 64))
        model.losses(model(x), targets(6), torch.tensor([[64, 64]]))
