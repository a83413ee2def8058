"""Classes of words: a label a word, whatever pieces it has."""

import pytest
import torch
import torch.nn.functional as F
from labelled_toys import foreign_folder, model, vocabulary

from attn_notes.data.labelled_text import MARKS
from attn_notes.data.tasks import create_task, load_task
from attn_notes.data.token_classification import (
    TokenClassification,
    encode_words,
    first_pieces,
)
from attn_notes.foundations.checks import ConfigError, InputError
from attn_notes.training.loop import train
from attn_notes.training.recipes import Recipe
from attn_notes.zoo.factory import create_model

KNOWN = vocabulary()
EXAMPLES = [(["the", "cities", "came"], [0, 1, 2]), (["who"], [4])]


def own(examples=EXAMPLES, classes=MARKS, **options):
    splits = dict.fromkeys(("train", "valid", "test"), examples)
    return TokenClassification(KNOWN, examples=splits, classes=classes, **options)


def test_the_first_piece_carries_the_label():
    words = ["the", "cities", "king’s", "to-day"]
    ids, types, labels = encode_words(KNOWN, words, [1, 2, 3, 4], 64)
    pieces = [len(KNOWN.tokens(word)) for word in words]
    assert pieces[1] > 1 and pieces[2] > 1
    expected = [x for label, n in zip([1, 2, 3, 4], pieces, strict=True)
                for x in [label] + [-100] * (n - 1)]  # fmt: skip
    assert labels == [-100, *expected, -100] and len(ids) == len(types) == len(labels)
    assert [w for w in first_pieces(KNOWN, words) if w >= 0] == [0, 1, 2, 3]


def test_every_word_of_the_set_has_a_piece():
    task = create_task("token_classification", vocabulary=KNOWN)
    for words, _ in task.examples("test")[:300]:
        found = [word for word in first_pieces(KNOWN, words) if word >= 0]
        assert found == [*range(len(words))]


def test_what_has_no_room_is_cut():
    ids, _, labels = encode_words(KNOWN, ["the"] * 30, [1] * 30, 10)
    assert len(ids) == len(labels) == 10 and labels == [-100, *[1] * 8, -100]


def test_loss_by_hand_and_without_padding():
    task, net = own(), model("token", KNOWN, 5)
    rows = task.dataset("train")
    batch = task.collate([rows[0], rows[1]])
    total, count = 0.0, 0
    for ids, _, labels in (rows[0], rows[1]):
        logits, wanted = net(torch.tensor(ids)[None].long())[0], torch.tensor(labels)
        total += F.cross_entropy(logits, wanted.long(), reduction="sum")
        count += int((wanted != -100).sum())
    torch.testing.assert_close(task.loss(net, batch)["class"][0], total)
    assert task.counts(batch) == {"class": count} == {"class": 4}
    task.average_over = "sequences"
    assert task.counts(batch) == {"class": 2}


def test_scores_leave_out_the_class_that_marks_nothing():
    task, net = own(), model("token", KNOWN, 5)
    torch.nn.init.zeros_(net.classifier.weight)
    net.classifier.bias.data = torch.tensor([1.0, 0, 0, 0, 0])
    scores = task.evaluate(net)
    assert scores["accuracy"] == pytest.approx(1 / 4) and scores["macro_f1"] == 0


def test_it_learns_and_writes_marks():
    examples = [(["the", "king", "came"], [1, 0, 3])] * 16
    task, net = own(examples), model("token", KNOWN, 5)
    recipe = Recipe(max_steps=30, batch_size=8, learning_rate=3e-3)
    train(net, task, recipe, progress=False)
    assert task.evaluate(net)["macro_f1"] == 1
    assert task.predict(net, ["The king: came!"]) == ["the, king came."]


def test_saved_and_loaded(tmp_path):
    task = create_task("token_classification", vocabulary=KNOWN, limit=5)
    task.save(tmp_path)
    loaded = load_task(tmp_path)
    assert loaded.classes == MARKS and loaded.vocabulary == KNOWN
    assert loaded.examples("train") == task.examples("train")


def test_a_folder_of_transformers(tmp_path):
    names = ("O", "B-PER", "I-PER")
    theirs = foreign_folder(tmp_path, "token", KNOWN, names)
    task = load_task(tmp_path, kind="token_classification")
    net = create_model("bert_base_token", pretrained=tmp_path)
    words = ["The", "cities", "came,"]
    logits = theirs(torch.tensor([KNOWN.pack(" ".join(words))[0]])).logits[0]
    pieces = first_pieces(KNOWN, words)
    said = [names[logits[1 + pieces.index(i)].argmax()] for i in range(3)]
    expected = " ".join(f"{w}/{name}" for w, name in zip(words, said, strict=True))
    assert task.predict(net, [" ".join(words)]) == [expected]


@pytest.mark.no_shapes
def test_bad_input():
    task, net = own(), model("token", KNOWN, 5)
    for text in ("", "...", "\udfff", "the " * 80):
        with pytest.raises(InputError, match=r"inputs\[1\]: expected"):
            task.predict(net, ["the king", text])
    with pytest.raises(ConfigError, match="num_classes"):
        task.predict(model("token", KNOWN, 4), ["the king"])
    with pytest.raises(ConfigError, match="logits of shape"):
        task.evaluate(model("sequence", KNOWN, 5))
    for example in (
        (["a"], [0, 1]),
        ([], []),
        ("a", [0]),
        (["a b"], [0]),
        (["a"], [5]),
    ):
        with pytest.raises(InputError, match="train, example 0"):
            own([example])
