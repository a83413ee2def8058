"""The pages that no notebook writes: the API reference, the claims, the table of
models."""

import ast
import re
from dataclasses import dataclass, field
from html import escape

from book import Notebook, offered_names
from claims import Claim
from stage import badge, definitions, slug, statement, up

REFERENCE = ["notation", "models", "claims", "workshop", "api/index"]

# ---------------------------------------------------------------- the package, as its
# notebooks define it


@dataclass
class Symbol:
    """A public function or class: where it is defined and what its reference entry
    says."""

    name: str
    module: str  # foundations.attention
    notebook: str
    section: str
    kind: str  # function, class or method
    signature: str
    doc: str
    # the name of the cell that defines it: the class, for a method written inside one
    defined_as: str
    methods: list["Symbol"] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        return f"attn_notes.{self.module}.{self.name}"

    @property
    def page(self) -> str:
        return f"api/{self.module}.html#{self.anchor}"


def argument_list(arguments: ast.arguments, drop_self: bool) -> list[str]:
    """The arguments of a signature as they are written: name: type = default."""

    def text(argument: ast.arg, default: ast.AST | None = None) -> str:
        shown = argument.arg + (
            f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
        )
        return shown + (
            f" = {ast.unparse(default)}"
            if default is not None and argument.annotation
            else f"={ast.unparse(default)}"
            if default is not None
            else ""
        )

    plain = arguments.posonlyargs + arguments.args
    defaults = [None] * (len(plain) - len(arguments.defaults)) + arguments.defaults
    shown = [text(*pair) for pair in zip(plain, defaults, strict=True)][
        int(drop_self) :
    ]
    if arguments.vararg:
        shown.append("*" + text(arguments.vararg))
    elif arguments.kwonlyargs:
        shown.append("*")
    shown += [
        text(*pair)
        for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    return shown + (["**" + text(arguments.kwarg)] if arguments.kwarg else [])


def signature_of(node: ast.FunctionDef, name: str, drop_self: bool = False) -> str:
    """A signature on one line when it is short, else one argument a line."""
    returns = (
        f" -> {ast.unparse(node.returns)}"
        if node.returns and node.name != "__init__"
        else ""
    )
    arguments = argument_list(node.args, drop_self)
    line = f"{name}({', '.join(arguments)}){returns}"
    if len(line) > 88:
        line = (
            f"{name}(\n"
            + "".join(f"    {argument},\n" for argument in arguments)
            + f"){returns}"
        )
    return line.replace("'", '"')


def class_signature(node: ast.ClassDef) -> str:
    init = next(
        (
            n
            for n in node.body
            if isinstance(n, ast.FunctionDef) and n.name == "__init__"
        ),
        None,
    )
    if init:
        return signature_of(init, node.name, drop_self=True)
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    if fields:
        return (
            f"{node.name}(\n"
            + "".join(f"    {ast.unparse(n)},\n" for n in fields)
            + ")"
        ).replace("'", '"')
    return f"{node.name}({', '.join(map(ast.unparse, node.bases))})"


def methods_of(node: ast.ClassDef, here: dict[str, str]) -> list[Symbol]:
    """The public methods of a class, in order."""
    return [
        Symbol(
            f"{node.name}.{method.name}",
            **here,
            kind="method",
            doc=ast.get_docstring(method) or "",
            signature=signature_of(method, method.name, drop_self=True),
            defined_as=node.name,
        )
        for method in node.body
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
    ]


def find_symbols(notebooks: list[Notebook]) -> dict[str, list[Symbol]]:
    """Every public symbol of the package by module, in the order in which the notebooks
    define them."""
    modules: dict[str, dict[str, Symbol]] = {}
    for notebook in notebooks:
        for cell in (c for c in notebook.code() if c.exports and notebook.module):
            here = {
                "module": notebook.module,
                "notebook": notebook.name,
                "section": cell.section,
            }
            for node in definitions(cell):
                is_class = isinstance(node, ast.ClassDef)
                modules.setdefault(notebook.module, {})[node.name] = Symbol(
                    node.name,
                    **here,
                    kind="class" if is_class else "function",
                    doc=ast.get_docstring(node) or "",
                    defined_as=node.name,
                    signature=class_signature(node)
                    if is_class
                    else signature_of(node, node.name),
                    methods=methods_of(node, here) if is_class else [],
                )
    return {module: list(symbols.values()) for module, symbols in modules.items()}


def prose(doc: str, equations: set[str]) -> str:
    """A docstring as Markdown: code in backticks and maths as they are; a label of an
    equation becomes its number."""
    text = re.sub(
        r"\(?\b(eq-[\w-]+)\b\)?",
        lambda m: f"{{eq}}`{m[1]}`" if m[1] in equations else m[0],
        doc,
    )
    text = re.sub(r"^#+ ", "", text, flags=re.MULTILINE)
    parts = re.split(r"(`[^`]+`|\$[^$]+\$|\{eq\}`[^`]+`)", text)
    return "".join(
        part if index % 2 else re.sub(r"([*_<>\[\]#|])", r"\\\1", part)
        for index, part in enumerate(parts)
    )


def entry(symbol: Symbol, equations: set[str], level: int) -> list[str]:
    """One symbol of the reference: heading, where it is defined, signature, docstring,
    methods."""
    title = symbol.name.split(".")[-1]
    here = f"{up('api/x')}{symbol.notebook}.html#def-{symbol.defined_as}"
    lines = [
        f'<span class="api-anchor" id="{symbol.anchor}"></span>',
        "",
        f"{'#' * level} {title}",
        "",
        f'<p class="api-defined"><span>{symbol.kind}</span> Defined in <a '
        f'href="{here}">{escape(symbol.section)}</a></p>',
        "",
        "```python",
        symbol.signature,
        "```",
        "",
    ]
    if symbol.doc:
        lines += [prose(symbol.doc, equations), ""]
    for method in symbol.methods:
        lines += entry(method, equations, level + 1)
    return lines


def api_pages(
    notebooks: list[Notebook], modules: dict[str, list[Symbol]], equations: set[str]
) -> dict[str, str]:
    """The reference: a page for every module, and their list."""
    everywhere = {s.name: s for symbols in modules.values() for s in symbols}
    pages, lines = (
        {},
        [
            "# API reference",
            "",
            "Everything that the package exports, from the notebooks that define it. "
            "Each entry links to the section that explains it.",
            "",
        ],
    )
    for notebook in (
        n for n in notebooks if n.module in modules or n.module == "__init__"
    ):
        symbols = modules.get(notebook.module) or [
            everywhere[name] for name in offered_names(notebooks) if name in everywhere
        ]
        names = [
            f'<a href="{s.module}.html#{s.anchor}"><code>{s.name}</code></a>'
            for s in symbols
        ]
        entries = (
            [line for s in symbols for line in entry(s, equations, 2)]
            if notebook.module in modules
            else [f"<p>{name}</p>\n" for name in names]
        )
        pages[f"api/{notebook.module}"] = "\n".join(
            [
                "# " + notebook.full_module.replace("_", "\\_"),
                "",
                "From the chapter "
                f"[{notebook.title}]({up('api/x')}{notebook.name}.ipynb). "
                f"{notebook.summary}",
                "",
                *entries,
            ]
        )
        lines += [
            f'<p class="api-module"><a href="{notebook.module}.html"><strong>'
            f"{notebook.full_module}</strong></a><br>{', '.join(names)}</p>",
            "",
        ]
    contents = [
        f"{page.removeprefix('api/').replace('__init__', 'attn_notes')} </{page}>"
        for page in pages
    ]
    pages["api/index"] = "\n".join(
        [*lines, "```{toctree}", ":hidden:", "", *contents, "```", ""]
    )
    return pages


# ---------------------------------------------------------------- claims


def claims_page(claims: list[Claim], notebooks: list[Notebook]) -> str:
    """Every statement of the notes that this book tests, with its verdict and the cell
    that reaches it."""
    titles = {n.name: n.title for n in notebooks}
    due = [c for c in claims if c.due]
    counts = {
        v: sum(c.verdict == v for c in due)
        for v in (
            "confirmed",
            "corrected",
            "answered",
            "not seen at this scale",
            "opposite at this scale",
            "",
        )
    }
    tally = " ".join(f"{badge(v)} <b>{n}</b>" for v, n in counts.items() if n)
    lines = [
        "# Claims",
        "",
        "Every statement of the source notes that a chapter tests, with its verdict. "
        "The verdict is that of a cell, which fails when "
        "its assertion does not hold; an experiment's verdict is computed from the "
        "measured 95% interval $[a, b]$ of a difference, not written down.",
        "",
        f'<p class="claims-tally">{tally}</p>',
        "",
    ]
    for chapter in dict.fromkeys(c.chapter for c in due):
        lines += [f"## {titles[chapter]}", "", '<div class="claims">']
        for claim in (c for c in due if c.chapter == chapter):
            where = (
                f'<a href="{claim.notebook}.html#claim-{claim.id}">'
                f"{escape(claim.section)}</a>"
                if claim.notebook
                else "no cell yet"
            )
            lines.append(
                f'<div class="claim-row {slug(claim.verdict)}" id="{claim.id}"><div>'
                f"{badge(claim.verdict)}<small>{claim.kind}</small></div>"
                f'<div><p class="says">{statement(claim.says)}</p><p class="show">'
                f'{statement(claim.show)}</p></div><div class="where">{where}</div>'
                "</div>"
            )
        lines += ["</div>", ""]
    later = [c for c in claims if not c.due]
    if later:
        rows = "".join(f"<li>{statement(c.says)}</li>" for c in later)
        lines += [
            "## To come",
            "",
            f"<details><summary>{len(later)} statements that belong to chapters not "
            f"yet written</summary><ul>{rows}</ul></details>",
            "",
        ]
    return "\n".join(lines)


# ---------------------------------------------------------------- models


def models_page(notebooks: list[Notebook]) -> str:
    """The registry as tables: every name below its chapter, its size, the paper's own
    figures, whether its weights are shipped, and the checkpoints that it reads."""
    from attn_notes.zoo.registry import list_models, model_info, sources, weights_folder

    lines = [
        "# Models",
        "",
        "Every name that `attn_notes.create_model` knows, with its exact number of "
        "parameters beside the figures that the paper prints. Where weights are "
        "shipped, `pretrained=True` loads them; every model also reads, from a file, a "
        "folder or a hub id, what it has saved itself and what stands below its "
        "chapter.",
        "",
    ]
    models = [model_info(name) for name in list_models()]
    titles = {n.name: n.title for n in notebooks}
    for task in dict.fromkeys(m.task for m in models):
        lines += [
            f"## {task.replace('_', ' ').capitalize()}",
            "",
            '<div class="pst-scrollable-table-container"><table class="table models">'
            '<thead><tr><th>Name</th><th class="number">Parameters</th><th>Weights</th>'
            "<th>Figures of the paper</th></tr></thead>",
        ]
        families: dict[tuple[str, str, str], list] = {}
        for m in (m for m in models if m.task == task):
            families.setdefault((m.chapter, m.paper, sources(m)), []).append(m)
        for (chapter, paper, read), family in families.items():
            others = read.removeprefix("attn_notes").lstrip(",; ")
            lines.append(
                f'<tbody><tr><th colspan="4"><a href="{chapter}.html">'
                f"{escape(titles[chapter])}</a> <small>{escape(paper)}"
                f"{f'. Reads {escape(others)}' if others else ''}</small></th></tr>"
            )
            for m in family:
                figures = ", ".join(
                    f"{escape(str(k).replace('_', ' '))} "
                    f"{escape(f'{v:,}' if isinstance(v, int) else str(v))}"
                    for k, v in m.reported.items()
                )
                shipped = "shipped" if weights_folder(m.name).is_dir() else ""
                lines.append(
                    f"<tr><td><code>{m.name}</code></td>"
                    f'<td class="number">{m.parameters:,}</td><td>{shipped}</td>'
                    f"<td>{figures}</td></tr>"
                )
            lines.append("</tbody>")
        lines += ["</table></div>", ""]
    return "\n".join(lines)
