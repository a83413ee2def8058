"""Language modeling: rows of a stream, bits per character, continuations, folders."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from attn_notes.data.causal_language_modeling import CausalLanguageModeling
from attn_notes.data.subwords import ByteBPE
from attn_notes.data.tasks import create_task, load_task
from attn_notes.data.text import text_classification
from attn_notes.data.text_stream import StreamRows, TextStream, read_documents
from attn_notes.foundations.checks import CheckpointError, ConfigError, InputError
from attn_notes.language.gpt import GPT, GPTConfig
from attn_notes.training.loop import train
from attn_notes.training.recipes import Recipe

TEXT = "to be or not to be, that is the question:\nwhether 'tis nobler "
KIND = "causal_language_modeling"


@pytest.fixture(scope="module")
def vocabulary():
    return ByteBPE.train([TEXT], 290)


@pytest.fixture(scope="module")
def task(vocabulary):
    documents = {"train": [TEXT * 8, TEXT[5:] * 4], "valid": [TEXT[3:40], "a question"]}
    return CausalLanguageModeling(vocabulary, documents, max_tokens=16)


def model_of(task, **sizes):
    given = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    given |= {"intermediate_size": 32, "max_position_embeddings": 32, **sizes}
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**given, "vocab_size": len(task.vocabulary)})).eval()


@pytest.mark.parametrize("length", [2, 3, 9, 10, 17])
@pytest.mark.parametrize("n, stride", [(8, 8), (8, 4), (5, 3), (1, 1)])
def test_every_label_is_predicted_once(length, n, stride):
    rows = StreamRows(range(length), n, stride)
    pairs = [
        (i, label) for ids, labels in rows for i, label in zip(ids, labels, strict=True)
    ]
    counted = [label for _, label in pairs if label != -100]
    assert counted == list(range(1, length))
    assert all(label in (i + 1, -100) for i, label in pairs)
    assert {len(ids) for ids, _ in rows} == {min(n, length - 1)} == {*rows.lengths}


def test_training_rows_tile_the_stream(task):
    stream, n = task.stream("train"), task.max_tokens
    rows = task.dataset("train")
    whole = (len(stream) - 1) // n
    for i in range(whole):
        ids, labels = rows[i]
        assert (ids == stream[i * n : (i + 1) * n]).all()
        assert (labels == stream[i * n + 1 : (i + 1) * n + 1]).all()
    assert len(rows) - whole in (0, 1)


def test_end_tokens_stand_around_documents(task):
    end, encode = task.vocabulary.end_token_id, task.vocabulary.encode
    first, second = task.documents("valid")
    expected = [end, *encode(first), end, *encode(second), end]
    assert task.stream("valid").tolist() == expected


def test_no_held_out_text_in_training():
    lines = {
        split: {line for text in read_documents(split) for line in text.split("\n")}
        for split in ("train", "valid", "test")
    }
    held_out = lines["valid"] | lines["test"]
    assert not lines["train"] & held_out and len(lines["train"]) > 27_000
    for split in ("valid", "test"):
        assert set(text_classification(split=split)[0]) <= held_out


class Fixed(nn.Module):
    "The same probabilities after every token."

    def __init__(self, probabilities):
        super().__init__()
        self.log_p = nn.Parameter(probabilities.log())

    def forward(self, input_ids):
        return self.log_p.expand(*input_ids.shape, -1)


def test_bits_per_character_by_hand(task):
    torch.manual_seed(0)
    p = torch.rand(len(task.vocabulary)).softmax(0)
    ids = task.stream("valid").tolist()[1:]
    nats = -sum(math.log(p[i]) for i in ids)
    characters = sum(len(text) for text in task.documents("valid"))
    scores = task.evaluate(Fixed(p), "valid")
    assert scores["loss"] == pytest.approx(nats / len(ids), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(nats / len(ids)), rel=1e-4)
    bits = nats / math.log(2) / characters
    assert scores["bits_per_character"] == pytest.approx(bits, rel=1e-5)


def test_processes_share_an_evaluation(task, monkeypatch):
    monkeypatch.setattr("attn_notes.data.causal_language_modeling.EVALUATED", 16)
    model, parts = model_of(task), []

    def gather(part):
        parts.append(part)
        return sum(parts, [])

    alone = task.evaluate(model)
    task.evaluate(model, rank=0, world_size=2, gather=gather)
    assert task.evaluate(model, rank=1, world_size=2, gather=gather) == alone


@pytest.mark.parametrize("average_over", ["tokens", "sequences"])
def test_it_trains(task, average_over):
    recipe = Recipe(
        learning_rate=1e-2, max_steps=30, batch_size=8, average_over=average_over
    )
    model = model_of(task, dropout=0.0)
    before = task.evaluate(model)["bits_per_character"]
    history = train(model, task, recipe, progress=False)
    assert history[-1]["valid_bits_per_character"] < 0.7 * before


def test_continuations(task):
    model = model_of(task, dropout=0.0)
    texts = ["to be", "whether 'tis nobler", TEXT[:9]]
    found = task.predict(model, texts, max_new_tokens=5, temperature=0)
    assert all(a.startswith(t) for a, t in zip(found, texts, strict=True))
    for text, both in zip(texts, found, strict=True):  # padding changes nothing
        assert task.predict(model, [text], max_new_tokens=5, temperature=0) == [both]
        ids = task.vocabulary.encode(text)
        out = model.generate(torch.tensor([ids]), max_new_tokens=5)
        assert task.vocabulary.decode(out[0].tolist()) == both
    drawn = [task.predict(model, texts, temperature=2.0, seed=s) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert task.predict(model, []) == []


def test_a_continuation_ends_before_the_end_token(task):
    model = model_of(task, dropout=0.0)
    end = task.vocabulary.end_token_id
    state = torch.zeros_like(model.embedding.tokens.weight)
    state[end] = 1.0
    with torch.no_grad():
        model.embedding.tokens.weight.copy_(state)
        for p in model.decoder.parameters():
            p.fill_(1.0)
    assert task.predict(model, ["to be"], temperature=0) == ["to be"]


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "texts, options, message",
    [
        ([""], {}, "inputs: expected a text of a token or more"),
        (["to", "  "], {}, r"inputs\[1\]: expected a text of a token"),
        (["to \ud800"], {}, "surrogate"),
        ("to be", {}, "a list"),
        ([3], {}, "expected a text; got 3"),
        (["be " * 40], {}, "inputs: expected at most 31 tokens"),
        (
            ["to", "be " * 12],
            {"max_new_tokens": 30},
            r"inputs\[1\]: expected at most 2",
        ),
        (["to"], {"temperature": -1.0}, "temperature"),
        (["to"], {"top_p": 0.0}, "top_p"),
        (["to"], {"top_k": 0}, "top_k"),
    ],
)
def test_bad_prompts(task, texts, options, message):
    with pytest.raises(InputError, match=message):
        task.predict(model_of(task), texts, **options)


def test_another_vocabulary(task):
    model = model_of(SimpleNamespace(vocabulary=range(300)))
    for ask in (lambda: task.evaluate(model), lambda: task.predict(model, ["to"])):
        with pytest.raises(ConfigError, match="vocab_size: expected 290.*got 300"):
            ask()


def test_a_text_file_or_folder(tmp_path):
    for split, text in {"train": TEXT * 9, "valid": TEXT}.items():
        (tmp_path / f"{split}.txt").write_text(text)
    made = create_task(KIND, "text", tmp_path)
    assert made.documents("valid") == [TEXT]
    (tmp_path / "one.txt").write_text("\n".join(f"line {i}" for i in range(20)))
    made = create_task(KIND, "text", tmp_path / "one.txt")
    assert made.documents("valid") == ["line 18\nline 19"]
    assert made.documents("train")[0].endswith("line 17")
    config = SimpleNamespace(
        vocab_size=270, max_position_embeddings=8, eos_token_id=0, bos_token_id=0
    )
    sizes = made.overrides(config)
    assert sizes["eos_token_id"] == sizes["bos_token_id"] == sizes["vocab_size"] - 1
    assert len(made.dataset("train")[0][0]) == 8
    with pytest.raises(InputError, match="test"):
        made.dataset("test")


@pytest.mark.no_shapes
@pytest.mark.parametrize("model", [None, torch.nn.Linear(2, 2)])
def test_what_generates_no_text(task, model):
    with pytest.raises(ConfigError, match="model: expected one that generates text"):
        task.predict(model, ["a text"])


@pytest.mark.no_shapes
def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match="data_dir"):
        create_task(KIND, "text")
    with pytest.raises(ConfigError, match="kjv"):
        create_task(KIND, "wikitext")
    with pytest.raises(InputError, match="a file or a folder"):
        create_task(KIND, "text", tmp_path / "absent")
    (tmp_path / "train.txt").write_text(TEXT)
    with pytest.raises(InputError, match="'valid'"):
        create_task(KIND, "text", tmp_path)
    (tmp_path / "valid.txt").write_text(" \n")
    with pytest.raises(InputError, match="some text"):
        create_task(KIND, "text", tmp_path)
    (tmp_path / "valid.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="UTF"):
        create_task(KIND, "text", tmp_path)
    with pytest.raises(InputError, match="documents"):
        TextStream(documents={"train": "one text"})
    with pytest.raises(InputError, match="at least two ids"):
        StreamRows([1], 4, 4)


def test_saved_and_loaded(task, tmp_path):
    task.save(tmp_path)
    again = load_task(tmp_path)
    assert type(again) is CausalLanguageModeling
    assert again.vocabulary == task.vocabulary
    assert again.max_tokens == task.max_tokens
    model = model_of(task)
    ask = {"max_new_tokens": 4, "temperature": 0}
    assert again.predict(model, ["to"], **ask) == task.predict(model, ["to"], **ask)
    with pytest.raises(InputError, match="documents"):
        again.dataset("train")
    stored = json.loads((tmp_path / "task.json").read_text())
    del stored["vocabulary"]
    (tmp_path / "task.json").write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match="task"):
        load_task(tmp_path)


@pytest.fixture
def foreign(tmp_path):
    "A GPT-2 folder as transformers writes it, its model and its tokenizer."
    transformers = pytest.importorskip("transformers")
    ByteBPE.train([TEXT], 290).save(tmp_path)
    tokenizer = transformers.GPT2TokenizerFast.from_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    config = transformers.GPT2Config(
        vocab_size=290, n_embd=16, n_layer=2, n_head=2, n_positions=32
    )
    config.bos_token_id = config.eos_token_id = 289
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    return tmp_path, model, tokenizer


def test_a_foreign_folder_continues_as_transformers_does(foreign):
    from attn_notes.zoo.factory import create_model

    folder, theirs, tokenizer = foreign
    task, model = load_task(folder, kind=KIND), create_model("gpt2", pretrained=folder)
    assert task.max_tokens == 32 and len(task.vocabulary) == 290
    for text in ("to be", "the question: é 問\n"):
        ids = tokenizer(text, return_tensors="pt")
        assert task.vocabulary.encode(text) == ids["input_ids"][0].tolist()
        out = theirs.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        expected = tokenizer.decode(out[0], skip_special_tokens=True)
        found = task.predict(model, [text], max_new_tokens=8, temperature=0)
        assert found == [expected]


def test_a_foreign_folder_that_does_not_fit(foreign):
    folder, *_ = foreign
    ByteBPE.load(folder).save(folder)  # vocab.json, merges.txt and tokenizer.json
    (folder / "tokenizer.json").unlink()
    merges = (folder / "merges.txt").read_bytes()
    (folder / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"merges\.txt or tokenizer\.json"):
        load_task(folder, kind=KIND)
    (folder / "merges.txt").write_bytes(merges)
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] = 300
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="300 tokens"):
        load_task(folder, kind=KIND)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_task(folder, kind=KIND)
