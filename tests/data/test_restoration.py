"""Undoing what has happened to an image: degradations, scores, held-out photographs,
batches of one task, the task in files."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from attn_notes.data import degraded_images
from attn_notes.data.degraded_images import (
    DEGRADATIONS,
    HELD_OUT,
    SIDE,
    bicubic,
    crop,
    degrade,
    image_scores,
    luminance,
    photographs,
    psnr,
    quantize,
)
from attn_notes.data.image_sets import PHOTOGRAPHS
from attn_notes.data.restoration import Restoration, mean_scores
from attn_notes.data.tasks import KINDS, create_task, kind_of_data, load_task
from attn_notes.foundations.checks import CheckpointError, ConfigError, InputError
from attn_notes.training.loop import train
from attn_notes.training.recipes import Recipe
from attn_notes.training.tasks import Task, describe_task
from attn_notes.zoo.factory import create_model

ALL = tuple(DEGRADATIONS)


class Same(nn.Module):
    """Gives images back, as large as the task asks for, times a number."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, images, task):
        return self.factor * bicubic(images, task)


def of(tasks=("denoise_30",), **options):
    options = {"limit": 20, "image_size": 16, **options}
    return create_task("restoration", "photographs", tasks=tasks, **options)


def fixed():
    return torch.Generator().manual_seed(0)


# ---- degradation


@pytest.mark.parametrize("task", ALL)
def test_degradation(task):
    clean = crop(photographs("valid")[0], 48, training=False)[None]
    bad = degrade(clean, task, fixed())
    side = 48 // DEGRADATIONS[task].scale
    assert bad.shape == (1, 3, side, side)
    assert torch.equal(bad, quantize(bad))
    assert torch.equal(bad, degrade(clean, task)) == task.startswith("sr_x")
    assert torch.equal(bad, degrade(clean, task, fixed()))
    assert bicubic(bad, task).shape == clean.shape


@pytest.mark.parametrize("task", ["denoise_30", "denoise_50"])
def test_noise_has_its_deviation(task):
    grey = torch.full((1, 3, 96, 96), 0.5)
    sigma = int(task[-2:]) / 255
    noise = (degrade(grey, task, fixed()) - grey).std()
    assert noise == pytest.approx(sigma, rel=0.05)


def test_shrinking_is_pillows():
    clean = crop(photographs("train")[0], 96, training=False)
    ours = degrade(clean[None], "sr_x3")[0].mul(255).round()
    picture = Image.fromarray(clean.mul(255).byte().permute(1, 2, 0).numpy())
    theirs = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC))
    assert np.abs(ours.permute(1, 2, 0).numpy() - theirs.astype(float)).mean() < 1


def test_rain_only_brightens():
    clean = torch.full((2, 3, 64, 64), 0.3)
    bad = degrade(clean, "derain", fixed())
    assert (bad >= quantize(clean)).all() and 0.1 < (bad > 0.31).float().mean() < 0.9
    assert torch.equal(bad[:, 0], bad[:, 1])  # as bright in every colour


@pytest.mark.no_shapes
def test_an_unknown_degradation():
    with pytest.raises(ConfigError, match="unknown task of restoration 'denoise_31'"):
        degrade(torch.rand(1, 3, 8, 8), "denoise_31")
    with pytest.raises(ConfigError, match="unknown task of restoration 'rain'; did"):
        of(("sr_x2", "rain"))


# ---- scores


def test_luminance_is_scikit_images():
    colours = pytest.importorskip("skimage.color")
    image = torch.rand(1, 3, 5, 7, generator=fixed())
    expected = colours.rgb2ycbcr(image[0].permute(1, 2, 0).numpy())[..., 0] / 255
    assert np.abs(luminance(image)[0, 0].numpy() - expected).max() < 1e-5


def test_scores_of_the_luminance():
    white, black = torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    assert luminance(white)[0, 0, 0, 0].item() == pytest.approx(235 / 255, abs=1e-6)
    assert luminance(black)[0, 0, 0, 0].item() == pytest.approx(16 / 255, abs=1e-6)
    random = torch.rand(2, 3, 24, 24, generator=fixed())
    noisy = (random + 0.1 * torch.randn(random.shape, generator=fixed())).clamp(0, 1)
    found = image_scores(noisy, random, border=2)
    y = [luminance(quantize(x))[..., 2:-2, 2:-2].double() for x in (noisy, random)]
    assert found["psnr"] == pytest.approx(
        -10 * math.log10((y[0] - y[1]).square().mean()), abs=1e-4
    )
    assert 0 < found["ssim"] < 1
    assert image_scores(random, random)["ssim"] == pytest.approx(1)
    assert psnr(white, white) == pytest.approx(100)  # and not infinite


def test_ssim_is_scikit_images():
    metrics = pytest.importorskip("skimage.metrics")
    a = luminance(torch.rand(1, 3, 40, 40, generator=fixed()))
    b = (a + 0.05 * torch.randn(a.shape, generator=fixed())).clamp(0, 1)
    theirs = metrics.structural_similarity(
        *(x[0, 0].double().numpy() for x in (a, b)),
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert degraded_images.ssim(a, b) == pytest.approx(theirs, abs=5e-3)


# ---- data and batches


def test_photographs_are_held_out_whole():
    assert len(photographs("valid")) == len(HELD_OUT) == 3
    assert len(photographs("train")) == len(PHOTOGRAPHS) - 3
    assert min(min(p.shape[1:]) for p in photographs("valid")) >= SIDE
    seen = {p.numpy().tobytes()[:999] for p in photographs("train")}
    assert not seen & {p.numpy().tobytes()[:999] for p in photographs("valid")}


def test_crops():
    picture = photographs("train")[0]
    middle = crop(picture, 32, training=False)
    assert torch.equal(middle, crop(picture, 32, training=False))
    torch.manual_seed(0)
    some = [crop(picture, 32, training=True) for _ in range(2)]
    assert middle.shape == some[0].shape and not torch.equal(*some)
    small = crop(picture[:, :10, :50], 32, training=True)  # continued with its border
    assert small.shape == (3, 32, 32)


def test_it_is_a_task():
    task = of(ALL)
    assert isinstance(task, Task) and task.kind == "restoration"
    assert kind_of_data("photographs", "restoration") == "restoration"
    assert KINDS["restoration"].data == ("photographs", "imagenet")
    task.setup(Recipe(batch_size=8, seed=1))
    batches = task.batches(0)
    rows = task.dataset("train")
    assert len(rows) == 6 * 20 and sorted(np.concatenate(batches)) == [*range(120)]
    kinds = [{rows[i][1] for i in batch} for batch in batches]
    assert all(len(kind) == 1 for kind in kinds) and kinds != sorted(kinds, key=min)
    assert [*batches[0]] == [*task.batches(0)[0]] != [*task.batches(1)[0]]
    assert describe_task(task)["examples"] == 120


def test_a_batch_has_its_task_and_its_sizes():
    task = of(("sr_x3", "derain"))
    rows = task.dataset("train")
    ((name, part),) = task.collate([rows[i] for i in range(4)]).items()
    assert name == "sr_x3" and part["targets"].shape == (4, 3, 48, 48)
    assert part["images"].shape == (4, 3, 16, 16)
    mixed = task.collate([rows[0], rows[20], rows[1]])
    assert {k: len(v["images"]) for k, v in mixed.items()} == {"sr_x3": 2, "derain": 1}
    counts, losses = task.counts(mixed), task.loss(Same(), mixed)
    assert counts == {"l1": 3 * (2 * 48 * 48 + 16 * 16)}
    wanted = sum(
        (bicubic(p["images"], k) - p["targets"]).abs().sum() for k, p in mixed.items()
    )
    assert (
        losses["l1"][0].item() == pytest.approx(wanted.item()) and losses["l1"][1] == 1
    )


def test_held_out_degradation_is_always_the_same():
    task, again = of(), of(seed=5)
    one, other = (x.collate([x.dataset("valid")[1]]) for x in (task, again))
    assert torch.equal(one["denoise_30"]["images"], other["denoise_30"]["images"])
    assert one["denoise_30"]["targets"].shape[-2:] == (SIDE, SIDE)


def test_training_and_scores():
    task, model = of(("denoise_50",)), Same()
    before = task.evaluate(model)
    assert before == mean_scores(list(task.score(bicubic, range(3))))
    assert before["psnr"] == before["psnr_denoise_50"] < 21
    recipe = Recipe(max_steps=4, batch_size=4, learning_rate=1e-2)
    history = train(model, task, recipe, progress=False)
    assert history[-1]["valid_loss"] < before["loss"] and "valid_ssim" in history[-1]
    halves = [
        [*task.score(bicubic, range(rank, 3, 2))]
        for rank in (0, 1)  # of two processes
    ]
    assert task.evaluate(Same(), gather=lambda _: sum(halves, [])) == before


@pytest.mark.no_shapes
def test_a_model_of_other_tasks():
    model = create_model("ipt_book", tasks=("sr_x2",))
    task = create_task("restoration")
    assert task.overrides(model.config) == {"tasks": ("sr_x2",)} and task.size == 24
    with pytest.raises(ConfigError, match="some of the model's, sr_x2; got derain"):
        of(("derain",)).check_model(model)
    with pytest.raises(ConfigError, match="tasks: expected some of sr_x2, .*got none"):
        create_task("restoration").dataset("train")
    with pytest.raises(InputError, match="data: expected some for 'train'; got none"):
        Restoration(("sr_x2",)).dataset("train")


def test_folders_of_imagenet(tmp_path):
    picture = Image.fromarray(
        photographs("train")[0][:, :40, :70].permute(1, 2, 0).numpy()
    )
    for split in ("train", "val"):
        for name in ("n1", "n2"):
            (tmp_path / split / name).mkdir(parents=True)
            picture.save(tmp_path / split / name / "a.png")
    task = create_task(
        "restoration", "imagenet", tmp_path, tasks=("sr_x2",), image_size=24
    )
    rows = task.dataset("train")
    assert len(rows) == 2
    part = task.collate([rows[0], rows[1]])["sr_x2"]
    assert part["targets"].shape == (2, 3, 48, 48)
    assert task.evaluate(Same())["psnr"] > 20


# ---- in files


def test_saved_and_loaded(tmp_path):
    of(("sr_x2", "derain")).save(tmp_path)
    task = load_task(tmp_path)
    assert (task.tasks, task.size) == (("sr_x2", "derain"), 16)
    assert len(task.dataset("train")) == 40
    stored = json.loads((tmp_path / "task.json").read_text())
    (tmp_path / "task.json").write_text(json.dumps({**stored, "tasks": ["cook"]}))
    with pytest.raises(CheckpointError, match="could not read it: unknown task"):
        load_task(tmp_path)


def test_predict_takes_files_pictures_and_bytes(tmp_path):
    pixels = photographs("valid")[0][:, :21, :34]
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    picture.save(tmp_path / "a.png")
    model = create_model("ipt_book")
    task = Restoration()
    given = [tmp_path / "a.png", picture, pixels]
    found = task.predict(model, given)  # the first task enlarges
    assert [x.size for x in found] == 3 * [
        (68, 42)
    ] and task.tasks == model.config.tasks
    assert len({x.tobytes() for x in found}) == 1
    (same,) = task.predict(model, [picture], task="derain")
    assert np.abs(np.asarray(same, float) - np.asarray(picture, float)).max() <= 1


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "given, task, said",
    [
        ("none.png", None, r"none.png: expected an image; got no file"),
        (torch.zeros(3, 4), None, "inputs: expected a file"),
        (
            torch.zeros(3, 4, 4, dtype=torch.uint8),
            "sharpen",
            "one of sr_x2, denoise_30",
        ),
    ],
)
def test_what_predict_refuses(given, task, said):
    with pytest.raises(InputError, match=said):
        Restoration().predict(create_model("ipt_book"), [given], task=task)
