"""Classifiers of images at the command line: files and folders of images, what is no
image among them, and weights that come in a folder, in another library's, or alone."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from attn_notes.data import tasks
from attn_notes.data.image_sets import image_set, imagenet_names
from attn_notes.foundations.checks import ConfigError
from attn_notes.zoo.factory import create_model

NAMES = {0: "a cat", 1: "a dog", 2: "a van", 3: "a bus", 4: "a man", 5: "a sea"}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of three images, one that is cut short, and a text."""
    folder = tmp_path_factory.mktemp("photographs")
    images = image_set("photographs", "valid")[0]
    for i, name in enumerate(("a.png", "b.JPG", "d.webp")):
        image = Image.fromarray(images[400 * i].permute(1, 2, 0).numpy())
        image.save(folder / name)
    cut = (folder / "b.JPG").read_bytes()
    (folder / "c.jpg").write_bytes(cut[: len(cut) // 2])
    (folder / "list.txt").write_text("a cat")
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A ViT of transformers with its preprocessing, as on the hub."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("vit-tiny")
    config = transformers.ViTConfig(
        image_size=24,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        id2label=NAMES,
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.eval().save_pretrained(folder)
    processor = transformers.ViTImageProcessor(size={"height": 24, "width": 24})
    processor.save_pretrained(folder)
    return model, processor, folder


NAME = "vit_base_patch16_224"


def test_files_and_folders(theirs, photographs, run, capsys):
    """One line an image; a file that is none costs its own."""
    model, processor, folder = theirs
    argv = "predict", NAME, "--pretrained", folder
    assert run(*argv, photographs / "a.png", photographs) == 1
    said = capsys.readouterr()
    lines = said.out.split("\n")
    named = [line.split(": ")[0] for line in lines]
    expected = [str(photographs / name) for name in ("a.png", "b.JPG", "d.webp")]
    assert named == [expected[0], expected[0], expected[1], "", expected[2], ""]
    assert said.err.count("\n") == 1 and "c.jpg: expected an image; could" in said.err
    assert said.err.startswith("attn-notes: input 2: ")
    image = processor(Image.open(photographs / "a.png"), return_tensors="pt")
    shares = model(**image).logits.softmax(-1)[0]
    best = shares.argsort(descending=True)[:5].tolist()
    answer = [part.rsplit(" ", 1) for part in lines[0].split(": ")[1].split(", ")]
    assert [name for name, _ in answer] == [NAMES[i] for i in best]
    for i, (_, share) in zip(best, answer, strict=True):
        assert abs(float(share.removesuffix("%")) / 100 - shares[i]) < 0.01


def test_more_images_than_a_batch(theirs, photographs, run, capsys, tmp_path):
    for i in range(70):
        shutil.copy(photographs / "a.png", tmp_path / f"{i:02}.png")
    shutil.copy(photographs / "c.jpg", tmp_path / "65.png")
    argv = "predict", NAME, "--pretrained", theirs[2], "--output", tmp_path / "said.txt"
    assert run(*argv, tmp_path) == 1
    lines = (tmp_path / "said.txt").read_text().split("\n")
    assert len(lines) == 71 and [i for i, x in enumerate(lines) if not x] == [65, 70]
    assert len({line.split(": ")[-1] for line in lines}) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "given, said",
    [
        ("absent.jpg", "expected an image; got no file"),
        ("list.txt", "expected an image; got another file"),
        ("empty", "expected images in the folder; got none"),
        ("", "path: expected a file or folder"),
        ("a\0b", "path: expected a file or folder"),
        ("x" * 5000, "path: expected a file or folder"),
    ],
)
def test_what_is_no_image(theirs, photographs, run, refused, capsys, given, said):
    (photographs / "empty").mkdir(exist_ok=True)
    path = photographs / given if given.isascii() and len(given) < 99 else given
    path = given if not given or "\0" in given else path
    argv = "predict", NAME, "--pretrained", theirs[2]
    assert said in refused(*argv, path)
    assert run(*argv, photographs / "a.png", path) == 1
    seen = capsys.readouterr()
    assert seen.out.count("\n") == 2 and seen.err.startswith("attn-notes: input 2: ")


def imagenet(tmp_path, **config):
    """A small ViT of 1,000 classes in a native folder, without a task."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = create_model(NAME, **{**sizes, **config})
    torch.nn.init.normal_(model.head.weight)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def test_a_folder_without_a_task_has_the_classes_of_imagenet(
    photographs, ask, refused, tmp_path
):
    model, folder = imagenet(tmp_path)
    (line,) = ask("predict", NAME, "--pretrained", folder, photographs / "a.png")
    names = line.split(": ")[1]
    first = next(name for name in imagenet_names() if names.startswith(f"{name} "))
    image = Image.open(photographs / "a.png").resize((224, 224), Image.BILINEAR)
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    best = model.eval()(values[None]).argmax()
    assert first == imagenet_names()[best]
    _, folder = imagenet(tmp_path / "few", num_classes=7)
    said = refused("predict", NAME, "--pretrained", folder, photographs / "a.png")
    assert "expected the names of two or more classes" in said


def test_a_single_file(photographs, ask, refused, tmp_path):
    """Of the classes that the name says, or it is refused."""
    model = create_model("vit_tiny_patch16_224")
    path = tmp_path / "weights.pt"
    torch.save(model.state_dict(), path)
    predict = "predict", "vit_tiny_patch16_224", "--pretrained"
    (line,) = ask(*predict, path, photographs / "a.png")
    assert line.count(" 0.1%") == 5
    torch.save(
        {k: v[:7] if "head" in k else v for k, v in model.state_dict().items()}, path
    )
    assert "re-initialized" in refused(*predict, path, photographs / "a.png")


TRAIN = "train", "vit_book", "--max-steps", 3


@pytest.mark.slow
def test_train_and_predict(run, ask, capsys, tmp_path):
    assert run(*TRAIN, "--data", "digits", "--output", tmp_path / "run") == 0
    assert "valid_top5_accuracy" in capsys.readouterr().out
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (stored["img_size"], stored["in_chans"]) == (8, 1)
    image = Image.fromarray(image_set("digits", "valid")[0][0, 0].numpy())
    image.save(tmp_path / "digit.png")
    argv = "predict", "vit_book", "--pretrained", tmp_path / "run"
    (line,) = ask(*argv, tmp_path / "digit.png")
    assert line.count("%") == 5


def folder_of_classes(root, classes=("n01", "n02"), size=40):
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = random.integers(0, 255, (size, size + 9, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.jpg")
    (root / "synset_words.txt").write_text("n01 tench, Tinca\nn02 goldfish\n")
    return root


@pytest.mark.slow
def test_fine_tuning_from_a_folder_at_another_size(theirs, run, ask, capsys, tmp_path):
    data = folder_of_classes(tmp_path / "data")
    train = "train", NAME, "--data", "imagenet", "--data-dir", data, "--max-steps", 2
    given = "--pretrained", theirs[2], "--recipe", "fine_tuning", "--image-size", 32
    assert run(*train, *given, "--output", tmp_path / "run") == 0
    said = capsys.readouterr().err
    assert "interpolated from 3 x 3 to 4 x 4" in said and "re-initialized" in said
    task = json.loads((tmp_path / "run" / "task.json").read_text())
    assert task["classes"] == ["tench, Tinca", "goldfish"]
    assert task["preprocessing"]["size"] == [32, 32]
    argv = "predict", NAME, "--pretrained", tmp_path / "run", data / "val" / "n01"
    assert len(ask(*argv)) == 4


@pytest.mark.no_shapes
def test_training_that_is_refused(refused, tmp_path):
    out = "--output", tmp_path / "run"
    said = refused(*TRAIN, *out, "--data", "imagenet")
    assert "expected a folder with train/ and val/" in said
    assert "image_size" in refused(*TRAIN, *out, "--image-size", 32)
    assert "data_dir" in refused(*TRAIN, *out, "--data-dir", tmp_path)
    assert "max_tokens" in refused(*TRAIN, *out, "--max-tokens", 9)
    said = refused("train", "gpt_book", *out, "--data", "mnist")
    assert "mnist serves image_classification" in said


@pytest.mark.no_shapes
@pytest.mark.parametrize("option", ["max_tokens", "image_size"])
def test_options_reach_the_task(refused, monkeypatch, tmp_path, option):
    """The first was parsed, and forgotten."""

    def refuse(kind, name, **given):
        raise ConfigError(str(given))

    monkeypatch.setattr(tasks, "create_task", refuse)
    given = f"--{option.replace('_', '-')}", 9, "--output", tmp_path / "run"
    assert f"'{option}': 9" in refused("train", "bert_book_sequence", *given)


def test_half_an_image_is_completed(run, refused, capsys, tmp_path):
    image = Image.fromarray(image_set("mnist", "valid")[0][0, 0].numpy())
    image.save(tmp_path / "digit.png")
    argv = "predict", "igpt_book", tmp_path / "digit.png"
    assert "--output: expected a file" in refused(*argv)
    other = "--output", tmp_path / "completed.text"  # said before any work
    assert "expected the name of an image" in refused(*argv, *other)
    output = "--output", tmp_path / "completed.png"
    assert run(*argv, tmp_path / "nothing.png", *output, "--seed", 1) == 1
    assert "nothing.png: expected an image" in capsys.readouterr().err
    with Image.open(tmp_path / "completed.png") as found:
        assert found.size == (14, 14)


@pytest.mark.slow
def test_fine_tuning_of_a_pixel_model(run, ask, capsys, tmp_path):
    """It keeps the palette of the folder that it begins with."""
    argv = "train", "igpt_book_classifier", "--max-steps", 2, "--data", "digits"
    first = "train", "igpt_book", "--max-steps", 2, "--data", "digits"
    assert run(*first, "--output", tmp_path / "pixels") == 0
    begin = "--pretrained", tmp_path / "pixels"
    assert run(*argv, *begin, "--output", tmp_path / "classes") == 0
    palettes = [
        json.loads((tmp_path / name / "task.json").read_text())["palette"]
        for name in ("pixels", "classes")
    ]
    assert palettes[0] == palettes[1]
    image = Image.fromarray(image_set("digits", "valid")[0][0, 0].numpy())
    image.save(tmp_path / "digit.png")
    folder = "--pretrained", tmp_path / "classes"
    (line,) = ask("predict", "igpt_book_classifier", *folder, tmp_path / "digit.png")
    assert line.count("%") == 5
