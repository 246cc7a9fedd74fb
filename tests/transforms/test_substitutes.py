"""Norms and gelus of a graph by kernels: equal values, and only where the kernels take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optree
import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from shardwise.ops.transforms.substitutes import substituted

aten: Any = torch.ops.aten
N, W = 300, 8
# float32: sums over rows are formed in another order
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.1}


@torch.library.custom_op("substitutes_test::rms", mutates_args=())
def rms(x: Tensor, weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    """Stands for `aten._fused_rms_norm`, which a CPU takes apart."""
    y, rstd = aten._fused_rms_norm(x, [W], weight, eps)
    return y.contiguous(), rstd.contiguous()


@rms.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x[..., :1])


@torch.library.custom_op("substitutes_test::rms_grad", mutates_args=())
def rms_grad(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Stands for `aten._fused_rms_norm_backward`."""
    normal, g = x * rstd, grad * weight
    dx = rstd * (g - normal * (g * normal).mean(-1, keepdim=True))
    return dx, (grad * normal).flatten(0, -2).sum(0)


@rms_grad.register_fake
def _(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def graph_of(f: Callable[..., Any], inputs: Sequence[Tensor]) -> GraphModule:
    """A graph with the nodes that a GPU's would have."""
    module = make_fx(f, tracing_mode="fake")(*inputs)
    for node in module.graph.nodes:
        args: Any = node.args
        if node.target is torch.ops.substitutes_test.rms.default:
            node.target = aten._fused_rms_norm.default
            node.args = (args[0], [W], *args[1:])
        elif node.target is torch.ops.substitutes_test.rms_grad.default:
            node.target = aten._fused_rms_norm_backward.default
            node.args = (args[0], args[1], [W], args[2], args[3], [True, True])
    module.recompile()
    return module


def names(f: Callable[..., Any], *inputs: Tensor) -> list[str]:
    """Kernels in the graph after the pass, which keeps values and does nothing twice."""
    module = graph_of(f, inputs)
    want = optree.tree_leaves(f(*inputs))
    substituted(module)
    module.graph.lint()
    module.recompile()
    first = str(module.graph)
    substituted(module)
    assert str(module.graph) == first
    tolerance = CLOSE.get(inputs[0].dtype, 1e-12)
    for a, b in zip(optree.tree_leaves(module(*inputs)), want, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    found = (str(n.target) for n in module.graph.nodes if n.op == "call_function")
    return sorted(n.split(".")[1] for n in found if n.startswith("shardwise."))


def drawn(*shapes: Sequence[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(*s, generator=rng).to(dtype) for s in shapes]


def layer(x: Tensor, w: Any, b: Any) -> Any:
    return aten.native_layer_norm(x, [W], w, b, 1e-5)


ROWS = ((2, N, W), (2, N, W), (W,), (W,))
FORWARD: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "rms": (lambda x, y, w, b: rms(x + y, w, 1e-5), ["add_rms_norm"]),
    "layer": (lambda x, y, w, b: layer(x + y, w, b), ["add_layer_norm"]),
    "no bias": (lambda x, y, w, b: layer(x + y, w, None), ["add_layer_norm"]),
    "sum read": (lambda x, y, w, b: [z := x + y, *rms(z, w, 1e-5), z * 2], ["add_rms_norm"]),
    "two norms": (
        lambda x, y, w, b: [z := x + y, layer(z, w, b), layer(z, b, w)],
        ["add_layer_norm"],
    ),
    "weight after": (lambda x, y, w, b: [z := x + y, rms(z, w * 2, 1e-5)], ["add_rms_norm"]),
    "no sum": (lambda x, y, w, b: [rms(x, w, 1e-5), layer(x, w, b)], []),
    "no weight": (lambda x, y, w, b: [rms(x + y, None, 1e-5), layer(x + y, None, None)], []),
    "no eps": (lambda x, y, w, b: rms(x + y, w, None), []),
    "a number": (lambda x, y, w, b: rms(x + 1, w, 1e-5), []),
    "a share": (lambda x, y, w, b: rms(torch.add(x, y, alpha=2), w, 1e-5), []),
    "a row": (lambda x, y, w, b: rms(x + b, w, 1e-5), []),
}


@pytest.mark.parametrize("name", FORWARD)
def test_a_norm_of_a_sum(name: str) -> None:
    f, want = FORWARD[name]
    assert names(f, *drawn(*ROWS)) == want


def test_other_types_of_norms() -> None:
    f, want = FORWARD["layer"]
    assert names(f, *drawn(*ROWS, dtype=torch.float64)) == []
    half = drawn(*ROWS, dtype=torch.bfloat16)
    assert names(lambda *xs: f(*xs)[0], *half) == want
    assert names(lambda x, y, w, b: layer(x + y.float(), w.float(), b.float()), *half) == []


def layer_grad(x: Tensor, g: Tensor, w: Any, b: Any) -> Any:
    _, mean, rstd = layer(x, w, b)
    return aten.native_layer_norm_backward(g, x, [W], mean, rstd, w, b, [True, True, True])


def rms_both(x: Tensor, g: Tensor, w: Tensor) -> Any:
    return rms_grad(g, x, rms(x, w, 1e-5)[1], w)


def needed(x: Tensor, g: Tensor, w: Tensor, b: Tensor) -> Any:
    dx, dw = rms_both(x, g, w)
    return dx + (g * dw)  # what is added needs the weight's gradient


def plus(f: Callable[..., Any], extra: Callable[..., Any]) -> Callable[..., Any]:
    def g(x: Tensor, grad: Tensor, w: Tensor, b: Tensor) -> Any:
        dx, *rest = f(x, grad, w, b)
        return [extra(dx, grad), *rest]

    return g


def rms_of(x: Tensor, g: Tensor, w: Tensor, b: Tensor) -> Any:
    return rms_both(x, g, w)


ADDED: dict[str, tuple[Callable[..., Any], int]] = {
    "alone": (lambda dx, g: dx, 0),
    "added": (lambda dx, g: dx + g.sin(), 0),
    "added from the left": (lambda dx, g: g.sin() + dx, 0),
    "twice itself": (lambda dx, g: dx + dx, 1),
    "several users": (lambda dx, g: [dx + g, dx * 2], 1),
    "a share": (lambda dx, g: torch.add(dx, g, alpha=2), 1),
    "a row": (lambda dx, g: dx + g[0, 0], 1),
    "a number": (lambda dx, g: dx + 1, 1),
}


@pytest.mark.parametrize("name", ADDED)
def test_a_norm_s_gradient_takes_what_is_added(name: str) -> None:
    extra, sums = ADDED[name]
    for f, want in ((rms_of, "rms_norm_backward"), (layer_grad, "layer_norm_backward")):
        g = plus(f, extra)
        assert names(g, *drawn(*ROWS)) == [want]
        module = graph_of(g, drawn(*ROWS))
        substituted(module)
        assert sum(n.target is aten.add.Tensor for n in module.graph.nodes) == sums


def test_what_needs_the_weight_s_gradient_is_not_taken() -> None:
    assert names(needed, *drawn(*ROWS)) == ["rms_norm_backward"]


def test_gradients_of_other_types_stay() -> None:
    assert names(layer_grad, *drawn(*ROWS, dtype=torch.float64)) == []

    def no_weight(x: Tensor, g: Tensor, w: Tensor, b: Tensor) -> Any:
        _, mean, rstd = layer(x, None, None)
        mask = [True, False, False]
        return aten.native_layer_norm_backward(g, x, [W], mean, rstd, None, None, mask)[0]

    assert names(no_weight, *drawn(*ROWS)) == []


def gelu(g: Tensor, x: Tensor, how: str = "tanh") -> Tensor:
    return aten.gelu_backward(g, x, approximate=how)


GELU: dict[str, tuple[Callable[..., Any], int]] = {
    "and its sum": (lambda x, g: [d := gelu(g, x), d.sum([0, 1])], 1),
    "exact": (lambda x, g: [d := gelu(g, x, "none"), d.sum([0, 1])], 1),
    "kept dims": (lambda x, g: [d := gelu(g, x), d.sum([0, 1], keepdim=True)], 1),
    "from behind": (lambda x, g: [d := gelu(g, x), d.sum([-2, -3])], 1),
    "only the sum": (lambda x, g: gelu(g, x).sum([0, 1]), 1),
    "no sum": (lambda x, g: gelu(g, x), 0),
    "two sums": (lambda x, g: [d := gelu(g, x), d.sum([0, 1]), d.sum([1, 0])], 0),
    "other dims": (lambda x, g: [d := gelu(g, x), d.sum([0, 2])], 0),
    "all dims": (lambda x, g: [d := gelu(g, x), aten.sum.dim_IntList(d, None)], 0),
    "a wider sum": (lambda x, g: [d := gelu(g, x), d.sum([0, 1], dtype=torch.float64)], 0),
    "few rows": (lambda x, g: [d := gelu(g[:, :9], x[:, :9]), d.sum([0, 1])], 0),
}


@pytest.mark.parametrize("name", GELU)
def test_gelu_s_gradient(name: str) -> None:
    f, count = GELU[name]
    assert names(f, *drawn(*ROWS[:2])) == ["gelu_backward_sum"] * count
    assert names(f, *drawn(*ROWS[:2], dtype=torch.float64)) == []
