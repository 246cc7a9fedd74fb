"""`Strategy`: a table of role -> layout, and nothing else. Parallelism is written in its rows.

A *role* is the name of a tensor: a parameter's last key, or an activation's name in the code.
`rest` says how a parameter is stored, `compute` how it is used, `activations` how the tensors
between ops lie. An exact role beats a pattern. Rows speak of a parameter's own dims; the dims that
stacking added come from options.

Two strategies multiply: rows are joined by dim name, axes of the first before axes of the second,
states united. A "*" row joins every row: `batch/data ...` touches the rows that have a dim of that
name, `... {R:data}` all, and `.../data` cuts the first dim that the axis divides, behind what cuts
it already.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import optree
import torch

from ..meshlib.errors import LayoutError, nearest
from ..meshlib.mesh import Mesh
from . import notation
from .layout import Layout, make, resolve
from .reshard import reshard_one
from .sharded import ShardedTensor

Table = Mapping[str, str]
OPTIONS: dict[str, tuple[str, ...] | None] = {  # name -> known values; None: a mesh axis or ""
    "layer": None,
    "save": ("gathered", "shard"),
    "matmul": ("direct", "streamed", "ring"),
    "attention": ("local",),
    "order": ("contiguous",),
    "tied": ("once", "per_use"),
    "recompute": ("none", "cheap", "all"),
}
DEFAULTS = {
    "layer": "", "save": "gathered", "matmul": "direct", "attention": "local",
    "order": "contiguous", "tied": "per_use", "recompute": "none",
}  # fmt: skip


@dataclass(frozen=True)
class Precision:
    """Dtypes: of stored parameters, of computation, of sums between devices."""

    param: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32
    reduce: torch.dtype = torch.float32


def _frozen(table: Mapping[str, str]) -> Mapping[str, str]:
    return MappingProxyType(dict(table))


@dataclass(frozen=True)
class Strategy:
    """Rows of role -> layout string: at rest, at use, and of activations; plus options.

    >>> from shardwise import strategies
    >>> s = strategies.data() * strategies.tensor_1d()
    >>> s["ffn"]
    'batch/data seq ffn/tensor'
    >>> s.compute_row("w_up")
    'embed ffn/tensor {R:data}'
    """

    rest: Table = field(default_factory=dict)
    compute: Table = field(default_factory=dict)
    activations: Table = field(default_factory=dict)
    precision: Precision = Precision()
    options: Mapping[str, str] = field(default_factory=dict)
    equal: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        for name in ("rest", "compute", "activations", "options"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))
        for name, value in self.options.items():
            if name not in OPTIONS:
                raise ValueError(f"strategy: unknown option {name!r}{nearest(name, OPTIONS)}")
            known = OPTIONS[name]
            if known is not None and value not in known:
                raise ValueError(f"strategy: option {name} = {value!r}{nearest(value, known)}")
        for table in (self.rest, self.compute, self.activations):
            for row in table.values():
                notation.parse(row)

    def __getitem__(self, role: str) -> str:
        """An activation's row."""
        return find_row(self.activations, role, "activations")

    def rest_row(self, role: str) -> str:
        """A parameter's row at rest."""
        return find_row(self.rest, role, "rest")

    def compute_row(self, role: str) -> str:
        """A parameter's row at use."""
        return find_row(self.compute, role, "compute")

    def option(self, name: str) -> str:
        """An option, or its default."""
        if name not in OPTIONS:
            raise ValueError(f"strategy: unknown option {name!r}{nearest(name, OPTIONS)}")
        return self.options.get(name, DEFAULTS[name])

    def __mul__(self, other: Strategy) -> Strategy:
        return Strategy(
            join_tables(self.rest, other.rest),
            join_tables(self.compute, other.compute),
            join_tables(self.activations, other.activations),
            other.precision if self.precision == Precision() else self.precision,
            {**self.options, **other.options},
            tuple(dict.fromkeys((*self.equal, *other.equal))),
        )

    def replace(
        self,
        *,
        rest: Table = MappingProxyType({}),
        compute: Table = MappingProxyType({}),
        activations: Table = MappingProxyType({}),
        precision: Precision | None = None,
        **options: str,
    ) -> Strategy:
        """The strategy with some rows and options changed."""
        return replace(
            self,
            rest={**self.rest, **rest},
            compute={**self.compute, **compute},
            activations={**self.activations, **activations},
            precision=precision or self.precision,
            options={**self.options, **options},
        )

    def use(self, params: Any) -> Any:
        """Parameters as their ops want them: in the compute dtype and the compute row, by role.

        What is already there is left alone. Cost: an all_gather of each dim that only `rest` cuts;
        a cast to reduced moves nothing here and all_reduces the gradient in the backward.
        """
        paths, leaves, spec = optree.tree_flatten_with_path(params, none_is_leaf=True)
        used = [
            self._used(str(getattr(path[-1], "name", path[-1])) if path else "", leaf)
            for path, leaf in zip(paths, leaves, strict=True)
        ]
        return spec.unflatten(used)

    def _used(self, role: str, leaf: Any) -> Any:
        if not isinstance(leaf, ShardedTensor):
            return leaf
        if leaf.is_floating_point() and leaf.dtype != self.precision.compute:
            leaf = leaf.to(self.precision.compute)
        row = self.compute_row(role)
        to = row_layout(row, leaf.shape, leaf.mesh, leaf.layout, f"compute row of {role}")
        wide = self.precision.reduce
        save: Any = self.option("save")
        return reshard_one(
            leaf,
            to,
            save=save,
            reduce_dtype=wide if wide != leaf.dtype else None,
        )

    def layouts(self, declaration: Any, sizes: Any, mesh: Mesh) -> Any:
        """The layout at rest of each declared parameter; see also `left_whole`.

        Raises:
            LayoutError: indivisible sizes or a row that does not fit, all of them, by path.
            MeshError: an axis that the mesh has not.
        """
        paths, leaves, spec = optree.tree_flatten_with_path(declaration)
        found: list[Layout] = []
        problems: list[str] = []
        for path, param in zip(paths, leaves, strict=True):
            name = ".".join(map(str, path))
            try:
                found.append(self._rest_layout(str(path[-1]), param, sizes, mesh))
            except LayoutError as error:
                problems.append(f"{name}: {error}")
        if problems:
            raise LayoutError("\n".join(problems), kind="indivisible")
        return spec.unflatten(found)

    def _rest_layout(self, role: str, param: Any, sizes: Any, mesh: Mesh) -> Layout:
        shape = param.shape(sizes)
        stacked = len(param.stacked)
        row = rest_layout(self.rest_row(role), shape[stacked:], mesh, f"rest row of {role}")
        layer = self.option("layer")
        ahead = tuple((layer,) if layer and name == "layer" else () for name in param.stacked)
        full = make(ahead + row.dims, row.unreduced, row.reduced, row.varying, row.memory, row.at)
        full.check(shape, mesh, f"rest row of {role}")
        return full

    def left_whole(
        self, declaration: Any, sizes: Any, mesh: Mesh, layouts: Any
    ) -> list[tuple[str, int]]:
        """Parameters that a `.../axis` row could not cut, with their bytes on each device.

        `layouts` is what the method of that name gave for the other arguments.
        """
        paths, params, _ = optree.tree_flatten_with_path(declaration)
        found: list[tuple[str, int]] = []
        for path, param, layout in zip(paths, params, optree.tree_leaves(layouts), strict=True):
            wanted = notation.parse(self.rest_row(str(path[-1]))).rest_axes
            if any(layout.state(axis) == "replicated" for axis in wanted):
                shape = param.shape(sizes)
                size = math.prod(layout.local_shape(shape, mesh)) * self.precision.param.itemsize
                found.append((".".join(map(str, path)), size))
        return found

    def table(self, declaration: Any, sizes: Any, mesh: Mesh) -> str:
        """Per parameter: its type at rest, its compute row, and its bytes on one device."""
        layouts = self.layouts(declaration, sizes, mesh)
        paths, params, _ = optree.tree_flatten_with_path(declaration)
        rows = [("parameter", "at rest", "at use", "bytes per device")]
        for path, param, layout in zip(paths, params, optree.tree_leaves(layouts), strict=True):
            shape = param.shape(sizes)
            dims = " ".join("/".join((str(n), *a)) for n, a in zip(shape, layout.dims, strict=True))
            size = math.prod(layout.local_shape(shape, mesh)) * self.precision.param.itemsize
            rows.append(
                (
                    ".".join(map(str, path)),
                    f"[{dims}]",
                    self.compute_row(str(path[-1])),
                    f"{size:,}",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )

    def to_toml(self) -> str:
        """The strategy as TOML tables, which `strategies.from_toml` reads back."""
        lines = ["[strategy]"]
        lines += [f'{name} = "{value}"' for name, value in self.options.items()]
        for name in ("rest", "compute", "activations"):
            lines += ["", f"[strategy.{name}]"]
            lines += [f'"{role}" = "{row}"' for role, row in getattr(self, name).items()]
        lines += ["", "[precision]"]
        lines += [
            f'{name} = "{str(getattr(self.precision, name)).removeprefix("torch.")}"'
            for name in ("param", "compute", "reduce")
        ]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        parts = []
        for name in ("rest", "compute", "activations"):
            table: Table = getattr(self, name)
            width = max(map(len, table), default=0)
            parts.append("\n".join([name, *(f"  {r:<{width}}  {row}" for r, row in table.items())]))
        if self.options:
            parts.append("options\n  " + ", ".join(f"{k} = {v}" for k, v in self.options.items()))
        return "\n".join(parts)


def find_row(table: Table, role: str, name: str) -> str:
    """The row of a role: exact, else the one pattern that matches."""
    if role in table:
        return table[role]
    hits = [
        p for p in table if p != "*" and any(c in p for c in "*?[") and fnmatch.fnmatchcase(role, p)
    ]
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
    memory = next((p.memory for p in (two, one) if p.memory != "device"), "device")
    words.append("" if memory == "device" else f"@{memory}")
    places = dict(one.at) | dict(two.at)
    words += [f"@{axis}={','.join(map(str, at))}" for axis, at in places.items()]
    return " ".join(w for w in words if w)
