"""The wheel, as a user gets it: built, installed into a clean environment, imported,
used."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from book import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of what a clone holds: the build leaves nothing behind."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(
        ROOT / "attn_notes",
        folder / "project" / "attn_notes",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "project")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--outdir",
            str(folder),
            str(folder / "project"),
        ],
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


def test_contents(wheel):
    """Every module and all package data, the licence, and nothing else."""
    names = zipfile.ZipFile(wheel).namelist()
    packed = {n for n in names if n.startswith("attn_notes/")}
    there = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "attn_notes").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert packed == there
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert all(name.startswith(("attn_notes/", "attn_notes-")) for name in names)


def closure(*names: str) -> set[str]:
    """These distributions and all that they need here, by their normal names."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of another system
            continue
        found.add(name)
        waiting += [
            re.match(r"[\w.-]+", need)[0] for need in needs if "extra ==" not in need
        ]
    return found


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of a clean environment with the wheel in it. torch and what it
    needs, several gigabytes, are linked from here; the rest is installed."""
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    place = next(folder.glob("lib/python*/site-packages"))
    for name in closure("torch", "torchvision"):
        files = metadata.files(name) or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            source = Path(metadata.distribution(name).locate_file(top))
            if source.exists() and not (place / top).exists():
                (place / top).symlink_to(source)
    subprocess.run(
        [
            python,
            "-m",
            "pip",
            "install",
            "-q",
            "--disable-pip-version-check",
            "-c",
            str(ROOT / "constraints.txt"),
            str(wheel),
        ],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    return python


def wheel_version() -> str:
    return re.search(
        r"^version = (\S+)",
        (ROOT / "settings.ini").read_text(encoding="utf-8"),
        re.MULTILINE,
    )[1]


def run(python, *arguments, cwd):
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST"))
    }
    return subprocess.run(
        [python, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def test_package(python, tmp_path):
    """It imports without the notebooks' extras, lists models and runs one."""
    code = """
import json, sys, torch, attn_notes as an
name = an.list_models()[0]
small = dict(an.model_info(name).tiny)
model, inputs = an.create_model(name, **small), an.example_inputs(name, **small)
output = model.eval()(**inputs)
heavy = sorted({"matplotlib", "sklearn"} & set(sys.modules))
print(json.dumps([an.__version__, an.list_models(), an.__file__, len(output), heavy]))
"""
    result = run(python, "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    version, models, place, rows, heavy = json.loads(result.stdout)
    assert version == wheel_version() and models and not heavy
    assert rows == 2 and str(ROOT / "attn_notes") not in place


def test_command_line(python, tmp_path):
    command = str(os.path.join(os.path.dirname(python), "attn-notes"))
    help_text = run(command, "--help", cwd=tmp_path)
    assert help_text.returncode == 0
    assert all(
        re.search(rf"\b{name}\b", help_text.stdout)
        for name in ("list", "info", "check", "train", "predict", "bench")
    ), help_text.stdout
    listed = run(command, "list", cwd=tmp_path)
    assert listed.returncode == 0 and listed.stdout.strip(), listed.stderr
    wrong = run(command, "info", "no_such_model", cwd=tmp_path)
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
