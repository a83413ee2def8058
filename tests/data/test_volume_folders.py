"""Folders of volumes with labels: the Decathlon's and BTCV's."""

import json

import nibabel
import numpy as np
import pytest
import torch
from volume_toys import btcv, msd

from attn_notes.data.volume_folders import LISTS, ORGANS, FolderRows, volume_folder
from attn_notes.data.volumes import VolumePreprocessing
from attn_notes.foundations.checks import InputError


def names(cases):
    return [image.rsplit("/", 1)[1] for image, _ in cases]


def test_the_decathlon(tmp_path):
    found = volume_folder(msd(tmp_path))
    assert found.classes == ("background", "spleen", "tumour")
    assert names(found.cases["train"]) == [f"case_{i}.nii.gz" for i in range(4)]
    assert names(found.cases["valid"]) == ["case_4.nii.gz"]
    for image, label in sum(found.cases.values(), []):
        assert label == image.replace("imagesTr", "labelsTr")
    assert found.preprocessing.window == (-175, 250)
    assert found.preprocessing.spacing == (1.5, 1.5, 2)


def test_kinds_of_magnetic_resonance_are_channels(tmp_path):
    found = volume_folder(msd(tmp_path, channels=4))
    assert found.preprocessing == VolumePreprocessing(channels=4)
    rows = FolderRows(found.cases["train"], found.preprocessing, 3)
    assert rows.volume(0)[0].shape == (4, 12, 14, 10)


def test_btcv_with_its_list_and_without(tmp_path):
    listed = volume_folder(btcv(tmp_path, listed=True))
    assert names(listed.cases["train"]) == [f"img000{i}.nii.gz" for i in (1, 2, 3)]
    assert names(listed.cases["valid"]) == ["img0021.nii.gz", "img0035.nii.gz"]
    assert len(listed.classes) == len(ORGANS) and listed.classes[9] == "IVC"
    (tmp_path / LISTS[0]).unlink()
    (tmp_path / "imagesTr" / "._img0001.nii.gz").write_text("left by a copy")
    found = volume_folder(tmp_path)
    assert found.classes == ORGANS and found.preprocessing == listed.preprocessing
    assert names(found.cases["valid"]) == ["img0035.nii.gz"]
    for image, label in sum(found.cases.values(), []):
        number = image[-11:-7]
        assert label.endswith(f"labelsTr/label{number}.nii.gz")


def test_the_last_fifth_of_btcv_is_what_the_code_holds_out(tmp_path):
    numbers = (*range(1, 11), *range(21, 41))
    for i in numbers:
        for folder, name in (("imagesTr", "img"), ("labelsTr", "label")):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{name}{i:04}.nii.gz").touch()
    cases = volume_folder(tmp_path).cases
    assert names(cases["valid"]) == [f"img{i:04}.nii.gz" for i in range(35, 41)]
    assert len(cases["train"]) == 24


def test_a_volume_is_read_once_and_as_the_model_wants_it(tmp_path):
    found = volume_folder(msd(tmp_path))
    rows = FolderRows(found.cases["train"], found.preprocessing, 3)
    values, labels, spacing = rows.volume(1)
    assert (len(rows), rows.name(1), spacing) == (4, "case_1.nii.gz", (1.5, 1.5, 2))
    assert values.shape == (1, 6, 7, 10) and labels.shape == (6, 7, 10)
    assert values.min() >= 0 and values.max() <= 1
    assert labels.unique().tolist() == [0, 2]
    assert values[0][labels > 0].mean() > 0.2 + values[0][labels == 0].mean()
    (tmp_path / "imagesTr" / "case_1.nii.gz").unlink()
    torch.manual_seed(0)
    crops = [rows.crop(1, (1, 1, 1)) for _ in range(20)]
    assert 5 < sum(bool(known.any()) for _, known in crops) < 20


def test_labels_follow_an_image_of_another_orientation(tmp_path, recwarn):
    msd(tmp_path)
    for path in tmp_path.glob("*/case_0.nii.gz"):
        image = nibabel.load(path)
        values = np.asarray(image.dataobj)
        flip = np.diag([-1.0, 1, 1, 1])
        flip[0, 3] = len(values) - 1
        turned = nibabel.Nifti1Image(values[::-1], image.affine @ flip)
        nibabel.save(turned, path.with_name(f"case_3{path.suffixes[0]}.gz"))
    cases = volume_folder(tmp_path).cases["train"]
    rows = FolderRows(cases, VolumePreprocessing(window=(-60.0, 210.0)), 3)
    for mine, theirs in zip(rows.volume(0)[:2], rows.volume(3)[:2], strict=True):
        assert torch.equal(mine, theirs)
    assert not [w for w in recwarn if "oriented" in str(w.message)]


# bad input


def listed(root, **changes):
    stored = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps(stored | changes))


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "change, said",
    [
        (lambda root: (root / "dataset.json").write_text("{"), "could not read it"),
        (lambda root: (root / "dataset.json").write_text("[]"), "could not read it"),
        (lambda root: listed(root, training=["imagesTr/case_0.nii.gz"]), "could not"),
        (lambda root: listed(root, labels={"1": "liver"}), 'labels: expected {"0"'),
        (lambda root: listed(root, labels={"background": 0}), 'labels: expected {"0"'),
        (lambda root: listed(root, modality={}), "modality: expected"),
        (lambda root: listed(root, training=[]), "two volumes or more"),
        (lambda root: (root / "dataset.json").unlink(), "expected dataset_0.json or"),
        (
            lambda root: (root / "labelsTr" / "case_2.nii.gz").unlink(),
            "labelsTr/case_2.nii.gz: expected a volume; got no file",
        ),
    ],
)
def test_a_folder_of_another_form(tmp_path, change, said):
    change(msd(tmp_path))
    with pytest.raises(InputError) as error:
        volume_folder(tmp_path)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.no_shapes
def test_no_folder(tmp_path):
    with pytest.raises(InputError, match="data_dir: expected a folder"):
        volume_folder(None)
    with pytest.raises(InputError, match="expected dataset_0.json"):
        volume_folder(tmp_path / "absent")
    btcv(tmp_path)
    (tmp_path / "labelsTr" / "label0002.nii.gz").unlink()
    with pytest.raises(InputError, match="5 images and 4 labels"):
        volume_folder(tmp_path)


@pytest.mark.no_shapes
def test_a_volume_of_other_channels_or_classes(tmp_path):
    cases = volume_folder(msd(tmp_path)).cases["train"]
    with pytest.raises(InputError, match="case_0.nii.gz: volume: expected 4 channels"):
        FolderRows(cases, VolumePreprocessing(channels=4), 3).volume(0)
    with pytest.raises(InputError, match="labelsTr/case_1.nii.gz: expected labels"):
        FolderRows(cases, VolumePreprocessing(), 2).volume(1)
