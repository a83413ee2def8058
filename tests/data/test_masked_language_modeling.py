"""Masked language modeling: its documents and batches, its two losses, and [MASK]
filled in, by our models and by those of a Hugging Face folder."""

import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from attn_notes.data.masked_language_modeling import (
    DATA,
    DUPLICATES,
    MaskedLanguageModeling,
    cut_sentences,
    documents,
    put_in,
)
from attn_notes.data.subwords import WordPiece
from attn_notes.data.tasks import create_task, load_task
from attn_notes.data.text import kjv_chapters, text_classification
from attn_notes.data.translation import SPLITS
from attn_notes.foundations.checks import CheckpointError, ConfigError, InputError
from attn_notes.language.bert import (
    Bert,
    BertConfig,
    BertForMaskedLM,
    BertForPretraining,
)
from attn_notes.training.history import stopping_after
from attn_notes.training.loop import train
from attn_notes.training.recipes import Recipe
from attn_notes.training.stream import seeded
from attn_notes.training.tasks import check_split
from attn_notes.zoo.factory import create_model

LINES = [
    f"the {a} sees the {b}." for a in ("cat", "dog", "cow") for b in ("sun", "sea")
]
TEXTS = {
    split: [[LINES[(i + 5 * j) % 6] for j in range(4)] for i in range(n)]
    for split, n in (("train", 9), ("valid", 6), ("test", 2))
}
VOCABULARY = WordPiece.train(LINES, 70)
CONFIG = BertConfig(
    vocab_size=len(VOCABULARY),
    hidden_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=32,
    dropout=0.0,
)
RECIPE = Recipe(max_steps=4, batch_size=4, learning_rate=5e-3, checkpoint_every=None)
MODELS = [BertForPretraining, BertForMaskedLM]


@pytest.fixture
def task():
    found = MaskedLanguageModeling(VOCABULARY, None, 32, TEXTS)
    found.setup(RECIPE)
    return found


def make(kind=BertForPretraining, seed=0, **change):
    torch.manual_seed(seed)
    return kind(BertConfig(**{**vars(CONFIG), **change}))


def one_batch(task, size=8, seed=0):
    data = task.dataset("train")
    return task.masked([data[i] for i in range(size)], np.random.default_rng(seed))


def test_held_out_chapters_do_not_leak():
    """The splits are those of the classified verses; no verse of a held-out chapter is
    learned, wherever it stands."""
    found = {split: documents("kjv", split) for split in SPLITS}
    verses = {split: {v for d in docs for v in d} for split, docs in found.items()}
    assert not verses["train"] & (verses["valid"] | verses["test"])
    for split in SPLITS:
        whole = [[v.text for v in c] for part, c in kjv_chapters() if part == split]
        assert len(found[split]) == len(whole)
        if split != "train":
            assert found[split] == whole
            assert set(text_classification("kjv-sections", split)[0]) <= verses[split]
    assert sum(map(len, found["train"])) > 27_000


def test_reviews_are_cut_into_sentences():
    assert cut_sentences("很好。不错！！买，吧") == ["很好。", "不错！！", "买，吧"]
    assert cut_sentences("很好，不错,买") == ["很好，", "不错,", "买"]
    assert cut_sentences("很好") == ["很好"]
    docs = documents("chinese-reviews", "test")
    texts = text_classification("chinese-reviews", "test")[0]
    assert ["".join("".join(d).split()) for d in docs] == [
        "".join(text.split()) for text in texts
    ]


def test_a_batch(task):
    batch, data = one_batch(task), task.dataset("train")
    rows = [data[i] for i in range(8)]
    assert set(batch) == {
        *("input_ids", "attention_mask", "token_type_ids", "labels"),
        "next_sentence_label",
    }
    hidden = batch["labels"] != -100
    original = torch.where(hidden, batch["labels"], batch["input_ids"])
    for i, (ids, first, is_random) in enumerate(rows):
        n, sep = len(ids), VOCABULARY.sep_token_id
        assert original[i, :n].tolist() == ids.tolist() and ids[first - 1] == sep
        assert batch["token_type_ids"][i, :n].tolist() == [0] * first + [1] * (
            n - first
        )
        assert batch["attention_mask"][i].sum() == n
        assert hidden[i].sum() == max(1, round(0.15 * n))
        assert batch["next_sentence_label"][i] == is_random
    assert not hidden[~batch["attention_mask"]].any()
    assert len(data) >= DUPLICATES * len(TEXTS["train"])


def test_other_tokens_are_hidden_in_every_epoch_and_the_same_in_the_same(task):
    data = [task.dataset("train")[i] for i in range(4)]

    def collated(*numbers):
        with seeded(*numbers):
            return task.collate(data)["labels"]

    assert collated(0, 1, 2).equal(collated(0, 1, 2))
    assert not collated(0, 1, 2).equal(collated(0, 2, 2))


@pytest.mark.parametrize("kind", MODELS)
def test_the_losses_are_the_sums_by_hand(task, kind):
    model = make(kind).double().eval()
    task.check_model(model)
    batch = one_batch(task)
    counts, terms = task.counts(batch), task.loss(model, batch)
    assert counts.keys() == terms.keys()
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
    output = model(**inputs)
    logits = output if kind is BertForMaskedLM else output.prediction_logits
    log_p, labels = logits.log_softmax(-1), batch["labels"]
    where = labels != -100
    total = -sum(log_p[i, j, labels[i, j]] for i, j in where.nonzero().tolist())
    assert counts["masked_token"] == where.sum() and terms["masked_token"][1] == 1
    torch.testing.assert_close(terms["masked_token"][0], total)
    assert ("next_sentence" in terms) == (kind is BertForPretraining)
    if "next_sentence" in terms:
        wanted = batch["next_sentence_label"]
        log_p = output.seq_relationship_logits.log_softmax(-1)
        total = -log_p[torch.arange(8), wanted].sum()
        torch.testing.assert_close(terms["next_sentence"][0], total)
        assert counts["next_sentence"] == 8


@pytest.mark.parametrize("kind", MODELS)
def test_batches_that_are_added_up_are_one_batch(task, kind):
    """The same examples and draws, whole and in two parts: each term over all that it
    counts, not a mean of means."""
    model = make(kind).double()
    task.check_model(model)
    batch = one_batch(task)
    parts = [{k: v[rows] for k, v in batch.items()} for rows in (slice(3), slice(3, 8))]
    for name, (loss, _) in task.loss(model, batch).items():
        sums = [task.loss(model, part)[name][0] for part in parts]
        counts = [task.counts(part)[name] for part in parts]
        assert sum(counts) == task.counts(batch)[name] and counts[0] != counts[1]
        torch.testing.assert_close(sum(sums), loss)


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_trains_and_scores(task, kind):
    model = make(kind)
    recipe = Recipe(
        max_steps=60, batch_size=8, learning_rate=1e-2, checkpoint_every=None
    )
    history = train(model, task, recipe, progress=False)
    terms = {"masked_token", "next_sentence"} & history[0].keys()
    assert len(terms) == (2 if kind is BertForPretraining else 0)  # of one: its loss
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    scores = task.evaluate(model)
    assert scores == task.evaluate(model) and scores["accuracy"] > 0.2
    assert ("next_sentence_accuracy" in scores) == (kind is BertForPretraining)
    shares = []
    task.evaluate(model, "valid", 0, 2, lambda part: shares.append(part) or part)
    assert task.evaluate(model, "valid", 1, 2, lambda p: shares[0] + p) == scores


def test_a_run_is_the_same_with_workers(task):
    losses = []
    for workers in (0, 1):
        with stopping_after(3) as found:
            recipe = Recipe(max_steps=3, batch_size=4, num_workers=workers)
            train(make(), task, recipe, progress=False)
        losses.append(list(found))
    assert losses[0] == losses[1]


class Knows(nn.Module):
    """Says "dog" everywhere, then "cow"."""

    def __init__(self, **config):
        super().__init__()
        self.config, self.weight = BertConfig(**config), nn.Parameter(torch.ones(1))

    def forward(self, input_ids, attention_mask, token_type_ids, predicted=None):
        logits = torch.zeros(*input_ids.shape, len(VOCABULARY))
        for token, value in (("dog", 3.0), ("cow", 2.0), ("##e", 1.0)):
            logits[..., VOCABULARY.id_of(token)] = value
        return logits if predicted is None else logits[predicted]


def test_every_mask_is_filled_in_its_place(task):
    model = Knows(vocab_size=len(VOCABULARY)).train()
    texts = ["the [MASK] sees  The [MASK]!", "the [MASK]"]
    assert task.predict(model, iter(texts)) == ["the dog sees  The dog!", "the dog"]
    filled = task.fill(model, texts, top=2)
    assert [[list(place) for place in text] for text in filled] == [
        [["dog", "cow"]] * 2,
        [["dog", "cow"]],
    ]
    assert filled == task.predict(model, texts, top=2) and model.training
    best = filled[1][0]
    assert best["dog"] / best["cow"] == pytest.approx(np.e)
    assert len(task.fill(model, ["[MASK]"], top=10_000)[0][0]) == len(VOCABULARY)
    assert put_in("play [MASK] now", ["##ing"]) == "playing now"


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "texts, said",
    [
        (["the cat"], r"inputs: expected a text with \[MASK\]"),
        (["[MASK]", "the [mask]"], r"inputs\[1\]: expected a text with \[MASK\]"),
        (["[MASK] " + "the " * 40], "at most 32 tokens"),
        (["[MASK] \udc80"], "surrogate"),
        ([3], "expected a text"),
        ("[MASK]", "expected texts in a list"),
    ],
)
def test_what_can_not_be_filled_in_is_refused(task, texts, said):
    with pytest.raises(InputError, match=said):
        task.predict(make(), texts)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "model",
    [
        make(vocab_size=CONFIG.vocab_size + 1),
        make(pad_token_id=1),
        make(Bert),
        nn.Linear(2, 2),
    ],
)
def test_a_model_of_something_else_is_refused(task, model):
    with pytest.raises(ConfigError):
        task.predict(model, ["the [MASK]"])
    with pytest.raises(ConfigError):
        train(model, task, RECIPE, progress=False)


@pytest.mark.no_shapes
def test_bad_names_and_options():
    with pytest.raises(ConfigError, match="kjv"):
        MaskedLanguageModeling.create("wikipedia")
    with pytest.raises(ConfigError, match="data_dir"):
        create_task("masked_language_modeling", "kjv", data_dir="/tmp")
    with pytest.raises(ConfigError, match="max_tokens"):
        create_task("masked_language_modeling", "kjv", max_tokens=0)
    with pytest.raises(ConfigError, match="rate"):
        create_task("masked_language_modeling", "kjv", rate=0.2)
    with pytest.raises(InputError, match="texts"):
        MaskedLanguageModeling(VOCABULARY).dataset("train")


@pytest.mark.parametrize("name", DATA)
def test_a_named_set_is_found_again(name, tmp_path):
    task = create_task("masked_language_modeling", name, seed=3, vocabulary=VOCABULARY)
    task.overrides(CONFIG)
    task.save(tmp_path)
    found = load_task(tmp_path)
    assert found.data == {"name": name, "seed": 3} and found.max_tokens == 32
    assert found.vocabulary == VOCABULARY and type(found) is MaskedLanguageModeling
    assert found.documents("test") == task.documents("test")
    check_split(found, "test", CONFIG)


def test_examples_go_to_workers(task):
    data = pickle.loads(pickle.dumps(task)).dataset("train")
    assert all(
        (a[0] == b[0]).all() for a, b in zip(data, task.dataset("train"), strict=True)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """BertForMaskedLM of transformers, shaken, and the folder that it writes with its
    tokenizer."""
    transformers = pytest.importorskip("transformers")
    found = tmp_path_factory.mktemp("bert-base-uncased")
    VOCABULARY.save(found)
    tokenizer = transformers.BertTokenizer.from_pretrained(found)
    config = transformers.BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
    )
    torch.manual_seed(5)
    reference = transformers.BertForMaskedLM(config).eval()
    for parameter in reference.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    reference.save_pretrained(found)
    tokenizer.save_pretrained(found)
    return found, reference, tokenizer


def test_a_folder_of_transformers_fills_the_same_words(folder):
    path, reference, tokenizer = folder
    task = load_task(path, kind="masked_language_modeling")
    model = create_model("bert_base_masked_lm", pretrained=path)
    texts = ["The [MASK] sees the sea.", "a [MASK], the [MASK] and Dogs", "[MASK]"]
    filled = task.fill(model, texts, top=4)
    for text, places in zip(texts, filled, strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            logits = reference(**inputs).logits[0]
        masks = inputs["input_ids"][0] == tokenizer.mask_token_id
        shares, ids = logits[masks].softmax(-1).topk(4)
        assert [list(place) for place in places] == [
            tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()
        ]
        ours = torch.tensor([list(place.values()) for place in places])
        torch.testing.assert_close(ours, shares, rtol=1e-4, atol=1e-6)


@pytest.mark.no_shapes
def test_a_folder_that_does_not_fit(folder, tmp_path):
    kind = "masked_language_modeling"
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": len(VOCABULARY)}))
    with pytest.raises(CheckpointError, match=r"vocab\.txt"):
        load_task(tmp_path, kind=kind)
    tokens = (folder[0] / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(tokens)
    assert load_task(tmp_path, kind=kind).vocabulary == VOCABULARY
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 5}))
    with pytest.raises(CheckpointError, match="vocabulary of 5 tokens"):
        load_task(tmp_path, kind=kind)
