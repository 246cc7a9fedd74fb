"""Broadcast and reduce along a mesh axis: one device's value for all, all devices' sum for one.

Each is the other's dual, its own forward-mode derivative, and commutes with vmap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ...layouts.convert import in_front
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
    step: Rooted, shards: Sequence[Tensor], by: record.Context | None, backward: bool
) -> list[Tensor]:
    """Move the shards, on the record."""
    axes = (step.axis,)
    if record.LOGS:
        sums: Any = "sum" if step.kind == "reduce" else None
        record.collective(step.kind, step.mesh, axes, shards[0], by, sums, backward)
    comm = step.mesh.comm
    move = comm.broadcast if step.kind == "broadcast" else comm.reduce
    return move(shards, axes, step.root)


class Root(torch.autograd.Function):
    """A broadcast or reduce of all shards of this process, with the other as derivative."""

    @staticmethod
    def forward(step: Rooted, by: Any, backward: bool, *shards: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        return tuple(run(step, shards, by, backward))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: D102
        ctx.step, ctx.by = inputs[0], inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # noqa: D102
        return None, None, None, *rooted(ctx.step.dual, grads, ctx.by, True)

    @staticmethod
    def jvp(ctx: Any, _step: Any, _by: Any, _backward: Any, *tangents: Tensor) -> Any:  # noqa: D102
        return tuple(rooted(ctx.step, tangents, None))

    @staticmethod
    def vmap(info: Any, dims: Any, step: Rooted, by: Any, backward: bool, *shards: Tensor) -> Any:  # noqa: D102
        front = in_front(shards, dims[3:], info.batch_size)
        return tuple(rooted(step, front, by, backward)), (0,) * len(shards)


def rooted(
    step: Rooted, shards: Sequence[Tensor], by: record.Context | None, backward: bool = False
) -> Sequence[Tensor]:
    """A differentiable broadcast or reduce: a node on every device, so that all meet backward."""
    return Root.apply(step, by, backward, *shards)
