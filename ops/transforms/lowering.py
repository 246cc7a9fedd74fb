"""From readable collectives to what inductor knows: capture and expansion.

A capture shows each collective as one op of `meshlib/traced.py`. On a simulated mesh it then opens
into plain tensor ops on the shards. On a distributed mesh it becomes a *functional collective* of
torch (`_c10d_functional.*` and `wait_tensor`) between local ops that put blocks in order. There
`node.meta["collective"]` is the record's `Collective`, and `node.meta["serial"]` names which one of
its group it is, alike on all ranks: (mesh, axes, number), of a joined one several. Every result is
new memory: inductor computes wrong numbers from ops that return views of their inputs.

Ranks must issue the same collectives in the same order although constants in their graphs differ.
So nothing here removes or merges a collective; `pipeline` compares the orders of all ranks after
passes that do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed._functional_collectives  # marks waits as ops with effects
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import has_side_effect
from torch.utils import _pytree as pytree

from ...meshlib import record, traced
from ...meshlib.distributed import DistributedTransport
from ...meshlib.record import Collective, Log
from ...meshlib.transport import Axes
from ...meshlib.wire import Group, join, stack, wire

Module = torch.fx.GraphModule
Node = torch.fx.Node
_functional: Any = torch.ops._c10d_functional
_KINDS: dict[Any, str] = {}
for _kind in traced.ARGUMENTS:
    _packet = getattr(getattr(torch.ops, traced.NAMESPACE), _kind)
    for _overload in (_packet.default, _packet.shards):
        _KINDS[_overload] = _kind
        # An unread collective still has to run: other devices take part in it.
        has_side_effect(_overload)


def captured(flat: Callable[..., list[Tensor]], inputs: Sequence[Tensor]) -> Module:
    """The graph of a function of tensors, from one run on fake ones: a collective is one op."""
    module = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
    module.graph.eliminate_dead_code()
    return module


def annotated(module: Module, log: Log) -> None:
    """Put the record's entry on each collective of a capture."""
    serials: dict[tuple[str, Axes], int] = {}
    for node in module.graph.nodes:
        kind = _KINDS.get(node.target)
        if kind is None:
            continue
        transport, axes, extra, number = traced.call(node.args[1:], kind)
        entry = (
            log.collectives[number] if number >= 0 else _entry(node, kind, transport, axes, extra)
        )
        node.meta["collective"] = entry
        at = (node.args[1], axes)
        serials[at] = serials.get(at, -1) + 1
        node.meta["serial"] = ((*at, serials[at]),)


def named(module: Module, names: Sequence[str]) -> None:
    """Call the inputs of a graph after the arguments that they come from."""
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node, name in zip(inputs, names, strict=True):
        node._rename(name)


def _entry(node: Node, kind: str, transport: Any, axes: Axes, extra: Sequence[Any]) -> Collective:
    """The entry of a collective that nobody wrote down."""
    first: Any = pytree.tree_leaves(node.args[0])[0]
    x: Tensor = first.meta["val"]
    n = math.prod(transport.axes[a] for a in axes)
    elements = record.volume(kind, x.numel(), n)
    reduce = extra[0] if kind == "all_reduce" else None
    return Collective(
        kind=cast(Any, kind),
        axes=tuple(a for a in axes if transport.axes[a] > 1),
        size=n,
        elements=elements,
        bytes=elements * x.element_size(),
        dtype=x.dtype,
        shape=tuple(x.shape),
        reduce=reduce,
        phase="forward",
        source="",
        op="",
        path=None,
        why="planned",
    )


def copied(module: Module) -> Module:
    """The same graph once more: passes change graphs in place."""
    graph = torch.fx.Graph()
    output = graph.graph_copy(module.graph, {}, return_output_node=True)
    result, old = cast(Any, output)
    graph.output(result).meta = dict(old.meta)
    return torch.fx.GraphModule(module, graph)


def simulated(module: Module) -> None:
    """Open the collectives of simulated meshes into ops on the shards."""
    _expand(module, {"simulated"})


def lowered(module: Module) -> None:
    """Turn the collectives of distributed meshes into functional ones."""
    _expand(module, {"distributed"})


def collectives(module: Module) -> list[Node]:
    """Nodes that stand for a collective, in order."""
    return [node for node in module.graph.nodes if "collective" in node.meta]


def is_distributed(module: Module) -> bool:
    """Whether a capture communicates between processes."""
    return any(
        traced.call(node.args[1:], _KINDS[node.target])[0].name == "distributed"
        for node in module.graph.nodes
        if node.target in _KINDS
    )


def _expand(module: Module, transports: set[str]) -> None:
    graph = module.graph
    pieces: dict[Any, Module] = {}
    seen: dict[Any, Node] = {}  # local ops on what expansions read: one node each
    for node in list(graph.nodes):
        kind = _KINDS.get(node.target)
        if kind is None:
            if _is_writing(node):
                seen.clear()  # a value read before is not the value after
            continue
        transport, axes, extra, _ = traced.call(node.args[1:], kind)
        if transport.name not in transports:
            continue
        operands = pytree.tree_leaves(node.args[0])
        values = [operand.meta["val"] for operand in operands]
        key = (kind, node.args[1:-1], *((v.shape, v.stride(), v.dtype, v.device) for v in values))
        key = _frozen(key)
        piece = pieces.get(key)
        if piece is None:
            piece = pieces[key] = _traced(kind, transport, axes, extra, values)
        with graph.inserting_before(node):
            results = _inlined(graph, piece, operands, node.meta, seen)
        if len(results) == 1 and isinstance(node.meta["val"], Tensor):
            node.replace_all_uses_with(results[0])
        for user in list(node.users):  # items of the list of shards
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    module.recompile()


def _frozen(x: Any) -> Any:
    return tuple(map(_frozen, x)) if isinstance(x, list | tuple) else x


def _traced(
    kind: str, transport: Any, axes: Axes, extra: Sequence[Any], values: Sequence[Tensor]
) -> Module:
    """One collective as a graph of its own, on the same fake tensors."""
    if isinstance(transport, DistributedTransport):
        group = transport._group(axes)
        assert group is not None
        name = transport.named_group(axes)

        def run(*shards: Tensor) -> list[Tensor]:
            return [_LOWER[kind](shards[0], group, name, *extra)]
    else:

        def run(*shards: Tensor) -> list[Tensor]:
            return list(getattr(transport, kind)(list(shards), axes, *extra))

    with torch.no_grad():
        return make_fx(run)(*values)


def _inlined(
    graph: torch.fx.Graph,
    piece: Module,
    operands: Sequence[Node],
    meta: dict[str, Any],
    seen: dict[Any, Node],
) -> list[Node]:
    """Copy a collective's graph in front of its op; returns its results."""
    env: dict[Node, Node] = {}
    inputs = iter(operands)
    is_noted = False
    has_moved = False
    is_local = not any(map(_is_functional, piece.graph.nodes))
    for node in piece.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(inputs)
        elif node.op == "output":
            return [env[result] for result in node.args[0]]
        else:
            is_moving = _is_functional(node)
            args = torch.fx.map_arg((node.args, node.kwargs), env.__getitem__)
            same = None if has_moved or is_moving else (node.target, _frozen(args[0]))
            if same in seen and not node.kwargs:
                env[node] = seen[same]
                continue
            new = env[node] = graph.node_copy(node, env.__getitem__)
            if same is not None and not node.kwargs:
                seen[same] = new
            has_moved = has_moved or is_moving
            if not is_noted and (is_moving or is_local):
                is_noted = True
                new.meta |= {k: meta[k] for k in ("collective", "serial")}
    raise AssertionError("a graph without an output")


def _is_writing(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_functional(node: Node) -> bool:
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace == "_c10d_functional"
        and target is not _functional.wait_tensor.default
    )


def _reduced(x: Tensor, op: str, name: str) -> Tensor:
    """The group's sum, maximum or minimum; a bool's sum is the maximum of its bytes."""
    is_bool = x.dtype == torch.bool
    sent = x.to(torch.uint8) if is_bool else x.contiguous()
    total = _functional.wait_tensor(
        _functional.all_reduce(sent, "max" if is_bool and op == "sum" else op, name)
    )
    return total.to(torch.bool) if is_bool else total


def _all_reduce(x: Tensor, group: Group, name: str, op: str) -> Tensor:
    return _reduced(x, op, name)


def _all_gather(x: Tensor, group: Group, name: str, dim: int) -> Tensor:
    parts = _functional.all_gather_into_tensor(wire(x), group.size, name)
    rows = _functional.wait_tensor(parts).view(x.dtype).view(group.size, *x.shape)
    return join(rows, group, dim)


def _reduce_scatter(x: Tensor, group: Group, name: str, dim: int) -> Tensor:
    is_bool = x.dtype == torch.bool
    rows = stack(x.to(torch.uint8) if is_bool else x.contiguous(), group, dim)
    part = _functional.reduce_scatter_tensor(
        rows.view(-1), "max" if is_bool else "sum", group.size, name
    )
    out = _functional.wait_tensor(part).view(rows.shape[1:])
    return out.to(torch.bool) if is_bool else out


def _all_to_all(x: Tensor, group: Group, name: str, split_dim: int, concat_dim: int) -> Tensor:
    rows = stack(x.contiguous(), group, split_dim)
    sent = wire(rows)
    sizes = [sent.numel() // group.size] * group.size
    moved = _functional.wait_tensor(_functional.all_to_all_single(sent, sizes, sizes, name))
    return join(moved.view(x.dtype).view(rows.shape), group, concat_dim)


def _permute(x: Tensor, group: Group, name: str, pairs: Sequence[tuple[int, int]]) -> Tensor:
    targets = [group.order[t] for s, t in pairs if s == group.position]
    origin = next((s for s, t in pairs if t == group.position), None)
    sent = wire(x)
    sends, receives = [0] * group.size, [0] * group.size
    for target in targets:
        sends[target] = sent.numel()
    if origin is not None:
        receives[group.order[origin]] = sent.numel()
    leaving = sent.repeat(len(targets)) if len(targets) > 1 else sent[: sum(sends)]
    moved = _functional.wait_tensor(_functional.all_to_all_single(leaving, receives, sends, name))
    if origin is None:
        return x.new_zeros(x.shape)
    return moved.view(x.dtype).view(x.shape)


def _broadcast(x: Tensor, group: Group, name: str, root: int) -> Tensor:
    moved = _functional.wait_tensor(_functional.broadcast(wire(x), group.order[root], name))
    return moved.view(x.dtype).view(x.shape)


def _reduce(x: Tensor, group: Group, name: str, root: int) -> Tensor:
    """As an all_reduce, which torch has as a functional collective; zeros on the others."""
    total = _reduced(x, "sum", name)
    return total if group.position == root else torch.zeros_like(total)


_LOWER: dict[str, Callable[..., Tensor]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "permute": _permute,
    "broadcast": _broadcast,
    "reduce": _reduce,
}
