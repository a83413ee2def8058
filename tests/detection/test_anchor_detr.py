"""Anchor DETR: its attention equal to a loop over places, whole models to the authors'
code on the same weights; what must not change anything does not; and the files that it
is read from."""

import json
import math
import re
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import attn_notes as an
from attn_notes.detection.anchor_detr import (
    PAPER,
    SIZES,
    AnchorDETR,
    AnchorDETRConfig,
    PointPositions,
    axis_middles,
)
from attn_notes.detection.anchor_detr_formats import OFFICIAL_FORMAT
from attn_notes.detection.row_column_attention import RowColumnAttention
from attn_notes.foundations.attention import record_attention
from attn_notes.training.recipes import make_optimizer
from attn_notes.zoo.benchmark import peak_memory
from attn_notes.zoo.devices import STAND_IN, fake_device, to_stand_in
from attn_notes.zoo.factory import count_parameters, create_model

LAYOUTS = Path(__file__).parent / "layouts"
SMALL = AnchorDETRConfig(
    hidden_size=32,
    num_attention_heads=2,
    intermediate_size=20,
    encoder_layers=2,
    decoder_layers=3,
    num_anchor_points=4,
    num_patterns=2,
    num_classes=4,
    backbone="small",
)
KINDS = ("row_column", "full")


def small(**change):
    """Ours in double precision, noise on all weights, in evaluation mode."""
    torch.manual_seed(0)
    model = AnchorDETR(replace(SMALL, **change)).double()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key != "anchor_points":
                noise = 0.2 if "backbone" not in key else 0.01
                value.add_(noise * torch.rand_like(value).sub(0.5))
    return model.eval()


def images(*sizes, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *s, generator=random, dtype=torch.float64) for s in sizes]


def targets(*counts):
    torch.manual_seed(1)
    found = []
    for n in counts:
        start = 30 * torch.rand(n, 2).double()
        boxes = torch.cat([start, start + 5 + 25 * torch.rand(n, 2)], -1)
        found.append({"boxes": boxes, "labels": torch.randint(4, (n,))})
    return found


# ---- the attention


def by_definition(attention, query_x, query_y, memory, places_x, places_y, mask):
    """Place by place: the weight of each is the product of its column's and row's."""
    d, heads = attention.hidden_size, attention.num_attention_heads
    parts = zip(
        attention.in_proj_weight.chunk(5), attention.in_proj_bias.chunk(5), strict=True
    )
    q_x, q_y, k_x, k_y, v = (lambda x, w=w, b=b: x @ w.T + b for w, b in parts)
    batch, height, width, _ = memory.shape
    out = torch.zeros_like(query_x)
    for b in range(batch):
        values = v(memory[b])
        keys_x = k_x(memory[b] + places_x[b % len(places_x), None]).mean(0)
        keys_y = k_y(memory[b] + places_y[b % len(places_y), :, None]).mean(1)
        for head in range(heads):
            cut = slice(head * d // heads, (head + 1) * d // heads)
            for q in range(query_x.shape[1]):
                a = q_x(query_x[b, q])[cut] @ keys_x[:, cut].T / (d // heads) ** 0.5
                c = q_y(query_y[b, q])[cut] @ keys_y[:, cut].T / (d // heads) ** 0.5
                if mask is not None:
                    a = a.masked_fill(~mask[b, 0], -torch.inf)
                    c = c.masked_fill(~mask[b, :, 0], -torch.inf)
                a, c = a.softmax(-1), c.softmax(-1)
                for i in range(height):
                    for j in range(width):
                        out[b, q, cut] += c[i] * a[j] * values[i, j, cut]
    return attention.out_proj(out)


def example(height, width, queries=5, d=8, masked=False):
    torch.manual_seed(0)
    attention = RowColumnAttention(d, 2).double()
    torch.nn.init.normal_(attention.in_proj_bias)
    x, y = (torch.randn(2, queries, d).double() for _ in "xy")
    memory = torch.randn(2, height, width, d).double()
    places = torch.randn(1, width, d).double(), torch.randn(2, height, d).double()
    mask = torch.ones(2, height, width, dtype=torch.bool)
    mask[1, :, width - 1 :] = mask[1, height - 2 :] = False
    return attention, (x, y, memory, *places, mask if masked else None)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_attention_and_its_gradients_equal_the_definition(shape, masked):
    attention, inputs = example(*shape, masked=masked)
    inputs = [
        x.requires_grad_() if x.is_floating_point() else x for x in inputs[:5]
    ] + [inputs[5]]
    wanted = [*inputs[:5], *attention.parameters()]
    weight = torch.randn(2, 5, 8).double()
    both = []
    for found in (attention(*inputs), by_definition(attention, *inputs)):
        both.append([found, *torch.autograd.grad((found * weight).sum(), wanted)])
    for ours, expected in zip(*both, strict=True):
        assert (ours - expected).abs().max() < 1e-12
        assert expected.abs().max() > 1e-3


def test_turning_the_map_turns_the_attention():
    """Rows for columns, and nothing else changes."""
    attention, (x, y, memory, places_x, places_y, mask) = example(3, 5, masked=True)
    other = RowColumnAttention(8, 2).double()
    order = torch.tensor([1, 0, 3, 2, 4])
    with torch.no_grad():
        for name in ("weight", "bias"):
            rows = getattr(attention, f"in_proj_{name}").unflatten(0, (5, -1))
            getattr(other, f"in_proj_{name}").copy_(rows[order].flatten(0, 1))
        other.out_proj.load_state_dict(attention.out_proj.state_dict())
    turned = other(
        y, x, memory.transpose(1, 2), places_y, places_x, mask.transpose(1, 2)
    )
    expected = attention(x, y, memory, places_x, places_y, mask)
    assert (turned - expected).abs().max() < 1e-12


def test_recorded_maps_of_columns_and_rows():
    attention, inputs = example(3, 5, masked=True)
    expected = attention(*inputs)
    with record_attention(attention) as maps:
        assert torch.allclose(attention(*inputs), expected, atol=1e-12)
    assert maps["attention_x"].shape == (2, 2, 5, 5)
    assert maps["attention_y"].shape == (2, 2, 5, 3)
    for weights in maps.values():
        assert torch.allclose(weights.sum(-1), torch.ones(2, 2, 5).double())
    assert maps["attention_x"][1, ..., 4:].abs().max() == 0
    assert maps["attention_y"][1, ..., 1:].abs().max() == 0


def test_dropout_acts_in_training_alone():
    attention, inputs = example(3, 5)
    expected = attention.eval()(*inputs)
    for part in (attention.attention_x, attention.attention_y):
        part.dropout = 0.5
        assert torch.equal(attention.eval()(*inputs), expected)
        assert (attention.train()(*inputs) - expected).abs().max() > 1e-3
        part.dropout = 0.0


def test_no_matrix_over_all_places_is_held():
    """The peak of a forward grows with the side of the map, not with its square."""
    attention = RowColumnAttention(8, 2)
    peaks = []
    for side in (32, 64, 128):
        q = torch.randn(1, 200, 8)
        places = torch.randn(1, side, 8)
        inputs = q, q, torch.randn(1, side, side, 8), places, places
        with torch.no_grad():
            peaks.append(peak_memory(lambda inputs=inputs: attention(*inputs)))
        assert peaks[-1] < 4 * 200 * 2 * side * side  # bytes of such a matrix
    assert peaks[2] < 3 * peaks[1]


# ---- positions


def test_sines_of_points_are_y_before_x():
    positions = PointPositions(8, 2)
    points = torch.tensor([[0.25, 0.5]]).double()  # x, y
    y, x = positions.encode(points.flip(-1))[0].chunk(2)
    steps = 2 * math.pi / torch.tensor([1, 1, 100, 100]).double()
    odd = torch.tensor([0, 1, 0, 1]).double() * math.pi / 2  # a cosine
    assert torch.allclose(x, (0.25 * steps + odd).sin(), atol=1e-12)
    assert torch.allclose(y, (0.5 * steps + odd).sin(), atol=1e-12)


def test_middles_are_shares_of_what_is_real():
    real = torch.tensor([[True] * 4, [True, True, False, False]])
    found = axis_middles(real, torch.float64)
    assert found.tolist() == [[0.125, 0.375, 0.625, 0.875], [0.25, 0.75, 0.75, 0.75]]


# ---- the sizes


@pytest.mark.parametrize("name", SIZES)
def test_counts_and_products(name):
    info, model = an.model_info(name), create_model(name, device="meta")
    c, d = info.config, info.config.hidden_size
    dense = 2 * d * c.intermediate_size + c.intermediate_size + d
    decoupled, usual = 6 * d * (d + 1), 4 * d * (d + 1)
    counted = c.encoder_layers * (decoupled + dense + 4 * d)
    counted += c.decoder_layers * (decoupled + usual + dense + 6 * d)
    counted += (model.backbone.channels[-1] + 1) * d + 2 * d + 2 * 2 * d * (d + 1)
    counted += 2 * c.num_anchor_points + d * c.num_patterns
    counted += (d + 1) * c.num_classes + 2 * (d + 1) * d + 4 * (d + 1)
    counted += count_parameters(model.backbone)
    assert count_parameters(model) == counted == info.parameters
    with FlopCounterMode(display=False) as flops:
        model.eval()(torch.empty(1, *info.input_size, device="meta"))
    assert flops.get_total_flops() == 2 * info.macs


def test_the_papers_recipe():
    model = create_model("anchor_detr_resnet50", device="meta")
    groups = make_optimizer(model, PAPER).param_groups
    rates = {round(group["lr"], 9) for group in groups}
    assert rates == {1e-4, 1e-5}
    slow = [p for g in groups if g["lr"] < 5e-5 for p in g["params"]]
    trained = [p for p in model.backbone.parameters() if p.requires_grad]
    assert {id(p) for p in slow} == {id(p) for p in trained}
    epoch = 118_287 / 8
    assert PAPER.max_steps == pytest.approx(50 * epoch, abs=epoch)
    before, after = PAPER.lr(int(39 * epoch)), PAPER.lr(int(41 * epoch))
    assert (before, after) == pytest.approx((1e-4, 1e-5))


# ---- equal to the authors

AUTHORS = json.loads((LAYOUTS / "anchor_detr_small.json").read_text())
BACKBONE = {
    key: shape
    for key, shape in AUTHORS["row_column"]["keys"].items()
    if key.startswith("backbone.")
}


def authors_weights(shapes):
    """The weights with which their code was run."""
    state, names = {}, [*shapes]
    for key, shape in shapes.items():
        first = re.sub(r"^(transformer\.(class|bbox)_embed)\.\d+", r"\1.0", key)
        random = torch.Generator().manual_seed(names.index(first))
        u = torch.rand(math.prod(shape), dtype=torch.float64, generator=random)
        x = (12**0.5 * (u - 0.5)).view(shape)
        if key == "transformer.position.weight":
            x = u.view(shape)
        elif len(shape) == 1:
            x = 0.1 * x + key.endswith(("weight", "running_var"))
        elif "pattern" not in key:
            x = x / x[0].numel() ** 0.5
        state[key] = x
    return state


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_losses_equal_the_authors(kind, tmp_path):
    stored = AUTHORS[kind]
    state = authors_weights(stored["keys"] | BACKBONE)
    torch.save({"model": state, "epoch": 3}, tmp_path / "w.pth")
    config = AnchorDETRConfig(
        intermediate_size=20,
        encoder_layers=1,
        decoder_layers=2,
        num_anchor_points=3,
        num_patterns=2,
        attention=kind,
        dilation=kind == "row_column",
    )
    with warnings.catch_warnings():
        if kind == "row_column":
            warnings.simplefilter("error")
        else:  # its file has a perceptron that it does not use
            warnings.simplefilter("ignore", an.CheckpointWarning)
        model = create_model(
            "anchor_detr_resnet50",
            tmp_path / "w.pth",
            dtype=torch.float64,
            **asdict(config),
        ).train()
    sizes = [(70, 100), (96, 64)]
    x = [
        torch.arange(3 * h * w).double().mul(0.3).sin().view(3, h, w) for h, w in sizes
    ]
    found = model(x)

    def same(ours, key):
        expected = torch.tensor(stored[key]).double()
        assert (ours.flatten() - expected).abs().max() < 1e-6, key

    same(found.pred_logits, "logits")
    same(found.pred_boxes, "boxes")
    same(found.aux_outputs[0]["pred_logits"][0], "first_logits")
    boxes = torch.tensor([[10.0, 20, 60, 65], [1, 2, 30, 40], [50, 10, 99, 30]])
    objects = [
        {"boxes": boxes.double(), "labels": torch.tensor([3, 0, 19])},
        {
            "boxes": torch.zeros(0, 4).double(),
            "labels": torch.zeros(0, dtype=torch.int64),
        },
    ]
    terms = model.losses(found, objects, torch.tensor(sizes))
    names = {"focal": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}
    assert terms.keys() == names.keys() == model.loss_weights.keys()
    for key, value in terms.items():
        layers = [v for k, v in stored["losses"].items() if k.startswith(names[key])]
        assert len(layers) == 2
        assert value.item() == pytest.approx(3 * sum(layers), rel=1e-6), key


def test_the_real_files_names_and_shapes_fit(tmp_path):
    keys = json.loads((LAYOUTS / "anchor_detr.json").read_text())["keys"] | BACKBONE
    state = {k: torch.zeros(1).expand(v) for k, v in keys.items()}
    torch.save({"model": state, "epoch": 1}, tmp_path / "w.pth")
    for name in ("anchor_detr_resnet50", "anchor_detr_resnet50_dc5"):
        with warnings.catch_warnings(action="error"):
            model = create_model(name, tmp_path / "w.pth", device="meta")
        assert not model.not_loaded
    state = OFFICIAL_FORMAT.apply(state, model)
    assert {k: v.shape for k, v in state.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    state = dict(keys, **{"transformer.level_embed.weight": [3, 256]})
    state = {k: torch.zeros(1).expand(v) for k, v in state.items()}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(an.CheckpointError, match="level_embed"):
        create_model("anchor_detr_resnet50", tmp_path / "w.pth", device="meta")


def test_other_classes_are_skipped_and_said(tmp_path):
    torch.save(small().float().state_dict(), tmp_path / "w.pth")
    with pytest.warns(an.CheckpointWarning, match="class_head"):
        model = create_model(
            "anchor_detr_tiny",
            tmp_path / "w.pth",
            **asdict(SMALL) | {"num_classes": 7},
        )
    assert model.not_loaded == ("class_head.weight", "class_head.bias")


# ---- what changes nothing


@pytest.mark.parametrize("kind", KINDS)
def test_company_of_the_same_size_changes_nothing(kind):
    model, x = small(attention=kind), images((40, 56), (40, 56), (40, 56))
    with torch.no_grad():
        together = model(x)
        batch = model(torch.stack(x), torch.ones(3, 40, 56, dtype=torch.bool))
        for key in ("pred_logits", "pred_boxes"):
            assert torch.allclose(batch[key], together[key], atol=1e-12)
            for i, one in enumerate(x):
                alone = model([one])[key][0]
                assert torch.allclose(alone, together[key][i], atol=1e-12)


def test_what_padding_changes():
    """With attention to all places nothing; the means along rows and columns are over
    the padding too, as in the authors' code, and only the rest is hidden."""
    d, mask = SMALL.hidden_size, torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[0], mask[1, :6, :4] = True, True
    features = torch.randn(2, d, 8, 8).double()
    noisy = torch.where(mask[:, None], features, 100.0)
    for kind in KINDS:
        model = small(attention=kind)
        with torch.no_grad():
            states = model.transform(features, mask)
            again = model.transform(noisy, mask)
            alone = model.transform(features[1:, :, :6, :4], None)
        same = torch.allclose(states, again, atol=1e-12)
        assert same == (kind == "full")
        assert torch.allclose(states[:, 0], again[:, 0], atol=1e-12)
        assert torch.allclose(alone[:, 0], states[:, 1], atol=1e-9) == (kind == "full")


def test_patterns_share_a_point_and_points_a_pattern():
    """Query i is pattern i // P at point i % P: moving one point moves the boxes of all
    its patterns, and of an untrained head those alone."""
    model = AnchorDETR(SMALL).eval()
    with torch.no_grad():
        before = model(torch.zeros(1, 3, 32, 32)).pred_boxes[0, :, :2].view(2, 4, 2)
        expected = model.anchor_points.expand(2, -1, -1)
        assert torch.allclose(before, expected, atol=1e-5)
        model.anchor_points[3] = 0.5
        after = model(torch.zeros(1, 3, 32, 32)).pred_boxes[0, :, :2].view(2, 4, 2)
    assert torch.equal(before[:, :3], after[:, :3])
    assert torch.allclose(after[:, 3], torch.full((2, 2), 0.5))


def test_points_and_patterns_learn():
    model, x = small().train(), images((48, 64))
    out = model(x)
    loss = (out.pred_boxes * torch.randn(out.pred_boxes.shape).double()).sum()
    loss.backward()
    for parameter in (model.anchor_points, model.patterns):
        assert (parameter.grad.abs().amax(1) > 0).all()


def test_tables_are_made_once_and_right():
    for kind in KINDS:
        model, x = small(attention=kind), images((40, 56))
        with torch.no_grad():
            first = model(x).pred_boxes
            assert len(model._tables) == 1
            assert torch.equal(model(x).pred_boxes, first)
            model(images((32, 32)))
            assert len(model._tables) == 2
            mask = torch.ones(1, 40, 56, dtype=torch.bool)
            masked = model(x[0][None], mask).pred_boxes
            assert torch.allclose(masked, first, atol=1e-12)


def test_recorded_attention_of_a_model():
    model, x = small(), images((40, 64))
    with torch.no_grad(), record_attention(model) as maps:
        model(x)
    names = {"encoder": "attention", "decoder": "cross_attention"}
    for part, name in names.items():
        queries = 40 if part == "encoder" else 8
        for axis, steps in (("x", 8), ("y", 5)):
            A = maps[f"{part}.layers.1.{name}.attention_{axis}"]
            assert A.shape == (1, 2, queries, steps)
    assert maps["decoder.layers.2.attention.attention"].shape == (1, 2, 8, 8)
    assert len(maps) == 2 * 2 + 3 * 3


def test_gradient_checkpointing_gives_the_same_states():
    model, x = small().train(), images((32, 32))
    weight = model.patterns
    expected = torch.autograd.grad(model(x).pred_boxes.sum(), weight)
    for stack in (model.encoder, model.decoder):
        stack.gradient_checkpointing = True
    found = torch.autograd.grad(model(x).pred_boxes.sum(), weight)
    assert torch.allclose(found[0], expected[0], atol=1e-12)


# ---- training and predictions


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_two_scenes(kind):
    torch.manual_seed(0)
    model = AnchorDETR(replace(SMALL, attention=kind))
    x, sizes = torch.randn(2, 3, 64, 64), torch.tensor([[64, 64]] * 2)
    found = [one | {"boxes": one["boxes"].float()} for one in targets(2, 1)]
    optimizer, history = torch.optim.AdamW(model.parameters(), 2e-3), []
    for _ in range(40):
        terms = model.losses(model(x), found, sizes)
        loss = sum(model.loss_weights[k] * v for k, v in terms.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.7 * history[0]
    assert model.eval()(x).aux_outputs is None


def test_sixteen_bits():
    model = small().float()
    with torch.no_grad():
        expected = model([x.float() for x in images((64, 64))])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model([x.float() for x in images((64, 64))])
    assert (output.pred_boxes.float() - expected.pred_boxes).abs().max() < 0.05
    found = [targets(3)[0] | {"boxes": targets(3)[0]["boxes"].float()}]
    terms = model.losses(output, found, torch.tensor([[64, 64]]))
    assert {term.dtype for term in terms.values()} == {torch.float32}


def test_fake_tensors_leave_no_trace():
    model = AnchorDETR(SMALL)
    with fake_device():
        to_stand_in(model)
        model(torch.empty(2, 3, 32, 32, device=STAND_IN)).pred_boxes.sum().backward()
    assert not model._tables


@pytest.mark.no_shapes
def test_exported_with_a_list_of_images():
    model = small(decoder_layers=1, encoder_layers=1).float()
    x = [one.float() for one in images((32, 40), (40, 24))]
    with torch.no_grad():
        expected = model(x).pred_boxes
        exported = torch.export.export(model, (x,)).module()
        assert torch.allclose(exported(x).pred_boxes, expected, atol=1e-5)


# ---- bad input


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "field, words",
    [
        ({"hidden_size": 36}, "groups of group norm: expected a divisor"),
        ({"num_attention_heads": 5}, "num_attention_heads: expected a divisor"),
        ({"backbone": "resnet18"}, "backbone: expected one of resnet50"),
        ({"attention": "sparse"}, "attention: expected one of row_column"),
        ({"dilation": True}, "dilation: expected False with the small backbone"),
        ({"num_patterns": 0}, "num_patterns: expected a whole number from 1"),
    ],
)
def test_configurations_that_do_not_fit(field, words):
    with pytest.raises(an.ConfigError, match=words):
        replace(SMALL, **field)


@pytest.mark.no_shapes
def test_input_that_does_not_fit():
    model, x = small(), images((64, 64))
    with pytest.raises(an.ConfigError, match="num_attention_heads: expected a divisor"):
        RowColumnAttention(8, 3)
    with pytest.raises(an.InputError, match=r"images\[1\]: "):
        model([torch.zeros(3, 8, 8), "cat"])
    with pytest.raises(an.InputError, match="mask: expected None with a list"):
        model(x, torch.ones(1, 64, 64, dtype=torch.bool))
    with pytest.raises(an.InputError, match="at most 8 objects.*got 9"):
        model.losses(model(x), targets(9), torch.tensor([[64, 64]]))
