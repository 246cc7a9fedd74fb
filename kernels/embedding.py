"""Rows of a table by id, and the table's gradient as a sum in a fixed order.

A device holds the block [start, start + size) of the vocabulary; ids name rows of the whole of it:

    lookup    rows[i] = table[ids[i] - start]                     0 where the block lacks the id
    backward  grad_table[v] = sum of grad[i] over ids[i] = start + v     0 where no id names v

Each is the other's derivative, so both have derivatives of any order. On a GPU the backward sorts
the ids (stably) and sums the rows of each id in an order that the ids alone decide, in float32,
rounded once: two runs agree to the bit. What inductor makes of a scatter, and torch's index_add,
add by atomics, in an order that changes from run to run.

Shapes: table and grad_table [size, width], ids [...] of any integer dtype, rows and grad
[..., width]. The lookup takes `size` too, so that its backward keeps the ids and not the table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import wide
from .registry import define, rows

# Whether the library's embedding runs these ops for CUDA tensors, or `F.embedding` everywhere.
# In a traced step they are opaque nodes, where inductor would make a scatter by atomics.
ON_CUDA = True


def _held(ids: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Which ids lie in the block [start, start + size), and where (0 for the others)."""
    local = ids - start
    held = (local >= 0) & (local < size)
    return held, torch.where(held, local, 0)


def _lookup(table: Tensor, ids: Tensor, start: int, size: int) -> Tensor:
    held, local = _held(ids, start, size)
    return torch.where(held.unsqueeze(-1), table[local], 0).contiguous()


def _backward(grad: Tensor, ids: Tensor, start: int, size: int) -> Tensor:
    held, local = _held(ids, start, size)
    v = torch.where(held.unsqueeze(-1), grad.to(wide(grad.dtype)), 0)
    v = v.reshape(-1, grad.shape[-1])
    total = v.new_zeros(size, grad.shape[-1]).index_add(0, local.reshape(-1), v)
    return total.to(grad.dtype)


def _lookup_backward(grad_rows: Tensor, ids: Tensor, start: int, size: int) -> tuple[Tensor, None]:
    return embedding_backward(grad_rows, ids, start, size), None


def _backward_backward(
    grad_table: Tensor, ids: Tensor, start: int, size: int
) -> tuple[Tensor, None]:
    return embedding_lookup(grad_table, ids, start, size), None


embedding_backward = define(
    "embedding_backward(Tensor grad, Tensor ids, int start, int size) -> (Tensor table)",
    twin=_backward,
    cuda="embedding_triton:backward",
    backward=_backward_backward,
    fake=lambda grad, ids, start, size: grad.new_empty(size, grad.shape[-1]),
)

embedding_lookup = define(
    "embedding_lookup(Tensor table, Tensor ids, int start, int size) -> (Tensor rows)",
    twin=_lookup,
    cuda="embedding_triton:lookup",
    backward=_lookup_backward,
    fake=lambda table, ids, start, size: table.new_empty(*ids.shape, table.shape[1]),
    vmap=rows(lambda: embedding_lookup, "ids"),
)
