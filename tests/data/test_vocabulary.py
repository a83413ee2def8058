"""Cutting text loses nothing, and ids mean the same on every machine."""
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attn_notes.data.translation import LANGUAGES, SPLITS, translation_pairs
from attn_notes.data.vocabulary import Vocabulary, detokenize, need, normalise, tokenize
from attn_notes.foundations.checks import ConfigError, InputError

TEXT = st.text(st.one_of(st.sampled_from("a1 ,‿▁-é公年、’\u0301\u202f\u2028<>"), st.characters(codec="utf-8")), max_size=30)


@given(TEXT, st.sampled_from(["en", "fr", "mul", "zh", "ja", "iso"]))
def test_cutting_can_be_undone(text, language):
    assert detokenize(tokenize(text, language), language) == normalise(text)


@given(TEXT, st.sampled_from(["en", "zh"]))
def test_no_token_is_empty_or_holds_a_space(text, language):
    assert all(token and " " not in token for token in tokenize(text, language))


@pytest.mark.slow
def test_all_phrases_round_trip():
    texts = {(language, getattr(pair, side)) for name in ("cldr-en-fr", "cldr-en-de", "cldr-en-zh", "dates-iso") for split in SPLITS
             for pair in translation_pairs(name, split) for language, side in zip(LANGUAGES[name], ("source", "target"))}
    assert len(texts) > 60_000
    wrong = [text for language, text in texts if detokenize(tokenize(text, language), language) != text]
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
        if not vocabulary.unknown(text):
            assert vocabulary.decode(vocabulary.encode(text)) == normalise(text)
    assert Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict()))) == vocabulary


def test_order_is_by_count_then_alphabet():
    assert Vocabulary.build(["b a c", "c b", "c"]).tokens[4:] == ["c", "b", "a"]
    assert Vocabulary.build(["b a"]).tokens == Vocabulary.build(["a b"]).tokens
    assert Vocabulary.build(["a a b b c"], max_size=6).tokens[4:] == ["a", "b"]
    assert Vocabulary.build(["a a b b c"], min_count=2).tokens[4:] == ["a", "b"]


def test_special_tokens():
    vocabulary = Vocabulary(["a"])
    assert vocabulary.encode("a b") == [4, 3] and vocabulary.unknown("a b c") == ["b", "c"]
    assert vocabulary.decode([1, 4, 3, 2, 4, 0]) == "a <unk>" and vocabulary.decode([]) == ""


@pytest.mark.no_shapes
def test_bad_input():
    with pytest.raises(ConfigError, match="more than once"):
        Vocabulary(["a", "a"])
    with pytest.raises(ConfigError, match="more than once"):
        Vocabulary(["<pad>"])
    with pytest.raises(ConfigError, match="max_size"):
        Vocabulary.build(["a"], max_size=3)
    with pytest.raises(InputError, match="0 to 4, got 5"):
        Vocabulary(["a"]).decode([5])
    with pytest.raises(ConfigError, match=r"attn_notes\[data\]"):
        need("no_such_package", "data")
