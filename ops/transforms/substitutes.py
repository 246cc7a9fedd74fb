"""What inductor is weak at, by kernels of this library: they take the place of a graph's nodes.

    x + y, then its rms_norm or layer_norm          one kernel; inductor's reads long rows twice
    the norm's gradient, plus what reaches x by     one kernel; inductor's reads all of it again
        other ways                                  for the weights' gradients
    gelu's gradient, and its sum over rows          one kernel; inductor's reads the gradient again

Only on a GPU, where a kernel is more than its twin, and for rows that it holds in registers.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch

from ...kernels import gelu, norms
from .nodes import in_order, maker

Node = torch.fx.Node
Module = torch.fx.GraphModule
aten: Any = torch.ops.aten


def substituted(module: Module) -> None:
    """Replace them, in place."""
    for node in list(module.graph.nodes):
        replace = _REPLACE.get(node.target)
        if replace is not None:
            replace(module, node)
    in_order(module)
    module.graph.eliminate_dead_code()


def _rms(module: Module, node: Node) -> None:
    x, shape, weight, eps = node.args
    if eps is not None:
        _norm(module, node, x, shape, weight, (), eps)


def _layer(module: Module, node: Node) -> None:
    x, shape, weight, bias, eps = node.args
    _norm(module, node, x, shape, weight, (bias,), eps)


def _norm(
    module: Module, node: Node, total: Any, shape: Any, weight: Any, bias: tuple[Any, ...], eps: Any
) -> None:
    """A norm of a sum of two tensors of its type."""
    value: torch.Tensor = total.meta["val"]
    if (
        not _takes(value, shape, weight, norms.LARGEST_FORWARD)
        or total.target is not aten.add.Tensor
    ):
        return
    terms = total.args
    if total.kwargs or any(not isinstance(t, Node) or _type(t) != _type(total) for t in terms):
        return
    make = maker(module, total)
    op: Any = norms.add_layer_norm if bias else norms.add_rms_norm
    found = make(op, *terms, weight, *bias, eps)
    parts = [make(operator.getitem, found, n) for n in range(4 if bias else 3)]
    total.replace_all_uses_with(parts[1])
    column = [*value.shape[:-1], 1]
    results = [parts[0], *(make(aten.view.default, p, column) for p in parts[2:])]
    users: list[Any] = list(node.users)
    for user in users:
        user.replace_all_uses_with(results[user.args[1]])


def _rms_gradient(module: Module, node: Node) -> None:
    grad, x, shape, rstd, weight, _ = node.args
    _norm_gradient(module, node, grad, x, shape, weight, (rstd,))


def _layer_gradient(module: Module, node: Node) -> None:
    grad, x, shape, mean, rstd, weight, _, _ = node.args
    _norm_gradient(module, node, grad, x, shape, weight, (mean, rstd))


def _norm_gradient(
    module: Module, node: Node, grad: Any, x: Any, shape: Any, weight: Any, statistics: Any
) -> None:
    results = {user.args[1]: user for user in node.users}
    if not _takes(x.meta["val"], shape, weight, norms.LARGEST_BACKWARD) or 0 not in results:
        return
    at, extra = _with_addition(results[0])
    make = maker(module, at)
    rows = list(x.meta["val"].shape[:-1])
    each = [make(aten.view.default, s, rows) for s in statistics]
    op: Any = norms.rms_norm_backward if len(each) == 1 else norms.layer_norm_backward
    found = make(op, grad, x, weight, *each, extra)
    at.replace_all_uses_with(make(operator.getitem, found, 0))
    for number, result in results.items():
        if number:
            result.replace_all_uses_with(make(operator.getitem, found, number))


def _with_addition(result: Node) -> tuple[Node, Node | None]:
    """Where the gradient is only added to another of its type: that sum, and the other."""
    users = list(result.users)
    if len(users) == 1 and users[0].target is aten.add.Tensor and not users[0].kwargs:
        others: list[Any] = [n for n in users[0].args if n is not result]
        is_node = len(others) == 1 and isinstance(others[0], Node)
        if is_node and _type(others[0]) == _type(result) and not _needs(others[0], result.args[0]):
            return users[0], others[0]
    return result, None


def _needs(node: Any, other: Any) -> bool:
    """Whether a node is computed from another."""
    seen, left = {node}, [node]
    while left:
        new = set(left.pop().all_input_nodes) - seen
        seen |= new
        left.extend(new)
    return other in seen


def _gelu_gradient(module: Module, node: Node) -> None:
    """gelu's gradient where it is also summed over all dims but the last."""
    grad, x = node.args
    value: torch.Tensor = node.meta["val"]
    rows = list(range(value.ndim - 1))
    users: list[Any] = [u for u in node.users if u.target is aten.sum.dim_IntList]
    users = [u for u in users if u.args[1] and not u.kwargs]
    sums = [u for u in users if sorted(d % value.ndim for d in u.args[1]) == rows]
    if len(sums) != 1 or value.dtype == torch.float64 or math.prod(value.shape[:-1]) < 256:
        return
    make = maker(module, node)
    is_tanh = node.kwargs.get("approximate", "none") == "tanh"
    found = make(gelu.gelu_backward_sum, grad, x, is_tanh)
    node.replace_all_uses_with(make(operator.getitem, found, 0))
    total = make(operator.getitem, found, 1)
    shape = list(sums[0].meta["val"].shape)
    sums[0].replace_all_uses_with(make(aten.view.default, total, shape))


def _type(node: Any) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape), node.meta["val"].dtype


def _takes(value: torch.Tensor, shape: Any, weight: Any, largest: int) -> bool:
    """Whether the kernels take rows like these."""
    fits = len(shape) == 1 and shape[0] <= largest and value.dtype != torch.float64
    return fits and weight is not None


_REPLACE = {
    aten._fused_rms_norm.default: _rms,
    aten.native_layer_norm.default: _layer,
    aten._fused_rms_norm_backward.default: _rms_gradient,
    aten.native_layer_norm_backward.default: _layer_gradient,
    aten.gelu_backward.default: _gelu_gradient,
}
