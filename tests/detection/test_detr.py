"""DETR: equal to transformers and to the authors' code on the same weights; what must
not change anything does not; and the files that it is read from."""

import argparse
import json
import math
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attn_notes as an
from attn_notes.detection.detr import (
    DETR,
    PAPER,
    SIZES,
    DETRConfig,
    SinePositions,
)
from attn_notes.detection.detr_backbone import (
    FrozenBatchNorm,
    ResNetBackbone,
    SmallBackbone,
)
from attn_notes.detection.detr_formats import HF_FORMAT, OFFICIAL_FORMAT
from attn_notes.detection.set_prediction import gather_objects, match, set_losses
from attn_notes.foundations.attention import record_attention
from attn_notes.foundations.masks import as_batch
from attn_notes.training.recipes import make_optimizer
from attn_notes.zoo.devices import STAND_IN, fake_device, to_stand_in
from attn_notes.zoo.factory import count_parameters, create_model

LAYOUTS = Path(__file__).parent / "layouts"
SMALL = DETRConfig(
    hidden_size=16,
    num_attention_heads=2,
    intermediate_size=20,
    encoder_layers=2,
    decoder_layers=3,
    num_queries=5,
    num_classes=4,
    dropout=0.0,
    backbone="small",
)
MASKS = replace(SMALL, masks=True)


def shake(model, seed=0):
    """Noise on every weight and norm, so that nothing is neutral."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                noise = 0.1 if value.ndim == 1 or "backbone" not in key else 0.01
                value.add_(noise * torch.rand_like(value).sub(0.5))
            if "bn3.weight" in key:  # else a deep ResNet grows and grows
                value.mul_(0.3)
    return model


def small(config=SMALL, **change):
    """Ours in double precision, shaken, in evaluation mode."""
    torch.manual_seed(0)
    return shake(DETR(replace(config, **change)).double().eval())


def images(*sizes, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *s, generator=random, dtype=torch.float64) for s in sizes]


def targets(*counts, size=(64, 64), masks=False):
    torch.manual_seed(1)
    found = []
    for n in counts:
        start = 30 * torch.rand(n, 2).double()
        boxes = torch.cat([start, start + 5 + 25 * torch.rand(n, 2)], -1)
        one = {"boxes": boxes, "labels": torch.randint(4, (n,))}
        if masks:
            one["masks"] = torch.rand(n, *size) > 0.5
        found.append(one)
    return found


# ---- the sizes


@pytest.mark.parametrize("name", SIZES)
def test_counts_and_products(name):
    info, model = an.model_info(name), create_model(name, device="meta")
    c, d = info.config, info.config.hidden_size
    attention, norm = 4 * d * d + 4 * d, 2 * d
    dense = 2 * d * c.intermediate_size + c.intermediate_size + d
    counted = c.encoder_layers * (attention + dense + 2 * norm)
    counted += c.decoder_layers * (2 * attention + dense + 3 * norm) + norm
    channels = model.backbone.channels
    counted += (channels[-1] + 1) * d + c.num_queries * d
    counted += (d + 1) * (c.num_classes + 1) + 2 * (d + 1) * d + 4 * (d + 1)
    if c.masks:
        wide = d + c.num_attention_heads
        widths = [wide, wide, d // 2, d // 4, d // 8, d // 16]
        counted += 2 * (d + 1) * d + 9 * widths[-1] + 1
        steps = zip(widths, widths[1:], strict=False)
        counted += sum((9 * a + 1) * b + 2 * b for a, b in steps)
        larger = zip(channels[-2::-1], widths[2:], strict=False)
        counted += sum((a + 1) * b for a, b in larger)
    counted += count_parameters(model.backbone)
    assert count_parameters(model) == counted == info.parameters
    with FlopCounterMode(display=False) as flops:
        model.eval()(torch.empty(1, *info.input_size, device="meta"))
    assert flops.get_total_flops() == 2 * info.macs


@pytest.mark.parametrize(
    "name, trained", [("resnet50", 41_302_368), ("resnet101", 60_242_272)]
)
def test_the_papers_count_is_of_what_is_trained(name, trained):
    """41.3M: without the stem and the first stage, which are frozen."""
    model = create_model(f"detr_{name}", device="meta")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    frozen = {k for k, p in model.named_parameters() if not p.requires_grad}
    assert {k.split(".")[1] for k in frozen} == {"conv1", "layer1"}


def test_dilation_doubles_the_map_and_no_weight():
    plain, dilated = (
        ResNetBackbone("resnet50", dilation) for dilation in (False, True)
    )
    x = torch.randn(1, 3, 70, 96)
    with torch.no_grad():
        a, b = plain(x), dilated(x)
    assert [m.shape[-2:] for m in a] == [(18, 24), (9, 12), (5, 6), (3, 3)]
    assert [m.shape[-2:] for m in b] == [(18, 24), (9, 12), (5, 6), (5, 6)]
    assert [m.shape[1] for m in a] == [*plain.channels]
    assert count_parameters(plain) == count_parameters(dilated)


# ---- equal to transformers


def hf_model(masks=False, dilation=False):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("timm")
    config = transformers.DetrConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=20,
        decoder_ffn_dim=20,
        encoder_attention_heads=8,  # its mask head needs a multiple of 8 channels
        decoder_attention_heads=8,
        num_queries=5,
        dropout=0.0,
        dilation=dilation,
        id2label=dict(enumerate("abcd")),
    )
    kind = "Segmentation" if masks else "ObjectDetection"
    torch.manual_seed(0)
    return shake(getattr(transformers, f"DetrFor{kind}")(config))


@pytest.mark.parametrize(
    "masks, dilation, training", [(False, True, True), (True, False, False)]
)
def test_outputs_and_gradients_equal_transformers(masks, dilation, training, tmp_path):
    theirs = hf_model(masks, dilation)
    theirs.save_pretrained(tmp_path)  # with the names of its files
    with warnings.catch_warnings(action="error"):
        model = create_model("detr_resnet50", tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "own.pth")  # with those in memory
    again = create_model("detr_resnet50", tmp_path / "own.pth", **asdict(model.config))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (model.config.masks, model.config.dilation) == (masks, dilation)
    model, theirs = model.double().train(training), theirs.double().train(training)
    x = images((64, 90), (70, 50))
    padded, mask = as_batch(x)
    found, expected = model(x), theirs(padded, pixel_mask=mask.long())
    both = [(found.pred_logits, expected.logits)]
    both += [(found.pred_boxes, expected.pred_boxes)]
    both += [(found.pred_masks, expected.pred_masks)] if masks else []
    random = torch.Generator().manual_seed(1)
    total = [0.0, 0.0]
    for ours, other in both:
        assert (ours - other).abs().max() < 1e-10 and ours.std() > 1e-3
        weights = torch.randn(ours.shape, generator=random).double()
        total = [
            t + (y * weights).sum() for t, y in zip(total, (ours, other), strict=True)
        ]
    for loss in total:
        loss.backward()
    grads = {k: p.grad for k, p in theirs.named_parameters() if p.grad is not None}
    grads = HF_FORMAT.apply(grads, model)
    trained = {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
    for key, grad in trained.items():
        assert (grad - grads[key]).abs().max() < 1e-10, key


def test_positions_equal_transformers_and_are_cached_right():
    modeling = pytest.importorskip("transformers.models.detr.modeling_detr")
    theirs = modeling.DetrSinePositionEmbedding(8, normalize=True)
    ours, x = SinePositions(16), torch.zeros(2, 16, 5, 7).double()
    mask = torch.ones(2, 5, 7, dtype=torch.bool)
    for hidden in (None, (4, 6), (2, 3)):
        if hidden:
            mask[1, hidden[0] :] = False
            mask[1, :, hidden[1] :] = False
        for _ in range(2):
            found = ours(x, mask)
            expected = theirs(x.shape, x.device, x.dtype, mask.clone()).flatten(2).mT
            assert (found - expected)[mask.flatten(1)].abs().max() < 1e-12
    full = torch.ones_like(mask)
    assert torch.allclose(ours(x).expand(2, -1, -1), ours(x, full), atol=1e-12)
    assert len(ours._tables) == 2  # of 5 rows and of 7 columns
    assert ours(x.float()).dtype == torch.float32
    alone = ours(x[:1, :, :2, :3])[0]
    assert torch.allclose(ours(x, mask)[1][mask[1].flatten()], alone, atol=1e-12)


# ---- equal to the authors

AUTHORS = json.loads((LAYOUTS / "detr_small.json").read_text())


def authors_weights(panoptic=False):
    """The weights with which their code was run; its positions are of 32 bits."""
    state = {}
    for i, (key, shape) in enumerate(AUTHORS["keys"].items()):
        random = torch.Generator().manual_seed(i)
        x = torch.rand(math.prod(shape), dtype=torch.float64, generator=random)
        x = (12**0.5 * (x - 0.5)).view(shape)
        if len(shape) > 1:
            x = x if "query_embed" in key else x / x[0].numel() ** 0.5
        else:
            x = 0.1 * x + key.endswith(("weight", "running_var"))
        state[key] = x
    if panoptic:
        return state
    return {k[5:]: x for k, x in state.items() if k.startswith("detr.")}


@pytest.mark.parametrize("name", ["plain", "dc5", "panoptic"])
def test_outputs_and_losses_equal_the_authors(name, tmp_path):
    stored, masks = AUTHORS[name], name == "panoptic"
    torch.save({"model": authors_weights(masks), "epoch": 3}, tmp_path / "w.pth")
    config = DETRConfig(
        hidden_size=128,
        intermediate_size=20,
        encoder_layers=2,
        decoder_layers=3,
        num_queries=7,
        num_classes=20,
        dropout=0.0,
        dilation=name == "dc5",
        masks=masks,
    )
    with warnings.catch_warnings(action="error"):
        model = create_model(
            "detr_resnet50", tmp_path / "w.pth", dtype=torch.float64, **asdict(config)
        ).train()
    sizes = [(70, 100), (96, 64)]
    x = [
        torch.arange(3 * h * w).double().mul(0.3).sin().view(3, h, w) for h, w in sizes
    ]
    found = model(x)

    def same(ours, key):
        expected = torch.tensor(stored[key]).double()
        assert (ours.flatten() - expected).abs().max() < 1e-6, key

    same(found.pred_logits, "logits")
    same(found.pred_boxes, "boxes")
    same(found.aux_outputs[0]["pred_logits"][0], "first_logits")
    if masks:
        assert list(found.pred_masks.shape) == stored["masks_shape"]
        same(found.pred_masks.flatten()[::97], "masks")
    boxes = torch.tensor([[10.0, 20, 60, 65], [1, 2, 30, 40], [50, 10, 99, 30]])
    shown = torch.zeros(3, 70, 100, dtype=torch.bool)
    for mask, (a, b, c, d) in zip(shown, boxes.int().tolist(), strict=True):
        mask[b:d, a:c] = True
    objects = [
        {"boxes": boxes.double(), "labels": torch.tensor([3, 0, 19]), "masks": shown},
        {
            "boxes": torch.zeros(0, 4).double(),
            "labels": torch.zeros(0, dtype=torch.int64),
            "masks": torch.zeros(0, 96, 64, dtype=torch.bool),
        },
    ]
    terms = model.losses(found, objects, torch.tensor(sizes))
    names = {"class": ("loss_ce", 2), "l1": ("loss_bbox", 3), "giou": ("loss_giou", 3)}
    names |= {"mask_dice": ("loss_dice", 3), "mask_focal": ("loss_mask", 3)}
    for key, value in terms.items():
        theirs, factor = names[key]
        layers = [v for k, v in stored["losses"].items() if k.startswith(theirs)]
        assert float(value) == pytest.approx(factor * sum(layers), rel=1e-6), key
    assert (
        len(terms) == (5 if masks else 3) and terms.keys() == model.loss_weights.keys()
    )


@pytest.mark.parametrize("name", ["detr_resnet50", "detr_resnet50_panoptic"])
def test_the_real_files_names_and_shapes_fit(name, tmp_path):
    shapes = json.loads((LAYOUTS / "detr.json").read_text())
    keys = shapes["keys"]
    if "panoptic" in name:
        keys = {f"detr.{k}": v for k, v in keys.items()} | shapes["panoptic"]
    state = {k: torch.zeros(1).expand(v) for k, v in keys.items()}
    args = argparse.Namespace(masks="panoptic" in name, lr=1e-4)
    torch.save({"model": state, "args": args, "epoch": 1}, tmp_path / "w.pth")
    with warnings.catch_warnings(action="error"):
        model = create_model(name, tmp_path / "w.pth", device="meta")
    assert not model.not_loaded
    state = OFFICIAL_FORMAT.apply(state, model)
    assert {k: v.shape for k, v in state.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


def test_a_detector_becomes_a_panoptic_model_and_back(tmp_path):
    """As the paper trains masks: from a detector's weights; every kind of file."""
    model, x = small().float(), images((64, 64))[0].float()
    state = model.state_dict()
    torch.save(state, tmp_path / "detector.pth")
    with pytest.warns(an.CheckpointWarning, match="left as they were: .*mask_head"):
        panoptic = create_model("detr_tiny", tmp_path / "detector.pth", **asdict(MASKS))
    assert all(
        k.startswith(("attention_map", "mask_head")) for k in panoptic.not_loaded
    )
    torch.save(panoptic.state_dict(), tmp_path / "panoptic.pth")
    with pytest.warns(an.CheckpointWarning, match="class_head.*skipped.*mask_head"):
        again = create_model(
            "detr_tiny", tmp_path / "panoptic.pth", **asdict(SMALL) | {"num_classes": 7}
        )
    assert again.not_loaded == ("class_head.weight", "class_head.bias")
    with torch.no_grad():
        expected = model([x]).pred_boxes
        assert torch.equal(panoptic([x]).pred_boxes, expected)
        assert torch.equal(again([x]).pred_boxes, expected)


def test_the_authors_detector_in_a_panoptic_model(tmp_path):
    keys = json.loads((LAYOUTS / "detr.json").read_text())["keys"]
    state = {k: torch.zeros(1).expand(v) for k, v in keys.items()}
    torch.save({"model": state}, tmp_path / "w.pth")
    with pytest.warns(an.CheckpointWarning, match="class_head"):
        model = create_model(
            "detr_resnet50_panoptic", tmp_path / "w.pth", device="meta"
        )
    assert len(model.not_loaded) == 34


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "conditional_detr"}, "model_type: expected detr"),
        ({"position_embedding_type": "learned"}, "position_embedding_type"),
        ({"decoder_ffn_dim": 7}, "decoder_ffn_dim: expected 2048"),
        ({"backbone_config": {"model_type": "resnet"}}, "backbone_type"),
    ],
)
def test_folders_of_other_models(change, words):
    stored = {"encoder_attention_heads": 8, "encoder_ffn_dim": 2048, "d_model": 256}
    stored |= {"backbone": "resnet101", "id2label": dict.fromkeys("abc")}
    values = HF_FORMAT.config(stored)
    assert values["backbone"] == "resnet101" and values["num_classes"] == 3
    with pytest.raises(an.ConfigError, match=words):
        HF_FORMAT.config(stored | change)


# ---- frozen batch norm


def test_frozen_batch_norm_is_batch_norm_in_evaluation():
    norm, frozen = nn.BatchNorm2d(6).double(), FrozenBatchNorm(6).double()
    for value in norm.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 2)
    frozen.load_state_dict(norm.state_dict())
    x = torch.randn(2, 6, 3, 4).double()
    before = {k: v.clone() for k, v in frozen.state_dict().items()}
    for training in (True, False):
        found = frozen.train(training)(x)
        assert torch.allclose(found, norm.eval()(x), atol=1e-12)
    assert not list(frozen.parameters())
    assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())
    assert not torch.allclose(norm.train()(x), found, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_frozen_batch_norm_keeps_no_map_for_its_gradient(dtype):
    frozen = FrozenBatchNorm(6)
    for value in frozen.state_dict().values():
        value.uniform_(0.5, 2)
    x = torch.randn(2, 6, 30, 40, dtype=dtype)
    if dtype == torch.float64:
        frozen = frozen.double()
    expected, kept = frozen(x), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: kept.append(value.numel()) or value, lambda value: value
    ):
        found = frozen(x.requires_grad_())
    close = dict(atol=1e-12) if dtype == torch.float64 else dict(rtol=0.02, atol=0.02)
    assert found.dtype == dtype and torch.allclose(found, expected, **close)
    assert max(kept) == 6
    (gradient,) = torch.autograd.grad(found.sum(), x)
    scale = frozen.weight * (frozen.running_var + frozen.eps).rsqrt()
    assert torch.allclose(gradient, scale[:, None, None].to(dtype).expand_as(x))


def test_a_step_of_training_moves_no_norm_of_the_backbone():
    model = small().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1)
    model(images((64, 64))).pred_boxes.sum().backward()
    optimizer.step()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert "backbone.conv1.weight" in moved
    assert not any(".bn" in k or "downsample.1" in k for k in moved)


def test_a_trained_backbone_loads_into_the_frozen_one():
    trained, x = SmallBackbone(nn.BatchNorm2d), torch.randn(2, 3, 32, 32)
    for _ in range(3):
        trained(x)
    frozen = SmallBackbone()
    frozen.load_state_dict(trained.state_dict())
    with torch.no_grad():
        for a, b in zip(frozen(x), trained.eval()(x), strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    assert count_parameters(frozen) == 231_496


# ---- what changes nothing


@pytest.mark.parametrize("config", [SMALL, MASKS], ids=["boxes", "masks"])
def test_company_of_the_same_size_changes_nothing(config):
    model, x = small(config), images((40, 56), (40, 56), (40, 56))
    with torch.no_grad():
        together = model(x)
        batch = model(torch.stack(x), torch.ones(3, 40, 56, dtype=torch.bool))
        for key in together:
            assert torch.allclose(batch[key], together[key], atol=1e-12)
            for i, one in enumerate(x):
                assert torch.allclose(
                    model([one])[key][0], together[key][i], atol=1e-12
                )


def test_what_stands_in_the_padding_changes_nothing():
    """Of the Transformer; the convolutions see the edge of the padding."""
    model = small()
    features = torch.randn(2, 16, 6, 8).double()
    mask = torch.ones(2, 6, 8, dtype=torch.bool)
    mask[1, 4:], mask[1, :, 5:] = False, False
    with torch.no_grad():
        memory, states = model.transform(features, mask)
        noisy = torch.where(mask[:, None], features, 100.0)
        again, moved = model.transform(noisy, mask)
        assert torch.allclose(states, moved, atol=1e-12)
        real = mask.flatten(1)
        assert torch.allclose(memory[real], again[real], atol=1e-12)
        alone = model.transform(features[1:, :, :4, :5], None)[1]
        assert torch.allclose(alone[:, 0], states[:, 1], atol=1e-12)


def test_queries_are_a_set():
    model, x = small(), images((48, 48))
    order = torch.tensor([3, 0, 4, 2, 1])
    with torch.no_grad():
        expected = model(x)
        model.query_embedding.weight.copy_(model.query_embedding.weight[order])
        found = model(x)
        assert torch.allclose(found.pred_boxes, expected.pred_boxes[:, order])
        model.query_embedding.weight.copy_(
            model.query_embedding.weight[:1].expand(5, -1)
        )
        same = model(x).pred_boxes
        assert (same - same[:, :1]).abs().max() < 1e-12
        assert (expected.pred_boxes - expected.pred_boxes[:, :1]).abs().max() > 1e-6


@pytest.mark.parametrize("positions", ["every_layer", "input", "none"])
def test_positions_where_they_are_added(positions):
    model = small(positions=positions)
    features = torch.randn(1, 16, 4, 5).double()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = features.flatten(2)[..., order].view_as(features)
    with torch.no_grad():
        a, b = (model.transform(x, None)[1] for x in (features, shuffled))
    assert torch.allclose(a, b, atol=1e-12) == (positions == "none")
    assert (a[:, :, :1] - a).abs().max() > 1e-6  # the queries differ in each


def test_recorded_attention():
    model, x = small(), images((48, 64), (40, 64))
    with torch.no_grad(), record_attention(model) as maps:
        found = model(x)
    assert torch.allclose(found.pred_boxes, model(x).pred_boxes, atol=1e-12)
    shapes = {key: tuple(weights.shape) for key, weights in maps.items()}
    assert len(shapes) == 2 + 2 * 3
    assert shapes["encoder.layers.1.attention.attention"] == (2, 2, 48, 48)
    assert shapes["decoder.layers.0.attention.attention"] == (2, 2, 5, 5)
    seen = maps["decoder.layers.2.cross_attention.attention"]
    assert seen.shape == (2, 2, 5, 48)
    assert seen[1].view(2, 5, 6, 8)[..., 5:, :].max() == 0  # padding: below 40


def test_gradient_checkpointing_gives_the_same_states():
    model, x = small().train(), images((32, 32))
    expected = torch.autograd.grad(
        model(x).pred_boxes.sum(), model.query_embedding.weight
    )
    for stack in (model.encoder, model.decoder):
        stack.gradient_checkpointing = True
    found = torch.autograd.grad(model(x).pred_boxes.sum(), model.query_embedding.weight)
    assert torch.allclose(found[0], expected[0], atol=1e-12)


# ---- training and predictions


def test_every_layer_answers_in_training_and_is_matched_by_itself():
    model, x = small().train(), images((64, 64), (64, 64))
    sizes, found = torch.tensor([[64, 64]] * 2), targets(2, 0)
    output = model(x)
    assert len(output.aux_outputs) == 2 and model.eval()(x).aux_outputs is None
    last = {"pred_logits": output.pred_logits, "pred_boxes": output.pred_boxes}
    objects, total = gather_objects(found, sizes), {}
    for one in (*output.aux_outputs, last):
        layer = one["pred_logits"][None], one["pred_boxes"][None]
        terms = set_losses(*layer, objects, match(*layer, objects))
        total = {k: total.get(k, 0) + v for k, v in terms.items()}
    torch.testing.assert_close(model.losses(output, found, sizes), total)


def test_losses_of_sixteen_bits_are_of_thirty_two():
    model = small().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model([x.float() for x in images((64, 64))])
    assert output.pred_logits.dtype == torch.bfloat16
    found = [{k: v for k, v in targets(3)[0].items()}]
    found[0]["boxes"] = found[0]["boxes"].float()
    terms = model.losses(output, found, torch.tensor([[64, 64]]))
    assert {term.dtype for term in terms.values()} == {torch.float32}


def test_it_learns_two_scenes():
    torch.manual_seed(0)
    model, x = DETR(replace(MASKS, num_queries=4)), torch.randn(2, 3, 64, 64)
    found, sizes = targets(2, 1, masks=True), torch.tensor([[64, 64]] * 2)
    for one in found:
        one["boxes"] = one["boxes"].float()
    optimizer, history = torch.optim.AdamW(model.parameters(), 2e-3), []
    for _ in range(40):
        terms = model.losses(model(x), found, sizes)
        loss = sum(model.loss_weights[k] * v for k, v in terms.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.7 * history[0]


def test_masks_at_the_size_of_each_image():
    model, x = small(MASKS), images((48, 64), (64, 40))
    sizes = torch.tensor([[48, 64], [64, 40]])
    with torch.no_grad():
        output = model(x)
        found = model.post_process(output, sizes)
    assert [tuple(one["masks"].shape) for one in found] == [(5, 48, 64), (5, 64, 40)]
    large = F.interpolate(output.pred_masks, (64, 64), mode="bilinear")
    best = found[1]["queries"][0]
    expected = large[1, best, :, :40].sigmoid()
    assert torch.allclose(found[1]["masks"][0].double(), expected, atol=1e-6)
    assert all(0 <= one["masks"].min() and one["masks"].max() <= 1 for one in found)


def test_the_papers_recipe():
    model = create_model("detr_resnet50", device="meta")
    groups = make_optimizer(model, PAPER).param_groups
    rates = dict.fromkeys((1e-4, 1e-5), 0)
    for group in groups:
        rates[round(group["lr"], 9)] += sum(p.numel() for p in group["params"])
    backbone = sum(p.numel() for p in model.backbone.parameters() if p.requires_grad)
    assert rates == {1e-4: 41_302_368 - backbone, 1e-5: backbone}
    epoch = round(118_287 / 64)
    assert PAPER.max_steps == pytest.approx(300 * epoch, abs=epoch)
    before, after = PAPER.lr(200 * epoch), PAPER.lr(201 * epoch)
    assert (before, after) == pytest.approx((1e-4, 1e-5))


# ---- images


def test_images_of_different_sizes_become_one_batch():
    x = images((5, 9), (7, 4))
    batch, mask = as_batch(x)
    assert batch.shape == (2, 3, 7, 9) and mask.sum((1, 2)).tolist() == [45, 28]
    assert torch.equal(batch[1, :, :7, :4], x[1]) and not batch[1, :, :, 4:].any()
    assert as_batch(x[:1])[1] is None
    batch, mask = as_batch(torch.stack(images((5, 9), (5, 9))))
    assert batch.shape == (2, 3, 5, 9) and mask is None


ONE = torch.zeros(3, 40, 40)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "x, mask, words",
    [
        ([], None, "images: expected a tensor .* or a list of images"),
        (ONE, None, r"images: .*\(b, 3, h, w\)"),
        ([ONE[:1]], None, r"images\[0\]: "),
        ([ONE, ONE[None]], None, r"images\[1\]: "),
        ([ONE, "cat"], None, r"images\[1\]: "),
        ([ONE.long()], None, r"images\[0\]: expected images, floating point"),
        ([ONE], torch.ones(1, 40, 40) > 0, "mask: expected None with a list"),
        (ONE[None], torch.ones(1, 40, 41) > 0, r"mask: .*\(1, 40, 40\)"),
        (ONE[None], torch.ones(1, 40, 40), "mask: expected a boolean mask"),
    ],
)
def test_images_that_are_none(x, mask, words):
    with pytest.raises(an.InputError, match=f"^{words}"):
        small()(x, mask)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "field, words",
    [
        ({"hidden_size": 30}, "num_attention_heads: expected a divisor"),
        ({"hidden_size": 18}, "hidden_size"),
        ({"hidden_size": 24, "masks": True}, "the mask head's last width"),
        ({"backbone": "resnet18"}, "backbone: expected one of resnet50"),
        ({"dilation": True}, "dilation: expected False with the small backbone"),
        ({"num_queries": 0}, "num_queries: expected a whole number from 1"),
        ({"positions": "learned"}, "positions: expected one of every_layer"),
    ],
)
def test_configurations_that_do_not_fit(field, words):
    with pytest.raises(an.ConfigError, match=words):
        replace(SMALL, **{"num_attention_heads": 4, **field})


def test_more_objects_than_queries():
    model, x = small(), images((64, 64))
    with pytest.raises(
        an.InputError, match=r"targets\[0\]: .*at most 5 objects.*got 6"
    ):
        model.losses(model(x), targets(6), torch.tensor([[64, 64]]))


def test_fake_tensors_leave_no_trace():
    model = DETR(SMALL)
    with fake_device():
        to_stand_in(model)
        model(torch.empty(2, 3, 32, 32, device=STAND_IN)).pred_boxes.sum().backward()
    assert not model.positions._tables


@pytest.mark.no_shapes
def test_exported_with_a_list_of_images():
    model = small(SMALL, decoder_layers=1, encoder_layers=1).float()
    x = [one.float() for one in images((32, 40), (40, 24))]
    with torch.no_grad():
        expected = model(x).pred_boxes
        exported = torch.export.export(model, (x,)).module()
        assert torch.allclose(exported(x).pred_boxes, expected, atol=1e-6)
