"""`Picture`: what `show` returns, as text for a terminal, as SVG for a page, as a file.

A picture is a tree of parts (lines, tables, grids of cells, bars), each of which says what is shown
and not how. This file writes parts as text; `draw.py` draws the same parts. Both are functions of
the parts alone, so the same picture is always the same characters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

WIDTH = 120  # columns of text beside each other
LIMIT = 64  # cells that one picture draws
GAP = "\u2026"
_BAR, _BARS = "\u2588", 40

Color = Literal["none", "ansi"]


@dataclass(frozen=True)
class Lines:
    """Lines of text as they are; `strong` ones are a heading."""

    text: str
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Columns under a head."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Cell:
    """One cell of a grid. Cells of one `hue` (a number, None: no colour) have the same content."""

    lines: tuple[str, ...]
    hue: int | None = None


@dataclass(frozen=True)
class Grid:
    """Cells in rows and columns with a label at each; `in_text` is false for what only SVG shows.

    `rows` and `columns` are empty strings where there is nothing to name.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[Cell, ...], ...]
    in_text: bool = True


@dataclass(frozen=True)
class Bars:
    """A bar per label, in proportion; `words` say each amount."""

    labels: tuple[str, ...]
    amounts: tuple[float, ...]
    words: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Parts beside each other where there is room ("across"), or below each other ("down")."""

    parts: tuple[Part, ...]
    run: Literal["across", "down"] = "across"


Part = Lines | Table | Grid | Bars | Group


@dataclass(frozen=True)
class Picture:
    """What `show` draws: `print` it, let a notebook display it, or save it.

    Attributes:
        parts: what is shown, in order.

    >>> import shardwise as sw
    >>> picture = sw.show(sw.make_mesh({"data": 2}))
    >>> print(str(picture).splitlines()[0])
    mesh(data=2): 2 simulated devices
    >>> picture._repr_html_()[:4]
    '<svg'
    """

    parts: tuple[Part, ...]

    def text(self, color: Color = "none") -> str:
        """The picture as lines of text; color="ansi" paints cells with terminal escapes."""
        return "\n".join(line.rstrip() for line in _down(self.parts, color))

    def __str__(self) -> str:
        return self.text()

    __repr__ = __str__  # so that a bare `sw.show(x)` at the prompt shows it

    def _repr_html_(self) -> str:
        from .draw import svg  # only who draws pays for it

        return svg(self.parts)

    def save(self, path: str | Path) -> None:
        """Write the picture to a file, as its suffix says: .svg, .png, .html or .txt.

        Raises:
            ValueError: another suffix.
            ModuleNotFoundError: .png without matplotlib (the extra "train").
        """
        path = Path(path)
        if path.suffix == ".png":
            from .draw import png

            png(self.parts, path)
        elif path.suffix in _WRITE:
            path.write_text(_WRITE[path.suffix](self) + "\n", encoding="utf-8")
        else:
            raise ValueError(
                f"save: {path.name!r} must end in one of {', '.join((*_WRITE, '.png'))}"
            )


def _page(picture: Picture) -> str:
    head = '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>shardwise</title>\n<body>'
    return f"{head}{picture._repr_html_()}</body></html>"


_WRITE: dict[str, Callable[[Picture], str]] = {
    ".svg": Picture._repr_html_,
    ".html": _page,
    ".txt": str,
}


def aligned(rows: Iterable[Sequence[str]]) -> str:
    """Rows of a table as lines, columns two spaces apart."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def pick(count: int, limit: int) -> list[int | None]:
    """Which of `count` things are drawn: all, or the first ones, a gap (None) and the last.

    >>> pick(3, 4), pick(9, 4)
    ([0, 1, 2], [0, 1, 2, None, 8])
    """
    if count <= limit:
        return list(range(count))
    return [0, None] if limit == 1 else [*range(limit - 1), None, count - 1]


def printable(text: str) -> str:
    """The text on one line, escapes for what does not print."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _lines(part: Lines, color: Color) -> list[str]:
    return part.text.splitlines() or [""]


def _table(part: Table, color: Color) -> list[str]:
    return aligned([part.head, *part.rows]).splitlines()


def _bars(part: Bars, color: Color) -> list[str]:
    most = max(part.amounts, default=0.0) or 1.0
    names = max(map(len, part.labels), default=0)
    return [
        f"{label:<{names}}  {_BAR * round(_BARS * amount / most):<{_BARS}}  {words}"
        for label, amount, words in zip(part.labels, part.amounts, part.words, strict=True)
    ]


def _grid(part: Grid, color: Color) -> list[str]:
    if not part.in_text:
        return []
    names = max(map(len, part.rows), default=0)
    widths = [
        max(len(label), *(len(line) for row in part.cells for line in row[i].lines))
        for i, label in enumerate(part.columns)
    ]
    margin = " " * (names + 1 if names else 0)

    def rule(left: str, middle: str, right: str) -> str:
        return margin + left + middle.join("\u2500" * (w + 2) for w in widths) + right

    made = [part.title] if part.title else []
    if any(part.columns):
        labels = "   ".join(f"{c:^{w}}" for c, w in zip(part.columns, widths, strict=True))
        made.append(f"{margin}  {labels}")
    made.append(rule("\u250c", "\u252c", "\u2510"))
    for number, (label, row) in enumerate(zip(part.rows, part.cells, strict=True)):
        if number:
            made.append(rule("\u251c", "\u253c", "\u2524"))
        for line in range(max(len(cell.lines) for cell in row)):
            shown = [
                _painted(
                    f" {cell.lines[line] if line < len(cell.lines) else '':<{w}} ", cell.hue, color
                )
                for cell, w in zip(row, widths, strict=True)
            ]
            lead = f"{label if line == 0 else '':>{names}} " if names else ""
            made.append(lead + "\u2502" + "\u2502".join(shown) + "\u2502")
    made.append(rule("\u2514", "\u2534", "\u2518"))
    return made


def _painted(text: str, hue: int | None, color: Color) -> str:
    if color == "none" or hue is None:
        return text
    from .draw import rgb

    return "\x1b[30;48;2;{};{};{}m{}\x1b[0m".format(*rgb(hue), text)


def _group(part: Group, color: Color) -> list[str]:
    if part.run == "down":
        return _down(part.parts, color)
    blocks = [(one, _TEXT[type(one)](one, "none")) for one in part.parts]
    rows: list[list[tuple[Any, int]]] = []
    room = 0
    for one, plain in blocks:
        if not plain:
            continue
        width = max(map(len, plain))
        if not rows or width + 3 > room:
            rows.append([])
            room = WIDTH + 3
        rows[-1].append((one, width))
        room -= width + 3
    made: list[str] = []
    for row in rows:
        columns = [_TEXT[type(one)](one, color) for one, _ in row]
        plains = [_TEXT[type(one)](one, "none") for one, _ in row]
        made += [""] if made else []
        for at in range(max(map(len, columns))):
            # escapes take no room: what is padded is counted without them
            made.append(
                "   ".join(
                    (column[at] + " " * (width - len(plain[at])))
                    if at < len(column)
                    else " " * width
                    for column, plain, (_, width) in zip(columns, plains, row, strict=True)
                )
            )
    return made


def _down(parts: Sequence[Part], color: Color) -> list[str]:
    made: list[str] = []
    for number, part in enumerate(parts):
        block = _TEXT[type(part)](part, color)
        tight = isinstance(part, Lines) and isinstance(parts[number - 1], Lines) and not part.strong
        made += [""] if made and block and not tight else []
        made += block
    return made


_TEXT: dict[type, Callable[[Any, Color], list[str]]] = {
    Lines: _lines,
    Table: _table,
    Grid: _grid,
    Bars: _bars,
    Group: _group,
}
