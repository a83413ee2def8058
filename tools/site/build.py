"""Build docs/ and README.md from the notebooks and the outputs stored in them.

    python tools/site/build.py [--root DIR]      the project in DIR (default: this one)

Nothing is run and nothing is fetched; the same notebooks give the same bytes.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from book import ROOT, Notebook, offered_names, read_book, reading_order  # noqa: E402
from claims import main_chapters, main_parts, read_claims  # noqa: E402
from pictures import shorter  # noqa: E402
from reference import (  # noqa: E402
    REFERENCE,
    Symbol,
    api_pages,
    claims_page,
    find_symbols,
    models_page,
)
from stage import nested_contents, stage_notebook  # noqa: E402

# What the theme brings and this site does not use.
UNUSED = (
    "*.map",
    "*.LICENSE.txt",
    "_static/locales",
    "_static/images/logo_*",
    "_static/*.png",
    "_static/webpack-macros.html",
    "_static/sbt-webpack-macros.html",
    ".buildinfo",
    ".doctrees",
    "objects.inv",
    "_static/scripts/fontawesome.js",
    "_static/vendor/fontawesome/webfonts/fa-brands*",
    "_static/vendor/fontawesome/webfonts/fa-regular*",
)


def code_links(
    notebooks: list[Notebook], modules: dict[str, list[Symbol]]
) -> dict[str, dict[str, str]]:
    """For every page, the names in its code that the reference explains: those that it
    imports and those that it defines."""
    places = {
        module: {s.name: s.page for s in symbols} for module, symbols in modules.items()
    }
    everywhere = {
        name: page for names in places.values() for name, page in names.items()
    }
    offered = set(offered_names(notebooks))
    links = {}
    for notebook in notebooks:
        here = dict(places.get(notebook.module, {}))
        for cell in notebook.code():
            for node in ast.walk(cell.tree):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                    "attn_notes"
                ):
                    known = places.get(
                        node.module.removeprefix("attn_notes").lstrip("."), everywhere
                    )
                    here |= {
                        alias.asname or alias.name: known[alias.name]
                        for alias in node.names
                        if alias.name in known
                    }
                elif isinstance(node, ast.Import):
                    for alias in (
                        alias for alias in node.names if alias.name == "attn_notes"
                    ):
                        here |= {
                            f"{alias.asname or alias.name}.{name}": everywhere[name]
                            for name in sorted(offered & set(everywhere))
                        }
        links[notebook.name] = here
    for module, names in places.items():
        links[f"api/{module}"] = everywhere | names
    return links


WORKSHOP = """# The workshop

How the book's models are trained, on which data, and how the package finds, checks
and times them. A reader of the chapters needs none of it.
"""


def pages_of(chapter: str, names: list[str]) -> tuple[str, ...]:
    """The pages that belong to a chapter: evidence and what else carries its name,
    vision/06_pvt_evidence and vision/00_pvt_formats to vision/06_pvt."""
    part, _, stem = chapter.rpartition("/")
    starts = f"{chapter}_", f"{part}/00_{stem[3:]}_"
    own = [name for name in names if name.startswith(starts)]
    return tuple(sorted(own, key=lambda name: "/00_" in name))


def grouped(
    parts: list[tuple[str, list[str]]], titles: dict[str, str], chapters: list[str]
) -> tuple[list[tuple[str, list[str]]], str, dict[str, tuple[str, ...]]]:
    """The sidebar: the papers' `chapters` by part, with the workshop as one entry; the
    workshop's page; the pages below each chapter."""
    pages = [
        name
        for _, some in parts
        for name in some
        if "/" in name and name not in chapters
    ]
    below = {name: pages_of(name, pages) for name in chapters}
    below = {name: some for name, some in below.items() if some}
    nested = {name for some in below.values() for name in some}
    shown, workshop, inside = [], WORKSHOP, []
    for part, some in parts:
        own = [name for name in some if name not in nested]
        if part.startswith("Workshop: "):
            workshop += f"\n## {part.removeprefix('Workshop: ').capitalize()}\n\n"
            workshop += "\n".join(f"- [{titles[n]}]({n}.ipynb)" for n in own) + "\n"
            inside += own
        else:
            shown.append((part, own))
    if inside:
        workshop += "\n" + nested_contents(inside) + "\n"
    return shown, workshop if inside else "", below


def thumbnails(notebooks: list[Notebook]) -> dict[str, str]:
    """The first picture of every notebook that has one, as SVG, by its name."""
    found = {}
    for notebook in notebooks:
        for cell in notebook.code():
            if "hide" in cell.directives or cell.directives.get("output") == "false":
                continue
            for output in cell.outputs:
                picture = output.get("data", {}).get("image/svg+xml")
                if picture:
                    found.setdefault(notebook.name, "".join(picture))
    return found


def thumbnail(picture: str) -> str:
    """Where a picture that a cell put out stands in docs/: MyST-NB names it so."""
    return f"_images/{hashlib.sha256(picture.encode()).hexdigest()}.svg"


def gallery(notebooks: list[Notebook]) -> str:
    """The chapters as cards with a picture each, part by part."""
    pictures, blocks = thumbnails(notebooks), []
    for part, chapters in main_parts(notebooks):
        cards = []
        for notebook in chapters:
            picture = (
                f'<img src="{thumbnail(pictures[notebook.name])}" alt="" '
                'loading="lazy">'
                if notebook.name in pictures
                else ""
            )
            cards.append(
                f'<a href="{notebook.name}.html">{picture}<b>{escape(notebook.title)}'
                f"</b><small>{escape(notebook.summary)}</small></a>"
            )
        blocks.append(f'### {part}\n\n<div class="gallery">{"".join(cards)}</div>')
    return "\n\n".join(blocks)


def toctrees(parts: list[tuple[str, list[str]]], extra: list[str]) -> str:
    """The table of contents that the sidebar shows, hidden on the home page itself."""
    blocks = []
    for caption, names in [*parts, ("Reference", extra)]:
        blocks += [
            "```{toctree}",
            f":caption: {caption}",
            ":hidden:",
            ":maxdepth: 1",
            "",
            *(f"/{name}" for name in names),
            "```",
            "",
        ]
    return "\n".join(blocks)


def stage(root: Path, source: Path) -> None:
    """Write everything that Sphinx reads into the folder `source`."""
    import nbformat

    notebooks = read_book(root)
    claims, _ = read_claims(root, notebooks)
    by_id = {claim.id: claim for claim in claims}
    parts = reading_order([n.name for n in notebooks])
    order = {
        name: place
        for place, name in enumerate(name for _, names in parts for name in names)
    }
    notebooks.sort(key=lambda n: order.get(n.name, -1))
    for path in (root / "nbs").rglob("*"):
        if path.suffix in (".md", ".png", ".svg") and "artifacts" not in path.parts:
            (source / path.relative_to(root / "nbs")).parent.mkdir(
                parents=True, exist_ok=True
            )
            shutil.copy(path, source / path.relative_to(root / "nbs"))
    modules = find_symbols(notebooks)
    equations = {
        label
        for n in notebooks
        for c in n.cells
        if c.kind == "markdown"
        for label in re.findall(r"\$\$\s*\((eq-[\w-]+)\)", c.source)
    }
    titles = {n.name: n.title for n in notebooks}
    papers = [notebook.name for notebook in main_chapters(notebooks)]
    parts, workshop, below = grouped(parts, titles, papers)
    generated = {
        **({"workshop": workshop} if workshop else {}),
        "claims": claims_page(claims, notebooks),
        "models": models_page(notebooks),
        **api_pages(notebooks, modules, equations),
    }
    for name, text in generated.items():
        (source / f"{name}.md").parent.mkdir(parents=True, exist_ok=True)
        (source / f"{name}.md").write_text(text, encoding="utf-8")
    extra = [name for name in REFERENCE if (source / f"{name}.md").exists()]
    for notebook in notebooks:
        target = source / f"{notebook.name}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        page = json.loads(stage_notebook(notebook, by_id, below.get(notebook.name, ())))
        if notebook.name == "index":
            cards = [c.id for c in notebook.code() if "gallery" in c.directives]
            page["cells"] = [
                nbformat.v4.new_markdown_cell(gallery(notebooks), id=cell["id"])
                if cell["id"] in cards
                else cell
                for cell in page["cells"]
            ]
            page["cells"].append(
                nbformat.v4.new_markdown_cell(toctrees(parts, extra), id="contents")
            )
        target.write_text(
            json.dumps(page, ensure_ascii=False, indent=1), encoding="utf-8"
        )
    (source / "code_links.json").write_text(
        json.dumps(code_links(notebooks, modules)), encoding="utf-8"
    )


# Scripts that the theme puts on every page and no page but the search needs; icons come
# from a font, see book.css.
NEEDLESS = [
    re.compile(r'\s*<script[^>]*src="[^"]*/fontawesome\.js[^"]*"></script>'),
    re.compile(r'\s*<meta name="docsearch:[^>]*>'),
]
# A class that no style of the theme asks for, on every link within the site.
UNSTYLED = ' class="reference internal"'
SEARCH_ONLY = re.compile(
    r'\s*<script src="[^"]*(?:searchtools|language_data|searchindex)\.js[^"]*">'
    r"</script>"
)

# Space that no reader sees: none is taken from what is set as it is written.
AS_WRITTEN = re.compile(r"(<(pre|script|style|textarea)\b.*?</\2>)", re.DOTALL)
LINE_ENDS = re.compile(r"\s*\n\s*")

# Names, punctuation, operators and space have the colour of the text: an element for
# each of them is a seventh of the whole site. The pieces of a string have one colour.
PLAIN = re.compile(r'<span class="(?:[npow]|n[bne]|vm)">([^<]*)</span>')
STRING = r'<span class="s[12aei]">([^<]*)</span>'
PIECES = re.compile(f"(?:{STRING}){{2,}}")


def whole_string(pieces: re.Match) -> str:
    """One element in the place of several for the pieces of a string."""
    text = re.sub(STRING, r"\1", pieces[0])
    return f'<span class="s2">{text}</span>'


def squeeze(html: str) -> str:
    """A page without indentation and empty lines, but for code and scripts."""
    parts = AS_WRITTEN.split(html)  # plain, kept, its tag, plain, ...
    return "".join(
        LINE_ENDS.sub("\n", part) if place % 3 == 0 else part
        for place, part in enumerate(parts)
        if place % 3 < 2
    )


def to_download(path: Path) -> str:
    """A notebook as a reader downloads it: as it is, but for the outputs, which are on
    the page already and come again when it is run."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    return json.dumps(notebook, ensure_ascii=False, indent=1) + "\n"


def trim(output: Path) -> None:
    """Remove what no page asks for."""
    wanted = set()
    for page in output.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        for pattern in [
            *NEEDLESS,
            *([] if page.name == "search.html" else [SEARCH_ONLY]),
        ]:
            html = pattern.sub("", html)
        html = html.replace(UNSTYLED, "")
        html = squeeze(PIECES.sub(whole_string, PLAIN.sub(r"\1", html)))
        page.write_text(html, encoding="utf-8")
        wanted |= set(re.findall(r"_static/images/([\w.-]+)", html))
    for picture in (output / "_images").glob("*.svg"):
        text = picture.read_text(encoding="utf-8")
        picture.write_text(shorter(text), encoding="utf-8")
    for pattern in UNUSED:
        for path in sorted(
            output.rglob(pattern) if "/" not in pattern else output.glob(pattern)
        ):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in wanted:
                path.unlink()


def build_site(output: Path, root: Path = ROOT) -> None:
    """Build the site of the project in `root` into the new folder `output`; a warning
    is an error."""
    from sphinx.cmd.build import build_main

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "book"
        source.mkdir()
        stage(root, source)
        os.environ["PYTHONHASHSEED"] = "0"
        code = build_main(
            [
                "-b",
                "html",
                "-q",
                "-W",
                "--keep-going",
                "-c",
                str(HERE),
                "-d",
                f"{folder}/doctrees",
                str(source),
                str(output),
            ]
        )
        if code:
            raise SystemExit(code)
        trim(output)
        for target in (output / "_sources").rglob("*.ipynb"):
            path = root / "nbs" / target.relative_to(output / "_sources")
            target.write_text(to_download(path), encoding="utf-8")
        (output / ".nojekyll").touch()


def readme(root: Path = ROOT) -> str:
    """The home page as README.md: outputs included, directives and hidden cells left
    out."""
    import nbformat
    from nbconvert import MarkdownExporter
    from traitlets.config import Config

    notebook = next(n for n in read_book(root) if n.name == "index")
    page = nbformat.reads(stage_notebook(notebook, {}), as_version=4)
    for cell in page.cells:
        for output in cell.get("outputs", []):  # the picture stands in docs/ already
            picture = output.get("data", {}).pop("image/svg+xml", None)
            if picture:
                output.data = {"text/markdown": f"![]({thumbnail(picture)})"}
    hidden = {"enabled": True, "remove_input_tags": {"remove-input"}}
    exporter = MarkdownExporter(config=Config(TagRemovePreprocessor=hidden))
    text, _ = exporter.from_notebook_node(page)
    links = r"(\]\()(?!https?:|#|_images/)([^)\s]+\.(?:ipynb|md|png|svg|yaml))"
    text = re.sub(links, r"\1nbs/\2", text).replace("](_images/", "](docs/_images/")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=ROOT)
    root = parser.parse_args().root.resolve()
    with tempfile.TemporaryDirectory(dir=root, prefix=".docs-") as folder:
        build_site(Path(folder) / "docs", root)
        shutil.rmtree(root / "docs", ignore_errors=True)
        (Path(folder) / "docs").rename(root / "docs")
    (root / "README.md").write_text(readme(root), encoding="utf-8")
    size = (
        sum(p.stat().st_size for p in (root / "docs").rglob("*") if p.is_file()) / 1e6
    )
    print(
        f"docs/ built: {len(list((root / 'docs').rglob('*.html')))} pages, {size:.1f} "
        "MB; open docs/index.html"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
