"""BoTNet: attention equal to a loop over pairs and to timm's, all else to torchvision's
ResNet; exact sizes; images of any size; and the files that it is read from."""

import warnings
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import ResNet, resnet50
from torchvision.models.resnet import Bottleneck
from torchvision.ops import SqueezeExcitation

import attn_notes as an
from attn_notes.data.tasks import load_task
from attn_notes.foundations.attention import record_attention
from attn_notes.training.recipes import make_optimizer
from attn_notes.vision import botnet_evidence as evidence
from attn_notes.vision.botnet import (
    SIZES,
    BoTNet,
    BoTNetConfig,
    RelativePositions,
    SpatialAttention,
)
from attn_notes.vision.botnet_formats import TORCHVISION_FORMAT, resize_table
from attn_notes.zoo.checkpoints import shipped_weights
from attn_notes.zoo.factory import count_parameters, create_model

SMALL = BoTNetConfig(
    img_size=48, num_classes=5, embed_dim=8, depths=(1, 2, 2), num_heads=2
)  # the last stage is given maps of 6 x 6


def shake(model, seed=0):
    """Noise on every weight and statistic: no norm is neutral, no head silent."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    for key, buffer in model.named_buffers():
        if "running" in key:
            buffer += 0.2 * torch.rand_like(buffer)
    return model


def small(**change):
    torch.manual_seed(0)
    return shake(BoTNet(replace(SMALL, **change))).double().eval()


def images(config=SMALL, rows=2, sides=None, seed=0):
    sides = sides or (config.img_size, config.img_size)
    random = torch.Generator().manual_seed(seed)
    shape = (rows, config.in_chans, *sides)
    return torch.randn(shape, generator=random, dtype=torch.float64)


# ---- the sizes


@pytest.mark.parametrize("name", SIZES)
def test_counts_by_construction_from_torchvisions_resnet(name):
    info, c = an.model_info(name), SIZES[name]
    *_, width = c.widths
    with torch.device("meta"):
        if c.embed_dim == 64:
            resnet = ResNet(Bottleneck, [*c.depths], c.num_classes)
        else:
            resnet = evidence.set_last_stage(BoTNet(c), "convolution")
    counted = count_parameters(resnet)
    counted -= c.depths[-1] * (9 - 3) * width**2  # 3 x 3 against q, k and v
    sides = [c.last_side, *[-(-c.last_side // c.last_stride)] * (c.depths[-1] - 1)]
    counted += sum(2 * (2 * side - 1) for side in sides) * width // c.num_heads
    if c.se_ratio:
        for inner, depth in zip(c.widths, c.depths, strict=True):
            outer, squeezed = 4 * inner, int(4 * inner * c.se_ratio)
            counted += depth * (2 * outer * squeezed + outer + squeezed)
    model = create_model(name, device="meta")
    assert count_parameters(model) == counted == info.parameters
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(torch.empty(1, *info.input_size, device="meta"))
    assert flops.get_total_flops() == 2 * info.macs


def test_the_papers_counts():
    for name, millions in (("botnet50", 20.8), ("botnet59_s1", 33.5)):
        assert abs(an.model_info(name).parameters / 1e6 - millions) < 0.2
    assert round(an.model_info("botnet59_s1").macs / 1e9 + 0.02, 1) == 7.3
    tables = 128 * 2 * (27 + 2 * 13)
    removed = 3 * 6 * 512**2
    assert 25_557_032 - removed + tables == an.model_info("botnet50").parameters


# ---- equal to references


def brute_force(attention, x):
    """Pair by pair, in loops."""
    p, (b, c, h, w) = attention.positions, x.shape
    qkv = nn.functional.conv2d(x, attention.in_proj.weight)
    d = c // attention.num_heads
    out = torch.zeros_like(x)
    for n in range(b):
        for head in range(attention.num_heads):
            q, k, v = (
                qkv[n, i * c + head * d : i * c + head * d + d] for i in range(3)
            )
            for y1 in range(h):
                for x1 in range(w):
                    scores, values = [], []
                    for y2 in range(h):
                        for x2 in range(w):
                            r = p.height[y2 - y1 + h - 1] + p.width[x2 - x1 + w - 1]
                            key = k[:, y2, x2] + r
                            scores.append(q[:, y1, x1] @ key / d**0.5)
                            values.append(v[:, y2, x2])
                    weights = torch.stack(scores).softmax(0)
                    found = weights @ torch.stack(values)
                    out[n, head * d : head * d + d, y1, x1] = found
    return out


@pytest.mark.parametrize("stride", [1, 2])
def test_attention_equals_a_loop_over_pairs(stride):
    torch.manual_seed(0)
    attention = SpatialAttention(8, 2, 4, stride).double()
    x = torch.randn(2, 8, 4, 4).double().requires_grad_()
    found, expected = attention(x), brute_force(attention, x)
    if stride == 2:
        expected = expected.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5))
    assert (found - expected).abs().max() < 1e-12
    weights = [x, *attention.parameters()]
    loss = torch.randn_like(found)
    ours = torch.autograd.grad((found * loss).sum(), weights)
    theirs = torch.autograd.grad((expected * loss).sum(), weights)
    assert max((a - b).abs().max() for a, b in zip(ours, theirs, strict=True)) < 1e-12


@pytest.mark.parametrize("sides", [(5, 5), (4, 6)], ids=str)
def test_positions_equal_timms(sides):
    module = pytest.importorskip("timm.layers.bottleneck_attn")
    torch.manual_seed(0)
    theirs = module.PosEmbedRel(sides, 3, 1.0).double()
    ours = RelativePositions(5, 3).double()
    with torch.no_grad():
        for mine, side, table in zip(
            ("height", "width"),
            sides,
            (theirs.height_rel, theirs.width_rel),
            strict=True,
        ):
            setattr(ours, mine, nn.Parameter(table.clone()))
            assert len(table) == 2 * side - 1
    q = torch.randn(2, 2, *sides, 3).double()
    found, expected = ours(q).flatten(0, 1), theirs(q.flatten(0, 1).flatten(1, 2))
    assert (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize("stride", [1, 2])
def test_attention_equals_timms(stride):
    module = pytest.importorskip("timm.layers.bottleneck_attn")
    torch.manual_seed(0)
    theirs = module.BottleneckAttn(
        16, 16, (6, 6), stride, num_heads=2, scale_pos_embed=True
    ).double()
    ours = SpatialAttention(16, 2, 6, stride).double()
    names = {
        "in_proj.weight": "qkv.weight",
        "positions.height": "pos_embed.height_rel",
        "positions.width": "pos_embed.width_rel",
    }
    state = theirs.state_dict()
    ours.load_state_dict({mine: state[key] for mine, key in names.items()})
    x = torch.randn(2, 16, 6, 6).double()
    found, expected = ours(x), theirs(x)
    assert (found - expected).abs().max() < 1e-12
    loss = torch.randn_like(found)
    (found * loss).sum().backward(), (expected * loss).sum().backward()
    for mine, key in names.items():
        gap = ours.get_parameter(mine).grad - theirs.get_parameter(key).grad
        assert gap.abs().max() < 1e-10, mine


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_all_else_is_torchvisions_resnet(training):
    torch.manual_seed(0)
    theirs = shake(ResNet(Bottleneck, [1, 1, 1, 2], 7)).double().train(training)
    config = BoTNetConfig(depths=(1, 1, 1, 2), num_classes=7)
    ours = evidence.set_last_stage(BoTNet(config), "convolution")
    ours = ours.double().train(training)
    rename = lambda key: key.replace("fc.", "head.").replace("layer", "stages.")
    moved = {rename(key): v for key, v in theirs.state_dict().items()}
    down = lambda key: (
        f"stages.{int(key[7]) - 1}{key[8:]}" if key.startswith("stages") else key
    )
    ours.load_state_dict({down(key): v for key, v in moved.items()})
    x = images(sides=(33, 40), rows=3)
    found, expected = ours(x), theirs(x)
    assert (found - expected).abs().max() < 1e-12
    found.square().sum().backward(), expected.square().sum().backward()
    for (_, a), (_, b) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert (a.grad - b.grad).abs().max() < 1e-10 * (1 + b.grad.abs().max())


def test_squeeze_and_excitation_scales_the_branch():
    model = small(se_ratio=0.25, activation="silu")
    block, x = model.stages[0][0], torch.randn(2, 8, 5, 5).double()
    assert isinstance(block.se, SqueezeExcitation)
    y = block.relu(block.bn1(block.conv1(x)))
    y = block.bn3(block.conv3(block.relu(block.bn2(block.conv2(y)))))
    share = block.se.fc2(nn.functional.silu(block.se.fc1(y.mean((2, 3), True))))
    expected = nn.functional.silu(y * share.sigmoid() + block.downsample(x))
    assert (block(x) - expected).abs().max() < 1e-12


# ---- any size


def test_tables_are_stretched_about_the_middle():
    table = torch.arange(-6.0, 7.0)[:, None]
    for side in (1, 2, 7, 14, 31):
        new = resize_table(table, side)[:, 0]
        assert len(new) == 2 * side - 1 and new[side - 1].abs() < 1e-5
        assert torch.allclose(new, -new.flip(0), atol=1e-5)
    assert resize_table(table, 7) is table


@pytest.mark.parametrize("sides", [(48, 48), (47, 33), (97, 64), (1, 5)], ids=str)
def test_maps_of_any_size(sides):
    model, x = small(), images(sides=sides)
    maps = model.forward_pyramid(x)
    up = lambda n, s: -(-n // s)
    expected = [
        (32 * 2**i, *(up(up(up(n, 2), 2), 2**i) for n in sides)) for i in range(3)
    ]
    assert [tuple(m.shape[1:]) for m in maps] == expected
    assert torch.equal(model.forward_features(x), maps[-1])
    assert torch.equal(model(x), model.head(maps[-1].mean((2, 3))))
    bare = small(num_classes=0)
    bare.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(bare(x), maps[-1].mean((2, 3)))


def test_loaded_for_another_size_it_is_what_it_is_when_called_with_it(tmp_path):
    model, x = small().float(), images(sides=(80, 80)).float()
    model.save_pretrained(tmp_path)
    with pytest.warns(an.CheckpointWarning, match="from maps of 6 x 6 to 10 x 10"):
        larger = create_model("botnet50", tmp_path, img_size=80)
    assert len(larger.stages[-1][0].conv2.positions.height) == 19
    assert torch.allclose(larger(x), model(x), atol=1e-6)


def test_company_changes_nothing():
    model, x = small(), images(rows=3, sides=(40, 51))
    with torch.no_grad():
        alone = torch.cat([model(x[i : i + 1]) for i in range(3)])
        assert torch.allclose(model(x), alone, atol=1e-12)


def test_recorded_attention():
    model, x = small(), images()
    with torch.no_grad(), record_attention(model) as maps:
        found = model(x)
    assert [w.shape for w in maps.values()] == [(2, 2, 36, 36), (2, 2, 9, 9)]
    assert all(torch.allclose(w.sum(-1), w.new_ones(())) for w in maps.values())
    assert torch.allclose(found, model(x), atol=1e-12)


def test_channels_last():
    model, x = small(), images(sides=(50, 46))
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    found = model(x.to(memory_format=torch.channels_last))
    assert torch.allclose(found, expected, atol=1e-12)


# ---- bad input

WRONG = {
    "grey": torch.zeros(2, 1, 24, 24),
    "bytes": torch.zeros(2, 3, 24, 24, dtype=torch.uint8),
    "one image": torch.zeros(3, 24, 24),
    "no image": torch.zeros(0, 3, 24, 24),
    "no pixels": torch.zeros(2, 3, 0, 24),
    "a list": [torch.zeros(3, 24, 24)],
}


@pytest.mark.no_shapes
@pytest.mark.parametrize("given", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("call", ["forward", "forward_features", "forward_pyramid"])
def test_bad_images(given, call):
    with pytest.raises(an.InputError, match=r"^images: expected .*; got .*") as caught:
        getattr(small(), call)(given)
    assert "\n" not in str(caught.value)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "change",
    [
        dict(num_heads=3),
        dict(depths=(2,)),
        dict(depths=(2, 0)),
        dict(stem_stride=3),
        dict(last_stride=4),
        dict(se_ratio=-0.1),
        dict(activation="gelu"),
        dict(num_classes=-1),
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
        again = create_model("botnet50", tmp_path)
    assert again.config == model.config
    assert torch.equal(again(images().float()), model(images().float()))


@pytest.mark.parametrize("name", ["botnet50", "botnet59_s1"])
def test_torchvisions_resnet_50_up_to_the_last_stage(name, tmp_path):
    torch.manual_seed(0)
    resnet = shake(resnet50()).eval()
    torch.save(resnet.state_dict(), tmp_path / "resnet50.pth")
    with pytest.warns(an.CheckpointWarning, match="left as they were: stages"):
        model = create_model(name, tmp_path / "resnet50.pth", activation="relu")
    assert {key.split(".")[0] for key in model.not_loaded} == {"stages", "head"}
    assert all(
        key.startswith(("stages.3.", "head.")) or ".se." in key
        for key in model.not_loaded
    )
    if name == "botnet50":
        x = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            y = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x))))
            y = resnet.layer3(resnet.layer2(resnet.layer1(y)))
            assert torch.equal(model.forward_pyramid(x)[2], y)


def test_a_resnet_of_another_depth_is_refused(tmp_path):
    from torchvision.models import resnet18

    torch.save(resnet18().state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(an.CheckpointError, match="missing"):
        create_model("botnet50", tmp_path / "resnet18.pth")


def test_keys_of_torchvision_become_ours():
    with torch.device("meta"):
        resnet, ours = resnet50(), BoTNet(BoTNetConfig())
    found = TORCHVISION_FORMAT.apply(resnet.state_dict(), ours)
    own = [k for k in ours.state_dict() if not k.startswith(("stages.3.", "head."))]
    assert sorted(found) == sorted(own)


# ---- recipe and weights


def test_weight_decay_spares_the_tables():
    model, recipe = BoTNet(SMALL), an.model_info("botnet50").recipes["paper"]
    decayed, spared = make_optimizer(model, recipe).param_groups
    names = {id(p): key for key, p in model.named_parameters()}
    assert sum("positions" in names[id(p)] for p in spared["params"]) == 4
    assert not any("positions" in names[id(p)] for p in decayed["params"])
    assert asdict(recipe)["label_smoothing"] == 0.1


def test_the_shipped_weights_tell_digits_apart():
    task = load_task(shipped_weights("botnet_book"))
    scores = task.evaluate(create_model("botnet_book", pretrained=True), "valid")
    assert scores["accuracy"] > 0.9 and task.classes == [*"0123456789"]


# ---- the parts of the experiments


def test_sixteen_digits_are_one_image():
    task = evidence.GridDigits.create("mnist", seed=0, augment=False)
    rows = [task.dataset("train")[i] for i in range(0, 3200, 100)]
    batch = task.collate(rows)
    assert batch["images"].shape == (2, 1, 64, 64)
    single = evidence.Digits.create("mnist", seed=0, augment=False)
    field = nn.functional.avg_pool2d(single.collate([rows[16 + 6]])["images"], 2)
    assert torch.equal(batch["images"][1, 0, 17:31, 33:47], field[0, 0])
    labels = torch.tensor([row[1] for row in rows]).view(2, 4, 4)
    wanted = task.wanted(batch["labels"])
    assert torch.equal(wanted["own"], labels)
    assert torch.equal(wanted["away"], labels[..., [2, 3, 0, 1]])


@pytest.mark.parametrize("kind", evidence.KINDS)
def test_what_the_last_stage_knows_of_places(kind):
    """Shuffled places are shuffled outputs only where it has no positions."""
    stage = evidence.network(0, kind).stages[-1].double().eval()
    for block in stage:
        nn.init.ones_(block.bn3.weight)
    x, order = torch.randn(2, 128, 7, 7).double(), torch.randperm(49)
    move = lambda z: z.flatten(2)[..., order].unflatten(2, (7, 7))
    same = torch.allclose(stage(move(x)), move(stage(x)), atol=1e-9)
    assert same == (kind == "none")
    assert stage(x).shape == (2, 256, 7, 7)


def test_absolute_positions_are_those_of_the_key():
    torch.manual_seed(0)
    positions, q = evidence.AbsolutePositions(3, 4), torch.randn(1, 2, 3, 3, 4)
    found = positions(q)
    for i in range(9):
        for j in range(9):
            e = positions.height[j // 3] + positions.width[j % 3]
            expected = q[0, :, i // 3, i % 3] @ e
            assert torch.allclose(found[0, :, i, j], expected, atol=1e-5)
