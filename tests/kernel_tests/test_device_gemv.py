"""The maps with int8 and int4 weights on a GPU, against float64; results poisoned."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from canaries import guarded, watched
from device_check import BITS, DEVICE, MODULES
from torch import Tensor

from shardwise.kernels import gemv, gemv_triton

# What torch warns of on a GPU (TF32 not used, say) is not what is tested here.
pytestmark = pytest.mark.filterwarnings("default")

DTYPES = pytest.mark.parametrize("dtype", BITS, ids=str)
SPLITS = pytest.mark.parametrize("splits", [None, 1, 3])
ROWS = pytest.mark.parametrize("rows", [1, 2, 7, 16])
GROUP = 128


def weights(
    size: int, outs: int, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(size)
    w = torch.randn(size, outs, device=DEVICE)
    return gemv.quantize_int8(w, dtype), gemv.quantize_int4(w, GROUP, dtype)


def guards(*tensors: Tensor) -> list[Tensor]:
    return [guarded(t) for t in tensors]


def check(found: Tensor, x: Tensor, w: Tensor) -> None:
    """Half a unit in the last place, and float32's error in a sum of `in` terms.

    Codes are exact and sums are formed in float32, in threads and trees of some 20 steps: each adds
    at most 2^-24 of the sum of |x| times the largest |w| (of int4: twice 15 scales, of which the
    largest |w| is at least a quarter). Rounding errors are of both signs: 2^-19 is never reached.
    """
    exact = x.double() @ w
    sizes = x.double().abs().sum(-1, keepdim=True) * w.abs().amax(0)
    assert found.isfinite().all()
    bound = 2.0 ** -BITS[found.dtype] * exact.abs() * 1.01 + 2.0**-19 * sizes + 1e-6
    assert ((found.double() - exact).abs() <= bound).all()


@DTYPES
@SPLITS
@ROWS
@pytest.mark.parametrize(("size", "outs"), [(4096, 515), (1000, 33), (77, 4100)])
def test_int8(rows: int, size: int, outs: int, splits: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(outs)
    q, scale = gemv.quantize_int8(torch.randn(size, outs, device=DEVICE), dtype)
    x = torch.randn(rows, size, device=DEVICE).to(dtype)
    held = guards(x, q, scale)
    with watched(*MODULES) as canaries:
        found = gemv_triton.int8_linear(held[0], held[1], held[2], splits=splits)
        torch.cuda.synchronize()
    assert canaries.buffers, "no kernel ran"
    check(found, x, gemv.dequantize_int8(q, scale.double()))


@DTYPES
@SPLITS
@ROWS
@pytest.mark.parametrize(("size", "outs"), [(4096, 515), (1024, 33), (128, 4100)])
def test_int4(rows: int, size: int, outs: int, splits: int | None, dtype: torch.dtype) -> None:
    _, (packed, scales, zeros) = weights(size, outs, dtype)
    x = torch.randn(rows, size, device=DEVICE).to(dtype)
    held = guards(x, packed, scales, zeros)
    with watched(*MODULES) as canaries:
        found = gemv_triton.int4_linear(held[0], held[1], held[2], held[3], GROUP, splits=splits)
        torch.cuda.synchronize()
    assert canaries.buffers, "no kernel ran"
    check(found, x, gemv.dequantize_int4(packed, scales.double(), zeros.double(), GROUP))


@pytest.mark.parametrize("group", [32, 64, 256])
def test_other_groups(group: int) -> None:
    torch.manual_seed(group)
    weight = gemv.quantize_int4(torch.randn(1024, 301, device=DEVICE), group)
    packed, scales, zeros = weight
    exact = gemv.dequantize_int4(packed, scales.double(), zeros.double(), group)
    for rows in (1, 5):
        x = torch.randn(rows, 1024, device=DEVICE)
        check(gemv.int4_linear(x, *weight, group=group), x, exact)


def test_many_rows_are_a_matmul() -> None:
    eight, four = weights(512, 300, torch.float32)
    x = torch.randn(4, 33, 512, device=DEVICE).bfloat16()
    for found, w in (
        (gemv.int8_linear(x, *eight), gemv.dequantize_int8(*eight)),
        (gemv.int4_linear(x, *four), gemv.dequantize_int4(*four, GROUP)),
    ):
        torch.testing.assert_close(found, x @ w.bfloat16())


@ROWS
def test_two_runs_are_equal_to_the_bit(rows: int) -> None:
    eight, four = weights(4096, 260, torch.bfloat16)
    x = torch.randn(rows, 4096, device=DEVICE).bfloat16()
    for run in (lambda: gemv.int8_linear(x, *eight), lambda: gemv.int4_linear(x, *four)):
        first, *others = (run() for _ in range(3))
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("rows", [1, 4])
def test_derivative_is_that_of_the_dequantised_matmul(rows: int) -> None:
    eight, four = weights(256, 100, torch.float32)
    x = torch.randn(rows, 256, device=DEVICE, requires_grad=True)
    for run, w in (
        (lambda x: gemv.int8_linear(x, *eight), gemv.dequantize_int8(*eight)),
        (lambda x: gemv.int4_linear(x, *four), gemv.dequantize_int4(*four, GROUP)),
    ):
        (grad,) = torch.autograd.grad(run(x).sum(), x)
        wanted = w.sum(1).expand_as(x)
        torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_captured_graph_gives_the_same(rows: int) -> None:
    eight, four = weights(4096, 260, torch.bfloat16)
    x = torch.randn(rows, 4096, device=DEVICE).bfloat16()
    wanted = gemv.int8_linear(x, *eight), gemv.int4_linear(x, *four)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gemv.int8_linear(x, *eight), gemv.int4_linear(x, *four)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
