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
    map_tensors,
    max_difference,
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
        lambda self, input_ids: (
            self.output(self.embedding(input_ids)) + torch.zeros(11),
            self.head(self.embedding(input_ids).mean(1)),
        ),
        lambda self, input_ids: (
            self.output(self.embedding(input_ids)),
            self.head(self.embedding(input_ids).mean(1) + torch.arange(6)),
        ),
        lambda self, input_ids: (
            self.output(self.embedding(input_ids.to("cpu"))),
            self.head(self.embedding(input_ids).mean(1)),
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
        toy,
        "forward",
        lambda self, input_ids: self.embedding(input_ids) * input_ids.max().item(),
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
    monkeypatch.setattr(
        toy, "forward", lambda self, input_ids: self.embedding(input_ids)
    )
    assert check_model("toy", "fake").without_gradient == ("head.weight", "head.bias")


def test_token_tasks_are_checked_with_the_loss_they_train_with():
    from attn_notes.training.losses import token_cross_entropy

    torch.manual_seed(0)
    logits, ids = torch.randn(2, 3, 7), torch.randint(7, (2, 3))
    loss, count = token_cross_entropy(logits, ids)
    for task, inputs, output in (
        ("translation", {"input_ids": ids[:, :1], "decoder_input_ids": ids}, logits),
        ("masked_language_modeling", {"input_ids": ids}, {"logits": logits}),
    ):
        assert torch.allclose(example_loss(task, output, inputs), loss / count)
    loss, count = token_cross_entropy(logits[:, :-1], ids[:, 1:])
    found = example_loss("causal_language_modeling", logits, {"input_ids": ids})
    assert torch.allclose(found, loss / count)


def test_classes_have_cross_entropy_and_everything_else_the_mean_square():
    logits = torch.randn(4, 3)
    expected = nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0]))
    for task in ("image_classification", "text_classification"):
        assert torch.equal(example_loss(task, logits, {}), expected)
    square = logits.square().mean()
    assert torch.equal(example_loss("token_classification", logits[None], {}), square)
    boxes = [{"boxes": torch.ones(2, 4), "labels": torch.tensor([1])}]
    tree = {"logits": logits, "more": [boxes, None, 3]}
    for task in ("image_classification", "detection", "translation"):
        assert torch.allclose(example_loss(task, tree, {}), square + 1)
    with pytest.raises(an.InputError, match="expected a floating tensor"):
        example_loss("detection", {"labels": torch.tensor([1])}, {})


class Detector(nn.Module):
    """Inputs and outputs as a detector has them: lists of dictionaries."""

    def __init__(self, config):
        super().__init__()
        self.conv = nn.Conv2d(3, config.hidden_size, 1)

    def forward(self, images, targets=None):
        pooled = [self.conv(image).mean((1, 2)) for image in images]
        shift = [t["boxes"].mean() for t in targets]
        return [{"boxes": p + s} for p, s in zip(pooled, shift, strict=True)]

    @staticmethod
    def example_inputs(config, batch_size, device=None):
        images = [torch.randn(3, 4 + i, 5, device=device) for i in range(batch_size)]
        targets = [{"boxes": torch.rand(2, 4, device=device)} for _ in images]
        return {"images": images, "targets": targets}


def test_lists_of_images_and_targets_travel_too(toy):
    config = an.model_info("toy").config
    registry.register_models(
        Detector,
        {"detector": {"config": config, "parameters": 24}},
        paper="nobody",
        year=2026,
        chapter="none",
        task="detection",
    )
    for device in ("fake", "cpu"):
        found = check_model("detector", device, batch_size=3)
        assert (found.parameters, found.without_gradient) == (24, ())


def test_the_largest_difference_is_over_the_whole_tree():
    a = {"x": torch.zeros(2), "y": [torch.tensor([1, 2]), torch.empty(0)]}
    assert max_difference(a, a) == 0
    b = {"x": torch.tensor([0.5, -2]), "y": a["y"]}
    assert max_difference(a, b) == 2
    c = {"x": a["x"], "y": [torch.tensor([1, 3]), torch.empty(0)]}
    assert (
        max_difference(a, c)
        == float("inf")
        == max_difference(torch.zeros(2), torch.zeros(1, 2))
    )
    assert map_tensors(lambda x: len(x), {"a": (torch.ones(3), "b")}) == {"a": (3, "b")}


@pytest.mark.no_shapes
def test_bad_questions(toy):
    with pytest.raises(an.ConfigError, match="unknown model"):
        check_model("toi", "fake")
    with pytest.raises(an.ConfigError, match="is to be had here; got"):
        check_model("toy", "nonsense")
    with pytest.raises(an.ConfigError, match="unknown field"):
        check_model("toy", "fake", depth=3)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator here")
@pytest.mark.parametrize("name", an.list_models())
def test_every_model_on_the_accelerator_equals_the_cpu(name):
    assert check_model(name).difference < 1e-3
