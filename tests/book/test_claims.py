"""Every claim that is due has one cell that asserts it, and no verdict is written by
hand."""

import nbformat
import pytest
from book import read_book
from claims import BY_KIND, COMPUTED, read_claims

IMPORT = "from attn_notes.training.experiments import least_favourable, verdict"


def test_the_book():
    """The claims of the book: nothing missing, nothing unknown, nothing without an
    assertion or a verdict."""
    claims, problems = read_claims()
    assert not problems, "\n".join(problems)
    due = [claim for claim in claims if claim.due]
    assert due and all(claim.verdict for claim in due)


def problems_of(
    tmp_path,
    *sources,
    rows="- {id: a, kind: experiment, says: s, show: s}",
    shown="'confirmed'",
    name="part/01_x",
):
    """What is wrong with a book of one chapter made of these cells."""
    path = tmp_path / "nbs" / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [nbformat.v4.new_code_cell(IMPORT)]
    for source in sources:
        cells.append(
            nbformat.v4.new_code_cell(
                source,
                outputs=[
                    nbformat.v4.new_output("execute_result", {"text/plain": shown})
                ],
            )
        )
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    (tmp_path / "nbs" / "claims.yaml").write_text(
        f"part/01_x:\n{rows}\nlater/02_y:\n- {{id: b, kind: figure, says: s, show: "
        f"s}}\n"
    )
    claims, problems = read_claims(tmp_path, read_book(tmp_path))
    return {claim.id: claim.verdict for claim in claims}, problems


ASSERT = "assert low > 0\n"


@pytest.mark.parametrize(
    "ending",
    [
        "verdict(low, high, 0.1)",
        "verdict(low, high=high, margin=0.1)",
        "outcome = verdict(low, high, 0.1)\noutcome",
        "least_favourable(verdict(low, high, 0.1), verdict(a[0], a[1], 0.1))",
        "experiments.verdict(*bounds, high, margin=1)",
        "verdict(*interval(a), margin=1)",
    ],
)
def test_computed_verdicts(tmp_path, ending):
    for shown in COMPUTED:
        verdicts, problems = problems_of(
            tmp_path, "#| claim: a\n" + ASSERT + ending, shown=repr(shown)
        )
        assert not problems and verdicts["a"] == shown


@pytest.mark.parametrize(
    "ending",
    [
        "'confirmed'",
        "",
        "print('verdict: confirmed')",
        "verdict(0.1, 0.2, 0.1)",
        "verdict(*(0.1, 0.2), margin=1)",
        "verdict(0.1, high, 0.1)",
        "verdict(low)",
        "outcome = 'confirmed'\noutcome",
        "outcome = verdict(low, high, 1)\noutcome = 'confirmed'\noutcome",
        "if low > 0:\n    outcome = verdict(low, high, 1)\noutcome",
        "least_favourable('confirmed')",
        "least_favourable()",
        "verdict(low, high, 1), 'confirmed'",
    ],
)
def test_written_verdicts_are_refused(tmp_path, ending):
    verdicts, problems = problems_of(tmp_path, "#| claim: a\n" + ASSERT + ending)
    assert problems and not verdicts["a"]


@pytest.mark.parametrize(
    "cell",
    [
        "def verdict(*a): return 'confirmed'",
        "verdict = lambda *a: 'confirmed'",
        "from elsewhere import verdict",
        "import other as verdict",
        "for verdict in [max]: pass",
        "from attn_notes.training.experiments import load as verdict",
    ],
)
def test_another_verdict_function_is_refused(tmp_path, cell):
    _, problems = problems_of(
        tmp_path, cell, "#| claim: a\n" + ASSERT + "verdict(low, high, 0.1)"
    )
    assert any("nothing else may take its name" in problem for problem in problems)


@pytest.mark.parametrize("shown", ["'Confirmed'", "tensor(1)", ""])
def test_a_stored_output_that_is_no_verdict(tmp_path, shown):
    verdicts, problems = problems_of(
        tmp_path, "#| claim: a\n" + ASSERT + "verdict(low, high, 0.1)", shown=shown
    )
    assert any("is none of" in problem for problem in problems) and not verdicts["a"]


@pytest.mark.parametrize("kind", [kind for kind, verdict in BY_KIND.items() if verdict])
def test_verdict_by_kind(tmp_path, kind):
    row = f"- {{id: a, kind: {kind}, says: s, show: s}}"
    verdicts, problems = problems_of(
        tmp_path, "#| claim: a\nassert value == 3\nvalue", rows=row
    )
    assert not problems and verdicts["a"] == BY_KIND[kind]
    verdicts, _ = problems_of(
        tmp_path,
        "#| claim: a\n" + ASSERT + "verdict(low, high, 1)",
        rows=row,
        shown="'opposite at this scale'",
    )
    assert verdicts["a"] == "opposite at this scale"


@pytest.mark.parametrize(
    "sources, said",
    [
        ([], "no cell for claim a"),
        (["#| claim: a\nvalue"], "asserts nothing"),
        (["#| claim: a\nassert True"], "asserts nothing"),
        (["#| claim: a\nassert 1 < 2"], "asserts nothing"),
        (["#| claim: a\nassert x\nx"] * 2, "has a cell already"),
        (["#| claim: unknown\nassert x"], "does not know this id"),
        (["#| claim: b\nassert x"], "which does not exist"),
        (["#| claim: a\n#| timing\nassert x\nverdict(low, high, 1)"], "not compared"),
    ],
)
def test_problems(tmp_path, sources, said):
    _, problems = problems_of(
        tmp_path, *sources, rows="- {id: a, kind: figure, says: s, show: s}"
    )
    assert any(said in problem for problem in problems), problems
