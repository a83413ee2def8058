"""The notebooks are clean and stored with their outputs, and the re-run notices what it
must."""

import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from book import ROOT, Cell, notebook_paths, read_book, reading_order, split_directives

NOTEBOOKS = notebook_paths(ROOT / "nbs")
LARGEST = 500_000
PRIVATE = re.compile(r"/(home|root|tmp|work|Users)/|\bat 0x[0-9a-f]{6,}")


def test_the_book_has_a_reading_order():
    order = [
        chapter
        for _, chapters in reading_order([n.name for n in read_book()])
        for chapter in chapters
    ]
    assert len(order) == len(set(order)) == len(NOTEBOOKS) - 1


@pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs"))
)
def test_clean(path):
    """No execution counts or stray metadata, no errors or warnings, outputs where a
    cell ends in a value, nothing private."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < LARGEST
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[
        0
    ].source.startswith("# ")
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags", "slideshow"}, cell.source
        if cell.cell_type == "code":
            assert cell.source.strip(), "an empty code cell"
            assert cell.execution_count is None, cell.source
            for output in cell.outputs:
                shown = output.get("data", {})
                assert not shown.get("text/plain", "").startswith("<Figure") or any(
                    kind.startswith("image/") for kind in shown
                ), f"{cell.id}: a figure without its picture: style() was not called"
                assert output.output_type != "error", (
                    f"{cell.source}\n{output.get('evalue')}"
                )
                assert output.get("name") != "stderr", cell.source
                text = output.get("text", "") + "".join(
                    str(v)
                    for k, v in output.get("data", {}).items()
                    if not k.startswith("image/png")
                )
                assert not PRIVATE.search(text), (
                    f"{cell.source}\nshows {PRIVATE.search(text)}"
                )


@pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs"))
)
def test_has_been_run(path):
    """Some cell shows something, where there is code at all."""
    code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    ran = [
        c
        for c in code
        if split_directives(c.source)[1].get("eval") != "false"
        and "export" not in split_directives(c.source)[1]
    ]
    assert not ran or any(c.outputs for c in code), (
        "no cell has an output: run the notebook"
    )


CELLS = {
    "digit": "import torch\nprint(3.25)\nx = torch.ones(2, 3)",
    "chinese": "'梯度消失'",
    "shape": "x.shape",
    "quiet": "x.sum();",
    "timing": "#| timing\nimport time; time.time()",
    "not run": "#| eval: false\nraise SystemExit",
    "stderr": "import sys; print('progress', file=sys.stderr)",
}


@pytest.fixture(scope="module")
def small_book(tmp_path_factory):
    """A notebook made and stored by the book's own tools."""
    folder = tmp_path_factory.mktemp("book")
    shutil.copy(ROOT / "nbs" / "conftest.py", folder)
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in CELLS.values()]
    )
    nbformat.write(notebook, folder / "small.ipynb")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; "
        "import notebooks; notebooks.execute(Path(sys.argv[2]))"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "tools"), str(folder / "small.ipynb")],
        check=True,
    )
    return folder


def rerun(folder, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment |= variables
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--nbval",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "--color=no",
            str(folder),
        ],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_stored_outputs_pass(small_book):
    result = rerun(small_book)
    assert result.returncode == 0, result.stdout
    assert f"{len(CELLS) - 1} passed" in result.stdout


def test_kernels_keep_no_history_on_disk(small_book, tmp_path):
    """All kernels would write to one file, and one that waits for it too long says so
    in the output of whatever cell is being run."""
    result = rerun(small_book, IPYTHONDIR=str(tmp_path))
    assert result.returncode == 0, result.stdout
    assert (tmp_path / "profile_default").is_dir()
    assert not [*tmp_path.rglob("history*")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "old, new",
    [
        ("3.25", "3.26"),
        ("梯度消失", "梯度爆炸"),
        ("[2, 3]", "[3, 2]"),
        ("3.25", "-3.25"),
    ],
)
def test_changed_output_fails(small_book, tmp_path, old, new):
    """A digit, a Chinese character, a shape or a sign changed in a stored output is
    noticed."""
    shutil.copytree(small_book, tmp_path, dirs_exist_ok=True)
    notebook = json.loads((tmp_path / "small.ipynb").read_text(encoding="utf-8"))
    changed = 0
    for cell in notebook["cells"]:
        text = json.dumps(cell.get("outputs"), ensure_ascii=False)
        cell["outputs"] = json.loads(text.replace(old, new))
        changed += text.count(old)
    (tmp_path / "small.ipynb").write_text(
        json.dumps(notebook, ensure_ascii=False), encoding="utf-8"
    )
    result = rerun(tmp_path)
    assert changed and result.returncode == 1 and "1 failed" in result.stdout, (
        result.stdout
    )


def test_missing_output_fails(small_book, tmp_path):
    """A cell that shows something and is stored without it is noticed, although its
    execution count is dropped."""
    shutil.copytree(small_book, tmp_path, dirs_exist_ok=True)
    notebook = nbformat.read(tmp_path / "small.ipynb", as_version=4)
    notebook.cells[1].outputs = []
    nbformat.write(notebook, tmp_path / "small.ipynb")
    assert "1 failed" in rerun(tmp_path).stdout


def test_lines_for_jupyter_alone_are_left_out_and_no_others():
    source = "%matplotlib inline\n!ls\nif (a\n    != b or c\n    % d):\n    pass"
    assert len(Cell("x", "code", source, {}, [], "", 0).tree.body) == 1


COMMENT = re.compile(r"^%(?!%)", re.MULTILINE)  # a line that the site leaves out


def comments(path):
    "Lines of prose and of Markdown outputs that the site would take for comments."
    for cell in nbformat.read(path, as_version=4).cells:
        texts = [cell.source] if cell.cell_type == "markdown" else []
        for output in cell.get("outputs", ()):
            texts.append(output.get("data", {}).get("text/markdown", ""))
        yield from (line for text in texts for line in COMMENT.findall(text))


@pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs"))
)
def test_no_line_is_lost(path):
    assert not list(comments(path))


def test_a_lost_line_is_noticed(tmp_path):
    table = nbformat.v4.new_output(
        "display_data", {"text/markdown": "| a |\n|---|\n\n% of 9,894 tokens: 41"}
    )
    code = nbformat.v4.new_code_cell("table", outputs=[table])
    notebook = nbformat.v4.new_notebook(cells=[code])
    nbformat.write(notebook, tmp_path / "a.ipynb")
    assert list(comments(tmp_path / "a.ipynb"))
