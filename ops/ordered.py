"""Sorting along a dim: sort, argsort, msort, topk, kthvalue, median.

over a cut dim            what moves
sort, argsort, msort      all_to_all to another dim that divides, and back; else all_gather
topk                      all_gather of each block's candidates
kthvalue, median          a choice
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layouts.convert import convert
from ..layouts.layout import LayoutLike
from ..layouts.sharded import ShardedTensor
from .dispatch import Info, Local, Op, export
from .index import gather
from .meet import along, block_rule, one_of, parts
from .reduce import reduction
from .rules import Rule, sized
from .shape import reshape

Over = Mapping[str, str] | None


class Sorted(NamedTuple):
    """What `sort`, `topk`, `kthvalue` and `median` give: values, and where they stood."""

    values: ShardedTensor
    indices: ShardedTensor


# Sorting: whole rows on each device.


def _sort_local(info: Info) -> Local:
    dim, descending, stable = info.static
    return lambda x: tuple(torch.sort(x, dim=dim, descending=descending, stable=stable))


def _whole(x: ShardedTensor, dim: int) -> ShardedTensor:
    """With a dim whole: its axes on another dim that they divide, else gathered."""
    axes = x.layout.dims[dim]
    n = x.mesh.group_size(axes)
    for other, size in enumerate(x.local_shape):
        if other != dim and size % n == 0:
            return convert(x, axes, other)
    return convert(x, axes, "replicated")


def _sort_cut(operands: Sequence[Any], static: tuple[Any, ...]) -> tuple[ShardedTensor, ...]:
    (x,) = operands
    dim = static[0]
    axes = x.layout.dims[dim]
    return tuple(convert(y, axes, dim) for y in _SORT((_whole(x, dim),), static))


def _pair_rule(shapes: Any, dim: int, *_: Any) -> Rule:
    return along(shapes, dim, results=2)


_SORT = Op("sort", _pair_rule, _sort_local, protocol=_sort_cut)


@export(torch.sort, methods=["sort"])
def sort(
    x: ShardedTensor,
    dim: int = -1,
    descending: bool = False,
    stable: bool = False,
    *,
    out: LayoutLike | None = None,
    over: Over = None,
) -> Sorted:
    """Values in order along a dim, which may be cut, and their global indices.

    Cost along a cut dim: an all_to_all of x to another dim that the axes divide, and of values and
    indices back; if there is none, an all_gather. The gradient goes the same way.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.tensor([3.0, 1.0, 4.0, 2.0]), sw.make_mesh({"data": 2}), "n/data")
    >>> values, indices = x.sort()
    >>> values.full_tensor(), indices.full_tensor()
    (tensor([1., 2., 3., 4.]), tensor([1, 3, 0, 2]))
    """
    return Sorted(*_SORT((x,), (one_of(dim, x), descending, stable), out, over))


@export(torch.argsort, methods=["argsort"])
def argsort(
    x: ShardedTensor,
    dim: int = -1,
    descending: bool = False,
    stable: bool = False,
    *,
    over: Over = None,
) -> ShardedTensor:
    """The global indices that sort along a dim; as `sort`."""
    return sort(x.detach(), dim, descending, stable, over=over).indices


@export(torch.msort, methods=["msort"])
def msort(x: ShardedTensor, *, out: LayoutLike | None = None) -> ShardedTensor:
    """Values in order along dim 0; as `sort`."""
    return sort(x, 0, out=out).values


# Top k: the best of each block's best.


def _top_rule(shapes: Any, k: int, dim: int, *_: Any) -> Rule:
    base = along(shapes, dim)
    top = (*base.inputs[0][:dim], ("k",), *base.inputs[0][dim + 1 :])
    return Rule(base.inputs, (top,) * 2, {**base.sizes, "k": k}, base.blocked | {"k"})


def _top_local(info: Info) -> Local:
    k, dim, largest, in_order = info.static
    return lambda x: tuple(torch.topk(x, k, dim, largest, in_order))


def _candidates_rule(shapes: Any, k: int, dim: int, largest: bool, n: int) -> Rule:
    base = block_rule(shapes, (dim,), (n,))
    top = (*base.inputs[0][:dim], (f"p{dim}", "k"), *base.inputs[0][dim + 1 :])
    return Rule(base.inputs, (top,) * 2, {**base.sizes, "k": k}, base.blocked | {"k"})


def _candidates_local(info: Info) -> Local:
    k, dim, largest, _ = info.static
    size = info.rule.sizes[f"i{dim}"]

    def best(offset: int) -> Callable[..., Any]:
        def local(x: Tensor) -> tuple[Tensor, Tensor]:
            values, indices = torch.topk(x, k, dim, largest)
            return values, indices + offset

        return local

    return [best(p * size) for p in info.mesh.positions(info.axes(f"p{dim}"))]


_CANDIDATES = Op("topk", _candidates_rule, _candidates_local)


def _top_cut(operands: Sequence[Any], static: tuple[Any, ...]) -> tuple[ShardedTensor, ...]:
    (x,) = operands
    k, dim, largest, _ = static
    axes = x.layout.dims[dim]
    (n,) = parts(x, (dim,))
    found = _CANDIDATES((x,), (min(k, x.shape[dim] // n), dim, largest, n))
    values, indices = (convert(y, axes, "replicated") for y in found)
    best, places = _TOP((values,), static)
    return best, gather(indices, dim, places)


_TOP = Op("topk", _top_rule, _top_local, protocol=_top_cut)


@export(torch.topk, methods=["topk"])
def topk(
    x: ShardedTensor,
    k: int,
    dim: int = -1,
    largest: bool = True,
    sorted: bool = True,
    *,
    out: LayoutLike | None = None,
    over: Over = None,
) -> Sorted:
    """The k largest (or smallest) values along a dim, which may be cut, and their global indices.

    Args:
        x: any layout.
        k: how many; not more than the dim has.
        dim: along which.
        largest: False for the smallest.
        sorted: in order.
        out: layout of the values.
        over: mesh axis to factor, where the types leave a choice.

    Returns:
        (values, indices); whole along `dim`. Of equal values, torch leaves open which are found.

    Cost along a cut dim: an all_gather of k values and k indices of each device; backward none.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.tensor([3.0, 1.0, 4.0, 2.0]), sw.make_mesh({"data": 2}), "n/data")
    >>> values, indices = x.topk(2)
    >>> values.full_tensor(), indices.full_tensor()
    (tensor([4., 3.]), tensor([2, 0]))
    """
    at = one_of(dim, x)
    if not 0 <= k <= (x.shape[at] if x.ndim else 1):
        raise ValueError(f"topk: k is {k}, but dim {at} of {x} is shorter")
    return Sorted(*_TOP((x,), (k, at, largest, sorted), out, over))


def _picked_rule(shapes: Any, dim: int, keepdim: bool, *_: Any) -> Rule:
    dims = (dim,) if shapes[0] else ()
    return sized(reduction(dims, keepdim, len(shapes[0]), blocked=True, results=2), shapes)


def _kth_local(info: Info) -> Local:
    dim, keepdim, k = info.static
    return lambda x: tuple(torch.kthvalue(x, k, dim, keepdim))


def _median_local(info: Info) -> Local:
    dim, keepdim = info.static
    return lambda x: tuple(torch.median(x, dim, keepdim))


_KTH = Op("kthvalue", _picked_rule, _kth_local)
_MEDIAN = Op("median", _picked_rule, _median_local)


@export(torch.kthvalue, methods=["kthvalue"])
def kthvalue(
    x: ShardedTensor,
    k: int,
    dim: int = -1,
    keepdim: bool = False,
    *,
    out: LayoutLike | None = None,
    over: Over = None,
) -> Sorted:
    """The k-th smallest value along a dim, and its index. A cut dim is a choice."""
    return Sorted(*_KTH((x,), (one_of(dim, x), keepdim, k), out, over))


@export(torch.median, methods=["median"])
def median(
    x: ShardedTensor,
    dim: int | None = None,
    keepdim: bool = False,
    *,
    out: LayoutLike | None = None,
    over: Over = None,
) -> Any:
    """The median along a dim, (values, indices), or of all entries. A cut dim is a choice.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.tensor([[3.0, 1.0, 2.0]]), sw.make_mesh({"data": 1}), "b/data d")
    >>> x.median(1).values.full_tensor()
    tensor([2.])
    """
    if dim is None:
        return _MEDIAN((reshape(x, (-1,)),), (0, False), out, over)[0]
    return Sorted(*_MEDIAN((x,), (one_of(dim, x), keepdim), out, over))
