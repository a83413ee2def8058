"""GPT: equal to transformers on the same weights; what is later, or padding, changes
nothing; generation with the cache equals generation without it."""

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attn_notes as an
from attn_notes.foundations.attention import record_attention
from attn_notes.foundations.checks import (
    CheckpointError,
    CheckpointWarning,
    ConfigError,
    InputError,
)
from attn_notes.foundations.generation import beam_search, sampling_probs
from attn_notes.language.gpt import (
    GPT,
    HF_FORMAT,
    LM_FORMAT,
    TF_FORMAT,
    GPTConfig,
    GPTForSequence,
    GPTSequenceConfig,
    GPTSequenceOutput,
    hf_config,
)
from attn_notes.language.gpt_evidence import kneser_ney
from attn_notes.zoo.checkpoints import fit_state
from attn_notes.zoo.factory import count_parameters, create_model
from attn_notes.zoo.registry import model_info

LAYOUTS = Path(__file__).parent / "layouts"
SMALL = GPTConfig(
    vocab_size=30,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=20,
    dropout=0.0,
    max_position_embeddings=24,
)
KINDS = {"gpt": False, "gpt2": True}
every_kind = pytest.mark.parametrize("norm_first", KINDS.values(), ids=KINDS)
seeds = st.integers(0, 999)


def shake(model, noise=0.2):
    """Every parameter with noise on it: no bias is zero and no norm is neutral."""
    for parameter in model.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return model


def shaken(norm_first=True, seed=0, kind=GPT, config=SMALL, **change):
    torch.manual_seed(seed)
    config = replace(config, norm_first=norm_first, **change)
    return shake(kind(config)).double().eval()


def tokens(rows=3, n=9, seed=0, vocab=30):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (rows, n), generator=generator)


def left_mask(rows=3, n=9, seed=0):
    """True on the last tokens of each row, at least one."""
    generator = torch.Generator().manual_seed(seed + 1)
    padding = torch.randint(0, n, (rows, 1), generator=generator)
    return torch.arange(n) >= padding


def reference_of(config):
    """A model of transformers of the same sizes, with noise on its weights."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_positions": config.max_position_embeddings,
        **{f"{part}_pdrop": config.dropout for part in ("resid", "embd", "attn")},
        "eos_token_id": config.eos_token_id,
        "bos_token_id": config.bos_token_id,
    }
    if config.norm_first:
        inner = config.intermediate_size
        sized = transformers.GPT2Config(**sizes, n_inner=inner)
        return shake(transformers.GPT2LMHeadModel(sized))
    return shake(
        transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**sizes))
    )


def twins(norm_first, seed=0, **change):
    """A model of transformers and ours with its weights, in double precision."""
    torch.manual_seed(seed)
    change = {"intermediate_size": 48, **change}  # four times the width, as GPT has
    config = replace(SMALL, norm_first=norm_first, **change)
    reference, model = reference_of(config), GPT(config)
    fit_state(model, reference.state_dict(), (HF_FORMAT,))
    return reference.double().eval(), model.double().eval()


# ---- sizes


def count_by_hand(v, d, n, layers, d_ff, final_norm):
    attention = 4 * (d * d + d)
    block = attention + (d * d_ff + d_ff) + (d_ff * d + d) + 2 * 2 * d
    return v * d + n * d + layers * block + 2 * d * final_norm


@pytest.mark.parametrize(
    "name, count, layers, width, heads",
    [
        ("gpt", 116_534_784, 12, 768, 12),
        ("gpt2", 124_439_808, 12, 768, 12),
        ("gpt2_medium", 354_823_168, 24, 1024, 16),
        ("gpt2_large", 774_030_080, 36, 1280, 20),
        ("gpt2_xl", 1_557_611_200, 48, 1600, 25),
    ],
)
def test_the_published_sizes(name, count, layers, width, heads):
    info, second = model_info(name), name != "gpt"
    c = info.config
    found = c.num_hidden_layers, c.hidden_size, c.num_attention_heads
    assert found == (layers, width, heads) and c.norm_first == second
    v, n = (50_257, 1024) if second else (40_478, 512)
    assert (c.vocab_size, c.max_position_embeddings) == (v, n)
    assert (
        count
        == info.parameters
        == count_by_hand(v, width, n, layers, 4 * width, second)
    )
    assert count_parameters(create_model(name, device="meta")) == count


@pytest.mark.parametrize(
    "book, name", [(False, "gpt_sequence"), (True, "gpt_book_sequence")]
)
def test_fine_tuning_adds_three_tokens_and_a_layer(book, name):
    language_model = "gpt_book" if book else "gpt"
    before, after = model_info(language_model), model_info(name)
    assert after.config.vocab_size == before.config.vocab_size + 3
    d = after.config.hidden_size
    assert after.parameters - before.parameters == 3 * d + 2 * d + 2


@every_kind
def test_initial_values(norm_first):
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=500,
        hidden_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=200,
        norm_first=norm_first,
    )
    std = {name: p.std().item() for name, p in GPT(config).named_parameters()}
    into = 0.02 / 4 if norm_first else 0.02  # the root of 2 x 8 additions
    layer = "decoder.layers.3."
    assert std["embedding.tokens.weight"] == pytest.approx(0.02, rel=0.05)
    positions = 0.01 if norm_first else 0.02
    assert std["embedding.positions.weight"] == pytest.approx(positions, rel=0.05)
    assert std[layer + "attention.in_proj_weight"] == pytest.approx(0.02, rel=0.05)
    assert std[layer + "feed_forward.linear1.weight"] == pytest.approx(0.02, rel=0.05)
    for name in ("attention.out_proj.weight", "feed_forward.linear2.weight"):
        assert std[layer + name] == pytest.approx(into, rel=0.05)


# ---- equal to transformers


def gradients(logits, mask, named):
    """By name, of a loss that the logits of all real tokens have a part in."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    loss = (logits.log_softmax(-1) * weights.to(logits))[mask].sum()
    return dict(
        zip(named, torch.autograd.grad(loss, list(named.values())), strict=True)
    )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@every_kind
def test_equals_transformers(norm_first, side, training):
    reference, model = (x.train(training) for x in twins(norm_first))
    ids, mask = tokens(), left_mask()
    mask = {"none": torch.ones_like(mask), "left": mask, "right": mask.flip(1)}[side]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    theirs = reference(ids, attention_mask=mask.long(), position_ids=positions).logits
    ours = model(ids, None if side == "none" else mask)
    assert (theirs - ours)[mask].abs().max() < 1e-10
    own = dict(model.named_parameters())
    named = dict(reference.named_parameters())
    found = gradients(ours, mask, own)
    expected = HF_FORMAT.apply(gradients(theirs, mask, named), model)
    assert found.keys() == expected.keys() == own.keys()
    for name in found:
        assert (found[name] - expected[name]).abs().max() < 1e-10, name


@pytest.mark.slow
def test_equals_transformers_at_the_published_size():
    torch.manual_seed(0)
    config = replace(model_info("gpt2").config, dropout=0.0)
    reference, model = reference_of(config).eval(), GPT(config).eval()
    fit_state(model, reference.state_dict(), (HF_FORMAT,))
    ids = tokens(2, 11, vocab=50_257)
    with torch.no_grad():
        theirs, ours = reference(ids).logits, model(ids)
    assert (theirs - ours).norm() < 1e-5 * theirs.norm()


# ---- what must not change anything


@every_kind
@settings(max_examples=6, deadline=None)
@given(st.integers(1, 8), seeds)
def test_a_later_token_changes_nothing_before_it(norm_first, t, seed):
    model, ids = shaken(norm_first, seed), tokens(seed=seed)
    other = torch.cat([ids[:, :t], tokens(n=9 - t, seed=seed + 1)], 1)
    with torch.no_grad():
        before, after = model(ids), model(other)
    assert (before - after)[:, :t].abs().max() < 1e-12
    changed = (ids != other).any(0)
    assert not changed.any() or (before - after)[:, t:].abs().max() > 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
@every_kind
def test_padding_changes_nothing(norm_first, side):
    model, ids = shaken(norm_first), tokens(rows=1, n=5)
    pad = (4, 0) if side == "left" else (0, 4)
    padded = torch.nn.functional.pad(ids, pad, value=7)
    mask = torch.nn.functional.pad(torch.ones_like(ids, dtype=torch.bool), pad)
    with torch.no_grad():
        alone, together = model(ids)[0], model(padded, mask)[mask]
        assert (alone - together).abs().max() < 1e-12
        if side == "right":
            assert (model(padded)[mask] - alone).abs().max() < 1e-12


def test_logits_at_chosen_positions_alone():
    model, ids = shaken(), tokens()
    predicted = torch.rand(ids.shape) < 0.3
    assert torch.allclose(model(ids, predicted=predicted), model(ids)[predicted])


# ---- generation


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@every_kind
def test_generation_equals_transformers(norm_first, padded):
    reference, model = twins(
        norm_first, vocab_size=30, eos_token_id=29, bos_token_id=29
    )
    ids, mask = tokens(4, 9, seed=2), left_mask(4, 9)
    mask = mask if padded else torch.ones_like(mask)
    found = model.generate(ids, mask if padded else None, max_new_tokens=15)
    if (
        padded and not norm_first
    ):  # their first GPT takes no positions of padded prompts
        for row, real, new in zip(ids, mask, found, strict=True):
            alone = reference.generate(
                row[None, real],
                max_new_tokens=15,
                do_sample=False,
                pad_token_id=29,
                attention_mask=torch.ones_like(row[None, real]),
            )[0, real.sum() :]
            assert torch.equal(new[9 : 9 + len(alone)], alone)
        return
    theirs = reference.generate(
        ids,
        attention_mask=mask.long(),
        max_new_tokens=15,
        do_sample=False,
        pad_token_id=29,
    )
    assert torch.equal(found[:, : theirs.shape[1]], theirs)
    assert (found[:, theirs.shape[1] :] == 29).all()


def without_cache(model, ids, mask, new):
    """Greedy, all positions computed again for every token."""
    for _ in range(new):
        nearest = model(ids, mask)[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, nearest], 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=True)
    return ids


@every_kind
@settings(max_examples=4, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), seeds)
def test_the_cache_changes_nothing(norm_first, rows, n, seed):
    model = shaken(norm_first, seed)
    ids, mask = tokens(rows, n, seed), left_mask(rows, n, seed)
    with torch.no_grad():
        expected = without_cache(model, ids, mask, 12)
    assert torch.equal(model.generate(ids, mask, max_new_tokens=12), expected)
    for row, real, whole in zip(ids, mask, expected, strict=True):
        alone = model.generate(row[None, real], max_new_tokens=12)
        assert torch.equal(alone[0, real.sum() :], whole[n:])


def test_a_step_leaves_the_state_before_it():
    model, ids = shaken(), tokens()
    with torch.no_grad():
        _, state = model.step(ids[:, :4], model.start())
        first, _ = model.step(ids[:, 4:6], state)
        model.step(ids[:, 6:9], state)
        again, _ = model.step(ids[:, 4:6], state)
    assert torch.equal(first, again)


def test_the_end_and_the_limits_of_rows():
    model, ids = shaken(), tokens()
    free = model.generate(ids, max_new_tokens=10)[:, 9:]
    end = free[0, 3].item()
    ended = model.generate(ids, max_new_tokens=10, eos_token_id=end)[:, 9:]
    for row, whole in zip(ended, free, strict=True):
        stop = (whole == end).nonzero()
        length = int(stop[0]) + 1 if len(stop) else 10
        assert torch.equal(row[:length], whole[:length]) and (row[length:] == end).all()
    limits = torch.tensor([2, 5, 3])
    own = model.generate(ids, max_new_tokens=limits)[:, 9:]
    for row, whole, limit in zip(own, free, limits.tolist(), strict=True):
        assert torch.equal(row[:limit], whole[:limit]) and (row[limit:] == 0).all()


def test_drawn_tokens_follow_the_distribution():
    model, n = shaken(), 4000
    ids = tokens(1, 5).expand(n, -1)
    how = {"temperature": 0.7, "top_k": 8, "top_p": 0.9}
    drawn = [
        model.generate(
            ids, max_new_tokens=1, **how, generator=torch.Generator().manual_seed(s)
        )[:, -1]
        for s in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    share = torch.bincount(drawn[0], minlength=30) / n
    expected = sampling_probs(model(ids[:1])[:, -1], **how)[0]
    assert (share - expected).abs().max() < 0.03 and (share[expected == 0] == 0).all()


def test_when_tokens_are_drawn():
    model, ids = shaken(), tokens()
    greedy = model.generate(ids, max_new_tokens=8)
    for how in (
        {"top_k": 1},
        {"temperature": 0.0, "top_k": 5},
        {"temperature": 1e-6},
        {"top_p": 1e-9, "do_sample": True},
        {"do_sample": False},
        {"num_beams": 1},
    ):
        assert torch.equal(model.generate(ids, max_new_tokens=8, **how), greedy)
    torch.manual_seed(0)
    drawn = model.generate(ids, max_new_tokens=8, do_sample=True)
    assert not torch.equal(drawn, greedy)


def test_a_beam_equals_the_one_without_a_cache():
    model, ids, mask = shaken(), tokens(), left_mask()

    def step(new, state):
        seen = torch.cat([state["ids"], new], 1) if "ids" in state else new
        more = seen.shape[1] - state["mask"].shape[1]
        real = torch.nn.functional.pad(state["mask"], (0, more), value=True)
        return model(seen, real)[:, -1], {"ids": seen, "mask": real}

    expected = beam_search(step, {"mask": mask}, ids, 5, 0, 6, 3, 1.0)
    found = model.generate(ids, mask, max_new_tokens=6, num_beams=3, eos_token_id=5)[
        :, 9:
    ]
    assert torch.equal(found.where(found != 5, 0), expected.where(expected != 5, 0))
    assert model.generate(ids, max_new_tokens=3, num_beams=2).shape == (3, 12)


def test_recorded_attention_of_a_generation():
    model, ids = shaken(), tokens(2, 4)
    with record_attention(model) as maps:
        plain = model.generate(ids, max_new_tokens=5)
    assert torch.equal(plain, model.generate(ids, max_new_tokens=5))
    weights = maps["decoder.layers.1.attention.attention"]
    assert weights.shape == (2, 3, 8, 8) and (weights.triu(1) == 0).all()


# ---- fine-tuning


@every_kind
def test_the_class_is_read_at_the_last_real_token(norm_first):
    config = GPTSequenceConfig(**asdict(SMALL), num_classes=4)
    model = shaken(norm_first, kind=GPTForSequence, config=config)
    ids, mask = tokens(), left_mask()
    with torch.no_grad():
        for real in (mask, mask.flip(1)):
            alone = torch.cat(
                [model(row[None, m]) for row, m in zip(ids, real, strict=True)]
            )
            assert (model(ids, real) - alone).abs().max() < 1e-12
        model.train()  # dropout is 0
        output = model(ids, mask, predicted=mask)
        assert isinstance(output, GPTSequenceOutput)
        assert torch.allclose(output.logits, model.eval()(ids, mask))
        body = shaken(norm_first)
        fit_state(
            body, {k: v for k, v in model.state_dict().items() if "class" not in k}
        )
        assert torch.allclose(output.lm_logits, body(ids, mask)[mask])
    assert model.generate(ids, max_new_tokens=2).shape == (3, 11)


def test_a_language_model_becomes_a_classifier_with_more_tokens(tmp_path):
    before = shaken(max_position_embeddings=128).float()
    before.architecture = "gpt_book"
    before.save_pretrained(tmp_path)
    with pytest.warns(CheckpointWarning, match=r"classifier\.weight"):
        after = create_model("gpt_book_sequence", pretrained=tmp_path, vocab_size=33)
    assert after.not_loaded == ("classifier.weight", "classifier.bias")
    table = after.embedding.tokens.weight
    assert torch.equal(table[:30], before.embedding.tokens.weight) and len(table) == 33
    assert 0 < table[30:].std() < 0.1
    config = GPTSequenceConfig(**asdict(before.config))
    with pytest.raises(CheckpointError, match="misshapen"):
        smaller = GPTForSequence(replace(config, vocab_size=20))
        fit_state(smaller, before.state_dict(), (LM_FORMAT,))


# ---- files


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_folders_of_transformers(name, prefix, tmp_path):
    reference, model = twins(KINDS[name])
    reference.float().save_pretrained(tmp_path)
    state = {k: v.clone() for k, v in reference.state_dict().items()}
    state.pop("lm_head.weight")
    buffers = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 24, 24) for i in (0, 1)}
    buffers |= {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    state |= buffers
    if not prefix:
        state = {k.removeprefix("transformer."): v for k, v in state.items()}
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    loaded = create_model(name, pretrained=tmp_path)
    assert loaded.config == replace(model.config, norm_first=KINDS[name])
    assert loaded.not_loaded == () and not loaded.training
    for key, value in model.float().state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


@pytest.mark.parametrize(
    "change, message",
    [
        ({"activation_function": "relu"}, "activation_function: expected gelu_new"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon: expected 1e-05"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: expected True"),
        ({"model_type": "openai-gpt", "afn": "swish"}, "afn: expected gelu"),
    ],
)
def test_a_model_of_another_kind_is_refused(change, message):
    sizes = {"vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 6}
    assert hf_config(sizes)["intermediate_size"] == 32
    with pytest.raises(ConfigError, match=message):
        hf_config({**sizes, **change})


def test_an_output_matrix_of_its_own_is_refused():
    reference, model = twins(True)
    state = dict(reference.state_dict())
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(CheckpointError, match="table of token embeddings"):
        fit_state(model, state, (HF_FORMAT,))


def test_the_classifier_of_tokens_is_not_that_of_texts(tmp_path):
    sizes = {"vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 6}
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(**sizes, bos_token_id=8, eos_token_id=8)
    transformers.GPT2ForTokenClassification(config).save_pretrained(tmp_path)
    said = r"skipped, not in this model: token_classifier.*left as they were: class"
    with pytest.warns(CheckpointWarning, match=said):
        create_model("gpt_book_sequence", pretrained=tmp_path)


def tf_names(reference):
    """The weights as OpenAI's GPT-2 has them: names of TensorFlow, (1, in, out)."""
    found = {}
    for key, value in reference.transformer.state_dict().items():
        key = key.replace(".weight", "" if key[:2] == "wt" or key[:2] == "wp" else ".w")
        key = key.replace(".bias", ".b").replace("h.", "h", 1) if key[0] == "h" else key
        if "ln_" in key:
            key = key.replace(".w", ".g").replace(".bias", ".b")
        value = value[None] if value.ndim == 2 and key[0] == "h" else value
        found["model/" + key.replace(".", "/")] = value.numpy()
    return found


def test_tensorflow_names_in_an_npz(tmp_path):
    reference, model = twins(True)
    state = tf_names(reference)
    official = json.loads((LAYOUTS / "gpt2_tensorflow.json").read_text())
    first = {k for k in official["keys"] if "/h0/" in k or "/h" not in k}
    assert {k for k in state if "/h1/" not in k} == first
    np.savez(tmp_path / "gpt2.npz", **state)
    sizes = asdict(model.config)
    loaded = create_model(
        "gpt2", pretrained=tmp_path / "gpt2.npz", dtype=torch.double, **sizes
    )
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


@pytest.mark.parametrize(
    "file, name, fmt",
    [
        ("gpt2_transformers.json", "gpt2", HF_FORMAT),
        ("gpt2_tensorflow.json", "gpt2", TF_FORMAT),
        ("gpt_openai.json", "gpt", TF_FORMAT),
    ],
)
def test_keys_and_shapes_of_the_official_files(file, name, fmt):
    official = json.loads((LAYOUTS / file).read_text())
    assert official["origin"]
    model = create_model(name, device="meta")
    state = {
        key: torch.empty(shape, device="meta")
        for key, shape in official["keys"].items()
    }
    assert fit_state(model, state, (HF_FORMAT, TF_FORMAT)) == ()
    assert fmt.recognize(set(state))
    lacking = dict(state)
    lacking.pop(next(key for key in state if "c_fc" in key))
    with pytest.raises(CheckpointError, match="missing"):
        fit_state(model, lacking, (HF_FORMAT, TF_FORMAT))


def test_saved_and_loaded(tmp_path):
    model = shaken().float()
    model.architecture = "gpt2"
    model.save_pretrained(tmp_path)
    loaded, ids = create_model("gpt2", pretrained=tmp_path), tokens()
    assert loaded.config == model.config
    assert torch.equal(loaded(ids), model(ids))
    with pytest.raises(CheckpointError, match="holds a gpt2, not a gpt2_medium"):
        create_model("gpt2_medium", pretrained=tmp_path)


# ---- what is refused, before any work


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_attention_heads": 5}, "num_attention_heads: expected a divisor"),
        ({"eos_token_id": 30}, "eos_token_id: expected an id of the vocabulary"),
        ({"dropout": 1.0}, "dropout: expected a number from 0"),
        ({"vocab_size": 0}, "vocab_size: expected a whole number"),
    ],
)
def test_impossible_configurations(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **change)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "ids, options, message",
    [
        (torch.zeros(2, 25).long(), {}, "input_ids: expected at most 24 tokens"),
        (torch.zeros(2, 3), {}, "input_ids: expected token ids"),
        (torch.zeros(3).long(), {}, "input_ids: expected token ids"),
        (
            torch.zeros(2, 3).long(),
            {"attention_mask": torch.ones(2, 3)},
            "boolean mask",
        ),
        (
            torch.zeros(2, 3).long(),
            {"attention_mask": torch.ones(2, 4).bool()},
            "attention_mask: expected a boolean mask of shape",
        ),
    ],
)
def test_a_forward_that_does_not_fit(ids, options, message):
    with pytest.raises(InputError, match=message):
        shaken()(ids, **options)


PROMPT = torch.zeros(2, 3).long()


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "ids, options, message",
    [
        (PROMPT, {"max_new_tokens": 22}, "at most 24 tokens together.*got 3 and 22"),
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens: expected a whole number"),
        (PROMPT, {"max_new_tokens": 2.5}, "max_new_tokens: expected"),
        (PROMPT + 30, {}, "input_ids: expected ids from 0 to 29; got 30"),
        (PROMPT - 1, {}, "input_ids: expected ids from 0 to 29; got -1"),
        (PROMPT[:, :0], {}, "at least one row and one token"),
        (PROMPT, {"attention_mask": PROMPT.bool()}, "row 0 hides everything"),
        (
            PROMPT,
            {"attention_mask": torch.tensor([[True, True, False]] * 2)},
            "attention_mask: expected padding on the left",
        ),
        (PROMPT, {"temperature": -1.0}, "temperature: expected"),
        (PROMPT, {"temperature": float("nan")}, "temperature: expected"),
        (PROMPT, {"temperature": 0.0, "do_sample": True}, "temperature: expected"),
        (PROMPT, {"top_k": 0}, "top_k: expected a whole number"),
        (PROMPT, {"top_p": 0.0}, "top_p: expected"),
        (PROMPT, {"top_p": 1.5}, "top_p: expected"),
        (
            PROMPT,
            {"eos_token_id": 30},
            "eos_token_id: expected .* from 0 to 29; got 30",
        ),
        (PROMPT, {"num_beams": 0}, "num_beams: expected"),
        (PROMPT, {"num_beams": 2, "top_k": 3}, "num_beams: expected 1"),
        (PROMPT, {"do_sample": False, "top_p": 0.5}, "top_p: expected None"),
    ],
)
def test_a_generation_that_does_not_fit(ids, options, message):
    model = shaken()
    model.step = lambda *_: pytest.fail("the model was called")
    with pytest.raises(InputError, match=message):
        model.generate(ids, **options)


def test_padding_without_a_mask_is_warned_of():
    model = shaken(pad_token_id=0)
    with pytest.warns(UserWarning, match="no attention_mask"):
        model.generate(PROMPT, max_new_tokens=1)


def test_recipes_are_the_papers():
    gpt, tuned = (model_info(name).recipes["paper"] for name in ("gpt", "gpt_sequence"))
    assert (gpt.learning_rate, gpt.warmup_steps, gpt.schedule) == (
        2.5e-4,
        2000,
        "cosine",
    )
    assert (gpt.batch_size, gpt.weight_decay) == (64, 0.01)
    assert (tuned.learning_rate, tuned.batch_size, tuned.schedule) == (
        6.25e-5,
        32,
        "linear",
    )
    assert tuned.warmup_steps / tuned.max_steps == pytest.approx(0.002, rel=0.02)
    assert set(an.list_models("gpt*")) >= {"gpt", "gpt2", "gpt2_xl", "gpt_book"}


@pytest.mark.parametrize("order", [1, 2, 4])
def test_probabilities_of_n_grams_sum_to_one(order):
    "After any context, of which some are not in the training text; and by hand."
    train, contexts = np.array([0, 1, 2, 0, 1, 3, 0, 2, 0, 1, 2]), [(0, 1), (3, 3)]
    for context in contexts:
        tests = [np.array([*context, w]) for w in range(4)]
        p = [kneser_ney(train, test, order, 4)[-1] for test in tests]
        assert sum(p) == pytest.approx(1)
    assert kneser_ney(train, np.array([0, 1, 2]), 2, 4)[-1] == pytest.approx(
        bigram_by_hand(train, 1, 2)
    )


def bigram_by_hand(train, before, word):
    "The probability of a pair, from the formula, with dictionaries."
    pairs = Counter(zip(train.tolist(), train[1:].tolist(), strict=False))
    after = Counter(b for _, b in pairs)  # after how many different ones

    def discount(counts):
        once, twice = (sum(c == k for c in counts.values()) for k in (1, 2))
        return once / max(once + 2 * twice, 1)

    D = discount(after)
    total = sum(after.values())
    lower = (max(after[word] - D, 0) + D * len(after) / 4) / total
    D = discount(pairs)
    of = {b: c for (a, b), c in pairs.items() if a == before}
    top = max(of.get(word, 0) - D, 0) + D * len(of) * lower
    return top / sum(of.values())
