"""How a parameter enters whose gradient was asked for scattered (ZeRO-2): as a block, though whole.

The leaf that autograd sees has the shape of a block, in the dtype asked of the gradient, and holds
no memory; the function gets the whole parameter, which is there already. Backward through this
entry converts a gradient, unreduced, to the layout asked for, as soon as it is complete: nothing as
large as the whole gradient is kept. A stacked parameter enters slice by slice in `scan`, so each
layer's gradient is scattered when its own backward is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...layouts import pending
from ...layouts.convert import COLLECTORS, Step, convert_shards, planned
from ...layouts.layout import Layout, make
from ...layouts.reshard import find_route
from ...layouts.sharded import ShardedTensor, make_type
from ...meshlib import record


@dataclass(frozen=True)
class Entry:
    """One parameter: its value, its layout inside the function, and its gradient's."""

    value: ShardedTensor
    inside: Layout
    asked: Layout
    dtype: torch.dtype
    path: str

    def leaf(self) -> list[Tensor]:
        """What is differentiated in its place: one number, seen in the gradient's local shape."""
        shape = self.asked.local_shape(self.value.shape, self.value.mesh)
        return [s.new_zeros((), dtype=self.dtype).expand(shape) for s in self.value._shards]

    def entered(self, leaf: Sequence[Tensor]) -> ShardedTensor:
        """The parameter inside, from the leaf's shards."""
        kind = make_type(self.value.mesh, self.inside, self.value.shape, self.value.dtype, True)
        by = record.context()
        if by is not None:
            by = by._replace(op=by.op or "value_and_grad", why="gradient", path=self.path or None)
        if COLLECTORS and self.value.mesh.transport == "distributed":
            value = ShardedTensor(self.value._shards, kind)
            back = [(self.dtype, None), *((step, by) for step in self.steps())]
            x = pending.entering(value, kind, leaf, back)
        else:
            x = ShardedTensor(
                _Enter.apply(self.steps(), by, self.value._shards, self.dtype, *leaf), kind
            )
        if self.path:
            x._path = self.path
        if self.value.ndim > 1 and not self.asked.dims[0] and not self.inside.dims[0]:
            x._entry = lambda: self.slices(leaf)
        return x

    def slices(self, leaf: Sequence[Tensor]) -> Callable[[int], ShardedTensor]:
        """The parameter's slices along dim 0, each with its own way out.

        A slice enters when it is asked for: backward leaves through what entered last first, so
        that the gradient of a layer goes before the layer in front computes its own.
        """
        columns = list(zip(*(s.unbind(0) for s in leaf), strict=True))
        shape, old = self.value.shape[1:], self.value._type
        kind = make_type(old.mesh, _tail(old.layout), shape, old.dtype, False)
        wholes = zip(*(s.detach().unbind(0) for s in self.value._shards), strict=True)
        parts = [
            Entry(
                ShardedTensor(tuple(whole), kind),
                _tail(self.inside),
                _tail(self.asked),
                self.dtype,
                self.path,
            )
            for whole in wholes
        ]
        return lambda number: parts[number].entered(columns[number])

    def steps(self) -> tuple[Step, ...]:
        """The conversions of the gradient."""
        value = self.value
        kind = make_type(value.mesh, self.inside.dual, value.shape, value.dtype, False)
        found = []
        for axes, to in find_route(kind, self.asked) or ():
            move = planned(kind, axes, to)
            if move is not None:
                step, kind = move
                found.append(step)
        return tuple(found)


def entry(
    value: Any, inside: Layout | None, asked: Layout | None, path: str, dtype: torch.dtype | None
) -> Entry | None:
    """The entry of a parameter, or None where its gradient comes out as it was asked for anyway."""
    if (
        inside is None
        or asked is None
        or inside.dual is asked
        or not isinstance(value, ShardedTensor)
    ):
        return None
    if find_route(value._type.with_layout(inside.dual), asked) is None:
        return None
    return Entry(value, inside, asked, dtype or value.dtype, path)


def _tail(layout: Layout) -> Layout:
    """The layout of a slice along dim 0."""
    return make(
        layout.dims[1:], layout.unreduced, layout.reduced, layout.varying, layout.memory, layout.at
    )


class _Enter(torch.autograd.Function):
    """Known wholes in the leaves' place; backward converts as the dual of a gather does."""

    @staticmethod
    def forward(
        ctx: Any, steps: tuple[Step, ...], by: Any, wholes: Any, dtype: Any, *leaf: Tensor
    ) -> Any:
        ctx.steps, ctx.by, ctx.dtype = steps, by, dtype
        return tuple(s.detach() for s in wholes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # Cast first: sums are taken in the dtype asked for.
        shards: Sequence[Tensor] = [g.to(ctx.dtype) for g in grads]
        for step in ctx.steps:
            shards = convert_shards(step, shards, ctx.by, True)
        return None, None, None, None, *shards
