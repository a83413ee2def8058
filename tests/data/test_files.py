"""Lines end where they were ended, and what can not be read is named with its row."""

import io

import pytest

from attn_notes.data.files import check_texts, lines_or_errors, read_lines
from attn_notes.data.phrases import TranslationPair as Pair
from attn_notes.data.translation import SPLITS, translation_pairs
from attn_notes.foundations.checks import InputError

# what Python's splitlines takes for ends of lines, and a lone carriage return
INSIDE = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\r"


def test_lines_end_at_newlines_alone(tmp_path):
    text = f"\ufeffone{INSIDE}still one\r\n\ntwo \ufeff\nthree\r"
    path = tmp_path / "text"
    path.write_bytes(text.encode())
    lines = [f"one{INSIDE}still one", "", "two \ufeff", "three\r"]
    assert list(read_lines(path)) == lines
    assert list(lines_or_errors(io.BytesIO(text.encode()), "input")) == lines
    assert not list(lines_or_errors(io.BytesIO(b""), "input"))


@pytest.fixture
def write(tmp_path):
    """Writes WMT14 as plain text; the splits that are not given are a pair each."""

    def write(**files):
        for split in SPLITS:
            for side in ("en", "de"):
                given = files.get(f"{split}_{side}", f"{split} {side}\n".encode())
                (tmp_path / f"{split}.{side}").write_bytes(given)
        return tmp_path

    return write


@pytest.mark.parametrize("sign", INSIDE)
def test_a_sign_inside_a_line_moves_no_translation(write, sign):
    english = f"\ufeffa{sign}b\r\nc\n".encode()
    folder = write(train_en=english, train_de=f"x\ny{sign}z\n".encode())
    found = translation_pairs("wmt14-en-de", data_dir=folder)
    assert found == [Pair("a b", "x"), Pair("c", "y z")]


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "content, said",
    [
        (b"fine\ncaf\xe9\n", r"train\.en: line 2: expected UTF-8; got the byte 0xe9"),
        (b"a\nb\xff", r"train\.en: line 2: expected UTF-8; got the byte 0xff at 1"),
        ("é\n".encode("utf-16"), r"train\.en: expected UTF-8; got UTF-16"),
        ("é\n".encode("utf-16-be"), r"train\.en: line 1: expected UTF-8"),
        ("ab\ncd\n".encode("utf-32"), r"train\.en: expected UTF-8; got UTF-16"),
        (b"a\n\xed\xa0\x80\n", r"train\.en: line 2: expected UTF-8"),
    ],
)
def test_bytes_of_another_encoding(write, content, said):
    folder = write(train_en=content, train_de=b"x\ny\n")
    with pytest.raises(InputError, match=said) as refused:
        translation_pairs("wmt14-en-de", data_dir=folder)
    assert "\n" not in str(refused.value)


def parquet(folder, split, rows, column="translation", **texts):
    """One shard of a split."""
    import pyarrow
    import pyarrow.parquet

    text = texts.get("text", pyarrow.string())
    kind = pyarrow.struct([("de", text), ("en", text)])
    table = pyarrow.table({column: pyarrow.array(rows, kind)})
    path = folder / f"{split}-00000-of-00001.parquet"
    pyarrow.parquet.write_table(table, path)
    return path


GOOD = [{"en": "a", "de": "x"}]


@pytest.fixture
def shards(tmp_path):
    for split in ("train", "validation", "test"):
        parquet(tmp_path, split, GOOD)
    return tmp_path


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "row, said",
    [
        ({"en": "b", "de": None}, "row 2: expected texts .*; got 'b' and None"),
        ({"en": None, "de": "y"}, "row 2: expected texts .*; got None and 'y'"),
        (None, "row 2: expected texts .*; got None and None"),
    ],
)
def test_a_row_of_parquet_without_a_text(shards, row, said):
    parquet(shards, "train", [*GOOD, row])
    with pytest.raises(InputError, match=rf"train-\S+\.parquet: {said}"):
        translation_pairs("wmt14-en-de", data_dir=shards)


@pytest.mark.no_shapes
def test_parquet_of_other_columns_is_found_before_a_row_is_read(shards):
    import pyarrow

    wanted = "expected a column translation with texts for 'en' and 'de'"
    parquet(shards, "test", GOOD, column="text")
    with pytest.raises(InputError, match=rf"test-\S+: {wanted}; got .*text: struct"):
        translation_pairs("wmt14-en-de", "valid", data_dir=shards)
    parquet(shards, "test", [{"en": 1, "de": 2}], text=pyarrow.int64())
    with pytest.raises(InputError, match=wanted):
        translation_pairs("wmt14-en-de", "valid", data_dir=shards)
    parquet(shards, "test", GOOD, text=pyarrow.large_string())
    assert translation_pairs("wmt14-en-de", "test", data_dir=shards)


@pytest.mark.no_shapes
@pytest.mark.parametrize("damage", ["end", "middle", "all"])
def test_a_broken_shard_is_one_line_with_its_name(shards, damage):
    rows = [{"en": f"{i} houses", "de": f"{i} Häuser"} for i in range(4000)]
    path = parquet(shards, "train", rows)
    whole = path.read_bytes()
    if damage == "middle":
        path.write_bytes(whole[:4] + bytes(2000) + whole[2004:])
    else:
        path.write_bytes(whole[:-20] if damage == "end" else b"")
    said = r"^\S+train-00000-of-00001\.parquet: can not be read"
    with pytest.raises(InputError, match=said) as refused:
        translation_pairs("wmt14-en-de", data_dir=shards)
    assert "\n" not in str(refused.value)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "given, said",
    [
        ("one text", "inputs: expected texts in a list"),
        (None, "inputs: expected texts in a list"),
        ([None], "inputs: expected a text; got None"),
        (["a", b"b"], r"inputs\[1\]: expected a text; got b'b'"),
        (["a", " \t\n"], r"inputs\[1\]: expected a text of a token or more"),
        (["half \ud83d of"], r"inputs: expected Unicode text; got .* at 5"),
    ],
)
def test_inputs_that_are_no_texts(given, said):
    with pytest.raises(InputError, match=f"^{said}"):
        check_texts(given)
