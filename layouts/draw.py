"""Parts of a picture as shapes, and shapes as SVG or PNG.

A part is laid out once, as rectangles and labels at places; SVG is those shapes written down, PNG
the same shapes drawn by matplotlib. Letters are of one width, so places need no font. Colours are
light fills under dark letters, and grey letters elsewhere: readable on white and on black.
"""

from __future__ import annotations

import colorsys
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from xml.sax.saxutils import escape, quoteattr

from .picture import Bars, Grid, Group, Lines, Part, Table

FONT, LETTER, LINE = 12, 7.25, 17  # pixels: size, width of a letter, distance of lines
PAD, SPACE, WIDTH = 8, 24, 1080  # in a cell; between parts; before parts are put below each other
BAR = 320
GREY, INK = "#808080", "#1b1f24"
_FACE = "ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace"
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Rect:
    """A filled rectangle; fill "none" leaves the frame."""

    x: float
    y: float
    width: float
    height: float
    fill: str = "none"


@dataclass(frozen=True)
class Label:
    """A line of text whose base line is at y."""

    x: float
    y: float
    text: str
    anchor: Literal["start", "middle", "end"] = "start"
    ink: str = GREY
    strong: bool = False


@dataclass(frozen=True)
class Scene:
    """Shapes inside a width and a height."""

    width: float
    height: float
    shapes: tuple[Rect | Label, ...]


def rgb(hue: int) -> tuple[int, int, int]:
    """The colour of a content: light, and far from its neighbours' (steps of the golden ratio)."""
    red, green, blue = colorsys.hls_to_rgb((0.58 + hue * 0.6180339887) % 1.0, 0.78, 0.6)
    return round(255 * red), round(255 * green), round(255 * blue)


def _fill(hue: int | None) -> str:
    return "none" if hue is None else "#{:02x}{:02x}{:02x}".format(*rgb(hue))


def _lines(part: Lines) -> Scene:
    lines = part.text.splitlines() or [""]
    labels = [
        Label(0, LINE * i + FONT, line, strong=part.strong) for i, line in enumerate(lines) if line
    ]
    return Scene(max(map(len, lines)) * LETTER, LINE * len(lines), tuple(labels))


def _table(part: Table) -> Scene:
    rows = [part.head, *part.rows]
    widths = [max(map(len, column)) * LETTER + 2 * PAD for column in zip(*rows, strict=True)]
    shapes: list[Rect | Label] = []
    for number, row in enumerate(rows):
        x = 0.0
        for cell, width in zip(row, widths, strict=True):
            y = LINE * number + FONT + (PAD if number else 0)
            if cell:
                shapes.append(Label(x, y, cell, strong=number == 0))
            x += width
    shapes.append(Rect(0, LINE + PAD / 4, sum(widths), 0))
    return Scene(sum(widths), LINE * len(rows) + PAD, tuple(shapes))


def _bars(part: Bars) -> Scene:
    most = max(part.amounts, default=0.0) or 1.0
    names = max(map(len, part.labels), default=0) * LETTER + PAD
    shapes: list[Rect | Label] = []
    for i, (label, amount, words) in enumerate(
        zip(part.labels, part.amounts, part.words, strict=True)
    ):
        y = i * (LINE + 4)
        length = BAR * amount / most
        shapes += [
            Label(0, y + FONT, label),
            Rect(names, y, length, LINE - 2, _fill(i)),
            Label(names + length + PAD, y + FONT, words),
        ]
    tail = max(map(len, part.words), default=0) * LETTER + PAD
    return Scene(names + BAR + tail, (LINE + 4) * len(part.labels), tuple(shapes))


def _grid(part: Grid) -> Scene:
    widths = [
        max(len(label), *(len(line) for row in part.cells for line in row[i].lines)) * LETTER
        + 2 * PAD
        for i, label in enumerate(part.columns)
    ]
    heights = [max(len(cell.lines) for cell in row) * LINE + PAD for row in part.cells]
    left = max(map(len, part.rows)) * LETTER
    left += PAD if left else 0
    shapes: list[Rect | Label] = []
    y = 0.0
    if part.title:
        shapes.append(Label(0, FONT, part.title))
        y += LINE
    if any(part.columns):
        x = left
        for label, width in zip(part.columns, widths, strict=True):
            shapes.append(Label(x + width / 2, y + FONT, label, "middle"))
            x += width
        y += LINE
    for name, row, height in zip(part.rows, part.cells, heights, strict=True):
        middle = y + height / 2 + FONT / 3
        if name:
            shapes.append(Label(left - PAD, middle, name, "end"))
        x = left
        for cell, width in zip(row, widths, strict=True):
            shapes.append(Rect(x, y, width, height, _fill(cell.hue)))
            top = middle - LINE * (len(cell.lines) - 1) / 2
            ink = GREY if cell.hue is None else INK
            shapes += [
                Label(x + width / 2, top + LINE * i, line, "middle", ink)
                for i, line in enumerate(cell.lines)
                if line
            ]
            x += width
        y += height
    wide = max(left + sum(widths), len(part.title) * LETTER)
    return Scene(wide, y, tuple(shapes))


def _group(part: Group) -> Scene:
    return (_across if part.run == "across" else _down)([scene(one) for one in part.parts])


def _moved(one: Scene, dx: float, dy: float) -> tuple[Rect | Label, ...]:
    return tuple(replace(shape, x=shape.x + dx, y=shape.y + dy) for shape in one.shapes)


def _across(scenes: Sequence[Scene]) -> Scene:
    """Beside each other; below where the width is used up."""
    shapes: list[Rect | Label] = []
    x = y = height = wide = 0.0
    for one in scenes:
        if x and x + one.width > WIDTH:
            x, y, height = 0.0, y + height + SPACE, 0.0
        shapes += _moved(one, x, y)
        height = max(height, one.height)
        x += one.width + SPACE
        wide = max(wide, x - SPACE)
    return Scene(wide, y + height, tuple(shapes))


def _down(scenes: Sequence[Scene]) -> Scene:
    shapes: list[Rect | Label] = []
    y = 0.0
    for one in scenes:
        shapes += _moved(one, 0, y)
        y += one.height + PAD
    return Scene(max((one.width for one in scenes), default=0), max(0.0, y - PAD), tuple(shapes))


_SCENES: dict[type, Callable[[Any], Scene]] = {
    Lines: _lines,
    Table: _table,
    Bars: _bars,
    Grid: _grid,
    Group: _group,
}


def scene(part: Part) -> Scene:
    """The shapes of a part."""
    return _SCENES[type(part)](part)


def _whole(parts: Sequence[Part]) -> Scene:
    inner = _down([scene(part) for part in parts])
    return Scene(inner.width + 2 * PAD, inner.height + 2 * PAD, _moved(inner, PAD, PAD))


def svg(parts: Sequence[Part]) -> str:
    """The parts as one SVG element: no script, no style sheet, nothing loaded."""
    whole = _whole(parts)
    width, height = _number(whole.width), _number(whole.height)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family={quoteattr(_FACE)} font-size="{FONT}">'
    ]
    lines += [_rect(s) if isinstance(s, Rect) else _label(s) for s in whole.shapes]
    return "\n".join([*lines, "</svg>"])


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _rect(shape: Rect) -> str:
    x, y, width, height = map(_number, (shape.x, shape.y, shape.width, shape.height))
    if not shape.height:
        return f'<path d="M{x} {y}h{width}" stroke="{GREY}"/>'
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" '
        f'fill="{shape.fill}" stroke="{GREY}"/>'
    )


def _label(shape: Label) -> str:
    anchor = "" if shape.anchor == "start" else f' text-anchor="{shape.anchor}"'
    weight = ' font-weight="bold"' if shape.strong else ""
    text = escape(_NO_XML.sub("\ufffd", shape.text))
    keep = ' xml:space="preserve"' if "  " in text else ""
    return (
        f'<text x="{_number(shape.x)}" y="{_number(shape.y)}" fill="{shape.ink}"'
        f"{anchor}{weight}{keep}>{text}</text>"
    )


def png(parts: Sequence[Part], path: Path) -> None:
    """Draw the parts into a PNG file, twice as fine as the SVG's pixels.

    Raises:
        ModuleNotFoundError: no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a PNG is drawn by matplotlib: install the extra 'train' "
            "(pip install 'shardwise[train]'), or save an .svg"
        ) from error
    whole = _whole(parts)
    figure = Figure(figsize=(whole.width / 72, whole.height / 72))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, whole.width)
    axes.set_ylim(whole.height, 0)
    places = {"start": "left", "middle": "center", "end": "right"}
    for shape in whole.shapes:
        if isinstance(shape, Rect):
            corner = (shape.x, shape.y)
            axes.add_patch(
                Rectangle(corner, shape.width, shape.height, facecolor=shape.fill, edgecolor=GREY)
            )
        else:
            axes.text(
                shape.x,
                shape.y,
                shape.text,
                color=shape.ink,
                family="monospace",
                size=FONT,
                weight="bold" if shape.strong else "normal",
                ha=places[shape.anchor],
                va="baseline",
                parse_math=False,
            )
    figure.savefig(path, dpi=144, transparent=True, metadata={"Software": None})
