"""Random tensors: the same values on every mesh and layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import shardwise as sw
from shardwise import random
from shardwise.meshlib import philox
from shardwise.ops.audit import report

DRAWS = {
    "normal": lambda k, s, m, to: random.normal(k, s, m, to),
    "normal f64": lambda k, s, m, to: random.normal(k, s, m, to, dtype=torch.float64),
    "normal bf16": lambda k, s, m, to: random.normal(k, s, m, to, dtype=torch.bfloat16),
    "uniform": lambda k, s, m, to: random.uniform(k, s, m, to, low=-1, high=2),
    "randint": lambda k, s, m, to: random.randint(k, s, m, to, low=3, high=1000),
    "bernoulli": lambda k, s, m, to: random.bernoulli(k, s, m, to, p=0.3),
    "truncated": lambda k, s, m, to: random.truncated_normal(k, s, m, to, std=2.0),
}
LAYOUTS = ["a b", "a/x b", "a b/x", "a/x b/y", "a/x/y b", "a/y/x b", "a b/y {U:x}", "a b {R:x,y}"]


@pytest.mark.parametrize("name", DRAWS)
def test_values_do_not_depend_on_mesh_or_layout(name: str) -> None:
    one = DRAWS[name](random.key(1), (12, 18), sw.make_mesh({"x": 1}), "a b").full_tensor()
    for sizes in ({"x": 2, "y": 3}, {"x": 3, "y": 2}, {"x": 6, "y": 1}):
        for layout in LAYOUTS:
            if name in ("randint", "bernoulli") and "{" in layout:
                continue
            drawn = DRAWS[name](random.key(1), (12, 18), sw.make_mesh(sizes), layout)
            assert torch.equal(drawn.full_tensor(), one), (sizes, layout)


def test_keys_and_names_give_other_values() -> None:
    mesh = sw.make_mesh({"x": 2})
    keys = [random.key(0), random.key(1), *random.split(random.key(0), 3)]
    keys += [random.fold_in(random.key(0), 1), random.fold_in(random.key(0), "blocks.w_up")]
    drawn = {tuple(random.normal(k, (4,), mesh).full_tensor().tolist()) for k in keys}
    assert len(drawn) == len(keys)


def test_categorical_draws_each_class_as_often_as_it_should() -> None:
    mesh = sw.make_mesh({"x": 2, "y": 2})
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    logits = p.log().expand(20000, 4).contiguous()
    seen = {}
    for layout in ("b v", "b/x v", "b v/x", "b/y v/x"):
        drawn = random.categorical(random.key(2), sw.shard(logits, mesh, layout))
        assert drawn.dtype == torch.int64
        seen[layout] = drawn.full_tensor()
    assert all(torch.equal(v, seen["b v"]) for v in seen.values())
    shares = torch.bincount(seen["b v"], minlength=4) / 20000
    torch.testing.assert_close(shares, p, atol=0.015, rtol=0)


def test_permutation_is_one() -> None:
    order = random.permutation(random.key(0), 1000)
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert not torch.equal(order, torch.arange(1000))


def test_dropout_keeps_the_mean_and_passes_owed_sums() -> None:
    mesh = sw.make_mesh({"x": 2, "y": 3})
    whole = torch.ones(600, 6)
    first = None
    for layout in ("a b", "a/x b", "a/y b/x", "a b {U:x}"):
        x = sw.shard(whole, mesh, layout)
        y = sw.nn.dropout(x, 0.25, random.key(9))
        assert y.layout is x.layout
        value = y.full_tensor()
        first = value if first is None else first
        assert torch.equal(value, first)
    assert float(first.mean()) == pytest.approx(1, abs=0.05)
    assert sw.nn.dropout(x, 0.25, None) is x
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\)"):
        sw.nn.dropout(x, 1.0, random.key(0))


def plain_dropout(x: torch.Tensor) -> torch.Tensor:
    """The definition: a mask of bernoulli, and a scale."""
    place = (tuple(x.shape), tuple(slice(0, n) for n in x.shape))
    return x * philox.bernoulli(random.key(3).words, *place, p=0.7).to(x.dtype) * (1 / 0.7)


@pytest.mark.parametrize(
    ("shape", "axes", "samples"),
    [
        ((6, 12), 1, None),
        ((12, 6, 1), 2, 25),
        ((6,), 1, None),
        ((12, 6, 12), 3, 15),
        ((1, 1), 1, None),
    ],
)
def test_dropout_in_every_layout(shape: tuple[int, ...], axes: int, samples: int | None) -> None:
    found = report(
        lambda x: sw.nn.dropout(x, 0.3, random.key(3)),
        [shape],
        axes=axes,
        samples=samples,
        reference=plain_dropout,
    )
    assert found.right
    assert not found.wrong
    assert not found.choice


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dropout_rounds_once(dtype: torch.dtype) -> None:
    x = torch.randn(30, 37, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = sw.nn.dropout(sw.shard(x, sw.make_mesh({"x": 2}), "a/x b"), 0.3, random.key(3))
    assert torch.equal(y.full_tensor(), plain_dropout(x))


def test_dropout_under_transforms() -> None:
    mesh = sw.make_mesh({"x": 2, "y": 3})
    x, g, h = (sw.shard(torch.randn(12, 6, dtype=torch.float64), mesh, "a/x b/y") for _ in range(3))

    def drop(x: Any) -> Any:
        return sw.nn.dropout(x, 0.3, random.key(3))

    def same(a: Any, b: Any) -> None:
        torch.testing.assert_close(a.full_tensor(), b.full_tensor(), rtol=1e-12, atol=1e-12)

    _, pull = sw.vjp(drop, x)
    same(pull(g)[0], drop(g))
    same(sw.jvp(drop, (x,), (g,))[1], drop(g))
    _, pull_again = sw.vjp(lambda g: sw.vjp(drop, x)[1](g)[0], g)
    same(pull_again(h)[0], drop(h))
    each = sw.vmap(drop)(x).full_tensor()
    row = sw.shard(torch.ones(6, dtype=torch.float64), mesh, "b/y")
    torch.testing.assert_close(each, x.full_tensor() * drop(row).full_tensor())


def test_dropout_takes_numbers_that_have_halves() -> None:
    x = sw.shard(torch.arange(4), sw.make_mesh({"x": 2}), "a/x")
    with pytest.raises(TypeError, match="must be of floating point"):
        sw.nn.dropout(x, 0.5, random.key(0))
