"""Classes of texts and of pairs."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from labelled_toys import foreign_folder, model, vocabulary
from sklearn.metrics import f1_score

from attn_notes.data.labelled_task import class_scores, confusion, split_texts
from attn_notes.data.tasks import create_task, load_task
from attn_notes.data.text_classification import TextClassification
from attn_notes.foundations.checks import CheckpointError, ConfigError, InputError
from attn_notes.training.loop import train
from attn_notes.training.recipes import Recipe
from attn_notes.zoo.factory import create_model

KNOWN = vocabulary()
PAIRS = [(("the king came", "to the city"), 0), (("who made it", "the film"), 1)]
SINGLE = [("the king came to the city", 0), ("who", 1), ("the film", 2)]


def own(examples=PAIRS, classes=("no", "yes"), **options):
    splits = dict.fromkeys(("train", "valid", "test"), examples)
    return TextClassification(KNOWN, examples=splits, classes=classes, **options)


def batch_of(task, split="train"):
    rows = task.dataset(split)
    return task.collate([rows[i] for i in range(len(rows))])


def test_a_pair_is_packed_with_its_label():
    ids, types, label = own().dataset("train")[0]
    assert (ids.tolist(), types.tolist()) == KNOWN.pack(*PAIRS[0][0])
    assert types.tolist().count(1) == 4 and label == 0


def test_loss_by_hand():
    task = own(SINGLE, ["a", "b", "c"])
    batch, net = batch_of(task), model("sequence", KNOWN, 3)
    rows = [torch.tensor([KNOWN.pack(text)[0]]) for text, _ in SINGLE]
    logits = torch.cat([net(row) for row in rows])  # each alone, without padding
    total, weight = task.loss(net, batch)["class"]
    expected = F.cross_entropy(logits, torch.tensor([0, 1, 2]), reduction="sum")
    torch.testing.assert_close(total, expected)
    assert task.counts(batch) == {"class": 3} and weight == 1


@pytest.mark.parametrize("first", [0, 1])
def test_scores_are_those_of_sklearn(first):
    random = np.random.default_rng(first)
    truth, said = random.integers(0, 4, 200), random.integers(0, 3, 200)
    counts = confusion(torch.tensor(truth), torch.tensor(said), 5)
    found, labels = class_scores(counts, first), [*range(first, 4)]
    expected = f1_score(truth, said, labels=labels, average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(expected)
    assert found["accuracy"] == pytest.approx((truth == said).mean())


def test_shares_of_evaluation_are_the_whole():
    examples = [(f"the king {'came ' * (i % 5)}", i % 2) for i in range(100)]
    task, net = own(examples), model("sequence", KNOWN)
    whole, parts = task.evaluate(net), []
    for rank in (0, 1):
        task.evaluate(net, "valid", rank, 2, lambda mine: parts.extend(mine) or mine)
    assert task.evaluate(net, "valid", 0, 2, lambda _: parts) == whole
    assert net.training


def test_it_learns():
    examples = [("the king came", 0), ("who made it", 1)] * 8
    task, net = own(examples), model("sequence", KNOWN)
    train(
        net,
        task,
        Recipe(max_steps=60, batch_size=8, learning_rate=1e-2),
        progress=False,
    )
    assert task.evaluate(net)["accuracy"] == 1
    assert task.predict(net, ["who made it", "the king came"]) == ["yes", "no"]


def test_few_labels_are_drawn_by_the_seed():
    few = [create_task("text_classification", seed=s, limit=20) for s in (0, 0, 1)]
    first, again, other = (task.examples("train") for task in few)
    assert len(first) == 20 and first == again != other
    whole = create_task("text_classification")
    assert {*first} < {*whole.examples("train")}
    assert few[0].examples("test") == whole.examples("test")


def test_saved_and_loaded(tmp_path):
    task = TextClassification.create("kjv-pairs", vocabulary=KNOWN, limit=10, seed=3)
    task.save(tmp_path)
    loaded = load_task(tmp_path)
    assert loaded.vocabulary == KNOWN and loaded.classes == ["elsewhere", "next"]
    assert loaded.examples("train") == task.examples("train") and loaded.parts == 2
    for change in ({"classes": ["one"]}, {"data": {"name": "imdb"}}):
        stored = json.loads((tmp_path / "task.json").read_text())
        (tmp_path / "task.json").write_text(json.dumps(stored | change))
        with pytest.raises(CheckpointError, match="task.json"):
            load_task(tmp_path)
        (tmp_path / "task.json").write_text(json.dumps(stored))


def test_a_folder_of_transformers(tmp_path):
    theirs = foreign_folder(tmp_path, "sequence", KNOWN, ("bad", "good", "odd"))
    task = load_task(tmp_path, kind="text_classification")
    net = create_model("bert_base_sequence", pretrained=tmp_path)
    texts = ["the king came", "who made it ||| the film of the year"]
    expected = []
    for text in texts:
        ids, types = KNOWN.pack(*split_texts([text])[0])
        logits = theirs(
            torch.tensor([ids]), token_type_ids=torch.tensor([types])
        ).logits
        expected.append(("bad", "good", "odd")[logits.argmax()])
    assert task.predict(net, texts) == expected and task.parts is None


@pytest.mark.parametrize("labels", [None, {"0": "a"}, {"1": "a", "2": "b"}, {"x": "a"}])
def test_a_folder_without_names_of_classes(tmp_path, labels):
    KNOWN.save(tmp_path)
    config = {"vocab_size": len(KNOWN), "id2label": labels}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="id2label"):
        TextClassification.load_foreign(tmp_path)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "text", ["", "\ud800", "one text", "a ||| b ||| c", "a |||", "||| b", "a ||| " * 40]
)
def test_texts_that_are_refused(text):
    task = TextClassification.create("kjv-pairs", vocabulary=KNOWN, limit=2)
    with pytest.raises(InputError, match=r"inputs\[1\]: expected"):
        task.predict(model("sequence", KNOWN), ["a ||| b", text])


@pytest.mark.no_shapes
def test_bad_input():
    with pytest.raises(InputError, match="at most 64 tokens"):
        own().predict(model("sequence", KNOWN), ["the " * 80])
    with pytest.raises(ConfigError, match="num_classes"):
        own().evaluate(model("sequence", KNOWN, 3))
    with pytest.raises(ConfigError, match="vocab_size"):
        own().evaluate(model("sequence", range(70)))
    with pytest.raises(ConfigError, match="logits of shape"):
        own().evaluate(model("token", KNOWN))
    with pytest.raises(InputError, match="train, example 1"):
        own([PAIRS[0], ("the king", 2)])
    with pytest.raises(ConfigError, match="classes"):
        own(classes=("no", "no"))
    for options in ({"limit": 0}, {"seed": -1}, {"data_dir": "here"}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            create_task("text_classification", **options)


def test_a_long_text_is_cut():
    task = own([("the king came " * 60, 0)] * 2, max_tokens=20)
    assert batch_of(task)["input_ids"].shape == (2, 20)
