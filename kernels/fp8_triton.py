"""The ops of `fp8.py` on a GPU: a quantiser in Triton, products by cuBLAS.

One program quantises one tile: it reads the tile once, along rows, and writes it twice, along rows
and, through shared memory, along columns. No scale passes through the host.
"""

# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton's annotations know neither a launch's num_warps nor that tl.range is iterated over.)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import fp8
from .fp8 import scaled_matmul
from .launch import Launch, empty

LARGEST_ROWS = 1 << 24  # offsets inside a tile are 32-bit
TILE = Launch(block=128, warps=8, rows=128)
SMALLEST = tl.constexpr(fp8.SMALLEST)
INFINITE = tl.constexpr(fp8.INFINITE)
CARRY = tl.constexpr(fp8.CARRY)
STEP = tl.constexpr(fp8.STEP)


@triton.jit(do_not_specialize=["units"])
def quantize_tiles(
    x, amax, result, transposed, scale, units,
    SIZE: tl.constexpr, UNIT: tl.constexpr, EXPONENT: tl.constexpr, END: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    bits = tl.load(amax).to(tl.float32).to(tl.int32, bitcast=True)
    bits = tl.minimum(tl.maximum(bits, SMALLEST), INFINITE)  # as integers: NaN counts as infinite
    bits = (bits + CARRY) & INFINITE
    bits = tl.where(bits < INFINITE, bits - EXPONENT * STEP, bits)
    inverse = tl.maximum(-bits + 254 * STEP, 0).to(tl.float32, bitcast=True)
    if tl.program_id(0) == 0:
        tl.store(scale, bits.to(tl.float32, bitcast=True))
    rows = units * UNIT  # so that the compiler knows what divides it
    across = tl.cdiv(SIZE, BLOCK)
    first_row = tl.program_id(0) // across * ROWS
    first_col = tl.program_id(0) % across * BLOCK
    row, col = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (first_row + row < rows)[:, None] & (first_col + col < SIZE)[None, :]
    base = tl.cast(first_row, tl.int64) * SIZE + first_col
    at = row[:, None] * SIZE + col[None, :]
    v = tl.load(x + base + at, mask=inside, other=0.0).to(tl.float32) * inverse
    v = tl.where(v > END, END, v)  # comparisons that keep NaN
    v = tl.where(v < -END, -END, v)
    q = v.to(result.dtype.element_ty)
    tl.store(result + base + at, q, mask=inside)
    base = tl.cast(first_col, tl.int64) * rows + first_row
    at = col[:, None] * rows + row[None, :]
    tl.store(transposed + base + at, tl.trans(q), mask=tl.trans(inside))


def quantize(
    x: Tensor, amax: Tensor | None, gradient: bool, how: Launch = TILE
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, columns, scale): launches `quantize_tiles`."""
    rows, size = x.shape
    if x.dtype == torch.float64 or rows >= LARGEST_ROWS or not _has_kernel(x) or not x.numel():
        return fp8._quantize(x, amax, gradient)
    x = x.contiguous()
    dtype = fp8.E5M2 if gradient else fp8.E4M3
    result, transposed = empty((rows, size), x, dtype), empty((size, rows), x, dtype)
    scale = empty((), x, torch.float32)
    unit = fp8.MULTIPLE if rows % fp8.MULTIPLE == 0 else 1
    quantize_tiles[(triton.cdiv(rows, how.rows) * triton.cdiv(size, how.block),)](
        x, fp8.largest(x) if amax is None else amax, result, transposed, scale, rows // unit,
        SIZE=size, UNIT=unit, EXPONENT=fp8.EXPONENT[dtype], END=torch.finfo(dtype).max,
        BLOCK=how.block, ROWS=how.rows, num_warps=how.warps,
    )  # fmt: skip
    return result, transposed, scale


def _has_kernel(x: Tensor) -> bool:
    """Not for float32 on a GPU: Triton 3.6 writes its transposed copy wrongly (seen on an H100)."""
    return not x.is_cuda or (fp8.has_fp8(x.device) and x.dtype != torch.float32)


def linear(
    x: Tensor, w: Tensor, x_amax: Tensor | None, w_amax: Tensor | None
) -> tuple[Tensor, ...]:
    if x.dtype == torch.float64:
        return fp8._linear(x, w, x_amax, w_amax)
    x_rows, x_columns, x_scale = quantize(x, x_amax, False)
    w_rows, w_columns, w_scale = quantize(w, w_amax, False)
    y = scaled_matmul(x_rows, x_scale, w_columns, w_scale, x.dtype, fast=True)
    return y, x_columns, x_scale, w_rows, w_scale


def linear_backward(
    grad: Tensor,
    grad_amax: Tensor | None,
    x_columns: Tensor,
    x_scale: Tensor,
    w_rows: Tensor,
    w_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    if grad.dtype == torch.float64:
        return fp8._linear_backward(grad, grad_amax, x_columns, x_scale, w_rows, w_scale)
    rows, columns, scale = quantize(grad, grad_amax, True)
    grad_x = scaled_matmul(rows, scale, w_rows, w_scale, grad.dtype)
    grad_w = scaled_matmul(x_columns, x_scale, columns, scale, grad.dtype)
    return grad_x, grad_w
