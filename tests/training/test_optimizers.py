"""BERT's Adam: by its formula, beside AdamW, one tensor at a time or all at once, and
from a state that was stored."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from attn_notes.foundations.checks import ConfigError
from attn_notes.training.optimizers import AdamWithoutCorrection
from attn_notes.training.recipes import Recipe, make_optimizer

OPTIONS = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
RECIPE = Recipe(optimizer="bert_adam", **{"learning_rate": 0.03, "weight_decay": 0.1})


def parameters(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(n, 3, dtype=dtype)) for n in (1, 4)]


def train(optimizer, steps, first=1):
    """Steps with the gradients of their number."""
    for step in range(first, first + steps):
        random = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=random).to(p)
        optimizer.step()


@given(
    st.floats(0, 0.99),
    st.floats(0, 0.999),
    st.floats(1e-8, 1),
    st.floats(0, 0.5),
    st.integers(1, 6),
)
def test_the_formula(beta1, beta2, eps, decay, steps):
    (p,) = parameters()[:1]
    value, means, squares = p.detach().flatten().tolist(), [0.0] * 3, [0.0] * 3
    optimizer = AdamWithoutCorrection([p], 0.1, (beta1, beta2), eps, decay)
    for step in range(1, steps + 1):
        train(optimizer, 1, step)
        for i, g in enumerate(p.grad.flatten().tolist()):
            means[i] = beta1 * means[i] + (1 - beta1) * g
            squares[i] = beta2 * squares[i] + (1 - beta2) * g * g
            update = means[i] / (math.sqrt(squares[i]) + eps) + decay * value[i]
            value[i] -= 0.1 * update
    assert p.flatten().tolist() == pytest.approx(value, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("step", [1, 2, 10, 300])
def test_adamw_times_the_factor(step):
    ours, theirs = parameters(), parameters()
    b1, b2 = OPTIONS["betas"]
    train(optimizer := AdamWithoutCorrection(ours, **OPTIONS), step - 1)
    root = math.sqrt(1 - b2**step)
    lr = OPTIONS["lr"] * (1 - b1**step) / root
    reference = torch.optim.AdamW(theirs, lr, (b1, b2), OPTIONS["eps"] / root, 0.0)
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p.data * (1 - OPTIONS["lr"] * OPTIONS["weight_decay"]))
        if step > 1:
            own, count = optimizer.state[p], torch.tensor(step - 1.0)
            reference.state[q] = {"step": count, **copy.deepcopy(own)}
    train(optimizer, 1, step), train(reference, 1, step)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_all_at_once_is_one_at_a_time(dtype):
    found = []
    for foreach in (True, False, None):
        ps = [*parameters(dtype=dtype), *parameters(1)]  # of two types
        train(AdamWithoutCorrection(ps, **OPTIONS, foreach=foreach), 5)
        found.append(ps)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_a_stored_state_goes_on(tmp_path):
    whole, first = parameters(), parameters()
    train(AdamWithoutCorrection(whole, **OPTIONS), 7)
    train(stopped := AdamWithoutCorrection(first, **OPTIONS), 3)
    torch.save(stopped.state_dict(), tmp_path / "optimizer.pt")
    stored = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    train(resumed := AdamWithoutCorrection(first, lr=1.0), 0)
    resumed.load_state_dict(stored)
    train(resumed, 4, first=4)
    assert all(map(torch.equal, whole, first))


def test_a_parameter_without_gradient_and_a_closure():
    used, unused = parameters()
    before = unused.clone()
    optimizer = AdamWithoutCorrection([used, unused], **OPTIONS)

    def closure():
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0] and torch.equal(unused, before)
    assert list(optimizer.state) == [used]


def test_the_recipe_names_it():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    optimizer = make_optimizer(model, replace(RECIPE, eps=1e-6, betas=(0.9, 0.98)))
    assert type(optimizer) is AdamWithoutCorrection
    assert [
        (g["lr"], g["betas"], g["eps"], g["weight_decay"])
        for g in optimizer.param_groups
    ] == [(0.03, (0.9, 0.98), 1e-6, 0.1), (0.03, (0.9, 0.98), 1e-6, 0.0)]


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "options",
    [
        dict(lr=-1),
        dict(lr=math.nan),
        dict(betas=(0.9, 1.0)),
        dict(betas=0.9),
        dict(eps=0),
        dict(weight_decay=-1),
        dict(foreach=2),
    ],
    ids=str,
)
def test_numbers_of_no_optimizer(options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"^{name}: expected .*; got"):
        AdamWithoutCorrection(parameters(), **options)
