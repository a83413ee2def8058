"""Figures: the same bytes every time, small, with any labels."""

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from attn_notes.foundations import plots
from attn_notes.foundations.checks import InputError
from attn_notes.foundations.plots import (
    Diagram,
    curves,
    show_attention,
    show_links,
    show_pair,
    style,
    to_svg,
)


@pytest.fixture(autouse=True)
def book_style():
    with matplotlib.rc_context():
        style()
        yield


def draw_attention():
    weights = torch.rand(4, 6, 7, generator=torch.Generator().manual_seed(0)).softmax(
        -1
    )
    return show_attention(
        weights,
        list("abcdef"),
        list("一二三四五六七"),
        title="heads",
        titles=["1", "2", "3", "4"],
    )


def draw_curves():
    return curves(
        [1, 2, 4],
        {"a": [[1, 2, 3], [2, 3, 5]], "b": [3, 2, 1]},
        "x",
        "y",
        dashed=["b"],
        xscale="log",
    )


def draw_diagram():
    return (
        Diagram(4, 2)
        .box("a", 0, 0, "输入", tone="data")
        .box("b", 1, 1)
        .arrow("a", "b", "then", bend=0.3)
        .figure
    )


@pytest.mark.parametrize("draw", [draw_attention, draw_curves, draw_diagram])
def test_same_bytes_and_small(draw):
    first = to_svg(draw())
    assert first == to_svg(draw()) and len(first) < 40_000
    assert (
        "<text" not in first and "dc:date" not in first and "Matplotlib v" not in first
    )


def test_a_large_map_is_small():
    words = [f"w{i}" for i in range(30)]
    assert (
        len(
            to_svg(
                show_attention(np.random.default_rng(0).random((30, 30)), words, words)
            )
        )
        < 40_000
    )
    assert len(to_svg(show_attention(np.eye(300)))) < 40_000


def test_chinese_without_a_chinese_font(monkeypatch, recwarn):
    monkeypatch.setattr(plots, "_CJK", plots.re.compile("no such font"))
    style()
    assert matplotlib.rcParams["font.family"] == ["DejaVu Sans"]
    assert to_svg(draw_attention()) == to_svg(draw_attention())
    assert not recwarn.list


@pytest.mark.parametrize(
    "shape, maps",
    [((3, 4), 1), ((2, 3, 4), 2), ((6, 3, 4), 6), ((2, 3, 3, 4), 6), ((1, 1), 1)],
)
def test_one_map_for_each_head(shape, maps):
    figure = show_attention(torch.rand(shape))
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) == maps and len({image.get_clim() for image in images}) == 1
    assert np.array_equal(images[0].get_array(), images[0].get_array().clip(0))


def test_the_data_behind_a_map():
    weights = torch.rand(2, 3, 4)
    figure = show_attention(weights, list("abc"), list("wxyz"))
    drawn = [axes.images[0].get_array() for axes in figure.axes[:2]]
    assert all(np.allclose(a, b) for a, b in zip(drawn, weights.numpy()))
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [
        "a",
        "b",
        "c",
    ] and [t.get_text() for t in figure.axes[0].get_xticklabels()] == [
        "w",
        "x",
        "y",
        "z",
    ]


def test_the_data_behind_a_curve():
    figure = draw_curves()
    (axes,) = figure.axes
    assert np.allclose(axes.lines[0].get_ydata(), [1.5, 2.5, 4]) and np.allclose(
        axes.lines[1].get_ydata(), [3, 2, 1]
    )
    assert (
        axes.lines[1].get_linestyle() == "--" and len(axes.collections) == 1
    )  # one band: only a has two seeds
    assert axes.get_xscale() == "log" and len(axes.get_legend().get_texts()) == 2


@pytest.mark.parametrize(
    "values",
    [
        torch.rand(3, 3, requires_grad=True),
        torch.rand(3, 3).bfloat16(),
        torch.eye(3, dtype=torch.bool),
        np.eye(3),
        [[0.5, 0.5], [1, 0]],
    ],
)
def test_every_kind_of_numbers(values):
    assert isinstance(show_attention(values), Figure)


def test_pair_shares_a_scale():
    figure = show_pair(torch.eye(3), 2 * torch.eye(3), ["a", "b"])
    assert [axes.get_title() for axes in figure.axes[:2]] == ["a", "b"] and figure.axes[
        0
    ].images[0].get_clim() == (0, 2)


def test_all_zero_map():
    assert to_svg(show_attention(torch.zeros(2, 2)))


def test_diagram_shows_itself():
    shown = Diagram().box("a", 0, 0)._repr_mimebundle_()
    assert shown["text/plain"] == "<Diagram with 1 boxes>" and shown[
        "image/svg+xml"
    ].startswith("<?xml")


@pytest.mark.no_shapes
@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: show_attention(torch.rand(3)), "expected weights"),
        (lambda: show_attention(torch.rand(0, 3)), "expected weights"),
        (lambda: show_attention(torch.rand(1, 1, 1, 2, 2)), "at most four axes"),
        (lambda: show_attention(torch.rand(2, 3), ["a"]), "rows: expected 2 labels"),
        (
            lambda: show_attention(torch.rand(2, 3), None, ["a"]),
            "columns: expected 3 labels",
        ),
        (lambda: show_pair(torch.rand(2, 3), torch.rand(3, 2)), "same shape"),
        (lambda: curves([1, 2], {}), "at least one line"),
        (lambda: curves([1, 2], {"a": [1, 2, 3]}), "^a: expected 2 points"),
        (lambda: Diagram().box("a", 0, 0).box("a", 1, 0), "already"),
        (lambda: Diagram().box("a", 0, 0, tone="loud"), "tone must be one of"),
        (lambda: Diagram().box("a", 0, 0).arrow("a", "b"), "no box called 'b'"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_links_draw_every_weight_that_shows():
    weights = np.array(
        [[[0.9, 0.1, 0.0], [0.05, 0.0, 0.95]], [[0.0, 1.0, 0.0], [0.3, 0.3, 0.4]]]
    )
    drawn = show_links(weights, ["a", "b"], ["x", "y", "z"]).axes[0]
    assert len(drawn.lines) == (weights >= 0.1).sum() and [
        t.get_text() for t in drawn.texts
    ] == ["x", "y", "z", "a", "b"]
    assert sorted(line.get_alpha() for line in drawn.lines) == sorted(
        weights[weights >= 0.1]
    )
    with pytest.raises(InputError, match="rows: expected 2 labels"):
        show_links(weights, ["a"], ["x", "y", "z"])
    with pytest.raises(InputError, match="at most three axes"):
        show_links(weights[None], ["a", "b"], ["x", "y", "z"])
