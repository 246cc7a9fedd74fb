"""Operations on lists of tensors as one operation a tensor.

Inductor makes one kernel of a `_foreach_` operation, whose every program finds out first which
tensor it is at and loads 8 bytes a thread; a kernel for each tensor reads 16 and can also be made
one with what comes before and after. Few large tensors, as stacked layers are, gain by it.
"""

from __future__ import annotations

from typing import Any

import torch

from .nodes import in_order, maker
from .order import is_view

Node = torch.fx.Node
Module = torch.fx.GraphModule
aten: Any = torch.ops.aten
FEWEST = 1 << 16  # elements of a tensor on average: a kernel of its own must be worth a launch


def unrolled(module: Module) -> None:
    """Unroll them, in place.

    One that writes into its first operands becomes one that does not, where nothing else can see
    them: they are results of such operations themselves.
    """
    place = {node: i for i, node in enumerate(module.graph.nodes)}
    made: set[Node] = set()
    for node in list(place):
        name = getattr(node.target, "__name__", "")
        if node.op == "call_function" and name.startswith("_foreach_"):
            name, _, overload = name.removeprefix("_foreach_").partition(".")
            _unroll(module, node, name, overload, place, made)
    in_order(module)
    module.graph.eliminate_dead_code()


def _unroll(
    module: Module,
    node: Node,
    name: str,
    overload: str,
    place: dict[Node, int],
    made: set[Node],
) -> None:
    """One operation in the place of each result."""
    operands: Any = node.args[0]
    sizes = [n.meta["val"].numel() for n in operands]
    writes, name = name.endswith("_"), name.removesuffix("_")
    form = _OVERLOADS.get((name, overload))
    if form is None or sum(sizes) < FEWEST * len(sizes):
        return
    if writes and not made.issuperset(operands):
        return
    if writes and any(is_view(user) for n in operands for user in n.users):
        return
    make, single = maker(module, node), getattr(getattr(aten, name), form)
    results = {user.args[1]: user for user in node.users}
    for number, operand in enumerate(operands):
        args = [a[number] if isinstance(a, list | tuple) else a for a in node.args]
        kwargs = dict(node.kwargs)
        if name.startswith("addc") and len(args) == 4:
            kwargs["value"] = args.pop()
        new = make(single, *args, **kwargs)
        made.add(new)
        if number in results:
            results[number].replace_all_uses_with(new)
        if writes:  # who reads it later reads what was written
            for user in list(operand.users):
                if place.get(user, -1) > place[node]:
                    user.replace_input_with(operand, new)
    for result in results.values():
        module.graph.erase_node(result)
    module.graph.erase_node(node)


# (operation, its form for lists) -> its form for one tensor
_OVERLOADS = {
    **{(n, "List"): "Tensor" for n in ("add", "sub", "mul", "div")},
    **{(n, "Scalar"): "Scalar" for n in ("add", "sub", "mul", "div", "lerp")},
    **{(n, "ScalarList"): "Scalar" for n in ("add", "sub", "mul", "div")},
    **{(n, "Tensor"): "Tensor" for n in ("add", "mul", "div")},
    **{(n, "Scalar"): "default" for n in ("addcmul", "addcdiv")},
    ("lerp", "List"): "Tensor",
    ("pow", "Scalar"): "Tensor_Scalar",
    ("maximum", "List"): "default",
    ("minimum", "List"): "default",
    **{(n, "default"): "default" for n in ("sqrt", "rsqrt", "neg", "abs", "reciprocal", "sign")},
}
