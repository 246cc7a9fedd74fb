"""Memories: where the shards of a tensor lie, `@host`, `@disk`, or on their device.

    from -> to    device            host       disk
    device                          to_host    to_host, write
    host          to_device                    write
    disk          read, to_device   read

A move changes nothing but the place in the layout; its derivative is the move back, so a parameter
at rest on the host has its gradient there too. Moves are differentiable, recorded as copies with
their bytes per device, and planned on abstract meshes like everything else.

"host" is pinned memory beside a GPU. On a machine without one, devices and host are one memory:
then a move still gives tensors of their own, and the meter, which counts device memory, leaves them
out.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..meshlib import record
from ..meshlib.errors import LayoutError
from ..meshlib.mesh import Mesh
from . import spill
from .convert import in_front
from .layout import Layout, make
from .sharded import DTYPES, ShardedTensor, Type

Memory = Literal["device", "host", "disk"]
Kind = Literal["to_host", "to_device", "read", "write"]

MOVES: dict[tuple[str, str], tuple[Kind, ...]] = {
    ("device", "host"): ("to_host",),
    ("device", "disk"): ("to_host", "write"),
    ("host", "device"): ("to_device",),
    ("host", "disk"): ("write",),
    ("disk", "device"): ("read", "to_device"),
    ("disk", "host"): ("read",),
}
BACK: dict[Kind, Kind] = {
    "to_host": "to_device",
    "to_device": "to_host",
    "read": "write",
    "write": "read",
}

# Ops that only look at part of a tensor: on disk they are parts of the map.
VIEWS = frozenset({"unbind", "select", "narrow", "getitem", "split", "chunk"})

_AWAY: set[int] = set()  # storages that are not in device memory
modes_off = torch.utils._python_dispatch._disable_current_modes  # pyright: ignore


def with_memory(layout: Layout, memory: str) -> Layout:
    """The same layout in another memory.

    >>> import shardwise as sw
    >>> with_memory(sw.Layout("a/data b"), "host")
    Layout('_/data _ @host')
    """
    if layout.memory == memory:
        return layout
    return make(layout.dims, layout.unreduced, layout.reduced, layout.varying, memory, layout.at)


def away(tensor: Tensor) -> Tensor:
    """Note that a tensor's storage is not in device memory; the meter leaves it out."""
    storage = tensor.untyped_storage()
    key = storage._cdata
    if key not in _AWAY:
        _AWAY.add(key)
        weakref.finalize(storage, _AWAY.discard, key)
    return tensor


def is_away(tensor: Tensor) -> bool:
    """Whether a tensor is known to lie outside device memory."""
    return bool(_AWAY) and tensor.untyped_storage()._cdata in _AWAY


def home(tensor: Tensor) -> Tensor:
    """Take back that a tensor is away: a planner asks what would be if it were on the device."""
    _AWAY.discard(tensor.untyped_storage()._cdata)
    return tensor


def any_away(args: Any) -> bool:
    """Whether any tensor among an op's arguments lies outside device memory."""
    if not _AWAY:
        return False
    return any(isinstance(x, Tensor) and is_away(x) for x in tree_leaves(args))


def on_host(like: Tensor, beside: torch.device) -> Tensor:
    """New host memory for a tensor: pinned beside a GPU, if the system grants it."""
    if beside.type == "meta":
        return torch.empty(like.shape, dtype=like.dtype, device="meta")
    if beside.type == "cuda":
        try:
            return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
        except RuntimeError as error:
            warnings.warn(
                f"host memory cannot be pinned ({str(error).splitlines()[0]}); "
                "copies from it are slower",
                stacklevel=2,
            )
    return torch.empty(like.shape, dtype=like.dtype)


def run(
    mesh: Mesh,
    shards: Sequence[Tensor],
    before: str,
    after: str,
    name: str = "",
    into: spill.File | None = None,
) -> list[Tensor]:
    """Shards in another memory; replicas that share one tensor share one there too."""
    device = mesh.shard_device
    first: dict[Any, int] = {}
    places = [first.setdefault(_key(s), len(first)) for s in shards]
    distinct = [shards[places.index(i)] for i in range(len(first))]
    with modes_off():
        if device.type == "meta":
            made = [torch.empty_like(s) for s in distinct]
        elif after == "device":
            made = [_onto(s, device, before) for s in distinct]
        else:
            made = [_off(s, device, after == "host") for s in distinct]
            if device.type == "cuda" and before == "device":
                torch.cuda.current_stream(device).synchronize()
            if after == "disk":
                made = spill.write(made, name, into)
        if after != "device":
            for tensor in made:
                away(tensor)
    if after == "device":
        for tensor in made:  # under a meter this is what counts it
            tensor.detach()
    # Never one tensor twice: each is the output of an autograd node.
    return [
        made[p] if i == places.index(p) else made[p].view_as(made[p]) for i, p in enumerate(places)
    ]


def _key(shard: Tensor) -> Any:
    if shard.device.type == "meta" or torch._C._functorch.is_functorch_wrapped_tensor(shard):  # pyright: ignore
        return id(shard)
    return shard.data_ptr(), shard.shape, shard.stride()


def _onto(shard: Tensor, device: torch.device, before: str) -> Tensor:
    """A shard in device memory, in a tensor of its own."""
    if before == "disk" and spill.behind(shard) is not None:
        shard = spill.read(shard, on_host(shard, device))
        return shard.to(device, non_blocking=True)
    return torch.empty(shard.shape, dtype=shard.dtype, device=device).copy_(
        shard, non_blocking=True
    )


def _off(shard: Tensor, device: torch.device, keep: bool) -> Tensor:
    """A shard in host memory, in a tensor of its own if it is to be kept."""
    if spill.behind(shard) is not None:
        return spill.read(shard, on_host(shard, device))
    if not keep and shard.device.type == "cpu":
        return shard  # on its way to a file
    return on_host(shard, device).copy_(shard, non_blocking=True)


class Move(torch.autograd.Function):
    """A move of all shards of this process, with the way back as derivative."""

    @staticmethod
    def forward(kind: Type, after: str, by: Any, backward: bool, *shards: Tensor) -> Any:  # noqa: D102
        return tuple(_recorded(kind, after, by, backward, shards))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: D102
        ctx.kind, ctx.after, ctx.by = inputs[:3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: D102
        layout = with_memory(ctx.kind.layout, ctx.after).dual
        source = ctx.kind.with_layout(layout)
        back = move_shards(source, ctx.kind.layout.memory, ctx.by, True, grads)
        return None, None, None, None, *back

    @staticmethod
    def jvp(ctx: Any, _kind: Any, _after: Any, _by: Any, _backward: Any, *tangents: Any) -> Any:  # noqa: D102
        return tuple(move_shards(ctx.kind, ctx.after, None, False, tangents))

    @staticmethod
    def vmap(info: Any, dims: Any, kind: Any, after: str, by: Any, back: bool, *shards: Any) -> Any:  # noqa: D102
        front = in_front(shards, dims[4:], info.batch_size)
        return tuple(move_shards(kind, after, by, back, front)), (0,) * len(shards)


def _recorded(
    kind: Type, after: str, by: Any, backward: bool, shards: Sequence[Tensor]
) -> list[Tensor]:
    before = kind.layout.memory
    if record.LOGS and not kind.mesh.is_outside:
        size = shards[0].numel() * shards[0].element_size()
        for what in MOVES[before, after]:
            record.copied(what, size, kind.mesh, by, backward)
    return run(kind.mesh, shards, before, after, (by.path if by else None) or str(kind))


def move_shards(
    kind: Type, after: str, by: Any, backward: bool, shards: Sequence[Tensor]
) -> Sequence[Tensor]:
    """A differentiable move of shards."""
    if torch._C._are_functorch_transforms_active():
        return Move.apply(kind, after, by, backward, *shards)
    needs = torch.is_grad_enabled() and any(s.requires_grad for s in shards)
    if needs or torch.autograd.forward_ad._current_level >= 0:
        return Move.apply(kind, after, by, backward, *shards)
    return _recorded(kind, after, by, backward, shards)


def to_memory(x: ShardedTensor, memory: str) -> ShardedTensor:
    """The same tensor in another memory; itself if it is there.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.ones(4), sw.make_mesh({"data": 2}), "n/data")
    >>> with sw.record() as plan:
    ...     print(to_memory(x, "host"), [(c.kind, c.bytes) for c in plan.copies])
    f32[4/data]@host [('to_host', 8)]
    """
    kind = x._type
    if kind.layout.memory == memory:
        return x
    grad = kind.grad and torch.is_grad_enabled()
    by, path = record.context(), getattr(x, "_path", None)
    if path is not None:
        by = (by or record.Context())._replace(path=path)
    shards = move_shards(kind, memory, by, False, x._shards)
    y = ShardedTensor(tuple(shards), kind.with_layout(with_memory(kind.layout, memory), grad))
    if path is not None:
        y._path = path
    return y


def fetched(x: ShardedTensor) -> ShardedTensor:
    """A tensor on disk, read to the host; for threads: unrecorded and without gradient."""
    with torch.no_grad():
        shards = run(x.mesh, x._shards, x.layout.memory, "host")
    return ShardedTensor(tuple(shards), x._type.with_layout(with_memory(x.layout, "host"), False))


def stored(x: ShardedTensor, over: ShardedTensor | None = None, name: str = "") -> ShardedTensor:
    """A tensor on the host, written to disk; unrecorded and without gradient.

    Args:
        x: the tensor.
        over: a tensor on disk that nobody reads any more: its file is written over.
        name: for errors.
    """
    found = None
    if over is not None and not over._shards[0].is_meta:
        found = spill.behind(over._shards[0])
    with torch.no_grad():
        shards = run(x.mesh, x._shards, "host", "disk", name, found and found[0])
    return ShardedTensor(tuple(shards), x._type.with_layout(with_memory(x.layout, "disk"), False))


def copied_into(x: ShardedTensor, place: ShardedTensor) -> ShardedTensor:
    """A tensor on the host, written into the device buffers of one that was given up."""
    size = x.local_shape.numel() * x.element_size()
    record.copied("to_device", size, x.mesh, record.context())
    with torch.no_grad():
        for to, value in {
            s.data_ptr(): (s, v) for s, v in zip(place._shards, x._shards, strict=True)
        }.values():
            to.copy_(value, non_blocking=True)
    return ShardedTensor(place._shards, place._type.with_layout(place.layout, False))


def settled(shards: Sequence[Tensor], mesh: Mesh, layout: Layout) -> list[Tensor]:
    """New shards, wherever they were made, in the memory of their layout."""
    if layout.memory == "device":
        return [s if s.device == mesh.shard_device else s.to(mesh.shard_device) for s in shards]
    block = "x".join(map(str, shards[0].shape)) or "single"
    name = f"a tensor of {DTYPES.get(shards[0].dtype)} in {block} blocks, '{layout}'"
    return run(mesh, shards, "device", layout.memory, name)


def refuse_disk(name: str, kinds: Sequence[Type]) -> None:
    """Raise for an op on tensors on disk: nothing is computed there."""
    for number, kind in enumerate(kinds):
        if kind.layout.memory == "disk":
            raise LayoutError(
                f"{name}: operand {number}, {kind}, is on disk, where nothing is computed\n"
                "bring it back first: sw.reshard(x, '... @device') or '... @host'",
                op=name,
            )
