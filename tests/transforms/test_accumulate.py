"""accumulate: micro-batches add up to the whole batch, and nothing more moves than is asked."""

from typing import Any

import pytest
import torch

import shardwise as sw


def mesh(**axes):
    return sw.make_mesh(axes, transport="simulated", device="cpu")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got, want, tol=1e-12):
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def loss(params, batch):
    y = torch.tanh(batch["x"] @ params["w"])
    return ((y - batch["y"]) ** 2).mean()


def setting(layout="_ _"):
    grid = mesh(data=2)
    params = {"w": sw.shard(randn(4, 4), grid, layout), "n": sw.shard(torch.arange(3), grid)}
    batch = {k: sw.shard(randn(12, 4, seed=i), grid, "b/data d") for i, k in enumerate("xy", 1)}
    return params, {**batch, "scale": 1.0, "none": None}


@pytest.mark.parametrize("num", [1, 2, 3, 6])
@pytest.mark.parametrize("asked", [None, "... {U:data}", ".../data"])
def test_micro_batches_add_up_to_the_whole_batch(num, asked):
    params, batch = setting()
    f = sw.value_and_grad(loss, grads=asked)
    want, whole = f(params, batch)
    with sw.record() as plan:
        value, grads = sw.accumulate(f, num)(params, batch)
    close(value.full_tensor(), want.full_tensor())
    close(grads["w"].full_tensor(), whole["w"].full_tensor())
    assert grads["w"].layout is whole["w"].layout
    assert grads["n"] is None
    moved = {
        None: ("all_reduce", num),
        "... {U:data}": ("all_reduce", 0),
        ".../data": ("reduce_scatter", num),
    }
    kind, times = moved[asked]
    assert plan.count(phase="backward") == plan.count(phase="backward", kind=kind) == times


@pytest.mark.parametrize("num", [2, 3])
@pytest.mark.parametrize("weigh", ["tensor", "number"])
def test_unequal_counts_of_tokens_are_weighted(num, weigh):
    grid = mesh(data=2)
    x = randn(12, 5)
    mask = torch.arange(12)[:, None] >= torch.arange(5) * 3
    w = randn(5, seed=1)
    ws = sw.shard(w, grid)
    batch = {"x": sw.shard(x, grid, "b/data s"), "mask": sw.shard(mask, grid, "b/data s")}

    def masked(w, batch):
        per = torch.sin(batch["x"] * w) * batch["mask"]
        return per.sum() / batch["mask"].sum()

    def count(b):
        total = b["mask"].sum()
        return total if weigh == "tensor" else int(total.item())

    value, g = sw.accumulate(sw.value_and_grad(masked), num, weight=count)(ws, batch)
    leaf = w.clone().requires_grad_()
    want = (torch.sin(x * leaf) * mask).sum() / mask.sum()
    want.backward()
    close(value.full_tensor(), want.detach())
    close(g.full_tensor(), leaf.grad)
    with pytest.raises(AssertionError):  # the mean of means is another number
        close(
            sw.accumulate(sw.value_and_grad(masked), num)(ws, batch)[0].full_tensor(), want.detach()
        )


def test_a_weight_left_unreduced_is_reduced():
    params, batch = setting()
    f = sw.value_and_grad(loss)
    weight = lambda b: (b["x"] * 0 + 1).sum()  # noqa: E731 - f64[]{U:data}
    value, _ = sw.accumulate(f, 2, weight=weight)(params, batch)
    close(value.full_tensor(), f(params, batch)[0].full_tensor())


def test_each_row_stays_on_its_device():
    grid = mesh(data=2)
    x = sw.shard(torch.arange(8.0), grid, "b/data")
    w = sw.shard(torch.ones(()), grid)
    seen = []

    def f(w, x):
        seen.append([s.tolist() for s in x.shards])
        return (x * w).sum()

    sw.accumulate(sw.value_and_grad(f), 2)(w, x)
    assert seen == [[[0.0, 1.0], [4.0, 5.0]], [[2.0, 3.0], [6.0, 7.0]]]


def test_sums_are_wide_and_aux_is_listed():
    params, batch = setting()
    half = {"w": params["w"].to(torch.bfloat16)}
    micro = {k: batch[k].to(torch.bfloat16) for k in "xy"}
    f = sw.value_and_grad(lambda p, b: (loss(p, b), b["x"].shape[0]), has_aux=True)
    (value, aux), g = sw.accumulate(f, 3)(half, micro)
    assert value.dtype == g["w"].dtype == torch.float32
    assert aux == [4, 4, 4]
    assert sw.accumulate(f, 3, dtype=torch.float64)(half, micro)[1]["w"].dtype == torch.float64


def test_the_batch_may_stand_anywhere():
    params, batch = setting()
    f = sw.value_and_grad(lambda b, p: loss(p, b), 1)
    value, g = sw.accumulate(f, 2, argnum=0)(batch, params)
    want, whole = f(batch, params)
    close(value.full_tensor(), want.full_tensor())
    close(g["w"].full_tensor(), whole["w"].full_tensor())


def test_parameters_that_share_memory_between_devices_are_summed_once():
    params, batch = setting("_ _ {R:data}")
    f = sw.value_and_grad(lambda p, b: sw.reshard(loss(p, b), ""), grads="_ _")
    _, g = sw.accumulate(f, 3)(params, batch)
    close(g["w"].full_tensor(), f(params, batch)[1]["w"].full_tensor())


def test_bad_batches_are_refused():
    params, batch = setting()
    f = sw.value_and_grad(loss)
    with pytest.raises(
        sw.LayoutError, match="x has 6 rows per device, which 4 micro-batches do not divide"
    ) as error:
        sw.accumulate(f, 4)(params, batch)
    assert error.value.kind == "indivisible"
    with pytest.raises(
        sw.LayoutError,
        match="must be cut alike in all of the batch, but it is cut: x by data, y by nothing",
    ):
        sw.accumulate(f, 2)(params, {**batch, "y": sw.reshard(batch["y"], "b d")})
    with pytest.raises(ValueError, match="num must be 1 or more"):
        sw.accumulate(f, 0)
    with pytest.raises(ValueError, match="a weight is a number or a scalar"):
        sw.accumulate(f, 2, weight=lambda b: b["x"])(params, batch)


def test_it_plans_on_an_abstract_mesh():
    grid = sw.make_mesh({"data": 64}, transport="abstract")
    params = {"w": sw.zeros((8, 8), grid)}
    batch = {k: sw.zeros((256, 8), grid, "b/data d") for k in "xy"}
    made = sw.plan(sw.accumulate(sw.value_and_grad(loss, grads="... {U:data}"), 4), params, batch)
    assert made.count(phase="backward") == 0
    assert str(made.result[1]["w"]) == "f32[8 8]{U:data}"


def test_a_micro_batch_without_a_label_counts_nothing() -> None:
    """Its mean is 0/0; its weight is 0, and so is what it adds to the loss."""
    mesh = sw.make_mesh({"data": 1})
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(4, 4, generator=rng, dtype=torch.float64)
    w = torch.randn(4, 6, generator=rng, dtype=torch.float64)
    batch = sw.shard({"x": x, "y": torch.tensor([1, 2, -100, -100])}, mesh)
    params = {"w": sw.shard(w, mesh)}

    def loss(p: Any, b: Any) -> Any:
        return torch.nn.functional.cross_entropy(b["x"] @ p["w"], b["y"])

    whole = sw.value_and_grad(loss)(params, batch)
    counted = sw.accumulate(sw.value_and_grad(loss), 2, weight=lambda b: (b["y"] != -100).sum())
    value, grads = counted(params, batch)
    assert abs(value.item() - whole[0].item()) < 1e-6
    torch.testing.assert_close(
        grads["w"].full_tensor(), whole[1]["w"].full_tensor(), check_dtype=False
    )
