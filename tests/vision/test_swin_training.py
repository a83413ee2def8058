"""The digits that the small Swin was trained on, the parts of its experiments, and the
ways to attend that are compared."""

import pytest
import torch
from torch.testing import assert_close

from attn_notes import create_model, model_info
from attn_notes.data.tasks import load_task
from attn_notes.vision import swin_training_evidence as evidence
from attn_notes.vision.swin import SwinConfig
from attn_notes.zoo.checkpoints import shipped_weights


def test_the_shipped_weights_tell_digits_apart():
    task = load_task(shipped_weights("swin_book"))
    scores = task.evaluate(create_model("swin_book", pretrained=True), "valid")
    assert scores["accuracy"] > 0.9 and task.classes == [*"0123456789"]


def test_the_experiments_have_the_network_that_ships():
    assert SwinConfig(**evidence.SMALL) == model_info("swin_book").config


def test_four_digits_are_one_image_and_neighbours_lie_side_by_side():
    task = evidence.FourDigits.create("mnist", seed=0, augment=False)
    rows = task.dataset("train")
    batch = task.collate([rows[i] for i in range(8)])
    labels = torch.tensor([rows[i][1] for i in range(8)]).view(2, 2, 2)
    assert batch["images"].shape == (2, 1, 28, 28)
    assert torch.equal(batch["labels"], labels)
    single = evidence.Digits.create("mnist", seed=0, augment=False)
    third = single.collate([rows[6]])["images"]
    small = torch.nn.functional.avg_pool2d(third, 2)[0, 0]
    assert_close(batch["images"][1, 0, 14:, :14], small)


@pytest.mark.parametrize("shift", [True, False])
def test_without_the_shift_a_window_hears_of_no_other(shift):
    torch.manual_seed(0)
    model, images = evidence.OfWindows(shift), torch.randn(1, 1, 28, 28)
    own, beside = model(images)
    assert own.shape == beside.shape == (1, 2, 2, 10)
    images[..., 14:] += 1  # the digits on the right
    change = (model(images)[0] - own)[0, :, 0].abs().max()
    assert (change > 1e-4) == shift


@pytest.mark.parametrize(
    "positions, same", [("none", True), ("relative", False), ("absolute", False)]
)
def test_without_positions_the_order_of_the_patches_is_nothing(positions, same):
    torch.manual_seed(0)
    model = evidence.network(0, positions, shift=False)
    for table in model.stages.parameters():
        if positions == "relative" and table.shape[0] == 169:
            torch.nn.init.normal_(table)
    images = torch.randn(1, 1, 28, 28)
    upside_down = images.unflatten(2, (14, 2)).flip(2).flatten(2, 3)  # rows of patches
    z, y = (model.stages[0](model.embed(one)) for one in (images, upside_down))
    assert ((y.flip(1) - z).abs().max() < 1e-4) == same


@pytest.mark.parametrize("way", evidence.WAYS, ids=lambda way: way.__name__)
def test_each_way_is_attention_among_the_tokens_that_it_names(way):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 14, 21, 8)
    y, x = torch.cartesian_prod(torch.arange(14), torch.arange(21)).T
    if way in (evidence.gathered, evidence.offsets):
        near = lambda a: (a[:, None] - a).abs() <= 3
        seen = near(y) & near(x)
    else:
        moved = 0 if way is evidence.regular else 4  # borders at 3, 10, 17
        window = (y + moved) // 7 * 10 + (x + moved) // 7
        seen = window[:, None] == window
    flat = [a.flatten(1, 2) for a in (q, k, v)]
    dense = torch.nn.functional.scaled_dot_product_attention(*flat, attn_mask=seen)
    assert_close(way(q, k, v).flatten(1, 2), dense)


def test_traffic_counts_what_operations_read_and_write():
    a, b = torch.randn(4, 6), torch.randn(6, 5)
    with evidence.Traffic() as traffic:
        a.T.T @ b  # views are free
    assert traffic.bytes == 4 * (4 * 6 + 6 * 5 + 4 * 5)
