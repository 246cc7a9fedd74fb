"""The named collectives of `shard_map`: local values in, typed local values out.

What varies over an axis is read as blocks of a cut dim, or as parts of a sum, and then a row of the
conversion table moves it; so each has its dual as gradient.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ...layouts.convert import convert, relabelled
from ...layouts.layout import State, make, with_state
from ...layouts.permute import moved, permute_shards
from ...layouts.sharded import ShardedTensor, make_type
from ...meshlib import record
from ...meshlib.errors import LayoutError, word
from ...meshlib.source import user_line
from .. import einops
from .local import MESH
from .rooted import Kind, Rooted


def _state(x: Any, axis: str, op: str, allowed: tuple[str, ...]) -> None:
    """Raise unless `x` is in one of these states over the axis."""
    if not isinstance(x, ShardedTensor):
        raise TypeError(f"{op}: expected a ShardedTensor, got {type(x).__name__}")
    x.mesh.check_axes((axis,))
    state = x.layout.state(axis)
    if state in allowed:
        return
    what = f"cuts its dim {state}" if isinstance(state, int) else f"leaves it {state}"
    hint = (
        "use sw.reshard outside of shard_map"
        if isinstance(state, int)
        else "every device has the same value"
    )
    if state == "unreduced":
        hint = f"sum it with ops.all_reduce(x, {axis!r}) or ops.reduce_scatter"
    raise LayoutError(
        word(
            f"x must be {' or '.join(allowed)} over {axis!r}, but the axis {what}\n{hint}",
            op=op,
            source=user_line(),
            operands=[("x", str(x))],
        ),
        op=op,
        source=user_line(),
    )


def _dim(x: ShardedTensor, dim: int, op: str) -> int:
    if not -x.ndim <= dim < x.ndim:
        raise IndexError(f"{op}: dim {dim} is out of range for {x}")
    return dim % x.ndim


def _as_cut(x: ShardedTensor, axis: str, dim: int) -> ShardedTensor:
    """What varies over the axis, read as blocks along a dim."""
    old = x.layout
    dims = (*old.dims[:dim], (*old.dims[dim], axis), *old.dims[dim + 1 :])
    layout = make(dims, old.unreduced, old.reduced, old.varying - {axis}, old.memory, old.at)
    n = x.mesh.axes[axis]
    return relabelled(x, layout, (*x.shape[:dim], x.shape[dim] * n, *x.shape[dim + 1 :]))


def _as_varying(x: ShardedTensor, axis: str) -> ShardedTensor:
    """Blocks along a dim, read as each device's own value."""
    dim = x.layout.state(axis)
    assert isinstance(dim, int)
    old = x.layout
    dims = tuple(tuple(a for a in axes if a != axis) for axes in old.dims)
    layout = make(dims, old.unreduced, old.reduced, old.varying | {axis}, old.memory, old.at)
    return relabelled(
        x, layout, (*x.shape[:dim], x.shape[dim] // x.mesh.axes[axis], *x.shape[dim + 1 :])
    )


def all_gather(x: ShardedTensor, axis: str, dim: int) -> ShardedTensor:
    """The values of all devices of an axis, one after another along a dim. Inside `shard_map`.

    Args:
        x: varying over `axis`, which has n devices.
        axis: a mesh axis.
        dim: becomes n times as long.

    Returns:
        Reduced over `axis`: equal on its devices, its gradient still to be summed.

    Cost: (n-1)/n of the result's bytes per device. Gradient: reduce_scatter.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.arange(4.0), sw.make_mesh({"data": 2}), "n/data")
    >>> f = lambda x: sw.ops.all_gather(x, "data", 0)
    >>> sw.shard_map(f, in_layouts="n/data", out_layouts="n {R:data}")(x)
    f32[4]{R:data} local[4] on mesh(data=2)
    """
    _state(x, axis, "all_gather", ("varying",))
    with record.acting("all_gather", "shard_map"):
        return convert(_as_cut(x, axis, _dim(x, dim, "all_gather")), axis, "reduced")


def all_reduce(
    x: ShardedTensor, axis: str, op: Literal["sum", "max", "min"] = "sum"
) -> ShardedTensor:
    """The sum, maximum or minimum over the devices of an axis, replicated. Inside `shard_map`.

    Args:
        x: varying over `axis`; for a sum also unreduced. For "max" and "min" without gradient:
            `x.detach()`.
        axis: a mesh axis of n devices.
        op: what combines the values.

    Cost: 2(n-1)/n of the bytes of `x` per device. Gradient of a sum: nothing moves.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.arange(4.0), sw.make_mesh({"data": 2}), "n/data")
    >>> f = lambda x: sw.ops.all_reduce(x, "data", op="max")
    >>> sw.shard_map(f, in_layouts="n/data", out_layouts="n")(x).full_tensor()
    tensor([2., 3.])
    """
    if op not in ("sum", "max", "min"):
        raise ValueError(f"all_reduce: op must be 'sum', 'max' or 'min', got {op!r}")
    _state(x, axis, "all_reduce", ("varying", "unreduced") if op == "sum" else ("varying",))
    with record.acting("all_reduce", "shard_map"):
        if op == "sum":
            if x.layout.state(axis) == "varying":
                x = convert(x, axis, "unreduced")
            return convert(x, axis, "replicated")
        if x._type.grad and torch.is_grad_enabled():
            raise LayoutError(
                f"all_reduce: op={op!r} has no gradient; pass x.detach(), got {x}", op="all_reduce"
            )
        if record.LOGS:
            record.collective("all_reduce", x.mesh, (axis,), x._shards[0], record.context(), op)
        shards = x.mesh.comm.all_reduce(x._shards, (axis,), op)
    old = x.layout
    layout = make(old.dims, old.unreduced, old.reduced, old.varying - {axis}, old.memory, old.at)
    return ShardedTensor(tuple(shards), x._type.with_layout(layout, False))


def reduce_scatter(x: ShardedTensor, axis: str, dim: int) -> ShardedTensor:
    """Each device's own block, along a dim, of the sum over an axis. Inside `shard_map`.

    Args:
        x: varying or unreduced over `axis`, which has n devices.
        axis: a mesh axis.
        dim: becomes 1/n as long; n must divide it.

    Returns:
        Varying over `axis`.

    Cost: (n-1)/n of the bytes of `x` per device. Gradient: all_gather.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.arange(8.0), sw.make_mesh({"data": 2}), "n/data")
    >>> f = lambda x: sw.ops.reduce_scatter(x, "data", 0)
    >>> sw.shard_map(f, in_layouts="n/data", out_layouts="n/data")(x).full_tensor()
    tensor([ 4.,  6.,  8., 10.])
    """
    _state(x, axis, "reduce_scatter", ("varying", "unreduced"))
    with record.acting("reduce_scatter", "shard_map"):
        if x.layout.state(axis) == "varying":
            x = convert(x, axis, "unreduced")
        return _as_varying(convert(x, axis, _dim(x, dim, "reduce_scatter")), axis)


def all_to_all(x: ShardedTensor, axis: str, split_dim: int, concat_dim: int) -> ShardedTensor:
    """Cut along one dim, block j sent to device j, joined along another. Inside `shard_map`.

    Args:
        x: varying over `axis`, which has n devices.
        axis: a mesh axis.
        split_dim: becomes 1/n as long; n must divide it.
        concat_dim: another dim, becomes n times as long.

    Cost: (n-1)/n of the bytes of `x` per device. Gradient: all_to_all, the dims exchanged.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.arange(4.0).reshape(2, 2), sw.make_mesh({"data": 2}), "a/data b")
    >>> f = lambda x: sw.ops.all_to_all(x, "data", 1, 0)
    >>> sw.shard_map(f, in_layouts="a/data b", out_layouts="a b/data")(x)
    f32[2 2/data] local[2 1] on mesh(data=2)
    """
    _state(x, axis, "all_to_all", ("varying",))
    split, concat = _dim(x, split_dim, "all_to_all"), _dim(x, concat_dim, "all_to_all")
    if split == concat:
        raise ValueError(f"all_to_all: split_dim and concat_dim are the same dim, {split}")
    with record.acting("all_to_all", "shard_map"):
        return _as_varying(convert(_as_cut(x, axis, concat), axis, split), axis)


def permute(x: ShardedTensor, axis: Any, *pairs: Any, **keywords: Any) -> ShardedTensor:
    """Each device's value sent to another position of an axis. Inside `shard_map`.

    Zeros where none arrives.

    Args:
        x: varying over `axis`.
        axis: a mesh axis. A tuple of dims instead means `torch.permute`.
        *pairs: one sequence of (source, target) positions; each sends once and receives once at
            most.
        **keywords: `out` and `over` of `torch.permute`.

    Cost: the bytes of `x` per device. Gradient: the inverse pairs.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.arange(3.0), sw.make_mesh({"ring": 3}), "n/ring")
    >>> f = lambda x: sw.ops.permute(x, "ring", [(i, (i + 1) % 3) for i in range(3)])
    >>> sw.shard_map(f, in_layouts="n/ring", out_layouts="n/ring")(x).full_tensor()
    tensor([2., 0., 1.])
    """
    if not isinstance(axis, str):
        return x.permute(axis, *pairs, **keywords)
    if len(pairs) != 1 or keywords:
        raise TypeError("permute: along a mesh axis it takes x, axis, pairs")
    _state(x, axis, "permute", ("varying",))
    with record.acting("permute", "shard_map"):
        return permute_shards(x, axis, pairs[0])


def broadcast(x: ShardedTensor, axis: str, root: int) -> ShardedTensor:
    """The value of the device at position `root` of an axis, on all. Inside `shard_map`.

    Args:
        x: varying over `axis`, which has n devices.
        axis: a mesh axis.
        root: a position on it.

    Returns:
        Reduced over `axis`: equal on its devices, its gradient still to be summed.

    Cost: n-1 of the n devices move the bytes of `x`. Gradient: `reduce` to the root.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.arange(4.0), sw.make_mesh({"data": 2}), "n/data")
    >>> f = lambda x: sw.ops.broadcast(x, "data", 1)
    >>> sw.shard_map(f, in_layouts="n/data", out_layouts="n {R:data}")(x).full_tensor()
    tensor([2., 3.])
    """
    _state(x, axis, "broadcast", ("varying",))
    return _rooted(x, axis, root, "broadcast", "reduced")


def reduce(x: Any, *where: Any, **keywords: Any) -> ShardedTensor:
    """The sum over an axis on its device at position `root`, zeros elsewhere. Inside `shard_map`.

    Args:
        x: varying or unreduced over `axis`, which has n devices.
        *where: `axis, root`: a mesh axis and a position on it. `pattern, op` instead mean the
            reduction of einops.
        **keywords: of einops' reduction.

    Returns:
        Varying over `axis`.

    Cost: n-1 of the n devices move the bytes of `x`. Gradient: `broadcast` from the root.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.arange(4.0), sw.make_mesh({"data": 2}), "n/data")
    >>> f = lambda x: sw.ops.reduce(x, "data", 1)
    >>> sw.shard_map(f, in_layouts="n/data", out_layouts="n/data")(x).full_tensor()
    tensor([0., 0., 2., 4.])
    """
    if len(where) != 2 or not isinstance(where[1], int) or keywords:
        return einops.reduce(x, *where, **keywords)
    axis, root = where
    _state(x, axis, "reduce", ("varying", "unreduced"))
    if x.layout.state(axis) == "varying":
        x = convert(x, axis, "unreduced")
    return _rooted(x, axis, root, "reduce", "varying")


def _rooted(x: ShardedTensor, axis: str, root: int, kind: Kind, after: State) -> ShardedTensor:
    """The collective, with the state over the axis that it leaves."""
    n = x.mesh.axes[axis]
    if not 0 <= root < n:
        raise ValueError(f"{kind}: root must be a position 0..{n - 1} of {axis!r}, got {root}")
    with record.acting(kind, "shard_map"):
        shards = moved(Rooted(x.mesh, axis, root, kind), x._shards, record.context())
    kind_after = x._type.with_layout(
        with_state(x.layout, axis, after), x._type.grad and torch.is_grad_enabled()
    )
    return ShardedTensor(tuple(shards), kind_after)


def axis_index(axis: str) -> ShardedTensor:
    """Each device's position on an axis: an int64 scalar, varying over it. Inside `shard_map`.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.zeros(3), sw.make_mesh({"data": 3}), "n/data")
    >>> f = lambda x: x + sw.ops.axis_index("data")
    >>> sw.shard_map(f, in_layouts="n/data", out_layouts="n/data")(x).full_tensor()
    tensor([0., 1., 2.])
    """
    mesh = MESH.get()
    if mesh is None:
        raise LayoutError(
            "axis_index: there is no mesh to read here: call it inside sw.shard_map",
            op="axis_index",
        )
    mesh.check_axes((axis,))
    where = mesh.shard_device
    shards: list[Tensor] = [
        torch.tensor(p, dtype=torch.int64, device=where) for p in mesh.positions((axis,))
    ]
    return ShardedTensor(
        tuple(shards), make_type(mesh, make((), varying=frozenset((axis,))), (), torch.int64)
    )
