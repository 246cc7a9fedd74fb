"""The gradient of `gelu.py` in Triton: programs walk down a strip of columns and add it up."""

# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton's annotations know neither a launch's num_warps nor that tl.range is iterated over.)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gelu as twins
from .launch import Launch, empty, power_of_two
from .norms_triton import summed


def strip_launch(size: int) -> Launch:
    """Columns of a strip and rows of a tile: 16 bytes a thread, twice."""
    block = min(256, max(16, power_of_two(size)))
    return Launch(block, warps=4, rows=max(1, 2048 // block), stages=1, programs=8)


@triton.jit
def tanh(x):
    """From an exponential of a number that is not positive, so that nothing overflows."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -t, t)


@triton.jit(do_not_specialize=["rows"])
def gelu_backward(
    grad, x, grad_x, parts, rows,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STRIPS: tl.constexpr,
    STAGES: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    strip = tl.program_id(0) % STRIPS
    first = tl.program_id(0) // STRIPS
    walkers = tl.num_programs(0) // STRIPS
    col = strip * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in tl.range(first, (rows + ROWS - 1) // ROWS, walkers, num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)[:, None]
        at = tl.cast(row, tl.int64) * SIZE + col
        mask = (row < rows) & (col < SIZE)
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        if TANH:
            t = tanh(0.7978845608028654 * (v + 0.044715 * v * v * v))
            inner = 0.7978845608028654 * (1.0 + 0.134145 * v * v)
            slope = 0.5 * (1.0 + t) + 0.5 * v * (1.0 - t * t) * inner
        else:
            cdf = 0.5 * (1.0 + tl.erf(v * 0.7071067811865476))
            slope = cdf + v * tl.exp(-0.5 * v * v) * 0.3989422804014327
        result = (g * slope).to(grad_x.dtype.element_ty)
        tl.store(grad_x + at, result, mask=mask)
        total += result.to(tl.float32)
    at = tl.cast(first, tl.int64) * SIZE + strip * BLOCK + tl.arange(0, BLOCK)
    inside = strip * BLOCK + tl.arange(0, BLOCK) < SIZE
    tl.store(parts + at, tl.sum(total, axis=0), mask=inside)


def backward_sum(
    grad: Tensor, x: Tensor, tanh: bool, how: Launch | None = None
) -> tuple[Tensor, Tensor]:
    if x.dtype == torch.float64:
        return twins._backward_sum(grad, x, tanh)
    size = x.shape[-1]
    rows = x.numel() // size if size else 0
    how = how or strip_launch(size)
    grad, x = grad.contiguous(), x.contiguous()
    grad_x = empty(x.shape, x)
    strips = -(-size // how.block)
    walkers = max(1, how.grid(rows, x.device) // strips)
    parts = empty((walkers, size), x, torch.float32)
    if rows:
        gelu_backward[(walkers * strips,)](
            grad, x, grad_x, parts, rows,
            SIZE=size, BLOCK=how.block, ROWS=how.rows, STRIPS=strips,
            STAGES=how.stages, TANH=tanh,
            num_warps=how.warps,
        )  # fmt: skip
    return grad_x, summed(parts if rows else parts.zero_(), x)
