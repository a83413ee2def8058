"""BERT: equal to transformers' on the same weights, with every head; what must not
change anything does not; and the files that it is read from."""

import json
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import attn_notes as an
from attn_notes.foundations.attention import record_attention
from attn_notes.foundations.masks import lengths_mask
from attn_notes.foundations.packing import PackedTokens
from attn_notes.language.bert import HF_FORMAT, Bert, BertConfig
from attn_notes.training.optimizers import AdamWithoutCorrection
from attn_notes.training.recipes import make_optimizer
from attn_notes.zoo.factory import count_parameters, create_model, example_inputs

SIZES = {
    "vocab_size": 60,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
}
SMALL = BertConfig(**SIZES, dropout=0.0)
HEADS = {  # of ours, and of transformers
    "": "BertModel",
    "_pretraining": "BertForPreTraining",
    "_masked_lm": "BertForMaskedLM",
    "_sequence": "BertForSequenceClassification",
    "_token": "BertForTokenClassification",
    "_span": "BertForQuestionAnswering",
}
every_head = pytest.mark.parametrize("head", HEADS)
LAYOUTS = Path(__file__).parent / "layouts"


def small(head="", seed=0, **change):
    """Ours in double precision, shaken: no bias is zero, no norm neutral."""
    torch.manual_seed(seed)
    config = replace(SMALL, **change)
    model = create_model(f"bert_base{head}", **asdict(config)).double().eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


def reference(head, seed=0, **change):
    """transformers' model with this head, shaken too."""
    transformers = pytest.importorskip("transformers")
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**SIZES | options | change)
    torch.manual_seed(seed)
    model = getattr(transformers, HEADS[head])(config).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


def batch(rows=3, n=9, seed=0, shortest=1):
    """Ids, mask and segments; the first row has no padding."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (rows, n), generator=random)
    lengths = torch.randint(shortest, n + 1, (rows,), generator=random)
    lengths[0] = n
    types = torch.randint(2, (rows, n), generator=random)
    return {
        "input_ids": ids,
        "attention_mask": lengths_mask(lengths, n),
        "token_type_ids": types,
    }


def outputs(found, mask):
    """The output tensors, those of single tokens where they are real."""
    values = [found] if isinstance(found, torch.Tensor) else list(found.values())
    return [
        x[mask] if x.shape[:2] == mask.shape else x for x in values if x is not None
    ]


def ours(model, inputs):
    """The output tensors of ours, at real tokens."""
    found = model(**inputs)
    if not isinstance(found, torch.Tensor):
        found = {key: found[key] for key in found.keys()}
    return outputs(found, inputs["attention_mask"])


# ---- the size


@pytest.mark.parametrize(
    "d, layers, wide, bare, with_heads",
    [
        (768, 12, 3072, 109_482_240, 110_106_428),
        (1024, 24, 4096, 335_141_888, 336_226_108),
    ],
)
def test_counts(d, layers, wide, bare, with_heads):
    name = {768: "bert_base", 1024: "bert_large"}[d]
    block = 4 * (d * d + d) + (d * wide + wide) + (wide * d + d) + 2 * 2 * d
    by_hand = (30_522 + 512 + 2 + 2) * d + layers * block + d * d + d
    head = (d * d + d) + 2 * d + 30_522 + (2 * d + 2)
    assert by_hand == bare and by_hand + head == with_heads
    for suffix, count in (("", bare), ("_pretraining", with_heads)):
        assert count_parameters(create_model(name + suffix, device="meta")) == count


# ---- equal to transformers


@every_head
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_outputs_and_gradients_equal_transformers(head, training, tmp_path):
    theirs = reference(head, num_labels=3 if head in ("_sequence", "_token") else 2)
    theirs.save_pretrained(tmp_path)
    model = create_model(f"bert_base{head}", tmp_path).double().train(training)
    theirs = theirs.double().train(training)
    inputs = batch()
    mask = inputs["attention_mask"]
    found = ours(model, inputs)
    expected = theirs(**inputs | {"attention_mask": mask.long()})
    expected = outputs(dict(expected), mask)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() < 1e-10
    for values in (found, expected):
        random = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=random) for x in values]
        sum((x * w).sum() for x, w in zip(values, weights, strict=True)).backward()
    grads = {k: p.grad for k, p in theirs.named_parameters() if p.grad is not None}
    grads = HF_FORMAT.apply(grads, model)
    named = dict(model.named_parameters())
    assert set(grads) == set(named)
    for key, p in named.items():
        assert (p.grad - grads[key]).abs().max() < 1e-10, key


@pytest.mark.parametrize("act", ["gelu_new", "gelu_pytorch_tanh"])
def test_the_other_gelu(act, tmp_path):
    theirs = reference("_masked_lm", hidden_act=act)
    theirs.save_pretrained(tmp_path)
    model = create_model("bert_base_masked_lm", tmp_path).double()
    assert model.config.activation == "gelu_tanh"
    inputs = batch()
    expected = theirs.double()(inputs["input_ids"]).logits
    assert (model(inputs["input_ids"]) - expected).abs().max() < 1e-10


# ---- what changes nothing


@every_head
@settings(max_examples=5)
@given(seed=st.integers(0, 999))
def test_padding_and_company_change_nothing(head, seed):
    model, inputs = small(head), batch(seed=seed)
    mask = inputs["attention_mask"]
    with torch.no_grad():
        together = ours(model, inputs)
        other = dict(inputs, input_ids=inputs["input_ids"].masked_fill(~mask, 3))
        for a, b in zip(together, ours(model, other), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-12)
        starts = [0, *mask.sum(1).cumsum(0).tolist()]
        for i in range(3):
            n = int(mask[i].sum())
            alone = ours(model, {k: v[i : i + 1, :n] for k, v in inputs.items()})
            for a, b in zip(together, alone, strict=True):
                rows = (
                    slice(starts[i], starts[i + 1]) if len(a) != 3 else slice(i, i + 1)
                )
                assert torch.allclose(a[rows], b, rtol=0, atol=1e-12)


@every_head
def test_packed_tokens_are_the_same(head):
    model, inputs = small(head), batch()
    packed = PackedTokens(inputs["attention_mask"])
    found = model(**inputs | {"attention_mask": packed})
    if not isinstance(found, torch.Tensor):
        found = {key: found[key] for key in found.keys()}
    found = outputs(found, packed.mask)
    expected = ours(model, inputs)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
    sum(x.sum() for x in found).backward()
    packed_gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    sum(x.sum() for x in expected).backward()
    for p, g in zip(model.parameters(), packed_gradients, strict=True):
        assert torch.allclose(p.grad, g, rtol=0, atol=1e-9)


@pytest.mark.parametrize("head", ["_pretraining", "_masked_lm"])
def test_predicted_positions_are_selected(head):
    model, inputs = small(head), batch()
    predicted = torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) < 0.3
    every, some = model(**inputs), model(**inputs, predicted=predicted)
    if head == "_pretraining":
        every, some = every.prediction_logits, some.prediction_logits
    assert torch.allclose(some, every[predicted], rtol=0, atol=1e-12)
    none = model(**inputs, predicted=torch.zeros_like(predicted))
    none = none.prediction_logits if head == "_pretraining" else none
    assert none.shape == (0, 60)


def test_order_segments_and_both_sides_count():
    model, inputs = small(), batch(rows=1)
    x = model(**inputs).last_hidden_state
    swapped = dict(inputs, input_ids=inputs["input_ids"].flip(1))
    assert not torch.allclose(model(**swapped).last_hidden_state.flip(1), x)
    other = dict(inputs, token_type_ids=1 - inputs["token_type_ids"])
    assert not torch.allclose(model(**other).last_hidden_state, x)
    first = torch.autograd.grad(x[0, 4].sum(), model.embedding.positions.weight)[0]
    assert (first[:9].abs().sum(1) > 0).all()


def test_recorded_attention():
    model, inputs = small("_pretraining"), batch()
    with torch.no_grad(), record_attention(model) as maps:
        found = ours(model, inputs)
    assert len(maps) == SMALL.num_hidden_layers
    for weights in maps.values():
        assert weights.shape == (3, SMALL.num_attention_heads, 9, 9)
        hidden = ~inputs["attention_mask"][:, None, None]
        assert (weights * hidden).abs().max() == 0
        assert torch.allclose(weights.sum(-1), torch.ones(3, 3, 9).double())
    for a, b in zip(found, ours(model, inputs), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


# ---- bad input

IDS = torch.ones(2, 9, dtype=torch.long)
BAD = {
    "longer than the positions": (dict(input_ids=IDS.repeat(1, 2)), "input_ids"),
    "no row": (dict(input_ids=IDS[:0]), "input_ids"),
    "floats": (dict(input_ids=IDS.double()), "input_ids"),
    "one text": (dict(input_ids=IDS[0]), "input_ids"),
    "a mask of numbers": (dict(attention_mask=IDS), "attention_mask"),
    "a shorter mask": (dict(attention_mask=IDS[:, :8].bool()), "attention_mask"),
    "a packed mask": (
        dict(attention_mask=PackedTokens(IDS[:, :8].bool())),
        "attention_mask",
    ),
    "fewer segments": (dict(token_type_ids=IDS[:, :8]), "token_type_ids"),
    "segments of one row": (dict(token_type_ids=IDS[:1]), "token_type_ids"),
    "boolean segments": (dict(token_type_ids=IDS.bool()), "token_type_ids"),
}


@pytest.mark.no_shapes
@every_head
@pytest.mark.parametrize("given, name", BAD.values(), ids=BAD)
def test_bad_input(head, given, name):
    with pytest.raises(an.InputError, match=rf"^{name}: expected .*; got .*") as caught:
        small(head)(**{"input_ids": IDS} | given)
    assert "\n" not in str(caught.value)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "predicted", [IDS, IDS[:, :8].bool(), IDS[0].bool(), [[True]]], ids="wsol"
)
@pytest.mark.parametrize("head", ["_pretraining", "_masked_lm"])
def test_bad_predicted(head, predicted):
    with pytest.raises(an.InputError, match=r"^predicted: expected .*; got"):
        small(head)(IDS, predicted=predicted)


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "change",
    [
        dict(num_attention_heads=5),
        dict(vocab_size=0),
        dict(hidden_size=12.5),
        dict(dropout=1.0),
        dict(pad_token_id=60),
        dict(num_classes=0),
        dict(type_vocab_size=0),
        dict(max_position_embeddings=0),
        dict(activation="relu"),
    ],
    ids=str,
)
def test_bad_configurations(change):
    with pytest.raises(an.ConfigError, match=f"{next(iter(change))}: expected .*; got"):
        replace(SMALL, **change)


# ---- files


def test_saved_and_read_back(tmp_path):
    model = small("_sequence", num_classes=4).float()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(action="error"):
        again = create_model("bert_base_sequence", tmp_path)
    assert again.config == model.config
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


FOLDERS = {  # what may be without, in ours
    ("", "_pretraining"): "skipped, not in this model: predictions",
    ("", "_masked_lm"): "left as they were: pooler",
    ("_sequence", "_pretraining"): "left as they were: classifier",
    ("_token", "_pretraining"): "skipped, not in this model:.*bert.pooler",
    ("_masked_lm", "_pretraining"): "skipped, not in this model:.*seq_relationship",
    ("_pretraining", ""): "left as they were: predictions",
    ("_span", "_sequence"): "left as they were: spans",
}


@pytest.mark.parametrize("heads, said", FOLDERS.items(), ids=map(str, FOLDERS))
@pytest.mark.parametrize("book", [True, False], ids=["ours", "transformers"])
def test_the_encoder_of_another_head(heads, said, book, tmp_path):
    head, other = heads
    theirs = small(other).float() if book else reference(other)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(an.CheckpointWarning, match=said):
        model = create_model(f"bert_base{head}", tmp_path)
    state = HF_FORMAT.apply(theirs.state_dict(), model) if not book else {}
    for key, value in (state or theirs.state_dict()).items():
        plain = key.removeprefix("bert.")
        found = getattr(model, "bert", model).state_dict().get(plain)
        assert found is None or torch.equal(found, value)
    assert all("encoder" not in key for key in model.not_loaded)


@pytest.mark.parametrize("single", [False, True], ids=["folder", "file"])
@pytest.mark.parametrize("book", [True, False], ids=["ours", "transformers"])
@pytest.mark.parametrize(
    "head, other", [("_token", "_sequence"), ("_sequence", "_token")]
)
def test_the_classifier_of_another_head(head, other, book, single, tmp_path):
    theirs = small(other).float() if book else reference(other)
    theirs.save_pretrained(tmp_path)
    given = tmp_path / "model.safetensors" if single else tmp_path
    sizes = SIZES if single else {}
    if single and not book and other == "_sequence":  # old taggers have a pooler too
        with pytest.warns(an.CheckpointWarning, match="skipped.*bert.pooler.weight"):
            create_model("bert_base_token", given, **sizes)
        return
    said = "re-initialized, of another task: classifier.weight, classifier.bias"
    with pytest.warns(an.CheckpointWarning, match=said):
        model = create_model(f"bert_base{head}", given, **sizes)
    assert {"classifier.weight", "classifier.bias"} <= {*model.not_loaded}
    assert not torch.equal(model.classifier.weight, theirs.classifier.weight)
    with warnings.catch_warnings(action="error"):
        create_model(f"bert_base{other}", given, **sizes)


def test_another_number_of_classes(tmp_path):
    reference("_sequence", num_labels=4).save_pretrained(tmp_path)
    assert create_model("bert_base_sequence", tmp_path).config.num_classes == 4
    with pytest.warns(an.CheckpointWarning, match="re-initialized.*classifier.weight"):
        create_model("bert_base_sequence", tmp_path, num_classes=2)


def layout(name):
    """A file with the keys of an official one, each dimension made small."""
    keys = json.loads((LAYOUTS / f"bert_{name}.json").read_text())["keys"]
    size = {30_522: 60, 768: 12, 3072: 20, 512: 16, 2: 2}
    random = numpy.random.default_rng(0)
    return {
        key: random.normal(size=[size[n] for n in shape]).astype("float32")
        for key, shape in keys.items()
    }


TWELVE = {**SIZES, "num_hidden_layers": 12, "dropout": 0.0}


@pytest.mark.parametrize("layout_name, prefix", [
    ("transformers", True), ("transformers", False)
], ids=["with bert.", "without"])  # fmt: skip
def test_an_old_file_of_transformers(layout_name, prefix, tmp_path):
    state = {k: torch.tensor(v) for k, v in layout(layout_name).items()}
    embeddings = state["bert.embeddings.word_embeddings.weight"]
    state["cls.predictions.decoder.weight"] = embeddings
    state["bert.embeddings.position_ids"] = torch.arange(16)[None]
    name = "bert_base_pretraining"
    if not prefix:  # as BertModel wrote it
        state = {k[5:]: v for k, v in state.items() if k.startswith("bert.")}
        name = "bert_base"
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path)
    with warnings.catch_warnings(action="error"):
        model = create_model(name, path, **TWELVE)
    encoder = getattr(model, "bert", model)
    front = "bert." if prefix else ""
    gamma = state[f"{front}encoder.layer.7.output.LayerNorm.gamma"]
    assert torch.equal(encoder.encoder.layers[7].norm2.weight, gamma)
    key = state[f"{front}encoder.layer.3.attention.self.key.weight"]
    assert torch.equal(encoder.encoder.layers[3].attention.in_proj_weight[12:24], key)
    if prefix:
        transformers = pytest.importorskip("transformers")
        for old, new in (("gamma", "weight"), ("beta", "bias")):
            state = {k.replace(old, new): v for k, v in state.items()}
        config = transformers.BertConfig(**SIZES | {"num_hidden_layers": 12})
        theirs = transformers.BertForPreTraining(config).eval()
        theirs.load_state_dict(state, strict=False), theirs.tie_weights()
        inputs = batch(n=7)
        found, expected = model(**inputs), theirs(**inputs)
        for key in found.keys():
            assert torch.allclose(found[key], expected[key], rtol=1e-4, atol=1e-4)


def test_the_npz_of_the_authors(tmp_path):
    arrays = layout("tensorflow")
    slots = {f"{k}/adam_{x}": v for k, v in arrays.items() for x in "mv"}
    extra = {"global_step": numpy.array(1_000_000)}
    numpy.savez(tmp_path / "bert.npz", **arrays, **slots, **extra)
    with warnings.catch_warnings(action="error"):
        model = create_model("bert_base_pretraining", tmp_path / "bert.npz", **TWELVE)
    x = torch.randn(4, 12)
    at = "bert/encoder/layer_5/intermediate/dense/"
    expected = x @ torch.tensor(arrays[f"{at}kernel"]) + torch.tensor(
        arrays[f"{at}bias"]
    )
    layer = model.bert.encoder.layers[5]
    assert torch.allclose(layer.feed_forward.linear1(x), expected, atol=1e-5)
    for place, part in enumerate(("query", "key", "value")):
        kernel = arrays[f"bert/encoder/layer_5/attention/self/{part}/kernel"]
        rows = layer.attention.in_proj_weight[place * 12 : place * 12 + 12]
        assert torch.equal(rows, torch.tensor(kernel.T))
    pair = torch.tensor(arrays["cls/seq_relationship/output_weights"])
    assert torch.equal(model.seq_relationship.weight, pair)
    bias = torch.tensor(arrays["cls/predictions/output_bias"])
    assert torch.equal(model.predictions.decoder.bias, bias)


@pytest.mark.parametrize(
    "head, names",
    [
        ("_sequence", ("output_weights", "output_bias")),
        ("_span", ("cls/squad/output_weights", "cls/squad/output_bias")),
    ],
)
def test_fine_tuned_by_the_authors_code(head, names, tmp_path):
    arrays = {k: v for k, v in layout("tensorflow").items() if "cls" not in k}
    arrays |= {names[0]: numpy.ones((2, 12), "f"), names[1]: numpy.full(2, 3.0, "f")}
    numpy.savez(tmp_path / "tuned.npz", **arrays)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if head == "_sequence" else "ignore")
        model = create_model(f"bert_base{head}", tmp_path / "tuned.npz", **TWELVE)
    layer = model.classifier if head == "_sequence" else model.spans
    assert (layer.weight == 1).all() and (layer.bias == 3).all()


REFUSED = [
    ({"position_embedding_type": "relative"}, "position_embedding_type: expected abs"),
    ({"hidden_act": "relu"}, "hidden_act: expected gelu or gelu_new"),
    ({"is_decoder": True}, "is_decoder: expected False"),
    ({"layer_norm_eps": 1e-5}, "layer_norm_eps: expected 1e-12"),
    ({"model_type": "roberta"}, "model_type: expected bert; got 'roberta'"),
    ({"hidden_size": "wide"}, "hidden_size: expected a whole number"),
    ({"id2label": 7}, "config.json"),
    ({"vocab_size": None}, "vocab_size: expected"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert")
    reference("_sequence").save_pretrained(path)
    return path


@pytest.mark.parametrize("change, said", REFUSED, ids=str)
def test_folders_of_another_kind(folder, change, said, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    (tmp_path / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()
    )
    with pytest.raises(an.CheckpointError, match=said) as caught:
        create_model("bert_base_sequence", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_or_with_half_of_them(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(an.CheckpointError, match="holds no model.safetensors"):
        create_model("bert_base_sequence", tmp_path)
    state = load_file(folder / "model.safetensors")
    half = {k: v for k, v in state.items() if "layer.1" not in k}
    save_file(half, tmp_path / "model.safetensors")
    with pytest.raises(an.CheckpointError, match="16 missing|12 missing"):
        create_model("bert_base_sequence", tmp_path)
    del state["bert.encoder.layer.1.attention.self.key.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(an.CheckpointError, match="expected 3 parts to join"):
        create_model("bert_base_sequence", tmp_path)


def test_the_configuration_of_the_authors(tmp_path):
    """bert_config.json has no labels, no padding and no kind."""
    config = {**SIZES, "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    config |= {"hidden_act": "gelu", "initializer_range": 0.02, "type_vocab_size": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = reference("_pretraining").state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    model = create_model("bert_base_pretraining", tmp_path)
    assert model.config == BertConfig(**SIZES, dropout=0.2)


def test_the_papers_optimizer_spares_norms_and_biases():
    recipe = an.model_info("bert_base_pretraining").recipes["paper"]
    optimizer = make_optimizer(Bert(SMALL), recipe)
    assert isinstance(optimizer, AdamWithoutCorrection)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0.0]
    assert optimizer.param_groups[0]["eps"] == 1e-6


def test_example_inputs_fit_small_positions():
    for n in (1, 2, 16):
        small_one = dict(SIZES, max_position_embeddings=n)
        model = create_model("bert_base", **small_one)
        assert model(**example_inputs("bert_base", **small_one)).pooler_output.shape[1]
