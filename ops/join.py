"""Putting tensors together and taking parts: cat, stack, split, unbind, narrow, select and `[]`.

All are linear; `cat` and `stack` in all their operands together, so that a sum that is owed in one passes and the
others count once. The dim that is joined or taken from is needed whole: where an axis cuts it, that is a choice.
All other dims stay as they are. A part that is the whole dim costs nothing and may be cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..layouts.layout import LayoutLike
from ..layouts.sharded import ShardedTensor, install
from ..meshlib.errors import LayoutError, word
from ..meshlib.source import user_line
from .dispatch import Info, Local, Op, export
from .rules import Rule, letters
from .shape import one_dim, view_rule

Over = Mapping[str, str] | None
Entry = None | int | tuple[int, int, int]  # a new dim, one index, (start, stop, step)


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
            raise ValueError(f"sizes {tuple(shapes[0])} and {tuple(shape)} differ on another dim than {dim}")
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
    tensors: Sequence[Any], dim: int = 0, *, axis: int | None = None, out: LayoutLike | None = None, over: Over = None
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
    kept = [t for t in tensors if t.ndim == ndim or tuple(t.shape) != (0,)]  # torch skips empty ones
    return _CAT(kept, (one_dim(dim, ndim),), out, over)  # type: ignore[no-any-return]


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
    return _STACK(list(tensors), (one_dim(dim, tensors[0].ndim + 1),), out, over)  # type: ignore[no-any-return]


def _split_rule(shapes: Any, dim: int, parts: tuple[int, ...]) -> Rule:
    dims = tuple((n,) for n in letters(len(shapes[0])))
    if len(parts) == 1:
        return view_rule(shapes[0], dims, dims)
    outs = [(*dims[:dim], (f"part{i}",), *dims[dim + 1 :]) for i in range(len(parts))]
    sizes = {f"part{i}": n for i, n in enumerate(parts)}
    return view_rule(shapes[0], dims, *outs, blocked={dims[dim][0], *sizes}, **sizes)


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
def split(x: ShardedTensor, split_size_or_sections: int | Sequence[int], dim: int = 0) -> tuple[ShardedTensor, ...]:
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
    return _SPLIT["split"]((x,), (at, parts))  # type: ignore[no-any-return]


@export(torch.chunk, methods=["chunk"])
def chunk(x: ShardedTensor, chunks: int, dim: int = 0) -> tuple[ShardedTensor, ...]:
    """At most `chunks` parts of equal length, the last may be shorter."""
    at = one_dim(dim, x.ndim)
    length = max(1, -(-x.shape[at] // chunks))
    return _SPLIT["chunk"]((x,), (at, _parts(x.shape[at], length)))  # type: ignore[no-any-return]


@export(torch.tensor_split, methods=["tensor_split"])
def tensor_split(x: ShardedTensor, indices_or_sections: int | Sequence[int], dim: int = 0) -> tuple[ShardedTensor, ...]:
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
    return _SPLIT["tensor_split"]((x,), (at, parts))  # type: ignore[no-any-return]


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
    return _UNBIND((x,), (one_dim(dim, x.ndim),))  # type: ignore[no-any-return]


install("__iter__", lambda x: iter(unbind(x)))


def _index_rule(shapes: Any, entries: tuple[Entry, ...]) -> Rule:
    dims = iter([(n,) for n in letters(len(shapes[0]))])
    sizes = iter(shapes[0])
    ins: list[tuple[str, ...]] = []
    out: list[tuple[str, ...]] = []
    blocked: set[str] = set()
    new: dict[str, int] = {}
    for entry in entries:
        if entry is None:
            out.append(())
            continue
        dim, size = next(dims), next(sizes)
        ins.append(dim)
        if isinstance(entry, tuple) and entry == (0, size, 1):
            out.append(dim)
            continue
        blocked.add(dim[0])
        if isinstance(entry, tuple):
            name = f"s{dim[0]}"
            new[name] = len(range(*entry))
            blocked.add(name)
            out.append((name,))
    return view_rule(shapes[0], tuple(ins), tuple(out), blocked=blocked, **new)


def _index_local(info: Info) -> Local:
    whole = iter(info.rule.inputs[0])
    index: list[Any] = []
    for entry in info.static[0]:
        if entry is None:
            index.append(None)
            continue
        kept = next(whole)[0] not in info.rule.blocked
        index.append(slice(None) if kept else slice(*entry) if isinstance(entry, tuple) else entry)
    found = tuple(index)
    return lambda x: x[found]


_INDEX = {name: Op(name, _index_rule, _index_local) for name in ("getitem", "narrow", "select")}


def _all_but(x: ShardedTensor, dim: int, entry: Entry) -> tuple[tuple[Entry, ...], ...]:
    return (tuple(entry if k == dim else (0, n, 1) for k, n in enumerate(x.shape)),)


@export(torch.narrow, methods=["narrow"])
def narrow(x: ShardedTensor, dim: int, start: int, length: int, *, out: LayoutLike | None = None) -> ShardedTensor:
    """`length` entries of a dim from `start` on."""
    at = one_dim(dim, x.ndim)
    size = x.shape[at]
    first = start + size if start < 0 else start
    if not 0 <= first <= size - length or length < 0:
        raise IndexError(f"narrow: start {start} and length {length} leave dim {dim} of size {size}")
    return _INDEX["narrow"]((x,), _all_but(x, at, (first, first + length, 1)), out)  # type: ignore[no-any-return]


@export(torch.select, methods=["select"])
def select(x: ShardedTensor, dim: int, index: int, *, out: LayoutLike | None = None) -> ShardedTensor:
    """One entry of a dim, which is dropped."""
    at = one_dim(dim, x.ndim)
    return _INDEX["select"]((x,), _all_but(x, at, _position(index, x.shape[at], dim)), out)  # type: ignore[no-any-return]


def _position(index: int, size: int, dim: int) -> int:
    if not -size <= index < size:
        raise IndexError(f"index {index} is out of range for dim {dim} of size {size}")
    return index % size


def getitem(x: ShardedTensor, index: Any) -> ShardedTensor:
    """`x[index]`: ints, slices, None, `...`, and one integer tensor.

    An int or a partial slice of a cut dim is a choice; an integer tensor looks a cut dim up (`ops/index.py`).

    Raises:
        LayoutError: kind "choice"; "meaningless" for a boolean tensor, whose result's shape depends on values.
        IndexError: out of range, too many indices.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.ones(4, 6, 8), sw.make_mesh({"data": 2}), "b/data s d")
    >>> x[:, -1, None, ::2]
    f32[4/data 1 4] local[2 1 4] on mesh(data=2)
    """
    entries, tensor = normal_index(index, x.shape)
    if entries is not None:
        x = _INDEX["getitem"]((x,), (entries,))
    return x if tensor is None else _TAKE[0](x, *tensor)


install("__getitem__", getitem)
_TAKE: list[Callable[..., ShardedTensor]] = []  # looking up by a tensor; `ops/index.py` fills it on import


def normal_index(index: Any, shape: Sequence[int]) -> tuple[tuple[Entry, ...] | None, tuple[Any, int] | None]:
    """An index as one entry per dim, and the tensor in it with the dim of the result that it looks up.

    The entries are None where they would change nothing but for the tensor.
    """
    items = list(index) if isinstance(index, tuple) else [index]
    items = [torch.as_tensor(i) if isinstance(i, list | range | np.ndarray) else i for i in items]
    used = sum(_takes(i) for i in items)
    if used > len(shape):
        raise IndexError(f"too many indices for a tensor with {len(shape)} dims")
    dots = [k for k, i in enumerate(items) if i is Ellipsis]
    if len(dots) > 1:
        raise IndexError("an index can have one '...' only")
    at = dots[0] if dots else len(items)
    items[at : at + len(dots)] = [slice(None)] * (len(shape) - used)
    entries: list[Entry] = []
    found: tuple[Any, int] | None = None
    dim = place = 0
    for item in items:
        if item is None:
            entries.append(None)
            place += 1
            continue
        size = shape[dim]
        if isinstance(item, slice):
            if item.step is not None and item.step <= 0:
                raise ValueError("step must be greater than zero; use flip")
            start, stop, step = item.indices(size)
            entries.append((start, max(start, stop), step))
            place += 1
        elif isinstance(item, ShardedTensor | Tensor):
            if item.dtype == torch.bool:
                _refuse_mask(item)
            if found is not None:
                raise LayoutError(
                    "[]: an index with two tensors has no rule; use gather, or flatten the dims and index once",
                    kind="no rule",
                    op="getitem",
                    source=user_line(),
                )
            found = item, place
            entries.append((0, size, 1))
            place += 1
        elif isinstance(item, bool) or not hasattr(item, "__index__"):
            raise TypeError(f"cannot index a ShardedTensor with {item!r}")
        else:
            entries.append(_position(item.__index__(), size, dim))
        dim += 1
    is_whole = found is not None and entries == [(0, n, 1) for n in shape]
    return None if is_whole else tuple(entries), found


def _takes(item: Any) -> int:
    """How many dims an item of an index speaks of."""
    if item is None or item is Ellipsis:
        return 0
    is_mask = isinstance(item, ShardedTensor | Tensor) and item.dtype == torch.bool
    return item.ndim if is_mask else 1


def _refuse_mask(mask: Any) -> None:
    raise LayoutError(
        word(
            "the shape of the result would depend on the mask's values\n"
            "keep the shape: ops.where(mask, x, 0), and count with mask.sum()",
            op="masked_select",
            source=user_line(),
            operands=[("mask", str(mask) if isinstance(mask, ShardedTensor) else f"bool{list(mask.shape)}")],
        ),
        op="masked_select",
        source=user_line(),
    )
