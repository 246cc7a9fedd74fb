"""Sums over whole tensors, many at once: one collective for all that are owed over the same axes.

An optimizer that reads norms would owe one scalar per tensor. Here the local partial sums are laid
end to end, reduced together, and cut apart again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layouts import tree
from ..layouts.convert import convert
from ..layouts.layout import make
from ..layouts.sharded import ShardedTensor, make_type
from ..meshlib.errors import LayoutError
from ..meshlib.mesh import Mesh
from .base import home
from .many import norms


def reduced_together(owed: Sequence[ShardedTensor]) -> list[ShardedTensor]:
    """Tensors with the sums taken that they owe.

    Cost: one all_reduce per mesh, dtype and set of axes, of all their elements together.

    >>> import shardwise as sw
    >>> mesh = sw.make_mesh({"data": 2})
    >>> with sw.record() as plan:
    ...     a, b = reduced_together([sw.full((n,), 1.0, mesh, "n {U:data}") for n in (2, 3)])
    >>> plan.count(), a.full_tensor()
    (1, tensor([1., 1.]))
    """
    out = list(owed)
    groups: dict[Any, list[int]] = {}
    for i, x in enumerate(owed):
        if x.layout.unreduced:
            held = frozenset(a for axes in x.layout.dims for a in axes)
            groups.setdefault((x.mesh, x.layout.unreduced, x.dtype, held), []).append(i)
    for (mesh, axes, dtype, cut_axes), members in groups.items():
        cut = tuple(a for a in mesh.axes if a in cut_axes)
        flat = [
            torch.cat([owed[i]._shards[k].reshape(-1) for i in members])
            for k in range(len(mesh.held))
        ]
        layout = make((cut,), axes)
        size = flat[0].numel() * mesh.group_size(cut)
        joined = ShardedTensor(tuple(flat), make_type(mesh, layout, (size,), dtype, False))
        done = convert(joined, tuple(a for a in mesh.axes if a in axes), "replicated")
        sizes = [owed[i].local_shape.numel() for i in members]
        parts = [shard.split(sizes) for shard in done._shards]
        for n, i in enumerate(members):
            x = owed[i]
            old = x.layout
            kind = x._type.with_layout(
                make(old.dims, old.unreduced - axes, old.reduced, old.varying, old.memory, old.at),
                False,
            )
            shards = tuple(part[n].reshape(x.local_shape) for part in parts)
            out[i] = ShardedTensor(shards, kind)
    return out


def refuse_unreduced(grads: Any, what: str) -> None:
    """Raise for gradients of which a sum is owed: a norm of parts means nothing."""
    for path, g in tree.items(grads):
        if isinstance(g, ShardedTensor) and g.layout.unreduced:
            whole = " ".join("/".join(("_", *axes)) for axes in g.layout.dims)
            raise LayoutError(
                f"{what}: {path} is {g}, "
                f"still a sum over {sorted(g.layout.unreduced)}; "
                "a norm of parts means nothing\n"
                f'reduce it first: sw.reshard({path}, "{whole}")',
                kind="unreduced",
                op=what,
            )


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over values of `dtype` are taken: at least float32."""
    return dtype if dtype.itemsize >= 4 else torch.float32


def partial(x: ShardedTensor, dims: Sequence[int], f: Any = None) -> ShardedTensor:
    """Sums over dims, at least in float32; over those that are cut the sum stays owed.

    Args:
        x: replicated or cut.
        dims: non-negative.
        f: applied to each local tensor first, elementwise.
    """
    kind, gone = x._type, set(dims)
    old = kind.layout
    kept = [d for d in range(x.ndim) if d not in gone]
    shards = []
    for s in x._shards:
        s = s.to(wide(s.dtype))
        s = s if f is None else f(s)
        shards.append(s.sum(tuple(dims)) if gone else s)
    owes = frozenset(a for d in gone for a in old.dims[d])
    layout = make(tuple(old.dims[d] for d in kept), owes, old.reduced - owes, old.varying)
    shape = [kind.shape[d] for d in kept]
    return ShardedTensor(tuple(shards), make_type(kind.mesh, layout, shape, shards[0].dtype, False))


def squares(leaves: Sequence[ShardedTensor], stacked: Sequence[bool]) -> list[ShardedTensor]:
    """Sums of squares of whole tensors, or of each entry of dim 0; owed sums are taken.

    Args:
        leaves: replicated or cut.
        stacked: per leaf, whether dim 0 is a stack of tensors of their own.

    Returns:
        Scalars, or [stack] tensors, at least float32.

    Cost: one all_reduce per set of axes.
    """
    return reduced_together(
        [
            partial(x, range(int(is_stack), x.ndim), torch.square)
            for x, is_stack in zip(leaves, stacked, strict=True)
        ]
    )


def per_entry(factor: Tensor, x: Tensor) -> Tensor:
    """A scalar, or [stack], shaped to multiply `x` entry by entry of dim 0."""
    return factor.reshape(factor.shape + (1,) * (x.ndim - factor.ndim)) if factor.ndim else factor


def together(f: Any, like: ShardedTensor, *xs: ShardedTensor) -> ShardedTensor:
    """`f` on the local tensors of all operands, whose layouts fit; typed like `like`."""
    shards = tuple(f(*parts) for parts in zip(*(x._shards for x in xs), strict=True))
    kind = like._type
    return ShardedTensor(
        shards, make_type(kind.mesh, kind.layout, kind.shape, shards[0].dtype, False)
    )


def global_norm(grads: Any) -> ShardedTensor:
    """The 2-norm of all leaves together, replicated; leaves may live on several sub-meshes.

    Squares are summed in float32 or wider.

    Cost: one scalar all_reduce per mesh over the axes that cut any of its gradients; sub-meshes add
    one more, over all their devices.

    Raises:
        LayoutError: kind "unreduced": a norm of parts of a sum means nothing.

    >>> import shardwise as sw
    >>> mesh = sw.make_mesh({"data": 2})
    >>> tree = {"a": sw.full((9,), 1.0, mesh), "b": sw.full((16,), 1.0, mesh, "n/data")}
    >>> global_norm(tree).item()
    5.0
    """
    refuse_unreduced(grads, "global_norm")
    dtypes = [wide(g.dtype) for g in tree.leaves(grads) if isinstance(g, ShardedTensor)]
    if not dtypes:
        raise ValueError("global_norm: no gradients")
    dtype = max(dtypes, key=lambda d: d.itemsize)

    def squared(shards: list[Tensor]) -> Tensor:
        lengths = norms([s.to(wide(s.dtype)) for s in shards])
        stack = torch.stack([n.to(dtype) for n in lengths])
        return (stack * stack).sum()

    return torch.sqrt(counted(grads, squared, dtype))  # pyright: ignore


def counted(grads: Any, f: Callable[[list[Tensor]], Tensor], dtype: torch.dtype) -> ShardedTensor:
    """A sum over all elements of all leaves, each counted once: a replicated scalar.

    Args:
        grads: a tree of replicated and cut tensors, on one mesh or on several sub-meshes.
        f: local tensors of one device to their part of the sum.
        dtype: of the sum.

    Cost: one scalar all_reduce per mesh over the axes that cut any of its leaves; sub-meshes add
    one more, over all their devices.
    """
    by_mesh: dict[Mesh, list[ShardedTensor]] = {}
    for g in tree.leaves(grads):
        if isinstance(g, ShardedTensor):
            by_mesh.setdefault(g.mesh, []).append(g)
    with torch.no_grad():
        totals = [_total(some, f, dtype) for some in by_mesh.values()]
        return totals[0] if len(totals) == 1 else _over_meshes(totals, home(grads), dtype)


def _total(leaves: Sequence[ShardedTensor], f: Any, dtype: torch.dtype) -> ShardedTensor:
    """The sum on one mesh.

    Each leaf counts on one device of the axes that do not cut it, so that one all_reduce over the
    axes that cut any of them is right for all.
    """
    mesh = leaves[0].mesh
    cut = frozenset(a for g in leaves for axes in g.layout.dims for a in axes)
    axes = tuple(a for a in mesh.axes if a in cut)
    parts: list[list[Tensor]] = [[] for _ in mesh.held]
    for g in leaves:
        own = {a for names in g.layout.dims for a in names}
        repeated = mesh.positions(tuple(a for a in axes if a not in own))
        for into, shard, place in zip(parts, g._shards, repeated, strict=True):
            if place == 0 and shard.numel():
                into.append(shard)
    sums = tuple(f(some) if some else _zero(mesh, dtype) for some in parts)
    total = ShardedTensor(sums, make_type(mesh, make((), frozenset(axes)), (), dtype, False))
    return convert(total, axes, "replicated") if axes else total


def _zero(mesh: Mesh, dtype: torch.dtype) -> Tensor:
    return torch.zeros((), dtype=dtype, device=mesh.shard_device)


def _over_meshes(totals: Sequence[ShardedTensor], mesh: Mesh, dtype: torch.dtype) -> ShardedTensor:
    """The sum of scalars of several meshes, each counted by the first device of its mesh."""
    shards = []
    for place in range(len(mesh.held)):
        rank = _rank(mesh, place)
        value = _zero(mesh, dtype)
        for t in totals:
            if t.mesh.ranks[0] == rank:
                value = value + t._shards[0]
        shards.append(value)
    axes = tuple(mesh.axes)
    kind = make_type(mesh, make((), frozenset(axes)), (), dtype, False)
    return convert(ShardedTensor(tuple(shards), kind), axes, "replicated")


def _rank(mesh: Mesh, place: int) -> int:
    """The device number of the shard at a place of `mesh.held`."""
    return mesh.ranks[mesh.positions(tuple(mesh.axes))[place]]
