"""Schedules from the step before the first on; their values: test_recipes.py."""

import math

import pytest
import torch

from attn_notes.foundations.checks import ConfigError
from attn_notes.training.schedules import (
    SCHEDULES,
    constant,
    cosine,
    inverse_square_root,
    seq2seq_halving,
    step_decay,
)

EACH = {
    "constant": constant(),
    "warm-up": constant(4),
    "inverse square root": inverse_square_root(64, 4),
    "cosine": cosine(10),
    "cosine with a warm-up": cosine(10, 4, 0.1),
    "one step": cosine(1),
    "step decay": step_decay([3, 6]),
    "step decay with a warm-up": step_decay([3, 6], 0.5, 2),
    "halving": seq2seq_halving(2, 2),
    "halving from the start": seq2seq_halving(2, 0),
}


@pytest.mark.parametrize("schedule", EACH.values(), ids=EACH)
def test_it_works_in_torchs_scheduler(schedule):
    "Which counts from 0: every update learns something, and the rates are ours."
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    rates = []
    for _ in range(9):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == [2 * schedule(step) for step in range(9)]
    assert all(math.isfinite(rate) for rate in rates)
    assert rates[0] == rates[1] > 0 and rates[0] == 2 * schedule(0)


def test_every_schedule_is_asked():
    names = {name.split("_")[-1] for name in SCHEDULES}
    assert names == {"constant", "root", "cosine", "linear", "decay", "halving"}
    assert all(make.__name__ == name for name, make in SCHEDULES.items())


@pytest.mark.no_shapes
def test_no_schedule_begins_before_its_first_step():
    with pytest.raises(ConfigError, match="milestones: expected a tuple, each a whole"):
        step_decay((-3, 5))
    with pytest.raises(ConfigError, match="fixed_epochs: expected a whole number"):
        seq2seq_halving(5, -1)


@pytest.mark.no_shapes
@pytest.mark.parametrize("step", [math.nan, math.inf, "1", None])
def test_a_step_is_a_number(step):
    with pytest.raises(ConfigError, match="step: expected a finite number"):
        constant(3)(step)
