"""Initialization: the scale of matrices, biases, and what is left alone."""

import pytest
import torch
from torch import nn

from attn_notes.foundations.checks import ConfigError
from attn_notes.foundations.initialization import (
    init_normal_,
    init_uniform_,
    init_xavier_,
)


def kinds(module):
    "Matrices, biases and norm gains of a module."
    named = list(module.named_parameters())
    return (
        [p for _, p in named if p.ndim > 1],
        [p for n, p in named if p.ndim == 1 and "bias" in n],
        [p for n, p in named if p.ndim == 1 and "bias" not in n],
    )


@pytest.fixture
def block():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(64, 4, 256)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.fill_(7.0)
    return block


def test_uniform_reaches_everything(block):
    assert init_uniform_(block, 0.08) is block
    values = torch.cat([p.flatten() for p in block.parameters()])
    assert values.abs().max() <= 0.08 and abs(values.std() - 0.08 / 3**0.5) < 1e-3


@pytest.mark.parametrize(
    "init", [init_xavier_, init_normal_, lambda m: init_normal_(m, truncated=True)]
)
def test_biases_are_zero_and_gains_are_left(block, init):
    assert init(block) is block
    matrices, biases, gains = kinds(block)
    assert (
        all((b == 0).all() for b in biases)
        and len(biases) == 6
        and all((g == 7).all() for g in gains)
        and len(gains) == 2
    )
    assert all(m.abs().max() < 1 for m in matrices) and len(matrices) == 4


def test_scales(block):
    init_xavier_(block)
    for matrix in kinds(block)[0]:
        assert abs(matrix.std() / (2 / sum(matrix.shape)) ** 0.5 - 1) < 0.05
    init_normal_(block, std=0.1)
    assert all(abs(matrix.std() / 0.1 - 1) < 0.05 for matrix in kinds(block)[0])
    init_normal_(block, std=0.1, truncated=True)
    assert all(
        matrix.abs().max() <= 0.2 and abs(matrix.std() / 0.088 - 1) < 0.05
        for matrix in kinds(block)[0]
    )


def test_recurrent_biases_are_found():
    lstm = init_xavier_(nn.LSTM(4, 8, 2, bidirectional=True))
    assert all(
        (p == 0).all() for name, p in lstm.named_parameters() if name.startswith("bias")
    )


def test_meta_parameters_are_no_trouble():
    with torch.device("meta"):
        init_normal_(init_xavier_(init_uniform_(nn.Linear(3, 4), 0.1)), truncated=True)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "call",
    [
        lambda m: init_uniform_(m, 0.0),
        lambda m: init_uniform_(m, -1.0),
        lambda m: init_normal_(m, std=float("nan")),
        lambda m: init_normal_(m, std=float("inf")),
        lambda m: init_uniform_(m, "0.1"),
        lambda m: init_normal_(m, None),
        lambda m: init_normal_(m, True),
    ],
)
def test_bad_scale_changes_nothing(block, call):
    with pytest.raises(ConfigError, match="expected a finite number above 0"):
        call(block)
    assert all((p == 7).all() for p in block.parameters())
