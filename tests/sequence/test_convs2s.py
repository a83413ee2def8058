"""ConvS2S: what the chapter shows once is asked here of many sizes, masks and ways to
be wrong."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attn_notes.foundations.attention import (
    ScaledDotProductAttention,
    record_attention,
)
from attn_notes.foundations.checks import ConfigError, InputError
from attn_notes.foundations.masks import lengths_mask
from attn_notes.sequence.convs2s import (
    PAPER_RECIPE,
    ConvS2S,
    ConvS2SConfig,
    GatedConv,
    ScaleGradient,
    WeightNorm,
    normalized,
    receptive_field,
    weights_kept,
)
from attn_notes.zoo.devices import check_model
from attn_notes.zoo.factory import count_parameters, create_model
from attn_notes.zoo.registry import model_info

TINY = ConvS2SConfig(
    source_vocab_size=30,
    target_vocab_size=40,
    hidden_size=12,
    conv_dim=(12, 16, 16),
    conv_kernel=(3, 5, 1),
    output_size=8,
    max_position_embeddings=24,
    dropout=0.0,
)


def shaken(config=TINY, seed=0):
    """A model in double precision of which no bias is zero and no position is like
    another."""
    torch.manual_seed(seed)
    model = ConvS2S(config).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def pairs(rows=3, n=7, m=6, seed=0):
    random = torch.Generator().manual_seed(seed)
    source, target = (
        torch.randint(4, high, (rows, length), generator=random)
        for high, length in ((30, n), (40, m))
    )
    lengths = torch.randint(1, n + 1, (rows,), generator=random)
    return source, target, lengths_mask(lengths, n)


# ---- the size


def test_count_is_exact():
    assert (
        count_parameters(create_model("convs2s", device="meta"))
        == model_info("convs2s").parameters
    )


def test_published_configuration():
    config = model_info("convs2s").config
    assert config.conv_dim == (512,) * 9 + (1024,) * 4 + (
        2048,
    ) * 2 and config.conv_kernel == (3,) * 13 + (1, 1)
    assert (
        config.hidden_size,
        config.output_size,
        receptive_field(config.conv_kernel),
    ) == (768, 512, 27)


def test_paper_recipe():
    paper = PAPER_RECIPE
    assert (
        paper.optimizer,
        paper.momentum,
        paper.learning_rate,
        paper.max_grad_norm,
    ) == (
        "sgd",
        0.99,
        0.25,
        0.1,
    )
    assert paper.average_over == "tokens" and paper.lr(
        paper.max_steps
    ) == pytest.approx(0.25e-3)


# ---- the parts


@pytest.mark.parametrize("layer", [nn.Linear(5, 4), nn.Conv1d(5, 4, 3)])
def test_weight_norm(layer):
    convolution = isinstance(layer, nn.Conv1d)
    layer = normalized(layer.double(), gain=4.0)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    x = x if convolution else x.transpose(1, 2)
    g, v = (
        p.detach().clone().requires_grad_()
        for p in (
            layer.parametrizations.weight.original0,
            layer.parametrizations.weight.original1,
        )
    )
    by_hand = g * v / v.square().sum(tuple(range(1, v.ndim)), keepdim=True).sqrt()
    function = nn.functional.conv1d if convolution else nn.functional.linear
    expected, got = function(x, by_hand, layer.bias), layer(x)
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)
    theirs = torch.autograd.grad(
        got.square().sum(),
        [
            layer.parametrizations.weight.original0,
            layer.parametrizations.weight.original1,
        ],
    )
    mine = torch.autograd.grad(expected.square().sum(), [g, v])
    assert all(
        torch.allclose(a, b, rtol=0, atol=1e-10)
        for a, b in zip(mine, theirs, strict=True)
    )


@pytest.mark.parametrize("layer", [nn.Linear(5, 4, bias=False), nn.Conv1d(5, 4, 3)])
def test_the_state_is_that_of_torch(layer):
    theirs = nn.utils.parametrizations.weight_norm(copy.deepcopy(layer))
    ours = WeightNorm(layer)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight, theirs.weight)


def test_a_weight_is_put_together_once_inside_a_generation():
    layer = normalized(nn.Linear(5, 4))
    assert layer.weight is not layer.weight
    with torch.no_grad(), weights_kept():
        assert layer.weight is layer.weight
        other = copy.deepcopy(layer)
        assert other.weight is not layer.weight
        with weights_kept():
            layer.parametrizations.weight.original0.mul_(2)
            assert torch.allclose(layer.weight, 2 * other.weight)
    assert layer.weight.requires_grad


@pytest.mark.parametrize("gain, dropout", [(1.0, 0.0), (4.0, 0.0), (4.0, 0.2)])
def test_initial_weights(gain, dropout):
    torch.manual_seed(0)
    layer = normalized(nn.Conv1d(200, 300, 3), gain, dropout)
    assert layer.weight.std().item() == pytest.approx(
        (gain * (1 - dropout) / 600) ** 0.5, rel=0.02
    )
    assert layer.bias.abs().max() == 0


@settings(deadline=None, max_examples=15)
@given(
    st.integers(1, 4),
    st.integers(1, 3).map(lambda half: 2 * half - 1),
    st.integers(1, 6),
    st.integers(0, 99),
)
def test_block_equals_a_loop(width, kernel, n, seed):
    torch.manual_seed(seed)
    block = GatedConv(3, width, kernel, 0.0).double()
    x = torch.randn(2, n + kernel - 1, 3, dtype=torch.float64)
    rows = [
        torch.einsum("bkc,wck->bw", x[:, i : i + kernel], block.conv.weight)
        + block.conv.bias
        for i in range(n)
    ]
    a, b = torch.stack(rows, 1).chunk(2, -1)
    assert torch.allclose(block(x), a * b.sigmoid(), rtol=0, atol=1e-12)


def test_gradient_into_the_encoder_is_divided_by_the_layers(monkeypatch):
    source, target, mask = pairs()
    model = shaken()
    grads = []
    for scaled in (True, False):
        if not scaled:
            monkeypatch.setattr(
                ScaleGradient, "apply", staticmethod(lambda x, factor: x)
            )
        model.zero_grad()
        model(source, target, mask).square().mean().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name in grads[0]:
        if not name.startswith("encoder.embedding"):
            factor = 3 if name.startswith("encoder.") else 1
            assert torch.allclose(
                grads[0][name] * factor, grads[1][name], rtol=1e-9, atol=1e-14
            ), name


def test_attention_readable_equals_fused():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 1, 5, 8, dtype=torch.float64)
    mask = lengths_mask(torch.tensor([5, 2]), 5)
    attend = ScaledDotProductAttention(scale=1.0)
    fused = attend(q, k, v, mask)
    with record_attention(attend) as maps:
        assert torch.allclose(attend(q, k, v, mask), fused, rtol=0, atol=1e-12)
    assert len(maps) == 1
    assert torch.allclose(attend.weights(q, k), (q @ k.transpose(-2, -1)).softmax(-1))


# ---- the whole, against a second form of it: padded on both sides and cut, one
# sentence, nothing cached


def second_form(model, source, target):
    """Logits (m v) of one sentence without padding: the paper's equations on plain
    tensors, the encoder's gradient unscaled."""
    half, encoder, decoder = 0.5**0.5, model.encoder, model.decoder

    def convolve(layer, h, pad):
        return nn.functional.conv1d(
            h.T[None], layer.conv.weight, layer.conv.bias, padding=pad
        )[0].T

    def gated(layer, y):
        a, b = y.tensor_split(2, -1)
        return a * torch.sigmoid(b)

    e = (
        encoder.embedding.tokens.weight[source]
        + encoder.embedding.positions.weight[: len(source)]
    )
    h = encoder.in_proj(e)
    for layer in encoder.layers:
        h = half * (
            gated(layer, convolve(layer, h, layer.kernel_size // 2))
            + layer.residual_proj(h)
        )
    z = encoder.out_proj(h)
    g = (
        decoder.embedding.tokens.weight[target]
        + decoder.embedding.positions.weight[: len(target)]
    )
    h = decoder.in_proj(g)
    for layer, attention in zip(decoder.layers, decoder.attention, strict=True):
        v = gated(layer, convolve(layer, h, layer.kernel_size - 1)[: len(target)])
        a = torch.softmax(half * (attention.query(v) + g) @ z.T, -1)
        c = a @ (half * (z + e)) * len(source) * (1 / len(source)) ** 0.5
        h = half * (half * (attention.out_proj(c) + v) + layer.residual_proj(h))
    return decoder.lm_head(decoder.out_proj(h))


@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(conv_dim=(7,), conv_kernel=(1,)),
        dict(conv_dim=(5, 9), conv_kernel=(7, 3), hidden_size=3),
        dict(conv_dim=(16, 12, 12, 20), conv_kernel=(1, 3, 3, 5), output_size=15),
    ],
)
def test_equals_a_second_form(change):
    model = shaken(replace(TINY, **change))
    source, target, _ = pairs(rows=1)
    ours, theirs = model(source, target)[0], second_form(model, source[0], target[0])
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)
    layers = len(model.config.conv_dim)
    gradients = [
        torch.autograd.grad(
            logits.square().mean(), list(model.parameters()), allow_unused=True
        )
        for logits in (ours, theirs)
    ]
    for (name, _), a, b in zip(model.named_parameters(), *gradients, strict=True):
        if not name.startswith(
            "encoder.embedding"
        ):  # reached on two ways, of which one is scaled
            assert torch.allclose(
                a * (layers if name.startswith("encoder.") else 1),
                b,
                rtol=1e-8,
                atol=1e-12,
            ), name


# ---- what must not change anything


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999), st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_pieces_equal_the_whole(seed, pieces):
    model = shaken()
    source, target, mask = pairs(m=sum(pieces), seed=seed)
    full = model(source, target, mask)
    state, logits = model.encode(source, mask), []
    for words in target.split(pieces, dim=1):
        part, state = model.decode(words, state)
        logits.append(part)
    assert torch.allclose(torch.cat(logits, 1), full, rtol=0, atol=1e-12)
    assert [past.shape[1] for past in state["past"]] == [
        k - 1 for k in TINY.conv_kernel
    ]


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 999), st.integers(0, 5))
def test_a_word_changes_nothing_before_it(seed, place):
    model = shaken()
    source, target, mask = pairs(seed=seed)
    other = target.clone()
    other[:, place] = 4 + (other[:, place] - 3) % 36
    before, after = model(source, target, mask), model(source, other, mask)
    assert (
        torch.equal(before[:, :place], after[:, :place])
        and (before[:, place] != after[:, place]).any(-1).all()
    )


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 999), st.integers(0, 6), st.integers(0, 6))
def test_padding_changes_nothing(seed, more_source, more_target):
    model = shaken()
    source, target, mask = pairs(seed=seed)
    real = model(source, target, mask)
    source = torch.where(mask, source, 17)  # whatever stands under the mask
    wider = (
        nn.functional.pad(source, (0, more_source), value=9),
        nn.functional.pad(target, (0, more_target), value=9),
    )
    masks = (
        nn.functional.pad(mask, (0, more_source)),
        nn.functional.pad(torch.ones_like(target, dtype=torch.bool), (0, more_target)),
    )
    assert torch.allclose(model(*wider, *masks)[:, :6], real, rtol=0, atol=1e-12)


def test_a_batch_of_one_equals_its_row():
    model = shaken()
    source, target, mask = pairs()
    rows = model(source, target, mask)
    for i, n in enumerate(mask.sum(1).tolist()):
        assert torch.allclose(
            model(source[i : i + 1, :n], target[i : i + 1])[0],
            rows[i],
            rtol=0,
            atol=1e-12,
        )


def test_training_mode_without_dropout_equals_evaluation():
    model, (source, target, mask) = shaken(), pairs()
    expected = model(source, target, mask)
    assert torch.equal(model.train()(source, target, mask), expected)


def test_dropout_only_in_training():
    model, (source, target, mask) = shaken(replace(TINY, dropout=0.3)), pairs()
    assert torch.equal(model(source, target, mask), model(source, target, mask))
    model.train()
    assert not torch.equal(model(source, target, mask), model(source, target, mask))


# ---- writing


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate_row_by_row(num_beams):
    model = shaken()
    source, _, mask = pairs(rows=4)
    together = model.generate(source, mask, max_new_tokens=9, num_beams=num_beams)
    for i, n in enumerate(mask.sum(1).tolist()):
        alone = model.generate(
            source[i : i + 1, :n], max_new_tokens=9, num_beams=num_beams
        )[0]
        assert (
            torch.equal(together[i, : len(alone)], alone)
            and (together[i, len(alone) :] == TINY.pad_token_id).all()
        )


def test_greedy_is_the_argmax_of_the_full_pass():
    model = shaken()
    source, _, mask = pairs(rows=4)
    words = model.generate(source, mask, max_new_tokens=8)
    given_words = torch.cat([torch.full((4, 1), TINY.bos_token_id), words[:, :-1]], 1)
    best = model(source, given_words, mask).argmax(-1)
    unfinished = torch.cat(
        [
            torch.ones(4, 1, dtype=torch.bool),
            (words[:, :-1] != TINY.eos_token_id).cumprod(1).bool(),
        ],
        1,
    )
    assert torch.equal(words[unfinished], best[unfinished])


def test_attention_is_recorded_layer_by_layer():
    model = shaken()
    source, target, mask = pairs()
    expected = model(source, target, mask)
    with record_attention(model) as maps:
        assert torch.allclose(model(source, target, mask), expected, rtol=0, atol=1e-6)
        whole = dict(maps)
        words = model.generate(source, mask, max_new_tokens=4)
        written = {name: weights.shape for name, weights in maps.items()}
    assert list(whole) == [f"decoder.attention.{i}.attention" for i in range(3)]
    for weights in whole.values():
        assert weights.shape == (3, 1, 6, 7) and torch.allclose(
            weights.sum(-1), torch.ones(3, 1, 6, dtype=torch.float64)
        )
        assert (weights.movedim(-1, 1)[~mask] == 0).all()
    assert set(written.values()) == {(3, 1, words.shape[1], 7)}


# ---- where it runs (compilers, precisions and files: tests/zoo/test_models.py)


@pytest.mark.slow
def test_fake_accelerator():
    assert check_model("convs2s", "fake").without_gradient == ()


@pytest.mark.slow
@pytest.mark.no_shapes
def test_export():
    model, (source, target, mask) = ConvS2S(TINY).eval(), pairs()
    n, m = torch.export.Dim("n", min=2, max=24), torch.export.Dim("m", min=2, max=24)
    exported = torch.export.export(
        model, (source, target, mask), dynamic_shapes=({1: n}, {1: m}, {1: n})
    ).module()
    source, target, mask = pairs(n=9, m=4)
    assert torch.allclose(
        exported(source, target, mask), model(source, target, mask), atol=1e-6
    )


def test_shipped_weights_translate():
    from attn_notes.data.tasks import load_task
    from attn_notes.zoo.registry import weights_folder

    task = load_task(weights_folder("convs2s"))
    assert task.predict(
        create_model("convs2s", pretrained=True), ["Tuesday, June 8, 2027"]
    ) == ["mardi 8 juin 2027"]


# ---- what is refused


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "wrong",
    [
        dict(conv_kernel=(3, 4, 1)),
        dict(conv_kernel=(3, 3)),
        dict(conv_dim=(), conv_kernel=()),
        dict(conv_dim=(12, 0, 16)),
        dict(hidden_size=0),
        dict(dropout=1.0),
        dict(target_vocab_size=-1),
    ],
)
def test_configuration_refused(wrong):
    with pytest.raises(ConfigError, match="got"):
        replace(TINY, **wrong)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "change",
    [
        dict(input_ids=torch.rand(3, 7)),
        dict(input_ids=torch.ones(7, dtype=torch.long)),
        dict(input_ids=torch.ones(3, 0, dtype=torch.long)),
        dict(decoder_input_ids=torch.ones(2, 6, dtype=torch.long)),
        dict(attention_mask=torch.ones(3, 7)),
        dict(attention_mask=torch.ones(3, 6, dtype=torch.bool)),
        dict(decoder_attention_mask=torch.ones(3, 7, dtype=torch.bool)),
        dict(decoder_input_ids=torch.ones(3, 25, dtype=torch.long)),
    ],
)
def test_forward_refuses(change):
    source, target, mask = pairs()
    with pytest.raises(InputError, match="expected"):
        ConvS2S(TINY)(
            **{
                "input_ids": source,
                "decoder_input_ids": target,
                "attention_mask": mask,
                **change,
            }
        )


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "change",
    [
        dict(max_new_tokens=25),
        dict(max_new_tokens=0),
        dict(num_beams=0),
        dict(input_ids=torch.full((3, 7), 30)),
        dict(attention_mask=torch.zeros(3, 7, dtype=torch.bool)),
    ],
)
def test_generate_refuses(change):
    source, _, mask = pairs()
    with pytest.raises(InputError), warnings.catch_warnings():
        warnings.simplefilter("error")
        ConvS2S(TINY).generate(
            **{"input_ids": source, "attention_mask": mask, **change}
        )
