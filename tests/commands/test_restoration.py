"""Images restored at the command line: one in, one out."""

import numpy as np
import pytest
import torch
from PIL import Image

from attn_notes.data.degraded_images import photographs
from attn_notes.data.restoration import Restoration
from attn_notes.zoo.factory import create_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small IPT with its task, and an image."""
    folder = tmp_path_factory.mktemp("ipt")
    torch.manual_seed(0)
    sizes = {"img_size": 12, "num_features": 4, "tasks": ("derain", "sr_x2")}
    create_model("ipt_book", **sizes).save_pretrained(folder)
    Restoration(("derain", "sr_x2"), 12).save(folder)
    pixels = photographs("valid")[0][:, :20, :31].permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(folder / "in.png")
    return folder


def test_an_image_is_restored(folder, run, capsys, tmp_path):
    argv = "predict", "ipt_book", "--pretrained", folder, folder / "in.png"
    out = tmp_path / "out.png"
    assert run(*argv, "--output", out) == 0
    assert Image.open(out).size == Image.open(folder / "in.png").size == (31, 20)
    assert run(*argv, "--output", out, "--task", "sr_x2") == 0
    assert capsys.readouterr().out == "" and Image.open(out).size == (62, 40)
    inner = np.asarray(Image.open(out))[::2, ::2].astype(int)
    assert np.abs(inner - np.asarray(Image.open(folder / "in.png"))).max() <= 1


@pytest.mark.no_shapes
def test_what_is_refused(folder, refused, tmp_path):
    argv = "predict", "ipt_book", "--pretrained", folder, folder / "in.png"
    out = "--output", tmp_path / "out.png"
    assert "task: expected one of derain, sr_x2; got 'sr_x3'" in refused(
        *argv, *out, "--task", "sr_x3"
    )
    assert "--output: expected a file for what the task makes" in refused(*argv)
    assert "expected one image for one file; got 2" in refused(
        *argv, folder / "in.png", *out
    )
    assert "the name of an image" in refused(*argv, "--output", tmp_path / "out.txt")
    assert not (tmp_path / "out.png").exists()


def test_other_tasks_have_no_such_option(refused):
    assert "--task: expected an option of image_classification" in refused(
        "predict", "vit_book", "x.png", "--task", "sr_x2"
    )
