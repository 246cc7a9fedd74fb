"""Parts of a tensor by position: narrow, select and `[]`.

All are linear. A dim of which a part is taken is needed whole: where an axis cuts it, that is a
choice. All other dims, and a part that is the whole dim, stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

Entry = None | int | tuple[int, int, int]  # a new dim, one index, (start, stop, step)


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
    return view_rule(shapes[0], tuple(ins), tuple(out), blocked=blocked, sizes=new)


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
def narrow(
    x: ShardedTensor, dim: int, start: int, length: int, *, out: LayoutLike | None = None
) -> ShardedTensor:
    """`length` entries of a dim from `start` on."""
    at = one_dim(dim, x.ndim)
    size = x.shape[at]
    first = start + size if start < 0 else start
    if not 0 <= first <= size - length or length < 0:
        raise IndexError(
            f"narrow: start {start} and length {length} leave dim {dim} of size {size}"
        )
    return _INDEX["narrow"]((x,), _all_but(x, at, (first, first + length, 1)), out)


@export(torch.select, methods=["select"])
def select(
    x: ShardedTensor, dim: int, index: int, *, out: LayoutLike | None = None
) -> ShardedTensor:
    """One entry of a dim, which is dropped."""
    at = one_dim(dim, x.ndim)
    return _INDEX["select"]((x,), _all_but(x, at, _position(index, x.shape[at], dim)), out)


def _position(index: int, size: int, dim: int) -> int:
    if not -size <= index < size:
        raise IndexError(f"index {index} is out of range for dim {dim} of size {size}")
    return index % size


def getitem(x: ShardedTensor, index: Any) -> ShardedTensor:
    """`x[index]`: ints, slices, None, `...`, and one integer tensor.

    An int or a partial slice of a cut dim is a choice; an integer tensor looks a cut dim up
    (`ops/index.py`).

    Raises:
        LayoutError: kind "choice"; "meaningless" for a boolean tensor, whose result's shape
            depends on values.
        IndexError: out of range, too many indices.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.ones(4, 6, 8), sw.make_mesh({"data": 2}), "b/data s d")
    >>> x[:, -1, None, ::2]
    f32[4/data 1 4] local[2 1 4] on mesh(data=2)
    """
    entries, tensor = normal_index(index, x.shape)
    if entries is not None:
        x = _INDEX["getitem"]((x,), (entries,))
    return x if tensor is None else LOOKUP[0](x, *tensor)


install("__getitem__", getitem)
LOOKUP: list[
    Callable[..., ShardedTensor]
] = []  # looking up by a tensor; `ops/index.py` fills it on import


def normal_index(
    index: Any, shape: Sequence[int]
) -> tuple[tuple[Entry, ...] | None, tuple[Any, int] | None]:
    """An index as one entry per dim, and the tensor in it with the dim that it looks up.

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
                    "[]: two tensors in an index have no rule; use gather, or flatten and index",
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
            operands=[
                (
                    "mask",
                    str(mask) if isinstance(mask, ShardedTensor) else f"bool{list(mask.shape)}",
                )
            ],
        ),
        op="masked_select",
        source=user_line(),
    )
