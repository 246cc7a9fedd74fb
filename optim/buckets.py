"""Many tensors scattered or gathered by few collectives: laid end to end, moved, laid out again.

A tensor takes part where its move is one reduce_scatter or one all_gather along one dim; others go
by their own route. A bucket is [devices, values]: row r holds what device r gets or gives of every
tensor in it. Packing and unpacking is one `torch._foreach_copy_` each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..layouts.convert import convert
from ..layouts.layout import Layout, make
from ..layouts.reshard import reshard_one
from ..layouts.sharded import ShardedTensor, Type, make_type
from ..meshlib.mesh import Mesh

SIZE = 64 * 2**20  # bytes of a bucket's whole side; a tensor as large as that goes alone
_copy: Any = torch._foreach_copy_  # pyright: ignore


@dataclass(frozen=True)
class Cut:
    """How a whole tensor's local shape falls into blocks: `n` along `dim`, over `axes`."""

    axes: tuple[str, ...]
    dim: int
    n: int

    def block(self, whole: Tensor, place: int) -> Tensor:
        """The block of the device at this place, a view."""
        size = whole.shape[self.dim] // self.n
        return whole.narrow(self.dim, place * size, size)

    def blocks(self, whole: Tensor) -> Tensor:
        """A view [..., dim, ...] -> [..., n, dim / n, ...]."""
        shape, d = whole.shape, self.dim
        return whole.view(*shape[:d], self.n, shape[d] // self.n, *shape[d + 1 :])

    def rows(self, bucket: Tensor, shape: Sequence[int]) -> Tensor:
        """A bucket's columns [n, values] seen as the blocks of a tensor of this local shape."""
        d = self.dim
        view = bucket.view(self.n, *shape[:d], shape[d] // self.n, *shape[d + 1 :])
        return view if d == 0 else view.movedim(0, d)


@lru_cache(maxsize=65536)
def find_cut(whole: Layout, cut: Layout, mesh: Mesh, state: str) -> Cut | None:
    """The cut between two layouts: the last axes of one dim, whole in `state`.

    None where the layouts differ in any other way.
    """
    changed = [a for a in mesh.axes if whole.state(a) != cut.state(a)]
    dims = {cut.state(a) for a in changed}
    dim = next(iter(dims), None)
    if len(dims) != 1 or not isinstance(dim, int) or {whole.state(a) for a in changed} != {state}:
        return None
    kept = len(whole.dims[dim])
    axes = cut.dims[dim][kept:]
    if whole.dims[dim] != cut.dims[dim][:kept] or set(axes) != set(changed):
        return None
    if whole.memory != "device" or cut.memory != "device":
        return None
    return Cut(axes, dim, mesh.group_size(axes))


def reduce_scattered(xs: Sequence[ShardedTensor], to: Sequence[Layout]) -> list[ShardedTensor]:
    """Tensors of which sums are owed, scattered into these layouts.

    Cost: a reduce_scatter per mesh, dtype, set of axes and `SIZE` bytes. Each result has memory of
    its own.

    >>> import shardwise as sw
    >>> mesh = sw.make_mesh({"data": 2})
    >>> owed = [sw.full((n,), 1.0, mesh, "n {U:data}") for n in (2, 4)]
    >>> with sw.record() as plan:
    ...     print(*reduce_scattered(owed, [sw.Layout("n/data")] * 2))
    f32[2/data] f32[4/data]
    >>> plan.count(), plan.elements()
    (1, 3)
    """
    ways = [find_cut(x.layout, t, x.mesh, "unreduced") for x, t in zip(xs, to, strict=True)]
    out = list(xs)
    for members in _buckets(xs, [w and (w.axes, 1) for w in ways]):
        kinds = [xs[i]._type.with_layout(to[i], False) for i in members]
        done = _scattered([xs[i] for i in members], kinds, [_some(ways[i]) for i in members])
        for i, x in zip(members, done, strict=True):
            out[i] = x
    return [x if x.layout is t else reshard_one(x, t) for x, t in zip(out, to, strict=True)]


def all_gathered(
    xs: Sequence[ShardedTensor],
    to: Sequence[Layout],
    into: Sequence[ShardedTensor | None] | None = None,
) -> list[ShardedTensor]:
    """Tensors gathered into these layouts.

    Args:
        xs: tensors, cut.
        to: their layouts after.
        into: per tensor, one of that layout and dtype whose buffers take the result; None for new
            ones.

    Cost: an all_gather per mesh, dtype, set of axes and `SIZE` bytes.

    >>> import shardwise as sw
    >>> mesh = sw.make_mesh({"data": 2})
    >>> parts = [sw.full((n,), 1.0, mesh, "n/data") for n in (2, 4)]
    >>> with sw.record() as plan:
    ...     print(*all_gathered(parts, [sw.Layout("n")] * 2))
    f32[2] f32[4]
    >>> plan.count(), plan.elements()
    (1, 3)
    """
    ways = [find_cut(t, x.layout, x.mesh, "replicated") for x, t in zip(xs, to, strict=True)]
    targets = list(into) if into is not None else [None] * len(xs)
    out = list(xs)
    for members in _buckets(xs, [w and (w.axes, w.n) for w in ways]):
        kinds = [xs[i]._type.with_layout(to[i], False) for i in members]
        some = [xs[i] for i in members]
        done = _gathered(
            some, kinds, [_some(ways[i]) for i in members], [targets[i] for i in members]
        )
        for i, x in zip(members, done, strict=True):
            out[i], targets[i] = x, None
    for i, (x, t) in enumerate(zip(out, to, strict=True)):
        if x.layout is t:
            continue
        out[i], target = reshard_one(x, t), targets[i]
        if target is not None:
            _copy(target._shards, out[i]._shards)
            out[i] = ShardedTensor(target._shards, out[i]._type)
    return out


def copies(xs: Sequence[ShardedTensor]) -> list[ShardedTensor]:
    """The same tensors, each shard in memory of its own; one launch for all of them."""
    made = [[s.new_empty(s.shape) for s in x._shards] for x in xs]
    if made:
        _copy([s for each in made for s in each], [s for x in xs for s in x._shards])
    return [ShardedTensor(tuple(each), x._type) for each, x in zip(made, xs, strict=True)]


def _scattered(
    xs: Sequence[ShardedTensor], kinds: Sequence[Type], ways: Sequence[Cut]
) -> list[ShardedTensor]:
    """One bucket, reduce_scattered into these types."""
    sizes = [kind.local_shape.numel() for kind in kinds]
    packed = []
    for shards in zip(*(x._shards for x in xs), strict=True):
        bucket = shards[0].new_empty((ways[0].n, sum(sizes)))
        _copy(
            _views(bucket, sizes, xs, ways),
            [w.blocks(s) for w, s in zip(ways, shards, strict=True)],
        )
        packed.append(bucket)
    done = convert(_typed(packed, xs[0], ways[0], is_cut=False), ways[0].axes, 0)
    made = []
    for bucket in done._shards:
        parts = [bucket.new_empty(kind.local_shape) for kind in kinds]
        _copy([part.view(-1) for part in parts], bucket.view(-1).split(sizes))
        made.append(parts)
    return [
        ShardedTensor(each, kind) for each, kind in zip(zip(*made, strict=True), kinds, strict=True)
    ]


def _gathered(
    xs: Sequence[ShardedTensor],
    kinds: Sequence[Type],
    ways: Sequence[Cut],
    targets: Sequence[ShardedTensor | None],
) -> list[ShardedTensor]:
    """One bucket, all_gathered into these types; devices that share a bucket share the results."""
    sizes = [x.local_shape.numel() for x in xs]
    packed = []
    for shards in zip(*(x._shards for x in xs), strict=True):
        bucket = shards[0].new_empty((1, sum(sizes)))
        parts = zip(bucket.view(-1).split(sizes), xs, strict=True)
        _copy([part.view(x.local_shape) for part, x in parts], shards)
        packed.append(bucket)
    done = convert(_typed(packed, xs[0], ways[0], is_cut=True), ways[0].axes, "replicated")
    made: list[list[Tensor]] = []
    known: dict[int, list[Tensor]] = {}
    for k, bucket in enumerate(done._shards):
        memory = bucket.untyped_storage()._cdata  # a traced tensor has no address
        shared = None if bucket.is_meta else known.get(memory)
        wholes, fresh = [], []
        for n, (kind, target) in enumerate(zip(kinds, targets, strict=True)):
            if target is None and shared is not None:
                wholes.append(shared[n])
                continue
            wholes.append(
                bucket.new_empty(kind.local_shape) if target is None else target._shards[k]
            )
            fresh.append(n)
        columns = _views(bucket, sizes, [kind for kind in kinds], ways)
        if fresh:
            _copy([ways[n].blocks(wholes[n]) for n in fresh], [columns[n] for n in fresh])
        if shared is None and not bucket.is_meta:
            known[memory] = wholes
        made.append(wholes)
    return [
        ShardedTensor(each, kind) for each, kind in zip(zip(*made, strict=True), kinds, strict=True)
    ]


def _views(
    bucket: Tensor, sizes: Sequence[int], likes: Sequence[Any], ways: Sequence[Cut]
) -> list[Tensor]:
    """The columns of a bucket, each seen as the blocks of its tensor."""
    columns = zip(bucket.split(sizes, 1), likes, ways, strict=True)
    return [way.rows(column, like.local_shape) for column, like, way in columns]


def _some(way: Cut | None) -> Cut:
    assert way is not None
    return way


def _buckets(
    xs: Sequence[ShardedTensor], moves: Sequence[tuple[tuple[str, ...], int] | None]
) -> list[list[int]]:
    """Indices of tensors that move together: two or more, of at most `SIZE` bytes.

    `moves` gives the axes, and how often the local bytes go into a bucket's whole side.
    """
    open_: dict[Any, tuple[list[int], int]] = {}
    full: list[list[int]] = []
    for i, (x, move) in enumerate(zip(xs, moves, strict=True)):
        if move is None:
            continue
        axes, times = move
        key = (x.mesh, axes, x.dtype, x._shards[0].device)
        size = x.local_shape.numel() * x.dtype.itemsize * times
        if size >= SIZE:
            continue
        members, filled = open_.get(key, ([], 0))
        if filled + size > SIZE:
            full.append(members)
            members, filled = [], 0
        open_[key] = ([*members, i], filled + size)
    return [some for some in (*full, *(m for m, _ in open_.values())) if len(some) > 1]


def _typed(
    shards: Sequence[Tensor], like: ShardedTensor, way: Cut, *, is_cut: bool
) -> ShardedTensor:
    """A bucket as a tensor [devices, values]; the other axes are taken to cut the values."""
    mesh = like.mesh
    others = tuple(a for a in mesh.axes if a not in way.axes)
    layout = make((way.axes, others)) if is_cut else make(((), others), frozenset(way.axes))
    shape = (way.n, shards[0].shape[1] * mesh.group_size(others))
    return ShardedTensor(tuple(shards), make_type(mesh, layout, shape, like.dtype, False))
