"""TransUNet: equal to its authors' code and to a rendering of the definitions; any size
of image; what must not change anything does not; and the files that it is read from."""

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import attn_notes as an
from attn_notes.foundations.attention import record_attention
from attn_notes.segmentation.transunet import (
    SIZES,
    TransUNet,
    TransUNetConfig,
    dice_and_cross_entropy,
)
from attn_notes.segmentation.transunet_formats import FORMATS, HEADS, OFFICIAL_FORMAT
from attn_notes.segmentation.transunet_resnet import EvenConv, SkipResNet
from attn_notes.training.recipes import make_optimizer
from attn_notes.vision.vit import ViT, ViTConfig
from attn_notes.zoo.checkpoints import fit_state
from attn_notes.zoo.factory import count_parameters, create_model

STORED = json.loads((Path(__file__).parent / "layouts" / "transunet.json").read_text())
SMALL = TransUNetConfig(  # as the stored outputs have it
    img_size=64,
    num_classes=3,
    resnet_layers=(1, 2, 1),
    resnet_width=32,
    embed_dim=32,
    depth=2,
    num_heads=4,
    mlp_ratio=1.5,
    dropout=0.0,
    decoder_channels=(24, 16, 8, 8),
)


def filled(skips=3):
    """Weights of the authors' names and shapes, each by a formula."""
    shapes, state = STORED["small"] | (STORED["small1"] if skips == 1 else {}), {}
    for k, (name, shape) in enumerate(sorted(shapes.items())):
        if not shape:
            state[name] = torch.tensor(0)
            continue
        x = torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 0.7 + k)
        inputs = math.prod(shape[1:])
        scale = 0.1 if len(shape) in (1, 3) else inputs**-0.5
        x = (x * scale * 1.4).view(shape)
        if name.endswith("running_var"):
            x = 1 + x.abs()
        elif len(shape) == 1 and name.endswith("weight"):
            x = 1 + x
        state[name] = x
    return state


def small(skips=3, **change):
    """Ours with these weights, in double precision, in evaluation mode."""
    model = TransUNet(replace(SMALL, num_skips=skips, **change)).double()
    if not change:
        fit_state(model, filled(skips), FORMATS, classifier=HEADS)
    return model.eval()


def images(sides=(64, 64), rows=2):
    count = rows * 3 * sides[0] * sides[1]
    x = torch.sin(torch.arange(count, dtype=torch.float64) * 0.37)
    return x.view(rows, 3, *sides)


# ---- the sizes


@pytest.mark.parametrize("name", SIZES)
def test_counts_and_products(name):
    info = an.model_info(name)
    model = create_model(name, device="meta")
    assert count_parameters(model) == info.parameters
    side = SIZES[name].img_size
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model.eval()(torch.empty(1, 3, side, side, device="meta"))
    assert flops.get_total_flops() // 2 == info.macs


def test_the_authors_names_and_shapes():
    model = create_model("transunet", device="meta")
    own = {k: list(v.shape) for k, v in model.state_dict().items()}
    count = sum(
        math.prod(shape)
        for name, shape in STORED["full"].items()
        if "running" not in name and "tracked" not in name
    )
    assert count == an.model_info("transunet").parameters == 105_277_081
    state = {k: torch.empty(s, device="meta") for k, s in STORED["full"].items()}
    found = OFFICIAL_FORMAT.apply(state, model)
    assert {k: list(v.shape) for k, v in found.items()} == own


# ---- equal to others


@pytest.mark.parametrize("skips", [3, 1])
def test_outputs_equal_the_authors(skips):
    with torch.no_grad():
        found = small(skips)(images())[:, :, ::7, ::5].flatten()
    expected = torch.tensor(STORED["logits"][str(skips)], dtype=torch.float64)
    assert (found - expected).abs().max() < 1e-10 * expected.abs().max()


def test_loss_and_gradients_equal_the_authors():
    model, shapes = small(1).train(), STORED["small"] | STORED["small1"]
    labels = (torch.arange(2 * 64 * 64) * 7 // 11 % 3).view(2, 64, 64)
    terms = model.losses(model(images()), labels)
    assert terms.keys() == model.loss_weights.keys()
    values = [terms[k] / 2 for k in ("cross_entropy", "dice")]
    assert torch.allclose(torch.stack(values), torch.tensor(STORED["loss"]).double())
    sum(model.loss_weights[k] * terms[k] / 2 for k in terms).backward()
    norms = {}  # tensors of the same norm, in ours' names
    for name, norm in STORED["grad"].items():
        shape = shapes[name]
        value = norm / math.prod(shape) ** 0.5
        norms[name] = torch.full(shape, value, dtype=torch.float64)
    norms = OFFICIAL_FORMAT.apply(norms, model)
    for name, parameter in model.named_parameters():
        own, expected = parameter.grad.norm(), norms[name].norm()
        assert abs(own - expected) < 1e-9 * max(1.0, expected.item()), name


def test_the_definition():
    """The encoder and the decoder, from softmax and convolutions alone."""
    model, x = small(), images((32, 48))
    with torch.no_grad():
        y, skips = model.backbone(x)
        p = model.patch_embedding.projection
        z = torch.einsum("bchw,dc->bhwd", y, p.weight[:, :, 0, 0]) + p.bias
        z = z.flatten(1, 2) + model.positions(2, 3)
        for block in model.encoder.layers:
            a = block.norm1(z)
            w, b = block.attention.in_proj_weight, block.attention.in_proj_bias
            q, k, v = (t.unflatten(2, (4, 8)) for t in (a @ w.T + b).chunk(3, 2))
            s = torch.einsum("bnhe,bmhe->bhnm", q, k) / 8**0.5
            a = torch.einsum("bhnm,bmhe->bnhe", s.softmax(-1), v).flatten(2)
            z = z + block.attention.out_proj(a)
            f = block.feed_forward
            z = z + f.linear2(F.gelu(f.linear1(block.norm2(z))))
        z = model.encoder.norm(z).mT.unflatten(2, (2, 3))
        z = model.decoder.widen(z)
        for i, block in enumerate(model.decoder.blocks):
            size = 2 * z.shape[2], 2 * z.shape[3]
            z = F.interpolate(z, size, mode="bilinear", align_corners=True)
            z = block.conv2(block.conv1(torch.cat([z, *skips[i : i + 1]], 1)))
        expected = model.segmentation_head(z)
        assert (model(x) - expected).abs().max() < 1e-10 * expected.abs().max()


def test_filters_are_standardized():
    conv = EvenConv(3, 4, 3).double()
    w = conv.weight.detach()
    mean, var = w.mean((1, 2, 3), keepdim=True), w.var((1, 2, 3), False, keepdim=True)
    expected = F.conv2d(images(), (w - mean) / (var + 1e-5).sqrt(), padding=1)
    assert (conv(images()) - expected).abs().max() < 1e-10


def test_dice_by_hand():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 5).double()
    labels = torch.randint(3, (2, 4, 5))
    labels[0, :2] = -100
    p, scores, logs = logits.softmax(1), [], []
    for k in range(3):
        both = sizes = 0.0
        for b, y, x in (labels >= 0).nonzero().tolist():
            g = float(labels[b, y, x] == k)
            both, sizes = both + p[b, k, y, x] * g, sizes + p[b, k, y, x] ** 2 + g
            logs += [-p[b, k, y, x].log()] if g else []
        scores.append((2 * both + 1e-5) / (sizes + 1e-5))
    dice, cross_entropy = dice_and_cross_entropy(logits, labels)
    assert abs(dice - (1 - sum(scores) / 3)) < 1e-10
    assert abs(cross_entropy - sum(logs) / len(logs)) < 1e-10


# ---- what must hold


@pytest.mark.parametrize("sides", [(16, 32), (32, 80), (64, 64)])
def test_any_size_and_any_batch(sides):
    model, x = small(), images(sides, 3)
    with torch.no_grad():
        found = model(x)
        assert found.shape == (3, 3, *sides)
        for i in range(3):
            assert torch.allclose(model(x[i : i + 1])[0], found[i], atol=1e-9)


def test_maps_of_the_resnet():
    model = SkipResNet(3, (1, 1, 1), 32)
    last, skips = model(torch.randn(1, 3, 64, 96))
    assert last.shape == (1, 512, 4, 6) and model.stride == 16
    shapes = [(1, 256, 8, 12), (1, 128, 16, 24), (1, 32, 32, 48)]
    assert [tuple(x.shape) for x in skips] == shapes
    assert (skips[1][..., -1] == 0).all() and (skips[1][..., -1, :] == 0).all()
    assert model.widths == [32, 128, 256, 512]


def test_without_the_transformer_and_without_the_resnet():
    for change in ({"depth": 0}, {"resnet_layers": (), "num_skips": 0}):
        model = TransUNet(replace(SMALL, **change)).eval()
        assert model(images().float()).shape == (2, 3, 64, 64)
        assert len(model.encoder.layers) == change.get("depth", 2)
    assert model.backbone is None
    assert model.patch_embedding.projection.kernel_size == (16, 16)


def test_tokens_see_all_tokens_without_a_resnet_they_have_no_skips():
    model = small(0, depth=1)
    x = images().requires_grad_()
    model(x)[0, 0, 0, 0].backward()
    assert (x.grad[0].abs().sum(0) > 0).all()  # through attention


def test_attention_is_recorded():
    model = small()
    with record_attention(model) as maps, torch.no_grad():
        model(images())
    assert [*maps] == [f"encoder.layers.{i}.attention.attention" for i in range(2)]
    for one in maps.values():
        assert one.shape == (2, 4, 16, 16)
        assert torch.allclose(one.sum(-1), torch.ones(()).double())


def test_what_decays():
    model = TransUNet(SMALL)
    optimizer = make_optimizer(model, an.model_info("transunet").recipes["paper"])
    spared = {
        id(p)
        for g in optimizer.param_groups
        if not g["weight_decay"]
        for p in g["params"]
    }
    for name, parameter in model.named_parameters():
        norm = parameter.ndim < 2 or name == "positions.weight"
        assert (id(parameter) in spared) == norm, name


# ---- files


def test_a_round_trip(tmp_path):
    model = create_model("transunet_book")
    model.save_pretrained(tmp_path)
    again = create_model("transunet_book", tmp_path)
    x = images().float()
    assert torch.equal(model.eval()(x), again.eval()(x))


def test_begins_with_a_hybrid_vit():
    torch.manual_seed(0)
    start = ViT(
        ViTConfig(
            img_size=32,
            embed_dim=64,
            num_heads=4,
            depth=1,
            num_classes=5,
            mlp_ratio=1.0,
            resnet_layers=(1, 1, 1),
        )
    )
    start.class_token.data.normal_()
    model = TransUNet(
        replace(
            SMALL,
            resnet_layers=(1, 1, 1),
            resnet_width=64,
            embed_dim=64,
            depth=1,
            mlp_ratio=1.0,
        )
    )
    decoder = model.decoder.widen.conv.weight.clone()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit_state(model, start.state_dict(), FORMATS, classifier=HEADS)
    said = " ".join(str(one.message) for one in said)
    assert "interpolated from 2 x 2 to 4 x 4" in said and "decoder" in said
    assert torch.equal(model.decoder.widen.conv.weight, decoder)
    own, theirs = model.backbone.state_dict(), start.backbone.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[key], theirs[key]) for key in own)
    layer = "encoder.layers.0.attention.in_proj_weight"
    assert torch.equal(model.state_dict()[layer], start.state_dict()[layer])


def flax_file(config):
    """The authors' .npz of a hybrid ViT, by the names that their loader asks for."""
    d, h, mlp = config.embed_dim, config.num_heads, round(config.embed_dim * 4)
    shapes = {"cls": (1, 1, d), "head/kernel": (d, 7), "head/bias": (7,)}
    shapes |= {"embedding/kernel": (1, 1, 1024, d), "embedding/bias": (d,)}
    root = "Transformer/"
    side = config.img_size // 16
    shapes[f"{root}posembed_input/pos_embedding"] = (1, side**2 + 1, d)
    for part in ("scale", "bias"):
        shapes[f"{root}encoder_norm/{part}"] = (d,)
    for i in range(config.depth):
        block = f"{root}encoderblock_{i}/"
        for name in ("query", "key", "value"):
            at = f"{block}MultiHeadDotProductAttention_1/{name}/"
            shapes |= {f"{at}kernel": (d, h, d // h), f"{at}bias": (h, d // h)}
        at = f"{block}MultiHeadDotProductAttention_1/out/"
        shapes |= {f"{at}kernel": (h, d // h, d), f"{at}bias": (d,)}
        for j, (a, b) in enumerate(((d, mlp), (mlp, d))):
            at = f"{block}MlpBlock_3/Dense_{j}/"
            shapes |= {f"{at}kernel": (a, b), f"{at}bias": (b,)}
        for j in (0, 2):
            shapes |= {
                f"{block}LayerNorm_{j}/{part}": (d,) for part in ("scale", "bias")
            }
    shapes["conv_root/kernel"] = (7, 7, 3, 64)
    norm = lambda at, c: {f"{at}/{part}": (1, 1, 1, c) for part in ("scale", "bias")}
    shapes |= norm("gn_root", 64)
    inputs = 64
    for s, count in enumerate(config.resnet_layers):
        c = 64 * 2**s
        for u in range(count):
            at = f"block{s + 1}/unit{u + 1}"
            for j, k in (
                (1, (1, 1, inputs, c)),
                (2, (3, 3, c, c)),
                (3, (1, 1, c, 4 * c)),
            ):
                shapes[f"{at}/conv{j}/kernel"] = k
                shapes |= norm(f"{at}/gn{j}", k[-1])
            if not u:
                shapes[f"{at}/conv_proj/kernel"] = (1, 1, inputs, 4 * c)
                shapes |= norm(f"{at}/gn_proj", 4 * c)
            inputs = 4 * c
    random = torch.Generator().manual_seed(0)
    return {k: torch.randn(s, generator=random) for k, s in shapes.items()}


def test_begins_with_the_authors_npz():
    config = replace(
        TransUNetConfig(), embed_dim=24, depth=1, num_heads=4, resnet_layers=(1, 2, 1)
    )
    model, file = TransUNet(config), flax_file(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit_state(model, file, FORMATS, classifier=HEADS)
    assert torch.equal(
        model.positions.weight, file["Transformer/posembed_input/pos_embedding"][0, 1:]
    )
    kernel = file["block2/unit2/conv2/kernel"].permute(3, 2, 0, 1)
    assert torch.equal(model.backbone.stages[1][1].conv2.weight, kernel)
    key = file["Transformer/encoderblock_0/MultiHeadDotProductAttention_1/key/kernel"]
    weight = model.encoder.layers[0].attention.in_proj_weight[24:48]
    assert torch.equal(weight, key.flatten(1).T)
    scale = file["block1/unit1/gn_proj/scale"].flatten()
    assert torch.equal(model.backbone.stages[0][0].shortcut[1].weight, scale)


# ---- bad input


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "change, said",
    [
        ({"decoder_channels": (8, 8)}, "decoder_channels"),
        ({"patch_size": 12, "img_size": 48}, "decoder_channels"),
        ({"resnet_layers": (1, 1)}, "resnet_layers"),
        ({"resnet_layers": ()}, "num_skips"),
        ({"num_skips": 4}, "num_skips"),
        ({"norm_groups": 5}, "norm_groups"),
        ({"num_heads": 5}, "num_heads"),
        ({"img_size": 60}, "img_size"),
    ],
)
def test_bad_configurations(change, said):
    with pytest.raises(an.ConfigError, match=said):
        replace(SMALL, **change)


@pytest.mark.no_shapes
def test_bad_images():
    model = TransUNet(SMALL)
    for x in (torch.zeros(1, 1, 64, 64), torch.zeros(1, 3, 60, 64), torch.zeros(3, 64)):
        with pytest.raises(an.InputError, match="images"):
            model(x)
    with pytest.raises(an.InputError, match="two patches"):
        model(torch.zeros(2, 3, 16, 16))


def test_the_class_of_every_pixel_at_another_size():
    model = create_model("transunet_book")
    logits = torch.randn(2, 4, 16, 16)
    full = F.interpolate(logits, (7, 30), mode="bilinear", align_corners=True)
    first, second = model.post_process(logits, [(7, 30), (16, 16)])
    assert torch.equal(first, full[0].argmax(0))
    assert torch.equal(second, logits[1].argmax(0))
