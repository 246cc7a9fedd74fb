"""Reductions over dims: sums stay local and leave a sum owed; max and min exchange one small all_reduce.

`sum` and `mean` (whose count is the GLOBAL one) are linear. `var`, `std`, `norm` and `logsumexp` are written in sums
and maxima, so a cut dim costs statistics only. `max` of a cut dim shares its gradient between ties over the whole
mesh, as torch does on one device for the reduction without dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layouts.convert import convert
from ..layouts.layout import LayoutLike
from ..layouts.sharded import ShardedTensor
from .dispatch import Info, Local, Op, export
from .rules import Rule, letters, sized

Dims = int | Sequence[int] | None


def normal_dims(dim: Dims, ndim: int) -> tuple[int, ...]:
    """Dims as sorted non-negative numbers; None is all."""
    if dim is None:
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
    kept = tuple(
        () if n in gone else (n,) for n in names if keepdim or n not in gone
    )
    return Rule(
        (tuple((n,) for n in names),),
        (kept,) * results,
        blocked=frozenset(gone) if blocked else frozenset(),
        reduced=dict.fromkeys(gone, reduced) if reduced else {},
        linear=frozenset((0,)) if linear else frozenset(),
    )


def _sum_rule(shapes: Any, dims: tuple[int, ...], keepdim: bool, *_: Any) -> Rule:
    return sized(reduction(dims, keepdim, len(shapes[0]), linear=True), shapes)


def _sum_local(info: Info) -> Local:
    dims, keepdim, scale, dtype = info.static
    if not dims:
        return lambda x: x.to(dtype or x.dtype) * scale if scale != 1 else x.to(dtype) if dtype else x.clone()
    if scale == 1:
        return lambda x: torch.sum(x, dims, keepdim=keepdim, dtype=dtype)
    return lambda x: torch.sum(x, dims, keepdim=keepdim, dtype=dtype) * scale


_SUM = Op("sum", _sum_rule, _sum_local)


@export(torch.sum, methods=["sum"])
def sum(  # noqa: A001
    x: ShardedTensor,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    out: LayoutLike | None = None,
    over: Mapping[str, str] | None = None,
) -> ShardedTensor:
    """The sum over dims (all, if None); unreduced over the axes that cut them. Nothing moves.

    Sums of integers cannot stay unreduced and are all_reduced at once.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.ones(4, 6), sw.make_mesh({"data": 2}), "b/data d")
    >>> x.sum(0)
    f32[6]{U:data} local[6] on mesh(data=2)
    """
    return _SUM((x,), (normal_dims(dim, x.ndim), keepdim, 1, dtype), out, over)  # type: ignore[no-any-return]


_MEAN = Op("mean", _sum_rule, _sum_local)


@export(torch.mean, methods=["mean"])
def mean(
    x: ShardedTensor,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    out: LayoutLike | None = None,
    over: Mapping[str, str] | None = None,
) -> ShardedTensor:
    """The mean over dims: the sum divided by the GLOBAL count, so also unreduced.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.arange(4.0), sw.make_mesh({"data": 2}), "n/data")
    >>> x.mean(), x.mean().full_tensor()
    (f32[]{U:data} local[] on mesh(data=2), tensor(1.5000))
    """
    dims = normal_dims(dim, x.ndim)
    count = math.prod(x.shape[d] for d in dims)
    if not (dtype or x.dtype).is_floating_point and not (dtype or x.dtype).is_complex:
        raise TypeError(f"mean of {x.dtype}: cast to a floating type first")
    return _MEAN((x,), (dims, keepdim, 1 / count if count else math.nan, dtype), out, over)  # type: ignore[no-any-return]


def _spread(x: ShardedTensor, dim: Dims, correction: float, keepdim: bool) -> ShardedTensor:
    """Mean of squared distances from the mean; the mean of a cut dim is reduced first."""
    dims = normal_dims(dim, x.ndim)
    count = math.prod(x.shape[d] for d in dims)
    if not dims:
        return x * math.nan if correction else x * 0
    middle = mean(x, dims, True)
    owed = tuple(a for a in x.mesh.axes if a in middle.layout.unreduced)
    centred = x - (convert(middle, owed, "replicated") if owed else middle)
    squares = sum(centred * centred, dims, keepdim)
    return squares * (1 / (count - correction) if count > correction else math.nan)


def _correction(correction: Any, unbiased: Any) -> float:
    return float(unbiased if unbiased is not None else 1.0 if correction is None else correction)


@export(torch.var, methods=["var"])
def var(
    x: ShardedTensor,
    dim: Any = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> ShardedTensor:
    """The variance over dims (all, if None), of values centred first; the count is the GLOBAL one.

    Cost over a cut dim: one all_reduce of the mean; the result is unreduced.
    """
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    return _spread(x, dim, _correction(correction, unbiased), keepdim)


@export(torch.std, methods=["std"])
def std(
    x: ShardedTensor,
    dim: Any = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> ShardedTensor:
    """The root of the variance; see `var`."""
    return torch.sqrt(var(x, dim, unbiased, keepdim, correction=correction))  # type: ignore[call-overload, no-any-return]


@export(torch.var_mean)
def var_mean(
    x: ShardedTensor, dim: Dims = None, keepdim: bool = False, *, correction: float | None = None
) -> tuple[ShardedTensor, ShardedTensor]:
    """Variance and mean."""
    return var(x, dim, None, keepdim, correction=correction), mean(x, dim, keepdim)


@export(torch.std_mean)
def std_mean(
    x: ShardedTensor, dim: Dims = None, keepdim: bool = False, *, correction: float | None = None
) -> tuple[ShardedTensor, ShardedTensor]:
    """Standard deviation and mean."""
    return std(x, dim, None, keepdim, correction=correction), mean(x, dim, keepdim)


@export(torch.count_nonzero, methods=["count_nonzero"])
def count_nonzero(x: ShardedTensor, dim: Dims = None) -> ShardedTensor:
    """How many elements are not zero."""
    return sum((x != 0).to(torch.int64), dim)


@export(torch.linalg.vector_norm)
def vector_norm(
    x: ShardedTensor,
    ord: Any = 2,  # noqa: A002
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> ShardedTensor:
    """The p-norm over dims (all, if None), p = 0, any positive number, or infinity either way.

    An unreduced operand is reduced first: a norm of parts means nothing.
    """
    x = x if dtype is None else x.to(dtype)
    size = torch.abs(x)  # type: ignore[call-overload]
    if ord == 0:
        return sum((x != 0).to(x.dtype), dim, keepdim)
    if ord in (math.inf, -math.inf):
        extreme = torch.amax if ord > 0 else torch.amin
        return extreme(size, normal_dims(dim, x.ndim), keepdim)  # type: ignore[arg-type, return-value]
    if ord == 1:
        return sum(size, dim, keepdim)
    if ord == 2:
        squares = sum(x * x, dim, keepdim)
        top = torch.where(squares > 0, squares, 1.0)  # type: ignore[call-overload]
        # the root has no slope at 0; torch calls it 0
        return torch.where(squares > 0, torch.sqrt(top), 0.0)  # type: ignore[call-overload, no-any-return]
    return sum(size**ord, dim, keepdim) ** (1 / ord)


@export(torch.norm, methods=["norm"])
def norm(
    x: ShardedTensor,
    p: Any = 2,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> ShardedTensor:
    """`torch.norm`: the p-norm; "fro" is 2."""
    return vector_norm(x, 2 if p in ("fro", None) else p, dim, keepdim, dtype=dtype)
