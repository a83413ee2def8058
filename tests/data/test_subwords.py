"""WordPiece and byte-level BPE cut as transformers does, and refuse what they can not
read."""

import copy
import json
import pickle
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attn_notes.data.subwords import ByteBPE, Subwords, WordPiece, longest_match
from attn_notes.data.text import text_classification
from attn_notes.foundations.checks import CheckpointError, ConfigError, InputError

TEXT = st.text(
    st.one_of(
        st.sampled_from("the sun\x00\x1f\u0301\u200b好，😀<|>[]#'"),
        st.characters(codec="utf-8"),
    ),
    max_size=30,
)
ODD = [
    "",
    "  \t\n ",
    "NUL\x00in\x01side\x7f \ufffd\ufeffmark",
    "a\ttab, a\xa0space and\u3000another, zero\u200bwidth, a\u2028line",
    "café cafe\u0301 \u0301 a\u0300\u0301b İstanbul ẞ ﬁ",
    "😀 👩\u200d👩\u200d👧 flags🇫🇷",
    "x" * 100 + " " + "x" * 101,
    "[MASK] [mask] a[MASK]b [CLS][SEP][PAD][UNK]",
    "it's—“quoted”…  50.5% ##a a##b $x^2$",
    "汉字kanji漢\U00020000 ひらがな 한국어",
]


def split(name, part="train"):
    return text_classification(name, part)[0]


@cache
def trained(name="kjv-sections", lowercase=True):
    return WordPiece.train(split(name)[:1000], 1500, lowercase)


@cache
def byte_pairs():
    return ByteBPE.train(split("kjv-sections")[:1000], 1000)


def texts():
    """Texts that nothing was trained on."""
    sets = "kjv-sections", "chinese-reviews"
    return ODD + [text for name in sets for text in split(name, "test")[:100]]


# as the libraries cut


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("name", ["kjv-sections", "chinese-reviews"])
def test_equal_to_bert_of_transformers(tmp_path, name, lowercase):
    transformers = pytest.importorskip("transformers")
    legacy = pytest.importorskip("transformers.models.bert.tokenization_bert_legacy")
    ours = trained(name, lowercase)
    ours.save(tmp_path)
    fast = transformers.BertTokenizer.from_pretrained(tmp_path)
    slow = legacy.BertTokenizerLegacy.from_pretrained(tmp_path)
    assert len(fast) == len(slow) == len(ours)
    for text in texts():
        theirs = fast(text, add_special_tokens=False, return_offsets_mapping=True)
        assert ours.encode(text) == theirs.input_ids
        assert ours.offsets(text) == theirs.offset_mapping
        assert ours.tokens(text) == slow.tokenize(text)
        decoded = fast.decode(theirs.input_ids, skip_special_tokens=True)
        assert ours.decode(theirs.input_ids) == decoded
    first, second = texts()[-2:]
    pair = fast(first, second)
    assert ours.pack(first, second) == (pair.input_ids, pair.token_type_ids)
    assert ours.pack(first)[0] == fast(first).input_ids


def test_equal_to_gpt2_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = byte_pairs()
    ours.save(tmp_path)
    theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    assert len(theirs) == len(ours) == ours.end_token_id + 1 == theirs.eos_token_id + 1
    for text in texts():
        found = theirs(text, return_offsets_mapping=True)
        assert ours.encode(text) == found.input_ids
        assert ours.offsets(text) == found.offset_mapping
        assert ours.decode(found.input_ids) == text
    end = "<|endoftext|>"
    assert theirs(end).input_ids == [ours.end_token_id] != ours.encode(end)
    assert theirs(end, split_special_tokens=True).input_ids == ours.encode(end)


@given(TEXT)
def test_byte_pairs_lose_nothing(text):
    vocabulary = byte_pairs()
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert vocabulary.end_token_id not in vocabulary.encode(text)


@given(TEXT, st.booleans())
def test_offsets(text, lowercase):
    vocabulary = trained(lowercase=lowercase)
    spans = vocabulary.offsets(text)
    assert len(spans) == len(vocabulary.encode(text))
    assert all(0 <= start < end <= len(text) for start, end in spans)
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
    for token, (start, end) in zip(vocabulary.tokens(text), spans, strict=True):
        if token.isascii() and token.isalpha() and text[start:end].isascii():
            part = "".join(c for c in text[start:end] if c.isprintable())
            assert token == (part.lower() if lowercase else part)


@pytest.mark.parametrize("name", ["kjv-sections", "chinese-reviews"])
def test_longest_match_is_the_libraries(name):
    vocabulary = trained(name)
    words = {word for text in split(name, "test")[:200] for word in text.split()}
    words = {w.lower() for w in words if w.isascii() and w.isalpha()} | set("好吃的")
    assert words
    for word in [*words, "x" * 100, "x" * 101]:
        assert longest_match(word, vocabulary.index) == vocabulary.tokens(word)


def test_longest_match_by_hand():
    pieces = ["un", "##a", "##aff", "##able", "##f", "##fable"]
    assert longest_match("unaffable", pieces) == ["un", "##aff", "##able"]
    assert longest_match("unstable", pieces) == ["[UNK]"]


# training


def test_training_gives_the_same_pieces_every_time():
    verses = split("kjv-sections")[:200]
    first = WordPiece.train(verses, 400)
    assert all(WordPiece.train(verses, 400) == first for _ in range(4))
    assert ByteBPE.train(verses, 400) == ByteBPE.train(verses, 400)
    code = (
        "import sys, json, zlib; from attn_notes.data.subwords import WordPiece;"
        "v = WordPiece.train(json.loads(sys.stdin.read()), 400); print(v.names)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(verses),
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == str(first.names)


def test_special_tokens_of_a_trained_vocabulary():
    vocabulary = trained()
    ids = [getattr(vocabulary, f"{n}_token_id") for n in "pad unk cls sep mask".split()]
    assert ids == [0, 1, 2, 3, 4] and vocabulary.names[4] == "[MASK]"
    assert vocabulary.id_of("[MASK]") == 4 and vocabulary.token_of(4) == "[MASK]"
    assert vocabulary.tokens("the [MASK]s")[1] == "[MASK]"
    assert vocabulary.decode([2, vocabulary.id_of("the"), 3, 0]) == "the"


@pytest.mark.parametrize("size", [6, 40, 90, 1500])
def test_the_commonest_characters_are_kept(size):
    reviews = split("chinese-reviews")[:300]
    vocabulary = WordPiece.train(reviews, size)
    assert len(vocabulary) <= size and (size == 6 or len(vocabulary) >= size - 1)
    assert size < 40 or vocabulary.tokens("的") == ["的"]


@pytest.mark.no_shapes
@pytest.mark.parametrize("kind", [WordPiece, ByteBPE])
@pytest.mark.parametrize(
    "given, size",
    [
        ([], 300),
        (["", ""], 300),
        ("one text", 300),
        (7, 300),
        (["a text"], 5),
        (["a text"], 0),
        (["a text"], 10**12),
        (["a text"], True),
        (["a text"], "300"),
    ],
)
def test_impossible_training(kind, given, size):
    with pytest.raises(ConfigError, match=r"^(texts|vocab_size): expected .*; got"):
        kind.train(given, size)


def test_text_of_nothing_but_control_characters():
    with pytest.raises(ConfigError, match="texts: expected a character"):
        WordPiece.train(["\x00", "\x01 \x02"], 300)
    with pytest.raises(ConfigError, match="vocab_size: expected .* at least|from 257"):
        ByteBPE.train(["a text"], 256)


# packing


def test_packing():
    vocabulary = trained()
    a, b = vocabulary.encode("And God said"), vocabulary.encode("let there be light")
    assert len(a) < len(b)
    assert vocabulary.pack("And God said") == ([2, *a, 3], [0] * (len(a) + 2))
    ids, types = vocabulary.pack(a, np.array(b))
    assert ids == [2, *a, 3, *b, 3]
    assert types == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    assert vocabulary.pack(a, "", 4) == ([2, a[0], 3, 3], [0, 0, 0, 1])
    assert vocabulary.pack(a, max_tokens=3)[0] == [2, a[0], 3]
    assert vocabulary.pack(torch.tensor(a))[0] == [2, *a, 3]
    assert a == vocabulary.encode("And God said")  # not shortened in place


@given(st.integers(0, 9), st.integers(0, 9), st.integers(3, 25))
def test_the_longer_is_shortened(n, m, size):
    a, b = list(range(10, 10 + n)), list(range(30, 30 + m))
    ids, types = trained().pack(a, b, size)
    assert len(ids) == len(types) == min(size, n + m + 3)
    left, right = list(a), list(b)
    while len(left) + len(right) > size - 3:
        (left if len(left) > len(right) else right).pop()
    assert ids == [2, *left, 3, *right, 3]


# storing


@pytest.mark.parametrize("make", [trained, byte_pairs])
def test_stored_and_read_again(tmp_path, make):
    vocabulary = make()
    vocabulary.save(tmp_path / "new" / "folder")
    kind, folder = type(vocabulary), tmp_path / "new" / "folder"
    assert kind.load(folder) == vocabulary
    stored = json.loads(json.dumps(vocabulary.to_dict()))
    for other in (
        Subwords.from_dict(stored),
        kind.from_dict(stored),
        pickle.loads(pickle.dumps(vocabulary)),
        copy.deepcopy(vocabulary),
    ):
        assert other == vocabulary and type(other) is kind
        for text in [*ODD, "<|endoftext|>"]:
            assert other.encode(text) == vocabulary.encode(text)
    (folder / ("vocab.txt" if kind is WordPiece else "merges.txt")).unlink()
    assert kind.load(folder) == vocabulary
    assert trained() != byte_pairs() and trained() != trained(lowercase=False)


@pytest.mark.parametrize("make", [trained, byte_pairs])
def test_what_transformers_saves(tmp_path, make):
    transformers = pytest.importorskip("transformers")
    vocabulary, kind = make(), type(make())
    vocabulary.save(tmp_path / "ours")
    name = "BertTokenizer" if kind is WordPiece else "GPT2Tokenizer"
    theirs = getattr(transformers, name).from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert kind.load(tmp_path / "theirs") == vocabulary


def test_a_folder_of_the_hub(tmp_path):
    tokens = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Café", "cafe"]
    (tmp_path / "vocab.txt").write_text("\r\n".join(tokens), "utf-8")
    vocabulary = WordPiece.load(tmp_path)
    assert len(vocabulary) == 8 and vocabulary.mask_token_id == 5
    assert vocabulary.tokens("Café") == ["cafe"]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert WordPiece.load(tmp_path).tokens("Café") == ["Café"]


def test_settings_and_limits_in_the_files(tmp_path):
    vocabulary = trained()
    vocabulary.save(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    read = WordPiece.load(tmp_path)
    text = "in the beginning god created"
    assert read.encode(text) == vocabulary.encode(text)
    assert read.tokens("The") != vocabulary.tokens("The") == ["the"]


# what is refused


SPECIALS = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n"
SMALL = ByteBPE.train(["a text"], 257)
LETTERS = {token: i for i, token in enumerate(SMALL.names[:256])}
INDEX = json.dumps({**LETTERS, "th": 256, "<|endoftext|>": 257})


def tokenizer_json(vocabulary, **changes):
    return json.dumps({**vocabulary.to_dict()["tokenizer"], **changes})


BROKEN = {
    "nothing": (WordPiece, {}, "tokenizer.json", "got none"),
    "empty": (WordPiece, {"vocab.txt": ""}, "vocab.txt", r"expected \[PAD\].*; got 0"),
    "no specials": (WordPiece, {"vocab.txt": "a\nb\n"}, "vocab.txt", r"\[MASK\]"),
    "no mask": (WordPiece, {"vocab.txt": SPECIALS[:-7]}, "vocab.txt", r"d \[MASK\] a"),
    "twice": (
        WordPiece,
        {"vocab.txt": f"{SPECIALS}the\nof\nthe\n"},
        "vocab.txt",
        "got 'the' in 2 lines, the last of them 8",
    ),
    "latin": (WordPiece, {"vocab.txt": b"caf\xe9\n"}, "vocab.txt", "line 1: .*UTF-8"),
    "utf-16": (
        WordPiece,
        {"vocab.txt": SPECIALS.encode("utf-16")},
        "vocab.txt",
        "got UTF-16",
    ),
    "no json": (WordPiece, {"tokenizer.json": "{"}, "tokenizer.json", "a tokenizer"),
    "a list": (ByteBPE, {"tokenizer.json": "[]"}, "tokenizer.json", "a tokenizer"),
    "deep": (ByteBPE, {"tokenizer.json": "[" * 10**5}, "tokenizer.json", "a tokenizer"),
    "pairs of bytes": (
        WordPiece,
        {"tokenizer.json": tokenizer_json(SMALL)},
        "tokenizer.json",
        "expected WordPiece .*; got BPE",
    ),
    "word pieces": (
        ByteBPE,
        {"tokenizer.json": tokenizer_json(WordPiece.train(["a text"], 20))},
        "tokenizer.json",
        "expected byte-level BPE .*; got WordPiece",
    ),
    "a normalizer": (
        ByteBPE,
        {"tokenizer.json": tokenizer_json(SMALL, normalizer={"type": "NFC"})},
        "tokenizer.json",
        "expected byte-level BPE .*; got BPE, .*, NFC",
    ),
    "settings": (
        WordPiece,
        {"vocab.txt": SPECIALS, "tokenizer_config.json": '{"do_lower_case": "no"}'},
        "tokenizer_config.json",
        "do_lower_case: expected True or False; got 'no'",
    ),
    "broken settings": (
        WordPiece,
        {"vocab.txt": SPECIALS, "tokenizer_config.json": "[1]"},
        "tokenizer_config.json",
        "an object of JSON",
    ),
    "merges of others": (
        ByteBPE,
        {"vocab.json": INDEX, "merges.txt": "#version: 0.2\nt h\nth e\n"},
        "merges.txt",
        "line 3: .*got 'th e'",
    ),
    "merges of three": (
        ByteBPE,
        {"vocab.json": INDEX, "merges.txt": "t h e\n"},
        "merges.txt",
        "line 1: .*got 't h e'",
    ),
    "too few bytes": (
        ByteBPE,
        {"vocab.json": '{"a": 0, "<|endoftext|>": 1}', "merges.txt": ""},
        "vocab.json",
        "among the tokens; got 2",
    ),
    "no end": (
        ByteBPE,
        {"vocab.json": json.dumps(LETTERS), "merges.txt": ""},
        "vocab.json",
        r"expected <\|endoftext\|> among",
    ),
    "holes": (
        ByteBPE,
        {
            "vocab.json": json.dumps({**LETTERS, "<|endoftext|>": 300}),
            "merges.txt": "",
        },
        "vocab.json",
        "expected ids from 0 to 256",
    ),
    "texts for ids": (
        ByteBPE,
        {"vocab.json": json.dumps(dict.fromkeys(LETTERS, "0")), "merges.txt": ""},
        "vocab.json",
        "got other values",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(tmp_path, case):
    kind, files, name, said = BROKEN[case]
    for file, content in files.items():
        raw = content if isinstance(content, bytes) else content.encode()
        (tmp_path / file).write_bytes(raw)
    with pytest.raises(CheckpointError, match=f"{name}: .*{said}") as error:
        kind.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.no_shapes
@pytest.mark.parametrize("make", [trained, byte_pairs])
@pytest.mark.parametrize("text", [None, 7, b"bytes", ["a"], "half \ud83d of", "\udc00"])
def test_what_is_no_text(make, text):
    for method in (make().encode, make().tokens, make().offsets):
        with pytest.raises(InputError, match=r"^text: expected .*; got"):
            method(text)
    with pytest.raises((InputError, ConfigError), match=r"^texts.*: expected .*; got"):
        type(make()).train([text], 300)


@pytest.mark.no_shapes
@pytest.mark.parametrize("make", [trained, byte_pairs])
@pytest.mark.parametrize("ids", [[-1], [10**6], [1.5], ["a"], 3, None, [[1]], "12"])
def test_ids_of_none(make, ids):
    vocabulary = make()
    with pytest.raises(InputError, match=r"^ids: expected .*; got"):
        vocabulary.decode(ids)
    with pytest.raises(InputError, match=r"^ids: expected .*; got"):
        vocabulary.token_of(ids[0] if isinstance(ids, list) else [ids])
    with pytest.raises(InputError, match=r"^token: expected one of \d+; got"):
        vocabulary.id_of("no such token")


@pytest.mark.parametrize("size", [2, 0, -1, True, "7"])
@pytest.mark.no_shapes
def test_no_room_for_the_special_tokens(size):
    with pytest.raises(ConfigError, match="max_tokens: expected .* at least 3; got"):
        trained().pack("a", "b", size)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "make, change, said",
    [
        (trained, {"unk_token": "[nope]"}, "an unknown word; got '.nope.'"),
        (byte_pairs, {"dropout": 0.5}, "the same pieces every time"),
    ],
)
def test_a_stored_tokenizer_with_other_settings(make, change, said):
    stored = make().to_dict()
    stored["tokenizer"]["model"] |= change
    with pytest.raises(ConfigError, match=f"^vocabulary: expected .*{said}"):
        Subwords.from_dict(stored)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "stored",
    [
        None,
        {},
        {"kind": "words"},
        {"kind": ["wordpiece"]},
        {"kind": "wordpiece", "tokenizer": {}},
        {"kind": "wordpiece", "tokenizer": SMALL.to_dict()["tokenizer"]},
        {"kind": "byte_bpe"},
    ],
)
def test_stored_as_something_else(stored):
    with pytest.raises(ConfigError, match=r"^vocabulary: expected .*; got"):
        Subwords.from_dict(stored)
