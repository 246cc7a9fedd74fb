"""Broadcast and reduce along a mesh axis: one device's value for all, all devices' sum for one.

Each is the other's dual; `layouts.permute.moved` runs them and makes them differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from ...meshlib import record
from ...meshlib.mesh import Mesh

Kind = Literal["broadcast", "reduce"]
DUAL: dict[Kind, Kind] = {"broadcast": "reduce", "reduce": "broadcast"}


@dataclass(frozen=True, slots=True)
class Rooted:
    """One of the two at work: from, or to, the device at position `root` of the axis."""

    mesh: Mesh
    axis: str
    root: int
    kind: Kind

    @property
    def dual(self) -> Rooted:
        """The way back."""
        return replace(self, kind=DUAL[self.kind])

    def run(
        self, shards: Sequence[Tensor], by: record.Context | None, backward: bool
    ) -> list[Tensor]:
        """Move the shards, on the record."""
        axes = (self.axis,)
        if record.LOGS:
            sums: Any = "sum" if self.kind == "reduce" else None
            record.collective(self.kind, self.mesh, axes, shards[0], by, sums, backward)
        comm = self.mesh.comm
        move = comm.broadcast if self.kind == "broadcast" else comm.reduce
        return move(shards, axes, self.root)
