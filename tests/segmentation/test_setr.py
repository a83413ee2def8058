"""SETR: equal to its authors' code and to a rendering of the definitions, in any size
of image; what must not change anything does not; and the files that it is read from."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import attn_notes as an
from attn_notes.foundations.attention import record_attention
from attn_notes.segmentation.setr import (
    LAYERS,
    SETR,
    SIZES,
    SETRConfig,
    SETROutput,
)
from attn_notes.segmentation.setr_formats import FORMATS, HEADS, OFFICIAL_FORMAT
from attn_notes.training.recipes import make_optimizer
from attn_notes.zoo.checkpoints import fit_state
from attn_notes.zoo.factory import count_parameters, create_model

LAYOUTS = Path(__file__).parent / "layouts"
STORED = np.load(LAYOUTS / "setr_outputs.npz")
SMALL = SETRConfig(  # of another size in every respect
    img_size=32,
    patch_size=8,
    num_classes=5,
    embed_dim=12,
    depth=4,
    num_heads=3,
    mlp_ratio=2.0,
    hidden_size=6,
    layers=(1, 3),
)
DECODERS = [*LAYERS]


def small(decoder="pup", seed=0, **change):
    """In double precision, with noise on every weight and statistic, in evaluation."""
    torch.manual_seed(seed)
    own = {"decoder": decoder, "class_token": decoder != "mla"}
    own |= {"layers": (2, 4)} if decoder == "mla" else {}
    model = SETR(replace(SMALL, **own | change)).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.data.uniform_(*((0.5, 1.5) if "var" in name else (-0.5, 0.5)))
    return model


def images(rows=2, sides=(32, 32), seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, *sides, generator=random, dtype=torch.float64)


# ---- the sizes


@pytest.mark.parametrize("name", SIZES)
def test_counts_and_products(name):
    info = an.model_info(name)
    model = create_model(name, device="meta")
    assert count_parameters(model) == info.parameters
    side = info.config.img_size
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model.eval()(torch.empty(1, 3, side, side, device="meta"))
    assert flops.get_total_flops() // 2 == info.macs


# ---- equal to the authors' code


def official_weight(i, key, shape):
    """The number of a place, as the stored outputs were made: whole numbers only."""
    n = torch.arange(int(np.prod(shape)))
    w = ((n * n % 65521 * 7919 + n * 31 + i * 104729) % 65521).double() / 32760.5 - 1
    w = w.view(tuple(shape))
    if "running_var" in key:
        return 1 + 0.5 * w
    if w.ndim == 1 and key.endswith("weight"):
        return 1 + 0.3 * w
    if w.ndim > 1 and shape[0] > 1 and "pos_embed" not in key and "cls" not in key:
        return w * 1.5 / w[0].numel() ** 0.5
    return w


def official_state(decoder, dim=12, depth=4, side=4, classes=5):
    """The authors' names at a smaller size, filled by the formula."""
    keys = json.loads((LAYOUTS / f"setr_{decoder}.json").read_text())["keys"]
    old, kept = {1024: dim, 3072: 3 * dim, 4096: 4 * dim, 2305: side**2 + 1}, {}
    heads = 2 if decoder == "naive" else 4
    old |= {19: classes}
    for key, shape in keys.items():
        parts = key.split(".")
        if parts[1] == "blocks" and int(parts[2]) >= depth:
            continue
        if parts[0] == "auxiliary_head" and int(parts[1]) >= heads:
            continue
        if "conv_seg" in key or "num_batches" in key:
            continue
        kept[key] = [old.get(n, n) for n in shape]
    found = {k: official_weight(i, k, kept[k]) for i, k in enumerate(sorted(kept))}
    counted = [key for key in kept if key.endswith("running_var")]
    zero = torch.zeros((), dtype=torch.int64)
    return found | {f"{k[:-11]}num_batches_tracked": zero for k in counted}


@pytest.mark.parametrize("decoder", DECODERS)
def test_outputs_equal_the_authors_code(decoder):
    config = SETRConfig(
        img_size=64,
        num_classes=5,
        embed_dim=12,
        depth=4,
        num_heads=3,
        decoder=decoder,
        class_token=decoder != "mla",
        layers=(1, 2) if decoder == "naive" else (1, 2, 3, 4),
    )
    model = SETR(config).double()
    fit_state(model, official_state(decoder), FORMATS, classifier=HEADS)
    assert not getattr(model, "not_loaded", ())
    x = torch.sin(torch.arange(2 * 3 * 64 * 64, dtype=torch.float64) * 0.37)
    model.train()
    for module in model.modules():  # statistics are those of the file
        module.training = isinstance(module, SETR)
    with torch.no_grad():
        output = model(x.view(2, 3, 64, 64))
    found = {decoder: output.logits}
    found |= {f"{decoder}_aux{i}": y for i, y in enumerate(output.aux_logits)}
    assert set(found) == {k for k in STORED.files if k.startswith(decoder)}
    for key, logits in found.items():
        expected = torch.from_numpy(STORED[key])
        assert (logits[:, :, 3::16, 5::16] - expected).abs().max() < 1e-10
        assert expected.abs().max() > 0.1


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_authors_names_and_shapes(decoder):
    """Every tensor of the large network has its place here, and the other way."""
    stored = json.loads((LAYOUTS / f"setr_{decoder}.json").read_text())["keys"]
    state = {key: torch.empty(shape, device="meta") for key, shape in stored.items()}
    model = create_model(f"setr_{decoder}_large", device="meta")
    assert OFFICIAL_FORMAT.recognize(set(state))
    found = {k: v.shape for k, v in OFFICIAL_FORMAT.apply(state, model).items()}
    assert found == {k: v.shape for k, v in model.state_dict().items()}


# ---- equal to the definitions


def definition(model, x):
    """The decoders by torch's functions, from the states of ViT's blocks."""
    c, head = model.config, model.decode_head
    vit = model.encoder
    b, p = len(x), c.patch_size
    grid = [side // p for side in x.shape[2:]]
    tokens = F.conv2d(x, *vit.patch_embedding.projection.parameters(), stride=p)
    tokens = tokens.flatten(2).mT
    if c.class_token:
        tokens = torch.cat([vit.class_token.expand(b, 1, -1), tokens], 1)
    tokens = tokens + vit.positions(*grid)
    states = [tokens := block(tokens) for block in vit.encoder.layers]

    def map_of(state, norm):
        z = F.layer_norm(state, norm.normalized_shape, norm.weight, norm.bias, 1e-6)
        return z[:, int(c.class_token) :].mT.unflatten(2, grid)

    def unit(z, part):
        z = F.conv2d(z, part.conv.weight, part.conv.bias, 1, part.conv.padding)
        n = part.norm
        mean, std = n.running_mean, (n.running_var + n.eps).sqrt()
        z = (z - mean[:, None, None]) / std[:, None, None]
        return (z * n.weight[:, None, None] + n.bias[:, None, None]).clamp(min=0)

    def up(z, size, corners=False):
        return F.interpolate(z, tuple(size), mode="bilinear", align_corners=corners)

    full = x.shape[2:]
    if c.decoder == "mla":
        above, streams = 0, {}
        for i in reversed(range(len(c.layers))):
            y = map_of(states[c.layers[i] - 1], head.norms[i])
            above = above + unit(y, head.laterals[i])
            y = unit(above, head.convs[i])
            y = unit(unit(y, head.outs[i][0]), head.outs[i][1])
            streams[i] = up(y, [4 * side for side in grid], True)
        z = torch.cat([streams[i] for i in sorted(streams)], 1)
        return up(F.conv2d(z, *head.classifier.parameters(), padding=1), full)
    z = map_of(states[-1], head.norm)
    for i, part in enumerate(head.convs):
        z = unit(z, part)
        if i < len(head.convs) - 1:
            z = up(z, [2 * side for side in z.shape[2:]])
    return up(F.conv2d(z, *head.classifier.parameters()), full)


@pytest.mark.parametrize("sides", [(32, 32), (40, 24), (8, 64)], ids=str)
@pytest.mark.parametrize("decoder", DECODERS)
def test_the_definition(decoder, sides):
    model, x = small(decoder), images(sides=sides)
    with torch.no_grad():
        found, expected = model(x), definition(model, x)
    assert found.shape == (2, 5, *sides)
    assert (found - expected).abs().max() < 1e-10 < found.std()


@pytest.mark.parametrize("decoder", DECODERS)
def test_gradients_equal_those_of_the_definition(decoder):
    model, x = small(decoder), images(sides=(24, 32))
    own = [model.encoder.positions.weight, model.decode_head.classifier.weight]
    own.append(model.encoder.encoder.layers[0].attention.in_proj_weight)
    first = torch.autograd.grad(model(x).square().sum(), own)
    second = torch.autograd.grad(definition(model, x).square().sum(), own)
    for a, b in zip(first, second, strict=True):
        assert (a - b).norm() < 1e-10 * b.norm()


def test_pup_has_a_step_for_every_doubling():
    for patch, count in ((2, 1), (4, 2), (8, 3), (16, 4)):
        model = SETR(replace(SMALL, patch_size=patch, img_size=32))
        assert model.decode_head.factors == (2,) * (count - 1) + (1,)
    assert len(create_model("setr_pup_large", device="meta").decode_head.convs) == 4


# ---- training and evaluation


@pytest.mark.parametrize("decoder", DECODERS)
def test_training_gives_a_list_and_evaluation_a_tensor(decoder):
    model = small(decoder)
    assert isinstance(model(images()), torch.Tensor)
    output = model.train()(images())
    assert isinstance(output, SETROutput) and len(output.aux_logits) == 2
    assert {x.shape for x in output.aux_logits} == {output.logits.shape}
    plain = small(decoder, auxiliary=False).train()(images())
    assert [*plain] == ["logits"]


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_parameter_learns(decoder):
    model = small(decoder).train()
    output = model(images())
    sum(x.square().mean() for x in (output.logits, *output.aux_logits)).backward()
    for name, parameter in model.named_parameters():
        if name.endswith("conv.bias"):  # batch normalization takes it away again
            continue
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_no_decay_on_positions_and_ten_times_the_rate_in_the_heads():
    recipe = an.model_info("setr_pup_large").recipes["paper"]
    model = small("pup")
    scales = {}
    ids = {id(p): n for n, p in model.named_parameters()}
    for group in make_optimizer(model, recipe).param_groups:
        scales |= {ids[id(p)]: group["lr_scale"] for p in group["params"]}
    assert scales["decode_head.classifier.weight"] == 10
    assert scales["auxiliary_heads.0.norm.weight"] == 10
    assert scales["encoder.positions.weight"] == 1
    assert "encoder.positions.weight" in model.no_weight_decay()
    assert (recipe.momentum, recipe.weight_decay, recipe.batch_size) == (0.9, 0, 8)


@pytest.mark.parametrize("decoder", DECODERS)
def test_company_changes_nothing(decoder):
    model, x = small(decoder), images(rows=3)
    with torch.no_grad():
        together = model(x)
        for i in range(3):
            assert torch.allclose(model(x[i : i + 1])[0], together[i], atol=1e-12)


def test_every_place_depends_on_every_other():
    """Through one layer of attention, the corner on the opposite one."""
    x = images(1, (32, 32))
    y = x.clone()
    y[:, :, -1, -1] += 1
    model = small("naive", depth=1, layers=(1,))
    changed = (model(x) - model(y)).abs().amax(1)[0] > 1e-12
    assert changed[0, 0]


def test_recorded_attention():
    model, x = small(), images(sides=(40, 24))
    with torch.no_grad(), record_attention(model) as maps:
        found = model(x)
    assert [m.shape for m in maps.values()] == 4 * [(2, 3, 16, 16)]
    assert torch.allclose(found, model(x), atol=1e-10)


def test_class_maps_of_other_sizes():
    model = small()
    with torch.no_grad():
        logits = model(images())
    first, second = model.post_process(logits, [(32, 32), (31, 50)])
    assert torch.equal(first, logits[0].argmax(0)) and second.shape == (31, 50)
    assert [x.shape for x in model.post_process(logits)] == 2 * [(32, 32)]


def test_gradient_checkpointing_changes_nothing():
    model, x = small("mla").train(), images()
    first = model(x).logits
    model.encoder.encoder.gradient_checkpointing = True
    assert torch.allclose(model(x).logits, first, atol=1e-12)


# ---- bad input

WRONG = {
    "one channel": torch.zeros(2, 1, 32, 32),
    "a volume": torch.zeros(2, 3, 8, 8, 8),
    "whole numbers": torch.zeros(2, 3, 32, 32, dtype=torch.int16),
    "no image": torch.zeros(0, 3, 32, 32),
    "no whole patches": torch.zeros(2, 3, 30, 32),
    "a list": [torch.zeros(3, 32, 32)],
}


@pytest.mark.no_shapes
@pytest.mark.parametrize("given", WRONG.values(), ids=WRONG)
def test_bad_images(given):
    with pytest.raises(an.InputError, match=r"^images: expected .*; got .*") as caught:
        small()(given)
    assert "\n" not in str(caught.value)


@pytest.mark.no_shapes
def test_a_single_patch_in_training():
    with pytest.raises(an.InputError, match="expected two patches or more in training"):
        small().train()(images(1, (8, 8)))
    assert small()(images(1, (8, 8))).shape == (1, 5, 8, 8)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "change",
    [
        dict(layers=(3, 1)),
        dict(layers=(1, 1)),
        dict(layers=(1, 5)),
        dict(layers=(0,)),
        dict(patch_size=3, img_size=33),
        dict(patch_size=7),
        dict(num_heads=5),
        dict(decoder="mla", layers=()),
        dict(decoder="mla", layers=(1, 3)),
        dict(decoder="fpn"),
        dict(num_classes=0),
        dict(auxiliary_weight=-1.0),
    ],
    ids=str,
)
def test_bad_configurations(change):
    with pytest.raises(an.ConfigError, match="expected .*; got"):
        replace(SMALL, **change)
    with pytest.raises(an.ConfigError, match="hidden_size: expected an even number"):
        replace(SMALL, decoder="mla", layers=(2, 4), hidden_size=5)


# ---- files


@pytest.mark.parametrize("decoder", DECODERS)
def test_saved_and_read_back(decoder, tmp_path):
    model = small(decoder).float()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        again = create_model(f"setr_{decoder}_base", tmp_path)
    assert again.config == model.config
    assert torch.equal(again(images().float()), model(images().float()))
    with pytest.warns(an.CheckpointWarning, match="another size"):
        other = create_model(f"setr_{decoder}_base", tmp_path, num_classes=3)
    heads = {key.rpartition(".")[0] for key in other.not_loaded}
    assert heads == {
        f"{own}.classifier"
        for own in ("decode_head", "auxiliary_heads.0", "auxiliary_heads.1")
    }


NARROW = dict(embed_dim=12, depth=4, num_heads=3, img_size=64)


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_authors_files(decoder, tmp_path):
    """With a counter and `conv_seg`, behind `state_dict`; positions of another grid."""
    state = official_state(decoder)
    state |= {"decode_head.conv_seg.weight": torch.zeros(5, 512, 1, 1)}
    state["backbone.pos_embed"] = torch.rand(1, 10, 12)
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "setr.pth")
    change = {**NARROW, "num_classes": 5}
    change["layers"] = (1, 2) if decoder == "naive" else (1, 2, 3, 4)
    with pytest.warns(an.CheckpointWarning, match="interpolated from 3 x 3 to 4 x 4"):
        model = create_model(f"setr_{decoder}_base", tmp_path / "setr.pth", **change)
    assert not model.not_loaded
    own = model.encoder.encoder.layers[1].attention.in_proj_weight
    expected = state["backbone.blocks.1.attn.qkv.weight"].float()
    assert torch.equal(own, expected)
    assert len(model.encoder.positions.weight) == 16 + (decoder != "mla")


@pytest.mark.filterwarnings("ignore:positions interpolated")
@pytest.mark.parametrize("decoder", ["pup", "mla"])
@pytest.mark.parametrize("source", ["book", "timm", "distilled", "transformers"])
def test_a_vit_fills_the_encoder(source, decoder, tmp_path):
    name = "deit_small_distilled_patch16_224" if source == "distilled" else None
    path, sizes = tmp_path / "vit.pth", {k: NARROW[k] for k in NARROW if k[0] != "i"}
    name = name or "vit_small_patch16_224"
    vit = create_model(name, **sizes)
    vit.encoder.layers[3].norm2.bias.data.uniform_()
    expected = vit.encoder.layers[3].norm2.bias
    if source == "timm":
        timm = pytest.importorskip("timm")
        vit = timm.create_model(name, **sizes)
        expected = vit.blocks[3].norm2.bias.data.uniform_()
        torch.save(vit.state_dict(), path)
    elif source == "transformers":
        library = pytest.importorskip("transformers")
        config = library.ViTConfig(
            hidden_size=12, num_hidden_layers=4, num_attention_heads=3
        )
        config.intermediate_size = 48
        vit = library.ViTForImageClassification(config)
        state = vit.state_dict()
        (key,) = (k for k in state if ".3.layernorm_after.bias" in k)
        expected = state[key].uniform_()
        path = tmp_path / "folder"
        vit.save_pretrained(path)
    else:
        path = tmp_path / "folder"
        vit.save_pretrained(path)
    layers = {"layers": (1, 2, 3, 4)}
    with pytest.warns(an.CheckpointWarning, match="left as they were: auxiliary_heads"):
        model = create_model(f"setr_{decoder}_base", path, **NARROW | layers)
    assert torch.equal(model.encoder.encoder.layers[3].norm2.bias, expected)
    assert all("head" in key for key in model.not_loaded)
    assert len(model.encoder.positions.weight) == 16 + (decoder != "mla")
