"""Volumes at the command line: NIfTI in and out, on the same grid."""

import warnings

import nibabel
import numpy as np
import pytest
import torch

from attn_notes.data.volume_segmentation import VolumeSegmentation
from attn_notes.data.volumes import VolumePreprocessing
from attn_notes.zoo.factory import create_model

AFFINE = np.array([[0, -1.5, 0, 20], [2.0, 0, 0, -3], [0, 0, 0.75, 9], [0, 0, 0, 1]])
SMALL = dict(
    patch_size=4,
    img_size=(8, 8, 8),
    hidden_size=8,
    mlp_dim=8,
    num_heads=2,
    num_layers=2,
    skips=(1,),
    feature_size=2,
    out_channels=3,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small UNETR with its task, and a volume whose axes are A, L and S."""
    folder = tmp_path_factory.mktemp("unetr")
    torch.manual_seed(0)
    create_model("unetr_tiny", **SMALL).save_pretrained(folder)
    VolumeSegmentation(
        ["air", "water", "bone"], VolumePreprocessing(), size=(8, 8, 8)
    ).save(folder)
    values = np.random.default_rng(0).normal(size=(10, 9, 14)).astype(np.float32)
    image = nibabel.Nifti1Image(values, AFFINE)
    nibabel.save(image, folder / "in.nii.gz")
    values[1, 2, 3] = np.nan
    nibabel.save(nibabel.Nifti1Image(values, AFFINE), folder / "nan.nii.gz")
    return folder


def test_a_volume_is_segmented_on_its_grid(trained, run, capsys, tmp_path):
    argv = "predict", "unetr_tiny", "--pretrained", trained, trained / "in.nii.gz"
    assert run(*argv, "--output", tmp_path / "out.nii.gz") == 0
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert "warning: input 1: " in said.err and "from ALS to RAS" in said.err
    ours, theirs = (
        nibabel.load(x) for x in (tmp_path / "out.nii.gz", trained / "in.nii.gz")
    )
    assert ours.shape == theirs.shape and np.array_equal(ours.affine, AFFINE)
    assert ours.header.get_zooms() == theirs.header.get_zooms()
    found = np.asarray(ours.dataobj)
    assert found.dtype == np.uint8 and found.max() <= 2
    from attn_notes.data.tasks import load_task

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = create_model("unetr_tiny", trained)
        (answer,) = load_task(trained).predict(model, [trained / "in.nii.gz"])
    back = np.flip(answer.labels.numpy().transpose(1, 0, 2), 1)
    assert np.array_equal(found, back)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "names, said",
    [
        (["nan.nii.gz"], "nan.nii.gz: expected finite numbers; got nan or infinity"),
        (["absent.nii"], "absent.nii: expected a volume; got no file"),
        (["task.json"], "task.json: expected a volume; could not read it"),
    ],
)
def test_what_is_no_volume(trained, refused, tmp_path, names, said):
    argv = "predict", "unetr_tiny", "--pretrained", trained
    files = [trained / name for name in names]
    assert said in refused(*argv, *files, "--output", tmp_path / "out.nii.gz")
    assert not (tmp_path / "out.nii.gz").exists()


@pytest.mark.no_shapes
def test_an_answer_needs_a_file_of_its_own(trained, run, refused, tmp_path):
    argv = "predict", "unetr_tiny", "--pretrained", trained
    file = trained / "in.nii.gz"
    assert "--output: expected a file" in refused(*argv, file)
    out = "--output", tmp_path / "out.nii"
    assert "one volume for one file; got 2" in refused(*argv, file, file, *out)
    assert "got out.png" in refused(*argv, file, "--output", tmp_path / "out.png")
    assert run(*argv, file, *out) == 0
    assert nibabel.load(tmp_path / "out.nii").shape == (10, 9, 14)
