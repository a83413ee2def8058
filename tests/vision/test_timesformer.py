"""TimeSformer: equal to transformers on the same weights, in all three kinds of
attention; its blocks equal to naive loops; what the order of frames can change; and the
files that it is read from."""

import json
import re
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import attn_notes as an
from attn_notes.training.recipes import make_optimizer
from attn_notes.vision.timesformer import TimeSformer, TimeSformerConfig
from attn_notes.vision.timesformer_formats import (
    FIELDS,
    HF_FORMAT,
    KINDS,
    OFFICIAL_FORMAT,
)
from attn_notes.zoo.factory import count_parameters, create_model

LAYOUTS = Path(__file__).parent / "layouts"
NAME = "timesformer_base_patch16_224"
SMALL = TimeSformerConfig(
    img_size=24,
    patch_size=8,
    in_chans=2,
    num_frames=3,
    num_classes=5,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=24,
)
every_kind = pytest.mark.parametrize("kind", KINDS.values())


def shake(model):
    """Noise on every weight: no bias is zero, no norm neutral, no order unseen."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def small(config=SMALL, **change):
    torch.manual_seed(0)
    return shake(TimeSformer(replace(config, **change)).double().eval())


def videos(config=SMALL, rows=2, sides=None, frames=None):
    sides = sides or (config.img_size, config.img_size)
    random = torch.Generator().manual_seed(0)
    shape = (rows, frames or config.num_frames, config.in_chans, *sides)
    return torch.randn(shape, generator=random, dtype=torch.float64)


# ---- the sizes


@pytest.mark.parametrize("name", [NAME, "timesformer_book"])
def test_counts_and_products(name):
    info = an.model_info(name)
    c = info.config
    d, n, t = c.hidden_size, (c.img_size // c.patch_size) ** 2, c.num_frames
    pixels, wide = c.in_chans * c.patch_size**2, c.intermediate_size
    dense, mlp = 4 * d * d + 4 * d, 2 * d * wide + wide + d
    block = 2 * dense + d * d + d + mlp + 6 * d
    count = pixels * d + d + d + (n + 1) * d + t * d
    count += c.num_hidden_layers * block + 2 * d + (d + 1) * c.num_classes
    time = n * t * (5 * d * d + 2 * t * d)
    space = t * (n + 1) * (4 * d * d + 2 * (n + 1) * d)
    macs = c.num_hidden_layers * (time + space + (1 + n * t) * 2 * d * wide)
    macs += n * t * pixels * d + d * c.num_classes
    model = create_model(name, device="meta")
    assert count_parameters(model) == count == info.parameters
    with FlopCounterMode(display=False) as flops:
        model.eval()(torch.empty(1, *info.input_size, device="meta"))
    assert flops.get_total_flops() == 2 * macs == 2 * info.macs
    if name == NAME:  # "0.59 TFLOPs" of three crops, "121.4M" with 174 classes
        assert round(3 * macs / 1e12, 2) == info.reported["TFLOPs of 3 views"]
        other = create_model(name, device="meta", num_classes=174)
        assert f"{count_parameters(other) / 1e6:.1f}M" == info.reported["parameters"]


# ---- equal to the reference


def reference(config, **options):
    transformers = pytest.importorskip("transformers")
    sizes = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    del sizes["drop_path_rate"]  # whole numbers alone
    kind = {ours: theirs for theirs, ours in KINDS.items()}[config.attention]
    stored = transformers.TimesformerConfig(
        attention_type=kind, num_labels=config.num_classes, **sizes | options
    )
    return shake(transformers.TimesformerForVideoClassification(stored))


def their_logits(theirs, x):
    """Of space alone transformers gives logits of every frame; the authors' code takes
    the mean of the frames' tokens first."""
    if theirs.config.attention_type != "space_only":
        return theirs(x).logits
    frames = theirs.timesformer.encoder(theirs.timesformer.embeddings(x))[0]
    mean = frames.unflatten(0, x.shape[:2]).mean(1)
    return theirs.classifier(theirs.timesformer.layernorm(mean)[:, 0])


@every_kind
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_outputs_and_gradients_equal_the_reference(kind, training, tmp_path):
    config = replace(SMALL, attention=kind)
    theirs = reference(config)
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        model = create_model(NAME, tmp_path)
    assert not model.not_loaded and model.config == config
    model, theirs = model.double().train(training), theirs.double().train(training)
    x = videos(config)
    found, expected = model(x), their_logits(theirs, x)
    assert (found - expected).abs().max() < 1e-10 and found.abs().max() > 0.1
    found.square().sum().backward(), expected.square().sum().backward()
    theirs = {key: p.grad for key, p in theirs.named_parameters()}
    grads = HF_FORMAT.apply(theirs, model)
    assert set(grads) == {key for key, _ in model.named_parameters()}
    for key, p in model.named_parameters():
        assert (p.grad - grads[key]).abs().max() < 1e-10, key


def test_another_size_of_frames_equals_the_reference():
    """Positions of the nearest place. (transformers reads images that are not square as
    if they were as wide as the configuration says.)"""
    theirs, model = reference(SMALL).double().eval(), small()
    state = HF_FORMAT.apply(theirs.state_dict(), model)
    model.load_state_dict(state)
    theirs.config.image_size = 40  # by which its layers count patches
    x = videos(sides=(40, 40))
    assert (model(x) - theirs(x).logits).abs().max() < 1e-10
    assert model(videos(sides=(16, 48))).isfinite().all()


def attended(attention, x):
    """What one set of tokens (n d) learns of itself."""
    return attention(x[None])[0]


def test_divided_attention_is_two_loops():
    """Place by place over time, then frame by frame; the class token is with every
    frame, and goes on as the mean."""
    block, x = small().encoder.layers[1], torch.randn(1 + 3 * 4, 16).double()
    token, patches = x[0], x[1:].view(3, 4, 16)
    learned = torch.stack(
        [
            attended(block.time_attention, block.time_norm(patches[:, place]))
            for place in range(4)
        ],
        1,
    )
    patches = patches + block.time_projection(learned)
    frames = []
    for frame in patches:
        tokens = torch.cat([token[None], frame])
        frames.append(tokens + attended(block.attention, block.norm1(tokens)))
    mean = torch.stack([frame[0] for frame in frames]).mean(0)
    y = torch.cat([mean[None], *[frame[1:] for frame in frames]])
    y = y + block.feed_forward(block.norm2(y))
    assert (block(x[None], 3)[0] - y).abs().max() < 1e-12


# ---- what the order of frames can change


@pytest.mark.parametrize(
    "change, blind",
    [
        ({"attention": "space"}, True),
        ({"attention": "divided"}, False),
        ({"attention": "joint"}, False),
    ],
    ids=str,
)
def test_the_order_of_frames(change, blind):
    model, x = small(**change), videos()
    moved = (model(x.flip(1)) - model(x)).abs().max()
    assert (moved < 1e-12) == blind and (blind or moved > 1e-3)
    if not blind:  # the table of time is all that tells frames apart
        torch.nn.init.zeros_(model.time_positions)
        assert (model(x.flip(1)) - model(x)).abs().max() < 1e-12


@every_kind
def test_company_changes_nothing(kind):
    model, x = small(attention=kind), videos(rows=3)
    with torch.no_grad():
        together = model(x)
        for i in range(3):
            assert torch.allclose(model(x[i : i + 1])[0], together[i], atol=1e-12)


@every_kind
def test_features_and_recorded_attention(kind):
    model, x = small(attention=kind), videos()
    with torch.no_grad(), an.record_attention(model) as maps:
        features = model.forward_features(x)
        assert torch.equal(model(x), model.head(features[:, 0]))
    assert features.shape == (2, 10 if kind == "space" else 28, 16)
    shapes = {tuple(map_.shape) for map_ in maps.values()}
    assert (
        shapes
        == {
            "divided": {(18, 2, 3, 3), (6, 2, 10, 10)},
            "joint": {(2, 2, 28, 28)},
            "space": {(6, 2, 10, 10)},
        }[kind]
    )


def test_it_begins_as_a_vit():
    """The layer behind the attention to time is zero in all blocks but the first."""
    model = TimeSformer(SMALL)
    weights = [b.time_projection.weight.abs().max() for b in model.encoder.layers]
    assert weights[0] > 0 and weights[1:] == [0, 0]
    assert not model.time_positions.any() and model.positions.weight.std() > 0.01


@every_kind
def test_what_weight_decay_spares(kind):
    model = TimeSformer(replace(SMALL, attention=kind))
    optimizer = make_optimizer(model, an.model_info(NAME).recipes["tiny"])
    free = {
        id(p)
        for g in optimizer.param_groups
        if not g["weight_decay"]
        for p in g["params"]
    }
    assert id(model.positions.weight) in free
    assert kind == "space" or id(model.time_positions) in free


# ---- bad input

WRONG = {
    "too short": (torch.zeros(2, 2, 2, 24, 24), "shape .b, 3, 2, h, w."),
    "too long": (torch.zeros(2, 4, 2, 24, 24), "shape .b, 3, 2, h, w."),
    "one clip": (torch.zeros(3, 2, 24, 24), "shape .b, 3, 2, h, w."),
    "channels before frames": (torch.zeros(2, 2, 3, 24, 24), "shape .b, 3, 2, h, w."),
    "colours": (torch.zeros(2, 3, 3, 24, 24), "2 channels"),
    "bytes": (torch.zeros(2, 3, 2, 24, 24, dtype=torch.uint8), "floating point"),
    "no clip": (torch.zeros(0, 3, 2, 24, 24), "at least one clip"),
    "half a patch": (torch.zeros(2, 3, 2, 24, 20), "multiples of 8, the patch"),
    "a list": ([torch.zeros(3, 2, 24, 24)], "clips"),
}


@pytest.mark.no_shapes
@pytest.mark.parametrize("given, said", WRONG.values(), ids=WRONG)
def test_bad_videos(given, said):
    with pytest.raises(an.InputError, match=f"^videos: expected .*{said}") as caught:
        small()(given)
    assert "\n" not in str(caught.value) and "; got " in str(caught.value)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "change",
    [
        dict(attention="axial"),
        dict(num_frames=0),
        dict(patch_size=7),
        dict(num_attention_heads=3),
        dict(dropout=1.0),
    ],
    ids=str,
)
def test_bad_configurations(change):
    with pytest.raises(an.ConfigError, match=f"{next(iter(change))}: expected .*; got"):
        replace(SMALL, **change)


# ---- files


def test_the_authors_files(tmp_path):
    """Keys and shapes of the released files, two of the blocks, with what stands
    beside them."""
    shapes = json.loads((LAYOUTS / "timesformer.json").read_text())["keys"]
    kept = {k: s for k, s in shapes.items() if not re.search(r"blocks\.([2-9]|1\d)", k)}
    state = {key: torch.full(shape, 0.01) for key, shape in kept.items()}
    beside = {"epoch": 14, "optimizer_state": {"state": {}}, "cfg": "TRAIN: {}"}
    torch.save({"model_state": state, **beside}, tmp_path / "K400.pyth")
    with warnings.catch_warnings(action="error"):
        model = create_model(NAME, tmp_path / "K400.pyth", num_hidden_layers=2)
    assert all((p == 0.01).all() for p in model.parameters())
    names = set(OFFICIAL_FORMAT.apply(state, model))
    assert names == {key for key, _ in model.named_parameters()}


TO_OFFICIAL = (
    ("class_token", "cls_token"),
    ("positions.weight", "pos_embed"),
    ("time_positions", "time_embed"),
    ("patch_embedding.projection", "patch_embed.proj"),
    ("encoder.layers", "blocks"),
    ("time_attention.in_proj_", "temporal_attn.qkv."),
    ("time_attention.out_proj", "temporal_attn.proj"),
    ("attention.in_proj_", "attn.qkv."),
    ("attention.out_proj", "attn.proj"),
    ("time_norm", "temporal_norm1"),
    ("time_projection", "temporal_fc"),
    ("feed_forward.linear", "mlp.fc"),
)


def official(model):
    """A state under the authors' names."""
    state = {}
    for key, value in model.float().state_dict().items():
        for ours, theirs in TO_OFFICIAL:
            key = key.replace(ours, theirs)
        tables = ("cls_token", "pos_embed", "time_embed")
        shape = (1, -1, value.shape[-1]) if key in tables else value.shape
        state[f"model.{key}"] = value.reshape(shape)
    return state


def test_a_file_for_clips_and_frames_of_another_size(tmp_path):
    """Tables of the nearest place, as the authors' loading does it."""
    theirs = small()
    torch.save({"model_state": official(theirs)}, tmp_path / "a.pyth")
    sizes = asdict(SMALL) | {"num_frames": 6, "img_size": 32}
    with pytest.warns(an.CheckpointWarning, match="interpolated from") as said:
        model = create_model(NAME, tmp_path / "a.pyth", **sizes)
    assert [str(one.message).split(" inter")[0] for one in said] == [
        "positions.weight",
        "time_positions",
    ]
    time = functional.interpolate(theirs.time_positions.T[None], 6, mode="nearest")
    assert torch.equal(model.time_positions, time[0].T)
    table = theirs.positions.weight
    grid = functional.interpolate(table[1:].T.reshape(1, -1, 3, 3), (4, 4))
    assert torch.equal(model.positions.weight[1:], grid[0].flatten(1).T)
    assert torch.equal(model.positions.weight[0], table[0])


def test_the_weights_of_a_vit(tmp_path):
    """Attention to time begins as a copy of that to space; a clip of one frame four
    times is then what the ViT says of the frame, once the first block's projection is
    zero as the others'."""
    timm = pytest.importorskip("timm")
    vit = timm.models.VisionTransformer(
        img_size=24, patch_size=8, in_chans=2, num_classes=5, embed_dim=16, depth=3,
        num_heads=2, mlp_ratio=1.5,
    )  # fmt: skip
    torch.save(shake(vit).state_dict(), tmp_path / "vit.pth")
    with pytest.warns(an.CheckpointWarning, match="left as they were: time_positions"):
        model = create_model(NAME, tmp_path / "vit.pth", **asdict(SMALL))
    for block in model.encoder.layers:
        for key, value in block.attention.state_dict().items():
            assert torch.equal(block.time_attention.state_dict()[key], value)
        torch.nn.init.zeros_(block.time_projection.weight)
    assert {key.split(".")[-2] for key in model.not_loaded if "." in key} == {
        "time_projection"
    }
    frame = torch.randn(2, 2, 24, 24)
    found = model(frame[:, None].expand(-1, 3, -1, -1, -1))
    assert torch.allclose(found, vit.eval()(frame), atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [dict(hidden_act="relu"), dict(qkv_bias=False), dict(model_type="vivit")],
    ids=str,
)
def test_another_model_of_transformers(change, tmp_path):
    reference(SMALL).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | change))
    with pytest.raises(an.CheckpointError, match=f"{next(iter(change))}: expected"):
        create_model(NAME, tmp_path)


def test_a_file_of_another_kind_of_attention(tmp_path):
    torch.save(small(attention="space").float().state_dict(), tmp_path / "a.pth")
    with pytest.raises(an.CheckpointError, match="missing: .*time_"):
        create_model(NAME, tmp_path / "a.pth", **asdict(SMALL))


def test_under_autocast_and_checkpointed():
    model, x = small().float().train(), videos().float()
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x)
    assert (found - expected).norm() < 0.05 * expected.norm()
    model.encoder.gradient_checkpointing = True
    assert torch.equal(model(x), expected)
