"""Augmentation of images: what it does to pictures, batches and labels; it is drawn
anew for every place and process, and nothing held out is touched."""

import numpy as np
import pytest
import torch

from attn_notes.data.image_augmentation import (
    augmented_batch,
    erase_parts,
    mix_images,
    repeated,
    vary_pictures,
)
from attn_notes.data.image_classification import ImageClassification
from attn_notes.data.images import Preprocessing
from attn_notes.foundations import checks
from attn_notes.foundations.checks import ConfigError
from attn_notes.training.processes import Processes
from attn_notes.training.recipes import Augmentation, Recipe
from attn_notes.training.stream import BatchStream, seeded

DEIT = Augmentation("rand-m9-mstd0.5-inc1", 0.0, 0.25, 0.8, 1.0, 3)
GREY = Preprocessing((12, 10), 12, mean=(0.4,), std=(0.3,))
COLOURS = Preprocessing((12, 10), 12, mean=(0.4,) * 3, std=(0.3,) * 3)
both = pytest.mark.parametrize("p", [GREY, COLOURS], ids=["grey", "colours"])


def pictures(p, n=6, seed=0):
    random = torch.Generator().manual_seed(seed)
    shape = (n, p.channels, *p.size)
    return torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)


def task(p=GREY, n=30, augment=True):
    splits = {s: (pictures(p, n, i), torch.arange(n) % 4) for i, s in
              enumerate(("train", "valid"))}  # fmt: skip
    return ImageClassification([*"abcd"], p, examples=splits, augment=augment)


# ---- pictures


@both
@pytest.mark.parametrize(
    "how",
    [Augmentation("rand-m9-mstd0.5-inc1"), Augmentation(color_jitter=0.4)],
    ids=["RandAugment", "jitter"],
)
def test_pictures_are_varied_by_the_seed_alone(p, how):
    images, found = pictures(p), []
    for seed in (0, 0, 1):
        with seeded(seed):
            found.append(vary_pictures(images, how, p))
    assert found[0].shape == images.shape and found[0].dtype == torch.uint8
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], images)


def test_rand_augment_is_timms():
    timm = pytest.importorskip("timm")
    transform = timm.data.create_transform(
        (12, 10), True, auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.3,
        interpolation="bilinear", mean=COLOURS.mean, std=COLOURS.std, separate=True,
    )[1]  # fmt: skip
    images, how = pictures(COLOURS, 20), Augmentation("rand-m9-mstd0.5-inc1")
    with seeded(3):
        found = vary_pictures(images, how, COLOURS)
    from attn_notes.data.images import as_picture

    with seeded(3):
        expected = [np.asarray(transform(as_picture(image))) for image in images]
    assert torch.equal(found, torch.from_numpy(np.stack(expected)).permute(0, 3, 1, 2))


def test_of_a_picture_some_bits_are_left():
    """At magnitude 10, which the noise on 9 reaches, timm asks Pillow for none."""
    with seeded(0):
        found = vary_pictures(pictures(GREY, 300), Augmentation("rand-m10-inc1"), GREY)
    assert len(found) == 300


# ---- batches


def test_a_part_is_noise_and_the_rest_as_it_was():
    images = torch.full((200, 3, 20, 20), 9.0)
    with seeded(0):
        found = erase_parts(images.clone(), Augmentation(random_erasing=0.25))
    changed = (found != images).any(1)
    erased = changed.flatten(1).any(1)
    assert 0.15 < erased.double().mean() < 0.35
    assert found[~erased].equal(images[~erased])
    share = changed[erased].double().mean((1, 2))
    assert 0.01 < share.min() and share.max() < 0.4
    noise = found.movedim(1, -1)[changed]
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


@pytest.mark.parametrize("n", [6, 7, 1])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_images_and_their_shares(kind, n):
    """The label has the share of each image that is in the picture."""
    images, labels = torch.arange(1.0, n + 1).repeat_interleave(4 * 64), torch.arange(n)
    images = images.view(n, 4, 8, 8)
    with seeded(2):
        found, shares = mix_images(images.clone(), labels, Augmentation(**{kind: 1}), n)
    assert torch.allclose(shares.sum(-1), torch.ones(n))
    values = (shares * torch.arange(1.0, n + 1)).sum(-1)
    assert torch.allclose(found.mean((1, 2, 3)), values, atol=1e-5)
    whole = found.flatten(1).unique(dim=1).shape[1] == 1
    assert whole == (kind == "mixup" or n == 1)
    partner = shares.clone().fill_diagonal_(0).argmax(-1)
    mixed = shares.max(-1).values < 1 - 1e-6
    n += n % 2  # of an odd batch, the first stands in for the one that lacks
    assert torch.equal(partner[mixed], (n - 1 - labels)[mixed])
    assert mixed.sum() >= len(labels) - 2 + len(labels) % 2 * 1 or len(labels) == 1


def test_one_in_two_batches_is_mixed_in_either_way():
    images, labels, cut = torch.zeros(2, 1, 9, 9), torch.arange(2), 0
    images[1] = 1.0
    for seed in range(200):
        with seeded(seed):
            found, _ = mix_images(images.clone(), labels, DEIT, 2)
        cut += found[0].unique().numel() > 1 or bool((found[0] == 1).all())
    assert 70 < cut < 130


@both
def test_nothing_asked_for_is_nothing_done(p):
    images, labels = pictures(p), torch.arange(6)
    batch = augmented_batch(images, labels, Augmentation(repeats=3), p, 6)
    assert torch.equal(batch["images"], p.normalize(images))
    assert torch.equal(batch["labels"], labels)


# ---- in training


def shares(world_size, task, recipe, count=2):
    """What each process gets of the first batches."""
    found = []
    for rank in range(world_size):
        process = Processes(0, 1)
        process.rank, process.world_size = rank, world_size
        stream = BatchStream(task, recipe, process, None)
        opened = stream.open()
        found.append([next(opened).batch for _ in range(count)])
        opened.close()
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_copies_of_an_image_differ(world_size):
    """Whatever process they are in, and from one epoch to the next."""
    how = Augmentation("rand-m9-mstd0.5-inc1", random_erasing=0.9, repeats=3)
    recipe, given = Recipe(batch_size=30, augmentation=how), task()
    given.setup(recipe)
    batches = given.batches(0)
    assert [len(b) for b in batches] == [30]
    assert set(np.unique(batches[0], return_counts=True)[1]) == {3}
    assert not np.array_equal(batches[0], given.batches(1)[0])
    found = shares(world_size, given, recipe)
    for epoch in (0, 1):
        of = {}
        for rank, mine in enumerate(found):
            numbers = given.batches(epoch)[0][rank::world_size]
            assert len(numbers) == len(mine[epoch]["images"])
            for i, image in zip(numbers, mine[epoch]["images"], strict=True):
                of.setdefault(int(i), []).append(image)
        alike = [torch.equal(a, b) for x in of.values() for a, b in zip(x, x[1:])]  # noqa: B905
        assert np.mean(alike) < 0.2
    again = shares(world_size, given, recipe)
    assert torch.equal(again[0][1]["images"], found[0][1]["images"])


def test_held_out_images_and_a_task_without_are_left_alone():
    recipe, given = Recipe(augmentation=DEIT), task()
    given.setup(recipe)
    rows = given.dataset("valid")
    some = [rows[i] for i in range(8)]
    batch = given.collate(some)
    plain = GREY.normalize(torch.stack([image for image, _, _ in some]))
    assert torch.equal(batch["images"], plain) and batch["labels"].ndim == 1
    still = task(augment=False)
    still.setup(recipe)
    rows = still.dataset("train")
    assert still.collate([rows[i] for i in range(8)])["labels"].ndim == 1
    assert len(np.unique(np.concatenate(still.batches(0)))) == 30


def test_a_batch_for_training():
    given = task(COLOURS)
    given.setup(Recipe(batch_size=9, augmentation=DEIT))
    rows = given.dataset("train")
    batch = given.collate([rows[int(i)] for i in given.batches(0)[0]])
    assert batch["images"].shape == (9, 3, 12, 10) and batch["labels"].shape == (9, 4)
    assert given.counts(batch) == {"class": 9}


def test_repeats():
    order = np.random.default_rng(0).permutation(8)
    assert repeated(order, None) is order
    found = repeated(order, Augmentation(repeats=3))
    assert found.tolist() == [x for x in order for _ in range(3)][:8]


# ---- bad input


@pytest.mark.parametrize(
    "change",
    [
        dict(rand_augment="rand-x9"),
        dict(rand_augment="v0"),
        dict(color_jitter=-0.1),
        dict(random_erasing=1.5),
        dict(mixup=float("nan")),
        dict(cutmix="1.0"),
        dict(repeats=0),
        dict(rand_augment="rand-m9", color_jitter=0.3),
    ],
    ids=str,
)
@pytest.mark.no_shapes
def test_impossible_augmentations(change):
    name = [*change][-1]
    with pytest.raises(ConfigError, match=f"augmentation: {name}: expected .*; got"):
        Augmentation(**change)
    with pytest.raises(ConfigError, match="recipe: augmentation: expected"):
        Recipe(augmentation=change)


@pytest.mark.parametrize(
    "how", [DEIT, Augmentation(mixup=1.0)], ids=["pictures", "mix"]
)
def test_what_lacks_is_named_before_training(monkeypatch, how):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"timm.*pip install 'attn_notes\[train\]'"):
        task().setup(Recipe(augmentation=how))
    task().setup(Recipe(augmentation=Augmentation(color_jitter=0.1, repeats=2)))
