"""The shipped weights of the small UNETR, the scores of its experiments, and what is
taken from a gradient."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from attn_notes import create_model
from attn_notes.data.brain import hard_brain
from attn_notes.data.tasks import load_task
from attn_notes.segmentation import unetr_training_evidence as evidence
from attn_notes.zoo.checkpoints import shipped_weights


def test_the_shipped_weights_know_tissues_from_intensity_alone_better():
    task = load_task(shipped_weights("unetr_tiny"))
    model = create_model("unetr_tiny", pretrained=True)
    volumes, labels = evidence.held("valid", 0, 4)
    ours = evidence.dice(evidence.answers(model, volumes), labels)
    ruler = evidence.regression(*evidence.held("train", 1000, 2), volumes)
    assert np.mean(ours) > np.mean(evidence.dice(ruler, labels)) + 0.05
    assert task.classes[3] == "white matter" and task.sides == evidence.WINDOW


def test_dice_is_counted_over_all_voxels():
    labels = torch.tensor([[0, 1, 1, 2], [3, 3, 3, 1]])
    said = torch.tensor([[0, 1, 2, 2], [3, 0, 3, 1]])
    assert_close(evidence.dice(said, labels), [0.8, 0.6667, 0.8])
    assert evidence.dice(labels, labels) == [1, 1, 1]


@pytest.mark.parametrize("voxels, expected", [(1, 0), (2, 0), (3, 1), (6, 1), (7, 2)])
def test_a_sheet_is_as_thick_as_it_is(voxels, expected):
    mask = np.zeros((16, 16, 16), bool)
    mask[4 : 4 + voxels] = True  # it goes on beyond the other borders
    found = evidence.thickness(mask)
    assert (found[mask] == expected).all() and (found[~mask] == -1).all()


def test_dice_by_thickness_is_dice_where_all_is_alike():
    labels = torch.zeros(1, 16, 16, 16, dtype=torch.long)
    labels[:, 2:10] = 1
    said = labels.clone()
    said[:, 10:12] = 1  # beside the sheet, so in its class
    found = evidence.dice_by_thickness(said, labels)
    assert found[0] == [0, 0, evidence.dice(said, labels)[0]]


@pytest.mark.parametrize(
    "model, depth, side", [("unetr", 1, 64), ("unet", 1, 7), ("unet", 3, 35)]
)
def test_what_a_state_depends_on_is_what_kernels_and_strides_say(model, depth, side):
    volume, _ = hard_brain("valid", (0, 2), (64, 64, 64))
    net = evidence.network(model, 0, norm="batch")
    assert evidence.reach(net, volume, depth)["reached"] == round((side / 64) ** 3, 4)


def test_held_statistics_change_no_answer_and_stop_the_gradient():
    norm, x = nn.InstanceNorm3d(2), torch.randn(1, 2, 4, 4, 4, requires_grad=True)
    before = norm(x).detach()
    evidence.hold_statistics(norm)
    assert_close(norm(x), before)
    (slope,) = torch.autograd.grad(norm(x)[0, 0, 0, 0, 0], x)
    assert (slope != 0).sum() == 1


def test_both_networks_are_of_one_size():
    sizes = [evidence.count_parameters(evidence.network(m, 0)) for m in evidence.MODELS]
    assert abs(sizes[0] / sizes[1] - 1) < 0.03
