"""The class of every pixel at the command line: a line each, or an image."""

import json

import pytest
import torch
from PIL import Image

from attn_notes.data.scenes import scenes
from attn_notes.data.tasks import create_task
from attn_notes.zoo.factory import create_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small UperNet with its task, and two scenes."""
    folder = tmp_path_factory.mktemp("upernet")
    torch.manual_seed(0)
    create_model("upernet_swin_book", embed_dim=8, num_classes=11).save_pretrained(
        folder
    )
    create_task("semantic_segmentation", "scenes", limit=1).save(folder)
    for i, image in enumerate(scenes("valid", 2).images):
        path = folder / "scenes" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return folder


def test_classes_of_images(folder, ask, run, tmp_path):
    argv = "predict", "upernet_swin_book", "--pretrained", folder, folder / "scenes"
    first, second = map(json.loads, ask(*argv))
    assert first["image"].endswith("0.png") and second["image"].endswith("1.png")
    assert sum(first["classes"].values()) == pytest.approx(1, abs=1e-3)
    out = tmp_path / "masks.png"
    assert run(*argv, "--output", out) == 0
    drawn = Image.open(out)
    assert drawn.width == 256 and drawn.height > 512  # names below each


@pytest.mark.no_shapes
def test_what_is_refused(folder, refused, tmp_path):
    argv = "predict", "upernet_swin_book", "--pretrained", folder
    assert "the name of an image" in refused(
        *argv, folder / "scenes", "--output", tmp_path / "masks.txt"
    )
    assert "expected an image; got no file" in refused(*argv, folder / "none.png")
    assert "--threshold: expected an option of semantic_segmentation" in refused(
        *argv, folder / "scenes", "--threshold", "0.5"
    )


def test_training_writes_what_predict_reads(run, capsys, tmp_path):
    argv = "train", "upernet_swin_book", "--data", "scenes", "--max-steps", "1"
    task = "--task", "semantic_segmentation"
    assert run(*argv, *task, "--output", tmp_path / "run") == 0
    capsys.readouterr()
    Image.fromarray(scenes("valid", 1).images[0].permute(1, 2, 0).numpy()).save(
        tmp_path / "scene.png"
    )
    said = "predict", "upernet_swin_book", "--pretrained", tmp_path / "run"
    assert run(*said, tmp_path / "scene.png", "--output", tmp_path / "out.png") == 0
    assert Image.open(tmp_path / "out.png").width == 256
