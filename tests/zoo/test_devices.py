"""The stand-in device catches what was left on the CPU, and nothing else."""

import pytest
import torch
from torch import nn

import attn_notes as an
from attn_notes.zoo import registry
from attn_notes.zoo.devices import (
    STAND_IN,
    check_model,
    example_loss,
    fake_device,
    to_stand_in,
)


def test_a_clean_model_passes_at_its_published_size(toy):
    for name in an.list_models():
        found = check_model(name, "fake")
        assert (
            found.parameters == an.model_info(name).parameters
            and found.device == "fake"
            and found.without_gradient == ()
        )


def test_without_memory_size_does_not_matter(toy):
    assert (
        check_model("toy", "fake", vocab_size=10**9, hidden_size=10**3).parameters
        > 10**12
    )


@pytest.mark.parametrize(
    "slip",
    [
        lambda self, ids: (
            self.output(self.embedding(ids)) + torch.zeros(11),
            self.head(self.embedding(ids).mean(1)),
        ),
        lambda self, ids: (
            self.output(self.embedding(ids)),
            self.head(self.embedding(ids).mean(1) + torch.arange(6)),
        ),
        lambda self, ids: (
            self.output(self.embedding(ids.to("cpu"))),
            self.head(self.embedding(ids).mean(1)),
        ),
    ],
    ids=["mask", "index", "moved"],
)
def test_a_tensor_left_on_the_cpu_is_caught(toy, monkeypatch, slip):
    monkeypatch.setattr(toy, "forward", slip)
    assert check_model("toy", "cpu", hidden_size=6).device == "cpu"
    with pytest.raises(RuntimeError, match="cpu"):
        check_model("toy", "fake")


def test_values_can_not_be_looked_at(toy, monkeypatch):
    monkeypatch.setattr(
        toy, "forward", lambda self, ids: self.embedding(ids) * ids.max().item()
    )
    with pytest.raises(RuntimeError):
        check_model("toy", "fake")


def test_a_shared_weight_stays_shared_and_recurrent_lists_follow(toy):
    with fake_device():
        model = to_stand_in(an.create_model("toy", device="meta"))
        assert (
            model.output.weight is model.embedding.weight
            and str(model.scale.device) == STAND_IN
        )
        recurrent = to_stand_in(nn.LSTM(3, 4, 2, device="meta"))
        output, _ = recurrent(torch.empty(5, 2, 3, device=STAND_IN))
        output.sum().backward()
        assert str(recurrent.weight_ih_l1.grad.device) == STAND_IN


def test_the_default_is_an_accelerator_or_the_stand_in(toy):
    found = check_model("toy")
    assert found.device == "fake" or torch.accelerator.is_available()


def test_parameters_out_of_reach_are_named(toy, monkeypatch):
    monkeypatch.setattr(toy, "forward", lambda self, ids: self.embedding(ids))
    assert check_model("toy", "fake").without_gradient == ("head.weight", "head.bias")


def test_token_tasks_are_checked_with_the_loss_they_train_with():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 7), torch.randint(1, 7, (2, 3))
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
    assert torch.allclose(
        example_loss("translation", logits, (target, target)), expected
    )


@pytest.mark.no_shapes
def test_bad_questions(toy):
    with pytest.raises(an.ConfigError, match="unknown model"):
        check_model("toi", "fake")
    with pytest.raises(an.ConfigError, match="is not to be had"):
        check_model("toy", "nonsense")
    with pytest.raises(an.ConfigError, match="unknown field"):
        check_model("toy", "fake", depth=3)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator here")
@pytest.mark.parametrize("name", registry.list_models())
def test_every_model_on_the_accelerator_equals_the_cpu(name):
    assert check_model(name).difference < 1e-3
