"""Hidden tokens in their shares, and pairs of passages that follow or do not."""

import numpy as np
import pytest
import torch

from attn_notes.data.masking import mask_tokens, sentence_pairs, shorten
from attn_notes.foundations.checks import ConfigError, InputError

PAD, CLS, SEP, MASK, SIZE = 0, 2, 3, 4, 500


def batch(lengths):
    """Rows of [CLS] tokens [SEP], padded, and where they are real."""
    n = max(lengths)
    ids = np.arange(n) + np.arange(len(lengths))[:, None] + 10
    real = np.arange(n) < np.array(lengths)[:, None]
    ids[:, 0], ids[np.arange(len(lengths)), np.array(lengths) - 1] = CLS, SEP
    return np.where(real, ids, PAD), real


def mask(ids, real=None, seed=0, **options):
    rng = np.random.default_rng(seed)
    special = (PAD, CLS, SEP)
    return mask_tokens(ids, special, MASK, SIZE, rng, attention_mask=real, **options)


@pytest.mark.parametrize("rate", [0.0, 0.15, 0.5])
@pytest.mark.parametrize("most", [None, 3])
def test_the_number_is_exact_and_no_special_token_is_chosen(rate, most):
    lengths = [3, 4, 9, 10, 17, 64]
    ids, real = batch(lengths)
    _, labels = mask(ids, real, rate=rate, max_predictions=most)
    wanted = [min(max(1, round(rate * n)), n - 2, most or n) for n in lengths]
    chosen = labels != -100
    assert chosen.sum(1).tolist() == wanted
    assert not chosen[np.isin(ids, (PAD, CLS, SEP))].any()
    assert (labels[chosen] == ids[chosen]).all()


def test_shares_within_binomial_bounds():
    """Of 100,000 hidden tokens 80% [MASK], 10% of the whole vocabulary, 10% kept; no
    position is preferred."""
    ids = np.tile(np.arange(20, 120), (7000, 1))
    hidden, labels = mask(ids)
    chosen = labels != -100
    n = chosen.sum()
    assert n == 7000 * 15 and (hidden[~chosen] == ids[~chosen]).all()
    same = 0.1 / SIZE  # a drawn token may be the one that stood there, or [MASK]
    kept = (hidden == ids)[chosen].mean()
    covered = (hidden == MASK)[chosen].mean()
    for share, wanted in ((covered, 0.8 + same), (kept, 0.1 + same)):
        assert abs(share - wanted) < 4 * (wanted * (1 - wanted) / n) ** 0.5
    drawn = hidden[chosen & (hidden != ids) & (hidden != MASK)]
    assert drawn.min() == 0 and drawn.max() == SIZE - 1
    counts = chosen.sum(0)
    assert abs(counts - 7000 * 0.15).max() < 5 * (7000 * 0.15 * 0.85) ** 0.5


def test_draws_are_those_of_the_generator_and_of_tensors_too():
    ids, real = batch([9, 30])
    one, other, again = mask(ids, real), mask(ids, real, seed=1), mask(ids, real)
    assert (one[1] == again[1]).all() and (one[1] != other[1]).any()
    given = torch.from_numpy(ids), torch.from_numpy(real)
    for tensor, array in zip(mask(*given), one, strict=True):
        assert tensor.dtype == torch.int64 and (tensor.numpy() == array).all()


def test_a_row_of_special_tokens_has_nothing_to_predict():
    hidden, labels = mask(np.array([[CLS, SEP]]))
    assert hidden.tolist() == [[CLS, SEP]] and (labels == -100).all()


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "ids, options, error",
    [
        (np.arange(5), {}, InputError),
        (np.ones((2, 3)), {}, InputError),
        (np.ones((2, 3), int), {"rate": 1.5}, ConfigError),
        (np.ones((2, 3), int), {"max_predictions": 0}, ConfigError),
    ],
)
def test_bad_ids_and_rates(ids, options, error):
    with pytest.raises(error):
        mask(ids, **options)


def corpus(documents=40, sentences=9, seed=0):
    """Documents of sentences of 3 to 8 tokens; a token says where it stands."""
    rng, found = np.random.default_rng(seed), []
    for d in range(documents):
        sizes = rng.integers(3, 9, sentences)
        ends = np.cumsum(sizes)
        tokens = 1000 * (d + 1) + np.arange(ends[-1])
        found.append([part.tolist() for part in np.split(tokens, ends[:-1])])
    return found


def follow(row):
    """Whether tokens stand one after another."""
    return row == list(range(row[0], row[0] + len(row)))


@pytest.mark.parametrize("max_tokens", [5, 16, 40, 128])
def test_pairs_say_what_they_are(max_tokens):
    documents = corpus()
    pairs = list(sentence_pairs(documents, max_tokens, np.random.default_rng(1)))
    for first, second, is_random in pairs:
        assert follow(first) and follow(second)
        assert len(first) + len(second) + 3 <= max_tokens
        assert is_random == (first[0] // 1000 != second[0] // 1000)
        assert is_random or second[0] > first[-1]
    if max_tokens == 128:  # nothing is shortened: a first passage begins where it may
        starts = {s[0] for d in documents for s in d}
        assert {row[0] for row, _, _ in pairs} <= starts


def test_halves_are_balanced_where_something_follows():
    pairs = sentence_pairs(corpus(300, 30), 32, np.random.default_rng(0), 0.0)
    ends = {1000 * (d + 1) + sum(map(len, doc)) - 1 for d, doc in
            enumerate(corpus(300, 30))}  # fmt: skip
    random = [is_random for first, _, is_random in pairs if first[-1] not in ends]
    n = len(random)
    assert n > 2000 and abs(np.mean(random) - 0.5) < 4 * (0.25 / n) ** 0.5


def test_what_was_exchanged_is_not_lost():
    """Without shortening, every sentence of a document is in some pair of its own."""
    documents = corpus(10, 12)
    pairs = list(sentence_pairs(documents, 300, np.random.default_rng(2)))
    own = {t for a, b, other in pairs for t in (a if other else a + b)}
    assert own == {t for d in documents for s in d for t in s}


def test_some_are_short():
    lengths = {}
    for share in (0.0, 0.5):
        rng = np.random.default_rng(3)
        pairs = sentence_pairs(corpus(100, 40), 60, rng, share)
        lengths[share] = np.mean([len(a) + len(b) for a, b, _ in pairs])
    assert lengths[0.5] < lengths[0.0] - 5


@pytest.mark.parametrize("sizes", [(9, 3), (3, 9), (6, 6), (20, 1), (1, 20)])
def test_the_longer_one_is_shortened(sizes):
    """At either end, as often; the last token of the second where both are equal."""
    first, second = list(range(sizes[0])), list(range(100, 100 + sizes[1]))
    cut = [shorten(first, second, 7, np.random.default_rng(i)) for i in range(50)]
    a, b = list(sizes)
    while a + b > 7:
        a, b = (a - 1, b) if a > b else (a, b - 1)
    assert {(len(one), len(two)) for one, two in cut} == {(a, b)}
    assert all(follow(row) for pair in cut for row in pair)
    long = int(sizes[1] > sizes[0])
    assert len({pair[long][0] for pair in cut}) > 1


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "documents, max_tokens",
    [([], 20), ([[[5, 6]]], 20), ([[[5]], []], 20), ([[[5]], [[]]], 20), (2, 4)],
)
def test_bad_documents(documents, max_tokens):
    documents = corpus(documents) if documents == 2 else documents
    with pytest.raises(InputError):
        list(sentence_pairs(documents, max_tokens, np.random.default_rng(0)))
