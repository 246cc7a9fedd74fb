"""Fewer collectives in the graph of a step: equal ones run once, small ones run together.

A collective costs a start besides its bytes, so many small ones of a kind are joined: their
operands are laid side by side, one collective moves them all, and its result is cut apart. Each
element meets the same elements of the other devices as before; results are the same bits wherever
the backend adds in an order that does not depend on an element's place, as it must with two devices
(a ring reduces a block of a reduce_scatter the same way wherever its elements lie; an all_reduce
over more than two devices may not).

Source: Rajbhandari et al. 2020 (arXiv 1910.02054), section 5.2, buckets of gradients.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from .nodes import calls
from .order import (
    NAMESPACE,
    Ancestry,
    arguments,
    is_collective,
    is_random,
    is_wait,
    name_of,
    needs,
    rearrange,
    settled,
    size,
    writes,
)

CAP = 25 << 20  # bytes in one joined collective
WINDOW = 64  # collectives of any kind between its first member and its last
AGAIN = ("regather", "recompute")  # phases that repeat a collective in order to save memory

# Ops of which all numbers are sizes, dims and the like.
_SHAPES = (
    "_unsafe_view", "expand", "permute", "reshape", "squeeze", "sum", "transpose", "unsqueeze",
    "view",
)  # fmt: skip

_aten: Any = torch.ops.aten
_functional: Any = torch.ops._c10d_functional


def deduplicated(module: GraphModule) -> GraphModule:
    """Run a collective once where the same value goes over the same group twice.

    Values are the same if the same ops compute them from the same inputs; only ops whose arguments
    cannot differ from device to device count, since all devices must come to the same decision. A
    collective that is repeated to save memory (its record, `meta["collective"]`, is of phase
    "regather" or "recompute") stays.

    Args:
        module: the graph of a step; changed in place.

    Returns:
        The module.

    Cost: one walk over the graph.

    >>> from torch.fx.experimental.proxy_tensor import make_fx
    >>> comm = torch.ops._c10d_functional
    >>> def step(x):
    ...     return [comm.wait_tensor(comm.all_reduce(x, "sum", "0")) * n for n in (2, 3)]
    >>> module = make_fx(step, tracing_mode="fake")(torch.ones(4))
    >>> deduplicated(module).code.count("all_reduce.default(")
    1
    """
    graph = module.graph
    numbers: dict[Node, Any] = {}  # nodes that hold the same value have the same number
    first: dict[Any, Node] = {}
    alike: dict[Node, bool] = {}  # is computed in the same way on all devices
    era = 0  # counts writes: a value before one is not the value after
    for node in list(graph.nodes):
        era += writes(node)
        numbers[node] = node
        alike[node] = node.op == "placeholder" or (
            _is_uniform(node) and all(alike[n] for n in node.all_input_nodes)
        )
        if not alike[node] or node.op == "placeholder":
            continue
        key = (era, node.target, _frozen(node.args, numbers), _frozen(node.kwargs, numbers))
        earlier = first.setdefault(key, node)
        if earlier is node or (is_collective(node) and _phase(node) in AGAIN):
            continue
        numbers[node] = numbers[earlier]
        if is_collective(node) or is_wait(node):
            node.replace_all_uses_with(earlier)
            graph.erase_node(node)
    graph.eliminate_dead_code()
    module.recompile()
    return module


def _is_uniform(node: Node) -> bool:
    """Whether an op is pure and its arguments are no numbers that a device's place decides."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or is_random(node) or writes(node):
        return False
    if target.namespace == NAMESPACE:
        return is_collective(node) or is_wait(node)
    if target.namespace != "aten":
        return False
    return target._opname in _SHAPES or all(
        not isinstance(value, (int, float, list, tuple)) or isinstance(value, bool)
        for value in (*node.args, *node.kwargs.values())
    )


def _frozen(value: Any, numbers: dict[Node, Any]) -> Any:
    """Arguments as a hashable value: nodes by number, lists as tuples, constants by their type."""
    if isinstance(value, Node):
        return numbers[value]
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v, numbers) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v, numbers)) for k, v in value.items())
    return (type(value), value)


def _phase(node: Node) -> str | None:
    entry = node.meta.get("collective")
    return None if entry is None else entry.phase


@dataclass
class _Bucket:
    """Collectives that become one."""

    members: list[Node]
    bytes: int
    start: int  # number of the first member among all collectives
    ancestors: int = 0  # of all members, as bits by position
    waits: list[list[Node]] = field(default_factory=list)


def bucketed(module: GraphModule, cap: int = CAP, window: int = WINDOW) -> GraphModule:
    """Join small collectives of the same kind, group and dtype.

    Members do not depend on each other, and never both on what the other must wait for. The joined
    collective stands where its last member stood, or before the first use of its result. What is
    repeated to save memory (see `deduplicated`) is joined only with its like.

    Args:
        module: the graph of a step, with `meta["val"]` on all nodes; changed in place.
        cap: bytes of the full tensors in one joined collective, per device.
        window: how many collectives of any kind later than its first member the last may come:
            bounds how long the first waits for the others. (Not bytes: they may differ from device
            to device, and all devices must join the same collectives.)

    Returns:
        The module. New nodes carry values and, where their members do, the joined record.

    Cost: one copy of what is moved, before and (all_gather, or where a view will not do) after.

    >>> from torch.fx.experimental.proxy_tensor import make_fx
    >>> comm = torch.ops._c10d_functional
    >>> def step(a, b):
    ...     return [comm.wait_tensor(comm.all_reduce(x, "sum", "0")) for x in (a, b)]
    >>> module = make_fx(step, tracing_mode="fake")(torch.ones(4), torch.ones(2, 3))
    >>> bucketed(module).code.count("all_reduce.default(")
    1
    """
    graph = module.graph
    buckets = _chosen(graph, cap, window)
    if not buckets:
        return module
    for bucket in buckets:
        _joined(graph, bucket)
    rearrange(graph, list(settled(list(graph.nodes), needs(graph))))
    module.recompile()
    return module


def _chosen(graph: Graph, cap: int, window: int) -> list[_Bucket]:
    """Buckets of two members and more, in the order of their last members."""
    needed = needs(graph)
    nodes = list(graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    order = Ancestry(nodes, needed)
    opened: dict[Any, _Bucket] = {}
    closed: list[_Bucket] = []
    count = 0
    for node in nodes:
        count += is_collective(node)
        key = _key(node)
        if key is None or _full_bytes(node) > cap:
            continue
        bucket = opened.get(key)
        is_open = (
            bucket is not None
            and bucket.bytes + _full_bytes(node) <= cap
            and count - bucket.start <= window
            and not any(order.follows(node, member) for member in bucket.members)
        )
        if not is_open or bucket is None:
            opened[key] = bucket = _Bucket([node], _full_bytes(node), count)
            closed.append(bucket)
            continue
        bucket.members.append(node)
        bucket.bytes += _full_bytes(node)
        order.unite(bucket.members)
    return [b for b in sorted(closed, key=lambda b: place[b.members[-1]]) if len(b.members) > 1]


def _key(node: Node) -> Any:
    """What members of a bucket have in common; None where a node cannot be a member."""
    if name_of(node) not in _JOIN or not all(is_wait(user) for user in node.users):
        return None
    given = arguments(node)
    value = given.pop("input").meta["val"]
    if not value.numel() or (not value.ndim and "group_size" in given):
        return None
    rest = tuple(given.values())
    return (node.target, rest, value.dtype, value.device, _phase(node))


def _full_bytes(node: Node) -> int:
    """Bytes of the full tensor: what a device holds before or after, whichever is more."""
    return max(size(node), size(arguments(node)["input"]))


Call = Callable[..., Node]


def _joined(graph: Graph, bucket: _Bucket) -> None:
    """Replace the members by one collective."""
    last = bucket.members[-1]
    before, cut = _JOIN[name_of(last)]
    given = [arguments(member) for member in bucket.members]
    inputs = [g["input"] for g in given]
    n = given[0].get("group_size", 1)
    with graph.inserting_before(last):
        joined = before(calls(graph), inputs, n)
        rest = {k: v for k, v in given[0].items() if k != "input"}
        whole = calls(graph)(last.target, joined, *rest.values())
    records = [member.meta.get("collective") for member in bucket.members]
    if all(entry is not None for entry in records):
        whole.meta["collective"] = merged(records)
    # Which collectives of the capture these are, for the comparison of ranks.
    whole.meta["serial"] = tuple(s for m in bucket.members for s in m.meta.get("serial", ()))
    waits = [[user for user in member.users if is_wait(user)] for member in bucket.members]
    after = next((user for user in waits[-1]), last)
    with graph.inserting_before(after):
        ready = calls(graph)(_functional.wait_tensor.default, whole)
        parts = cut(calls(graph), ready, [m.meta["val"].shape for m in bucket.members], n)
    for member, done, part in zip(bucket.members, waits, parts, strict=True):
        for wait in done:
            wait.replace_all_uses_with(part)
            graph.erase_node(wait)
        graph.erase_node(member)


def merged(records: Sequence[Any]) -> Any:
    """The record of one collective that moves what several moved."""
    first = records[0]
    same = {
        name: getattr(first, name)
        if all(getattr(r, name) == getattr(first, name) for r in records)
        else None
        for name in ("path", "op", "source")
    }
    return dataclasses.replace(
        first,
        elements=sum(r.elements for r in records),
        bytes=sum(r.bytes for r in records),
        shape=(sum(math.prod(r.shape) for r in records),),
        path=same["path"],
        op=same["op"] or "bucket",
        source=same["source"] or first.source,
    )


def _beside(call: Call, inputs: Sequence[Node], n: int) -> Node:
    """All elements in one row."""
    return call(_aten.cat.default, [call(_aten.reshape.default, x, [-1]) for x in inputs], 0)


def _beside_by_block(call: Call, inputs: Sequence[Node], n: int) -> Node:
    """One row a device: its blocks of all tensors."""
    return call(_aten.cat.default, [call(_aten.reshape.default, x, [n, -1]) for x in inputs], 1)


def _cut_rows(call: Call, ready: Node, shapes: Sequence[torch.Size], n: int) -> list[Node]:
    """Results of an all_gather: every device's row holds its blocks of all tensors."""
    rows = call(_aten.view.default, ready, [n, -1])
    return _cut(call, rows, [shape.numel() // n for shape in shapes], shapes)


def _cut_flat(call: Call, ready: Node, shapes: Sequence[torch.Size], n: int) -> list[Node]:
    """Results that lie one after the other."""
    row = call(_aten.view.default, ready, [1, -1])
    return _cut(call, row, [shape.numel() for shape in shapes], shapes)


def _cut(call: Call, rows: Node, widths: Sequence[int], shapes: Sequence[torch.Size]) -> list[Node]:
    parts, start = [], 0
    for width, shape in zip(widths, shapes, strict=True):
        part = call(_aten.slice.Tensor, rows, 1, start, start + width)
        parts.append(call(_aten.reshape.default, part, list(shape)))
        start += width
    return parts


_JOIN: dict[str, tuple[Callable[..., Node], Callable[..., list[Node]]]] = {
    "all_gather_into_tensor": (_beside, _cut_rows),
    "reduce_scatter_tensor": (_beside_by_block, _cut_flat),
    "all_reduce": (_beside, _cut_flat),
}
