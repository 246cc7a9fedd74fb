"""Passes over the graph of a step: capture, reuse of donated memory, printing, compilation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx.experimental.proxy_tensor import make_fx

Module = torch.fx.GraphModule
LARGEST_CONSTANT = 1 << 24  # elements


def captured(flat: Callable[..., list[Tensor]], inputs: Sequence[Tensor]) -> Module:
    """The graph of a function of tensors, from one run on fake ones."""
    module = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
    module.graph = fx_graph_cse(module.graph)
    module.graph.eliminate_dead_code()
    folded(module)
    spread(module)
    module.recompile()
    return module


def spread(module: Module) -> None:
    """One entry added to each row of zeros becomes a comparison with the column's number.

    The gradient of the label's logit is one: as a scatter it is a tensor of logits' size of its
    own, as a comparison it is part of the kernel that makes the logits' gradient.
    """
    aten: Any = torch.ops.aten
    for node in module.graph.nodes:
        if node.target is not aten.scatter_add.default:
            continue
        base, dim, index, source = node.args
        width, last = node.meta["val"].shape[-1], node.meta["val"].ndim - 1
        is_zero = base.target is aten.new_zeros.default
        if not is_zero or dim % (last + 1) != last or index.meta["val"].shape[-1] != 1:
            continue
        value = node.meta["val"]
        with module.graph.inserting_before(node):
            columns = module.graph.call_function(
                aten.arange.default, (width,), {"dtype": torch.int64, "device": value.device}
            )
            hit = module.graph.call_function(aten.eq.Tensor, (columns, index))
            zero = module.graph.call_function(
                aten.scalar_tensor.default, (0.0,), {"dtype": value.dtype, "device": value.device}
            )
            chosen = module.graph.call_function(aten.where.self, (hit, source, zero))
        chosen.meta = dict(node.meta)
        node.replace_all_uses_with(chosen)
    module.graph.eliminate_dead_code()


def folded(module: Module) -> None:
    """Replace what depends on no input by its value: tables of angles, ranges, masks.

    Inductor would compute them again in every kernel that reads them: for rotary positions a power,
    a sine and a cosine for each element of queries and keys.
    """
    known: dict[torch.fx.Node, bool] = {}
    for node in module.graph.nodes:
        inputs = node.all_input_nodes
        known[node] = (
            node.op == "call_function"
            and isinstance(node.meta.get("val"), Tensor)
            and isinstance(node.target, torch._ops.OpOverload)
            and node.target.namespace == "aten"
            and torch.Tag.nondeterministic_seeded not in node.target.tags
            and not node.target._schema.is_mutable
            and all(known[n] for n in inputs)
        )
    edge = [
        node
        for node in module.graph.nodes
        if known[node]
        and any(not known[user] for user in node.users)
        and 1 < node.meta["val"].numel() <= LARGEST_CONSTANT
    ]
    values: dict[torch.fx.Node, Any] = {}

    def value(node: Any) -> Any:
        if node not in values:
            args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), value)
            values[node] = node.target(*args, **kwargs)
        return values[node]

    for number, node in enumerate(edge):
        name = f"_constant_{number}"
        with torch.no_grad():
            module.register_buffer(name, value(node))
        with module.graph.inserting_before(node):
            constant = module.graph.get_attr(name)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
    module.graph.eliminate_dead_code()


def reuse(module: Module, given: Sequence[int]) -> None:
    """Write results into donated inputs of the same shape and dtype, in order."""
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    output = next(n for n in module.graph.nodes if n.op == "output")
    results = list(output.args[0])
    free = list(range(len(results)))
    for position in given:
        source = inputs[position]
        for number in free:
            result = results[number]
            is_made = isinstance(result, torch.fx.Node) and result.op != "placeholder"
            if is_made and _alike(source, result):
                with module.graph.inserting_before(output):
                    results[number] = module.graph.call_function(
                        torch.ops.aten.copy_.default, (source, result)
                    )
                results[number].meta = dict(result.meta)
                free.remove(number)
                break
    output.args = (results,)
    module.recompile()


def _alike(a: torch.fx.Node, b: torch.fx.Node) -> bool:
    one, two = a.meta["val"], b.meta["val"]
    return (
        one.shape == two.shape
        and one.dtype == two.dtype
        and one.device == two.device
        and one.stride() == two.stride()
    )


def compiled(
    module: Module, inputs: Sequence[Tensor], options: Mapping[str, Any]
) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    """Code of the graph: a function of the list of inputs."""
    options = dict(options)
    backend = options.pop("backend", "inductor")
    if backend == "eager":
        return lambda shards: module(*shards)
    if backend != "inductor":
        raise ValueError(f"jit: unknown backend {backend!r} (known: 'inductor', 'eager')")
    from torch._inductor import compile as inductor

    with torch.no_grad():
        run: Any = inductor(module, list(inputs), options=options)
    return lambda shards: run(*shards)


def printed(module: Module) -> str:
    """One line an op: name, op, operands, and the type of the result."""
    lines = []
    for node in module.graph.nodes:
        value = node.meta.get("val")
        kind = ""
        if isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            kind = f"  {dtype}{list(value.shape)}"
        if node.op == "placeholder":
            lines.append(f"{node.name}{kind}")
        elif node.op == "call_function":
            name = str(node.target).removeprefix("aten.")
            operands = ", ".join(map(str, node.all_input_nodes))
            lines.append(f"{node.name} = {name}({operands}){kind}")
        elif node.op == "output":
            lines.append(f"return {', '.join(map(str, node.all_input_nodes))}")
    return "\n".join(lines)
