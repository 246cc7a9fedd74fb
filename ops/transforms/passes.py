"""Passes over the graph of a step: simplification, reuse of donated memory, compilation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.compile_utils import fx_graph_cse

from .options import Options
from .order import is_collective
from .overlap import INDUCTOR
from .products import biased, joined
from .replay import Replay
from .substitutes import substituted
from .unrolled import unrolled

Module = torch.fx.GraphModule
# Inductor joins what it computes itself by computing all parts at each place and choosing.
ON_GPU = {"max_pointwise_cat_inputs": 1}
LARGEST_CONSTANT = 1 << 24  # elements


def simplified(module: Module) -> None:
    """Merge what is computed twice, drop what nothing reads, fold what depends on no input."""
    module.graph = fx_graph_cse(module.graph)
    module.graph.eliminate_dead_code()
    folded(module)
    spread(module)
    module.recompile()


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

    with torch.no_grad():
        found = [value(node) for node in edge]  # all, before any node is replaced
    for number, node in enumerate(edge):
        name = f"_constant_{number}"
        module.register_buffer(name, found[number])
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
                results[number].meta = {"val": result.meta["val"]}
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
    module: Module, inputs: Sequence[Tensor], options: Options
) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    """Code of the graph: a function of the list of inputs."""
    if options.backend == "eager":
        return lambda shards: module(*shards)
    from torch._inductor import compile as inductor

    communicates = any(map(is_collective, module.graph.nodes))
    ours: Mapping[str, Any] = INDUCTOR if communicates and "overlap" in options.chosen else {}
    if on_gpu := any(x.device.type == "cuda" for x in inputs):
        for change in (unrolled, biased, joined, substituted):
            change(module)
        module.recompile()
        ours = {**ours, **ON_GPU}
    with torch.no_grad():
        code: Any = inductor(module, list(inputs), options={**ours, **options.inductor})

    def run(shards: Sequence[Tensor]) -> Sequence[Tensor]:
        return code(*shards)

    is_recorded = options.cuda_graph if options.cuda_graph is not None else not communicates
    return Replay(run, written(module)) if on_gpu and is_recorded else run


def written(module: Module) -> list[int]:
    """Positions of the inputs into which results are written."""
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    copies = [n for n in module.graph.nodes if n.target is torch.ops.aten.copy_.default]
    return sorted(inputs.index(n.args[0]) for n in copies if n.args[0] in inputs)
