"""Largest and smallest entries, and where they are.

Where an axis cuts a reduced dim, each device reduces its block and one small all_reduce (max or
min) finishes. Values that need a gradient cost one more: `amax` shares its gradient between ties,
so it counts them; `max` along a dim gives it to the entry that it picks, the first one, so it
fetches that entry. The backward moves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layouts.layout import LayoutLike
from ..layouts.sharded import ShardedTensor
from ..meshlib.transport import ReduceOp
from . import pointwise
from .dispatch import Info, Local, Op, export
from .index import gather
from .meet import dropped, extremum, first_index, settled
from .reduce import Dims, normal_dims, reduction
from .rules import Rule, sized

Over = Mapping[str, str] | None


class Extreme(NamedTuple):
    """What `max` and `min` along a dim give."""

    values: ShardedTensor
    indices: ShardedTensor


class Range(NamedTuple):
    """What `aminmax` gives."""

    min: ShardedTensor
    max: ShardedTensor


class _Seen(torch.autograd.Function):
    """Zero, with the derivative of x: so a gradient reaches an entry whose value is known."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.clone()


def _ties_rule(shapes: Any, dims: tuple[int, ...]) -> Rule:
    whole = reduction(dims, True, len(shapes[0]))
    return sized(Rule((*whole.inputs, whole.outputs[0]), whole.outputs), shapes)


def _ties_local(info: Info) -> Local:
    dims = info.static[0]

    def count(x: Tensor, largest: Tensor) -> Tensor:
        tied = x == largest
        entries = torch.where(tied, _Seen.apply(x), 0)
        return entries.sum(dims, keepdim=True) + tied.sum(dims, keepdim=True).to(x.dtype)

    return count


_TIES = Op("amax", _ties_rule, _ties_local)


def _amax_rule(shapes: Any, dims: tuple[int, ...], keepdim: bool, op: str) -> Rule:
    return sized(reduction(dims, keepdim, len(shapes[0]), reduced=op), shapes)


def _amax_local(info: Info) -> Local:
    dims, keepdim, op = info.static
    function = torch.amax if op == "max" else torch.amin
    return lambda x: function(x, dims, keepdim=keepdim)


def _amax_cut(operands: Sequence[Any], static: tuple[Any, ...]) -> ShardedTensor:
    """The all_reduce of the tie count also carries the gradient: that of the tied entries."""
    (x,) = operands
    dims, keepdim, op = static
    value: Any = extremum(x, dims, op)
    if x._type.grad and torch.is_grad_enabled():
        ties: Any = settled(_TIES((x, value), (dims,)))
        count = ties.detach()
        value = value + (ties - count) / count
    return dropped(value, dims, keepdim)


_AMAX = {op: Op(f"a{op}", _amax_rule, _amax_local, protocol=_amax_cut) for op in ("max", "min")}


def _reduced_by(
    op: ReduceOp, x: ShardedTensor, dim: Dims, keepdim: bool, out: LayoutLike | None, over: Over
) -> ShardedTensor:
    dims = normal_dims(dim, x.ndim)
    if x.ndim == 0:
        return x
    return _AMAX[op]((x,), (dims, keepdim, op), out, over)


def _all_dims(dim: Dims) -> Dims:
    return None if isinstance(dim, Sequence) and not dim else dim


@export(torch.amax, methods=["amax"])
def amax(
    x: ShardedTensor,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """The largest entry along dims (all, if None); ties share the gradient.

    Cost: where an axis cuts one of the dims, an all_reduce(max) of the result, and, if x needs a
    gradient, an all_reduce of its tie count; backward none. The result is replicated there.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.arange(6.0).reshape(2, 3), sw.make_mesh({"data": 2}), "b/data d")
    >>> x.amax(0)
    f32[3] local[3] on mesh(data=2)
    >>> x.amax().item()
    5.0
    """
    return _reduced_by("max", x, _all_dims(dim), keepdim, out, over)


@export(torch.amin, methods=["amin"])
def amin(
    x: ShardedTensor,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """The smallest entry along dims; as `amax`.

    >>> import torch, shardwise as sw
    >>> sw.shard(torch.arange(6.0), sw.make_mesh({"data": 2}), "n/data").amin().item()
    0.0
    """
    return _reduced_by("min", x, _all_dims(dim), keepdim, out, over)


@export(torch.aminmax, methods=["aminmax"])
def aminmax(x: ShardedTensor, *, dim: int | None = None, keepdim: bool = False) -> Range:
    """Smallest and largest entry, as two calls."""
    return Range(amin(x, dim, keepdim), amax(x, dim, keepdim))


def _arg_rule(shapes: Any, dims: tuple[int, ...], keepdim: bool, op: str) -> Rule:
    return _amax_rule(shapes, dims, keepdim, f"arg{op}")


def _arg_local(info: Info) -> Local:
    dims, keepdim, op = info.static
    function = torch.argmax if op == "max" else torch.argmin
    ndim = len(info.rule.inputs[0])
    if len(dims) == 1:
        return lambda x: function(x, dims[0], keepdim=keepdim)
    return lambda x: function(x).reshape((1,) * ndim if keepdim else ())


def _arg_cut(operands: Sequence[Any], static: tuple[Any, ...]) -> ShardedTensor:
    (x,) = operands
    dims, keepdim, op = static
    return dropped(first_index(x, extremum(x, dims, op), dims), dims, keepdim)


_ARG = {
    op: Op(f"arg{op}", _arg_rule, _arg_local, protocol=_arg_cut, differentiable=False)
    for op in ("max", "min")
}


def _arg(
    op: str, x: ShardedTensor, dim: int | None, keepdim: bool, out: LayoutLike | None, over: Over
) -> ShardedTensor:
    return _ARG[op]((x,), (normal_dims(dim, x.ndim), keepdim, op), out, over)


@export(torch.argmax, methods=["argmax"])
def argmax(
    x: ShardedTensor,
    dim: int | None = None,
    keepdim: bool = False,
    *,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """The global index of the largest entry, the first of ties: along a dim, or flattened.

    Cost: where an axis cuts what is searched, an all_reduce(max) of values and an all_reduce(min)
    of int64.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.tensor([1.0, 4.0, 4.0, 2.0]), sw.make_mesh({"data": 2}), "n/data")
    >>> x.argmax().item()
    1
    """
    return _arg("max", x, dim, keepdim, out, over)


@export(torch.argmin, methods=["argmin"])
def argmin(
    x: ShardedTensor,
    dim: int | None = None,
    keepdim: bool = False,
    *,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """The global index of the smallest entry; as `argmax`."""
    return _arg("min", x, dim, keepdim, out, over)


def _pair_rule(shapes: Any, dims: tuple[int, ...], keepdim: bool, op: str) -> Rule:
    return sized(reduction(dims, keepdim, len(shapes[0]), reduced=op, results=2), shapes)


def _pair_local(info: Info) -> Local:
    dims, keepdim, op = info.static
    function = torch.max if op == "max" else torch.min
    return lambda x: tuple(function(x, dims[0], keepdim=keepdim))


def _pair_cut(
    operands: Sequence[Any], static: tuple[Any, ...]
) -> tuple[ShardedTensor, ShardedTensor]:
    (x,) = operands
    dims, keepdim, op = static
    values = extremum(x, dims, op)
    indices = first_index(x, values, dims)
    if x._type.grad and torch.is_grad_enabled():
        values = settled(gather(x, dims[0], indices))
    return dropped(values, dims, keepdim), dropped(indices, dims, keepdim)


_PAIR = {op: Op(op, _pair_rule, _pair_local, protocol=_pair_cut) for op in ("max", "min")}


def _largest(
    op: ReduceOp, x: Any, dim: Any, keepdim: bool, out: LayoutLike | None, over: Over
) -> Any:
    if dim is None:
        return _reduced_by(op, x, None, keepdim, out, over)
    if not isinstance(dim, int):
        return getattr(pointwise, f"{op}imum")(x, dim, out=out, over=over)
    if x.ndim == 0:
        return Extreme(x, _ARG[op]((x,), ((), False, op)))
    return Extreme(*_PAIR[op]((x,), (normal_dims(dim, x.ndim), keepdim, op), out, over))


@export(torch.max, methods=["max"])
def max(
    x: Any,
    dim: Any = None,
    keepdim: bool = False,
    *,
    out: LayoutLike | None = None,
    over: Over = None,
) -> Any:
    """`torch.max`: of all entries; along a dim (values, indices); or of two tensors.

    Args:
        x: any layout.
        dim: None for all entries (ties share the gradient, as in `amax`); a dim (the first of ties
            gets it); or a second tensor.
        keepdim: keep the dim with size 1.
        out: layout of the values.
        over: mesh axis to factor, where the types leave a choice.

    Cost: along a cut dim an all_reduce(max) and, for the index, an all_reduce(min); if x needs a
    gradient, one more all_reduce that fetches the picked entries. Backward none.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.tensor([[1.0, 5.0], [7.0, 2.0]]), sw.make_mesh({"data": 2}), "b/data d")
    >>> values, indices = x.max(0)
    >>> values.full_tensor(), indices.full_tensor()
    (tensor([7., 5.]), tensor([1, 0]))
    """
    return _largest("max", x, dim, keepdim, out, over)


@export(torch.min, methods=["min"])
def min(
    x: Any,
    dim: Any = None,
    keepdim: bool = False,
    *,
    out: LayoutLike | None = None,
    over: Over = None,
) -> Any:
    """`torch.min`; as `max`."""
    return _largest("min", x, dim, keepdim, out, over)
