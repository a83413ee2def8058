"""Folders and files as other libraries really write them, read by formats made of the
helpers: GPT-2 and BERT of transformers, a training checkpoint of timm's ViT, and the
.npz of the Vision Transformer's authors."""

import argparse
import json
from dataclasses import dataclass

import numpy
import pytest
import torch
from torch import nn

import attn_notes as an
from attn_notes.zoo import registry
from attn_notes.zoo.formats import (
    CheckpointFormat,
    concat,
    rename,
    resize_positions,
    strip_prefix,
    transpose,
)
from attn_notes.zoo.hub import PretrainedMixin
from attn_notes.zoo.registry import register_models


@dataclass(frozen=True)
class Config:
    hidden_size: int = 8
    num_hidden_layers: int = 1
    max_position_embeddings: int = 6
    num_classes: int = 3


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.in_proj, self.linear1 = nn.Linear(d, 3 * d), nn.Linear(d, 4 * d)

    def forward(self, x):
        return self.in_proj(x), self.linear1(x)


class Body(nn.Module, PretrainedMixin):
    """Positions, blocks and a classifier: enough of a model to be filled."""

    classifier = ("head.*",)

    def __init__(self, config):
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.positions = nn.Parameter(torch.zeros(config.max_position_embeddings, d))
        self.layers = nn.ModuleList(Block(d) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(d, config.num_classes)


BLOCK = r"layers.\1."
GPT2 = CheckpointFormat(
    "GPT-2 of transformers",
    recognize=lambda keys: any(key.endswith("attn.c_attn.weight") for key in keys),
    convert=lambda state, model: rename(
        transpose(strip_prefix(state, "transformer."), ["*.c_*.weight"]),
        [
            (r"^wpe\.weight$", "positions"),
            (r"^h\.(\d+)\.attn\.c_attn\.", rf"{BLOCK}in_proj."),
            (r"^h\.(\d+)\.mlp\.c_fc\.", rf"{BLOCK}linear1."),
        ],
    ),
    config=lambda config: {
        "hidden_size": config["n_embd"],
        "num_hidden_layers": config["n_layer"],
        "max_position_embeddings": config["n_positions"],
    },
    ignore=("*.attn.bias", "*.masked_bias"),
    optional=("wte.*", "h.*", "ln_f.*", "lm_head.*"),
    absent=("head.*",),
)


def from_bert(state, model):
    state = strip_prefix(state, "bert.")
    parts = ("query", "key", "value")
    joined = {
        rf"{BLOCK}in_proj.\2": [
            rf"encoder\.layer\.(\d+)\.attention\.self\.{part}\.(weight|bias)"
            for part in parts
        ]
    }
    state = rename(
        concat(state, joined),
        [
            (r"^embeddings\.position_embeddings\.weight$", "positions"),
            (r"^encoder\.layer\.(\d+)\.intermediate\.dense\.", rf"{BLOCK}linear1."),
            (r"^classifier\.", "head."),
        ],
    )
    n = model.config.max_position_embeddings
    return {**state, "positions": resize_positions(state["positions"], n)}


BERT = CheckpointFormat(
    "BERT of transformers",
    recognize=lambda keys: any(".attention.self.query." in key for key in keys),
    convert=from_bert,
    config=lambda config: {
        "hidden_size": config["hidden_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "max_position_embeddings": config["max_position_embeddings"],
        "num_classes": len(config["id2label"]),
    },
    ignore=("*position_ids",),
    optional=("embeddings.*", "encoder.*", "pooler.*"),
)
TIMM = CheckpointFormat(
    "ViT of timm",
    recognize=lambda keys: "blocks.0.attn.qkv.weight" in keys,
    convert=lambda state, model: rename(
        {**state, "pos_embed": state["pos_embed"][0]},
        [
            ("^pos_embed$", "positions"),
            (r"^blocks\.(\d+)\.attn\.qkv\.", rf"{BLOCK}in_proj."),
            (r"^blocks\.(\d+)\.mlp\.fc1\.", rf"{BLOCK}linear1."),
        ],
    ),
    optional=("cls_token", "patch_embed.*", "blocks.*", "norm.*"),
)


def from_jax(state, model):
    """Kernels are (inputs, outputs), of the heads (inputs, heads, channels)."""
    d = model.config.hidden_size
    state = {
        key: value.flatten(value.ndim - 2)
        if key.endswith("bias") and value.ndim == 2
        else value.reshape(d, d)
        if value.ndim == 3 and key.endswith("kernel")
        else value
        for key, value in state.items()
    }
    block = r"Transformer/encoderblock_(\d+)/"
    attention = rf"{block}MultiHeadDotProductAttention_1/"
    state = transpose(state, ["*/kernel"])
    joined = {
        rf"{BLOCK}in_proj.{ours}": [
            rf"{attention}{part}/{theirs}" for part in ("query", "key", "value")
        ]
        for ours, theirs in (("weight", "kernel"), ("bias", "bias"))
    }
    state = rename(
        concat(state, joined),
        [
            ("^Transformer/posembed_input/pos_embedding$", "positions"),
            (rf"^{block}MlpBlock_3/Dense_0/", rf"{BLOCK}linear1."),
            ("^head/", "head."),
            (r"\.kernel$", ".weight"),
        ],
    )
    return {**state, "positions": state["positions"][0]}


JAX = CheckpointFormat(
    "ViT of its authors",
    recognize=lambda keys: "Transformer/posembed_input/pos_embedding" in keys,
    convert=from_jax,
    optional=("Transformer/*", "embedding/*", "cls"),
)


@pytest.fixture
def body(monkeypatch):
    monkeypatch.setattr(registry, "_MODELS", {})
    monkeypatch.setattr(registry, "read_index", dict)
    register_models(
        Body,
        {"body": {"config": Config(), "parameters": 587}},
        paper="nobody",
        year=2026,
        chapter="none",
        task="text_classification",
        formats=(GPT2, BERT, TIMM, JAX),
    )
    torch.manual_seed(0)


def perturb(model):
    """Every weight its own, so that no two can be taken for each other."""
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value))
    return model.eval()


@pytest.mark.slow
def test_gpt2_in_shards(body, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=6
    )
    theirs = perturb(transformers.GPT2LMHeadModel(config))
    theirs.save_pretrained(tmp_path / "gpt2", max_shard_size="2KB")
    assert len(list((tmp_path / "gpt2").glob("model-*-of-*.safetensors"))) > 1
    with pytest.warns(an.CheckpointWarning) as caught:
        ours = an.create_model("body", pretrained=tmp_path / "gpt2")
    said = str(caught[0].message)
    assert "skipped, not in this model: " in said and "ln_f.weight" in said
    assert "not in this format, left as they were: head.weight, head.bias" in said
    assert (ours.config.num_hidden_layers, ours.config.hidden_size) == (2, 8)
    x = torch.randn(3, 8)
    for block, layer in zip(theirs.transformer.h, ours.layers, strict=True):
        expected = block.attn.c_attn(x), block.mlp.c_fc(x)
        for a, b in zip(layer(x), expected, strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    assert torch.equal(ours.positions, theirs.transformer.wpe.weight)


@pytest.mark.slow
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_bert_with_parts_that_we_join_and_positions_of_another_number(
    body, tmp_path, safe
):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=7,
        num_labels=5,
    )
    theirs = perturb(transformers.BertForSequenceClassification(config))
    folder = tmp_path / "bert"
    theirs.save_pretrained(folder)
    if not safe:  # as before safetensors
        (folder / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    with pytest.warns(
        an.CheckpointWarning, match="skipped, not in this.*encoder.layer"
    ):
        ours = an.create_model("body", pretrained=folder)
    assert ours.config == Config(8, 2, 7, 5)
    x = torch.randn(3, 8)
    for block, layer in zip(theirs.bert.encoder.layer, ours.layers, strict=True):
        attention = block.attention.self
        parts = [part(x) for part in (attention.query, attention.key, attention.value)]
        joined, hidden = layer(x)
        assert torch.allclose(joined, torch.cat(parts, -1), atol=1e-6)
        assert torch.allclose(hidden, block.intermediate.dense(x), atol=1e-6)
    table = theirs.bert.embeddings.position_embeddings.weight
    assert torch.equal(ours.positions, table)
    assert torch.equal(ours.head.weight, theirs.classifier.weight)
    with pytest.warns(an.CheckpointWarning, match="re-initialized.*head.weight"):
        longer = an.create_model(
            "body", folder, max_position_embeddings=13, num_classes=2
        )
    assert torch.allclose(longer.positions[::2], table, atol=1e-6)


@pytest.mark.slow
def test_a_training_checkpoint_as_official_scripts_write_it(body, tmp_path):
    timm = pytest.importorskip("timm")
    sizes = dict(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2)
    theirs = perturb(timm.models.VisionTransformer(**sizes, num_classes=3))
    averaged = perturb(timm.models.VisionTransformer(**sizes, num_classes=3))
    optimizer = torch.optim.AdamW(theirs.parameters())
    theirs(torch.randn(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    path = tmp_path / "checkpoint.pth"
    content = {
        "model": theirs.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1).state_dict(),
        "epoch": 299,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="vit", lr=5e-4, distributed=True, seed=0),
        "model_ema": {f"module.{k}": v for k, v in averaged.state_dict().items()},
    }
    torch.save(content, path)
    size = {"num_hidden_layers": 2, "max_position_embeddings": 5}
    with pytest.warns(an.CheckpointWarning, match="skipped, not in.*cls_token"):
        ours = an.create_model("body", path, **size)
    qkv = averaged.blocks[1].attn.qkv.weight
    assert torch.equal(ours.layers[1].in_proj.weight, qkv)
    assert torch.equal(ours.head.weight, averaged.head.weight)
    del content["model_ema"]
    torch.save(content, path)
    with pytest.warns(an.CheckpointWarning):
        last = an.create_model("body", path, **size)
    assert torch.equal(last.head.weight, theirs.head.weight)


def test_the_npz_of_the_vision_transformer(body, tmp_path):
    numpy.random.seed(0)
    d, heads, hidden = 8, 2, 32
    attention = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1"
    mlp = "Transformer/encoderblock_0/MlpBlock_3"
    shapes = {
        "cls": (1, 1, d),
        "embedding/kernel": (4, 4, 3, d),
        "embedding/bias": (d,),
        "Transformer/posembed_input/pos_embedding": (1, 6, d),
        **{
            f"{attention}/{part}/{kind}": shape
            for part in ("query", "key", "value")
            for kind, shape in (
                ("kernel", (d, heads, d // heads)),
                ("bias", (heads, d // heads)),
            )
        },
        f"{mlp}/Dense_0/kernel": (d, hidden),
        f"{mlp}/Dense_0/bias": (hidden,),
        "head/kernel": (d, 3),
        "head/bias": (3,),
    }
    theirs = {
        key: numpy.random.randn(*shape).astype("float32")
        for key, shape in shapes.items()
    }
    numpy.savez(tmp_path / "ViT.npz", **theirs)
    with pytest.warns(an.CheckpointWarning, match="skipped, not in this model: cls"):
        ours = an.create_model("body", tmp_path / "ViT.npz")
    x = torch.randn(3, d)
    projected, hidden = ours.layers[0](x)
    for place, part in enumerate(("query", "key", "value")):
        kernel = torch.tensor(theirs[f"{attention}/{part}/kernel"])
        bias = torch.tensor(theirs[f"{attention}/{part}/bias"])
        expected = torch.einsum("nd,dhc->nhc", x, kernel) + bias
        found = projected[:, place * d : place * d + d]
        assert torch.allclose(found, expected.flatten(1), atol=1e-5)
    expected = x @ torch.tensor(theirs[f"{mlp}/Dense_0/kernel"])
    expected += torch.tensor(theirs[f"{mlp}/Dense_0/bias"])
    assert torch.allclose(hidden, expected, atol=1e-5)


def test_an_index_of_transformers_names_its_size_too(body, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    text = {"metadata": {"total_size": 4}, "weight_map": {"a": "model-1.safetensors"}}
    index.write_text(json.dumps(text))
    with pytest.raises(an.CheckpointError, match="no checkpoint file at .*model-1"):
        an.create_model("body", index)
