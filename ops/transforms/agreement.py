"""Whether all ranks issue their collectives in one order.

Two ranks wait for each other in every group that both are in, so the collectives of their common
groups have to come in the same order on both. Graphs differ between ranks (offsets of blocks are
constants), and a pass that looks at them may decide differently on two ranks. So the orders are
exchanged once a compilation, and a result that differs is not used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ...meshlib import traced
from ...meshlib.distributed import DistributedTransport, _all_gather, job

Node = torch.fx.Node


class Call(NamedTuple):
    """One collective of a rank: the members of its group, and what all of them must agree on."""

    ranks: tuple[int, ...]
    what: str


def calls(nodes: Sequence[Node]) -> list[Call]:
    """The collectives of a graph between processes, in order."""
    found: list[Call] = []
    for node in nodes:
        serials = node.meta["serial"]
        transport = traced.transport_of(serials[0][0])
        if not isinstance(transport, DistributedTransport):
            continue
        axes = serials[0][1]
        ranks = tuple(sorted(transport.ranks[i] for i in transport._members(axes)))
        numbers = [number for _, _, number in serials]
        found.append(Call(ranks, f"{'/'.join(axes)} of {transport.key}: {node.target} {numbers}"))
    return found


def agreed(mine: Sequence[Call]) -> bool:
    """Whether every two ranks of the job have their common collectives in the same order.

    All processes of the job call this, together; all get the same answer.
    """
    me = job().rank
    orders = _exchanged(mine)
    is_alike = all(
        _common(orders[me], rank) == _common(other, me) for rank, other in enumerate(orders)
    )
    verdict = torch.tensor([int(is_alike)], device=job().device)
    dist.all_reduce(verdict, dist.ReduceOp.MIN)
    return bool(verdict.item())


def _common(order: Sequence[Call], rank: int) -> list[Call]:
    return [call for call in order if rank in call.ranks]


def _gather(table: Tensor, row: Tensor) -> None:
    """The rows of all ranks, one after another; torch's function for it changes its name."""
    _all_gather(dist.group.WORLD, table, row).wait()


def _exchanged(mine: Sequence[Call]) -> list[list[Call]]:
    """The orders of all ranks."""
    device, size = job().device, job().size
    groups = sorted({call.ranks for call in mine})
    short = [
        (groups.index(call.ranks), hashlib.blake2b(call.what.encode(), digest_size=8).hexdigest())
        for call in mine
    ]
    data = json.dumps([groups, short]).encode()
    length = torch.tensor([len(data)], device=device)
    lengths = length.new_empty(size)
    _gather(lengths, length)
    longest = int(lengths.max().item())
    row = torch.tensor(list(data.ljust(longest)), dtype=torch.uint8).to(device)
    table = row.new_empty(size * longest)
    _gather(table, row)
    orders: list[list[Call]] = []
    for text in table.view(size, longest).tolist():
        known, order = json.loads(bytes(text))
        orders.append([Call(tuple(known[group]), what) for group, what in order])
    return orders
