"""Cutting text loses nothing, and ids mean the same on every machine."""

import json
import subprocess
import sys
import time
import unicodedata

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_notes.data.translation import LANGUAGES, SPLITS, translation_pairs
from attn_notes.data.vocabulary import (
    BPEVocabulary,
    Vocabulary,
    detokenize,
    normalize,
    tokenize,
    vocabulary_from,
)
from attn_notes.foundations.checks import ConfigError, InputError

TEXT = st.text(
    st.one_of(
        st.sampled_from("a1 ,‿▁-é公年、’\u0301\u202f\u2028<>"),
        st.characters(codec="utf-8"),
    ),
    max_size=30,
)


@given(TEXT, st.sampled_from(["en", "fr", "mul", "zh", "ja", "iso"]))
def test_cutting_can_be_undone(text, language):
    assert detokenize(tokenize(text, language), language) == normalize(text)


@given(TEXT, st.sampled_from(["en", "zh"]))
def test_no_token_is_empty_or_holds_a_space(text, language):
    assert all(token and " " not in token for token in tokenize(text, language))


@pytest.mark.slow
def test_all_phrases_round_trip():
    texts = {
        (language, getattr(pair, side))
        for name in ("cldr-en-fr", "cldr-en-de", "cldr-en-zh", "dates-iso")
        for split in SPLITS
        for pair in translation_pairs(name, split)
        for language, side in zip(LANGUAGES[name], ("source", "target"), strict=True)
    }
    assert len(texts) > 60_000
    wrong = [
        text
        for language, text in texts
        if detokenize(tokenize(text, language), language) != text
    ]
    assert not wrong


def test_digits_words_and_characters():
    assert tokenize("12 miles") == ["1", "‿2", "miles"]
    assert tokenize("12英里", "zh") == ["1", "2", "英", "里"]
    assert tokenize("4 июл. 2014") == ["4", "июл", "‿.", "2", "‿0", "‿1", "‿4"]
    assert tokenize("") == [] and detokenize([]) == ""


@given(st.lists(TEXT, min_size=1, max_size=5), st.sampled_from(["en", "zh"]))
def test_what_was_built_from_a_text_decodes_to_it(texts, language):
    vocabulary = Vocabulary.build(texts, language)
    for text in texts:
        if not vocabulary.oov_tokens(text):
            assert vocabulary.decode(vocabulary.encode(text)) == normalize(text)
    assert (
        Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict()))) == vocabulary
    )


def test_order_is_by_count_then_alphabet():
    assert Vocabulary.build(["b a c", "c b", "c"]).tokens[4:] == ["c", "b", "a"]
    assert Vocabulary.build(["b a"]).tokens == Vocabulary.build(["a b"]).tokens
    assert Vocabulary.build(["a a b b c"], max_size=6).tokens[4:] == ["a", "b"]
    assert Vocabulary.build(["a a b b c"], min_count=2).tokens[4:] == ["a", "b"]


def test_two_languages_share_one_list():
    english, chinese = Vocabulary.build_shared(
        [["b a 1", "b"], iter(["1英 b", "英"])], ["en", "zh"]
    )
    assert english.tokens[4:] == chinese.tokens[4:] == ["1", "b", "英", "a", "▁b"] and [
        english.language,
        chinese.language,
    ] == ["en", "zh"]
    assert Vocabulary.build_shared([["b a", "b"]], ["en"], max_size=5)[
        0
    ] == Vocabulary.build(["b a", "b"], max_size=5)


def test_special_tokens():
    vocabulary = Vocabulary(["a"])
    assert vocabulary.encode("a b") == [4, 3] and vocabulary.oov_tokens("a b c") == [
        "b",
        "c",
    ]
    assert (
        vocabulary.decode([1, 4, 3, 2, 4, 0]) == "a <unk>"
        and vocabulary.decode([]) == ""
    )


# pieces of words

ENGLISH = [
    "the lower house",
    "the lowest house of the widest street, No. 12",
    "a house",
    "I declare resumed the session.",
] * 3
GERMAN = [
    "das Haus",
    "das niedrigste Haus der breitesten Straße, Nr. 12",
    "ein Haus",
    "Ich erkläre die Sitzung für wiederaufgenommen.",
] * 3


@given(st.lists(TEXT, min_size=1, max_size=4), TEXT, st.integers(5, 60))
def test_pieces_spell_every_text_of_known_characters(texts, other, size):
    pieces = BPEVocabulary.build([*texts, *texts], max_size=size)
    for text in [*texts, other]:
        ids = pieces.encode(text)
        known = not pieces.oov_tokens(text)
        assert (
            (3 in ids) == (not known)
            and not {0, 1, 2} & set(ids)
            and all(3 <= i < len(pieces) for i in ids)
        )
        assert not known or pieces.decode([1, *ids, 2, 0]) == normalize(text)
    assert len(pieces) <= max(size, 4 + len(set("".join(pieces.tokens[4:]))))


def test_a_piece_crosses_no_space_and_no_digit_joins_another():
    pieces = BPEVocabulary.build(["12 12 miles, 每小时12公里"] * 9, max_size=500)
    assert (
        all(" " not in token[1:] for token in pieces.tokens)
        and not {"12", " 12", "小时"} & set(pieces.tokens)
        and " miles" in pieces.tokens
    )
    assert [pieces.tokens[i] for i in pieces.encode("miles 121")] == [
        " miles",
        " 1",
        "2",
        "1",
    ]


def test_pieces_have_the_interface_of_a_vocabulary():
    english, german = BPEVocabulary.build_shared(
        [ENGLISH, iter(GERMAN)], ["en", "de"], max_size=90
    )
    assert (
        len(english) == len(german) == 90
        and english.tokens == german.tokens
        and english.tokens[:4] == Vocabulary([]).tokens
    )
    assert [english.language, german.language] == ["en", "de"] and english != german
    assert (
        english
        == BPEVocabulary.build_shared([ENGLISH, GERMAN], ["en", "de"], max_size=90)[0]
    )
    assert (
        english.decode(english.encode("the hottest session")) == "the hottest session"
        and english.encode("") == []
    )
    assert (
        english.oov_tokens("tée ?§?") == ["é", "?", "§", "?"]
        and english.decode(english.encode("é t")) == "<unk> t"
    )
    stored = json.loads(json.dumps(german.to_dict()))
    assert vocabulary_from(stored) == german == BPEVocabulary.from_dict(
        stored
    ) and vocabulary_from(stored).encode("das Hau§") == german.encode("das Hau§")
    plain = Vocabulary(german.tokens[4:], "de")
    assert vocabulary_from(plain.to_dict()) == plain != german and german != plain


def test_texts_that_look_like_special_tokens_are_texts():
    pieces = BPEVocabulary.build(["<pad> <eos> <unk>"] * 3, max_size=40)
    assert (
        min(pieces.encode("<pad><eos>")) > 3
        and pieces.decode(pieces.encode("<pad> <eos>")) == "<pad> <eos>"
    )


@pytest.mark.slow
def test_training_is_the_same_in_every_process():
    code = (
        "from attn_notes.data.vocabulary import BPEVocabulary as V;"
        f"print(V.build({ENGLISH + GERMAN!r}, max_size=120).to_dict())"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    }
    assert said == {
        f"{BPEVocabulary.build(ENGLISH + GERMAN, max_size=120).to_dict()}\n"
    }


@pytest.mark.no_shapes
def test_bad_pieces(monkeypatch):
    with pytest.raises(ConfigError, match="merges: expected two tokens to one"):
        BPEVocabulary(["a", "b"], [["a", "b"]])
    with pytest.raises(ConfigError, match="merges: expected two tokens to one"):
        BPEVocabulary(["a", "b", "ab"], [["a"]])
    with pytest.raises(ConfigError, match="max_size of at least 5"):
        BPEVocabulary.build(["a"], max_size=4)
    with pytest.raises(InputError, match="0 to 4; got 5"):
        BPEVocabulary(["a"], []).decode([5])
    monkeypatch.setattr("attn_notes.foundations.checks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tokenizers.*attn_notes\[text\]"):
        BPEVocabulary(["a"], [])


@pytest.mark.no_shapes
def test_bad_input():
    with pytest.raises(ConfigError, match="more than once"):
        Vocabulary(["a", "a"])
    with pytest.raises(ConfigError, match="more than once"):
        Vocabulary(["<pad>"])
    with pytest.raises(ConfigError, match="max_size"):
        Vocabulary.build(["a"], max_size=3)
    with pytest.raises(InputError, match="0 to 4; got 5"):
        Vocabulary(["a"]).decode([5])


# words as long as a book

LONG = {
    "a word": "the" * 300_000,
    "letters in any order": "".join(chr(97 + i * i % 1009 % 26) for i in range(10**6)),
    "signs": "=-" * 100_000,
    "marks": "a" + "\u0301\u0323" * 30_000,
}


@pytest.mark.parametrize("name", LONG)
def test_a_word_of_a_megabyte_takes_no_minutes(name):
    start = time.process_time()
    pieces = BPEVocabulary.build([LONG[name], "the lower house"], max_size=120)
    words = Vocabulary.build([LONG[name]])
    for vocabulary in (pieces, words):
        ids = vocabulary.encode(LONG[name])
        assert vocabulary.decode(ids) == normalize(LONG[name])
    assert time.process_time() - start < 15


def test_words_of_at_most_256_letters_are_learnt_whole():
    long = "".join(chr(97 + i * i % 1009 % 26) for i in range(256))
    pieces = BPEVocabulary.build([f"{long}, the {long}"] * 3, max_size=2000)
    found = [pieces.tokens[i] for i in pieces.encode(f"the {long} {long}the")]
    assert found[:3] == [" the", f" {long}", f" {long}"]
    assert "".join(found[3:]) == "the"


@given(st.text(st.sampled_from("aé\u0301\u0323\u0344\u0345\u05b0각ᄀᆨ🏽"), max_size=40))
def test_marks_are_put_in_order_as_unicode_does(text):
    assert normalize(text + "b" * 1001) == unicodedata.normalize(
        "NFC", text + "b" * 1001
    )


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "make",
    [
        lambda: Vocabulary(None),
        lambda: Vocabulary("abc"),
        lambda: Vocabulary([1, 2]),
        lambda: Vocabulary(["a"], None),
        lambda: Vocabulary.build("hello world"),
        lambda: Vocabulary.build([None]),
        lambda: Vocabulary.build(["a"], max_size="10"),
        lambda: Vocabulary.build(["a"], max_size=5.5),
        lambda: Vocabulary.build_shared([["a"]], ["en", "fr"]),
        lambda: Vocabulary(["a"]).encode(b"a"),
        lambda: Vocabulary(["a"]).decode([4.7]),
        lambda: Vocabulary(["a"]).decode(["a"]),
        lambda: Vocabulary(["a"]).decode(torch.tensor([[4, 4], [4, 2]])),
        lambda: Vocabulary(["a"]).decode(4),
        lambda: vocabulary_from(None),
        lambda: vocabulary_from({"tokens": "abc"}),
        lambda: vocabulary_from({"tokens": ["a"], "more": 1}),
        lambda: Vocabulary.build(["a \udfff"]),
        lambda: BPEVocabulary.build(["a \ud800"]),
        lambda: BPEVocabulary(["a"], []).encode("half \ud83d of"),
        lambda: BPEVocabulary.build(["a"], max_size=10**6 + 1),
        lambda: BPEVocabulary(["a"], 3),
        lambda: BPEVocabulary(["a"], [(1, 2)]),
    ],
)
def test_what_is_no_text_no_token_no_id(make):
    with pytest.raises((ConfigError, InputError), match="expected") as caught:
        make()
    assert "\n" not in str(caught.value)
