"""Adding entries at places that an integer tensor names: scatter_add, index_add.

What is added is an op of its own, from zeros, and `x` joins by addition. So a sum that is owed in
either passes, and `x` counts once where an axis cuts the added entries. Along a cut dim of `x`
each device keeps what falls in its own range.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layouts.layout import LayoutLike
from ..layouts.sharded import ShardedTensor
from .dispatch import Info, Local, Op, export
from .index import aligned, check_integer, owned, per_block
from .pointwise import OPS, zeros_like
from .rules import Rule, letters
from .shape import one_dim


def _scatter_rule(shapes: Sequence[Any], dim: int) -> Rule:
    base, index, src = shapes
    x, places, sizes, blocked = aligned(base, index, dim)
    values = []
    for k, (n, m) in enumerate(zip(index, src, strict=True)):
        name = places[k][0] if n == m else f"v{k}"
        if n > m:
            raise ValueError(f"the index is longer ({n}) than the source ({m}) in dim {k}")
        if n != m:
            blocked |= {name, *places[k], *(x[k] if k != dim else ())}
        sizes[name] = m
        values.append((name,))
    return Rule((x, places, tuple(values)), (x,), sizes, frozenset(blocked), linear=frozenset((2,)))


def _scatter_local(info: Info) -> Local:
    dim = info.static[0]

    def masked(offset: int, size: int, total: int) -> Callable[..., Any]:
        def local(base: Tensor, index: Tensor, src: Tensor) -> Tensor:
            here, inside = owned(index, offset, size, total)
            src = src[tuple(slice(n) for n in index.shape)]
            return base.scatter_add(dim, here, torch.where(inside, src, 0))

        return local

    factor = f"d{dim}"
    if info.axes(factor):
        return per_block(info, factor, masked)
    return lambda base, index, src: base.scatter_add(
        dim, index, src[tuple(slice(n) for n in index.shape)]
    )


_SCATTER = Op("scatter_add", _scatter_rule, _scatter_local)


@export(torch.scatter_add, methods=["scatter_add"])
def scatter_add(
    x: ShardedTensor, dim: int, index: Any, src: Any, *, out: LayoutLike | None = None
) -> ShardedTensor:
    """`x` with `src` added at an index along `dim`.

    Returns:
        The shape of x. If an axis cuts `dim` of x, each device adds what falls in its own range;
        if it cuts the same dim of index and src, the sum over it is left owed. Linear in x and
        src together.

    >>> import torch, shardwise as sw
    >>> x = sw.zeros((4,), sw.make_mesh({"data": 2}), "n/data")
    >>> x.scatter_add(0, torch.tensor([3, 3, 0]), torch.ones(3)).full_tensor()
    tensor([1., 0., 0., 2.])
    """
    check_integer("scatter_add", index)
    added = _SCATTER((zeros_like(x), index, src), (one_dim(dim, x.ndim),))
    return OPS["add"]((x, added), (), out)


def _index_add_rule(shapes: Sequence[Any], dim: int) -> Rule:
    base, index, src = shapes
    x = tuple((n,) for n in letters(len(base)))
    values = tuple(("k",) if k == dim else d for k, d in enumerate(x))
    want = (*base[:dim], *index, *base[dim + 1 :])
    if tuple(src) != want:
        raise ValueError(f"the source has shape {tuple(src)}, expected {want}")
    sizes = {d[0]: n for d, n in zip(x, base, strict=True)} | {"k": index[0]}
    return Rule((x, (("k",),), values), (x,), sizes, linear=frozenset((2,)))


def _index_add_local(info: Info) -> Local:
    dim = info.static[0]

    def masked(offset: int, size: int, total: int) -> Callable[..., Any]:
        def local(base: Tensor, index: Tensor, src: Tensor) -> Tensor:
            here, inside = owned(index, offset, size, total)
            mask = inside.reshape(-1, *[1] * (src.ndim - dim - 1))
            return base.index_add(dim, here, torch.where(mask, src, 0))

        return local

    factor = f"d{dim}"
    if info.axes(factor):
        return per_block(info, factor, masked)
    return lambda base, index, src: base.index_add(dim, index, src)


_INDEX_ADD = Op("index_add", _index_add_rule, _index_add_local)


@export(torch.index_add, methods=["index_add"])
def index_add(
    x: ShardedTensor,
    dim: int,
    index: Any,
    source: Any,
    *,
    alpha: float = 1,
    out: LayoutLike | None = None,
) -> ShardedTensor:
    """`x` with slices of `source`, times alpha, added where a 1-D index into `dim` says.

    Layouts as in `scatter_add`.
    """
    check_integer("index_add", index)
    if index.ndim != 1:
        raise ValueError(f"index_add: the index must have 1 dim, got {index.ndim}")
    added = _INDEX_ADD((zeros_like(x), index, source), (one_dim(dim, x.ndim),))
    return OPS["add"]((x, added if alpha == 1 else added * alpha), (), out)
