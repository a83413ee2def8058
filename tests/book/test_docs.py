"""docs/ and README.md are what the committed notebooks build to, byte for byte: a stale
page fails, and so does an unstable build."""

import re
import subprocess
import sys
from html import unescape

import pytest
from book import ROOT, read_book


def files(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A second build, in another folder and another process."""
    folder = tmp_path_factory.mktemp("site")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import build; from pathlib "
        "import Path; out = Path(sys.argv[2]); "
        "build.build_site(out / 'docs'); (out / "
        "'README.md').write_text(build.readme(), encoding='utf-8')"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "tools" / "site"), str(folder)],
        check=True,
    )
    return folder


def test_docs_are_fresh(fresh):
    built, committed = files(fresh / "docs"), files(ROOT / "docs")
    assert sorted(built) == sorted(committed), "pages come or go: run make docs"
    stale = [name for name in built if built[name] != committed[name]]
    assert not stale, f"stale pages; run make docs: {stale[:10]}"


def test_readme_is_fresh(fresh):
    assert (fresh / "README.md").read_text(encoding="utf-8") == (
        ROOT / "README.md"
    ).read_text(encoding="utf-8"), "run make docs"


def test_readme_shows_no_cell_that_hides_its_code():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    index = next(notebook for notebook in read_book() if notebook.name == "index")
    hidden = [c for c in index.code() if c.directives.get("echo") == "false"]
    assert hidden
    for cell in hidden:
        assert not [line for line in cell.source.split("\n") if line and line in text]


def test_links_and_pictures_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    assert any(target.endswith(".svg") for target in targets)
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_docs_name_no_folder_of_this_machine():
    for name, content in files(ROOT / "docs").items():
        if name.endswith((".html", ".js", ".css", ".md")):
            assert str(ROOT).encode() not in content, name


def shown_outputs(notebook):
    """The first lines of the plain text that a page has to show."""
    for cell in notebook.code():
        if "hide" in cell.directives or cell.directives.get("output") == "false":
            continue
        for output in cell.outputs:
            data = output.get("data", {})
            text = output.get("text") if output.get("name") == "stdout" else None
            if set(data) == {"text/plain"}:
                text = data["text/plain"]
            if text and text.strip():
                yield "".join(text.strip().splitlines()[0].split())


@pytest.mark.parametrize("notebook", read_book(), ids=lambda n: n.name)
def test_every_text_that_a_cell_puts_out_is_on_its_page(notebook):
    page = ROOT / "docs" / f"{notebook.name}.html"
    plain = re.sub(r"<[^>]*>", "", page.read_text(encoding="utf-8"))
    plain = "".join(unescape(plain).split())
    assert [text for text in shown_outputs(notebook) if text not in plain] == []


def test_every_page_with_maths_brings_what_sets_it():
    pages = [p.read_text("utf-8") for p in (ROOT / "docs").rglob("*.html")]
    with_maths = [page for page in pages if 'class="math ' in page]
    assert with_maths and all("tex-svg.js" in page for page in with_maths)


def test_every_label_of_an_equation_has_become_its_number():
    shown = []
    for path in sorted((ROOT / "docs").rglob("*.html")):
        text = re.sub(r"<[^>]*>", "", path.read_text(encoding="utf-8"))
        labels = re.findall(r"\(eq-[\w-]+\)|\{#[\w-]+\}|\{eq\}", text)
        shown += [f"{path.relative_to(ROOT / 'docs')}: {label}" for label in labels]
    assert shown == []
