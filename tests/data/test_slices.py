"""Slices: of the brain, of folders as in TransUNet's repository, what is refused in
these; Dice; losses that a model brings."""

import numpy as np
import pytest
import torch
from torch import nn

from attn_notes.data.brain import TISSUES, hard_brain
from attn_notes.data.semantic_batches import SKIPPED, class_dices, segmentation_scores
from attn_notes.data.semantic_slices import DATA, ORGANS, mask_data, turn_pair
from attn_notes.data.tasks import create_task, kind_of_data, load_task
from attn_notes.foundations.checks import ConfigError, InputError, Output
from attn_notes.training.loop import train
from attn_notes.training.recipes import Recipe
from attn_notes.training.tasks import check_held_out

KIND = "semantic_segmentation"


# ---- the brain


def test_slices_of_the_brain(tmp_path):
    task = create_task(KIND, "slices", limit=3, seed=5)
    assert task.classes == [*TISSUES] and kind_of_data("slices") == KIND
    assert len(task.dataset("train")) == 3 and len(task.dataset("valid")) == 200
    image, mask, training = task.dataset("train")[1]
    values, labels = hard_brain("train", (5, 1), (64, 64, 1))
    assert training and torch.equal(image[0], image[2])
    assert torch.equal(mask.flip(0).T.long(), labels[..., 0])
    grey = (170 * values[0, ..., 0]).clamp(0, 255)
    assert (image[0].flip(0).T - grey).abs().max() <= 0.5
    check_held_out(task)
    task.save(tmp_path)
    again = load_task(tmp_path)
    assert again.data == task.data and again.classes == task.classes
    other = create_task(KIND, "slices", limit=1, seed=6).dataset("train")[0][0]
    assert not torch.equal(other, task.dataset("train")[0][0])
    wide = create_task(KIND, "slices", limit=1, image_size=96).dataset("valid")
    assert wide[0][0].shape == (3, 96, 96) == (3, *wide[0][1].shape)


@pytest.mark.no_shapes
def test_bad_options():
    assert DATA == ("scenes", "slices", "ade20k", "synapse")
    for name, option in (("slices", {"data_dir": "x"}), ("coco", {})):
        with pytest.raises(ConfigError):
            create_task(KIND, name, **option)
    for option in ({"size": 0}, {"limit": 0}, {"seed": -1}):
        with pytest.raises(ConfigError):
            mask_data("slices", **option)


# ---- folders


@pytest.fixture
def synapse(tmp_path):
    """Four training slices and two volumes of two and three slices."""
    h5py = pytest.importorskip("h5py")
    random = np.random.default_rng(0)
    for folder in ("train_npz", "test_vol_h5", "lists/lists_Synapse"):
        (tmp_path / folder).mkdir(parents=True)
    names = [f"case0005_slice{i:03d}" for i in range(4)]
    for name in names:
        image = random.random((20, 20), np.float32)
        label = random.integers(0, 9, (20, 20)).astype(np.float32)
        np.savez(tmp_path / "train_npz" / name, image=image, label=label)
    for case, depth in (("case0001", 2), ("case0002", 3)):
        with h5py.File(tmp_path / "test_vol_h5" / f"{case}.npy.h5", "w") as file:
            file["image"] = random.random((depth, 20, 20)).astype(np.float32)
            file["label"] = random.integers(0, 9, (depth, 20, 20)).astype(np.float32)
    lists = tmp_path / "lists" / "lists_Synapse"
    (lists / "train.txt").write_text("\n".join(names) + "\n")
    (lists / "test_vol.txt").write_text("case0001\ncase0002\n")
    return tmp_path


def test_a_folder(synapse, tmp_path_factory):
    import h5py

    task = create_task(KIND, "synapse", synapse, image_size=16)
    assert task.classes == [*ORGANS] and len(task.classes) == 9
    assert len(task.dataset("train")) == 4 and len(task.dataset("valid")) == 5
    image, mask, training = task.dataset("train")[2]
    with np.load(synapse / "train_npz" / "case0005_slice002.npz") as file:
        assert np.abs(image[1].numpy() - 255 * file["image"]).max() <= 0.5001
        assert (mask.numpy() == file["label"]).all() and training
    held = task.dataset("valid")[3]
    with h5py.File(synapse / "test_vol_h5" / "case0002.npy.h5") as file:
        assert np.abs(held[0][0].numpy() - 255 * file["image"][1]).max() <= 0.5001
        assert (held[1].numpy() == file["label"][1]).all() and not held[2]
    batch = task.collate([task.dataset("train")[i] for i in range(3)])
    assert batch["images"].shape == (3, 3, 16, 16) == (3, 3, *batch["labels"].shape[1:])
    (one, *_) = task.split_batches("valid")
    assert one["images"].shape == (1, 3, 16, 16) and one["labels"].shape == (1, 20, 20)
    assert len(create_task(KIND, "synapse", synapse, limit=2).dataset("train")) == 2
    saved = tmp_path_factory.mktemp("task")
    task.save(saved)
    assert (
        load_task(saved, synapse)
        .dataset("valid")[0][0]
        .equal(task.dataset("valid")[0][0])
    )


def test_turned_together():
    torch.manual_seed(0)
    mask = torch.arange(36, dtype=torch.uint8).view(6, 6)
    image, kinds = mask.expand(3, 6, 6), set()
    for _ in range(60):
        found, turned = turn_pair(image, mask)
        assert torch.equal(found[0], turned) and found.shape == image.shape
        same, whole = torch.equal(turned, mask), len(turned.unique()) == 36
        kinds.add("same" if same else "quarters" if whole else "tilted")
    assert kinds == {"same", "quarters", "tilted"}


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "label, image, said",
    [
        (np.full((20, 20), 9.0), None, "labels from 0 to 8"),
        (np.full((20, 20), 0.5), None, "whole numbers"),
        (np.full((20, 20), 255), None, "empty mask"),
        (np.zeros((20, 10)), None, "20 x 20"),
        (None, np.zeros((2, 20, 20)), "h w"),
        (None, np.full((20, 20), np.nan), "finite"),
        (None, np.array([["a"]]), "finite"),
    ],
)
def test_bad_slices(synapse, label, image, said):
    path = synapse / "train_npz" / "case0005_slice001.npz"
    with np.load(path) as file:
        good = {name: file[name] for name in file}
    image = good["image"] if image is None else image
    label = good["label"] if label is None else label
    np.savez(path, image=image, label=label)
    rows = create_task(KIND, "synapse", synapse).dataset("train")
    with pytest.raises(InputError, match="slice001.*" + said):
        rows[1]


@pytest.mark.no_shapes
def test_bad_folders(synapse):
    with pytest.raises(InputError, match="data_dir"):
        create_task(KIND, "synapse")
    (synapse / "train_npz" / "case0005_slice000.npz").write_bytes(b"nothing")
    with pytest.raises(InputError, match="slice000"):
        create_task(KIND, "synapse", synapse).dataset("train")[0]
    (synapse / "test_vol_h5" / "case0001.npy.h5").write_bytes(b"nothing")
    with pytest.raises(InputError, match="case0001"):
        create_task(KIND, "synapse", synapse).dataset("valid")
    (synapse / "train_npz" / "case0005_slice003.npz").unlink()
    with pytest.raises(InputError, match="slice003"):
        create_task(KIND, "synapse", synapse)
    lists = synapse / "lists" / "lists_Synapse" / "train.txt"
    lists.write_text("\n")
    with pytest.raises(InputError, match="names of files"):
        create_task(KIND, "synapse", synapse)
    lists.unlink()
    with pytest.raises(InputError, match="list of names"):
        create_task(KIND, "synapse", synapse)


# ---- Dice


def test_dice_is_torchmetrics():
    classes = pytest.importorskip("torchmetrics.classification")
    random = torch.Generator().manual_seed(0)
    truth = torch.randint(4, (500,), generator=random)
    said = torch.randint(4, (500,), generator=random)
    table = (4 * truth + said).bincount(minlength=16).view(4, 4)
    f1 = classes.MulticlassF1Score(4, average="none")(said, truth)
    assert torch.allclose(class_dices(table), f1.double(), atol=1e-6)
    found = segmentation_scores(table, TISSUES)["mean_dice"]
    assert found == pytest.approx(float(f1[1:].mean()), abs=1e-6)
    named = segmentation_scores(table, ("a", "b", "c", "background"))["mean_dice"]
    assert named == pytest.approx(float(f1[:3].mean()), abs=1e-6)
    assert "mean_dice" not in segmentation_scores(table)
    table[3] = table[:, 3] = 0  # absent: no part of the mean
    found = segmentation_scores(table, TISSUES)["mean_dice"]
    assert found == pytest.approx(float(class_dices(table)[1:3].mean()))


# ---- a loss of the model's own


class Found(Output):
    logits: torch.Tensor


class Own(nn.Module):
    """One channel; two terms summed over images."""

    def __init__(self, weights):
        super().__init__()
        self.conv, self.loss_weights = nn.Conv2d(3, 1, 1), weights

    def forward(self, images):
        logits = self.conv(images)
        return Found(logits) if self.training else logits

    def losses(self, output, labels):
        each = (output.logits[:, 0] - labels.clamp(min=0)).abs() * (labels != SKIPPED)
        return {"near": each.mean((1, 2)).sum(), "far": (each**2).mean((1, 2)).sum()}


def test_a_loss_of_the_models_own():
    torch.manual_seed(0)
    task = create_task(KIND, "scenes", limit=8, digits=False, image_size=32)
    model = Own({"near": 0.75, "far": 0.25})
    history = train(model, task, Recipe(max_steps=2, batch_size=4, learning_rate=1e-12))
    row = history[0]
    assert {"near", "far"} <= {*row} and "cross_entropy" not in row
    assert row["loss"] == pytest.approx(0.75 * row["near"] + 0.25 * row["far"])
    model.train()
    batch = task.collate([task.dataset("train")[int(i)] for i in task.batches(0)[0]])
    assert task.counts(batch) == {"near": 4, "far": 4}
    terms = task.loss(model, batch)
    assert terms["near"][0].item() / 4 == pytest.approx(row["near"])
    scores, table = task.evaluate(model), task.table(model)[0]
    assert scores["mean_dice"] == pytest.approx(float(class_dices(table)[1]))
    logits, _ = task.outputs(model.eval(), batch["images"])
    assert logits.shape == (4, 2, 32, 32) and (logits[:, 0] == 0).all()
    plain = nn.Conv2d(3, 2, 1)  # the next model brings none
    assert set(task.loss(plain, batch)) == set(task.counts(batch))


@pytest.mark.no_shapes
def test_losses_without_their_weights():
    task = create_task(KIND, "scenes", limit=4, digits=False, image_size=32)
    batch = task.collate([task.dataset("train")[0]])
    for weights, said in (({}, "loss_weights"), ({"near": 1.0}, "terms")):
        with pytest.raises(ConfigError, match=said):
            task.loss(Own(weights), batch)
    with pytest.raises(ConfigError, match="loss_weights"):
        train(Own({"near": "much"}), task, Recipe(max_steps=1))
    with pytest.raises(ConfigError, match="11 classes"):
        create_task(KIND, limit=1).outputs(nn.Conv2d(3, 1, 1), torch.zeros(1, 3, 4, 4))
