"""The signature of a task's `predict` says which options of the command it takes."""

from typing import Annotated

import pytest

from attn_notes.commands import predict
from attn_notes.foundations.values import Positive, Range, Size


class Painter:
    """A task that takes some of the options."""

    kind = "painting"

    def predict(
        self,
        model,
        inputs,
        temperature: Positive = 1.0,
        top_k: Size | None = None,
        top_p: Annotated[float, Range(0, 1, above=True)] | None = None,
        seed: int = 0,
    ):
        return [f"{text} {temperature} {top_k} {top_p} {seed}" for text in inputs]


class Looker:
    """A task that takes none."""

    kind = "looking"

    def predict(self, model, inputs):
        return list(inputs)


@pytest.fixture(params=[Painter])
def task(request, monkeypatch):
    monkeypatch.setattr(predict, "find_task", lambda arguments: (request.param(), None))
    monkeypatch.setattr(predict, "load_model", lambda name, folder: None)


def test_options_that_the_task_takes(task, ask):
    assert ask("predict", "any", "ab") == ["ab 1.0 None None 0"]
    given = "--temperature 0.5 --top-k 3 --top-p 1 --seed 8".split()
    assert ask("predict", "any", *given, "ab", "c") == [
        "ab 0.5 3 1.0 8",
        "c 0.5 3 1.0 8",
    ]


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "option, said",
    [
        ("--num-beams 3", "--num-beams: expected an option of painting (--temperature"),
        ("--max-new-tokens 3", "got one of another kind of task"),
        ("--temperature 0", "--temperature: expected a finite number above 0; got 0.0"),
        ("--top-p 1.5", "--top-p: expected a number from above 0 to 1, or None"),
        ("--top-p nan", "argument --top-p: expected a number from 0, such as 0.7"),
        ("--temperature -1", "argument --temperature: expected"),
        ("--temperature=-1", "argument --temperature: expected a number from 0"),
        ("--temperature 1e999", "argument --temperature: expected a number from 0"),
        ("--top-k 0", "argument --top-k: expected a whole number of at least 1"),
        ("--seed x", "argument --seed: expected a whole number from 0"),
    ],
)
def test_options_that_it_does_not(task, refused, option, said):
    assert said in refused("predict", "any", *option.split(), "ab")


@pytest.mark.no_shapes
@pytest.mark.parametrize("task", [Looker], indirect=True)
def test_a_task_without_options(task, refused):
    said = refused("predict", "any", "--seed", 3, "ab")
    assert "--seed: expected an option of looking (which has none)" in said


@pytest.mark.no_shapes
def test_the_shipped_translator_takes_a_beam_alone(refused):
    said = refused("predict", "transformer_tiny", "--top-k", 3, "in 5 days")
    assert "--top-k: expected an option of translation (--num-beams)" in said
