"""From a notebook to the page that Sphinx reads: directives become what it shows.

A cell marked hide vanishes; the other `#|` lines vanish from its source. An exported
cell says which module it goes to, a claim cell carries the statement that it tests and
the verdict, both as a strip above the cell that links can point at.
"""

import ast
import json
import re
from html import escape

import nbformat
from book import Cell, Notebook
from claims import Claim

UP = "../"


def up(name: str) -> str:
    """The way from a page to the top of the site."""
    return UP * name.count("/")


def slug(verdict: str) -> str:
    return verdict.replace(" ", "-") or "open"


def badge(verdict: str) -> str:
    return f'<span class="verdict {slug(verdict)}">{escape(verdict or "open")}</span>'


def statement(text: str) -> str:
    """A row of claims.yaml as HTML: what stands between $ signs becomes a formula that
    the page's MathJax sets."""
    parts = re.split(r"\$([^$]+)\$", text)
    return "".join(
        f'<span class="math notranslate nohighlight">\\({escape(part)}\\)</span>'
        if index % 2
        else escape(part, quote=False)
        for index, part in enumerate(parts)
    )


def only_imports(cell: Cell) -> bool:
    return bool(cell.tree.body) and all(
        isinstance(node, (ast.Import, ast.ImportFrom)) for node in cell.tree.body
    )


def defined_names(cell: Cell) -> list[str]:
    """The public names that an exported cell defines."""
    names = []
    for node in cell.tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [t.id for t in targets if isinstance(t, ast.Name)]
    return [name for name in names if not name.startswith("_")]


def fold_title(cell: Cell) -> str:
    """What a folded cell is called: an exported one by the first names it defines."""
    if only_imports(cell):
        return "Imports"
    names = defined_names(cell) if cell.exports else []
    more = ", ..." if len(names) > 3 else ""
    return f"The code: {', '.join(names[:3])}{more}" if names else "The code"


def definitions(cell: Cell) -> list[ast.FunctionDef | ast.ClassDef]:
    """The public functions and classes that a cell defines: those of the reference."""
    return [
        node
        for node in cell.tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
    ]


def strip_above(notebook: Notebook, cell: Cell, claims: dict[str, Claim]) -> str:
    """What stands above a cell: its claim with verdict, or the module that it goes to;
    empty for other cells."""
    parts = []
    claim = claims.get(cell.directives.get("claim", ""))
    if claim:
        parts.append(
            f'<div class="cell-strip claim" id="claim-{claim.id}"><a '
            f'href="{up(notebook.name)}claims.html#{claim.id}" '
            f'title="All claims">{badge(claim.verdict)}</a><span>'
            f"{statement(claim.says)}</span></div>"
        )
    if cell.exports and notebook.module and not only_imports(cell):
        anchors = "".join(
            f'<span id="def-{name}"></span>' for name in defined_names(cell)
        )
        said = f"exported: {notebook.full_module}"
        if any(definitions(c) for c in notebook.code() if c.exports):
            page = f"{up(notebook.name)}api/{notebook.module}.html"
            said = f'<a href="{page}">{said}</a>'
        parts.append(f'<div class="cell-strip exported">{anchors}{said}</div>')
    return "\n".join(parts)


def page_tags(cell: Cell) -> list[str]:
    tags = []
    if cell.directives.get("echo") == "false":
        tags.append("remove-input")
    if cell.directives.get("output") == "false":
        tags.append("remove-output")
    if (
        cell.directives.get("code-fold") in ("true", "show")
        or cell.exports
        and only_imports(cell)
    ):
        tags.append("hide-input")
    return tags


def has_picture(output: nbformat.NotebookNode) -> bool:
    """Whether an output of a cell is a picture."""
    return any(kind.startswith("image/") for kind in output.get("data", {}))


def split_outputs(raw: nbformat.NotebookNode, cell: Cell) -> list:
    """The cell, or, where a caption belongs to its picture alone, the cell and a second
    one without code: what was put out from the picture on, or behind it."""
    pictures = [i for i, output in enumerate(raw.outputs) if has_picture(output)]
    if "figure" not in raw.metadata["mystnb"] or not pictures:
        return [raw]
    outputs, shown = raw.outputs, raw.metadata["mystnb"]
    first, last = pictures[0], pictures[-1]
    groups = [outputs[:first], outputs[first : last + 1], outputs[last + 1 :]]
    parts = []
    for number, group in enumerate(groups):
        if not group:
            continue
        figure = {"mystnb": shown} if number == 1 else {}
        if not parts:
            part = raw
            part.metadata["mystnb"] = {
                key: value
                for key, value in shown.items()
                if number == 1 or key != "figure"
            }
        else:  # a cell without source would be dropped, outputs and all
            part = nbformat.v4.new_code_cell(
                "...",
                metadata={"tags": ["remove-input"], **figure},
                id=f"outputs-{number}-{cell.id}"[:64],
            )
        part.outputs = group
        parts.append(part)
    return parts


def statements_table(notebook: Notebook, claims: dict[str, Claim]) -> str:
    """The statements of this chapter with their verdicts, each linked to its cell;
    empty when the chapter has none."""
    rows = []
    for claim in claims.values():
        if claim.chapter == notebook.name and claim.due:
            cell = f"{up(notebook.name)}{claim.notebook}.html#claim-{claim.id}"
            rows.append(
                f"<tr><td>{statement(claim.says)}</td>"
                f'<td><a href="{cell}">{badge(claim.verdict)}</a></td></tr>'
            )
    if not rows:
        return ""
    return (
        "## What the notes say\n\n"
        "This book began as reading notes. These are their statements on this chapter; "
        "each verdict leads to the cell that tested it.\n\n"
        '<table class="table statements"><thead><tr><th>Statement</th><th>Verdict'
        f"</th></tr></thead><tbody>{''.join(rows)}</tbody>"
        "</table>"
    )


def nested_contents(pages: list[str]) -> str:
    """The pages that the sidebar shows below this one."""
    entries = "\n".join(f"/{name}" for name in pages)
    return f"```{{toctree}}\n:hidden:\n\n{entries}\n```"


def stage_notebook(
    notebook: Notebook, claims: dict[str, Claim], below: tuple[str, ...] = ()
) -> str:
    """The notebook as the site shows it, as JSON; `below` are the pages that belong to
    it."""
    page = nbformat.read(notebook.path, as_version=4)
    cells = []
    for raw, cell in zip(page.cells, notebook.cells, strict=True):
        if cell.kind != "code":
            if not cells:  # nbdev wants the summary, which is no quotation, quoted
                raw.source = re.sub(r"\A(# .*\n+)> ?", r"\1", raw.source)
            cells.append(raw)
            continue
        if "hide" in cell.directives or not cell.source.strip():
            continue
        strip = strip_above(notebook, cell, claims)
        if strip:
            cells.append(
                nbformat.v4.new_markdown_cell(strip, id=f"strip-{cell.id}"[:64])
            )
        raw.source = cell.source
        raw.metadata["tags"] = page_tags(cell)
        shown = {
            "image": {
                "alt": cell.directives.get("fig-cap") or f"Figure: {cell.section}"
            },
            "code_prompt_show": fold_title(cell),
            "code_prompt_hide": fold_title(cell),
        }
        if "fig-cap" in cell.directives:
            shown["figure"] = {
                "caption": cell.directives["fig-cap"],
                "name": cell.directives.get("label", f"fig-{cell.id}"),
            }
        raw.metadata["mystnb"] = shown
        cells += split_outputs(raw, cell)
    ending = statements_table(notebook, claims), below and nested_contents(list(below))
    for index, text in enumerate(filter(None, ending)):
        cells.append(nbformat.v4.new_markdown_cell(text, id=f"ending-{index}"))
    page.cells = cells
    page.metadata = {
        "kernelspec": {
            "display_name": "Python 3 (ipykernel)",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python", "pygments_lexer": "ipython3"},
    }
    return json.dumps(page, ensure_ascii=False, indent=1, sort_keys=True)
