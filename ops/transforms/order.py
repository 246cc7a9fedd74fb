"""What may not change places in the graph of a step, and putting its nodes in another order.

A node needs its operands. Besides, an op that writes to a tensor stays behind everything before it
and ahead of everything after it, and random ops and messages between two devices keep their order
among themselves. Any order that respects this computes the same bits. Orders here depend on nothing
but the graph (no sets are walked), so that all devices issue collectives in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

NAMESPACE = "_c10d_functional"
KINDS: dict[str, str] = {  # name in torch -> kind in the record
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
}

Needs = Mapping[Node, tuple[Node, ...]]


def name_of(node: Node) -> str:
    """The functional collective's name in torch; "" for every other node."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != NAMESPACE:
        return ""
    return target._opname


def is_collective(node: Node) -> bool:
    """Whether the node issues a collective."""
    return name_of(node) in KINDS


def is_wait(node: Node) -> bool:
    """Whether the node waits for one."""
    return name_of(node) == "wait_tensor"


def is_view(node: Node) -> bool:
    """Whether the node gives an operand's memory another shape and reads nothing."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    result = target._schema.returns[0].alias_info if target._schema.returns else None
    return result is not None and not result.is_write


def is_random(node: Node) -> bool:
    """Whether a second run gives other numbers."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.nondeterministic_seeded in target.tags
    )


def writes(node: Node) -> bool:
    """Whether the node changes a tensor that existed before it."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of an op by their names in its schema, defaults filled in."""
    target: Any = node.target
    schema = target._schema
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False))
    given.update(node.kwargs)
    return {a.name: given.get(a.name, a.default_value) for a in schema.arguments}


def size(node: Node) -> int:
    """Bytes of the tensors that a node yields; 0 for nodes without a known value."""
    leaves = tree_leaves(node.meta.get("val"))
    return sum(x.numel() * x.element_size() for x in leaves if isinstance(x, Tensor))


def needs(graph: Graph) -> dict[Node, tuple[Node, ...]]:
    """What must come before each node: its operands and whatever it may not overtake."""
    found: dict[Node, tuple[Node, ...]] = {}
    barrier: Node | None = None
    since: list[Node] = []  # after the barrier
    last: Node | None = None  # whose order among its kind counts
    for node in graph.nodes:
        before = list(node.all_input_nodes)
        if node.op != "placeholder" and barrier is not None:
            before.append(barrier)
        if writes(node) or node.op == "output":
            before += since
            barrier, since = node, []
        else:
            since.append(node)
        if is_random(node) or (name_of(node) and not is_collective(node) and not is_wait(node)):
            before += [last] if last is not None else []
            last = node
        found[node] = tuple(dict.fromkeys(before))
    return found


class Ancestry:
    """For each node the set of those that must come before it, as bits of one integer.

    Args:
        nodes: in an order in which each follows what it needs.
        needed: of each node what must come right before it.
    """

    def __init__(self, nodes: Sequence[Node], needed: Needs) -> None:
        self._number = {node: i for i, node in enumerate(nodes)}
        self._before: dict[Node, int] = {}
        for node in nodes:
            bits = 0
            for source in needed[node]:
                bits |= self._before[source] | 1 << self._number[source]
            self._before[node] = bits

    def follows(self, node: Node, other: Node) -> bool:
        """Whether `other` must come before `node`."""
        return bool(self._before[node] >> self._number[other] & 1)

    def unite(self, nodes: Sequence[Node]) -> None:
        """Let nodes that do not follow each other be one: each needs what any of them needs."""
        mask = whole = 0
        for node in nodes:
            mask |= 1 << self._number[node]
            whole |= self._before[node]
        whole &= ~mask
        for node, before in self._before.items():
            if before & mask:
                self._before[node] = before | whole | mask
        for node in nodes:
            self._before[node] = whole


def settled(nodes: Iterable[Node], needed: Needs) -> Iterator[Node]:
    """The nodes in the given order, each preceded by what it needs; every node once.

    What a node needs and did not come yet is put right before it, so nothing comes later than the
    order says.
    """
    done: dict[Node, None] = {}
    for root in nodes:
        yield from emitted(root, needed, done)


def emitted(root: Node, needed: Needs, done: dict[Node, None]) -> Iterator[Node]:
    """The node and what it needs, except what is in `done`, which grows."""
    if root in done:
        return
    pending = {root: iter(needed[root])}  # in order of insertion, a stack
    while pending:
        node = next(reversed(pending))
        following = next((n for n in pending[node] if n not in done), None)
        if following is None:
            del pending[node]
            done[node] = None
            yield node
        elif following in pending:
            raise ValueError(f"{following} and {node} each need the other")
        else:
            pending[following] = iter(needed[following])


def rearrange(graph: Graph, order: Sequence[Node]) -> None:
    """Put the nodes of a graph into the given order, which must name each of them once."""
    anchor = graph._root
    for node in order:
        anchor.append(node)
        anchor = node
    graph.lint()
