"""The Sphinx extension of the book: identifiers in code link to the reference, Chinese
words are found, colours of code."""

import json
import re
from pathlib import Path

from docutils import nodes
from pygments.formatters import HtmlFormatter
from pygments.style import Style
from pygments.token import (
    Comment,
    Error,
    Generic,
    Keyword,
    Name,
    Number,
    Operator,
    Punctuation,
    String,
    Token,
)
from reference import REFERENCE
from sphinx.search.en import SearchEnglish

CHINESE = re.compile(r"[\u3400-\u9fff]+")


def palette(text, comment, keyword, string, number, name, faint):
    return {
        Token: text,
        Comment: f"italic {comment}",
        Keyword: keyword,
        Keyword.Constant: number,
        Operator: faint,
        Operator.Word: keyword,
        Punctuation: faint,
        Name.Function: name,
        Name.Class: name,
        Name.Decorator: comment,
        Name.Builtin: text,
        Name.Builtin.Pseudo: comment,
        String: string,
        String.Doc: f"italic {comment}",
        Number: number,
        Generic.Error: keyword,
        Error: text,
    }


class Light(Style):
    background_color = "#f7f5f0"
    styles = palette(
        "#24292e", "#66655c", "#8a2f3c", "#2e6443", "#7a4a12", "#1f4f82", "#4d4f52"
    )


class Dark(Style):
    background_color = "#1d1f21"
    styles = palette(
        "#dcd9d2", "#9a978c", "#e29a9f", "#a3c9a8", "#e0b988", "#9cc3ec", "#b9b7b0"
    )


class BookEnglish(SearchEnglish):
    """English, and each Chinese run of characters with all its pairs, so that a word
    inside a sentence is found."""

    def split(self, text: str) -> list[str]:
        words = super().split(text)
        for run in CHINESE.findall(text):
            words += [run] + [run[i : i + 2] for i in range(len(run) - 1)]
        return words


HIGHLIGHT = re.compile(
    r'(<div class="highlight-(?:ipython3|python)[^"]*"><div class="highlight"><pre>'
    r")(.*?)(</pre></div>)",
    re.DOTALL,
)
NAME = re.compile(
    r'(?P<before><span class="o">\.</span>|<span class="k">(?:class|def)</span><span '
    r'class="w"> </span>)?<span class="(?P<kind>n|nc|nf|nn|nd|ne)">(?P<name>'
    r'\w+)</span>(?!<span class="o">=</span>)'
)
MEMBER = re.compile(
    r'<span class="n">(\w+)</span><span class="o">\.</span><span class="n">(\w+)</span>'
)


def link_names(body: str, links: dict[str, str], root: str) -> str:
    """The code of a page with the names in `links` linked to the reference; attributes
    and keyword arguments are left alone."""

    def link(match: re.Match) -> str:
        name, before = match["name"], match["before"] or ""
        if name not in links or before.endswith(".</span>"):
            return match[0]
        return (
            f'{before}<a class="code-link" href="{root}{links[name]}"><span '
            f'class="{match["kind"]}">{name}</span></a>'
        )

    def link_member(match: re.Match) -> str:
        page = links.get(f"{match[1]}.{match[2]}")
        return (
            match[0]
            if page is None
            else match[0].replace(
                f'<span class="n">{match[2]}</span>',
                f'<a class="code-link" href="{root}{page}"><span class="n">'
                f"{match[2]}</span></a>",
            )
        )

    return HIGHLIGHT.sub(
        lambda block: (
            block[1] + MEMBER.sub(link_member, NAME.sub(link, block[2])) + block[3]
        ),
        body,
    )


LABEL = re.compile(r"\(?\b(eq-[a-z0-9-]+)\b(?![^<]*>)\)?")


def link_equations(
    body: str, equations: dict[str, tuple[str, int]], here: str, titles: dict
) -> str:
    """The code of a page with the labels of equations, as docstrings name them,
    replaced by their numbers and linked; an equation of another page says which."""
    root = "../" * here.count("/")

    def link(match: re.Match) -> str:
        if match[1] not in equations:
            return match[0]
        page, number = equations[match[1]]
        title = "" if page == here or page not in titles else titles[page].astext()
        where = f"{number}, {title}" if title else f"{number}"
        return (
            f'(<a class="code-link" href="{root}{page}.html#equation-{match[1]}">'
            f"{where}</a>)"
        )

    return HIGHLIGHT.sub(
        lambda block: block[1] + LABEL.sub(link, block[2]) + block[3], body
    )


def reference_nav(env, pagename: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """What the sidebar of a page of the reference lists: captions with (page, text)."""
    blocks = [
        (
            "Reference",
            [(n, env.titles[n].astext()) for n in REFERENCE if n in env.titles],
        )
    ]
    part, _, module = pagename.removeprefix("api/").partition(".")
    if module:
        start = f"api/{part}."
        near = [n for n in env.toctree_includes["api/index"] if n.startswith(start)]
        blocks.append(
            (f"attn_notes.{part}", [(n, n.removeprefix(start)) for n in near])
        )
    return blocks


def keep_to_notebooks(context: dict) -> None:
    """A page that was generated has no source to download, only its print."""
    context["sourcename"] = ""
    for button in context["header_buttons"]:
        if button["label"] == "download-buttons":
            button["buttons"] = [
                one
                for one in button["buttons"]
                if one["label"] != "download-source-button"
            ]


def on_page(app, pagename, templatename, context, doctree):
    if context.get("page_source_suffix") == ".md":
        keep_to_notebooks(context)
    if pagename.startswith("api/"):
        context["sidebars"] = [
            "reference-nav.html" if name == "sbt-sidebar-nav.html" else name
            for name in context["sidebars"]
        ]
        context["reference_nav"] = reference_nav(app.env, pagename)
    if "body" in context:
        root = "../" * pagename.count("/")
        context["body"] = link_names(
            context["body"], app.config.attn_code_links.get(pagename, {}), root
        )
        context["body"] = link_equations(
            context["body"],
            app.env.get_domain("math").equations,
            pagename,
            app.env.titles,
        )


def number_equations(app, doctree):
    """Equations count from one on every page, as a reader of a chapter expects."""
    equations = app.env.get_domain("math").equations
    labelled = [node for node in doctree.findall(nodes.math_block) if node.get("label")]
    for number, node in enumerate(labelled, 1):
        node["number"] = number
        equations[node["label"]] = (app.env.current_document.docname, number)


def announce_math(app, pagename, templatename, context, doctree):
    """Sphinx brings MathJax to pages with equations; those of a statement's label,
    which are raw HTML, are equations too."""
    if 'class="math ' in context.get("body", ""):
        context["has_maths_elements"] = True


def number_figures(app, env):
    """Figures likewise."""
    for numbers in env.toc_fignumbers.values():
        for kind in numbers.values():
            kind.update({name: (place,) for place, name in enumerate(kind, 1)})


def write_colours(app, error):
    """The colours of code, for the light page and for the dark one."""
    if app.builder.format == "html" and not error:
        colours = [
            HtmlFormatter(style=style).get_style_defs(
                f'html[data-theme="{theme}"] .highlight'
            )
            for theme, style in (("light", Light), ("dark", Dark))
        ]
        (Path(app.outdir) / "_static" / "pygments.css").write_text(
            "\n".join(colours) + "\n", encoding="utf-8"
        )


def read_links(app, config):
    path = Path(app.srcdir) / "code_links.json"
    config.attn_code_links = (
        json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    )


def setup(app):
    app.add_config_value("attn_code_links", {}, "", types=(dict,))
    app.connect("config-inited", read_links)
    app.connect("doctree-read", number_equations)
    app.connect("env-check-consistency", number_figures)
    app.connect("build-finished", write_colours, priority=900)
    app.connect("html-page-context", announce_math, priority=100)
    app.connect("html-page-context", on_page, priority=900)
    app.add_search_language(BookEnglish)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
