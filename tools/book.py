"""The book as data: which notebooks there are, in which order they are read, and what
their directives say."""

import ast
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]

# The reading order: part, then its chapters. A pattern takes the notebooks that stand
# nowhere above it.
READING = [
    ("The map", ["reading_map"]),
    ("Sequences before attention", ["sequence/01_*", "sequence/02_*", "sequence/03_*"]),
    ("Foundations", ["foundations/*", "sequence/00_*"]),
    ("The Transformer", ["sequence/*"]),
    ("Language", ["language/*"]),
    ("Vision", ["vision/0[1-9]_*", "vision/*"]),  # what chapters share stands last
    ("Detection", ["detection/0[1-9]_*", "detection/*"]),
    ("Segmentation", ["segmentation/0[1-9]_*", "segmentation/*"]),
    ("Efficient Transformers", ["efficient/0[1-9]_*", "efficient/*"]),
    ("Workshop: training", ["training/*"]),
    ("Workshop: data", ["data/*"]),
    ("Workshop: package and command line", ["zoo/*", "cli", "commands/*"]),
]

MAGIC = re.compile(
    r"\s*(%%?|!)\w"
)  # %time, %%bash, !ls; not a line that goes on with != or %
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*?)\s*$")


@dataclass
class Cell:
    """A code or markdown cell: its source without directives, the directives, and the
    heading it stands under."""

    id: str
    kind: str
    source: str
    directives: dict[str, str]
    outputs: list
    section: str
    index: int

    @property
    def exports(self) -> bool:
        return any(name in self.directives for name in ("export", "exports", "exporti"))

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree; line magics, which only Jupyter knows, are left out."""
        return ast.parse(
            "\n".join(
                line for line in self.source.splitlines() if not MAGIC.match(line)
            )
        )


@dataclass
class Notebook:
    """One chapter: `name` is its path below nbs/ without the suffix, as in
    sequence/01_cells."""

    path: Path
    name: str
    cells: list[Cell] = field(repr=False)
    title: str = ""
    summary: str = ""
    module: str = ""

    @property
    def full_module(self) -> str:
        """The module as it is imported: attn_notes.foundations.attention."""
        return f"attn_notes.{self.module}".removesuffix(".__init__")

    def code(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.kind == "code"]

    def claims(self) -> list[Cell]:
        return [cell for cell in self.code() if "claim" in cell.directives]


def split_directives(source: str) -> tuple[str, dict[str, str]]:
    """The source without its `#|` lines, and these as {name: value}."""
    kept, directives = [], {}
    for line in source.splitlines():
        match = DIRECTIVE.match(line)
        if match:
            directives[match[1]] = match[2]
        else:
            kept.append(line)
    return "\n".join(kept).strip("\n"), directives


def read_notebook(path: Path, nbs: Path) -> Notebook:
    """Read a notebook with the section and directives of every cell."""
    cells, section, title, summary, module = [], "", "", "", ""
    for index, raw in enumerate(nbformat.read(path, as_version=4).cells):
        source, directives = (
            (raw.source, {})
            if raw.cell_type != "code"
            else split_directives(raw.source)
        )
        if raw.cell_type == "markdown":
            outside_fences = re.sub(
                r"^(`{3,}|~{3,}).*?^\1", "", source, flags=re.MULTILINE | re.DOTALL
            )
            for level, heading in re.findall(
                r"^(#{1,4})\s+(.+?)\s*$", outside_fences, re.MULTILINE
            ):
                if len(level) == 1 and not title:
                    title = heading
                    rest = source.split(heading, 1)[1].strip()
                    first = re.split(r"\n\s*\n", rest)[0].replace("\n", " ")
                    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", first)
                    summary = plain.removeprefix("> ")
                section = heading
        module = directives.get("default_exp", module)
        cells.append(
            Cell(
                raw.get("id", ""),
                raw.cell_type,
                source,
                directives,
                raw.get("outputs", []),
                section,
                index,
            )
        )
    return Notebook(
        path, str(path.relative_to(nbs).with_suffix("")), cells, title, summary, module
    )


def notebook_paths(nbs: Path) -> list[Path]:
    """Every notebook of the book; folders and files beginning with _ or . are no part
    of it."""
    return [
        p
        for p in sorted(nbs.rglob("*.ipynb"))
        if not any(part.startswith((".", "_")) for part in p.relative_to(nbs).parts)
    ]


def read_book(root: Path = ROOT) -> list[Notebook]:
    return [read_notebook(path, root / "nbs") for path in notebook_paths(root / "nbs")]


def offered_names(notebooks: list[Notebook]) -> list[str]:
    """What `attn_notes` itself offers: the names that its top notebook takes from the
    modules."""
    top = [n for n in notebooks if n.module == "__init__"]
    return [
        alias.name
        for notebook in top
        for cell in notebook.code()
        if cell.exports
        for node in ast.walk(cell.tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]


def reading_order(names: list[str]) -> list[tuple[str, list[str]]]:
    """The parts with the chapters that exist, in reading order; a chapter that has no
    place is an error."""
    left = sorted(set(names) - {"index"})
    parts = []
    for part, patterns in READING:
        chapters = []
        for pattern in patterns:
            taken = [
                n
                for n in left
                if Path(n).match(pattern) and n.count("/") == pattern.count("/")
            ]
            chapters += taken
            left = [n for n in left if n not in taken]
        if chapters:
            parts.append((part, chapters))
    if left:
        raise ValueError(
            f"no place in the reading order of tools/book.py for: {', '.join(left)}"
        )
    return parts
