"""The vocabularies of a Marian folder are those of transformers, and it translates."""

import json
import shutil

import pytest
import torch

from attn_notes.data.marian import MarianVocabulary, marian_vocabularies
from attn_notes.data.tasks import load_task
from attn_notes.foundations.checks import CheckpointError, ConfigError
from attn_notes.zoo.factory import create_model

ENGLISH = [
    "the cat sees the dog",
    "a dog sees a cat",
    "cats see dogs",
    "der Tag",
]
GERMAN = ["die Katze sieht den Hund", "ein Hund sieht eine Katze", "die Hunde sehen"]


def test_equal_to_the_tokenizer_of_transformers(marian, recwarn):
    transformers = pytest.importorskip("transformers")
    folder, names = marian[1], ("source.spm", "target.spm", "vocab.json")
    theirs = transformers.MarianTokenizer(*(str(folder / name) for name in names))
    source, target = marian_vocabularies(folder)
    for text in ENGLISH:
        assert source.encode(text) == theirs(text).input_ids
        assert target.encode(text) == theirs(text_target=text).input_ids
    for text in GERMAN:
        ids = target.encode(text) + [target.index["<pad>"]]
        expected = theirs.spm_target.decode(theirs.spm_target.encode(text))
        if not target.oov_tokens(text):
            assert target.decode(ids) == expected == text
    assert source.oov_tokens("x")[-1] == "x" and not source.oov_tokens("the cat")
    assert len(source) == len(target) == len(theirs)


@pytest.fixture
def folder(marian, tmp_path):
    """A copy of the folder, to be spoilt."""
    return shutil.copytree(marian[1], tmp_path / "marian")


def test_the_name_of_a_target_language_is_one_token(folder):
    transformers = pytest.importorskip("transformers")
    index = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({**index, ">>deu<<": len(index)}))
    names = ("source.spm", "target.spm", "vocab.json")
    theirs = transformers.MarianTokenizer(*(str(folder / name) for name in names))
    source = MarianVocabulary(folder)
    for text in (">>deu<< the cat", ">>deu<<the dog", "a >>deu<< cat"):
        assert source.encode(text) == theirs(text).input_ids


def test_the_folder_is_a_task(marian):
    task, model = load_task(marian[1]), create_model("transformer_base", marian[1])
    theirs, ours = marian[0].float(), model.eval()
    for text in ("the cat sees the dog", "a dog"):
        ids = task.source_vocab.encode(text)
        found = theirs.generate(
            input_ids=torch.tensor([ids]),
            max_new_tokens=min(len(ids) + 50, 23),
            num_beams=1,
            do_sample=False,
            bad_words_ids=[[ours.config.pad_token_id]],
        )
        assert task.predict(model, [text]) == [
            task.target_vocab.decode(found[0, 1:].tolist())
        ]
    marian[0].double()
    with pytest.raises(ConfigError, match="stay in their folder"):
        task.save(marian[1])
    assert not (marian[1] / "task.json").exists()
    assert task.overrides() == {"vocab_size": len(task.source_vocab)}


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "name, content, said",
    [
        ("vocab.json", "{", "expected a table of pieces"),
        ("vocab.json", "[" * 100_000, "expected a table of pieces"),
        ("vocab.json", '["</s>", "<unk>", "<pad>"]', "expected a table of pieces"),
        ("vocab.json", '{"</s>": 0, "<unk>": 1}', "</s>, <unk> and <pad>"),
        ("vocab.json", '{"</s>": 0, "<unk>": 1, "<pad>": 9}', "a table of pieces"),
        ("source.spm", "nothing", "expected a sentencepiece model"),
        ("target.spm", "", "expected a sentencepiece model"),
    ],
)
def test_broken_files(folder, name, content, said):
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"{name}: .*{said}"):
        load_task(folder)


def test_vocabularies_of_another_model_are_refused(folder):
    index = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({**index, "more": len(index)}))
    model = create_model("transformer_base", folder)
    with pytest.raises(ConfigError, match=r"source vocabulary: expected \d+ tokens"):
        load_task(folder).predict(model, ["the cat"])
