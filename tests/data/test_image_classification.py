"""Classes of images: batches, loss, scores, and the folders of trained models."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from attn_notes.data.image_batches import BATCH
from attn_notes.data.image_classification import ImageClassification, stored_classes
from attn_notes.data.image_sets import image_set, imagenet_names
from attn_notes.data.images import Preprocessing, evaluation_transform, open_image
from attn_notes.data.tasks import create_task, kind_of_data, load_task
from attn_notes.foundations.checks import CheckpointError, ConfigError, InputError
from attn_notes.training.loop import train
from attn_notes.training.recipes import Recipe
from attn_notes.training.tasks import Task, describe_task
from attn_notes.vision.vit import ViTConfig
from attn_notes.zoo.registry import model_info

P = Preprocessing((6, 6), 6, mean=(0.5,), std=(0.25,))
CLASSES = [f"class {i}" for i in range(7)]


def examples(n=100, k=7, seed=0):
    """Dark images with one bright row, which says the class."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % k
    images = torch.randint(0, 60, (n, 1, 6, 6), generator=random, dtype=torch.uint8)
    images[torch.arange(n), 0, labels % 6] += 100 + 30 * (labels[:, None] // 6).byte()
    return images, labels


def own(n=100, **options):
    splits = {split: examples(n, seed=i) for i, split in enumerate(("train", "valid"))}
    return ImageClassification(CLASSES, P, examples=splits, **options)


def model(k=7, pixels=36):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, k))


def batch_of(task, split="train"):
    rows = task.dataset(split)
    return task.collate([rows[i] for i in range(len(rows))])


def test_it_is_a_task():
    task = own()
    assert isinstance(task, Task) and task.kind == "image_classification"
    for name in ("mnist", "digits", "photographs", "imagenet"):
        assert kind_of_data(name, task.kind) == task.kind


def test_a_batch_is_normalized():
    task, (images, labels) = own(), examples()
    batch = batch_of(task)
    torch.testing.assert_close(batch["images"], (images / 255 - 0.5) / 0.25)
    assert batch["images"].dtype == torch.float32 and batch["labels"].equal(labels)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_by_hand(smoothing):
    task, net = own(), model()
    task.setup(Recipe(label_smoothing=smoothing))
    batch = batch_of(task)
    total, weight = task.loss(net, batch)["class"]
    logits = net(batch["images"])
    expected = F.cross_entropy(
        logits, batch["labels"], reduction="sum", label_smoothing=smoothing
    )
    torch.testing.assert_close(total, expected)
    assert task.counts(batch) == {"class": 100} and weight == 1


def test_scores_by_hand():
    task, net = own(), model()
    images, labels = examples(seed=1)
    logits = net((images / 255 - 0.5) / 0.25)
    order = logits.argsort(1, descending=True)
    places = (order == labels[:, None]).int().argmax(1)
    found = task.evaluate(net)
    assert found["accuracy"] == pytest.approx((places == 0).double().mean().item())
    assert found["top5_accuracy"] == pytest.approx((places < 5).double().mean().item())
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, labels).item())
    assert 0 < found["accuracy"] < found["top5_accuracy"] < 1


def test_of_five_classes_the_top_five_say_nothing():
    splits = {"valid": examples(10, k=5)}
    task = ImageClassification(CLASSES[:5], P, examples=splits)
    assert {*task.evaluate(model(5))} == {"loss", "accuracy"}
    assert len(task.predict(model(5), [splits["valid"][0][0]])[0]) == 5


def test_shares_of_evaluation_are_the_whole():
    task, net, parts = own(3 * BATCH + 7), model(), []
    whole = task.evaluate(net)
    for rank in (0, 1):
        task.evaluate(net, "valid", rank, 2, lambda mine: parts.extend(mine) or mine)
    assert task.evaluate(net, "valid", 0, 2, lambda _: parts) == whole
    assert net.training


def test_an_epoch_is_every_example_once():
    task = own()
    task.setup(Recipe(batch_size=32, seed=4))
    first, again, other = (task.batches(epoch) for epoch in (0, 0, 1))
    assert [len(rows) for rows in first] == [32, 32, 32, 4]
    assert sorted(np.concatenate(first).tolist()) == [*range(100)]
    flat = [np.concatenate(rows).tolist() for rows in (first, again, other)]
    assert flat[0] == flat[1] != flat[2]


def test_it_learns():
    task, net = own(), model()
    train(
        net,
        task,
        Recipe(max_steps=200, batch_size=25, learning_rate=2e-2),
        progress=False,
    )
    assert task.evaluate(net)["accuracy"] > 0.95
    images, labels = examples(seed=2)
    found = task.predict(net, [*images[:7]])
    assert [answer[0][0] for answer in found] == CLASSES
    assert all(sum(share for _, share in answer) <= 1.0001 for answer in found)
    assert all(answer == sorted(answer, key=lambda x: -x[1]) for answer in found)


@pytest.mark.parametrize("name", ["mnist", "photographs"])
def test_training_is_varied_and_nothing_else(name):
    task, still = create_task("image_classification", name), None
    for split in ("train", "valid"):
        rows = task.dataset(split)
        some = [rows[i] for i in range(0, len(rows), len(rows) // 8)]
        torch.manual_seed(0)
        batches = [task.collate(some)["images"] for _ in range(2)]
        still = task.preprocessing.normalize(torch.stack([x for x, _, _ in some]))
        varied = [not batch.equal(still) for batch in batches]
        assert varied == [split == "train"] * 2
        assert not batches[0].equal(batches[1]) or split == "valid"
        if name == "mnist":  # as much ink, where none is lost at the side
            ink = [(x + 1).sum((1, 2, 3)) for x in (batches[0], still)]
            assert ((ink[0] - ink[1]).abs() / ink[1]).median() < 0.01
    plain = create_task("image_classification", name, augment=False)
    rows = plain.dataset("train")
    assert plain.collate([rows[3]])["images"].equal(
        plain.preprocessing.normalize(rows[3][0][None])
    )


def test_few_examples_are_drawn_by_the_seed():
    few = [create_task("image_classification", seed=s, limit=9) for s in (0, 0, 1)]
    first, again, other = (batch_of(task, "train")["labels"] for task in few)
    images = [task.dataset("train").images for task in few]
    assert images[0].equal(images[1]) and not images[0].equal(images[2])
    assert len(first) == 9 and first.equal(again) and not first.equal(other)
    more = create_task("image_classification", limit=20).dataset("train").images
    assert more[:9].equal(images[0])  # a larger training set holds the smaller
    assert len(few[0].dataset("valid")) == 1000
    assert describe_task(few[0])["hash"] != describe_task(few[2])["hash"]


def test_what_a_model_is_built_with():
    task = create_task("image_classification", "digits")
    sizes = {"img_size": 8, "in_chans": 1, "num_classes": 10}
    assert task.overrides() == task.overrides(ViTConfig()) == sizes

    class Config:
        num_classes = 3

    assert task.overrides(Config()) == {"num_classes": 10}


def test_saved_and_loaded(tmp_path):
    given = Preprocessing(mean=(0.1,), std=(0.2,))
    task = create_task(
        "image_classification", "mnist", seed=3, limit=9, preprocessing=given
    )
    assert task.preprocessing.mean == (0.1,) and task.preprocessing.size == (28, 28)
    task.save(tmp_path)
    loaded = load_task(tmp_path)
    assert loaded.classes == task.classes
    assert loaded.preprocessing == task.preprocessing
    assert loaded.dataset("train").images.equal(task.dataset("train").images)
    changes = [
        {"classes": ["one"]},
        {"data": {"name": "cifar"}},
        {"preprocessing": {"size": 3}},
        {"preprocessing": {"sizes": 3}},
        {"augment": "yes"},
    ]
    stored = json.loads((tmp_path / "task.json").read_text())
    for change in changes:
        (tmp_path / "task.json").write_text(json.dumps(stored | change))
        with pytest.raises(CheckpointError, match="task.json"):
            load_task(tmp_path)


def test_colours_are_no_statistics_of_grey():
    rgb = Preprocessing(mean=(0.1,) * 3, std=(0.2,) * 3)
    grey, colour = (
        create_task("image_classification", name, preprocessing=rgb, limit=2)
        for name in ("mnist", "photographs")
    )
    assert grey.preprocessing.mean == (0.5,) and colour.preprocessing.mean == (0.1,) * 3


# folders of images


@pytest.fixture
def folder(tmp_path):
    """Noise: two classes, six images each for training, three held out."""
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name in ("cats", "dogs"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 255, (30, 20 + i, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def test_a_folder_is_read_batch_by_batch(folder):
    task = create_task("image_classification", "imagenet", data_dir=folder)
    assert task.classes == ["cats", "dogs"]
    config = ViTConfig(img_size=16, patch_size=8)
    assert task.overrides(config) == {"img_size": 16, "in_chans": 3, "num_classes": 2}
    rows = task.dataset("valid")
    assert len(rows) == 6 and [rows[i][1] for i in range(6)] == [0] * 3 + [1] * 3
    batch = batch_of(task, "valid")
    transform = evaluation_transform(task.preprocessing)
    expected = torch.stack([transform(open_image(rows[i][0])) for i in range(6)])
    assert batch["images"].equal(task.preprocessing.normalize(expected))
    varied, again = (batch_of(task)["images"] for _ in range(2))
    assert varied.shape == (12, 3, 16, 16) and not varied.equal(again)
    plain = create_task("image_classification", "imagenet", folder, augment=False)
    assert batch_of(plain)["images"].equal(batch_of(plain)["images"])
    assert describe_task(task) == describe_task(task)


def test_a_size_that_was_asked_for(folder):
    create = lambda **options: create_task(
        "image_classification", "imagenet", data_dir=folder, **options
    )
    config = ViTConfig(img_size=32, patch_size=8)
    given = Preprocessing((24, 24), 27)
    task = create(image_size=16, preprocessing=given)
    assert task.overrides(config)["img_size"] == 16 and task.preprocessing.resize == 18
    task = create(preprocessing=given)
    assert task.overrides(config)["img_size"] == 32 and task.preprocessing.resize == 36


@pytest.mark.slow
def test_workers_give_the_same(folder, tmp_path):
    losses = []
    for workers in (0, 2):
        task = create_task("image_classification", "imagenet", data_dir=folder)
        task.overrides(ViTConfig(img_size=8, patch_size=8))
        recipe = Recipe(max_steps=4, batch_size=4, num_workers=workers)
        net = model(2, 192)
        history = train(net, task, recipe, progress=False)
        losses.append([row["loss"] for row in history] + [task.evaluate(net)["loss"]])
    assert losses[0] == losses[1]


@pytest.mark.no_shapes
def test_a_broken_file_in_a_folder(folder):
    task = create_task("image_classification", "imagenet", data_dir=folder)
    (folder / "val" / "dogs" / "1.png").write_bytes(b"no image")
    task.overrides(ViTConfig(img_size=8, patch_size=8))
    with pytest.raises(
        InputError, match="valid, examples 0 to 5: .*1.png: expected an"
    ):
        train(model(2, 192), task, Recipe(max_steps=1), progress=False)


# what comes from elsewhere


def write_json(folder, name, stored):
    (folder / name).write_text(json.dumps(stored))


PROCESSOR = {"size": 24, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def test_a_folder_of_transformers(tmp_path):
    write_json(tmp_path, "preprocessor_config.json", PROCESSOR)
    write_json(tmp_path, "config.json", {"id2label": {"1": "dog", "0": "cat"}})
    task = load_task(tmp_path)
    assert isinstance(task, ImageClassification)
    assert task.classes == ["cat", "dog"] and task.preprocessing.size == (24, 24)
    with pytest.raises(InputError, match="examples: expected some for 'train'"):
        task.dataset("train")


def test_a_folder_of_timm(tmp_path):
    cfg = {"input_size": [3, 32, 32], "interpolation": "bicubic", "crop_pct": 1.0}
    cfg |= {"mean": [0.4] * 3, "std": [0.3] * 3}
    stored = {"num_classes": 2, "label_names": ["cat", "dog"], "pretrained_cfg": cfg}
    write_json(tmp_path, "config.json", stored)
    info = model_info("vit_base_patch16_224")
    task = ImageClassification.of_model(info, tmp_path)
    assert task.classes == ["cat", "dog"] and task.preprocessing.mean == (0.4,) * 3
    assert task.preprocessing.interpolation == "bicubic"


def test_names_of_the_thousand():
    labels = {str(i): f"LABEL_{i}" for i in range(1000)}
    for stored in ({"id2label": labels}, {"num_classes": 1000}):
        assert stored_classes(stored, "here") == imagenet_names()
    own = {i: f"class {i % 500}" for i in range(1000)}  # some of ImageNet's are alike
    assert stored_classes({"id2label": own}, "here")[501] == "class 1"


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "stored",
    [
        {},
        {"num_classes": 10},
        {"id2label": {"0": "cat"}},
        {"id2label": {"0": "cat", "2": "dog"}},
        {"id2label": ["cat", "dog"]},
        {"label_names": "cats", "num_classes": 4},
    ],
)
def test_names_that_are_absent(stored):
    with pytest.raises(
        CheckpointError, match="^here: expected the names of two or more"
    ):
        stored_classes(stored, "here")


# bad input


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "images, labels",
    [
        (torch.zeros(2, 1, 6, 6), [0, 1]),
        (torch.zeros(2, 6, 6, dtype=torch.uint8), [0, 1]),
        (torch.zeros(2, 1, 6, 6, dtype=torch.uint8), [0, 7]),
        (torch.zeros(2, 1, 6, 6, dtype=torch.uint8), [0, -1]),
        (torch.zeros(2, 1, 6, 6, dtype=torch.uint8), [0]),
        (torch.zeros(2, 1, 6, 6, dtype=torch.uint8), [0.0, 1.0]),
        (torch.zeros(0, 1, 6, 6, dtype=torch.uint8), []),
        ("images", [0]),
    ],
)
def test_examples_that_are_none(images, labels):
    with pytest.raises(InputError, match="train: expected images of bytes"):
        ImageClassification(CLASSES, P, examples={"train": (images, labels)})


class Coloured(nn.Module):
    config = ViTConfig(num_classes=7)


@pytest.mark.no_shapes
def test_bad_input():
    with pytest.raises(ConfigError, match="logits of shape"):
        own().evaluate(model(6))
    with pytest.raises(ConfigError, match="in_chans: expected 1"):
        own().evaluate(Coloured())
    with pytest.raises(ConfigError, match="classes"):
        ImageClassification(["one"], P)
    with pytest.raises(ConfigError, match="preprocessing"):
        ImageClassification(CLASSES, None)
    with pytest.raises(InputError, match="a list of images"):
        own().predict(model(), "a.png")
    with pytest.raises(InputError, match=r"inputs\[1\]: expected"):
        own().predict(model(), [examples()[0][0], 3])
    for options in (
        {"limit": 0},
        {"seed": -1},
        {"data_dir": "here"},
        {"image_size": 9},
    ):
        with pytest.raises(ConfigError, match=next(iter(options))):
            create_task("image_classification", **options)
    with pytest.raises(ConfigError, match="split"):
        create_task("image_classification", limit=1).dataset("test")


def test_a_picture_of_another_size_is_resized():
    task, image = own(), image_set("mnist", "valid")[0][0]
    small = torch.nn.functional.interpolate(
        image[None].float(), (6, 6), mode="bilinear", antialias=True
    )
    expected = model()((small / 255 - 0.5) / 0.25).softmax(-1)[0]
    (found,) = task.predict(model(), [image])
    assert found[0][1] == pytest.approx(expected.max().item(), abs=0.01)
