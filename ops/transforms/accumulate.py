"""`accumulate`: the gradient of a large batch as the sum over micro-batches.

A micro-batch takes local rows: each row stays on its device, nothing moves. The gradients keep the
layouts that the function gives them; left unreduced (`grads="... {U:data}"`), they are reduced
once, after the last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

from ...layouts.layout import make
from ...layouts.reshard import reshard_one
from ...layouts.sharded import ShardedTensor, make_type
from ...layouts.tree import items
from ...meshlib.errors import LayoutError
from .leaves import carrying_path, is_differentiable


def accumulate(
    f: Callable[..., Any],
    num: int,
    *,
    argnum: int = -1,
    weight: Callable[[Any], Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Callable[..., Any]:
    """A `value_and_grad` that runs on `num` micro-batches, one after another, and adds up.

    Args:
        f: gives (value, gradients) or ((value, aux), gradients): what `value_and_grad` returns.
        num: micro-batches; it divides the local rows of every leaf of the batch.
        argnum: which argument is the batch, a tree; dim 0 of each tensor in it is cut.
        weight: micro-batch -> number or scalar tensor, its share of the mean, as the count of its
            tokens. None: all are equal.
        dtype: in which values and gradients are summed; their own where that is wider.

    Returns:
        A function of the same arguments and results: for a loss that is a (weighted) mean over
        rows, those of the whole batch. With aux, the list of the micro-batches' aux.

    Cost: what `f` moves, `num` times; nothing else but an all_reduce of a scalar per unreduced
    weight.

    Raises:
        LayoutError: kind "indivisible", or leaves whose rows lie on different devices.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"data": 2})
    >>> x, w = sw.shard(torch.arange(8.0), mesh, "b/data"), sw.shard(torch.tensor(2.0), mesh)
    >>> value, g = sw.accumulate(sw.value_and_grad(lambda w, x: (w * x).mean()), 2)(w, x)
    >>> value.item(), g.item()
    (7.0, 3.5)
    """
    if num < 1:
        raise ValueError(f"accumulate: num must be 1 or more, got {num}")

    def accumulated(*args: Any, **kwargs: Any) -> Any:
        at = argnum % len(args)
        micros = [rows(args[at], part, num) for part in range(num)]
        shares = _shares(micros, weight, dtype)
        total: Any = None
        auxes: list[Any] = []
        has_aux = False
        for micro, share in zip(micros, shares, strict=True):
            value, grads = f(*args[:at], micro, *args[at + 1 :], **kwargs)
            has_aux = isinstance(value, tuple)
            if has_aux:
                value, aux = value
                auxes.append(aux)
            total = _added(total, (value, grads), share, dtype)
        value, grads = total
        return ((value, auxes), grads) if has_aux else (value, grads)

    return accumulated


def rows(batch: Any, part: int, num: int) -> Any:
    """Micro-batch `part` of `num`: the same local rows of every device."""
    found: list[tuple[str, Any]] = [
        (path, x) for path, x in items(batch) if isinstance(x, ShardedTensor | Tensor) and x.ndim
    ]
    cuts = {x.layout.dims[0] if isinstance(x, ShardedTensor) else (): path for path, x in found}
    if len(cuts) > 1:
        listed = ", ".join(
            f"{path or 'batch'} by {'/'.join(axes) or 'nothing'}" for axes, path in cuts.items()
        )
        raise LayoutError(
            f"accumulate: dim 0 must be cut alike in all of the batch, but it is cut: {listed}"
        )
    for path, x in found:
        count = x.local_shape[0] if isinstance(x, ShardedTensor) else x.shape[0]
        if count % num:
            raise LayoutError(
                f"accumulate: {path or 'batch'} has {count} rows per device, which {num} "
                f"micro-batches do not divide: {x if isinstance(x, ShardedTensor) else x.shape}",
                kind="indivisible",
                op="accumulate",
            )
    return optree.tree_map(lambda x: _rows(x, part, num), batch, none_is_leaf=True)


def _rows(x: Any, part: int, num: int) -> Any:
    if not isinstance(x, ShardedTensor | Tensor) or not x.ndim:
        return x
    if isinstance(x, Tensor):
        size = x.shape[0] // num
        return x.narrow(0, part * size, size)
    size = x.local_shape[0] // num
    kind = make_type(x.mesh, x.layout, (x.shape[0] // num, *x.shape[1:]), x.dtype, x._type.grad)
    return carrying_path(
        ShardedTensor(tuple(s.narrow(0, part * size, size) for s in x._shards), kind), x
    )


def _shares(
    micros: list[Any], weight: Callable[[Any], Any] | None, dtype: torch.dtype
) -> list[Any]:
    """The share of each micro-batch in the mean: numbers, or replicated scalars."""
    if weight is None:
        return [1 / len(micros)] * len(micros)
    weights = [_settled(weight(micro), dtype) for micro in micros]
    total = weights[0]
    for w in weights[1:]:
        total = total + w
    return [w / total for w in weights]


def _settled(w: Any, dtype: torch.dtype) -> Any:
    """A weight as a number or a replicated scalar."""
    if isinstance(w, Tensor):
        return w.item()
    if not isinstance(w, ShardedTensor):
        return w
    if w.ndim:
        raise ValueError(f"accumulate: a weight is a number or a scalar, got {w}")
    wide = (
        torch.promote_types(dtype, w.dtype) if w.is_floating_point() else torch.float64
    )  # counts stay exact
    return reshard_one(w.detach().to(wide), make(()))


def _added(total: Any, new: Any, share: Any, dtype: torch.dtype) -> Any:
    """`total + share * new`, leaf by leaf; None stays None."""

    def scaled(x: Any) -> Any:
        if not is_differentiable(x):
            return x
        wide = torch.promote_types(dtype, x.dtype)
        if isinstance(x, Tensor):
            factor = share._shards[0] if isinstance(share, ShardedTensor) else share
            return _times(x.to(wide), factor)
        factors = share._shards if isinstance(share, ShardedTensor) else [share] * len(x._shards)
        # On the shards: a scale is linear, so the gradient's state stays as it is, unreduced too.
        shards = tuple(
            _times(s.to(wide), r).to(wide) for s, r in zip(x._shards, factors, strict=True)
        )
        kind = make_type(x.mesh, x.layout, x.shape, wide, x._type.grad)
        return carrying_path(ShardedTensor(shards, kind), x)

    def add(a: Any, b: Any) -> Any:
        if not is_differentiable(b):
            return b
        if isinstance(b, Tensor):
            return a + b
        if a._type is not b._type:
            raise LayoutError(
                f"accumulate: a gradient changes its type between micro-batches: {a} -> {b}",
                kind="drift",
            )
        if any(s.requires_grad for s in (*a._shards, *b._shards)):
            shards = tuple(s + t for s, t in zip(a._shards, b._shards, strict=True))
            return carrying_path(ShardedTensor(shards, a._type), a)
        for s, t in zip(a._shards, b._shards, strict=True):
            s.add_(t)  # our own sum, scaled into fresh memory: no second copy of the gradients
        return a

    mine = optree.tree_map(scaled, new, none_is_leaf=True)
    return mine if total is None else optree.tree_map(add, total, mine, none_is_leaf=True)


def _times(x: Tensor, share: Any) -> Tensor:
    """`share * x`; a loss that does not count is 0 even where it is 0/0, a mean of nothing."""
    if x.ndim:
        return x * share
    if isinstance(share, Tensor):
        return torch.where(share == 0, 0.0, x * share)
    return x * share if share else torch.zeros_like(x)
