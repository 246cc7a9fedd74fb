"""Rows of a strategy: how one is found by role, read on a shape, and joined with another's.

Rows are joined by dim name, axes of the first before axes of the second, states united. A "*" row
joins every row: `batch/data ...` touches the rows that have a dim of that name, `... {R:data}` all,
and `.../data` cuts the first dim that the axis divides, behind what cuts it already.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from ..meshlib.errors import LayoutError, nearest
from ..meshlib.mesh import Mesh
from . import notation
from .layout import Layout, make, resolve

Table = Mapping[str, str]
T = TypeVar("T")
# Roles of parameters that presets have rows for, whether a model has them or not.
ROLES = frozenset(
    {"w_q", "w_k", "w_v", "w_o", "b_q", "b_k", "b_v", "b_o", "q_norm", "k_norm"}
    | {"w_up", "w_gate", "w_down", "b_up", "b_gate", "b_down", "e_up", "e_gate", "e_down"}
    | {"router", "w_mix", "b_mix", "embed", "head", "pos", "types", "cls", "w_patch", "b_patch"}
    | {"b_vocab"}
)
PADDABLE = ("vocab", "heads", "kv_heads", "ffn")  # dims that a config can round up


class Frozen(Mapping[str, T]):
    """A mapping that nobody changes: hashed by its items, copied and sent as they are.

    >>> table = Frozen({"w": "d f/tensor"})
    >>> table == {"w": "d f/tensor"}, hash(table) == hash(Frozen(table))
    (True, True)
    """

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, T] | Iterable[tuple[str, T]] = ()) -> None:
        self._items = dict(items)

    def __getitem__(self, name: str) -> T:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**self._items, **other}

    def __ror__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**other, **self._items}

    def __reduce__(self) -> tuple[Any, ...]:
        return (Frozen, (self._items,))

    def __repr__(self) -> str:
        return repr(self._items)


def is_pattern(role: str) -> bool:
    """Whether a key of a table stands for several roles."""
    return any(c in role for c in "*?[")


def misnamed(row: str, names: tuple[str, ...], known: Iterable[str]) -> str:
    """What is wrong with a row's dim names beside those that a parameter declares; "" if nothing.

    Position says which dim is meant, so a name that is another dim's of this parameter, or that no
    dim of the model has but is spelled almost like one, is a mistake. Other names are free: presets
    give one row to roles whose dims have other names, and so may a declaration.
    """
    parsed = notation.parse(row)
    if parsed.rest is None:
        pairs = list(zip(parsed.names, names, strict=False))
    else:
        behind = len(parsed.names) - parsed.rest
        pairs = list(zip(parsed.names[: parsed.rest], names, strict=False))
        if behind:
            pairs += list(zip(parsed.names[-behind:], names[-behind:], strict=False))
    known = set(known)
    for here, there in pairs:
        if here == there or here.isdigit():
            continue
        meant = difflib.get_close_matches(here, names, n=1, cutoff=0.8)
        if here in names or (here not in known and meant):
            hint = "" if here in names else f"; did you mean {meant[0]!r}?"
            return (
                f"'{row}' says {here!r} where the parameter has {there!r}{hint} ({' '.join(names)})"
            )
    return ""


def find_row(table: Table, role: str, name: str) -> str:
    """The row of a role: exact, else the one pattern that matches."""
    if role in table:
        return table[role]
    hits = [p for p in table if p != "*" and is_pattern(p) and fnmatch.fnmatchcase(role, p)]
    if len(hits) > 1:
        raise LayoutError(f"strategy: role {role!r} matches two patterns of {name}: {hits}")
    if hits:
        return table[hits[0]]
    if "*" in table:
        return table["*"]
    raise LayoutError(f"strategy: no row of {name} for role {role!r}{nearest(role, table)}")


def row_layout(row: str, shape: Any, mesh: Mesh, has: Layout | None, what: str = "") -> Layout:
    """A row resolved on a shape.

    `.../axis` beside spoken dims cuts the first dim that the axis divides.
    """
    parsed = notation.parse(row)
    ndim = len(shape)
    if parsed.rest is None or len(parsed.dims) < ndim or not parsed.rest_axes:
        layout = resolve(row, ndim, has, shape, mesh)
        if layout.ndim != ndim:
            raise LayoutError(
                f"{what}: '{row}' speaks of {layout.ndim} dims, the tensor has {ndim}"
            )
        return layout
    dims = [list(d) for d in parsed.dims]
    for axis in parsed.rest_axes:
        mesh.check_axes((axis,))
        for number, axes in enumerate(dims):
            over = math.prod(mesh.axes[a] for a in (*axes, axis))
            if shape[number] % over == 0:
                axes.append(axis)
                break
        else:
            raise LayoutError(
                f"{what}: axis {axis!r} of size {mesh.axes[axis]} divides no dim of "
                f"{tuple(shape)} under '{row}'",
                kind="indivisible",
            )
    return make(
        tuple(map(tuple, dims)),
        parsed.states["U"],
        parsed.states["R"],
        parsed.states["V"],
        parsed.memory,
        parsed.at,
    )


def rest_layout(row: str, shape: Any, mesh: Mesh, what: str = "") -> Layout:
    """A row at rest; a tensor that the axis of `.../axis` divides nowhere stays whole over it."""
    try:
        return row_layout(row, shape, mesh, None, what)
    except LayoutError as error:
        axes = notation.parse(row).rest_axes
        if not axes or error.kind != "indivisible":
            raise
    return row_layout(row.replace("/".join(("...", *axes)), "..."), shape, mesh, None, what)


def join_tables(a: Table, b: Table) -> dict[str, str]:
    """Rows of both, joined; a "*" row of one side joins every exact row of the other."""
    joined: dict[str, str] = {}
    for role in dict.fromkeys([*a, *b]):
        left = a.get(role) if role in a else a.get("*") if role not in ("*",) else None
        right = b.get(role) if role in b else b.get("*") if role not in ("*",) else None
        if left is None or right is None:
            joined[role] = left or right or "..."
        else:
            joined[role] = join(left, right, role)
    return joined


def join(a: str, b: str, role: str = "") -> str:
    """Two rows as one: by dim name, axes of a before axes of b, states united."""
    one, two = notation.parse(a), notation.parse(b)
    exact, other = (
        (one, two) if one.rest is None or (two.rest is not None and one.dims) else (two, one)
    )
    if one.rest is None and two.rest is None and one.names != two.names:
        raise LayoutError(f"strategy: rows of {role!r} name other dims: '{a}' and '{b}'")
    if (
        one.rest is not None
        and two.rest is not None
        and set(two.names) - set(one.names)
        and one.dims
    ):
        raise LayoutError(f"strategy: rows of {role!r} cannot be joined: '{a}' and '{b}'")
    axes_of = [dict(zip(p.names, p.dims, strict=True)) for p in (one, two)]
    named = set().union(*exact.dims, *exact.states.values())
    dims: list[tuple[str, ...]] = []
    for name in exact.names:
        both = [axes_of[0].get(name, ()), axes_of[1].get(name, ())]
        extra = 1 if exact is one else 0
        if other.rest is not None:  # an exact row beats a "*" row on the axes that it names
            both[extra] = tuple(x for x in both[extra] if x not in named)
        dims.append(tuple(dict.fromkeys((*both[0], *both[1]))))
    cut = set().union(*dims) if dims else set()
    states = {
        s: frozenset(
            axis
            for p in (one, two)
            for axis in p.states[s]
            if axis not in cut and (p is exact or axis not in named or axis in exact.states[s])
        )
        for s in "URV"
    }
    tail = [x for p in (one, two) for x in p.rest_axes if x not in cut]
    flat = [x for d in dims for x in d] + tail
    twice = {x for x in flat if flat.count(x) > 1}
    if twice:
        raise LayoutError(
            f"strategy: rows of {role!r} put axis {sorted(twice)[0]!r} on two dims: '{a}' and '{b}'"
        )
    both_open = one.rest is not None and two.rest is not None
    words = ["/".join((name, *axes)) for name, axes in zip(exact.names, dims, strict=True)]
    if both_open:
        words.insert(
            exact.rest or 0 if exact.rest is not None else len(words), "/".join(("...", *tail))
        )
    elif tail:
        words.append("/".join(("...", *tail)))
    words.append(notation.write_states(states))
    memory = next((f"@{p.memory}" for p in (two, one) if p.names_memory), "")
    words.append(memory)
    places = dict(one.at) | dict(two.at)
    words += [f"@{axis}={','.join(map(str, at))}" for axis, at in places.items()]
    return " ".join(w for w in words if w)


def hint(name: str, n: int, sizes: Mapping[str, int]) -> str:
    """How a dim that n devices do not divide can be made to fit, by its name."""
    if name == "kv_heads":
        return (
            f'; leave keys and values whole: kv="replicate" of the preset; '
            f"or pad them, and heads along: pad.kv_heads = {n}"
        )
    if name == "heads" and sizes.get("kv_heads", sizes.get("heads")) != sizes.get("heads"):
        return (
            f"; pad it: pad.kv_heads = {n}, which pads heads along, "
            f'or pad.heads = {n} with kv="replicate" of the preset'
        )
    return f"; pad it: pad.{name} = {n}" if name in PADDABLE else ""
