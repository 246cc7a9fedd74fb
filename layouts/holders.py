"""Who holds what: the parts of a picture of one layout on a mesh.

The tensor is cut into blocks. Each cell of the first grid is a block, named by its range on the
dims that are drawn, and holds the coordinates of the devices that have it: `(0,0-3)` are the
devices 0 on the first mesh axis and 0 to 3 on the second, `0|2` is 0 and 2. Devices that hold
parts of a sum are joined by `+`. The second grid, of SVG only, is the mesh: each device in the
colour of its block.

A cell's devices follow from its place and the layout's axes, so that a picture of a job with many
thousand devices costs no more than its cells.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch

from ..meshlib.errors import format_bytes
from ..meshlib.mesh import Mesh, position
from .layout import Layout
from .picture import GAP, LIMIT, Cell, Grid, Group, Lines, Part, pick

SIDE = 16  # rows or columns of one grid
PARTS = 8  # lines of one cell

Coord = Mapping[str, int]


def holders(
    mesh: Mesh,
    layout: Layout,
    shape: Sequence[int],
    names: Sequence[str],
    dtype: torch.dtype | None = None,
    title: str = "",
) -> tuple[Part, ...]:
    """The picture of one tensor: its type, the states of its axes, blocks and devices.

    Args:
        mesh: the devices.
        layout: what they hold.
        shape: global shape.
        names: of the dims.
        dtype: to say bytes; None says elements.
        title: the first line.
    """
    local = layout.local_shape(shape, mesh)
    head = [Lines(title, strong=True)] if title else []
    devices = ",".join(mesh.axes)
    size = math.prod(local)
    amount = f"{size:,} elements" if dtype is None else format_bytes(size * dtype.itemsize)
    block = " x ".join(map(str, local)) or "one number"
    said = [f"each device holds {block} ({amount})", *_states(mesh, layout)]
    sides, blocks, drawn, total = _blocks(mesh, layout, shape, names)
    said += [sides] if sides else []
    said.append(f"cells: devices ({devices})" + elided(drawn, total, "blocks"))
    facts = Lines("\n".join(said))
    return (*head, facts, Group((*blocks, *_devices(mesh, layout))))


def mesh_grids(
    mesh: Mesh, cell: Callable[[Coord], Cell], *, title: str = "", in_text: bool = True
) -> list[Grid]:
    """The mesh as grids: its last two axes are rows and columns, those before are grids."""
    axes = tuple(mesh.axes)
    rest, row, column = axes[:-2], axes[-2:-1], axes[-1:]
    counts = [mesh.group_size(one) for one in (rest, row, column)]
    panels, rows, columns = _limits(*counts)
    made: list[Grid] = []
    for number, p in enumerate(panels):
        if p is None:
            made.append(_gap_grid(in_text))
            continue
        fixed = _coords(mesh, rest, p)
        words = [title] if title and number == 0 else []
        cells = [
            [
                Cell((GAP,))
                if r is None or c is None
                else cell({**fixed, **_coords(mesh, row, r), **_coords(mesh, column, c)})
                for c in columns
            ]
            for r in rows
        ]
        made.append(
            Grid(
                " ".join([*words, *(f"{a} {i}" for a, i in fixed.items())]),
                tuple(_axis_label(row, r) for r in rows),
                tuple(_axis_label(column, c) for c in columns),
                tuple(map(tuple, cells)),
                in_text,
            )
        )
    return made


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers, runs of them as ranges.

    >>> spans([0, 1, 2, 5])
    '0-2|5'
    """
    found: list[list[int]] = []
    for n in numbers:
        if found and found[-1][1] == n - 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    return "|".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def _states(mesh: Mesh, layout: Layout) -> list[str]:
    """A line for each state that is more than a cut."""
    n = mesh.group_size
    order = tuple(a for a in mesh.axes if mesh.axes[a] > 1)
    copies = tuple(a for a in order if layout.state(a) == "replicated" and a not in layout.at)
    lines = []
    if copies:
        lines.append(f"replicated over {', '.join(copies)}: {n(copies)} copies")
    words = {
        "unreduced": "{{U:{0}}}: partial sums over {0}: the value is the sum of {1} parts",
        "reduced": "{{R:{0}}}: {1} copies over {0}; gradients are parts of a sum",
        "varying": "{{V:{0}}}: each of {1} devices over {0} holds a value of its own",
    }
    for state, text in words.items():
        axes = tuple(a for a in mesh.axes if layout.state(a) == state)
        if axes:
            lines.append(text.format(",".join(axes), n(axes)))
    for axis, where in layout.at.items():
        lines.append(f"only at {axis} {', '.join(map(str, where))}")
    if layout.memory != "device":
        lines.append(f"in {layout.memory} memory" if layout.memory == "host" else "on disk")
    return lines


def _blocks(
    mesh: Mesh, layout: Layout, shape: Sequence[int], names: Sequence[str]
) -> tuple[str, list[Part], int, int]:
    """What the sides of the grids are, the grids, how many blocks they show and there are."""
    counts = [mesh.group_size(axes) for axes in layout.dims]
    row, column, outer = _drawn_dims(counts)
    panels, rows, columns = _limits(
        math.prod(counts[d] for d in outer), *(1 if d is None else counts[d] for d in (row, column))
    )
    whole = [f"{names[d]} {shape[d]}" for d in range(len(shape)) if d not in (row, column, *outer)]
    axes_of = ["/".join((f"{names[d]} {n}", *layout.dims[d])) for d, n in enumerate(shape)]
    sides = []
    if row is not None:
        sides.append(f"rows: {axes_of[row]}")
    if column is not None:
        sides.append(f"columns: {axes_of[column]}")
    if outer:
        sides.append(f"grids: {', '.join(axes_of[d] for d in outer)}")
    if whole:
        sides.append(f"whole: {', '.join(whole)}")
    parts: list[Part] = []

    def span(dim: int, index: int) -> str:
        n = shape[dim] // counts[dim]
        return f"{index * n}:{(index + 1) * n}"

    def label(dim: int | None, index: int | None) -> str:
        return "" if dim is None else GAP if index is None else span(dim, index)

    for p in panels:
        if p is None:
            parts.append(_gap_grid())
            continue
        fixed = dict(zip(outer, _digits(p, [counts[d] for d in outer]), strict=True))
        cells = []
        for r in rows:
            line = []
            for c in columns:
                if r is None or c is None:
                    line.append(Cell((GAP,)))
                    continue
                index = [0] * len(shape)
                for dim, at in {**fixed, row: r, column: c}.items():
                    if dim is not None:
                        index[dim] = at
                lines = _holding(mesh, layout, index)
                line.append(Cell(lines, _digits_to_number(index, counts)))
            cells.append(tuple(line))
        title = ", ".join(f"{names[d]} {span(d, i)}" for d, i in fixed.items())
        parts.append(
            Grid(
                title,
                tuple(label(row, r) for r in rows),
                tuple(label(column, c) for c in columns),
                tuple(cells),
            )
        )
    drawn = math.prod(sum(i is not None for i in one) for one in (panels, rows, columns))
    return "; ".join(sides), parts, drawn, math.prod(counts)


def _drawn_dims(counts: Sequence[int]) -> tuple[int | None, int | None, tuple[int, ...]]:
    """The dims that are rows, columns and grids: cut ones first, in the tensor's order.

    A dim alone has the last one beside it, or the first where it is the last itself.
    """
    ndim = len(counts)
    if ndim < 2:
        return None, (0 if ndim else None), ()
    cut = [d for d, n in enumerate(counts) if n > 1]
    if len(cut) >= 2:
        return cut[0], cut[1], tuple(cut[2:])
    one = cut[0] if cut else 0
    return (0, one, ()) if one == ndim - 1 else (one, ndim - 1, ())


def _limits(panels: int, rows: int, columns: int) -> list[list[int | None]]:
    """Which panels, rows and columns are drawn, so that no more than `LIMIT` cells are."""
    wide = min(columns, SIDE)
    high = min(rows, SIDE, LIMIT // wide)
    return [pick(panels, LIMIT // (wide * high)), pick(rows, high), pick(columns, wide)]


def _holding(mesh: Mesh, layout: Layout, index: Sequence[int]) -> tuple[str, ...]:
    """The devices that hold a block, a line for each content that they hold of it."""
    fixed: dict[str, int] = {}
    for axes, at in zip(layout.dims, index, strict=True):
        fixed |= _coords(mesh, axes, at)
    differ = [
        tuple(a for a in mesh.axes if layout.state(a) == state)
        for state in ("varying", "unreduced")
    ]
    contents = [range(mesh.group_size(axes)) for axes in differ]
    lines: list[str] = []
    for v, u in itertools.islice(itertools.product(*contents), PARTS):
        at = {**fixed, **_coords(mesh, differ[0], v), **_coords(mesh, differ[1], u)}
        text = ",".join(spans([at[a]] if a in at else _places(mesh, layout, a)) for a in mesh.axes)
        lines.append(("+ " if u else "; " if v else "") + f"({text})")
    more = math.prod(map(len, contents)) - len(lines)
    return tuple(lines) if not more else (*lines, f"{GAP} {more} more")


def _places(mesh: Mesh, layout: Layout, axis: str) -> list[int]:
    """Coordinates on an axis where the tensor lives."""
    size = mesh.axes[axis]
    return sorted({i % size for i in layout.at.get(axis, range(size))})


def _devices(mesh: Mesh, layout: Layout) -> list[Part]:
    """The mesh, each device in the colour of its block."""
    counts = [mesh.group_size(axes) for axes in layout.dims]
    cut = [d for d, n in enumerate(counts) if n > 1]

    def cell(coord: Coord) -> Cell:
        if any(coord[a] not in _places(mesh, layout, a) for a in layout.at if a in coord):
            return Cell(("-",))
        index = [position(mesh.axes, coord, axes) for axes in layout.dims]
        text = ",".join(str(index[d]) for d in cut) or "all"
        parts = tuple(a for a in mesh.axes if layout.state(a) in ("unreduced", "varying"))
        lines = (text, f"part {position(mesh.axes, coord, parts)}") if parts else (text,)
        return Cell(lines, _digits_to_number(index, counts))

    return list(
        mesh_grids(
            mesh, cell, title="block held at" if len(mesh.axes) > 2 else "block held", in_text=False
        )
    )


def _axis_label(axis: Sequence[str], index: int | None) -> str:
    return "" if not axis else GAP if index is None else f"{axis[0]} {index}"


def _gap_grid(in_text: bool = True) -> Grid:
    return Grid("", ("",), ("",), ((Cell((GAP,)),),), in_text)


def elided(drawn: int, total: int, what: str) -> str:
    """How many of a number of things are drawn, where not all are."""
    return "" if drawn == total else f"; drawn: {drawn} of {total:,} {what}"


def _digits(number: int, sizes: Sequence[int]) -> list[int]:
    """The mixed-radix digits of a number, major to minor."""
    found: list[int] = []
    for size in reversed(sizes):
        number, digit = divmod(number, size)
        found.append(digit)
    return found[::-1]


def _digits_to_number(digits: Sequence[int], sizes: Sequence[int]) -> int:
    number = 0
    for digit, size in zip(digits, sizes, strict=True):
        number = number * size + digit
    return number


def _coords(mesh: Mesh, axes: Sequence[str], index: int) -> dict[str, int]:
    """The coordinates on some axes of position `index` over them."""
    return dict(zip(axes, _digits(index, [mesh.axes[a] for a in axes]), strict=True))
