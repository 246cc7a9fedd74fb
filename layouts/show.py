"""`show`: the picture of anything of the library, by its type.

One table says who draws which type; rooms above add theirs with `register`, so that nothing here
knows them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..meshlib.errors import LayoutError, format_bytes, nearest
from ..meshlib.mesh import Mesh, position
from . import notation, tree
from .holders import elided, holders, mesh_grids
from .layout import Layout, resolve
from .picture import GAP, Cell, Group, Lines, Part, Picture, Table, printable
from .rows import rest_layout, row_layout
from .sharded import DTYPES, ShardedTensor, Type, write_type
from .strategy import Strategy

Drawer = Callable[..., Sequence[Part]]
_DRAWERS: dict[type, tuple[str, Drawer, tuple[str, ...]]] = {}


def register(kind: type, name: str, drawer: Drawer, options: tuple[str, ...] = ()) -> None:
    """Let `show` draw a type.

    Args:
        kind: the type; its subclasses are drawn the same way.
        name: what errors call it.
        drawer: from a value, and the options as keywords, to the parts of its picture.
        options: names of the keywords that it takes.
    """
    _DRAWERS[kind] = name, drawer, options


def show(x: Any, **options: Any) -> Picture:
    r"""The picture of a tensor, layout, tree, mesh, strategy, plan or timetable.

    Args:
        x: what to show. A layout may be a string.
        **options: `mesh` and `shape` of a layout alone; `mesh`, `sizes` and perhaps `roles` of a
            strategy, which then shows who holds what: `sizes` maps names of dims to sizes (or is a
            config with such attributes), `roles` maps a role to its dims ("embed -> ffn", the arrow
            marks a parameter) and defaults to the roles whose rows name all their dims.

    Returns:
        A `Picture`: text when printed, SVG in a notebook, either or a PNG with `.save(path)`. At
        most 64 cells of a grid are drawn; the rest is counted.

    Raises:
        TypeError: a thing that has no picture, or options that it does not take.
        LayoutError: a layout that does not fit the shape or the mesh.

    >>> import shardwise as sw
    >>> mesh = sw.make_mesh({"data": 2, "tensor": 2})
    >>> picture = sw.show("batch/data embed/tensor", mesh=mesh, shape=(8, 64))
    >>> print("\n".join(str(picture).splitlines()[:3]))
    batch 8/data  embed 64/tensor  on mesh(data=2, tensor=2)
    each device holds 4 x 32 (128 elements)
    rows: batch 8/data; columns: embed 64/tensor
    """
    for kind in type(x).__mro__:
        if kind in _DRAWERS:
            name, drawer, known = _DRAWERS[kind]
            for option in options:
                if option not in known:
                    raise TypeError(f"show: {name} takes no {option!r}{nearest(option, known)}")
            return Picture(tuple(drawer(x, **options)))
    known = ", ".join(dict.fromkeys(name for name, *_ in _DRAWERS.values()))
    raise TypeError(f"show: {type(x).__name__} has no picture; it shows: {known}")


def _tensor(x: ShardedTensor) -> Sequence[Part]:
    return _type(x._type)


def _type(kind: Type) -> Sequence[Part]:
    names = [f"dim {i}" for i in range(len(kind.shape))]
    title = f"{kind} on {kind.mesh}"
    return holders(kind.mesh, kind.layout, kind.shape, names, kind.dtype, title)


def _layout(
    x: str | Layout, *, mesh: Mesh | None = None, shape: Sequence[int] | None = None
) -> Sequence[Part]:
    if mesh is None or shape is None:
        raise TypeError(
            f"show: the layout '{x}' alone has no sizes; say show(layout, mesh=mesh, shape=(8, 64))"
        )
    layout = resolve(x, len(shape), None, shape, mesh)
    layout.check(shape, mesh, "show")
    names = _names(x, len(shape)) if isinstance(x, str) else [f"dim {i}" for i in range(len(shape))]
    title = f"{_written(names, shape, layout)}on {mesh}"
    return holders(mesh, layout, shape, names, None, title)


def _names(text: str, ndim: int) -> list[str]:
    """Names of the dims that a layout string speaks of; numbers for the others."""
    parsed = notation.parse(text)
    names = [f"dim {i}" for i in range(ndim)]
    first = len(parsed.dims) if parsed.rest is None else parsed.rest
    for i, name in enumerate(parsed.names):
        at = i if i < first else i + ndim - len(parsed.names)
        if name != "_":
            names[at] = name
    return names


def _written(names: Sequence[str], shape: Sequence[int], layout: Layout) -> str:
    """`batch 8/data  embed 64  {U:tensor}  `."""
    dims = zip(names, shape, layout.dims, strict=True)
    words = ["/".join((f"{name} {n}", *axes)) for name, n, axes in dims]
    states = {"U": layout.unreduced, "R": layout.reduced, "V": layout.varying}
    words.append(notation.write_states(states))
    return "".join(f"{word}  " for word in words if word)


def _mesh(mesh: Mesh) -> Sequence[Part]:
    def cell(coord: Mapping[str, int]) -> Cell:
        return Cell((str(mesh.ranks[position(mesh.axes, coord, tuple(mesh.axes))]),))

    grids = mesh_grids(mesh, cell)
    drawn = sum(one.lines != (GAP,) for grid in grids for row in grid.cells for one in row)
    devices = f"{mesh.size:,} {mesh.transport} device{'s' if mesh.size != 1 else ''}"
    said = f"cells: ranks{elided(drawn, mesh.size, 'devices')}"
    return Lines(f"{mesh}: {devices}", strong=True), Lines(said), Group(tuple(grids))


def _tree(x: Any) -> Sequence[Part]:
    rows: list[tuple[str, str, str]] = []
    total = 0
    for path, leaf in tree.items(x):
        text, size = _leaf(leaf, path)
        total += size or 0
        rows.append((printable(path), text, "" if size is None else f"{size:,}"))
    meshes = dict.fromkeys(str(i.mesh) for i in tree.leaves(x) if isinstance(i, ShardedTensor))
    head = [Lines(f"on {', '.join(meshes)}", strong=True)] if meshes else []
    count = f"{len(rows)} {'leaf' if len(rows) == 1 else 'leaves'}"
    table = [Table(("path", "type", "bytes per device"), tuple(rows))] if rows else []
    return (*head, *table, Lines(f"{count}, {total:,} bytes per device ({format_bytes(total)})"))


def _leaf(leaf: Any, path: str) -> tuple[str, int | None]:
    """What a leaf is, and its bytes on one device."""
    if isinstance(leaf, ShardedTensor):
        return str(leaf), math.prod(leaf.local_shape) * leaf.element_size()
    if isinstance(leaf, torch.Tensor):
        text = write_type(leaf.dtype, leaf.shape, Layout("...", leaf.ndim))
        return f"{text} (plain)", leaf.numel() * leaf.element_size()
    if isinstance(leaf, Layout):
        return str(leaf), None
    if leaf is None or isinstance(leaf, bool | int | float | complex | str):
        return printable(repr(leaf)), None
    raise TypeError(f"show: {path or 'the tree'} is a {type(leaf).__name__}, not a tensor")


def _strategy(
    s: Strategy,
    *,
    mesh: Mesh | None = None,
    sizes: Any = None,
    roles: Mapping[str, str] | None = None,
) -> Sequence[Part]:
    if mesh is None and (sizes is not None or roles is not None):
        raise TypeError(
            "show: sizes and roles of a strategy need a mesh: show(s, mesh=..., sizes=)"
        )
    if mesh is None:
        return _rows(s)
    if sizes is None:
        raise TypeError("show: a strategy on a mesh needs sizes={'embed': 64, ...} or a config")
    return _multiples(s, mesh, sizes, roles)


def _rows(s: Strategy) -> Sequence[Part]:
    """The tables of a strategy: parameters, activations, options."""
    params = [
        (role, s.rest.get(role, ""), s.compute.get(role, ""))
        for role in dict.fromkeys([*s.rest, *s.compute])
    ]
    dtypes = [(name, DTYPES.get(dtype, str(dtype))) for name, dtype in s.precision.dtypes.items()]
    dtypes += [("fp8", "true")] if s.precision.fp8 else []
    tables = [
        Table(("parameter", "at rest", "at use"), tuple(params)),
        Table(("activation", "layout"), tuple(s.activations.items())),
        Table(("option", "value"), (*s.options.items(), *dtypes)),
    ]
    return (Group(tuple(one for one in tables if one.rows)),)


def _multiples(
    s: Strategy, mesh: Mesh, sizes: Any, roles: Mapping[str, str] | None
) -> Sequence[Part]:
    """A small picture for each role: parameters at rest and at use, activations."""
    drawn: dict[tuple[Any, ...], list[str]] = {}
    left: list[str] = []
    if roles is None:
        roles, left = _own_roles(s, sizes)
    for role, dims in roles.items():
        names = dims.replace("->", " ").split()
        shape = _shape(names, sizes, role)
        is_param = role not in s.activations and (role in s.rest or "->" in dims)
        what = f"row of {role}"
        param, compute = s.precision.param, s.precision.compute
        if is_param:
            rest = rest_layout(s.rest_row(role), shape, mesh, what)
            used = row_layout(s.compute_row(role), shape, mesh, rest, what)
            layouts = [("at rest", rest, param), ("at use", used, compute)]
            if layouts[0][1:] == layouts[1][1:]:
                layouts = [("at rest and at use", rest, param)]
        else:
            layouts = [("", row_layout(s[role], shape, mesh, None, what), compute)]
        for _, layout, _ in layouts:
            layout.check(shape, mesh, what)
        drawn.setdefault((tuple(names), shape, tuple(layouts)), []).append(role)
    cards: list[Part] = []
    for (names, shape, layouts), same in drawn.items():
        for when, layout, dtype in layouts:
            title = ", ".join(same) + (f" {when}" if when else "")
            written = Lines(_written(names, shape, layout).rstrip())
            first, *rest = holders(mesh, layout, shape, names, dtype, title)
            cards.append(Group((first, written, *rest), "down"))
    head = [Lines(str(mesh), strong=True)]
    if left:
        head.append(Lines(f"no picture, for want of names or sizes: {', '.join(left)}"))
    return (*head, Group(tuple(cards)))


def _own_roles(s: Strategy, sizes: Any) -> tuple[dict[str, str], list[str]]:
    """The roles whose row names every dim, each of a known size; and the others."""
    found: dict[str, str] = {}
    left: list[str] = []
    for table in (s.rest, s.activations):
        for role, row in table.items():
            parsed = notation.parse(row)
            closed = parsed.rest is None or (parsed.dims and parsed.rest_axes)
            if closed and all(_size(name, sizes) is not None for name in parsed.names):
                found[role] = " ".join(parsed.names)
            else:
                left.append(role)
    return found, list(dict.fromkeys(left))


def _size(name: str, sizes: Any) -> int | None:
    """The size of a named dim, in a mapping, or a config with `sizes` or with such attributes."""
    if name.isdigit():
        return int(name)
    table = getattr(sizes, "sizes", sizes)
    return table.get(name) if isinstance(table, Mapping) else getattr(table, name, None)


def _shape(names: Sequence[str], sizes: Any, role: str) -> tuple[int, ...]:
    found = [_size(name, sizes) for name in names]
    for name, size in zip(names, found, strict=True):
        if size is None:
            raise LayoutError(f"show: {role}: no size for dim {name!r}; give it in sizes=")
    return tuple(size for size in found if size is not None)


register(ShardedTensor, "a tensor", _tensor)
register(Type, "a tensor", _type)
register(Layout, "a layout", _layout, ("mesh", "shape"))
register(str, "a layout", _layout, ("mesh", "shape"))
register(Mesh, "a mesh", _mesh)
register(Strategy, "a strategy", _strategy, ("mesh", "sizes", "roles"))
for _kind in (dict, list, tuple):
    register(_kind, "a tree of tensors", _tree)
