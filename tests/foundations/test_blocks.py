"""Blocks: torch's encoder layer, the places of the norm, and the branch that is left
out."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from attn_notes.foundations.attention import record_attention
from attn_notes.foundations.blocks import (
    DropPath,
    FeedForward,
    PostNormBlock,
    PreNormBlock,
    Stack,
)
from attn_notes.foundations.checks import ConfigError, InputError
from attn_notes.foundations.masks import causal_mask, lengths_mask
from attn_notes.foundations.positions import LearnedPositions, SinusoidalPositions
from attn_notes.zoo.devices import STAND_IN, fake_device, to_stand_in

BLOCKS = [PostNormBlock, PreNormBlock]
NAMES = {
    "self_attn": "attention",
    "linear1": "feed_forward.linear1",
    "linear2": "feed_forward.linear2",
    "norm1": "norm1",
    "norm2": "norm2",
}


def from_torch(state):
    return {
        NAMES[key.split(".")[0]] + key[key.index(".") :]: value
        for key, value in state.items()
    }


@pytest.mark.parametrize("Block", BLOCKS)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", ["padded", "causal", "bias"])
def test_blocks_equal_torch(Block, activation, training, case):
    torch.manual_seed(0)
    reference = nn.TransformerEncoderLayer(
        12,
        3,
        20,
        0.0,
        activation,
        1e-6,
        True,
        Block is PreNormBlock,
        dtype=torch.float64,
    ).train(training)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    block = Block(
        12,
        3,
        20,
        activation={"relu": nn.ReLU, "gelu": nn.GELU}[activation],
        norm=partial(nn.LayerNorm, eps=1e-6),
    )
    block = block.double().train(training)
    block.load_state_dict(from_torch(reference.state_dict()))
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    real = lengths_mask(torch.tensor([5, 3]), 5)
    bias = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    hidden = torch.zeros_like(real, dtype=torch.float64).masked_fill(~real, -torch.inf)
    mine, theirs = {
        "padded": ({}, {"src_key_padding_mask": ~real}),
        "causal": (
            {"is_causal": True},
            {"src_mask": ~causal_mask(5), "src_key_padding_mask": ~real},
        ),
        "bias": (
            {"bias": bias},
            {"src_mask": bias.flatten(0, 1), "src_key_padding_mask": hidden},
        ),
    }[case]
    expected, got = reference(x, **theirs)[real], block(x, real, **mine)[real]
    assert (got - expected).abs().max() < 1e-10
    parameters = dict(block.named_parameters())
    others = from_torch(dict(reference.named_parameters()))
    pairs = zip(
        torch.autograd.grad(got.square().sum(), [x, *(parameters[n] for n in others)]),
        torch.autograd.grad(expected.square().sum(), [x, *others.values()]),
        strict=True,
    )
    assert all((a - b).abs().max() < 1e-10 for a, b in pairs)


def test_blocks_are_their_equations():
    x = torch.randn(2, 3, 8)
    pre, post = PreNormBlock(8, 2, 16), PostNormBlock(8, 2, 16)
    y = x + pre.attention(pre.norm1(x))
    assert torch.equal(pre(x), y + pre.feed_forward(pre.norm2(y)))
    norms = [(n.weight, n.bias) for n in (post.norm1, post.norm2)]
    y = F.layer_norm(x + post.attention(x), (8,), *norms[0])
    assert torch.equal(post(x), F.layer_norm(y + post.feed_forward(y), (8,), *norms[1]))


@pytest.mark.parametrize("Block", BLOCKS)
def test_norm_and_activation_are_factories(Block):
    block = Block(8, 2, 16, activation=nn.SiLU, norm=nn.RMSNorm, bias=False)
    assert isinstance(block.norm1, nn.RMSNorm) and isinstance(block.norm2, nn.RMSNorm)
    assert block.norm1 is not block.norm2 and block.norm1.normalized_shape == (8,)
    assert isinstance(block.feed_forward.activation, nn.SiLU)
    assert (
        block.attention.in_proj_bias is None and block.attention.out_proj.bias is None
    )
    assert [name for name, _ in Block(8, 2, 16).named_parameters()] == [
        f"{part}.{name}"
        for part, names in {
            "attention": ["in_proj_weight", "in_proj_bias"],
            "attention.out_proj": ["weight", "bias"],
            "feed_forward.linear1": ["weight", "bias"],
            "feed_forward.linear2": ["weight", "bias"],
            "norm1": ["weight", "bias"],
            "norm2": ["weight", "bias"],
        }.items()
        for name in names
    ]


@pytest.mark.parametrize("Block", BLOCKS)
@pytest.mark.parametrize(
    "options", [{"dropout": 0.5}, {"attention_dropout": 0.5}, {"drop_path": 0.5}]
)
def test_every_dropout_is_off_in_evaluation(Block, options):
    torch.manual_seed(0)
    block, x = Block(8, 2, 16, **options), torch.randn(16, 4, 8)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_drop_path_takes_whole_samples():
    torch.manual_seed(0)
    x = torch.rand(2000, 3, 2) + 1
    y = DropPath(0.3)(x)
    dropped = (y == 0).flatten(1)
    assert (dropped.any(1) == dropped.all(1)).all()
    assert abs(dropped.all(1).float().mean() - 0.3) < 0.05
    assert torch.allclose(y[~dropped.all(1)], x[~dropped.all(1)] / 0.7)
    assert torch.equal(DropPath(0.0)(x), x)
    assert DropPath(0.3)(x.bfloat16()).dtype == torch.bfloat16


class Constant(nn.Module):
    "A sub-layer that gives the same number everywhere."

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x, **options):
        return torch.full_like(x, self.value)


def with_branches(block, attention, feed_forward):
    "The block with its sub-layers replaced and its norms gone."
    block.attention, block.feed_forward = Constant(attention), Constant(feed_forward)
    block.norm1 = block.norm2 = nn.Identity()
    return block


@pytest.mark.parametrize("Block", BLOCKS)
@pytest.mark.parametrize("values", [(1, 0), (0, 1)])
def test_residual_dropout_takes_entries(Block, values):
    """Element by element, on the sub-layer's output and not on the residual stream: no
    sample and no token goes as a whole."""
    torch.manual_seed(0)
    block = with_branches(Block(8, 2, 16, dropout=0.3), *values)
    y = block(torch.zeros(2000, 3, 8))
    zeros = (y == 0).flatten(1).double()
    assert torch.allclose(y[y != 0], torch.tensor(1 / 0.7))
    assert (zeros.mean(0) - 0.3).abs().max() < 0.06
    correlation = torch.corrcoef(zeros.T) - torch.eye(24, dtype=torch.float64)
    assert correlation.abs().max() < 0.12
    x = torch.randn(4, 3, 8)
    assert torch.equal(with_branches(block, 0, 0)(x), x)


@pytest.mark.parametrize("Block", BLOCKS)
def test_drop_path_of_a_block_leaves_out_branches(Block):
    "Attention and feed-forward each for itself, a whole sample at a time."
    torch.manual_seed(0)
    block = with_branches(Block(8, 2, 16, drop_path=0.25), 1, 10)
    y = (block(torch.zeros(4000, 3, 8)) * 0.75).flatten(1)
    assert (y == y[:, :1]).all()
    shares = {v: (y[:, 0] - v).abs().lt(1e-4).double().mean() for v in (0, 1, 10, 11)}
    for value, expected in {0: 1 / 16, 1: 3 / 16, 10: 3 / 16, 11: 9 / 16}.items():
        assert abs(shares[value] - expected) < 0.03


@pytest.mark.parametrize("Block", BLOCKS)
def test_without_drop_path_there_is_no_such_module(Block):
    assert not any(isinstance(m, DropPath) for m in Block(8, 2, 16).modules())
    paths = [m for m in Block(8, 2, 16, drop_path=0.2).modules() if hasattr(m, "p")]
    assert sorted(m.p for m in paths if isinstance(m, DropPath)) == [0.2]


def test_feed_forward_works_on_each_token_alone():
    ffn, x = FeedForward(8, 16, nn.GELU), torch.randn(2, 5, 8)
    assert torch.allclose(ffn(x)[:, 2], ffn(x[:, 2]), atol=1e-6)
    dropped = FeedForward(8, 16, dropout=0.5)
    assert not torch.equal(dropped(x), dropped(x))
    dropped.eval()
    assert torch.equal(dropped(x), dropped(x))


@pytest.mark.parametrize("Block", BLOCKS)
def test_block_is_recorded(Block):
    block = Block(8, 2, 16)
    with record_attention(block) as maps:
        block(torch.randn(2, 5, 8))
    assert maps["attention.attention"].shape == (2, 2, 5, 5)


# stacks


def test_a_stack_hands_its_arguments_to_every_layer():
    torch.manual_seed(0)
    layers = [PostNormBlock(8, 2, 16), PreNormBlock(8, 2, 16)]
    norm, x = nn.LayerNorm(8), torch.randn(2, 5, 8)
    mask, bias = lengths_mask(torch.tensor([5, 3]), 5), torch.randn(2, 5, 5)
    stack = Stack(iter(layers), norm)
    y = x
    for layer in layers:
        y = layer(y, mask, bias, is_causal=True)
    assert torch.equal(stack(x, mask, bias, is_causal=True), norm(y))
    assert torch.equal(Stack(layers)(x, mask, bias=bias, is_causal=True), y)
    keys = [key.split(".")[0] for key in stack.state_dict()]
    assert set(keys) == {"layers", "norm"} and "norm.weight" in stack.state_dict()
    assert not any(key.startswith("norm") for key in Stack(layers).state_dict())
    with record_attention(stack) as maps:
        stack(x)
    assert list(maps) == [f"layers.{i}.attention.attention" for i in range(2)]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_of_a_stack(dropout):
    "The same numbers, dropout included; and the layers do run twice."
    torch.manual_seed(0)
    sizes = dict(dropout=dropout, attention_dropout=dropout, drop_path=dropout)
    stack = Stack([PreNormBlock(8, 2, 16, **sizes) for _ in range(3)], nn.LayerNorm(8))
    x, calls = torch.randn(2, 5, 8), []
    mask = lengths_mask(torch.tensor([5, 3]), 5)
    stack.layers[1].feed_forward.linear1.register_forward_hook(
        lambda *_: calls.append(1)
    )
    found = []
    for stack.gradient_checkpointing in (False, True):
        torch.manual_seed(1)
        calls.clear()
        y = stack(x, mask, is_causal=True)
        grads = torch.autograd.grad(y.square().sum(), list(stack.parameters()))
        assert len(calls) == 1 + stack.gradient_checkpointing
        found.append([y, *grads])
    assert all(map(torch.equal, *found))
    calls.clear()
    stack.eval()(x, mask).sum().backward()
    assert len(calls) == 1  # in training only


class Model(nn.Module):
    "Positions and two blocks: what most models of the book are made of."

    def __init__(self):
        super().__init__()
        self.sinusoids = SinusoidalPositions(8, 10)
        self.learned = LearnedPositions(8, 10)
        rates = dict(dropout=0.1, attention_dropout=0.1, drop_path=0.1)
        self.encoder = Stack([Block(8, 2, 16, **rates) for Block in BLOCKS])

    def forward(self, x, mask, causal=True, planted=None):
        x = x + self.sinusoids(x.shape[1]) + self.learned(x.shape[1])
        return self.encoder(x if planted is None else x + planted, mask, None, causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("recorded", [True, False])
def test_nothing_stays_behind_on_the_cpu(causal, recorded):
    """Forward and backward on a stand-in accelerator; a tensor planted on the CPU is
    caught."""
    model = Model()
    with fake_device(), record_attention(model) if recorded else nullcontext():
        to_stand_in(model)
        x = torch.empty(2, 5, 8, device=STAND_IN)
        mask = torch.ones(2, 5, dtype=torch.bool, device=STAND_IN)
        model(x, mask, causal).sum().backward()
        assert all(p.grad.device == torch.device(STAND_IN) for p in model.parameters())
        with pytest.raises(RuntimeError, match="(?i)device"):
            model(x, mask, causal, planted=torch.empty(8, device="cpu"))


def test_gradient_checkpointing_from_outside_and_autocast():
    model, x = Model().eval(), torch.randn(2, 5, 8)
    mask = lengths_mask(torch.tensor([5, 3]), 5)
    plain = model(x, mask)
    again = checkpoint(model, x, mask, use_reentrant=False)
    first, second = (
        torch.autograd.grad(y.square().sum(), list(model.parameters()))
        for y in (plain, again)
    )
    assert torch.equal(plain, again) and all(map(torch.allclose, first, second))
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x, mask) - plain).norm() < 0.05 * plain.norm()


@pytest.mark.slow
@pytest.mark.no_shapes
def test_compile_and_export():
    model, x = Model().eval(), torch.randn(2, 5, 8)
    mask = lengths_mask(torch.tensor([5, 3]), 5)
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
        lambda: FeedForward(8, 16, dropout=1.0),
        lambda: DropPath(1.0),
        lambda: PostNormBlock(0, 1, 16),
        lambda: PreNormBlock(8, 2, 16, dropout=-1),
        lambda: PostNormBlock(8, 3, 16),
        lambda: PreNormBlock(8, 2, 16, drop_path=2),
        lambda: PreNormBlock(8, 2, 16, drop_path=-0.1),
        lambda: PostNormBlock(8, 2, 16, attention_dropout=1.5),
    ],
)
def test_bad_configuration(call):
    with pytest.raises(ConfigError, match=": expected .*; got"):
        call()


@pytest.mark.no_shapes
@pytest.mark.parametrize("Block", BLOCKS)
@pytest.mark.parametrize(
    "x",
    [torch.randn(2, 8), torch.randn(2, 3, 7), torch.ones(2, 3, 8, dtype=torch.long)],
)
def test_shapes_that_do_not_fit_give_no_numbers(Block, x):
    "Shapes are checked at the model; inside it torch refuses."
    with pytest.raises(RuntimeError):
        Block(8, 2, 16)(x)


@pytest.mark.no_shapes
@pytest.mark.parametrize("Block", BLOCKS)
def test_bad_masks(Block):
    with pytest.raises(InputError, match="^mask: expected"):
        Block(8, 2, 16)(torch.randn(2, 3, 8), torch.ones(2, 1, dtype=torch.bool))
