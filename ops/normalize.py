"""The norms of layers: an uncut dim runs torch's own kernel; a cut one exchanges statistics only.

    over a cut dim     forward                              backward
    rms_norm           all_reduce                           all_reduce
    layer_norm         all_reduce of mean, of variance      the same two

each of the tensor's size without that dim. A weight is cut as x is; a weight that is cut where x is
not is a choice: slice x, or gather the weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layouts.layout import LayoutLike
from ..layouts.place import constant
from ..layouts.sharded import ShardedTensor, Type
from ..meshlib import record
from .dispatch import Info, Local, Op, Prepared, export, rerun
from .meet import leads, settled, widened
from .moments import vector_norm
from .pointwise import clamp, to
from .reduce import Dims, mean, normal_dims, sum
from .rules import Rule, letters, sized
from .shape import reshape

_grad_enabled = torch.is_grad_enabled
Over = Mapping[str, str] | None
Ints = tuple[int, ...]


def _norm_rule(shapes: Any, width: int, eps: Any, has_bias: bool) -> Rule:
    x = tuple((n,) for n in letters(len(shapes[0])))
    last = x[len(x) - width :]
    return sized(
        Rule(
            (x, *(last for _ in shapes[1:])),
            (x,),
            blocked=frozenset(n for (n,) in last),
            linear=frozenset() if has_bias else frozenset((1,)),
        ),
        shapes,
    )


def _last(x: Any, width: int) -> Ints:
    return tuple(range(x.ndim - width, x.ndim))


def _local_shape(info: Info) -> Ints:
    width = info.static[0]
    return tuple(info.size(dim[0]) if dim else 1 for dim in info.rule.outputs[0][-width:])


def _rms_local(info: Info) -> Local:
    shape, eps = _local_shape(info), info.static[1]
    return lambda x, weight=None: F.rms_norm(x, shape, weight, eps)


def _rms_cut(operands: Sequence[Any], static: tuple[Any, ...]) -> ShardedTensor:
    x, *weight = operands
    width, eps, _ = static
    wide: Any = widened(x)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    square: Any = settled(mean(wide * wide, _last(x, width), True))
    y: Any = to(wide * (square + eps).rsqrt(), x.dtype)
    return y * weight[0] if weight else y


def _layer_local(info: Info) -> Local:
    shape, (_, eps, has_bias) = _local_shape(info), info.static
    norm = torch.layer_norm  # what F.layer_norm calls, without its own dispatch
    if has_bias and len(info.kinds) == 3:
        return lambda x, weight, bias: norm(x, shape, weight, bias, eps)
    if has_bias:
        return lambda x, bias: norm(x, shape, None, bias, eps)
    return lambda x, weight=None: norm(x, shape, weight, None, eps)


def _layer_cut(operands: Sequence[Any], static: tuple[Any, ...]) -> ShardedTensor:
    x, *rest = operands
    width, eps, has_bias = static
    dims, wide = _last(x, width), cast(Any, widened(x))
    centred = wide - settled(mean(wide, dims, True))
    variance: Any = settled(mean(centred * centred, dims, True))
    y: Any = to(centred * (variance + eps).rsqrt(), x.dtype)
    bias = rest.pop() if has_bias else None
    y = y * rest[0] if rest else y
    return y if bias is None else y + bias


# With the protocol, and without: an uncut x beside a cut weight is a choice.
_RMS = (
    Op("rms_norm", _norm_rule, _rms_local),
    Op("rms_norm", _norm_rule, _rms_local, protocol=_rms_cut),
)
_LAYER = (
    Op("layer_norm", _norm_rule, _layer_local),
    Op("layer_norm", _norm_rule, _layer_local, protocol=_layer_cut),
)


def _normed(
    ops: tuple[Op, Op],
    x: ShardedTensor,
    shape: Sequence[int],
    rest: tuple[Any, ...],
    static: tuple[Any, ...],
    out: LayoutLike | None,
    over: Over,
) -> ShardedTensor:
    given = [t for t in rest if t is not None]
    if isinstance(x, Tensor):  # a constant beside sharded weights
        x = constant(x, next(t for t in given if isinstance(t, ShardedTensor)))
    try:
        kinds = tuple([t._type for t in given])
    except AttributeError:  # a plain tensor among them: a constant
        given = [constant(t, x) if isinstance(t, Tensor) else t for t in given]
        kinds = tuple([t._type for t in given])
    able = _checked(ops[0].name, x._type, tuple(shape), kinds)
    return ops[able]((x, *given), (len(shape), *static), out, over)


@cache
def _checked(name: str, x: Type, shape: Ints, kinds: tuple[Type, ...]) -> bool:
    """Whether the protocol may run; raises for sizes that do not fit."""
    width = len(shape)
    if not width or tuple(x.shape[-width:]) != shape:
        raise ValueError(f"{name}: normalized_shape {shape} is not the end of {tuple(x.shape)}")
    for kind in kinds:
        if tuple(kind.shape) != shape:
            raise ValueError(f"{name}: a weight of shape {tuple(kind.shape)} beside {shape}")
    dims = range(len(x.shape) - width, len(x.shape))
    return leads(x, dims, [(kind, range(width)) for kind in kinds])


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
    """x over the root of its mean square along the last dims, times weight.

    Args:
        x: [..., *normalized_shape]; those dims may be cut.
        normalized_shape: the last dims.
        weight: of that shape.
        eps: added to the mean square; None is the dtype's own.
        out: the result's layout.
        over: mesh axis to factor, where the types leave a choice.

    Cost over a cut dim: an all_reduce of one number per row, forward and backward.

    Raises:
        LayoutError: kind "choice": a weight cut where x is not.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.full((2, 4), 3.0), sw.make_mesh({"tensor": 2}), "b d/tensor")
    >>> torch.nn.functional.rms_norm(x, (4,))
    f32[2 4/tensor] local[2 2] on mesh(tensor=2)
    """
    return _normed(_RMS, x, normalized_shape, (weight,), (eps, False), out, over)


@export(F.layer_norm, torch.layer_norm)
def layer_norm(
    x: ShardedTensor,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
    *,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """Zero mean and unit variance along the last dims, times weight, plus bias.

    Args:
        x: [..., *normalized_shape]; those dims may be cut.
        normalized_shape: the last dims.
        weight: of that shape.
        bias: of that shape.
        eps: added to the variance.
        cudnn_enable: no effect, as in torch.
        out: the result's layout.
        over: mesh axis to factor, where the types leave a choice.

    Cost over a cut dim: two all_reduces of one number per row, forward and backward; the variance
    is taken of centred values, so large means lose no digits.

    Raises:
        LayoutError: kind "choice": a weight cut where x is not.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.tensor([[1.0, 3.0]]), sw.make_mesh({"tensor": 2}), "b d/tensor")
    >>> torch.nn.functional.layer_norm(x, (2,)).full_tensor()
    tensor([[-1.0000,  1.0000]])
    """
    if out is None and over is None:
        try:  # all operands there, and seen before: the shortest way in
            ready = _READY.get(
                (x._type, weight._type, bias._type, tuple(normalized_shape), eps, _grad_enabled())
            )
        except AttributeError:
            ready = None
        if ready is not None and not record.LOGS:
            return rerun(ready, x, weight, bias)
    result = _normed(
        _LAYER, x, normalized_shape, (weight, bias), (eps, bias is not None), out, over
    )
    if out is None and over is None and type(weight) is type(bias) is ShardedTensor:
        _remember(x, weight, bias, tuple(normalized_shape), eps)
    return result


_READY: dict[Any, Prepared] = {}  # layer_norm with weight and bias: the plans that convert nothing


def _remember(x: Any, weight: Any, bias: Any, shape: Ints, eps: float) -> None:
    kinds = (x._type, weight._type, bias._type)
    for op in _LAYER:
        found = op.fast.get(((len(shape), eps, True), _grad_enabled(), *kinds))
        if found is not None:
            _READY[(*kinds, shape, eps, _grad_enabled())] = found


def _group_rule(shapes: Any, groups: int, eps: float, has_bias: bool) -> Rule:
    x = shapes[0]
    if len(x) < 2 or x[1] % groups:
        raise ValueError(f"{groups} groups do not divide the channels of {tuple(x)}")
    names = letters(len(x))
    channels = ("g", "c")
    dims = (("d0",), channels, *((n,) for n in names[2:]))
    sizes = {"g": groups, "c": x[1] // groups}
    blocked = frozenset(("c", *names[2:]))
    return sized(Rule((dims, *((channels,) for _ in shapes[1:])), (dims,), sizes, blocked), shapes)


def _group_local(info: Info) -> Local:
    (_, eps, has_bias), groups = info.static, info.size("g")

    def norm(x: Any, *rest: Any) -> Any:
        *weight, bias = rest if has_bias else (*rest, None)
        return F.group_norm(x, groups, weight[0] if weight else None, bias, eps)

    return norm


_GROUP = Op("group_norm", _group_rule, _group_local)


@export(F.group_norm)
def group_norm(
    x: ShardedTensor,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """`torch.nn.functional.group_norm` of [batch, channels, ...]: batch and groups may be cut.

    Raises:
        LayoutError: kind "choice": a dim within a group is cut.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.zeros(2, 4, 3), sw.make_mesh({"tensor": 2}), "b c/tensor s")
    >>> torch.nn.functional.group_norm(x, 2)
    f32[2 4/tensor 3] local[2 2 3] on mesh(tensor=2)
    """
    operands = [t for t in (x, weight, bias) if t is not None]
    return _GROUP(operands, (num_groups, eps, bias is not None), out, over)


@export(F.batch_norm)
def batch_norm(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> ShardedTensor:
    """Each channel of [batch, channels, ...] by statistics of the GLOBAL batch, or running ones.

    Cost while training: two all_reduces of [channels] where batch or space is cut. Running
    statistics are not written: values are immutable, so pass None for them while training and keep
    your own.
    """
    if training and (running_mean is not None or running_var is not None):
        raise TypeError(
            "batch_norm: nothing is written in place; pass None for the running statistics"
        )
    row = (1, -1, *(1,) * (x.ndim - 2))

    def beside(t: Any) -> Any:
        return reshape(t, row) if isinstance(t, ShardedTensor) else t.reshape(row)

    if training:
        dims = tuple(d for d in range(x.ndim) if d != 1)
        centred = x - settled(mean(x, dims, True))
        spread: Any = settled(mean(centred * centred, dims, True))
    else:
        centred, spread = x - beside(running_mean), beside(running_var)
    y = centred * (spread + eps).rsqrt()
    y = y if weight is None else y * beside(weight)
    return y if bias is None else y + beside(bias)


@export(F.normalize)
def normalize(x: Any, p: float = 2.0, dim: Dims = 1, eps: float = 1e-12) -> ShardedTensor:
    """x over its p-norm along a dim, which may be cut; the norm counts as `eps` where it is less.

    Cost along a cut dim: an all_reduce of the norms, forward and backward.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.tensor([[3.0, 4.0]]), sw.make_mesh({"tensor": 2}), "b d/tensor")
    >>> torch.nn.functional.normalize(x).full_tensor()
    tensor([[0.6000, 0.8000]])
    """
    return x / clamp(vector_norm(x, p, dim, True), eps)


@export(F.cosine_similarity, torch.cosine_similarity)
def cosine_similarity(x: Any, y: Any, dim: int = 1, eps: float = 1e-8) -> ShardedTensor:
    """The cosine of the angle between x and y along a dim, which may be cut.

    Cost along a cut dim: an all_reduce of each norm, forward and backward; the result is a sum
    still owed.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.tensor([[3.0, 4.0]]), sw.make_mesh({"tensor": 2}), "b d/tensor")
    >>> torch.nn.functional.cosine_similarity(x, x).full_tensor()
    tensor([1.])
    """
    width = max(x.ndim, y.ndim)
    at = normal_dims(dim, width)[0] - width
    unit_x = x / clamp(vector_norm(x, 2, at, True), eps)
    unit_y = y / clamp(vector_norm(y, 2, at, True), eps)
    return sum(unit_x * unit_y, at)
