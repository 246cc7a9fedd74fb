"""Ops whose local work depends on where a block lies: pad, roll, flip, tril, triu, diagonal.

Along a cut dim, `roll` sends only the border that changes its device, `flip` sends whole blocks
to the opposite end, and `tril` and `triu` shift their diagonal by the block's offsets and move
nothing. `pad` and `diagonal` need their dims whole: a cut there is a choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..layouts.layout import LayoutLike
from ..layouts.permute import permute_shards
from ..layouts.reshard import reshard_one
from ..layouts.sharded import ShardedTensor
from .dispatch import Info, Local, Op, export
from .rules import Rule, letters
from .shape import flatten, ints, one_dim, reshape, view_rule

Over = Mapping[str, str] | None
Ints = tuple[int, ...]


def _same_rule(shapes: Any, blocked: Ints = ()) -> Rule:
    dims = tuple((n,) for n in letters(len(shapes[0])))
    return view_rule(shapes[0], dims, dims, blocked=[dims[k][0] for k in blocked])


def _asked(x: ShardedTensor, out: LayoutLike | None) -> ShardedTensor:
    return x if out is None else reshard_one(x, out)


# One dim "(p i)" of n blocks, of which only the local part i changes: p is whatever cuts the dim.


def _blockwise_rule(shapes: Sequence[Any], dim: int, n: int, size: int) -> Rule:
    """The local part of a dim of n blocks replaced by one of another size."""
    names = letters(len(shapes[0]))
    sizes: dict[str, int] = {"p": n, "whole": size}
    ins = []
    for number, shape in enumerate(shapes):
        sizes |= {name: m for k, (name, m) in enumerate(zip(names, shape, strict=True)) if k != dim}
        sizes[f"part{number}"] = shape[dim] // n
        ins.append(
            tuple(("p", f"part{number}") if k == dim else (name,) for k, name in enumerate(names))
        )
    out = tuple(("p", "whole") if k == dim else (name,) for k, name in enumerate(names))
    blocked = frozenset({"whole", *(f"part{i}" for i in range(len(shapes)))})
    return Rule(
        tuple(ins), (out,), sizes, blocked, linear=frozenset(range(len(shapes))), joint=True
    )


def _part_local(info: Info) -> Local:
    dim, _, length, start = info.static
    return lambda x: x.narrow(dim, start, length)


def _join_local(info: Info) -> Local:
    dim = info.static[0]
    return lambda *parts: torch.cat(parts, dim)


_PART = Op(
    "roll", lambda shapes, dim, n, size, start: _blockwise_rule(shapes, dim, n, size), _part_local
)
_JOIN = Op("roll", _blockwise_rule, _join_local)


def _roll_local(info: Info) -> Local:
    shifts, dims = info.static
    return lambda x: torch.roll(x, shifts, dims)


def _roll_blocks(operands: Sequence[Any], static: tuple[Any, ...]) -> ShardedTensor:
    """Dim by dim: the tail of each block goes one block further than its head."""
    (x,) = operands
    for shift, dim in zip(*static, strict=True):
        axes = x.layout.dims[dim]
        if not axes:
            x = _ROLL((x,), ((shift,), (dim,)))
            continue
        n = x.mesh.group_size(axes)
        size = x.shape[dim] // n
        blocks, tail = divmod(shift, size)
        if not tail:
            x = permute_shards(x, axes, _ring(n, blocks))
            continue
        head = _PART((x,), (dim, n, size - tail, 0))
        moved = _PART((x,), (dim, n, tail, size - tail))
        head = permute_shards(head, axes, _ring(n, blocks))
        moved = permute_shards(moved, axes, _ring(n, blocks + 1))
        x = _JOIN((moved, head), (dim, n, size))
    return x


def _ring(n: int, steps: int) -> list[tuple[int, int]]:
    return [(p, (p + steps) % n) for p in range(n)]


_ROLL = Op(
    "roll",
    lambda shapes, shifts, dims: _same_rule(shapes, dims),
    _roll_local,
    protocol=_roll_blocks,
)


@export(torch.roll, methods=["roll"])
def roll(
    x: ShardedTensor,
    shifts: int | Sequence[int],
    dims: int | Sequence[int] | None = None,
    *,
    out: LayoutLike | None = None,
) -> ShardedTensor:
    """Entries moved on along dims, those that fall off the end coming in at the start.

    Args:
        x: any layout.
        shifts: how far, per dim; negative moves back.
        dims: which; None rolls the flattened tensor.
        out: the result's layout.

    Cost: along a cut dim with local size m, a permute of the shift modulo m entries (and of the
    rest, where the shift passes a whole block); nothing else moves. Gradient: the way back.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.arange(6), sw.make_mesh({"seq": 3}), "s/seq")
    >>> x.roll(1).full_tensor()
    tensor([5, 0, 1, 2, 3, 4])
    """
    if dims is None:
        if x.ndim == 1:
            dims = 0
        else:
            return _asked(reshape(roll(flatten(x), shifts, 0), x.shape), out)
    by, at = ints((shifts,)), tuple(one_dim(d, x.ndim) for d in ints((dims,)))
    if len(by) != len(at):
        raise ValueError(f"roll: {len(by)} shifts for {len(at)} dims")
    if len(set(at)) != len(at):
        totals = {d: sum(s for s, e in zip(by, at, strict=True) if e == d) for d in at}
        at, by = tuple(totals), tuple(totals.values())
    by = tuple(s % max(x.shape[d], 1) for s, d in zip(by, at, strict=True))
    return _asked(_ROLL((x,), (by, at)), out)


def _flip_local(info: Info) -> Local:
    dims = info.static[0]
    return lambda x: torch.flip(x, dims)


def _flip_blocks(operands: Sequence[Any], static: tuple[Any, ...]) -> ShardedTensor:
    """Blocks to the opposite end, then each turned round where it is."""
    (x,) = operands
    for dim in static[0]:
        if axes := x.layout.dims[dim]:
            n = x.mesh.group_size(axes)
            x = permute_shards(x, axes, [(p, n - 1 - p) for p in range(n)])
    return _FLIP_EACH((x,), static)


_FLIP = Op(
    "flip", lambda shapes, dims: _same_rule(shapes, dims), _flip_local, protocol=_flip_blocks
)
_FLIP_EACH = Op("flip", lambda shapes, dims: _same_rule(shapes), _flip_local)


@export(torch.flip, methods=["flip"])
def flip(
    x: ShardedTensor, *order: Any, dims: Any = None, out: LayoutLike | None = None
) -> ShardedTensor:
    """Dims in reverse order.

    Cost: a permute of the local tensor per cut dim; nothing where none is cut. Gradient: the same.

    >>> import torch, shardwise as sw
    >>> sw.shard(torch.arange(4), sw.make_mesh({"data": 2}), "n/data").flip(0).full_tensor()
    tensor([3, 2, 1, 0])
    """
    at = tuple(one_dim(d, x.ndim) for d in ints(order, dims))
    if len(set(at)) != len(at):
        raise ValueError(f"flip: dims {at} name a dim twice")
    return _asked(_FLIP((x,), (at,)), out)


export(torch.fliplr, methods=["fliplr"])(lambda x: flip(x, 1))
export(torch.flipud, methods=["flipud"])(lambda x: flip(x, 0))


def _triangle(function: Callable[..., Any]) -> Callable[[Info], Local]:
    def local(info: Info) -> Local:
        (rows,), (columns,) = info.rule.inputs[0][-2:]
        diagonal = info.static[0]
        if not info.axes(rows) and not info.axes(columns):
            return lambda x: function(x, diagonal)
        return [
            lambda x, k=diagonal + row - column: function(x, k)
            for row, column in zip(info.offsets(rows), info.offsets(columns), strict=True)
        ]

    return local


_TRIL = Op("tril", lambda shapes, _: _same_rule(shapes), _triangle(torch.tril))
_TRIU = Op("triu", lambda shapes, _: _same_rule(shapes), _triangle(torch.triu))


@export(torch.tril, methods=["tril"])
def tril(x: ShardedTensor, diagonal: int = 0, *, out: LayoutLike | None = None) -> ShardedTensor:
    """The last two dims' lower triangle, zeros above. Nothing moves, however the matrix is cut.

    >>> import torch, shardwise as sw
    >>> sw.shard(torch.ones(2, 2), sw.make_mesh({"seq": 2}), "s/seq t").tril().full_tensor()
    tensor([[1., 0.],
            [1., 1.]])
    """
    _matrix("tril", x)
    return _TRIL((x,), (diagonal,), out)


@export(torch.triu, methods=["triu"])
def triu(x: ShardedTensor, diagonal: int = 0, *, out: LayoutLike | None = None) -> ShardedTensor:
    """The last two dims' upper triangle, zeros below. Nothing moves, however the matrix is cut."""
    _matrix("triu", x)
    return _TRIU((x,), (diagonal,), out)


def _matrix(name: str, x: ShardedTensor) -> None:
    if x.ndim < 2:
        raise ValueError(f"{name} needs at least 2 dims, got {x.ndim}")


def _diagonal_rule(shapes: Any, offset: int, dim1: int, dim2: int) -> Rule:
    shape = shapes[0]
    dims = tuple((n,) for n in letters(len(shape)))
    rest = tuple(d for k, d in enumerate(dims) if k not in (dim1, dim2))
    length = max(0, min(shape[dim1] + min(offset, 0), shape[dim2] - max(offset, 0)))
    blocked = (*dims[dim1], *dims[dim2], "diagonal")
    return view_rule(
        shape, dims, (*rest, ("diagonal",)), blocked=blocked, sizes={"diagonal": length}
    )


def _diagonal_local(info: Info) -> Local:
    static = info.static
    return lambda x: torch.diagonal(x, *static)


_DIAGONAL = Op("diagonal", _diagonal_rule, _diagonal_local)


@export(torch.diagonal, methods=["diagonal"])
def diagonal(
    x: ShardedTensor,
    offset: int = 0,
    dim1: int = 0,
    dim2: int = 1,
    *,
    out: LayoutLike | None = None,
) -> ShardedTensor:
    """The diagonal of two dims, as a last dim; a cut in one of the two is a choice."""
    a, b = one_dim(dim1, x.ndim), one_dim(dim2, x.ndim)
    if a == b:
        raise ValueError(f"diagonal: dims {dim1} and {dim2} are the same")
    return _DIAGONAL((x,), (offset, a, b), out)


def _pad_rule(shapes: Any, widths: Ints, mode: str, is_zero: bool) -> Rule:
    shape = shapes[0]
    dims = tuple((n,) for n in letters(len(shape)))
    outs = list(dims)
    new: dict[str, int] = {}
    blocked: list[str] = []
    for k in range(len(widths) // 2):
        before, behind = widths[2 * k], widths[2 * k + 1]
        if (before, behind) == (0, 0):
            continue
        at = len(shape) - 1 - k
        new[f"padded{at}"] = size = shape[at] + before + behind
        if size < 0:
            raise ValueError(
                f"padding ({before}, {behind}) leaves dim {at} of size {shape[at]} with {size}"
            )
        blocked += [*dims[at], f"padded{at}"]
        outs[at] = (f"padded{at}",)
    rule = view_rule(shape, dims, tuple(outs), blocked=blocked, sizes=new)
    return rule if is_zero else Rule(rule.inputs, rule.outputs, rule.sizes, rule.blocked)


def _pad_local(info: Info) -> Local:
    widths, mode, _ = info.static
    if mode == "constant":
        return lambda x, value: F.pad(x, widths, mode, value)
    return lambda x, _: F.pad(x, widths, mode)


_PAD = Op("pad", _pad_rule, _pad_local)


@export(F.pad)
def pad(
    x: ShardedTensor,
    pad: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
    *,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """`torch.nn.functional.pad`: entries added before and behind, from the last dim on.

    Args:
        x: any layout; a padded dim that is cut is a choice.
        pad: (before, behind) of the last dim, of the one before it, ...; negative ones crop.
        mode: "constant", "reflect", "replicate" or "circular".
        value: of the constant. With zeros a sum that is owed stays owed.
        out: the result's layout.
        over: mesh axis to factor.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.ones(4, 3), sw.make_mesh({"data": 2}), "b/data d")
    >>> torch.nn.functional.pad(x, (1, 2))
    f32[4/data 6] local[2 6] on mesh(data=2)
    """
    widths = tuple(int(n) for n in pad)
    if len(widths) % 2 or len(widths) > 2 * x.ndim:
        raise ValueError(f"pad: {widths} must hold a pair for at most {x.ndim} dims")
    is_linear = mode != "constant" or not value
    return _PAD((x, value or 0), (widths, mode, is_linear), out, over)
