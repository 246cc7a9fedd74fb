"""Softmax and its kin: an uncut dim runs torch's own kernel; a cut one exchanges statistics only.

    over a cut dim           forward                          backward
    softmax, log_softmax     all_reduce(max), all_reduce      all_reduce
    logsumexp                all_reduce(max), all_reduce      none

each of the tensor's size without that dim. The protocols are other ops put together, so their
gradients follow; the maximum that is subtracted has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..layouts.layout import LayoutLike
from ..layouts.sharded import ShardedTensor
from .dispatch import Info, Local, Op, export
from .meet import dropped, extremum, settled, widened
from .pointwise import to, where
from .reduce import Dims, normal_dims, reduction, sum
from .rules import Rule, letters, sized

Over = Mapping[str, str] | None
Ints = tuple[int, ...]


def _along(shapes: Any, dim: int, *_: Any) -> Rule:
    names = letters(len(shapes[0]))
    dims = tuple((n,) for n in names)
    at = normal_dims(dim, len(names))
    return sized(Rule((dims,), (dims,), blocked=frozenset(names[d] for d in at)), shapes)


def _kernel(function: Callable[..., Any]) -> Callable[[Info], Local]:
    def local(info: Info) -> Local:
        dim, dtype = info.static
        return lambda x: function(x, dim, dtype=dtype)

    return local


def _softmax_cut(operands: Sequence[Any], static: tuple[Any, ...]) -> ShardedTensor:
    (x,) = operands
    dim, dtype = static
    wide: Any = widened(x if dtype is None else to(x, dtype))
    e = (wide - extremum(wide, (dim,), "max")).exp()
    return to(e / settled(sum(e, dim, True)), dtype or x.dtype)


def _log_softmax_cut(operands: Sequence[Any], static: tuple[Any, ...]) -> ShardedTensor:
    (x,) = operands
    dim, dtype = static
    wide: Any = widened(x if dtype is None else to(x, dtype))
    low = wide - extremum(wide, (dim,), "max")
    return to(low - settled(sum(low.exp(), dim, True)).log(), dtype or x.dtype)


_SOFTMAX = Op("softmax", _along, _kernel(torch.softmax), protocol=_softmax_cut)
_LOG_SOFTMAX = Op("log_softmax", _along, _kernel(torch.log_softmax), protocol=_log_softmax_cut)


def _softmax(
    op: Op, x: ShardedTensor, dim: int | None, dtype: Any, out: LayoutLike | None, over: Over
) -> ShardedTensor:
    if dim is None:
        raise TypeError(f"{op.name}: say which dim; torch's guess is deprecated")
    return op((x,), (normal_dims(dim, x.ndim)[0] if x.ndim else dim, dtype), out, over)


@export(torch.softmax, torch.special.softmax, methods=["softmax"])
def softmax(
    x: ShardedTensor,
    dim: int,
    dtype: torch.dtype | None = None,
    *,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """exp(x) over its sum along a dim, which may be cut.

    Cost along a cut dim: an all_reduce(max) and an all_reduce of x without that dim; one backward.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.zeros(2, 4), sw.make_mesh({"tensor": 2}), "b n/tensor")
    >>> torch.softmax(x, -1)
    f32[2 4/tensor] local[2 2] on mesh(tensor=2)
    >>> torch.softmax(x, -1).full_tensor()[0]
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    return _softmax(_SOFTMAX, x, dim, dtype, out, over)


@export(torch.log_softmax, torch.special.log_softmax, methods=["log_softmax"])
def log_softmax(
    x: ShardedTensor,
    dim: int,
    dtype: torch.dtype | None = None,
    *,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """Logarithm of the softmax along a dim, which may be cut. Cost as `softmax`.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.zeros(2, 4), sw.make_mesh({"tensor": 2}), "b n/tensor")
    >>> torch.log_softmax(x, -1).full_tensor()[0]
    tensor([-1.3863, -1.3863, -1.3863, -1.3863])
    """
    return _softmax(_LOG_SOFTMAX, x, dim, dtype, out, over)


# torch.nn.functional has a third positional argument, for its own warnings.
export(F.softmax)(lambda x, dim=None, _stacklevel=3, dtype=None, **kw: softmax(x, dim, dtype, **kw))
export(F.log_softmax)(
    lambda x, dim=None, _stacklevel=3, dtype=None, **kw: log_softmax(x, dim, dtype, **kw)
)


@export(F.softmin)
def softmin(
    x: Any,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """Softmax of -x."""
    return _softmax(_SOFTMAX, -x, dim, dtype, out, over)


def _lse_rule(shapes: Any, dims: Ints, keepdim: bool) -> Rule:
    return sized(reduction(dims, keepdim, len(shapes[0]), reduced="logsumexp"), shapes)


def _lse_local(info: Info) -> Local:
    dims, keepdim = info.static
    return lambda x: torch.logsumexp(x, dims or 0, keepdim=keepdim)


def _lse_cut(operands: Sequence[Any], static: tuple[Any, ...]) -> ShardedTensor:
    (x,) = operands
    dims, keepdim = static
    wide: Any = widened(x)
    top: Any = extremum(wide, dims, "max")
    top = where(top.isinf(), 0, top)  # a row of -inf stays -inf, without inf - inf
    result = settled(sum((wide - top).exp(), dims, True)).log() + top
    return to(dropped(result, dims, keepdim), x.dtype)


_LOGSUMEXP = Op("logsumexp", _lse_rule, _lse_local, protocol=_lse_cut)


@export(torch.logsumexp, torch.special.logsumexp, methods=["logsumexp"])
def logsumexp(
    x: ShardedTensor,
    dim: Dims,
    keepdim: bool = False,
    *,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """log(sum(exp(x))) over dims, which may be cut; robust against overflow.

    Cost over a cut dim: an all_reduce(max) and an all_reduce of the result; backward none.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.full((4,), 1000.0), sw.make_mesh({"tensor": 2}), "n/tensor")
    >>> x.logsumexp(0).full_tensor()
    tensor(1001.3863)
    """
    return _LOGSUMEXP((x,), (normal_dims(dim, x.ndim), keepdim), out, over)
