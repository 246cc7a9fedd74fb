"""remat: the same bits, less held, and the second run recorded as recomputation."""

import pytest
import torch

import shardwise as sw
from shardwise.layouts.convert import convert


def mesh(**axes):
    return sw.make_mesh(axes, transport="simulated", device="cpu")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def setting(layout="..."):
    grid = mesh(data=2)
    params = [sw.shard(randn(4, 4, seed=i), grid, layout) for i in range(3)]
    return params, sw.shard(randn(8, 4, seed=9), grid, "b/data d")


def layer(w, x):
    return torch.tanh(x @ sw.reshard(w, "... {R:data}"))


def loss(params, x, wrap):
    for w in params:
        x = wrap(lambda x, w=w: layer(w, x))(x)
    return (x * x).mean()


WRAPS = {
    "all": sw.remat,
    "cheap": lambda f: sw.remat(f, recompute="cheap"),
    "none": lambda f: sw.remat(f, recompute="none"),
    "offload": lambda f: sw.remat(f, recompute="none", offload=True),
    "offload, all": lambda f: sw.remat(f, offload=True),
    "nested": lambda f: sw.remat(sw.remat(f)),
}


@pytest.mark.parametrize("layout", ["_ _", "_/data _", "_ _ {R:data}"])
@pytest.mark.parametrize("name", WRAPS)
def test_value_and_gradients_are_the_same_bits(name, layout):
    params, x = setting(layout)
    value, grads = sw.value_and_grad(loss)(params, x, lambda f: f)
    again, same = sw.value_and_grad(loss)(params, x, WRAPS[name])
    assert torch.equal(value.full_tensor(), again.full_tensor())
    for a, b in zip(grads, same, strict=True):
        assert a.layout is b.layout
        assert torch.equal(a.full_tensor(), b.full_tensor())


@pytest.mark.parametrize("name", WRAPS)
def test_the_second_run_is_recorded_as_recomputation(name):
    params, x = setting("_/data _")
    with sw.record() as plan:
        sw.grad(loss)(params, x, WRAPS[name])
    again = 0 if name in ("none", "offload") else 3
    assert plan.count(kind="all_gather", phase="forward") == 3
    if name != "nested":
        assert (
            plan.count(kind="all_gather", phase="recompute")
            == plan.count(phase="recompute")
            == again
        )
    assert plan.count(kind="reduce_scatter", phase="backward") == plan.count(phase="backward") == 3
    assert not plan.warnings


def test_cheap_runs_no_matmul_again():
    params, x = setting()
    with sw.record() as plain:
        sw.grad(loss)(params, x, lambda f: f)
    with sw.record() as cheap:
        sw.grad(loss)(params, x, WRAPS["cheap"])
    with sw.record() as whole:
        sw.grad(loss)(params, x, sw.remat)
    assert cheap.flops == plain.flops
    assert whole.flops > plain.flops


def test_less_is_held():
    grid = sw.make_mesh({"data": 4}, transport="abstract")
    params = [sw.zeros((64, 64), grid) for _ in range(8)]
    x = sw.zeros((4096, 64), grid, "b/data d")
    peaks = [
        sw.plan(
            lambda p, x, wrap=wrap: sw.grad(lambda p: loss(p, x, wrap))(p), params, x
        ).peak_memory
        for wrap in (
            lambda f: f,
            lambda f: sw.remat(lambda x: torch.sin(torch.sin(torch.sin(f(x))))),
        )
    ]
    deep = sw.plan(
        lambda p, x: sw.grad(
            lambda p: loss(p, x, lambda f: lambda x: torch.sin(torch.sin(torch.sin(f(x)))))
        )(p),
        params,
        x,
    ).peak_memory
    assert peaks[1] < deep / 2


@pytest.mark.parametrize("wrap", [sw.remat, WRAPS["cheap"]])
def test_a_remembered_cast_of_a_closed_over_weight_stays_right(wrap):
    grid = mesh(data=2)
    w, x = randn(4, 4), randn(8, 4, seed=1)
    xs = sw.shard(x, grid, "b/data d")

    def f(w):
        inside = wrap(lambda x: torch.tanh(x @ w) @ w)(
            xs
        )  # the cast is made, and remembered, in here
        after = torch.tanh(xs @ w)  # and read here
        return (inside * after).mean() + (convert(w, "data", "reduced") ** 2).sum()

    with sw.record() as plan:
        g = sw.grad(f)(sw.shard(w, grid))
    assert plan.count(phase="backward", kind="all_reduce") == plan.count(phase="backward") == 1
    leaf = w.clone().requires_grad_()
    ((torch.tanh(x @ leaf) @ leaf) * torch.tanh(x @ leaf)).mean().add((leaf**2).sum()).backward()
    torch.testing.assert_close(g.full_tensor(), leaf.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("at", [(0,), (1,), (0, 1, 2)])
@pytest.mark.parametrize("name", WRAPS)
def test_beside_gathers_that_keep_the_shard(name, at):
    params, x = setting("_/data _")

    def gathered(w, x):
        return torch.tanh(x @ sw.reshard(w, "... {R:data}", save="shard"))

    def f(params, x, wrap):
        for i, w in enumerate(params):
            x = (wrap(gathered) if i in at else gathered)(w, x)
        return (x * x).mean()

    want = sw.grad(f)(params, x, lambda f: f)
    with sw.record() as plan:
        got = sw.grad(f)(params, x, WRAPS[name])
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.full_tensor(), b.full_tensor())
    # The first layer needs no gradient of its input, so nobody reads its weight again.
    again = {1, 2} if name in ("none", "offload") else {1, 2} - set(at)
    assert plan.count(phase="regather") == len(again)
    assert not plan.warnings


def test_second_order_through_remat():
    params, x = setting()
    v = [sw.shard(randn(4, 4, seed=20 + i), x.mesh) for i in range(3)]

    def total(wrap):
        def inner(p):
            grads = sw.grad(lambda p: loss(p, x, wrap))(p)
            return sum((g * u).sum() for g, u in zip(grads, v, strict=True))

        return sw.grad(inner)(params)

    for a, b in zip(total(sw.remat), total(lambda f: f), strict=True):
        torch.testing.assert_close(a.full_tensor(), b.full_tensor(), rtol=1e-12, atol=1e-12)
    for a, b in zip(
        sw.hvp(lambda p: loss(p, x, sw.remat), params, v), total(lambda f: f), strict=True
    ):
        torch.testing.assert_close(a.full_tensor(), b.full_tensor(), rtol=1e-12, atol=1e-12)


def test_a_gradient_inside_what_runs_again():
    grid = mesh(data=2)
    x = sw.shard(randn(8), grid, "_/data")
    f = sw.remat(lambda x: sw.grad(lambda x: (x**3).sum())(x))
    close = sw.grad(lambda x: (f(x) ** 2).sum())(x)
    torch.testing.assert_close(close.full_tensor(), 36 * randn(8) ** 3, rtol=1e-12, atol=1e-12)


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="recompute must be 'none', 'cheap' or 'all', got 'some'"):
        sw.remat(torch.sin, recompute="some")


@pytest.mark.parametrize("wrap", [lambda f: f, sw.remat, WRAPS["cheap"], WRAPS["offload"]])
def test_vmap_and_forward_mode_inside_hooks(wrap):
    w, x = randn(4, 4), randn(8, 4, seed=1)
    grid = mesh(data=2)
    ws, xs = sw.shard(w, grid, "_/data _"), sw.shard(x, grid, "_/data _")

    def f(w):
        y = torch.tanh(xs @ sw.reshard(w, "_ _ {R:data}", save="shard"))
        body = wrap(
            lambda y: (
                sw.vmap(sw.grad(lambda r: (r**3).sum()))(y) + sw.hvp(lambda y: (y**3).sum(), y, y)
            )
        )
        return (body(y) ** 2).sum()

    leaf = w.clone().requires_grad_()
    ((9 * torch.tanh(x @ leaf) ** 2) ** 2).sum().backward()
    torch.testing.assert_close(sw.grad(f)(ws).full_tensor(), leaf.grad, rtol=1e-12, atol=1e-12)


def test_what_goes_to_the_host_is_planned():
    grid = sw.make_mesh({"data": 4}, transport="abstract")
    x = sw.zeros((64, 8), grid, "b/data d")

    def body(x):
        return torch.tanh(torch.exp(x))

    def f(x):
        return sw.remat(body, recompute="none", offload=True)(x).sum()

    plan = sw.plan(sw.grad(f), x)
    assert [(c.kind, c.bytes, c.phase) for c in plan.copies] == [
        *[("to_host", 16 * 8 * 4, "forward")] * 2,
        *[("to_device", 16 * 8 * 4, "backward")] * 2,
    ]
