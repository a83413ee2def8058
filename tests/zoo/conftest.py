"""A toy to put through the zoo, registered for the length of one test: tied weights, a head of num_classes, a buffer."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from attn_notes.foundations.checks import check_positive
from attn_notes.zoo import registry
from attn_notes.zoo.checkpoints import Layout, PretrainedMixin


@dataclass(frozen=True)
class ToyConfig:
    vocab_size: int = 11
    hidden_size: int = 6
    num_classes: int = 3
    widths: tuple[int, ...] = (4, 5)

    def __post_init__(self):
        check_positive(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_classes=self.num_classes,
        )


class Toy(nn.Module, PretrainedMixin):
    heads = ("head.*",)

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.output.weight = self.embedding.weight
        self.head = nn.Linear(config.hidden_size, config.num_classes)
        self.register_buffer("scale", torch.full((1,), 2.0))

    def forward(self, ids):
        x = self.embedding(ids) * self.scale
        return self.output(x), self.head(x.mean(1))

    @staticmethod
    def example_inputs(config, batch_size, device=None):
        return (torch.randint(config.vocab_size, (batch_size, 7), device=device),)


class OtherToy(Toy):
    pass


ELSEWHERE = Layout(
    "elsewhere",
    recognise=lambda keys: "emb.w" in keys,
    rename=((r"^emb\.w$", "embedding.weight"), (r"^fc\.", "head.")),
    auxiliary=("pooler.*",),
)


@pytest.fixture
def toy(monkeypatch):
    """The names toy, toy_wide and other_toy, and nothing of the book."""
    monkeypatch.setattr(registry, "_MODELS", {})
    monkeypatch.setattr(registry, "MODEL_MODULES", [])
    known = dict(
        paper="nobody",
        chapter="none",
        task="classification",
        layouts=(ELSEWHERE,),
        tiny={"hidden_size": 2},
    )
    registry.register_model(
        "toy", ToyConfig(), parameters=87, figures={"accuracy": 0.5}, **known
    )(Toy)
    registry.register_model(
        "toy_wide", ToyConfig(hidden_size=12), parameters=171, **known
    )(Toy)
    registry.register_model("other_toy", ToyConfig(), parameters=87, **known)(OtherToy)
    torch.manual_seed(0)
    return Toy
