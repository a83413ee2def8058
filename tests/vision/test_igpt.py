"""iGPT: equal to transformers on the same weights, and to the authors' code as far as
it can be read; what is later changes nothing; an image is generated to its last
pixel."""

import json
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import attn_notes as an
from attn_notes.vision.igpt import (
    HF_FORMAT,
    IGPT,
    SIZES,
    TF_FORMAT,
    IGPTClassifier,
    IGPTClassifierConfig,
    IGPTConfig,
    QuickGELU,
    hf_config,
)
from attn_notes.zoo.checkpoints import fit_state
from attn_notes.zoo.factory import count_parameters, create_model

LAYOUTS = Path(__file__).parent / "layouts"
SIDE, COLOURS = 4, 11
SMALL = IGPTConfig(
    vocab_size=COLOURS + 1,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=20,
    max_position_embeddings=SIDE**2,
)
CLASSES = IGPTClassifierConfig(**asdict(SMALL), num_classes=5)
every_kind = pytest.mark.parametrize("config", [SMALL, CLASSES], ids=["pixel", "class"])


def shake(model, seed=0):
    """Noise on every weight: no norm is neutral, no head silent."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def small(config=SMALL, seed=0):
    """Ours in double precision, shaken, in evaluation mode."""
    torch.manual_seed(seed)
    kind = IGPTClassifier if config == CLASSES else IGPT
    return shake(kind(config), seed).double().eval()


def images(rows=3, seed=0, n=SIDE**2):
    """The start token, and random colours."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(COLOURS, (rows, n), generator=random)
    ids[:, 0] = COLOURS
    return ids


def hf_sizes(config, **more):
    sizes = {
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_inner": config.intermediate_size,
        "n_positions": config.max_position_embeddings,
    }
    sizes |= {f"{part}_pdrop": config.dropout for part in ("resid", "embd", "attn")}
    if config == CLASSES:
        sizes["num_labels"] = config.num_classes
    return sizes | more


def reference(config, bias, **more):
    """Of transformers, shaken; its biases too, or zero as in the authors' weights."""
    transformers = pytest.importorskip("transformers")
    stored = transformers.ImageGPTConfig(**hf_sizes(config, **more))
    ends = "ForImageClassification" if config == CLASSES else "ForCausalImageModeling"
    torch.manual_seed(0)
    model = shake(getattr(transformers, f"ImageGPT{ends}")(stored))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and not bias:
            parameter.data.zero_()
    return model


# ---- sizes


@pytest.mark.parametrize("name", SIZES)
def test_the_published_sizes(name):
    layers, d, heads, count, *_ = SIZES[name]
    c, info = an.model_info(name).config, an.model_info(name)
    assert (c.vocab_size, c.max_position_embeddings) == (512 + 1, 32 * 32)
    assert c.num_attention_heads == heads and c.bos_token_id == 512
    body = 513 * d + 1024 * d + layers * (12 * d * d + 2 * d) + d + 512 * d
    model = create_model(name, device="meta")
    assert body == count == info.parameters == count_parameters(model)
    assert not any("bias" in key for key in model.state_dict())


def test_the_activation_and_the_norm():
    x = torch.randn(5, 12, dtype=torch.float64)
    quick, exact = QuickGELU()(x), nn.GELU()(x)
    assert 1e-3 < (quick - exact).abs().max() < 0.03
    norm = small().decoder.norm
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    assert torch.allclose(norm(x), expected, atol=1e-12)
    assert not torch.allclose(norm(x + 1), norm(x), atol=0.1)  # the mean counts


def test_initial_values():
    torch.manual_seed(0)
    sizes = dict(hidden_size=256, num_attention_heads=4, intermediate_size=1024)
    model = IGPT(replace(SMALL, vocab_size=500, num_hidden_layers=9, **sizes))
    std = {name: p.std().item() for name, p in model.named_parameters()}
    layer = "decoder.layers.3."
    assert std["head.weight"] == 0
    for name, expected in (
        ("embedding.tokens.weight", 0.02),
        ("embedding.positions.weight", 0.01),
        (layer + "attention.in_proj_weight", 1 / 16),
        (layer + "attention.out_proj.weight", 1 / 16 / 3),
        (layer + "feed_forward.linear2.weight", 0.02),
    ):
        assert std[name] == pytest.approx(expected, rel=0.05), name


# ---- equal to transformers


@pytest.mark.parametrize("bias", [False, True], ids=["no biases", "biases"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@every_kind
@pytest.mark.filterwarnings("ignore:.*left as they were. head.weight")
def test_outputs_and_gradients_equal_transformers(config, training, bias):
    theirs, made = reference(config, bias), replace(config, bias=bias)
    model = (IGPTClassifier if config == CLASSES else IGPT)(made)
    fit_state(model, theirs.state_dict(), (HF_FORMAT,))
    theirs, model = theirs.double().train(training), model.double().train(training)
    ids = images()
    found, expected = model(ids), theirs(ids).logits
    found = found if isinstance(found, torch.Tensor) else found.logits
    assert (found - expected).abs().max() < 1e-10 and found.abs().max() > 0.1
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    grads = {
        key: p.grad
        for key, p in theirs.named_parameters()
        if bias or not key.endswith("bias")
    }
    grads = HF_FORMAT.apply(grads, model)
    own = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert set(grads) == set(own) and len(own) > 10
    for key, value in own.items():
        assert (value - grads[key]).abs().max() < 1e-10, key


def test_generation_equals_transformers_to_the_last_pixel():
    theirs = reference(SMALL, False).double().eval()
    model = IGPT(SMALL)
    fit_state(model, theirs.state_dict(), (HF_FORMAT,))
    model = model.double().eval()
    for kept in (0, 7):
        prompt = images(rows=4)[:, : 1 + kept]
        new = SIDE**2 - kept
        found = model.generate(prompt, max_new_tokens=new)
        given = {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
        expected = theirs.generate(prompt, max_new_tokens=new, do_sample=False, **given)
        assert found.shape == (4, 1 + SIDE**2) and torch.equal(found, expected)
        assert (found[:, 1:] < COLOURS).all()


@pytest.mark.slow
def test_the_small_size_equals_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.ImageGPTForCausalImageModeling(transformers.ImageGPTConfig())
    model = IGPT(an.model_info("igpt_small").config)
    fit_state(model, theirs.state_dict(), (HF_FORMAT,))
    ids = torch.randint(512, (1, 64))
    with torch.no_grad():
        expected, found = theirs.eval()(ids).logits, model.eval()(ids)
    assert (found - expected).norm() < 1e-5 * expected.norm()


# ---- what changes nothing


@settings(max_examples=6)
@given(t=st.integers(1, SIDE**2 - 1), seed=st.integers(0, 999))
def test_a_later_pixel_changes_nothing_before_it(t, seed):
    model, ids = small(seed=seed), images(seed=seed)
    other = torch.cat([ids[:, :t], images(seed=seed + 1)[:, t:]], 1)
    with torch.no_grad():
        before, after = model(ids), model(other)
    assert (before - after)[:, :t].abs().max() < 1e-12
    assert (ids == other).all() or (before - after)[:, t:].abs().max() > 1e-9


@every_kind
def test_padding_changes_nothing(config):
    model, ids = small(config), images(rows=1, n=9)
    mask = torch.ones_like(ids, dtype=torch.bool)
    for pad in ((4, 0), (0, 4)):
        wide, shown = (nn.functional.pad(x, pad) for x in (ids, mask))
        with torch.no_grad():
            alone, together = model(ids), model(wide, shown)
        together = together if config == CLASSES else together[shown][None]
        assert (alone - together).abs().max() < 1e-12


@settings(max_examples=4)
@given(rows=st.integers(1, 3), kept=st.integers(0, 12), seed=st.integers(0, 99))
def test_the_cache_changes_nothing(rows, kept, seed):
    model, ids = small(seed=seed), images(rows, seed)[:, : 1 + kept]
    expected = ids
    with torch.no_grad():
        for _ in range(4):
            new = model(expected)[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, new], 1)
    assert torch.equal(model.generate(ids, max_new_tokens=4), expected)
    drawn = [
        model.generate(
            ids,
            max_new_tokens=4,
            temperature=0.9,
            top_k=5,
            generator=torch.Generator().manual_seed(seed),
        )
        for _ in range(2)
    ]
    assert torch.equal(*drawn)


def test_classes_are_of_the_mean_of_the_states():
    model, ids = small(CLASSES), images()
    expected = model.classifier(model.hidden_states(ids).mean(1))
    assert torch.allclose(model(ids), expected, atol=1e-12)
    output = model.train()(ids)
    assert torch.equal(output.logits, model.eval()(ids))
    assert output.pixel_logits.shape == (3, SIDE**2, COLOURS)
    fresh = IGPTClassifier(CLASSES)
    assert (fresh.eval()(ids) == 0).all()


# ---- files


@pytest.mark.parametrize("change", [{}, {"n_inner": None}], ids=["", "usual width"])
def test_a_folder_of_transformers(change, tmp_path):
    theirs = reference(SMALL, False, **change)
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        model = create_model("igpt_small", tmp_path)
    wide = 48 if change else 20
    assert model.config == replace(SMALL, intermediate_size=wide)
    ids = images()
    assert torch.allclose(model(ids), theirs.eval()(ids).logits, atol=1e-5)


def test_a_classifier_of_transformers(tmp_path):
    theirs = reference(CLASSES, False)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(an.CheckpointWarning, match="left as they were: head.weight"):
        model = create_model("igpt_small_classifier", tmp_path)
    assert model.config == CLASSES
    ids = images()
    assert torch.allclose(model(ids), theirs.eval()(ids).logits, atol=1e-5)


def test_a_pixel_model_begins_a_classifier(tmp_path):
    theirs = small().float()
    theirs.save_pretrained(tmp_path)
    with pytest.warns(an.CheckpointWarning, match="left as they were: classifier"):
        model = create_model("igpt_small_classifier", tmp_path, num_classes=5)
    ids = images()
    assert torch.equal(model.hidden_states(ids), theirs.hidden_states(ids))
    assert model.not_loaded == ("classifier.weight",)


def test_biases_are_not_dropped(tmp_path):
    theirs = reference(SMALL, True)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(an.CheckpointError, match="bias: expected zeros.*bias=True"):
        create_model("igpt_small", tmp_path)
    model, ids = create_model("igpt_small", tmp_path, bias=True), images()
    assert torch.allclose(model(ids), theirs.eval()(ids).logits, atol=1e-5)


def test_old_buffers_of_transformers_are_no_weights(tmp_path):
    state = reference(SMALL, False).state_dict()
    for i in range(2):
        state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16)
        state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(state, tmp_path / "weights.pth")
    with warnings.catch_warnings(action="error"):
        model = create_model("igpt_small", tmp_path / "weights.pth", **asdict(SMALL))
    assert not model.not_loaded


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "gelu"},
        {"tie_word_embeddings": True},
        {"model_type": "gpt2"},
        {"scale_attn_by_inverse_layer_idx": True},
    ],
    ids=str,
)
def test_another_model_of_transformers(change):
    stored = hf_sizes(SMALL) | {"model_type": "imagegpt"}
    with pytest.raises(an.ConfigError, match=f"{next(iter(change))}: expected"):
        hf_config(stored | change)


LITTLE = {512: 12, 1024: 16, 2048: 20, 8: 3, 64: 4, 10: 5}


def official():
    """Variables of the authors' code, with the names and the ranks that it gives them
    and small sizes; the first two layers. The vocabulary keeps a size of its own."""
    stored = json.loads((LAYOUTS / "igpt_official.json").read_text())["variables"]
    random, state = numpy.random.default_rng(0), {}
    for key, shape in stored.items():
        if key.startswith("model/h") and int(key.split("/")[1][1:]) > 1:
            continue
        shape = [LITTLE[n] for n in shape]
        if key in ("model/wte", "model/wtet"):
            shape[0] = COLOURS
        state[key] = random.normal(0, 0.3, shape).astype("float32")
    return state


def authors_logits(state, ids):
    """What the authors' model.py computes, in its own words: `ids` are the pixels, and
    the start vector comes before them in place of the last."""
    w = {key.removeprefix("model/"): torch.tensor(x) for key, x in state.items()}

    def norm(x, g):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * g

    h = w["wte"][ids]
    h = torch.cat([w["sos"].expand(len(h), 1, -1), h[:, :-1]], 1)
    n = ids.shape[1]
    h = h + w["wpe"][:n]
    b = torch.ones(n, n).tril()
    for i in range(2):
        x = norm(h, w[f"h{i}/ln_1/g"])
        q, k, v = (
            torch.einsum("bsf,hef->bhse", x, w[f"h{i}/attn/{p}_proj"]) for p in "qkv"
        )
        a = q @ k.mT * v.shape[-1] ** -0.5
        a = (a * b - 1e10 * (1 - b)).softmax(-1) @ v
        h = h + torch.einsum("bhse,hef->bsf", a, w[f"h{i}/attn/c_proj"])
        x = norm(h, w[f"h{i}/ln_2/g"]) @ w[f"h{i}/mlp/c_fc/w"]
        h = h + (x * torch.sigmoid(1.702 * x)) @ w[f"h{i}/mlp/c_proj/w"]
    h = norm(h, w["ln_f/g"])
    return h @ w["wtet"].T, h.mean(1) @ w["clf/wclf"].T


@pytest.mark.parametrize("classes", [False, True], ids=["pixel", "class"])
def test_the_authors_code(classes, tmp_path):
    state, ids = official(), images()
    pixels = torch.cat([ids[:, 1:], ids[:, 1:2]], 1)  # the last one is never read
    logits, of_class = authors_logits(state, pixels)
    if not classes:
        del state["model/clf/wclf"]
    numpy.savez(tmp_path / "model.npz", **state)
    name, config = (
        ("igpt_small_classifier", CLASSES) if classes else ("igpt_small", SMALL)
    )
    with warnings.catch_warnings(action="error"):
        model = create_model(name, tmp_path / "model.npz", **asdict(config))
    assert not model.not_loaded
    expected = of_class if classes else logits
    assert (
        torch.allclose(model(ids), expected, atol=1e-4) and expected.abs().max() > 0.1
    )


def test_the_authors_names_are_the_published_model():
    """Every variable of iGPT-S has its place and its shape."""
    stored = json.loads((LAYOUTS / "igpt_official.json").read_text())["variables"]
    state = {key: torch.empty(shape, device="meta") for key, shape in stored.items()}
    del state["model/clf/wclf"]
    model = create_model("igpt_small", device="meta")
    found = TF_FORMAT.apply(state, model)
    expected = {key: x.shape for key, x in model.state_dict().items()}
    assert {key: x.shape for key, x in found.items()} == expected


# ---- bad input


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "given",
    [torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), images(n=4).repeat(1, 5)],
    ids=["floats", "one row", "too many"],
)
def test_bad_ids(given):
    with pytest.raises(an.InputError, match="^input_ids: expected .*; got"):
        small()(given)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "prompt, new, match",
    [
        (images(n=7), 11, "at most 17 tokens together"),
        (torch.full((1, 2), COLOURS + 1), 2, "input_ids"),
        (images(n=7), 0, "max_new_tokens"),
    ],
    ids=["too many pixels", "no such colour", "none"],
)
def test_bad_prompts(prompt, new, match):
    with pytest.raises(an.InputError, match=match):
        small().generate(prompt, max_new_tokens=new)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 1},
        {"num_attention_heads": 5},
        {"dropout": 1.0},
        {"max_position_embeddings": 0},
        {"bias": 1},
    ],
    ids=str,
)
def test_bad_configurations(change):
    with pytest.raises(an.ConfigError, match=f"{next(iter(change))}: expected .*; got"):
        replace(SMALL, **change)
