"""A run that is killed goes on as if it had not been."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from training_toy import RECIPE

HERE = Path(__file__).parent
# the moment a run is killed, and the step of the checkpoint it must leave
MOMENTS = {
    "in a forward pass": 6,
    "between gradient and update": 3,
    "half a checkpoint": 5,
    "before the rename": 3,
    "after the rename": 6,
    "half a line": 6,
    "while evaluating": 10,
    "": 12,
    "while evaluating, averaging": 10,
    ", averaging": 12,
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """What became of the runs that killed_runs.py killed."""
    command = [
        sys.executable,
        str(HERE / "killed_runs.py"),
        str(tmp_path_factory.mktemp("killed")),
        *MOMENTS,
        "from outside",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("moment", [*MOMENTS, "from outside"])
def test_killed_run_resumes_to_the_same_weights(killed, moment):
    unbroken = ", averaging" if moment.endswith(", averaging") else ""
    run, whole = killed[moment], killed[unbroken]
    assert run["killed"] == (0 if moment == unbroken else signal.SIGKILL)
    assert run["step"] == MOMENTS.get(moment, run["step"])
    assert run["digest"] == whole["digest"]
    assert run["steps"] == list(range(1, RECIPE.max_steps + 1))
    assert run["parts"] == []
