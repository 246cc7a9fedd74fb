"""The quantiser, interpreted (collected by test_interpreter.py in its own process).

The interpreter's cast to 8 bits is wrong where it must round, so these numbers need no rounding:
what is tested here is the scale, the clamp, both copies and what lies around them. The cast is
tested on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from canaries import guarded, watched

from shardwise.kernels import fp8, fp8_triton
from shardwise.kernels.launch import Launch

SIZES = [(7, 64), (128, 128), (130, 272), (33, 1000), (1, 1), (200, 3)]


def exact(rows: int, size: int, dtype: torch.dtype, end: float) -> torch.Tensor:
    """Numbers with three significant bits, the largest of them `end`."""
    generator = torch.Generator().manual_seed(rows * size)
    mantissa = torch.randint(4, 8, (rows, size), generator=generator)
    exponent = torch.randint(-6, 3, (rows, size), generator=generator)
    sign = torch.randint(0, 2, (rows, size), generator=generator) * 2 - 1
    x = sign * mantissa * torch.exp2(exponent.double())
    x[-1, -1] = end
    return x.to(dtype)


def same(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert torch.equal(a.float(), b.float())


@pytest.mark.parametrize("backwards", [False, True], ids=["", "reversed"])
@pytest.mark.parametrize("gradient", [False, True], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_quantiser_equals_its_twin(
    shape: tuple[int, int], dtype: torch.dtype, gradient: bool, backwards: bool
) -> None:
    x = exact(*shape, dtype, 40.0)
    held, amax = guarded(x), guarded(fp8.largest(x))
    with watched(fp8_triton, backwards=backwards):
        found = fp8_triton.quantize(held, amax, gradient)
    same(found, fp8._quantize(x, fp8.largest(x), gradient))
    assert torch.equal(found[0].double() * found[2].double(), x.double())
    assert torch.equal(held, x)


@pytest.mark.parametrize("how", [Launch(32, 4, rows=64), Launch(64, 4, rows=16)], ids=str)
def test_other_tiles(how: Launch) -> None:
    x = exact(70, 144, torch.float32, -20.0)
    with watched(fp8_triton):
        found = fp8_triton.quantize(x, fp8.largest(x), False, how)
    same(found, fp8._quantize(x, fp8.largest(x), False))


@pytest.mark.parametrize("gradient", [False, True], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("amax", [0.0, 2.0**-110, 1e-30, 447.9, 448.0, 448.1, 2.9e38], ids=str)
def test_scales_are_the_twins(amax: float, gradient: bool) -> None:
    x, largest = torch.zeros(16, 16), torch.tensor(amax)
    found = fp8_triton.quantize(x, largest, gradient)
    same(found, fp8._quantize(x, largest, gradient))
    end = torch.finfo(found[0].dtype).max
    scale = found[2].item()
    assert scale * end >= amax
    assert scale / 2 * end < max(amax, 2.0**-99)


@pytest.mark.parametrize("amax", [float("inf"), float("nan"), 3.4e38], ids=str)
def test_a_largest_that_is_not_finite_makes_the_scale_infinite(amax: float) -> None:
    x, largest = torch.ones(16, 16), torch.tensor(amax)
    for found in (fp8_triton.quantize(x, largest, False), fp8._quantize(x, largest, False)):
        assert found[2].item() == float("inf")
        assert not found[0].float().any()


def test_what_is_beyond_the_given_largest_is_clamped() -> None:
    x = torch.full((16, 16), 4.0)
    x[0, 0], x[0, 1] = 1e9, -1e9
    rows, columns, scale = fp8_triton.quantize(x, torch.tensor(448.0), False)
    assert scale.item() == 1.0
    assert rows[0, :3].tolist() == columns[:3, 0].tolist() == [448.0, -448.0, 4.0]


def test_a_strided_operand_and_one_without_elements() -> None:
    x = exact(48, 32, torch.float32, 16.0)
    same(fp8_triton.quantize(x.t(), fp8.largest(x), False), fp8._quantize(x.t(), None, False))
    rows, columns, _ = fp8_triton.quantize(torch.zeros(0, 32), torch.tensor(1.0), False)
    assert (rows.shape, columns.shape) == ((0, 32), (32, 0))


def test_linear_and_its_backward_equal_their_twins() -> None:
    x, w = exact(48, 32, torch.float32, 16.0), exact(32, 64, torch.float32, 8.0)
    found = fp8_triton.linear(x, w, fp8.largest(x), None)
    same(found, fp8._linear(x, w, None, None))
    grad = exact(48, 64, torch.float32, 1.0)
    same(
        fp8_triton.linear_backward(grad, None, *found[1:]),
        fp8._linear_backward(grad, None, *found[1:]),
    )
