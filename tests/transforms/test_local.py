"""shard_map: local code, its types, its collectives and its gradients."""

import pytest
import torch

import shardwise as sw
from shardwise import ops


def mesh(**axes):
    return sw.make_mesh(axes, transport="simulated", device="cpu")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_inside_are_local_shapes_that_vary_where_they_were_cut():
    grid = mesh(a=2, b=3)
    x = sw.shard(randn(4, 6), grid, "_/a _/b")
    r = sw.shard(randn(6), grid, "_ {R:a U:b}")
    seen = []

    def body(x, r, k):
        seen.extend([str(x), str(r), k])
        return x

    y = sw.shard_map(body, in_layouts=("_/a _", "_ {R:a U:b}", None), out_layouts="_/a _")(x, r, 3)
    assert seen == ["f64[2 6]{V:a}", "f64[6]{U:b R:a}", 3]
    assert y.layout is sw.Layout("_/a _")
    close(y.full_tensor(), x.full_tensor())


def test_axes_of_one_dim_come_back_in_their_order():
    grid = mesh(a=2, b=3)
    x = sw.shard(randn(12), grid, "_/b/a")
    y = sw.shard_map(lambda x: x * 2, in_layouts="_/b/a", out_layouts="_/b/a")(x)
    close(y.full_tensor(), 2 * x.full_tensor())


def ring(n):
    return [(i, (i + 1) % n) for i in range(n)]


# name -> (body, in, out, the same on the global [6, 6] value with n blocks of rows)
BODIES = {
    "all_reduce": (lambda x: ops.all_reduce(x, "a"), "_ _", lambda b: sum(b)),
    "all_reduce of a sum that is owed": (
        lambda x: ops.all_reduce(x @ ops.all_reduce(x, "a").sum(0, keepdim=True).T, "a"),
        "_ _",
        lambda b: sum(p @ sum(b).sum(0, keepdim=True).T for p in b),
    ),
    "all_gather": (lambda x: ops.all_gather(x, "a", 1), "_ _ {R:a}", lambda b: torch.cat(b, 1)),
    "all_gather, last dim": (
        lambda x: ops.all_gather(torch.sin(x), "a", -1),
        "_ _",
        lambda b: torch.cat(b, 1).sin(),
    ),
    "reduce_scatter": (
        lambda x: ops.reduce_scatter(x, "a", 1),
        "_ _/a",
        lambda b: sum(b),
    ),
    "all_to_all": (
        lambda x: ops.all_to_all(x, "a", 1, 0),
        "_ _/a",
        lambda b: torch.cat(b, 0),
    ),
    "permute": (
        lambda x: ops.permute(x, "a", [(0, 1)]),
        "_/a _",
        lambda b: torch.cat([torch.zeros_like(b[0]), b[0], *[torch.zeros_like(c) for c in b[2:]]]),
    ),
    "ring": (
        lambda x: x * ops.permute(x, "a", ring(x.mesh.axes["a"])),
        "_/a _",
        lambda b: torch.cat([b[i] * b[i - 1] for i in range(len(b))]),
    ),
    "broadcast": (lambda x: ops.broadcast(x, "a", 1), "_ _ {R:a}", lambda b: b[1]),
    "broadcast, read by each": (
        lambda x: torch.sin(x) * ops.broadcast(x, "a", 0),
        "_/a _",
        lambda b: torch.cat([p.sin() * b[0] for p in b]),
    ),
    "reduce": (
        lambda x: ops.reduce(x, "a", 1),
        "_/a _",
        lambda b: torch.cat([sum(b) if i == 1 else torch.zeros_like(p) for i, p in enumerate(b)]),
    ),
    "reduce of a sum that is owed": (
        lambda x: ops.reduce(x.sum(0, keepdim=True) @ ops.all_reduce(x, "a").T, "a", 0),
        "_/a _",
        lambda b: torch.cat(
            [sum(p.sum(0, keepdim=True) @ sum(b).T for p in b)]
            + [torch.zeros(1, len(b[0]), dtype=b[0].dtype) for _ in b[1:]]
        ),
    ),
    "axis_index": (
        lambda x: x * (ops.axis_index("a") + 1),
        "_/a _",
        lambda b: torch.cat([p * (i + 1) for i, p in enumerate(b)]),
    ),
    "left unreduced": (lambda x: ops.all_gather(x, "a", 0), "_ _ {U:a}", lambda b: torch.cat(b)),
    "max": (lambda x: x - ops.all_reduce(x.detach(), "a", op="max"), "_/a _",
            lambda b: torch.cat([p - torch.stack(b).amax(0).detach() for p in b])),
    "min": (lambda x: x - ops.all_reduce(x.detach(), "a", op="min"), "_/a _",
            lambda b: torch.cat([p - torch.stack(b).amin(0).detach() for p in b])),
}  # fmt: skip


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", BODIES)
def test_collectives_and_their_gradients(name, n):
    body, out, plain = BODIES[name]
    grid = mesh(a=n)
    value = randn(6, 6)
    f = sw.shard_map(body, in_layouts="_/a _", out_layouts=out)
    x = sw.shard(value, grid, "_/a _")
    leaf = value.clone().requires_grad_()
    want = plain(list(leaf.chunk(n)))
    y, pull = sw.vjp(f, x)
    assert y.layout is sw.Layout(out)
    close(y.full_tensor(), want.detach())
    c = randn(*want.shape, seed=5)
    want.backward(c)
    (g,) = pull(sw.shard(c, grid, y.layout.dual))
    close(g.full_tensor(), leaf.grad)
    if name not in ("max", "min"):
        t = randn(6, 6, seed=7)
        _, tangent = sw.jvp(f, (x,), (sw.shard(t, grid, "_/a _"),))
        _, expected = torch.autograd.functional.jvp(lambda v: plain(list(v.chunk(n))), value, t)
        close(tangent.full_tensor(), expected)


@pytest.mark.parametrize("state", ["_ _", "_ _ {R:a}", "_/a _", "_ _/a"])
def test_value_and_grad_through_shard_map_equals_the_unsharded_gradient(state):
    grid = mesh(a=2, b=3)
    w, x = randn(6, 6), randn(6, 6, seed=1)
    ws, xs = sw.shard(w, grid, state), sw.shard(x, grid, "_/a _/b")

    @sw.shard_map(in_layouts=("_ _ {R:a}", "_/a _"), out_layouts="")
    def loss(w, x):
        return ops.all_reduce((torch.tanh(x @ w) ** 2).sum(), "a")

    value, g = sw.value_and_grad(loss)(ws, xs)
    leaf = w.clone().requires_grad_()
    want = (torch.tanh(x @ leaf) ** 2).sum()
    want.backward()
    close(value.full_tensor(), want.detach())
    assert g.layout is sw.Layout(state).dual
    close(g.full_tensor(), leaf.grad)


@pytest.mark.parametrize("inside", ["_ _", "_ _ {R:a}"])
def test_a_gradient_taken_inside_is_the_gradient_of_the_sum_over_devices(inside):
    grid = mesh(a=2)
    w, x = randn(6, 6), randn(6, 6, seed=1)
    leaf = w.clone().requires_grad_()
    (torch.tanh(x @ leaf) ** 2).sum().backward()
    body = sw.grad(lambda w, x: (torch.tanh(x @ w) ** 2).sum())
    f = sw.shard_map(body, in_layouts=(inside, "_/a _"), out_layouts="_ _")
    close(f(sw.shard(w, grid), sw.shard(x, grid, "_/a _")).full_tensor(), leaf.grad)


def test_a_result_that_is_equal_on_the_devices_is_copied_to_each_block():
    grid = mesh(a=2)
    w = randn(3)
    f = sw.shard_map(torch.sin, in_layouts="_", out_layouts="_/a")
    y, pull = sw.vjp(f, sw.shard(w, grid))
    close(y.full_tensor(), torch.cat([w.sin()] * 2))
    c = randn(6, seed=1)
    close(pull(sw.shard(c, grid, "_/a"))[0].full_tensor(), w.cos() * (c[:3] + c[3:]))


def test_what_moves_is_recorded_with_its_reason():
    grid = mesh(a=2)
    x = sw.shard(randn(4, 4), grid, "_ _/a")
    f = sw.shard_map(lambda x: ops.all_reduce(x, "a"), in_layouts="_/a _", out_layouts="_ _")
    with sw.record() as plan:
        f(x)
        sw.grad(lambda x: (f(x) ** 2).sum())(x)
    rows = [(c.kind, c.why, c.op, c.phase) for c in plan.collectives]
    assert rows[:2] == [
        ("all_to_all", "shard_map", "shard_map", "forward"),
        ("all_reduce", "shard_map", "all_reduce", "forward"),
    ]
    assert all(c.why in ("shard_map", "gradient") for c in plan.collectives)
    assert all(c.source.startswith("test_local.py") for c in plan.collectives)


def test_a_result_that_still_varies_is_refused_with_the_fix():
    x = sw.shard(randn(4), mesh(a=2), "_/a")
    with pytest.raises(sw.LayoutError) as error:
        sw.shard_map(lambda x: x.sum(), in_layouts="_/a", out_layouts="")(x)
    assert "a result varies over 'a', which '' does not cut" in str(error.value)
    assert "ops.all_reduce(y, 'a')" in str(error.value)
    assert "ops.all_gather(y, 'a', dim)" in str(error.value)


def test_a_sum_that_is_owed_cannot_become_a_block():
    x = sw.shard(randn(4), mesh(a=2), "_ {U:a}")
    with pytest.raises(sw.LayoutError, match=r"is a sum over 'a', by which '_/a' cuts it"):
        sw.shard_map(lambda x: x, in_layouts="_ {U:a}", out_layouts="_/a")(x)


def test_a_branch_on_what_varies_is_refused():
    x = sw.shard(randn(4), mesh(a=2), "_/a")
    with pytest.raises(sw.LayoutError, match=r"the value differs over \['a'\]"):
        sw.shard_map(lambda x: x if x.sum() > 0 else -x, in_layouts="_/a", out_layouts="_/a")(x)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda x, r: ops.all_reduce(r, "a"),
            "x must be varying or unreduced over 'a', but the axis leaves it replicated",
        ),
        (lambda x, r: ops.all_gather(r, "a", 0), "x must be varying over 'a'"),
        (lambda x, r: ops.permute(r, "a", [(0, 1)]), "every device has the same value"),
        (lambda x, r: ops.all_reduce(x, "c"), "unknown axis 'c'"),
        (lambda x, r: ops.all_reduce(x, "a", op="mean"), r"op must be 'sum', 'max' or 'min'"),
        (lambda x, r: ops.permute(x, "a", [(0, 2)]), r"positions \[2\] must differ"),
        (lambda x, r: ops.all_to_all(x, "a", 0, 0), "the same dim"),
        (lambda x, r: ops.reduce_scatter(x, "a", 0), "not divisible"),
    ],
)
def test_bad_collectives_say_why(call, words):
    grid = mesh(a=2)
    x, r = sw.shard(randn(6), grid, "_/a"), sw.shard(randn(4), grid)
    with pytest.raises((sw.LayoutError, sw.MeshError, ValueError), match=words):
        sw.shard_map(call, in_layouts=("_/a", "_"), out_layouts="_/a")(x, r)


def test_outside_there_is_no_mesh_and_a_maximum_has_no_gradient():
    with pytest.raises(sw.LayoutError, match=r"call it inside sw\.shard_map"):
        ops.axis_index("a")
    with pytest.raises(TypeError, match="none is a ShardedTensor"):
        sw.shard_map(lambda x: x, in_layouts="", out_layouts="")(3)
    x = sw.shard(randn(4), mesh(a=2), "_/a")
    f = sw.shard_map(
        lambda x: ops.all_reduce(x, "a", op="max").sum(), in_layouts="_/a", out_layouts=""
    )
    with pytest.raises(sw.LayoutError, match=r"op='max' has no gradient; pass x.detach\(\)"):
        sw.grad(f)(x)


def test_it_plans_on_an_abstract_mesh():
    grid = sw.make_mesh({"data": 512}, transport="abstract")
    x = sw.zeros((1024, 8), grid, "b/data d")
    f = sw.shard_map(
        lambda x: ops.all_gather(x, "data", 0), in_layouts="b/data d", out_layouts="b d {R:data}"
    )
    made = sw.plan(f, x)
    assert made.count(kind="all_gather", why="shard_map") == 1
    assert str(made.result) == "f32[1024 8]{R:data}"


def test_roots_are_positions_and_einops_reduce_keeps_its_name():
    grid = mesh(a=2)
    x = sw.shard(randn(4, 6), grid, "_/a _")
    for collective in (ops.broadcast, ops.reduce):
        body = sw.shard_map(lambda x, f=collective: f(x, "a", 2), in_layouts="_/a _",
                            out_layouts="_/a _")  # fmt: skip
        with pytest.raises(ValueError, match=r"root must be a position 0\.\.1 of 'a', got 2"):
            body(x)
    close(ops.reduce(x, "a b -> b", "sum").full_tensor(), x.full_tensor().sum(0))
    with pytest.raises(sw.LayoutError, match="broadcast"):
        sw.shard_map(lambda x: ops.broadcast(ops.all_reduce(x, "a"), "a", 0), in_layouts="_/a _",
                     out_layouts="_ _")(x)  # fmt: skip


@pytest.mark.parametrize("n", [2, 3])
def test_broadcast_and_reduce_are_adjoint_and_recorded(n):
    grid = mesh(a=n)
    x = sw.shard(randn(6, 6), grid, "_/a _")

    @sw.shard_map(in_layouts="_/a _", out_layouts="_/a _")
    def f(x):
        return ops.reduce(torch.tanh(ops.broadcast(x, "a", 1) * x), "a", 0)

    with sw.record() as plan:
        _, pull = sw.vjp(f, x)
        pull(x)
    block = 36 // n * (n - 1) / n
    rows = [(c.phase, c.kind, c.elements, c.reduce) for c in plan.collectives]
    assert rows == [
        ("forward", "broadcast", block, None), ("forward", "reduce", block, "sum"),
        ("backward", "broadcast", block, None), ("backward", "reduce", block, "sum"),
    ]  # fmt: skip
    mapped = sw.vmap(f, in_dims=0)(
        sw.shard(torch.stack([x.full_tensor(), randn(6, 6, seed=3)]), grid, "v _/a _")
    )
    close(mapped.full_tensor()[0], f(x).full_tensor())
