"""DeiT: equal to timm and transformers on the same weights, with both its heads; the
files that it is read from; and the paper's recipe, run as it stands."""

import argparse
import json
import os
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attn_notes as an
from attn_notes.training.recipes import make_optimizer
from attn_notes.vision.deit import SIZES, DeiT, DeiTConfig, DeiTOutput
from attn_notes.vision.vit import ViT, ViTConfig
from attn_notes.zoo.factory import count_parameters, create_model
from attn_notes.zoo.formats import find_format

SMALL = DeiTConfig(
    img_size=20,
    patch_size=5,
    in_chans=2,
    num_classes=3,
    embed_dim=12,
    depth=2,
    num_heads=3,
    mlp_ratio=20 / 12,
    drop_path_rate=0.0,
    distilled=True,
)
PLAIN = replace(SMALL, distilled=False)
NAME, ONE_HEAD = "deit_base_distilled_patch16_224", "deit_base_patch16_224"
training = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def shake(model, seed=0):
    """Noise on every weight: no bias is zero, no norm neutral."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def small(config=SMALL, seed=0, **change):
    torch.manual_seed(seed)
    return shake(DeiT(replace(config, **change)).double().eval(), seed)


def images(config=SMALL, rows=3, sides=None, seed=0):
    random = torch.Generator().manual_seed(seed)
    shape = (rows, config.in_chans, *(sides or (config.img_size,) * 2))
    return torch.randn(shape, generator=random, dtype=torch.float64)


# ---- the sizes


@pytest.mark.parametrize("name", SIZES)
def test_counts_and_products(name):
    c, info = SIZES[name], an.model_info(name)
    heads, patches = 1 + c.distilled, (c.img_size // c.patch_size) ** 2
    d, n, pixels = c.embed_dim, heads + patches, c.in_chans * c.patch_size**2
    counted = (pixels + 1) * d + (n + heads) * d + 2 * d
    counted += c.depth * (12 * d * d + 13 * d) + heads * (d + 1) * c.num_classes
    products = patches * pixels * d + heads * d * c.num_classes
    products += c.depth * (12 * n * d * d + 2 * n * n * d)
    model = create_model(name, device="meta").eval()
    assert count_parameters(model) == counted == info.parameters
    with FlopCounterMode(display=False) as flops:
        model(torch.empty(1, *info.input_size, device="meta"))
    assert flops.get_total_flops() == 2 * products == 2 * info.macs
    if c.in_chans == 3:
        said = float(info.reported["parameters"].removesuffix("M"))
        assert abs(counted / 1e6 - said) < 1


# ---- equal to the references


def timm_reference(config, **options):
    timm = pytest.importorskip("timm")
    sizes = asdict(config)
    for ours in ("representation_size", "dropout", "norm_eps", "resnet_layers"):
        del sizes[ours]
    distilled = sizes.pop("distilled")
    made = timm.models.deit.VisionTransformerDistilled
    model = (made if distilled else timm.models.VisionTransformer)(**sizes, **options)
    if distilled:
        model.set_distilled_training(True)
    return shake(model)


def hf_reference(config, kind="ForImageClassificationWithTeacher"):
    transformers = pytest.importorskip("transformers")
    stored = transformers.DeiTConfig(
        image_size=config.img_size,
        patch_size=config.patch_size,
        num_channels=config.in_chans,
        num_labels=config.num_classes,
        hidden_size=config.embed_dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        intermediate_size=round(config.embed_dim * config.mlp_ratio),
    )
    return shake(getattr(transformers, f"DeiT{kind}")(stored))


def equal(model, theirs, call, config):
    """Logits of each head, and gradients of a loss of all."""
    x = images(config)
    found, expected = model.forward_heads(x), call(x)
    found = [found[name] for name in found]
    random, loss = torch.Generator().manual_seed(1), [0.0, 0.0]
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < 1e-10 and a.abs().max() > 0.1
        weights = torch.randn(a.shape, generator=random)
        loss = [loss[0] + (a * weights).sum(), loss[1] + (b * weights).sum()]
    [total.backward() for total in loss]
    grads = {key: p.grad for key, p in theirs.named_parameters()}
    grads = find_format(grads, an.model_info(NAME).formats).apply(grads, model)
    assert set(grads) == {key for key, _ in model.named_parameters()}
    for key, p in model.named_parameters():
        assert (p.grad - grads[key]).abs().max() < 1e-10, key


@training
@pytest.mark.parametrize("config", [SMALL, PLAIN], ids=["distilled", "plain"])
def test_equal_to_timm(config, training, tmp_path):
    theirs = timm_reference(config)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    with warnings.catch_warnings(action="error"):
        model = create_model(NAME, tmp_path / "weights.pth", **asdict(config))
    assert not model.not_loaded
    model, theirs = model.double().train(training), theirs.double().train(training)

    def call(x):
        if not config.distilled:
            return [theirs(x)]
        tokens = theirs.forward_features(x)
        return [theirs.head(tokens[:, 0]), theirs.head_dist(tokens[:, 1])]

    equal(model, theirs, call, config)
    ours, other, x = model(images(config)), theirs(images(config)), images(config)
    if training and config.distilled:
        assert isinstance(ours, DeiTOutput) and [*ours] == [*DeiTOutput(*other)]
        assert torch.equal(ours["distillation_logits"], other[1])
    else:
        assert (ours - other).abs().max() < 1e-10 and ours.shape == (len(x), 3)


@training
def test_equal_to_transformers(training, tmp_path):
    config = replace(SMALL, norm_eps=1e-12)
    theirs = hf_reference(config)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    with warnings.catch_warnings(action="error"):
        model = create_model(NAME, tmp_path / "weights.pth", **asdict(config))
    model, theirs = model.double().train(training), theirs.double().train(training)

    def call(x):
        found = theirs(x)
        return [found.cls_logits, found.distillation_logits]

    equal(model, theirs, call, config)
    expected = theirs(images(config)).logits
    assert (model.eval()(images(config)) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("sides", [(20, 20), (30, 20), (10, 35)], ids=str)
def test_other_sizes_equal_timm(sides, tmp_path):
    """To the precision of timm's positions, which are interpolated as float32."""
    theirs = timm_reference(SMALL, dynamic_img_size=True)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    model = create_model(NAME, tmp_path / "weights.pth", **asdict(SMALL)).double()
    x = images(sides=sides)
    assert (model(x) - theirs.double().eval()(x)).abs().max() < 1e-6


@pytest.mark.slow
def test_the_base_size_equals_timm(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model(NAME).eval()
    for p in theirs.parameters():
        p.data += 0.02 * torch.randn_like(p)
    torch.save({"model": theirs.state_dict()}, tmp_path / "weights.pth")
    model, x = create_model(NAME, tmp_path / "weights.pth"), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        found, expected = model(x), theirs(x)
    assert (found - expected).norm() < 1e-5 * expected.norm()


# ---- what it is


def test_it_is_a_vit_with_a_token():
    """Of the weights of a ViT without distillation, the same logits."""
    vit = shake(ViT(ViTConfig(**{k: v for k, v in asdict(PLAIN).items()
                                 if k != "distilled"})).double())  # fmt: skip
    model = small(PLAIN)
    model.load_state_dict(vit.state_dict())
    assert torch.equal(model(images()), vit.eval()(images()))
    more = set(small().state_dict()) - set(model.state_dict())
    assert more == {
        "distillation_token",
        "distillation_head.weight",
        "distillation_head.bias",
    }


def test_heads_and_their_mean():
    model, x = small(), images()
    heads, features = model.forward_heads(x), model.forward_features(x)
    assert features.shape == (3, 2 + 16, 12)
    assert torch.equal(heads.logits, model.head(features[:, 0]))
    assert torch.equal(
        heads.distillation_logits, model.distillation_head(features[:, 1])
    )
    assert torch.equal(model(x), (heads.logits + heads.distillation_logits) / 2)
    assert torch.equal(model.train()(x).logits, heads.logits)
    alone = small(PLAIN).forward_heads(x)
    assert alone.distillation_logits is None and [*alone] == ["logits"]
    bare = small(num_classes=0)
    assert torch.allclose(bare(x), bare.forward_features(x)[:, :2].mean(1))


def test_the_tokens_begin_alike_and_learn_apart():
    model = small()
    model.distillation_token.data = model.class_token.data.clone()
    model.positions.weight.data[1] = model.positions.weight.data[0]
    features = model.forward_features(images())
    assert torch.allclose(features[:, 0], features[:, 1], atol=1e-12)
    model.distillation_token.data[0] += 1.0
    features = model.forward_features(images())
    assert not torch.allclose(features[:, 0], features[:, 1], atol=1e-3)


def test_the_start_of_the_authors_code():
    torch.manual_seed(0)
    model = DeiT(replace(SIZES["deit_tiny_distilled_patch16_224"], depth=2))
    for name, value in model.named_parameters():
        if "norm" in name or "patch_embedding" in name:
            continue
        if name.endswith("bias"):
            assert not value.any(), name
        else:
            assert abs(value.std() - 0.02) < 0.003 and value.abs().max() > 0.03, name
    patches = model.patch_embedding.projection.weight
    assert patches.abs().max() <= 768**-0.5 and abs(patches.std() * 48 - 1) < 0.02


def test_weight_decay_spares_tokens_and_positions():
    recipe, model = an.model_info(NAME).recipes["paper"], DeiT(SMALL)
    decayed, spared = make_optimizer(model, recipe).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    free = {id(p) for p in spared["params"]}
    named = {name for name, p in model.named_parameters() if id(p) in free}
    assert {"positions.weight", "class_token", "distillation_token"} <= named
    assert "distillation_head.weight" not in named


def test_the_recipe_of_the_papers_table():
    """Table 9."""
    recipe = an.model_info(ONE_HEAD).recipes["paper"]
    how, epoch = recipe.augmentation, recipe.max_steps / 300
    assert recipe.optimizer == "adamw" and recipe.batch_size == 1024
    assert recipe.learning_rate == 0.0005 * recipe.batch_size / 512
    assert recipe.schedule == "cosine" and recipe.weight_decay == 0.05
    assert recipe.warmup_steps == 5 * epoch and recipe.label_smoothing == 0.1
    assert abs(epoch - 1_281_167 / 1024) < 0.5 and recipe.max_grad_norm is None
    assert how.rand_augment == "rand-m9-mstd0.5-inc1" and how.repeats == 3
    assert (how.mixup, how.cutmix, how.random_erasing) == (0.8, 1.0, 0.25)
    config = an.model_info(ONE_HEAD).config
    assert (config.dropout, config.drop_path_rate) == (0.0, 0.1)
    assert recipe.lr(recipe.max_steps) == pytest.approx(1e-5)


@pytest.mark.no_shapes
def test_compiled_and_exported_at_another_size():
    model, x = small().float(), images(sides=(30, 20)).float()
    with torch.no_grad():
        expected = model(x)
        exported = torch.export.export(model, (x,)).module()
        assert torch.allclose(exported(x), expected, atol=1e-6)
        torch._dynamo.reset()
        model.train().compile(backend="eager", fullgraph=True)
        found = model(x)
    assert torch.allclose((found.logits + found.distillation_logits) / 2, expected)


def test_channels_last():
    model, x = small(), images()
    with torch.no_grad():
        expected = model(x)
        model.to(memory_format=torch.channels_last)
        found = model(x.to(memory_format=torch.channels_last))
    assert torch.allclose(found, expected, atol=1e-12)


# ---- bad input


@pytest.mark.no_shapes
@pytest.mark.parametrize("shape", [(2, 3, 20, 20), (2, 2, 20, 22), (2, 2, 4, 20)])
@pytest.mark.parametrize("call", ["forward", "forward_heads"])
def test_bad_images(shape, call):
    with pytest.raises(an.InputError, match=r"^images: expected .*; got .*"):
        getattr(small(), call)(torch.zeros(shape))


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "change",
    [
        dict(global_pool="avg"),
        dict(representation_size=5),
        dict(distilled="yes"),
        dict(patch_size=7),
        dict(drop_path_rate=1.0),
    ],
    ids=str,
)
def test_bad_configurations(change):
    with pytest.raises(an.ConfigError, match=f"{next(iter(change))}: expected .*; got"):
        replace(SMALL, **change)


# ---- files


@pytest.mark.parametrize("config", [SMALL, PLAIN], ids=["distilled", "plain"])
def test_saved_and_read_back(config, tmp_path):
    model = small(config, num_classes=4).float()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        again = create_model(NAME, tmp_path)
    assert again.config == model.config
    assert torch.equal(again(images().float()), model(images().float()))


def test_an_official_checkpoint(tmp_path):
    """As facebookresearch/deit writes it: under "model", with arguments beside it."""
    theirs = timm_reference(SMALL)
    content = {"model": theirs.state_dict(), "args": argparse.Namespace(lr=5e-4)}
    torch.save(content, tmp_path / "checkpoint.pth")
    with warnings.catch_warnings(action="error"):
        model = create_model(NAME, tmp_path / "checkpoint.pth", **asdict(SMALL))
    x = images().float()
    assert torch.allclose(model(x), theirs.eval()(x), atol=1e-5)


def test_a_folder_of_timm(tmp_path):
    theirs = timm_reference(SMALL)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    sizes = {"patch_size": 5, "embed_dim": 12, "depth": 2, "num_heads": 3}
    stored = {
        "architecture": "deit_tiny_distilled_patch16_224",
        "num_classes": 3,
        "model_args": sizes | {"mlp_ratio": 20 / 12},
        "pretrained_cfg": {"input_size": [2, 20, 20], "crop_pct": 0.9},
    }
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with warnings.catch_warnings(action="error"):
        model = create_model(NAME, tmp_path)
    assert model.config == replace(SMALL, drop_path_rate=0.1)


def test_folders_of_transformers(tmp_path):
    config, x = replace(SMALL, norm_eps=1e-12), images().float()
    theirs = hf_reference(config)
    theirs.save_pretrained(tmp_path / "both")
    with warnings.catch_warnings(action="error"):
        model = create_model(NAME, tmp_path / "both")
    assert model.config == replace(config, drop_path_rate=0.1)
    assert torch.allclose(model(x), theirs.eval()(x).logits, atol=1e-5)
    theirs = hf_reference(config, "ForImageClassification").eval()
    theirs.save_pretrained(tmp_path / "one")
    with pytest.warns(an.CheckpointWarning, match="as they were: distillation_head"):
        model = create_model(NAME, tmp_path / "one")
    assert model.not_loaded == ("distillation_head.weight", "distillation_head.bias")
    assert torch.allclose(model.forward_heads(x).logits, theirs(x).logits, atol=1e-5)


def test_a_folder_of_transformers_vit(tmp_path):
    """As which the hub has the undistilled ones."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=20, patch_size=5, num_channels=2, num_labels=3, hidden_size=12,
        num_hidden_layers=2, num_attention_heads=3, intermediate_size=20,
    )  # fmt: skip
    theirs = shake(transformers.ViTForImageClassification(config)).eval()
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        model = create_model(ONE_HEAD, tmp_path)
    assert not model.config.distilled
    x = images().float()
    assert torch.allclose(model(x), theirs(x).logits, atol=1e-5)


def test_another_resolution_and_other_classes(tmp_path):
    path, x = tmp_path / "weights.pth", images(sides=(30, 30)).float()
    torch.save(small().float().state_dict(), path)
    sizes = dict(asdict(SMALL), img_size=30)
    said = "positions interpolated from 4 x 4 to 6 x 6 patches"
    with pytest.warns(an.CheckpointWarning, match=said):
        model = create_model(NAME, path, **sizes)
    assert torch.allclose(model(x), small().float()(x), atol=1e-5)
    heads = ("head.weight", "head.bias")
    heads += tuple(f"distillation_{key}" for key in heads)
    with pytest.warns(an.CheckpointWarning, match="re-initialized.*distillation_head"):
        model = create_model(NAME, path, **dict(asdict(SMALL), num_classes=7))
    assert model.not_loaded == heads and model(images().float()).shape == (3, 7)


def test_with_and_without_the_token(tmp_path):
    """A distilled file gives a model of one head; the other way the token lacks."""
    path = tmp_path / "weights.pth"
    torch.save(small().float().state_dict(), path)
    with pytest.warns(
        an.CheckpointWarning, match="skipped, not in.*distillation_token"
    ):
        model = create_model(ONE_HEAD, path, **asdict(PLAIN))
    table = small().float().positions.weight
    assert torch.equal(model.positions.weight[0], table[0])
    assert torch.equal(model.positions.weight[1:], table[2:])
    torch.save(model.state_dict(), path)
    with pytest.raises(an.CheckpointError, match="1 missing: distillation_token;"):
        create_model(NAME, path, **asdict(SMALL))


# ---- the paper's recipe, whole


def folder_of_classes(root):
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cats", "dogs"):
            (root / split / name).mkdir(parents=True)
            for i in range(3):
                pixels = random.integers(0, 255, (40, 49, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.mark.slow
def test_the_papers_recipe_under_torchrun(tmp_path):
    """Two steps of two processes, every part of table 9 in them, with a teacher of
    torchvision's."""
    from torchvision.models import squeezenet1_1

    pytest.importorskip("timm")
    data, weights = folder_of_classes(tmp_path / "data"), tmp_path / "teacher.pth"
    torch.manual_seed(0)
    torch.save(squeezenet1_1(num_classes=2).state_dict(), weights)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--standalone", "-m", "attn_notes.cli", "train"),
        *("deit_tiny_distilled_patch16_224", "--recipe", "paper", "--max-steps", "2"),
        *("--teacher", "squeezenet1_1", "--teacher-weights", str(weights)),
        *("--data", "imagenet", "--data-dir", str(data)),
        *("--output", str(tmp_path / "run")),
    ]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, env=os.environ | threads
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [1, 2]
    mean = (rows[0]["class"] + rows[0]["distillation"]) / 2
    assert rows[0]["loss"] == pytest.approx(mean, rel=1e-5)
    assert 0 <= rows[-1]["valid_accuracy"] <= 1
    task = json.loads((tmp_path / "run" / "task.json").read_text())
    assert task["kind"] == "image_classification"
    model = create_model("deit_tiny_distilled_patch16_224", tmp_path / "run")
    assert model.config.distilled and model.config.num_classes == 2
    assert isinstance(model.head, nn.Linear) and Path(tmp_path / "run").is_dir()
