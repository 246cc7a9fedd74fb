"""fp8 by its definition: values, straight-through gradients, and every transform, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from shardwise.kernels import fp8

# Forward mode imports torch's decompositions for it, which use torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

F = torch.func
ROWS, INNER, OUTER = 32, 48, 64


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + 1000 * seed)
    return torch.randn(shape, generator=generator).to(dtype)


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, w and the gradient of the product."""
    x, w, g = normal(ROWS, INNER), normal(INNER, OUTER) / 7, normal(ROWS, OUTER, seed=1) / 500
    return x.to(dtype), w.to(dtype), g.to(dtype)


def quantised(x: Tensor, gradient: bool = False) -> Tensor:
    """What a tensor becomes, in float64, written another way than the library does."""
    dtype = fp8.E5M2 if gradient else fp8.E4M3
    scale = 1.0
    while float(x.abs().max()) > torch.finfo(dtype).max * scale:
        scale *= 2
    while float(x.abs().max()) <= torch.finfo(dtype).max * scale / 2:
        scale /= 2
    return (x.float() / scale).to(dtype).double() * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients_are_those_of_the_quantised(dtype: torch.dtype) -> None:
    x, w, g = operands(dtype)
    y, pull = F.vjp(fp8.linear, x, w)
    grad_x, grad_w = pull(g)
    qx, qw, qg = quantised(x), quantised(w), quantised(g, gradient=True)
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 1e-6}
    for found, exact in ((y, qx @ qw), (grad_x, qg @ qw.t()), (grad_w, qx.t() @ qg)):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, **tolerance)


@pytest.mark.parametrize("gradient", [False, True], ids=["e4m3", "e5m2"])
def test_rounding_of_an_element(gradient: bool) -> None:
    x = normal(64, 64) * torch.exp2(normal(64, 64, seed=1))
    rows, columns, scale = fp8.fp8_quantize(x, None, gradient)
    assert torch.equal(rows.t().float(), columns.float())
    error = (rows.double() * scale.double() - x.double()).abs()
    bound = 2.0**-3 if gradient else 2.0**-4
    smallest = torch.finfo(rows.dtype).smallest_normal * scale.double()
    assert (error <= bound * x.double().abs().clamp(min=smallest)).all()
    assert scale.log2() == scale.log2().round()
    assert 0.5 * torch.finfo(rows.dtype).max < rows.float().abs().max()


def test_parts_with_scales_of_their_own_have_the_values_of_the_whole() -> None:
    x = normal(64, 48)
    x = torch.where(x.abs() < 0.02, torch.tensor(1.0), x)  # far from what is rounded coarsely
    x[:16] /= 8
    whole, _, scale = fp8.fp8_quantize(x, None, False)
    for part, rows in zip(x.split(16), whole.split(16), strict=True):
        own, _, own_scale = fp8.fp8_quantize(part, None, False)
        assert torch.equal(own.float() * own_scale, rows.float() * scale)


def test_rounding_of_a_product_is_some_four_percent() -> None:
    x, w = normal(256, 512), normal(512, 128)
    exact = x.double() @ w.double()
    error = (fp8.linear(x, w).double() - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
    assert 0.02 < error < 0.045


@pytest.mark.parametrize("shape", [(31, 48, 64), (32, 40, 64), (32, 48, 8)], ids=str)
def test_what_does_not_fit_is_the_plain_product(shape: tuple[int, int, int]) -> None:
    x, w = normal(*shape[:2]), normal(*shape[1:])
    assert torch.equal(fp8.linear(x, w), x @ w)


def test_no_rows_give_zero_gradients() -> None:
    x, w = torch.zeros(0, 48), normal(48, 64)
    y, pull = F.vjp(fp8.linear, x, w)
    assert y.shape == (0, 64)
    assert not pull(y)[1].any()


def test_zeros_are_zeros() -> None:
    assert not fp8.linear(torch.zeros(16, 16), torch.zeros(16, 16)).any()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_one_nan_or_infinity_makes_all_nan(bad: float) -> None:
    x, w, _ = operands()
    x[3, 5] = bad
    assert fp8.linear(x, w).isnan().all()


def test_float64_is_not_quantised() -> None:
    x, w, g = operands(torch.float64)
    y, pull = F.vjp(fp8.linear, x, w)
    wanted, wanted_pull = F.vjp(torch.matmul, x, w)
    torch.testing.assert_close((y, *pull(g)), (wanted, *wanted_pull(g)), rtol=1e-12, atol=1e-12)


def test_a_given_largest_magnitude_is_used() -> None:
    x, w, _ = operands()
    found = fp8.fp8_linear(x, w, 8 * fp8.largest(x), fp8.largest(w))
    own = fp8.fp8_linear(x, w, None, None)
    assert torch.equal(found[2], 8 * own[2])
    assert torch.equal(found[4], own[4])


def loss(x: Tensor, w: Tensor) -> Tensor:
    return fp8.linear(x, w).sin().sum()


def by_backward(f: Callable[..., Tensor]) -> Callable[..., Any]:
    def run(*a: Tensor) -> Any:
        leaves = [x.clone().requires_grad_() for x in a]
        f(*leaves).backward()
        return tuple(x.grad for x in leaves)

    return run


def by_checkpoint(f: Callable[..., Tensor]) -> Callable[..., Any]:
    from torch.utils.checkpoint import checkpoint

    return by_backward(lambda *a: checkpoint(f, *a, use_reentrant=False))  # type: ignore[arg-type]


def by_compiler(backend: str) -> Callable[..., Any]:
    def made(f: Callable[..., Tensor]) -> Callable[..., Any]:
        torch._dynamo.reset()
        return torch.compile(F.grad(f, (0, 1)), backend=backend, fullgraph=True)

    return made


PATHS: dict[str, Callable[..., Any]] = {
    "backward": by_backward,
    "checkpoint": by_checkpoint,
    "compile aot_eager": by_compiler("aot_eager"),
    "compile inductor": by_compiler("inductor"),
    "make_fx": lambda f: lambda *a: make_fx(F.grad(f, (0, 1)), tracing_mode="fake")(*a)(*a),
    "vmap": lambda f: lambda x, w: F.vmap(F.grad(f, (0, 1)), (0, None), 0)(x[None], w),
}


@pytest.mark.parametrize("path", PATHS)
def test_gradient_is_the_same_by(path: str) -> None:
    x, w, _ = operands()
    wanted = F.grad(loss, (0, 1))(x, w)
    found = PATHS[path](loss)(x, w)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.reshape(b.shape), b, rtol=1e-5, atol=1e-6)


def test_a_batch_is_a_loop() -> None:
    x, w, _ = operands()
    xs = torch.stack([x, x * 3])
    found = F.vmap(fp8.linear, (0, None))(xs, w)
    assert torch.equal(found, torch.stack([fp8.linear(a, w) for a in xs]))


def test_forward_mode_is_straight_through() -> None:
    x, w, _ = operands()
    y, moved = F.jvp(fp8.linear, (x, w), (x * 2, torch.zeros_like(w)))
    assert torch.equal(y, fp8.linear(x, w))
    torch.testing.assert_close(moved.double(), 2 * x.double() @ quantised(w), rtol=1e-5, atol=1e-5)


def double_backward(x: Tensor, w: Tensor) -> None:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(x, w), x, create_graph=True)
    first.pow(2).sum().backward()


SECOND: dict[str, Callable[..., Any]] = {
    "grad of grad": F.grad(lambda x, w: F.grad(loss)(x, w).pow(2).sum()),
    "double backward": double_backward,
}


@pytest.mark.parametrize("way", SECOND)
def test_a_second_derivative_is_refused(way: str) -> None:
    x, w, _ = operands()
    with pytest.raises(RuntimeError, match="fp8 has no second derivative"):
        SECOND[way](x, w)


def test_the_backward_keeps_one_byte_an_element() -> None:
    x, w, _ = operands(torch.bfloat16)
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fp8.linear(x.requires_grad_(), w.requires_grad_())
    sizes = {t.numel(): t.element_size() for t in kept if t.dim()}
    assert sizes.pop(x.numel()) == sizes.pop(w.numel()) == 1
    assert not sizes, "the result is not kept"
