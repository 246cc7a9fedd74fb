"""Meshes: named grids of devices. An axis has a name and a size; everything else is by name.

A `Mesh` is immutable and interned: the same axes over the same devices by the same transport are
the same object, so layouts, plans and caches compare meshes with `is`. Device numbers count in axis
order, major to minor. A process that holds none of a sub-mesh's devices keeps one *meta* shard of
each tensor there, so that the program types and runs everywhere and nothing moves.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

import torch

from .abstract import AbstractTransport
from .errors import MeshError, nearest
from .simulated import SimulatedTransport
from .transport import Axes, Transport

TransportName = Literal["simulated", "distributed", "abstract"]
_INTERNED: dict[tuple[Any, ...], Mesh] = {}


class Mesh:
    """A grid of devices with named axes, and the transport that moves data between them.

    Attributes:
        axes: axis name to size, major to minor.
        size: number of devices.
        transport: "simulated", "distributed" or "abstract".
        device: where this process keeps its shards.
        coords: the coordinate, axis name to index, of each shard that this process holds.
        is_first: true in exactly one process of the job: print and write files there.

    >>> import shardwise as sw
    >>> mesh = sw.make_mesh({"data": 2, "tensor": 4})
    >>> print(mesh, mesh.size, mesh.coords[5])
    mesh(data=2, tensor=4) 8 {'data': 1, 'tensor': 1}
    """

    axes: Mapping[str, int]
    size: int
    transport: TransportName
    device: torch.device
    coords: tuple[Mapping[str, int], ...]
    is_first: bool
    ranks: tuple[int, ...]  # device numbers of the root mesh, in this mesh's order
    check: bool  # whether ranks compare each collective before it runs
    _positions: dict[Axes, tuple[int, ...]]
    comm: Transport  # what moves the data; meshlib and layouts only

    def __new__(
        cls,
        axes: Mapping[str, int],
        transport: TransportName,
        device: torch.device,
        ranks: tuple[int, ...],
        check: bool = False,
    ) -> Mesh:
        """The one mesh of these arguments."""
        key = (tuple(axes.items()), transport, device, ranks, check)
        if transport == "distributed":
            from .distributed import job

            key += (job().attempt,)
        found = _INTERNED.get(key)
        if found is not None:
            return found
        self = object.__new__(cls)
        _INTERNED[key] = self
        self.axes = MappingProxyType(dict(axes))
        self.size = math.prod(axes.values())
        self.transport = transport
        self.device = device
        self.ranks = ranks
        self.check = check
        self._positions = {}
        names = tuple(axes)
        grid = itertools.product(*(range(n) for n in axes.values()))
        every = tuple(MappingProxyType(dict(zip(names, at, strict=True))) for at in grid)
        self.is_first = True
        if transport == "simulated":
            self.coords = every
            self.comm = SimulatedTransport(axes)
        elif transport == "abstract":
            self.coords = every[:1]
            self.comm = AbstractTransport(axes)
        else:
            from .distributed import DistributedTransport, job

            rank = job().rank
            self.is_first = rank == 0
            self.coords = (every[ranks.index(rank)],) if rank in ranks else ()
            self.comm = (
                DistributedTransport(axes, ranks, device, check)
                if self.coords
                else AbstractTransport(axes)
            )
        return self

    @property
    def is_outside(self) -> bool:
        """Whether this process holds no device of the mesh (a sub-mesh of other processes)."""
        return not self.coords

    @property
    def shard_device(self) -> torch.device:
        """Where shards lie: the device, or "meta" on an abstract mesh or outside a sub-mesh."""
        meta = self.transport == "abstract" or self.is_outside
        return torch.device("meta") if meta else self.device

    @property
    def held(self) -> tuple[Mapping[str, int], ...]:
        """Coordinates of the shards that are computed here; outside the mesh one representative."""
        return self.coords or (MappingProxyType(dict.fromkeys(self.axes, 0)),)

    def check_axes(self, names: Sequence[str]) -> None:
        """Raise MeshError for a name that is no axis of this mesh."""
        for name in names:
            if name not in self.axes:
                raise MeshError(f"unknown axis {name!r} on {self}{nearest(name, self.axes)}")

    def group_size(self, axes: Axes) -> int:
        """Number of devices that differ only on `axes`."""
        return math.prod(self.axes[a] for a in axes)

    def positions(self, axes: Axes) -> tuple[int, ...]:
        """Position in its group over `axes` (major to minor) of each held shard."""
        found = self._positions.get(axes)
        if found is None:
            found = self._positions[axes] = tuple(
                position(self.axes, coord, axes) for coord in self.held
            )
        return found

    def at(self, **coords: int | Sequence[int]) -> Mesh:
        """The sub-mesh at some coordinates: an int drops its axis, a sequence keeps part of it.

        Args:
            **coords: axis to index or indices; negative ones count from the end.

        >>> import shardwise as sw
        >>> sw.make_mesh({"pipe": 4, "data": 2}).at(pipe=(0, -1))
        mesh(pipe=2, data=2)
        """
        self.check_axes(tuple(coords))
        kept: dict[str, int] = {}
        picks: list[list[int]] = []
        for name, size in self.axes.items():
            want = coords.get(name, tuple(range(size)))
            indices = [want] if isinstance(want, int) else list(want)
            if not indices or any(not -size <= i < size for i in indices):
                raise MeshError(f"axis {name!r} of {self} has no coordinates {want}; size {size}")
            picks.append([i % size for i in indices])
            if len(set(picks[-1])) != len(picks[-1]):
                raise MeshError(f"axis {name!r} of {self}: coordinate named twice in {want}")
            if not isinstance(want, int):
                kept[name] = len(indices)
        at = [
            position(self.axes, dict(zip(self.axes, c, strict=True)), tuple(self.axes))
            for c in itertools.product(*picks)
        ]
        ranks = tuple(self.ranks[i] for i in at)
        return Mesh(kept, self.transport, self.device, ranks, self.check)

    def refine(self, axis: str, **sizes: int) -> Mesh:
        """The same devices with one axis cut into several, named major to minor.

        >>> import shardwise as sw
        >>> sw.make_mesh({"data": 2, "tensor": 4}).refine("tensor", row=2, col=2)
        mesh(data=2, row=2, col=2)
        """
        self.check_axes((axis,))
        if math.prod(sizes.values()) != self.axes[axis]:
            raise MeshError(
                f"axis {axis!r} of {self} has size {self.axes[axis]}, but "
                f"{' x '.join(f'{k}={v}' for k, v in sizes.items())} = {math.prod(sizes.values())}"
            )
        axes: dict[str, int] = {}
        for name, size in self.axes.items():
            for new, n in sizes.items() if name == axis else ((name, size),):
                if new in axes or (new in self.axes and new != axis and name == axis):
                    raise MeshError(f"axis name {new!r} is used twice in a refinement of {self}")
                axes[new] = n
        return Mesh(axes, self.transport, self.device, self.ranks, self.check)

    def __repr__(self) -> str:
        return f"mesh({', '.join(f'{name}={size}' for name, size in self.axes.items())})"

    def __deepcopy__(self, memo: Any) -> Mesh:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a Mesh belongs to this process; make it again with make_mesh(mesh.axes)")


def position(sizes: Mapping[str, int], coord: Mapping[str, int], axes: Axes) -> int:
    """Mixed-radix index of a coordinate over `axes`, major to minor."""
    index = 0
    for axis in axes:
        index = index * sizes[axis] + coord[axis]
    return index


@cache
def abstract_twin(mesh: Mesh) -> Mesh:
    """The abstract mesh with the same axes: for planning and for types without memory."""
    if mesh.transport == "abstract":
        return mesh
    return Mesh(mesh.axes, "abstract", mesh.device, tuple(range(mesh.size)))


def make_mesh(
    axes: Mapping[str, int],
    *,
    transport: TransportName | None = None,
    device: str | torch.device | None = None,
    check: bool = False,
) -> Mesh:
    """A mesh with named axes, major to minor.

    Args:
        axes: name to size. One size may be -1: what the world size leaves (1 on a simulated or
            abstract mesh).
        transport: None takes "distributed" in a process that torchrun started, else "simulated":
            all devices in this process. "abstract" holds shapes only and may be of any size.
        device: where shards live; None takes the GPU if there is one.
        check: compare op, axis, shape, dtype and number of every collective between ranks before it
            runs. Slow; a distributed mesh only, ignored elsewhere.

    Raises:
        MeshError: a bad name or size; or a product that is not the world size.

    >>> import shardwise as sw
    >>> sw.make_mesh({"data": -1, "tensor": 4})
    mesh(data=1, tensor=4)
    """
    sizes = dict(axes)
    for name, size in sizes.items():
        if not name.isidentifier():
            raise MeshError(f"axis name {name!r} is not an identifier")
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
            raise MeshError(f"axis {name!r} has size {size!r}; expected an int >= 1, or -1 once")
    if transport is None:
        transport = "distributed" if is_launched() else "simulated"
    elif transport not in ("simulated", "distributed", "abstract"):
        raise MeshError(
            f"unknown transport {transport!r}"
            + nearest(transport, ("simulated", "distributed", "abstract"))
        )
    world = 1
    if transport == "distributed":
        from .distributed import job

        world = job(device).size
        where = job(device).device
    else:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if where.type == "cuda" and where.index is None:
            where = torch.device(
                "cuda", torch.cuda.current_device() if transport == "simulated" else 0
            )
    free = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    text = ", ".join(f"{name}={size}" for name, size in axes.items())
    if len(free) > 1:
        raise MeshError(f"mesh({text}): only one axis may be -1, found {free}")
    if free:
        if transport == "distributed" and world % known:
            raise MeshError(
                f"mesh({text}): the other axes multiply to {known}, not a divisor of {world}"
            )
        sizes[free[0]] = max(1, world // known)
    total = math.prod(sizes.values())
    if transport == "distributed" and total != world:
        raise MeshError(
            f"mesh({text}) has {total} devices, but this job has {world} processes; "
            f"start {total} with torchrun --nproc-per-node, or change an axis (-1: what is left)"
        )
    return Mesh(sizes, transport, where, tuple(range(total)), check and transport == "distributed")


def is_launched() -> bool:
    """Whether torchrun (or a launcher with the same variables) started this process."""
    env = os.environ
    return "TORCHELASTIC_RUN_ID" in env or all(
        name in env for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")
    )
