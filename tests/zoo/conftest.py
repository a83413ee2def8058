"""Toys to put through the zoo, registered for the length of one test: tied weights, a
head of num_classes, a buffer."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from attn_notes.foundations.checks import check_fields
from attn_notes.foundations.values import Size
from attn_notes.zoo import registry
from attn_notes.zoo.formats import CheckpointFormat, rename
from attn_notes.zoo.hub import PretrainedMixin
from attn_notes.zoo.registry import register_models


@dataclass(frozen=True)
class ToyConfig:
    vocab_size: Size = 11
    hidden_size: Size = 6
    num_classes: Size = 3
    widths: tuple[Size, ...] = (4, 5)

    def __post_init__(self):
        check_fields(self)


class Toy(nn.Module, PretrainedMixin):
    classifier = ("head.*",)

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.output.weight = self.embedding.weight
        self.head = nn.Linear(config.hidden_size, config.num_classes)
        self.register_buffer("scale", torch.full((1,), 2.0))

    def forward(self, input_ids):
        x = self.embedding(input_ids) * self.scale
        return self.output(x), self.head(x.mean(1))

    @staticmethod
    def example_inputs(config, batch_size, device=None):
        ids = torch.randint(config.vocab_size, (batch_size, 7), device=device)
        return {"input_ids": ids}


class OtherToy(Toy):
    pass


ELSEWHERE = CheckpointFormat(
    "elsewhere",
    recognize=lambda keys: "emb.w" in keys,
    convert=lambda state, model: rename(
        state, [(r"^emb\.w$", "embedding.weight"), (r"^fc\.", "head.")]
    ),
    config=lambda config: {
        "hidden_size": config["n_embd"],
        "num_classes": len(config.get("id2label", "abc")),
    },
    ignore=("*.position_ids",),
    optional=("pooler.*",),
)


@pytest.fixture
def toy(monkeypatch):
    """The names toy, toy_wide and other_toy, and nothing of the book."""
    monkeypatch.setattr(registry, "_MODELS", {})
    monkeypatch.setattr(registry, "read_index", dict)
    common = dict(
        paper="nobody",
        year=2026,
        chapter="none",
        task="classification",
        formats=(ELSEWHERE,),
        tiny={"hidden_size": 2},
    )
    register_models(
        Toy,
        {
            "toy": {
                "config": ToyConfig(),
                "parameters": 87,
                "reported": {"accuracy": 0.5},
            },
            "toy_wide": {"config": ToyConfig(hidden_size=12), "parameters": 171},
        },
        **common,
    )
    register_models(
        OtherToy, {"other_toy": {"config": ToyConfig(), "parameters": 87}}, **common
    )
    torch.manual_seed(0)
    return Toy
