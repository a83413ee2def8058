"""Padding, start and end: one object in the vocabulary, the task and the model."""

from dataclasses import replace

import pytest
import torch

import attn_notes as an
from attn_notes.data.marian import marian_vocabularies
from attn_notes.data.phrases import TranslationPair
from attn_notes.data.translation_task import TranslationTask
from attn_notes.data.vocabulary import BOS, EOS, PAD, Vocabulary
from attn_notes.foundations.special_ids import SpecialIds, check_special_ids
from attn_notes.training.loop import train
from attn_notes.training.recipes import Recipe
from attn_notes.zoo.registry import override

PAIRS = [
    TranslationPair("one two three", "un deux trois"),
    TranslationPair("two one", "deux un"),
]


def task_of(pairs=PAIRS):
    return TranslationTask(pairs={split: pairs for split in ("train", "valid", "test")})


def model_of(task, **changes):
    info = an.model_info("seq2seq_bahdanau")
    sizes = task.overrides(override(info.config, {}))
    torch.manual_seed(0)
    return an.create_model(info.name, **{**info.tiny, **sizes, **changes})


def test_the_three_agree():
    task = task_of()
    model, vocabulary = model_of(task), task.source_vocab
    assert vocabulary.special_ids == task.special_ids == model.special_ids
    names = [vocabulary.tokens[i] for i in vars(vocabulary.special_ids).values()]
    assert names == [PAD, BOS, EOS]
    check_special_ids(SpecialIds(), object())  # what has none is not asked


def test_marian_has_others_and_so_have_its_batches(marian):
    source, target = marian_vocabularies(marian[1])
    pad, end = source.index["<pad>"], source.index["</s>"]
    assert source.special_ids == target.special_ids == SpecialIds(pad, pad, end)
    pairs = {"train": [TranslationPair("the cat", "die Katze")]}
    task = TranslationTask(source, target, pairs, shared_vocabulary=True)
    batch = task.collate([([5, 6], [7]), ([5], [7, 8])])
    assert batch["input_ids"].tolist() == [[5, 6], [5, pad]]
    assert batch["decoder_input_ids"].tolist() == [[pad, 7, pad], [pad, 7, 8]]
    assert batch["labels"].tolist() == [[7, end, -100], [7, 8, end]]
    config = an.create_model("transformer_base", marian[1], device="meta").config
    assert SpecialIds.of(config) == source.special_ids
    sizes = task.overrides(replace(config, pad_token_id=0, bos_token_id=1))
    assert sizes["pad_token_id"] == sizes["bos_token_id"] == pad
    assert "eos_token_id" not in sizes  # the configuration has it


RECIPE = Recipe(max_steps=1, batch_size=2)
USES = {
    "predict": lambda model, task: task.predict(model, ["one two"]),
    "evaluate": lambda model, task: task.evaluate(model, "valid"),
    "train": lambda model, task: train(model, task, RECIPE, progress=False),
}


@pytest.mark.no_shapes
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    "change, said",
    [
        ({"eos_token_id": 3}, "eos_token_id: expected 2, .*; got 3"),
        ({"bos_token_id": 2}, "bos_token_id: expected 1, .*; got 2"),
        ({"pad_token_id": 3}, "pad_token_id: expected 0, .*; got 3"),
        ({"source_vocab_size": 50}, "source vocabulary: expected 50 tokens, .*; got 7"),
        ({"target_vocab_size": 6}, "target vocabulary: expected 6 tokens, .*; got 7"),
    ],
    ids=str,
)
def test_a_model_of_other_ids_is_refused_before_any_work(use, change, said):
    task = task_of()
    model = model_of(task, **change)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(an.ConfigError, match=said):
        USES[use](model, task)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.no_shapes
def test_a_run_is_not_resumed_with_another_vocabulary(tmp_path):
    task, folder = task_of(), tmp_path / "run"
    train(model_of(task), task, RECIPE, folder, progress=False)
    more = [*PAIRS, TranslationPair("four", "quatre")]
    with pytest.raises((an.ConfigError, an.CheckpointError), match="vocabulary|task"):
        longer = replace(RECIPE, max_steps=2)
        train(model_of(task), task_of(more), longer, folder, resume=True)


def test_a_vocabulary_says_what_its_ids_are():
    assert Vocabulary(["a"]).special_ids is Vocabulary(["b"]).special_ids
