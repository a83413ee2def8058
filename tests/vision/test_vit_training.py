"""The digits and squares of photographs that the small vision transformers were trained
on, and the parts of their experiments."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from attn_notes import create_model
from attn_notes.data.image_sets import PATCH, PHOTOGRAPHS, columns_of, photograph
from attn_notes.data.tasks import load_task
from attn_notes.vision.vit_evidence import vit_macs
from attn_notes.vision.vit_training_evidence import (
    PATCH_4,
    PATCHES,
    WAYS,
    RowsAndColumns,
    colour_network,
    digits,
    enlarged,
    left_parts,
    network,
    photographs,
    set_positions,
)
from attn_notes.zoo.checkpoints import shipped_weights
from attn_notes.zoo.factory import count_parameters


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


@pytest.mark.parametrize("patch, count", [(14, 4), (7, 16), (4, 49)])
def test_networks_of_another_patch_differ_in_what_reads_it_alone(patch, count):
    assert patch in PATCHES
    usual, other = network("vit", 0), network("vit", 0, patch_size=patch).to("meta")
    both = (usual.named_parameters(), other.named_parameters())
    shapes = [{name: p.shape for name, p in found} for found in both]
    first, positions = "patch_embedding.projection.weight", "positions.weight"
    assert shapes[1].pop(first) == (64, 1, patch, patch) and shapes[0].pop(first)
    assert shapes[1].pop(positions) == (1 + count, 64) and shapes[0].pop(positions)
    assert shapes[0] == shapes[1]
    with FlopCounterMode(display=False) as flops:
        other(torch.zeros(1, 1, 28, 28, device="meta"))
    assert flops.get_total_flops() == 2 * sum(vit_macs(other.config).values())


def test_networks_for_squares_are_of_one_size():
    models = [colour_network(name, 0).eval() for name in ("vit", "cnn")]
    ours, other = map(count_parameters, models)
    assert abs(ours / other - 1) < 0.01
    shapes = [tuple(model(torch.zeros(2, 3, 32, 32)).shape) for model in models]
    assert shapes == [(2, 10)] * 2


def test_the_seed_draws_the_squares_to_train_on():
    one, same, other = (photographs(100, seed).dataset("train") for seed in (0, 0, 1))
    assert len(one) == 100 and torch.equal(one.images, same.images)
    assert not torch.equal(one.images, other.images)
    held_out = [photographs(100, seed).dataset("valid").images for seed in (0, 1)]
    assert torch.equal(*held_out) and len(held_out[0]) == 1000


def test_rates_are_chosen_within_what_is_there_for_training():
    """The squares they are tested on lie in the right quarter of the left part."""
    rows = left_parts().dataset("valid")
    for label, name in enumerate(PHOTOGRAPHS):
        whole = torch.tensor(photograph(name)).permute(2, 0, 1)
        end = columns_of(whole.shape[2], "train")[1]
        place = whole[:, :, columns_of(end, "valid")[0] : end]
        found = place.unfold(1, PATCH, 1).unfold(2, PATCH, 1)  # 3 y x 32 32
        square = rows.images[rows.labels == label][0]
        corner = (found[..., 0, 0] == square[:, :1, 0, None]).all(0)
        assert (found[:, corner] == square[:, None]).flatten(2).all(-1).all(0).any()
