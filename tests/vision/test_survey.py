"""The experiment with one head or two: what is asked, and that both are as large."""

import pytest
import torch

from attn_notes.vision.survey_evidence import (
    DISTANCES,
    PLACES,
    OneLayer,
    milliseconds,
    rings,
)
from attn_notes.zoo.factory import count_parameters


def test_each_place_is_asked_for_the_digits_before_it():
    torch.manual_seed(0)
    labels = torch.arange(10)
    images = labels[:, None].float().expand(10, 4)
    inputs, targets = rings(images, labels, 3, 2)
    assert inputs.shape == (3, PLACES, 4) and targets.shape == (3, PLACES, 2)
    for place in range(PLACES):
        for relation, far in enumerate(DISTANCES):
            asked = inputs[:, (place - far) % PLACES, 0]
            assert torch.equal(targets[:, place, relation], asked.long())


@pytest.mark.parametrize("layer", ["alone", "block"])
@pytest.mark.parametrize("relations", [1, 2])
def test_one_head_and_two_have_as_many_parameters(layer, relations):
    one, two = (OneLayer(heads, layer, relations) for heads in (1, 2))
    assert count_parameters(one) == count_parameters(two)
    logits = two(torch.randn(3, PLACES, 784))
    assert logits.shape == (3, PLACES, relations, 10)


def test_without_attention_to_others_a_layer_cannot_know():
    """What is answered at a place does depend on the digits at other places."""
    torch.manual_seed(0)
    net, digits = OneLayer(2, "alone", 2).eval(), torch.randn(1, PLACES, 784)
    changed = digits.clone()
    changed[:, 3] += 1
    assert (net(digits) - net(changed)).abs().amax((0, 2, 3)).min() > 0


def test_the_median_call_is_timed():
    calls = []
    assert milliseconds(lambda: calls.append(1), 5) >= 0 and len(calls) == 6
