"""Ops along an ordered dim: running sums and the like, sort, topk, kthvalue, median.

    over a cut dim                    what moves
    cumsum, cumprod, logcumsumexp     all_gather of one total per block
    sort, argsort, msort              all_to_all to another dim that divides, and back; else all_gather
    topk                              all_gather of each block's candidates
    kthvalue, median                  a choice
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layouts.convert import convert
from ..layouts.layout import LayoutLike
from ..layouts.sharded import ShardedTensor
from .dispatch import Info, Local, Op, export
from .index import gather
from .meet import block_rule, blockwise, parts
from .pointwise import to
from .reduce import normal_dims, reduction
from .rules import Rule, letters, sized
from .shape import reshape

Over = Mapping[str, str] | None


class Sorted(NamedTuple):
    """What `sort`, `topk`, `kthvalue` and `median` give: values, and where they stood."""

    values: ShardedTensor
    indices: ShardedTensor


def _along(shapes: Any, dim: int, *_: Any, results: int = 1, linear: bool = False) -> Rule:
    names = letters(len(shapes[0]))
    dims = tuple((n,) for n in names)
    return sized(
        Rule(
            (dims,),
            (dims,) * results,
            blocked=frozenset(names[dim : dim + 1]),
            linear=frozenset((0,)) if linear else frozenset(),
        ),
        shapes,
    )


def _one(dim: int, x: ShardedTensor) -> int:
    (found,) = normal_dims(dim, x.ndim) or (0,)
    return found


# Running totals: the function, how a block is totalled, the total of nothing, how two are joined.


@dataclass(frozen=True)
class _Scan:
    function: Callable[..., Tensor]
    total: str
    start: float
    join: Callable[[Tensor, Tensor], Tensor]


SCANS = {
    "cumsum": _Scan(torch.cumsum, "sum", 0, torch.add),
    "cumprod": _Scan(torch.cumprod, "prod", 1, torch.mul),
    "logcumsumexp": _Scan(torch.logcumsumexp, "logsumexp", -math.inf, torch.logaddexp),
}


def _joined_rule(shapes: Any, dim: int, n: int, linear: bool) -> Rule:
    """Each block of a dim "(p i)" with the one number of its own beside it."""
    base = block_rule(shapes, (dim,), (n,))
    return Rule(base.inputs, (base.inputs[0],), base.sizes, base.blocked, joint=linear)


def _define_scan(name: str) -> Op:
    scan = SCANS[name]
    linear = name == "cumsum"

    def before(info: Info) -> Local:
        dim = info.static[0]

        def exclusive(totals: Tensor) -> Tensor:
            first = torch.full_like(totals.narrow(dim, 0, 1), scan.start)
            ahead = torch.cat((first, totals.narrow(dim, 0, totals.shape[dim] - 1)), dim)
            return scan.function(ahead, dim)

        return exclusive

    def each(info: Info) -> Local:
        return lambda x: scan.function(x, info.static[0])

    def each_rule(shapes: Any, dim: int, n: int) -> Rule:
        base = block_rule(shapes, (dim,), (n,))
        only = frozenset((0,)) if linear else frozenset()
        return Rule(base.inputs, (base.inputs[0],), base.sizes, base.blocked, linear=only)

    blocks = Op(name, each_rule, each)
    exclusive = Op(name, lambda shapes, dim: _along(shapes, dim, linear=linear), before)
    joined = Op(
        name,
        lambda shapes, dim, n: _joined_rule(shapes, dim, n, linear),
        lambda info: scan.join,
    )

    def cut(operands: Sequence[Any], static: tuple[Any, ...]) -> ShardedTensor:
        """Each block's own running totals, joined with the total of the blocks before it."""
        (x,) = operands
        dim, dtype = static
        x = x if dtype is None else to(x, dtype)
        axes = x.layout.dims[dim]
        (n,) = parts(x, (dim,))
        totals = convert(blockwise(x, (dim,), scan.total), axes, "replicated")
        ahead = convert(exclusive((totals,), (dim,)), axes, dim)
        return joined((blocks((x,), (dim, n)), ahead), (dim, n))  # type: ignore[no-any-return]

    def whole(info: Info) -> Local:
        dim, dtype = info.static
        if dtype is None:
            return lambda x: scan.function(x, dim)
        return lambda x: scan.function(x, dim, dtype=dtype)

    return Op(name, lambda shapes, *s: _along(shapes, *s, linear=linear), whole, protocol=cut)


_SCANS = {name: _define_scan(name) for name in SCANS}


def _scanned(
    name: str, x: ShardedTensor, dim: int, dtype: Any, out: LayoutLike | None, over: Over
) -> ShardedTensor:
    if dtype is None and not x.dtype.is_floating_point and not x.dtype.is_complex:
        dtype = torch.int64  # as torch does, across blocks too
    return _SCANS[name]((x,), (_one(dim, x), dtype), out, over)  # type: ignore[no-any-return]


@export(torch.cumsum, methods=["cumsum"])
def cumsum(
    x: ShardedTensor,
    dim: int,
    *,
    dtype: torch.dtype | None = None,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """Running sums along a dim, which may be cut; a sum that is owed stays owed.

    Cost along a cut dim: an all_gather of one total per block, forward and backward.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.ones(4), sw.make_mesh({"data": 2}), "n/data")
    >>> x.cumsum(0).full_tensor()
    tensor([1., 2., 3., 4.])
    """
    return _scanned("cumsum", x, dim, dtype, out, over)


@export(torch.cumprod, methods=["cumprod"])
def cumprod(
    x: ShardedTensor,
    dim: int,
    *,
    dtype: torch.dtype | None = None,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """Running products along a dim, which may be cut. Cost as `cumsum`.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.full((4,), 2.0), sw.make_mesh({"data": 2}), "n/data")
    >>> x.cumprod(0).full_tensor()
    tensor([ 2.,  4.,  8., 16.])
    """
    return _scanned("cumprod", x, dim, dtype, out, over)


@export(torch.logcumsumexp, methods=["logcumsumexp"])
def logcumsumexp(
    x: ShardedTensor, dim: int, *, out: LayoutLike | None = None, over: Over = None
) -> ShardedTensor:
    """Logarithm of the running sums of exp(x) along a dim, which may be cut. Cost as `cumsum`.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.zeros(4), sw.make_mesh({"data": 2}), "n/data")
    >>> x.logcumsumexp(0).exp().full_tensor()
    tensor([1., 2., 3., 4.])
    """
    return _scanned("logcumsumexp", x, dim, None, out, over)


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
    return _along(shapes, dim, results=2)


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

    Cost along a cut dim: an all_to_all of x to another dim that the axes divide, and of values and indices back;
    if there is none, an all_gather. The gradient goes the same way.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.tensor([3.0, 1.0, 4.0, 2.0]), sw.make_mesh({"data": 2}), "n/data")
    >>> values, indices = x.sort()
    >>> values.full_tensor(), indices.full_tensor()
    (tensor([1., 2., 3., 4.]), tensor([1, 3, 0, 2]))
    """
    return Sorted(*_SORT((x,), (_one(dim, x), descending, stable), out, over))


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
    base = _along(shapes, dim)
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
    k, dim, largest, n = info.static
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
    at = _one(dim, x)
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
    return Sorted(*_KTH((x,), (_one(dim, x), keepdim, k), out, over))


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
    return Sorted(*_MEDIAN((x,), (_one(dim, x), keepdim), out, over))
