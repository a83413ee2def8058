"""One format, no lint, no type error: what a reader and an editor see of the code."""

import subprocess
import sys
from pathlib import Path

import pytest
from book import ROOT

TOOLS = Path(sys.executable).parent


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "format", "--check", "--quiet", "."),
        ("ruff", "check", "--quiet", "."),
        ("ty", "check", "--quiet", "attn_notes"),
    ],
    ids=["format", "lint", "types"],
)
def test_clean(command):
    found = subprocess.run(
        [TOOLS / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize(
    "code, command",
    [
        ("x = { 'a':1 }\n", ("ruff", "format", "--check", "--quiet")),
        ("import os\n", ("ruff", "check", "--quiet")),
        ("def f(x: int) -> str:\n    return x\n", ("ty", "check", "--quiet")),
    ],
    ids=["format", "lint", "types"],
)
def test_a_planted_fault_is_noticed(tmp_path, code, command):
    (tmp_path / "planted.py").write_text(code)
    found = subprocess.run(
        [TOOLS / command[0], *command[1:], tmp_path / "planted.py"],
        cwd=ROOT,
        capture_output=True,
    )
    assert found.returncode == 1
