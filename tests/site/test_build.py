"""What the build does to pages and pictures to make them smaller changes nothing that
a reader sees."""

import re
from io import BytesIO

import numpy as np
import pytest
from build import PIECES, squeeze, whole_string
from pictures import shorter, shorter_path, smaller_png
from PIL import Image

GLYPH = (
    "M 628 4666L3578 4666L3578 4134L1259 4134L1259 2753Q 1000 900 -12 40"
    "C 1 2 3 4 5 6L5 7 z M 1 1L2 2"
)


def points(path: str) -> list[tuple[str, float, float]]:
    """Where each step of a path leads, in whichever form it is written."""
    takes = {"M": 2, "L": 2, "H": 1, "V": 1, "Q": 4, "C": 6, "Z": 0}
    found, x, y, start = [], 0.0, 0.0, (0.0, 0.0)
    for letter, rest in re.findall(r"([A-Za-z])([^A-Za-z]*)", path):
        numbers = [float(n) for n in re.findall(r"-?(?:\d+\.?\d*|\.\d+)", rest)]
        size = takes[letter.upper()]
        if letter in "zZ":
            x, y = start
            found.append(("Z", x, y))
        for at in range(0, len(numbers), size or 1):
            some = numbers[at : at + size]
            by = (x, y) if letter.islower() else (0.0, 0.0)
            name = letter.upper()
            if name == "H":
                name, some = "L", [some[0] + by[0], y]
            elif name == "V":
                name, some = "L", [x, some[0] + by[1]]
            else:
                some = [value + by[i % 2] for i, value in enumerate(some)]
            found += [
                (name, round(u, 6), round(v, 6))
                for u, v in zip(some[::2], some[1::2], strict=True)
            ]
            x, y = some[-2:]
            start = (x, y) if name == "M" else start
    return found


@pytest.mark.parametrize(
    "path",
    [
        GLYPH,
        "M 0 160.29L382.79 160.29L382.79 0L0 0L0 160.29 z ",
        "M -0.5 -0.05L-0.5 7.2L0.25 7.2L-10 -3.75",
        "M 3 4L3 4L3 4",
    ],
)
def test_a_shorter_path_goes_through_the_same_points(path):
    short = shorter_path(path)
    assert points(short) == points(path)
    assert len(short) < len(path)


@pytest.mark.parametrize("path", ["m 1 2l3 4", "M 1 2A 5 5 0 0 1 9 9", "M 1 2 3 4", ""])
def test_a_path_of_another_kind_stays(path):
    assert shorter_path(path) == path


def test_letters_of_a_picture_keep_their_places():
    svg = (
        "<svg><g transform='translate(1.5 2)'><use xlink:href='#a'/>"
        "<use xlink:href='#b' transform='translate(59.18 0)'/>"
        "<use xlink:href='#c' transform='translate(0 3) scale(0.7)'/>"
        "<use xlink:href='#d' transform='translate(4 -5)'/></g></svg>"
    )
    assert shorter(svg) == (
        "<svg><g transform='translate(1.5 2)'><use xlink:href='#a'/>"
        "<use xlink:href='#b' x='59.18'/>"
        "<use xlink:href='#c' transform='translate(0 3) scale(0.7)'/>"
        "<use xlink:href='#d' x='4' y='-5'/></g></svg>"
    )


def some_pixels(kind: str) -> np.ndarray:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (40, 30, 4), dtype=np.uint8)
    if kind != "translucent":
        pixels[..., 3] = 255
    if kind == "grey":
        pixels[..., 1:3] = pixels[..., :1]
    if kind == "few colours":
        pixels[..., :3] = random.integers(0, 256, (9, 3))[pixels[..., 0] % 9]
    return pixels


@pytest.mark.parametrize("kind", ["translucent", "many colours", "grey", "few colours"])
def test_a_smaller_picture_has_the_same_pixels(kind):
    pixels = some_pixels(kind)
    Image.fromarray(pixels).save(file := BytesIO(), "PNG")
    small = smaller_png(file.getvalue())
    with Image.open(BytesIO(small)) as found:
        assert (np.asarray(found.convert("RGBA")) == pixels).all()
    assert len(small) <= len(file.getvalue())
    if kind in ("grey", "few colours"):
        assert len(small) < 0.5 * len(file.getvalue())


def test_space_in_code_is_kept():
    page = (
        "<p>one\n\n   two</p>\n<pre>a\n\n    b</pre>\n  <p> three</p>"
        "<script>\n  x = `\n  y`\n</script>"
    )
    assert squeeze(page) == (
        "<p>one\ntwo</p>\n<pre>a\n\n    b</pre>\n<p> three</p>"
        "<script>\n  x = `\n  y`\n</script>"
    )


def test_pieces_of_a_string_become_one():
    code = (
        '<span class="sa">f</span><span class="s2">"a </span><span class="si">{</span>'
        'x<span class="si">}</span><span class="s2">"</span>'
    )
    assert PIECES.sub(whole_string, code) == (
        '<span class="s2">f"a {</span>x<span class="s2">}"</span>'
    )
