"""One entry per block: how a reduction that is no sum meets over the axes that cut a dim.

A dim cut into n blocks is "(p i)", p the block and i the place in it. Each device reduces its
block, which makes a tensor with n entries along the dim, cut by the same axes: a legal,
differentiable value. `meet` then finds the largest or smallest of those n by one all_reduce; other
ops gather them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layouts.convert import convert, in_front
from ..layouts.layout import make
from ..layouts.sharded import ShardedTensor, make_type
from ..meshlib import record
from ..meshlib.mesh import Mesh
from ..meshlib.transport import Axes, ReduceOp
from .dispatch import Info, Local, Op
from .pointwise import to
from .rules import Rule, letters, sized
from .shape import one_dim, reshape

_functorch = torch._C._are_functorch_transforms_active


class _Meet(torch.autograd.Function):
    """An all_reduce of max or min: without derivative, and the same for each entry of a vmap."""

    @staticmethod
    def forward(mesh: Mesh, axes: Axes, op: ReduceOp, *shards: Tensor) -> tuple[Tensor, ...]:
        if record.LOGS:
            record.collective("all_reduce", mesh, axes, shards[0], record.context(), op)
        return tuple(mesh.comm.all_reduce(shards, axes, op))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (None,) * (3 + len(grads))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return (None,) * (len(tangents) - 3)

    @staticmethod
    def vmap(info: Any, dims: Any, mesh: Mesh, axes: Axes, op: ReduceOp, *shards: Tensor) -> Any:
        front = in_front(shards, dims[3:], info.batch_size)
        return _meet_shards(mesh, axes, op, front), (0,) * len(shards)


def _meet_shards(
    mesh: Mesh, axes: Axes, op: ReduceOp, shards: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The largest or smallest of each entry over the devices of the axes."""
    if _functorch():
        return _Meet.apply(mesh, axes, op, *shards)
    return _Meet.forward(mesh, axes, op, *shards)


def meet(blocks: ShardedTensor, dims: Sequence[int], op: ReduceOp) -> ShardedTensor:
    """The largest or smallest entry along dims that hold one entry per device; no gradient.

    Args:
        blocks: undifferentiated; along each of `dims` the axes that cut it leave local size 1.
        dims: to reduce; they stay, with size 1.
        op: "max" or "min".

    Returns:
        Replicated over the axes that cut those dims.

    Cost: one joint all_reduce of the local tensor. Gloo and NCCL may pass over a nan elsewhere.
    """
    old, mesh = blocks.layout, blocks.mesh
    cut = {a for d in dims for a in old.dims[d]}
    axes = tuple(a for a in mesh.axes if a in cut)
    if not axes:
        return blocks
    shards = _meet_shards(mesh, axes, op, blocks._shards)
    left = tuple(() if d in dims else a for d, a in enumerate(old.dims))
    shape = [1 if d in dims else n for d, n in enumerate(blocks.shape)]
    layout = make(left, old.unreduced, old.reduced, old.varying, old.memory, old.at)
    return ShardedTensor(shards, make_type(mesh, layout, shape, blocks.dtype, False))


# One entry per block: a dim "(p i)" whose p is what cuts it becomes "p".

BLOCK: dict[str, Callable[..., Tensor]] = {
    "max": lambda x, dims: torch.amax(x, dims, keepdim=True),
    "min": lambda x, dims: torch.amin(x, dims, keepdim=True),
    "sum": lambda x, dims: torch.sum(x, dims, keepdim=True),
    "prod": lambda x, dims: torch.prod(x, dims[0], keepdim=True),
    "logsumexp": lambda x, dims: torch.logsumexp(x, dims, keepdim=True),
}


def block_rule(
    shapes: Sequence[Any], dims: tuple[int, ...], counts: tuple[int, ...], linear: bool = False
) -> Rule:
    """Dims of n blocks become n entries; further operands have those n entries, or size 1."""
    sizes: dict[str, int] = {}
    ins: list[tuple[str, ...]] = []
    outs: list[tuple[str, ...]] = []
    for d, (name, size) in enumerate(zip(letters(len(shapes[0])), shapes[0], strict=True)):
        if d in dims:
            n = counts[dims.index(d)]
            sizes |= {f"p{d}": n, f"i{d}": size // n}
            ins.append((f"p{d}", f"i{d}"))
            outs.append((f"p{d}",))
        else:
            sizes[name] = size
            ins.append((name,))
            outs.append((name,))
    others = tuple(
        tuple(
            () if n == 1 and sizes[dim[0]] != 1 else dim for n, dim in zip(shape, outs, strict=True)
        )
        for shape in shapes[1:]
    )
    return Rule(
        (tuple(ins), *others),
        (tuple(outs),),
        sizes,
        frozenset(f"i{d}" for d in dims),
        linear=frozenset((0,)) if linear else frozenset(),
    )


_BLOCKS = {
    name: Op(
        name,
        lambda shapes, dims, counts, name=name: block_rule(shapes, dims, counts, name == "sum"),
        lambda info, function=function: lambda x: function(x, info.static[0]),
    )
    for name, function in BLOCK.items()
}


def blockwise(x: ShardedTensor, dims: tuple[int, ...], kind: str) -> ShardedTensor:
    """Each device's block reduced to one entry along `dims`: local, nothing moves."""
    return _BLOCKS[kind]((x,), (dims, parts(x, dims)))


def parts(x: ShardedTensor, dims: Sequence[int]) -> tuple[int, ...]:
    """Into how many blocks each dim is cut."""
    return tuple(x.mesh.group_size(x.layout.dims[d]) for d in dims)


def extremum(x: ShardedTensor, dims: tuple[int, ...], op: ReduceOp) -> ShardedTensor:
    """Largest or smallest entry along dims, which stay with size 1; without gradient.

    Cost: one all_reduce of the result where an axis cuts one of the dims.
    """
    return meet(blockwise(x.detach(), dims, op), dims, op)


def dropped(x: ShardedTensor, dims: tuple[int, ...], keepdim: bool) -> ShardedTensor:
    """Without dims of size 1, unless they are to be kept."""
    if keepdim or not dims:
        return x
    return reshape(x, [n for d, n in enumerate(x.shape) if d not in dims])


def settled(x: ShardedTensor) -> ShardedTensor:
    """Every owed sum taken: one joint all_reduce to replicated."""
    owed = tuple(a for a in x.mesh.axes if a in x.layout.unreduced)
    return convert(x, owed, "replicated") if owed else x


# Where the extreme entry is: the smallest global index among those that equal it.


def _first_local(info: Info) -> Local:
    dims, counts = info.static
    total = [info.kinds[0].shape[d] for d in dims]
    here = [n // c for n, c in zip(total, counts, strict=True)]
    end = 1
    for n in total:
        end *= n

    def at(offsets: tuple[int, ...]) -> Callable[..., Tensor]:
        def first(x: Tensor, largest: Tensor) -> Tensor:
            place = torch.zeros((), dtype=torch.int64, device=x.device)
            for d, n, size, offset in zip(dims, total, here, offsets, strict=True):
                steps = torch.arange(offset, offset + size, device=x.device)
                place = place * n + steps.reshape(-1, *(1,) * (x.ndim - 1 - d))
            hit = (x == largest) | (
                x != x
            )  # with a nan anywhere, the extreme is nan and nan is found
            return torch.where(hit, place, end).amin(dims, keepdim=True)

        return first

    starts = [
        [p * size for p in info.mesh.positions(info.axes(f"p{d}"))]
        for d, size in zip(dims, here, strict=True)
    ]
    return [at(offsets) for offsets in zip(*starts, strict=True)]


_FIRST = Op("argmax", block_rule, _first_local, differentiable=False)


def first_index(x: ShardedTensor, extreme: ShardedTensor, dims: tuple[int, ...]) -> ShardedTensor:
    """The first global index, row-major over `dims`, where x equals its extreme.

    Cost: one all_reduce(min) of int64 where an axis cuts one of the dims.
    """
    return meet(_FIRST((x.detach(), extreme), (dims, parts(x, dims))), dims, "min")


def widened(x: ShardedTensor) -> ShardedTensor:
    """In float32 if it is narrower: statistics are taken there, as torch's kernels do."""
    return to(x, torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x


def leads(x: Any, dims: Sequence[int], others: Sequence[tuple[Any, Sequence[int]]]) -> bool:
    """Whether no other operand is cut along x's `dims` by an axis that does not cut x there."""
    for k, d in enumerate(dims):
        mine = x.layout.dims[d]
        for other, theirs in others:
            if set(other.layout.dims[theirs[k]]) - set(mine):
                return False
    return True


def along(shapes: Any, dim: int, *_: Any, results: int = 1, linear: bool = False) -> Rule:
    """A dim that is needed whole and kept."""
    names = letters(len(shapes[0]))
    dims = tuple((n,) for n in names)
    return sized(
        Rule(
            (dims,),
            (dims,) * results,
            blocked=frozenset(names[dim : dim + 1]),
            linear=frozenset((0,)) if linear else frozenset(),
        ),
        shapes,
    )


def one_of(dim: int, x: ShardedTensor) -> int:
    """One dim as a non-negative number."""
    return one_dim(dim, x.ndim) if x.ndim else 0
