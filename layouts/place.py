"""From plain values to ShardedTensors: by global value, by local blocks, by a callback per block.

`shard` takes the *global* value, equal in every process; under torchrun the first call of each
source line compares a checksum. A value that needs a gradient is not differentiated through:
gradients are asked of ShardedTensors, by `value_and_grad`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from ..meshlib.errors import LayoutError, word
from ..meshlib.mesh import Mesh
from ..meshlib.source import user_line
from .layout import Layout, LayoutLike, resolve
from .memory import settled, with_memory
from .reshard import check_dtype, cut
from .sharded import ShardedTensor, make_type, wrap

_CHECKED: set[tuple[str, Mesh]] = set()  # source lines whose values were compared between processes


def shard(x: Any, mesh: Mesh, layout: Any = "...") -> Any:
    """Global values placed on a mesh.

    Args:
        x: a tensor, array or number, or a tree of them: the global value, the same in every
            process.
        mesh: where to.
        layout: one layout for all leaves, or a tree of them; "..." is replicated.

    Returns:
        ShardedTensors of the same tree. On an abstract mesh they hold shapes only.

    Raises:
        LayoutError: an indivisible dim, a wrong number of dims.
        MeshError: an unknown axis; or (torchrun) values that differ between processes.

    >>> import torch, shardwise as sw
    >>> sw.shard(torch.zeros(4, 6), sw.make_mesh({"data": 2, "tensor": 3}), "b/data d/tensor")
    f32[4/data 6/tensor] local[2 2] on mesh(data=2, tensor=3)
    """
    if isinstance(layout, str | Layout):
        return optree.tree_map(lambda v: _shard(v, mesh, layout), x, none_is_leaf=True)
    return optree.tree_map(lambda v, to: _shard(v, mesh, to), x, layout, none_is_leaf=True)


def _shard(value: Any, mesh: Mesh, layout: LayoutLike) -> Any:
    if value is None:
        return None
    if isinstance(value, ShardedTensor):
        raise TypeError("shard takes plain values; use sw.reshard for a ShardedTensor")
    value = torch.as_tensor(value).detach()
    to = resolve(layout, value.ndim, None, value.shape, mesh)
    to.check(value.shape, mesh, "shard")
    check_dtype(value.dtype, to, "shard")
    where = mesh.shard_device
    if where.type == "meta":
        block = torch.empty(to.local_shape(value.shape, mesh), dtype=value.dtype, device="meta")
        return wrap(settled([block], mesh, to), mesh, to, value.shape)
    if mesh.transport == "distributed":
        _compare(value, mesh)
    blocks = cut(value, mesh, to)
    if to.memory != "device":
        return wrap(settled(blocks, mesh, to), mesh, to, value.shape)
    shards = [block.to(where) for block in blocks]
    if value.device == where:  # never alias the caller's memory: he may write to it
        shards = [block.clone() for block in shards]
    return wrap(shards, mesh, to, value.shape)


def _compare(value: Tensor, mesh: Mesh) -> None:
    """All processes of the mesh hold the same global value, or all raise."""
    line = (user_line(), mesh)
    if line in _CHECKED and not mesh.check:
        return
    _CHECKED.add(line)
    from ..meshlib.distributed import agree

    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.blake2b(raw.numpy().tobytes(), digest_size=16)
    digest.update(repr((tuple(value.shape), value.dtype)).encode())
    agree(mesh.comm, digest.digest(), f"shard at {line[0]}: the global value")


def from_local(shards: Tensor | Sequence[Tensor], mesh: Mesh, layout: LayoutLike) -> ShardedTensor:
    """A ShardedTensor of local blocks.

    Args:
        shards: this process's block, or on a simulated mesh one per device in row-major order.
        mesh: where they lie.
        layout: what they are blocks of: cut dims are `size of the axes` times as long globally.

    Raises:
        LayoutError: shapes or dtypes that differ between devices, a wrong number of shards or dims.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"data": 2})
    >>> sw.from_local([torch.ones(2), torch.ones(2)], mesh, "n/data").full_tensor()
    tensor([1., 1., 1., 1.])
    """
    blocks = [shards] if isinstance(shards, Tensor) else list(shards)
    held = len(mesh.held)
    if len(blocks) != held:
        raise LayoutError(
            f"from_local: got {len(blocks)} shards, but this process holds {held} devices of {mesh}"
        )
    first = blocks[0]
    to = resolve(layout, first.ndim)
    odd = [i for i, b in enumerate(blocks) if b.shape != first.shape or b.dtype != first.dtype]
    if odd:
        raise LayoutError(
            word(
                "the shards must have one shape and dtype, "
                f"but shard {odd[0]} differs from shard 0",
                op="from_local",
                source=user_line(),
                operands=[
                    (f"shard {i}", f"{tuple(blocks[i].shape)} {blocks[i].dtype}")
                    for i in (0, *odd[:3])
                ],
                mesh=mesh,
            )
        )
    if to.ndim != first.ndim:
        raise LayoutError(
            f"from_local: layout '{to}' speaks of {to.ndim} dims, the shards have {first.ndim}",
            kind="parse",
        )
    mesh.check_axes(list(to.axes))
    check_dtype(first.dtype, to, "from_local")
    if mesh.transport == "distributed" and not mesh.is_outside:
        from ..meshlib.distributed import agree

        text = f"{tuple(first.shape)} {first.dtype} {to}"
        agree(
            mesh.comm,
            hashlib.blake2b(text.encode(), digest_size=16).digest(),
            f"from_local at {user_line()}: this process has shape, dtype, layout {text}; they",
        )
    shape = [n * mesh.group_size(axes) for n, axes in zip(first.shape, to.dims, strict=True)]
    return wrap(settled(blocks, mesh, to), mesh, to, shape)


def from_callback(
    fn: Callable[[tuple[slice, ...]], Tensor],
    shape: Sequence[int],
    mesh: Mesh,
    layout: LayoutLike = "...",
    *,
    dtype: torch.dtype | None = None,
) -> ShardedTensor:
    """A ShardedTensor whose blocks are asked for one by one, by their global index.

    Args:
        fn: global index (one slice per dim) to that block; called once per distinct block held
            here.
        shape: global shape.
        mesh: where to.
        layout: replicated by default; unreduced axes get the value on their first device.
        dtype: cast to it; needed on an abstract mesh, where fn is not called (default float32).

    Raises:
        LayoutError: a block of another shape than asked for.

    >>> import torch, shardwise as sw
    >>> whole = torch.arange(6.0)
    >>> sw.from_callback(lambda i: whole[i], (6,), sw.make_mesh({"data": 3}), "n/data").shards[1]
    tensor([2., 3.])
    """
    to = resolve(layout, len(shape), None, shape, mesh)
    to.check(shape, mesh, "from_callback")
    if dtype is not None:
        check_dtype(dtype, to, "from_callback")
    local = to.local_shape(shape, mesh)
    if mesh.shard_device.type == "meta":
        block = torch.empty(local, dtype=dtype or torch.float32, device="meta")
        return wrap(settled([block], mesh, to), mesh, to, shape)
    made: dict[Any, Tensor] = {}
    shards = []
    for coord, place in zip(mesh.held, mesh.positions(tuple(sorted(to.unreduced))), strict=True):
        index = to.index(shape, mesh, coord)
        key = tuple((s.start, s.stop) for s in index)
        if key not in made:
            block = torch.as_tensor(fn(index))
            if tuple(block.shape) != local:
                raise LayoutError(
                    f"from_callback: fn gave shape {tuple(block.shape)} for index {index}, "
                    f"expected {local}"
                )
            where = mesh.shard_device if to.memory == "device" else block.device
            made[key] = block.detach().to(device=where, dtype=dtype or block.dtype)
        block = made[key]
        shards.append(block.view_as(block) if place == 0 else torch.zeros_like(block))
    if to.memory != "device":
        shards = settled(shards, mesh, to)
    return wrap(shards, mesh, to, shape)


def full(
    shape: Sequence[int],
    value: float,
    mesh: Mesh,
    layout: LayoutLike = "...",
    *,
    dtype: torch.dtype | None = None,
) -> ShardedTensor:
    """A tensor whose GLOBAL value is one number everywhere, whatever its states.

    >>> import shardwise as sw
    >>> x = sw.full((4,), 3.0, sw.make_mesh({"data": 2}), "n {U:data}")
    >>> x.shards
    (tensor([3., 3., 3., 3.]), tensor([0., 0., 0., 0.]))
    """
    return from_callback(
        lambda index: torch.full([s.stop - s.start for s in index], value, dtype=dtype),
        shape,
        mesh,
        layout,
        dtype=dtype or torch.tensor(value).dtype,
    )


def zeros(
    shape: Sequence[int],
    mesh: Mesh,
    layout: LayoutLike = "...",
    *,
    dtype: torch.dtype | None = None,
) -> ShardedTensor:
    """Zeros; also "a batch of this shape" on an abstract mesh.

    >>> import shardwise as sw
    >>> sw.zeros((8, 128), sw.make_mesh({"data": 512}, transport="abstract"), "b s")
    f32[8 128] local[8 128] on mesh(data=512)
    """
    return full(shape, 0.0, mesh, layout, dtype=dtype or torch.get_default_dtype())


def constant(value: Any, like: ShardedTensor) -> ShardedTensor:
    """A plain tensor as operand beside `like`: undifferentiated and equal on every device."""
    tensor = torch.as_tensor(value)
    if tensor.requires_grad and torch.is_grad_enabled():
        raise LayoutError(
            word(
                "a plain tensor beside a ShardedTensor is a constant, but this one needs a gradient"
                "\nshard it (sw.shard(t, mesh)) and differentiate that, or pass t.detach()",
                source=user_line(),
                operands=[("tensor", str(tuple(tensor.shape))), ("beside", str(like))],
            )
        )
    memory = "device" if like.layout.memory == "device" else "host"
    layout = with_memory(resolve("...", tensor.ndim), memory)
    kind = make_type(like.mesh, layout, tensor.shape, tensor.dtype, False)
    where = like.mesh.shard_device
    if memory == "host" and where.type == "cuda":
        where = torch.device("cpu")
    if where.type == "meta" or tensor.device.type == "meta":
        tensor = torch.empty_like(tensor, device="meta")
    elif tensor.device != where:
        tensor = tensor.to(where)
    if like.mesh.transport == "distributed" and like.mesh.check:
        _compare(tensor, like.mesh)
    return ShardedTensor((tensor,) * len(like.mesh.held), kind)


def pad_to_multiple(x: ShardedTensor | Tensor, dim: int, multiple: int) -> Any:
    """Zeros appended along a dim until its size is a multiple; the true size is yours to remember.

    >>> import torch
    >>> pad_to_multiple(torch.ones(5), 0, 4).shape
    torch.Size([8])
    """
    size = x.shape[dim]
    extra = -size % multiple
    if not extra:
        return x
    widths = [0, 0] * (x.ndim - 1 - dim % x.ndim) + [0, extra]
    return torch.nn.functional.pad(x, widths)  # pyright: ignore
