"""UperNet on Swin: equal to transformers and to a rendering of the definitions; any
size of image; what must not change anything does not; and the files that it is read
from."""

import json
import warnings
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attn_notes as an
from attn_notes.foundations.attention import record_attention
from attn_notes.segmentation.upernet import (
    SIZES,
    PyramidPooling,
    UperNet,
    UperNetConfig,
    UperNetOutput,
)
from attn_notes.segmentation.upernet_evidence import with_head
from attn_notes.segmentation.upernet_formats import FORMATS, HEADS, neighbours_apart
from attn_notes.training.recipes import make_optimizer
from attn_notes.vision.swin_backbone import shifted_windows
from attn_notes.vision.windows import make_windows
from attn_notes.zoo.checkpoints import fit_state
from attn_notes.zoo.factory import count_parameters, create_model

LAYOUTS = Path(__file__).parent / "layouts"
SMALL = UperNetConfig(  # of another size in every respect
    img_size=64,
    num_classes=5,
    embed_dim=8,
    depths=(2, 1, 2, 2),
    num_heads=(1, 2, 2, 4),
    window_size=3,
    mlp_ratio=2.0,
    drop_path_rate=0.0,
    hidden_size=12,
    pool_scales=(1, 2, 5),
    head_dropout=0.0,
    auxiliary_channels=6,
)
SIDES = [(64, 64), (70, 131), (32, 200), (17, 40)]


def shake(model, seed=0):
    """Noise on every weight and statistic: no bias is zero, no norm neutral."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.data.uniform_(0.5, 1.5)
    return model


def small(seed=0, **change):
    """Ours in double precision, shaken, in evaluation mode."""
    torch.manual_seed(seed)
    return shake(UperNet(replace(SMALL, **change)).double().eval(), seed)


def images(rows=2, sides=(64, 64), seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, *sides, generator=random, dtype=torch.float64)


@cache
def theirs(**change):
    """The model of transformers, shaken."""
    library = pytest.importorskip("transformers")
    sizes = dict(
        embed_dim=8, depths=(2, 1, 2, 2), num_heads=(1, 2, 2, 4), window_size=3
    )
    sizes |= dict(mlp_ratio=2.0, drop_path_rate=0.0)
    stages = [f"stage{i}" for i in range(1, 5)]
    swin = library.SwinConfig(**sizes, out_features=stages)
    heads = dict(hidden_size=12, pool_scales=(1, 2, 5), auxiliary_channels=6)
    config = library.UperNetConfig(
        backbone_config=swin, num_labels=5, **heads, **change
    )
    return shake(library.UperNetForSemanticSegmentation(config)).double()


def filled(reference, config=SMALL):
    model = UperNet(config).double()
    fit_state(model, reference.state_dict(), FORMATS, classifier=HEADS)
    return model


# ---- the sizes


@pytest.mark.parametrize("name", SIZES)
def test_counts_and_products(name):
    info, c = an.model_info(name), SIZES[name]
    model = create_model(name, device="meta")
    assert count_parameters(model) == info.parameters
    sides = [(c.img_size, c.img_size), (512, 2048)]
    products = []
    for size in sides:
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            model.eval()(torch.empty(1, 3, *size, device="meta"))
        products.append(flops.get_total_flops() // 2)
    assert products[0] == info.macs
    if "GFLOPs, 512 x 2048" in info.reported:  # the paper's, and its parameters
        assert abs(products[1] / 1e9 - info.reported["GFLOPs, 512 x 2048"]) < 1
        assert f"{info.parameters / 1e6:.0f}M" == info.reported["parameters"]


def test_the_heads_cost_what_their_shapes_say():
    def conv(inputs, outputs, kernel):
        return inputs * outputs * kernel**2 + 2 * outputs

    model, c = (
        create_model("upernet_swin_tiny", device="meta"),
        SIZES["upernet_swin_tiny"],
    )
    d, widths, k = 512, (96, 192, 384, 768), 150
    head = 4 * conv(768, d, 1) + conv(768 + 4 * d, d, 3)
    head += sum(conv(width, d, 1) + conv(d, d, 3) for width in widths[:3])
    head += conv(4 * d, d, 3) + d * k + k
    assert c.backbone.widths == widths
    assert count_parameters(model.decode_head) == head
    assert count_parameters(model.auxiliary_head) == conv(384, 256, 3) + 257 * k


# ---- equal to others


@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_outputs_equal_transformers(sides):
    reference = theirs()
    model = filled(reference)
    with torch.no_grad():
        expected = reference.eval()(images(sides=sides)).logits
        found = model.eval()(images(sides=sides))
    assert found.shape == expected.shape == (2, 5, *sides)
    assert (found - expected).abs().max() < 1e-10 and found.abs().max() > 0.1


def test_loss_and_gradients_equal_transformers():
    reference = theirs()
    model, x = filled(reference).train(), images(sides=(70, 64))
    labels = torch.randint(
        0, 5, (2, 70, 64), generator=torch.Generator().manual_seed(1)
    )
    labels[:, :9] = 255
    reference.train().zero_grad()
    expected = reference(x, labels=labels).loss
    expected.backward()
    output = model(x)
    own = [F.cross_entropy(output[k], labels, ignore_index=255) for k in output]
    loss = own[0] + SMALL.auxiliary_weight * own[1]
    loss.backward()
    assert abs(loss - expected).item() < 1e-10
    grads = {k: p.grad for k, p in reference.named_parameters() if p.grad is not None}
    grads = next(f for f in FORMATS if f.name == "transformers").apply(grads, model)
    own = {k: p.grad for k, p in model.named_parameters()}
    assert grads.keys() == own.keys()
    assert max((own[k] - grads[k]).abs().max().item() for k in own) < 1e-10


def test_the_definition_of_the_head():
    """Pooling by loops over cells, all else by torch's functions."""
    model = small()
    x = images(sides=(72, 40))
    maps = model.backbone.forward_pyramid(x)

    def unit(x, part):
        n, c = part.norm, part.conv
        y = F.conv2d(x, c.weight, padding=c.weight.shape[-1] // 2)
        mean, std = n.running_mean, (n.running_var + n.eps).sqrt()
        y = (y - mean[:, None, None]) / std[:, None, None]
        return (y * n.weight[:, None, None] + n.bias[:, None, None]).clamp(min=0)

    def up(x, like):
        return F.interpolate(x, like.shape[2:], mode="bilinear")

    head = model.decode_head
    top, pooled = maps[-1], []
    h, w = top.shape[2:]
    for s, branch in zip((1, 2, 5), head.pyramid.branches, strict=True):
        cells = top.new_zeros(*top.shape[:2], s, s)
        for i in range(s):
            for j in range(s):
                rows = slice(i * h // s, -(-(i + 1) * h // s))
                columns = slice(j * w // s, -(-(j + 1) * w // s))
                cells[:, :, i, j] = top[:, :, rows, columns].mean((2, 3))
        pooled.append(up(unit(cells, branch), top))
    p = [None, None, None, unit(torch.cat([top, *pooled], 1), head.pyramid.fusion)]
    for i in (2, 1, 0):
        p[i] = unit(maps[i], head.laterals[i]) + up(p[i + 1], maps[i])
    outs = [unit(p[i], head.fpn_convs[i]) for i in range(3)] + [p[3]]
    y = unit(torch.cat([up(o, outs[0]) for o in outs], 1), head.fusion)
    expected = up(head.classifier(y), x)
    assert (model(x) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("sides", [(8, 8), (9, 14)], ids=str)
def test_windows_of_large_maps_are_swins(sides):
    for shifted in (False, True):
        ours = shifted_windows(*sides, 4, shifted)
        swins = make_windows(*sides, 4, shifted)
        assert torch.equal(ours.order, swins.order)
        assert torch.equal(ours.places, swins.places)
        assert (ours.hidden is None) == (swins.hidden is None)
        assert ours.hidden is None or torch.equal(ours.hidden, swins.hidden)


def test_a_single_window_is_shifted_too():
    ours, swins = shifted_windows(3, 4, 4, True), make_windows(3, 4, 4, True)
    assert swins.hidden is None and ours.hidden.any()
    tokens = torch.arange(12.0).view(1, 12, 1)
    assert torch.equal(ours.reverse(ours.partition(tokens)), tokens)


# ---- parts left out


def test_without_pooling_and_without_the_auxiliary_head():
    model = small(pool_scales=(), auxiliary=False).train()
    assert not any(
        "branches" in k or "auxiliary" in k for k, _ in model.named_parameters()
    )
    output = model(images())
    assert isinstance(output, UperNetOutput) and [*output] == ["logits"]


def test_heads_that_are_compared_differ_in_nothing_else():
    """Backbone and auxiliary head begin alike; the heads are what they are called."""
    full, no_pooling, last = (
        with_head(head, 3) for head in ("UperNet", "without pooling", "last map")
    )
    for other in (no_pooling, last):
        for key, value in other.state_dict().items():
            if not key.startswith("decode_head"):
                assert torch.equal(value, full.state_dict()[key]), key
    assert not len(no_pooling.decode_head.pyramid.branches)
    assert not torch.equal(
        full.backbone.patch_embedding.weight,
        with_head("UperNet", 4).backbone.patch_embedding.weight,
    )
    maps = last.backbone.forward_pyramid(torch.randn(1, 3, 64, 64))
    found, classifier = last.decode_head(maps), last.decode_head.classifier
    by_hand = torch.einsum("kc,bchw->bkhw", classifier.weight[..., 0, 0], maps[-1])
    assert found.shape == (1, 2, 4, 4) and torch.allclose(found, by_hand, atol=1e-6)


def test_training_gives_both_and_evaluation_a_tensor():
    model = small()
    assert isinstance(model(images()), torch.Tensor)
    output = model.train()(images(sides=(40, 30)))
    assert [*output] == ["logits", "aux_logits"]
    assert output.logits.shape == output["aux_logits"].shape == (2, 5, 40, 30)


def test_pooling_knows_the_whole_map():
    """With a scale of 1 every place depends on every other, without on neighbours."""
    x = images(sides=(9, 9))[:, :1].expand(2, 4, 9, 9).clone()
    for scales, far in (((1,), True), ((), False)):
        torch.manual_seed(0)
        module = PyramidPooling(4, 3, scales).double().eval()
        y = x.clone()
        y[:, :, 8, 8] += 1
        changed = (module(x) - module(y)).abs().amax(1) > 0
        assert bool(changed[:, 0, 0].any()) == far


# ---- invariants


def test_company_changes_nothing():
    model, x = small(), images(rows=3)
    with torch.no_grad():
        together = model(x)
        for i in range(3):
            assert torch.allclose(model(x[i : i + 1])[0], together[i], atol=1e-12)


def test_class_maps_of_other_sizes():
    model = small()
    with torch.no_grad():
        logits = model(images())
    first, second = model.post_process(logits, [(64, 64), (31, 50)])
    assert torch.equal(first, logits[0].argmax(0)) and second.shape == (31, 50)
    assert [x.shape for x in model.post_process(logits)] == 2 * [(64, 64)]
    even = torch.zeros(1, 5, 4, 4)
    even[:, 3] = 1
    assert (model.post_process(even, [(7, 9)])[0] == 3).all()


def test_recorded_attention():
    model, x = small(), images(sides=(40, 24))
    with torch.no_grad(), record_attention(model) as maps:
        found = model(x)
    assert len(maps) == sum(SMALL.depths)
    assert torch.allclose(found, model(x), atol=1e-10)


def test_every_parameter_learns_and_tables_do_not_decay():
    model = small().train()
    output = model(images())
    (output.logits.square().mean() + output.aux_logits.square().mean()).backward()
    assert all(
        p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters()
    )
    recipe = an.model_info("upernet_swin_tiny").recipes["paper"]
    _, spared = make_optimizer(model, recipe).param_groups
    ids = {id(p) for p in spared["params"]}
    table = model.backbone.stages[0].blocks.layers[0].position_bias.table
    assert id(table) in ids and id(model.decode_head.fusion.norm.weight) in ids
    assert id(model.decode_head.fusion.conv.weight) not in ids


def test_the_papers_recipe():
    recipe = an.model_info("upernet_swin_tiny").recipes["paper"]
    assert (recipe.optimizer, recipe.learning_rate) == ("adamw", 6e-5)
    assert (recipe.weight_decay, recipe.schedule) == (0.01, "linear")
    assert (recipe.warmup_steps, recipe.max_steps) == (1500, 160_000)
    assert recipe.batch_size == 16 and SIZES["upernet_swin_base"].img_size == 512


# ---- bad input

WRONG = {
    "one channel": torch.zeros(2, 1, 64, 64),
    "a volume": torch.zeros(2, 3, 8, 8, 8),
    "whole numbers": torch.zeros(2, 3, 64, 64, dtype=torch.int16),
    "no image": torch.zeros(0, 3, 64, 64),
    "less than a patch": torch.zeros(2, 3, 3, 64),
    "a list": [torch.zeros(3, 64, 64)],
}


@pytest.mark.no_shapes
@pytest.mark.parametrize("given", WRONG.values(), ids=WRONG)
def test_bad_images(given):
    with pytest.raises(an.InputError, match=r"^images: expected .*; got .*") as caught:
        small()(given)
    assert "\n" not in str(caught.value)


@pytest.mark.no_shapes
def test_a_single_image_in_training():
    with pytest.raises(an.InputError, match="expected two or more in training"):
        small().train()(images(rows=1))


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "change",
    [
        dict(depths=(2,), num_heads=(1,)),
        dict(num_heads=(1, 2, 2)),
        dict(num_heads=(3, 2, 2, 4)),
        dict(pool_scales=(1, 0)),
        dict(hidden_size=0),
        dict(num_classes=0),
        dict(head_dropout=1.0),
        dict(auxiliary_weight=-1.0),
    ],
    ids=str,
)
def test_bad_configurations(change):
    with pytest.raises(an.ConfigError, match=f"{next(iter(change))}: expected .*; got"):
        replace(SMALL, **change)


# ---- files


def test_saved_and_read_back(tmp_path):
    model = small().float()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        again = create_model("upernet_swin_tiny", tmp_path)
    assert again.config == model.config
    assert torch.equal(again(images().float()), model(images().float()))


def test_a_folder_of_transformers(tmp_path):
    reference = theirs()
    reference.float().save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        model = create_model("upernet_swin_tiny", tmp_path, img_size=64)
    assert not model.not_loaded
    expected = replace(SMALL, head_dropout=0.1)
    assert asdict(model.config) == asdict(expected)
    with torch.no_grad():
        found, other = (
            model(images().float()),
            reference.eval()(images().float()).logits,
        )
    assert torch.allclose(found, other, atol=1e-4)
    reference.double()
    config = json.loads((tmp_path / "config.json").read_text())
    for change in (
        {"auxiliary_num_convs": 2},
        {"auxiliary_concat_input": True},
        {"backbone_config": {**config["backbone_config"], "model_type": "resnet"}},
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(an.CheckpointError, match="expected .*; got"):
            create_model("upernet_swin_tiny", tmp_path)


WIDTHS = {96: 12, 192: 24, 384: 48, 768: 96, 288: 36, 576: 72, 1152: 144, 2304: 288}
WIDTHS |= {1536: 192, 3072: 384, 512: 16, 256: 8, 2048: 64, 2816: 160}
NARROW = dict(embed_dim=12, hidden_size=16, auxiliary_channels=8)


def official(name):
    """The names of a released network, its widths small."""
    keys = json.loads((LAYOUTS / f"{name}.json").read_text())["keys"]
    torch.manual_seed(0)
    state = {}
    for key, shape in keys.items():
        counted = "relative_position_index" in key or "num_batches" in key
        shape = shape if counted else [WIDTHS.get(n, n) for n in shape]
        state[key] = torch.zeros(shape).long() if counted else torch.rand(shape) + 0.1
    return state


@pytest.mark.parametrize("name", ["upernet_swin", "upernet_mmseg"])
def test_the_authors_files(name, tmp_path):
    state = official(name)
    meta = {"meta": {"epoch": 127, "iter": 160_000}, "state_dict": state}
    torch.save(meta, tmp_path / "upernet.pth")
    with warnings.catch_warnings(action="error"):
        model = create_model("upernet_swin_tiny", tmp_path / "upernet.pth", **NARROW)
    assert not model.not_loaded
    head = model.decode_head
    for ours, key in (
        (head.pyramid.branches[3].norm.running_var, "psp_modules.3.1.bn.running_var"),
        (head.pyramid.fusion.conv.weight, "bottleneck.conv.weight"),
        (head.laterals[1].conv.weight, "lateral_convs.1.conv.weight"),
        (head.fpn_convs[2].norm.bias, "fpn_convs.2.bn.bias"),
        (head.fusion.conv.weight, "fpn_bottleneck.conv.weight"),
        (head.classifier.bias, "conv_seg.bias"),
    ):
        assert torch.equal(ours, state[f"decode_head.{key}"])
    convs = state["auxiliary_head.convs.0.conv.weight"]
    assert torch.equal(model.auxiliary_head.conv.conv.weight, convs)
    assert torch.equal(model.backbone.norm.weight, state["backbone.norm3.weight"])
    assert torch.equal(model.backbone.norms[1].bias, state["backbone.norm1.bias"])
    merging = model.backbone.stages[2].merging
    if name == "upernet_swin":
        key = "backbone.layers.1.downsample.reduction.weight"
        assert torch.equal(merging.reduction.weight, state[key])
        return
    key = "backbone.stages.1.downsample"
    weight, gain = (state[f"{key}.{k}.weight"] for k in ("reduction", "norm"))
    assert torch.equal(merging.norm.weight, neighbours_apart(gain))
    x = torch.randn(2, 24, 6, 8)  # as mmsegmentation merges
    unfolded = nn.functional.unfold(x, 2, stride=2).mT
    bias = state[f"{key}.norm.bias"]
    expected = F.layer_norm(unfolded, (96,), gain, bias) @ weight.T
    merging.norm.bias.data = neighbours_apart(bias)
    found = merging(x.permute(0, 2, 3, 1)).flatten(1, 2)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("library", ["timm", "Swin", "book"])
def test_a_swin_fills_the_backbone(library, tmp_path):
    sizes = {"embed_dim": 12, "depths": (2, 2, 6, 2), "num_classes": 7}
    swin = create_model("swin_tiny_patch4_window7_224", **sizes)
    path = tmp_path / "swin.pth"
    if library == "timm":
        timm = pytest.importorskip("timm")
        swin = timm.create_model("swin_tiny_patch4_window7_224", **sizes)
        torch.save(swin.state_dict(), path)
    elif library == "Swin":
        state = official("upernet_swin")
        state = {k[9:]: v for k, v in state.items() if k.startswith("backbone.")}
        state = {k: v for k, v in state.items() if not k.startswith("norm")}
        state |= {"norm.weight": torch.rand(96), "norm.bias": torch.rand(96)}
        state |= {"head.weight": torch.rand(7, 96), "head.bias": torch.rand(7)}
        torch.save({"model": state}, path)
    else:
        swin.save_pretrained(tmp_path / "book")
        path = tmp_path / "book"
    with pytest.warns(an.CheckpointWarning, match="left as they were: backbone.norms"):
        model = create_model("upernet_swin_tiny", path, **NARROW)
    parts = {key.split(".")[0] for key in model.not_loaded}
    assert parts == {"backbone", "decode_head", "auxiliary_head"}
    kept = [key for key in model.not_loaded if key.startswith("backbone")]
    assert all(key.startswith("backbone.norms.") for key in kept)
    assert model.config.num_classes == 150 and model.config.img_size == 512
    if library != "Swin":
        theirs = swin.norm.weight
        assert torch.equal(model.backbone.norm.weight, theirs)


def test_another_number_of_classes(tmp_path):
    small().float().save_pretrained(tmp_path)
    with pytest.warns(
        an.CheckpointWarning, match="another size: .*decode_head.classif"
    ):
        model = create_model("upernet_swin_tiny", tmp_path, num_classes=3)
    heads = {"decode_head.classifier", "auxiliary_head.classifier"}
    assert {key.rpartition(".")[0] for key in model.not_loaded} == heads
