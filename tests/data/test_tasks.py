"""A task trains, scores, stores itself, and talks to people."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from attn_notes.data.phrases import Pair
from attn_notes.data.tasks import (
    PAPER_SUBWORDS,
    PAPER_VOCABULARIES,
    TranslationTask,
    create_task,
    load_task,
    translation_scores,
)
from attn_notes.data.vocabulary import Subwords, Vocabulary
from attn_notes.foundations.checks import CheckpointError, ConfigError, InputError

RECIPE = SimpleNamespace(batch_size=4, max_tokens=None, seed=0, label_smoothing=0.0)
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
        Pair(f"{ten} {one}", f"{NUMBERS[ten]} {NUMBERS[one]}")
        for ten in tens
        for one in range(10)
    ]


@pytest.fixture
def task():
    splits = {
        "train": pairs(range(1, 8)) + [Pair("8", "acht"), Pair("9", "neun")],
        "valid": pairs([8]),
        "test": pairs([9]),
    }
    sides = [
        Vocabulary.build([getattr(p, side) for p in splits["train"]], lang)
        for side, lang in (("source", "en"), ("target", "de"))
    ]
    return TranslationTask(*sides, splits)


class WordForWord(nn.Module):
    """Knows the dictionary: target token i for source token i. Has a dropout that would show if it were left on."""

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

    def forward(self, source, target_in, source_mask=None, target_mask=None):
        ends = torch.cat(
            [torch.where(source_mask, source, 2), source.new_full((len(source), 1), 2)],
            1,
        )[:, : target_in.shape[1]]
        return self.dropout(
            20
            * self.scale
            * torch.nn.functional.one_hot(self.table[ends], self.size).float()
        )

    def generate(self, source, source_mask=None, max_new_tokens=50, num_beams=1):
        assert not self.training and source.shape == source_mask.shape
        self.calls.append((tuple(source.shape), max_new_tokens, num_beams))
        return torch.cat(
            [
                torch.where(source_mask, self.table[source], 2),
                source.new_full((len(source), 1), 2),
            ],
            1,
        )


def test_a_model_that_knows_scores_full_marks(task):
    model = WordForWord(task).train()
    scores = task.evaluate(model)
    assert scores["exact"] == 100 and scores["loss"] < 1e-4 and model.training
    assert (
        task.evaluate(model, "test", num_beams=3)["exact"] == 100
        and model.calls[-1][2] == 3
    )


def test_the_loss_is_a_sum_and_a_count(task):
    batch = next(task.train_batches(RECIPE))
    loss, count = task.loss(WordForWord(task).eval(), batch, RECIPE)
    assert count == batch["target_mask"].sum() and loss < 1e-3 * count


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_processes_together_have_one_batch(task, world):
    shards = [list(task.train_batches(RECIPE, 1, rank, world)) for rank in range(world)]
    whole = list(task.train_batches(RECIPE, 1))
    assert (
        {len(shard) for shard in shards}
        == {len(whole)}
        == {task.steps_per_epoch(RECIPE)}
    )
    for batch, parts in zip(whole, zip(*shards)):
        assert (batch["target_out"] > 0).sum() == sum(
            (part["target_out"] > 0).sum() for part in parts
        )
    model = WordForWord(task).eval()
    sums = [
        sum(task.loss(model, part, RECIPE)[0] for part in parts)
        for parts in zip(*shards)
    ]
    torch.testing.assert_close(
        torch.stack(sums),
        torch.stack([task.loss(model, batch, RECIPE)[0] for batch in whole]),
    )


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
    assert [path.name for path in tmp_path.iterdir()] == ["task.json"]
    with pytest.raises(InputError, match="'valid'"):
        loaded.evaluate(WordForWord(loaded))


@pytest.mark.slow
def test_a_named_task_finds_its_pairs_again(tmp_path):
    task = create_task("translation", "dates-iso", holdout="unit", phrases=2, seed=3)
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
    apart, joint = (
        create_task("translation", name),
        create_task("translation", name, joint_vocabulary=True),
    )
    source, target = joint.source_vocab, joint.target_vocab
    assert source.tokens == target.tokens and [source.language, target.language] == [
        apart.source_vocab.language,
        apart.target_vocab.language,
    ]
    assert set(source.tokens) == {
        *apart.source_vocab.tokens,
        *apart.target_vocab.tokens,
    } and joint.overrides() == {"vocab_size": len(source)}
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


def test_a_task_file_from_before_joint_vocabularies(task, tmp_path):
    task.save(tmp_path)
    stored = json.loads((tmp_path / "task.json").read_text())
    assert stored.pop("joint_vocabulary") is False
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
        "translation", "wmt14-en-de", data_dir=tmp_path, joint_vocabulary=True
    )
    assert isinstance(task.source_vocab, Subwords) and task.overrides() == {
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
    ] and loaded.ids("train") == task.ids("train")


def test_pairs_that_are_too_long_are_left_out(task):
    before = [
        pair
        for pair, (a, b) in zip(task.pairs("train"), task.ids("train"))
        if len(a) == 1
    ]
    with pytest.warns(
        UserWarning, match="70 of 72 training pairs have more than 2 tokens"
    ):
        task.keep_within(2)  # a word and <eos>
    assert (
        task.pairs("train") == before
        and [len(target) for _, target in task.ids("train")] == [1, 1]
        and task.max_new_tokens == 2
    )
    assert sum(len(batch["source"]) for batch in task.train_batches(RECIPE)) == 2


def test_nothing_is_said_of_pairs_that_fit(task, recwarn):
    bound = task.max_new_tokens
    task.keep_within(50)
    assert not recwarn and len(task.ids("train")) == 72 and task.max_new_tokens == bound
    with pytest.raises(InputError, match="at most 1 tokens, got none"):
        task.keep_within(1)


def test_the_papers_sizes():
    assert PAPER_VOCABULARIES == {"wmt14": (160_000, 80_000)} and PAPER_SUBWORDS == {
        "wmt14-en-de": 37_000,
        "wmt14-en-fr": 32_000,
    }


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        "[]",
        '{"kind": "translation"}',
        '{"kind": "painting"}',
        '{"kind": "translation", "source": {"tokens": ["a", "a"], "language": "en"}}',
        '{"kind": "translation", "source": {"tokens": ["a"], "merges": [["a", "b"]], "language": "en"}}',
    ],
)
def test_a_broken_task_file(tmp_path, content):
    if content is not None:
        (tmp_path / "task.json").write_text(content)
    with pytest.raises(CheckpointError, match="task.json"):
        load_task(tmp_path)


@pytest.mark.no_shapes
def test_bad_arguments():
    with pytest.raises(ConfigError, match="translation"):
        create_task("painting")
    with pytest.raises(ConfigError, match="cldr-en-fr"):
        create_task("translation", "cldr-en-frr")
    with pytest.raises(ConfigError, match="joint vocabulary: expected the same tokens"):
        TranslationTask(Vocabulary(["a"]), Vocabulary(["b"]), joint_vocabulary=True)
    with pytest.raises(ConfigError, match="phrases"):
        create_task(phrases=0)
    with pytest.raises(InputError, match="data_dir"):
        create_task("translation", "wmt14-en-de")


def test_scores():
    assert translation_scores(["a b c d", "x"], ["a b c d", "y"], "en")["exact"] == 50
    assert translation_scores(["2024-03-01"], ["2024-03-01"], "iso") == pytest.approx(
        {"exact": 100, "bleu": 100}
    )
    with pytest.raises(InputError):
        translation_scores([], [], "en")


def test_without_sacrebleu_there_is_no_bleu(monkeypatch):
    monkeypatch.setattr("attn_notes.data.vocabulary.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"attn_notes\[train\]"):
        assert translation_scores(["a"], ["a"], "en") == {"exact": 100}
