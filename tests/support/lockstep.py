"""Steps with functional collectives, written down without processes and run on all ranks at once.

`Lockstep` runs a graph on the inputs of every rank, node by node. It adds in the order of the
ranks, so that bits can be compared; and what a collective returns is nothing but a promise until it
is waited for, so that a pass that forgets a wait fails.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

GROUP = "0"
_functional: Any = torch.ops._c10d_functional


def wait(x: Tensor) -> Tensor:
    """The result of a collective."""
    return _functional.wait_tensor(x)


def gather(x: Tensor, n: int) -> Tensor:
    """All ranks' blocks along the first dimension."""
    return wait(_functional.all_gather_into_tensor(x, n, GROUP))


def scatter(x: Tensor, n: int) -> Tensor:
    """This rank's block of the sum."""
    return wait(_functional.reduce_scatter_tensor(x, "sum", n, GROUP))


def total(x: Tensor, op: str = "sum") -> Tensor:
    """The sum over the ranks."""
    return wait(_functional.all_reduce(x, op, GROUP))


class Gather(torch.autograd.Function):
    """A parameter from its shards; its gradient goes back as a shard."""

    @staticmethod
    def forward(x: Tensor, n: int) -> Tensor:  # pyright: ignore
        return gather(x, n)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.n = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore
        return scatter(grad.contiguous(), ctx.n), None


def traced(f: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    """The graph of a function, as `jit` captures it."""
    module = make_fx(f, tracing_mode="fake")(*inputs)
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


@dataclass(frozen=True)
class Promise:
    """What a collective returns: of no use before the wait."""

    value: Tensor


class Lockstep:
    """Runs a graph on the inputs of every rank.

    Attributes:
        issued: names of the collectives, in order.
    """

    def __init__(self, module: GraphModule) -> None:
        self.module = module
        self.issued: list[str] = []

    def __call__(self, inputs: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Results of every rank."""
        n = len(inputs)
        env: dict[Node, list[Any]] = {}
        places = iter(range(len(inputs[0])))
        for node in self.module.graph.nodes:
            args = [
                torch.fx.map_arg((node.args, dict(node.kwargs)), lambda x, r=r: env[x][r])
                for r in range(n)
            ]
            name = getattr(node.target, "_opname", "")
            if node.op == "placeholder":
                place = next(places)
                env[node] = [inputs[r][place] for r in range(n)]
            elif node.op == "get_attr":
                env[node] = [getattr(self.module, str(node.target))] * n
            elif node.op == "output":
                return [list(a[0][0]) for a in args]
            elif name == "wait_tensor":
                env[node] = [a[0][0].value for a in args]
            elif name in _RUN:
                self.issued.append(name)
                moved = [a[0][0].contiguous() for a in args]
                env[node] = [Promise(x) for x in _RUN[name](moved, *args[0][0][1:])]
            else:
                assert not any(isinstance(x, Promise) for x in tree_leaves(args)), node
                target: Any = node.target
                env[node] = [target(*a, **k) for a, k in args]
        raise AssertionError("the graph returns nothing")


def _reduced(xs: list[Tensor], op: str) -> Tensor:
    return reduce({"sum": operator.add, "max": torch.maximum}[op], xs)


_RUN: dict[str, Callable[..., list[Tensor]]] = {
    "all_gather_into_tensor": lambda xs, n, g: [torch.cat(xs) for _ in xs],
    "reduce_scatter_tensor": lambda xs, op, n, g: [
        x.clone() for x in _reduced(xs, op).chunk(len(xs))
    ],
    "all_reduce": lambda xs, op, g: [_reduced(xs, op).clone() for _ in xs],
}


@dataclass(frozen=True)
class Net:
    """A small GPT-like step: parameters kept as shards, momentum, loss over all ranks.

    Attributes:
        ranks: processes.
        layers: blocks.
        rows: batch of one rank.
        width: of the hidden state.
    """

    ranks: int = 2
    layers: int = 2
    rows: int = 2
    length: int = 6
    width: int = 8
    is_sharded: bool = True

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of whole parameters, layer after layer."""
        w = self.width
        return [(w,), (w, 3 * w), (w, w), (w,), (w, 4 * w), (4 * w, w)] * self.layers

    def inputs(self, seed: int = 0) -> list[list[Tensor]]:
        """Parameters, momenta and data of every rank."""
        generator = torch.Generator().manual_seed(seed)

        def draw(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator) * 0.3

        n = self.ranks if self.is_sharded else 1
        whole = [draw(s) for s in self.shapes] + [draw(s) for s in self.shapes]
        data = [draw((self.rows, self.length, self.width)) for _ in range(2 * self.ranks)]
        return [
            [x.chunk(n)[r % n].clone() for x in whole] + data[2 * r : 2 * r + 2]
            for r in range(self.ranks)
        ]

    def step(self, *given: Tensor) -> list[Tensor]:
        """New parameters and momenta, and the loss."""
        count = len(self.shapes)
        params = [p.detach().requires_grad_() for p in given[:count]]
        momenta = given[count : 2 * count]
        x, y = given[2 * count :]
        with torch.enable_grad():
            loss = (self._forward(params, x) - y).square().mean()
            grads = torch.autograd.grad(loss, params)
        if not self.is_sharded:
            grads = [total(g) for g in grads]
        norm = total(torch.stack([g.square().sum() for g in grads]).sum()).sqrt()
        moved = [0.9 * m + g / (norm + 1.0) for m, g in zip(momenta, grads, strict=True)]
        new = [p.detach() - 0.1 * m for p, m in zip(params, moved, strict=True)]
        return [*new, *moved, total(loss.detach())]

    def _forward(self, params: Sequence[Tensor], x: Tensor) -> Tensor:
        for i in range(self.layers):
            g1, wa, wo, g2, wu, wd = (
                Gather.apply(p, self.ranks) if self.is_sharded else p
                for p in params[6 * i : 6 * i + 6]
            )
            q, k, v = (F.layer_norm(x, x.shape[-1:]) * g1 @ wa).chunk(3, -1)
            x = x + (q @ k.transpose(1, 2) * 0.5).softmax(-1) @ v @ wo
            x = x + F.gelu(F.layer_norm(x, x.shape[-1:]) * g2 @ wu) @ wd
        return x

    def graph(self) -> GraphModule:
        """Of the step."""
        return traced(self.step, *self.inputs()[0])


def equal(a: Sequence[Sequence[Tensor]], b: Sequence[Sequence[Tensor]]) -> bool:
    """Whether all results of all ranks have the same bits."""
    return all(
        torch.equal(x, y) and x.shape == y.shape and x.stride() == y.stride()
        for one, two in zip(a, b, strict=True)
        for x, y in zip(one, two, strict=True)
    )
