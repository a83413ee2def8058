"""Quantization: equal to the definition and to torchao, bit for bit; the bound on the
error; whole numbers multiplied without error; which weights a model quantizes, shared
tables among them; files; the straight-through gradient."""

import importlib
import io
import logging
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import attn_notes as an
from attn_notes.efficient.quantization import (
    KINDS,
    FakeQuantize,
    fake_quantize,
    import_torchao,
    int8_linear,
    int8_share,
    matrices,
    quantize,
    quantize_tensor,
    saved_bytes,
    simulate,
    weight_at,
)
from attn_notes.foundations.attention import MultiHeadAttention

torchao = import_torchao()
every_kind = pytest.mark.parametrize("kind", KINDS)
CONFIGS = {
    "weight_only": torchao.Int8WeightOnlyConfig,
    "dynamic": torchao.Int8DynamicActivationInt8WeightConfig,
}


def rows(*shape, seed=0, spread=3.0):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=random)
    return x * (spread * torch.randn(shape[:-1], generator=random)).exp()[..., None]


# ---- one tensor


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_row", [True, False])
@given(seed=st.integers(0, 999), bits=st.integers(2, 8), shift=st.floats(-9, 9))
def test_the_error_is_within_half_a_scale(per_row, symmetric, seed, bits, shift):
    x = rows(3, 2, 17, seed=seed).double() + shift
    found = quantize_tensor(x, bits, per_row, symmetric)
    assert found.codes.dtype == torch.int8 and found.codes.shape == x.shape
    assert found.scale.shape == ((3, 2, 1) if per_row else (1, 1, 1))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert low <= found.codes.min() and found.codes.max() <= high
    error = (found.dequantize() - x).abs() / found.scale
    assert error.max() <= (0.5 if symmetric else 1.0) + 1e-9
    inner = (found.codes > low) & (found.codes < high)
    assert not inner.any() or error[inner].max() <= 0.5 + 1e-9
    if not symmetric:  # zero is a code: padding stays exact
        zero = quantize_tensor(
            torch.cat([x, 0 * x[..., :1]], -1), bits, per_row, symmetric
        )
        assert (zero.dequantize()[..., -1] == 0).all()


def test_codes_are_those_of_the_definition():
    x = torch.tensor([[-1.0, 0.0, 0.3, 1.0], [0.0, 0.0, 0.0, 0.0]]).double()
    found = quantize_tensor(x, bits=3)  # -4 ... 3, scale 2/7
    assert found.codes.tolist() == [[-4, 0, 1, 3], [0] * 4]
    assert found.scale[0, 0] == pytest.approx(2 / 7)
    assert torch.isfinite(found.dequantize()).all()
    found = quantize_tensor(x + 0.5, bits=2, symmetric=False)  # -0.5 ... 1.5: 2/3
    assert found.zero_point[0].tolist() == [-1]
    assert found.codes[0].tolist() == [-2, 0, 0, 1]


def test_a_row_with_an_outlier_spoils_no_other_row():
    x = rows(4, 64, spread=0)
    x[0, 0] = 500
    calm = quantize_tensor(x).dequantize()[1:]
    spoilt = quantize_tensor(x, per_row=False).dequantize()[1:]
    assert (calm - x[1:]).norm() < 0.01 * x[1:].norm()
    assert (spoilt - x[1:]).norm() > 0.5 * x[1:].norm()


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "x, bits, said",
    [
        (torch.ones(2), 1, "bits: expected a whole number from 2 to 8; got 1"),
        (torch.ones(2), 9, "from 2 to 8; got 9"),
        (torch.ones(2), 4.5, "bits: expected"),
        (torch.ones(2).int(), 8, "x: expected floating-point rows"),
        (torch.ones(2, 0), 8, "x: expected floating-point rows"),
        (torch.tensor(1.0), 8, "x: expected floating-point rows"),
    ],
)
def test_what_cannot_be_quantized(x, bits, said):
    with pytest.raises((an.ConfigError, an.InputError), match=said):
        quantize_tensor(x, bits)


# ---- equal to torchao


@every_kind
def test_codes_scales_and_products_are_torchaos(kind):
    torch.manual_seed(0)
    layer, x = nn.Linear(48, 40), rows(3, 5, 48, spread=1.0)
    weight = quantize_tensor(layer.weight.detach())
    theirs = nn.Sequential(deepcopy(layer))
    torchao.quantize_(theirs, CONFIGS[kind](set_inductor_config=False))
    packed = theirs[0].weight
    assert torch.equal(packed.qdata, weight.codes)
    assert torch.equal(packed.scale, weight.scale)
    assert torch.equal(packed.dequantize(), weight.dequantize())
    with torch.no_grad():
        found = int8_linear(x, weight, layer.bias, kind == "dynamic")
        expected = theirs(x)
        exact = layer(x)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert 1e-4 < (found - exact).norm() / exact.norm() < 0.03


def test_whole_numbers_are_multiplied_without_error():
    x, w = rows(7, 96, spread=0).double(), rows(11, 96, seed=1).double()
    a, b = quantize_tensor(x), quantize_tensor(w)
    found = int8_linear(x, b)
    expected = a.dequantize() @ b.dequantize().mT
    assert (found - expected).abs().max() < 1e-12 * expected.abs().max()
    largest = torch.full((1, 2**15), 1.0).double()
    assert int8_linear(largest, quantize_tensor(largest)).item() == pytest.approx(
        2**15 * (127 / 127.5) ** 2
    )


@pytest.mark.no_shapes
def test_a_weight_with_a_zero_point_is_refused():
    weight = quantize_tensor(rows(4, 8), symmetric=False)
    with pytest.raises(an.InputError, match="symmetric codes; got a zero point"):
        int8_linear(rows(2, 8), weight)


# ---- whole models


def shaken(name, **overrides):
    torch.manual_seed(0)
    model = an.create_model(name, **overrides).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def plain(model):
    "The model with weights rounded as ours, in floating point."
    model = deepcopy(model)
    for path in matrices(model):
        weight = weight_at(model, path)
        weight.data = quantize_tensor(weight.data).dequantize()
    return model


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES = {
    "vit_book": {"depth": 1},
    "gpt_book": SMALL,
    "bert_book_pretraining": SMALL | {"intermediate_size": 48},
    "transformer_tiny": {"num_hidden_layers": 1},
    "detr_tiny": {"encoder_layers": 1, "decoder_layers": 2},
}


def outputs(model, name, inputs):
    torch.manual_seed(0)
    with torch.no_grad():
        found = model(**inputs)
    if isinstance(found, torch.Tensor):
        return found
    names = {"bert_book_pretraining": "prediction_logits", "detr_tiny": "pred_boxes"}
    return found[names[name]]


@pytest.mark.parametrize("name", SIZES)
def test_a_model_in_int8_is_the_model_of_the_rounded_weights(name):
    model = shaken(name, **SIZES[name])
    before = deepcopy(model.state_dict())
    inputs = an.example_inputs(name, 2)
    found = quantize(model, "weight_only")
    a = outputs(found, name, inputs)
    b = outputs(plain(model), name, inputs)
    assert (a - b).norm() <= 1e-5 * b.norm()
    dynamic = outputs(quantize(model, "dynamic"), name, inputs)
    assert 0 < (dynamic - b).norm() < 0.3 * b.norm()
    after = model.state_dict()
    assert all(torch.equal(x, after[key]) for key, x in before.items())
    assert not found.training


def test_a_table_that_a_layer_shares_stays_a_float_and_shared():
    model = shaken("bert_book_pretraining", **SIZES["bert_book_pretraining"])
    found = quantize(model)
    assert found.predictions.decoder.weight is found.bert.embedding.tokens.weight
    assert "predictions.dense.weight" in matrices(model)
    assert not any("embedding" in path or "decoder" in path for path in matrices(model))
    counted = [weight_at(model, path).numel() for path in matrices(model)]
    total = sum(p.numel() for p in model.parameters())
    assert int8_share(found) == sum(counted) / total
    assert saved_bytes(found) < saved_bytes(model)


def test_without_the_stacked_projections_a_quarter_of_a_block_stays_float():
    model = shaken("vit_book")
    found, d, total = quantize(model), 64, 205_066
    theirs = deepcopy(model)
    torchao.quantize_(theirs, torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    assert int8_share(theirs) == (4 * 9 * d * d + 10 * d) / total
    assert int8_share(found) == (4 * 12 * d * d + 10 * d) / total
    names = {key for key, p in found.named_parameters() if hasattr(p, "qdata")}
    assert "encoder.layers.0.attention.in_proj_weight" in names


@every_kind
def test_cross_attention_caches_and_records_work(kind):
    torch.manual_seed(0)
    attention = MultiHeadAttention(16, 2).eval()
    nn.init.normal_(attention.in_proj_bias)
    found = quantize(attention, kind)
    x, memory = rows(2, 3, 16, spread=0), rows(2, 5, 16, seed=1, spread=0)
    with torch.no_grad(), an.record_attention(found) as maps:
        once = found(x, memory)
        cached = found(x, cache=found.project_memory(memory))
        assert (once - cached).abs().max() < 1e-6
        assert maps["attention"].shape == (2, 2, 3, 5)
    joint, own = plain(attention), found(x)
    assert (own - joint(x)).norm() < (1e-5 if kind == "weight_only" else 0.05)


def test_generation_with_a_cache_is_that_of_the_rounded_weights():
    model = an.create_model("gpt_book", pretrained=True)
    prompt = torch.tensor([[1, 5, 9, 200]])
    found = quantize(model, "weight_only").generate(prompt, max_new_tokens=8)
    assert torch.equal(found, plain(model).generate(prompt, max_new_tokens=8))


@every_kind
def test_saved_and_loaded_again(kind):
    model = quantize(shaken("vit_book", depth=1), kind)
    file, x = io.BytesIO(), an.example_inputs("vit_book", 2)
    torch.save(model.state_dict(), file)
    assert file.tell() == saved_bytes(model)
    file.seek(0)
    other = an.create_model("vit_book", depth=1).eval()
    other.load_state_dict(torch.load(file, weights_only=True), assign=True)
    with torch.no_grad():
        assert torch.equal(model(**x), other(**x))


@pytest.mark.no_shapes
def test_models_that_cannot_be_quantized():
    layer = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(an.ConfigError, match="kind: expected .*weight_only.*; got"):
        quantize(layer, "static")
    with pytest.raises(an.InputError, match="linear layers or attention.*got none"):
        quantize(nn.ReLU())
    with pytest.raises(an.InputError, match="got Int8Tensor"):
        quantize(quantize(layer))
    with pytest.raises(an.InputError, match="torch.float64"):
        quantize(layer.double())
    with pytest.raises(an.ConfigError, match="from 2 to 8; got 16"):
        simulate(layer, 16)


def test_without_torchao_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr("attn_notes.foundations.checks.find_spec", lambda name: None)
    with pytest.raises(an.ConfigError, match=r"attn_notes\[quantize\]"):
        quantize(nn.Linear(8, 8))


def test_only_the_notice_of_the_import_is_kept_back(monkeypatch, caplog):
    log = logging.getLogger("torch.utils._pytree")

    def speak(name):
        log.warning("Calling register_constant() on Enum subclasses is deprecated")
        log.warning("something else")

    monkeypatch.setattr(importlib, "import_module", speak)
    before = list(log.filters)
    with caplog.at_level(logging.WARNING, logger=log.name):
        monkeypatch.setattr(log, "propagate", True)
        import_torchao()
    assert caplog.messages == ["something else"] and log.filters == before


# ---- rounding in training


def test_the_gradient_goes_straight_through():
    x = rows(3, 8).double().requires_grad_()
    y = fake_quantize(x, 3)
    assert torch.equal(y, quantize_tensor(x.detach(), 3).dequantize())
    slope = torch.randn_like(y)
    y.backward(slope)
    assert torch.equal(x.grad, slope)


@pytest.mark.parametrize("per_row", [True, False])
def test_simulated_weights_are_the_rounded_ones(per_row):
    model = shaken("vit_book", depth=1)
    found, x = simulate(model, 4, per_row), an.example_inputs("vit_book", 2)
    rounded = deepcopy(model)
    for path in matrices(rounded):
        weight = weight_at(rounded, path)
        weight.data = quantize_tensor(weight.data, 4, per_row).dequantize()
    with torch.no_grad():
        assert torch.equal(found(**x), rounded(**x))
    found(**x).sum().backward()
    kept = found.encoder.layers[0].attention.parametrizations.in_proj_weight.original
    assert kept.grad.norm() > 0
    assert torch.equal(kept, model.encoder.layers[0].attention.in_proj_weight)
    assert sum(isinstance(m, FakeQuantize) for m in found.modules()) == 5
    for module in [m for m in found.modules() if parametrize.is_parametrized(m)]:
        for name in [*module.parametrizations]:
            parametrize.remove_parametrizations(module, name)
    state = rounded.state_dict()
    assert all(torch.equal(x, state[key]) for key, x in found.state_dict().items())
