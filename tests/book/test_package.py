"""The committed package is what the notebooks export, to the byte."""

import shutil
import subprocess
import sys
from pathlib import Path

from book import ROOT, read_book


def modules(package: Path) -> dict[str, str]:
    return {
        str(p.relative_to(package)): p.read_text(encoding="utf-8")
        for p in package.rglob("*.py")
    }


def test_export_is_the_committed_package(tmp_path):
    shutil.copytree(
        ROOT / "nbs",
        tmp_path / "nbs",
        ignore=shutil.ignore_patterns("artifacts", ".*", "__pycache__"),
    )
    shutil.copytree(
        ROOT / "tools",
        tmp_path / "tools",
        ignore=shutil.ignore_patterns("site", "__pycache__"),
    )
    for name in ("settings.ini", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run(
        [sys.executable, "tools/notebooks.py", "export"], cwd=tmp_path, check=True
    )
    exported, committed = modules(tmp_path / "attn_notes"), modules(ROOT / "attn_notes")
    assert sorted(exported) == sorted(committed), (
        "modules without a notebook, or notebooks not exported: run "
        "tools/notebooks.py export"
    )
    stale = [name for name in exported if exported[name] != committed[name]]
    assert not stale, (
        "these modules are not what their notebooks export; run tools/notebooks.py "
        f"export: {stale}"
    )


def test_every_module_has_one_notebook():
    exporting = [
        n.module
        for n in read_book()
        if n.module and any(cell.exports for cell in n.cells)
    ]
    assert len(exporting) == len(set(exporting))


def test_one_version():
    """nbdev, the package, pyproject.toml and the citation agree on the version."""
    import configparser
    import tomllib

    import attn_notes

    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    version = settings["DEFAULT"]["version"]
    assert attn_notes.__version__ == version
    assert (
        tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "version"
        ]
        == version
    )
    assert f"version: {version}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_make_bench_runs_the_command_line():
    """A module run with -m that has nothing to run ends quietly, and so did make bench,
    once."""
    command = subprocess.run(
        ["make", "-n", "--no-print-directory", "bench"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()[-1]
    shown = subprocess.run(
        f"{command} --help",
        shell=True,
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert shown.startswith("usage: attn-notes bench")
