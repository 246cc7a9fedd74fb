"""fp8 on a GPU: bits equal those of torch's cast, products those of the quantised numbers."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from canaries import guarded, watched
from device_check import BITS, DEVICE
from torch import Tensor

from shardwise.kernels import fp8, fp8_triton

if not fp8.has_fp8(DEVICE):
    pytest.skip("needs 8-bit tensor cores", allow_module_level=True)

# What torch warns of on a GPU (TF32 not used, say) is not what is tested here.
pytestmark = pytest.mark.filterwarnings("default")

DTYPES = pytest.mark.parametrize("dtype", BITS, ids=str)
KINDS = pytest.mark.parametrize("gradient", [False, True], ids=["e4m3", "e5m2"])
SHAPES = [(33, 64), (128, 4096), (301, 1000), (1, 16), (4097, 272), (16, 1)]
# Tensor cores add 8-bit products, exact in themselves, to sums of some 14 bits, 32 at a time: the
# 128 additions of 4096 terms each lose 2^-13 of a sum at most. Beside the sum of the magnitudes,
# some 40 times larger, that is 2^-11; twice that is allowed. Terms in a wrong place make 2^-6.
SUM = 2.0**-10


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(sum(shape) + seed)
    return torch.randn(*shape, device=DEVICE, generator=generator).to(dtype)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


@KINDS
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantised_bits_are_those_of_torch(
    shape: tuple[int, int], dtype: torch.dtype, gradient: bool
) -> None:
    x = normal(*shape, dtype=dtype) * torch.exp2(normal(*shape, dtype=dtype, seed=1) * 2)
    held = guarded(x)
    with watched(fp8_triton) as canaries:
        rows, columns, scale = fp8.fp8_quantize(held, fp8.largest(x), gradient)
        torch.cuda.synchronize()
    assert canaries.buffers or dtype == torch.float32, "no kernel ran"
    wanted = fp8._quantize(x, None, gradient)
    assert torch.equal(scale, wanted[2])
    assert torch.equal(bits(rows), bits(wanted[0]))
    assert torch.equal(bits(columns), bits(wanted[1]))
    assert torch.equal(held, x)


@KINDS
def test_every_bfloat16_is_cast_as_torch_casts_it(gradient: bool) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, device=DEVICE).to(torch.int16).view(torch.bfloat16)
    x = every[~every.isinf()].view(2, 32767)
    end = torch.tensor(torch.finfo(fp8.E5M2 if gradient else fp8.E4M3).max, device=DEVICE)
    rows, _, scale = fp8.fp8_quantize(x, end, gradient)
    assert scale.item() == 1.0
    wanted = fp8._quantize(x, end, gradient)[0]
    assert torch.equal(rows.isnan(), x.isnan())
    known = ~x.isnan()
    assert torch.equal(bits(rows)[known], bits(wanted)[known])


@pytest.mark.parametrize("shift", [1, 8])
def test_unaligned_operands(shift: int) -> None:
    x = normal(48, 80)
    found = fp8.fp8_quantize(guarded(x, shift), None, False)
    wanted = fp8._quantize(x, None, False)
    for a, b in zip(found[:2], wanted[:2], strict=True):
        assert torch.equal(bits(a), bits(b))


def test_one_nan_or_infinity_makes_all_nan() -> None:
    x, w = normal(32, 64), normal(64, 48)
    x[3, 5] = float("nan")
    assert fp8.linear(x, w).isnan().all()
    x[3, 5] = float("inf")
    assert fp8.linear(x, w).isnan().all()


def within(found: Tensor, exact: Tensor, magnitudes: Tensor) -> None:
    """Half a unit in the last place, and what the sum of these magnitudes may lose."""
    assert found.isfinite().all()
    allowed = exact.abs() * 2.0 ** -BITS[found.dtype] + magnitudes * SUM
    excess = ((found.double() - exact).abs() - allowed).max()
    assert excess <= 0, excess


@pytest.mark.parametrize("fast", [False, True], ids=["", "fast"])
@pytest.mark.parametrize("out", BITS, ids=str)
@pytest.mark.parametrize("gradient", [False, True], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("shape", [(32, 64, 48), (176, 512, 256), (16, 4096, 16)], ids=str)
def test_product_of_the_quantised(
    shape: tuple[int, int, int], gradient: bool, out: torch.dtype, fast: bool
) -> None:
    m, k, n = shape
    a, _, a_scale = fp8.fp8_quantize(normal(m, k), None, gradient)
    b, _, b_scale = fp8.fp8_quantize(normal(n, k, seed=1), None, False)
    found = fp8.scaled_matmul(a, a_scale, b, b_scale, out, fast=fast)
    wide = [(q.double() * s.double()) for q, s in ((a, a_scale), (b, b_scale))]
    assert found.dtype == out
    within(found, wide[0] @ wide[1].t(), wide[0].abs() @ wide[1].abs().t())


@DTYPES
@pytest.mark.parametrize("shape", [(64, 128, 96), (528, 1024, 512)], ids=str)
def test_linear_and_both_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, inner, outer = shape
    x, w = normal(rows, inner, dtype=dtype), normal(inner, outer, dtype=dtype, seed=1) / 32
    grad = normal(rows, outer, dtype=dtype, seed=2) * 1e-3
    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    with watched(fp8_triton) as canaries:
        y = fp8.linear(*leaves)
        y.backward(grad)
        torch.cuda.synchronize()
    assert len(canaries.buffers) == 9, "three tensors are quantised, each to three results"
    q = {}
    for name, value, gradient in (("x", x, False), ("w", w, False), ("g", grad, True)):
        r, _, s = fp8._quantize(value, None, gradient)
        q[name] = r.double() * s.double()
    products = ((y, "x", "w"), (leaves[0].grad, "g", "wt"), (leaves[1].grad, "xt", "g"))
    q["wt"], q["xt"] = q["w"].t(), q["x"].t()
    for found, a, b in products:
        assert found is not None
        assert found.dtype == dtype
        within(found.detach(), q[a] @ q[b], q[a].abs() @ q[b].abs())


def test_rounding_is_some_four_percent() -> None:
    x, w = normal(512, 2048), normal(2048, 1024, seed=1)
    exact = x.double() @ w.double()
    error = (fp8.linear(x, w).double() - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
    assert 0.02 < error < 0.045


def test_what_does_not_fit_is_the_plain_product() -> None:
    x, w = normal(33, 64), normal(64, 48)
    assert torch.equal(fp8.linear(x, w), x @ w)


def test_two_runs_are_equal_to_the_bit() -> None:
    x, w = normal(512, 1024), normal(1024, 768)
    runs = [torch.func.vjp(fp8.linear, x, w) for _ in range(2)]
    first, second = ((y, *pull(torch.ones_like(y))) for y, pull in runs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_backward_keeps_one_byte_an_element() -> None:
    x, w = normal(4096, 4096).requires_grad_(), normal(4096, 256).requires_grad_()
    fp8.linear(x, w)  # the workspace of cuBLAS stays
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = fp8.linear(x, w)
    held = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    assert held <= x.numel() + w.numel() + 64 * 1024


def test_a_captured_graph_gives_the_same() -> None:
    x, w = normal(256, 512), normal(512, 256)
    wanted = fp8.linear(x, w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = fp8.linear(x, w)
    graph.replay()
    assert torch.equal(found, wanted)


def test_compiled_as_it_is_eagerly() -> None:
    x, w = normal(256, 512), normal(512, 256)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return fp8.linear(x, w).float().pow(2).sum()

    wanted = torch.func.grad(loss, (0, 1))(x, w)
    torch._dynamo.reset()
    found = torch.compile(torch.func.grad(loss, (0, 1)), fullgraph=True)(x, w)
    for a, b in zip(found, wanted, strict=True):
        # A cotangent that rounds otherwise in its last place may round to the next e5m2.
        close = (a.double() - b.double()).pow(2).sum() / b.double().pow(2).sum()
        assert close < 1e-4
