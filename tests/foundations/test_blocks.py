"""Blocks: torch's encoder layer, the places of the norm, and the branch that is left out."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from attn_notes.foundations.attention import record_attention
from attn_notes.foundations.blocks import DropPath, EncoderBlock, FeedForward, Residual
from attn_notes.foundations.checks import ConfigError, InputError
from attn_notes.foundations.masks import causal_mask, lengths_mask
from attn_notes.foundations.positions import LearnedPositions, SinusoidalPositions
from attn_notes.zoo.devices import STAND_IN, fake_device, to_stand_in

NAMES = {
    "self_attn": "attention",
    "linear1": "feed_forward.linear1",
    "linear2": "feed_forward.linear2",
    "norm1": "attention_path.norm",
    "norm2": "feed_forward_path.norm",
}


def from_torch(state):
    return {
        NAMES[key.split(".")[0]] + key[key.index(".") :]: value
        for key, value in state.items()
    }


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_encoder_block_equals_torch(norm_first, activation, training, causal):
    torch.manual_seed(0)
    reference = nn.TransformerEncoderLayer(
        12, 3, 20, 0.0, activation, 1e-6, True, norm_first, dtype=torch.float64
    ).train(training)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    block = (
        EncoderBlock(12, 3, 20, activation=activation, norm_first=norm_first, eps=1e-6)
        .double()
        .train(training)
    )
    block.load_state_dict(from_torch(reference.state_dict()))
    x, real = (
        torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True),
        lengths_mask(torch.tensor([5, 3]), 5),
    )
    expected = reference(
        x, src_mask=~causal_mask(5) if causal else None, src_key_padding_mask=~real
    )[real]
    got = block(x, real, is_causal=causal)[real]
    assert (got - expected).abs().max() < 1e-10
    mine, theirs = (
        dict(block.named_parameters()),
        from_torch(dict(reference.named_parameters())),
    )
    names = list(theirs)
    pairs = zip(
        torch.autograd.grad(got.square().sum(), [x, *(mine[n] for n in names)]),
        torch.autograd.grad(expected.square().sum(), [x, *(theirs[n] for n in names)]),
    )
    assert all((a - b).abs().max() < 1e-10 for a, b in pairs)


def test_residual_is_its_equation():
    x, f = torch.randn(2, 3, 8), nn.Linear(8, 8)
    pre, post = Residual(8, norm_first=True), Residual(8)
    assert torch.equal(pre(x, f), x + f(pre.norm(x))) and torch.equal(
        post(x, f), F.layer_norm(x + f(x), (8,), post.norm.weight, post.norm.bias)
    )
    assert torch.equal(Residual(8, norm_first=True)(x, torch.zeros_like), x)


@pytest.mark.parametrize(
    "options", [{"dropout": 0.5}, {"attention_dropout": 0.5}, {"drop_path": 0.5}]
)
def test_every_dropout_is_off_in_evaluation(options):
    torch.manual_seed(0)
    block, x = EncoderBlock(8, 2, 16, norm_first=True, **options), torch.randn(16, 4, 8)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_drop_path_takes_whole_samples():
    torch.manual_seed(0)
    x = torch.rand(2000, 3, 2) + 1
    y = DropPath(0.3)(x)
    dropped = (y == 0).flatten(1)
    assert (dropped.any(1) == dropped.all(1)).all() and abs(
        dropped.all(1).float().mean() - 0.3
    ) < 0.05
    assert torch.allclose(y[~dropped.all(1)], x[~dropped.all(1)] / 0.7)
    assert (
        torch.equal(DropPath(0.0)(x), x)
        and DropPath(0.3)(x.bfloat16()).dtype == torch.bfloat16
    )


@pytest.mark.parametrize("norm_first", [False, True])
def test_residual_dropout_takes_entries(norm_first):
    "Element by element, on the sub-layer's output and not on the path: no sample and no token goes as a whole."
    torch.manual_seed(0)
    path, x, branch = (
        Residual(8, dropout=0.3, norm_first=norm_first),
        torch.zeros(2000, 3, 8),
        torch.ones(2000, 3, 8),
    )
    path.norm = nn.Identity()
    y = path(x, lambda _: branch)
    zeros = (y == 0).flatten(1).double()
    assert (
        torch.allclose(y[y != 0], torch.tensor(1 / 0.7))
        and (zeros.mean(0) - 0.3).abs().max() < 0.06
    )
    assert (
        torch.corrcoef(zeros.T) - torch.eye(24, dtype=torch.float64)
    ).abs().max() < 0.12
    assert torch.equal(path(x + 1, torch.zeros_like), x + 1)


def test_feed_forward_works_on_each_token_alone():
    ffn, x = FeedForward(8, 16, "gelu"), torch.randn(2, 5, 8)
    assert torch.allclose(ffn(x)[:, 2], ffn(x[:, 2]), atol=1e-6)
    dropped = FeedForward(8, 16, dropout=0.5)
    assert not torch.equal(dropped(x), dropped(x))
    dropped.eval()
    assert torch.equal(dropped(x), dropped(x))


def test_block_is_recorded():
    block = EncoderBlock(8, 2, 16)
    with record_attention(block) as maps:
        block(torch.randn(2, 5, 8))
    assert maps["attention.attend"].shape == (2, 2, 5, 5)


class Stack(nn.Module):
    "Positions and two blocks: what most models of the book are made of."

    def __init__(self):
        super().__init__()
        self.waves, self.learned = SinusoidalPositions(8, 10), LearnedPositions(8, 10)
        self.blocks = nn.ModuleList(
            [
                EncoderBlock(
                    8,
                    2,
                    16,
                    dropout=0.1,
                    attention_dropout=0.1,
                    drop_path=0.1,
                    norm_first=first,
                )
                for first in (False, True)
            ]
        )

    def forward(self, x, mask, causal=True, planted=None):
        x = (
            x
            + self.waves(x.shape[1])
            + self.learned(x.shape[1])
            + (0 if planted is None else planted)
        )
        for block in self.blocks:
            x = block(x, mask, is_causal=causal)
        return x


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("recorded", [True, False])
def test_nothing_stays_behind_on_the_cpu(causal, recorded):
    "Forward and backward on a stand-in accelerator; a tensor planted on the CPU is caught."
    model = Stack()
    with fake_device(), record_attention(model) if recorded else nullcontext():
        to_stand_in(model)
        x, mask = (
            torch.empty(2, 5, 8, device=STAND_IN),
            torch.ones(2, 5, dtype=torch.bool, device=STAND_IN),
        )
        model(x, mask, causal).sum().backward()
        assert all(p.grad.device == torch.device(STAND_IN) for p in model.parameters())
        with pytest.raises(RuntimeError, match="(?i)device"):
            model(x, mask, causal, planted=torch.empty(8, device="cpu"))


def test_gradient_checkpointing_and_autocast():
    model, x, mask = (
        Stack().eval(),
        torch.randn(2, 5, 8),
        lengths_mask(torch.tensor([5, 3]), 5),
    )
    plain = model(x, mask)
    again = checkpoint(model, x, mask, use_reentrant=False)
    first, second = (
        torch.autograd.grad(y.square().sum(), list(model.parameters()))
        for y in (plain, again)
    )
    assert torch.equal(plain, again) and all(
        torch.allclose(a, b) for a, b in zip(first, second)
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x, mask) - plain).norm() < 0.05 * plain.norm()


@pytest.mark.slow
@pytest.mark.no_shapes
def test_compile_and_export():
    model, x, mask = (
        Stack().eval(),
        torch.randn(2, 5, 8),
        lengths_mask(torch.tensor([5, 3]), 5),
    )
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(
        model, (x, mask), dynamic_shapes=({0: batch}, {0: batch})
    ).module()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for form in (exported, compiled):
        assert torch.allclose(form(x, mask), model(x, mask), atol=1e-6)
    x, mask = x[:1].repeat(3, 1, 1), mask[:1].repeat(3, 1)
    assert torch.allclose(exported(x, mask), model(x, mask), atol=1e-6)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "call",
    [
        lambda: FeedForward(8, 0),
        lambda: FeedForward(8, 16, "swish"),
        lambda: FeedForward(8, 16, dropout=1.0),
        lambda: DropPath(1.0),
        lambda: Residual(0),
        lambda: Residual(8, dropout=-1),
        lambda: EncoderBlock(8, 3, 16),
        lambda: EncoderBlock(8, 2, 16, drop_path=2),
    ],
)
def test_bad_configuration(call):
    with pytest.raises(ConfigError, match="must"):
        call()


@pytest.mark.no_shapes
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 8),
        torch.randn(2, 3, 7),
        torch.ones(2, 3, 8, dtype=torch.long),
        torch.empty(0, 3, 8),
    ],
)
def test_bad_input(norm_first, x):
    with pytest.raises(InputError, match="^x: expected"):
        EncoderBlock(8, 2, 16, norm_first=norm_first)(x)
