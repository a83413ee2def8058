"""What the small iGPT has learned, and the parts of its experiments."""

import pytest
import torch

from attn_notes import create_model
from attn_notes.data.tasks import load_task
from attn_notes.vision.igpt_evidence import NEIGHBOURS, contexts, counted_bits
from attn_notes.vision.igpt_training_evidence import (
    Reordered,
    fine_tune,
    layer_features,
    probe,
)
from attn_notes.zoo.checkpoints import shipped_weights


def task_and_model():
    return load_task(shipped_weights("igpt_book")), create_model("igpt_book", True)


def test_the_shipped_weights_predict_pixels_and_complete():
    task, model = task_and_model()
    rows = task.dataset("valid")
    batch = task.collate([rows[i] for i in range(0, 1000, 20)])
    with torch.no_grad():
        logits = model(batch["input_ids"])
    loss = torch.nn.functional.cross_entropy(logits.mT, batch["pixels"])
    assert 0.3 < loss / torch.log(torch.tensor(2.0)) < 0.65
    (image,) = task.predict(model, [rows[0][0]])
    assert image.size == (14, 14)


def test_counting_by_hand():
    """Two images of 2 x 2 pixels and two colours."""
    known = torch.tensor([[0, 1, 1, 0]]).numpy()
    bits = counted_bits(known, known, 2, 1.0, side=2)
    assert len(bits) == len(NEIGHBOURS) + 2
    assert bits[0] == pytest.approx(1.0)  # two of each
    before = contexts(known, 2, 2)
    assert before[0].tolist() == [[2, 0, 2, 1]]  # the pixel on the left, 2: the border
    assert before[1].tolist() == [[2, 2, 0, 1]]  # the one above
    # after the border 0 and 1; after 0 a 1; after 1 a 0; each mixed with one half
    left = torch.tensor([(1 + 0.5) / 3, (1 + 0.5) / 2, (1 + 0.5) / 3, (1 + 0.5) / 2])
    assert bits[1] == pytest.approx(-left.log2().mean().item(), abs=1e-6)


def test_more_counts_are_better_where_the_images_are_regular():
    random = torch.Generator().manual_seed(0)
    first = torch.randint(0, 2, (200, 1, 1), generator=random)
    images = (first + torch.arange(4)[:, None] + torch.arange(4)).remainder(2)
    pixels = images.flatten(1).numpy()
    bits = counted_bits(pixels[:100], pixels[100:], 2, 1.0, side=4)
    assert bits[0] == pytest.approx(1, abs=0.05) and bits[1] < 0.3


def test_features_are_means_of_normed_states():
    task, model = task_and_model()
    rows = task.dataset("valid")
    ids = task.collate([rows[i] for i in (0, 500)])["input_ids"]
    layers = layer_features(model, ids)
    assert [x.shape for x in layers] == [(2, 64)] * 7
    with torch.no_grad():
        last = model.hidden_states(ids).mean(1)
        first = model.decoder.layers[0].norm1(model.embedding(ids)).mean(1)
    assert torch.allclose(torch.tensor(layers[-1]), last, atol=1e-5)
    assert torch.allclose(torch.tensor(layers[0]), first, atol=1e-5)


def test_a_probe_separates_what_a_line_does():
    x = torch.randn(80, 3, generator=torch.Generator().manual_seed(0)).numpy()
    labels = (x[:, 0] > 0).astype(int)
    assert probe((x[:60], labels[:60]), (x[60:], labels[60:])) > 80


def test_reordered_pixels_are_the_same_ones():
    task = Reordered.create("mnist", limit=8, augment=False, image_size=14)
    rows = task.dataset("train")
    plain = task.collate([rows[0]])
    task.order = torch.randperm(196, generator=torch.Generator().manual_seed(0))
    turned = task.collate([rows[0]])
    assert torch.equal(turned["pixels"][0], plain["pixels"][0, task.order])
    assert torch.equal(turned["input_ids"][0, 1:], turned["pixels"][0, :-1])


def test_fine_tuning_begins_where_it_says(monkeypatch):
    """With a rate of nearly nothing the weights are those that it began with."""
    from attn_notes.vision import igpt_training_evidence as evidence

    pixels = create_model("igpt_book", True)
    short = evidence.replace(evidence.FINE_TUNING, max_steps=1, warmup_steps=0)
    monkeypatch.setattr(evidence, "FINE_TUNING", short)
    for start in ("pretrained", "fresh"):
        model, task = fine_tune(start, 1.0, 16, 0, 1e-9)
        key = "decoder.layers.2.feed_forward.linear1.weight"
        same = torch.allclose(
            model.get_parameter(key), pixels.get_parameter(key), atol=1e-6
        )
        assert same == (start == "pretrained")
        assert len(task.dataset("train")) == 16
