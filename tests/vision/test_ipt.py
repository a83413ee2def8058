"""IPT: equal to the authors' code on the same weights, in their names and in ours; a
start at the identity; any size of image through tiles; and what it refuses."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import attn_notes as an
from attn_notes.data.sliding_window import window_starts
from attn_notes.foundations.checks import CheckpointError, ConfigError, InputError
from attn_notes.vision.ipt import (
    BOOK,
    IPT,
    SIZES,
    IPTConfig,
    restore_in_tiles,
    tile_starts,
)
from attn_notes.vision.ipt_formats import OFFICIAL_FORMAT
from attn_notes.zoo.devices import check_model
from attn_notes.zoo.factory import count_parameters, create_model

LAYOUTS = Path(__file__).parent / "layouts"
AUTHORS = json.loads((LAYOUTS / "ipt_small.json").read_text())
SMALL = dict(
    img_size=8,
    patch_size=2,
    num_features=4,
    depth=2,
    num_heads=2,
    tasks=("sr_x2", "sr_x3", "denoise_30"),
)


def wave(shape, phase=0):
    return torch.arange(math.prod(shape)).double().mul(0.7).add(phase).sin().view(shape)


def authors_state():
    """The weights for which the authors' code was run."""
    keys = AUTHORS["keys"].items()
    return {key: 0.2 * wave(shape, i) for i, (key, shape) in enumerate(keys)}


@pytest.fixture
def small(tmp_path):
    """Ours, from a file as the authors store it."""
    constant = {
        "sub_mean.weight": torch.eye(3).view(3, 3, 1, 1),
        "sub_mean.bias": torch.zeros(3),
        "add_mean.weight": torch.eye(3).view(3, 3, 1, 1),
        "add_mean.bias": torch.zeros(3),
        "body.position_encoding.position_ids": torch.arange(16)[None],
    }
    torch.save(authors_state() | constant, tmp_path / "IPT.pt")
    options = {"dtype": torch.float64, **SMALL}
    return create_model("ipt_base", tmp_path / "IPT.pt", **options)


# ---- the sizes


@pytest.mark.parametrize("name", SIZES)
def test_counts_and_products(name):
    info, c = an.model_info(name), SIZES[name][0]
    d, f, n = c.embed_dim, c.num_features, (c.img_size // c.patch_size) ** 2
    hidden = int(d * c.mlp_ratio)
    mlp = 2 * d * hidden + hidden + d
    encoder, decoder = 4 * d * d + mlp + 4 * d, 8 * d * d + mlp + 6 * d
    body = d * d + d + n * d + mlp + c.depth * (encoder + decoder)
    head = 27 * f + f + 4 * (25 * f * f + f)
    tails = {
        1: 0,
        2: 36 * f * f + 4 * f,
        3: 81 * f * f + 9 * f,
        4: 2 * (36 * f * f + 4 * f),
    }
    each = [tails[c.scale(task)] + 27 * f + 3 + head + n * d for task in c.tasks]
    model = create_model(name, device="meta")
    assert count_parameters(model) == body + sum(each) == info.parameters
    c1 = c.tasks[0]
    assert c1 == "sr_x2"
    with FlopCounterMode(display=False) as flops:
        model(torch.empty(1, *info.input_size, device="meta"), c1)
    assert flops.get_total_flops() == 2 * info.macs


def test_one_task_has_the_size_that_is_quoted():
    model = create_model("ipt_base", device="meta", tasks=("sr_x2",))
    assert count_parameters(model) == 115_460_419  # 115.5M
    layout = json.loads((LAYOUTS / "ipt.json").read_text())["keys"]
    assert count_parameters(model) == sum(
        math.prod(shape)
        for key, shape in layout.items()
        if not key.endswith("position_ids") and "_mean." not in key
    )


# ---- equal to the authors' code


@pytest.mark.parametrize("task", range(3))
def test_outputs_and_gradients_are_the_authors(small, task):
    images = (wave((2, 3, 8, 8)) + 1) / 2
    found = small(images, SMALL["tasks"][task])
    expected = torch.tensor(AUTHORS["expected"][str(task)], dtype=torch.float64)
    assert (found.flatten()[::29] - expected).abs().max() < 1e-10 * expected.norm()
    found.square().sum().backward()
    slopes = {key: p.grad for key, p in small.named_parameters() if p.grad is not None}
    scale = max(map(abs, AUTHORS["slopes"][str(task)].values()))
    # the authors' names to ours, through the format itself
    keys = {key: torch.full(shape, 1.0 * i) for i, (key, shape) in names()}
    ours = OFFICIAL_FORMAT.apply(keys, small)
    number = {i: key for i, (key, _) in names()}
    compared = 0
    for key, marked in ours.items():
        name = number[int(marked.flatten()[0])]
        if key in slopes:
            g = slopes[key].flatten()
            along = torch.arange(len(g)).double().mul(0.3).sin()
            slope = AUTHORS["slopes"][str(task)][name]
            assert abs((g * along).sum() - slope) < 1e-10 * scale
            compared += 1
    assert compared == len(slopes) >= len(AUTHORS["slopes"][str(task)])


def names():
    return enumerate(AUTHORS["keys"].items())


def test_a_file_in_the_published_layout_loads(tmp_path):
    layout = json.loads((LAYOUTS / "ipt.json").read_text())["keys"]
    model = create_model("ipt_base", device="meta", tasks=("sr_x2",))
    state = {key: torch.empty(shape, device="meta") for key, shape in layout.items()}
    ours, own = OFFICIAL_FORMAT.apply(state, model), model.state_dict()
    assert ours.keys() == own.keys()
    assert all(ours[key].shape == own[key].shape for key in own)


@pytest.mark.no_shapes
@pytest.mark.parametrize("tasks", [("sr_x2",), ("sr_x2", "sr_x3", "derain", "sr_x4")])
def test_a_file_of_another_number_of_tasks(tmp_path, tasks):
    torch.save(authors_state(), tmp_path / "IPT.pt")
    with pytest.raises(CheckpointError, match=r"a head and a tail for each of .*got 3"):
        create_model("ipt_base", tmp_path / "IPT.pt", **{**SMALL, "tasks": tasks})


# ---- how it begins


@pytest.mark.parametrize("name", SIZES)
def test_it_begins_as_the_identity(name):
    torch.manual_seed(0)
    tasks = ("sr_x2", "sr_x3", "sr_x4", "derain")
    sizes = {"depth": 1, "num_features": 12, "img_size": 24, "tasks": tasks}
    model = create_model(name, **sizes)
    images = torch.rand(2, 3, 24, 24)
    with torch.no_grad():
        features = model.heads["derain"](images)
        assert model.body(features, 3).abs().max() < 1e-3  # of positions around 1
        for task in tasks:
            scale = model.config.scale(task)
            wanted = F.interpolate(images, scale_factor=scale, mode="nearest")
            assert (model(images, task) - wanted).abs().max() < 1e-5


def test_the_body_learns_from_the_first_step():
    torch.manual_seed(0)
    model = create_model("ipt_book")
    model(torch.rand(1, 3, 24, 24), "derain").square().sum().backward()
    assert model.body.head.linear2.weight.grad.norm() > 0


# ---- tasks, sizes, tiles


def shaken(**changes):
    torch.manual_seed(0)
    model = IPT(IPTConfig(**{**SMALL, "rgb_range": 1.0, **changes})).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def test_without_a_task_there_is_an_image_for_each():
    model, images = shaken(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    found = model(images)
    assert list(found) == [*SMALL["tasks"]]
    for task, one in found.items():
        scale = model.config.scale(task)
        assert one.shape == (2, 3, 8 * scale, 8 * scale)
        assert torch.equal(one, model(images, task))
    assert not torch.allclose(found["denoise_30"], images, atol=1e-2)


def test_the_task_embedding_matters():
    model = shaken()
    x = torch.rand(1, 4, 8, 8, dtype=torch.float64)
    assert not torch.allclose(model.body(x, 0), model.body(x, 1), atol=1e-3)


@pytest.mark.parametrize("sides", [(8, 13), (21, 30), (5, 9), (1, 1), (3, 20)])
@pytest.mark.parametrize("task", ["sr_x3", "denoise_30"])
def test_any_size(sides, task):
    model = shaken()
    images = torch.rand(2, 3, *sides, dtype=torch.float64)
    found, scale = model(images, task), model.config.scale(task)
    assert found.shape == (2, 3, sides[0] * scale, sides[1] * scale)
    assert torch.allclose(found[:1], model(images[:1], task))  # whatever is beside it
    if min(sides) >= 8:  # the corner is the first tile's alone
        corner = model(images[..., :8, :8], task)
        inner = (..., slice(4 * scale), slice(4 * scale))
        assert torch.allclose(found[inner], corner[inner])


@pytest.mark.parametrize("size", [1, 3, 8])
def test_tiles_cover_everything(size):
    for side in range(size, 4 * size + 3):
        starts = tile_starts(side, size)
        seen = {i for start in starts for i in range(start, start + size)}
        assert seen == {*range(side)} and starts == sorted({*starts})
        assert starts == window_starts(side, size)  # as those of volumes
    images = torch.rand(2, 3, 3 * size + 1, 2 * size, dtype=torch.float64)
    same = restore_in_tiles(lambda tiles: tiles, images, size, 1)
    assert torch.allclose(same, images)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "images, task, said",
    [
        (torch.rand(1, 3, 8, 8), "sharpen", "one of sr_x2, sr_x3, denoise_30; got 'sh"),
        (torch.rand(1, 3, 8, 8), 7, "task: expected one of sr_x2"),
        (torch.rand(1, 1, 8, 8), "sr_x2", r"images: .*\(b, 3, h, w\)"),
        (torch.rand(3, 8, 8), "sr_x2", "images: expected"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "sr_x2", "floating point"),
        (torch.rand(1, 3, 0, 8), "sr_x2", "at least one image and one pixel"),
    ],
)
def test_what_the_model_refuses(images, task, said):
    with pytest.raises(InputError, match=said) as error:
        IPT(IPTConfig(**SMALL))(images, task)
    assert "\n" not in str(error.value)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "changes, said",
    [
        ({"patch_size": 3}, "patch_size: expected a divisor of img_size"),
        ({"num_heads": 3}, "num_heads: expected a divisor of embed_dim"),
        ({"tasks": ()}, "tasks, mean: expected names"),
        ({"tasks": ("sr_x2", "sr_x2")}, "each once"),
        ({"tasks": ("no.dot",)}, "lower-case letters"),
        ({"tasks": ("sr_x5",)}, "enlarge by 2, 3, 4 or 8 times; got 5"),
        ({"rgb_range": 0.0}, "rgb_range"),
    ],
)
def test_what_the_configuration_refuses(changes, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        IPTConfig(**{**SMALL, **changes})


@pytest.mark.no_shapes
def test_a_named_task_compiles_and_exports():
    model = create_model("ipt_book", **{**SMALL, "num_features": 3, "num_heads": 1})
    images = torch.rand(1, 3, 8, 12)
    with torch.no_grad():
        expected = model(images, "sr_x3")
        exported = torch.export.export(model, (images, "sr_x3")).module()
        assert torch.allclose(exported(images, "sr_x3"), expected, atol=1e-5)
        model.compile(backend="eager", fullgraph=True)
        assert torch.allclose(model(images, "sr_x3"), expected, atol=1e-5)


def test_the_small_one_on_the_stand_in_device():
    assert check_model("ipt_book", "fake").without_gradient == ()


# ---- what ships


def test_shipped_weights_beat_bicubic_on_photographs_they_never_saw():
    from attn_notes.data.degraded_images import bicubic
    from attn_notes.data.restoration import mean_scores
    from attn_notes.data.tasks import load_task
    from attn_notes.zoo.registry import weights_folder

    model = create_model("ipt_book", pretrained=True)
    task = load_task(weights_folder("ipt_book"))
    assert task.tasks == BOOK["tasks"]
    found = task.evaluate(model)
    before = mean_scores(list(task.score(bicubic, range(len(task.dataset("valid"))))))
    for name in task.tasks:
        assert found[f"psnr_{name}"] > before[f"psnr_{name}"] + 0.3
        assert found[f"ssim_{name}"] > before[f"ssim_{name}"]
