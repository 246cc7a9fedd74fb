"""`Layout`: where a tensor's numbers are, as an interned value.

Which axes cut each dim; the state of the rest. On every mesh axis a tensor is in one state: sharded
on a dim (an int here), "replicated", "unreduced", "reduced", or, inside `shard_map` and `vmap`
only, "varying": differing per device with no claim how. The dual, the layout of the cotangent,
swaps unreduced and reduced and keeps the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import Literal

from ..meshlib.errors import LayoutError
from ..meshlib.mesh import Mesh, position
from . import notation
from .notation import At, Dims

State = int | Literal["replicated", "unreduced", "reduced", "varying"]
DUAL: dict[State, State] = {"unreduced": "reduced", "reduced": "unreduced"}
_INTERNED: dict[tuple[object, ...], Layout] = {}
_PARSED: dict[tuple[str, int | None], Layout] = {}
_EMPTY: frozenset[str] = frozenset()
# Axes of the dims that open vmaps map.
MAPPED: ContextVar[frozenset[str]] = ContextVar("mapped", default=_EMPTY)


class Layout:
    """A tensor's layout: interned, hashable, equal only to itself; dim names are not part of it.

    Args:
        text: a layout string (see `docs/layouts.md`).
        ndim: number of dims, needed only for a string with "...".

    Attributes:
        dims: per dim the mesh axes that cut it, major to minor.
        unreduced: axes over which the value is the sum of the local ones.
        reduced: axes over which it is replicated and its gradient unreduced.
        varying: axes over which it differs, inside shard_map and vmap.
        memory: "device", "host" or "disk".
        at: axis to coordinates, for a tensor that lives on a sub-mesh.
        ndim: number of dims.
        dual: the layout of the cotangent.

    Raises:
        LayoutError: kind "parse".

    >>> Layout("b/data s d/tensor {U:pipe}")
    Layout('_/data _ _/tensor {U:pipe}')
    >>> Layout("b/data s d/tensor {U:pipe}").dual is Layout("_/data _ _/tensor {R:pipe}")
    True
    """

    __slots__ = (
        "_dual", "_states", "_text", "at", "dims", "memory", "ndim", "reduced", "unreduced",
        "varying",
    )  # fmt: skip

    dims: Dims
    unreduced: frozenset[str]
    reduced: frozenset[str]
    varying: frozenset[str]
    memory: Literal["device", "host", "disk"]
    at: Mapping[str, tuple[int, ...]]
    ndim: int
    _dual: Layout | None  # found when it is first asked for

    def __new__(cls, text: str | Layout, ndim: int | None = None) -> Layout:
        """The one layout that the text means."""
        if isinstance(text, Layout):
            return text
        found = _PARSED.get((text, ndim))
        if found is None:
            found = resolve(text, ndim)
            if ndim is not None and found.ndim != ndim:
                raise LayoutError(
                    f"layout {text!r} speaks of {found.ndim} dims, but the tensor has {ndim}",
                    kind="parse",
                )
            _PARSED[text, ndim] = found
        return found

    @property
    def dual(self) -> Layout:
        """The layout of the cotangent."""
        if self._dual is None:
            self._dual = make(
                self.dims, self.reduced, self.unreduced, self.varying, self.memory, self.at
            )
        return self._dual

    def state(self, axis: str) -> State:
        """The dim that the axis cuts, or "replicated", "unreduced", "reduced", "varying"."""
        return self._states.get(axis, "replicated")

    @property
    def axes(self) -> Mapping[str, State]:
        """Every axis that is not replicated, with its state."""
        return self._states

    def local_shape(self, shape: Sequence[int], mesh: Mesh) -> tuple[int, ...]:
        """Shape of one block.

        Raises:
            LayoutError: kind "indivisible", naming dim, axis and sizes.
            MeshError: an axis that the mesh has not.

        >>> import shardwise as sw
        >>> Layout("b/data d/tensor").local_shape((8, 64), sw.make_mesh({"data": 2, "tensor": 4}))
        (4, 16)
        """
        self.check(shape, mesh)
        sizes = mesh.axes
        return tuple(
            size // math.prod(sizes[a] for a in axes)
            for size, axes in zip(shape, self.dims, strict=True)
        )

    def check(self, shape: Sequence[int], mesh: Mesh, what: str = "") -> None:
        """Raise unless a tensor of this global shape can have this layout on the mesh."""
        lead = f"{what}: " if what else ""
        if len(shape) != self.ndim:
            raise LayoutError(
                f"{lead}layout '{self}' speaks of {self.ndim} dims, "
                f"but the tensor has {len(shape)}: "
                f"{tuple(shape)}",
                kind="parse",
            )
        mesh.check_axes([a for a in self._states])
        for dim, (size, axes) in enumerate(zip(shape, self.dims, strict=True)):
            over = math.prod(mesh.axes[a] for a in axes)
            if over > 1 and size % over:
                raise LayoutError(
                    f"{lead}dim {dim} of size {size} is not divisible by axis "
                    f"{'/'.join(axes)!r} of size {over} "
                    f"(shape {tuple(shape)}, layout '{self}', on {mesh})"
                    f"\npad it: layouts.pad_to_multiple(x, {dim}, {over})",
                    kind="indivisible",
                )

    def index(
        self, shape: Sequence[int], mesh: Mesh, coord: Mapping[str, int]
    ) -> tuple[slice, ...]:
        """The block of the global tensor that the device at `coord` holds, as slices.

        >>> import shardwise as sw
        >>> Layout("b/data d").index((8, 64), sw.make_mesh({"data": 2}), {"data": 1})
        (slice(4, 8, None), slice(0, 64, None))
        """
        local = self.local_shape(shape, mesh)
        starts = [
            n * position(mesh.axes, coord, axes) for n, axes in zip(local, self.dims, strict=True)
        ]
        return tuple(slice(a, a + n) for a, n in zip(starts, local, strict=True))

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Layout({self._text!r})"

    def __reduce__(self) -> tuple[type[Layout], tuple[str]]:
        return Layout, (self._text,)


LayoutLike = str | Layout


def make(
    dims: Dims,
    unreduced: frozenset[str] = _EMPTY,
    reduced: frozenset[str] = _EMPTY,
    varying: frozenset[str] = _EMPTY,
    memory: str = "device",
    at: Mapping[str, tuple[int, ...]] | At = (),
) -> Layout:
    """The interned layout with these parts, which must already be consistent."""
    places = tuple(at.items()) if isinstance(at, Mapping) else at
    key = (dims, unreduced, reduced, varying, memory, places)
    found = _INTERNED.get(key)
    if found is None:
        self = object.__new__(Layout)
        self.dims, self.ndim = dims, len(dims)
        self.unreduced, self.reduced, self.varying = unreduced, reduced, varying
        self.memory = memory  # pyright: ignore
        self.at = MappingProxyType(dict(places))
        states: dict[str, State] = {a: i for i, axes in enumerate(dims) for a in axes}
        states.update(dict.fromkeys(unreduced, "unreduced"))
        states.update(dict.fromkeys(reduced, "reduced"))
        states.update(dict.fromkeys(varying, "varying"))
        self._states = states
        self._text = notation.write(
            dims, {"U": unreduced, "R": reduced, "V": varying}, memory, places
        )
        self._dual = None if unreduced or reduced else self
        found = _INTERNED.setdefault(key, self)
    return found


def with_state(layout: Layout, axis: str, to: State) -> Layout:
    """The layout with one axis in another state; an axis that cuts a dim goes last on it."""
    dims = tuple(tuple(a for a in axes if a != axis) for axes in layout.dims)
    if isinstance(to, int):
        dims = (*dims[:to], (*dims[to], axis), *dims[to + 1 :])
    one = frozenset((axis,))
    return make(
        dims,
        (layout.unreduced - one) | (one if to == "unreduced" else _EMPTY),
        (layout.reduced - one) | (one if to == "reduced" else _EMPTY),
        (layout.varying - one) | (one if to == "varying" else _EMPTY),
        layout.memory,
        layout.at,
    )


def replicated(ndim: int) -> Layout:
    """Nothing cut, nothing owed."""
    return make(((),) * ndim)


def resolve(
    text: LayoutLike,
    ndim: int | None = None,
    has: Layout | None = None,
    shape: Sequence[int] | None = None,
    mesh: Mesh | None = None,
) -> Layout:
    """The layout a string means for a tensor with `ndim` dims that now has layout `has`.

    Without "..." an axis not mentioned is replicated. With it, the dims that it stands for and the
    axes that nobody mentions keep what they have in `has` (nothing, for a new tensor); an axis that
    the string names elsewhere leaves them. `.../axis` cuts the first of those dims that the axis
    divides, given `shape` and `mesh`. Inside vmap an axis of the mapped dim is invisible: no string
    moves it.
    """
    mapped = has.varying & MAPPED.get() if has is not None and has.varying else None
    if mapped:
        found = resolve(text, ndim, make(has.dims, has.unreduced, has.reduced), shape, mesh)  # pyright: ignore
        for axis in mapped:
            found = with_state(found, axis, "varying")
        return found
    if isinstance(text, Layout):
        return text
    parsed = notation.parse(text)
    if parsed.rest is None:
        return make(
            parsed.dims,
            parsed.states["U"],
            parsed.states["R"],
            parsed.states["V"],
            parsed.memory,
            parsed.at,
        )
    if ndim is None and has is not None:
        ndim = has.ndim
    if ndim is None:
        raise LayoutError(f"layout {text!r}: '...' needs ndim", kind="parse")
    unspoken = ndim - len(parsed.dims)
    if unspoken < 0:
        raise LayoutError(
            f"layout {text!r} speaks of {len(parsed.dims)} dims, but the tensor has {ndim}",
            kind="parse",
        )
    named = set(parsed.rest_axes).union(*parsed.dims, *parsed.states.values())
    first, last = parsed.rest, parsed.rest + unspoken
    kept = has.dims[first:last] if has is not None else ((),) * unspoken
    middle = [tuple(a for a in axes if a not in named) for axes in kept]
    for axis in parsed.rest_axes:
        _place(middle, axis, first, text, shape, mesh)
    dims = parsed.dims[:first] + tuple(middle) + parsed.dims[first:]
    spoken = named.union(*dims)
    old = has if has is not None else replicated(ndim)
    return make(
        dims,
        parsed.states["U"] | (old.unreduced - spoken),
        parsed.states["R"] | (old.reduced - spoken),
        parsed.states["V"] | (old.varying - spoken),
        parsed.memory if parsed.names_memory or has is None else has.memory,
        parsed.at or old.at,
    )


def _place(
    dims: list[tuple[str, ...]],
    axis: str,
    first: int,
    text: str,
    shape: Sequence[int] | None,
    mesh: Mesh | None,
) -> None:
    """Put the axis on the first dim that it divides."""
    if mesh is not None:
        mesh.check_axes((axis,))
    for i, axes in enumerate(dims):
        if shape is None or mesh is None:
            dims[i] = (*axes, axis)
            return
        over = math.prod(mesh.axes[a] for a in (*axes, axis))
        if shape[first + i] % over == 0:
            dims[i] = (*axes, axis)
            return
    raise LayoutError(
        f"layout {text!r}: axis {axis!r} divides none of the dims that '...' stands for"
        + (f" (shape {tuple(shape)}, on {mesh})" if shape is not None else ""),
        kind="indivisible",
    )
