"""ViT: equal to timm, transformers, torchvision and the authors' code on the same
weights; what must not change anything does not; and the files that it is read from."""

import argparse
import json
import math
import warnings
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attn_notes as an
from attn_notes.foundations.attention import record_attention
from attn_notes.foundations.blocks import DropPath
from attn_notes.training.recipes import make_optimizer
from attn_notes.vision.bit_resnet import BiTResNet, StdConv, pad_same
from attn_notes.vision.vit import (
    BOOK,
    HF_FORMAT,
    SIZES,
    TIMM_FORMAT,
    TORCHVISION_FORMAT,
    ViT,
    ViTConfig,
)
from attn_notes.zoo.devices import STAND_IN, fake_device, to_stand_in
from attn_notes.zoo.factory import count_parameters, create_model

LAYOUTS = Path(__file__).parent / "layouts"
SMALL = ViTConfig(
    img_size=20,
    patch_size=5,
    in_chans=2,
    num_classes=3,
    embed_dim=12,
    depth=2,
    num_heads=3,
    mlp_ratio=20 / 12,
)
HYBRID = replace(SMALL, img_size=32, patch_size=16, resnet_layers=(1, 2))
every_pool = pytest.mark.parametrize("pool", ["token", "avg"])


def shake(model, seed=0):
    """Noise on every weight: no bias is zero, no norm neutral, no head silent."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def small(config=SMALL, seed=0, **change):
    """Ours in double precision, shaken, in evaluation mode."""
    torch.manual_seed(seed)
    return shake(ViT(replace(config, **change)).double().eval(), seed)


def images(config=SMALL, rows=3, sides=None, seed=0):
    sides = sides or (config.img_size, config.img_size)
    random = torch.Generator().manual_seed(seed)
    shape = (rows, config.in_chans, *sides)
    return torch.randn(shape, generator=random, dtype=torch.float64)


# ---- the sizes


@pytest.mark.parametrize("name", SIZES)
def test_counts_and_products(name):
    c, n = SIZES[name], 1 + (SIZES[name].img_size // SIZES[name].patch_size) ** 2
    d, wide = c.embed_dim, round(c.embed_dim * c.mlp_ratio)
    pixels = 1024 if c.resnet_layers else c.in_chans * c.patch_size**2
    block = (4 * d * d + 4 * d) + (2 * d * wide + wide + d) + 4 * d
    body = (pixels + 1) * d + d + n * d + c.depth * block + 2 * d
    products = (n - 1) * pixels * d + c.num_classes * d
    products += c.depth * (n * (4 * d * d + 2 * d * wide) + 2 * n * n * d)
    resnet = BiTResNet(layers=c.resnet_layers) if c.resnet_layers else nn.Identity()
    counted = body + (d + 1) * c.num_classes + count_parameters(resnet)
    info, model = an.model_info(name), create_model(name, device="meta")
    assert count_parameters(model) == counted == info.parameters
    with FlopCounterMode(display=False) as flops:
        model(torch.empty(1, *info.input_size, device="meta"))
    assert flops.get_total_flops() == 2 * info.macs
    assert c.resnet_layers or info.macs == products


def test_the_hybrid_has_the_grid_of_patches():
    info = an.model_info("vit_base_r50_s16_224")
    model = create_model(info.name, device="meta")
    shape = model.backbone(torch.empty(1, 3, 224, 224, device="meta")).shape
    assert shape == (1, 1024, 14, 14) and model.backbone.stride == 16
    assert model.patch_embedding.projection.kernel_size == (1, 1)


# ---- equal to the references


def timm_reference(config, **options):
    timm = pytest.importorskip("timm")
    from timm.layers import HybridEmbed, StdConv2dSame
    from timm.models.resnetv2 import ResNetV2

    if config.resnet_layers:
        backbone = ResNetV2(
            layers=config.resnet_layers,
            num_classes=0,
            global_pool="",
            in_chans=config.in_chans,
            preact=False,
            stem_type="same",
            conv_layer=partial(StdConv2dSame, eps=1e-8),
        )
        options |= {"embed_layer": partial(HybridEmbed, backbone=backbone)}
        config = replace(config, patch_size=config.patch_size // 8, resnet_layers=())
    sizes = {
        key: value
        for key, value in asdict(config).items()
        if key not in ("representation_size", "dropout", "norm_eps", "resnet_layers")
    }
    sizes["class_token"] = config.global_pool == "token"
    model = timm.models.VisionTransformer(**sizes, fc_norm=False, **options)
    return shake(model), lambda x: model(x)


def hf_reference(config, **options):
    transformers = pytest.importorskip("transformers")
    stored = transformers.ViTConfig(
        image_size=config.img_size,
        patch_size=config.patch_size,
        num_channels=config.in_chans,
        num_labels=config.num_classes,
        hidden_size=config.embed_dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        intermediate_size=round(config.embed_dim * config.mlp_ratio),
        **options,
    )
    model = shake(transformers.ViTForImageClassification(stored))
    return model, lambda x: model(x).logits


def torchvision_reference(config):
    from torchvision.models.vision_transformer import VisionTransformer

    assert config.in_chans == 3
    model = VisionTransformer(
        image_size=config.img_size,
        patch_size=config.patch_size,
        num_layers=config.depth,
        num_heads=config.num_heads,
        hidden_dim=config.embed_dim,
        mlp_dim=round(config.embed_dim * config.mlp_ratio),
        num_classes=config.num_classes,
        representation_size=config.representation_size,
    )
    return shake(model), lambda x: model(x)


COLOURED = replace(SMALL, in_chans=3)
REFERENCES = {
    "timm": (timm_reference, SMALL, TIMM_FORMAT),
    "timm, mean": (timm_reference, replace(SMALL, global_pool="avg"), TIMM_FORMAT),
    "timm, hybrid": (timm_reference, HYBRID, TIMM_FORMAT),
    "transformers": (hf_reference, replace(SMALL, norm_eps=1e-12), HF_FORMAT),
    "torchvision": (torchvision_reference, COLOURED, TORCHVISION_FORMAT),
    "torchvision, hidden layer": (
        torchvision_reference,
        replace(COLOURED, representation_size=7),
        TORCHVISION_FORMAT,
    ),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("make, config, fmt", REFERENCES.values(), ids=REFERENCES)
def test_outputs_and_gradients_equal_the_reference(
    make, config, fmt, training, tmp_path
):
    theirs, call = make(config)
    path = tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), path)
    with warnings.catch_warnings(action="error"):
        model = create_model("vit_base_patch16_224", path, **asdict(config))
    assert not model.not_loaded
    model, theirs = model.double().train(training), theirs.double().train(training)
    x = images(config)
    found, expected = model(x), call(x)
    assert (found - expected).abs().max() < 1e-10 and found.abs().max() > 0.1
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    grads = {key: p.grad for key, p in theirs.named_parameters()}
    grads = fmt.apply(grads, model)
    assert set(grads) == {key for key, _ in model.named_parameters()}
    for key, p in model.named_parameters():
        assert (p.grad - grads[key]).abs().max() < 1e-10, key


@pytest.mark.parametrize("sides", [(20, 20), (30, 20), (10, 35)], ids=str)
def test_other_sizes_equal_timm(sides, tmp_path):
    """To the precision of timm's positions, which are interpolated as float32."""
    theirs, call = timm_reference(SMALL, dynamic_img_size=True)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    model = create_model(
        "vit_base_patch16_224", tmp_path / "weights.pth", **asdict(SMALL)
    )
    theirs.double().eval(), model.double()
    x = images(sides=sides)
    assert (model(x) - call(x)).abs().max() < 1e-6
    grads = [torch.autograd.grad(f(x).sum(), p)[0].flatten(0, -2) for f, p in (
        (model, model.positions.weight), (call, theirs.pos_embed)
    )]  # fmt: skip
    assert (grads[0] - grads[1]).abs().max() < 1e-5


@pytest.mark.slow
def test_the_base_size_equals_timm(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("vit_base_patch16_224").eval()
    for p in theirs.parameters():
        p.data += 0.02 * torch.randn_like(p)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    model = create_model("vit_base_patch16_224", tmp_path / "weights.pth")
    x = torch.randn(1, 3, 224, 224)
    found, expected = model(x), theirs(x)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    found.square().sum().backward(), expected.square().sum().backward()
    grads = {key: p.grad for key, p in theirs.named_parameters()}
    for key, value in TIMM_FORMAT.apply(grads, model).items():
        gap = model.get_parameter(key).grad - value
        assert gap.norm() < 1e-4 * value.norm(), key


def test_the_authors_code():
    """Logits of the authors' code, which has GELU by tanh."""
    stored = json.loads((LAYOUTS / "vit_flax_small.json").read_text())
    sizes = dict(asdict(SMALL), img_size=8, patch_size=4, in_chans=3, num_heads=2)
    path = LAYOUTS / "vit_flax_small.npz"
    with warnings.catch_warnings(action="error"):
        model = create_model("vit_base_patch16_224", path, **sizes)
    x = torch.tensor(stored["images"]).view(2, 3, 8, 8)
    expected = torch.tensor(stored["logits"])
    with torch.no_grad():
        assert 1e-5 < (model(x) - expected).abs().max() < 1e-3
        for module in model.modules():
            if isinstance(module, nn.GELU):
                module.approximate = "tanh"
        assert (model(x) - expected).abs().max() < 2e-6


# ---- what changes nothing


@settings(max_examples=5)
@given(seed=st.integers(0, 999))
@pytest.mark.parametrize("config", [SMALL, HYBRID], ids=["ViT", "hybrid"])
def test_company_changes_nothing(config, seed):
    model, x = small(config), images(config, seed=seed)
    with torch.no_grad():
        together = model(x)
        for i in range(3):
            assert torch.allclose(model(x[i : i + 1])[0], together[i], atol=1e-12)


@every_pool
def test_without_positions_patches_may_change_places(pool):
    model, x = small(global_pool=pool), images()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    cut = nn.functional.unfold(x, 5, stride=5)[..., order]
    shuffled = nn.functional.fold(cut, (20, 20), 5, stride=5)
    assert not torch.allclose(model(shuffled), model(x))
    model.positions.weight.data.zero_()
    assert torch.allclose(model(shuffled), model(x), atol=1e-12)


@every_pool
def test_features_and_logits(pool):
    model, x = small(global_pool=pool), images()
    features = model.forward_features(x)
    assert features.shape == (3, 16 + (pool == "token"), 12)
    pooled = features[:, 0] if pool == "token" else features.mean(1)
    assert torch.equal(model(x), model.head(pooled))
    bare = small(global_pool=pool, num_classes=0)
    bare.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(bare(x), pooled)
    assert set(model.state_dict()) - set(bare.state_dict()) == {
        "head.weight",
        "head.bias",
    }


def test_recorded_attention():
    model, x = small(), images(sides=(10, 15))
    with torch.no_grad(), record_attention(model) as maps:
        found = model(x)
    assert len(maps) == SMALL.depth
    for weights in maps.values():
        assert weights.shape == (3, SMALL.num_heads, 7, 7)
        assert torch.allclose(weights.sum(-1), torch.ones(3, 3, 7).double())
    assert torch.allclose(found, model(x), atol=1e-12)


def test_the_head_begins_at_zero_and_learns_first():
    torch.manual_seed(0)
    model, x = ViT(replace(SMALL, representation_size=5)), images().float()
    assert (model(x) == 0).all()
    labels = torch.tensor([0, 0, 1])
    nn.functional.cross_entropy(model(x), labels).backward()
    reached = {key for key, p in model.named_parameters() if p.grad.abs().max() > 0}
    assert reached == {"head.weight", "head.bias"}
    torch.optim.SGD(model.parameters(), 0.1).step()
    model.zero_grad()
    nn.functional.cross_entropy(model(x), labels).backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


def test_dropout_and_drop_path_stand_where_the_paper_has_them():
    config = replace(SMALL, depth=3, dropout=0.1, drop_path_rate=0.4)
    model = ViT(config)
    rates = {name: m.p for name, m in model.named_modules() if type(m) is nn.Dropout}
    assert len(rates) == 1 + 2 * 3 and set(rates.values()) == {0.1}
    assert all(layer.attention.attention.dropout == 0 for layer in model.encoder.layers)
    paths = [m.p for m in model.modules() if isinstance(m, DropPath)]
    assert paths == pytest.approx([0.2, 0.4])
    model = ViT(replace(config, drop_path_rate=0.0))
    assert not any(isinstance(m, DropPath) for m in model.modules())


def test_positions_weigh_nothing_in_weight_decay():
    model = ViT(SMALL)
    recipe = an.model_info("vit_base_patch16_224").recipes["paper"]
    decayed, spared = make_optimizer(model, recipe).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    named = {id(p): key for key, p in model.named_parameters()}
    names = {named[id(p)] for p in spared["params"]}
    assert {"positions.weight", "class_token", "encoder.norm.weight"} <= names
    assert all("weight" not in key or "norm" in key or "pos" in key for key in names)


# ---- any size


@pytest.mark.parametrize("grid", [(4, 4), (6, 6), (2, 7), (1, 1)], ids=str)
def test_positions_of_a_grid(grid):
    positions = small().positions
    rows = positions(*grid)
    assert rows.shape == (1 + math.prod(grid), 12)
    assert torch.equal(rows[0], positions.weight[0])
    assert (grid == (4, 4)) == (rows is positions.weight)
    positions.weight.data[1:] = 3.0  # of a constant, the same constant
    assert torch.allclose(positions(*grid)[1:], torch.tensor(3.0).double())


def test_positions_follow_the_weights_and_their_type():
    model = small()
    with torch.no_grad():
        before = model.positions(6, 6)
        model.positions.weight.data.mul_(2.0)
        assert torch.allclose(model.positions(6, 6), 2 * before)
    assert len(model.positions._weights_along) == 1
    assert model.float().positions(6, 6).dtype == torch.float32
    model.positions(6, 6).sum().backward()
    assert model.positions.weight.grad.abs().min() > 0


def test_fake_tensors_leave_no_trace():
    model = ViT(SMALL)
    with fake_device():
        to_stand_in(model)
        x = torch.empty(2, 2, 30, 20, device=STAND_IN)
        model(x).sum().backward()
    assert not model.positions._weights_along


@pytest.mark.no_shapes
def test_compiled_and_exported_at_another_size():
    model, x = small().float(), images(sides=(30, 20)).float()
    with torch.no_grad():
        expected = model(x)
        exported = torch.export.export(model, (x,)).module()
        assert torch.allclose(exported(x), expected, atol=1e-6)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for some in (images().float(), x):
            assert torch.allclose(compiled(some), model(some), atol=1e-6)


def test_another_size_under_autocast():
    model, x = small().float(), images(sides=(30, 20)).float()
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x)
    found.sum().backward()
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert model.positions.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("config", [SMALL, HYBRID], ids=["ViT", "hybrid"])
def test_channels_last(config):
    model, x = small(config), images(config)
    with torch.no_grad():
        expected = model(x)
        model.to(memory_format=torch.channels_last)
        found = model(x.to(memory_format=torch.channels_last))
    assert torch.allclose(found, expected, atol=1e-12)


def test_images_of_another_precision():
    model, x = small(), images()
    with torch.no_grad():
        assert torch.allclose(model(x.float()), model(x), atol=1e-6)
        assert model.float()(x).dtype == torch.float32


# ---- bad input

WRONG = {
    "grey": torch.zeros(2, 1, 20, 20),
    "bytes": torch.zeros(2, 2, 20, 20, dtype=torch.uint8),
    "one image": torch.zeros(2, 20, 20),
    "no image": torch.zeros(0, 2, 20, 20),
    "a cut patch": torch.zeros(2, 2, 20, 22),
    "less than a patch": torch.zeros(2, 2, 4, 20),
    "no pixels": torch.zeros(2, 2, 0, 20),
    "sparse": torch.zeros(2, 2, 20, 20).to_sparse(),
    "a list": [torch.zeros(2, 20, 20)],
}


@pytest.mark.no_shapes
@pytest.mark.parametrize("given", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("call", ["forward", "forward_features"])
def test_bad_images(given, call):
    with pytest.raises(an.InputError, match=r"^images: expected .*; got .*") as caught:
        getattr(small(), call)(given)
    assert "\n" not in str(caught.value)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "change",
    [
        dict(patch_size=7),
        dict(num_heads=5),
        dict(num_classes=-1),
        dict(global_pool="max"),
        dict(depth=0),
        dict(mlp_ratio=0.0),
        dict(dropout=1.0),
        dict(norm_eps=0.0),
        dict(resnet_layers=(1, 0)),
        dict(img_size=2.5),
    ],
    ids=str,
)
def test_bad_configurations(change):
    with pytest.raises(an.ConfigError, match=f"{next(iter(change))}: expected .*; got"):
        replace(SMALL, **change)


def test_a_stride_that_no_patch_has():
    with pytest.raises(an.ConfigError, match="stride of the ResNet: .*; got 8 and 5"):
        replace(SMALL, resnet_layers=(1, 2))


# ---- the ResNet of the hybrid


@pytest.mark.parametrize("n", [7, 8, 9, 32])
@pytest.mark.parametrize("kernel, stride", [(7, 2), (3, 2), (3, 1), (1, 2), (1, 1)])
def test_same_padding(n, kernel, stride):
    x = torch.ones(1, 1, n, n + 1)
    padded = pad_same(x, kernel, stride)
    out = nn.functional.max_pool2d(padded, kernel, stride)
    assert out.shape[-2:] == (math.ceil(n / stride), math.ceil((n + 1) / stride))
    right, left = padded[0, 0, -1].sum(), padded[0, 0, 0].sum()
    assert padded.sum() == x.sum() and right <= left


def test_standardized_filters():
    conv = StdConv(3, 8, 3, 2)
    x = torch.randn(2, 3, 9, 12)
    before = conv(x)
    conv.weight.data = 3 * conv.weight.data + 5  # neither scale nor mean says anything
    assert torch.allclose(conv(x), before, atol=1e-4)


# ---- files


def saved(model, folder):
    path = folder / "weights.pth"
    torch.save(model.state_dict(), path)
    return path


def test_saved_and_read_back(tmp_path):
    model = small(num_classes=4).float()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        again = create_model("vit_base_patch16_224", tmp_path)
    assert again.config == model.config
    assert torch.equal(again(images().float()), model(images().float()))


def test_a_folder_of_transformers(tmp_path):
    theirs, call = hf_reference(SMALL, hidden_dropout_prob=0.25, layer_norm_eps=1e-5)
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        model = create_model("vit_base_patch16_224", tmp_path)
    assert model.config == replace(SMALL, dropout=0.25, norm_eps=1e-5)
    x = images().float()
    assert torch.allclose(model(x), theirs.eval()(x).logits, atol=1e-5)


HF_OLD = (  # as files on the hub have it, and as this version has it in memory
    ("layers.", "encoder.layer."),
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".attention.o_proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)


@pytest.mark.parametrize("old", [False, True], ids=["new names", "old names"])
def test_names_of_transformers(old, tmp_path):
    theirs, _ = hf_reference(SMALL)
    state = theirs.state_dict()
    for new, before in HF_OLD:
        state = {k.replace(new, before) if old else k: v for k, v in state.items()}
    state["vit.embeddings.mask_token"] = torch.zeros(1, 1, 12)
    torch.save(state, tmp_path / "weights.pth")
    sizes = dict(asdict(SMALL), norm_eps=1e-12)
    with warnings.catch_warnings(action="error"):
        model = create_model("vit_base_patch16_224", tmp_path / "weights.pth", **sizes)
    x = images().float()
    assert torch.allclose(model(x), theirs.eval()(x).logits, atol=1e-5)


@pytest.mark.parametrize(
    "change", [dict(hidden_act="relu"), dict(qkv_bias=False), dict(model_type="beit")]
)
def test_another_model_of_transformers(change, tmp_path):
    theirs, _ = hf_reference(SMALL)
    theirs.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | change))
    with pytest.raises(an.CheckpointError, match=f"{next(iter(change))}: expected"):
        create_model("vit_base_patch16_224", tmp_path)


@pytest.mark.filterwarnings("ignore:positions interpolated")
def test_a_folder_of_timm(tmp_path):
    theirs, call = timm_reference(SMALL)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    sizes = asdict(SMALL)
    sizes = {key: sizes[key] for key in ("patch_size", "embed_dim", "depth")}
    sizes |= {"num_heads": 3, "mlp_ratio": 20 / 12}
    stored = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 3,
        "num_features": 12,
        "global_pool": "token",
        "model_args": sizes,
        "pretrained_cfg": {"input_size": [2, 20, 20], "crop_pct": 0.9},
    }
    (tmp_path / "config.json").write_text(json.dumps(stored))
    model = create_model("vit_base_patch16_224", tmp_path)
    assert model.config == SMALL
    stored["pretrained_cfg"]["input_size"] = [3, 224, 224]
    del stored["model_args"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(an.CheckpointError, match="misshapen.*12.* for .*192"):
        create_model("vit_base_patch16_224", tmp_path)


def test_a_training_checkpoint_of_timm(tmp_path):
    """Wrapped, with an average, of several processes."""
    theirs, call = timm_reference(SMALL)
    averaged = {f"module.{k}": v + 1 for k, v in theirs.state_dict().items()}
    content = {"model": theirs.state_dict(), "model_ema": averaged, "epoch": 3}
    content["args"] = argparse.Namespace(model="vit", lr=5e-4)
    torch.save(content, tmp_path / "checkpoint.pth")
    model = create_model(
        "vit_base_patch16_224", tmp_path / "checkpoint.pth", **asdict(SMALL)
    )
    assert torch.equal(model.head.bias, theirs.head.bias + 1)


LITTLE = {16: 4, 768: 12, 12: 3, 64: 4, 3072: 20, 1000: 3, 197: 5, 1024: 1024}


def layout(name):
    """A file with the keys of an official one, the Transformer's dimensions small."""
    keys = json.loads((LAYOUTS / f"{name}.json").read_text())["keys"]
    random = numpy.random.default_rng(0)

    def size(key, shape):
        conv = key.startswith(("block", "conv_root", "gn_root"))
        return shape if conv else [LITTLE.get(n, n) for n in shape]

    return {
        key: random.normal(size=size(key, shape)).astype("float32")
        for key, shape in keys.items()
    }


OFFICIAL = {"vit_flax": {"patch_size": 4, "img_size": 8}}
OFFICIAL["vit_hybrid_flax"] = {"patch_size": 16, "img_size": 32}
OFFICIAL["vit_hybrid_flax"]["resnet_layers"] = (3, 4, 9)
TWELVE = dict(asdict(SMALL), depth=12, in_chans=3)


@pytest.mark.parametrize(
    "name, prefix",
    [("vit_flax", ""), ("vit_flax", "opt/target/"), ("vit_hybrid_flax", "params/")],
)
def test_the_authors_files(name, prefix, tmp_path):
    state, path = layout(name), tmp_path / "ViT.npz"
    if prefix:  # and norms as old files have them
        state = {
            f"{prefix}{key}": v[None, None, None] if "/gn" in key else v
            for key, v in state.items()
        }
    numpy.savez(path, **state)
    sizes = TWELVE | OFFICIAL[name]
    with warnings.catch_warnings(action="error"):
        model = create_model("vit_base_patch16_224", path, **sizes)
    attention = f"{prefix}Transformer/encoderblock_7/MultiHeadDotProductAttention_1"
    x = torch.randn(5, 12)
    for place, part in enumerate(("query", "key", "value")):
        kernel = torch.tensor(state[f"{attention}/{part}/kernel"])
        bias = torch.tensor(state[f"{attention}/{part}/bias"])
        expected = torch.einsum("nd,dhc->hnc", x, kernel) + bias[:, None]
        found = model.encoder.layers[7].attention.project(x[None], place, place)
        assert torch.allclose(found[0, 0], expected, atol=1e-5)
    kernel = torch.tensor(state[f"{attention}/out/kernel"])
    expected = torch.einsum("nhc,hcd->nd", x.view(5, 3, 4), kernel)
    found = nn.functional.linear(x, model.encoder.layers[7].attention.out_proj.weight)
    assert torch.allclose(found, expected, atol=1e-5)
    if "hybrid" in name:
        kernel = state[f"{prefix}block2/unit3/conv2/kernel"]
        found = model.backbone.stages[1][2].conv2.weight
        assert numpy.array_equal(found.detach(), kernel.transpose(3, 2, 0, 1))


def test_the_hidden_layer_of_the_pretraining_head(tmp_path):
    state, path = layout("vit_flax"), tmp_path / "ViT.npz"
    state |= {"pre_logits/kernel": numpy.ones((12, 12), "float32")}
    state |= {"pre_logits/bias": numpy.full(12, 2.0, "float32")}
    numpy.savez(path, **state)
    sizes = TWELVE | OFFICIAL["vit_flax"]
    with pytest.warns(an.CheckpointWarning, match="skipped, not in this.*pre_logits"):
        model = create_model("vit_base_patch16_224", path, **sizes)
    assert model.pre_logits is None
    sizes["representation_size"] = 12
    model = create_model("vit_base_patch16_224", path, **sizes)
    assert (model.pre_logits.bias == 2).all() and not model.not_loaded


@pytest.mark.parametrize("book", [True, False], ids=["ours", "timm"])
def test_a_checkpoint_of_another_resolution(book, tmp_path):
    """Interpolated when it is read, as it would be in a forward pass."""
    theirs = small().float() if book else timm_reference(SMALL)[0]
    path, sizes = saved(theirs, tmp_path), dict(asdict(SMALL), img_size=30)
    said = "positions interpolated from 4 x 4 to 6 x 6 patches"
    with pytest.warns(an.CheckpointWarning, match=said):
        model = create_model("vit_base_patch16_224", path, **sizes)
    original = create_model("vit_base_patch16_224", path, **asdict(SMALL))
    assert model.positions.weight.shape == (37, 12) and not model.not_loaded
    x = images(sides=(30, 30)).float()
    assert torch.allclose(model(x), original(x), atol=1e-5)


@pytest.mark.parametrize("classes", [7, 0])
def test_a_checkpoint_of_another_number_of_classes(classes, tmp_path):
    theirs, _ = timm_reference(SMALL)
    path, sizes = saved(theirs, tmp_path), dict(asdict(SMALL), num_classes=classes)
    said = "re-initialized.*head.weight, head.bias" if classes else "skipped.*head"
    with pytest.warns(an.CheckpointWarning, match=said):
        model = create_model("vit_base_patch16_224", path, **sizes)
    assert model.not_loaded == (("head.weight", "head.bias") if classes else ())
    out = model(images().float())
    assert out.shape == (3, classes or 12) and (out == 0).all() == bool(classes)


def test_the_encoder_alone_of_transformers(tmp_path):
    theirs, _ = hf_reference(SMALL)
    theirs.vit.save_pretrained(tmp_path)
    with pytest.warns(an.CheckpointWarning, match="left as they were: head"):
        model = create_model("vit_base_patch16_224", tmp_path, num_classes=3)
    assert model.not_loaded == ("head.weight", "head.bias")
    expected = theirs.vit.eval()(images().float()).last_hidden_state
    assert torch.allclose(model.forward_features(images().float()), expected, atol=1e-5)


def test_the_mean_instead_of_the_class_token(tmp_path):
    path = saved(small().float(), tmp_path)
    sizes = dict(asdict(SMALL), global_pool="avg")
    with pytest.warns(an.CheckpointWarning, match="skipped, not in this.*class_token"):
        model = create_model("vit_base_patch16_224", path, **sizes)
    assert torch.equal(model.positions.weight, small().float().positions.weight[1:])
    path = saved(model, tmp_path)
    with pytest.raises(an.CheckpointError, match="class_token|square"):
        create_model("vit_base_patch16_224", path, **asdict(SMALL))


@pytest.mark.filterwarnings("ignore:positions interpolated")
def test_another_patch_is_refused(tmp_path):
    path = saved(small().float(), tmp_path)
    sizes = dict(asdict(SMALL), patch_size=4)
    with pytest.raises(an.CheckpointError, match="misshapen: patch_embedding"):
        create_model("vit_base_patch16_224", path, **sizes)


def test_every_name_trains_small_on_grey_digits():
    for name in SIZES:
        tiny = dict(an.model_info(name).tiny)
        model = create_model(name, **tiny)
        assert model(torch.randn(2, 1, 28, 28)).shape == (2, BOOK["num_classes"])
