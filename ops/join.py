"""Putting tensors together and taking them apart: cat, stack, split, chunk, unbind.

All are linear; `cat` and `stack` in all their operands together, so that a sum that is owed in
one passes and the others count once. The dim that is joined or taken from is needed whole: where
an axis cuts it, that is a choice. All other dims stay as they are. A part that is the whole dim
costs nothing and may be cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ..layouts.layout import LayoutLike
from ..layouts.sharded import ShardedTensor, install
from ..meshlib.errors import LayoutError
from .dispatch import Info, Local, Op, export
from .rules import Rule, letters
from .shape import one_dim, view_rule

Over = Mapping[str, str] | None


def _cat_rule(shapes: Sequence[Any], dim: int) -> Rule:
    names = letters(len(shapes[0]))
    sizes = dict(zip(names, shapes[0], strict=True))
    ins = []
    blocked = {"joined"}
    alone = len(shapes) == 1
    for number, shape in enumerate(shapes):
        if len(shape) != len(names) or any(
            shape[k] != sizes[n] for k, n in enumerate(names) if k != dim
        ):
            raise ValueError(
                f"sizes {tuple(shapes[0])} and {tuple(shape)} differ on another dim than {dim}"
            )
        part = "joined" if alone else f"part{number}"
        sizes[part] = shape[dim]
        blocked.add(part)
        ins.append(tuple((part if k == dim else n,) for k, n in enumerate(names)))
    del sizes[names[dim]]
    sizes["joined"] = sum(shape[dim] for shape in shapes)
    out = tuple(("joined" if k == dim else n,) for k, n in enumerate(names))
    return Rule(
        tuple(ins),
        (out,),
        sizes,
        frozenset() if alone else frozenset(blocked),
        linear=frozenset(range(len(shapes))),
        joint=True,
    )


def _cat_local(info: Info) -> Local:
    dim = info.static[0]
    return lambda *parts: torch.cat(parts, dim)


_CAT = Op("cat", _cat_rule, _cat_local)


@export(torch.cat, torch.concat, torch.concatenate)
def cat(
    tensors: Sequence[Any],
    dim: int = 0,
    *,
    axis: int | None = None,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """Tensors one behind the other along a dim.

    Args:
        tensors: equal in all other dims; plain tensors are constants.
        dim: where; a choice if an axis cuts it in one of them.
        axis: the same, numpy's name.
        out: the result's layout.
        over: mesh axis to factor.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.ones(4, 3), sw.make_mesh({"data": 2}), "b/data d")
    >>> torch.cat([x, 2 * x], dim=1)
    f32[4/data 6] local[2 6] on mesh(data=2)
    """
    dim = dim if axis is None else axis
    ndim = max(t.ndim for t in tensors)
    kept = [
        t for t in tensors if t.ndim == ndim or tuple(t.shape) != (0,)
    ]  # torch skips empty ones
    return _CAT(kept, (one_dim(dim, ndim),), out, over)


concat = concatenate = cat


def _stack_rule(shapes: Sequence[Any], dim: int) -> Rule:
    dims = tuple((n,) for n in letters(len(shapes[0])))
    sizes = {d[0]: n for d, n in zip(dims, shapes[0], strict=True)}
    for shape in shapes:
        if tuple(shape) != tuple(shapes[0]):
            raise ValueError(f"shapes {tuple(shapes[0])} and {tuple(shape)} differ")
    return Rule(
        (dims,) * len(shapes),
        ((*dims[:dim], ("stacked",), *dims[dim:]),),
        {**sizes, "stacked": len(shapes)},
        frozenset(("stacked",)),
        linear=frozenset(range(len(shapes))),
        joint=True,
    )


def _stack_local(info: Info) -> Local:
    dim = info.static[0]
    return lambda *parts: torch.stack(parts, dim)


_STACK = Op("stack", _stack_rule, _stack_local)


@export(torch.stack)
def stack(
    tensors: Sequence[Any], dim: int = 0, *, out: LayoutLike | None = None, over: Over = None
) -> ShardedTensor:
    """Tensors of one shape side by side along a new dim, which nothing cuts.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.ones(4), sw.make_mesh({"data": 2}), "n/data")
    >>> torch.stack([x, x])
    f32[2 4/data] local[2 2] on mesh(data=2)
    """
    return _STACK(list(tensors), (one_dim(dim, tensors[0].ndim + 1),), out, over)


def _split_rule(shapes: Any, dim: int, parts: tuple[int, ...]) -> Rule:
    dims = tuple((n,) for n in letters(len(shapes[0])))
    if len(parts) == 1:
        return view_rule(shapes[0], dims, dims)
    outs = [(*dims[:dim], (f"part{i}",), *dims[dim + 1 :]) for i in range(len(parts))]
    sizes = {f"part{i}": n for i, n in enumerate(parts)}
    return view_rule(shapes[0], dims, *outs, blocked={dims[dim][0], *sizes}, sizes=sizes)


def _split_local(info: Info) -> Local:
    dim, parts = info.static
    if len(parts) == 1:
        return lambda x: (x.view_as(x),)
    return lambda x: torch.split(x, list(parts), dim)


_SPLIT = {name: Op(name, _split_rule, _split_local) for name in ("split", "chunk", "tensor_split")}


def _parts(size: int, length: int) -> tuple[int, ...]:
    """Parts of a length, the last one shorter; one empty part of nothing."""
    return tuple(min(length, size - start) for start in range(0, size, length)) or (0,)


@export(torch.split, torch.split_with_sizes, methods=["split", "split_with_sizes"])
def split(
    x: ShardedTensor, split_size_or_sections: int | Sequence[int], dim: int = 0
) -> tuple[ShardedTensor, ...]:
    """Parts of a length (the last may be shorter), or of the lengths in a list.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.ones(4, 6), sw.make_mesh({"data": 2}), "b/data d")
    >>> [str(part) for part in x.split([2, 4], dim=1)]
    ['f32[4/data 2]', 'f32[4/data 4]']
    """
    at = one_dim(dim, x.ndim)
    asked = split_size_or_sections
    parts = _parts(x.shape[at], asked) if isinstance(asked, int) else tuple(asked)
    if sum(parts) != x.shape[at] or any(n < 0 for n in parts):
        raise ValueError(f"split: {list(parts)} does not add up to size {x.shape[at]} of dim {dim}")
    return _SPLIT["split"]((x,), (at, parts))


@export(torch.chunk, methods=["chunk"])
def chunk(x: ShardedTensor, chunks: int, dim: int = 0) -> tuple[ShardedTensor, ...]:
    """At most `chunks` parts of equal length, the last may be shorter."""
    at = one_dim(dim, x.ndim)
    length = max(1, -(-x.shape[at] // chunks))
    return _SPLIT["chunk"]((x,), (at, _parts(x.shape[at], length)))


@export(torch.tensor_split, methods=["tensor_split"])
def tensor_split(
    x: ShardedTensor, indices_or_sections: int | Sequence[int], dim: int = 0
) -> tuple[ShardedTensor, ...]:
    """Parts that differ in length by at most one, or cut at the indices of a list."""
    at = one_dim(dim, x.ndim)
    size = x.shape[at]
    asked = indices_or_sections
    if isinstance(asked, int):
        parts = tuple(size // asked + (i < size % asked) for i in range(asked))
    else:
        ends = [*(range(size)[:i].stop for i in asked), size]
        parts = tuple(max(0, b - a) for a, b in zip([0, *ends], ends))  # noqa: B905 - one start more
        if sum(parts) != size:
            raise ValueError(f"tensor_split: indices {list(asked)} must rise")
    return _SPLIT["tensor_split"]((x,), (at, parts))


def _unbind_rule(shapes: Any, dim: int) -> Rule:
    dims = tuple((n,) for n in letters(len(shapes[0])))
    outs = [(*dims[:dim], *dims[dim + 1 :])] * shapes[0][dim]
    return view_rule(shapes[0], dims, *outs, blocked=dims[dim])


def _unbind_local(info: Info) -> Local:
    dim = info.static[0]
    return lambda x: torch.unbind(x, dim)


_UNBIND = Op("unbind", _unbind_rule, _unbind_local)


@export(torch.unbind, methods=["unbind"])
def unbind(x: ShardedTensor, dim: int = 0) -> tuple[ShardedTensor, ...]:
    """All slices along a dim, as one op: its backward stacks their gradients once.

    >>> import torch, shardwise as sw
    >>> layers = sw.shard(torch.ones(3, 4), sw.make_mesh({"tensor": 2}), "layer d/tensor")
    >>> [str(w) for w in layers.unbind()]
    ['f32[4/tensor]', 'f32[4/tensor]', 'f32[4/tensor]']
    """
    if x.ndim == 0:
        raise IndexError("unbind: a 0-d tensor has no dim to take apart")
    return _UNBIND((x,), (one_dim(dim, x.ndim),))


class NotIterableError(LayoutError, TypeError):
    """A cut dim has no slices to go over; a TypeError too: code asks so what can be iterated."""


def _iterate(x: ShardedTensor) -> Iterator[ShardedTensor]:
    try:
        return iter(unbind(x))
    except LayoutError as error:
        raise NotIterableError(
            str(error), kind=error.kind, op=error.op, source=error.source, fixes=error.fixes
        ) from None


install("__iter__", _iterate)
