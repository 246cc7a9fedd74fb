"""Running means of a matrix held as a row and a column: what Adafactor and CAME share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layouts import tree
from ..layouts.layout import make
from ..layouts.place import full
from ..layouts.sharded import ShardedTensor
from .flat import here
from .sums import partial, per_entry, reduced_together, squares, together, wide


class Factors(NamedTuple):
    """Per leaf: means over the last dim, over the last but one; or all values of a vector."""

    row: Sequence[Any]
    col: Sequence[Any]
    nu: Sequence[Any]


def empty(params: Any, row: str, col: str, nu: str | None) -> dict[str, Any]:
    """Zeros: rows and columns for tensors with two dims or more, all values for the others."""

    def zeros(p: ShardedTensor, gone: int | None) -> ShardedTensor:
        dims, shape = list(p.layout.dims), list(p.shape)
        if gone is not None:
            del dims[gone], shape[gone]
        layout = make(tuple(dims), memory=p.layout.memory)
        return full(shape, 0.0, p.mesh, layout, dtype=wide(p.dtype))

    found = {
        row: tree.map(lambda p: zeros(p, -1) if p.ndim > 1 else None, params),
        col: tree.map(lambda p: zeros(p, -2) if p.ndim > 1 else None, params),
    }
    if nu is not None:
        found[nu] = tree.map(lambda p: zeros(p, None) if p.ndim < 2 else None, params)
    return found


def factored(
    leaves: Sequence[ShardedTensor],
    old: Factors,
    weights: Sequence[Any],
    f: Callable[[Tensor], Tensor],
) -> tuple[Factors, list[Any]]:
    """Factors after one more tensor each, and the means of the rows.

    Args:
        leaves: what is averaged, through f.
        old: the factors before.
        weights: per leaf, the weight of the newest.
        f: elementwise on local tensors.

    Cost: two all_reduces in a row, of rows and columns, then of one number per matrix, for all
    leaves together.
    """
    owed = []
    for x in leaves:
        if x.ndim > 1:
            owed += [partial(x, (x.ndim - 1,), f), partial(x, (x.ndim - 2,), f)]
    sums = iter(reduced_together(owed))
    rows, cols, nus = [], [], []
    for x, row, col, nu, weight in zip(leaves, *old, weights, strict=True):
        if x.ndim > 1:
            r, c = x.shape[-2:]
            rows.append(
                together(lambda o, n, k=c, w=weight: _lerp(o, n / k, w), row, row, next(sums))
            )
            cols.append(
                together(lambda o, n, k=r, w=weight: _lerp(o, n / k, w), col, col, next(sums))
            )
            nus.append(None)
        else:
            rows.append(None)
            cols.append(None)
            nus.append(together(lambda o, n, w=weight: _lerp(o, f(n.to(o.dtype)), w), nu, nu, x))
    totals = iter(reduced_together([partial(r, (r.ndim - 1,)) for r in rows if r is not None]))
    means = [None if r is None else _over(next(totals), r.shape[-1]) for r in rows]
    return Factors(rows, cols, nus), means


def _over(x: ShardedTensor, n: int) -> ShardedTensor:
    return together(lambda t: t / n, x, x)


def _lerp(old: Tensor, new: Tensor, weight: Any) -> Tensor:
    if isinstance(weight, Tensor):
        return old + (new - old) * weight.to(old.dtype)
    return torch.lerp(old, new.to(old.dtype), weight)


def at_least(x: Tensor, low: Any) -> Tensor:
    """`x`, or `low` where that is larger; in the dtype of `x`."""
    return x.clamp(min=low.to(x.dtype) if isinstance(low, Tensor) else low)


def outer(row: Tensor, col: Tensor, mean: Tensor) -> Tensor:
    """The matrix with these row and column means: their product over the mean of the rows.

    Rows are divided first: the product of two small means would be 0 in float32.
    """
    return (row / mean.unsqueeze(-1)).unsqueeze(-1) * col.unsqueeze(-2)


def root_mean_squares(leaves: Sequence[ShardedTensor], stacked: Sequence[bool]) -> list[Any]:
    """Root mean squares of whole tensors, or of each entry of a stack: one all_reduce."""
    out = []
    for x, total in zip(leaves, squares(leaves, stacked), strict=True):
        count = x.numel() // max(1, total.numel())
        out.append(together(lambda t, n=count: (t / max(1, n)).sqrt(), total, total))
    return out


def clipped(
    leaves: Sequence[ShardedTensor], limit: Any, stacked: Sequence[bool]
) -> list[ShardedTensor]:
    """Tensors scaled down so that their root mean square is at most `limit`."""

    def one(u: Tensor, size: Tensor) -> Tensor:
        factor = (size / here({"limit": limit}, u.device).limit).clamp(min=1.0).to(u.dtype)
        return u / per_entry(factor, u)

    sizes = root_mean_squares(leaves, stacked)
    return [together(one, u, u, size) for u, size in zip(leaves, sizes, strict=True)]
