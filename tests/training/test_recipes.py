import json
import math
import pickle
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from attn_notes.foundations.checks import ConfigError
from attn_notes.foundations.positions import LearnedPositions
from attn_notes.training.recipes import Recipe, make_optimizer
from attn_notes.training.schedules import (
    SCHEDULES,
    constant,
    cosine,
    inverse_square_root,
    seq2seq_halving,
    step_decay,
)


@given(d=st.integers(1, 2048), w=st.integers(1, 9000), step=st.integers(1, 99_999))
def test_inverse_square_root_peaks_at_the_end_of_its_warm_up(d, w, step):
    factor = inverse_square_root(d, w)
    assert factor(step) <= factor(w) * (1 + 1e-12)
    assert math.isclose(factor(w), (d * w) ** -0.5)
    assert math.isclose(factor(step), d**-0.5 * min(step**-0.5, step * w**-1.5))


@given(steps=st.integers(2, 999), share=st.floats(0, 0.9), floor=st.floats(0, 0.5))
def test_cosine(steps, share, floor):
    warmup = int(steps * share)
    factor = cosine(steps, warmup, floor)
    values = [factor(s) for s in range(max(1, warmup), steps + 1)]
    assert values == sorted(values, reverse=True) and math.isclose(
        values[-1], floor, abs_tol=1e-12
    )
    assert factor(steps + 5) == pytest.approx(floor)
    if warmup:
        assert factor(warmup) == 1 and factor(1) == 1 / warmup


def test_cosine_equals_torch():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for step in range(1, 21):
        optimizer.step()
        reference.step()
        assert cosine(20)(step) == pytest.approx(reference.get_last_lr()[0], abs=1e-12)


@pytest.mark.parametrize("per_epoch", [1, 2, 7, 100])
def test_seq2seq_halving(per_epoch):
    factor = seq2seq_halving(per_epoch)
    assert all(factor(s) == 1 for s in range(1, 5 * per_epoch + 1))
    assert factor(5 * per_epoch + 1) == 0.5
    assert factor(7 * per_epoch + 1) == 1 / 32  # the last half epoch of 7.5


def test_step_decay_and_constant():
    factor = step_decay([3, 5], 0.1, warmup_steps=2)
    assert [round(factor(s), 6) for s in range(1, 8)] == [
        0.5,
        1,
        1,
        0.1,
        0.1,
        0.01,
        0.01,
    ]
    assert [constant(4)(s) for s in (1, 4, 9)] == [0.25, 1, 1] and constant()(1) == 1


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "make, options",
    [
        (constant, dict(warmup_steps=-1)),
        (inverse_square_root, dict(d_model=0, warmup_steps=1)),
        (inverse_square_root, dict(d_model=8, warmup_steps=0)),
        (cosine, dict(max_steps=5, warmup_steps=5)),
        (cosine, dict(max_steps=5, floor=2)),
        (step_decay, dict(milestones=[5, 3])),
        (step_decay, dict(milestones=[])),
        (step_decay, dict(milestones=[5], decay=0)),
        (seq2seq_halving, dict(steps_per_epoch=0)),
    ],
)
def test_schedules_refuse(make, options):
    with pytest.raises(ConfigError, match="schedule: expected"):
        make(**options)


BAD = [
    dict(optimizer="lion"),
    dict(learning_rate=0),
    dict(learning_rate=math.nan),
    dict(learning_rate="1e-3"),
    dict(betas=(0.9, 1.0)),
    dict(betas=0.9),
    dict(eps=-1),
    dict(momentum=1),
    dict(weight_decay=-0.1),
    dict(schedule="plateau"),
    dict(warmup_steps=-1),
    dict(warmup_steps=1.5),
    dict(max_steps=0),
    dict(batch_size=0),
    dict(batch_size=None),
    dict(max_tokens=0),
    dict(gradient_accumulation_steps=0),
    dict(average_over="words"),
    dict(max_grad_norm=0),
    dict(max_grad_norm=math.nan),
    dict(label_smoothing=-0.1),
    dict(ema_decay=1),
    dict(mixed_precision="fp8"),
    dict(average_last=0),
    dict(average_last=2.5),
    dict(average_every=0),
    dict(average_every=None),
    dict(seed=-1),
    dict(evaluate_every=0),
    dict(checkpoint_every=-5),
    dict(optimizer=["adam"]),
    dict(num_workers=-1),
    dict(max_steps=True),
    dict(lr_scales={"a": -1}),
    dict(lr_scales={"a": math.inf}),
    dict(lr_scales={3: 1.0}),
    dict(lr_scales="backbone"),
    dict(lr_scales=0.1),
]


@pytest.mark.no_shapes
@pytest.mark.parametrize("fields", BAD, ids=str)
def test_recipes_refuse(fields):
    (name,) = fields
    with pytest.raises(
        ConfigError, match=f"recipe: {name}: expected .*; got"
    ) as caught:
        Recipe(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(schedule="inverse_square_root", warmup_steps=4), "expected the options"),
        (
            dict(
                schedule="seq2seq_halving",
                schedule_options={"steps_per_epoch": 5},
                warmup_steps=3,
            ),
            "no warm-up",
        ),
        (dict(schedule_options={"milestones": [1]}), "expected the options"),
        (
            dict(schedule="cosine", schedule_options={"max_steps": 5}),
            "expected the options",
        ),
        (dict(schedule="cosine", max_steps=5, warmup_steps=5), "warmup_steps from 0"),
    ],
)
def test_schedule_options_must_fit(fields, said):
    with pytest.raises(ConfigError, match=said):
        Recipe(**fields)


@given(st.integers(1, 60), st.integers(1, 8), st.integers(1, 20))
def test_the_steps_of_an_average(steps, last, every):
    if (last - 1) * every >= steps:
        with pytest.raises(
            ConfigError, match=f"steps back: expected fewer than max_steps={steps}"
        ):
            Recipe(max_steps=steps, average_last=last, average_every=every)
    else:
        recipe = Recipe(max_steps=steps, average_last=last, average_every=every)
        assert [s for s in range(1, steps + 1) if recipe.averages(s)] == sorted(
            steps - i * every for i in range(last)
        )
    assert all(
        Recipe(max_steps=steps, ema_decay=0.0).averages(s)
        and not Recipe(max_steps=steps).averages(s)
        for s in range(1, steps + 1)
    )


def test_two_averages_exclude_each_other():
    with pytest.raises(
        ConfigError, match="average_last and ema_decay are two averages"
    ):
        Recipe(average_last=1, ema_decay=0.0)


def test_a_recipe_is_plain_data():
    recipe = Recipe(
        schedule="inverse_square_root",
        schedule_options={"d_model": 64},
        warmup_steps=10,
        max_tokens=100,
    )
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert json.loads(json.dumps(asdict(recipe)))["schedule_options"] == {"d_model": 64}
    assert replace(recipe, seed=1).lr(10) == pytest.approx((64 * 10) ** -0.5 * 1e-3)


def test_every_schedule_has_a_recipe():
    options = {
        "inverse_square_root": {"d_model": 8},
        "step_decay": {"milestones": [2]},
        "seq2seq_halving": {"steps_per_epoch": 3},
    }
    for name in SCHEDULES:
        recipe = Recipe(
            schedule=name,
            schedule_options=options.get(name, {}),
            warmup_steps=4 if name == "inverse_square_root" else 0,
            max_steps=10,
        )
        assert all(0 <= recipe.lr(s) <= recipe.learning_rate for s in range(1, 11))


@pytest.mark.parametrize(
    "name, kind",
    [
        ("adam", torch.optim.Adam),
        ("adamw", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
    ],
)
def test_optimizer_spares_vectors_and_frozen_parameters(name, kind):
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    model[1].bias.requires_grad = False
    optimizer = make_optimizer(model, Recipe(optimizer=name, weight_decay=0.1))
    assert type(optimizer) is kind
    assert [
        (g["weight_decay"], [tuple(p.shape) for p in g["params"]])
        for g in optimizer.param_groups
    ] == [(0.1, [(2, 3)]), (0.0, [(2,), (2,)])]


class Parts(nn.Module):
    """A model with everything that weight decay spares, and more."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm((2, 2)))
        self.positions = LearnedPositions(2, max_position_embeddings=5)
        self.table = nn.Parameter(torch.zeros(4, 2))
        self.pair_bias = nn.Parameter(torch.zeros(2, 2))
        self.tokens = nn.Embedding(6, 2)
        self.head = nn.Linear(2, 6)
        self.head.weight = self.tokens.weight  # tied

    def no_weight_decay(self):
        return {"table"}


def grouped(model, recipe):
    """Names of the parameters of each group, by weight decay and rate."""
    names = {p: name for name, p in model.named_parameters()}
    return {
        (g["weight_decay"], g["lr"], g["lr_scale"]): [names[p] for p in g["params"]]
        for g in make_optimizer(model, recipe).param_groups
    }


def test_groups_of_parameters():
    recipe = Recipe(optimizer="adamw", weight_decay=0.1, learning_rate=0.5)
    decayed = ["backbone.0.weight", "tokens.weight"]
    spared = [
        "table",
        "pair_bias",
        "backbone.0.bias",
        "backbone.1.weight",
        "backbone.1.bias",
        "positions.weight",
        "head.bias",
    ]
    assert grouped(Parts(), recipe) == {
        (0.1, 0.5, 1.0): decayed,
        (0.0, 0.5, 1.0): spared,
    }
    scales = {"backbone.0.*": 0.1, "backbone.*": 0.2, "positions.weight": 0}
    assert grouped(Parts(), replace(recipe, lr_scales=scales)) == {
        (0.1, 0.5, 1.0): ["tokens.weight"],
        (0.1, 0.05, 0.1): ["backbone.0.weight"],
        (0.0, 0.5, 1.0): ["table", "pair_bias", "head.bias"],
        (0.0, 0.05, 0.1): ["backbone.0.bias"],
        (0.0, 0.1, 0.2): ["backbone.1.weight", "backbone.1.bias"],
        (0.0, 0.0, 0.0): ["positions.weight"],
    }


@pytest.mark.parametrize("tied_name", ["tokens.weight", "head.weight"])
def test_a_tied_parameter_is_spared_by_either_name(tied_name):
    class Tied(Parts):
        def no_weight_decay(self):
            return {tied_name, "table"}

    groups = grouped(Tied(), Recipe(weight_decay=0.1))
    assert groups[0.1, 1e-3, 1.0] == ["backbone.0.weight"]


@pytest.mark.no_shapes
def test_names_and_patterns_must_be_of_parameters():
    class Misnamed(Parts):
        def no_weight_decay(self):
            return {"table", "tabel"}

    with pytest.raises(ConfigError, match="no_weight_decay: .* got tabel"):
        make_optimizer(Misnamed(), Recipe())
    scales = {"backbone.*": 0.1, "backbones.*": 0.1}
    with pytest.raises(ConfigError, match=r"lr_scales: .* got \['backbones"):
        make_optimizer(Parts(), Recipe(lr_scales=scales))
    with pytest.raises(ConfigError, match="parameters to train; got none"):
        make_optimizer(Parts().requires_grad_(False), Recipe())
