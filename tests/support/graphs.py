"""Graphs of small steps, and what tests of passes ask of them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from lockstep import Lockstep, Net, equal
from torch import Tensor
from torch.fx import GraphModule, Node

from shardwise.meshlib.record import Collective
from shardwise.ops.transforms.bucketing import bucketed, deduplicated
from shardwise.ops.transforms.order import is_collective, name_of
from shardwise.ops.transforms.overlap import overlapped

NETS = {
    "sharded": Net(),
    "three ranks": Net(ranks=3, layers=1, width=12),
    "whole": Net(is_sharded=False),
}


@functools.cache
def graph_of(net: Net) -> GraphModule:
    """The graph of a net's step; copy it before a pass."""
    return net.graph()


def counts(module: GraphModule) -> dict[str, int]:
    """How many collectives of each name a graph has."""
    found: dict[str, int] = {}
    for node in module.graph.nodes:
        if is_collective(node):
            found[name_of(node)] = found.get(name_of(node), 0) + 1
    return found


def collectives(module: GraphModule) -> list[Node]:
    """The nodes that issue one, in order."""
    return [node for node in module.graph.nodes if is_collective(node)]


def ranks(*shape: int, n: int = 2, count: int = 1) -> list[list[Tensor]]:
    """Inputs of every rank."""
    return [[torch.randn(shape) for _ in range(count)] for _ in range(n)]


def noted(node: Node, phase: Any, size: int = 4) -> None:
    """Give a collective a record, as the lowering does."""
    node.meta["collective"] = Collective(
        "all_gather", ("data",), 2, size, 4.0 * size, torch.float32, (size,), None, phase,
        "train.py:1", "use", f"w{size}", "use",
    )  # fmt: skip


def same_bits(module: GraphModule, before: GraphModule, inputs: list[list[Tensor]]) -> bool:
    """Whether both graphs give the same results on all ranks."""
    return equal(Lockstep(module)(inputs), Lockstep(before)(inputs))


def passed(module: GraphModule, *passes: Callable[[GraphModule], Any]) -> GraphModule:
    """A copy after some passes."""
    module = copy.deepcopy(module)
    for one in passes:
        assert one(module) is module
    return module


def everything(module: GraphModule, window: int = 300, cap: int = 400) -> GraphModule:
    """All passes, with limits that bind in small graphs."""
    deduplicated(module)
    bucketed(module, cap=cap, window=6)
    return overlapped(module, window=window)
