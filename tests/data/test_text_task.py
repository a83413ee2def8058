"""Texts are checked, packed, padded and asked in batches; the vocabulary is the
model's."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from attn_notes.data import tasks
from attn_notes.data.batching import RaggedArray
from attn_notes.data.subwords import WordPiece
from attn_notes.data.tasks import KINDS, load_task, register_task
from attn_notes.data.text_task import (
    StoredTextTask,
    TextTask,
    answers,
    check_vocabulary,
    collate_texts,
    foreign_vocabulary,
    pack_texts,
)
from attn_notes.foundations.checks import CheckpointError, ConfigError, InputError
from attn_notes.training.recipes import Recipe

TEXTS = ["the sun", "the moon and the stars", "the heaven and the earth"]
WORDS = WordPiece.train(TEXTS, 80)


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.setattr(tasks, "KINDS", dict(KINDS))
    monkeypatch.setattr(tasks, "_CLASSES", dict(tasks._CLASSES))

    @register_task("counting")
    class Counting(StoredTextTask):
        def training_texts(self):
            return TEXTS

        def dataset(self, split):
            return RaggedArray.from_rows(self.vocabulary.pack(t)[0] for t in TEXTS)

    return Counting


class Length(nn.Module):
    """Says how many real tokens each row has."""

    def __init__(self, **config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config, self.shapes = SimpleNamespace(**config), []

    def forward(self, input_ids, attention_mask, token_type_ids):
        assert not self.training and not torch.is_grad_enabled()
        self.shapes.append(tuple(input_ids.shape))
        return attention_mask.sum(1) + 100 * token_type_ids.sum(1)


def test_a_batch():
    rows = pack_texts(WORDS, ["the sun|the moon", "sun"], 20, lambda t: t.split("|"))
    batch = collate_texts(rows)
    assert WORDS.tokens("the sun the moon") == ["the", "sun", "the", "moon"]
    assert batch["attention_mask"].sum(1).tolist() == [7, 3]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1], [0] * 7]
    assert batch["input_ids"][0, [0, 3, 6]].tolist() == [2, 3, 3]


def test_answers_come_in_the_order_of_the_texts():
    texts = ["sun " * n for n in (5, 1, 70, 2, *range(1, 60))]
    rows, model = pack_texts(WORDS, texts, 100), Length().train()
    found = answers(model, rows, 0, lambda output, batch: output.tolist())
    assert found == [len(text.split()) + 2 for text in texts] and model.training
    assert len(model.shapes) == 2 and model.shapes[0][1] < 40
    assert answers(model, [], 0, lambda output, batch: output.tolist()) == []


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "texts, said",
    [
        ("sun", "inputs: expected texts in a list"),
        (["sun", 7], r"inputs\[1\]: expected a text"),
        (["sun", "  "], r"inputs\[1\]: expected a text of a token"),
        (["sun", "moon \ud800"], r"inputs\[1\]: .*surrogate"),
        (["the " * 9], "inputs: expected at most 8 tokens.* got 11"),
        (["sun", "the " * 9], r"inputs\[1\]: expected at most 8 tokens"),
    ],
)
def test_what_can_not_be_read_is_refused(texts, said):
    with pytest.raises(InputError, match=said):
        pack_texts(WORDS, texts, 8)


@pytest.mark.no_shapes
def test_rows_without_their_segments():
    for rows in ([], [([2, 3], [0])], [([], [])]):
        with pytest.raises(InputError):
            collate_texts(rows)


def test_a_vocabulary_is_of_the_models_size(counting):
    for config in ({"vocab_size": 5}, {"vocab_size": len(WORDS), "pad_token_id": 1}):
        with pytest.raises(ConfigError, match="as the vocabulary has it"):
            check_vocabulary(Length(**config), WORDS)
    check_vocabulary(Length(vocab_size=len(WORDS), pad_token_id=0), WORDS)
    check_vocabulary(Length(), WORDS)
    task, model = counting(WORDS), Length(max_position_embeddings=4)
    with pytest.raises(InputError, match="at most 4 tokens"):
        task.pack(model, ["the sun and the moon"])


def test_a_configuration_bounds_vocabulary_and_length(counting):
    task = counting()
    asked = SimpleNamespace(vocab_size=40, max_position_embeddings=16)
    assert task.overrides(asked) == {"vocab_size": 40, "pad_token_id": 0}
    assert task.max_tokens == 16 and len(task.vocabulary) == 40
    given = counting(WORDS)
    assert given.overrides(asked)["vocab_size"] == len(WORDS)
    assert given.overrides() == {"vocab_size": len(WORDS), "pad_token_id": 0}


def test_batches_are_the_recipes(counting):
    task = counting(WORDS)
    with pytest.raises(ConfigError, match="setup"):
        task.batches()
    task.setup(Recipe(batch_size=2))
    assert sorted(map(len, task.batches(3))) == [1, 2]
    task.setup(Recipe(max_tokens=9))
    assert sorted(i for rows in task.batches() for i in rows) == [0, 1, 2]


def test_a_task_is_stored_with_its_vocabulary(counting, tmp_path):
    task = counting(WORDS, {"name": "sky"}, 24)
    task.save(tmp_path)
    found = load_task(tmp_path)
    assert found.vocabulary == WORDS and found.max_tokens == 24
    assert found.data == {"name": "sky"} and repr(found) == repr(task)
    assert "sky" in repr(task) and "no vocabulary yet" in repr(counting())


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "change",
    [{"vocabulary": None}, {"max_tokens": 0}, {"data": "sky"}, {"vocabulary": {}}],
)
def test_a_broken_task_file(counting, tmp_path, change):
    counting(WORDS).save(tmp_path)
    path = tmp_path / "task.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match="task.json"):
        load_task(tmp_path)


@pytest.mark.no_shapes
def test_what_is_no_vocabulary():
    with pytest.raises(ConfigError, match="vocabulary"):
        TextTask(["the", "sun"])
    with pytest.raises(ConfigError, match="max_tokens"):
        TextTask(WORDS, max_tokens=0)


def test_a_folder_of_another_library(tmp_path):
    with pytest.raises(CheckpointError):
        foreign_vocabulary(tmp_path)
    WORDS.save(tmp_path)
    with pytest.raises(CheckpointError, match="config.json"):
        foreign_vocabulary(tmp_path)
    config = tmp_path / "config.json"
    for size in (len(WORDS) + 1, None):
        config.write_text(json.dumps({"vocab_size": size}))
        with pytest.raises(CheckpointError, match=f"vocabulary of {size} tokens"):
            foreign_vocabulary(tmp_path)
    config.write_text(json.dumps({"vocab_size": len(WORDS)}))
    assert len(foreign_vocabulary(tmp_path)) == len(WORDS)
