"""Ops that add or drop dims that say nothing new: expand, squeeze, unsqueeze, repeat, tile.

Linear in their operand. A new extent is a factor that the operand does not have, so nothing cuts
it unless `over` says so; the operand's gradient is then unreduced over that axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layouts.layout import LayoutLike
from ..layouts.sharded import ShardedTensor
from ..meshlib.errors import LayoutError
from .dispatch import Info, Local, Op, export
from .rules import Rule, letters
from .shape import flatten, ints, one_dim, view_rule

Over = Mapping[str, str] | None
Shape = tuple[int, ...]


def _expand_rule(shapes: Any, new: Shape) -> Rule:
    old = shapes[0]
    lead = len(new) - len(old)
    ins: list[tuple[str, ...]] = []
    outs: list[tuple[str, ...]] = [(f"e{k}",) for k in range(lead)]
    for k, (have, want) in enumerate(zip(old, new[lead:], strict=True)):
        ins.append((f"d{k}",) if have == want else ())
        outs.append((f"d{k}",) if have == want else (f"e{lead + k}",))
    grown = {f"e{k}": new[k] for k in range(len(new)) if (f"e{k}",) in outs}
    return view_rule(old, tuple(ins), tuple(outs), sizes=grown)


def _expand_local(info: Info) -> Local:
    shape = info.out_shape()
    return lambda x: x.expand(shape)


_EXPAND = Op("expand", _expand_rule, _expand_local)


@export(torch.broadcast_to, methods=["expand", "broadcast_to"])
def expand(
    x: ShardedTensor,
    *sizes: Any,
    size: Any = None,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """Dims of size 1 repeated to a size, new ones in front; -1 keeps. Nothing is copied.

    >>> import torch, shardwise as sw
    >>> sw.shard(torch.ones(4, 1), sw.make_mesh({"data": 2}), "b/data d").expand(2, -1, 3)
    f32[2 4/data 3] local[2 2 3] on mesh(data=2)
    """
    asked = ints(sizes, size)
    lead = len(asked) - x.ndim
    old = (*([1] * lead), *x.shape)
    new = tuple(h if w == -1 else w for h, w in zip(old, asked, strict=False))
    if (
        lead < 0
        or any(h not in (1, w) for h, w in zip(old, new, strict=True))
        or -1 in asked[: max(lead, 0)]
    ):
        raise ValueError(f"expand: {tuple(x.shape)} cannot be broadcast to {asked}")
    return _EXPAND((x,), (new,), out, over)


broadcast_to = expand


@export(methods=["expand_as"])
def expand_as(x: ShardedTensor, other: Any) -> ShardedTensor:
    """`x` expanded to the global shape of another tensor."""
    return expand(x, tuple(other.shape))


@export(torch.broadcast_tensors)
def broadcast_tensors(*tensors: Any) -> tuple[Any, ...]:
    """All tensors expanded to their common shape."""
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    return tuple(t.expand(shape) for t in tensors)


def _squeeze_rule(shapes: Any, gone: Shape) -> Rule:
    dims = tuple(() if k in gone else (f"d{k}",) for k in range(len(shapes[0])))
    return view_rule(shapes[0], dims, tuple(d for d in dims if d))


def _unsqueeze_rule(shapes: Any, at: int) -> Rule:
    dims = tuple((n,) for n in letters(len(shapes[0])))
    return view_rule(shapes[0], dims, (*dims[:at], (), *dims[at:]))


def _bound(function: Callable[..., Any]) -> Callable[[Info], Local]:
    """The torch function with the op's one static argument."""
    return lambda info: lambda x: function(x, info.static[0])


_SQUEEZE = Op("squeeze", _squeeze_rule, _bound(torch.squeeze))
_UNSQUEEZE = Op("unsqueeze", _unsqueeze_rule, _bound(torch.unsqueeze))


@export(torch.squeeze, methods=["squeeze"])
def squeeze(
    x: ShardedTensor, dim: int | Sequence[int] | None = None, *, out: LayoutLike | None = None
) -> ShardedTensor:
    """Without the dims of size 1 (those named, or all)."""
    named = range(x.ndim) if dim is None else [one_dim(d, x.ndim) for d in ints((dim,))]
    gone = tuple(d for d in named if x.ndim and x.shape[d] == 1)
    return _SQUEEZE((x,), (gone,), out)


@export(torch.unsqueeze, methods=["unsqueeze"])
def unsqueeze(x: ShardedTensor, dim: int, *, out: LayoutLike | None = None) -> ShardedTensor:
    """With a new dim of size 1."""
    return _UNSQUEEZE((x,), (one_dim(dim, x.ndim + 1),), out)


def _repeat_rule(shapes: Any, times: Shape) -> Rule:
    lead = len(times) - len(shapes[0])
    dims = tuple((n,) for n in letters(len(shapes[0])))
    outs = [
        (() if n == 1 and k >= lead else (f"r{k}",)) + (dims[k - lead] if k >= lead else ())
        for k, n in enumerate(times)
    ]
    return view_rule(shapes[0], dims, tuple(outs), sizes={f"r{k}": n for k, n in enumerate(times)})


def _repeat_local(info: Info) -> Local:
    times = [info.size(f"r{k}") for k in range(len(info.static[0]))]
    return lambda x: x.repeat(times)


_REPEAT = Op("repeat", _repeat_rule, _repeat_local)


@export(methods=["repeat"])
def _repeat(x: ShardedTensor, *times: Any, repeats: Any = None) -> ShardedTensor:
    """`Tensor.repeat`: each dim tiled, new ones in front. A cut dim that is tiled is a choice."""
    asked = ints(times, repeats)
    if len(asked) < x.ndim:
        raise ValueError(f"repeat: {asked} must name at least {x.ndim} dims")
    return _REPEAT((x,), (asked,))


@export(torch.tile, methods=["tile"])
def tile(
    x: ShardedTensor,
    *times: Any,
    dims: Any = None,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """`torch.tile`: each dim repeated whole; a cut dim that is tiled is a choice."""
    asked = ints(times, dims)
    asked = (*([1] * (x.ndim - len(asked))), *asked)
    return _REPEAT((x,), (asked,), out, over)


def _interleave_rule(shapes: Any, dim: int, times: int) -> Rule:
    dims = tuple((n,) for n in letters(len(shapes[0])))
    outs = tuple((*d, "r") if k == dim and times != 1 else d for k, d in enumerate(dims))
    return view_rule(shapes[0], dims, outs, sizes={"r": times})


def _interleave_local(info: Info) -> Local:
    dim, times = info.static[0], info.size("r")
    return lambda x: x.repeat_interleave(times, dim)


_INTERLEAVE = Op("repeat_interleave", _interleave_rule, _interleave_local)


@export(torch.repeat_interleave, methods=["repeat_interleave"])
def repeat_interleave(
    x: ShardedTensor,
    repeats: int,
    dim: int | None = None,
    *,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """Each entry of a dim repeated beside itself; a cut dim stays cut.

    Raises:
        LayoutError: kind "meaningless", for repeats in a tensor: the shape would depend on values.
    """
    if isinstance(repeats, ShardedTensor | Tensor):
        raise LayoutError(
            "repeat_interleave: repeats in a tensor make the shape depend on values; give an int",
            op="repeat_interleave",
        )
    if dim is None:
        x, dim = flatten(x), 0
    return _INTERLEAVE((x,), (one_dim(dim, x.ndim), int(repeats)), out, over)
