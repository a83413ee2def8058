"""The classes of voxels: batches, loss, scores of whole volumes, files in and out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from torch import nn
from volume_toys import btcv, msd, save

import attn_notes as an
from attn_notes.data.sliding_window import sliding_window
from attn_notes.data.tasks import KINDS, create_task, kind_of_data, load_task
from attn_notes.data.volume_batches import volume_scores
from attn_notes.data.volume_folders import ORGANS
from attn_notes.data.volume_segmentation import VolumeSegmentation, as_volume
from attn_notes.data.volumes import Volume, VolumePreprocessing, read_volume
from attn_notes.foundations.checks import CheckpointError, ConfigError, InputError
from attn_notes.training.loop import train
from attn_notes.training.losses import dice_cross_entropy
from attn_notes.training.recipes import Recipe
from attn_notes.training.tasks import Task, describe_task

KIND = "volume_segmentation"
SMALL = dict(
    patch_size=4,
    img_size=(8, 8, 8),
    hidden_size=8,
    mlp_dim=8,
    num_heads=2,
    num_layers=2,
    skips=(1,),
    feature_size=2,
)


def model(channels=1, classes=4):
    torch.manual_seed(0)
    return nn.Conv3d(channels, classes, 3, padding=1)


def mni(**options):
    return create_task(KIND, "mni", **{"limit": 12, "image_size": 16, **options})


@pytest.fixture
def folder(tmp_path):
    return msd(tmp_path / "data")


def test_it_is_a_task():
    task = mni()
    assert isinstance(task, Task) and task.kind == KIND
    assert all(kind_of_data(name) == KIND for name in KINDS[KIND].data)
    assert KINDS[KIND].data == ("mni", "msd", "btcv")


def test_a_batch(folder):
    task = create_task(KIND, "msd", folder, image_size=8)
    for one, count in ((mni(), 12), (task, 4)):
        rows = one.dataset("train")
        assert len(rows) == count and rows[1][:2] == ("train", 1)
        batch = one.collate([rows[0], rows[1]])
        assert batch["volumes"].shape == (2, 1, *one.sides)
        assert batch["labels"].shape == (2, *one.sides)
        assert batch["labels"].dtype == torch.int64
    whole = task.dataset("valid").source.volume(0)[0]  # 6 x 7 x 10 voxels
    middle = task.collate([task.dataset("valid")[0]])["volumes"][0]
    assert torch.equal(middle[:, 1:7, 1:], whole[..., 1:9])
    assert not middle[:, ::7].any() and not middle[:, :, 0].any()


def test_crops_of_the_brain_are_of_the_seed_and_those_of_a_folder_are_varied(folder):
    first, again, other = (mni(seed=s).dataset("train") for s in (0, 0, 1))
    crop = lambda rows: rows.source.crop(3, (16, 16, 16))[0]
    assert torch.equal(crop(first), crop(again))
    assert not torch.equal(crop(first), crop(other))
    held = [mni(seed=s).dataset("valid").source.volume(1)[0] for s in (0, 1)]
    assert torch.equal(*held)
    task = create_task(KIND, "msd", folder, image_size=4)
    rows = task.dataset("train")
    crops = [task.collate([rows[0]])["volumes"] for _ in range(8)]
    assert not all(torch.equal(crops[0], x) for x in crops[1:])


def test_an_epoch_is_every_example_once():
    task = mni()
    task.setup(Recipe(batch_size=5, seed=4))
    first, again, other = (np.concatenate(task.batches(e)).tolist() for e in (0, 0, 1))
    assert [len(rows) for rows in task.batches(0)] == [5, 5, 2]
    assert sorted(first) == [*range(12)] and first == again != other


def test_loss_by_hand():
    task, net = mni(), model()
    rows = task.dataset("train")
    batch = task.collate([rows[0], rows[1], rows[2]])
    dice, total = dice_cross_entropy(net(batch["volumes"]), batch["labels"])
    found = task.loss(net, batch)
    assert found == {"dice": (dice, 1.0), "cross_entropy": (total, 1.0)}
    assert task.counts(batch) == {"dice": 3, "cross_entropy": 3 * 16**3}


def test_scores_are_monais():
    """Of two volumes at once, as its metrics average them."""
    metrics = pytest.importorskip("monai.metrics")
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (2, 9, 10, 11), generator=random)
    said = torch.where(labels.roll(1, 2) > 1, 2, labels)
    hot = lambda x: torch.nn.functional.one_hot(x, 3).movedim(-1, 1).float()
    ours = [volume_scores(said[i], labels[i], 3, (1, 2, 3)) for i in range(2)]
    dice = metrics.DiceMetric(include_background=False, reduction="mean_batch")
    far = metrics.HausdorffDistanceMetric(percentile=95, reduction="mean_batch")
    dice(hot(said), hot(labels)), far(hot(said), hot(labels), spacing=[1, 2, 3])
    for i, theirs in enumerate((dice.aggregate(), far.aggregate())):
        mine = np.mean([scores[i] for scores in ours], 0)
        assert np.allclose(mine, theirs.numpy(), atol=1e-6)


def test_scores_at_their_limits():
    labels = torch.zeros(6, 8, 10, dtype=torch.long)
    labels[2:4, 2:5, 2:6] = 1
    perfect = volume_scores(labels, labels, 3, (1, 1, 1))
    assert perfect[0][0] == 1 and perfect[1][0] == 0
    assert np.isnan(perfect[0][1]) and np.isnan(perfect[1][1])  # absent from both
    missed = volume_scores(labels * 0, labels, 3, (1, 2, 3))
    assert missed[0][0] == 0
    assert missed[1][0] == pytest.approx(np.hypot.reduce([6, 16, 30]))
    wrong = volume_scores(labels + (labels == 0) * 2, labels, 3, (1, 1, 1))
    assert np.isnan(wrong[0][1])  # predicted where there is none: not counted


def test_evaluation_is_of_whole_volumes(folder):
    task = create_task(KIND, "msd", folder, image_size=4)
    net, source = model(classes=3), task.dataset("valid").source
    values, labels, spacing = source.volume(0)
    with torch.no_grad():
        logits = sliding_window(net, values[None], (4, 4, 4))
    dice, total = dice_cross_entropy(logits, labels[None].long())
    found = task.evaluate(net)
    assert found["loss"] == pytest.approx(float(dice + total / labels.numel()))
    each, far = volume_scores(logits[0].argmax(0), labels, 3, spacing)
    assert found["dice_spleen"] == each[0] == pytest.approx(found["dice"])
    assert np.isnan(found["dice_tumour"]) and found["hd95"] == pytest.approx(far[0])
    assert [*found] == ["loss", "dice", "hd95", "dice_spleen", "dice_tumour"]


def test_shares_of_evaluation_are_the_whole(folder):
    listed = json.loads((folder / "dataset.json").read_text())
    listed["validation"] = listed["training"][-3:]
    (folder / "dataset.json").write_text(json.dumps(listed))
    task, net, parts = create_task(KIND, "msd", folder, image_size=4), model(1, 3), []
    whole = task.evaluate(net)
    for rank in (0, 1):
        task.evaluate(net, "valid", rank, 2, lambda mine: parts.extend(mine) or mine)
    assert task.evaluate(net, "valid", 0, 2, lambda _: parts) == whole
    assert net.training


def test_it_learns(folder):
    """Bright cubes are found by their brightness."""
    classes = {"0": "background", "1": "spleen", "2": "tumour"}
    msd(folder, labels=classes)
    for path in folder.glob("labelsTr/*"):
        labels = np.asarray(nibabel.load(path).dataobj)
        save(path, labels.clip(max=1))
    task = create_task(KIND, "msd", folder, image_size=8)
    recipe = Recipe(max_steps=120, batch_size=4, learning_rate=5e-2)
    history = train(model(classes=3), task, recipe, progress=False)
    assert history[-1]["valid_dice_spleen"] > 0.8


def test_what_a_model_is_built_with(folder):
    config = an.model_info("unetr_tiny").config
    wanted = {"in_channels": 1, "out_channels": 4, "img_size": (16, 16, 16)}
    assert mni().overrides(config) == wanted == mni().overrides()
    task = create_task(KIND, "msd", folder)
    assert task.overrides(config)["img_size"] == config.img_size == task.sides
    assert task.overrides(config)["out_channels"] == 3

    class Config:
        in_channels = 5

    assert mni().overrides(Config()) == {"in_channels": 1}


def test_saved_and_loaded(folder, tmp_path):
    given = VolumePreprocessing(window=(0.0, 100.0), spacing=(1.0, 1.0, 1.0))
    task = create_task(KIND, "msd", folder, seed=3, limit=2, preprocessing=given)
    task.size = (8, 8, 4)
    task.save(tmp_path)
    assert "data_dir" not in (tmp_path / "task.json").read_text()
    loaded = load_task(tmp_path, folder)
    assert (loaded.classes, loaded.preprocessing) == (task.classes, given)
    assert loaded.sides == (8, 8, 4) and len(loaded.dataset("train")) == 2
    assert describe_task(loaded) == describe_task(task)
    stored = json.loads((tmp_path / "task.json").read_text())
    for change in (
        {"classes": ["one"]},
        {"data": {"name": "lungs"}},
        {"preprocessing": {"spacing": 3}},
        {"size": [8, 8]},
    ):
        (tmp_path / "task.json").write_text(json.dumps(stored | change))
        with pytest.raises(CheckpointError, match="task.json"):
            load_task(tmp_path)
    with pytest.raises(InputError, match="expected volumes of 3 classes; got 14"):
        load = VolumeSegmentation(task.classes, given, {**task.data})
        load.data["data_dir"] = str(btcv(tmp_path / "other"))
        load.dataset("train")


# what is predicted


def test_an_answer_lies_on_the_grid_of_its_file(tmp_path):
    """Whatever spacing and orientation the file has."""
    given = VolumePreprocessing(window=(0.0, 1.0), spacing=(2.0, 2.0, 2.0))
    task = VolumeSegmentation(["dark", "bright"], given, size=(4, 4, 4))
    net = nn.Conv3d(1, 2, 1)
    net.weight.data = torch.tensor([-1.0, 1]).view(2, 1, 1, 1, 1)
    net.bias.data = torch.tensor([0.5, -0.5])
    values = np.zeros((12, 8, 10), np.float32)
    values[:6] = 1
    affine = np.diag([-1.0, -1, 2, 1])
    path = save(tmp_path / "in.nii.gz", values, affine)
    with pytest.warns(UserWarning, match="re-oriented from LPS"):
        (answer,) = task.predict(net, [path])
    assert answer.labels.dtype == torch.uint8
    assert repr(answer) == "Segmentation(12 x 8 x 10: dark 50.0%, bright 50.0%)"
    task.write_answers([answer], tmp_path / "out.nii.gz")
    found = nibabel.load(tmp_path / "out.nii.gz")
    assert np.array_equal(found.dataobj, values) and found.get_data_dtype() == np.uint8
    assert np.array_equal(found.affine, affine)
    with pytest.warns(UserWarning, match="re-oriented"):
        values = read_volume(path).values
    same = task.predict(net, [values])[0]  # of 1 mm, unlike the file
    assert same.labels.shape == (12, 8, 10)


def test_several_volumes_and_several_channels():
    given = VolumePreprocessing(channels=2)
    task = VolumeSegmentation(["a", "b", "c"], given, size=(8, 8, 8))
    volumes = [torch.rand(2, 9, 10, 11), torch.rand(2, 4, 5, 6)]
    found = task.predict(model(2, 3), volumes)
    assert [tuple(x.labels.shape) for x in found] == [(9, 10, 11), (4, 5, 6)]
    assert torch.equal(
        task.predict(model(2, 3), volumes[1:])[0].labels, found[1].labels
    )
    assert task.predict(model(2, 3), []) == []


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "given, said",
    [
        (3, "inputs[1]: expected a file, a volume"),
        (torch.zeros(4, 4, 4), "inputs[1]: expected a file, a volume"),
        (torch.zeros(1, 4, 4, 4, dtype=torch.int64), "inputs[1]: expected a file"),
        (torch.full((1, 4, 4, 4), float("nan")), "inputs[1]: expected finite numbers"),
        (torch.zeros(1, 4, 0, 4), "inputs[1]: expected a file, a volume"),
        (torch.zeros(3, 4, 4, 4), "inputs[1]: volume: expected 1 channels; got 3"),
        ("absent.nii", "absent.nii: expected a volume; got no file"),
    ],
)
def test_what_can_not_be_predicted(given, said):
    task = VolumeSegmentation(["a", "b"], VolumePreprocessing(), size=(4, 4, 4))
    with pytest.raises(InputError) as error:
        task.predict(model(1, 2), [torch.zeros(1, 4, 4, 4), given])
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


@pytest.mark.no_shapes
def test_bad_input(folder):
    task = mni()
    with pytest.raises(ConfigError, match="model: expected logits of 4 classes; got 3"):
        task.evaluate(model(1, 3))
    with pytest.raises(ConfigError, match="out_channels: expected 4.*got 14"):
        task.evaluate(an.create_model("unetr_tiny", out_channels=14, **SMALL))
    with pytest.raises(InputError, match="a list of volumes"):
        task.predict(model(), "a.nii")
    with pytest.raises(InputError, match="one volume for one file; got 2"):
        task.check_output(Path("out.nii"), 2)
    with pytest.raises(InputError, match="in .nii or .nii.gz; got out.png"):
        task.check_output(Path("out.png"), 1)
    with pytest.raises(ConfigError, match="data_dir"):
        create_task(KIND, "mni", folder)
    with pytest.raises(InputError, match="data_dir: expected a folder"):
        create_task(KIND, "msd")
    with pytest.raises(ConfigError, match="image_size"):
        mni(image_size=0)
    with pytest.raises(ConfigError, match="split"):
        task.dataset("test")
    volume = as_volume(torch.zeros(1, 2, 2, 2))
    assert isinstance(volume, Volume) and as_volume(volume) is volume


@pytest.mark.no_shapes
def test_a_volume_with_nan_is_met_before_training(folder):
    path = folder / "imagesTr" / "case_4.nii.gz"  # held out
    values = np.full((12, 14, 10), np.nan, np.float32)
    save(path, values)
    task = create_task(KIND, "msd", folder, image_size=4)
    with pytest.raises(InputError, match="case_4.nii.gz: expected finite numbers"):
        train(model(1, 3), task, Recipe(max_steps=1), progress=False)


def test_the_organs_of_the_published_weights():
    info = an.model_info("unetr_base")
    task = VolumeSegmentation.of_model(info, None)
    assert task.classes == [*ORGANS] and task.sides == (96, 96, 96)
    assert task.preprocessing.window == (-175, 250)
    with pytest.raises(CheckpointError, match="unetr_tiny: expected a folder with"):
        VolumeSegmentation.of_model(an.model_info("unetr_tiny"), None)


# the paper's recipe, whole


@pytest.mark.slow
def test_the_papers_recipe_under_torchrun(tmp_path):
    """Two steps of two processes on a small folder; and what it has saved."""
    data = btcv(tmp_path / "data")
    torch.manual_seed(0)
    start = an.create_model("unetr_base", **SMALL)
    start.save_pretrained(tmp_path / "start")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--standalone", "-m", "attn_notes.cli", "train", "unetr_base"),
        *("--recipe", "paper", "--max-steps", "2", "--image-size", "8"),
        *("--pretrained", str(tmp_path / "start"), "--data", "btcv"),
        *("--data-dir", str(data), "--output", str(tmp_path / "run")),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=400, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [1, 2] and "valid_hd95" in rows[-1]
    task = load_task(tmp_path / "run", data)
    trained = an.create_model("unetr_base", tmp_path / "run")
    assert trained.config.out_channels == len(task.classes)
    found = task.evaluate(trained)
    assert found["dice"] == pytest.approx(rows[-1]["valid_dice"], abs=1e-5)
