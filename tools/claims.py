"""The claims of the notes, the cells that test them, and the verdict of each cell.

    python tools/claims.py      list the claims; exit code 1 when something is wrong

A claim is a row of nbs/claims.yaml below the chapter that tests it, and is due once
that chapter's notebook exists. The cell that tests it starts with `#| claim: id` and
asserts. Its verdict follows from the kind of the row, except where the cell's last
expression is `verdict(...)` of attn_notes.training.experiments, as it must be for an
experiment: then the verdict is what the cell shows, which the re-run of the notebooks
keeps true.
"""

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml
from book import ROOT, Cell, Notebook, read_book, reading_order

BY_KIND = {
    "identity": "confirmed",
    "figure": "confirmed",
    "correction": "corrected",
    "question": "answered",
    "experiment": None,
}
COMPUTED = ("confirmed", "opposite at this scale", "not seen at this scale")
VERDICTS = (*COMPUTED, "corrected", "answered")
VERDICT_FUNCTIONS = ("verdict", "least_favourable")
VERDICT_MODULE = "attn_notes.training.experiments"


@dataclass
class Claim:
    id: str
    kind: str
    says: str
    show: str
    chapter: str  # as claims.yaml files it
    due: bool
    verdict: str = ""  # empty: no cell, or none that can be read
    notebook: str = ""  # where the cell stands, with its section
    section: str = ""


def called(node: ast.AST) -> str:
    """The name of the function that this expression calls, without what stands before
    the last dot."""
    if not isinstance(node, ast.Call):
        return ""
    return (
        node.func.id
        if isinstance(node.func, ast.Name)
        else getattr(node.func, "attr", "")
    )


def asserts(cell: Cell) -> bool:
    """Whether the cell asserts something that it computes."""
    for node in ast.walk(cell.tree):
        if isinstance(node, ast.Assert) and any(
            isinstance(part, (ast.Name, ast.Call)) for part in ast.walk(node.test)
        ):
            return True
        if called(node).startswith("assert_"):
            return True
    return False


def is_literal(node: ast.AST) -> bool:
    return not any(
        isinstance(part, (ast.Name, ast.Call, ast.Attribute, ast.Subscript))
        for part in ast.walk(node)
    )


def is_verdict_call(node: ast.AST) -> bool:
    """`verdict(low, high, ...)` of computed bounds, or `least_favourable(...)` of such
    calls."""
    name = called(node)
    if name == "least_favourable":
        return bool(node.args) and all(
            is_verdict_call(argument) for argument in node.args
        )
    bounds = (
        (node.args + [k.value for k in node.keywords if k.arg in ("low", "high")])[:2]
        if name == "verdict"
        else []
    )
    both = any(
        isinstance(bound, ast.Starred) for bound in bounds
    )  # verdict(*interval, ...)
    return (both or len(bounds) == 2) and not any(map(is_literal, bounds))


def computes_verdict(cell: Cell) -> bool:
    """Whether the cell's value is a verdict that the cell computes: a call, or a name
    assigned once from one."""
    last = cell.tree.body[-1] if cell.tree.body else None
    if not isinstance(last, ast.Expr):
        return False
    if isinstance(last.value, ast.Name):
        stored = [
            n
            for n in ast.walk(cell.tree)
            if isinstance(n, ast.Name)
            and isinstance(n.ctx, ast.Store)
            and n.id == last.value.id
        ]
        plain = [
            n
            for n in cell.tree.body
            if isinstance(n, ast.Assign)
            and len(n.targets) == 1
            and n.targets[0] in stored
        ]
        return len(stored) == len(plain) == 1 and is_verdict_call(plain[0].value)
    return is_verdict_call(last.value)


def redefines_verdict(notebook: Notebook) -> bool:
    """Whether a notebook puts something else under the name of a verdict function, or
    takes it from elsewhere."""
    if notebook.full_module == VERDICT_MODULE:
        return False
    for cell in notebook.code():
        for node in ast.walk(cell.tree):
            bound = []
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                bound = [node.name]
            elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                bound = [node.id]
            elif (
                isinstance(node, ast.Import)
                or isinstance(node, ast.ImportFrom)
                and node.module != VERDICT_MODULE
            ):
                bound = [alias.asname or alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                bound = [
                    alias.asname
                    for alias in node.names
                    if alias.asname and alias.asname != alias.name
                ]
            if set(bound) & set(VERDICT_FUNCTIONS):
                return True
    return False


def shown_value(cell: Cell) -> str:
    """The text of the value that the cell ends in."""
    results = [o for o in cell.outputs if o.output_type == "execute_result"]
    return (
        str(results[-1]["data"].get("text/plain", "")).strip().strip("'\"")
        if results
        else ""
    )


def read_claims(
    root: Path = ROOT, notebooks: list[Notebook] | None = None
) -> tuple[list[Claim], list[str]]:
    """Every claim with its verdict, in the order of claims.yaml, and what is wrong, one
    line each."""
    notebooks = read_book(root) if notebooks is None else notebooks
    names = {notebook.name for notebook in notebooks}
    claims, problems = {}, []
    for chapter, rows in yaml.safe_load(
        (root / "nbs" / "claims.yaml").read_text(encoding="utf-8")
    ).items():
        for row in rows:
            if row["id"] in claims or row["kind"] not in BY_KIND:
                problems.append(
                    f"claims.yaml: {row['id']} stands there twice, or its kind "
                    f"{row['kind']!r} is none of {', '.join(BY_KIND)}"
                )
            claims[row["id"]] = Claim(**row, chapter=chapter, due=chapter in names)

    for notebook in notebooks:
        if notebook.claims() and redefines_verdict(notebook):
            problems.append(
                f"{notebook.name}: verdict must be the function of {VERDICT_MODULE}, "
                "and nothing else may take its name"
            )
        for cell in notebook.claims():
            id = cell.directives["claim"]
            where = f"{notebook.name}, claim {id}"
            claim = claims.get(id)
            if claim is None:
                problems.append(f"{where}: claims.yaml does not know this id")
                continue
            if claim.notebook:
                problems.append(
                    f"{where}: the claim has a cell already, in {claim.notebook}"
                )
            if not claim.due:
                problems.append(
                    f"{where}: claims.yaml files it under {claim.chapter}, which does "
                    "not exist"
                )
            if not asserts(cell):
                problems.append(f"{where}: the cell asserts nothing that it computes")
            claim.notebook, claim.section = notebook.name, cell.section
            claim.verdict = BY_KIND[claim.kind] or ""
            if computes_verdict(cell):
                shown = shown_value(cell)
                claim.verdict = shown if shown in COMPUTED else ""
                if not claim.verdict:
                    problems.append(
                        f"{where}: the stored verdict {shown!r} is none of "
                        f"{', '.join(COMPUTED)}; run the notebook"
                    )
                if (
                    "timing" in cell.directives
                    or cell.directives.get("eval") == "false"
                ):
                    problems.append(
                        f"{where}: a cell whose output is not compared can give no "
                        "verdict"
                    )
            elif claim.kind == "experiment":
                problems.append(
                    f"{where}: the cell of an experiment ends in verdict(low, high, "
                    "...) of computed bounds"
                )
    problems += [
        f"{c.chapter}: no cell for claim {c.id}"
        for c in claims.values()
        if c.due and not c.notebook
    ]
    return list(claims.values()), problems


def main_parts(notebooks: list[Notebook]) -> list[tuple[str, list[Notebook]]]:
    """The chapters that a newcomer is shown, by part: those of the papers, without
    their evidence pages, what they share, and the workshop."""
    by_name = {notebook.name: notebook for notebook in notebooks}
    parts = [
        (
            part,
            [
                by_name[name]
                for name in names
                if not name.endswith("_evidence")
                and "/00_" not in name  # parts that the chapters share
            ],
        )
        for part, names in reading_order(list(by_name))
        if not part.startswith(("Workshop", "Foundations"))
    ]
    return [(part, chapters) for part, chapters in parts if chapters]


def main_chapters(notebooks: list[Notebook]) -> list[Notebook]:
    """The same chapters in one list."""
    return [chapter for _, chapters in main_parts(notebooks) for chapter in chapters]


def chapter_list(root: Path = ROOT):
    """The papers' chapters by part, with a sentence each: Markdown that Jupyter shows.
    The site puts a picture to each."""
    from IPython.display import Markdown

    blocks = []
    for part, chapters in main_parts(read_book(root)):
        rows = [f"- [{c.title}]({c.name}.ipynb): {c.summary}" for c in chapters]
        blocks.append(f"### {part}\n\n" + "\n".join(rows))
    return Markdown("\n\n".join(blocks))


def verdict_table(root: Path = ROOT):
    """How many statements each part tests and with what verdicts, for the home page: a
    Markdown table that Jupyter shows."""
    from IPython.display import Markdown

    notebooks = read_book(root)
    claims, _ = read_claims(root, notebooks)
    due = [claim for claim in claims if claim.due]
    parts = [
        (part, [claim for claim in due if claim.chapter in names])
        for part, names in reading_order([notebook.name for notebook in notebooks])
    ]
    heads = [one for one in VERDICTS if any(c.verdict == one for c in due)]
    lines = [
        ["part", "statements", *(one.removesuffix(" at this scale") for one in heads)],
        ["---"] + ["---:"] * (len(heads) + 1),
        *(
            [part, len(here), *(sum(c.verdict == one for c in here) for one in heads)]
            for part, here in [*parts, ("**all**", due)]
            if here
        ),
    ]
    return Markdown("\n".join(f"| {' | '.join(map(str, row))} |" for row in lines))


def main() -> int:
    claims, problems = read_claims()
    for claim in claims:
        if claim.due:
            print(
                f"{claim.id:26} {claim.kind:11} {claim.verdict or '-':24} "
                f"{claim.notebook}"
            )
    print(*problems, sep="\n", file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
