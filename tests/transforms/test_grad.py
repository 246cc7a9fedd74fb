"""The law of gradients: dual layouts, the unsharded values, and what moves is on the record."""

import itertools

import pytest
import torch

import shardwise as sw

STATES = ["_ _", "_ _ {R:a}", "_ _ {U:a}", "_/a _", "_ _/a"]


def mesh(**axes):
    return sw.make_mesh(axes, transport="simulated", device="cpu")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("layout", STATES)
def test_gradient_has_the_dual_layout_and_the_unsharded_value(layout, n):
    w = randn(6, 6)
    x = sw.shard(w, mesh(a=n), layout)
    value, g = sw.value_and_grad(lambda x: (torch.sin(x) * x).sum())(x)
    assert g.layout is sw.Layout(layout).dual
    assert value.layout is sw.Layout("")
    close(g.full_tensor(), torch.cos(w) * w + torch.sin(w))
    close(value.full_tensor(), (torch.sin(w) * w).sum())


@pytest.mark.parametrize(("a", "b"), list(itertools.product(["", "{R:%s}", "{U:%s}"], repeat=2)))
def test_a_loss_in_any_mix_of_states_is_seeded_right(a, b):
    grid = mesh(a=2, b=3)
    w = randn(6)
    x = sw.shard(w, grid, "_")
    asked = " ".join(s % axis for s, axis in ((a, "a"), (b, "b")) if s).replace("} {", " ")

    def loss(x):
        return sw.reshard((x**3).sum(), asked)

    value, g = sw.value_and_grad(loss)(x)
    close(value.full_tensor(), (w**3).sum())
    close(g.full_tensor(), 3 * w**2)
    assert g.layout is sw.Layout("_")


def test_an_unreduced_loss_plus_a_reduced_one():
    grid = mesh(a=2, b=2)
    w, x = randn(6, 6), randn(6, 6, seed=1)
    ws, xs = sw.shard(w, grid, "_ _ {R:a,b}"), sw.shard(x, grid, "_/a _/b")

    def loss(w, x):
        return ((x * w) ** 2).mean() + 0.1 * (w**2).sum()

    g = sw.grad(loss)(ws, xs)
    plain = w.clone().requires_grad_()
    loss(plain, x).backward()
    close(g.full_tensor(), plain.grad)
    assert str(g.layout) == "_ _ {U:a,b}"


def test_unused_parameters_get_zeros_and_other_leaves_none():
    grid = mesh(a=2)
    params = {
        "used": sw.shard(randn(4), grid, "_/a"),
        "unused": sw.shard(randn(4), grid, "_ {R:a}"),
        "count": sw.shard(torch.arange(4), grid),
        "none": None,
        "plain": randn(3),
        "name": "text",
    }
    g = sw.grad(lambda p: (p["used"] * p["count"]).sum())(params)
    close(g["used"].full_tensor(), torch.arange(4.0, dtype=torch.float64))
    assert str(g["unused"]) == "f64[4]{U:a}"
    close(g["unused"].full_tensor(), torch.zeros(4, dtype=torch.float64))
    close(g["plain"], torch.zeros(3, dtype=torch.float64))
    assert g["count"] is None
    assert g["none"] is None
    assert g["name"] is None


def test_argnums_and_aux():
    grid = mesh(a=2)
    x, y = (sw.shard(randn(4, seed=i), grid, "_/a") for i in range(2))

    def f(x, k, y):
        return (x * y).sum() * k, {"twice": x * 2, "k": k}

    (value, aux), (gx, gy) = sw.value_and_grad(f, (0, 2), has_aux=True)(x, 3.0, y)
    close(gx.full_tensor(), 3 * y.full_tensor())
    close(gy.full_tensor(), 3 * x.full_tensor())
    close(value.full_tensor(), 3 * (x.full_tensor() * y.full_tensor()).sum())
    assert aux["k"] == 3.0
    assert not aux["twice"].requires_grad
    g, aux = sw.grad(f, 2, has_aux=True)(x, 3.0, y)
    close(g.full_tensor(), gy.full_tensor())


def test_a_loss_that_is_no_scalar_is_refused():
    x = sw.shard(randn(4), mesh(a=2), "_/a")
    with pytest.raises(
        sw.LayoutError, match=r"the loss must be a scalar, got shape \(4,\)\nreduce it: loss.mean"
    ):
        sw.grad(lambda x: x * 2)(x)
    with pytest.raises(TypeError, match="must return a scalar tensor, got float"):
        sw.grad(lambda x: 1.0)(x)
    with pytest.raises(TypeError, match=r"real floating number, got torch\.int64"):
        sw.grad(lambda x: x.to(torch.int64).sum())(x)
    with pytest.raises(TypeError, match=r"returns \(loss, aux\), got ShardedTensor"):
        sw.grad(lambda x: x.sum(), has_aux=True)(x)


def batch_loss(params, x):
    return ((torch.tanh(x @ params["up"]) @ params["down"]) ** 2).mean()


def setting(layout="..."):
    grid = mesh(data=2, tensor=1)
    params = {k: sw.shard(randn(4, 4, seed=i), grid, layout) for i, k in enumerate(("up", "down"))}
    return params, sw.shard(randn(8, 4, seed=3), grid, "b/data d")


def expected(params, x):
    plain = {k: v.full_tensor().requires_grad_() for k, v in params.items()}
    batch_loss(plain, x.full_tensor()).backward()
    return {k: v.grad for k, v in plain.items()}


@pytest.mark.parametrize(
    ("asked", "layout", "kinds"),
    [
        (None, "_ _", ["all_reduce", "all_reduce"]),
        ("...", "_ _", ["all_reduce", "all_reduce"]),
        ("... {U:data}", "_ _ {U:data}", []),
        (".../data", "_/data _", ["reduce_scatter", "reduce_scatter"]),
        ("_ _/data", "_ _/data", ["reduce_scatter", "reduce_scatter"]),
        (lambda p: {k: ".../data" for k in p}, "_/data _", ["reduce_scatter", "reduce_scatter"]),
        ({"up": ".../data", "down": None}, None, ["all_reduce", "reduce_scatter"]),
    ],
)
def test_the_layouts_asked_of_gradients_decide_what_moves(asked, layout, kinds):
    params, x = setting()
    with sw.record() as plan:
        _, g = sw.value_and_grad(batch_loss, grads=asked)(params, x)
    assert [c.kind for c in plan.collectives if c.phase != "report"] == kinds
    assert plan.count(phase="report", kind="all_reduce") == 1
    for name, want in expected(params, x).items():
        assert layout is None or g[name].layout is sw.Layout(layout)
        close(g[name].full_tensor(), want)
    assert all(c.path in ("up", "down") for c in plan.collectives if c.phase != "report")


def test_gradients_of_parameters_cut_over_the_batch_axis_are_scattered_once():
    params, x = setting(".../data")

    def loss(p, x):
        return batch_loss({k: sw.reshard(w, "... {R:data}") for k, w in p.items()}, x)

    with sw.record() as plan:
        _, g = sw.value_and_grad(loss)(params, x)
    assert plan.count(phase="forward", kind="all_gather") == 2
    assert plan.count(phase="backward", kind="reduce_scatter") == plan.count(phase="backward") == 2
    for name, want in expected(params, x).items():
        assert g[name].layout is params[name].layout
        close(g[name].full_tensor(), want)


def test_a_stacked_gradient_is_scattered_layer_by_layer():
    grid = mesh(data=2)
    w, x = randn(3, 4, 4), randn(8, 4, seed=1)
    ws, xs = sw.shard(w, grid), sw.shard(x, grid, "b/data d")

    def loss(p, x):
        return (sw.scan(lambda x, w: (torch.tanh(x @ w), None), x, p)[0] ** 2).mean()

    with sw.record() as plan:
        _, g = sw.value_and_grad(loss, grads="_ _/data _")(ws, xs)
    moved = [c for c in plan.collectives if c.phase == "backward"]
    assert [(c.kind, c.shape) for c in moved] == [("reduce_scatter", (4, 4))] * 3
    assert g.layout is sw.Layout("_ _/data _")
    plain = w.clone().requires_grad_()
    y = x
    for i in range(3):
        y = torch.tanh(y @ plain[i])
    (y**2).mean().backward()
    close(g.full_tensor(), plain.grad)


def test_gradients_in_another_dtype():
    params, x = setting()
    params = {k: w.to(torch.float32) for k, w in params.items()}
    _, g = sw.value_and_grad(batch_loss, dtype=torch.float64)(params, x.to(torch.float32))
    assert g["up"].dtype == torch.float64


def test_scattered_gradients_are_summed_in_the_dtype_asked_for():
    params, x = setting()
    params = {k: w.to(torch.bfloat16) for k, w in params.items()}
    with sw.record() as plan:
        _, g = sw.value_and_grad(batch_loss, grads=".../data", dtype=torch.float32)(
            params, x.to(torch.bfloat16)
        )
    assert str(g["up"]) == "f32[4/data 4]"
    assert {c.dtype for c in plan.collectives if c.phase == "backward"} == {torch.float32}
    assert plan.memory["parameters"] == 2 * 16 * 2
    assert plan.memory["gradients"] == 2 * 8 * 4


def test_a_parameter_read_whole_and_in_slices():
    grid = mesh(data=2)
    w, x = randn(2, 4, 4), randn(8, 4, seed=1)
    ws, xs = sw.shard(w, grid), sw.shard(x, grid, "b/data d")

    def loss(p):
        return (sw.scan(lambda c, w: (torch.tanh(c @ w), None), xs, p)[0] ** 2).mean() + (
            p * p
        ).sum()

    g = sw.grad(loss, grads="_ _/data _")(ws)
    leaf = w.clone().requires_grad_()
    ((torch.tanh(torch.tanh(x @ leaf[0]) @ leaf[1]) ** 2).mean() + (leaf * leaf).sum()).backward()
    close(g.full_tensor(), leaf.grad)


def test_scattered_gradients_inside_other_transforms():
    params, x = setting()
    f = sw.grad(batch_loss, grads=".../data")
    want = f(params, x)

    def outer(scale):
        g = f({k: w * scale for k, w in params.items()}, x)
        return sum((t * t).sum() for t in g.values())

    one = sw.shard(torch.ones((), dtype=torch.float64), x.mesh)
    plain = sw.grad(
        lambda s: sum(
            (t * t).sum()
            for t in sw.grad(batch_loss)({k: w * s for k, w in params.items()}, x).values()
        )
    )
    close(sw.grad(outer)(one).full_tensor(), plain(one).full_tensor())
    _, tangent = sw.jvp(lambda p: f(p, x), (params,), ({k: w for k, w in params.items()},))
    _, other = sw.jvp(
        lambda p: sw.grad(batch_loss)(p, x), (params,), ({k: w for k, w in params.items()},)
    )
    for k in want:
        assert tangent[k].layout is want[k].layout
        close(tangent[k].full_tensor(), other[k].full_tensor())


def test_many_readers_of_one_weight_cost_one_all_reduce():
    grid = mesh(data=2)
    w, x = sw.shard(randn(4, 4), grid), sw.shard(randn(8, 4, seed=1), grid, "b/data d")
    with sw.record() as plan:
        g = sw.grad(lambda w: (x @ w).sum() + ((x @ w) ** 2).sum() + torch.sin(x @ w).sum())(w)
    assert plan.count(phase="backward", axis="data") == 1
    plain = w.full_tensor().requires_grad_()
    y = x.full_tensor() @ plain
    (y.sum() + (y**2).sum() + torch.sin(y).sum()).backward()
    close(g.full_tensor(), plain.grad)


@pytest.mark.parametrize("layout", STATES)
def test_vjp_takes_dual_cotangents_and_may_be_pulled_twice(layout):
    w = randn(6, 6)
    x = sw.shard(w, mesh(a=2), layout)
    y, pull = sw.vjp(lambda x: {"y": torch.sin(x), "n": 3}, x)
    assert not y["y"].requires_grad
    for seed in (1, 2):
        c = randn(6, 6, seed=seed)
        (g,) = pull({"y": sw.shard(c, x.mesh, y["y"].layout.dual)})
        assert g.layout is x.layout.dual
        close(g.full_tensor(), torch.cos(w) * c)


def test_vjp_refuses_a_cotangent_of_another_layout():
    x = sw.shard(randn(4), mesh(a=2), "_ {R:a}")
    _, pull = sw.vjp(torch.sin, x)
    with pytest.raises(
        sw.LayoutError, match=r"cotangent of f64\[4\]{R:a} must be f64\[4\]{U:a}, got f64\[4\]{R:a}"
    ):
        pull(x)
    with pytest.raises(ValueError, match="2 cotangents for 1 outputs"):
        pull((x, x))


def test_the_gradient_of_a_closed_over_tensor_flows_through_nested_grads():
    grid = mesh(a=2)
    w, x = randn(4), randn(4, seed=1)
    ws, xs = sw.shard(w, grid), sw.shard(x, grid, "_/a")

    def outer(w):
        inner = sw.grad(lambda x: ((x * w) ** 3).sum())(xs)
        return (inner * inner).sum()

    plain = w.clone().requires_grad_()
    ((3 * (x * plain) ** 2 * plain) ** 2).sum().backward()
    close(sw.grad(outer)(ws).full_tensor(), plain.grad)
