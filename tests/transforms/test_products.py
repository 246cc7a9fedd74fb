"""Products joined in graphs: equal values, as many products as there must be, no write passed."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import optree
import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import shardwise as sw
from shardwise import models, optim, strategies
from shardwise.ops.transforms import products, unrolled

aten: Any = torch.ops.aten
Pass = Callable[[GraphModule], None]


def drawn(*shapes: Sequence[int]) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(*s, dtype=torch.float64, generator=rng) for s in shapes]


def counts(module: GraphModule) -> dict[str, int]:
    """How many products of each kind a graph has."""
    found = collections.Counter(str(n.target) for n in module.graph.nodes)
    return {k: found[f"aten.{k}.default"] for k in ("mm", "addmm", "cat")}


def results(module: GraphModule, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Results and the inputs after the run, which may be written to."""
    given = [x.clone() for x in inputs]
    found = module(*given)
    return [*optree.tree_leaves(found), *given]


def changed(change: Pass, f: Callable[..., Any], *inputs: Tensor) -> dict[str, int]:
    """The products after a pass that keeps values, and that finds nothing on a second run."""
    module = make_fx(f, tracing_mode="fake")(*inputs)
    same_after(change, module, inputs, 1e-12)
    return counts(module)


def same_after(
    change: Pass, module: GraphModule, inputs: Sequence[Tensor], tolerance: float
) -> None:
    want = results(module, inputs)
    for _ in range(2):
        change(module)
        module.graph.lint()
        module.recompile()
    first = str(module.graph)
    change(module)
    assert str(module.graph) == first
    for a, b in zip(results(module, inputs), want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def step_of(name: str) -> tuple[GraphModule, list[Tensor]]:
    """A training step of two layers as a graph of one device, and its inputs."""
    make: Any = {"llama": models.llama, "gpt2": models.gpt2}[name]
    config: Any = {
        "llama": models.LlamaConfig(layer=2, embed=16, heads=4, kv_heads=2, ffn=48, vocab=32),
        "gpt2": models.GPT2Config(layer=2, embed=16, heads=4, vocab=32, position=64),
    }[name]
    strategy, mesh = strategies.data(), sw.make_mesh({"data": 1})
    model = make(config, strategy)
    params, rng = model.init(sw.random.key(0), mesh), torch.Generator().manual_seed(0)
    tokens = sw.shard(torch.randint(32, (8, 64), generator=rng), mesh, strategy["tokens"])
    rows, optimizer = {"tokens": tokens, "labels": tokens}, optim.adamw(1e-3)
    state = optimizer.init(params)

    def step(p: Any, s: Any, batch: Any) -> Any:
        loss, grads = sw.value_and_grad(model.loss)(p, batch)
        return *optimizer.step(grads, s, p), loss

    jitted = sw.jit(step, options={"backend": "eager"})
    jitted(params, state, rows)
    inputs = optree.tree_leaves((params, state, rows), namespace="shardwise")
    return jitted.graph.module, inputs


@pytest.mark.parametrize(
    ("name", "before", "with_biases", "after"),
    [("llama", (45, 0), (45, 0), (27, 0)), ("gpt2", (39, 0), (27, 12), (19, 8))],
)
def test_a_step_has_fewer_products(
    name: str,
    before: tuple[int, int],
    with_biases: tuple[int, int],
    after: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(unrolled, "FEWEST", 0)
    module, inputs = step_of(name)
    found = counts(module)
    assert (found["mm"], found["addmm"]) == before
    for change, want in (
        (unrolled.unrolled, before),
        (products.biased, with_biases),
        (products.joined, after),
    ):
        # float32: a step of Adam divides by the gradient's size, small ones' roundings show
        same_after(change, module, inputs, 1e-5)
        found = counts(module)
        assert (found["mm"], found["addmm"]) == want
    assert not any("foreach" in str(n.target) for n in module.graph.nodes)


def test_products_of_one_left_operand_are_slices_of_one() -> None:
    def f(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Any:
        y = (x @ b).view(4, 4, 5)
        return x @ a, y.view(4, 20), (x @ c).t().reshape(-1)

    found = changed(products.joined, f, *drawn((16, 4), (4, 3), (4, 5), (4, 2)))
    assert found == {"mm": 1, "addmm": 0, "cat": 1}


def test_short_left_operands_are_left_alone() -> None:
    found = changed(products.joined, lambda x, a, b: (x @ a, x @ b), *drawn((5, 4), (4, 3), (4, 5)))
    assert found["mm"] == 2


def test_products_that_need_each_other_stay_apart() -> None:
    def f(x: Tensor, a: Tensor, b: Tensor) -> Any:
        first = x @ a
        return first, x @ (b + first.sum()), x @ a.mul(2)

    found = changed(products.joined, f, *drawn((16, 4), (4, 3), (4, 3)))
    assert found == {"mm": 2, "addmm": 0, "cat": 1}


def test_groups_do_not_need_each_other_in_a_circle() -> None:
    def f(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Any:
        one, two = x @ a, y @ b
        return x @ (a + two.sum()), y @ (b + one.sum())  # either pair may be one, not both

    found = changed(products.joined, f, *drawn((16, 4), (16, 4), (4, 3), (4, 3)))
    assert found == {"mm": 3, "addmm": 0, "cat": 1}


def test_a_circle_of_three_groups_is_seen() -> None:
    def f(x: Tensor, y: Tensor, z: Tensor, a: Tensor) -> Any:
        one, two, three = x @ a, y @ a, z @ a
        return x @ (a + two.sum()), y @ (a + three.sum()), z @ (a + one.sum())

    found = changed(products.joined, f, *drawn((16, 4), (16, 4), (16, 4), (4, 3)))
    assert found["mm"] == 4


def test_writes_in_between_keep_products_apart() -> None:
    def between(x: Tensor, a: Tensor, b: Tensor) -> Any:
        first = x @ a
        x.add_(1)
        return first, x @ b

    assert changed(products.joined, between, *drawn((16, 4), (4, 3), (4, 3)))["mm"] == 2

    def weights(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Any:
        one = x @ a, x @ b
        a.mul_(2)
        return *one, y @ a, y @ b

    found = changed(products.joined, weights, *drawn((16, 4), (16, 4), (4, 3), (4, 3)))
    assert found == {"mm": 2, "addmm": 0, "cat": 2}  # the weights are other ones

    def total(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Any:
        first = x @ a
        a.mul_(2)
        return first + y @ b

    assert changed(products.joined, total, *drawn((16, 4), (16, 4), (4, 3), (4, 3)))["mm"] == 2


def test_sums_are_one_product() -> None:
    def f(x: Tensor, y: Tensor, z: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return (x @ a.t()).view(4, 4, 3) + (y @ b.t()).view(4, 4, 3) + (z @ c.t()).view(4, 4, 3)

    shapes = ((16, 4), (16, 5), (16, 6), (3, 4), (3, 5), (3, 6))
    assert changed(products.joined, f, *drawn(*shapes)) == {"mm": 1, "addmm": 0, "cat": 2}


def test_a_sum_inside_another_is_one_product() -> None:
    def f(x: Tensor, y: Tensor, a: Tensor, b: Tensor, other: Tensor) -> Tensor:
        return other + (x @ a + y @ b)

    shapes = ((16, 4), (16, 4), (4, 3), (4, 3), (16, 3))
    assert changed(products.joined, f, *drawn(*shapes))["mm"] == 1


def test_sums_share_weights_side_by_side() -> None:
    def f(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Any:
        one = x @ a.t() + y @ b.t()
        return one, torch.sin(x) @ a.t() + torch.sin(y) @ b.t()

    found = changed(products.joined, f, *drawn((16, 4), (16, 4), (3, 4), (3, 4)))
    assert found == {"mm": 2, "addmm": 0, "cat": 3}


SUMS: dict[str, tuple[Callable[..., Any], int]] = {
    "a share of one": (lambda x, y, a, b: torch.add(x @ a, y @ b, alpha=2), 2),
    "used twice": (lambda x, y, a, b: [p := x @ a, p + y @ b], 2),
    "added to itself": (lambda x, y, a, b: (lambda p: p + p)(x @ a), 1),
    "other rows": (
        lambda x, y, a, b: (x @ a).view(8, 6) + (y @ b[:, :1].repeat(1, 3)).view(8, 6),
        1,
    ),
    "broadcast": (lambda x, y, a, b: (x @ a)[:1] + y @ b, 2),
    "products of other shapes": (
        lambda x, y, a, b: (x @ a).view(8, 6) + (y.reshape(8, 8) @ y.view(8, 8)[:, :6]),
        2,
    ),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_that_are_none(name: str) -> None:
    f, want = SUMS[name]
    found = changed(products.joined, f, *drawn((16, 4), (16, 4), (4, 3), (4, 3)))
    assert found["mm"] == want


def test_products_of_other_shapes_seen_alike_are_not_added() -> None:
    def f(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (x @ a).view(-1) + (y @ b).view(-1)

    assert changed(products.joined, f, *drawn((16, 4), (24, 4), (4, 3), (4, 2)))["mm"] == 2


def test_products_with_biases_are_joined_where_those_are_rows() -> None:
    shapes = ((16, 4), (4, 3), (4, 5), (3,), (5,))

    def rows(x: Tensor, a: Tensor, b: Tensor, one: Tensor, two: Tensor) -> Any:
        return torch.addmm(one, x, a), torch.addmm(two, x, b)

    found = changed(products.joined, rows, *drawn(*shapes))
    assert found == {"mm": 0, "addmm": 1, "cat": 2}

    def scaled(x: Tensor, a: Tensor, b: Tensor, one: Tensor, two: Tensor) -> Any:
        return torch.addmm(one, x, a, alpha=2), torch.addmm(two, x, b, beta=3)

    assert changed(products.joined, scaled, *drawn(*shapes))["addmm"] == 2

    def wide(x: Tensor, a: Tensor, b: Tensor, one: Tensor, two: Tensor) -> Any:
        return torch.addmm(one[:1], x, a), torch.addmm(two.expand(16, 5), x, b)

    assert changed(products.joined, wide, *drawn(*shapes))["addmm"] == 2


BIASES: dict[str, tuple[Callable[..., Any], int]] = {
    "a row": (lambda x, w, b: x @ w + b.view(6), 1),
    "of heads": (lambda x, w, b: (x @ w).view(4, 4, 2, 3) + b, 1),
    "not contiguous": (lambda x, w, b: (x @ w).view(16, 3, 2) + b.t(), 1),
    "of some columns": (lambda x, w, b: (x @ w).view(16, 2, 3) + b[0], 0),
    "one number": (lambda x, w, b: x @ w + b[0, 0], 0),
    "broadcast": (lambda x, w, b: (x @ w).view(16, 2, 3) + b[:, :1], 0),
    "as large": (lambda x, w, b: x[:1] @ w + b.view(1, 6), 0),
    "a share": (lambda x, w, b: torch.add(x @ w, b.view(6), alpha=2), 0),
    "used twice": (lambda x, w, b: [p := x @ w, p + b.view(6)], 0),
    "another type": (lambda x, w, b: x @ w + b.view(6).float(), 0),
}


@pytest.mark.parametrize("name", BIASES)
def test_a_bias_is_where_its_product_starts(name: str) -> None:
    f, want = BIASES[name]
    found = changed(products.biased, f, *drawn((16, 4), (4, 6), (2, 3)))
    assert (found["addmm"], found["mm"]) == (want, 1 - want)


def test_a_bias_does_not_carry_its_product_past_a_write() -> None:
    def f(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        product = x @ w
        w.mul_(2)
        return product + b

    assert changed(products.biased, f, *drawn((16, 4), (4, 6), (6,)))["mm"] == 1
