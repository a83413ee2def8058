"""Verses and reviews: clean text, disjoint splits, whole chapters held out."""

import re

import pytest

from attn_notes.data.text import (
    SECTIONS,
    chinese_reviews,
    kjv_verses,
    text_classification,
)
from attn_notes.data.translation import SPLITS
from attn_notes.foundations.checks import ConfigError


def test_verses():
    verses = kjv_verses()
    assert 31_000 < len(verses) < 31_200 and len({verse.book for verse in verses}) == 66
    assert verses[0].text == "In the beginning God created the heaven and the earth."
    assert not any(re.search(r"[\[\]]|^\d", verse.text) for verse in verses)
    assert [(v.book, v.chapter, v.number) for v in verses] == sorted(
        (v.book, v.chapter, v.number) for v in verses
    )


def test_reviews_have_one_opinion():
    reviews = chinese_reviews()
    assert len({text for text, _ in reviews}) == len(reviews) > 17_000
    assert {label for _, label in reviews} == {0, 1} and all(
        text.strip() for text, _ in reviews
    )


@pytest.mark.parametrize("name", ["kjv-sections", "chinese-reviews"])
def test_splits(name):
    splits = [text_classification(name, split) for split in SPLITS]
    texts = [set(split[0]) for split in splits]
    assert len(set.union(*texts)) == sum(len(split[0]) for split in splits)
    for texts, labels, classes in splits:
        assert len(texts) == len(labels) > 800 and set(labels) == set(
            range(len(classes))
        )


def test_whole_chapters_are_held_out():
    chapter = {}
    for verse in kjv_verses():
        chapter.setdefault(verse.text, (verse.book, verse.chapter))
    chapters = [
        {chapter[text] for text in text_classification("kjv-sections", split)[0]}
        for split in SPLITS
    ]
    assert not (
        chapters[0] & chapters[1]
        or chapters[0] & chapters[2]
        or chapters[1] & chapters[2]
    )
    assert text_classification("kjv-sections")[2] == list(SECTIONS)


@pytest.mark.no_shapes
def test_bad_names():
    with pytest.raises(ConfigError, match="kjv-sections"):
        text_classification("imdb")
    with pytest.raises(ConfigError, match="split"):
        text_classification(split="dev")


@pytest.mark.no_shapes
def test_an_absent_package_names_its_extra(monkeypatch):
    monkeypatch.setattr("attn_notes.foundations.checks.find_spec", lambda name: None)
    for read in (kjv_verses, chinese_reviews):
        with pytest.raises(ConfigError, match=r"attn_notes\[data\]"):
            read.__wrapped__()
