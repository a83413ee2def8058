"""Images with boxes: sizes as the reference's, and objects that go where pixels go."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import masks_to_boxes

from attn_notes.data.boxes import (
    BoxAugmentation,
    BoxPreprocessing,
    fit_picture,
    real_sizes,
)
from attn_notes.data.scenes import scenes
from attn_notes.foundations.checks import ConfigError
from attn_notes.foundations.masks import pad_images

NOTHING = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


def picture(height, width, seed=0):
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 255, (height, width, 3), np.uint8))


def test_sizes_are_those_of_transformers():
    transforms = pytest.importorskip("transformers.image_transforms")
    random, own = np.random.default_rng(0), BoxPreprocessing()
    for h, w in random.integers(20, 3000, (2000, 2)).tolist():
        theirs = transforms.get_size_with_aspect_ratio((h, w), 800, 1333)
        assert own.size(h, w) == tuple(theirs)


@pytest.mark.parametrize("size", [(40, 61), (90, 33), (32, 32), (20, 70)])
def test_an_image_is_that_of_transformers(size):
    transformers = pytest.importorskip("transformers")
    own = BoxPreprocessing(32, 60)
    processor = transformers.DetrImageProcessor(
        size={"shortest_edge": 32, "longest_edge": 60}
    )
    theirs = processor(picture(*size), return_tensors="pt")["pixel_values"][0]
    image, _ = fit_picture(picture(*size), NOTHING, own)
    assert image.shape == theirs.shape
    torch.testing.assert_close(own.normalize(image), theirs, atol=0.02, rtol=0)


@pytest.mark.parametrize("seed", range(12))
def test_objects_go_where_their_pixels_go(seed):
    """Mirrored, cropped and resized: boxes stay around masks, and the digits' classes
    with them."""
    image, target = scenes("train", 1, start=seed)[0]
    torch.manual_seed(seed)
    own = BoxPreprocessing(160, 300)
    found, left = fit_picture(image, target, own, BoxAugmentation())
    n, (h, w) = len(left["labels"]), found.shape[1:]
    assert left["boxes"].shape == (n, 4) and left["masks"].shape == (n, h, w)
    assert left["area"].shape == (n,) and type(left["boxes"]) is torch.Tensor
    assert min(h, w) <= 160
    if n:
        around = masks_to_boxes(left["masks"]) + torch.tensor([0, 0, 1, 1])
        assert (left["boxes"] - around).abs().max() < 5  # of scaled pixels
        assert left["boxes"].min() >= 0 and (left["boxes"][:, 2] <= w).all()
        assert (left["boxes"][:, 2:] > left["boxes"][:, :2]).all()
    assert {*left["labels"].tolist()} <= {*target["labels"].tolist()}


def test_the_papers_sides():
    sides = set()
    torch.manual_seed(0)
    for _ in range(60):
        image, _ = fit_picture(
            picture(96, 96), NOTHING, BoxPreprocessing(80, 133), BoxAugmentation()
        )
        sides.add(min(image.shape[1:]))
    assert sides <= {*range(48, 81)} and {48, 80} <= sides
    plain, _ = fit_picture(picture(96, 96), NOTHING, BoxPreprocessing(80, 133))
    assert plain.shape == (3, 80, 80)


def test_an_image_of_the_right_size_is_left_alone():
    image = scenes("train", 1).images[0]
    found, _ = fit_picture(image, NOTHING, BoxPreprocessing(64, 107))
    assert found.equal(image)


def test_the_sizes_of_a_padded_batch():
    _, mask = pad_images([torch.ones(3, 5, 7), torch.ones(3, 6, 2)])
    assert real_sizes(mask).tolist() == [[5, 7], [6, 2]]


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "made, options",
    [
        (BoxPreprocessing, {"shortest": 0}),
        (BoxPreprocessing, {"longest": 799}),
        (BoxPreprocessing, {"mean": (0.5,)}),
        (BoxPreprocessing, {"std": (0.5, 0.5, 0.0)}),
        (BoxAugmentation, {"shortest": ()}),
        (BoxAugmentation, {"crop": (9, 8)}),
    ],
)
def test_impossible_values(made, options):
    with pytest.raises(ConfigError, match=[*options][0]):
        made(**options)
