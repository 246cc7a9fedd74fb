"""A jitted function inside another transform, and what tells one program from another."""

from __future__ import annotations

import math

import pytest
import torch

import shardwise as sw
from shardwise.layouts.sharded import ShardedTensor

EAGER = {"backend": "eager"}
MESH = sw.make_mesh({"data": 2})


def point() -> ShardedTensor:
    return sw.shard(torch.tensor([1.0, 2.0, 3.0, 4.0]), MESH, "n/data")


@pytest.mark.parametrize("is_warm", [False, True], ids=["cold", "warm"])
def test_transforms_see_what_it_does(is_warm: bool) -> None:
    square = sw.jit(lambda x: (x * x).sum(), options=EAGER)
    double = sw.jit(lambda x: x * 2, options=EAGER)
    x = point()
    if is_warm:
        square(x), double(x)
    whole = x.full_tensor()
    assert torch.equal(sw.grad(square)(x).full_tensor(), 2 * whole)
    outer = sw.grad(lambda a: 3 * square(a) + a.sum())(x)
    assert torch.equal(outer.full_tensor(), 6 * whole + 1)
    assert torch.equal(sw.grad(lambda a: sw.remat(square)(a))(x).full_tensor(), 2 * whole)
    assert sw.jvp(square, (x,), (x,))[1].full_tensor() == 60
    assert torch.equal(sw.vmap(double)(x).full_tensor(), 2 * whole)
    both = sw.jit(lambda a: double(a) + 1, options=EAGER)
    assert torch.equal(both(x).full_tensor(), 2 * whole + 1)


@pytest.mark.parametrize("static", [(), (1,)], ids=["", "static"])
def test_equal_numbers_of_other_kinds_are_other_programs(static: tuple[int, ...]) -> None:
    f = sw.jit(lambda a, n: a * n, static_argnums=static, options=EAGER)
    a = sw.shard(torch.tensor([3, 5]), MESH)
    assert f(a, 2).dtype == torch.int64
    assert f(a, 2.0).dtype == torch.float32
    g = sw.jit(lambda a, n: a / n, static_argnums=static, options=EAGER)
    one = sw.shard(torch.ones(2), MESH)
    assert g(one, 0.0).full_tensor().tolist() == [math.inf] * 2
    assert g(one, -0.0).full_tensor().tolist() == [-math.inf] * 2
    assert len(g.programs) == 2
    for _ in range(2):
        g(one, float("nan"))
    assert len(g.programs) == 3


def test_a_donated_argument_that_is_not_there() -> None:
    f = sw.jit(lambda a: a, donate_argnums=3, options=EAGER)
    with pytest.raises(ValueError, match="donate_argnums=3 of 1 arguments"):
        f(point())
