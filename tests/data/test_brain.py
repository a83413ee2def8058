"""The average brain, its two parts, and their hard versions."""

import pytest
import torch

from attn_notes.data import brain
from attn_notes.data.brain import (
    HELD_OUT_SIZE,
    PARTS,
    TISSUES,
    BrainRows,
    brain_part,
    brain_template,
    hard_brain,
)
from attn_notes.data.volumes import cut
from attn_notes.foundations.checks import ConfigError

SIZE = (24, 20, 28)


@pytest.fixture(scope="module")
def template():
    return brain_template()


def test_the_template_and_its_tissues(template):
    template, shares = template
    assert template.shape == (197, 233, 189) and template.spacing == (1, 1, 1)
    assert template.axes == "RAS" and len(shares) == len(TISSUES) == 4
    assert (shares >= 0).all()
    assert (shares.sum(0) - 1).abs().max() < 0.01
    counts = torch.bincount(shares.argmax(0).flatten())[1:].double()
    fluid, grey, white = (counts / counts.sum()).tolist()
    assert (round(fluid, 3), round(grey, 3), round(white, 3)) == (0.085, 0.578, 0.337)


def test_the_parts_share_nothing_and_lose_nothing_but_the_gap(template):
    (_, rear), (front, end) = PARTS["train"], PARTS["valid"]
    assert front - rear == 16
    brain = (template[0].values[0] > 0).sum((0, 2))
    assert not brain[: PARTS["train"][0]].any() and not brain[end:].any()
    parts = [(brain_part(split)[0] > 0).sum() for split in ("train", "valid")]
    assert sum(parts) == brain[:rear].sum() + brain[front:].sum()


def test_a_version_is_its_seed():
    first, again, other = (hard_brain("valid", s, SIZE) for s in (3, 3, 4))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])
    train = hard_brain("train", 3, SIZE)
    assert not torch.equal(first[1], train[1])
    image, labels = first
    assert image.shape == (1, *SIZE) and image.dtype == torch.float32
    assert labels.shape == SIZE and labels.dtype == torch.int64
    assert image.min() >= 0 and image.isfinite().all()


def test_a_crop_is_a_part_of_its_version(monkeypatch):
    """But for the noise."""
    start = (60, 20, 70)
    monkeypatch.setattr(brain, "_crop_start", lambda *_: start)
    whole, part = hard_brain("valid", 5), hard_brain("valid", 5, SIZE)
    image, labels = (cut(x, start, SIZE) for x in whole)
    assert torch.equal(labels, part[1])
    assert 0 < (image - part[0]).abs().mean() < 0.15


def test_versions_differ_as_scanners_do():
    """Half of them inverted, all of them about 0 to 1."""
    dark = 0
    for seed in range(16):
        image, labels = hard_brain("train", seed, (40, 32, 40))
        fluid, white = (image[0][labels == k].mean() for k in (1, 3))
        dark += bool(fluid < white)
        assert 0.4 < image[0][labels > 0].mean() < 1.4
    assert 4 <= dark <= 12


def test_rows():
    train, valid = BrainRows("train", 1, 5), BrainRows("valid", 0, 2)
    assert (len(train), len(valid), train.name(3)) == (5, 2, "version 3")
    assert torch.equal(train.crop(2, SIZE)[0], hard_brain("train", (1, 2), SIZE)[0])
    values, labels, spacing = valid.volume(1)
    assert labels.shape == HELD_OUT_SIZE == values.shape[1:] and spacing == (1, 1, 1)
    assert labels.unique().tolist() == [0, 1, 2, 3]


def test_a_crop_larger_than_the_part():
    image, labels = hard_brain("valid", 0, (32, 96, 32))
    assert image.shape == (1, 32, 96, 32)
    assert not labels[:, :4].any() and not labels[:, -4:].any()


@pytest.mark.no_shapes
def test_an_unknown_split():
    with pytest.raises(ConfigError, match="split"):
        hard_brain("left")
