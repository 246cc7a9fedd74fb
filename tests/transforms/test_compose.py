"""Every composition of transforms equals torch.func's on the unsharded function, in float64."""

import pytest
import torch
import torch.func as tf

import shardwise as sw

# torch.func.jvp itself warns on its first call.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)
MESHES = {"a2": {"a": 2}, "a3": {"a": 3}, "a2b2": {"a": 2, "b": 2}}
# How a weight [6, 6] lies; inside, `use` makes it reduced over a, as a strategy does.
WEIGHTS = {
    "replicated": "_ _",
    "reduced": "_ _ {R:a}",
    "cut": "_/a _",
    "columns": "_ _/a",
}


def use(w):
    return sw.reshard(w, "_ _ {R:a}") if isinstance(w, sw.ShardedTensor) else w


def loss(w, x):
    y = torch.tanh(x @ use(w))
    return (y * y * y).mean()


def sample(w, x):  # one row
    return (torch.sin(x @ use(w)) ** 2).sum()


def total(tree):
    return (tree * tree * tree).sum()


# name -> the same program over a namespace of transforms; v is a direction like w.
PROGRAMS = {
    "grad": lambda t, w, x, v: t.grad(loss)(w, x),
    "grad of grad": lambda t, w, x, v: t.grad(lambda w: total(t.grad(loss)(w, x)))(w),
    "third": lambda t, w, x, v: t.grad(
        lambda w: total(t.grad(lambda w: total(t.grad(loss)(w, x)))(w))
    )(w),
    "jvp": lambda t, w, x, v: t.jvp(lambda w: loss(w, x), (w,), (v,))[1],
    "jvp of grad": lambda t, w, x, v: t.jvp(lambda w: t.grad(loss)(w, x), (w,), (v,))[1],
    "grad of jvp": lambda t, w, x, v: t.grad(lambda w: t.jvp(lambda w: loss(w, x), (w,), (v,))[1])(
        w
    ),
    "jvp of jvp": lambda t, w, x, v: t.jvp(
        lambda w: t.jvp(lambda w: loss(w, x), (w,), (v,))[1], (w,), (v,)
    )[1],
    "grad of hvp": lambda t, w, x, v: t.grad(
        lambda w: total(t.jvp(lambda w: t.grad(loss)(w, x), (w,), (v,))[1])
    )(w),
    "vmap": lambda t, w, x, v: t.vmap(lambda r: sample(w, r))(x),
    "vmap of grad": lambda t, w, x, v: t.vmap(t.grad(sample), in_dims=(None, 0))(w, x),
    "vmap of grad, closed over": lambda t, w, x, v: t.vmap(
        lambda r: t.grad(lambda w: sample(w, r))(w)
    )(x),
    "vmap of grad of x": lambda t, w, x, v: t.vmap(t.grad(lambda r: sample(w, r)))(x),
    "vmap of vjp": lambda t, w, x, v: t.vmap(
        lambda r: (lambda y, pull: pull(y)[0])(*t.vjp(lambda r: torch.sin(r), r))
    )(x),
    "vmap of jvp": lambda t, w, x, v: t.vmap(
        lambda r: t.jvp(lambda r: sample(w, r), (r,), (r,))[1], out_dims=0
    )(x),
    "vmap of hvp": lambda t, w, x, v: t.vmap(
        lambda r: t.jvp(t.grad(lambda r: sample(w, r)), (r,), (r,))[1]
    )(x),
    "grad of vmap": lambda t, w, x, v: t.grad(lambda w: total(t.vmap(lambda r: sample(w, r))(x)))(
        w
    ),
    "grad of vmap of grad": lambda t, w, x, v: t.grad(
        lambda w: total(t.vmap(t.grad(sample), in_dims=(None, 0))(w, x).sum(0))
    )(w),
    "jvp of vmap of grad": lambda t, w, x, v: t.jvp(
        lambda w: t.vmap(t.grad(lambda r: sample(w, r)))(x), (w,), (v,)
    )[1],
    "vmap of vmap": lambda t, w, x, v: t.vmap(t.vmap(torch.sin), in_dims=1, out_dims=1)(x),
    "vmap with sum over samples": lambda t, w, x, v: t.grad(
        lambda w: t.vmap(lambda r: sample(w, r), chunk_size=2)(x).mean()
    )(w),
}


class Ours:
    grad, jvp, vmap, vjp = (
        staticmethod(sw.grad),
        staticmethod(sw.jvp),
        staticmethod(sw.vmap),
        staticmethod(sw.vjp),
    )


@pytest.fixture(scope="module")
def values():
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(6, 6, generator=rng, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_composition_equals_torch_func(name, mesh, values):
    w, x, v = values
    want = PROGRAMS[name](tf, w, x, v)
    grid = sw.make_mesh(MESHES[mesh], transport="simulated", device="cpu")
    for lies, layout in WEIGHTS.items():
        for rows in (
            ("_/a _", "_ _", "_/b _", "_/b/a _") if mesh == "a2b2" and lies == "cut" else ("_/a _",)
        ):
            if mesh == "a2b2" and rows == "_/b/a _":
                continue  # 6 rows
            got = PROGRAMS[name](
                Ours, sw.shard(w, grid, layout), sw.shard(x, grid, rows), sw.shard(v, grid, layout)
            )
            torch.testing.assert_close(
                got.full_tensor(),
                want,
                rtol=1e-11,
                atol=1e-11,
                msg=lambda m, at=f"{name}, {lies}, {rows}": f"{at}: {m}",
            )


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("lies", WEIGHTS)
def test_hvp_gives_the_dual_layout_and_the_hessian_product(mesh, lies, values):
    w, x, v = values
    grid = sw.make_mesh(MESHES[mesh], transport="simulated", device="cpu")
    sharded = [sw.shard(t, grid, WEIGHTS[lies]) for t in (w, v)]
    xs = sw.shard(x, grid, "_/a _")
    got = sw.hvp(lambda w: loss(w, xs), *sharded)
    assert got.layout is sw.Layout(WEIGHTS[lies]).dual
    want = torch.einsum("ijkl,kl->ij", tf.hessian(lambda w: loss(w, x))(w), v)
    torch.testing.assert_close(got.full_tensor(), want, rtol=1e-11, atol=1e-11)


def test_hessian_as_vmap_of_hvp(values):
    w, x, _ = values
    grid = sw.make_mesh({"a": 2}, transport="simulated", device="cpu")
    basis = torch.eye(36, dtype=torch.float64).reshape(36, 6, 6)
    ws, xs = sw.shard(w, grid, "_/a _"), sw.shard(x, grid, "_/a _")
    got = sw.vmap(lambda v: sw.hvp(lambda w: loss(w, xs), ws, v))(sw.shard(basis, grid, "_ _/a _"))
    assert str(got) == "f64[36 6/a 6]"
    want = tf.hessian(lambda w: loss(w, x))(w).reshape(36, 6, 6)
    torch.testing.assert_close(got.full_tensor(), want, rtol=1e-11, atol=1e-11)


def test_per_entry_gradients_lie_with_their_entries(values):
    w, x, _ = values
    grid = sw.make_mesh({"a": 2}, transport="simulated", device="cpu")
    got = sw.vmap(sw.grad(sample), in_dims=(None, 0))(sw.shard(w, grid), sw.shard(x, grid, "_/a _"))
    assert str(got) == "f64[6/a 6 6]"
