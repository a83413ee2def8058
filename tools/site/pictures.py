"""The same picture in fewer characters: what matplotlib writes as SVG, shorter, and no
point of it moved and no pixel changed."""

import re
from base64 import b64decode, b64encode
from functools import cache
from io import BytesIO

import numpy as np
from PIL import Image

STEP = re.compile(r"([A-Za-z])([^A-Za-z]*)")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
TAKES = {"M": 2, "L": 2, "Q": 4, "C": 6, "z": 0}  # what matplotlib writes
OUTLINE = re.compile(r"(?<= d=)'([^']*)'")
EMBEDDED = re.compile(r"(?<=data:image/png;base64,)[^'\"]*")
PLACED = re.compile(r" transform='translate\(([-.\d]+) ([-.\d]+)\)'/>")


def whole(number: str, decimals: int) -> int:
    """A decimal in units of its last digit: 7.2 with two decimals is 720."""
    before, _, after = number.partition(".")
    return int(before + after.ljust(decimals, "0"))


def written(size: int, decimals: int) -> str:
    """The other way, as short as it goes: 720 with two decimals is 7.2."""
    if not decimals:
        return str(size)
    digits = f"{abs(size):0{decimals + 1}d}"
    after = digits[-decimals:].rstrip("0")
    before = digits[:-decimals].lstrip("0")
    number = f"{before}.{after}" if after else before or "0"
    return f"-{number}" if size < 0 else number


@cache  # the letters of the font are on every picture
def shorter_path(path: str) -> str:
    """A path whose every step is counted from the corner of the picture or from the
    step before, whichever is shorter; one with other steps than matplotlib's stays."""
    steps = [(letter, NUMBER.findall(rest)) for letter, rest in STEP.findall(path)]
    if any(TAKES.get(letter) != len(numbers) for letter, numbers in steps):
        return path
    decimals = max(
        (len(n.partition(".")[2]) for _, some in steps for n in some), default=0
    )
    here = start = (0, 0)
    before, parts = "", []
    for letter, numbers in steps:
        if letter == "z":
            here, before = start, "z"
            parts.append("z")
            continue
        to = [whole(n, decimals) for n in numbers]
        by = [value - here[i % 2] for i, value in enumerate(to)]
        keep, name = slice(None), letter
        if letter == "L" and 0 in by:  # straight up or along
            keep, name = (slice(1, 2), "V") if by[0] == 0 else (slice(0, 1), "H")
        forms = []
        for step, values in ((name, to[keep]), (name.lower(), by[keep])):
            text = " ".join(written(value, decimals) for value in values)
            text = text.replace(" -", "-")
            if step != before or step in "Mm":
                text = step + text
            elif not text.startswith("-"):  # the letter goes on
                text = f" {text}"
            forms.append((len(text), text, step))
        _, text, before = min(forms)
        parts.append(text)
        here = (to[-2], to[-1])
        start = here if letter == "M" else start
    return "".join(parts)


def smaller_png(data: bytes) -> bytes:
    """The same pixels, with as few channels as they need: a table of colours, grey, or
    no opacity; what cannot be made smaller stays."""
    with Image.open(BytesIO(data)) as opened:
        picture = opened.convert("RGBA")
    forms = [picture]
    if picture.getchannel("A").getextrema() == (255, 255):
        plain = picture.convert("RGB")
        red, green, blue = (band.tobytes() for band in plain.split())
        forms = [plain.getchannel(0) if red == green == blue else plain]
        pixels = np.asarray(plain).reshape(-1, 3)
        colours, which = np.unique(pixels, axis=0, return_inverse=True)
        if len(colours) <= 256:
            table = which.reshape(plain.height, plain.width).astype(np.uint8)
            forms.append(Image.fromarray(table, "P"))
            forms[-1].putpalette(colours.tobytes())
    made = [data]
    for form in forms:
        form.save(file := BytesIO(), "PNG", optimize=True)
        made.append(file.getvalue())
    return min(made, key=len)


def shorter(svg: str) -> str:
    """A picture of matplotlib's with shorter paths, letters placed by x and y, and
    smaller embedded pictures."""
    svg = EMBEDDED.sub(
        lambda png: b64encode(smaller_png(b64decode(png[0]))).decode(), svg
    )
    svg = OUTLINE.sub(lambda found: f"'{shorter_path(found[1])}'", svg)
    uses = re.split(r"(<use [^>]*>)", svg)
    uses[1::2] = [PLACED.sub(r" x='\1' y='\2'/>", use) for use in uses[1::2]]
    return "".join(uses).replace(" y='0'/>", "/>")
