"""scan: lax.scan's contract over stacked layers."""

import pytest
import torch

import shardwise as sw


def mesh(**axes):
    return sw.make_mesh(axes, transport="simulated", device="cpu")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def setting(layout="_ _ _"):
    grid = mesh(data=2, other=1)
    blocks = {
        "w": sw.shard(randn(3, 4, 4) / 2, grid, layout),
        "b": sw.shard(randn(3, 4, seed=1), grid),
    }
    return {"blocks": blocks}, sw.shard(randn(8, 4, seed=2), grid, "b/data d")


def body(x, p):
    x = torch.tanh(x @ sw.reshard(p["w"], "... {R:data}") + p["b"])
    return x, {"norm": (x * x).sum(), "none": None}


def loss(params, x, recompute="none"):
    x, ys = sw.scan(body, x, params["blocks"], recompute=recompute)
    return (x * x).mean() + ys["norm"].sum()


def expected(params, x):
    w, b = (params["blocks"][k].full_tensor().requires_grad_() for k in ("w", "b"))
    y, norms = x.full_tensor(), []
    for i in range(3):
        y = torch.tanh(y @ w[i] + b[i])
        norms.append((y * y).sum())
    value = (y * y).mean() + sum(norms)
    value.backward()
    return value.detach(), {"w": w.grad, "b": b.grad}, torch.stack(norms).detach()


@pytest.mark.parametrize("recompute", ["none", "cheap", "all"])
@pytest.mark.parametrize("layout", ["_ _ _", "_ _/data _", "_ _ _ {R:data}", "_/other _ _/data"])
def test_values_and_gradients_are_those_of_the_loop(layout, recompute):
    params, x = setting(layout)
    value, g = sw.value_and_grad(loss)(params, x, recompute)
    want, grads, norms = expected(params, x)
    torch.testing.assert_close(value.full_tensor(), want, rtol=1e-12, atol=1e-12)
    for k in grads:
        torch.testing.assert_close(g["blocks"][k].full_tensor(), grads[k], rtol=1e-12, atol=1e-12)
        assert g["blocks"][k].layout is params["blocks"][k].layout.dual
    _, ys = sw.scan(body, x, params["blocks"])
    assert str(ys["norm"]) == "f64[3]{U:data}"
    torch.testing.assert_close(ys["norm"].full_tensor(), norms, rtol=1e-12, atol=1e-12)
    assert ys["none"] is None


def test_records_name_the_parameter_and_gather_layer_by_layer():
    params, x = setting("_ _/data _")
    with sw.record() as plan:
        sw.grad(loss)(params, x)
    gathers = [c for c in plan.collectives if c.kind == "all_gather"]
    assert [(c.path, c.shape, c.phase) for c in gathers] == [("blocks.w", (2, 4), "forward")] * 3
    assert plan.count(kind="reduce_scatter", path="blocks.w", phase="backward") == 3
    assert plan.count(kind="all_reduce", path="blocks.b", phase="backward") == 3


def test_second_order():
    params, x = setting()
    v = {
        "blocks": {
            k: sw.shard(randn(*t.shape, seed=5), x.mesh) for k, t in params["blocks"].items()
        }
    }
    got = sw.hvp(lambda p: loss(p, x), params, v)["blocks"]

    def plain(w, b):
        y, extra = x.full_tensor(), 0
        for i in range(3):
            y = torch.tanh(y @ w[i] + b[i])
            extra = extra + (y * y).sum()
        return (y * y).mean() + extra

    args = tuple(params["blocks"][k].full_tensor() for k in ("w", "b"))
    dirs = tuple(v["blocks"][k].full_tensor() for k in ("w", "b"))
    _, want = torch.autograd.functional.hvp(plain, args, dirs)
    for k, t in zip(("w", "b"), want, strict=True):
        torch.testing.assert_close(got[k].full_tensor(), t, rtol=1e-11, atol=1e-11)


def test_a_carry_that_drifts_names_paths_and_both_types():
    grid = mesh(a=2)
    carry = {"x": sw.shard(randn(4), grid), "n": sw.shard(randn(2), grid), "k": 1}
    xs = sw.shard(randn(3, 4), grid)

    def f(c, x):
        return {"x": sw.reshard(c["x"], "_/a"), "n": c["n"].to(torch.float32), "k": 2}, None

    with pytest.raises(sw.LayoutError) as error:
        sw.scan(f, carry, xs)
    assert error.value.kind == "drift"
    text = str(error.value)
    assert "the carry changes its type in iteration 0" in text
    assert "x  f64[4] -> f64[4/a]" in text
    assert "n  f64[2] -> f32[2]" in text
    assert "k  " not in text


def test_a_carry_of_another_structure_is_refused():
    grid = mesh(a=2)
    xs = sw.shard(randn(3, 4), grid)
    with pytest.raises(sw.LayoutError, match="changes its type in iteration 0"):
        sw.scan(lambda c, x: ((c, x), None), sw.shard(randn(4), grid), xs)


def test_a_scanned_dim_that_is_cut_is_refused_with_the_fix():
    xs = {"w": sw.shard(randn(4, 4), mesh(a=2), "layer/a d")}
    with pytest.raises(sw.LayoutError) as error:
        sw.scan(lambda c, x: (c, None), 0, xs)
    assert "the scanned dim 0 is cut by axis 'a'" in str(error.value)
    assert "gather it: sw.reshard(x, '_ _')" in str(error.value)
    assert "w  f64[4/a 4]" in str(error.value)


@pytest.mark.parametrize(
    ("xs", "words"),
    [
        ({}, "there are no tensors"),
        ({"a": torch.ones(2), "b": torch.ones(3)}, "a has 2, b has 3"),
        ({"a": torch.ones(())}, "a is a scalar"),
        (torch.ones(0, 2), "dim 0 of xs is empty"),
    ],
)
def test_bad_stacks_are_refused(xs, words):
    with pytest.raises(ValueError, match=words):
        sw.scan(lambda c, x: (c, None), 0, xs)
    with pytest.raises(TypeError, match=r"returns \(carry, y\), got int"):
        sw.scan(lambda c, x: 3, 0, torch.ones(2))
