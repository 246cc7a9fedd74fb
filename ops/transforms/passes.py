"""Passes over the graph of a step: capture, reuse of donated memory, printing, compilation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

Module = torch.fx.GraphModule


def captured(flat: Callable[..., list[Tensor]], inputs: Sequence[Tensor]) -> Module:
    """The graph of a function of tensors, from one run on fake ones."""
    module = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


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
            if isinstance(result, torch.fx.Node) and result.op != "placeholder" and _alike(source, result):
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


def compiled(module: Module, inputs: Sequence[Tensor], options: Any) -> Callable[..., Any]:
    """Code of the graph: a function of the list of inputs."""
    from torch._inductor import compile as inductor

    with torch.no_grad():
        run = inductor(module, list(inputs), options=options or {})
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
