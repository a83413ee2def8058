"""COCO's files: read as pycocotools reads them, what is wrong said, and written."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from attn_notes.data.coco import (
    IDLE,
    CocoRows,
    class_names,
    coco_categories,
    has_split,
    write_coco,
)
from attn_notes.data.scenes import DIGITS, scenes
from attn_notes.foundations.checks import InputError

SQUARE = [[2, 1, 6, 1, 6, 4, 2, 4]]  # a polygon
CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}]


def thing(image_id=1, category_id=1, bbox=(2, 1, 4, 3), **more):
    return {"image_id": image_id, "category_id": category_id, "bbox": [*bbox], **more}


def write(root, annotations, images=2, listed=None, categories=CATEGORIES):
    """A COCO folder of grey images, 8 high and 10 wide."""
    (root / "annotations").mkdir(parents=True)
    (root / "val2017").mkdir()
    for i in range(1, images + 1):
        Image.new("RGB", (10, 8), (90, 90, 90)).save(root / "val2017" / f"{i}.png")
    names = [
        {"id": i, "file_name": f"{i}.png", "height": 8, "width": 10}
        for i in range(1, (listed or images) + 1)
    ]
    stored = {"images": names, "annotations": annotations, "categories": categories}
    path = root / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(stored))
    return path


def test_written_and_read_again(tmp_path):
    made = scenes("valid", 5)
    write_coco(tmp_path, "valid", [made[i] for i in range(5)], DIGITS)
    rows = CocoRows(tmp_path, "valid", masks=True)
    assert rows.classes == [*DIGITS] and len(rows) == 5
    for i in range(5):
        path, target, training = rows[i]
        image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        assert image.equal(made.images[i]) and not training
        for name in ("boxes", "labels", "masks", "area", "iscrowd"):
            assert target[name].equal(made.target(i)[name])
        assert target["size"] == (64, 64) and target["image_id"] == i
    assert has_split(tmp_path, "valid") and not has_split(tmp_path, "train")


def test_outlines_are_those_of_pycocotools(tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    runs = {"size": [8, 10], "counts": [20, 12, 48]}
    things = [
        thing(segmentation=SQUARE, id=1, area=12),
        thing(segmentation=runs, id=2, area=12, iscrowd=1),
    ]
    path = write(tmp_path, things)
    _, target, _ = CocoRows(tmp_path, "valid", masks=True)[0]
    theirs = coco.COCO(path)
    masks = [theirs.annToMask(theirs.anns[i]) for i in (1, 2)]
    assert target["masks"].equal(torch.from_numpy(np.stack(masks)).bool())
    assert target["iscrowd"].tolist() == [0, 1]


@pytest.mark.parametrize(
    "ids, classes",
    [
        ([1, 3], [IDLE, "1", IDLE, "3"]),  # as COCO's 80 of 91
        ([0, 1], ["0", "1"]),
        ([3, 1], [IDLE, "1", IDLE, "3"]),
        ([7, 900, 21], ["7", "21", "900"]),  # more would be idle than not
        ([5], ["5"]),
    ],
)
def test_numbers_of_categories(ids, classes):
    table = coco_categories([{"id": i, "name": str(i)} for i in ids])
    assert class_names(table) == classes
    assert all(classes[table[i][0]] == str(i) for i in ids)


def test_what_is_left_out_is_said(tmp_path):
    things = [
        thing(bbox=(8, 2, 5, 3)),  # beyond the border
        thing(category_id=3, bbox=(0, 0, 4, 0)),
        thing(bbox=(1, 1, -2, 2)),
        thing(bbox=(11, 2, 3, 3)),
        thing(bbox=(1, 1, float("nan"), 2)),
        thing(image_id=9),
        thing(image_id=3),  # of an image whose file is absent
        thing(image_id=2, category_id=3, iscrowd=1),
    ]
    write(tmp_path, things, listed=3)
    with pytest.warns(UserWarning, match="left out") as caught:
        rows = CocoRows(tmp_path, "valid")
    (said,) = [str(warning.message).split("left out: ")[1] for warning in caught]
    assert said == (
        "1 images whose file is absent, 4 boxes without area in their image, "
        "1 annotations of images that are not listed"
    )
    assert len(rows) == 2
    first, second = (rows.target(i) for i in range(2))
    assert first["boxes"].tolist() == [[8, 2, 10, 5]] and first["area"].tolist() == [6]
    assert second["labels"].tolist() == [3] and second["iscrowd"].tolist() == [1]


def test_an_image_without_objects(tmp_path):
    write(tmp_path, [])
    target = CocoRows(tmp_path, "valid", masks=True).target(1)
    shapes = {name: tuple(target[name].shape) for name in ("boxes", "labels", "masks")}
    assert shapes == {"boxes": (0, 4), "labels": (0,), "masks": (0, 8, 10)}


def test_some_images_by_the_seed(tmp_path):
    write(tmp_path, [], images=9)
    drawn = [CocoRows(tmp_path, "valid").some(4, seed).ids for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len({*drawn[0]}) == 4


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "change, said",
    [
        ({"annotations": [thing(category_id=2)]}, r"annotations\[0\]: expected image_"),
        ({"annotations": [{"image_id": 1}]}, r"annotations\[0\]: expected image_id"),
        ({"annotations": [thing(bbox=(1, 2, 3))]}, "expected bbox of four numbers"),
        ({"annotations": [thing(bbox=("a",) * 4)]}, "expected bbox of four numbers"),
        ({"annotations": [thing()]}, "expected a segmentation; got None"),
        ({"annotations": {}}, "could not read it"),
        ({"categories": []}, "expected categories"),
        ({"categories": [{"id": 1}]}, "expected categories"),
        ({"categories": CATEGORIES[:1] * 2}, "expected categories"),
        ({"images": [{"id": 1, "file_name": "1.png"}]}, r"images\[0\]: expected an id"),
        ({"images": []}, "expected the images of"),
    ],
)
def test_a_broken_file(tmp_path, change, said):
    path = write(tmp_path, [])
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=said) as caught:
        CocoRows(tmp_path, "valid", masks=True)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.no_shapes
def test_no_file_and_outlines_that_are_none(tmp_path):
    with pytest.raises(InputError, match="data_dir: expected a folder"):
        CocoRows(None, "valid")
    with pytest.raises(InputError, match="expected annotations/instances_train2017"):
        CocoRows(tmp_path, "train")
    path = write(tmp_path, [thing(segmentation={"size": [3, 3], "counts": "x"})])
    with pytest.raises(InputError, match="image 1: expected polygons or run lengths"):
        CocoRows(tmp_path, "valid", masks=True).target(0)
    path.write_text("no JSON")
    with pytest.raises(InputError, match="could not read it"):
        CocoRows(tmp_path, "valid")
