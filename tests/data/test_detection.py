"""Objects in images: batches, loss, average precision, answers, and the folders of
trained detectors."""

import json

import numpy as np
import pytest
import torch
from detector_toys import Toy, bright
from PIL import Image

from attn_notes.data.box_scores import STATS, average_precision
from attn_notes.data.boxes import BoxPreprocessing
from attn_notes.data.coco import write_coco
from attn_notes.data.detection import Detection, coco_names
from attn_notes.data.detection_rows import SceneRows
from attn_notes.data.scenes import DIGITS, scenes
from attn_notes.data.tasks import create_task, kind_of_data, load_task
from attn_notes.foundations.checks import CheckpointError, ConfigError, InputError
from attn_notes.training.recipes import Recipe
from attn_notes.training.tasks import Task, check_batch, describe_task
from attn_notes.zoo.registry import model_info

P = BoxPreprocessing(24, 40, (0.5,) * 3, (0.5,) * 3)


def own(count=6, preprocessing=P, **options):
    splits = {s: bright(count, seed=i) for i, s in enumerate(("train", "valid"))}
    return Detection(["red", "yellow"], preprocessing, examples=splits, **options)


def batch_of(task, split="train", count=None):
    rows = task.dataset(split)
    return task.collate([rows[i] for i in range(count or len(rows))])


def test_it_is_a_task():
    assert isinstance(own(), Task) and own().kind == "detection"
    assert kind_of_data("coco", "detection") == "detection"
    task = create_task("detection", limit=9)
    assert len(task.dataset("train")) == 9 and task.classes == [*DIGITS]
    assert task.overrides() == {"num_classes": 10}


def test_a_batch_of_scenes():
    task, made = create_task("detection", "scenes", seed=3), scenes("train", 2, seed=3)
    batch = batch_of(task, count=2)
    mean, std = (
        torch.tensor(x).view(3, 1, 1)
        for x in (task.preprocessing.mean, task.preprocessing.std)
    )
    expected = (made.images / 255 - mean) / std
    torch.testing.assert_close(batch["images"], expected)
    assert batch["mask"].all() and batch["mask"].shape == (2, 64, 64)
    for i, target in enumerate(batch["targets"]):
        assert {*target} == {"boxes", "labels"}
        assert target["boxes"].equal(made.target(i)["boxes"])
    check_batch(batch, num_classes=10)
    assert describe_task(task) == describe_task(create_task("detection", seed=3))


def test_images_of_different_sizes():
    images = [torch.zeros(3, 24, w, dtype=torch.uint8) for w in (30, 24)]
    targets = [{"boxes": [[1, 2, 9, 30]], "labels": [1]}, {"boxes": [], "labels": []}]
    task = Detection(["a", "b"], P, examples={"train": (images, targets)})
    batch = batch_of(task)
    assert batch["images"].shape == (2, 3, 24, 30)
    assert not batch["mask"][1, :, 24:].any() and batch["mask"][0].all()
    assert batch["images"][1, :, :, 24:].abs().max() == 0
    assert batch["targets"][0]["boxes"].tolist() == [[1, 2, 9, 24]]  # its border
    assert batch["targets"][1]["boxes"].shape == (0, 4)
    assert task.counts(batch) == {"class": 2, "focal": 1, "l1": 1, "giou": 1}
    model = Toy()
    task.loss(model, batch)
    assert model.given[1] is batch["mask"]
    task.loss(model, batch_of(own()))
    assert model.given[1] is None  # nothing is padded


def test_loss_by_hand():
    task, model = own(), Toy()
    batch = batch_of(task)
    boxes = sum(target["boxes"].sum() for target in batch["targets"])
    terms = task.loss(model, batch)
    for i, (name, weight) in enumerate(Toy.loss_weights.items()):
        value, given = terms[name]
        assert value == (boxes + 6 * 48) * (i + 1) and given == weight
    scores = task.evaluate(model, "train")
    total = (boxes + 6 * 48) / 6  # six images, an object each
    assert scores["loss"] == pytest.approx(float(total * (1 + 2 * 5 + 3 * 2)))


def test_scores_of_one_who_finds_all():
    scores = own().evaluate(Toy())
    assert scores["AP50"] == scores["AP75"] == pytest.approx(1)
    assert "AP_large" not in scores and scores["AP_small"] == pytest.approx(1)


def test_shares_of_evaluation_are_the_whole():
    task, parts = own(40), []
    whole = task.evaluate(Toy())
    for rank in (0, 1):
        task.evaluate(Toy(), "valid", rank, 2, lambda mine: parts.extend(mine) or mine)
    assert task.evaluate(Toy(), "valid", 0, 2, lambda _: parts) == whole


def test_an_epoch_is_every_example_once():
    task = own(10)
    task.setup(Recipe(batch_size=4, seed=4))
    first, again, other = (task.batches(epoch) for epoch in (0, 0, 1))
    assert [len(rows) for rows in first] == [4, 4, 2]
    flat = [np.concatenate(rows).tolist() for rows in (first, again, other)]
    assert sorted(flat[0]) == [*range(10)] and flat[0] == flat[1] != flat[2]


# average precision


def objects(boxes, labels=None, **more):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.zeros(len(boxes)).long() if labels is None else torch.tensor(labels)
    return {"boxes": boxes, "labels": labels} | {
        k: torch.tensor(v) for k, v in more.items()
    }


def test_average_precision_by_hand():
    """A box that overlaps by 0.62 passes three of the ten thresholds."""
    true = [objects([[0, 0, 100, 10]], area=[1000.0], iscrowd=[0])]
    found = [objects([[0, 0, 62, 10], [50, 50, 60, 60]], scores=[0.9, 0.1])]
    scores = average_precision(true, found, 1)
    expected = {"AP": 0.3, "AP50": 1.0, "AP75": 0.0, "AP_small": 0.3}
    assert scores == pytest.approx(expected)
    found[0]["scores"] = torch.tensor([0.1, 0.9])  # the wrong one first
    assert average_precision(true, found, 1)["AP50"] == pytest.approx(0.5)
    cuts = average_precision(true, found, 1, (100, 900))
    assert {*cuts} == {"AP", "AP50", "AP75", "AP_large"}


def test_crowds_count_neither_for_nor_against():
    boxes = [[0, 0, 10, 10], [20, 20, 60, 60]]
    true = [objects(boxes, area=[100.0, 1600.0], iscrowd=[0, 1])]
    inside = [[20, 20, 30, 30], [40, 40, 55, 55]]
    found = [objects([boxes[0], *inside], scores=[0.5, 0.9, 0.8])]
    assert average_precision(true, found, 1)["AP"] == pytest.approx(1)
    true[0]["iscrowd"] = torch.tensor([0, 0])
    assert average_precision(true, found, 1)["AP"] < 0.5


def test_average_precision_is_that_of_torchmetrics():
    detection = pytest.importorskip("torchmetrics.detection")
    random = torch.Generator().manual_seed(0)
    true, found = [], []
    for _ in range(12):
        corner = torch.rand(4, 2, generator=random) * 60
        boxes = torch.cat([corner, corner + 8 + 30 * torch.rand(4, 2)], 1)
        labels = torch.randint(0, 3, (4,), generator=random)
        true.append(objects(boxes.tolist(), labels.tolist()))
        true[-1] |= {"area": (boxes[:, 2:] - boxes[:, :2]).prod(1)}
        true[-1] |= {"iscrowd": torch.zeros(4).long()}
        moved = boxes + torch.randn(4, 4, generator=random)
        scores = torch.rand(4, generator=random).tolist()
        found.append(objects(moved.tolist(), labels.tolist(), scores=scores))
    ours = average_precision(true, found, 3)
    overlaps, recalls = np.linspace(0.5, 0.95, 10), np.linspace(0, 1, 101)
    metric = detection.MeanAveragePrecision(
        iou_thresholds=overlaps.tolist(), rec_thresholds=recalls.tolist()
    )  # its own are in single precision
    metric.update(found, true)
    theirs = metric.compute()
    for name, key in zip(
        STATS[:4], ("map", "map_50", "map_75", "map_small"), strict=True
    ):
        assert ours[name] == pytest.approx(theirs[key].item(), abs=1e-6)
    assert 0.1 < ours["AP"] < 0.95


def test_nothing_found_and_nothing_there():
    true = [objects([[0, 0, 9, 9]], area=[81.0], iscrowd=[0])]
    nothing = [objects([], scores=[])]
    assert average_precision(true, nothing, 2)["AP"] == 0
    assert average_precision([objects([], area=[], iscrowd=[])], nothing, 2) == {}
    with pytest.raises(InputError, match="found: expected one for each of 1 images"):
        average_precision(true, [], 2)


def test_sizes_of_scenes_are_smaller():
    assert create_task("detection").sizes == (144, 324)
    assert create_task("detection", image_size=128).sizes == (576, 1296)
    assert own().sizes == (1024, 9216)


# answers


def test_boxes_in_pixels_of_the_picture(tmp_path):
    """Of a picture twice as large as the model sees it."""
    task, (images, targets) = own(), bright()
    picture = Image.fromarray(images[1].permute(1, 2, 0).numpy())
    picture = picture.resize((48, 48), Image.Resampling.NEAREST)
    picture.save(tmp_path / "a.png")
    box = [2.0 * x for x in targets[1]["boxes"][0]]
    for given in (picture, str(tmp_path / "a.png"), tmp_path / "a.png"):
        (found,) = task.predict(Toy(), [given])
        (one,) = found
        assert one["label"] == "yellow" and one["score"] == pytest.approx(0.9)
        assert one["box"] == pytest.approx(box, abs=2)
    assert found.picture().size == (288, 288)  # enlarged to be drawn on
    both = task.predict(Toy(), [images[0], picture], threshold=0.1)
    assert [len(one) for one in both] == [2, 2]
    assert both[0][0]["box"] == pytest.approx(targets[0]["boxes"][0], abs=1)
    line = json.loads(task.line("a.png", both[1]))
    assert line == {"image": "a.png", "objects": both[1].objects}


def test_pictures_with_boxes_are_written(tmp_path):
    task, images = own(), bright()[0]
    found = task.predict(Toy(), [*images[:2]])
    task.write_answers([found[0], InputError("none"), found[1]], tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as sheet:
        assert sheet.size == (264, 528)
    x0, y0, _, _ = (11 * x for x in found[0][0]["box"])
    drawn = found[0].picture()
    assert drawn.getpixel((int(x0), int(y0))) not in ((250, 0, 0), (0, 0, 0))
    with pytest.raises(InputError, match="expected the name of an image"):
        task.write_answers(found, tmp_path / "a.txt")


# folders


def coco_folder(root, count=6):
    for split in ("train", "valid"):
        made = scenes(split, count)
        write_coco(root, split, [made[i] for i in range(count)], DIGITS)
    return root


def test_a_coco_folder(tmp_path):
    task = create_task("detection", "coco", coco_folder(tmp_path), image_size=64)
    assert task.classes == [*DIGITS] and task.preprocessing.longest == 107
    batch, made = batch_of(task, "valid"), scenes("valid", 6)
    for i, target in enumerate(batch["targets"]):
        assert target["boxes"].equal(made.target(i)["boxes"])
    torch.manual_seed(0)
    varied, again = (batch_of(task)["images"] for _ in range(2))
    assert varied.shape != again.shape or not varied.equal(again)
    plain = create_task("detection", "coco", tmp_path, augment=False, limit=3)
    assert len(plain.dataset("train")) == 3
    assert batch_of(plain)["images"].equal(batch_of(plain)["images"])
    assert task.evaluate(Toy(), "valid")["AP"] < 0.2
    Image.new("RGB", (9, 9)).save(tmp_path / "val2017" / f"{2:012}.png")
    with pytest.raises(InputError, match="expected .64, 64. pixels, as its annot"):
        batch_of(task, "valid")


def test_crowds_are_not_learned(tmp_path):
    path = coco_folder(tmp_path) / "annotations" / "instances_val2017.json"
    stored = json.loads(path.read_text())
    for one in stored["annotations"]:
        one["iscrowd"] = 1
    path.write_text(json.dumps(stored))
    task = create_task("detection", "coco", tmp_path, image_size=64)
    assert task.counts(batch_of(task, "valid"))["l1"] == 0
    assert "AP" not in task.evaluate(Toy())


def test_saved_and_loaded(tmp_path):
    task = create_task("detection", "scenes", seed=3, limit=9, image_size=48)
    task.save(tmp_path)
    loaded = load_task(tmp_path)
    assert loaded.classes == task.classes and repr(loaded) == repr(task)
    assert loaded.preprocessing == task.preprocessing
    assert loaded.dataset("train")[0][0].equal(task.dataset("train")[0][0])
    stored = json.loads((tmp_path / "task.json").read_text())
    for change in (
        {"classes": []},
        {"data": {"name": "voc", "seed": 0, "limit": None}},
        {"preprocessing": {"shortest": 0}},
        {"augment": "yes"},
    ):
        (tmp_path / "task.json").write_text(json.dumps(stored | change))
        with pytest.raises(CheckpointError, match="task.json"):
            load_task(tmp_path)


PROCESSOR = {"image_mean": [0.4] * 3, "image_std": [0.2] * 3}
SIZES = {
    "edges": {"size": {"shortest_edge": 90, "longest_edge": 150}},
    "first versions": {"size": 90, "max_size": 150},
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_folder_of_transformers(tmp_path, size):
    stored = json.dumps(PROCESSOR | size)
    (tmp_path / "preprocessor_config.json").write_text(stored)
    labels = json.dumps({"id2label": {"1": "dog", "0": "N/A"}})
    (tmp_path / "config.json").write_text(labels)
    info = model_info("detr_resnet50")
    for task in (Detection.load_foreign(tmp_path), Detection.of_model(info, tmp_path)):
        assert task.classes == ["N/A", "dog"]
        given = BoxPreprocessing(90, 150, (0.4,) * 3, (0.2,) * 3)
        assert task.preprocessing == given


def test_a_single_file_has_the_classes_of_coco():
    task = Detection.of_model(model_info("detr_resnet50"), None)
    assert task.preprocessing == BoxPreprocessing()
    assert len(task.classes) == 91 and task.classes.count("N/A") == 11
    assert task.classes[1] == "person" and task.classes == coco_names()
    tiny = Detection.preprocessing_of(model_info("detr_tiny"), None)
    assert tiny == create_task("detection").preprocessing
    assert (tiny.shortest, tiny.longest) == (64, 107)


# bad input


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "target, said",
    [
        ({"boxes": [[3, 3, 3, 9]], "labels": [0]}, "expected boxes x0 < x1, y0 < y1"),
        ({"boxes": [[3, 9, 8, 5]], "labels": [0]}, "expected boxes x0 < x1, y0 < y1"),
        ({"boxes": [[0, 0, float("nan"), 2]], "labels": [0]}, "expected boxes x0 < x1"),
        ({"boxes": [[30, 3, 40, 9]], "labels": [0]}, "in an image of 24 x 24 pixels"),
        ({"boxes": [[1, 1, 9, 9]], "labels": [2]}, "expected labels from 0 to 1"),
        ({"boxes": [[1, 1, 9, 9]], "labels": [-1]}, "expected labels from 0 to 1"),
        ({"boxes": [[1, 1, 9, 9]], "labels": [0.5]}, "expected labels from 0 to 1"),
        ({"boxes": [[1, 1, 9, 9]], "labels": [0, 1]}, "expected boxes .n 4. and"),
        ({"boxes": [1, 1, 9, 9], "labels": [0]}, "expected boxes .n 4. and labels"),
        ({"labels": [0]}, "expected a dict with boxes"),
        ("boxes", "expected a dict with boxes"),
    ],
)
def test_objects_that_are_none(target, said):
    images = bright(2)[0]
    given = {"valid": (images, [{"boxes": [], "labels": []}, target])}
    with pytest.raises(InputError, match=f"valid, example 1: .*{said}"):
        Detection(["red", "yellow"], P, examples=given)


@pytest.mark.no_shapes
def test_bad_input():
    task = own()
    with pytest.raises(ConfigError, match="expected a detector.*without losses"):
        task.evaluate(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="a list of images"):
        task.predict(Toy(), "a.png")
    with pytest.raises(InputError, match=r"inputs\[1\]: expected"):
        task.predict(Toy(), [bright()[0][0], 3])
    with pytest.raises(ConfigError, match="threshold"):
        task.predict(Toy(), [bright()[0][0]], threshold=2.0)
    with pytest.raises(InputError, match="examples: expected some for 'test'"):
        task.dataset("test")
    with pytest.raises(InputError, match="train: expected images, and as many dicts"):
        Detection(["a"], P, examples={"train": (bright(3)[0], [])})
    with pytest.raises(InputError, match="train, example 0: expected bytes"):
        Detection(["a"], P, examples={"train": ([1], [bright()[1][0]])})
    with pytest.raises(ConfigError, match="classes"):
        Detection([], P)
    with pytest.raises(ConfigError, match="preprocessing"):
        Detection(["a"], "half")
    with pytest.raises(InputError, match="data_dir"):
        create_task("detection", "coco")
    for options in ({"limit": 0}, {"seed": -1}, {"data_dir": "x"}, {"image_size": 0}):
        with pytest.raises(ConfigError, match=[*options][0]):
            create_task("detection", "scenes", **options)
    with pytest.raises(InputError, match="size: expected 32"):
        create_task("detection", "scenes", image_size=16).dataset("train")[0]


def test_more_objects_than_queries_are_refused_before_training():
    import attn_notes as an

    model = an.create_model("detr_tiny", num_queries=2, num_classes=2)
    images, _ = bright(2)
    target = {"boxes": [[1, 1, 9, 9]] * 3, "labels": [0, 1, 0]}
    task = Detection(["red", "yellow"], P, examples={"train": (images, [target] * 2)})
    with pytest.raises(InputError, match="at most 2 objects"):
        task.loss(model, batch_of(task))


def test_scenes_are_made_once():
    rows = SceneRows("valid", 3, 64, 0, True)
    assert rows.made(1) is rows.made(1) and len(rows) == 3
    assert rows[-1][1]["image_id"] == 2
    with pytest.raises(IndexError):
        rows[3]
