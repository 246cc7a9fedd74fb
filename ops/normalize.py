"""Softmax and the norms: an uncut dim runs torch's own kernel; a cut one exchanges statistics only.

    over a cut dim      forward                             backward
    softmax             all_reduce(max), all_reduce         all_reduce
    logsumexp           all_reduce(max), all_reduce         none
    rms_norm            all_reduce                          all_reduce
    layer_norm          all_reduce of mean, of variance     the same two

all of the tensor's size without that dim. The protocols are other ops put together, so their gradients follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from ..layouts.convert import convert
from ..layouts.layout import LayoutLike
from ..layouts.sharded import ShardedTensor
from .dispatch import Info, Local, Op, export
from .meet import extreme_value
from .reduce import Dims, normal_dims, reduction
from .rules import Rule, letters, sized

Over = Mapping[str, str] | None


def _along(shapes: Any, dim: int, *_: Any) -> Rule:
    names = letters(len(shapes[0]))
    dims = tuple((n,) for n in names)
    (place,) = normal_dims(dim, len(names))
    return sized(Rule((dims,), (dims,), blocked=frozenset({names[place]})), shapes)


def _finite(top: ShardedTensor) -> ShardedTensor:
    """The maximum to subtract; 0 where a whole row is -inf."""
    return torch.where(torch.isinf(top), 0.0, top)  # type: ignore[call-overload, no-any-return]


def _exponentials(x: ShardedTensor, dim: int) -> tuple[ShardedTensor, ShardedTensor, ShardedTensor]:
    """x less its maximum, the exponential of that, and its sum, still owed over the cut."""
    (place,) = normal_dims(dim, x.ndim)
    low = x - extreme_value(x, (place,), True, "max")
    e = torch.exp(low)  # type: ignore[call-overload]
    return low, e, e.sum(place, keepdim=True)


def _softmax(operands: Sequence[Any], static: tuple[Any, ...]) -> ShardedTensor:
    (x,), (dim, dtype) = operands, static
    _, e, total = _exponentials(x if dtype is None else x.to(dtype), dim)
    return e / total  # type: ignore[no-any-return]


def _log_softmax(operands: Sequence[Any], static: tuple[Any, ...]) -> ShardedTensor:
    (x,), (dim, dtype) = operands, static
    low, _, total = _exponentials(x if dtype is None else x.to(dtype), dim)
    return low - torch.log(total)  # type: ignore[call-overload, no-any-return]


def _plain(function: Any) -> Any:
    return lambda info: lambda x: function(x, info.static[0], dtype=info.static[1])


_SOFTMAX = Op("softmax", _along, _plain(torch.softmax), protocol=_softmax)
_LOG_SOFTMAX = Op("log_softmax", _along, _plain(torch.log_softmax), protocol=_log_softmax)


def _positional(dim: Any, rest: tuple[Any, ...], dtype: Any) -> Any:
    """dtype of `torch.softmax(x, dim, dtype)` and of F.softmax(x, dim, _stacklevel, dtype)."""
    found = [d for d in rest if isinstance(d, torch.dtype)]
    return found[0] if found else dtype


@export(torch.softmax, F.softmax, methods=["softmax"])
def softmax(
    x: ShardedTensor,
    dim: int = -1,
    *rest: Any,
    dtype: torch.dtype | None = None,
    out: LayoutLike | None = None,
    over: Over = None,
    **_stack: Any,
) -> ShardedTensor:
    """exp(x) over its sum along a dim, which may be cut.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.zeros(2, 4), sw.make_mesh({"tensor": 2}), "b n/tensor")
    >>> torch.softmax(x, -1).full_tensor()[0]
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    return _SOFTMAX((x,), (dim, _positional(dim, rest, dtype)), out, over)  # type: ignore[no-any-return]


@export(torch.log_softmax, F.log_softmax, methods=["log_softmax"])
def log_softmax(
    x: ShardedTensor,
    dim: int = -1,
    *rest: Any,
    dtype: torch.dtype | None = None,
    out: LayoutLike | None = None,
    over: Over = None,
    **_stack: Any,
) -> ShardedTensor:
    """Logarithm of the softmax along a dim, which may be cut."""
    return _LOG_SOFTMAX((x,), (dim, _positional(dim, rest, dtype)), out, over)  # type: ignore[no-any-return]


@export(F.softmin)
def softmin(x: ShardedTensor, dim: int = -1, *rest: Any, **keywords: Any) -> ShardedTensor:
    """Softmax of -x."""
    return softmax(-x, dim, *rest, **keywords)


def _lse_rule(shapes: Any, dims: tuple[int, ...], keepdim: bool) -> Rule:
    return sized(reduction(dims, keepdim, len(shapes[0]), reduced="logsumexp"), shapes)


def _lse_protocol(operands: Sequence[Any], static: tuple[Any, ...]) -> ShardedTensor:
    (x,), (dims, keepdim) = operands, static
    top = _finite(extreme_value(x, dims, True, "max"))
    total = torch.exp(x - top).sum(dims, keepdim=True)  # type: ignore[call-overload]
    result = torch.log(total) + top  # type: ignore[call-overload]
    return result if keepdim else result.squeeze(dims)  # type: ignore[no-any-return]


def _lse_local(info: Info) -> Local:
    dims, keepdim = info.static
    return lambda x: torch.logsumexp(x, dims, keepdim=keepdim) if dims else x.clone()


_LOGSUMEXP = Op("logsumexp", _lse_rule, _lse_local, protocol=_lse_protocol)


@export(torch.logsumexp, methods=["logsumexp"])
def logsumexp(x: ShardedTensor, dim: Dims, keepdim: bool = False) -> ShardedTensor:
    """log(sum(exp(x))) over dims, which may be cut; robust against overflow."""
    return _LOGSUMEXP((x,), (normal_dims(dim, x.ndim), keepdim))  # type: ignore[no-any-return]


def _norm_rule(shapes: Any, width: int, *_: Any) -> Rule:
    names = letters(len(shapes[0]))
    x = tuple((n,) for n in names)
    last = x[len(x) - width :]
    return sized(
        Rule((x, *(last for _ in shapes[1:])), (x,), blocked=frozenset(n for (n,) in last)), shapes
    )


def _rms_local(info: Info) -> Local:
    width, eps, _ = info.static
    shape = tuple(info.size(dim[0]) for dim in info.rule.outputs[0][-width:])
    return lambda x, weight=None: F.rms_norm(x, shape, weight, eps)


def _rms_protocol(operands: Sequence[Any], static: tuple[Any, ...]) -> ShardedTensor:
    (x, *weight), (width, eps, dtype) = operands, static
    dims = tuple(range(x.ndim - width, x.ndim))
    wide = x.to(torch.float32) if x.element_size() < 4 else x
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    y = wide * torch.rsqrt((wide * wide).mean(dims, keepdim=True) + eps)  # type: ignore[call-overload]
    y = y.to(x.dtype)
    return y * weight[0] if weight else y  # type: ignore[no-any-return]


_RMS = Op("rms_norm", _norm_rule, _rms_local, protocol=_rms_protocol)


@export(F.rms_norm, torch.rms_norm)
def rms_norm(
    x: ShardedTensor,
    normalized_shape: Sequence[int],
    weight: Any = None,
    eps: float | None = None,
    *,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """x over the root of its mean square along the last dims, times weight; those dims may be cut."""
    _fits(x, normalized_shape)
    operands = (x,) if weight is None else (x, weight)
    return _RMS(operands, (len(normalized_shape), eps, None), out, over)  # type: ignore[no-any-return]


def _layer_local(info: Info) -> Local:
    width, eps, has_weight = info.static
    shape = tuple(info.size(dim[0]) for dim in info.rule.outputs[0][-width:])
    if not has_weight:
        return lambda x, bias=None: F.layer_norm(x, shape, None, bias, eps)
    return lambda x, weight=None, bias=None: F.layer_norm(x, shape, weight, bias, eps)


def _layer_protocol(operands: Sequence[Any], static: tuple[Any, ...]) -> ShardedTensor:
    (x, *rest), (width, eps, has_weight) = operands, static
    dims = tuple(range(x.ndim - width, x.ndim))
    wide = x.to(torch.float32) if x.element_size() < 4 else x
    centred = wide - _whole(wide.mean(dims, keepdim=True))
    variance = (centred * centred).mean(dims, keepdim=True)
    y = (centred * torch.rsqrt(variance + eps)).to(x.dtype)  # type: ignore[call-overload]
    if has_weight:
        y = y * rest.pop(0)
    return y + rest[0] if rest else y  # type: ignore[no-any-return]


def _whole(x: ShardedTensor) -> ShardedTensor:
    """A statistic with its sum taken: subtracted from a cut tensor it would be reduced only later."""
    owed = tuple(a for a in x.mesh.axes if a in x.layout.unreduced)
    return convert(x, owed, "replicated") if owed else x


_LAYER = Op("layer_norm", _norm_rule, _layer_local, protocol=_layer_protocol)


@export(F.layer_norm, torch.layer_norm)
def layer_norm(
    x: ShardedTensor,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """Zero mean and unit variance along the last dims, times weight, plus bias; those dims may be cut.

    The variance is taken of centred values, so large means lose no digits.
    """
    _fits(x, normalized_shape)
    operands = tuple(t for t in (x, weight, bias) if t is not None)
    return _LAYER(operands, (len(normalized_shape), eps, weight is not None), out, over)  # type: ignore[no-any-return]


def _fits(x: ShardedTensor, normalized_shape: Sequence[int]) -> None:
    width = len(normalized_shape)
    if not width or tuple(x.shape[-width:]) != tuple(normalized_shape):
        raise ValueError(f"normalized_shape {tuple(normalized_shape)} is not the end of {tuple(x.shape)}")


@export(F.normalize)
def normalize(
    x: ShardedTensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12
) -> ShardedTensor:
    """x over its p-norm along a dim."""
    norm = torch.linalg.vector_norm(x, p, dim, keepdim=True)  # type: ignore[call-overload]
    return x / norm.clamp(eps)


@export(F.cosine_similarity, torch.cosine_similarity)
def cosine_similarity(x: Any, y: Any, dim: int = 1, eps: float = 1e-8) -> ShardedTensor:
    """The cosine of the angle between x and y along a dim."""
    x_norm = torch.linalg.vector_norm(x, 2, dim, keepdim=True).clamp(eps)
    y_norm = torch.linalg.vector_norm(y, 2, dim, keepdim=True).clamp(eps)
    return ((x / x_norm) * (y / y_norm)).sum(dim)  # type: ignore[no-any-return]


