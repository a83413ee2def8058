"""The committed package is what the notebooks export, to the byte."""
import shutil
import subprocess
import sys
from pathlib import Path

from book import ROOT, read_book


def modules(package: Path) -> dict[str, str]:
    return {str(p.relative_to(package)): p.read_text(encoding="utf-8") for p in package.rglob("*.py")}


def test_export_is_the_committed_package(tmp_path):
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns("artifacts", ".*", "__pycache__"))
    shutil.copytree(ROOT / "tools", tmp_path / "tools", ignore=shutil.ignore_patterns("site", "__pycache__"))
    for name in ("settings.ini", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run([sys.executable, "tools/notebooks.py", "export"], cwd=tmp_path, check=True)
    exported, committed = modules(tmp_path / "attn_notes"), modules(ROOT / "attn_notes")
    assert sorted(exported) == sorted(committed), "modules without a notebook, or notebooks not exported: run tools/notebooks.py export"
    stale = [name for name in exported if exported[name] != committed[name]]
    assert not stale, f"these modules are not what their notebooks export; run tools/notebooks.py export: {stale}"


def test_every_module_has_one_notebook():
    exporting = [n.module for n in read_book() if n.module and any(cell.exports for cell in n.cells)]
    assert len(exporting) == len(set(exporting))


def test_version_is_said_once():
    import configparser

    import attn_notes

    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    assert attn_notes.__version__ == settings["DEFAULT"]["version"]
    assert f'version: {attn_notes.__version__}' in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
