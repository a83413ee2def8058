"""The digits that the small vision transformer was trained on, and the parts of its
experiments."""

import pytest
import torch
from torch.testing import assert_close

from attn_notes import create_model
from attn_notes.data.tasks import load_task
from attn_notes.vision.vit_training_evidence import (
    PATCH_4,
    WAYS,
    RowsAndColumns,
    digits,
    enlarged,
    network,
    set_positions,
)
from attn_notes.zoo.checkpoints import shipped_weights


def test_the_shipped_weights_tell_digits_apart():
    task = load_task(shipped_weights("vit_book"))
    scores = task.evaluate(create_model("vit_book", pretrained=True), "valid")
    assert scores["accuracy"] > 0.95 and task.classes == [*"0123456789"]


def test_one_half_of_a_position_is_the_row_and_one_the_column():
    positions = RowsAndColumns(8, 3)
    table = positions(3, 3)[1:].unflatten(0, (3, 3))
    assert_close(table[1, :, :4], table[1, :1, :4].expand(3, -1))
    assert_close(table[:, 2, 4:], table[:1, 2, 4:].expand(3, -1))
    assert not torch.equal(table[0], table[1])
    assert not torch.equal(table[:, 0], table[:, 1])


@pytest.mark.parametrize("kind, same", [("none", True), ("1-D", False), ("2-D", False)])
def test_without_positions_the_order_of_the_patches_is_nothing(kind, same):
    model = network("vit", 0)
    set_positions(model, kind)
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(2, 1, 28, 28)
    turned = images.unflatten(-1, (4, 7)).flip(-2).flatten(-2)  # columns of patches
    change = (model(images) - model(turned)).abs().max()
    assert (change < 1e-4) == same


@pytest.mark.parametrize("way", WAYS)
def test_an_enlarged_model_has_the_old_weights_and_other_positions(way):
    model = network("vit", 0, img_size=16, **PATCH_4)
    torch.nn.init.normal_(model.head.weight)
    larger, images = enlarged(model, way, 1), torch.randn(2, 1, 28, 28)
    assert larger.positions.side == 7
    for name, value in model.state_dict().items():
        if name != "positions.weight":
            assert torch.equal(larger.state_dict()[name], value)
    # the model itself interpolates in 2-D where an image is larger
    assert torch.allclose(larger(images), model(images), atol=1e-4) == (way == "2-D")


def test_smaller_digits():
    task = digits(100, seed=0, side=16)
    batch = task.collate([task.dataset("train")[i] for i in range(3)])
    assert batch["images"].shape == (3, 1, 16, 16) and len(task.dataset("train")) == 100
