"""Attention: readable and fast form, torch's module, and what is recorded."""

import asyncio
import contextvars
import copy
import gc
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from attn_notes.foundations import attention as module
from attn_notes.foundations.attention import (
    Attention,
    HeadProjections,
    MultiHeadAttention,
    ScaledDotProductAttention,
    attention_naive,
    attention_weights,
    cross_attend,
    record_attention,
)
from attn_notes.foundations.blocks import PreNormBlock, Stack
from attn_notes.foundations.cache import CrossAttentionCache, KeyValueCache
from attn_notes.foundations.checks import ConfigError, InputError
from attn_notes.foundations.masks import causal_mask, expand_mask, lengths_mask


def qkv(b=2, h=3, n=4, m=5, d=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((b, h, n, d), (b, h, m, d), (b, h, m, d))
    return [
        torch.randn(size, generator=generator, dtype=dtype, requires_grad=True)
        for size in sizes
    ]


def gradients(output, inputs):
    return torch.autograd.grad(output.square().sum(), inputs, retain_graph=True)


def close(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-12)


def perturbed(module):
    "Every parameter with noise on it, so that a dropped bias is seen."
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def readable(attention):
    "The form that is used while somebody records."
    return lambda *args, **options: Attention.forward(attention, *args, **options)


def random(shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


MASKS = {
    "none": None,
    "keys": lengths_mask(torch.tensor([5, 2]), 5),
    "a hidden sentence": lengths_mask(torch.tensor([5, 0]), 5),
    "pairs": random((2, 4, 5), 1) > 0.5,
    "some hidden rows": random((2, 4, 5), 3) > 0.8,
    "heads": random((2, 3, 4, 5), 2) > 0.6,
}
BIASES = {
    "none": None,
    "pairs": random((4, 5), 4).double() - 0.5,
    "heads": 3 * random((3, 4, 5), 5).double(),
    "batch": random((2, 1, 4, 5), 6).double(),
    "single precision": random((1, 3, 4, 5), 7),
}


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_readable_equals_fast(mask, bias, training, scale):
    inputs = qkv()
    if bias is not None:
        bias = bias.clone().requires_grad_()
    attention = ScaledDotProductAttention(scale=scale).train(training)
    naive, weights = attention_naive(*inputs, mask, bias, scale)
    wanted = inputs if bias is None else [*inputs, bias]
    expected = gradients(naive, wanted)
    for form in (attention, readable(attention)):
        other = form(*inputs, mask, bias)
        assert (naive - other).abs().max() < 1e-12
        for a, b in zip(expected, gradients(other, wanted), strict=True):
            assert a.isfinite().all() and b.isfinite().all()
            assert (a - b).abs().max() < (1e-10 if a.dtype == torch.float64 else 1e-5)
    allowed = torch.ones(2, 3, 4, 5, dtype=torch.bool)
    if mask is not None:
        allowed = expand_mask(mask).expand(2, 3, 4, 5)
    assert (weights[~allowed] == 0).all()
    assert torch.allclose(weights.sum(-1), allowed.any(-1).double())


def test_a_bias_is_added_to_the_scaled_scores():
    q, k, v = qkv()
    bias = BIASES["heads"]
    expected = ((q @ k.mT / 8**0.5 + bias).softmax(-1)) @ v
    assert close(attention_naive(q, k, v, bias=bias)[0], expected)
    assert close(ScaledDotProductAttention()(q, k, v, bias=bias), expected)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_rows_that_see_nothing_are_zero_in_every_precision(dtype, with_bias, training):
    inputs, mask = qkv(dtype=dtype), MASKS["a hidden sentence"]
    bias = BIASES["heads"].to(dtype).requires_grad_() if with_bias else None
    wanted = [*inputs, bias] if with_bias else inputs
    attention = ScaledDotProductAttention().train(training)
    for form in (lambda *x: attention_naive(*x)[0], attention, readable(attention)):
        output = form(*inputs, mask, bias)
        assert (output[1] == 0).all() and output[0].isfinite().all()
        found = gradients(output, wanted)
        assert all(g.isfinite().all() for g in found)
        assert all((g[1] == 0).all() for g in found[:3])


def test_large_scores_leave_nothing_on_hidden_keys():
    q, k, v = qkv(dtype=torch.float32)
    weights = attention_weights(100 * q, -100 * k, MASKS["keys"])
    assert weights.isfinite().all() and (weights[1, ..., 2:] == 0).all()
    low = attention_weights(torch.full_like(q, 1e5), -k.abs(), MASKS["keys"])
    for found in (weights, low):  # hidden keys take nothing from the others either
        assert torch.allclose(found.sum(-1), torch.ones(2, 3, 4))
    for bias in (None, torch.full((4, 5), 1e4)):
        changed = v.detach().clone()
        changed[1, :, 2:] += 1e6
        one, other = (
            ScaledDotProductAttention()(100 * q, -100 * k, x, MASKS["keys"], bias)
            for x in (v, changed)
        )
        assert torch.equal(one, other)


@pytest.mark.parametrize("bias", [None, BIASES["heads"][..., :4]])
@pytest.mark.parametrize("mask", [None, lengths_mask(torch.tensor([4, 1]), 4)])
def test_causal(mask, bias):
    inputs = qkv(m=4)
    both = expand_mask(causal_mask(4), pairs=True) & (
        True if mask is None else expand_mask(mask)
    )
    naive, _ = attention_naive(*inputs, both.expand(2, 1, 4, 4), bias)
    attention = ScaledDotProductAttention()
    for form in (attention, readable(attention)):
        output = form(*inputs, mask, bias, is_causal=True)
        assert (naive - output).abs().max() < 1e-12


def test_a_later_token_does_not_reach_an_earlier_one():
    q, k, v = qkv(m=4)
    k2, v2 = k.detach().clone(), v.detach().clone()
    k2[..., -1, :] += 1
    v2[..., -1, :] += 1
    attention = ScaledDotProductAttention()
    for form in (attention, readable(attention)):
        assert torch.equal(
            form(q, k, v, is_causal=True)[..., :-1, :],
            form(q, k2, v2, is_causal=True)[..., :-1, :],
        )


def test_scale():
    q, k, v = qkv()
    assert torch.allclose(
        attention_weights(q, k, scale=0.0),
        torch.full((2, 3, 4, 5), 0.2, dtype=torch.float64),
    )
    assert torch.allclose(
        attention_weights(q, k, scale=2 * 8**-0.5), attention_weights(2 * q, k)
    )


@given(st.integers(1, 40), st.integers(0, 99))
def test_scores_are_divided_by_the_root_of_the_width(d, seed):
    q, k, v = qkv(d=d, seed=seed)
    expected = (q @ k.mT / d**0.5).softmax(-1) @ v
    attention = ScaledDotProductAttention()
    for form in (lambda *x: attention_naive(*x)[0], attention, readable(attention)):
        assert torch.allclose(form(q, k, v), expected, atol=1e-12)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_fused_projection_equals_separate_heads(h, c, seed):
    torch.manual_seed(seed)
    module = perturbed(MultiHeadAttention(h * c, h).double())
    x = torch.randn(2, 3, h * c, dtype=torch.float64)
    weight = module.in_proj_weight.view(3, h, c, h * c)
    bias = module.in_proj_bias.view(3, h, c)
    heads = [
        attention_naive(
            *(F.linear(x, weight[i, j], bias[i, j])[:, None] for i in range(3))
        )[0][:, 0]
        for j in range(h)
    ]
    assert torch.allclose(module(x), module.out_proj(torch.cat(heads, -1)), atol=1e-12)


def test_dropout_is_on_in_training_only():
    inputs = qkv()
    attention = ScaledDotProductAttention(0.5)
    for form in (attention.__call__, readable(attention)):
        attention.train()
        assert not torch.equal(form(*inputs), form(*inputs))
        attention.eval()
        assert torch.equal(form(*inputs), form(*inputs))
        assert torch.allclose(form(*inputs), attention_naive(*inputs)[0])
    module = MultiHeadAttention(8, 2, dropout=0.5)
    x = torch.randn(2, 3, 8)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "case", ["self", "padded", "causal", "cross", "positions", "added"]
)
def test_multi_head_equals_torch(bias, training, case):
    torch.manual_seed(0)
    reference = perturbed(
        nn.MultiheadAttention(12, 3, bias=bias, batch_first=True, dtype=torch.float64)
    ).train(training)
    module = MultiHeadAttention(12, 3, bias=bias).double().train(training)
    module.load_state_dict(reference.state_dict())
    assert list(module.state_dict()) == list(reference.state_dict())
    x, memory, positions = (
        torch.randn(2, n, 12, dtype=torch.float64, requires_grad=True)
        for n in (4, 5, 5)
    )
    real = lengths_mask(torch.tensor([4, 2]), 4)
    table = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    keys = MASKS["keys"]
    # other query, key and value than x; our options, torch's; what is differentiated
    arguments, mine, theirs, inputs = {
        "self": ((), {}, {}, [x]),
        "padded": ((), {"mask": real}, {"key_padding_mask": ~real}, [x]),
        "causal": ((), {"is_causal": True}, {"attn_mask": ~causal_mask(4)}, [x]),
        "cross": (
            (memory,),
            {"mask": keys},
            {"key_padding_mask": ~keys},
            [x, memory],
        ),
        "positions": ((memory + positions, memory), {}, {}, [x, memory, positions]),
        "added": ((), {"bias": table}, {"attn_mask": table.flatten(0, 1)}, [x, table]),
    }[case]
    key, value = {0: (x, x), 1: (memory, memory), 2: arguments}[len(arguments)]
    expected, _ = reference(x, key, value, need_weights=False, **theirs)
    got = module(x, *arguments, **mine)
    assert (got - expected).abs().max() < 1e-10
    pairs = zip(
        gradients(got, [*inputs, *module.parameters()]),
        gradients(expected, [*inputs, *reference.parameters()]),
        strict=True,
    )
    assert all((a - b).abs().max() < 1e-10 for a, b in pairs)


@pytest.mark.parametrize("bias", [True, False])
def test_begins_with_the_weights_that_torch_begins_with(bias):
    "The same draws in the same order, so the same seed gives the same model."
    states = []
    for make in (MultiHeadAttention, nn.MultiheadAttention):
        torch.manual_seed(0)
        states.append(make(12, 3, bias=bias).state_dict())
    ours, theirs = states
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_key_that_is_the_query_is_self_attention():
    module = MultiHeadAttention(8, 2).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    assert close(module(x), module(x, x)) and close(module(x), module(x, x, x))


def test_one_product_where_the_inputs_are_one(monkeypatch):
    "Self-attention projects once, with a memory twice, with separate values thrice."
    module, x, y = MultiHeadAttention(8, 2), torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    q, k, v = module.project(x).unbind(0)
    pointers = {part.untyped_storage().data_ptr() for part in (q, k, v)}
    assert len(pointers) == 1
    made, project = [], HeadProjections.project
    monkeypatch.setattr(
        HeadProjections,
        "project",
        lambda self, *args: made.append(args[1:]) or project(self, *args),
    )
    for arguments, count in (((x,), 1), ((x, y), 2), ((x, y, y), 3)):
        made.clear()
        module(*arguments)
        assert len(made) == count


@given(st.integers(1, 3), st.integers(1, 7), st.integers(0, 4), st.integers(0, 99))
def test_padding_changes_nothing(b, n, pad, seed):
    torch.manual_seed(seed)
    module = MultiHeadAttention(6, 2).double()
    x = torch.randn(b, n, 6, dtype=torch.float64)
    padded = torch.cat([x, torch.randn(b, pad, 6, dtype=torch.float64)], dim=1)
    mask = lengths_mask(torch.full((b,), n), n + pad)
    assert close(module(padded, mask=mask)[:, :n], module(x))
    assert close(module(x)[:1], module(x[:1]))  # a row of a batch, alone


@pytest.mark.slow
@pytest.mark.no_shapes  # the checks themselves can not be traced
@pytest.mark.parametrize("training", [True, False])
def test_other_ways_of_running(training):
    "bf16 autocast, torch.compile, torch.export: the same numbers, masks included."
    torch.manual_seed(0)
    module, x = MultiHeadAttention(16, 4).train(training), torch.randn(2, 5, 16)
    mask = lengths_mask(torch.tensor([5, 0]), 5)
    for options in (
        {"mask": mask},
        {"mask": mask, "bias": torch.randn(4, 5, 5)},
        {"is_causal": True},
    ):
        expected = module(x, **options)
        exported = torch.export.export(module, (x,), options).module()
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        assert torch.allclose(exported(x, **options), expected, atol=1e-6)
        assert torch.allclose(compiled(x, **options), expected, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            half = module(x, **options)
        assert half.dtype == torch.bfloat16
        assert (half - expected).norm() < 0.02 * expected.norm()


@pytest.mark.slow
@pytest.mark.no_shapes
def test_export_with_dynamic_sizes():
    module, x = MultiHeadAttention(16, 4).eval(), torch.randn(2, 5, 16)
    mask = lengths_mask(torch.tensor([5, 3]), 5)
    b, n = torch.export.Dim("b", min=2, max=64), torch.export.Dim("n", min=2, max=64)
    dynamic = {"query": {0: b, 1: n}, "mask": {0: b, 1: n}}
    exported = torch.export.export(
        module, (), {"query": x, "mask": mask}, dynamic_shapes=dynamic
    ).module()
    x, mask = torch.randn(3, 7, 16), lengths_mask(torch.tensor([7, 1, 4]), 7)
    assert torch.allclose(exported(query=x, mask=mask), module(x, mask=mask), atol=1e-6)


# what is recorded


class StepByStep(nn.Module):
    """A model that attends once for each step, to its own growing past or to a fixed
    memory."""

    def __init__(self, grows):
        super().__init__()
        self.attention, self.grows = MultiHeadAttention(8, 2), grows

    def forward(self, x):
        rows = [
            self.attention(x[:, i : i + 1], x[:, : i + 1] if self.grows else x)
            for i in range(x.shape[1])
        ]
        return torch.cat(rows, dim=1)

    @torch.no_grad()
    def generate(self, x):
        return torch.cat([self(x), self(x)])


class Generates(StepByStep):
    "Its `generate` never calls `forward`, as encoder-decoders do."

    def generate(self, x, steps=2):
        return [self.attention(x) for _ in range(steps)]


@pytest.mark.parametrize("training", [True, False])
def test_record_keeps_the_output_and_sees_the_mask(training):
    module, x = MultiHeadAttention(8, 2).train(training), torch.randn(2, 5, 8)
    mask = MASKS["keys"]
    plain = module(x, mask=mask)
    with record_attention(module) as maps:
        watched = module(x, mask=mask)
    weights = maps["attention"]
    assert torch.allclose(plain, watched, atol=1e-6) and list(maps) == ["attention"]
    assert weights.shape == (2, 2, 5, 5) and not weights.requires_grad
    assert (weights[1, ..., 2:] == 0).all()
    assert torch.allclose(weights.sum(-1), torch.ones(2, 2, 5))


def test_record_sees_the_bias_and_the_scale():
    attention, (q, k, v) = ScaledDotProductAttention(scale=1.0), qkv()
    with record_attention(attention) as maps:
        attention(q, k, v, bias=BIASES["heads"])
    assert close(maps[""], (q @ k.mT + BIASES["heads"]).softmax(-1))


def test_record_names_nested_modules_and_starts_afresh():
    model = nn.ModuleDict(
        {"a": MultiHeadAttention(8, 2), "b": nn.Sequential(MultiHeadAttention(8, 4))}
    )
    model.forward = lambda x: model["b"](model["a"](x))
    with record_attention(model) as maps:
        model(torch.randn(1, 3, 8))
        assert {name: tuple(w.shape) for name, w in maps.items()} == {
            "a.attention": (1, 2, 3, 3),
            "b.0.attention": (1, 4, 3, 3),
        }
        model(torch.randn(2, 6, 8))  # another batch, another length
        assert maps["a.attention"].shape == (2, 2, 6, 6)


def test_record_joins_the_steps_of_one_call():
    x = torch.randn(2, 4, 8)
    model = StepByStep(grows=False)
    with record_attention(model) as maps:
        model(x)
        steps = maps["attention.attention"]
        model.attention(x, x)
        whole = maps["attention.attention"][..., 4:, :]
        assert torch.allclose(steps, whole, atol=1e-6)
        for _ in range(2):
            model.generate(x)  # two calls inside one generate
            assert maps["attention.attention"].shape == (2, 2, 8, 4)
        for _ in range(2):
            model.forward(x)  # not through __call__
            assert maps["attention.attention"].shape == (2, 2, 4, 4)


def test_record_of_a_generate_that_does_not_call_forward():
    model, x = Generates(grows=False), torch.randn(2, 4, 8)
    with record_attention(model) as maps:
        for steps in (3, 2, 1):
            model.generate(x, steps)
            assert maps["attention.attention"].shape == (2, 2, 4 * steps, 4)


def test_record_fills_up_keys_that_came_later():
    model = StepByStep(grows=True)
    with record_attention(model) as maps:
        model(torch.randn(2, 4, 8))
    weights = maps["attention.attention"]
    assert weights.shape == (2, 2, 4, 4) and (weights.triu(1) == 0).all()
    assert torch.allclose(weights.sum(-1), torch.ones(2, 2, 4))


def test_record_leaves_no_trace_also_after_an_exception():
    model, x = StepByStep(grows=False), torch.randn(1, 2, 8)
    before, attributes = model(x), set(vars(model))
    with pytest.raises(RuntimeError, match="planned"):
        with record_attention(model) as maps:
            model(x)
            assert set(vars(model)) == attributes  # nor while it is recorded
            raise RuntimeError("planned")
    recorded = maps["attention.attention"].clone()
    assert torch.equal(model(x), before) and len(maps) == 1
    assert torch.equal(maps["attention.attention"], recorded)
    with pytest.raises(InputError):
        with record_attention(model):
            model.attention(x, mask=torch.ones(1, 3, dtype=torch.bool))
    model(x)
    assert torch.equal(maps["attention.attention"], recorded)


def test_a_call_that_fails_is_a_call():
    model, x = StepByStep(grows=False), torch.randn(1, 2, 8)
    with record_attention(model) as maps:
        model(x)
        with pytest.raises(RuntimeError):
            model(torch.randn(1, 2, 7))
        model(x)
        assert maps["attention.attention"].shape == (1, 2, 2, 2)


def test_nested_records():
    "All of the same model; of two models, each its own."
    model, other, x = StepByStep(False), MultiHeadAttention(8, 4), torch.randn(1, 2, 8)
    with record_attention(model) as outer:
        with record_attention(model) as inner:
            model(x)
        (weights,), (again,) = inner.values(), outer.values()
        assert torch.equal(weights, again)
        model(x + 1)
        (later,) = outer.values()
        assert not torch.equal(later, weights)
        assert torch.equal(inner["attention.attention"], weights)
        with record_attention(other) as apart:
            other(x)
            model(torch.randn(1, 5, 8))
        assert list(apart) == ["attention"] and apart["attention"].shape[1] == 4
        assert outer["attention.attention"].shape == (1, 2, 5, 5)


def test_a_model_inside_another_has_calls_of_its_own():
    inner, x = MultiHeadAttention(8, 2), torch.randn(1, 3, 8)
    outer = nn.Sequential(inner, inner)
    with record_attention(outer) as twice, record_attention(inner) as last:
        outer(x)
    assert last["attention"].shape == (1, 2, 3, 3)
    assert twice["0.attention"].shape == (1, 2, 6, 3)


def test_a_copy_made_while_recording_is_a_model_like_any_other():
    model, x = StepByStep(grows=False), torch.randn(1, 2, 8)
    with record_attention(model) as maps:
        model(x)
        twin = copy.deepcopy(model)
        assert vars(twin).keys() == vars(model).keys()
        expected = twin(x + 1)  # not recorded
        assert maps["attention.attention"].shape == (1, 2, 2, 2)
        with record_attention(twin) as others:
            twin(x)
        assert list(others) == ["attention.attention"]
    assert torch.equal(twin(x + 1), expected)


def test_threads_record_apart():
    model, other = StepByStep(grows=False), {}
    inside, done = threading.Event(), threading.Event()

    def beside():
        inside.wait()
        model(torch.randn(3, 6, 8))  # not recorded by anyone
        with record_attention(model) as maps:
            for _ in range(3):
                model(torch.randn(4, 5, 8))
        other.update(maps)
        done.set()

    thread = threading.Thread(target=beside)
    thread.start()
    with record_attention(model) as maps:
        model(torch.randn(1, 2, 8))
        inside.set()
        assert done.wait(60)
        assert maps["attention.attention"].shape == (1, 2, 2, 2)
        model(torch.randn(2, 3, 8))
        assert maps["attention.attention"].shape == (2, 2, 3, 3)
    thread.join()
    assert other["attention.attention"].shape == (4, 2, 5, 5)


def stance():
    import torch._dynamo.eval_frame as eval_frame

    return eval_frame._stance.stance


def unrecorded(model, x, *records):
    "Whether a call leaves these records as they are, and takes the fused kernel."
    before = [{name: w.clone() for name, w in maps.items()} for maps in records]
    with mock.patch.object(Attention, "forward", side_effect=AssertionError):
        model(x)
    return stance() == "default" and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        for a, b in zip(before, records, strict=True)
    )


def test_records_closed_in_any_order():
    model, x = MultiHeadAttention(8, 2), torch.randn(1, 3, 8)
    assert stance() == "default"
    first, second = record_attention(model), record_attention(model)
    a, b = first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    model(x)
    assert not a and len(b) == 1 and stance() == "force_eager"
    second.__exit__(None, None, None)
    assert unrecorded(model, x + 1, a, b)


def test_a_record_in_a_generator_that_another_thread_closes():
    model, x, kept = MultiHeadAttention(8, 2), torch.randn(1, 3, 8), []

    def rows():
        with record_attention(model) as maps:
            kept.append(maps)
            while True:
                model(x)
                yield maps["attention"]

    generator = rows()
    assert next(generator).shape == (1, 2, 3, 3) == next(generator).shape
    thread = threading.Thread(target=generator.close)
    thread.start()
    thread.join()
    assert unrecorded(model, x + 1, *kept)
    assert not module._RECORDERS.get()  # what was closed elsewhere costs nothing


def test_records_of_asynchronous_tasks():
    "Each its own, in turns; and what a record has started ends with it."
    model, late = MultiHeadAttention(8, 2), []

    async def shapes(n):
        found = []
        with record_attention(model) as maps:
            for b in (1, 2, 3):
                model(torch.randn(b, n, 8))
                await asyncio.sleep(0)
                found.append(tuple(maps["attention"].shape))
        return found

    async def outlives(closed, maps):
        await closed.wait()
        late.append(unrecorded(model, torch.randn(1, 9, 8), maps))

    async def both():
        closed = asyncio.Event()
        with record_attention(model) as maps:
            task = asyncio.create_task(outlives(closed, maps))
            await asyncio.to_thread(model, torch.randn(1, 4, 8))
            assert maps["attention"].shape == (1, 2, 4, 4)
        closed.set()
        await task
        return await asyncio.gather(*(shapes(n) for n in (2, 5)))

    with ThreadPoolExecutor() as pool:  # a browser's tests may have a loop in this one
        two, five = pool.submit(asyncio.run, both()).result()
    assert two == [(b, 2, 2, 2) for b in (1, 2, 3)] and late == [True]
    assert five == [(b, 2, 5, 5) for b in (1, 2, 3)]


def test_a_closed_record_keeps_no_model_alive():
    model = MultiHeadAttention(8, 2)
    with record_attention(model) as maps:
        model(torch.randn(1, 3, 8))
        context = contextvars.copy_context()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and context is not None and len(maps) == 1


@pytest.mark.parametrize("late", [False, True], ids=["backward inside", "after"])
def test_training_while_it_is_recorded(late):
    "With checkpoints of our own and from outside, and with averaged weights."
    torch.manual_seed(0)
    model, x = Stack([PreNormBlock(8, 2, 16)]).train(), torch.randn(2, 3, 8)
    model.gradient_checkpointing = True
    expected = gradients(model(x), list(model.parameters()))
    with record_attention(model) as maps:
        averaged, y = AveragedModel(model), model(x)
        found = None if late else gradients(y, list(model.parameters()))
        assert [w.shape for w in maps.values()] == [(2, 2, 3, 3)]
        averaged.update_parameters(model)
        copied = pickle.loads(pickle.dumps(model))
    found = found or gradients(y, list(model.parameters()))
    assert all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, found, strict=True)
    )
    assert unrecorded(averaged, x, maps) and unrecorded(copied, x, maps)


def test_what_is_computed_again_for_the_backward_pass_is_no_call():
    class Checkpointed(MultiHeadAttention):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    model, x = Checkpointed(8, 2), torch.randn(2, 3, 8, requires_grad=True)
    expected = gradients(model(x), [x])[0]
    with record_attention(model) as maps:
        y = model(x)
        assert torch.allclose(gradients(y, [x])[0], expected, atol=1e-5)
        assert maps["attention"].shape == (2, 2, 3, 3)


@pytest.mark.parametrize("size", [1.0, 500.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_recorded_in_half_precision_equals_the_fused_form(dtype, size, autocast):
    "Also where the products leave the range of float16, which ends at 65504."
    torch.manual_seed(0)
    attention, (q, k, v) = ScaledDotProductAttention(), torch.randn(3, 2, 2, 5, 64)
    q, k = (size * x for x in (q, k))
    assert size == 1 or (q @ k.mT).abs().max() > 65504
    if not autocast:
        q, k, v = (x.to(dtype) for x in (q, k, v))
    with torch.autocast("cpu", dtype, enabled=autocast):
        fused = attention(q, k, v, MASKS["keys"])
        with record_attention(attention) as maps:
            recorded = attention(q, k, v, MASKS["keys"])
    assert recorded.dtype == fused.dtype and recorded.isfinite().all()
    assert (recorded - fused).abs().max() < 0.02
    assert torch.allclose(maps[""].float().sum(-1), torch.ones(2, 2, 5), atol=0.02)


@pytest.mark.slow
@pytest.mark.no_shapes
def test_a_compiled_model_is_recorded():
    model, x = MultiHeadAttention(8, 2), torch.randn(2, 3, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = compiled(x)
    with record_attention(compiled) as maps:
        compiled(x)
        found = compiled(x)
    assert torch.allclose(found, expected, atol=1e-6)
    assert [tuple(w.shape) for w in maps.values()] == [(2, 2, 3, 3)]
    assert torch.equal(compiled(x), expected)


@pytest.mark.no_shapes
@pytest.mark.parametrize("model", [None, "transformer_tiny", MultiHeadAttention])
def test_record_of_what_is_no_model(model):
    with pytest.raises(InputError, match="^record_attention: expected a model; got a"):
        with record_attention(model):
            pass


def test_record_of_a_model_without_attention_is_empty():
    with record_attention(nn.Linear(2, 2)) as maps:
        pass
    assert maps == {}


def test_record_does_not_touch_the_gradient():
    module = MultiHeadAttention(8, 2).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    plain = gradients(module(x), [x])[0]
    with record_attention(module):
        watched = gradients(module(x), [x])[0]
    assert (plain - watched).abs().max() < 1e-10


def test_own_kind_of_attention_is_recorded():
    class Uniform(Attention):
        def weights(self, q, k, mask=None, bias=None):
            weights = q.new_ones(*q.shape[:-1], k.shape[-2])
            weights = weights if mask is None else weights * mask
            return weights / weights.sum(-1, keepdim=True)

    q, k, v = qkv(d=8)
    model = Uniform()
    with record_attention(model) as maps:
        output = model(q, k[..., :5], v, MASKS["keys"])
    expected = v[1, :, :2].mean(-2, keepdim=True).expand(3, 4, 8)
    assert torch.allclose(output[1], expected) and (maps[""][1, ..., 2:] == 0).all()


# bad input


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "arguments, words",
    [
        ((12, 5), "num_attention_heads: expected a divisor of hidden_size"),
        ((0, 1), "hidden_size"),
        ((12, 0), "num_attention_heads"),
        ((12, 3, 1.0), "dropout"),
    ],
)
def test_bad_configuration(arguments, words):
    with pytest.raises(ConfigError, match=words):
        MultiHeadAttention(*arguments)


X = torch.randn(2, 3, 8)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "options, words",
    [
        ({"mask": torch.ones(2, 3)}, "^mask: expected a boolean"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "^mask: "),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, "^mask: .*n, m = 3, 3; got"),
        ({"mask": torch.ones(2, 2, 3, dtype=torch.bool)}, "^mask: .*; got shape"),
        # a mask of one key is not spread over all
        ({"mask": torch.ones(2, 1, dtype=torch.bool)}, "^mask: expected one that fits"),
        ({"value": X}, "^value: expected None without a key; got value"),
        ({"cache": KeyValueCache(), "key": X}, "^key: expected None beside a KeyVal"),
        (
            {"key": X[:, :2], "is_causal": True},
            "^is_causal: expected at least as many keys as queries; "
            "got 2 keys and 3 queries$",
        ),
    ],
)
@pytest.mark.parametrize("recorded", [False, True])
def test_bad_input(options, words, recorded):
    module = MultiHeadAttention(8, 2)
    with pytest.raises(InputError, match=words):
        with record_attention(module) if recorded else nullcontext():
            module(X, **options)


@pytest.mark.no_shapes
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        (torch.randn(2, 8),),
        (torch.randn(2, 3, 7),),
        (torch.ones(2, 3, 8, dtype=torch.long),),
        (X, torch.randn(2, 5, 6)),
        (X, torch.randn(3, 5, 8)),
        (X, None, None, torch.ones(5, 3, 3, dtype=torch.bool)),
    ],
)
def test_shapes_that_do_not_fit_give_no_numbers(arguments, recorded):
    "Shapes are checked at the model; inside it torch refuses, nothing is broadcast."
    module = MultiHeadAttention(8, 2)
    with record_attention(module) if recorded else nullcontext():
        with pytest.raises(RuntimeError):
            module(*arguments)


@pytest.mark.no_shapes
def test_attention_without_weights():
    with pytest.raises(NotImplementedError, match="does not say"):
        Attention()(*qkv())


@pytest.mark.no_shapes
def test_record_of_changing_batches_is_refused():
    model = StepByStep(grows=False)
    with pytest.raises(InputError, match=r"^record_attention: .*\(2, 2\) and \(3, 2\)"):
        with record_attention(model):
            model.attention(torch.randn(2, 2, 8))
            model.attention(torch.randn(3, 2, 8))


def test_record_of_a_beam_repeats_the_step_before_it():
    "The first step of a beam search has one row a sentence, the others one a beam."
    model = StepByStep(grows=False)
    first, beams = torch.randn(2, 2, 8), torch.randn(6, 2, 8)
    with record_attention(model) as maps:
        model.attention(first)
        model.attention(beams)
    weights = next(iter(maps.values()))
    with record_attention(model) as alone:
        model.attention(first)
    expected = next(iter(alone.values())).repeat_interleave(3, 0)
    assert weights.shape == (6, 2, 4, 2)
    assert torch.equal(weights[:, :, :2], expected)


# generation step by step: projected memory, shared by several rows, and a past


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_rows_that_share_a_projected_memory(b, k, n, m, padded, recorded, seed):
    """k consecutive rows attend to one row of the memory, as if it stood there k times;
    gradients too."""
    torch.manual_seed(seed)
    module = perturbed(MultiHeadAttention(6, 3).double())
    x, memory = (
        torch.randn(size, dtype=torch.float64, requires_grad=True)
        for size in ((k * b, n, 6), (b, m, 6))
    )
    mask = lengths_mask(torch.randint(1, m + 1, (b,)), m) if padded else None
    expected = module(
        x,
        memory.repeat_interleave(k, 0),
        mask=None if mask is None else mask.repeat_interleave(k, 0),
    )
    with record_attention(module) if recorded else nullcontext():
        got = module(x, cache=module.project_memory(memory, mask))
    assert close(got, expected)
    for a, e in zip(
        gradients(got, [x, memory, *module.parameters()]),
        gradients(expected, [x, memory, *module.parameters()]),
        strict=True,
    ):
        assert (a - e).abs().max() < 1e-10


def test_cross_attend_row_by_row():
    module, q = MultiHeadAttention(6, 3), torch.randn(4, 3, 2, 2)
    keys, values = torch.randn(2, 2, 3, 5, 2)
    mask = lengths_mask(torch.tensor([5, 2]), 5)
    found = cross_attend(module.attention, q, CrossAttentionCache(keys, values, mask))
    for row in range(4):
        one = slice(row // 2, row // 2 + 1)
        expected, _ = attention_naive(
            q[row : row + 1], keys[one], values[one], mask[one]
        )
        assert torch.allclose(found[row], expected[0], atol=1e-6)


def test_projected_memory_is_read_and_not_copied():
    module = MultiHeadAttention(6, 3)
    cache, seen = module.project_memory(torch.randn(2, 5, 6)), []
    forward = module.attention.forward
    module.attention.forward = lambda q, k, v, *rest: (
        seen.extend([k, v]) or forward(q, k, v, *rest)
    )
    for rows in (2, 8):
        module(torch.randn(rows, 1, 6), cache=cache)
    expected = 2 * [cache.keys.data_ptr(), cache.values.data_ptr()]
    assert [x.data_ptr() for x in seen] == expected
    assert all(x.shape == (2, 3, 5, 2) for x in seen)


@given(st.integers(1, 5), st.integers(0, 5), st.booleans(), st.integers(0, 99))
def test_causal_with_a_past_is_the_end_of_the_whole(n, past, padded, seed):
    """The queries are the last n of past + n positions, in the fast and in the readable
    form."""
    total, draw = past + n, torch.Generator().manual_seed(seed)
    q, k, v = (x.detach() for x in qkv(n=total, m=total, seed=seed))
    lengths = torch.randint(1, total + 1, (2,), generator=draw)
    mask = lengths_mask(lengths, total) if padded else None
    attention = ScaledDotProductAttention()
    whole = attention(q, k, v, mask, is_causal=True)[:, :, past:]
    for form in (attention, readable(attention)):
        assert close(form(q[:, :, past:], k, v, mask, is_causal=True), whole)


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.booleans(),
    st.integers(0, 99),
)
def test_pieces_through_a_cache_equal_the_whole(pieces, padded, seed):
    torch.manual_seed(seed)
    module = perturbed(MultiHeadAttention(6, 3).double()).requires_grad_(False)
    total, cache, parts = sum(pieces), KeyValueCache(), []
    x = torch.randn(2, total, 6, dtype=torch.float64)
    mask = lengths_mask(torch.randint(1, total + 1, (2,)), total) if padded else None
    whole = module(x, mask=mask, is_causal=True)
    for part in x.split(pieces, 1):
        end = cache.length + part.shape[1]
        seen, before = None if mask is None else mask[:, :end], cache
        output, cache = module(part, mask=seen, is_causal=True, cache=before)
        again, _ = module(part, mask=seen, is_causal=True, cache=before)
        assert close(output, again)  # the old state gives what it gave
        parts.append(output)
    assert close(torch.cat(parts, 1), whole) and cache.length == total


@pytest.mark.no_shapes
@pytest.mark.parametrize("rows", [3, 5, 0])
def test_rows_that_can_not_share_a_memory(rows):
    module = MultiHeadAttention(6, 3)
    with pytest.raises(
        InputError,
        match="^cache: expected keys whose number of rows divides the queries'; "
        f"got {rows} rows of keys and 4 of queries$",
    ):
        keys, values = torch.randn(2, rows, 3, 5, 2)
        module(torch.randn(4, 2, 6), cache=CrossAttentionCache(keys, values))


@pytest.mark.no_shapes
def test_masks_and_caches_of_another_size():
    module, cache = MultiHeadAttention(6, 3), KeyValueCache()
    with torch.no_grad():
        _, cache = module(torch.randn(4, 2, 6), is_causal=True, cache=cache)
        with pytest.raises(InputError, match="^cache: expected keys"):
            module(torch.randn(2, 1, 6), is_causal=True, cache=cache)
        earlier = torch.ones(4, 2, dtype=torch.bool)  # the mask of the tokens before
        with pytest.raises(InputError, match=r"^mask: .*1, 3; got shape \(4, 1, 1, 2"):
            module(torch.randn(4, 1, 6), mask=earlier, is_causal=True, cache=cache)
    memory, mask = torch.randn(2, 5, 6), torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(InputError, match=r"^mask: .*; got shape \(2, 1, 1, 4\)$"):
        module(torch.randn(4, 1, 6), cache=module.project_memory(memory, mask))


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "options",
    [
        {"key": torch.randn(2, 5, 6)},
        {"value": torch.randn(2, 5, 6)},
        {"mask": torch.ones(2, 5, dtype=torch.bool)},
        {"bias": torch.zeros(5, 5)},
        {"is_causal": True},
    ],
)
def test_a_projected_memory_stands_alone(options):
    module, x = MultiHeadAttention(6, 3), torch.randn(2, 5, 6)
    (name,) = options
    with pytest.raises(
        InputError, match=f"^{name}: expected None beside a CrossAttentionCache"
    ):
        module(x, cache=module.project_memory(x), **options)


@pytest.mark.no_shapes
@pytest.mark.parametrize("form", [ScaledDotProductAttention.forward, Attention.forward])
def test_more_queries_than_positions(form):
    with pytest.raises(
        InputError,
        match="^is_causal: expected at least as many keys as queries; "
        "got 3 keys and 4 queries$",
    ):
        form(ScaledDotProductAttention(), *qkv(n=4, m=3), is_causal=True)
