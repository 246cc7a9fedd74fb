"""What the ranks of a job decide together: one order of collectives, one verdict on a budget.

Two ranks wait for each other in every group that both are in, so the collectives of their common
groups have to come in the same order on both. Graphs differ between ranks (offsets of blocks are
constants), and a pass that looks at them may decide differently on two ranks. So the orders are
exchanged, and a result that differs is not used. For the same reason a rank on which the step fits
no budget says so to the others, which would wait for it otherwise.
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
from ..budget import BudgetError

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


def agreed(mine: Sequence[Call], is_fine: bool = True) -> bool:
    """Whether every two ranks of the job have their common collectives in the same order.

    Args:
        mine: this rank's.
        is_fine: whether this rank wants its graph for other reasons; one that does not is enough.

    All processes of the job call this, together; all get the same answer.
    """
    me = job().rank
    orders = _exchanged(mine)
    is_alike = is_fine and all(
        _common(orders[me], rank) == _common(other, me) for rank, other in enumerate(orders)
    )
    verdict = torch.tensor([int(is_alike)], device=job().device)
    dist.all_reduce(verdict, dist.ReduceOp.MIN)
    return bool(verdict.item())


def refused(mine: BudgetError | None) -> BudgetError | None:
    """The refusal of the rank that misses most bytes; None if no rank refuses.

    All processes of the job call this, together; all get the same answer.
    """
    said = ["", 0] if mine is None else [str(mine), mine.shortfall]
    answers = map(json.loads, _gathered(json.dumps(said).encode()))
    refusals = [(-short, rank, text) for rank, (text, short) in enumerate(answers) if text]
    if not refusals:
        return None
    short, rank, text = min(refusals)
    return BudgetError(f"rank {rank}: {text}", -short)


def _common(order: Sequence[Call], rank: int) -> list[Call]:
    return [call for call in order if rank in call.ranks]


def _gather(table: Tensor, row: Tensor) -> None:
    """The rows of all ranks, one after another; torch's function for it changes its name."""
    _all_gather(dist.group.WORLD, table, row).wait()


def _exchanged(mine: Sequence[Call]) -> list[list[Call]]:
    """The orders of all ranks."""
    groups = sorted({call.ranks for call in mine})
    short = [
        (groups.index(call.ranks), hashlib.blake2b(call.what.encode(), digest_size=8).hexdigest())
        for call in mine
    ]
    orders: list[list[Call]] = []
    for text in _gathered(json.dumps([groups, short]).encode()):
        known, order = json.loads(text)
        orders.append([Call(tuple(known[group]), what) for group, what in order])
    return orders


def _gathered(data: bytes) -> list[bytes]:
    """What all ranks say, in their order, padded by spaces."""
    device, size = job().device, job().size
    length = torch.tensor([len(data)], device=device)
    lengths = length.new_empty(size)
    _gather(lengths, length)
    longest = int(lengths.max().item())
    row = torch.tensor(list(data.ljust(longest)), dtype=torch.uint8).to(device)
    table = row.new_empty(size * longest)
    _gather(table, row)
    return [bytes(text) for text in table.view(size, longest).tolist()]
