"""`permute_shards`: whole shards sent along mesh axes: ring shifts, blocks in another order.

It changes the value, not the type: the shard of position s over the axes goes to position t for
each pair (s, t), and where nothing arrives there are zeros. It is linear; its dual is the
permutation with the pairs turned round, it is its own forward-mode derivative, and it commutes
with vmap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..meshlib import record
from ..meshlib.errors import LayoutError, word
from ..meshlib.mesh import Mesh
from ..meshlib.source import user_line
from ..meshlib.transport import Axes
from .convert import in_front
from .sharded import ShardedTensor

Pairs = tuple[tuple[int, int], ...]
_grad_enabled = torch.is_grad_enabled
_functorch = torch._C._are_functorch_transforms_active
_forward_ad = torch.autograd.forward_ad


class Move(Protocol):
    """A linear move of whole shards along mesh axes, which no dim of a tensor enters."""

    @property
    def dual(self) -> Move:
        """The way back."""
        ...

    def run(
        self, shards: Sequence[Tensor], by: record.Context | None, backward: bool
    ) -> list[Tensor]:
        """Move the shards, on the record."""
        ...


@dataclass(frozen=True, slots=True)
class Shift:
    """A permutation at work: (from, to) positions over mesh axes, major to minor."""

    mesh: Mesh
    axes: Axes
    pairs: Pairs

    @property
    def dual(self) -> Shift:
        """The way back."""
        return Shift(self.mesh, self.axes, tuple(sorted((t, s) for s, t in self.pairs)))

    def run(
        self, shards: Sequence[Tensor], by: record.Context | None, backward: bool
    ) -> list[Tensor]:
        """Send the shards; recorded with the elements of one local operand."""
        if record.LOGS:
            record.collective("permute", self.mesh, self.axes, shards[0], by, None, backward)
        return self.mesh.comm.permute(shards, self.axes, self.pairs)

    @property
    def is_identity(self) -> bool:
        """Whether every shard stays where it is."""
        everyone = len(self.pairs) == self.mesh.group_size(self.axes)
        return everyone and all(s == t for s, t in self.pairs)


def checked(mesh: Mesh, axes: Axes, pairs: Sequence[tuple[int, int]]) -> Shift:
    """The permutation, if no position is outside the axes or stands twice on a side.

    Raises:
        MeshError: an unknown axis.
        ValueError: a bad position.
    """
    mesh.check_axes(axes)
    n = mesh.group_size(axes)
    for side in zip(*pairs, strict=True):
        if len(set(side)) != len(side) or any(not 0 <= p < n for p in side):
            raise ValueError(
                f"permute: positions {list(side)} must differ and lie in 0..{n - 1}, over {axes}"
            )
    return Shift(mesh, axes, tuple(sorted((int(s), int(t)) for s, t in pairs)))


class Moved(torch.autograd.Function):
    """A move of all shards of this process, whole, with its dual as derivative."""

    @staticmethod
    def forward(move: Move, by: Any, backward: bool, *shards: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        return tuple(move.run(shards, by, backward))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: D102
        ctx.move, ctx.by = inputs[0], inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # noqa: D102
        return None, None, None, *moved(ctx.move.dual, grads, ctx.by, True)

    @staticmethod
    def jvp(ctx: Any, _move: Any, _by: Any, _backward: Any, *tangents: Tensor) -> Any:  # noqa: D102
        return tuple(moved(ctx.move, tangents, None))

    @staticmethod
    def vmap(info: Any, dims: Any, move: Move, by: Any, backward: bool, *shards: Tensor) -> Any:  # noqa: D102
        front = in_front(shards, dims[3:], info.batch_size)
        return tuple(moved(move, front, by, backward)), (0,) * len(shards)


# The C apply, which skips the binding of the signature.
_apply = super(torch.autograd.Function, Moved).apply  # pyright: ignore


def moved(
    move: Move, shards: Sequence[Tensor], by: record.Context | None, backward: bool = False
) -> Sequence[Tensor]:
    """A differentiable move: a node on every device, so that all meet in the backward."""
    if _functorch():
        return Moved.apply(move, by, backward, *shards)
    if (
        _grad_enabled() and any(s.requires_grad for s in shards)
    ) or _forward_ad._current_level >= 0:
        return _apply(move, by, backward, *shards)
    return move.run(shards, by, backward)


def permute_shards(
    x: ShardedTensor, axes: str | Sequence[str], pairs: Sequence[tuple[int, int]]
) -> ShardedTensor:
    """`x` with its shards moved along mesh axes; the type stays.

    Args:
        x: sharded or varying over each of the axes.
        axes: one axis, or several (major to minor) whose positions count as one.
        pairs: (from, to) positions; no position stands twice on a side. Zeros where nothing
            arrives.

    Returns:
        Same type. A full permutation of a cut dim reorders its blocks.

    Cost: the local elements per device, one step; nothing where every shard stays. Gradient: the
    pairs turned round.

    Raises:
        LayoutError: an axis over which the shards are equal or parts of a sum.
        ValueError: a position outside the axes, or twice on a side.

    >>> import torch, shardwise as sw
    >>> from shardwise.layouts.permute import permute_shards
    >>> x = sw.shard(torch.arange(4), sw.make_mesh({"ring": 4}), "n/ring")
    >>> permute_shards(x, "ring", [(i, (i + 1) % 4) for i in range(4)]).full_tensor()
    tensor([3, 0, 1, 2])
    """
    names: Axes = (axes,) if isinstance(axes, str) else tuple(axes)
    shift = checked(x.mesh, names, pairs)
    wrong = [
        a
        for a in names
        if not isinstance(x.layout.state(a), int) and x.layout.state(a) != "varying"
    ]
    if wrong:
        raise LayoutError(
            word(
                f"axis {wrong[0]!r} cuts no dim (it is {x.layout.state(wrong[0])}): "
                "there are no blocks to send along it",
                op="permute",
                source=user_line(),
                operands=[("x", str(x))],
                mesh=x.mesh,
            ),
            op="permute",
            source=user_line(),
        )
    if shift.is_identity:
        return x
    kind = x._type.with_layout(x.layout, x._type.grad and _grad_enabled())
    return ShardedTensor(tuple(moved(shift, x._shards, record.context())), kind)
