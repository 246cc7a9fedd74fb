"""New nodes in a graph of one device's ops, and sorting them to where they can stand."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from .order import rearrange, writes

Node = torch.fx.Node
Module = torch.fx.GraphModule


def calls(graph: torch.fx.Graph) -> Callable[..., Node]:
    """A writer of calls, where the graph inserts them, that also fills in what they yield."""

    def call(target: Any, *args: Any, **kwargs: Any) -> Node:
        node = graph.call_function(target, args, kwargs)
        given, named = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        fake = next(x for x in tree_leaves((given, named)) if isinstance(x, FakeTensor))
        with fake.fake_mode:
            node.meta["val"] = target(*given, **named)
        return node

    return call


def maker(module: Module, place: Node) -> Callable[..., Node]:
    """Makes nodes before `place`, with the types of their results."""
    call = calls(module.graph)

    def make(target: Any, *args: Any, **kwargs: Any) -> Node:
        with module.graph.inserting_before(place):
            return call(target, *args, **kwargs)

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
