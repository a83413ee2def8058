"""What the directives of a cell become on its page, and what the reference says of a
definition."""

import ast
import json

import attn_site
import nbformat
import pytest
import reference
import stage
from book import read_notebook, split_directives
from claims import Claim


@pytest.fixture
def staged(tmp_path):
    """Stage a notebook of these cells: (page cells, notebook)."""

    def make(*sources):
        path = tmp_path / "part" / "01_x.ipynb"
        path.parent.mkdir(exist_ok=True)
        cells = [
            nbformat.v4.new_markdown_cell("# Title\n\nA summary."),
            *map(nbformat.v4.new_code_cell, sources),
        ]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        notebook = read_notebook(path, tmp_path)
        claim = Claim(
            "a", "identity", "$h_{t-1} < 1$", "shown", "part/01_x", True, "confirmed"
        )
        claims = {"a": claim} if notebook.claims() else {}
        return json.loads(stage.stage_notebook(notebook, claims))["cells"][1:], notebook

    return make


def test_directives():
    assert split_directives("#| export\n# | claim: a-b\nx = 1  #| no") == (
        "x = 1  #| no",
        {"export": "", "claim": "a-b"},
    )


@pytest.mark.parametrize(
    "source",
    ["#| hide\nx = 1", "#| default_exp part.x", "#| hide\n#| export\nimport torch"],
)
def test_hidden_cells_vanish(staged, source):
    assert staged(source)[0] == []


@pytest.mark.parametrize(
    "source, tag",
    [
        ("#| echo: false\nx", "remove-input"),
        ("#| output: false\nx", "remove-output"),
        ("#| code-fold: true\nx", "hide-input"),
        ("#| export\nimport torch", "hide-input"),
        ("#| timing\nx", None),
        ("#| eval: false\nx", None),
    ],
)
def test_tags(staged, source, tag):
    (cell,) = staged(source)[0]
    assert cell["metadata"]["tags"] == ([tag] if tag else []) and "#|" not in "".join(
        cell["source"]
    )


@pytest.mark.parametrize(
    "source, title",
    [
        ("#| code-fold: true\nx = 1", "The code"),
        ("#| export\nimport torch", "Imports"),
        ("#| export\n#| code-fold true\ndef f():\n    pass", "The code: f"),
        ("#| export\na = b = _c = 1\nd = e = 2", "The code: a, b, d, ..."),
    ],
)
def test_a_folded_cell_is_called_by_what_it_defines(staged, source, title):
    cell = staged("#| default_exp part.x", source)[0][-1]
    assert cell["metadata"]["mystnb"]["code_prompt_show"] == title


def test_exported_cell_says_where_it_goes(staged):
    cells, notebook = staged("#| default_exp part.x", "#| export\ndef f(x):\n    pass")
    assert notebook.full_module == "attn_notes.part.x" and (
        notebook.title,
        notebook.summary,
    ) == ("Title", "A summary.")
    assert (
        "exported: attn_notes.part.x" in cells[0]["source"]
        and 'id="def-f"' in cells[0]["source"]
    )
    assert cells[1]["source"] == "def f(x):\n    pass"


def test_claim_cell_carries_its_verdict(staged):
    strip, cell, _ = staged("#| claim: a\nassert x")[0]
    assert (
        'id="claim-a"' in strip["source"]
        and "confirmed" in strip["source"]
        and "\\(h_{t-1} &lt; 1\\)" in strip["source"]
    )


def test_figure_gets_caption_and_name(staged):
    (cell,) = staged("#| fig-cap: A curve.\n#| label: fig-curve\nplot()")[0]
    assert cell["metadata"]["mystnb"]["figure"] == {
        "caption": "A curve.",
        "name": "fig-curve",
    }


PICTURE = nbformat.v4.new_output("display_data", {"image/svg+xml": "<svg/>"})
TEXT = nbformat.v4.new_output("execute_result", {"text/plain": "'confirmed'"})


@pytest.mark.parametrize(
    "outputs, parts",
    [
        ([PICTURE], [1]),
        ([PICTURE, TEXT], [1, 1]),
        ([TEXT, PICTURE], [1, 1]),
        ([TEXT, PICTURE, PICTURE, TEXT, TEXT], [1, 2, 2]),
    ],
)
def test_the_caption_is_the_pictures_alone(tmp_path, outputs, parts):
    cell = nbformat.v4.new_code_cell("#| fig-cap: A curve.\nplot()", outputs=outputs)
    cells = [nbformat.v4.new_markdown_cell("# Title"), cell]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "x.ipynb")
    notebook = read_notebook(tmp_path / "x.ipynb", tmp_path)
    staged = json.loads(stage.stage_notebook(notebook, {}))["cells"][1:]
    assert [len(cell["outputs"]) for cell in staged] == parts
    for cell in staged:
        drawn = any(
            "data" in o and "image/svg+xml" in o["data"] for o in cell["outputs"]
        )
        assert drawn == ("figure" in cell["metadata"].get("mystnb", {}))
        assert cell["source"]  # without one, its outputs would be dropped


@pytest.mark.parametrize(
    "source, signature",
    [
        (
            "def f(a, *, b: int = 1, **c) -> int: pass",
            "f(a, *, b: int = 1, **c) -> int",
        ),
        ("def f(a=1, /, *b): pass", "f(a=1, *b)"),
        ("class A:\n    def __init__(self, x: int): pass", "A(x: int)"),
        ("class A(B): pass", "A(B)"),
        (
            "class A:\n    x: int\n    y: str = 'a'",
            'A(\n    x: int,\n    y: str = "a",\n)',
        ),
    ],
)
def test_signatures(source, signature):
    node = ast.parse(source).body[0]
    assert (
        reference.class_signature(node)
        if isinstance(node, ast.ClassDef)
        else reference.signature_of(node, node.name)
    ) == signature


def test_methods_stand_with_their_class(staged):
    _, notebook = staged(
        "#| default_exp part.x",
        "#| export\nclass A:\n    'The class.'\n\n    def go(self, n: int) -> int:\n  "
        "      'Goes.'",
    )
    (a,) = reference.find_symbols([notebook])["part.x"]
    assert [m.signature for m in a.methods] == ["go(n: int) -> int"]
    assert a.methods[0].defined_as == "A"


def test_a_chapter_ends_in_its_statements(staged):
    cells, _ = staged("#| claim: a\nassert x")
    assert cells[-1]["source"].startswith("## What the notes say")
    assert "#claim-a" in cells[-1]["source"] and "confirmed" in cells[-1]["source"]


def test_names_in_code_are_linked_but_not_attributes_or_keywords():
    code = (
        '<div class="highlight-ipython3 notranslate"><div class="highlight"><pre>'
        '<span class="n">f</span><span class="p">(</span><span class="n">f</span>'
        '<span class="o">=</span>'
        '<span class="n">x</span><span class="o">.</span><span class="n">f</span>'
        "</pre></div>"
    )
    linked = attn_site.link_names(code, {"f": "api/m.html#f"}, "../")
    assert linked.count(
        '<a class="code-link" href="../api/m.html#f">'
    ) == 1 and linked.index("<a ") < linked.index("(")


def test_chinese_is_searched_in_pairs():
    assert {"梯度消失", "梯度", "消失", "of"} <= set(
        attn_site.BookEnglish({}).split("of 梯度消失")
    )
