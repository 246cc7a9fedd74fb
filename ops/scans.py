"""Running sums, products and the like along a dim, which may be cut.

Each device runs over its own block; one total per block is gathered, and each block is joined with
the total of those before it. Backward the same gather.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layouts.convert import convert
from ..layouts.layout import LayoutLike
from ..layouts.sharded import ShardedTensor
from .dispatch import Info, Local, Op, export
from .meet import along, block_rule, blockwise, one_of, parts
from .pointwise import to
from .rules import Rule

Over = Mapping[str, str] | None


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
    exclusive = Op(name, lambda shapes, dim: along(shapes, dim, linear=linear), before)
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
        return joined((blocks((x,), (dim, n)), ahead), (dim, n))

    def whole(info: Info) -> Local:
        dim, dtype = info.static
        if dtype is None:
            return lambda x: scan.function(x, dim)
        return lambda x: scan.function(x, dim, dtype=dtype)

    return Op(name, lambda shapes, *s: along(shapes, *s, linear=linear), whole, protocol=cut)


_SCANS = {name: _define_scan(name) for name in SCANS}


def _scanned(
    name: str, x: ShardedTensor, dim: int, dtype: Any, out: LayoutLike | None, over: Over
) -> ShardedTensor:
    if dtype is None and not x.dtype.is_floating_point and not x.dtype.is_complex:
        dtype = torch.int64  # as torch does, across blocks too
    return _SCANS[name]((x,), (one_of(dim, x), dtype), out, over)


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
