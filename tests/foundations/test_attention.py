"""Attention: readable and fast form, torch's module, and what is recorded."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from attn_notes.foundations.attention import (
    Attend,
    DotProductAttend,
    MultiHeadAttention,
    attention_naive,
    attention_weights,
    record_attention,
)
from attn_notes.foundations.cache import KeyValueCache
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


MASKS = {
    "none": None,
    "keys": lengths_mask(torch.tensor([5, 2]), 5),
    "a hidden sentence": lengths_mask(torch.tensor([5, 0]), 5),
    "pairs": torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(1)) > 0.5,
    "heads": torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(2)) > 0.6,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("training", [True, False])
def test_readable_equals_fast(mask, training):
    inputs = qkv()
    attend = DotProductAttend().train(training)
    naive, weights = attention_naive(*inputs, mask)
    for other in (attend(*inputs, mask), Attend.forward(attend, *inputs, mask)):
        assert (naive - other).abs().max() < 1e-12
        for a, b in zip(gradients(naive, inputs), gradients(other, inputs)):
            assert (
                not a.isnan().any()
                and not b.isnan().any()
                and (a - b).abs().max() < 1e-10
            )
    allowed = (
        torch.ones(2, 3, 4, 5, dtype=torch.bool)
        if mask is None
        else expand_mask(mask).expand(2, 3, 4, 5)
    )
    assert (weights[~allowed] == 0).all()
    assert torch.allclose(weights.sum(-1), allowed.any(-1).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_see_nothing_are_zero_in_every_precision(dtype):
    inputs = qkv(dtype=dtype)
    for output in (
        attention_naive(*inputs, MASKS["a hidden sentence"])[0],
        DotProductAttend()(*inputs, MASKS["a hidden sentence"]),
    ):
        assert (output[1] == 0).all() and output[0].isfinite().all()
        assert all(g.isfinite().all() for g in gradients(output, inputs))


def test_large_scores_leave_nothing_on_hidden_keys():
    q, k, v = qkv(dtype=torch.float32)
    weights = attention_weights(100 * q, -100 * k, MASKS["keys"])
    assert weights.isfinite().all() and (weights[1, ..., 2:] == 0).all()


@pytest.mark.parametrize("mask", [None, lengths_mask(torch.tensor([4, 1]), 4)])
def test_causal(mask):
    inputs = qkv(m=4)
    both = expand_mask(causal_mask(4), pairs=True) & (
        True if mask is None else expand_mask(mask)
    )
    naive, _ = attention_naive(*inputs, both.expand(2, 1, 4, 4))
    attend = DotProductAttend()
    for output in (
        attend(*inputs, mask, is_causal=True),
        Attend.forward(attend, *inputs, mask, is_causal=True),
    ):
        assert (naive - output).abs().max() < 1e-12


def test_a_later_token_does_not_reach_an_earlier_one():
    q, k, v = qkv(m=4)
    k2, v2 = k.detach().clone(), v.detach().clone()
    k2[..., -1, :] += 1
    v2[..., -1, :] += 1
    for attend in (
        DotProductAttend(),
        lambda *a, **b: Attend.forward(DotProductAttend(), *a, **b),
    ):
        assert torch.equal(
            attend(q, k, v, is_causal=True)[..., :-1, :],
            attend(q, k2, v2, is_causal=True)[..., :-1, :],
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
    for form in (
        lambda *x: attention_naive(*x)[0],
        DotProductAttend(),
        lambda *x: Attend.forward(DotProductAttend(), *x),
    ):
        assert torch.allclose(form(q, k, v), expected, atol=1e-12)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_fused_projection_equals_separate_heads(h, c, seed):
    torch.manual_seed(seed)
    module, x = (
        shaken(MultiHeadAttention(h * c, h).double()),
        torch.randn(2, 3, h * c, dtype=torch.float64),
    )
    weight, bias = (
        module.in_proj_weight.view(3, h, c, h * c),
        module.in_proj_bias.view(3, h, c),
    )
    heads = [
        attention_naive(
            *(F.linear(x, weight[i, j], bias[i, j])[:, None] for i in range(3))
        )[0][:, 0]
        for j in range(h)
    ]
    assert torch.allclose(module(x), module.out_proj(torch.cat(heads, -1)), atol=1e-12)


def test_dropout_is_on_in_training_only():
    inputs = qkv()
    attend = DotProductAttend(0.5)
    for form in (attend.__call__, lambda *a: Attend.forward(attend, *a)):
        attend.train()
        assert not torch.equal(form(*inputs), form(*inputs))
        attend.eval()
        assert torch.equal(form(*inputs), form(*inputs)) and torch.allclose(
            form(*inputs), attention_naive(*inputs)[0]
        )
    module = MultiHeadAttention(8, 2, dropout=0.5)
    x = torch.randn(2, 3, 8)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def shaken(module):
    "Every parameter with noise on it, so that a dropped bias is seen."
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", ["self", "padded", "causal", "cross"])
def test_multi_head_equals_torch(bias, training, case):
    torch.manual_seed(0)
    reference = shaken(
        nn.MultiheadAttention(12, 3, bias=bias, batch_first=True, dtype=torch.float64)
    ).train(training)
    module = MultiHeadAttention(12, 3, bias=bias).double().train(training)
    module.load_state_dict(reference.state_dict())
    assert list(module.state_dict()) == list(reference.state_dict())
    x, memory = (
        torch.randn(2, n, 12, dtype=torch.float64, requires_grad=True) for n in (4, 5)
    )
    real, other = (
        lengths_mask(torch.tensor([4, 2]), 4),
        None if case != "cross" else memory,
    )
    mine, theirs = {
        "self": ({}, {}),
        "padded": ({"mask": real}, {"key_padding_mask": ~real}),
        "causal": ({"is_causal": True}, {"attn_mask": ~causal_mask(4)}),
        "cross": ({"mask": MASKS["keys"]}, {"key_padding_mask": ~MASKS["keys"]}),
    }[case]
    keys = x if other is None else other
    inputs = [x] if other is None else [x, memory]
    expected, _ = reference(x, keys, keys, need_weights=False, **theirs)
    got = module(x, other, **mine)
    assert (got - expected).abs().max() < 1e-10
    pairs = zip(
        gradients(got, [*inputs, *module.parameters()]),
        gradients(expected, [*inputs, *reference.parameters()]),
    )
    assert all((a - b).abs().max() < 1e-10 for a, b in pairs)


def test_memory_equal_to_x_is_self_attention():
    module, x = (
        MultiHeadAttention(8, 2).double(),
        torch.randn(2, 3, 8, dtype=torch.float64),
    )
    assert torch.allclose(module(x), module(x, x))


def test_projections_are_views_of_one_product():
    q, k, v = MultiHeadAttention(8, 2).project(torch.randn(2, 3, 8)).unbind(0)
    assert (
        q.untyped_storage().data_ptr()
        == k.untyped_storage().data_ptr()
        == v.untyped_storage().data_ptr()
    )


@given(st.integers(1, 3), st.integers(1, 7), st.integers(0, 4), st.integers(0, 99))
def test_padding_changes_nothing(b, n, pad, seed):
    torch.manual_seed(seed)
    module, x = (
        MultiHeadAttention(6, 2).double(),
        torch.randn(b, n, 6, dtype=torch.float64),
    )
    padded = torch.cat([x, torch.randn(b, pad, 6, dtype=torch.float64)], dim=1)
    mask = lengths_mask(torch.full((b,), n), n + pad)
    assert torch.allclose(module(padded, mask=mask)[:, :n], module(x), atol=1e-12)
    assert torch.allclose(
        module(x)[:1], module(x[:1]), atol=1e-12
    )  # a row of a batch, alone


@pytest.mark.slow
@pytest.mark.no_shapes  # the checks themselves can not be traced
@pytest.mark.parametrize("training", [True, False])
def test_other_ways_of_running(training):
    "bf16 autocast, torch.compile, torch.export: the same numbers, masks included."
    torch.manual_seed(0)
    module, x, mask = (
        MultiHeadAttention(16, 4).train(training),
        torch.randn(2, 5, 16),
        lengths_mask(torch.tensor([5, 3]), 5),
    )
    expected = module(x, None, mask)
    exported = torch.export.export(module, (x, None, mask)).module()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.allclose(
        exported(x, None, mask), expected, atol=1e-6
    ) and torch.allclose(compiled(x, None, mask), expected, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        half = module(x, None, mask)
    assert (
        half.dtype == torch.bfloat16
        and (half - expected).norm() < 0.02 * expected.norm()
    )


# what is recorded


class StepByStep(nn.Module):
    "A model that attends once for each step, to its own growing past or to a fixed memory."

    def __init__(self, grows):
        super().__init__()
        self.attention, self.grows = MultiHeadAttention(8, 2), grows

    def forward(self, x):
        rows = [
            self.attention(x[:, i : i + 1], x[:, : i + 1] if self.grows else x)
            for i in range(x.shape[1])
        ]
        return torch.cat(rows, dim=1)

    def generate(self, x):
        return torch.cat([self(x), self(x)])


@pytest.mark.parametrize("training", [True, False])
def test_record_keeps_the_output_and_sees_the_mask(training):
    module, x = MultiHeadAttention(8, 2).train(training), torch.randn(2, 5, 8)
    mask = MASKS["keys"]
    plain = module(x, mask=mask)
    with record_attention(module) as maps:
        watched = module(x, mask=mask)
    weights = maps["attend"]
    assert (
        torch.allclose(plain, watched, atol=1e-6)
        and list(maps) == ["attend"]
        and weights.shape == (2, 2, 5, 5)
        and not weights.requires_grad
    )
    assert (weights[1, ..., 2:] == 0).all() and torch.allclose(
        weights.sum(-1), torch.ones(2, 2, 5)
    )


def test_record_names_nested_modules_and_starts_afresh():
    model = nn.ModuleDict(
        {"a": MultiHeadAttention(8, 2), "b": nn.Sequential(MultiHeadAttention(8, 4))}
    )
    model.forward = lambda x: model["b"](model["a"](x))
    with record_attention(model) as maps:
        model(torch.randn(1, 3, 8))
        assert {name: tuple(w.shape) for name, w in maps.items()} == {
            "a.attend": (1, 2, 3, 3),
            "b.0.attend": (1, 4, 3, 3),
        }
        model(torch.randn(2, 6, 8))  # another batch, another length
        assert maps["a.attend"].shape == (2, 2, 6, 6)


def test_record_joins_the_steps_of_one_call():
    x = torch.randn(2, 4, 8)
    model = StepByStep(grows=False)
    with record_attention(model) as maps:
        model(x)
        steps = maps["attention.attend"]
        model.attention(x, x)
        whole = maps["attention.attend"][..., 4:, :]
    assert torch.allclose(steps, whole, atol=1e-6)
    with record_attention(model) as maps:
        model.generate(x)
    assert maps["attention.attend"].shape == (
        2,
        2,
        8,
        4,
    )  # both calls inside one generate


def test_record_fills_up_keys_that_came_later():
    model = StepByStep(grows=True)
    with record_attention(model) as maps:
        model(torch.randn(2, 4, 8))
    weights = maps["attention.attend"]
    assert (
        weights.shape == (2, 2, 4, 4)
        and (weights.triu(1) == 0).all()
        and torch.allclose(weights.sum(-1), torch.ones(2, 2, 4))
    )


def test_record_restores_also_after_an_exception():
    model, x = StepByStep(grows=False), torch.randn(1, 2, 8)
    before, attributes = model(x), set(vars(model))
    with pytest.raises(RuntimeError, match="planned"):
        with record_attention(model):
            raise RuntimeError("planned")
    with pytest.raises(InputError):
        with record_attention(model):
            model.attention(torch.randn(1, 2, 7))
    assert (
        set(vars(model)) == attributes
        and model.attention.attend.record is None
        and torch.equal(model(x), before)
    )
    with record_attention(model) as outer:
        with record_attention(model) as inner:
            model(x)
        assert inner and not outer
        model(x)
    assert (
        outer
        and model.attention.attend.record is None
        and set(vars(model)) == attributes
    )


def test_record_of_a_model_without_attention_is_empty():
    with record_attention(nn.Linear(2, 2)) as maps:
        pass
    assert maps == {}


def test_record_does_not_touch_the_gradient():
    model, x = (
        MultiHeadAttention(8, 2).double(),
        torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True),
    )
    plain = gradients(model(x), [x])[0]
    with record_attention(model):
        watched = gradients(model(x), [x])[0]
    assert (plain - watched).abs().max() < 1e-10


def test_own_kind_of_attention_is_recorded():
    class Uniform(Attend):
        def weights(self, q, k, mask=None):
            weights = q.new_ones(*q.shape[:-1], k.shape[-2])
            weights = weights if mask is None else weights * mask
            return weights / weights.sum(-1, keepdim=True)

    q, k, v = qkv(d=8)
    model = Uniform()
    with record_attention(model) as maps:
        output = model(q, k[..., :5], v, MASKS["keys"])
    assert (
        torch.allclose(output[1], v[1, :, :2].mean(-2, keepdim=True).expand(3, 4, 8))
        and (maps[""][1, ..., 2:] == 0).all()
    )


# bad input


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "arguments, words",
    [
        ((12, 5), "num_attention_heads must divide hidden_size"),
        ((0, 1), "hidden_size"),
        ((12, 0), "num_attention_heads"),
        ((12, 3, 1.0), "dropout"),
    ],
)
def test_bad_configuration(arguments, words):
    with pytest.raises(ConfigError, match=words):
        MultiHeadAttention(*arguments)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "x, options, words",
    [
        (torch.randn(2, 8), {}, "^x: expected features"),
        (torch.randn(2, 3, 7), {}, "^x: "),
        (torch.ones(2, 3, 8, dtype=torch.long), {}, "^x: "),
        (torch.empty(0, 3, 8), {}, "^x: expected at least one row"),
        (torch.randn(2, 3, 8), {"memory": torch.randn(2, 5, 6)}, "^memory: "),
        (torch.randn(2, 3, 8), {"mask": torch.ones(2, 3)}, "^mask: expected a boolean"),
        (torch.randn(2, 3, 8), {"mask": torch.ones(3, dtype=torch.bool)}, "^mask: "),
        (torch.randn(2, 3, 8), {"mask": torch.ones(2, 4, dtype=torch.bool)}, "^mask: "),
        (
            torch.randn(2, 3, 8),
            {"mask": torch.ones(5, 3, 3, dtype=torch.bool)},
            "^mask: ",
        ),
        (
            torch.randn(2, 3, 8),
            {"memory": torch.randn(2, 2, 8), "is_causal": True},
            "^memory: expected without is_causal",
        ),
        (torch.randn(2, 3, 8), {"memory": torch.randn(3, 5, 8)}, "^memory: "),
    ],
)
@pytest.mark.parametrize("recorded", [False, True])
def test_bad_input(x, options, words, recorded):
    module = MultiHeadAttention(8, 2)
    if recorded:
        module.attend.record = lambda weights: None
    with pytest.raises(InputError, match=words):
        module(x, **options)


@pytest.mark.no_shapes
def test_attend_without_weights():
    with pytest.raises(NotImplementedError, match="does not say"):
        Attend()(*qkv())


@pytest.mark.no_shapes
def test_record_of_changing_batches_is_refused():
    model = StepByStep(grows=False)
    with pytest.raises(InputError, match="batch or the heads changed"):
        with record_attention(model):
            model.attention(torch.randn(1, 2, 8))
            model.attention(torch.randn(2, 2, 8))


# what a decoder that writes word by word needs: projected memory, shared by several rows, and a past


def close(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-12)


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
    "k consecutive rows look into one row of the memory, as if it stood there k times; gradients too."
    torch.manual_seed(seed)
    module = shaken(MultiHeadAttention(6, 3).double())
    x, memory = (
        torch.randn(size, dtype=torch.float64, requires_grad=True)
        for size in ((k * b, n, 6), (b, m, 6))
    )
    mask = lengths_mask(torch.randint(1, m + 1, (b,)), m) if padded else None
    expected = module(
        x,
        memory.repeat_interleave(k, 0),
        None if mask is None else mask.repeat_interleave(k, 0),
    )
    module.attend.record = (lambda weights: None) if recorded else None
    got = module(x, module.project(memory, 1, 3), mask)
    assert close(got, expected)
    for a, e in zip(
        gradients(got, [x, memory, *module.parameters()]),
        gradients(expected, [x, memory, *module.parameters()]),
    ):
        assert (a - e).abs().max() < 1e-10


def test_look_up_row_by_row():
    module, q = MultiHeadAttention(6, 3), torch.randn(4, 3, 2, 2)
    memory, mask = torch.randn(2, 2, 3, 5, 2), lengths_mask(torch.tensor([5, 2]), 5)
    found = module.look_up(q, memory, mask)
    for row in range(4):
        one = row // 2
        k, v = memory[:, one : one + 1]
        assert torch.allclose(
            found[row],
            attention_naive(q[row : row + 1], k, v, mask[one : one + 1])[0][0],
            atol=1e-6,
        )


def test_projected_memory_is_read_and_not_copied():
    module = MultiHeadAttention(6, 3)
    memory, seen = module.project(torch.randn(2, 5, 6), 1, 3), []
    attend = module.attend.forward
    module.attend.forward = lambda q, k, v, *rest: (
        seen.extend([k, v]) or attend(q, k, v, *rest)
    )
    module(torch.randn(2, 1, 6), memory)
    module(torch.randn(8, 1, 6), memory)
    assert [x.data_ptr() for x in seen] == 2 * [x.data_ptr() for x in memory] and all(
        x.shape == (2, 3, 5, 2) for x in seen
    )


@given(st.integers(1, 5), st.integers(0, 5), st.booleans(), st.integers(0, 99))
def test_causal_with_a_past_is_the_end_of_the_whole(n, past, padded, seed):
    "The queries are the last n of past + n places, in the fast and in the readable form."
    q, k, v = (x.detach() for x in qkv(n=past + n, m=past + n, seed=seed))
    mask = (
        lengths_mask(
            torch.randint(
                1, past + n + 1, (2,), generator=torch.Generator().manual_seed(seed)
            ),
            past + n,
        )
        if padded
        else None
    )
    attend = DotProductAttend()
    whole = attend(q, k, v, mask, is_causal=True)[:, :, past:]
    for form in (attend, lambda *a, **b: Attend.forward(attend, *a, **b)):
        assert close(form(q[:, :, past:], k, v, mask, is_causal=True), whole)


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.booleans(),
    st.integers(0, 99),
)
def test_pieces_through_a_cache_equal_the_whole(pieces, padded, seed):
    torch.manual_seed(seed)
    module, x = (
        shaken(MultiHeadAttention(6, 3).double()).requires_grad_(False),
        torch.randn(2, sum(pieces), 6, dtype=torch.float64),
    )
    mask = (
        lengths_mask(torch.randint(1, sum(pieces) + 1, (2,)), sum(pieces))
        if padded
        else None
    )
    whole, cache, parts = module(x, mask=mask, is_causal=True), KeyValueCache(), []
    for part in x.split(pieces, 1):
        end = cache.length + part.shape[1]
        parts.append(
            module(
                part,
                mask=None if mask is None else mask[:, :end],
                is_causal=True,
                cache=cache,
            )
        )
    assert close(torch.cat(parts, 1), whole) and cache.length == sum(pieces)


@pytest.mark.no_shapes
@pytest.mark.parametrize("rows", [3, 5, 0])
def test_rows_that_can_not_share_a_memory(rows):
    module = MultiHeadAttention(6, 3)
    with pytest.raises(
        InputError,
        match=f"^memory: expected a number of rows that divides 4, the rows of x; got {rows}$",
    ):
        module(torch.randn(4, 2, 6), torch.randn(2, rows, 3, 5, 2))


@pytest.mark.no_shapes
def test_masks_and_caches_of_another_size():
    module, cache = MultiHeadAttention(6, 3), KeyValueCache()
    with torch.no_grad():
        module(torch.randn(4, 2, 6), is_causal=True, cache=cache)
        with pytest.raises(InputError, match="^cache: expected keys"):
            module(torch.randn(2, 1, 6), is_causal=True, cache=cache)
        with pytest.raises(
            InputError, match=r"^mask: .*\(4, 3, 1, 3\); got \(4, 1, 1, 2\)$"
        ):  # the mask of the words before
            module(
                torch.randn(4, 1, 6),
                mask=torch.ones(4, 2, dtype=torch.bool),
                is_causal=True,
                cache=cache,
            )
    with pytest.raises(InputError, match=r"^mask: .*; got \(2, 1, 1, 4\)$"):
        module(
            torch.randn(4, 1, 6),
            torch.randn(2, 2, 3, 5, 2),
            torch.ones(2, 4, dtype=torch.bool),
        )


@pytest.mark.no_shapes
@pytest.mark.parametrize("options", [{"is_causal": True}, {"cache": KeyValueCache()}])
@pytest.mark.parametrize(
    "memory",
    [torch.randn(2, 5, 6), torch.randn(2, 2, 3, 5, 2)],
    ids=["memory", "projected"],
)
def test_a_memory_has_no_order_and_no_past(memory, options):
    with pytest.raises(
        InputError, match="^memory: expected without is_causal and cache"
    ):
        MultiHeadAttention(6, 3)(torch.randn(2, 5, 6), memory, **options)
    assert options.get("cache", KeyValueCache()).length == 0


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "form", [DotProductAttend.forward, Attend.forward], ids=["fast", "readable"]
)
def test_more_queries_than_places(form):
    with pytest.raises(
        InputError,
        match="^is_causal: expected at least as many keys as queries; got 3 keys and 4 queries$",
    ):
        form(DotProductAttend(), *qkv(n=4, m=3), is_causal=True)


@pytest.mark.no_shapes
def test_a_mask_of_one_key_is_not_spread_over_all():
    with pytest.raises(InputError, match="^mask: expected one that fits"):
        MultiHeadAttention(8, 2)(
            torch.randn(2, 3, 8), mask=torch.ones(2, 1, dtype=torch.bool)
        )
