"""Variance, standard deviation, norms of entries: over a cut dim statistics are exchanged.

    over a cut dim       forward                               backward
    var, std             all_reduce of mean and of variance    all_reduce of the mean's gradient
    norm (p = 2, ...)    all_reduce of the sum of powers       none
    norm (p = 0, 1)      nothing: a sum is owed                none
    norm (p = inf)       as amax                               none

Variances are taken of centred values, so large means lose no digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layouts.layout import LayoutLike
from ..layouts.reshard import reshard_one
from ..layouts.sharded import ShardedTensor
from .dispatch import Info, Local, Op, export
from .extreme import amax, amin
from .meet import settled
from .pointwise import to, where
from .reduce import Dims, mean, normal_dims, reduction, sum
from .rules import Rule, sized

Over = Mapping[str, str] | None


def _rule(shapes: Any, dims: tuple[int, ...], keepdim: bool, *_: Any) -> Rule:
    return sized(reduction(dims, keepdim, len(shapes[0]), reduced="moment"), shapes)


def _local(function: Callable[..., Tensor]) -> Callable[[Info], Local]:
    def local(info: Info) -> Local:
        dims, keepdim, correction = info.static
        return lambda x: function(x, dims or None, correction=correction, keepdim=keepdim)

    return local


def _spread(operands: Sequence[Any], static: tuple[Any, ...]) -> ShardedTensor:
    """The mean squared distance from the mean."""
    (x,) = operands
    dims, keepdim, correction = static
    count = math.prod(x.shape[d] for d in dims)
    centred = x - settled(mean(x, dims, True))
    squares: Any = settled(sum(centred * centred, dims, keepdim))
    return squares / max(count - correction, 0)


def _root(x: Any, power: float = 2) -> ShardedTensor:
    """x to the 1/power; where it has no slope, at 0, the gradient is 0, as in torch's norms."""
    inside: Any = where(x != 0, x, 1)
    return where(x != 0, inside.sqrt() if power == 2 else inside ** (1 / power), 0)


_VAR = Op("var", _rule, _local(torch.var), protocol=_spread)
_STD = Op("std", _rule, _local(torch.std), protocol=lambda xs, static: _root(_spread(xs, static)))


def _moment(
    op: Op,
    x: ShardedTensor,
    dim: Any,
    unbiased: Any,
    keepdim: bool,
    correction: Any,
    out: Any,
    over: Over,
) -> ShardedTensor:
    if isinstance(dim, bool):  # x.var(False)
        dim, unbiased = None, dim
    if unbiased is not None:
        correction = float(unbiased)
    correction = 1 if correction is None else correction
    return op((x,), (normal_dims(dim, x.ndim), keepdim, correction), out, over)


@export(torch.var, methods=["var"])
def var(
    x: ShardedTensor,
    dim: Any = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: float | None = None,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """The variance over dims (all, if None); counts are GLOBAL.

    Args:
        x: any layout.
        dim: one, several, or None for all.
        unbiased: True is correction=1, False correction=0.
        keepdim: keep the dims with size 1.
        correction: taken from the count; 1 by default.
        out: the result's layout.
        over: mesh axis to factor, where the types leave a choice.

    Cost: over a cut dim two all_reduces of the result's size; one backward.

    >>> import torch, shardwise as sw
    >>> sw.shard(torch.arange(4.0), sw.make_mesh({"data": 2}), "n/data").var(correction=0).item()
    1.25
    """
    return _moment(_VAR, x, dim, unbiased, keepdim, correction, out, over)


@export(torch.std, methods=["std"])
def std(
    x: ShardedTensor,
    dim: Any = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: float | None = None,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """The root of the variance; as `var`.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.tensor([1.0, 5.0]), sw.make_mesh({"data": 2}), "n/data")
    >>> x.std(correction=0).item()
    2.0
    """
    return _moment(_STD, x, dim, unbiased, keepdim, correction, out, over)


@export(torch.var_mean)
def var_mean(
    x: ShardedTensor,
    dim: Any = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> tuple[ShardedTensor, ShardedTensor]:
    """Variance, and mean, which over a cut dim is still owed."""
    over = None if isinstance(dim, bool) else dim
    return var(x, dim, unbiased, keepdim, correction=correction), mean(x, over, keepdim)


@export(torch.std_mean)
def std_mean(
    x: ShardedTensor,
    dim: Any = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> tuple[ShardedTensor, ShardedTensor]:
    """Standard deviation, and mean, which over a cut dim is still owed."""
    over = None if isinstance(dim, bool) else dim
    return std(x, dim, unbiased, keepdim, correction=correction), mean(x, over, keepdim)


def _norm_local(info: Info) -> Local:
    dims, keepdim, p = info.static
    return lambda x: torch.linalg.vector_norm(x, p, dims or None, keepdim)


def _norm_cut(operands: Sequence[Any], static: tuple[Any, ...]) -> ShardedTensor:
    (x,) = operands
    dims, keepdim, p = static
    powers = x * x if p == 2 and not x.dtype.is_complex else x.abs() ** p
    return _root(settled(sum(powers, dims, keepdim)), p)


_NORM = Op("vector_norm", _rule, _norm_local, protocol=_norm_cut)


@export(torch.linalg.vector_norm)
def vector_norm(
    x: Any,
    ord: float = 2,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """The p-norm over dims (all, if None): p is 0, any number, or infinity either way.

    Cost: over a cut dim one all_reduce of the result (none for p = 0 and 1, whose sum stays owed);
    backward none.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.tensor([3.0, 4.0]), sw.make_mesh({"data": 2}), "n/data")
    >>> torch.linalg.vector_norm(x).item()
    5.0
    """
    x = x if dtype is None else to(x, dtype)
    if ord == 0:
        return sum(to(x != 0, x.dtype), dim, keepdim, out=out, over=over)
    size = x.abs()
    if ord in (math.inf, -math.inf):
        return (amax if ord > 0 else amin)(size, dim, keepdim, out=out, over=over)
    if ord == 1:
        return sum(size, dim, keepdim, out=out, over=over)
    return _NORM((x,), (normal_dims(dim, x.ndim), keepdim, ord), out, over)


@export(torch.norm, methods=["norm"])
def norm(
    x: ShardedTensor,
    p: Any = "fro",
    dim: Dims = None,
    keepdim: bool = False,
    out: LayoutLike | None = None,
    dtype: torch.dtype | None = None,
) -> ShardedTensor:
    """`torch.norm`: the p-norm of entries; "fro" is 2. Cost as `vector_norm`.

    >>> import torch, shardwise as sw
    >>> sw.shard(torch.tensor([3.0, 4.0]), sw.make_mesh({"data": 2}), "n/data").norm().item()
    5.0
    """
    if p == "nuc":
        raise ValueError("norm: the nuclear norm has no rule")
    found = vector_norm(x, 2 if p in ("fro", None) else p, dim, keepdim, dtype=dtype)
    return found if out is None else reshard_one(found, out)


@export(torch.linalg.norm)
def _linalg_norm(
    x: ShardedTensor,
    ord: Any = None,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> ShardedTensor:
    """`torch.linalg.norm` where it is a norm of entries."""
    is_vector = (
        isinstance(dim, int) or (dim is not None and len(dim) == 1) or (dim is None and x.ndim == 1)
    )
    if ord not in (None, "fro") and not is_vector:
        raise ValueError(
            "linalg.norm: norms of matrices have no rule; for entries use linalg.vector_norm"
        )
    return vector_norm(x, 2 if ord in (None, "fro") else ord, dim, keepdim, dtype=dtype)
