"""The Transformer: equal to torch's and to Marian on the same weights; and what must
not change anything does not."""

import json
import re
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import attn_notes as an
from attn_notes.foundations.attention import Attention, record_attention
from attn_notes.foundations.checks import (
    CheckpointError,
    CheckpointWarning,
    ConfigError,
    InputError,
)
from attn_notes.foundations.generation import beam_search, reorder_state
from attn_notes.foundations.masks import lengths_mask
from attn_notes.sequence import encoder_decoder
from attn_notes.sequence.encoder_decoder import EncoderDecoder
from attn_notes.sequence.transformer import (
    MARIAN_FORMAT,
    TORCH_FORMAT,
    Transformer,
    TransformerConfig,
)
from attn_notes.zoo.checkpoints import fit_state
from attn_notes.zoo.devices import STAND_IN, check_model, fake_device, to_stand_in
from attn_notes.zoo.factory import count_parameters, create_model, example_inputs
from attn_notes.zoo.registry import model_info

SMALL = TransformerConfig(
    vocab_size=30,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=20,
    dropout=0.0,
    max_position_embeddings=24,
)
PAD, BOS, EOS = SMALL.pad_token_id, SMALL.bos_token_id, SMALL.eos_token_id
KINDS = {
    "post-norm": {},
    "pre-norm": {"norm_first": True},
    "learned positions": {"positions": "learned"},
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
kinds, seeds = st.sampled_from(list(KINDS.values())), st.integers(0, 999)


def shake(model, noise=0.2):
    """Every parameter with noise on it: no bias is zero and no norm is neutral."""
    for parameter in model.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return model


def shaken(kind=None, seed=0, **change):
    """A model in double precision of which no two parts are alike."""
    torch.manual_seed(seed)
    return shake(Transformer(replace(SMALL, **(kind or {}), **change)).double().eval())


def pairs(rows=3, n=7, m=6, seed=0, vocab=30):
    random = torch.Generator().manual_seed(seed)
    source, target = (
        torch.randint(4, vocab, (rows, length), generator=random) for length in (n, m)
    )
    lengths = torch.randint(1, n + 1, (rows,), generator=random)
    return source, target, lengths_mask(lengths, n)


def right_mask(rows, m, seed):
    """True on the first tokens of each row, at least one."""
    return lengths_mask(
        torch.randint(
            1, m + 1, (rows,), generator=torch.Generator().manual_seed(seed + 1)
        ),
        m,
    )


def sinusoids(n, d):
    """The paper's section 3.5, one entry at a time."""
    rows = [
        [
            (torch.cos if i % 2 else torch.sin)(
                torch.tensor(position / 10000 ** ((i - i % 2) / d), dtype=torch.float64)
            )
            for i in range(d)
        ]
        for position in range(n)
    ]
    return torch.tensor(rows, dtype=torch.float64)


# ---- the size


def count_by_hand(vocab, d, d_ff, layers):
    """Every matrix of the paper, one by one: no biases in attention, no norm behind the
    stacks, one matrix of tokens."""
    attention = sum(rows * columns for rows, columns in [(d, d)] * 4)
    feed_forward = (d * d_ff + d_ff) + (d_ff * d + d)
    encoder_layer = attention + feed_forward + 2 * (d + d)
    decoder_layer = 2 * attention + feed_forward + 3 * (d + d)
    return vocab * d + layers * (encoder_layer + decoder_layer)


@pytest.mark.parametrize(
    "name, sizes, paper",
    [
        ("transformer_base", (37_000, 512, 2048, 6), 65e6),
        ("transformer_big", (37_000, 1024, 4096, 6), 213e6),
    ],
)
def test_count_is_exact_and_near_the_papers(name, sizes, paper):
    found = count_parameters(create_model(name, device="meta"))
    assert (
        found == count_by_hand(*sizes) == model_info(name).parameters
        and abs(found / paper - 1) < 0.04
    )


def test_published_configurations():
    base, big = (model_info(f"transformer_{size}").config for size in ("base", "big"))
    assert (
        base.hidden_size,
        base.num_hidden_layers,
        base.num_attention_heads,
        base.intermediate_size,
        base.dropout,
    ) == (512, 6, 8, 2048, 0.1)
    assert (
        big.hidden_size,
        big.num_hidden_layers,
        big.num_attention_heads,
        big.intermediate_size,
        big.dropout,
    ) == (1024, 6, 16, 4096, 0.3)
    for config in (base, big):
        assert config.positions == "sinusoidal" and not (
            config.norm_first or config.final_norm or config.attention_bias
        )
        assert (
            config.vocab_size
            == config.source_vocab_size
            == config.target_vocab_size
            == 37_000
        )


@pytest.mark.parametrize(
    "size, steps, last, every", [("base", 100_000, 5, 1500), ("big", 300_000, 20, 600)]
)
def test_paper_recipe(size, steps, last, every):
    info = model_info(f"transformer_{size}")
    paper, d = info.recipes["paper"], info.config.hidden_size
    assert (
        paper.optimizer,
        paper.betas,
        paper.eps,
        paper.label_smoothing,
        paper.max_tokens,
    ) == ("adam", (0.9, 0.98), 1e-9, 0.1, 25_000)
    assert (paper.max_steps, paper.average_last, paper.average_every) == (
        steps,
        last,
        every,
    )
    for step in (1, 100, 4000, 4001, 50_000):
        assert paper.lr(step) == pytest.approx(
            d**-0.5 * min(step**-0.5, step * 4000**-1.5)
        )


# ---- equal to torch's, which has no embeddings, on the same shaken weights


def twins(config, as_in_paper=False, seed=0, noise=0.2):
    """torch's module and ours with its weights. As in the paper: without its last norms
    and its attention biases."""
    torch.manual_seed(seed)
    c = config
    with warnings.catch_warnings(
        action="ignore"
    ):  # torch names the fast paths that it can not take
        reference = shake(
            nn.Transformer(
                c.hidden_size,
                c.num_attention_heads,
                c.num_hidden_layers,
                c.num_hidden_layers,
                c.intermediate_size,
                c.dropout,
                batch_first=True,
                norm_first=c.norm_first,
            ),
            noise,
        )
    if as_in_paper:
        reference.encoder.norm = reference.decoder.norm = None
        for name, parameter in reference.named_parameters():
            if "attn" in name and name.endswith("bias"):
                parameter.data.zero_()
    model = shake(
        Transformer(
            replace(config, final_norm=not as_in_paper, attention_bias=not as_in_paper)
        ),
        noise,
    )
    missing = model.load_state_dict(
        TORCH_FORMAT.apply(reference.state_dict(), model), strict=False
    )
    assert missing.missing_keys == ["embedding.tokens.weight"] and all(
        "attention" in key and "bias" in key for key in missing.unexpected_keys
    )
    return reference, model


def gradients(logits, vectors, table, module, ours):
    """By name, of a loss that every logit has a part in: for the vectors that go in,
    the embedding matrix and every weight."""
    own = (
        dict(module.named_parameters())
        if ours
        else TORCH_FORMAT.apply(dict(module.named_parameters()), module)
    )
    named = {
        "source vectors": vectors[0],
        "target vectors": vectors[1],
        "embedding.tokens.weight": table,
        **own,
    }
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).to(
        logits
    )
    return dict(
        zip(
            named,
            torch.autograd.grad(
                (logits.log_softmax(-1) * weights).sum(), list(named.values())
            ),
            strict=True,
        )
    )


def both(reference, model, source, target, source_mask, target_mask):
    """(logits, gradients) of torch's module between embeddings written out here, and of
    ours."""
    table, positions = (
        model.embedding.tokens.weight.detach().clone().requires_grad_(),
        model.embedding.positions.weight,
    )
    d, m = table.shape[1], target.shape[1]
    x, y = (table[ids] * d**0.5 + positions[: ids.shape[1]] for ids in (source, target))
    hidden = {"tgt_mask": torch.ones(m, m, dtype=torch.bool).triu(1)}
    if source_mask is not None:
        hidden |= {
            "src_key_padding_mask": ~source_mask,
            "memory_key_padding_mask": ~source_mask,
        }
    if target_mask is not None:
        hidden |= {"tgt_key_padding_mask": ~target_mask}
    theirs = reference(x, y, **hidden) @ table.T
    vectors = []
    handle = model.embedding.register_forward_hook(
        lambda module, given, output: vectors.append(output)
    )
    ours = model(source, target, source_mask, target_mask)
    handle.remove()
    return (theirs, gradients(theirs, (x, y), table, reference, False)), (
        ours,
        gradients(ours, vectors, model.embedding.tokens.weight, model, True),
    )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "norm_first, as_in_paper",
    [(False, False), (False, True), (True, False)],
    ids=["post-norm", "as in the paper", "pre-norm"],
)
@settings(max_examples=6)
@given(
    st.sampled_from([(1, 6), (3, 6), (3, 12), (1, 12)]),
    st.integers(1, 3),
    st.integers(1, 7),
    st.integers(1, 6),
    st.booleans(),
    st.booleans(),
    seeds,
)
def test_equals_torch(
    norm_first,
    as_in_paper,
    training,
    heads,
    layers,
    n,
    m,
    source_padded,
    target_padded,
    seed,
):
    config = replace(
        SMALL,
        num_attention_heads=heads[0],
        hidden_size=heads[1],
        num_hidden_layers=layers,
        norm_first=norm_first,
    )
    reference, model = (
        module.double().train(training) for module in twins(config, as_in_paper, seed)
    )
    source, target, mask = pairs(n=n, m=m, seed=seed)
    (theirs, expected), (ours, found) = both(
        reference,
        model,
        source,
        target,
        mask if source_padded else None,
        right_mask(3, m, seed) if target_padded else None,
    )
    assert (theirs - ours).abs().max() < 1e-10
    assert (
        found.keys() <= expected.keys()
        and len(found) == 3 + len(list(model.parameters())) - 1
    )
    for name in found:
        assert (found[name] - expected[name]).abs().max() < 1e-10, name


@pytest.mark.slow
def test_equals_torch_at_the_published_size():
    reference, model = twins(
        replace(model_info("transformer_base").config, dropout=0.0), noise=0.02
    )
    source, target, mask = pairs(rows=2, n=11, m=9, vocab=37_000)
    (theirs, expected), (ours, found) = both(
        reference, model, source, target, mask, None
    )
    assert (theirs - ours).abs().max() < 1e-5 * theirs.abs().max()
    for name in found:
        assert (found[name] - expected[name]).norm() <= 1e-4 * expected[name].norm(), (
            name
        )


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_weights_of_torch_load(norm_first, tmp_path):
    reference, model = twins(replace(SMALL, norm_first=norm_first))
    torch.save(reference.state_dict(), tmp_path / "torch.pt")
    sizes = {
        name: getattr(SMALL, name)
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
        )
    }
    options = dict(
        pretrained=tmp_path / "torch.pt",
        norm_first=norm_first,
        final_norm=True,
        attention_bias=True,
        **sizes,
    )
    with pytest.warns(
        CheckpointWarning,
        match=r"not in this format, left as they were: embedding.tokens\.weight$",
    ):
        loaded = create_model("transformer_base", **options)
    fresh = Transformer(model.config)
    with pytest.warns(CheckpointWarning, match=r"embedding.tokens\.weight$"):
        fit_state(fresh, reference.state_dict(), (TORCH_FORMAT,))
    for other in (loaded, fresh):
        found = other.state_dict()
        assert all(
            torch.equal(found[key], value)
            for key, value in model.state_dict().items()
            if not key.startswith("embedding")
        )
    assert not loaded.training


@pytest.mark.parametrize(
    "without, named",
    [
        (
            "final_norm",
            [
                "encoder.norm.weight",
                "encoder.norm.bias",
                "decoder.norm.weight",
                "decoder.norm.bias",
            ],
        ),
        (
            "attention_bias",
            [
                "encoder.layers.0.attention.in_proj_bias",
                "decoder.layers.1.cross_attention.out_proj.bias",
            ],
        ),
    ],
)
def test_weights_that_the_model_has_no_place_for_are_listed(without, named):
    reference, model = twins(SMALL)
    paper = Transformer(replace(model.config, **{without: False}))
    before = {key: value.clone() for key, value in paper.state_dict().items()}
    with pytest.raises(
        CheckpointError,
        match=r"nn\.Transformer format\) does not fit Transformer: \d+ unexpected: ",
    ) as refused:
        fit_state(paper, reference.state_dict(), (TORCH_FORMAT,))
    assert all(name in str(refused.value) for name in named)
    assert all(
        torch.equal(value, before[key]) for key, value in paper.state_dict().items()
    )


# ---- equal to Marian of transformers, which has embeddings and a cache of its own


@pytest.fixture(scope="module")
def ours(marian):
    model = create_model("transformer_base", pretrained=marian[1])
    assert not model.training and model.config.positions == "sinusoidal_halves"
    return model.double()


@settings(max_examples=8)
@given(n=st.integers(1, 9), m=st.integers(1, 8), seed=seeds)
def test_equals_marian(marian, ours, n, m, seed):
    source, target, mask = pairs(
        rows=4, n=n, m=m, seed=seed, vocab=ours.config.vocab_size
    )
    theirs = marian[0](
        input_ids=source, attention_mask=mask.long(), decoder_input_ids=target
    ).logits
    assert (theirs - ours(source, target, mask)).abs().max() < 1e-10


# transformers divides by length ** alpha, and not by the paper's
# ((5 + length) / 6) ** alpha: with alpha = 0 both rank by log p
@pytest.mark.parametrize(
    "options",
    [dict(num_beams=1), dict(num_beams=4, length_penalty=0.0)],
    ids=["greedy", "beam"],
)
def test_generates_what_marian_generates(marian, ours, options):
    pad = ours.config.pad_token_id
    source, _, mask = pairs(rows=12, n=9, seed=5, vocab=pad)
    theirs = marian[0].generate(
        input_ids=source,
        attention_mask=mask.long(),
        max_new_tokens=18,
        do_sample=False,
        early_stopping=False,
        bad_words_ids=[[pad]],
        **options,
    )
    found = ours.generate(source, mask, max_new_tokens=18, **options)
    assert torch.equal(theirs[:, 1:], found)
    assert len((found != pad).sum(1).unique()) > 1  # some end early


def test_marian_never_generates_padding(ours):
    source, _, mask = pairs(rows=12, n=9, seed=5, vocab=ours.config.pad_token_id)
    bias = ours.embedding.logits_bias
    before, pad = bias[-1].item(), ours.config.pad_token_id
    bias.data[-1] = 100.0  # the padding would win everywhere
    try:
        assert (ours.generate(source, mask, max_new_tokens=3)[:, 0] != pad).all()
        assert (ours(source, source, mask).argmax(-1) == pad).all()
    finally:
        bias.data[-1] = before


def test_marian_files_of_the_hub_load(marian, ours, tmp_path):
    """Pickled, with every copy of the tied matrix and both tables of positions."""
    state = {name: value.float() for name, value in marian[0].state_dict().items()}
    assert {"lm_head.weight", "model.decoder.embed_positions.weight"} <= set(state)
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((marian[1] / "config.json").read_text())
    loaded = create_model("transformer_big", pretrained=tmp_path)
    assert loaded.config == ours.config
    for name, value in ours.state_dict().items():
        assert torch.equal(loaded.state_dict()[name].double(), value), name


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "change, words",
    [
        ({"scale_embedding": False}, "scale_embedding: expected True; got False"),
        ({"decoder_layers": 3}, "decoder_layers: expected 2; got 3"),
        ({"activation_function": "tanh"}, "activation: expected one of .*; got 'tanh'"),
        (
            {"share_encoder_decoder_embeddings": False},
            "share_encoder_decoder_embeddings: expected True; got False",
        ),
    ],
)
def test_a_marian_of_another_kind_is_refused(marian, tmp_path, change, words):
    stored = json.loads((marian[1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stored, **change}))
    (tmp_path / "model.safetensors").write_bytes(
        (marian[1] / "model.safetensors").read_bytes()
    )
    with pytest.raises(CheckpointError, match=f"config.json: {words}$"):
        create_model("transformer_base", pretrained=tmp_path)


def test_marian_weights_without_a_part_are_refused(marian):
    state = marian[0].state_dict()
    del state["model.decoder.layers.1.encoder_attn.k_proj.weight"]
    model = Transformer(SMALL)
    with pytest.raises(CheckpointError, match="3 parts to join; got only some beside"):
        fit_state(model, state, (MARIAN_FORMAT,))


# ---- the parts: one matrix of tokens, positions, where dropout acts


@every_kind
def test_tokens_are_scaled_and_positions_are_added(kind):
    model, ids = shaken(kind), pairs()[0]
    table = (
        model.embedding.positions.weight if "positions" in kind else sinusoids(24, 12)
    )
    for start in (0, 5, 17):
        expected = (
            model.embedding.tokens.weight[ids] * 12**0.5 + table[start : start + 7]
        )
        assert torch.allclose(
            model.embedding(ids, start), expected, rtol=0, atol=1e-6
        )  # the table is kept in float32


def test_one_matrix_for_source_target_and_softmax(tmp_path):
    model, (source, target, mask) = shaken(), pairs()
    model.save_pretrained(tmp_path / "model")
    kept = load_file(tmp_path / "model" / "model.safetensors")
    for named in (model.state_dict(), dict(model.named_parameters()), kept):
        assert [name for name, value in named.items() if 30 in value.shape] == [
            "embedding.tokens.weight"
        ]
    target, source = (
        10 + target % 10,
        20 + source % 10,
    )  # tokens 3 to 9 are in neither: only the softmax has them
    parts = {}
    for name, ids in (
        ("softmax", slice(3, 10)),
        ("target", slice(10, 20)),
        ("source", slice(20, 30)),
    ):
        before = model(source, target, mask)
        model.embedding.tokens.weight.data[ids] += 0.1
        parts[name] = (
            (model(source, target, mask) - before)[..., :3].abs().max().item(),
            (model(source, target, mask) - before).abs().max().item(),
        )
    assert (
        parts["softmax"][0] == 0
        and all(changed > 1e-4 for _, changed in parts.values())
        and parts["target"][0] > 1e-4 < parts["source"][0]
    )


def test_initial_weights():
    torch.manual_seed(0)
    model = Transformer(
        TransformerConfig(
            vocab_size=500,
            hidden_size=64,
            num_attention_heads=4,
            num_hidden_layers=1,
            intermediate_size=200,
            positions="learned",
            attention_bias=True,
        )
    )
    assert model.embedding.tokens.weight.std().item() == pytest.approx(
        64**-0.5, rel=0.02
    )
    assert model.embedding.positions.weight.std().item() == pytest.approx(
        0.5**0.5, rel=0.02
    )  # the size of the sinusoids
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (
                parameter == (1 if re.search(r"norm\d\.weight$", name) else 0)
            ).all(), name
        elif not name.startswith("embedding"):
            assert parameter.abs().max().item() == pytest.approx(
                (6 / sum(parameter.shape)) ** 0.5, rel=0.02
            ), name  # Xavier's bound


def test_dropout_acts_on_the_embeddings_and_on_every_sub_layer():
    model = shaken(dropout=0.3)
    layers = [f"{side}.layers.{i}" for side in ("encoder", "decoder") for i in range(2)]
    expected = {f"{layer}.dropout" for layer in layers}
    found = {
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.Dropout) and part.p > 0
    }
    assert found == expected | {"embedding.dropout"} and {
        model.get_submodule(name).p for name in found
    } == {0.3}
    weights = [part for part in model.modules() if isinstance(part, Attention)]
    assert len(weights) == 6 and all(part.dropout == 0 for part in weights)
    acted, x = [], torch.ones(1, 1, 12, dtype=torch.float64)
    for layer in layers:  # how often in a block: once for every sub-layer
        part, seen = model.get_submodule(layer), []
        hook = part.dropout.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        part(x, x) if "decoder" in layer else part(x)
        hook.remove()
        acted.append(len(seen))
    assert acted == [2, 2, 3, 3]


@every_kind
def test_dropout_only_in_training(kind):
    model, (source, target, mask) = shaken(kind, dropout=0.3), pairs()
    expected = shaken(kind)(source, target, mask)
    assert torch.equal(model(source, target, mask), expected) and torch.equal(
        shaken(kind).train()(source, target, mask), expected
    )
    model.train()
    assert not torch.allclose(model(source, target, mask), model(source, target, mask))


# ---- what must not change anything


@settings(max_examples=12)
@given(kinds, seeds, st.integers(0, 6), st.integers(0, 6))
def test_padding_changes_nothing(kind, seed, more_source, more_target):
    model = shaken(kind)
    source, target, mask = pairs(seed=seed)
    target_mask = right_mask(3, 6, seed)
    real = model(source, target, mask, target_mask)
    source, target = (
        torch.where(mask, source, 17),
        torch.where(target_mask, target, 11),
    )  # whatever stands under the masks
    wider = (
        nn.functional.pad(source, (0, more_source), value=9),
        nn.functional.pad(target, (0, more_target), value=8),
    )
    masks = (
        nn.functional.pad(mask, (0, more_source)),
        nn.functional.pad(target_mask, (0, more_target)),
    )
    for found in (
        model(*wider, *masks),
        model(*wider, masks[0]),
    ):  # with and without a target mask
        assert torch.allclose(
            found[:, :6][target_mask], real[target_mask], rtol=0, atol=1e-12
        )


@settings(max_examples=12)
@given(kinds, seeds, st.integers(0, 4))
def test_a_hidden_token_of_the_target_is_not_looked_at(kind, seed, position):
    model = shaken(kind)
    source, target, mask = pairs(seed=seed)
    target_mask = torch.ones_like(target, dtype=torch.bool)
    target_mask[:, position] = False
    other = target.clone()
    other[:, position] = 4 + (other[:, position] - 3) % 26
    a, b = (model(source, ids, mask, target_mask) for ids in (target, other))
    assert torch.allclose(
        a[target_mask], b[target_mask], rtol=0, atol=1e-12
    ) and not torch.allclose(a[:, position], b[:, position])


@settings(max_examples=12)
@given(kinds, seeds, st.integers(0, 5))
def test_a_token_changes_nothing_before_it(kind, seed, position):
    model = shaken(kind)
    source, target, mask = pairs(seed=seed)
    other = target.clone()
    other[:, position] = 4 + (other[:, position] - 3) % 26
    for target_mask in (None, torch.ones_like(target, dtype=torch.bool)):
        before, after = (
            model(source, ids, mask, target_mask) for ids in (target, other)
        )
        assert (
            torch.equal(before[:, :position], after[:, :position])
            and (before[:, position:] != after[:, position:]).any(-1).all()
        )


@every_kind
def test_rows_know_nothing_of_each_other(kind):
    model = shaken(kind)
    source, target, mask = pairs(rows=5)
    rows = model(source, target, mask)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.allclose(
        model(source[order], target[order], mask[order]),
        rows[order],
        rtol=0,
        atol=1e-12,
    )
    for i, n in enumerate(mask.sum(1).tolist()):
        assert torch.allclose(
            model(source[i : i + 1, :n], target[i : i + 1])[0],
            rows[i],
            rtol=0,
            atol=1e-12,
        )


@every_kind
def test_every_token_of_the_source_reaches_every_position(kind):
    model, (source, target, _) = shaken(kind), pairs()
    before = model(source, target)
    for position in range(7):
        other = source.clone()
        other[:, position] = 4 + (other[:, position] - 3) % 26
        assert ((model(other, target) - before).abs().amax(-1) > 1e-9).all()
    turned = source.flip(1)
    assert not torch.allclose(model(turned, target), before)  # and the order counts


# ---- a cache instead of the whole sentence


@settings(max_examples=12)
@given(kinds, seeds, st.lists(st.integers(1, 4), min_size=1, max_size=5), st.booleans())
def test_pieces_equal_the_whole(kind, seed, pieces, padded):
    model = shaken(kind)
    source, target, mask = pairs(m=sum(pieces), seed=seed)
    mask = mask if padded else None
    full = model(source, target, mask)
    state, logits = model.encode(source, mask), []
    for ids in target.split(pieces, dim=1):
        part, state = model.decode(ids, state)
        logits.append(part)
    assert torch.allclose(torch.cat(logits, 1), full, rtol=0, atol=1e-12)
    assert {past.length for past in state["past"]} == {sum(pieces)}


@settings(max_examples=12)
@given(kinds, seeds, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_hypotheses_of_a_sentence_share_its_memory(kind, seed, k, m, more):
    """k different beginnings for each of three sentences, then shuffled within the
    sentences, and continued."""
    model = shaken(kind)
    source, target, mask = pairs(m=m + more, rows=3 * k, seed=seed)
    source, mask = source[:3], mask[:3]
    sentence = torch.arange(3).repeat_interleave(k)
    start = model.encode(source, mask)
    _, state = model.decode(target[:, :m], reorder_state(start, sentence))
    index = sentence * k + torch.randint(
        0, k, (3 * k,), generator=torch.Generator().manual_seed(seed)
    )
    logits, state = model.decode(target[:, m:], reorder_state(state, index))
    beginnings = torch.cat([target[index, :m], target[:, m:]], 1)
    assert torch.allclose(
        logits,
        model(source[sentence], beginnings, mask[sentence])[:, m:],
        rtol=0,
        atol=1e-12,
    )
    assert all(a is b for a, b in zip(state["memory"], start["memory"], strict=True))


@every_kind
def test_a_state_stays_as_it_is(kind):
    """Two ways to go on from one state, in any order, give what a whole pass gives."""
    model = shaken(kind)
    source, target, mask = pairs(m=8)
    other = target.flip(0)
    with torch.no_grad():
        _, state = model.decode(target[:, :3], model.encode(source, mask))
        ways = (target[:, 3:5], other[:, 3:], target[:, 3:])
        found = [model.decode(tokens, state)[0] for tokens in ways]
    for tokens, logits in zip(ways, found, strict=True):
        whole = model(source, torch.cat([target[:, :3], tokens], 1), mask)[:, 3:]
        assert torch.allclose(whole, logits, rtol=0, atol=1e-12)


# ---- generation


def without_cache(model, source, mask, max_new_tokens, num_beams, length_penalty):
    """The search of `generate` over a state of plain rows: every step is a whole pass
    over the tokens so far."""

    def step(new, state):
        tokens = torch.cat([state["tokens"], new], 1)
        logits = model(state["source"], tokens, state["mask"])[:, -1]
        return logits, {**state, "tokens": tokens}

    state = {"source": source, "mask": mask, "tokens": source[:, :0]}
    prompt = torch.full((len(source), 1), BOS)
    options = max_new_tokens, num_beams, length_penalty
    return beam_search(step, state, prompt, EOS, PAD, *options)


@every_kind
@pytest.mark.parametrize("num_beams, length_penalty", [(1, 0.6), (4, 0.6), (3, 0.0)])
def test_search_with_a_cache_equals_search_without(kind, num_beams, length_penalty):
    model = shaken(kind)
    source, _, mask = pairs(rows=5)
    bounds = mask.sum(1) + 8
    expected = without_cache(model, source, mask, bounds, num_beams, length_penalty)
    assert torch.equal(
        EncoderDecoder.generate(model, source, mask, bounds, num_beams, length_penalty),
        expected,
    )
    assert torch.equal(
        model.generate(source, mask, 9, num_beams, length_penalty),
        without_cache(model, source, mask, 9, num_beams, length_penalty),
    )


@every_kind
def test_greedy_is_the_argmax_of_the_full_pass(kind):
    model = shaken(kind)
    source, _, mask = pairs(rows=6)
    tokens = model.generate(source, mask, max_new_tokens=10)
    best = model(
        source, nn.functional.pad(tokens[:, :-1], (1, 0), value=BOS), mask
    ).argmax(-1)
    unfinished = nn.functional.pad(
        (tokens[:, :-1] != EOS).cumprod(1).bool(), (1, 0), value=True
    )
    assert (
        torch.equal(tokens[unfinished], best[unfinished])
        and (tokens[~unfinished] == PAD).all()
    )


@pytest.mark.parametrize("num_beams", [1, 4])
def test_a_batch_is_generated_as_its_sentences_alone(num_beams):
    """The paper's search: alpha 0.6, each sentence bound by its own length + 50."""
    model = shaken(max_position_embeddings=80, num_hidden_layers=1, seed=1)
    source, _, mask = pairs(rows=4)
    together = model.generate(source, mask, num_beams=num_beams)
    lengths = []
    for i, n in enumerate(mask.sum(1).tolist()):
        alone = model.generate(source[i : i + 1, :n], num_beams=num_beams)[0]
        assert (
            torch.equal(together[i, : len(alone)], alone)
            and (together[i, len(alone) :] == PAD).all()
        )
        lengths.append(len(alone))
    assert len(set(lengths)) > 1


@pytest.mark.no_shapes
def test_what_the_paper_searches_with_is_the_default(monkeypatch):
    monkeypatch.setattr(
        encoder_decoder, "beam_search", lambda *arguments: arguments[5:]
    )
    source, _, mask = pairs()
    bounds, num_beams, length_penalty = shaken(max_position_embeddings=80).generate(
        source, mask, num_beams=4
    )
    assert bounds.tolist() == (mask.sum(1) + 50).tolist() and (
        num_beams,
        length_penalty,
    ) == (4, 0.6)


def endless(model):
    """The same model, which never generates the end token, nor the padding."""
    decode = model.decode

    def never(tokens, state):
        logits, state = decode(tokens, state)
        logits[..., [PAD, EOS]] = -torch.inf
        return logits, state

    model.decode = never
    return model


@pytest.mark.parametrize("num_beams", [1, 4])
def test_a_sentence_becomes_at_most_fifty_tokens_longer(num_beams):
    source, _, mask = pairs(rows=3)
    generated = endless(
        shaken(num_hidden_layers=1, max_position_embeddings=80)
    ).generate(source, mask, num_beams=num_beams)
    assert (generated != PAD).sum(1).tolist() == (mask.sum(1) + 50).tolist() and len(
        mask.sum(1).unique()
    ) > 1
    for mask_ in (mask, None):  # nor longer than there are positions
        assert (
            endless(shaken(num_hidden_layers=1)).generate(
                source, mask_, num_beams=num_beams
            )
            != PAD
        ).sum(1).tolist() == [24] * 3


def test_the_memory_is_never_copied():
    model = endless(shaken())
    source, _, mask = pairs(rows=2)
    decode, seen = model.decode, []

    def watched(tokens, state):
        seen.append(
            [
                (x.keys.untyped_storage().data_ptr(), x.keys.shape, len(tokens))
                for x in state["memory"]
            ]
        )
        return decode(tokens, state)

    model.decode = watched
    model.generate(source, mask, max_new_tokens=5, num_beams=4)
    assert [step[0][2] for step in seen] == [2, 8, 8, 8, 8]  # rows of tokens
    memory = [[layer[:2] for layer in step] for step in seen]
    assert all(step == memory[0] for step in memory)
    assert {shape for _, shape in memory[0]} == {(2, 3, 7, 4)}


# ---- what the heads look at

ENCODER, SELF, CROSS = (
    [f"{path}.attention" for path in paths]
    for paths in (
        ["encoder.layers.0.attention", "encoder.layers.1.attention"],
        ["decoder.layers.0.attention", "decoder.layers.1.attention"],
        ["decoder.layers.0.cross_attention", "decoder.layers.1.cross_attention"],
    )
)


def check_maps(maps, mask, steps):
    """Every layer recorded, every row of weights sums to one, nothing on hidden tokens
    or on later ones."""
    b, n = mask.shape
    assert set(maps) == {*ENCODER, *SELF, *CROSS}
    for names, shape in (
        (ENCODER, (b, 3, n, n)),
        (SELF, (b, 3, steps, steps)),
        (CROSS, (b, 3, steps, n)),
    ):
        for name in names:
            assert maps[name].shape == shape and torch.allclose(
                maps[name].sum(-1), torch.ones(shape[:3], dtype=torch.float64)
            ), name
            if names is SELF:
                assert (maps[name].triu(1) == 0).all() and (
                    maps[name].tril() > 0
                ).sum() == b * 3 * steps * (steps + 1) / 2, name
            else:
                assert (maps[name].movedim(-1, 1)[~mask] == 0).all() and (
                    maps[name].movedim(-1, 1)[mask] > 0
                ).all(), name


@every_kind
def test_attention_is_recorded_in_every_layer(kind):
    model = shaken(kind)
    source, target, mask = pairs()
    expected, tokens = (
        model(source, target, mask),
        model.generate(source, mask, max_new_tokens=5),
    )
    with record_attention(model) as maps:
        assert torch.allclose(model(source, target, mask), expected, rtol=0, atol=1e-12)
        check_maps(maps, mask, 6)
        assert torch.equal(model.generate(source, mask, max_new_tokens=5), tokens)
        check_maps(maps, mask, tokens.shape[1])
        stepwise = dict(maps)
        model(source, nn.functional.pad(tokens[:, :-1], (1, 0), value=BOS), mask)
        for name, weights in maps.items():  # step by step as all at once
            real = mask[:, None, :, None] if name.startswith("encoder") else 1
            assert torch.allclose(
                stepwise[name] * real, weights * real, rtol=0, atol=1e-12
            )
    assert torch.equal(
        model.generate(source, mask, max_new_tokens=5, num_beams=3),
        recorded_beam(model, source, mask),
    )


def recorded_beam(model, source, mask):
    """The same search while it is recorded; its cross-attention, too, leaves out the
    padding."""
    with record_attention(model) as maps:
        tokens = model.generate(source, mask, max_new_tokens=5, num_beams=3)
    for name in CROSS:
        rows = mask.repeat_interleave(len(maps[name]) // len(mask), 0)
        assert (
            torch.allclose(maps[name].sum(-1), torch.ones((), dtype=torch.float64))
            and (maps[name].movedim(-1, 1)[~rows] == 0).all()
        )
    return tokens


def count_calls(model, **inputs):
    """How many functions of the package a forward calls, and in how many files."""
    calls = []

    def profile(frame, event, argument):
        path = frame.f_code.co_filename
        if event == "call" and "/attn_notes/" in path:
            calls.append(path)

    sys.setprofile(profile)
    try:
        model(**inputs)
    finally:
        sys.setprofile(None)
    return len(calls), len(set(calls))


@pytest.mark.no_shapes
def test_a_forward_makes_few_calls():
    model = create_model("transformer_tiny").eval()
    inputs = example_inputs("transformer_tiny")
    plain = {k: v for k, v in inputs.items() if k.endswith("input_ids")}
    calls, files = count_calls(model, **plain)
    assert calls <= 43 and files <= 5  # one a layer is the stack's `call_layer`
    calls, files = count_calls(model, **inputs)  # two calls for the mask of each layer
    assert calls <= 59 and files <= 6


# ---- where it runs (at its published sizes, compiled, in other precisions, from files:
# tests/zoo/test_models.py)


@pytest.mark.parametrize("name", ["transformer_base", "transformer_big"])
@pytest.mark.slow
def test_fake_accelerator(name):
    """With every switch the other way than registered."""
    found = check_model(
        name, "fake", positions="learned", norm_first=True, attention_bias=True
    )
    assert (
        found.without_gradient == () and found.parameters > model_info(name).parameters
    )


def test_a_step_of_generation_on_a_fake_accelerator():
    model = Transformer(SMALL).eval()
    with fake_device(), torch.no_grad():
        to_stand_in(model)
        source = torch.ones(2, 7, dtype=torch.long, device=STAND_IN)
        state = reorder_state(
            model.encode(source),  # a mask would be read, which a fake has not
            torch.zeros(6, dtype=torch.long, device=STAND_IN),
        )
        for m in (3, 1):
            logits, state = model.decode(
                torch.ones(6, m, dtype=torch.long, device=STAND_IN), state
            )
            state = reorder_state(
                state, torch.zeros(6, dtype=torch.long, device=STAND_IN)
            )
        assert (
            logits.shape == (6, 1, 30)
            and str(logits.device)
            == str(state["past"][0]._room.keys.device)
            == STAND_IN
        )


@pytest.mark.slow
@pytest.mark.no_shapes
def test_export():
    model, (source, target, mask) = Transformer(SMALL).eval(), pairs()
    n, m = torch.export.Dim("n", min=2, max=24), torch.export.Dim("m", min=2, max=24)
    exported = torch.export.export(
        model, (source, target, mask), dynamic_shapes=({1: n}, {1: m}, {1: n})
    ).module()
    for n, m in ((9, 4), (3, 24)):
        source, target, mask = pairs(n=n, m=m)
        assert torch.allclose(
            exported(source, target, mask), model(source, target, mask), atol=1e-6
        )


# ---- what is refused


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "wrong, words",
    [
        (
            dict(num_attention_heads=5),
            "num_attention_heads: expected a divisor of hidden_size; got 5 and 12",
        ),
        (dict(num_attention_heads=0), "num_attention_heads: .*; got 0"),
        (dict(vocab_size=0), "vocab_size: expected a whole .*; got 0"),
        (dict(dropout=1.0), "dropout: .* got 1.0"),
        (
            dict(positions="rotary"),
            "positions: expected one of sinusoidal, .*, learned; got 'rotary'",
        ),
        (dict(max_position_embeddings=-1), "max_position.*; got -1"),
    ],
)
def test_configuration_refused(wrong, words):
    with pytest.raises(ConfigError, match=f"^{words}$"):
        replace(SMALL, **wrong)


@pytest.mark.no_shapes
def test_an_odd_width_has_no_sinusoids():
    odd = replace(SMALL, hidden_size=9)
    with pytest.raises(ConfigError, match="even width.*; got 9$"):
        Transformer(odd)
    assert Transformer(replace(odd, positions="learned"))(*pairs()[:2]).shape == (
        3,
        6,
        30,
    )


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "change, words",
    [
        (
            dict(input_ids=torch.ones(3, 25, dtype=torch.long), attention_mask=None),
            "input_ids: expected at most 24 tokens, .*; got 25",
        ),
        (
            dict(decoder_input_ids=torch.ones(3, 25, dtype=torch.long)),
            "decoder_input_ids: expected at most 24 tokens, .*; got 25",
        ),
        (
            dict(attention_mask=torch.ones(3, 6, dtype=torch.bool)),
            r"attention_mask: expected .*\(3, 7\), .*; got bool .*\(3, 6\)",
        ),
        (
            dict(attention_mask=torch.ones(3, 7)),
            r"attention_mask: expected .*\(3, 7\), .*; got float32 .*\(3, 7\)",
        ),
        (
            dict(decoder_attention_mask=torch.ones(3, 7, dtype=torch.bool)),
            r"decoder_attention_mask: expected .*\(3, 6\), .*; got bool .*\(3, 7\)",
        ),
        (
            dict(decoder_input_ids=torch.ones(2, 6, dtype=torch.long)),
            "decoder_input_ids: expected as many rows as input_ids has, 3; got 2",
        ),
        (
            dict(input_ids=torch.rand(3, 7)),
            r"input_ids: expected token ids, .*; got float32 of shape \(3, 7\)",
        ),
        (
            dict(input_ids=torch.ones(3, 0, dtype=torch.long)),
            r"input_ids: expected at least one row and one token; got .*\(3, 0\)",
        ),
    ],
)
def test_forward_refuses(change, words):
    source, target, mask = pairs()
    with pytest.raises(InputError, match=f"^{words}$"):
        Transformer(SMALL)(
            **{
                "input_ids": source,
                "decoder_input_ids": target,
                "attention_mask": mask,
                **change,
            }
        )


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "change, words",
    [
        (
            dict(input_ids=torch.ones(3, 25, dtype=torch.long), attention_mask=None),
            "input_ids: expected at most 24 tokens, .*; got 25",
        ),
        (
            dict(max_new_tokens=25),
            "max_new_tokens: .* at most 24 tokens, the number of positions; got 25",
        ),
        (
            dict(max_new_tokens=0),
            "max_new_tokens: expected a whole number of at least 1.*; got 0",
        ),
        (dict(num_beams=0), "num_beams: expected a whole .*; got 0"),
        (
            dict(num_beams=2, length_penalty=-1.0),
            "length_penalty: expected a number from 0 to 10; got -1.0",
        ),
        (
            dict(attention_mask=torch.ones(3, 8, dtype=torch.bool)),
            r"attention_mask: expected .*\(3, 7\), .*; got bool .*\(3, 8\)",
        ),
        (
            dict(attention_mask=torch.arange(3)[:, None].expand(3, 7) != 1),
            "attention_mask: expected at least one True .*; row 1 hides everything",
        ),
        (
            dict(input_ids=torch.full((3, 7), 30)),
            "input_ids: expected ids from 0 to 29; got 30",
        ),
        (dict(input_ids=torch.full((3, 7), -1)), "input_ids: .* got -1"),
        (
            dict(input_ids=torch.ones(7, dtype=torch.long)),
            r"input_ids: expected token ids, .*\(b, n\); got int64 .*\(7,\)",
        ),
    ],
)
def test_generate_refuses(change, words):
    source, _, mask = pairs()
    with pytest.raises(InputError, match=f"^{words}$"), warnings.catch_warnings():
        warnings.simplefilter("error")
        Transformer(SMALL).generate(
            **{"input_ids": source, "attention_mask": mask, **change}
        )


@pytest.mark.no_shapes
def test_decode_beyond_the_positions_is_refused():
    model, (source, _, mask) = Transformer(SMALL).eval(), pairs()
    with torch.no_grad():
        _, state = model.decode(
            torch.ones(3, 24, dtype=torch.long), model.encode(source, mask)
        )
        with pytest.raises(
            InputError,
            match="^positions: expected positions within 0 to 23; got 1 from 24 on$",
        ):
            model.decode(torch.ones(3, 1, dtype=torch.long), state)


@pytest.mark.no_shapes
def test_a_checkpoint_of_another_size_is_refused(tmp_path):
    an.create_model("transformer_tiny", vocab_size=30).save_pretrained(
        tmp_path / "model"
    )
    with pytest.raises(
        CheckpointError,
        match=r"1 misshapen: embedding.tokens\.weight \(30, 128\) for \(31, 128\)$",
    ):
        create_model("transformer_tiny", pretrained=tmp_path / "model", vocab_size=31)
    with pytest.raises(
        CheckpointError,
        match=r"\d+ missing: encoder\.layers\.2\.attention\.in_proj_weight",
    ):
        create_model(
            "transformer_tiny", pretrained=tmp_path / "model", num_hidden_layers=3
        )
    with pytest.raises(
        CheckpointError, match="holds a transformer_tiny, not a transformer_base$"
    ):
        create_model("transformer_base", pretrained=tmp_path / "model")


@pytest.mark.no_shapes
@pytest.mark.parametrize("change", [{"num_beams": 0}, {"max_new_tokens": 0}])
def test_bad_sizes_are_refused_before_the_source_is_read(monkeypatch, change):
    model = Transformer(TransformerConfig(20, 8, 1, 2, 16))
    monkeypatch.setattr(
        Transformer, "encode", lambda *_: pytest.fail("the source was read")
    )
    with pytest.raises(InputError, match=next(iter(change))):
        model.generate(torch.ones(1, 3, dtype=torch.long), **change)
