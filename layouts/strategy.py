"""`Strategy`: a table of role -> layout, and nothing else. Parallelism is written in its rows.

A *role* is the name of a tensor: a parameter's last key, or an activation's name in the code.
`rest` says how a parameter is stored, `compute` how it is used, `activations` how the tensors
between ops lie. An exact role beats a pattern. Rows speak of a parameter's own dims; the dims that
stacking added come from options.

Two strategies multiply: `rows` says how their rows join.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import optree

from ..meshlib.errors import LayoutError, nearest
from ..meshlib.mesh import Mesh
from . import notation
from .layout import Layout, make
from .memory import to_memory, with_memory
from .picture import Picture
from .picture import Table as PictureTable
from .precision import DTYPES as DTYPES
from .precision import Precision as Precision
from .reshard import reshard_one
from .rows import (
    ROLES,
    Frozen,
    Table,
    find_row,
    hint,
    is_pattern,
    join_tables,
    misnamed,
    rest_layout,
    row_layout,
)
from .sharded import ShardedTensor

OPTIONS: dict[str, tuple[str, ...] | None] = {  # name -> known values; None: a mesh axis or ""
    "layer": None,
    "save": ("gathered", "shard"),
    "matmul": ("direct", "streamed", "ring"),
    "attention": ("local",),
    "order": ("contiguous",),
    "tied": ("once", "per_use"),
    "recompute": ("none", "cheap", "all"),
    "saved": ("device", "host"),
}
DEFAULTS = {
    "layer": "", "save": "gathered", "matmul": "direct", "attention": "local",
    "order": "contiguous", "tied": "per_use", "recompute": "none", "saved": "device",
}  # fmt: skip
_TABLES = ("rest", "compute", "activations", "options")
_NONE: Table = Frozen()


@dataclass(frozen=True)
class Strategy:
    """Rows of role -> layout string: at rest, at use, and of activations; plus options.

    `equal` lists groups of axes that must be of one size: the sides of a square or a cube.

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
    precision: Precision = field(default_factory=Precision)
    options: Mapping[str, str] = field(default_factory=dict)
    equal: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        for name in _TABLES:
            table = getattr(self, name)
            if not isinstance(table, Mapping):
                raise TypeError(f"strategy: {name} = {table!r}; expected a table of role = layout")
            for key, text in table.items():
                if not isinstance(key, str) or not isinstance(text, str):
                    raise TypeError(f"strategy: {name} has {key!r} = {text!r}; expected strings")
            object.__setattr__(self, name, Frozen(table))
        for name, value in self.options.items():
            if name not in OPTIONS:
                raise ValueError(f"strategy: unknown option {name!r}{nearest(name, OPTIONS)}")
            known = OPTIONS[name]
            if known is not None and value not in known:
                raise ValueError(f"strategy: option {name} = {value!r}{nearest(value, known)}")
        for table in (self.rest, self.compute, self.activations):
            for row in table.values():
                notation.parse(row)
        if not isinstance(self.precision, Precision):
            raise TypeError(f"strategy: precision = {self.precision!r}; expected a Precision")
        if not isinstance(self.equal, tuple) or not all(_are_sides(axes) for axes in self.equal):
            raise TypeError(
                f"strategy: equal = {self.equal!r}; expected groups of 2 or 3 names of axes"
            )

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
        if not isinstance(other, Strategy):
            return NotImplemented
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
        rest: Table = _NONE,
        compute: Table = _NONE,
        activations: Table = _NONE,
        precision: Precision | None = None,
        **options: str,
    ) -> Strategy:
        """The strategy with some rows and options changed."""
        given: dict[str, Any] = {"rest": rest, "compute": compute, "activations": activations}
        for name, table in given.items():
            if not isinstance(table, Mapping):
                raise TypeError(f"strategy: {name} = {table!r}; expected a table of role = layout")
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
        row = self.compute_row(role)
        to = row_layout(row, leaf.shape, leaf.mesh, leaf.layout, f"compute row of {role}")
        # A row that names no memory is one on the device, wherever the parameter rests.
        to = with_memory(to, notation.parse(row).memory)
        if leaf.layout.memory == "disk":
            leaf = to_memory(leaf, to.memory)
        if leaf.is_floating_point() and leaf.dtype != self.precision.compute:
            leaf = leaf.to(self.precision.compute)
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
            LayoutError: indivisible sizes, a row that does not fit or that names other dims than
                the parameter has, all of them, by path.
            MeshError: an axis that the mesh has not.

        Warns:
            UserWarning: a row of a role that neither a parameter nor a preset has.
        """
        paths, leaves, spec = optree.tree_flatten_with_path(declaration)
        found: list[Layout] = []
        problems = self._unequal(mesh)
        known = {*_mapping(sizes), *(name for param in leaves for name in param.names)}
        self._warn_of_unused({str(path[-1]) for path in paths if path})
        for path, param in zip(paths, leaves, strict=True):
            name, role = ".".join(map(str, path)), str(path[-1])
            own = param.names[len(param.stacked) :]
            rows = {"rest": self.rest_row(role), "compute": self.compute_row(role)}
            wrong = [
                f"{name}: {table} row of {role}: {text}"
                for table, row in rows.items()
                if (text := misnamed(row, own, known))
            ]
            problems += wrong
            try:
                found.append(self._rest_layout(role, param, sizes, mesh))
            except LayoutError as error:
                problems += [] if wrong else [f"{name}: {error}"]
        if problems:
            raise LayoutError("\n".join(problems), kind="indivisible")
        return spec.unflatten(found)

    def _warn_of_unused(self, declared: set[str]) -> None:
        """Tell of rows that a typing error in the role has kept from every parameter."""
        for table in ("rest", "compute"):
            for role in getattr(self, table):
                if not is_pattern(role) and role not in ROLES and role not in declared:
                    warnings.warn(
                        f"strategy: the {table} row of {role!r} is no parameter's"
                        f"{nearest(role, sorted(declared))}",
                        stacklevel=3,
                    )

    def _unequal(self, mesh: Mesh) -> list[str]:
        """What is wrong with the sizes of the axes."""
        for axes in self.equal:
            mesh.check_axes(axes)
        shapes = {2: "square", 3: "cube"}
        return [
            f"axes {', '.join(map(repr, axes))} are the sides of a {shapes[len(axes)]}, "
            f"so they must be of one size; {mesh} has {', '.join(str(mesh.axes[a]) for a in axes)}"
            for axes in self.equal
            if len({mesh.axes[a] for a in axes}) > 1
        ]

    def check(self, sizes: Any, mesh: Mesh, **more: int) -> None:
        """Refuse what cannot run: unequal sides, and activations that an axis does not divide.

        Args:
            sizes: dim to size: a mapping, or a config.
            mesh: where to.
            **more: sizes that no config has: batch, seq.

        Raises:
            LayoutError: all problems, each with the role, the dim, the axes and both sizes.
            MeshError: an axis that the mesh has not.

        >>> import shardwise as sw
        >>> mesh = sw.make_mesh({"tensor": 4})
        >>> sw.strategies.tensor_1d().check({"heads": 6}, mesh)
        Traceback (most recent call last):
        ...
        shardwise.meshlib.errors.LayoutError: strategy: dim 'heads' of size 6 (heads, attended) is \
not divisible by 4 ('tensor'); pad it: pad.heads = 4
        """
        known = {**_mapping(sizes), **more}
        wrong: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for role, row in self.activations.items():
            parsed = notation.parse(row)
            for name, axes in zip(parsed.names, parsed.dims, strict=True):
                mesh.check_axes(axes)
                if name in known and known[name] % mesh.group_size(axes):
                    wrong.setdefault((name, axes), []).append(role)
        problems = self._unequal(mesh)
        for (name, axes), roles in wrong.items():
            n = mesh.group_size(axes)
            way = hint(name, n, known)
            roles = [role for role in roles if role != "*"] or roles
            more_roles = f" and {len(roles) - 3} more" if len(roles) > 3 else ""
            problems.append(
                f"dim {name!r} of size {known[name]} ({', '.join(roles[:3])}{more_roles}) "
                f"is not divisible by {n} ({'/'.join(axes)!r}){way}"
            )
        if problems:
            raise LayoutError("strategy: " + "\n".join(problems), kind="indivisible")

    def _rest_layout(self, role: str, param: Any, sizes: Any, mesh: Mesh) -> Layout:
        shape = param.shape(sizes)
        stacked = len(param.stacked)
        row = rest_layout(self.rest_row(role), shape[stacked:], mesh, f"rest row of {role}")
        layer = self.option("layer")
        ahead = tuple((layer,) if layer and name == "layer" else () for name in param.stacked)
        full = make(ahead + row.dims, row.unreduced, row.reduced, row.varying, row.memory, row.at)
        for name, size, axes in zip(param.names, shape, full.dims, strict=True):
            n = mesh.group_size(axes)
            if size % n and not name.isdigit():
                raise LayoutError(
                    f"rest row of {role}: dim {name!r} of size {size} is not divisible by {n} "
                    f"({'/'.join(axes)!r}){hint(name, n, _mapping(sizes))}",
                    kind="indivisible",
                )
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

    def table(self, declaration: Any, sizes: Any, mesh: Mesh) -> Picture:
        """Per parameter: its type at rest, its compute row, and its bytes on one device."""
        layouts = self.layouts(declaration, sizes, mesh)
        paths, params, _ = optree.tree_flatten_with_path(declaration)
        rows: list[tuple[str, ...]] = []
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
        head = ("parameter", "at rest", "at use", "bytes per device")
        return Picture((PictureTable(head, tuple(rows)),))

    def to_toml(self) -> str:
        """The strategy as TOML tables, which `strategies.from_toml` reads back."""
        lines = ["[strategy]"]
        lines += [f"{name} = {_quoted(value)}" for name, value in self.options.items()]
        if self.equal:
            lines.append(f"equal = {json.dumps(self.equal)}")
        for name in ("rest", "compute", "activations"):
            lines += ["", f"[strategy.{name}]"]
            lines += [f"{_quoted(k)} = {_quoted(row)}" for k, row in getattr(self, name).items()]
        names = {dtype: name for name, dtype in DTYPES.items()}
        lines += ["", "[precision]"]
        lines += [f'{name} = "{names[dtype]}"' for name, dtype in self.precision.dtypes.items()]
        lines += ["fp8 = true"] if self.precision.fp8 else []
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


def _mapping(sizes: Any) -> Mapping[str, int]:
    """Dim to size, of a mapping, a config with `sizes`, or any object."""
    sizes = getattr(sizes, "sizes", sizes)
    return sizes if isinstance(sizes, Mapping) else vars(sizes)


def _are_sides(axes: Any) -> bool:
    return isinstance(axes, tuple) and len(axes) in (2, 3) and all(isinstance(a, str) for a in axes)


def _quoted(text: str) -> str:
    """A string as TOML and JSON both write it."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
