"""Quantising to int8 and int4 on a CPU: nearest codes, packing and unpacking, what is refused."""

from __future__ import annotations

import pytest
import torch
from inputs import real

from shardwise.kernels import gemv


def test_int8_codes_are_the_nearest() -> None:
    w = real(40, 9)
    q, scale = gemv.quantize_int8(w, torch.float64)
    assert (q.shape, q.dtype, scale.shape) == ((9, 40), torch.int8, (9,))
    error = (gemv.dequantize_int8(q, scale) - w).abs()
    assert (error <= scale / 2 * (1 + 1e-12)).all()
    assert (q.abs().amax(1) == 127).all()
    torch.testing.assert_close(scale, w.abs().amax(0) / 127)


@pytest.mark.parametrize("group", [8, 24, 48])
def test_int4_codes_are_the_nearest(group: int) -> None:
    w = real(48, 9) + 0.3
    packed, scales, zeros = gemv.quantize_int4(w, group, torch.float64)
    assert (packed.shape, packed.dtype) == ((9, 6), torch.int32)
    assert scales.shape == zeros.shape == (9, 48 // group)
    error = (gemv.dequantize_int4(packed, scales, zeros, group) - w).abs()
    bound = scales.repeat_interleave(group, 1).t() / 2
    assert (error <= bound * (1 + 1e-12)).all()
    codes = gemv.unpack_int4(packed, group).unflatten(1, (-1, group))
    assert (codes.amin(2) == 0).all()
    assert (codes.amax(2) == 15).all()


@pytest.mark.parametrize("group", [8, 16, 32])
def test_codes_are_packed_in_the_order_told(group: int) -> None:
    codes = torch.randint(0, 16, (5, 32))
    packed = gemv.pack_int4(codes, group)
    assert torch.equal(gemv.unpack_int4(packed, group), codes.int())
    words = group // 8
    for word, j in ((0, 0), (1, 3), (3, 7)):
        column = word // words * group + j * words + word % words
        assert torch.equal((packed[:, word] >> (4 * j)) & 15, codes[:, column].int())


def test_constant_weights_are_exact() -> None:
    for value in (0.0, 0.7, -1.25):
        w = torch.full((16, 3), value, dtype=torch.float64)
        q = gemv.quantize_int8(w, torch.float64)
        torch.testing.assert_close(gemv.dequantize_int8(*q), w)
        four = gemv.quantize_int4(w, 8, torch.float64)
        torch.testing.assert_close(gemv.dequantize_int4(*four, 8), w)


def test_codes_belong_to_the_rounded_scale() -> None:
    """A scale rounded to bf16 is off by up to 2^-9, which moves the greatest codes by a quarter."""
    w = real(64, 50)
    q, scale = gemv.quantize_int8(w, torch.bfloat16)
    assert scale.dtype == torch.bfloat16
    inside = (w.abs() <= 127.5 * scale.double()).t()
    error = (q * scale.double()[:, None] - w.t()).abs()
    assert (error <= scale.double()[:, None] * 0.5 * (1 + 1e-12))[inside].all()


@pytest.mark.parametrize("shape", [(48,), (3, 48), (2, 3, 48), (0, 48)])
def test_linear_is_the_matmul_of_the_dequantised_weight(shape: tuple[int, ...]) -> None:
    x, w = real(*shape), real(48, 7)
    eight, four = gemv.quantize_int8(w, torch.float64), gemv.quantize_int4(w, 16, torch.float64)
    found = gemv.int8_linear(x, *eight), gemv.int4_linear(x, *four, group=16)
    for y, held in zip(
        found, (gemv.dequantize_int8(*eight), gemv.dequantize_int4(*four, 16)), strict=True
    ):
        torch.testing.assert_close(y, x @ held, rtol=1e-12, atol=1e-12)


def test_derivative_of_x_in_bf16() -> None:
    q, scale = gemv.quantize_int8(real(48, 7).float())
    x = real(3, 48).bfloat16().requires_grad_()
    (grad,) = torch.autograd.grad(gemv.int8_linear(x, q, scale).sum(), x)
    wanted = gemv.dequantize_int8(q, scale).bfloat16().sum(1).expand(3, 48)
    torch.testing.assert_close(grad, wanted, rtol=2e-2, atol=2e-2)


def test_what_does_not_fit_is_told() -> None:
    w = real(48, 7)
    with pytest.raises(ValueError, match="a weight is"):
        gemv.quantize_int8(w[0])
    for group in (32, 12, 0):
        with pytest.raises(ValueError, match="a group is"):
            gemv.quantize_int4(w, group)
    q, scale = gemv.quantize_int8(w)
    with pytest.raises(ValueError, match="do not fit"):
        gemv.int8_linear(w.t()[:, :40], q, scale)
    packed, scales, zeros = gemv.quantize_int4(w, 16)
    for wrong in ((w.t()[:, :40], scales, 16), (w.t(), scales[:2], 16), (w.t(), scales, 0)):
        with pytest.raises(ValueError, match="do not fit"):
            gemv.int4_linear(wrong[0], packed, wrong[1], zeros, wrong[2])
