"""Translation trains, scores, stores itself, and talks to people."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from attn_notes.data import translation_task
from attn_notes.data.phrases import TranslationPair
from attn_notes.data.tasks import create_task, load_task
from attn_notes.data.translation_task import (
    PAPER_SUBWORDS,
    PAPER_VOCABULARIES,
    TranslationTask,
    length_batches,
    translation_scores,
)
from attn_notes.data.vocabulary import BPEVocabulary, Vocabulary
from attn_notes.foundations.checks import CheckpointError, ConfigError, InputError

RECIPE = SimpleNamespace(
    batch_size=4,
    max_tokens=None,
    seed=0,
    label_smoothing=0.0,
    average_over="tokens",
)
SHARED, TWO = (
    SimpleNamespace(vocab_size=1),
    SimpleNamespace(source_vocab_size=1, target_vocab_size=1),
)
NUMBERS = [
    "null",
    "eins",
    "zwei",
    "drei",
    "vier",
    "fünf",
    "sechs",
    "sieben",
    "acht",
    "neun",
]


def pairs(tens):
    return [
        TranslationPair(f"{ten} {one}", f"{NUMBERS[ten]} {NUMBERS[one]}")
        for ten in tens
        for one in range(10)
    ]


@pytest.fixture
def task():
    splits = {
        "train": pairs(range(1, 8))
        + [
            TranslationPair("8", "acht"),
            TranslationPair("9", "neun"),
        ],
        "valid": pairs([8]),
        "test": pairs([9]),
    }
    sides = [
        Vocabulary.build([getattr(p, side) for p in splits["train"]], lang)
        for side, lang in (("source", "en"), ("target", "de"))
    ]
    task = TranslationTask(*sides, splits)
    task.setup(RECIPE)
    return task


def batches(task, epoch=0, rank=0, world_size=1):
    """The share of a process, None where it has no row."""
    data = task.dataset("train")
    shares = (rows[rank::world_size] for rows in task.batches(epoch))
    return [
        task.collate([data[i] for i in rows]) if len(rows) else None for rows in shares
    ]


def rows_of(example):
    """An example as two lists."""
    return [side.tolist() for side in example]


class WordForWord(nn.Module):
    """Target token i for source token i, and a dropout that would show if left on."""

    def __init__(self, task):
        super().__init__()
        table = torch.zeros(len(task.source_vocab), dtype=torch.long)
        for i, number in enumerate(NUMBERS):
            table[task.source_vocab.index[str(i)]] = task.target_vocab.index[number]
        table[2] = 2
        self.register_buffer("table", table)
        self.scale, self.size, self.dropout, self.calls = (
            nn.Parameter(torch.ones(1)),
            len(task.target_vocab),
            nn.Dropout(0.5),
            [],
        )

    def forward(
        self,
        input_ids,
        decoder_input_ids,
        attention_mask=None,
        decoder_attention_mask=None,
    ):
        last = input_ids.new_full((len(input_ids), 1), 2)
        ends = torch.cat([torch.where(attention_mask, input_ids, 2), last], 1)
        ends = ends[:, : decoder_input_ids.shape[1]]
        one_hot = torch.nn.functional.one_hot(self.table[ends], self.size)
        return self.dropout(20 * self.scale * one_hot.float())

    def generate(self, input_ids, attention_mask=None, max_new_tokens=50, num_beams=1):
        assert not self.training and input_ids.shape == attention_mask.shape
        assert not torch.is_grad_enabled()
        self.calls.append((tuple(input_ids.shape), max_new_tokens, num_beams))
        found = torch.where(attention_mask, self.table[input_ids], 2)
        return torch.cat([found, input_ids.new_full((len(input_ids), 1), 2)], 1)


def test_a_model_that_knows_scores_full_marks(task):
    model = WordForWord(task).train()
    scores = task.evaluate(model)
    assert scores["exact"] == 100 and scores["loss"] < 1e-4 and model.training
    assert (
        task.evaluate(model, "test", num_beams=3)["exact"] == 100
        and model.calls[-1][2] == 3
    )


def test_the_loss_is_a_sum_and_a_count(task):
    batch = batches(task)[0]
    loss, weight = task.loss(WordForWord(task).eval(), batch)["next_token"]
    count = task.counts(batch)["next_token"]
    assert weight == 1 and loss < 1e-3 * count
    assert count == batch["decoder_attention_mask"].sum()


def test_the_recipe_says_what_the_loss_is_averaged_over_and_how_it_is_smoothed(task):
    batch, model = batches(task)[0], WordForWord(task).eval()
    plain = task.loss(model, batch)["next_token"][0]
    changed = {**vars(RECIPE), "average_over": "sequences", "label_smoothing": 0.1}
    task.setup(SimpleNamespace(**changed))
    assert task.counts(batch) == {"next_token": len(batch["labels"])}
    smoothed = task.loss(model, batch)["next_token"][0]
    tokens = batch["decoder_attention_mask"].sum()
    size = len(task.target_vocab)  # 20 is the logit of the right token, 0 of others
    expected = plain + 0.1 * tokens * 20 * (1 - 1 / size)
    torch.testing.assert_close(smoothed, expected)


def test_batches_by_tokens(task):
    task.setup(SimpleNamespace(**{**vars(RECIPE), "batch_size": 1, "max_tokens": 12}))
    for batch in batches(task):  # a target is read with <eos>
        assert batch["decoder_input_ids"].numel() <= 12


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_processes_together_have_one_batch(task, world_size):
    shards = [batches(task, 1, rank, world_size) for rank in range(world_size)]
    whole = batches(task, 1)
    assert {len(shard) for shard in shards} == {len(whole)} == {len(task.batches(1))}
    model = WordForWord(task).eval()
    for batch, *parts in zip(whole, *shards, strict=True):
        parts = [part for part in parts if part is not None]
        counts = [task.counts(part)["next_token"] for part in parts]
        assert sum(counts) == task.counts(batch)["next_token"]
        sums = [task.loss(model, part)["next_token"][0] for part in parts]
        torch.testing.assert_close(sum(sums), task.loss(model, batch)["next_token"][0])


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_an_evaluation(task, world_size, monkeypatch):
    """Each looks at its batches, joins what all found, and has the same numbers."""
    monkeypatch.setattr(
        translation_task,
        "length_batches",
        lambda lengths: length_batches(lengths, 3),
    )
    whole = task.evaluate(WordForWord(task), "train")
    models = [WordForWord(task) for _ in range(world_size)]
    met, parts = threading.Barrier(world_size, timeout=60), {}

    def evaluate(rank):
        def gather(part):
            parts[rank] = part
            met.wait()
            joined = [item for r in range(world_size) for item in parts[r]]
            met.wait()
            return joined

        return task.evaluate(models[rank], "train", rank, world_size, gather)

    with ThreadPoolExecutor(world_size) as threads:
        scores = list(threads.map(evaluate, range(world_size)))
    assert scores == [whole] * world_size
    assert [len(model.calls) for model in models] == [24 // world_size] * world_size


def test_predictions_come_in_the_order_of_the_texts(task):
    texts = ["7 3 1 2", "5", "2 9", "5"]
    assert task.predict(WordForWord(task), texts) == [
        "sieben drei eins zwei",
        "fünf",
        "zwei neun",
        "fünf",
    ]


def test_unknown_words_are_said_and_read(task):
    with pytest.warns(UserWarning, match="read as <unk>: foo, bar"):
        assert len(task.predict(WordForWord(task), ["foo bar foo"])) == 1


@pytest.mark.no_shapes
@pytest.mark.parametrize("texts", [["7", ""], ["  "], "7 3", [7]])
def test_what_is_not_a_text_is_refused(task, texts):
    model = WordForWord(task)
    with pytest.raises(InputError):
        task.predict(model, texts)
    assert not model.calls


@pytest.mark.parametrize(
    "kind", [iter, tuple, dict.fromkeys, lambda texts: (text for text in texts)]
)
def test_texts_in_any_iterable(task, kind):
    assert task.predict(WordForWord(task), kind(["7", "5"])) == ["sieben", "fünf"]


def test_the_lines_of_a_file(task, tmp_path):
    (tmp_path / "texts").write_text("7\n5 5\n")
    with open(tmp_path / "texts") as file:
        assert task.predict(WordForWord(task), file) == ["sieben", "fünf fünf"]


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "texts, said",
    [
        (["7", " \u2028"], r"^inputs\[1\]: expected a text of a token or more; got"),
        (["7", "5", 3], r"^inputs\[2\]: expected a text; got 3$"),
        (["7", b"5"], r"^inputs\[1\]: expected a text; got b'5'$"),
        ([""], r"^inputs: expected a text of a token or more; got ''$"),
        (["5", "7 " * 9], r"^inputs\[1\]: expected at most 8 tokens; got 9$"),
        (["5 \ud800"], r"^inputs: expected Unicode text; got the surrogate .*d800"),
        (
            ["5", "x" * 10**6 + "\ud800"],
            r"^inputs\[1\]: expected Unicode text; .{,60}$",
        ),
        (7, "^inputs: expected texts in a list or another iterable; got 7$"),
        (None, "^inputs: expected texts in a list or another iterable; got None$"),
        ("7 3", "^inputs: expected texts in a list or another iterable; got '7 3'$"),
    ],
)
def test_what_is_refused_is_named_by_its_place(task, texts, said, recwarn):
    model = WordForWord(task)
    model.max_tokens = 8  # positions
    with pytest.raises(InputError, match=said):
        task.predict(model, texts)
    assert not model.calls and not recwarn


def test_a_model_without_a_limit_has_one_for_texts(task):
    model = WordForWord(task)
    assert task.predict(model, ["7 " * 4096]) == [" ".join(["sieben"] * 4096)]
    with pytest.raises(InputError, match=r"inputs: expected at most 4096 tokens"):
        task.predict(model, ["7 " * 4097])


def test_unknown_words_are_said_of_each_text(task):
    with pytest.warns(UserWarning) as caught:
        task.predict(WordForWord(task), ["foo 7", "7", "é" * 10**6, "foo"])
    said = [str(warning.message) for warning in caught]
    assert [text.split(":")[0] for text in said] == [f"inputs[{i}]" for i in (0, 2, 3)]
    assert all("not in the vocabulary, so read as <unk>: " in text for text in said)
    assert max(map(len, said)) < 120


def test_no_texts_no_answers(task):
    assert task.predict(WordForWord(task), []) == []


def test_saving_and_loading(task, tmp_path):
    task.save(tmp_path)
    loaded = load_task(tmp_path)
    assert (
        loaded.source_vocab == task.source_vocab
        and loaded.target_vocab == task.target_vocab
    )
    assert loaded.max_new_tokens == task.max_new_tokens == 1 + 5 * 2 // 4
    assert loaded.predict(WordForWord(loaded), ["7 3"]) == ["sieben drei"]
    assert type(loaded) is TranslationTask and loaded.kind == "translation"
    assert [path.name for path in tmp_path.iterdir()] == ["task.json"]
    with pytest.raises(InputError, match="'valid'"):
        loaded.evaluate(WordForWord(loaded))


@pytest.mark.slow
def test_a_named_task_finds_its_pairs_again(tmp_path):
    task = create_task(
        "translation", "dates-iso", holdout="unit", max_phrases=2, seed=3
    )
    task.save(tmp_path)
    loaded = load_task(tmp_path)
    assert (
        loaded.pairs("valid") == task.pairs("valid")
        and len(task.pairs("valid")) == 600
        and loaded.overrides() == task.overrides()
    )
    assert "data_dir" not in json.loads((tmp_path / "task.json").read_text())["data"]


@pytest.mark.parametrize("name", ["cldr-en-zh", "dates-iso"])
@pytest.mark.slow
def test_one_vocabulary_for_both_languages(tmp_path, name):
    apart, joint = create_task("translation", name), create_task("translation", name)
    sizes = joint.overrides(SHARED)
    source, target = joint.source_vocab, joint.target_vocab
    assert source.tokens == target.tokens
    assert [source.language, target.language] == [
        apart.source_vocab.language,
        apart.target_vocab.language,
    ]
    assert sizes == joint.overrides() == {"vocab_size": len(source)}
    assert set(source.tokens) == {
        *apart.source_vocab.tokens,
        *apart.target_vocab.tokens,
    }
    pair = joint.pairs("train")[0]
    assert [
        source.decode(source.encode(pair.source)),
        target.decode(target.encode(pair.target)),
    ] == [pair.source, pair.target]
    joint.save(tmp_path)
    loaded = load_task(tmp_path)
    assert loaded.overrides() == joint.overrides() and [
        loaded.source_vocab,
        loaded.target_vocab,
    ] == [source, target]


def test_a_task_file_that_says_nothing_of_a_shared_vocabulary(task, tmp_path):
    task.save(tmp_path)
    stored = json.loads((tmp_path / "task.json").read_text())
    assert stored.pop("shared_vocabulary") is False
    (tmp_path / "task.json").write_text(json.dumps(stored))
    assert load_task(tmp_path).overrides() == task.overrides()


def test_wmt14_is_a_task_too(tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.en").write_text("a b\nc\n")
        (tmp_path / f"{split}.fr").write_text("x\ny z\n")
    task = create_task("translation", "wmt14-en-fr", data_dir=tmp_path)
    assert task.overrides() == {"source_vocab_size": 7, "target_vocab_size": 7}
    task.save(tmp_path)
    assert load_task(tmp_path, data_dir=tmp_path).pairs("test") == task.pairs("test")


def test_wmt14_with_one_vocabulary_has_pieces_of_words(tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.en").write_text("the lower house\nthe lowest\n")
        (tmp_path / f"{split}.de").write_text("das Haus\ndas niedrigste, größte\n")
    task = create_task(
        "translation", "wmt14-en-de", data_dir=tmp_path, shared_vocabulary=True
    )
    assert isinstance(task.source_vocab, BPEVocabulary) and task.overrides() == {
        "vocab_size": len(task.source_vocab)
    }
    assert (
        task.source_vocab.tokens == task.target_vocab.tokens
        and task.target_vocab.language == "de"
    )
    task.save(tmp_path)
    loaded = load_task(tmp_path, data_dir=tmp_path)
    assert [loaded.source_vocab, loaded.target_vocab] == [
        task.source_vocab,
        task.target_vocab,
    ]
    mine, theirs = (list(map(rows_of, t.dataset("train"))) for t in (task, loaded))
    assert mine == theirs


def test_pairs_that_are_too_long_are_left_out(task):
    before = [
        pair
        for pair, (a, b) in zip(task.pairs("train"), task.dataset("train"), strict=True)
        if len(a) == 1
    ]
    with pytest.warns(
        UserWarning, match="70 of 72 training pairs have more than 2 tokens"
    ):
        task.filter_by_length(2)  # a word and <eos>
    assert (
        task.pairs("train") == before
        and [len(target) for _, target in task.dataset("train")] == [1, 1]
        and task.max_new_tokens == 2
    )
    task.setup(RECIPE)
    assert sum(len(batch["input_ids"]) for batch in batches(task)) == 2


def test_nothing_is_said_of_pairs_that_fit(task, recwarn):
    bound = task.max_new_tokens
    task.filter_by_length(50)
    assert (
        not recwarn
        and len(task.dataset("train")) == 72
        and task.max_new_tokens == bound
    )
    with pytest.raises(InputError, match="at most 1 tokens; got none"):
        task.filter_by_length(1)


def test_the_papers_sizes():
    assert PAPER_VOCABULARIES == {"wmt14": (160_000, 80_000)} and PAPER_SUBWORDS == {
        "wmt14-en-de": 37_000,
        "wmt14-en-fr": 32_000,
    }


@pytest.mark.no_shapes
def test_bad_arguments():
    with pytest.raises(ConfigError, match="unknown kind of task 'painting'"):
        create_task("painting")
    with pytest.raises(ConfigError, match="cldr-en-fr"):
        create_task("translation", "cldr-en-frr")
    with pytest.raises(
        ConfigError, match="shared_vocabulary: expected the same tokens"
    ):
        TranslationTask(Vocabulary(["a"]), Vocabulary(["b"]), shared_vocabulary=True)
    with pytest.raises(ConfigError, match="phrases"):
        create_task(max_phrases=0)
    with pytest.raises(ConfigError, match="translation.*brush"):
        create_task("translation", brush=3)
    with pytest.raises(ConfigError, match="one a side"):
        TranslationTask(Vocabulary(["a"]))
    with pytest.raises(ConfigError, match="setup"):
        TranslationTask(Vocabulary(["a"]), Vocabulary(["b"])).batches(0)
    with pytest.raises(InputError, match="data_dir"):
        create_task("translation", "wmt14-en-de")


def test_scores():
    assert translation_scores(["a b c d", "x"], ["a b c d", "y"], "en")["exact"] == 50
    assert translation_scores(["2024-03-01"], ["2024-03-01"], "iso") == pytest.approx(
        {"exact": 100, "bleu": 100}
    )
    with pytest.raises(InputError):
        translation_scores([], [], "en")


@pytest.mark.parametrize(
    "language, cut",
    [("en", "13a"), ("mul", "13a"), ("zh", "zh"), ("zh_Hant", "zh"), ("zh-CN", "zh")]
    + [("iso", "char"), ("ja", "ja-mecab"), ("ja_JP", "ja-mecab"), ("ko", "ko-mecab")],
)
def test_bleu_is_cut_as_sacrebleu_has_it_for_the_language(monkeypatch, language, cut):
    import sacrebleu.metrics.bleu as bleu

    asked, tokenizer = [], bleu._get_tokenizer
    missing = cut.endswith("mecab") and find_spec("MeCab") is None

    def get(name):
        asked.append(name)
        return tokenizer(name)

    monkeypatch.setattr(bleu, "_get_tokenizer", get)
    with pytest.warns(UserWarning, match="MeCab") if missing else nullcontext():
        scores = translation_scores(["东京。"], ["东京。"], language)
    assert asked == ([cut, "char"] if missing else [cut])
    assert scores["exact"] == 100


def test_without_sacrebleu_there_is_no_bleu(monkeypatch):
    monkeypatch.setattr("attn_notes.foundations.checks.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"attn_notes\[train\]"):
        assert translation_scores(["a"], ["a"], "en") == {"exact": 100}


def test_a_model_says_which_vocabulary_it_wants(task):
    sizes = {"source_vocab_size": len(task.source_vocab)}
    sizes["target_vocab_size"] = len(task.target_vocab)
    assert task.overrides() == task.overrides(TWO) == sizes
    with pytest.raises(ConfigError, match="shared_vocabulary"):
        task.overrides(SHARED)
    chosen = TranslationTask(pairs={"train": task.pairs("train")})
    assert chosen.overrides(SHARED) == {"vocab_size": len(chosen.source_vocab)}
    assert chosen.source_vocab.tokens == chosen.target_vocab.tokens
    apart = TranslationTask(
        pairs={"train": task.pairs("train")}, shared_vocabulary=False
    )
    with pytest.raises(ConfigError, match="shared_vocabulary"):
        apart.overrides(SHARED)


def test_a_model_with_few_positions_leaves_long_pairs_out(task):
    config = SimpleNamespace(source_vocab_size=1, max_position_embeddings=2)
    with pytest.warns(UserWarning, match="70 of 72"):
        task.overrides(config)
    assert len(task.dataset("train")) == 2 and task.max_new_tokens == 2


def test_pairs_of_a_folder_are_read_and_not_kept(tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.en").write_text("a b\nc\nd d d d\n")
        (tmp_path / f"{split}.fr").write_text("x\ny z\nv\n")
    task = create_task("translation", "wmt14-en-fr", data_dir=tmp_path)
    with pytest.warns(UserWarning, match="1 of 3"):
        task.filter_by_length(3)
    task.setup(RECIPE)
    assert not task._pairs and len(task.dataset("train")) == 2
    assert [pair.source for pair in task.stream("train")] == ["a b", "c"]
    with pytest.warns(UserWarning, match="1 of 2"):
        task.filter_by_length(2)
    assert [pair.source for pair in task.pairs("train")] == ["a b"]


def test_the_stored_ids_are_flat(task):
    pairs = task.dataset("train")
    assert pairs.rows.values.dtype.name == "int32" and len(pairs.rows) == 2 * 72
    assert pairs.nbytes == 4 * pairs.lengths.sum() + 20 * 72 + 8
    odd = pairs.filter(np.arange(72) % 2 == 1)
    assert odd.rows is pairs.rows and len(odd) == 36
    assert [rows_of(odd[i]) for i in range(36)] == [
        rows_of(pairs[i]) for i in range(1, 72, 2)
    ]
    assert odd.lengths.tolist() == pairs.lengths[1::2].tolist()
    again = odd.filter(np.arange(36) == 3)
    assert rows_of(again[0]) == rows_of(pairs[7]) and len(list(again)) == 1
    assert list(map(rows_of, task.dataset("valid"))) == [
        [task.source_vocab.encode(p.source), task.target_vocab.encode(p.target)]
        for p in task.pairs("valid")
    ]


def test_it_is_a_task_of_the_training_loop(task):
    from attn_notes.training.tasks import Task

    assert isinstance(task, Task)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "pairs",
    [
        [TranslationPair("a", "b")],
        {"train": [("a", "b")]},
        {"train": [TranslationPair(" ", "b")]},
        {"train": "ab"},
        {"train": 3},
    ],
    ids=str,
)
def test_what_are_no_pairs(pairs):
    with pytest.raises(InputError, match="pairs: expected"):
        TranslationTask(pairs=pairs)


@pytest.mark.parametrize(
    "changed",
    [
        {"max_new_tokens": -5},
        {"max_new_tokens": 3.9},
        {"shared_vocabulary": "false"},
        {"data": {"name": "cldr-en-fr", "more": 1}},
        {"data": {"holdout": "random"}},
    ],
    ids=str,
)
def test_a_task_file_of_odd_values(task, tmp_path, changed):
    task.save(tmp_path)
    path = tmp_path / "task.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(CheckpointError, match="task.json"):
        load_task(tmp_path)


def test_home_is_home_of_tasks_too(task, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    task.save("~")
    assert load_task("~").source_vocab == task.source_vocab


@pytest.mark.no_shapes
@pytest.mark.parametrize("given", [([], []), (["a"], ["a", "b"]), ("ab", "ab")])
def test_scores_of_what_does_not_fit(given):
    with pytest.raises(InputError, match="expected"):
        translation_scores(*given, "en")


@pytest.mark.no_shapes
def test_a_model_that_does_not_generate(task):
    with pytest.raises(ConfigError, match="model: expected one with generate"):
        task.predict(None, ["a"])
