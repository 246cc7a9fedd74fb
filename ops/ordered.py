"""Ops along an ordered dim: cumsum, cumprod, sort, argsort, topk.

    over a cut dim      what moves
    cumsum              all_gather of the blocks' totals
    sort, argsort       all_to_all to another dim that divides, and back; else all_gather
    topk                all_gather of k candidates of each device
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layouts.layout import Layout, with_state
from ..layouts.reshard import reshard_one
from ..layouts.sharded import ShardedTensor, make_type
from .dispatch import Info, Local, Op, export
from .reduce import normal_dims
from .rules import Rule, letters, sized


class Sorted(NamedTuple):
    """Values in order, and where they stood."""

    values: ShardedTensor
    indices: ShardedTensor


def _along(shapes: Any, dim: int, *static: Any, results: int = 1, linear: bool = False) -> Rule:
    names = letters(len(shapes[0]))
    dims = tuple((n,) for n in names)
    place = normal_dims(dim, len(names))
    return sized(
        Rule(
            (dims,),
            (dims,) * results,
            blocked=frozenset(names[p] for p in place),
            linear=frozenset((0,)) if linear else frozenset(),
        ),
        shapes,
    )


def _cumsum_protocol(operands: Any, static: tuple[Any, ...]) -> ShardedTensor:
    """Each block's own cumsum, plus the totals of the blocks before it."""
    (x,), (dim, dtype) = operands, static
    x = x if dtype is None else x.to(dtype)
    (place,) = normal_dims(dim, x.ndim)
    axes = x.layout.dims[place]
    n = x.mesh.group_size(axes)
    kind = x._type
    own = ShardedTensor(tuple(torch.cumsum(s, place) for s in x._shards), kind)
    shape = (*x.shape[:place], n, *x.shape[place + 1 :])
    totals = ShardedTensor(
        tuple(s.sum(place, keepdim=True) for s in x._shards),
        make_type(kind.mesh, kind.layout, shape, x.dtype, kind.grad),
    )
    whole: Layout = totals.layout
    for axis in reversed(axes):
        whole = with_state(whole, axis, "reduced" if kind.grad else "replicated")
    every = reshard_one(totals, whole)
    before = tuple(
        s.narrow(place, 0, p).sum(place, keepdim=True)
        for s, p in zip(every._shards, x.mesh.positions(axes), strict=True)
    )
    # a local add: the one entry along the dim is this block's own, not a broadcast
    return ShardedTensor(tuple(a + b for a, b in zip(own._shards, before, strict=True)), own._type)


_CUMSUM = Op(
    "cumsum",
    lambda shapes, dim, dtype: _along(shapes, dim, linear=True),
    lambda info: lambda x: torch.cumsum(x, info.static[0], dtype=info.static[1]),
    protocol=_cumsum_protocol,
)


@export(torch.cumsum, methods=["cumsum"])
def cumsum(x: ShardedTensor, dim: int, *, dtype: torch.dtype | None = None) -> ShardedTensor:
    """Running sums along a dim, which may be cut: only the blocks' totals move.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.ones(4), sw.make_mesh({"data": 2}), "n/data")
    >>> x.cumsum(0).full_tensor()
    tensor([1., 2., 3., 4.])
    """
    if not x.dtype.is_floating_point and dtype is None:
        dtype = torch.int64  # as torch does, also across blocks
    return _CUMSUM((x,), (dim, dtype))  # type: ignore[no-any-return]


_CUMPROD = Op(
    "cumprod", lambda shapes, dim: _along(shapes, dim), lambda info: lambda x: torch.cumprod(x, info.static[0])
)


@export(torch.cumprod, methods=["cumprod"])
def cumprod(x: ShardedTensor, dim: int) -> ShardedTensor:
    """Running products along a dim, which must not be cut."""
    return _CUMPROD((x,), (dim,))  # type: ignore[no-any-return]


def elsewhere(x: ShardedTensor, place: int) -> ShardedTensor:
    """`x` with a dim whole: its axes moved to another dim where they divide it, else gathered."""
    layout = x.layout
    for axis in reversed(layout.dims[place]):
        width = x.mesh.axes[axis]
        for other, n in enumerate(x.shape):
            over = x.mesh.group_size(layout.dims[other])
            if other != place and n % (over * width) == 0:
                layout = with_state(layout, axis, other)
                break
        else:
            layout = with_state(layout, axis, "replicated")
    return reshard_one(x, layout)


def _sort_local(info: Info) -> Local:
    dim, descending, stable = info.static

    def ordered(x: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.sort(x, dim=dim, descending=descending, stable=stable)
        return found.values, found.indices

    return ordered


def _sort_protocol(operands: Any, static: tuple[Any, ...]) -> tuple[ShardedTensor, ShardedTensor]:
    (x,), (dim, descending, stable) = operands, static
    (place,) = normal_dims(dim, x.ndim)
    values, indices = _SORT((elsewhere(x, place),), static)
    return reshard_one(values, x.layout), reshard_one(indices, x.layout)


_SORT = Op(
    "sort", lambda shapes, dim, *_: _along(shapes, dim, results=2), _sort_local, protocol=_sort_protocol
)


@export(torch.sort, methods=["sort"])
def sort(
    x: ShardedTensor, dim: int = -1, descending: bool = False, stable: bool = False
) -> Sorted:
    """Values in order along a dim, which may be cut, and their indices.

    Cost over a cut dim: an all_to_all there and back if another dim takes the axis, else an all_gather.
    """
    return Sorted(*_SORT((x,), (dim, descending, stable)))


@export(torch.argsort, methods=["argsort"])
def argsort(
    x: ShardedTensor, dim: int = -1, descending: bool = False, stable: bool = False
) -> ShardedTensor:
    """The indices that sort along a dim; see `sort`."""
    return sort(x, dim, descending, stable).indices


def _topk_rule(shapes: Any, k: int, dim: int, *_: Any) -> Rule:
    names = letters(len(shapes[0]))
    (place,) = normal_dims(dim, len(names))
    if not 0 <= k <= shapes[0][place]:
        raise ValueError(f"k = {k} is more than the {shapes[0][place]} entries of dim {place}")
    dims = tuple((n,) for n in names)
    top = (*dims[:place], ("k",), *dims[place + 1 :])
    base = sized(Rule((dims,), (top, top), {"k": k}, blocked=frozenset({names[place]})), shapes)
    return base


def _topk_local(info: Info) -> Local:
    k, dim, largest, in_order = info.static

    def top(x: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.topk(x, k, dim, largest, in_order)
        return found.values, found.indices

    return top


def _topk_protocol(operands: Any, static: tuple[Any, ...]) -> tuple[ShardedTensor, ShardedTensor]:
    """k candidates of each block, gathered, and k of them."""
    (x,), (k, dim, largest, in_order) = operands, static
    (place,) = normal_dims(dim, x.ndim)
    axes = x.layout.dims[place]
    width = x.local_shape[place]
    own = min(k, width)
    found = [torch.topk(s, own, place, largest, True) for s in x._shards]
    shape = (*x.shape[:place], own * x.mesh.group_size(axes), *x.shape[place + 1 :])
    kind = x._type
    values = ShardedTensor(
        tuple(f.values for f in found), make_type(kind.mesh, kind.layout, shape, x.dtype, kind.grad)
    )
    indices = ShardedTensor(
        tuple(f.indices + p * width for f, p in zip(found, x.mesh.positions(axes), strict=True)),
        make_type(kind.mesh, kind.layout, shape, torch.int64, False),
    )
    whole = kind.layout
    for axis in reversed(axes):
        whole = with_state(whole, axis, "replicated")
    values, indices = reshard_one(values, whole), reshard_one(indices, whole)
    best, at = _TOPK((values,), (k, dim, largest, in_order))
    return best, torch.gather(indices, place, at)  # type: ignore[arg-type, return-value]


_TOPK = Op("topk", _topk_rule, _topk_local, protocol=_topk_protocol)


@export(torch.topk, methods=["topk"])
def topk(
    x: ShardedTensor,
    k: int,
    dim: int = -1,
    largest: bool = True,
    sorted: bool = True,  # noqa: A002
) -> Sorted:
    """The k largest (or smallest) values along a dim, which may be cut, and their indices.

    Cost over a cut dim: an all_gather of k values and k indices of each device.
    """
    return Sorted(*_TOPK((x,), (k, dim, largest, sorted)))
