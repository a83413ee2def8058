"""Images as sequences of colours: the palette, the tasks of the next pixel and of the
class of a sequence, half an image completed."""

import json
import math
from dataclasses import replace

import numpy
import pytest
import torch
from PIL import Image

import attn_notes as an
from attn_notes.data.colour_palette import ColourPalette, fit_palette, read_palette
from attn_notes.data.image_generation import (
    ImageGeneration,
    ImageSequenceClassification,
)
from attn_notes.data.tasks import create_task, kind_of_data, load_task
from attn_notes.training.loop import train
from attn_notes.training.recipes import Recipe
from attn_notes.training.tasks import Task
from attn_notes.vision.igpt import (
    IGPT,
    IGPTClassifier,
    IGPTClassifierConfig,
    IGPTConfig,
)

SMALL = dict(
    vocab_size=5,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=20,
    max_position_embeddings=16,
)
GREYS = ColourPalette(torch.tensor([[-1.0], [-0.3], [0.3], [1.0]]))
NAMES = ["dark", "light"]


def examples(rows=6, channels=1, side=4):
    """Images that are dark or light, and their classes."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 90, (rows, channels, side, side), generator=random)
    labels = torch.arange(rows) % 2
    return (images + 160 * labels[:, None, None, None]).to(torch.uint8), labels


def task_of(kind=ImageGeneration, palette=GREYS, side=4, **options):
    own = {"train": examples(), "valid": examples(4)}
    if kind is ImageSequenceClassification:
        options["classes"] = NAMES
    return kind(palette, side, examples=own, augment=False, **options)


def model_of(task, **change):
    torch.manual_seed(0)
    if isinstance(task, ImageSequenceClassification):
        return IGPTClassifier(IGPTClassifierConfig(**SMALL, num_classes=2))
    return IGPT(replace(IGPTConfig(**SMALL), **change))


def batch_of(task, split="train"):
    rows = task.dataset(split)
    return task.collate([rows[i] for i in range(len(rows))])


# ---- the palette


def test_each_pixel_gets_the_nearest_colour():
    images = 2 * torch.rand(3, 3, 5, 4) - 1
    palette = ColourPalette(2 * torch.rand(50, 3) - 1)
    ids = palette.encode(images)
    pixels = images.permute(0, 2, 3, 1).reshape(3, 20, 3)
    assert torch.equal(ids, torch.cdist(pixels, palette.colours[None]).argmin(-1))
    again = palette.decode(ids, 5, 4)
    assert torch.equal(palette.encode(again), ids) and again.shape == images.shape


def test_the_palette_of_few_colours_is_found():
    colours = torch.tensor([[-0.9, 0.1, 0.5], [0.2, -0.4, 0.0], [0.8, 0.7, 0.6]])
    images = colours[torch.randint(3, (4, 6, 6))].permute(0, 3, 1, 2)
    found = fit_palette(images, 3)
    assert torch.allclose(found.colours, colours, atol=1e-5)  # darkest first
    with pytest.raises(an.InputError, match="4 different colours or more; got 3"):
        fit_palette(images, 4)


def test_palettes_of_others(tmp_path):
    transformers = pytest.importorskip("transformers")
    clusters = (2 * numpy.random.default_rng(0).random((16, 3)) - 1).round(3)
    processor = transformers.ImageGPTImageProcessor(
        clusters=clusters.tolist(), size={"height": 6, "width": 6}
    )
    processor.save_pretrained(tmp_path)
    numpy.save(tmp_path / "kmeans_centers.npy", clusters)
    image = numpy.random.default_rng(1).integers(0, 256, (6, 6, 3)).astype("uint8")
    expected = processor(Image.fromarray(image), return_tensors="pt")["input_ids"]
    x = torch.tensor(image).permute(2, 0, 1)[None] / 127.5 - 1
    for path in (tmp_path, tmp_path / "kmeans_centers.npy"):
        assert torch.equal(read_palette(path).encode(x), expected.view(1, -1))


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "colours", [[[0.0, 0.0]], [[0.0]], [[3.0], [0.0]], 5, "x"], ids=str
)
def test_what_is_no_palette(colours, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"clusters": colours})
    )
    with pytest.raises(an.CheckpointError, match="could not use the palette"):
        read_palette(tmp_path)


def test_no_palette_there(tmp_path):
    for path in (tmp_path, tmp_path / "x.npy"):
        with pytest.raises(an.CheckpointError, match="expected a palette"):
            read_palette(path)


@pytest.mark.no_shapes
def test_images_that_do_not_fit_the_palette():
    with pytest.raises(an.InputError, match="^images: expected .b 1 h w"):
        GREYS.encode(torch.zeros(2, 3, 4, 4))
    with pytest.raises(an.InputError, match="^ids: "):
        GREYS.decode(torch.full((1, 16), 4), 4, 4)
    with pytest.raises(an.InputError, match="^ids: expected 4 x 4 = 16 pixels"):
        GREYS.decode(torch.zeros(1, 9, dtype=torch.long), 4, 4)


# ---- the tasks


@pytest.mark.parametrize("kind", [ImageGeneration, ImageSequenceClassification])
def test_it_is_a_task(kind):
    task = task_of(kind)
    assert isinstance(task, Task)
    assert kind_of_data("mnist", task.kind) == task.kind
    batch = batch_of(task)
    assert torch.equal(batch["input_ids"][:, 1:], batch["pixels"][:, :-1])
    assert (batch["input_ids"][:, 0] == len(GREYS)).all()
    images = task.palette.decode(batch["pixels"], 4, 4)
    true = examples()[0] / 127.5 - 1
    assert (images - true).abs().max() < 0.36
    recipe = Recipe(max_steps=2, batch_size=3, checkpoint_every=None)
    train(model_of(task), task, recipe, progress=False)
    assert all(map(math.isfinite, task.evaluate(model_of(task)).values()))


def test_a_model_says_side_and_colours():
    own = {"train": examples(20, side=8), "valid": examples(4, side=8)}
    task = ImageGeneration(None, None, examples=own, augment=False)
    sizes = task.overrides(IGPTConfig(**SMALL))
    assert sizes == {"vocab_size": 5, "max_position_embeddings": 16}
    assert (task.side, len(task.palette)) == (4, 4)
    assert batch_of(task)["pixels"].shape == (20, 16)
    with pytest.raises(an.ConfigError, match="a square image; got 12"):
        ImageGeneration(GREYS).overrides(
            IGPTConfig(**SMALL | {"max_position_embeddings": 12})
        )


def test_a_fresh_model_guesses():
    task = task_of()
    scores = task.evaluate(model_of(task))
    assert scores["bits_per_pixel"] == pytest.approx(2)  # four greys, a head of zeros
    assert scores["loss"] == pytest.approx(math.log(4))


def test_both_losses_or_one():
    task = task_of(ImageSequenceClassification)
    model, batch = model_of(task).train(), batch_of(task)
    torch.nn.init.normal_(model.head.weight)
    losses, counts = task.loss(model, batch), task.counts(batch)
    assert counts == {"class": 6, "next_pixel": 96} and losses.keys() == counts.keys()
    logits = model(batch["input_ids"]).pixel_logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch["pixels"].flatten())
    assert torch.allclose(losses["next_pixel"][0] / 96, expected)
    task.generative_weight = 0.0
    assert task.loss(model, batch).keys() == task.counts(batch).keys() == {"class"}


def test_pixels_are_drawn():
    """Each row for itself; the likeliest ones at a temperature of 0."""
    task, model = task_of(), model_of(task_of())
    torch.nn.init.normal_(model.head.weight, std=0.1)
    pixels = task.read_pixels([*examples(1)[0]]).repeat(6, 1)
    assert len(task.complete(model, pixels, 4).unique(dim=0)) > 3
    assert len(task.complete(model, pixels, 4, temperature=0).unique(dim=0)) == 1


def test_half_an_image_is_kept():
    task, model = task_of(), model_of(task_of())
    torch.nn.init.normal_(model.head.weight, std=0.3)
    images = [*examples(3)[0]]
    found = task.predict(model, images, seed=1)
    again = task.predict(model, images, seed=1)
    for one, same, image in zip(found, again, images, strict=True):
        assert one.size == (4, 4) and one.tobytes() == same.tobytes()
        ids = task.read_pixels([image])[0]
        assert one.tobytes()[:8] == task.picture(ids).tobytes()[:8]
    whole = task.predict(model, images, kept_rows=4)
    assert whole[0].tobytes() == task.picture(task.read_pixels(images)[0]).tobytes()
    assert len({x.tobytes() for x in task.predict(model, images[:1] * 8)}) > 1
    assert task.predict(model, []) == []


def test_saved_and_read_back(tmp_path):
    for kind in (ImageGeneration, ImageSequenceClassification):
        task = task_of(kind)
        task.save(tmp_path)
        again = load_task(tmp_path)
        assert type(again) is kind and again.side == 4
        assert torch.allclose(again.palette.colours, GREYS.colours)
        assert again.classes == task.classes


def test_a_folder_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    clusters = (2 * numpy.random.default_rng(0).random((4, 3)) - 1).tolist()
    size = {"height": 4, "width": 4}
    transformers.ImageGPTImageProcessor(clusters=clusters, size=size).save_pretrained(
        tmp_path
    )
    sizes = dict(vocab_size=5, n_embd=12, n_layer=1, n_head=3, n_positions=16)
    transformers.ImageGPTForCausalImageModeling(
        transformers.ImageGPTConfig(**sizes)
    ).save_pretrained(tmp_path)
    info, model = an.model_info("igpt_small"), an.create_model("igpt_small", tmp_path)
    task = ImageGeneration.of_model(info, tmp_path)
    (image,) = task.predict(model, [torch.zeros(3, 9, 7, dtype=torch.uint8)])
    assert image.size == (4, 4) and image.mode == "RGB"
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(an.CheckpointError, match="expected a folder with a palette"):
        ImageGeneration.of_model(info, tmp_path)


def test_a_palette_of_the_wrong_size():
    task = task_of()
    with pytest.raises(an.ConfigError, match="^vocab_size: expected 5, .*4 colours"):
        task.evaluate(model_of(task, vocab_size=9))
    with pytest.raises(an.ConfigError, match="^max_position_embeddings: expected 16"):
        task.predict(model_of(task, max_position_embeddings=25), [examples()[0][0]])
    with pytest.raises(an.ConfigError, match="^palette: expected 3 channels"):
        create_task("image_generation", "photographs", preprocessing=GREYS)


def test_what_is_no_image_is_named(tmp_path):
    task, file = task_of(), tmp_path / "broken.png"
    file.write_bytes(b"no image")
    with pytest.raises(an.InputError, match="broken.png: expected an image"):
        task.predict(model_of(task), [examples()[0][0], str(file)])


def test_the_answers_are_one_picture(tmp_path):
    task = task_of()
    images = [task.picture(x) for x in batch_of(task)["pixels"][:3]]
    for name in ("sheet.png", "sheet"):
        answers = [*images[:2], an.InputError("one was refused"), images[2]]
        task.write_answers(answers, tmp_path / name)
        with Image.open(tmp_path / name) as sheet:
            assert sheet.size == (12, 4)
            assert sheet.crop((8, 0, 12, 4)).tobytes() == images[2].tobytes()
