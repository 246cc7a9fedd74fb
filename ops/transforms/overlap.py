"""Communication beside computation: collectives start early, waits come late, memory is bounded.

Between its start and its wait a collective holds its operand and its result. `overlapped` walks
over the graph once, as the device will: it starts what will be needed next as long as the bytes in
flight stay within a window, and waits for a result where it is first used. What the graph starts
at some point (a gradient's reduce_scatter) is not held back any further: the oldest in flight is
waited for instead.

Inductor chooses an order of its own after ours unless told otherwise: compile with `INDUCTOR`.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from .order import (
    emitted,
    is_collective,
    is_view,
    is_wait,
    needs,
    rearrange,
    size,
)

INFLIGHT = 512 << 20  # bytes

INDUCTOR: Mapping[str, Any] = {
    # It would choose among several orders by their peak, and undo ours.
    "reorder_for_peak_memory": False,
}

_MOVES = ("reshape", "cat", "_to_copy", "clone", "slice", "_unsafe_view")  # and every view


def overlapped(module: GraphModule, window: int = INFLIGHT) -> GraphModule:
    """Start collectives as early as their operands and a window of memory allow; wait at first use.

    A collective that needs another's result starts where the graph has it, since starting it
    earlier would mean to wait there. All other nodes keep their order.

    Args:
        module: the graph of a step, with `meta["val"]`; changed in place.
        window: bytes of operands and results in flight at once; a larger collective flies alone.

    Returns:
        The module: the same results, bit for bit.

    Cost: none but memory, at most `window` bytes.

    >>> from torch.fx.experimental.proxy_tensor import make_fx
    >>> comm = torch.ops._c10d_functional
    >>> def step(x, w):
    ...     whole = comm.wait_tensor(comm.all_gather_into_tensor(w, 2, "0"))
    ...     return x.sin().cos() + whole
    >>> module = make_fx(step, tracing_mode="fake")(torch.ones(4), torch.ones(2))
    >>> [n.name for n in overlapped(module).graph.nodes][2:]
    ['all_gather_into_tensor', 'sin', 'cos', 'wait_tensor', 'add', 'output']
    """
    graph = module.graph
    if any(is_collective(node) for node in graph.nodes):
        rearrange(graph, _Walk(graph, window).order())
        module.recompile()
    return module


class _Walk:
    """One walk over the graph: what is in flight, and the order that comes of it."""

    def __init__(self, graph: Graph, window: int) -> None:
        self.window = window
        self.needed = needs(graph)
        self.nodes = list(graph.nodes)
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.late = self._late()
        self.prologue = self._prologue()
        self.fixed = [
            n
            for n in self.nodes
            if n not in self.late and n not in self.prologue and not is_collective(n)
        ]
        self.use = self._first_uses()
        self.done: dict[Node, None] = {}
        self.flying: dict[Node, int] = {}  # collective -> bytes, oldest first
        self.result: list[Node] = []

    def _late(self) -> dict[Node, None]:
        """Waits, and what cuts and shapes their results: all of it happens at first use."""
        found: dict[Node, None] = {}
        for node in self.nodes:
            inputs = self.needed[node]
            if is_wait(node) or (_moves(node) and inputs and all(n in found for n in inputs)):
                found[node] = None
        return found

    def _prologue(self) -> dict[Node, None]:
        """What casts, shapes and joins operands, for collectives alone."""
        found: dict[Node, None] = {}
        for node in reversed(self.nodes):
            is_own = node.users and all(is_collective(u) or u in found for u in node.users)
            if is_own and _moves(node) and node not in self.late:
                found[node] = None
        return found

    def _first_uses(self) -> dict[Node, int]:
        """Place of the first node that stays put, or of the first collective, to read each result.

        A node that is read by none has the place of the end.
        """
        end = len(self.nodes)
        use: dict[Node, int] = {}
        for node in reversed(self.nodes):
            places = [end]
            for user in node.users:
                moves = user in self.late or user in self.prologue
                places.append(use[user] if moves else self.place[user])
            use[node] = min(places)
        return use

    def _earliest(self, node: Node) -> int | None:
        """The place after which a collective may start; None if that means waiting for another."""
        latest, stack = -1, [node]
        while stack:
            for before in self.needed[stack.pop()]:
                if before in self.late or is_collective(before):
                    return None
                if before in self.prologue:
                    stack.append(before)
                else:
                    latest = max(latest, self.place[before])
        return latest

    def order(self) -> list[Node]:
        """All nodes in their new order."""
        due = {self.place[n]: n for n in self.nodes if is_collective(n)}
        ready: dict[int, list[Node]] = {}
        for node in due.values():
            earliest = self._earliest(node)
            if earliest is not None:
                ready.setdefault(earliest, []).append(node)
        waiting: list[tuple[int, int]] = []  # may start: by first use, then place
        num_given = sum(n.op == "placeholder" for n in self.nodes)
        for i, node in enumerate(self.nodes):
            if i in due:
                self._start(node)
            elif node not in self.late and node not in self.prologue:
                self._emit(node)
            for collective in ready.get(i, ()):
                heapq.heappush(waiting, (self.use[collective], self.place[collective]))
            while waiting and i >= num_given - 1:
                collective = due[waiting[0][1]]
                if collective not in self.done:
                    if self.flying and self._flight(collective) > self.window:
                        break
                    self._start(collective)
                heapq.heappop(waiting)
        return self.result

    def _flight(self, node: Node) -> int:
        """Bytes in flight once the collective has started."""
        return sum(self.flying.values()) + _bytes(node)

    def _start(self, node: Node) -> None:
        if node in self.done:
            return
        while self.flying and self._flight(node) > self.window:
            oldest = next(iter(self.flying))
            for wait in [user for user in oldest.users if is_wait(user)]:
                self._emit(wait)
            self.flying.pop(oldest, None)  # one that nobody waits for
        self._emit(node)

    def _emit(self, root: Node) -> None:
        """Write a node and what it needs, and keep account of what flies."""
        for node in emitted(root, self.needed, self.done):
            self.result.append(node)
            if is_collective(node):
                self.flying[node] = _bytes(node)
            elif is_wait(node):
                self.flying.pop(node.args[0], None)  # pyright: ignore


def _moves(node: Node) -> bool:
    """Whether a node only places elements."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    return is_view(node) or target._opname in _MOVES


def _bytes(node: Node) -> int:
    """What a collective holds while it flies."""
    return size(node) + sum(size(operand) for operand in node.all_input_nodes)
