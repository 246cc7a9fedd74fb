"""Many tensors scattered or gathered by few collectives: laid end to end, moved, laid out again.

A tensor takes part where its move is one reduce_scatter or one all_gather along one dim; others go
by their own route. A bucket is [devices, values]: row r holds what device r gets or gives of every
tensor in it. Packing and unpacking is one `torch._foreach_copy_` each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..layouts.convert import convert
from ..layouts.layout import Layout, make
from ..layouts.reshard import reshard_one
from ..layouts.sharded import ShardedTensor, make_type
from ..meshlib.mesh import Mesh

SIZE = 64 * 2**20  # bytes of a bucket's whole side; a tensor as large as that goes alone


@dataclass(frozen=True)
class Cut:
    """How a whole tensor's local shape falls into blocks: `n` along `dim`, over `axes`."""

    axes: tuple[str, ...]
    dim: int
    n: int

    def blocks(self, whole: Tensor) -> Tensor:
        """A view [..., dim, ...] -> [..., n, dim / n, ...]."""
        return whole.unflatten(self.dim, (self.n, -1))

    def rows(self, bucket: Tensor, shape: Sequence[int]) -> Tensor:
        """A bucket's columns [n, values] seen as the blocks of a tensor of this local shape."""
        block = [*shape]
        block[self.dim] //= self.n
        return bucket.unflatten(1, block).movedim(0, self.dim)


def find_cut(whole: Layout, cut: Layout, mesh: Mesh) -> Cut | None:
    """The cut between two layouts, None where they differ by more than one dim's last axes."""
    changed = [a for a in mesh.axes if whole.state(a) != cut.state(a)]
    dims = {cut.state(a) for a in changed}
    dim = next(iter(dims), None)
    if len(dims) != 1 or not isinstance(dim, int) or len({whole.state(a) for a in changed}) != 1:
        return None
    axes = cut.dims[dim][len(whole.dims[dim]) :]
    is_behind = whole.dims[dim] == cut.dims[dim][: len(whole.dims[dim])]
    if not is_behind or set(axes) != set(changed) or whole.memory != cut.memory:
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
    ways = [find_cut(x.layout, t, x.mesh) for x, t in zip(xs, to, strict=True)]
    ways = [
        None if way is None or x.layout.state(way.axes[0]) != "unreduced" else way
        for x, way in zip(xs, ways, strict=True)
    ]
    out = list(xs)
    for members in _buckets(xs, ways, 1):
        way = _way(ways[members[0]])
        if len(members) == 1:
            out[members[0]] = reshard_one(xs[members[0]], to[members[0]])
            continue
        sizes = [xs[i].local_shape.numel() // way.n for i in members]
        shards = []
        for k in range(len(xs[members[0]]._shards)):
            flat = xs[members[0]]._shards[k].new_empty((way.n, sum(sizes)))
            columns = zip(members, flat.split(sizes, 1), strict=True)
            into = [_way(ways[i]).rows(part, xs[i].local_shape) for i, part in columns]
            torch._foreach_copy_(into, [_way(ways[i]).blocks(xs[i]._shards[k]) for i in members])
            shards.append(flat)
        done = convert(_joined(shards, xs[members[0]], way, "unreduced"), way.axes, 0)
        kinds = [xs[i]._type.with_layout(to[i], False) for i in members]
        made = []
        for shard in done._shards:
            blocks = [shard.new_empty(kind.local_shape) for kind in kinds]
            torch._foreach_copy_([b.view(-1) for b in blocks], shard.view(-1).split(sizes))
            made.append(blocks)
        for i, kind, column in zip(members, kinds, zip(*made, strict=True), strict=True):
            out[i] = ShardedTensor(column, kind)
    return [
        x if way is not None or x.layout is t else reshard_one(x, t)
        for x, t, way in zip(out, to, ways, strict=True)
    ]


def all_gathered(
    xs: Sequence[ShardedTensor],
    to: Sequence[Layout],
    into: Sequence[ShardedTensor | None] | None = None,
) -> list[ShardedTensor]:
    """Tensors gathered into these layouts.

    Args:
        xs: tensors, cut.
        to: their layouts after.
        into: per tensor, one of that layout whose buffers take the result; None for new ones.

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
    ways = [find_cut(t, x.layout, x.mesh) for x, t in zip(xs, to, strict=True)]
    targets = [None] * len(xs) if into is None else into
    out = list(xs)
    for members in _buckets(xs, ways, None):
        way = _way(ways[members[0]])
        sizes = [xs[i].local_shape.numel() for i in members]
        shards = []
        for k in range(len(xs[members[0]]._shards)):
            flat = xs[members[0]]._shards[k].new_empty((1, sum(sizes)))
            columns = zip(members, flat.view(-1).split(sizes), strict=True)
            torch._foreach_copy_(
                [part.view(xs[i].local_shape) for i, part in columns],
                [xs[i]._shards[k] for i in members],
            )
            shards.append(flat)
        done = convert(_joined(shards, xs[members[0]], way, "cut"), way.axes, "replicated")
        kinds = [xs[i]._type.with_layout(to[i], False) for i in members]
        made: list[list[Tensor]] = [[] for _ in members]
        seen: dict[int, list[Tensor]] = {}
        for k, flat in enumerate(done._shards):
            again = None if flat.is_meta else seen.get(flat.data_ptr())
            wholes = []
            for n, i in enumerate(members):
                target = targets[i]
                if target is not None:
                    wholes.append(target._shards[k])
                elif again is not None:
                    wholes.append(again[n])
                else:
                    wholes.append(flat.new_empty(kinds[n].local_shape))
            fresh = [n for n, i in enumerate(members) if again is None or targets[i] is not None]
            columns = flat.split(sizes, 1)
            if fresh:
                torch._foreach_copy_(
                    [_way(ways[members[n]]).blocks(wholes[n]) for n in fresh],
                    [_way(ways[members[n]]).rows(columns[n], kinds[n].local_shape) for n in fresh],
                )
            if not flat.is_meta:
                seen.setdefault(flat.data_ptr(), wholes)
            for whole, column in zip(wholes, made, strict=True):
                column.append(whole)
        for i, kind, column in zip(members, kinds, made, strict=True):
            out[i] = ShardedTensor(tuple(column), kind)
    return [x if x.layout is t else reshard_one(x, t) for x, t in zip(out, to, strict=True)]


def copies(xs: Sequence[ShardedTensor]) -> list[ShardedTensor]:
    """The same tensors, each shard in memory of its own; one launch for all of them."""
    made = [[s.new_empty(s.shape) for s in x._shards] for x in xs]
    if made:
        torch._foreach_copy_([s for each in made for s in each], [s for x in xs for s in x._shards])
    return [ShardedTensor(tuple(each), x._type) for each, x in zip(made, xs, strict=True)]


def _way(way: Cut | None) -> Cut:
    assert way is not None
    return way


def _buckets(
    xs: Sequence[ShardedTensor], ways: Sequence[Cut | None], scale: int | None
) -> Iterator[list[int]]:
    """Indices of tensors that move together.

    `scale` times the local bytes, or the group's size times them, is a tensor's whole side.
    """
    open_: dict[Any, tuple[list[int], int]] = {}
    for i, (x, way) in enumerate(zip(xs, ways, strict=True)):
        if way is None:
            continue
        key = (x.mesh, way.axes, x.dtype, x._shards[0].device)
        size = x.local_shape.numel() * x.dtype.itemsize * (scale or way.n)
        members, filled = open_.get(key, ([], 0))
        if members and filled + size > SIZE:
            yield members
            members, filled = [], 0
        open_[key] = ([*members, i], filled + size)
    for members, _ in open_.values():
        yield members


def _joined(
    shards: Sequence[Tensor], like: ShardedTensor, way: Cut, state: Literal["unreduced", "cut"]
) -> ShardedTensor:
    """A bucket as a typed tensor [devices, values]; the other axes are taken to cut the values."""
    mesh = like.mesh
    others = tuple(a for a in mesh.axes if a not in way.axes)
    layout = (
        make(((), others), frozenset(way.axes))
        if state == "unreduced"
        else make((way.axes, others))
    )
    shape = (way.n, shards[0].shape[1] * mesh.group_size(others))
    return ShardedTensor(tuple(shards), make_type(mesh, layout, shape, like.dtype, False))
