"""ShardedTensors and DTensors: layouts to placements and back. Nothing is sent.

    ours                                torch's
    dim d cut by an axis                Shard(d) on its mesh dim
    d cut by several, in mesh order     Shard(d) on each: torch applies mesh dims left to right
    d cut by several, other order       _StridedShard(d, split_factor) where an axis comes later
                                        in our order than one that stands to its right in the mesh
    {U:axis}                            Partial("sum")
    replicated, {R:axis}                Replicate(); torch has no word for the second

A split factor is the product of the sizes of those axes to the right. It is how FSDP over tensor
parallelism is written there: `ffn/tensor/data` on a mesh (data, tensor).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import optree
import torch

from ..layouts.layout import Layout, make
from ..layouts.sharded import ShardedTensor, make_type
from ..meshlib.errors import LayoutError, MeshError
from ..meshlib.mesh import Mesh
from .meshes import from_device_mesh, to_device_mesh

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def to_dtensor(tree: Any, *, copy: bool = True) -> Any:
    """DTensors of the ShardedTensors of a tree; other leaves stay as they are.

    With `copy=False` they share memory, which saves a copy where they are only read: saving with
    torch's checkpoints. Tensors here are never written in place, so let nothing write into those.

    Args:
        tree: any tree, on distributed meshes.
        copy: whether the DTensors get memory of their own.

    Returns:
        The same tree. Global shape, dtype and values are the same; a reduced axis is replicated.

    Raises:
        MeshError: a simulated or abstract mesh.
        LayoutError: a tensor in host or disk memory, one that needs a gradient, or one that lives
            on some coordinates of its mesh only.
    """
    return optree.tree_map(
        lambda x: _to(x, copy) if isinstance(x, ShardedTensor) else x, tree, none_is_leaf=True
    )


def from_dtensor(tree: Any, *, mesh: Mesh | None = None, copy: bool = True) -> Any:
    """ShardedTensors of the DTensors of a tree; other leaves stay as they are.

    Args:
        tree: any tree; parameters of modules come without their graph.
        mesh: what their device meshes mean, which need no names then; None takes their own names.
        copy: whether they get memory of their own. With False nobody may write into the DTensors
            any more.

    Returns:
        The same tree. The mesh of each is `from_device_mesh` of its own, so slices become
        sub-meshes.

    Raises:
        LayoutError: blocks of unequal size, a sum that is not one (`avg`, `max`), an order of
            shards that is none of axes.
        MeshError: a device mesh without names; or one that is not over the devices of `mesh`.
    """
    from torch.distributed.tensor import DTensor

    return optree.tree_map(
        lambda x: _from(x, mesh, copy) if isinstance(x, DTensor) else x, tree, none_is_leaf=True
    )


def _to(x: ShardedTensor, copy: bool) -> DTensor:
    from torch.distributed.tensor import DTensor

    layout, mesh = x.layout, x.mesh
    if mesh.transport != "distributed":
        raise MeshError(
            f"to_dtensor: {x!r} is {mesh.transport}, and a DTensor has one device per process; "
            f"start the program with torchrun --nproc-per-node {mesh.size}, or give torch the "
            "global value: x.full_tensor()"
        )
    if x.requires_grad:
        raise LayoutError(f"to_dtensor: {x!r} needs a gradient, which ends here; say x.detach()")
    if layout.memory != "device":
        raise LayoutError(
            f"to_dtensor: {x} is not in device memory; bring it there first: "
            'sw.reshard(x, "... @device")'
        )
    if layout.at or layout.varying:
        raise LayoutError(f"to_dtensor: {x!r} is on some devices only; torch has no such tensor")
    if mesh.is_outside:
        local = torch.empty(0, dtype=x.dtype, device=mesh.device)
    else:
        local = x.to_local().detach()
        local = local.clone(memory_format=torch.contiguous_format) if copy else local.contiguous()
    return DTensor.from_local(
        local,
        to_device_mesh(mesh),
        placements(layout, mesh.axes),
        run_check=False,
        shape=x.shape,
        stride=_strides(x.shape),
    )


def _from(x: DTensor, mesh: Mesh | None, copy: bool) -> ShardedTensor:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    dm = x.device_mesh
    if mesh is None:
        mesh = from_device_mesh(dm)
    elif tuple(mesh.axes.values()) != tuple(dm.mesh.shape) or mesh.ranks != tuple(
        dm.mesh.flatten().tolist()
    ):
        raise MeshError(f"from_dtensor: {dm} is not over the devices of {mesh}, {mesh.ranks}")
    layout = read_placements(x.placements, x.shape, mesh)
    kind = make_type(mesh, layout, x.shape, x.dtype)
    if mesh.is_outside:
        block = torch.empty(kind.local_shape, dtype=x.dtype, device="meta")
    else:
        block = x.to_local().detach()
        if isinstance(block, AsyncCollectiveTensor):  # still on its way
            block = block.wait()
        block = block.clone(memory_format=torch.contiguous_format) if copy else block
    return ShardedTensor((block,), kind)


def placements(layout: Layout, sizes: Mapping[str, int]) -> list[Any]:
    """One torch placement per axis of a mesh with these sizes.

    >>> import shardwise as sw
    >>> placements(sw.Layout("ffn/tensor/data embed {U:pipe}"), {"data": 2, "tensor": 4, "pipe": 2})
    [_StridedShard(dim=0, sf=4), Shard(dim=0), Partial(sum)]
    """
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    order = list(sizes)
    found: list[Any] = []
    for number, axis in enumerate(order):
        state = layout.state(axis)
        if not isinstance(state, int):
            found.append(Partial("sum") if state == "unreduced" else Replicate())
            continue
        axes = layout.dims[state]
        before = axes[: axes.index(axis)]
        factor = math.prod(sizes[a] for a in before if order.index(a) > number)
        found.append(_StridedShard(state, split_factor=factor) if factor > 1 else Shard(state))
    return found


def read_placements(given: Sequence[Any], shape: Sequence[int], mesh: Mesh) -> Layout:
    """The layout that placements mean.

    >>> import shardwise as sw
    >>> from torch.distributed.tensor import Partial, Shard
    >>> mesh = sw.make_mesh({"data": 2, "tensor": 2})
    >>> read_placements([Shard(1), Partial()], (4, 8), mesh)
    Layout('_ _/data {U:tensor}')
    """
    from torch.distributed.tensor import Partial
    from torch.distributed.tensor.placement_types import Shard, _StridedShard

    cut: dict[int, dict[str, int]] = {}
    owed: list[str] = []
    for axis, one in zip(mesh.axes, given, strict=True):
        if type(one) is Shard:
            cut.setdefault(one.dim % len(shape), {})[axis] = 1
        elif type(one) is _StridedShard:
            cut.setdefault(one.dim % len(shape), {})[axis] = int(one.split_factor)
        elif type(one) is Partial and one.reduce_op == "sum":
            owed.append(axis)
        elif not one.is_replicate():
            raise LayoutError(
                f"from_dtensor: {one} on axis {axis!r} has no counterpart: only a sum can be owed; "
                "redistribute it to Replicate() first"
            )
    dims = tuple(_order(cut.get(dim, {}), mesh, given) for dim in range(len(shape)))
    layout = make(dims, frozenset(owed))
    layout.check(shape, mesh, "from_dtensor: blocks here are of one size")
    return layout


def _order(factors: Mapping[str, int], mesh: Mesh, given: Sequence[Any]) -> tuple[str, ...]:
    """Axes of one dim, major to minor, from the split factor of each.

    Read from the right of the mesh, an axis goes behind as many of those already placed as its
    factor says, counted from the major end: the sizes of the ones before it multiply to the factor.
    """
    placed: list[str] = []
    for axis in reversed([a for a in mesh.axes if a in factors]):
        where, before = 0, 1
        while before < factors[axis] and where < len(placed):
            before *= mesh.axes[placed[where]]
            where += 1
        if before != factors[axis]:
            raise LayoutError(
                f"from_dtensor: placements {tuple(given)} on {mesh} are no order of axes; "
                "redistribute it first"
            )
        placed.insert(where, axis)
    return tuple(placed)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides)) if shape else ()
