"""Splits that do not touch, longer sentences, a baseline, WMT14 in real layouts."""

import pytest

from attn_notes.data.phrases import TranslationPair as Pair
from attn_notes.data.translation import (
    LANGUAGES,
    SPLITS,
    hash_split,
    iterate_pairs,
    join_phrases,
    nearest_neighbour_translate,
    translation_pairs,
)
from attn_notes.data.vocabulary import tokenize
from attn_notes.foundations.checks import ConfigError, InputError

SETS = [
    (name, holdout)
    for name in LANGUAGES
    if not name.startswith("wmt14")
    for holdout in (
        ("random", "unit") if name.startswith(("cldr", "dates")) else ("random",)
    )
]


@pytest.mark.slow
@pytest.mark.parametrize("name, holdout", SETS)
def test_no_pair_is_in_two_splits(name, holdout):
    splits = [
        {pair.source for pair in translation_pairs(name, split, holdout)}
        for split in SPLITS
    ]
    sizes = [len(translation_pairs(name, split, holdout)) for split in SPLITS]
    assert (
        len(set.union(*splits)) == sum(sizes)
        and min(sizes) > 30
        and sizes[0] > 0.85 * sum(sizes)
    )


@pytest.mark.parametrize("name", ["cldr-en-fr", "cldr-en-zh", "dates-iso"])
def test_held_out_units_are_not_trained_on(name):
    trained = {
        key
        for pair in translation_pairs(name, "train", "unit")
        for key in pair.group.split()
    }
    for split in ("valid", "test"):
        for pair in translation_pairs(name, split, "unit"):
            assert not trained.issuperset(pair.group.split())
    keys = {
        key
        for pair in translation_pairs(name, "test", "unit")
        for key in pair.group.split()
        if hash_split(key) == "test"
    }
    assert {key.split(":")[0] for key in keys} == (
        {"year"} if name == "dates-iso" else {"unit", "money", "country"}
    )


def test_languages_share_their_splits():
    french, chinese = (
        {pair.source for pair in translation_pairs(name, "test")}
        for name in ("cldr-en-fr", "cldr-en-zh")
    )
    assert french == chinese


def test_callers_get_their_own_list():
    translation_pairs("cldr-en-fr", "valid").clear()
    assert translation_pairs("cldr-en-fr", "valid")


def test_joined_phrases():
    pairs = translation_pairs("cldr-en-fr", "valid")
    joined = join_phrases(pairs, 300, seed=1)
    assert (
        joined == join_phrases(pairs, 300, seed=1) != join_phrases(pairs, 300, seed=2)
    )
    assert len({pair.source for pair in joined}) == 300
    short = {pair.source: pair.target for pair in pairs}
    assert any(pair.source in short for pair in joined) and all(
        pair in pairs for pair in join_phrases(pairs, 20, max_phrases=1)
    )
    lengths = [
        len(tokenize(pair.source)) for pair in join_phrases(translation_pairs(), 2_000)
    ]
    assert 13 < sum(lengths) / len(lengths) < 17


def test_the_neighbour_of_a_known_text_is_itself():
    pairs = translation_pairs("cldr-en-fr")[:400]
    assert nearest_neighbour_translate(
        pairs, [pair.source for pair in pairs], chunk=64
    ) == [pair.target for pair in pairs]


def test_the_neighbour_shares_the_rare_word():
    pairs = [
        Pair("in 3 days", "a"),
        Pair("in 3 weeks", "b"),
        Pair("in 4 days", "c"),
        Pair("in 3 days", "d"),
    ]
    assert nearest_neighbour_translate(
        pairs, ["9 weeks", "in 4 days", "in 3 days", "nothing known"]
    ) == ["b", "c", "a", "a"]


@pytest.mark.no_shapes
def test_bad_arguments(tmp_path):
    with pytest.raises(ConfigError, match="cldr-en-fr"):
        translation_pairs("cldr-en-fx")
    with pytest.raises(ConfigError, match="split"):
        translation_pairs(split="dev")
    with pytest.raises(ConfigError, match="holdout"):
        translation_pairs("gettext-en-fr", holdout="unit")
    with pytest.raises(ConfigError, match="data_dir"):
        translation_pairs("cldr-en-fr", data_dir=tmp_path)
    for arguments in (
        dict(count=1, max_phrases=5),
        dict(count=9, max_phrases=1),
        dict(count=1, max_phrases=0),
    ):
        with pytest.raises(InputError):
            join_phrases([Pair("a", "b")] * 4, **arguments)
    with pytest.raises(InputError):
        nearest_neighbour_translate([], ["a"])


ENGLISH = ["Resumption of the session", "I declare  resumed the session.", ""]
GERMAN = [
    "Wiederaufnahme der Sitzungsperiode",
    "Ich erkläre die Sitzungsperiode für wiederaufgenommen.",
    "leer",
]
PAIRS = [
    Pair("Resumption of the session", GERMAN[0]),
    Pair("I declare resumed the session.", GERMAN[1]),
]


def write_parquet(folder, shards=2):
    """The set wmt/wmt14 as on the hub: shards with a column `translation`."""
    import pyarrow
    import pyarrow.parquet as parquet

    folder.mkdir(parents=True)
    kind = pyarrow.struct([("de", pyarrow.string()), ("en", pyarrow.string())])
    for split, count in (("train", shards), ("validation", 1), ("test", 1)):
        for i in range(count):
            rows = [{"de": a, "en": b} for a, b in zip(GERMAN, ENGLISH, strict=True)][
                i::count
            ]
            parquet.write_table(
                pyarrow.table({"translation": pyarrow.array(rows, kind)}),
                folder / f"{split}-{i:05d}-of-{count:05d}.parquet",
            )


def write_text(folder):
    for split in SPLITS:
        (folder / f"{split}.en").write_text("\n".join(ENGLISH) + "\n", "utf-8")
        (folder / f"{split}.de").write_text("\n".join(GERMAN) + "\n", "utf-8")


@pytest.mark.parametrize("inside", [True, False])
def test_wmt14_from_parquet(tmp_path, inside):
    write_parquet(tmp_path / "de-en")
    found = translation_pairs(
        "wmt14-en-de", "train", data_dir=tmp_path if inside else tmp_path / "de-en"
    )
    assert sorted(found, key=lambda p: p.source) == sorted(
        PAIRS, key=lambda p: p.source
    )
    assert translation_pairs("wmt14-en-de", "test", data_dir=str(tmp_path)) == PAIRS


def test_wmt14_from_text(tmp_path):
    write_text(tmp_path)
    assert translation_pairs("wmt14-en-de", "valid", data_dir=tmp_path) == PAIRS
    (tmp_path / "train.de").write_text(
        "\n".join(["Wieder@@ aufnahme der Sitzungs@@ periode", *GERMAN[1:]]), "utf-8"
    )
    assert translation_pairs("wmt14-en-de", "train", data_dir=tmp_path) == PAIRS


@pytest.mark.no_shapes
def test_a_folder_that_is_absent_or_half_there(tmp_path):
    with pytest.raises(InputError, match="got None"):
        translation_pairs("wmt14-en-de")
    with pytest.raises(InputError, match="nowhere"):
        translation_pairs("wmt14-en-de", data_dir=tmp_path / "nowhere")
    with pytest.raises(InputError, match="train.en, train.de, valid.en"):
        translation_pairs("wmt14-en-de", data_dir=tmp_path)
    write_text(tmp_path)
    (tmp_path / "test.de").unlink()
    with pytest.raises(InputError, match="missing test.de$"):
        translation_pairs("wmt14-en-de", data_dir=tmp_path)
    (tmp_path / "test.de").write_text("one line\n")
    with pytest.raises(InputError, match="as many lines"):
        translation_pairs("wmt14-en-de", "test", data_dir=tmp_path)


@pytest.mark.no_shapes
def test_parquet_that_is_half_there(tmp_path):
    write_parquet(tmp_path / "de-en", shards=3)
    (tmp_path / "de-en" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(InputError, match="missing train-00001-of-00003.parquet"):
        translation_pairs("wmt14-en-de", "test", data_dir=tmp_path)
    next((tmp_path / "de-en").glob("validation*")).unlink()
    with pytest.raises(InputError, match="train"):
        translation_pairs("wmt14-en-de", "test", data_dir=tmp_path)


@pytest.mark.no_shapes
def test_parquet_of_something_else(tmp_path):
    import pyarrow
    import pyarrow.parquet as parquet

    for split in ("train", "validation", "test"):
        parquet.write_table(
            pyarrow.table({"text": ["a"]}), tmp_path / f"{split}-00000-of-00001.parquet"
        )
    with pytest.raises(InputError, match="translation"):
        translation_pairs("wmt14-en-de", data_dir=tmp_path)
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(InputError, match="train"):
        translation_pairs("wmt14-en-de", data_dir=tmp_path)


def test_pairs_come_one_by_one(tmp_path):
    """What is wrong is said at once, and no more is read than is asked for."""
    with pytest.raises(InputError, match="missing train.en"):
        iterate_pairs("wmt14-en-de", data_dir=tmp_path)
    write_text(tmp_path)
    pairs = iterate_pairs("wmt14-en-de", "valid", data_dir=tmp_path)
    assert next(pairs) == PAIRS[0] and list(pairs) == PAIRS[1:]
    found = list(iterate_pairs("dates-iso", "test", "unit"))
    assert found == translation_pairs("dates-iso", "test", "unit")


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-abcde",),
        ("train-00000-of-00000",),
        ("train-00000-of-999999999",),
        ("train-00000-of-00001", "train-00001-of-00002"),
    ],
)
def test_shards_of_other_names(tmp_path, names):
    for name in (*names, "validation-00000-of-00001", "test-00000-of-00001"):
        (tmp_path / f"{name}.parquet").touch()
    with pytest.raises(InputError, match="expected shards named as"):
        translation_pairs("wmt14-en-de", data_dir=tmp_path)


@pytest.mark.no_shapes
@pytest.mark.parametrize("given", [3, b"wmt", ["wmt"], False, "x" * 400, ""])
def test_what_is_no_folder_of_data(given):
    with pytest.raises(ConfigError, match="path: expected"):
        translation_pairs("wmt14-en-de", data_dir=given)


def test_a_folder_of_data_below_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.en").write_text("a\n")
        (tmp_path / f"{split}.de").write_text("b\n")
    assert translation_pairs("wmt14-en-de", data_dir="~")[0].target == "b"
