"""Two processes under torchrun compute what one computes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = str(Path(__file__).parent / "two_processes.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What one process found, and what two found."""
    found = []
    for launcher in (
        [],
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    ):
        folder = tmp_path_factory.mktemp("run")
        process = subprocess.Popen(
            [sys.executable, *launcher, SCRIPT, str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            said, _ = process.communicate(timeout=300)
        finally:
            process.terminate()  # torchrun then ends its processes too
        assert process.returncode == 0, said
        found.append(json.loads((folder / "found.json").read_text()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tokens", "accumulated", "sequences", "sgd"])
def test_same_losses(runs, recipe):
    one, two = runs
    assert (one["world"], two["world"]) == (1, 2)
    assert len(one[recipe]) == len(two[recipe])
    assert two[recipe] == pytest.approx(one[recipe], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["whole", "halves", "thirds", "workers"])
def test_same_terms_to_double_precision(runs, recipe):
    """Counts differ between processes, batches and terms."""
    one, two = (run[recipe] for run in runs)
    assert (one["looked"], two["looked"]) == (7, 4)  # of seven held-out images
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert b == pytest.approx(a, rel=1e-12)
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-12)
    if recipe in ("halves", "workers"):
        whole = runs[0]["whole"]
        for a, b in zip(whole["rows"], two["rows"], strict=True):
            assert b == pytest.approx(a, rel=1e-12)
        assert two["weights"] == pytest.approx(whole["weights"], rel=1e-12)


@pytest.mark.slow
def test_one_process_stops_all_and_they_resume(runs):
    for run in runs:
        assert run["stopped"] == "stopped after step 5"
        assert run["steps"] == list(range(1, 13)) and run["same"]
