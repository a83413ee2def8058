"""NIfTI files in and out, and volumes as a model reads them."""

import gzip
import itertools
import warnings

import nibabel
import numpy as np
import pytest
import torch
from volume_toys import MM, save

from attn_notes.data.volumes import (
    Volume,
    VolumePreprocessing,
    cut,
    random_crop,
    random_variation,
    read_labels,
    read_volume,
    resize_labels,
    start_around,
    write_volume,
)
from attn_notes.foundations.checks import ConfigError, InputError

VALUES = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
AXES = [
    "".join(one)
    for order in itertools.permutations(("RL", "AP", "SI"))
    for one in itertools.product(*order)
]


def affine_of(axes):
    """Voxels of 1 x 2 x 3 mm to the right, the front and the top, stored so."""
    found = np.zeros((4, 4))
    for column, letter in enumerate(axes):
        row = next(i for i, ends in enumerate(("RL", "AP", "SI")) if letter in ends)
        found[row, column] = (1 if letter in "RAS" else -1) * (row + 1)
    found[:, 3] = [5, -7, 9, 1]
    return found


@pytest.mark.parametrize("axes", AXES)
def test_every_orientation_is_read_and_given_back(tmp_path, axes):
    path = save(tmp_path / "a.nii.gz", VALUES, affine_of(axes))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        volume = read_volume(path)
    assert [str(w.message) for w in said] == (
        [] if axes == "RAS" else [f"{path}: re-oriented from {axes} to RAS"]
    )
    theirs = nibabel.as_closest_canonical(nibabel.load(path))
    assert np.array_equal(volume.values[0], theirs.get_fdata())
    assert np.allclose(volume.affine, theirs.affine)
    assert volume.spacing == pytest.approx((1, 2, 3)) and volume.axes == axes
    for voxel in itertools.product(*map(range, volume.shape)):
        place = np.linalg.inv(affine_of(axes)) @ volume.affine @ [*voxel, 1]
        stored = VALUES[tuple(np.round(place[:3]).astype(int))]
        assert volume.values[(0, *voxel)] == stored
    write_volume(tmp_path / "b.nii.gz", volume.values[0].short(), volume)
    again = nibabel.load(tmp_path / "b.nii.gz")
    assert np.array_equal(again.dataobj, VALUES)
    assert np.array_equal(again.affine, affine_of(axes))
    assert again.header.get_zooms() == nibabel.load(path).header.get_zooms()


def test_an_oblique_affine_is_kept(tmp_path):
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
    path = save(tmp_path / "a.nii", VALUES, turn @ affine_of("LPS"))
    with pytest.warns(UserWarning, match="from LPS to RAS"):
        volume = read_volume(path)
    assert volume.spacing == pytest.approx((1, 2, 3))
    write_volume(tmp_path / "b.nii", volume.values[0], volume)
    files = [nibabel.load(tmp_path / name) for name in ("a.nii", "b.nii")]
    assert np.allclose(files[0].affine, files[1].affine, atol=1e-6)
    assert np.array_equal(files[1].dataobj, VALUES)


def test_channels_lie_last_in_a_file(tmp_path):
    values = np.random.default_rng(0).normal(size=(3, 4, 5, 2)).astype(np.float32)
    volume = read_volume(save(tmp_path / "a.nii.gz", values, np.eye(4)))
    assert np.array_equal(volume.values, np.moveaxis(values, -1, 0))
    assert volume.shape == (3, 4, 5) and "2 channels, 3 x 4 x 5" in repr(volume)


def test_only_gz_is_compressed(tmp_path):
    volume = Volume(torch.zeros(1, 2, 2, 2), np.eye(4))
    for name in ("a.nii", "b.nii.gz"):
        write_volume(tmp_path / name, volume.values[0].byte(), volume)
    plain = gzip.decompress((tmp_path / "b.nii.gz").read_bytes())
    assert plain == (tmp_path / "a.nii").read_bytes()


# bad input


def damaged(folder, case):
    """A file that is no volume."""
    path = folder / "a.nii.gz"
    if case == "absent":
        return path
    if case == "folder":
        path.mkdir()
    elif case == "text":
        path.write_text("a brain")
    elif case == "cut":
        save(path, np.random.default_rng(0).normal(size=(9, 9, 9)), np.eye(4))
        path.write_bytes(path.read_bytes()[:3000])
    elif case == "flat":
        save(path, VALUES[0], np.eye(4))
    elif case == "complex":
        save(path, VALUES.astype(np.complex64), np.eye(4))
    elif case == "affine":
        image = nibabel.Nifti1Image(VALUES, np.eye(4))
        image.header.set_sform(np.zeros((4, 4)), 2)
        image._affine = None
        raw = bytearray(image.to_bytes())
        raw[280:328] = bytes(48)  # the rows of the affine
        path.write_bytes(gzip.compress(bytes(raw)))
    else:
        values = VALUES.astype(np.float32)
        values[0, 1, 2] = float(case)
        save(path, values, np.eye(4))
    return path


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "case, said",
    [
        ("absent", "expected a volume; got no file"),
        ("folder", "expected a volume; could not read it"),
        ("text", "expected a volume; could not read it"),
        ("cut", "expected a volume; could not read it"),
        ("flat", "three dimensions, or four with channels; got int16 of shape"),
        ("complex", "three dimensions, or four with channels; got complex64"),
        ("affine", "expected an affine that can be inverted"),
        ("nan", "expected finite numbers; got nan or infinity in 1 voxels"),
        ("inf", "expected finite numbers; got nan or infinity in 1 voxels"),
    ],
)
def test_what_is_no_volume(tmp_path, case, said):
    with pytest.raises(InputError) as error:
        read_volume(damaged(tmp_path, case))
    assert str(error.value).startswith(f"{tmp_path / 'a.nii.gz'}: ")
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "change, said",
    [
        (lambda x: x[:, :, :3], "of shape (2, 3, 4), as the image has"),
        (lambda x: x * 0 + 7, "labels from 0 to 4; got 7"),
        (lambda x: x * 0 - 1, "labels from 0 to 4; got -1"),
        (lambda x: x * 0 + 0.5, "labels from 0 to 4; got 0.5"),
        (lambda x: x * np.float32("nan"), "labels from 0 to 4; got nan"),
    ],
)
def test_what_are_no_labels(tmp_path, change, said):
    values = change((VALUES % 5).astype(np.float32))
    path = save(tmp_path / "a.nii", values.astype(np.float32))
    with pytest.raises(InputError) as error:
        read_labels(path, 5, (2, 3, 4))
    assert said in str(error.value) and str(path) in str(error.value)


def test_labels_lie_as_their_image_does(tmp_path):
    labels = (VALUES % 5).astype(np.float64)[..., None]
    path = save(tmp_path / "a.nii", labels, affine_of("LPS"))
    found = read_labels(path, 5, (2, 3, 4))
    assert np.array_equal(found, (VALUES % 5)[::-1, ::-1])


@pytest.mark.no_shapes
def test_bad_input(tmp_path):
    volume = Volume(torch.zeros(1, 2, 3, 4), np.eye(4))
    with pytest.raises(InputError, match=r"values: expected shape \(2, 3, 4\)"):
        write_volume(tmp_path / "a.nii", torch.zeros(2, 3, 5), volume)
    with pytest.raises(InputError, match="volume: expected 2 channels; got 1"):
        VolumePreprocessing(channels=2).prepare(volume)
    for wrong in ({"window": (1.0, 1.0)}, {"spacing": (1, 0, 1)}, {"channels": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            VolumePreprocessing(**wrong)


# as a model reads it


def test_a_window_and_numbers_by_themselves():
    values = torch.tensor([-500.0, -175, 37.5, 250, 900]).view(1, 1, 1, 5)
    volume = Volume(values, np.eye(4))
    windowed = VolumePreprocessing(window=(-175.0, 250.0)).prepare(volume)
    assert windowed.flatten().tolist() == [0, 0, 0.5, 1, 1]
    random = torch.rand(2, 10, 10, 10) * torch.tensor([3.0, 50]).view(2, 1, 1, 1) + 7
    random[:, :5] = 7.0
    found = VolumePreprocessing(channels=2).prepare(Volume(random, np.eye(4)))
    assert (found[:, :5] == 0).all()
    assert (found[:, 5:] > 1).float().mean() == pytest.approx(0.01, abs=0.002)
    flat = VolumePreprocessing().prepare(Volume(torch.ones(1, 2, 2, 2), np.eye(4)))
    assert (flat == 0).all()


def test_spacing_there_and_back():
    plane = torch.arange(24.0).view(1, 24, 1, 1).expand(1, 24, 16, 10)
    volume, wanted = Volume(plane.contiguous(), MM), (1.5, 1.5, 2.0)
    preprocessing = VolumePreprocessing(window=(0.0, 23.0), spacing=wanted)
    found = preprocessing.prepare(volume)
    assert found.shape == (1, 12, 8, 10) == (1, *preprocessing.shape(volume))
    line = found[0, :, 0, 0] * 23
    torch.testing.assert_close(line, torch.arange(12.0) * 2 + 0.5)
    labels = (plane[0] >= 12).byte()
    small = preprocessing.prepare_labels(labels, volume)
    assert small.shape == (12, 8, 10) and small.float().mean() == 0.5
    assert torch.equal(resize_labels(small, labels.shape), labels)


@pytest.mark.parametrize("side", [3, 8, 11])
def test_a_crop_is_what_padding_and_slicing_give(side):
    values = torch.arange(6 * 7 * 8.0).view(1, 6, 7, 8) + 1
    padded = torch.nn.functional.pad(values, (20,) * 6)
    for start in [(0, 0, 0), (-2, 3, 5), (5, -7, 1), (-9, -9, -9), (30, 0, 0)]:
        x, y, z = (20 + a for a in start)
        whole = padded[:, x : x + side, y : y + side, z : z + side]
        found = cut(values, start, (side,) * 3)
        expected = torch.zeros(1, side, side, side)
        expected[:, : whole.shape[1], : whole.shape[2], : whole.shape[3]] = whole
        assert torch.equal(found, expected)


def test_crops_lie_in_the_volume():
    assert start_around((0, 5, 9), (4, 4, 4), (10, 10, 10)) == (0, 3, 6)
    assert start_around((0, 2, 9), (4, 5, 12), (10, 4, 10)) == (0, -1, -1)


def test_half_of_the_crops_are_of_what_is_labelled():
    values = torch.ones(1, 20, 20, 20)
    values[:, :4] = 0  # outside the body
    labels = torch.zeros(20, 20, 20, dtype=torch.uint8)
    labels[16:18, 16:18, 16:18] = 2
    middles, torch_seed = [], torch.manual_seed(0)
    del torch_seed
    for _ in range(300):
        image, known = random_crop(values, labels, (1, 1, 1))
        assert image == 1
        middles.append(int(known))
    assert 0.4 < sum(x == 2 for x in middles) / 300 < 0.6
    empty = random_crop(values * 0, labels * 0, (4, 4, 4))
    assert empty[0].shape == (1, 4, 4, 4) and not empty[1].any()


def test_variation_moves_labels_with_their_voxels():
    labels = torch.arange(4 * 4 * 6).view(4, 4, 6)
    torch.manual_seed(0)
    shapes, moved = set(), 0
    for _ in range(60):
        values, found = random_variation(labels[None].float(), labels)
        line = torch.stack([values.flatten(), found.flatten().float()])
        assert torch.corrcoef(line)[0, 1] > 0.99999
        moved += not torch.equal(found, labels)
        shapes.add(tuple(found.shape))
    assert 30 < moved < 60 and shapes == {(4, 4, 6)}
    wide = torch.zeros(2, 3, 4)
    assert {tuple(random_variation(wide[None], wide)[1].shape) for _ in range(30)} == {
        (2, 3, 4)
    }
