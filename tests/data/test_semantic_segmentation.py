"""Images with masks: scenes, folders in the form of ADE20K, what is refused in them,
batches, scores as torchmetrics gives them, the task in files."""

import json
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from attn_notes.data import semantic_pictures, semantic_slices
from attn_notes.data.boxes import BoxPreprocessing
from attn_notes.data.scenes import scenes
from attn_notes.data.semantic_batches import (
    SKIPPED,
    class_ious,
    confusion,
    segmentation_scores,
)
from attn_notes.data.semantic_masks import (
    ADE_CLASSES,
    IGNORED,
    SCENE_CLASSES,
    folder_classes,
    read_mask,
)
from attn_notes.data.semantic_pictures import FoundClasses, fit_pair, vary_pair
from attn_notes.data.semantic_segmentation import SemanticSegmentation
from attn_notes.data.tasks import KINDS, create_task, kind_of_data, load_task
from attn_notes.foundations.checks import (
    CheckpointError,
    ConfigError,
    InputError,
    Output,
)
from attn_notes.training.loop import train
from attn_notes.training.recipes import Recipe
from attn_notes.training.tasks import Task, check_held_out, describe_task
from attn_notes.zoo.factory import create_model

KIND = "semantic_segmentation"
CLASSES = ("wall", "sky", "tree")


class TwoHeads(Output):
    """As a model with an auxiliary head gives it."""

    logits: torch.Tensor
    aux_logits: object = None


class Pixels(nn.Module):
    """A class of every pixel from its colour; in training with auxiliary heads."""

    def __init__(self, classes, heads=0, stride=1):
        super().__init__()
        self.conv, self.stride = nn.Conv2d(3, classes, 1), stride
        self.heads = nn.ModuleList(nn.Conv2d(3, classes, 1) for _ in range(heads))

    def forward(self, images):
        x = images[..., :: self.stride, :: self.stride]
        if not (self.training and self.heads):
            return self.conv(x)
        extra = [head(x) for head in self.heads]
        return TwoHeads(self.conv(x), extra[0] if len(extra) == 1 else extra)


def save_mask(path, values, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, np.uint8), mode="L")
    if mode == "P":  # numbers stand for colours of a palette
        image = image.convert("L")
        image.putpalette([i for i in range(256) for _ in range(3)])
    image.save(path)


@pytest.fixture
def ade(tmp_path):
    """Six images for training and two held out, of several sizes; classes 1 to 3, and
    0 where nobody has labelled."""
    random = np.random.default_rng(0)
    for split, count in (("training", 6), ("validation", 2)):
        for i in range(count):
            h, w = 20 + 7 * i, 40 - 3 * i
            image = random.integers(0, 256, (h, w, 3), dtype=np.uint8)
            folder = tmp_path / "images" / split
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"ADE_{i:08d}.jpg")
            mask = random.integers(0, 4, (h, w))
            path = tmp_path / "annotations" / split / f"ADE_{i:08d}.png"
            save_mask(path, mask, "P" if i else "L")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return tmp_path


def of_folder(ade, **options):
    return create_task(KIND, "ade20k", ade, image_size=16, **options)


# ---- scenes


def test_masks_of_scenes():
    task, made = create_task(KIND, limit=5), scenes("valid", 4)
    assert task.classes == ["background", *"0123456789"] == [*SCENE_CLASSES]
    rows = task.dataset("valid")
    assert len(rows) == 500 and len(task.dataset("train")) == 5
    for i in range(4):
        image, mask, training = rows[i]
        _, target = made[i]
        assert torch.equal(image, made.images[i]) and not training
        assert ((mask > 0) == target["masks"].any(0)).all()
        for one, label in zip(target["masks"], target["labels"], strict=True):
            assert (mask[one] == label + 1).all()
    batch = task.collate([rows[0], rows[1]])
    assert batch["images"].shape == (2, 3, 64, 64) == (2, 3, *batch["labels"].shape[1:])
    assert torch.equal(batch["labels"][0], rows[0][1].long())  # and never mirrored


def test_it_is_a_task():
    task = create_task(KIND, "scenes", limit=40, seed=3)
    assert isinstance(task, Task) and task.kind == KIND
    assert kind_of_data("scenes", KIND) == KIND and kind_of_data("ade20k") == KIND
    assert KINDS[KIND].data == semantic_slices.DATA
    task.setup(Recipe(batch_size=16, seed=1))
    batches = task.batches(0)
    assert [len(one) for one in batches] == [16, 16]  # the rest is left out
    assert [*batches[0]] == [*task.batches(0)[0]] != [*task.batches(1)[0]]
    task.setup(Recipe(batch_size=64))
    assert [len(one) for one in task.batches(0)] == [40]
    assert describe_task(task)["examples"] == 40
    check_held_out(create_task(KIND, "scenes", limit=1, image_size=32))


# ---- folders


def test_a_folder(ade):
    task = of_folder(ade)
    assert task.classes == [*CLASSES] and len(task.dataset("train")) == 6
    image, mask, training = task.dataset("valid")[1]
    assert image.endswith("ADE_00000001.jpg") and not training
    with Image.open(ade / "annotations/validation/ADE_00000001.png") as file:
        values = np.asarray(file).astype(int)
    found = read_mask(mask, 3, values.shape)
    assert (found.numpy()[values == 0] == IGNORED).all()
    assert (found.numpy()[values > 0] == values[values > 0] - 1).all()
    shifted = np.where(values == 0, IGNORED, values)
    path = ade / "as_is.png"
    save_mask(path, shifted)
    kept = read_mask(path, 4, values.shape, reduce_zero_label=False)
    assert (kept.numpy() == shifted).all()


def test_batches_of_a_folder(ade):
    task = of_folder(ade)
    rows = task.dataset("train")
    torch.manual_seed(0)
    batch = task.collate([rows[i] for i in range(6)])
    assert batch["images"].shape == (6, 3, 16, 16)
    assert batch["labels"].shape == (6, 16, 16)
    assert set(batch["labels"].unique().tolist()) == {SKIPPED, 0, 1, 2}
    held = task.dataset("valid")
    one = task.collate([held[0]])
    assert one["images"].shape[2] == 16 and one["labels"].shape == (1, 20, 40)
    both = task.collate([held[0], held[1]])  # padded: only to be looked at
    assert both["labels"].shape == (2, 27, 40) and (both["labels"][0, 20:] < 0).all()
    assert len([*task.split_batches("valid")]) == 2
    check_held_out(task)


def test_training_on_a_folder(ade):
    task, model = of_folder(ade, limit=4), Pixels(3, heads=1, stride=2)
    assert len(task.dataset("train")) == 4
    recipe = Recipe(max_steps=3, batch_size=2, learning_rate=1e-2)
    history = train(model, task, recipe, progress=False)
    assert {"valid_mean_iou", "valid_pixel_accuracy", "valid_loss"} <= {*history[-1]}


def test_names_of_classes(tmp_path):
    assert folder_classes(tmp_path) == ADE_CLASSES and len({*ADE_CLASSES}) == 150
    rows = "Idx\tRatio\tName\n1\t0.1\twall\n2\t0.1\tbuilding, edifice\n"
    (tmp_path / "objectInfo150.txt").write_text(rows)
    assert folder_classes(tmp_path) == ("wall", "building")
    (tmp_path / "classes.txt").write_text("\n\n")
    with pytest.raises(InputError, match="names of classes; got an empty list"):
        folder_classes(tmp_path)


@pytest.mark.no_shapes
def test_what_is_refused_in_a_folder(ade):
    path = ade / "annotations/training/ADE_00000000.png"
    size = (20, 40)
    task, example = of_folder(ade), of_folder(ade).dataset("train")[0]
    save_mask(path, np.full(size, 4))
    with pytest.raises(InputError, match=r"0.png: expected labels from 0 to 2.*3 to 3"):
        task.collate([example])
    save_mask(path, np.zeros(size))
    with pytest.raises(InputError, match=r"0.png: .* got an empty mask"):
        task.collate([example])
    save_mask(path, np.ones((19, 40)))
    with pytest.raises(InputError, match=r"a mask of 20 x 40 .*; got 19 x 40"):
        task.collate([example])
    Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(path)
    with pytest.raises(InputError, match="of one channel.*got an image of mode RGB"):
        task.collate([example])
    path.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"expected a mask; could not read it"):
        task.collate([example])
    path.unlink()
    with pytest.raises(InputError, match="pairs .*; got no mask for ADE_00000000.jpg"):
        of_folder(ade)


@pytest.mark.no_shapes
def test_folders_without_pairs(tmp_path):
    with pytest.raises(InputError, match="data_dir: expected the folder"):
        create_task(KIND, "ade20k")
    with pytest.raises(
        InputError, match="images/training: expected a folder; got none"
    ):
        create_task(KIND, "ade20k", tmp_path)
    for part in ("images", "annotations"):
        (tmp_path / part / "training").mkdir(parents=True)
    with pytest.raises(InputError, match="expected pairs .*; got no image"):
        create_task(KIND, "ade20k", tmp_path)
    with pytest.raises(ConfigError, match="data_dir: expected None; got"):
        create_task(KIND, "scenes", tmp_path)
    with pytest.raises(ConfigError, match="data: expected one of scenes, slices"):
        semantic_slices.mask_data("coco")


# ---- examples of one's own


def own(values, masks):
    how = BoxPreprocessing(8, 32)
    return SemanticSegmentation(CLASSES, how, examples={"train": (values, masks)})


@pytest.mark.no_shapes
def test_own_examples():
    values = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    masks = torch.randint(0, 3, (3, 8, 8))
    task = own(values, masks)
    image, mask, training = task.dataset("train")[2]
    assert training and torch.equal(mask.long(), masks[2])
    masks[1] = 3
    with pytest.raises(InputError, match="train, mask 1: expected labels from 0 to 2"):
        own(values, masks)
    masks[1] = IGNORED
    with pytest.raises(InputError, match="train, mask 1: .*; got an empty mask"):
        own(values, masks)
    with pytest.raises(InputError, match="a mask of 8 x 8 pixels.*; got 8 x 7"):
        own(values, masks[:, :, 1:])
    for given in ((values.float(), masks), (values, masks[:2]), (values, 1), values[0]):
        with pytest.raises(InputError, match="train: expected images of bytes"):
            own(given, None) if isinstance(given, torch.Tensor) else own(*given)
    with pytest.raises(InputError, match="expected some for 'valid'; got train"):
        task.dataset("valid")


# ---- varied


def test_image_and_mask_go_together():
    """A picture whose brightness is its class stays so, whatever is done to both."""
    torch.manual_seed(0)
    mask = torch.randint(0, 3, (5, 6)).repeat_interleave(8, 0).repeat_interleave(8, 1)
    image = (80 * mask).byte().expand(3, *mask.shape)
    how = BoxPreprocessing(40, 160)
    for _ in range(10):
        values, classes = fit_pair(image, mask.byte(), how, True, True)
        assert values.shape == (3, 40, 40) and classes.shape == (40, 40)
        real = classes != IGNORED
        assert (values[:, ~real] == 0).all()
        far = (values[0].float() - 80.0 * classes)[real].abs() > 30
        assert far.float().mean() < 0.2  # edges are interpolated in the image alone
    values, classes = vary_pair(image, mask.byte(), 16)
    assert torch.equal(values[0], 80 * classes)


def test_a_cut_has_more_than_one_class():
    mask = torch.zeros(64, 64, dtype=torch.uint8)
    mask[:, 60:] = 1
    image = mask.expand(3, 64, 64)
    torch.manual_seed(0)
    mixed = [len(vary_pair(image, mask, 8)[1].unique()) > 1 for _ in range(60)]
    single = [vary_pair(image, 0 * mask, 8)[1].max() == 0 for _ in range(3)]
    assert sum(mixed) > 15 and all(single)  # of one cut alone it would be 4 of 60
    assert semantic_pictures.TRIES == 10


# ---- scores


@pytest.mark.parametrize("classes, absent", [(4, ()), (6, (2, 5))])
def test_scores_are_torchmetrics(classes, absent):
    metrics = pytest.importorskip("torchmetrics.classification")
    random = torch.Generator().manual_seed(classes)
    allowed = torch.tensor([i for i in range(classes) if i not in absent])
    draw = lambda: allowed[torch.randint(len(allowed), (5, 9, 7), generator=random)]
    labels, said = draw(), draw()
    labels[torch.rand(labels.shape, generator=random) < 0.2] = SKIPPED
    options = {"ignore_index": SKIPPED}
    iou = metrics.MulticlassJaccardIndex(classes, average="macro", **options)
    each = metrics.MulticlassJaccardIndex(classes, average="none", **options)
    right = metrics.MulticlassAccuracy(classes, average="micro", **options)
    table = torch.zeros(classes, classes, dtype=torch.int64)
    for one, truth in zip(said, labels, strict=True):  # image by image
        for metric in (iou, each, right):
            metric.update(one[None], truth[None])
        table += confusion(one, truth, classes)
    found = segmentation_scores(table)
    assert found["mean_iou"] == pytest.approx(iou.compute().item(), abs=1e-6)
    assert found["pixel_accuracy"] == pytest.approx(right.compute().item(), abs=1e-6)
    ious = class_ious(table)
    assert ious[list(absent)].isnan().all()
    assert torch.allclose(ious.nan_to_num(), each.compute().double(), atol=1e-6)


def test_a_class_that_is_said_but_absent_counts():
    table = confusion(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0]), 3)
    assert table.tolist() == [[2, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert segmentation_scores(table)["mean_iou"] == pytest.approx((2 / 3 + 0) / 2)


# ---- loss


@pytest.mark.parametrize("heads", [0, 1, 2])
def test_the_loss(heads):
    torch.manual_seed(0)
    model, task = Pixels(11, heads, stride=2), create_task(KIND, limit=3)
    batch = task.collate([task.dataset("train")[i] for i in range(3)])
    batch["labels"][:, :30] = SKIPPED
    pixels = 3 * 34 * 64
    assert task.counts(batch) == {"cross_entropy": pixels, "auxiliary": pixels}
    found = task.loss(model, batch)
    output = model(batch["images"])
    several = output.aux_logits if heads else []
    every = [output.logits if heads else output]
    every += [several] if heads == 1 else several
    up = [F.interpolate(x, (64, 64), mode="bilinear") for x in every]
    expected = [F.cross_entropy(x, batch["labels"], reduction="sum") for x in up]
    assert found["cross_entropy"][0].item() == pytest.approx(expected[0].item())
    assert found["auxiliary"][0].item() == pytest.approx(
        sum(expected[1:], 0.0 * up[0].sum()).item()
    )
    assert (found["cross_entropy"][1], found["auxiliary"][1]) == (1.0, 0.4)


def test_the_model_says_the_weight_of_the_auxiliary_loss():
    task = create_task(KIND, limit=2)
    config = create_model("upernet_swin_book", auxiliary_weight=0.1).config
    assert task.overrides(config) == {"num_classes": 11, "img_size": 64}
    assert task.auxiliary_weight == 0.1 and task.overrides()["num_classes"] == 11


@pytest.mark.no_shapes
def test_models_that_do_not_fit():
    task = create_task(KIND, limit=2)
    with pytest.raises(ConfigError, match="num_classes: expected 11.*got 150"):
        task.check_model(create_model("upernet_swin_tiny", device="meta"))
    image = [torch.zeros(3, 64, 64, dtype=torch.uint8)]
    with pytest.raises(
        ConfigError, match=r"logits of 11 classes.*got \(1, 4, 64, 64\)"
    ):
        task.predict(Pixels(4), image)
    model = Pixels(11)
    model.forward = lambda images: (images,)
    with pytest.raises(ConfigError, match="logits of 11 classes.*; got tuple"):
        task.predict(model, image)


@pytest.mark.no_shapes
@pytest.mark.parametrize("digits, channels", [(True, 1), (True, 12), (False, 3)])
def test_other_classes_are_refused_before_any_work(digits, channels, monkeypatch):
    """A model that has no configuration is tried on one image, before the held-out
    data are looked at; its mode and the random numbers stay as they were."""
    task = create_task(KIND, limit=4, digits=digits, image_size=32)
    asked, read = [], SemanticSegmentation.dataset
    seen = lambda self, split: asked.append(split) or read(self, split)
    monkeypatch.setattr(SemanticSegmentation, "dataset", seen)
    model, k = Pixels(channels), len(task.classes)
    wanted = rf"logits of {k} classes for every pixel, \(1 {k} h w\)"
    wanted += r" or \(1 1 h w\)" if k == 2 else ""
    with pytest.raises(ConfigError, match=rf"{wanted}; got \(1, {channels}, 32, 32\)"):
        train(model, task, Recipe(max_steps=1, batch_size=2), progress=False)
    assert "valid" not in asked
    model = Pixels(k)
    before = torch.get_rng_state()
    task.check_model(model)
    assert model.training and before.equal(torch.get_rng_state())


def test_scores_of_a_split_in_two_processes(ade):
    task, model = of_folder(ade), Pixels(3)
    whole = task.evaluate(model)
    halves = [task.table(model, "valid", rank, 2) for rank in (0, 1)]
    both = task.evaluate(model, gather=lambda _: halves)
    assert both == pytest.approx(whole)
    pixels = int(sum(table.sum() for table, _ in halves))
    labelled = sum(
        int((read_mask(*pair) != IGNORED).sum())
        for pair in (
            (ade / f"annotations/validation/ADE_0000000{i}.png", 3, size)
            for i, size in enumerate([(20, 40), (27, 37)])
        )
    )
    assert pixels == labelled  # at the size of the masks


# ---- what it says


def test_predict_takes_files_pictures_and_bytes(tmp_path):
    task, model = create_task(KIND, limit=1), Pixels(11)
    values = scenes("valid", 1).images[0]
    picture = Image.fromarray(values.permute(1, 2, 0).numpy())
    picture.save(tmp_path / "a.png")
    large = picture.resize((160, 128))
    found = task.predict(model, [tmp_path / "a.png", picture, values, large])
    assert [tuple(one.mask.shape) for one in found] == 3 * [(64, 64)] + [(128, 160)]
    assert torch.equal(found[0].mask, found[2].mask)
    assert sum(found[0].shares().values()) == pytest.approx(1, abs=1e-3)
    drawn = found[3].picture()
    assert drawn.width == 320 and drawn.height > 256
    line = json.loads(task.line("a.png", found[0]))
    assert line["image"] == "a.png" and line["classes"] == found[0].shares()
    task.write_answers([*found, InputError("x")], tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").height > 4 * 256


@pytest.mark.no_shapes
def test_what_is_no_image():
    task, model = create_task(KIND, limit=1), Pixels(11)
    with pytest.raises(InputError, match="inputs: expected a list of images; got one"):
        task.predict(model, torch.zeros(3, 64, 64, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"inputs\[1\]: expected a file, a picture"):
        task.predict(model, [torch.zeros(3, 64, 64, dtype=torch.uint8), 5])


def test_a_picture_of_classes():
    mask = torch.zeros(64, 64, dtype=torch.int64)
    mask[:8] = 3
    grey = torch.full((3, 64, 64), 100, dtype=torch.uint8)
    drawn = np.asarray(FoundClasses(grey, mask, [*SCENE_CLASSES]).picture())
    assert (drawn[40:250, :250] == 100).all()  # the background has no colour
    top = drawn[:30, :250].reshape(-1, 3)
    assert len(np.unique(top, axis=0)) == 1 and (top[0] != 100).any()
    nothing = FoundClasses(grey, 0 * mask, [*SCENE_CLASSES]).picture()
    assert nothing.size == (256, 256)


# ---- in files


def test_saved_and_loaded(tmp_path, ade):
    task = create_task(KIND, "scenes", limit=7, seed=2, image_size=48)
    task.save(tmp_path)
    again = load_task(tmp_path)
    assert again.classes == task.classes and again.preprocessing == task.preprocessing
    assert len(again.dataset("train")) == 7
    assert torch.equal(again.dataset("train")[3][0], task.dataset("train")[3][0])
    folder = of_folder(ade, reduce_zero_label=True, augment=False)
    folder.save(tmp_path)
    assert str(ade) not in (tmp_path / "task.json").read_text()
    again = load_task(tmp_path, ade)
    assert not again.augment and len(again.dataset("train")) == 6
    stored = json.loads((tmp_path / "task.json").read_text())
    (tmp_path / "task.json").write_text(json.dumps({**stored, "classes": []}))
    with pytest.raises(CheckpointError, match="could not read it: classes"):
        load_task(tmp_path)


def test_weights_of_transformers(tmp_path):
    library = pytest.importorskip("transformers")
    stages = [f"stage{i}" for i in range(1, 5)]
    swin = library.SwinConfig(embed_dim=8, num_heads=(1, 1, 2, 2), out_features=stages)
    labels = {"id2label": {0: "wall", 1: "sky", 2: "tree"}}
    heads = {"hidden_size": 8, "auxiliary_channels": 8}
    config = library.UperNetConfig(backbone_config=swin, **heads, **labels)
    library.UperNetForSemanticSegmentation(config).save_pretrained(tmp_path)
    processor = library.SegformerImageProcessor(size={"height": 64, "width": 64})
    processor.save_pretrained(tmp_path)
    from attn_notes.zoo.registry import model_info

    info = model_info("upernet_swin_tiny")
    task = SemanticSegmentation.of_model(info, tmp_path)
    assert task.classes == ["wall", "sky", "tree"]
    assert task.preprocessing.shortest == 64
    with warnings.catch_warnings(action="error"):
        model = create_model("upernet_swin_tiny", tmp_path)
    (found,) = task.predict(model, [torch.zeros(3, 70, 90, dtype=torch.uint8)])
    assert found.mask.shape == (70, 90)
    alone = SemanticSegmentation.of_model(info, None)
    assert alone.classes == [*ADE_CLASSES] and alone.preprocessing.shortest == 512
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["id2label"]
    (tmp_path / "config.json").write_text(json.dumps({**stored, "num_classes": 9}))
    with pytest.raises(CheckpointError, match="ADE20K's 150 classes.*: 9 classes"):
        SemanticSegmentation.of_model(info, tmp_path)
