"""Sets with labels: what is held out is held out, and labels are what they say."""

from itertools import pairwise

import pytest

from attn_notes.data.labelled_text import (
    MARKS,
    PASSAGES,
    QUESTIONS,
    classified_texts,
    film_questions,
    films,
    labelled_words,
    make_question,
    verse_pairs,
    with_marks,
    without_marks,
)
from attn_notes.data.text import kjv_chapters, text_classification
from attn_notes.data.translation import SPLITS
from attn_notes.foundations.checks import ConfigError

OTHERS = (("train", "valid"), ("train", "test"), ("valid", "test"))


def apart(sets):
    return not any(sets[a] & sets[b] for a, b in OTHERS)


def test_pairs_are_next_or_of_another_chapter():
    where, following = {}, set()
    for _, verses in kjv_chapters():
        for verse in verses:
            where.setdefault(verse.text, set()).add((verse.book, verse.chapter))
        following |= {(a.text, b.text) for a, b in pairwise(verses)}
    for split in SPLITS:
        for (a, b), label in verse_pairs(split):
            assert ((a, b) in following) == bool(label)
            if not label:
                assert {book for book, _ in where[a]} & {book for book, _ in where[b]}


def test_no_verse_of_a_pair_is_in_two_splits():
    pairs = {split: verse_pairs(split) for split in SPLITS}
    assert apart({s: {v for p, _ in some for v in p} for s, some in pairs.items()})
    for some in pairs.values():
        assert 0.46 < sum(label for _, label in some) / len(some) < 0.54


def test_a_wrong_second_verse_is_no_opening():
    openings = {verses[0].text for _, verses in kjv_chapters()}
    inner = {v.text for _, verses in kjv_chapters() for v in verses[1:]}
    seconds = {
        b for split in SPLITS for (_, b), label in verse_pairs(split) if not label
    }
    assert not seconds & (openings - inner)


@pytest.mark.parametrize(
    "text, words, labels",
    [
        ("And he said, Who?", "and he said who", [0, 0, 1, 4]),
        ("Go; (for it is late.) Lo!", "go for it is late lo", [2, 0, 0, 0, 3, 4]),
        ("the king’s, Beth-el:", "the king’s beth-el", [0, 1, 2]),
        ("light — and", "light and", [0, 0]),
    ],
)
def test_marks_by_hand(text, words, labels):
    found = without_marks(text)
    assert found == (words.split(), labels)


def test_marks_come_back():
    text = "And God said, Let there be light: and there was light."
    assert with_marks(*without_marks(text)) == text.lower()
    words, labels, classes = labelled_words(split="test")
    assert classes == MARKS and all(map(len, words))
    assert [*map(len, words)] == [*map(len, labels)]


def test_words_are_in_one_split():
    rows = {split: {*map(tuple, labelled_words(split=split)[0])} for split in SPLITS}
    assert apart(rows)


@pytest.mark.parametrize("split", SPLITS)
def test_answers_stand_where_they_say(split):
    for question in film_questions(split):
        assert question.answer and question.answer == question.answer.strip()
        assert 0 <= question.start < question.end <= len(question.passage)


def test_an_answer_by_hand():
    facts = {"title": "Playtime", "year": "1967", "director": "Jacques Tati"}
    facts |= {"country": "France", "language": "French", "minutes": "124 minutes"}
    facts |= {"actors": "Barbara Dennek and Billy Kearns"}
    form, wording = PASSAGES["test"][0], QUESTIONS["country"][0]
    made = make_question(facts, form, "country", wording)
    assert made.question == "Where was Playtime made?" and made.answer == "France"
    assert made.passage.startswith("Playtime lasts 124 minutes. With Barbara Dennek")
    for kind in QUESTIONS:
        made = make_question(facts, form, kind, QUESTIONS[kind][0])
        assert made.answer == facts[kind]


def test_films_and_forms_are_held_out():
    forms = [form for some in PASSAGES.values() for form in some]
    assert len({*forms}) == len(forms)
    orders = {s: {order(form) for form in some} for s, some in PASSAGES.items()}
    assert apart(orders)
    titles = {f["title"] for f in films()}
    assert len(titles) > 9000 and len(film_questions("test")) > 400
    passages = {s: {q.passage for q in film_questions(s)} for s in SPLITS}
    assert apart(passages)


def order(form):
    names = ("title", "year", "director", "country", "language", "minutes", "actors")
    assert all(form.count(f"{{{name}}}") == 1 for name in names)
    return tuple(sorted(names, key=form.index))


def test_three_sets_in_one_shape():
    texts, labels, classes = classified_texts("kjv-sections", "test")
    assert (texts, labels, classes) == text_classification("kjv-sections", "test")
    texts, labels, classes = classified_texts("kjv-pairs", "test")
    assert len(texts[0]) == 2 and {*labels} == {0, 1} and classes[1] == "next"


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "call",
    [
        lambda: classified_texts("imdb"),
        lambda: labelled_words("conll"),
        lambda: verse_pairs("dev"),
        lambda: film_questions("dev"),
        lambda: labelled_words(split="dev"),
    ],
)
def test_bad_names(call):
    with pytest.raises(ConfigError, match="expected one of"):
        call()
