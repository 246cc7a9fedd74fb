"""vmap: the mapped dim and its axes are invisible inside and come back outside."""

import pytest
import torch

import shardwise as sw


def mesh(**axes):
    return sw.make_mesh(axes, transport="simulated", device="cpu")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_inside_the_mapped_dim_and_its_axes_are_gone():
    x = sw.shard(randn(6, 4), mesh(a=2, b=2), "_/a _/b")
    seen = []

    def f(x):
        seen.append(str(x))
        return x.sum()

    y = sw.vmap(f)(x)
    assert seen == ["f64[4/b]{V:a}"]
    assert str(y) == "f64[6/a]{U:b}"
    close(y.full_tensor(), x.full_tensor().sum(1))


@pytest.mark.parametrize(
    "layout", ["_ _ _", "_/a _ _", "_ _/a _", "_ _/b/a _", "_ _ _ {U:a}", "_ _/a _ {R:b}"]
)
@pytest.mark.parametrize(("into", "out"), [(0, 0), (1, 0), (1, -1), (-2, 1), (2, 2)])
def test_any_in_and_out_dim(layout, into, out):
    value = randn(4, 4, 4)
    x = sw.shard(value, mesh(a=2, b=2), layout)
    f = torch.func.vmap(torch.sin, into, out)
    close(sw.vmap(torch.sin, into, out)(x).full_tensor(), f(value))


def test_trees_of_arguments_and_results():
    grid = mesh(a=2)
    x, y = sw.shard(randn(4, 3), grid, "_/a _"), sw.shard(randn(3, 4, seed=1), grid, "_ _/a")
    w = sw.shard(randn(3, seed=2), grid)

    def f(batch, w, k):
        return {"dot": (batch["x"] * batch["y"] * w).sum() * k, "w": w, "none": None}

    out = {"dot": 0, "w": None, "none": None}
    got = sw.vmap(f, in_dims=({"x": 0, "y": 1}, None, None), out_dims=out)({"x": x, "y": y}, w, 2.0)
    assert str(got["dot"]) == "f64[4/a]"
    assert got["w"].layout is w.layout
    assert got["none"] is None
    want = 2 * (x.full_tensor() * y.full_tensor().T * w.full_tensor()).sum(1)
    close(got["dot"].full_tensor(), want)


def test_a_mapped_argument_that_is_not_cut_is_cut_like_the_others():
    grid = mesh(a=2)
    x, y = sw.shard(randn(4, 3), grid, "_/a _"), sw.shard(randn(4, 3, seed=1), grid)
    got = sw.vmap(lambda x, y, z: (x * y * z).sum())(x, y, torch.ones(4, 3, dtype=torch.float64))
    assert str(got) == "f64[4/a]"
    close(got.full_tensor(), (x.full_tensor() * y.full_tensor()).sum(1))


def test_a_result_that_is_equal_on_the_devices_is_repeated():
    grid = mesh(a=2)
    x, w = sw.shard(randn(4), grid, "_/a"), sw.shard(randn(3), grid, "_ {U:a}")
    got = sw.vmap(lambda x: w)(x)
    assert str(got) == "f64[4/a 3]"
    close(got.full_tensor(), w.full_tensor().expand(4, 3))


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_a_weight_that_is_closed_over_gets_its_whole_gradient(chunk):
    grid = mesh(a=2)
    w, x = randn(3), randn(8, 3, seed=1)
    xs = sw.shard(x, grid, "_/a _")

    def loss(w):
        return sw.vmap(lambda x: torch.tanh((x * w).sum()), chunk_size=chunk)(xs).mean()

    with sw.record() as plan:
        g = sw.grad(loss)(sw.shard(w, grid))
    leaf = w.clone().requires_grad_()
    torch.tanh((x * leaf).sum(1)).mean().backward()
    close(g.full_tensor(), leaf.grad)
    assert plan.count(phase="backward") == (1 if chunk is None else 4 // chunk)


def test_layout_strings_written_for_the_whole_do_not_move_the_mapped_axes():
    grid = mesh(a=2, b=2)
    x, w = sw.shard(randn(4, 4), grid, "_/a _/b"), sw.shard(randn(4, 4, seed=1), grid, "_/b _")
    got = sw.vmap(lambda x: torch.sin(sw.reshard(x @ w, "d {R:b}")))(x)
    assert str(got) == "f64[4/a 4]{R:b}"
    close(got.full_tensor(), torch.sin(x.full_tensor() @ w.full_tensor()))


def test_size_one_axes_type_as_larger_ones():
    for n in (1, 2):
        x = sw.shard(randn(4, 3), mesh(a=n), "_/a _")
        assert sw.vmap(lambda x: x.sum())(x).layout is sw.Layout("_/a")


def test_plain_tensors_are_mapped_too():
    w = sw.shard(randn(4), mesh(a=2), "_/a")
    got = sw.vmap(lambda t: (w * t).sum())(randn(5))
    assert str(got) == "f64[5]{U:a}"
    close(got.full_tensor(), w.full_tensor().sum() * randn(5))


def test_what_cannot_be_mapped_says_why():
    grid = mesh(a=2, b=2)
    x, y = sw.shard(randn(4, 4), grid, "_/a _"), sw.shard(randn(4, 4), grid, "_/b _")
    with pytest.raises(
        sw.LayoutError, match="the mapped dims are cut by different axes: a and b"
    ) as error:
        sw.vmap(torch.mul)(x, y)
    assert error.value.kind == "choice"
    with pytest.raises(ValueError, match="no argument is mapped"):
        sw.vmap(torch.sin, in_dims=None)(x)
    with pytest.raises(ValueError, match=r"different sizes: \[2, 4\]"):
        sw.vmap(torch.mul)(x, sw.shard(randn(2, 4), grid))
    with pytest.raises(IndexError, match="in_dims has 2 for a tensor with 2 dims"):
        sw.vmap(torch.sin, in_dims=2)(x)
    with pytest.raises(ValueError, match="is no prefix of the tree"):
        sw.vmap(torch.sin, in_dims=(0, 0))(x)
    with pytest.raises(TypeError, match="must return tensors, got float"):
        sw.vmap(lambda x: 1.0)(x)
    with pytest.raises(
        sw.LayoutError, match="out_dims is None for a result that differs between entries"
    ):
        sw.vmap(torch.sin, out_dims=None)(x)
    with pytest.raises(sw.LayoutError, match="out_dims is None"):
        sw.vmap(torch.sin, out_dims=None)(sw.shard(randn(4, 4), grid))


def test_it_plans_on_an_abstract_mesh():
    grid = sw.make_mesh({"data": 64}, transport="abstract")
    x, w = sw.zeros((128, 8), grid, "b/data d"), sw.zeros((8,), grid)
    made = sw.plan(sw.vmap(sw.grad(lambda w, x: (w * x).sum()), in_dims=(None, 0)), w, x)
    assert str(made.result) == "f32[128/data 8]"
    assert not made.collectives


def test_local_code_inside_vmap_and_vmap_inside_local_code():
    grid = mesh(a=2, b=2)
    value = randn(4, 4)
    x = sw.shard(value, grid, "_/a _/b")
    total = sw.shard_map(
        lambda r: sw.ops.all_reduce(r.sum(), "b"), in_layouts="_/b", out_layouts=""
    )
    got = sw.vmap(total)(x)
    assert str(got) == "f64[4/a]"
    close(got.full_tensor(), value.sum(1))
    each = sw.shard_map(
        sw.vmap(lambda r: sw.ops.all_reduce(r.sum(), "b")), in_layouts="_/a _/b", out_layouts="_/a"
    )
    close(each(x).full_tensor(), value.sum(1))
    close(
        sw.grad(lambda x: (each(x) ** 2).sum())(x).full_tensor(),
        2 * value.sum(1, keepdim=True).expand(4, 4),
    )
    close(
        sw.grad(lambda x: (sw.vmap(total)(x) ** 2).sum())(x).full_tensor(),
        2 * value.sum(1, keepdim=True).expand(4, 4),
    )
