"""Files of images as people see them, and pictures as models read them."""

import json
import struct
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from skimage import data

from attn_notes.data.images import (
    Preprocessing,
    as_picture,
    evaluation_transform,
    model_preprocessing,
    open_image,
    processor_preprocessing,
    random_flip,
    random_shift,
    timm_preprocessing,
    training_transform,
)
from attn_notes.foundations.checks import CheckpointError, ConfigError, InputError
from attn_notes.zoo.registry import model_info, override

CAT = Image.fromarray(data.chelsea()[60:188, 100:260])  # 160 x 128
GREY = np.asarray(CAT.convert("L"))


def saved(tmp_path, name, image, **options):
    image.save(tmp_path / name, **options)
    return open_image(tmp_path / name)


def distance(picture, other=CAT):
    """The mean difference of two pictures, in steps of 255."""
    assert picture.mode == "RGB" and picture.size == other.size
    first, second = (np.asarray(x.convert("RGB"), float) for x in (picture, other))
    return np.abs(first - second).mean()


# files


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.PNG"])
def test_a_picture_without_loss(tmp_path, name):
    assert distance(saved(tmp_path, name, CAT)) == 0


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LAB", "YCbCr"])
def test_modes(tmp_path, mode):
    image = CAT.convert(mode) if mode != "LAB" else CAT.convert("L")
    endings = {"CMYK": "jpg", "YCbCr": "jpg"}
    name = f"a.{endings.get(mode, 'png')}"
    found = saved(tmp_path, name, image, quality=95)
    expected = CAT if mode in endings else image
    assert distance(found, expected) < (4 if mode in endings else 0.01)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits(tmp_path, name):
    wide = Image.fromarray(GREY.astype(np.uint16) * 257)
    assert distance(saved(tmp_path, name, wide), Image.fromarray(GREY)) == 0


@pytest.mark.parametrize("turn", range(1, 9))
def test_cameras_that_were_held_otherwise(tmp_path, turn):
    lie = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what the tag undoes
    image = CAT if turn == 1 else CAT.transpose(Image.Transpose(lie[turn]))
    exif = Image.Exif()
    exif[0x0112] = turn
    assert distance(saved(tmp_path, "a.png", image, exif=exif)) == 0


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "one colour", "gif"])
def test_what_is_transparent_is_white(tmp_path, kind):
    """The half that is hidden is black underneath."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, 4:] = 200, 200, 200, 255
    image, options = Image.fromarray(pixels), {}
    if kind == "LA":
        image = image.convert("LA")
    elif kind != "RGBA":
        image = image.convert("RGB")
        image = image.quantize(4) if kind != "one colour" else image
        index = image.getpixel((0, 0))
        options = {"transparency": index}
    found = saved(tmp_path, "a.gif" if kind == "gif" else "a.png", image, **options)
    values = np.asarray(found)
    assert (values[:, :4] == 255).all() and (values[:, 4:] == 200).all()


def test_of_several_frames_the_first(tmp_path):
    other = Image.new("RGB", CAT.size)
    for name in ("a.gif", "a.tif", "a.webp"):
        found = saved(tmp_path, name, CAT, save_all=True, append_images=[other])
        assert distance(found) < 12


WRONG = {
    "cut.jpg": "could not read it: image file is truncated",
    "cut.png": "could not read it",
    "text.png": "got another file",
    "empty.jpg": "got another file",
    "absent.jpg": "got no file",
    "folder": "got a folder",
    "wide.tif": "its numbers are not of 8 or 16 bits",
    "float.tif": "its numbers are not of 8 or 16 bits",
    "huge.png": "could not read it: Image size",
}


@pytest.fixture
def wrong(tmp_path):
    """Files that are no images."""
    for ending in ("jpg", "png"):
        CAT.save(path := tmp_path / f"cut.{ending}")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "text.png").write_text("a cat")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder").mkdir()
    Image.fromarray(GREY.astype(np.int32) * 100_000).save(tmp_path / "wide.tif")
    Image.fromarray(GREY.astype(np.float32)).save(tmp_path / "float.tif")
    CAT.save(path := tmp_path / "huge.png")
    head = bytearray(path.read_bytes())
    head[16:24] = struct.pack(">II", 100_000, 100_000)
    path.write_bytes(head)
    return tmp_path


@pytest.mark.no_shapes
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", WRONG)
def test_files_that_are_no_images(wrong, name):
    with pytest.raises(InputError) as error:
        open_image(wrong / name)
    said = str(error.value)
    assert said.startswith(f"{wrong / name}: expected an image; ") and "\n" not in said
    assert WRONG[name] in said or name == "huge.png"


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "image, said",
    [
        (3, "inputs: expected a file, a picture, or bytes .* got int"),
        (torch.zeros(3, 4, 4), "got float32 of shape"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), "got uint8 of shape"),
        (torch.zeros(3, 0, 4, dtype=torch.uint8), "got uint8 of shape"),
        (np.zeros((4, 4, 3), np.uint8), "got uint8 of shape"),
        ("a\0b", "expected a file or folder"),
        ("a" * 5000, "expected a file or folder"),
    ],
)
def test_what_is_no_picture(image, said):
    with pytest.raises(InputError, match=said):
        as_picture(image, "inputs")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_in_any_form(tmp_path, channels):
    image = CAT.convert("L") if channels == 1 else CAT
    values = torch.from_numpy(np.array(image)).reshape(128, 160, channels)
    assert distance(as_picture(values.permute(2, 0, 1)), image) == 0
    assert distance(as_picture(image), image) == 0
    image.save(tmp_path / "a.png")
    assert distance(as_picture(str(tmp_path / "a.png")), image) == 0


# from a picture to numbers


def timm_numbers(cfg, picture):
    timm = pytest.importorskip("timm")
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config(pretrained_cfg=cfg)
    )
    return transform(picture)


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("size, crop_pct", [(32, 0.9), (48, 1.0), (160, 0.875)])
def test_numbers_are_timms(size, crop_pct, mode):
    cfg = {
        "input_size": (3, size, size),
        "crop_pct": crop_pct,
        "crop_mode": mode,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }
    ours = timm_preprocessing(cfg)
    for picture in (CAT, CAT.transpose(Image.Transpose.ROTATE_90)):
        found = ours.normalize(evaluation_transform(ours)(picture)[None])[0]
        torch.testing.assert_close(found, timm_numbers(cfg, picture))


@pytest.mark.parametrize(
    "options",
    [
        {"size": {"height": 40, "width": 24}},
        {"size": {"height": 40, "width": 40}, "resample": 3, "do_normalize": False},
        {
            "size": {"height": 40, "width": 40},
            "do_center_crop": True,
            "crop_size": {"height": 32, "width": 32},
        },
    ],
)
def test_numbers_are_those_of_transformers(tmp_path, options):
    transformers = pytest.importorskip("transformers")
    crops = options.get("do_center_crop")
    name = "DeiTImageProcessor" if crops else "ViTImageProcessor"
    kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    theirs = kind(**options)
    theirs.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    ours = processor_preprocessing(stored)
    found = ours.normalize(evaluation_transform(ours)(CAT)[None])
    expected = theirs(CAT, return_tensors="pt")["pixel_values"]
    assert (found - expected).abs().max() < 0.02  # a step of the rounding at most


def test_numbers_are_torchvisions():
    weights = pytest.importorskip("torchvision.models").ViT_B_16_Weights.IMAGENET1K_V1
    theirs = weights.transforms()
    ours = Preprocessing((224, 224), 256, "bilinear", (*theirs.mean,), (*theirs.std,))
    found = ours.normalize(evaluation_transform(ours)(CAT)[None])[0]
    torch.testing.assert_close(found, theirs(CAT), atol=1e-6, rtol=1e-5)


def test_as_the_registry_says():
    info = model_info("vit_base_patch16_224")
    assert model_preprocessing(info) == Preprocessing()
    info = replace(info, crop_pct=0.9, interpolation="bicubic", mean=(0.4,) * 3)
    found = model_preprocessing(info)
    assert (found.resize, found.interpolation) == (248, "bicubic")
    assert found.mean == (0.4,) * 3 and found.size == (224, 224)


def test_a_grey_model_gets_one_channel():
    grey = Preprocessing((128, 160), (128, 160), mean=(0.25,), std=(0.5,))
    found = evaluation_transform(grey)(CAT)
    assert (found[0].numpy() == GREY).all()
    values = grey.normalize(found[None])
    torch.testing.assert_close(values, (found[None] / 255 - 0.25) / 0.5)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 1))
def test_every_picture_gets_the_size(width, height, stretched):
    p = Preprocessing((24, 32), (24, 32) if stretched else 40)
    for transform in (evaluation_transform(p), training_transform(p)):
        assert transform(CAT.resize((width, height))).shape == (3, 24, 32)


def test_training_draws_from_torch():
    p, seen = Preprocessing((32, 32), 32), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        seen.append(training_transform(p)(CAT))
    assert seen[0].equal(seen[1]) and not seen[0].equal(seen[2])


def test_another_size_keeps_the_share_that_is_cut():
    p = Preprocessing((224, 224), 256).scaled((384, 384))
    assert (p.size, p.resize) == ((384, 384), 439)
    assert Preprocessing().scaled((96, 32)).resize == (96, 32)
    assert override(Preprocessing(), json.loads(json.dumps(asdict(p)))) == p


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "options",
    [
        {"size": (0, 4)},
        {"size": 224},
        {"resize": 100},
        {"resize": (300, 100)},
        {"interpolation": "area"},
        {"mean": (0.5,)},
        {"mean": (0.5,) * 2, "std": (0.5,) * 2},
        {"std": (0.5, 0.5, 0.0)},
        {"mean": (float("nan"),) * 3},
    ],
)
def test_impossible_preprocessing(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Preprocessing(**options)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "stored",
    [
        {},
        {"size": 224, "image_mean": [0.5], "image_std": [0.5, 0.5]},
        {"size": {"longest": 3}, "image_mean": [0.5], "image_std": [0.5]},
        {"size": 8, "image_mean": [0.5], "image_std": [0.5], "rescale_factor": 1},
        {"size": 8, "image_mean": [0.5], "image_std": [0.5], "resample": 7},
        {"size": 8, "image_mean": 3, "image_std": [0.5]},
    ],
)
def test_a_processor_that_is_none(stored):
    with pytest.raises(CheckpointError, match="preprocessor_config.json: expected"):
        processor_preprocessing(stored)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "change", [{"crop_mode": "border"}, {"mean": None}, {"std": 3}]
)
def test_what_timm_asks_for_in_vain(change):
    cfg = {"input_size": (3, 8, 8), "interpolation": "bicubic", "mean": (0.5,) * 3}
    with pytest.raises(CheckpointError, match="pretrained_cfg: expected"):
        timm_preprocessing({**cfg, "std": (0.5,) * 3, **change})


# a batch at once


@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 7), st.integers(0, 3))
def test_images_move_and_nothing_else(b, h, w, most):
    images = torch.randint(0, 256, (b, 2, h, w), dtype=torch.uint8)
    moved = random_shift(images, most)
    padded = torch.nn.functional.pad(images, (most,) * 4)
    for image, wide in zip(moved, padded, strict=True):
        windows = wide.unfold(1, h, 1).unfold(2, w, 1)
        assert (windows == image[:, None, None]).all(-1).all(-1).all(0).any()


def test_all_moves_come():
    images = torch.zeros(2000, 1, 5, 5, dtype=torch.uint8)
    images[:, :, 2, 2] = 1
    places = random_shift(images, 1).flatten(1).argmax(1)
    assert {*places.tolist()} == {6, 7, 8, 11, 12, 13, 16, 17, 18}


def test_one_in_two_is_mirrored():
    images = torch.arange(12, dtype=torch.uint8).view(1, 1, 3, 4).repeat(1000, 3, 1, 1)
    same = (random_flip(images) == images).flatten(1).all(1)
    assert 400 < same.sum() < 600
    assert (random_flip(images).flip(-1).sort(-1).values == images).all()
