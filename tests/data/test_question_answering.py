"""Answers in a passage: from characters to tokens and back, and the best stretch."""

import pytest
import torch
import torch.nn.functional as F
from labelled_toys import foreign_folder, model, vocabulary

from attn_notes.data.labelled_text import Question, film_questions
from attn_notes.data.question_answering import (
    MAX_ANSWER,
    QuestionAnswering,
    answer_scores,
    best_spans,
    passage_tokens,
    span_text,
    token_span,
)
from attn_notes.data.tasks import create_task, load_task
from attn_notes.data.text_task import collate_texts
from attn_notes.data.translation import SPLITS
from attn_notes.foundations.checks import ConfigError, InputError
from attn_notes.training.loop import train
from attn_notes.training.recipes import Recipe
from attn_notes.zoo.factory import create_model

KNOWN = vocabulary()
PASSAGE = "The king made it in 1967, in the city."
EXAMPLES = [
    Question("Who made it?", PASSAGE, 0, 8),
    Question("When?", PASSAGE, PASSAGE.index("1967"), PASSAGE.index(",")),
]


def own(examples=EXAMPLES, **options):
    splits = dict.fromkeys(("train", "valid", "test"), examples)
    return QuestionAnswering(KNOWN, examples=splits, **options)


def test_every_answer_comes_back_from_its_tokens():
    for split in SPLITS:
        for one in film_questions(split):
            offsets = KNOWN.offsets(one.passage)
            span = token_span(offsets, one.start, one.end)
            assert span_text(one.passage, offsets, *span) == one.answer


def test_places_in_the_packed_pair():
    ids, types, (start, end) = own().dataset("train")[1]
    assert [KNOWN.token_of(int(i)) for i in ids[start : end + 1]] == ["[UNK]"]
    before = len(KNOWN.encode("When?")) + len(KNOWN.encode("The king made it in"))
    assert types[start] == 1 and start == end == before + 2


@pytest.mark.parametrize("seed", range(20))
def test_the_best_stretch_is_the_best_by_search(seed):
    torch.manual_seed(seed)
    rows = [KNOWN.pack("who made it", "the king " * n) for n in (1, 3, 17 + seed)]
    batch = collate_texts(rows)
    start, end = torch.randn(2, *batch["input_ids"].shape)
    allowed = passage_tokens(batch)
    for i, (a, b) in enumerate(best_spans(start, end, allowed).tolist()):
        inside = allowed[i].nonzero().flatten().tolist()
        # neither in the question nor at [SEP] or padding
        assert inside == [*range(rows[i][1].index(1), len(rows[i][0]) - 1)]
        every = [(x, y) for x in inside for y in inside if x <= y < x + MAX_ANSWER]
        assert (a, b) == max(every, key=lambda s: start[i, s[0]] + end[i, s[1]])


@pytest.mark.parametrize(
    "said, truth, expected",
    [
        ("The Beatles.", "beatles", (1, 1)),
        ("a b c", "c", (0, 2 / 3)),
        ("in the city", "the old city", (0, 0.5)),
        ("x y", "z", (0, 0)),
        ("the", "the", (1, 1)),
        ("the", "city", (0, 0)),
        ("no no", "no", (0, 2 / 3)),
    ],
)
def test_scores_of_squad(said, truth, expected):
    assert answer_scores(said, truth) == pytest.approx(expected)


def test_loss_by_hand_and_without_padding():
    task, net = own(), model("span", KNOWN)
    rows = [task.dataset("train")[i] for i in range(2)]
    batch = task.collate(rows)
    sums = {"start": 0.0, "end": 0.0}
    for ids, types, (start, end) in rows:
        inputs = torch.tensor(ids).long()[None], None, torch.tensor(types).long()[None]
        output = net(*inputs)
        for side, place in (("start", start), ("end", end)):
            logits = output[f"{side}_logits"]
            sums[side] += F.cross_entropy(logits, torch.tensor([int(place)]))
    found = task.loss(net, batch)
    for side, total in sums.items():
        torch.testing.assert_close(found[side][0], total)
    assert task.counts(batch) == {"start": 2, "end": 2}


def test_it_learns():
    task, net = own(EXAMPLES * 8), model("span", KNOWN)
    recipe = Recipe(max_steps=80, batch_size=8, learning_rate=5e-3)
    train(net, task, recipe, progress=False)
    scores = task.evaluate(net)
    assert scores["exact_match"] == scores["f1"] == 100
    texts = [f"{one.question} ||| {one.passage}" for one in EXAMPLES]
    assert task.predict(net, texts) == ["The king", "1967"]


def test_an_answer_that_is_cut_off():
    far = Question("Who?", "the film " * 30 + "king", 270, 274)
    task = own([*EXAMPLES, far], max_tokens=32)
    with pytest.warns(UserWarning, match="1 of 3 training examples"):
        assert len(task.dataset("train")) == 2
    assert task.examples("train") == EXAMPLES
    assert task.dataset("valid")[2][2].tolist() == [-100, -100]
    scores = task.evaluate(model("span", KNOWN))
    assert scores["loss"] < 100 and len(task.examples("valid")) == 3
    with pytest.raises(InputError, match="within 32 tokens"):
        own([far], max_tokens=32).dataset("train")


def test_saved_and_loaded(tmp_path):
    task = create_task("question_answering", vocabulary=KNOWN, limit=5)
    task.save(tmp_path)
    loaded = load_task(tmp_path)
    assert loaded.vocabulary == KNOWN
    assert loaded.examples("train") == task.examples("train")


def test_a_folder_of_transformers(tmp_path):
    theirs = foreign_folder(tmp_path, "span", KNOWN)
    task = load_task(tmp_path, kind="question_answering")
    net = create_model("bert_base_span", pretrained=tmp_path)
    ids, types = KNOWN.pack("who made it", PASSAGE)
    with torch.no_grad():
        output = theirs(torch.tensor([ids]), token_type_ids=torch.tensor([types]))
    inside = range(types.index(1), len(ids) - 1)
    spans = [(a, b) for a in inside for b in inside if a <= b]
    score = lambda s: output.start_logits[0, s[0]] + output.end_logits[0, s[1]]
    best = [place - types.index(1) for place in max(spans, key=score)]
    expected = span_text(PASSAGE, KNOWN.offsets(PASSAGE), *best)
    assert task.predict(net, [f"who made it ||| {PASSAGE}"]) == [expected]


@pytest.mark.no_shapes
def test_bad_input():
    task, net = own(), model("span", KNOWN)
    for text in ("", "who made it", "who ||| ", "who ||| \x00", "\ud800 ||| the king"):
        with pytest.raises(InputError, match=r"inputs\[1\]: expected"):
            task.predict(net, ["who ||| the king", text])
    with pytest.raises(InputError, match="at most 64 tokens"):
        task.predict(net, ["who ||| " + "the " * 80])
    with pytest.raises(ConfigError, match="start_logits"):
        task.evaluate(model("sequence", KNOWN))
    for example in (("who", PASSAGE, 0, 3), Question("who", PASSAGE, 5, 5)):
        with pytest.raises(InputError, match="train, example 0"):
            own([example])
    with pytest.raises(ConfigError, match="expected one of films"):
        create_task("question_answering", "squad")
