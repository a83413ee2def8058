"""What `train` is given, and what a task answers: one line, before a step."""

import os

import pytest
import torch
from training_toy import RECIPE, Toy, ToyModel, toy_model

from attn_notes.foundations.checks import ConfigError, InputError
from attn_notes.training.loop import train
from attn_notes.training.processes import launched_rank, make_accelerator

pytestmark = pytest.mark.no_shapes


def run(model=None, task=None, recipe=RECIPE, **options):
    model = toy_model() if model is None else model
    train(model, task or Toy(), recipe, progress=False, **options)
    return model.state_dict()


def born_in_inference():
    with torch.inference_mode():
        return toy_model()


def lazy():
    model = toy_model()
    model.more = torch.nn.LazyLinear(3)
    return model


@pytest.mark.parametrize(
    "given, said",
    [
        ({"model": "transformer_tiny"}, "model: expected"),
        ({"model": ToyModel}, "model: expected"),
        ({"model": toy_model().to("meta")}, "on the device meta"),
        ({"model": lazy()}, "not initialized"),
        ({"model": born_in_inference()}, "inference_mode"),
        ({"task": Toy}, "task: expected"),
        ({"task": ["a pair"]}, "without setup, dataset"),
        ({"recipe": {"max_steps": 2}}, "recipe: expected"),
        ({"recipe": None}, "recipe: expected"),
    ],
)
def test_what_can_not_be_trained(given, said):
    with pytest.raises(ConfigError, match=said):
        run(**given)


def test_gradients_that_are_switched_off():
    with torch.no_grad(), pytest.raises(ConfigError, match="expected gradients"):
        run()


def token(task, model, batch):
    return Toy.loss(task, model, batch)["token"][0]


@pytest.mark.parametrize(
    "method, answer, said",
    [
        ("counts", lambda s, b: None, "task.counts"),
        ("counts", lambda s, b: {"token": -3}, "task.counts"),
        ("counts", lambda s, b: {"token": float("inf")}, "task.counts"),
        ("counts", lambda s, b: {"token": "many"}, "task.counts"),
        ("counts", lambda s, b: {"token": torch.ones(3)}, "task.counts"),
        ("loss", token, "task.loss"),
        ("loss", lambda s, m, b: {"token": token(s, m, b)}, "task.loss"),
        ("loss", lambda s, m, b: {"token": (torch.ones(3), 1.0)}, "task.loss"),
        ("loss", lambda s, m, b: {"token": (token(s, m, b), None)}, "task.loss"),
        ("loss", lambda s, m, b: {"token": (token(s, m, b).detach(), 1)}, "gradient"),
        ("batches", lambda s, e: iter([[0]]), "batches as a sequence"),
        ("batches", lambda s, e: {"a": [0]}, "batches as a sequence"),
        ("batches", lambda s, e: [[10**6]], "numbers from 0 to 59"),
        ("batches", lambda s, e: [[0.5]], "numbers from 0 to 59"),
        ("batches", lambda s, e: [3], "numbers from 0 to 59"),
        ("dataset", lambda s, split: iter([1]), "as a sequence"),
        ("dataset", lambda s, split: {"a": 1}, "as a sequence"),
        ("collate", lambda s, examples: None, "batch: expected"),
        ("evaluate", lambda s, *a, **k: 3.0, "task.evaluate"),
        ("evaluate", lambda s, *a, **k: [1], "task.evaluate"),
    ],
)
def test_answers_of_a_task(method, answer, said):
    task = type("Mine", (Toy,), {method: answer})()
    with pytest.raises((ConfigError, InputError), match=said) as caught:
        run(task=task)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "left",
    [
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        {"ACCELERATE_USE_DEEPSPEED": "true"},
        {"ACCELERATE_TORCH_DEVICE": "meta"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
        {"PMI_SIZE": "2", "PMI_RANK": "1"},
    ],
    ids=str,
)
def test_the_recipe_alone_decides(monkeypatch, left):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    accelerator = make_accelerator(RECIPE, None)
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.device.type != "meta"
    assert {name: os.environ[name] for name in left} == left


@pytest.mark.parametrize(
    "name, value",
    [
        ("MASTER_PORT", "abc"),
        ("MASTER_PORT", ""),
        ("MASTER_PORT", "99999999"),
        ("MASTER_ADDR", "no such host."),
    ],
)
def test_a_place_where_processes_can_not_meet(monkeypatch, name, value):
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    told |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29512"}
    for key, one in {**told, name: value}.items():
        monkeypatch.setenv(key, one)
    with pytest.raises(ConfigError, match=name):
        launched_rank()
