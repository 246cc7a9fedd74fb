"""New nodes in a graph of one device's ops, and sorting them to where they can stand."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .order import rearrange, writes

Node = torch.fx.Node
Module = torch.fx.GraphModule


def maker(module: Module, place: Node, like: Node | None = None) -> Callable[..., Node]:
    """Makes nodes before `place`, with the types of their results.

    Args:
        module: whose graph it is.
        place: the node before which they stand.
        like: a node of one tensor, where `place` gives several.
    """

    def make(target: Any, *args: Any, **kwargs: Any) -> Node:
        with module.graph.inserting_before(place):
            node = module.graph.call_function(target, args, kwargs)
        given, named = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with (like or place).meta["val"].fake_mode:
            node.meta["val"] = target(*given, **named)
        return node

    return make


def in_order(module: Module) -> None:
    """Sort the nodes so that each follows its operands, as near to where it stood as can be.

    For nodes that were moved and made within one of the `stretches`: then none passes a write.
    """
    nodes = list(module.graph.nodes)
    number = {node: i for i, node in enumerate(nodes)}
    missing = {node: len(node.all_input_nodes) for node in nodes}
    ready = [i for i, node in enumerate(nodes) if not missing[node]]
    heapq.heapify(ready)
    order = []
    while ready:
        node = nodes[heapq.heappop(ready)]
        order.append(node)
        for user in node.users:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, number[user])
    rearrange(module.graph, order)


def stretches(module: Module) -> dict[Node, int]:
    """For each node how many ops before it write to a tensor that others see."""
    found, count = {}, 0
    for node in module.graph.nodes:
        found[node] = count
        count += writes(node)
    return found


class Ancestry:
    """For each node the set of those before it that it needs, as bits of one integer."""

    def __init__(self, module: Module) -> None:
        self._number = {node: i for i, node in enumerate(module.graph.nodes)}
        self._before: dict[Node, int] = {}
        for node in module.graph.nodes:
            bits = 0
            for source in node.all_input_nodes:
                bits |= self._before[source] | 1 << self._number[source]
            self._before[node] = bits

    def related(self, node: Node, other: Node) -> bool:
        """Whether either needs the other."""
        one = self._before[node] >> self._number[other]
        return bool((one | self._before[other] >> self._number[node]) & 1)

    def unite(self, nodes: Sequence[Node]) -> None:
        """Let nodes that do not depend on each other be one: each needs what any of them needs."""
        mask = sum(1 << self._number[node] for node in nodes)
        whole = 0
        for node in nodes:
            whole |= self._before[node]
        for node in nodes:
            self._before[node] = whole
        for node, before in self._before.items():
            if before & mask:
                self._before[node] = before | whole | mask
