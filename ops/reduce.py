"""Sums and what else folds a dim into one entry: sum, mean, count_nonzero, prod, any, all.

`sum` and `mean`, whose count is the GLOBAL one, are linear: over a cut dim they stay local and
leave a sum owed. The others exchange one entry per device and result at once. See `extreme` for max
and min, `moments` for var and norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..layouts.convert import convert
from ..layouts.layout import LayoutLike
from ..layouts.sharded import ShardedTensor
from .dispatch import Info, Local, Op, export
from .meet import blockwise, dropped, extremum
from .pointwise import to
from .rules import Rule, letters, sized

Dims = int | Sequence[int] | None
Over = Mapping[str, str] | None


def normal_dims(dim: Dims, ndim: int) -> tuple[int, ...]:
    """Dims as sorted non-negative numbers; None and none are all."""
    if dim is None or dim == () or dim == []:
        return tuple(range(ndim))
    given = (dim,) if isinstance(dim, int) else tuple(dim)
    for d in given:
        if not -max(ndim, 1) <= d < max(ndim, 1):
            raise IndexError(f"dim {d} is out of range for a tensor with {ndim} dims")
    found = tuple(sorted(d % max(ndim, 1) for d in given))
    if len(set(found)) != len(found):
        raise ValueError(f"dim {dim} names a dim twice")
    return found if ndim else ()


def reduction(
    dims: tuple[int, ...],
    keepdim: bool,
    ndim: int,
    *,
    linear: bool = False,
    reduced: str | None = None,
    blocked: bool = False,
    results: int = 1,
) -> Rule:
    """The rule that drops (or keeps as size 1) these dims."""
    names = letters(ndim)
    gone = {names[d] for d in dims}
    kept = tuple(() if n in gone else (n,) for n in names if keepdim or n not in gone)
    return Rule(
        (tuple((n,) for n in names),),
        (kept,) * results,
        blocked=frozenset(gone) if blocked else frozenset(),
        reduced=dict.fromkeys(gone, reduced) if reduced else {},
        linear=frozenset((0,)) if linear else frozenset(),
    )


def _sum_rule(
    shapes: Any, dims: tuple[int, ...], keepdim: bool, dtype: torch.dtype | None = None
) -> Rule:
    # parts that are rounded to integers do not add up to the rounded sum
    rounds = dtype is not None and not (dtype.is_floating_point or dtype.is_complex)
    return sized(reduction(dims, keepdim, len(shapes[0]), linear=not rounds), shapes)


def _sum_local(info: Info) -> Local:
    dims, keepdim, dtype = info.static
    return lambda x: torch.sum(x, dims, keepdim=keepdim, dtype=dtype)


_SUM = Op("sum", _sum_rule, _sum_local)


@export(torch.sum, methods=["sum"])
def sum(
    x: ShardedTensor,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """The sum over dims (all, if None); unreduced over the axes that cut them. Nothing moves.

    Sums of integers cannot stay unreduced and are all_reduced at once.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.ones(4, 6), sw.make_mesh({"data": 2}), "b/data d")
    >>> x.sum(0)
    f32[6]{U:data} local[6] on mesh(data=2)
    """
    return _SUM((x,), (normal_dims(dim, x.ndim), keepdim, dtype), out, over)


def _mean_local(info: Info) -> Local:
    """The mean of the block times its share of the whole: no sum is larger than it must be."""
    dims, keepdim, dtype = info.static
    factors = [info.rule.inputs[0][d][0] for d in dims]
    share = 1 / math.prod(info.mesh.group_size(info.axes(f)) for f in factors)
    if share == 1:
        return lambda x: torch.mean(x, dims, keepdim=keepdim, dtype=dtype)
    return lambda x: torch.mean(x, dims, keepdim=keepdim, dtype=dtype) * share


_MEAN = Op("mean", _sum_rule, _mean_local)


@export(torch.mean, methods=["mean"])
def mean(
    x: ShardedTensor,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """The mean over dims: the sum divided by the GLOBAL count, so also unreduced.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.arange(4.0), sw.make_mesh({"data": 2}), "n/data")
    >>> x.mean(), x.mean().full_tensor()
    (f32[]{U:data} local[] on mesh(data=2), tensor(1.5000))
    """
    dims = normal_dims(dim, x.ndim)
    if not (dtype or x.dtype).is_floating_point and not (dtype or x.dtype).is_complex:
        raise TypeError(f"mean of {x.dtype}: cast to a floating type first")
    return _MEAN((x,), (dims, keepdim, dtype), out, over)


def _nonzero(x: Any) -> Any:
    return x != 0


@export(torch.count_nonzero, methods=["count_nonzero"])
def count_nonzero(
    x: ShardedTensor, dim: Dims = None, *, out: LayoutLike | None = None
) -> ShardedTensor:
    """How many entries are not zero along dims (all, if None): int64.

    Cost: over a cut dim an all_reduce of the result.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.tensor([0, 3, 4, 0]), sw.make_mesh({"data": 2}), "n/data")
    >>> x.count_nonzero().item()
    2
    """
    return sum(to(_nonzero(x), torch.int64), dim, out=out)


def _fold_rule(shapes: Any, dims: tuple[int, ...], keepdim: bool, op: str, *_: Any) -> Rule:
    return sized(reduction(dims, keepdim, len(shapes[0]), reduced=op), shapes)


_LOGIC: dict[str, Any] = {"any": (torch.any, "max"), "all": (torch.all, "min")}


def _logic_local(info: Info) -> Local:
    dims, keepdim, name = info.static
    function = _LOGIC[name][0]
    return (lambda x: function(x, dims, keepdim=keepdim)) if dims else (lambda x: x != 0)


def _logic_cut(operands: Sequence[Any], static: tuple[Any, ...]) -> ShardedTensor:
    (x,) = operands
    dims, keepdim, name = static
    truth = to(_nonzero(x), torch.uint8)  # a bool is no number to a collective
    return dropped(to(extremum(truth, dims, _LOGIC[name][1]), torch.bool), dims, keepdim)


_LOGICAL = {
    name: Op(name, _fold_rule, _logic_local, protocol=_logic_cut, differentiable=False)
    for name in _LOGIC
}


@export(torch.any, methods=["any"])
def any(
    x: ShardedTensor, dim: Dims = None, keepdim: bool = False, *, out: LayoutLike | None = None
) -> ShardedTensor:
    """Whether some entry is not zero. Over a cut dim: an all_reduce(max) of bytes.

    >>> import torch, shardwise as sw
    >>> sw.shard(torch.tensor([0, 1]), sw.make_mesh({"data": 2}), "n/data").any().item()
    True
    """
    return _LOGICAL["any"]((x,), (normal_dims(dim, x.ndim), keepdim, "any"), out)


@export(torch.all, methods=["all"])
def all(
    x: ShardedTensor, dim: Dims = None, keepdim: bool = False, *, out: LayoutLike | None = None
) -> ShardedTensor:
    """Whether no entry is zero; as `any`."""
    return _LOGICAL["all"]((x,), (normal_dims(dim, x.ndim), keepdim, "all"), out)


def _prod_local(info: Info) -> Local:
    dims, keepdim, _, dtype = info.static
    return lambda x: torch.prod(x, dims[0], keepdim=keepdim, dtype=dtype)


def _prod_cut(operands: Sequence[Any], static: tuple[Any, ...]) -> ShardedTensor:
    """The products of the blocks are gathered: one number per device and result."""
    (x,) = operands
    dims, keepdim, _, dtype = static
    each = blockwise(x if dtype is None else to(x, dtype), dims, "prod")
    whole = convert(each, each.layout.dims[dims[0]], "replicated")
    return _PROD((whole,), (dims, keepdim, "prod", dtype))


_PROD = Op("prod", _fold_rule, _prod_local, protocol=_prod_cut)


@export(torch.prod, methods=["prod"])
def prod(
    x: ShardedTensor,
    dim: int | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """The product along a dim, or of all entries.

    Cost: along a cut dim an all_gather of one product per device and result. Gradient: nothing
    moves.

    >>> import torch, shardwise as sw
    >>> sw.shard(torch.tensor([2.0, 3.0]), sw.make_mesh({"data": 2}), "n/data").prod().item()
    6.0
    """
    if x.ndim == 0:
        return x if dtype is None else to(x, dtype)
    if dim is not None:
        return _PROD((x,), (normal_dims(dim, x.ndim), keepdim, "prod", dtype), out, over)
    for d in reversed(range(x.ndim)):
        x = prod(x, d, keepdim, dtype=dtype, out=out if d == 0 else None)
    return x
