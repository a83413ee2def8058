"""The phrases are translations, the same in every process, and none is a key."""

import datetime
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from attn_notes.data.phrases import cldr_pairs, date_pairs
from attn_notes.data.translation import LANGUAGES, SPLITS, translation_pairs

CLDR = ["cldr-en-fr", "cldr-en-de", "cldr-en-zh"]


def everything(name):
    return [pair for split in SPLITS for pair in translation_pairs(name, split)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CLDR)
def test_about_twelve_thousand_distinct_pairs(name):
    pairs = everything(name)
    assert 11_500 < len(pairs) == len({pair.source for pair in pairs}) < 13_500


@pytest.mark.parametrize("name", CLDR)
def test_no_key_is_left(name):
    for pair in everything(name):
        for text in (pair.source, pair.target):
            assert (
                not re.search(r"[a-z]+-[a-z]+-?[a-z]*$", text)
                or pair.group.split(":")[-1] not in text
            )


def test_known_translations():
    french, chinese = (
        {p.source: p.target for p in everything(name)}
        for name in ("cldr-en-fr", "cldr-en-zh")
    )
    assert french["1 kilometer"] == "1 kilomètre" and chinese["1 kilometer"] == "1公里"
    assert french["August 12"] == "12 août" and chinese["August 12"] == "8月12日"


def test_every_kind_is_there():
    kinds = Counter(pair.group.split(":")[0] for pair in cldr_pairs("en", "de"))
    assert (
        set(kinds) == {"date", "time", "unit", "money", "country"}
        and min(kinds.values()) > 500
    )


def test_dates_are_dates_of_their_year():
    for pair in date_pairs():
        assert pair.group == f"year:{datetime.date.fromisoformat(pair.target).year}"
    assert len({pair.source for pair in date_pairs()}) > 12_000


@pytest.mark.slow
def test_text_is_normalized():
    for name in LANGUAGES:
        if not name.startswith("wmt14"):
            for pair in everything(name):
                assert (
                    pair.source
                    and pair.target
                    and not re.search(r"[^\S ]|  ", pair.source + pair.target)
                )


@pytest.mark.slow
def test_another_process_gives_the_same_pairs():
    code = (
        "from attn_notes.data.translation import translation_pairs as pairs\n"
        "from hashlib import sha256\n"
        "found = [pairs('cldr-en-fr', split) for split in ('train', 'test')]\n"
        "digest = sha256(repr(found).encode()).hexdigest()"
    )
    here = {}
    exec(code, here)
    there = subprocess.run(
        [sys.executable, "-c", code + "\nprint(digest)"],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == here["digest"]
