"""The Transformer: equal to torch's and to Marian on the same weights, and what must not change anything, does not."""

import re
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import attn_notes as an
from attn_notes.foundations.attention import record_attention
from attn_notes.foundations.checks import (
    CheckpointError,
    CheckpointWarning,
    ConfigError,
    InputError,
)
from attn_notes.foundations.masks import lengths_mask
from attn_notes.foundations.search import beam_search, reorder_state
from attn_notes.sequence.seq2seq import Seq2Seq
from attn_notes.sequence.transformer import TORCH_LAYOUT, Transformer, TransformerConfig
from attn_notes.zoo.checkpoints import fit_state
from attn_notes.zoo.devices import STAND_IN, check_model, fake_device, to_stand_in
from attn_notes.zoo.registry import count_parameters, create_model, model_info

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
    """Every parameter with noise on it, so that no bias is zero and no norm is neutral."""
    for parameter in model.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return model


def shaken(kind={}, seed=0, **change):
    """A model in double precision of which no two parts are alike."""
    torch.manual_seed(seed)
    return shake(Transformer(replace(SMALL, **kind, **change)).double().eval())


def pairs(rows=3, n=7, m=6, seed=0, vocab=30):
    random = torch.Generator().manual_seed(seed)
    source, target = (
        torch.randint(4, vocab, (rows, length), generator=random) for length in (n, m)
    )
    lengths = torch.randint(1, n + 1, (rows,), generator=random)
    return source, target, lengths_mask(lengths, n)


def right_mask(rows, m, seed):
    """True on the first words of each row, at least one."""
    return lengths_mask(
        torch.randint(
            1, m + 1, (rows,), generator=torch.Generator().manual_seed(seed + 1)
        ),
        m,
    )


def waves(n, d):
    """The paper's section 3.5, one entry at a time."""
    rows = [
        [
            (torch.cos if i % 2 else torch.sin)(
                torch.tensor(place / 10000 ** ((i - i % 2) / d), dtype=torch.float64)
            )
            for i in range(d)
        ]
        for place in range(n)
    ]
    return torch.tensor(rows, dtype=torch.float64)


# ---- the size


def count_by_hand(vocab, d, d_ff, layers):
    """Every matrix of the paper, one by one: no biases in attention, no norm behind the stacks, one matrix of words."""
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
    """torch's module and ours with its weights. As in the paper: without its last norms and its attention biases."""
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
        TORCH_LAYOUT.apply(reference.state_dict()), strict=False
    )
    assert missing.missing_keys == ["embedding.words.weight"] and all(
        "attention" in key and "bias" in key for key in missing.unexpected_keys
    )
    return reference, model


def gradients(logits, vectors, words, module, ours):
    """By name, of a loss that every logit has a part in: for the vectors that go in, the words' matrix and every weight."""
    own = (
        dict(module.named_parameters())
        if ours
        else TORCH_LAYOUT.apply(dict(module.named_parameters()))
    )
    named = {
        "source vectors": vectors[0],
        "target vectors": vectors[1],
        "embedding.words.weight": words,
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
        )
    )


def both(reference, model, source, target, source_mask, target_mask):
    """(logits, gradients) of torch's module between embeddings written out here, and of ours."""
    words, places = (
        model.embedding.words.weight.detach().clone().requires_grad_(),
        model.embedding.positions.weight,
    )
    d, m = words.shape[1], target.shape[1]
    x, y = (words[ids] * d**0.5 + places[: ids.shape[1]] for ids in (source, target))
    hidden = {"tgt_mask": torch.ones(m, m, dtype=torch.bool).triu(1)}
    if source_mask is not None:
        hidden |= {
            "src_key_padding_mask": ~source_mask,
            "memory_key_padding_mask": ~source_mask,
        }
    if target_mask is not None:
        hidden |= {"tgt_key_padding_mask": ~target_mask}
    theirs = reference(x, y, **hidden) @ words.T
    vectors = []
    handle = model.embedding.register_forward_hook(
        lambda module, given, output: vectors.append(output)
    )
    ours = model(source, target, source_mask, target_mask)
    handle.remove()
    return (theirs, gradients(theirs, (x, y), words, reference, False)), (
        ours,
        gradients(ours, vectors, model.embedding.words.weight, model, True),
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
        match=r"not in this layout, left as they were: embedding\.words\.weight$",
    ):
        loaded = create_model("transformer_base", **options)
    fresh = Transformer(model.config)
    with pytest.warns(CheckpointWarning, match=r"embedding\.words\.weight$"):
        fit_state(fresh, reference.state_dict(), (TORCH_LAYOUT,))
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
        match=r"torch\.nn\.Transformer layout\) does not fit Transformer: \d+ unexpected: ",
    ) as refused:
        fit_state(paper, reference.state_dict(), (TORCH_LAYOUT,))
    assert all(name in str(refused.value) for name in named)
    assert all(
        torch.equal(value, before[key]) for key, value in paper.state_dict().items()
    )


# ---- equal to Marian of transformers, which has embeddings and a cache of its own

MARIAN = (
    (r"model\.shared\.", "embedding.words."),
    (r"^model\.", ""),
    (r"\.self_attn\.", ".attention."),
    (r"\.encoder_attn\.", ".cross_attention."),
    (r"\.fc([12])\.", r".feed_forward.linear\1."),
    (r"\.self_attn_layer_norm\.", ".attention_path.norm."),
    (r"\.encoder_attn_layer_norm\.", ".cross_path.norm."),
    (r"\.final_layer_norm\.", ".feed_forward_path.norm."),
)


@pytest.fixture(scope="module")
def marian():
    """Marian, shaken, and ours with its weights; the places of ours are copied into it, for it puts the sines before the cosines."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MarianConfig(
        vocab_size=30,
        d_model=12,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=20,
        decoder_ffn_dim=20,
        activation_function="relu",
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        scale_embedding=True,
        max_position_embeddings=24,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        decoder_start_token_id=BOS,
        forced_eos_token_id=None,
    )
    torch.manual_seed(8)  # one whose sentences end at different places
    reference = shake(transformers.MarianMTModel(config).double().eval())
    state = reference.state_dict()
    for name in [
        name
        for name in state
        if name.endswith("q_proj.weight") or name.endswith("q_proj.bias")
    ]:
        state[re.sub(r"q_proj\.(\w+)$", r"in_proj_\1", name)] = torch.cat(
            [state.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        )
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in MARIAN:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    model = Transformer(replace(SMALL, attention_bias=True)).double().eval()
    model.load_state_dict({name: renamed[name] for name in model.state_dict()})
    for side in (reference.model.encoder, reference.model.decoder):
        side.embed_positions.weight.data.copy_(model.embedding.positions.weight)
    return reference, model


@settings(max_examples=8)
@given(n=st.integers(1, 9), m=st.integers(1, 8), seed=seeds)
def test_equals_marian(marian, n, m, seed):
    reference, model = marian
    source, target, mask = pairs(rows=4, n=n, m=m, seed=seed)
    theirs = reference(
        input_ids=source, attention_mask=mask.long(), decoder_input_ids=target
    ).logits
    assert (theirs - model(source, target, mask)).abs().max() < 1e-10


# transformers divides by length ** alpha, and not by the paper's ((5 + length) / 6) ** alpha: with alpha = 0 both rank by log p
@pytest.mark.parametrize(
    "options",
    [dict(num_beams=1), dict(num_beams=4, length_penalty=0.0)],
    ids=["greedy", "beam"],
)
def test_writes_what_marian_writes(marian, options):
    reference, model = marian
    source, _, mask = pairs(rows=12, n=9, seed=5)
    theirs = reference.generate(
        input_ids=source,
        attention_mask=mask.long(),
        max_new_tokens=18,
        do_sample=False,
        early_stopping=False,
        **options,
    )
    ours = model.generate(source, mask, max_new_tokens=18, **options)
    assert torch.equal(theirs[:, 1:], ours)
    lengths = (ours != PAD).sum(1)
    assert len(lengths.unique()) > 1  # some end early


# ---- the parts: one matrix of words, places, where dropout acts


@every_kind
def test_words_are_scaled_and_places_are_added(kind):
    model, ids = shaken(kind), pairs()[0]
    table = model.embedding.positions.weight if "positions" in kind else waves(24, 12)
    for start in (0, 5, 17):
        expected = (
            model.embedding.words.weight[ids] * 12**0.5 + table[start : start + 7]
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
            "embedding.words.weight"
        ]
    target, source = (
        10 + target % 10,
        20 + source % 10,
    )  # words 3 to 9 are in neither: only the softmax has them
    parts = {}
    for name, ids in (
        ("softmax", slice(3, 10)),
        ("target", slice(10, 20)),
        ("source", slice(20, 30)),
    ):
        before = model(source, target, mask)
        model.embedding.words.weight.data[ids] += 0.1
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
    assert model.embedding.words.weight.std().item() == pytest.approx(
        64**-0.5, rel=0.02
    )
    assert model.embedding.positions.weight.std().item() == pytest.approx(
        0.5**0.5, rel=0.02
    )  # the size of the waves
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == (1 if name.endswith("norm.weight") else 0)).all(), name
        elif not name.startswith("embedding"):
            assert parameter.abs().max().item() == pytest.approx(
                (6 / sum(parameter.shape)) ** 0.5, rel=0.02
            ), name  # Xavier's bound


def test_dropout_acts_on_the_embeddings_and_on_every_sub_layer():
    model = shaken(dropout=0.3)
    sub_layers = {
        "encoder": ("attention", "feed_forward"),
        "decoder": ("attention", "cross", "feed_forward"),
    }
    expected = {
        f"{side}.layers.{i}.{path}_path.dropout"
        for side, paths in sub_layers.items()
        for path in paths
        for i in range(2)
    }
    found = {
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.Dropout) and part.p > 0
    }
    assert found == expected | {"embedding.dropout"} and {
        model.get_submodule(name).p for name in found
    } == {0.3}
    assert all(
        part.attend.dropout == 0
        for name, part in model.named_modules()
        if hasattr(part, "attend")
    )


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
def test_a_hidden_word_of_the_target_is_not_looked_at(kind, seed, place):
    model = shaken(kind)
    source, target, mask = pairs(seed=seed)
    target_mask = torch.ones_like(target, dtype=torch.bool)
    target_mask[:, place] = False
    other = target.clone()
    other[:, place] = 4 + (other[:, place] - 3) % 26
    a, b = (model(source, words, mask, target_mask) for words in (target, other))
    assert torch.allclose(
        a[target_mask], b[target_mask], rtol=0, atol=1e-12
    ) and not torch.allclose(a[:, place], b[:, place])


@settings(max_examples=12)
@given(kinds, seeds, st.integers(0, 5))
def test_a_word_changes_nothing_before_it(kind, seed, place):
    model = shaken(kind)
    source, target, mask = pairs(seed=seed)
    other = target.clone()
    other[:, place] = 4 + (other[:, place] - 3) % 26
    for target_mask in (None, torch.ones_like(target, dtype=torch.bool)):
        before, after = (
            model(source, words, mask, target_mask) for words in (target, other)
        )
        assert (
            torch.equal(before[:, :place], after[:, :place])
            and (before[:, place:] != after[:, place:]).any(-1).all()
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
def test_every_word_of_the_source_reaches_every_place(kind):
    model, (source, target, _) = shaken(kind), pairs()
    before = model(source, target)
    for place in range(7):
        other = source.clone()
        other[:, place] = 4 + (other[:, place] - 3) % 26
        assert (
            (model(source=other, target_in=target) - before).abs().amax(-1) > 1e-9
        ).all()
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
    for words in target.split(pieces, dim=1):
        part, state = model.decode(words, state)
        logits.append(part)
    assert torch.allclose(torch.cat(logits, 1), full, rtol=0, atol=1e-12)
    assert {cache.length for cache in state["past"]} == {sum(pieces)}


@settings(max_examples=12)
@given(kinds, seeds, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_hypotheses_of_a_sentence_share_its_memory(kind, seed, k, m, more):
    """k different beginnings for each of three sentences, then shuffled within the sentences, and continued."""
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
    assert state["memory"] is start["memory"]


# ---- writing


def without_cache(model, source, mask, max_new_tokens, num_beams, length_penalty):
    """The search of `generate` over a state of plain rows: every step is a whole pass over the words so far."""

    def step(last, state):
        state["words"] = torch.cat([state["words"], last[:, None]], 1)
        return model(state["source"], state["words"], state["mask"])[:, -1], state

    state = {"source": source, "mask": mask, "words": source[:, :0]}
    return beam_search(
        step,
        state,
        len(source),
        BOS,
        EOS,
        PAD,
        max_new_tokens,
        num_beams=num_beams,
        length_penalty=length_penalty,
    )


@every_kind
@pytest.mark.parametrize("num_beams, length_penalty", [(1, 0.6), (4, 0.6), (3, 0.0)])
def test_search_with_a_cache_equals_search_without(kind, num_beams, length_penalty):
    model = shaken(kind)
    source, _, mask = pairs(rows=5)
    bounds = mask.sum(1) + 8
    expected = without_cache(model, source, mask, bounds, num_beams, length_penalty)
    assert torch.equal(
        super(Transformer, model).generate(
            source, mask, bounds, num_beams, length_penalty
        ),
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
    words = model.generate(source, mask, max_new_tokens=10)
    best = model(
        source, nn.functional.pad(words[:, :-1], (1, 0), value=BOS), mask
    ).argmax(-1)
    unfinished = nn.functional.pad(
        (words[:, :-1] != EOS).cumprod(1).bool(), (1, 0), value=True
    )
    assert (
        torch.equal(words[unfinished], best[unfinished])
        and (words[~unfinished] == PAD).all()
    )


@pytest.mark.parametrize("num_beams", [1, 4])
def test_a_batch_is_written_as_its_sentences_alone(num_beams):
    """With the paper's search: alpha 0.6, and each sentence bound by its own length + 50."""
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
        Seq2Seq, "generate", lambda self, source, mask, *options: options
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
    """The same model, which never writes the end symbol, nor the padding."""
    decode = model.decode

    def never(words, state):
        logits, state = decode(words, state)
        logits[..., [PAD, EOS]] = -torch.inf
        return logits, state

    model.decode = never
    return model


@pytest.mark.parametrize("num_beams", [1, 4])
def test_a_sentence_becomes_at_most_fifty_words_longer(num_beams):
    source, _, mask = pairs(rows=3)
    written = endless(shaken(num_hidden_layers=1, max_position_embeddings=80)).generate(
        source, mask, num_beams=num_beams
    )
    assert (written != PAD).sum(1).tolist() == (mask.sum(1) + 50).tolist() and len(
        mask.sum(1).unique()
    ) > 1
    for mask_ in (mask, None):  # nor longer than there are places
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

    def watched(words, state):
        seen.append(
            [
                (x.untyped_storage().data_ptr(), x.shape, len(words))
                for x in state["memory"].keys_values
            ]
        )
        return decode(words, state)

    model.decode = watched
    model.generate(source, mask, max_new_tokens=5, num_beams=4)
    assert (
        len(seen) == 5
        and all(step == seen[0] for step in seen)
        and {shape for _, shape, _ in seen[0]} == {(2, 2, 3, 7, 4)}
    )
    assert {rows for _, _, rows in seen[0]} == {8}


# ---- what the heads look at

ENCODER, SELF, CROSS = (
    [f"{path}.attend" for path in paths]
    for paths in (
        ["encoder.layers.0.attention", "encoder.layers.1.attention"],
        ["decoder.layers.0.attention", "decoder.layers.1.attention"],
        ["decoder.layers.0.cross_attention", "decoder.layers.1.cross_attention"],
    )
)


def check_maps(maps, mask, steps):
    """Every layer recorded, every row of weights sums to one, nothing on hidden words or on later ones."""
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
    expected, words = (
        model(source, target, mask),
        model.generate(source, mask, max_new_tokens=5),
    )
    with record_attention(model) as maps:
        assert torch.allclose(model(source, target, mask), expected, rtol=0, atol=1e-12)
        check_maps(maps, mask, 6)
        assert torch.equal(model.generate(source, mask, max_new_tokens=5), words)
        check_maps(maps, mask, words.shape[1])
        written = dict(maps)
        model(source, nn.functional.pad(words[:, :-1], (1, 0), value=BOS), mask)
        assert all(
            torch.allclose(written[name], maps[name], rtol=0, atol=1e-12)
            for name in maps
        )  # step by step as all at once
    assert torch.equal(
        model.generate(source, mask, max_new_tokens=5, num_beams=3),
        written_by_beam(model, source, mask),
    )


def written_by_beam(model, source, mask):
    """The same search while it is recorded; its cross-attention, too, leaves out the padding."""
    with record_attention(model) as maps:
        words = model.generate(source, mask, max_new_tokens=5, num_beams=3)
    for name in CROSS:
        rows = mask.repeat_interleave(len(maps[name]) // len(mask), 0)
        assert (
            torch.allclose(maps[name].sum(-1), torch.ones((), dtype=torch.float64))
            and (maps[name].movedim(-1, 1)[~rows] == 0).all()
        )
    return words


# ---- where it runs (at its published sizes, compiled, in other precisions, from files: tests/zoo/test_models.py)


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


def test_a_step_of_writing_on_a_fake_accelerator():
    model = Transformer(SMALL).eval()
    with fake_device(), torch.no_grad():
        to_stand_in(model)
        source, mask = (
            torch.ones(2, 7, dtype=dtype, device=STAND_IN)
            for dtype in (torch.long, torch.bool)
        )
        state = reorder_state(
            model.encode(source, mask),
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
            and str(logits.device) == str(state["past"][0].keys.device) == STAND_IN
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
            "num_attention_heads must divide hidden_size; got 5 and 12",
        ),
        (dict(num_attention_heads=0), "num_attention_heads .*; got 0"),
        (dict(vocab_size=0), "vocab_size must be a whole number of at least 1; got 0"),
        (dict(dropout=1.0), "dropout .* got 1.0"),
        (
            dict(positions="rotary"),
            "positions must be one of sinusoidal, learned; got 'rotary'",
        ),
        (dict(max_position_embeddings=-1), "max_position.*; got -1"),
    ],
)
def test_configuration_refused(wrong, words):
    with pytest.raises(ConfigError, match=f"^{words}$"):
        replace(SMALL, **wrong)


@pytest.mark.no_shapes
def test_an_odd_width_has_no_waves():
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
            dict(source=torch.ones(3, 25, dtype=torch.long), source_mask=None),
            "source: expected at most 24 words, the number of positions; got 25",
        ),
        (
            dict(target_in=torch.ones(3, 25, dtype=torch.long)),
            "target_in: expected at most 24 words, the number of positions; got 25",
        ),
        (
            dict(source_mask=torch.ones(3, 6, dtype=torch.bool)),
            r"source_mask: expected a boolean mask of shape \(3, 7\), .*; got bool of shape \(3, 6\)",
        ),
        (
            dict(source_mask=torch.ones(3, 7)),
            r"source_mask: expected a boolean mask of shape \(3, 7\), .*; got float32 of shape \(3, 7\)",
        ),
        (
            dict(target_mask=torch.ones(3, 7, dtype=torch.bool)),
            r"target_mask: expected a boolean mask of shape \(3, 6\), .*; got bool of shape \(3, 7\)",
        ),
        (
            dict(target_in=torch.ones(2, 6, dtype=torch.long)),
            "source and target_in: expected one batch size; got 3 and 2",
        ),
        (
            dict(source=torch.rand(3, 7)),
            r"source: expected token ids, .*; got float32 of shape \(3, 7\)",
        ),
        (
            dict(source=torch.ones(3, 0, dtype=torch.long)),
            r"source: expected at least one row and one token; got int64 of shape \(3, 0\)",
        ),
    ],
)
def test_forward_refuses(change, words):
    source, target, mask = pairs()
    with pytest.raises(InputError, match=f"^{words}$"):
        Transformer(SMALL)(
            **{"source": source, "target_in": target, "source_mask": mask, **change}
        )


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "change, words",
    [
        (
            dict(source=torch.ones(3, 25, dtype=torch.long), source_mask=None),
            "source: expected at most 24 words, the number of positions; got 25",
        ),
        (
            dict(max_new_tokens=25),
            "max_new_tokens: expected at most 24, the number of positions; got 25",
        ),
        (
            dict(max_new_tokens=0),
            "max_new_tokens must be a whole number of at least 1; got 0",
        ),
        (dict(num_beams=0), "num_beams must be .* at least 1; got 0"),
        (
            dict(num_beams=2, length_penalty=-1.0),
            "length_penalty must be at least 0; got -1.0",
        ),
        (
            dict(source_mask=torch.ones(3, 8, dtype=torch.bool)),
            r"source_mask: expected a boolean mask of shape \(3, 7\), .*; got bool of shape \(3, 8\)",
        ),
        (
            dict(source_mask=torch.arange(3)[:, None].expand(3, 7) != 1),
            "source_mask: expected at least one True in every row; row 1 hides everything",
        ),
        (
            dict(source=torch.full((3, 7), 30)),
            "source: expected ids from 0 to 29; got 30",
        ),
        (dict(source=torch.full((3, 7), -1)), "source: .* got -1"),
        (
            dict(source=torch.ones(7, dtype=torch.long)),
            r"source: expected token ids, whole numbers of shape \(b, n\); got int64 of shape \(7,\)",
        ),
    ],
)
def test_generate_refuses(change, words):
    source, _, mask = pairs()
    with pytest.raises(InputError, match=f"^{words}$"), warnings.catch_warnings():
        warnings.simplefilter("error")
        Transformer(SMALL).generate(**{"source": source, "source_mask": mask, **change})


@pytest.mark.no_shapes
def test_decode_beyond_the_places_is_refused():
    model, (source, _, mask) = Transformer(SMALL).eval(), pairs()
    with torch.no_grad():
        _, state = model.decode(
            torch.ones(3, 24, dtype=torch.long), model.encode(source, mask)
        )
        with pytest.raises(
            InputError,
            match="^positions: expected places within 0 to 23; got 1 from 24 on$",
        ):
            model.decode(torch.ones(3, 1, dtype=torch.long), state)


@pytest.mark.no_shapes
def test_a_checkpoint_of_another_size_is_refused(tmp_path):
    an.create_model("transformer_tiny", vocab_size=30).save_pretrained(
        tmp_path / "model"
    )
    with pytest.raises(
        CheckpointError,
        match=r"1 misshapen: embedding\.words\.weight \(30, 128\) for \(31, 128\)$",
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
