"""What `make gpu` does, tried on the CPU where no accelerator is: each check tells the
right from the wrong, and a check that breaks or hangs costs its row alone."""

import json
import time

import pytest
import torch

from attn_notes.training import gpu
from attn_notes.zoo.factory import create_model, example_inputs
from attn_notes.zoo.registry import list_models, model_info

NAME = "transformer_tiny"


@pytest.mark.parametrize("check", gpu.CHECKS.values(), ids=list(gpu.CHECKS))
@pytest.mark.slow
@pytest.mark.no_shapes
def test_checks_pass(check, monkeypatch):
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: torch.nn.Module.compile
    )
    for row in check(NAME, "cpu"):
        assert row["passed"], row


def test_a_planted_difference_is_noticed(monkeypatch):
    monkeypatch.setattr(gpu, "moved", lambda inputs, device: example_inputs(NAME, 4))
    assert not all(row["passed"] for row in gpu.check_equal(NAME, "cpu"))


def test_a_resume_that_forgets_is_noticed(monkeypatch):
    monkeypatch.setattr(gpu.ExampleTask, "batches", lambda task, epoch: [[task.steps]])
    (row,) = gpu.check_resumed(NAME, "cpu")
    assert row["passed"] is False


def test_what_is_checked():
    assert gpu.check_names("equal") == list_models()
    classes = [model_info(name).model for name in gpu.check_names("compile")]
    assert len(set(classes)) == len(classes)
    chapters = [model_info(name).chapter for name in gpu.check_names("time")]
    assert len(set(chapters)) == len(chapters)


def test_inputs_are_lengthened():
    inputs = gpu.lengthened(example_inputs(NAME, 3), 64)
    assert {value.shape for value in inputs.values()} == {(3, 64)}
    create_model(NAME)(**inputs)


@pytest.mark.slow
def test_a_check_that_breaks_costs_its_row():
    (row,) = gpu.in_process("equal", "no_such_model", "cpu", time.monotonic() + 60)
    assert row["passed"] is False and "no_such_model" in row["error"]
    (row,) = gpu.in_process("equal", NAME, "cpu", time.monotonic())
    assert row["kind"] == "skipped" and "no time" in row["why"]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_without_an_accelerator_it_says_so(capsys):
    assert gpu.main([]) == 0
    assert "no accelerator" in capsys.readouterr().out


def test_stored_answers_are_whole():
    for path in (gpu.artifacts_folder() / "gpu").glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert rows[0]["kind"] == "device" and rows[0]["name"]
        assert {row["name"] for row in rows[1:] if row["kind"] == "equal"} <= set(
            list_models()
        )
