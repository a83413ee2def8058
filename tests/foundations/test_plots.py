"""Figures: the same bytes every time, small, with any labels, legible on a phone and on
either ground."""

import re

import matplotlib
import matplotlib.colors
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from attn_notes.foundations import plots
from attn_notes.foundations.checks import InputError
from attn_notes.foundations.plots import (
    COLORS,
    INK,
    LETTERS,
    TONES,
    WIDTH,
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
        .frame("a", "b", text="× N")
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
    assert all(np.allclose(a, b) for a, b in zip(drawn, weights.numpy(), strict=True))
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
    assert axes.get_xscale() == "log" and len(figure.legends[0].get_texts()) == 2


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
        (lambda: Diagram().frame("b"), "no box called 'b'; expected one of none yet"),
        (lambda: show_pair(torch.eye(2), torch.eye(2), rows=["a"]), "rows: expected 2"),
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
    assert [t.get_text() for t in drawn.texts] == ["x", "y", "z", "a", "b"]
    lines = [line for line in drawn.lines if line.get_alpha() is not None]
    assert len(lines) == (weights >= 0.1).sum()
    assert sorted(line.get_alpha() for line in lines) == sorted(weights[weights >= 0.1])
    assert len({line.get_color() for line in lines}) == 2
    ends = {tuple(line.get_xdata()) for line in lines}
    assert len(ends) == len(lines)  # none hides another
    (legend,) = drawn.figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["head 0", "head 1"]
    assert not show_links(weights[0], ["a", "b"], ["x", "y", "z"]).legends
    fewer = show_links(weights[0], ["a", "b"], ["x", "y", "z"], min_weight=0.9)
    assert len(fewer.axes[0].lines) == 2
    with pytest.raises(InputError, match="rows: expected 2 labels"):
        show_links(weights, ["a"], ["x", "y", "z"])
    with pytest.raises(InputError, match="at most three axes"):
        show_links(weights[None], ["a", "b"], ["x", "y", "z"])


# on a phone, on either ground


def contrast(a, b):
    "The contrast of two colours, as the guidelines for accessible pages define it."

    def luminance(color):
        rgb = np.array(matplotlib.colors.to_rgb(color))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("ground", ["#ffffff", "#fffefb", "#15171a", "#1d1f21"])
def test_colours_stand_out_from_light_and_dark_pages(ground):
    heat = matplotlib.colors.to_hex(matplotlib.colormaps["heat"](1.0))
    ends = [
        matplotlib.colors.to_hex(matplotlib.colormaps["diverging"](x))
        for x in (0.0, 1.0)
    ]
    for color in (INK, *COLORS, heat, *ends):
        assert contrast(color, ground) >= 3, color
    assert contrast(INK, ground) >= 3.5


def test_letters_stand_out_from_boxes():
    assert all(contrast(LETTERS, tone) >= 7 for tone in TONES.values())


def test_little_is_the_ground():
    assert matplotlib.colormaps["heat"](0.0)[3] == 0
    assert matplotlib.colormaps["diverging"](0.5)[3] < 0.02
    for draw in (draw_attention, draw_curves, draw_diagram):
        figure = draw()
        assert figure.get_facecolor()[3] == 0
        assert all(axes.get_facecolor()[3] == 0 for axes in figure.axes)


TOKENS = (
    "the agreement on the European Economic Area was signed in August 1992 .".split()
)


@pytest.mark.parametrize(
    "draw",
    [
        draw_attention,
        draw_curves,
        draw_diagram,
        lambda: show_attention(np.eye(13), TOKENS, TOKENS, title="one map"),
        lambda: show_attention(np.ones((4, 13, 13)), TOKENS, TOKENS),
        lambda: show_attention(np.ones((2, 8, 20, 20))),
        lambda: show_attention(np.eye(60), [f"w{i}" for i in range(60)]),
        lambda: show_pair(np.eye(13), np.eye(13), ["a", "b"], TOKENS, TOKENS),
        lambda: show_links(np.ones((2, 13, 13)), TOKENS, TOKENS),
        lambda: show_links(np.ones((13, 13)), TOKENS, TOKENS),
    ],
)
def test_letters_can_be_read_on_a_phone(draw):
    "At least 8 pixels where 358 pixels are left for the figure as it is stored."
    figure = draw()
    svg = to_svg(figure)
    width = float(re.search(r'<svg[^>]* width="([\d.]+)pt"', svg)[1])
    texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text()]
    smallest = min(text.get_fontsize() for text in texts if text.get_visible())
    assert smallest * min(1.333, 358 / width) >= 8
    assert width <= 72 * (WIDTH + 0.2)


@pytest.mark.parametrize("shape", [(4, 13, 13), (2, 30, 30), (3, 5, 13, 13)])
def test_labels_do_not_collide(shape):
    "Neither the labels of an axis with each other nor panels with the next."
    names = [f"token{i}" for i in range(shape[-1])]
    figure = show_attention(np.ones(shape), names, names)
    figure.draw_without_rendering()
    for axes in figure.axes[:-1]:
        for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
            boxes = [t.get_window_extent() for t in ticks if t.get_text()]
            shrunk = [b.shrunk(0.8, 0.8) for b in boxes]
            assert not any(
                a.overlaps(b) for i, a in enumerate(shrunk) for b in shrunk[:i]
            )


def test_many_labels_are_thinned_not_shrunk():
    names = [f"w{i}" for i in range(60)]
    axes = show_attention(np.eye(60), names, names).axes[0]
    shown = [t.get_text() for t in axes.get_yticklabels()]
    assert shown == names[:: len(names) // len(shown)] and len(shown) < 60
    positions = axes.get_yticks().tolist()
    assert [names[int(at)] for at in positions] == shown


def test_heads_of_a_layer_stay_together():
    "Five heads are three and two; what is not needed is empty; titles in order."
    figure = show_attention(np.ones((2, 5, 7, 7)), list("abcdefg"), list("abcdefg"))
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels] == [
        f"layer {i}, head {j}" for i in range(2) for j in range(5)
    ]
    lines = sorted({round(axes.get_subplotspec().rowspan.start) for axes in panels})
    assert lines == [0, 1, 2, 3]
    titles = [f"t{i}" for i in range(10)]
    figure = show_attention(np.ones((2, 5, 7, 7)), titles=titles)
    assert [axes.get_title() for axes in figure.axes if axes.images] == titles
    assert show_attention(np.ones((3, 3))).axes[0].get_title() == ""


def test_every_curve_has_a_marker_of_its_own():
    lines = {name: np.arange(100) for name in "abc"}
    drawn = curves(range(100), lines, dashed=["c"]).axes[0].lines
    markers = [line.get_marker() for line in drawn]
    assert len(set(markers[:2])) == 2 and markers[2] in (None, "None")
    assert drawn[0].get_markevery() == 6
    assert curves(range(100), {"a": np.arange(100)}).axes[0].lines[0].get_marker() in (
        None,
        "None",
    )
    assert curves(range(9), {"a": np.arange(9)}).axes[0].lines[0].get_marker() == "o"


def test_a_frame_holds_its_boxes():
    diagram = (
        Diagram().box("a", 0, 0).box("b", 2, 1, width=1.0).frame("a", "b", text="N")
    )
    frame = diagram.axes.patches[-1]
    low, high = frame.get_bbox().min, frame.get_bbox().max
    for box in diagram.boxes.values():
        assert (low < box.get_bbox().min).all() and (high > box.get_bbox().max).all()
    assert np.allclose(low, [-0.55, -0.4]) and np.allclose(high, [2.65, 1.4])
    text = diagram.axes.texts[-1]
    assert text.get_text() == "N" and text.get_position()[0] > 2.65
    assert len(diagram.boxes) == 2
    text = diagram.frame("a", text="M", side="left").axes.texts[-1]
    assert text.get_position()[0] < -0.55 and text.get_ha() == "right"


def test_a_legend_beside_the_curves():
    few, many = (
        curves(range(3), {f"line {i}": [1, 2, 3] for i in range(n)}) for n in (1, 4)
    )
    assert not few.legends and few.axes[0].get_legend() is None
    names = [text.get_text() for text in many.legends[0].get_texts()]
    assert names == [f"line {i}" for i in range(4)]
    long = curves([1], {"a" * 60: [1], "b": [2]}).legends[0]
    assert long._ncols == 1 and many.legends[0]._ncols == 4
