"""dense in fp8: the layouts of the einsum, values within the bound of 8 bits, on any mesh alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from check import close, moves, placed
from gallery import mesh, values
from torch import Tensor

import shardwise as sw
from shardwise import nn
from shardwise.kernels import fp8
from shardwise.ops.audit import report

B, S, K, N = 8, 16, 64, 96
ROUNDING = 0.045  # of a product's size, root mean square: two factors, each rounded by 2.6 %
GRADIENT = 0.065  # one of the factors is a gradient with two bits, rounded by 5.2 %


def dense(x: Any, w: Any, b: Any = None, **options: Any) -> Any:
    return nn.dense(x, w, b, precision="fp8", **options)


def off(found: Any, exact: Tensor) -> float:
    """Root mean square of the error over that of the exact value."""
    whole = found.full_tensor() if isinstance(found, sw.ShardedTensor) else found
    return float((whole.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("axes", [1, 2])
def test_every_layout_of_both_operands(axes: int) -> None:
    """In float64, which is not quantised: the rule, and gradients of every layout."""
    samples = None if axes == 1 else 60
    found = report(dense, [(6, 12), (12, 6)], axes=axes, samples=samples, reference=torch.mm)
    plain = report(nn.dense, [(6, 12), (12, 6)], axes=axes, samples=samples, reference=torch.mm)
    assert not found.wrong
    assert sorted(found.choice) == sorted(plain.choice)
    for key, result in plain.right.items():
        if not any("U:" in layout for layout in key):
            assert found.right[key] == result


def test_a_sum_that_is_owed_is_reduced_before_it_is_rounded() -> None:
    on = mesh(t=2)
    x, w = placed(values(S, K), on, "s d {U:t}"), placed(values(K, N), on, "d f {R:t}")
    assert nn.dense(x, w).layout is sw.Layout("s f {U:t}")
    with sw.record() as plan:
        y = dense(x, w)
    assert y.layout is sw.Layout("s f {R:t}") or y.layout is sw.Layout("s f")
    assert [kind for kind, *_ in moves(plan, "forward")] == ["all_reduce"]


# layouts of x, w, b and out
CASES: dict[str, tuple[dict[str, int], str, str, str, str]] = {
    "one": ({"t": 1}, "b s d", "d f", "f", "b s f"),
    "data": ({"t": 4}, "b/t s d", "d f {R:t}", "f {R:t}", "b/t s f"),
    "column parallel": ({"t": 2}, "b s d {R:t}", "d f/t", "f/t", "b s f/t"),
    "row parallel": ({"t": 4}, "b s d/t", "d/t f", "f", "b s f"),
    "row parallel, scattered": ({"t": 4}, "b s d/t", "d/t f", "f", "b/t s f"),
    "cube": ({"i": 2, "j": 2, "k": 2}, "b/i/j s d/k", "d/k/i f/j", "f/j {R:i}", "b/i/k s f/j"),
}  # fmt: skip


def run(
    case: str, dtype: torch.dtype, call: Callable[..., Any]
) -> tuple[Any, tuple[Any, ...], sw.Plan]:
    """Result, gradients for one cotangent, and what moved."""
    axes, *layouts, out = CASES[case]
    on = mesh(**axes)
    x, w, b, g = (values(B, S, K), values(K, N, seed=1) / 8, values(N, seed=2), values(B, S, N))
    given = [placed(v.to(dtype), on, to) for v, to in zip((x, w, b), layouts, strict=True)]
    with sw.record() as plan:
        y, pull = sw.vjp(lambda *a: call(*a, out=out), *given)
        grads = pull(placed(g.to(dtype), on, y.layout.dual))
    return y, grads, plan


@pytest.mark.parametrize("case", CASES)
def test_values_are_within_the_bound_and_equal_on_every_mesh(case: str) -> None:
    x, w, b, g = values(B, S, K), values(K, N, seed=1) / 8, values(N, seed=2), values(B, S, N)
    y, grads, plan = run(case, torch.float32, dense)
    alone, alone_grads, _ = run("one", torch.float32, dense)
    assert y.layout is sw.Layout(CASES[case][-1])
    assert y.dtype == torch.float32
    assert 0.01 < off(y - 0.0, x @ w + b) < ROUNDING
    assert 0.02 < off(grads[0], g @ w.T) < GRADIENT
    assert 0.02 < off(grads[1], torch.einsum("bsk,bsn->kn", x, g)) < GRADIENT
    # Blocks have scales of their own, and yet the values of the whole, up to what is tiny in it.
    for found, one in zip((y, *grads), (alone, *alone_grads), strict=True):
        assert off(found, one.full_tensor().double()) < 1e-4
    plain = run(case, torch.float32, nn.dense)[2]
    assert moves(plan, "forward") == moves(plain, "forward")
    assert sorted(moves(plan, "backward")) == sorted(moves(plain, "backward"))
    assert plan.flops == plain.flops


@pytest.mark.parametrize("case", CASES)
def test_float64_is_not_rounded(case: str) -> None:
    y, grads, _ = run(case, torch.float64, dense)
    wanted, wanted_grads, _ = run(case, torch.float64, nn.dense)
    for found, exact in zip((y, *grads), (wanted, *wanted_grads), strict=True):
        assert found.layout is exact.layout
        close(found, exact.full_tensor())


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("axes", "x_at", "w_at", "out"),
    [
        ({"t": 1}, "b s d", "d f", "b s f"),
        ({"t": 2}, "b s d", "d f/t", "b s f/t"),
        ({"t": 4}, "b/t s d", "d f", "b/t s f"),
        ({"row": 2, "col": 2}, "b/row s d/col", "d/row f/col", "b/row s f/col"),
    ],
    ids=str,
)
def test_a_tuple_of_weights_is_one_product(axes, x_at, w_at, out, with_bias, monkeypatch) -> None:
    on, x = mesh(**axes), values(B, S, K).float()
    ws = [values(K, n, seed=n).float() for n in (64, 32, 32)]
    bs = [values(n, seed=n).float() for n in (64, 32, 32)] if with_bias else [None] * 3
    places = [placed(w, on, w_at) for w in ws]
    bias_at = "f/" + w_at.split("f/")[1] if "f/" in w_at else "f"
    biases = [None if b is None else placed(b, on, bias_at) for b in bs]
    calls: list[tuple[int, ...]] = []
    real = fp8.fp8_linear
    monkeypatch.setattr(fp8, "fp8_linear", lambda x, w, *a: calls.append(w.shape) or real(x, w, *a))

    def total(x: Any, *ws: Any) -> Any:
        ys = dense(x, ws, tuple(biases) if with_bias else None, out=out)
        assert all(y.layout is sw.Layout(out) for y in ys)
        return sum((y * y).sum() for y in ys)

    with sw.record() as plan:
        loss, grads = sw.value_and_grad(total, (0, 1, 2, 3))(placed(x, on, x_at), *places)
    cut = on.group_size(tuple(w_at.split("f")[1].strip("/").split())) if "f/" in w_at else 1
    assert calls == [(K, 128 // cut)] * len(loss.mesh.positions(()))
    ys = [x.double() @ w.double() + (0 if b is None else b.double())
          for w, b in zip(ws, bs, strict=True)]  # fmt: skip
    assert abs(loss.item() / float(sum((y * y).sum() for y in ys)) - 1) < 0.02
    wanted = sum(2 * y @ w.double().T for y, w in zip(ys, ws, strict=True))
    assert off(grads[0], wanted) < 2 * GRADIENT  # y itself is rounded, and then its gradient
    for grad, y in zip(grads[1:], ys, strict=True):
        assert off(grad, torch.einsum("bsk,bsn->kn", x.double(), 2 * y)) < 2 * GRADIENT
    plain = nn.dense(placed(x, on, x_at), tuple(places), out=out)
    assert [y.layout for y in plain] == [sw.Layout(out)] * 3
    assert not plan.warnings


def test_added_products_are_reduced_once() -> None:
    on = mesh(t=2)
    a, w_o = values(B, S, 4, 16).float(), values(4, 16, N, seed=1).float()
    u, w_down = values(B, S, K, seed=2).float(), values(K, N, seed=3).float()
    given = [placed(a, on, "b s h/t d"), placed(u, on, "b s f/t")]
    weights = (placed(w_o, on, "h/t d e"), placed(w_down, on, "f/t e"))
    with sw.record() as plan:
        y = dense(given, weights, out="b s e", inputs=(2, 1))
    exact = torch.einsum("bshd,hde->bse", a.double(), w_o.double()) + u.double() @ w_down.double()
    assert off(y, exact) < ROUNDING
    assert moves(plan, "forward") == [("all_reduce", "t", B * S * N)]


@pytest.mark.parametrize("shape", [(3, 5, 64, 96), (2, 8, 40, 96), (2, 8, 64, 24)], ids=str)
def test_sizes_that_are_no_multiples_of_16_are_multiplied_plainly(shape: Any) -> None:
    b, s, k, n = shape
    on = mesh(t=1)
    x, w = placed(values(b, s, k).float(), on, "b s d"), placed(values(k, n).float(), on, "d f")
    assert torch.equal(dense(x, w).full_tensor(), nn.dense(x, w).full_tensor())


def test_the_dtype_stays() -> None:
    y, grads, _ = run("data", torch.bfloat16, dense)
    assert y.dtype == torch.bfloat16
    assert all(g.dtype == torch.bfloat16 for g in grads)


def test_it_can_be_planned() -> None:
    on = sw.make_mesh({"t": 4}, transport="abstract")
    x, w = (sw.shard(torch.empty(shape, device="meta"), on, at)
            for shape, at in (((B, S, K), "b s d/t"), ((K, N), "d/t f")))  # fmt: skip
    plan = sw.plan(lambda x, w: dense(x, w, out="b s f"), x, w)
    assert moves(plan, "forward") == [("all_reduce", "t", 2 * 3 / 4 * B * S * N)]
    assert plan.flops == 2 * B * S * K * N / 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's compiler
def test_compiled_it_gives_the_same() -> None:
    on = mesh(t=2)
    x, w = placed(values(B, S, K).float(), on, "b/t s d"), placed(values(K, N).float(), on, "d f")

    def loss(x: Any, w: Any) -> Any:
        return dense(x, w).sin().sum()

    value, grads = sw.value_and_grad(loss, (0, 1))(x, w)
    found, found_grads = sw.jit(sw.value_and_grad(loss, (0, 1)))(x, w)
    for a, b in zip((found, *found_grads), (value, *grads), strict=True):
        torch.testing.assert_close(a.full_tensor(), b.full_tensor(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recompute", ["all", "cheap"])
def test_a_rerun_gives_the_same_bits(recompute: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on = mesh(t=2)
    x, w = placed(values(B, S, K).float(), on, "b/t s d"), placed(values(K, N).float(), on, "d f")

    def loss(x: Any, w: Any) -> Any:
        return dense(x, w).sin().sum()

    wanted = sw.grad(loss, (0, 1))(x, w)
    found = sw.grad(sw.remat(loss, recompute=recompute), (0, 1))(x, w)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.full_tensor(), b.full_tensor())


def test_wrong_arguments_are_named() -> None:
    on = mesh(t=2)
    x, w = placed(values(S, K), on, "b d"), placed(values(K, N), on, "d f")
    with pytest.raises(ValueError, match=r"unknown precision 'int4'.*'default', 'fp8'"):
        nn.dense(x, w, precision="int4")  # pyright: ignore
    with pytest.raises(ValueError, match="precision 'fp8' needs method 'direct', not 'ring'"):
        dense(x, w, method="ring")
    with pytest.raises(TypeError, match="several dtypes"):
        dense(x, w.float())


def test_no_second_derivative_in_either_mode() -> None:
    mesh = sw.make_mesh({"data": 2})
    x, w = sw.shard(torch.randn(32, 64), mesh), sw.shard(torch.randn(64, 32) / 8, mesh)

    def loss(w: Any) -> Any:
        return (torch.tanh(sw.nn.dense(x, w, precision="fp8")) ** 2).sum()

    with pytest.raises(RuntimeError, match="fp8 has no second derivative"):
        sw.hvp(loss, w, w)
    with pytest.raises(RuntimeError, match="fp8 has no second derivative"):
        sw.jvp(sw.grad(loss), (w,), (w,))
