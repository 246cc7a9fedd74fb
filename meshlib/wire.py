"""How a shard goes over the wire: as what the backends move and reduce, blocks in their order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .transport import ReduceOp

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_NATIVE = frozenset((*_FLOATS, torch.int64, torch.int32, torch.int8, torch.uint8))
_REDUCE = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class Group(NamedTuple):
    """The processes that take part in a collective over some axes."""

    pg: dist.ProcessGroup
    size: int
    position: int  # this process's, over the axes in the order given
    order: tuple[int, ...]  # rank within pg of each position
    is_ordered: bool  # whether `order` counts up, so that memory is in order of position


def described(x: Tensor) -> str:
    """Dtype and shape, for messages."""
    return f"{str(x.dtype).removeprefix('torch.')}[{' '.join(map(str, x.shape))}]"


def wire(x: Tensor) -> Tensor:
    """Flat, contiguous, of a dtype that any backend moves; the memory of a contiguous x."""
    flat = x.contiguous().view(-1)
    return flat if x.dtype in _NATIVE else flat.view(torch.uint8)


def summand(x: Tensor) -> Tensor:
    """The same memory in a dtype that a backend reduces."""
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def reduce_op(x: Tensor, op: ReduceOp) -> Any:
    """The backend's operation that reduces a tensor of this dtype."""
    return _REDUCE["max" if x.dtype == torch.bool and op == "sum" else op]


def stack(x: Tensor, group: Group, dim: int) -> Tensor:
    """The blocks of x along `dim`, on a new first dim, in the group's own order of members."""
    dim %= x.ndim
    shape, n = x.shape, group.size
    blocks = x.view(*shape[:dim], n, shape[dim] // n, *shape[dim + 1 :]).movedim(dim, 0)
    if group.is_ordered:
        return blocks.contiguous()
    positions = sorted(range(n), key=group.order.__getitem__)
    return torch.stack([blocks[p] for p in positions])


def join(stack: Tensor, group: Group, dim: int) -> Tensor:
    """What `stack` makes, undone: blocks in order of position along `dim`."""
    dim %= stack.ndim - 1
    if group.is_ordered:
        return stack.movedim(0, dim).flatten(dim, dim + 1)
    return torch.cat([stack[r] for r in group.order], dim)
