"""TransFuse: equal to its authors' code and to a rendering of the definitions; any size
of image; what must not change anything does not; and the files that it is read from."""

import json
import warnings
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attn_notes as an
from attn_notes.foundations.attention import record_attention
from attn_notes.segmentation.transfuse import (
    SIZES,
    BiFusion,
    TransFuse,
    TransFuseConfig,
)
from attn_notes.segmentation.transfuse_formats import (
    FORMATS,
    HEADS,
    NAMES,
    join_streams,
)
from attn_notes.segmentation.transfuse_parts import (
    AttentionGate,
    boundary_weights,
    structure_loss,
)
from attn_notes.segmentation.transfuse_streams import MapPositions, resize_table
from attn_notes.training.recipes import make_optimizer
from attn_notes.zoo.checkpoints import fit_state
from attn_notes.zoo.factory import count_parameters, create_model
from attn_notes.zoo.formats import rename

STORED = json.loads((Path(__file__).parent / "layouts" / "transfuse.json").read_text())
SMALL = TransFuseConfig(  # of another size in every respect
    img_size=(32, 48),
    patch_size=8,
    num_classes=3,
    resnet_layers=(1, 2, 1),
    resnet_width=4,
    embed_dim=12,
    depth=2,
    num_heads=3,
    mlp_ratio=2.0,
    dropout=0.0,
)
CUT = replace(SIZES["transfuse_small"], resnet_layers=(1, 1, 1), depth=2, dropout=0.0)


def small(seed=0, **change):
    """In double precision, with noise on weights and statistics, in evaluation."""
    torch.manual_seed(seed)
    model = TransFuse(replace(SMALL, **change)).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.data.uniform_(0.5, 1.5)
    return model


def images(rows=2, sides=(32, 48), seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, *sides, generator=random, dtype=torch.float64)


# ---- the sizes


@pytest.mark.parametrize("name", SIZES)
def test_counts_and_products(name):
    info, config = an.model_info(name), SIZES[name]
    model = create_model(name, device="meta").eval()
    assert count_parameters(model) == info.parameters
    with FlopCounterMode(display=False) as flops:
        model(torch.empty(1, 3, *config.sides, device="meta"))
    assert flops.get_total_flops() // 2 == info.macs
    if name in STORED["keys"]:  # the authors have a class token beside
        keys = STORED["keys"][name].items()
        counted = ("running_", "num_batches")
        theirs = sum(prod(s) for k, s in keys if not any(c in k for c in counted))
        assert theirs == info.parameters + config.embed_dim
    if "parameters" in info.reported:
        said = float(info.reported["parameters"][:-1])
        assert abs(info.parameters / 1e6 - said) < 0.1


@pytest.mark.parametrize("name", STORED["keys"])
def test_every_key_of_the_authors_has_its_place(name):
    keys = {k: torch.empty(s, device="meta") for k, s in STORED["keys"][name].items()}
    model = create_model(name, device="meta")
    official = next(f for f in FORMATS if f.recognize(set(keys)))
    assert official.name == "TransFuse"
    found, own = official.apply(keys, model), model.state_dict()
    assert found.keys() == own.keys()
    assert all(found[k].shape == own[k].shape for k in own)


def test_the_streams_are_torchvisions_and_timms():
    vision = pytest.importorskip("torchvision").models
    for name, arch in (
        ("transfuse_small", "resnet34"),
        ("transfuse_large", "resnet50"),
    ):
        with torch.device("meta"):
            state = vision.get_model(arch).state_dict()
        own = create_model(name, device="meta").cnn.state_dict()
        assert {k: v.shape for k, v in own.items()} == {
            k: v.shape for k, v in state.items() if not k.startswith(("layer4", "fc"))
        }


# ---- equal to the authors' code


def formula(i, key, shape):
    """A weight by a formula of its place."""
    j = torch.arange(prod(shape), dtype=torch.float64)
    r = ((12.9898 * j + 78.233 * i).sin() * 43758.5453).frac().view(shape)
    if key.endswith("running_var"):
        return 1 + 0.3 * r
    if len(shape) >= 2:
        return r * (3 / (prod(shape) / shape[0])) ** 0.5
    return 1 + 0.2 * r if key.endswith("weight") else 0.1 * r


@cache
def official():
    """The authors' network with fewer blocks, by its formula, in double precision."""
    kept = {
        k: s
        for k, s in STORED["keys"]["transfuse_small"].items()
        if not any(
            k.startswith(f"{part}.{i}.")
            for part, some in (
                ("resnet.layer1", (1, 2)),
                ("resnet.layer2", (1, 2, 3)),
                ("resnet.layer3", (1, 2, 3, 4, 5)),
                ("transformer.blocks", range(2, 8)),
            )
            for i in some
        )
    }
    return {
        k: torch.tensor(0) if "num_batches" in k else formula(i, k, s)
        for i, (k, s) in enumerate(kept.items())
    }


@pytest.fixture(scope="module")
def twin():
    model = TransFuse(CUT).double()
    assert not fit_state(model, official(), FORMATS, classifier=HEADS)
    sides = (torch.arange(n, dtype=torch.float64) for n in (192, 256))
    y, x = torch.meshgrid(*sides, indexing="ij")
    picture = [(0.05 * x + 0.02 * y).sin(), (0.03 * x * y / 50).cos()]
    picture += [(0.1 * y).sin() * (0.07 * x).cos()]
    ellipse = (((x - 120) / 60) ** 2 + ((y - 90) / 40) ** 2) < 1
    return model, torch.stack(picture)[None], ellipse[None].long()


def test_maps_losses_and_gradients_equal_the_authors(twin):
    model, picture, mask = twin
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    model.train()
    for norm in norms:
        norm.eval()
    with torch.no_grad():
        output = model(picture)
        found = [*output.aux_logits[::-1], output.logits]
        assert torch.equal(model.eval()(picture), output.logits)
    assert not output.logits[:, 0].any()
    for logits, expected in zip(found, STORED["small"]["maps"], strict=True):
        own = logits[0, 1, 8::16, 8::16].flatten()
        expected = torch.tensor(expected, dtype=torch.float64)
        assert (own - expected).abs().max() < 1e-10
    terms = model.losses(model.train()(picture), mask)
    theirs = dict(
        zip(("fusion", "transformer", "joint"), STORED["small"]["losses"], strict=True)
    )
    assert all(abs(terms[k].item() - theirs[k]) < 1e-10 for k in terms)
    sum(model.loss_weights[k] * v for k, v in terms.items()).backward()
    fake = {k: torch.tensor(0.0) for k in STORED["small"]["gradients"]}
    names = dict(zip(fake, translated(fake), strict=True))
    grads = {k: p.grad.norm().item() for k, p in model.named_parameters()}
    for theirs, norm in STORED["small"]["gradients"].items():
        assert grads[names[theirs]] == pytest.approx(norm, rel=1e-8)


def translated(keys):
    """Our names of the authors' keys."""
    more = (
        ("pos_embed", "positions.weight"),
        (r"\.blocks\.", ".encoder.layers."),
        (r"attn\.qkv\.weight", "attention.in_proj_weight"),
    )
    renamed = rename({k: torch.tensor(0.0) for k in keys}, NAMES)
    return [*rename(renamed, more)]


# ---- equal to the definitions


def test_bifusion_by_its_definition():
    torch.manual_seed(0)
    fuse = BiFusion(6, 8, 2, 10, 0.3).double().eval()
    g, t = torch.randn(2, 6, 5, 7).double(), torch.randn(2, 8, 5, 7).double()

    def norm(x, n):
        return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias)

    def linear(x, part):
        w, b = part.conv.weight[:, :, 0, 0], part.conv.bias
        return norm(torch.einsum("ec,bchw->behw", w, x) + b[:, None, None], part.norm)

    product = linear(g, fuse.project_cnn) * linear(t, fuse.project_transformer)
    conv = fuse.product.conv
    product = norm(
        F.conv2d(product, conv.weight, conv.bias, padding=1), fuse.product.norm
    )
    where = torch.stack([g.amax(1), g.mean(1)], 1)
    where = F.conv2d(where, fuse.spatial.conv.weight, padding=3)
    where = norm(where, fuse.spatial.norm).sigmoid()
    first, _, last = fuse.channels
    which = t.mean((2, 3)) @ first.weight[:, :, 0, 0].T + first.bias
    which = (which.relu() @ last.weight[:, :, 0, 0].T + last.bias).sigmoid()
    parts = torch.cat([where * g, which[..., None, None] * t, product.relu()], 1)
    assert (fuse(g, t) - fuse.residual(parts)).abs().max() < 1e-10


def test_the_gate_is_a_share_of_the_skip():
    torch.manual_seed(0)
    gate = AttentionGate(5, 3, 4).double().eval()
    signal, skip = torch.randn(2, 5, 4, 6).double(), torch.randn(2, 3, 4, 6).double()
    share = gate(signal, skip) / skip
    assert ((share > 0) & (share < 1)).all()
    assert (share - share[:, :1]).abs().max() < 1e-10  # the same for every channel
    gate.score[1].bias.data.fill_(50.0)
    assert (gate(signal, skip) - skip).abs().max() < 1e-10


def test_the_loss_by_loops_over_pixels():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 1, 9, 40, generator=random).double()
    mask = (torch.rand(1, 1, 9, 40, generator=random) > 0.6).double()
    weights = torch.empty(9, 40).double()
    m = mask[0, 0]
    for i in range(9):
        for j in range(40):
            rows = slice(max(i - 15, 0), i + 16)
            near = m[rows, max(j - 15, 0) : j + 16].sum() / 31**2
            weights[i, j] = 1 + 5 * abs(near - m[i, j])
    assert (boundary_weights(mask)[0, 0] - weights).abs().max() < 1e-12
    p = logits[0, 0].sigmoid()
    entropy = -(m * p.log() + (1 - m) * (1 - p).log())
    both, either = (weights * p * m).sum(), (weights * (p + m - p * m)).sum()
    expected = (weights * entropy).sum() / weights.sum()
    expected = expected + 1 - (both + 1) / (either + 1)
    found = structure_loss(logits, mask, boundary_weights(mask))
    assert abs(found.item() - expected.item()) < 1e-10


def test_unlabelled_pixels_and_classes_apart():
    model = small().train()
    output = model(images())
    labels = torch.randint(3, (2, 32, 48), generator=torch.Generator().manual_seed(1))
    labels[:, :5] = -100
    found = model.losses(output, labels)
    assert found.keys() == model.loss_weights.keys()
    masks = torch.stack([(labels == k).double() for k in (1, 2)], 1)
    weights = boundary_weights(masks) * (labels >= 0)[:, None]
    one = structure_loss(output.logits[:, 1:], masks, weights)
    assert one.shape == (2, 2)
    assert abs(found["joint"] - one.mean(1).sum()).item() < 1e-12
    labels[:] = -100
    assert all(term.isfinite() for term in model.losses(output, labels).values())


def test_positions_of_another_grid():
    torch.manual_seed(0)
    table = MapPositions(4, 3, 5).double()
    grid = table.weight.view(3, 5, 4)
    assert torch.equal(table(3, 5), table.weight)
    larger = table(5, 9).view(5, 9, 4)
    assert (larger[::2, ::2] - grid).abs().max() < 1e-12  # what was there stays
    middle = (grid[0, 0] + grid[0, 1]) / 2
    assert (larger[0, 1] - middle).abs().max() < 1e-12
    again = resize_table(larger.flatten(0, 1), (5, 9), (3, 5))
    assert (again - table.weight).abs().max() < 1e-12


# ---- invariants


def test_training_gives_three_and_evaluation_a_tensor():
    model = small()
    logits = model(images())
    assert logits.shape == (2, 3, 32, 48) and not logits[:, 0].any()
    output = model.train()(images(sides=(40, 24)))
    assert [*output] == ["logits", "aux_logits"] and len(output.aux_logits) == 2
    assert all(x.shape == (2, 3, 40, 24) for x in (output.logits, *output.aux_logits))


def test_a_logit_above_zero_is_the_foreground():
    model = small(num_classes=2)
    with torch.no_grad():
        logits = model(images())
    mask = model.post_process(logits)[0]
    assert torch.equal(mask == 1, logits[0, 1] > 0) and 0 < mask.sum() < mask.numel()
    assert model.post_process(logits, [(7, 9), (64, 5)])[1].shape == (64, 5)


def test_other_sides_are_padded():
    model, x = small(), images(sides=(33, 41))
    with torch.no_grad():
        expected = model(F.pad(x, (0, 7, 0, 7)))[..., :33, :41]
        assert torch.equal(model(x), expected)
        with pytest.raises(an.InputError, match="multiples of 8"):
            model.forward_streams(x)


def test_company_changes_nothing():
    model, x = small(), images(rows=3)
    with torch.no_grad():
        together = model(x)
        for i in range(3):
            assert torch.allclose(model(x[i : i + 1])[0], together[i], atol=1e-12)


def test_recorded_attention():
    model, x = small(), images(sides=(40, 24))
    with torch.no_grad(), record_attention(model) as maps:
        found = model(x)
    assert [x.shape for x in maps.values()] == 2 * [(2, 3, 15, 15)]
    assert torch.allclose(found, model(x), atol=1e-10)


def test_only_the_transformer_sees_far_in_one_step():
    """The first stage of the CNN knows its surroundings, the tokens the whole image."""
    model = small()
    x = images(rows=1, sides=(64, 64))
    y = x.clone()
    y[..., -1, -1] += 1
    with torch.no_grad():
        changed = [
            (a - b).abs().amax(1)[0, 0, 0] > 0
            for a, b in zip(
                (model.cnn(x)[0], model.transformer(x)),
                (model.cnn(y)[0], model.transformer(y)),
                strict=True,
            )
        ]
    assert [bool(c) for c in changed] == [False, True]


def test_every_parameter_learns_and_positions_do_not_decay():
    model = small().train()
    labels = torch.randint(3, (2, 32, 48))
    terms = model.losses(model(images()), labels)
    sum(model.loss_weights[k] * v for k, v in terms.items()).backward()
    assert all(p.grad is not None for p in model.parameters())
    recipe = an.model_info("transfuse_small").recipes["paper"]
    assert (recipe.optimizer, recipe.learning_rate) == ("adam", 7e-5)
    assert recipe.betas == (0.5, 0.999) and recipe.max_grad_norm == 2.0
    assert recipe.max_steps * recipe.batch_size == 25 * 2000
    _, spared = make_optimizer(model, recipe).param_groups
    ids = {id(p) for p in spared["params"]}
    assert id(model.transformer.positions.weight) in ids
    assert sum(model.loss_weights.values()) == pytest.approx(1)


# ---- bad input

WRONG = {
    "one channel": torch.zeros(2, 1, 32, 48),
    "a volume": torch.zeros(2, 3, 8, 8, 8),
    "whole numbers": torch.zeros(2, 3, 32, 48, dtype=torch.int16),
    "no image": torch.zeros(0, 3, 32, 48),
    "a list": [torch.zeros(3, 32, 48)],
}


@pytest.mark.no_shapes
@pytest.mark.parametrize("given", WRONG.values(), ids=WRONG)
def test_bad_images(given):
    with pytest.raises(an.InputError, match=r"^images: expected .*; got .*") as caught:
        small()(given)
    assert "\n" not in str(caught.value)


@pytest.mark.no_shapes
def test_a_single_patch_in_training():
    with pytest.raises(an.InputError, match="expected two patches or more"):
        small().train()(images(rows=1, sides=(8, 8)))
    assert small()(images(rows=1, sides=(8, 8))).shape == (1, 3, 8, 8)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "change",
    [
        dict(img_size=(32, 44)),
        dict(img_size=20),
        dict(img_size=(32, 32, 32)),
        dict(patch_size=4),
        dict(num_classes=1),
        dict(resnet_width=3),
        dict(embed_dim=6, num_heads=2),
        dict(num_heads=5),
        dict(resnet_layers=(1, 1)),
        dict(dropout=1.0),
    ],
    ids=str,
)
def test_bad_configurations(change):
    name = {"img_size": "img_size|patch_size"}.get(next(iter(change)))
    with pytest.raises(
        an.ConfigError, match=f"{name or [*change][0]}: expected .*; got"
    ):
        replace(SMALL, **change)


# ---- files


def test_saved_and_read_back(tmp_path):
    model = small().float()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        again = create_model("transfuse_small", tmp_path)
    assert again.config == model.config
    assert torch.equal(again(images().float()), model(images().float()))


def test_a_file_of_the_authors(tmp_path):
    state = {f"module.{k}": v.float() if v.ndim else v for k, v in official().items()}
    torch.save(state, tmp_path / "TransFuse-19_best.pth")
    change = dict(resnet_layers=(1, 1, 1), depth=2)
    with warnings.catch_warnings(action="error"):
        model = create_model(
            "transfuse_small", tmp_path / "TransFuse-19_best.pth", **change
        )
    assert not model.not_loaded
    key = "up_c_1_2.attn_block.psi.0.weight"
    assert torch.equal(model.joins[0].gate.score[0].weight, official()[key].float())
    table = official()["transformer.pos_embed"][0].float()
    assert torch.equal(model.transformer.positions.weight, table)
    with pytest.warns(an.CheckpointWarning, match="from 12 x 16 to 24 x 32 patches"):
        model = create_model(
            "transfuse_small",
            tmp_path / "TransFuse-19_best.pth",
            img_size=(384, 512),
            **change,
        )
    expected = resize_table(table, (12, 16), (24, 32))
    assert torch.equal(model.transformer.positions.weight, expected)
    with pytest.warns(an.CheckpointWarning, match="another size: .*joint_head.1"):
        model = create_model(
            "transfuse_small",
            tmp_path / "TransFuse-19_best.pth",
            num_classes=4,
            **change,
        )
    heads = {key.rpartition(".")[0] for key in model.not_loaded}
    assert heads == {h.removesuffix(".*") + ".conv" for h in HEADS}


@pytest.mark.parametrize("source", ["both", "DeiT", "ResNet"])
def test_a_deit_and_a_resnet_fill_the_streams(source, tmp_path):
    timm = pytest.importorskip("timm")
    vision = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    deit = timm.create_model("deit_small_patch16_224", depth=3).state_dict()
    resnet = vision.resnet34().state_dict()
    state = {"both": join_streams(deit, resnet), "DeiT": deit, "ResNet": resnet}[source]
    torch.save(state, tmp_path / "start.pth")
    with pytest.warns(an.CheckpointWarning) as caught:
        model = create_model("transfuse_small", tmp_path / "start.pth", depth=2)
    said = " ".join(str(w.message) for w in caught)
    assert ("from 14 x 14 to 12 x 16" in said) == (source != "ResNet")
    parts = {key.split(".")[0] for key in model.not_loaded}
    joined = {
        "ups",
        "fusions",
        "joins",
        "joint_head",
        "transformer_head",
        "fusion_head",
    }
    left = {"both": set(), "DeiT": {"cnn"}, "ResNet": {"transformer"}}[source]
    assert parts == joined | left
    if source != "ResNet":
        stream = model.transformer
        weight = deit["blocks.1.attn.qkv.weight"]
        assert torch.equal(stream.encoder.layers[1].attention.in_proj_weight, weight)
        table = deit["pos_embed"][0, 1:]
        expected = resize_table(table, (14, 14), (12, 16))
        assert torch.equal(stream.positions.weight, expected)
    if source != "DeiT":
        weight = resnet["layer3.5.conv2.weight"]
        assert torch.equal(model.cnn.layer3[5].conv2.weight, weight)
