"""Approximations of softmax attention: each equal to its readable form and, at the end
of its range, to exact attention; causal, masked, in other precisions, on other devices;
and what each of them refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attn_notes as an
from attn_notes.efficient.approximation import ApproximateAttention, replace_attention
from attn_notes.efficient.efficient_attention import (
    LinearAttention,
    LinformerAttention,
    LocalAttention,
    PerformerAttention,
    random_directions,
)
from attn_notes.efficient.hashing import LSHAttention
from attn_notes.foundations.attention import (
    Attention,
    MultiHeadAttention,
    attention_naive,
    record_attention,
)
from attn_notes.foundations.checks import ConfigError, InputError
from attn_notes.foundations.packing import PackedTokens
from attn_notes.zoo.devices import STAND_IN, fake_device, to_stand_in

B, H, N, D = 2, 3, 37, 8
MAKE = {
    "local": lambda: LocalAttention(5),
    "linformer": lambda: LinformerAttention(N, 6),
    "linear": LinearAttention,
    "performer": lambda: PerformerAttention(D, 20),
    "lsh": lambda: LSHAttention(D, chunk=6, rounds=3),
}
CAUSAL = [name for name in MAKE if name != "linformer"]
every = pytest.mark.parametrize("name", MAKE)
every_causal = pytest.mark.parametrize("name", CAUSAL)


def made(name, dtype=torch.float64):
    torch.manual_seed(1)
    attention = MAKE[name]().to(dtype).eval()
    attention.block = 8  # of kernels: several blocks, the last one not full
    return attention


def qkv(n=N, m=N, dtype=torch.float64, c=D, scale=1.5):
    torch.manual_seed(0)
    q, k = (
        scale * torch.randn(B, H, n, D, dtype=dtype),
        torch.randn(B, H, m, D).to(dtype),
    )
    return q, k, torch.randn(B, H, m, c).to(dtype)


def hidden(m=N):
    "A mask of keys with holes; in row 1 most are hidden."
    torch.manual_seed(2)
    mask = torch.rand(B, m) > 0.3
    mask[1, m // 2 :] = False
    return mask


def recorded(attention, *args, **options):
    with record_attention(attention) as maps:
        output = attention(*args, **options)
    (weights,) = maps.values()
    return output, weights


# ---- the fast form is the readable one


@every
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
def test_the_fast_form_equals_the_readable_one(name, masked, is_causal):
    if is_causal and name not in CAUSAL:
        pytest.skip("not causal")
    attention, (q, k, v) = made(name), qkv(c=5)
    mask = hidden() if masked else None
    for x in (q, k, v, *attention.parameters()):
        x.requires_grad_()
    inputs = [q, k, v, *attention.parameters()]
    fast = attention(q, k, v, mask, is_causal=is_causal)
    slow, weights = recorded(attention, q, k, v, mask, is_causal=is_causal)
    assert (fast - slow).abs().max() < 1e-10 and fast.abs().max() > 0.1
    loss = torch.randn_like(fast)
    options = {"allow_unused": True, "materialize_grads": True}
    ours = torch.autograd.grad((fast * loss).sum(), inputs, **options)
    theirs = torch.autograd.grad((slow * loss).sum(), inputs, **options)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-10
    assert (weights.sum(-1) - 1).abs().max() < 1e-10 or masked
    if is_causal:
        assert weights.triu(1).abs().max() == 0
    if masked and name != "linformer":
        assert weights[~hidden()[:, None, None].expand_as(weights)].abs().max() == 0


@every
def test_hidden_keys_say_nothing(name):
    attention, (q, k, v) = made(name), qkv()
    mask = hidden()
    before = attention(q, k, v, mask)
    other = ~mask[:, None, :, None]
    k, v = k.masked_fill(other, 3.0), v.masked_fill(other, 3.0)
    if name == "lsh":  # queries are keys: only their own rows may change
        q = q.masked_fill(other, 3.0)
        change = (attention(q, k, v, mask) - before).masked_fill(other, 0)
        chunks = attention.hashed(q)  # and who shares a chunk with whom
        assert chunks.shape == (B, H, 3, N) and change.isfinite().all()
        return
    assert (attention(q, k, v, mask) - before).abs().max() < 1e-10


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_that_hide_everything_give_zeros(name, dtype):
    attention, (q, k, v) = made(name, dtype), qkv(dtype=dtype)
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[0] = False
    for x in (q, k, v):
        x.requires_grad_()
    outputs = attention(q, k, v, mask), recorded(attention, q, k, v, mask)[0]
    for output in outputs:
        assert output[0].abs().max() == 0 and output.isfinite().all()
        assert output.dtype == dtype and output[1].abs().max() > 0
        grads = torch.autograd.grad(
            output.float().sum(), (q, k, v), allow_unused=True, materialize_grads=True
        )
        assert all(g.isfinite().all() and g[0].abs().max() == 0 for g in grads)


@every_causal
def test_a_later_token_changes_nothing_before_it(name):
    attention, (q, k, v) = made(name), qkv()
    before = attention(q, k, v, is_causal=True)
    for x in (k, v):
        x[:, :, 20:] += 1
    after = attention(q, k, v, is_causal=True)
    assert (after - before)[:, :, :20].abs().max() < 1e-10
    assert (after - before)[:, :, 20:].abs().max() > 1e-2


@pytest.mark.parametrize("name", ["local", "linear", "performer"])
@pytest.mark.parametrize("n", [1, 4, 20])
def test_causal_queries_are_the_last_positions(name, n):
    attention, (q, k, v) = made(name), qkv()
    whole = attention(q, k, v, hidden(), is_causal=True)
    part = attention(q[:, :, -n:], k, v, hidden(), is_causal=True)
    assert (part - whole[:, :, -n:]).abs().max() < 1e-10
    slow, _ = recorded(attention, q[:, :, -n:], k, v, hidden(), is_causal=True)
    assert (slow - part).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["linformer", "linear", "performer"])
def test_queries_of_other_tokens(name):
    attention, (q, k, v) = made(name), qkv(n=11)
    fast, (slow, _) = attention(q, k, v), recorded(attention, q, k, v)
    assert fast.shape == (B, H, 11, D) and (fast - slow).abs().max() < 1e-10


# ---- at the end of the range it is exact attention


def test_local_attention_is_exact_within_its_window():
    q, k, v = qkv()
    distance = (torch.arange(N)[:, None] - torch.arange(N)).abs()
    for window in (1, 2, 7, N):
        for is_causal in (False, True):
            near = distance < window
            near = near.tril() if is_causal else near
            expected, _ = attention_naive(q, k, v, near.expand(B, 1, N, N))
            found = LocalAttention(window)(q, k, v, is_causal=is_causal)
            assert (found - expected).abs().max() < 1e-10
    exact = F.scaled_dot_product_attention(q, k, v)
    assert (LocalAttention(N)(q, k, v) - exact).abs().max() < 1e-10


def test_linformer_with_identities_is_exact():
    q, k, v = qkv()
    attention = LinformerAttention(N, N).double()
    for mixtures in attention.parameters():
        nn.init.eye_(mixtures)
    exact = F.scaled_dot_product_attention(q, k, v)
    assert (attention(q, k, v) - exact).abs().max() < 1e-10


@pytest.mark.parametrize("is_causal", [False, True])
def test_one_bucket_is_exact_attention_of_shared_keys(is_causal):
    q, k, v = qkv()
    attention = LSHAttention(D, chunk=N, rounds=2).double()
    scores = q @ F.normalize(q, dim=-1).mT
    scores = scores + torch.full((N,), -1e4, dtype=q.dtype).diag()
    if is_causal:
        scores = scores.masked_fill(torch.ones(N, N).triu(1) == 1, -torch.inf)
    expected = scores.softmax(-1) @ v
    assert (attention(q, k, v, is_causal=is_causal) - expected).abs().max() < 1e-10


def test_hashing_against_a_loop_over_tokens():
    attention, (q, _, v) = made("lsh"), qkv()
    found = attention(q, q, v, is_causal=True)
    keys, buckets = F.normalize(q, dim=-1), attention.hashed(q)
    for b, h in [(0, 0), (1, 2)]:
        met = [set() for _ in range(N)]
        for turn in buckets[b, h].tolist():
            order = sorted(range(N), key=lambda i, t=turn: t[i])
            for place, i in enumerate(order):
                first = (place // 6 - 1) * 6
                for j in order[max(first, 0) : first + 12]:
                    if turn[i] == turn[j] and j <= i:
                        met[i].add(j)
        for i, others in enumerate(met):
            index = sorted(others - {i}) or [i]
            A = (keys[b, h, index] @ q[b, h, i]).softmax(-1)
            assert (A @ v[b, h, index] - found[b, h, i]).abs().max() < 1e-10
        assert any(len(others) < i + 1 for i, others in enumerate(met))


# ---- random features


def test_random_directions():
    """At right angles within a block, and of the lengths of normal vectors; the signs
    of a QR factorization would lean them to one side."""
    random = torch.Generator().manual_seed(0)
    drawn = random_directions(40000, 8, generator=random).double()
    products = drawn.unflatten(0, (-1, 8)) @ drawn.unflatten(0, (-1, 8)).mT
    off = products - torch.diag_embed(products.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-4
    assert drawn.mean(0).abs().max() < 0.03
    assert (drawn.T @ drawn / 40000 - torch.eye(8)).abs().max() < 0.03
    assert abs(drawn.square().sum(1).mean() - 8) < 0.1
    assert abs(drawn.square().sum(1).var() - 16) < 1
    free = random_directions(7, 3, orthogonal=False)
    assert free.shape == (7, 3) and abs((free[0] @ free[1]).item()) > 1e-4


def test_the_estimate_is_unbiased_and_its_variance_the_formulas():
    """E[phi(x).phi(y)] = exp(x.y), variance (exp(|x+y|^2) - 1) exp(2 x.y) / f for
    independent directions (Choromanski et al. 2021, lemma 2); less for orthogonal."""
    torch.manual_seed(0)
    x, y = 0.2 * torch.randn(2, 8, dtype=torch.float64)
    found = {}
    for orthogonal in (False, True):
        w = random_directions(8 * 60000, 8, orthogonal).double()
        terms = (w @ (x + y) - (x @ x + y @ y) / 2).exp()
        estimates = terms.unflatten(0, (-1, 8)).mean(1)
        error = estimates.std() / len(estimates) ** 0.5
        assert abs(estimates.mean() - (x @ y).exp()) < 4 * error
        found[orthogonal] = estimates.var().item()
    z = (x + y).square().sum()
    formula = (z.exp() - 1) * (2 * x @ y).exp() / 8
    assert abs(found[False] / formula - 1) < 0.1
    assert found[True] < 0.95 * found[False]


def test_performer_nears_softmax_and_redraws():
    q, k, v = qkv(scale=0.5)
    k = k / 2
    exact = F.scaled_dot_product_attention(q, k, v)
    torch.manual_seed(3)
    errors = []
    for count in (16, 4096):
        attention = PerformerAttention(D, count).double()
        errors.append((attention(q, k, v) - exact).norm() / exact.norm())
    assert errors[1] < 0.1 < errors[0]
    before = attention.directions.clone()
    attention.redraw(torch.Generator().manual_seed(5))
    first = attention(q, k, v)
    assert not torch.equal(before, attention.directions)
    attention.redraw(torch.Generator().manual_seed(5))
    assert torch.equal(first, attention(q, k, v))
    assert "directions" in attention.state_dict()


def test_large_scores_do_not_overflow():
    q, k, v = (8 * x.float() for x in qkv())
    assert made("performer", torch.float32)(q, k, v).isfinite().all()
    assert made("performer", torch.float32)(q, k, v, is_causal=True).isfinite().all()


def test_causal_linear_attention_is_a_recurrence():
    q, k, v = qkv(c=4)
    found = made("linear")(q, k, v, is_causal=True)
    S, z = q.new_zeros(B, H, D, 4), q.new_zeros(B, H, D)
    for i in range(N):
        f, g = F.elu(q[:, :, i]) + 1, F.elu(k[:, :, i]) + 1
        S, z = S + g[..., None] * v[:, :, i, None], z + g
        y = (f[..., None] * S).sum(-2) / (f * z).sum(-1, keepdim=True)
        assert (y - found[:, :, i]).abs().max() < 1e-10


# ---- against other libraries


def test_local_attention_equals_longformers():
    transformers = pytest.importorskip("transformers")
    from transformers.models.longformer import modeling_longformer as longformer

    config = transformers.LongformerConfig(
        hidden_size=24, num_attention_heads=3, attention_window=[6], num_hidden_layers=1
    )
    torch.manual_seed(0)
    theirs = longformer.LongformerSelfAttention(config, 0).double().eval()
    x, seen = torch.randn(2, 36, 24, dtype=torch.float64), torch.ones(2, 36).bool()
    seen[1, 29:] = False
    hide = torch.zeros(2, 36).masked_fill(~seen, -1.0).double()
    (expected, *_) = theirs(
        x,
        attention_mask=hide,
        is_index_masked=hide < 0,
        is_index_global_attn=hide > 0,
        is_global_attn=False,
    )
    q, k, v = (
        layer(x).unflatten(2, (3, 8)).transpose(1, 2)
        for layer in (theirs.query, theirs.key, theirs.value)
    )
    found = LocalAttention(4)(q, k, v, seen).transpose(1, 2).flatten(2)
    assert (found - expected)[seen].abs().max() < 1e-6  # their softmax has 32 bits


# ---- in a model


@every
def test_it_replaces_attention_in_a_model(name):
    torch.manual_seed(0)
    model = nn.Sequential(MultiHeadAttention(H * D, H), MultiHeadAttention(H * D, H))
    assert replace_attention(model.double().eval(), MAKE[name]) == 2
    x = torch.randn(B, N, H * D, dtype=torch.float64)
    with record_attention(model) as maps:
        slow = model(x)
    assert len(maps) == 2 and (model(x) - slow).abs().max() < 1e-10
    assert all(not layer.attention.training for layer in model)


@every
def test_packed_tokens_are_those_of_each_sequence(name):
    attention, (q, k, v) = made(name), qkv()
    mask = torch.arange(N) < torch.tensor([[N], [25]])
    packed = PackedTokens(mask)
    flat = [packed.pack(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v)]
    expected = attention(q, k, v, mask)
    found = attention(*flat, packed)
    zeros = packed.unpack(found.transpose(1, 2)).transpose(1, 2)
    real = mask[:, None, :, None]
    # hidden tokens are zeros there: it matters to what mixes queries with keys alone
    options = [x.masked_fill(~real, 0) for x in (q, k, v)]
    expected = attention(*options, mask)
    assert (zeros - expected.masked_fill(~real, 0)).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["local", "linear", "performer"])
def test_generation_with_a_cache_equals_the_whole(name):
    torch.manual_seed(0)
    model = an.create_model(
        "gpt", vocab_size=50, hidden_size=24, num_hidden_layers=2, dropout=0.0,
        num_attention_heads=3, intermediate_size=32, max_position_embeddings=40,
    ).double().eval()  # fmt: skip
    replace_attention(model, MAKE[name])
    ids = torch.randint(50, (2, 9))
    found = model.generate(ids, max_new_tokens=12)
    for i in range(9, 21):
        logits = model(found[:, :i])[:, -1]
        assert torch.equal(logits.argmax(-1), found[:, i])


# ---- precision, compilers, devices


@pytest.mark.no_shapes
@every
def test_autocast_compile_and_export(name):
    attention, (q, k, v) = made(name, torch.float32), qkv(dtype=torch.float32)
    expected = attention(q, k, v, hidden())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = [x.bfloat16() for x in (q, k, v)]
        found = attention(*rounded, hidden())
    assert found.dtype == torch.bfloat16
    exact = attention(*(x.float() for x in rounded), hidden())
    assert (found - exact).abs().max() < 0.05
    exported = torch.export.export(attention, (q, k, v, hidden())).module()
    assert (exported(q, k, v, hidden()) - expected).abs().max() < 1e-5
    torch._dynamo.reset()  # of what other tests have compiled
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    assert (compiled(q, k, v, hidden()) - expected).abs().max() < 1e-5


@every
@pytest.mark.parametrize("is_causal", [False, True])
def test_on_another_device(name, is_causal):
    is_causal = is_causal and name in CAUSAL
    model = MultiHeadAttention(H * D, H)
    replace_attention(model, MAKE[name])
    with fake_device():
        to_stand_in(model)
        x = torch.randn(B, N, H * D, device=STAND_IN)
        mask = torch.ones(B, N, dtype=torch.bool, device=STAND_IN)
        for given in (None, mask):
            output = model(x, mask=given, is_causal=is_causal)
            assert output.device == x.device
            output.sum().backward()
    with torch.device("meta"):
        empty = MAKE[name]()
    empty.to_empty(device="cpu").load_state_dict(made(name, torch.float32).state_dict())
    q, k, v = qkv(dtype=torch.float32)
    again = made(name, torch.float32).half().float()
    assert (empty(q, k, v) - made(name, torch.float32)(q, k, v)).abs().max() < 1e-5
    assert again(q, k, v).isfinite().all()


def test_linear_attention_stores_no_pairs():
    """The memory of a long sequence: a hundred times as many tokens as features."""
    from attn_notes.zoo.benchmark import peak_memory

    q = torch.randn(1, 1, 4096, 16)
    pairs = 4 * 4096**2
    for attention in (
        LinearAttention(),
        PerformerAttention(16, 32),
        LocalAttention(32),
    ):
        for is_causal in (False, True):
            used = peak_memory(lambda a=attention, c=is_causal: a(q, q, q, is_causal=c))
            assert used < pairs / 10


# ---- bad input


@pytest.mark.no_shapes
@every
def test_what_is_refused(name):
    attention, (q, k, v) = made(name), qkv()
    with pytest.raises(InputError, match="bias: expected None"):
        attention(q, k, v, bias=torch.zeros(N, N))
    pairs = torch.ones(B, N, N, dtype=torch.bool)
    with pytest.raises(InputError, match=r"mask: expected one of keys, \(2, 37\)"):
        attention(q, k, v, pairs)
    for bad in (torch.ones(B, N), torch.ones(B, N - 1).bool(), torch.ones(5, N).bool()):
        with pytest.raises(InputError, match="mask"):
            attention(q, k, v, bad)
    if name != "linformer":
        with pytest.raises(InputError):
            attention(q, k[:, :, 1:], v[:, :, 1:], is_causal=True)


@pytest.mark.no_shapes
def test_bad_sizes():
    q, k, v = qkv()
    with pytest.raises(InputError, match="window: expected at most 37.*got 38"):
        LocalAttention(38)(q, k, v)
    with pytest.raises(InputError, match="37 queries for 37 keys; got 9"):
        LocalAttention(4)(q[:, :, :9], k, v)
    with pytest.raises(InputError, match="is_causal: expected False"):
        made("linformer")(q, k, v, is_causal=True)
    with pytest.raises(InputError, match="expected 37 tokens.*got 30"):
        made("linformer")(q, k[:, :, :30], v[:, :, :30])
    with pytest.raises(InputError, match="expected 37 queries, which are the keys"):
        made("lsh")(q[:, :, :9], k, v, is_causal=True)
    for make in (
        lambda: LocalAttention(0),
        lambda: LinformerAttention(8, 0),
        lambda: PerformerAttention(8, 0),
        lambda: LSHAttention(8, 0),
        lambda: LSHAttention(8, 4, max_buckets=7),
        lambda: LocalAttention(4, dropout=2),
    ):
        with pytest.raises(ConfigError):
            make()
    with pytest.raises(ConfigError, match="expected a model with multi-head attention"):
        replace_attention(nn.Linear(2, 2), LinearAttention)
    with pytest.raises(NotImplementedError, match="does not say how it attends"):
        ApproximateAttention()(q, k, v)
    assert issubclass(ApproximateAttention, Attention)


@torch.no_grad()
def test_dropout_of_pairs_acts_in_training_alone():
    q, k, v = qkv()
    for attention in (LocalAttention(9, 0.5), LinformerAttention(N, 9, 0.5).double()):
        whole = attention.eval()(q, k, v)
        torch.manual_seed(0)
        mean = torch.stack([attention.train()(q, k, v) for _ in range(400)]).mean(0)
        assert not torch.equal(attention(q, k, v), whole)
        assert (mean - whole).abs().mean() < 0.1 * whole.square().mean() ** 0.5


# ---- what the evidence measures with


def test_exponents_and_the_mean():
    from attn_notes.efficient.efficient_attention_evidence import (
        MeanAttention,
        exponents,
    )

    rows = [
        {"config": {"kind": kind, "n": n}, "seed": seed, "metrics": {"seconds": t}}
        for kind, power in (("a", 2), ("b", 1))
        for seed in (0, 1)
        for n in (128, 1024, 2048, 8192)
        for t in [n**power * 1e-6 * (seed + 1) + 99 * (n < 1024)]
    ]
    for kind, power in (("a", 2), ("b", 1)):
        assert all(abs(x - power) < 1e-9 for x in exponents(rows, kind))
        assert len(exponents(rows, kind)) == 2
    q, k, v = qkv()
    even = torch.zeros_like(q)
    for is_causal in (False, True):
        expected = F.scaled_dot_product_attention(even, k, v, is_causal=is_causal)
        found = MeanAttention()(q, k, v, is_causal=is_causal)
        assert (found - expected).abs().max() < 1e-10
