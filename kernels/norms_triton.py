"""The norms of `norms.py` in Triton: a tile of whole rows in registers, read once.

Forward: one program a tile. Backward: a few programs a multiprocessor loop over tiles, keep their
part of the weight's gradient in float32 registers and write it once; a second kernel adds the
parts, in a fixed order. Loads come before the loop's arithmetic, so `stages` > 1 lets the compiler
fetch the next tile while this one is reduced.
"""

# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton's annotations know neither a launch's num_warps nor that tl.range is iterated over.)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import norms
from .launch import Launch, empty, power_of_two
from .norms import LARGEST_BACKWARD, LARGEST_FORWARD


def forward_launch(size: int) -> Launch:
    """How the forward is launched for rows of `size` elements: 32 elements a thread."""
    block = power_of_two(size)
    rows = max(1, 2048 // block)
    warps = min(16, max(1, rows * block // 1024))
    return Launch(block, warps=8 if block > 16384 else warps, rows=rows)  # 8 warps: no spills


def backward_launch(size: int) -> Launch:
    """How the backward is launched for rows of `size` elements: 16 elements a thread."""
    block = power_of_two(size)
    rows = max(1, 2048 // block)
    warps = min(16, max(1, rows * block // 512))
    return Launch(
        block, warps, rows, stages=2 if block <= 8192 else 1, programs=max(1, 16 // warps)
    )


@triton.jit(do_not_specialize=["rows"])
def norm_forward(
    x, extra, weight, bias, y, total, mean, rstd, rows, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    CENTRED: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, BLOCK)[None, :]
    for first in tl.range(
        tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES
    ):
        row = tl.cast(first, tl.int64) + tl.arange(0, ROWS)[:, None]
        at = row * SIZE + col
        inside = (row < rows) & (col < SIZE)
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            v += tl.load(extra + at, mask=inside, other=0.0).to(tl.float32)
            rounded = v.to(total.dtype.element_ty)
            tl.store(total + at, rounded, mask=inside)
            v = rounded.to(tl.float32)  # the backward sees the rounded sum
        if CENTRED:
            m = tl.sum(v, axis=1, keep_dims=True) / SIZE
            v = tl.where(col < SIZE, v - m, 0.0)
            tl.store(mean + row, m, mask=row < rows)
        r = 1.0 / tl.sqrt(tl.sum(v * v, axis=1, keep_dims=True) / SIZE + eps)
        tl.store(rstd + row, r, mask=row < rows)
        w = tl.load(weight + col, mask=col < SIZE, other=0.0).to(tl.float32)
        result = v * r * w
        if BIAS:
            result += tl.load(bias + col, mask=col < SIZE, other=0.0).to(tl.float32)
        tl.store(y + at, result.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def norm_backward(
    grad, x, weight, mean, rstd, extra, grad_x, weight_parts, bias_parts, rows,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    CENTRED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + col, mask=col < SIZE, other=0.0)
    by_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    if CENTRED:
        by_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in tl.range(
        tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES
    ):
        row = tl.cast(first, tl.int64) + tl.arange(0, ROWS)[:, None]
        at = row * SIZE + col
        inside = (row < rows) & (col < SIZE)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        n = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, mask=row < rows, other=0.0)
        if CENTRED:
            n -= tl.load(mean + row, mask=row < rows, other=0.0)
        n *= r
        h = g * w.to(tl.float32)
        result = h - n * (tl.sum(h * n, axis=1, keep_dims=True) / SIZE)
        if CENTRED:
            result -= tl.sum(h, axis=1, keep_dims=True) / SIZE
            by_bias += g
        by_weight += g * n
        result *= r
        if ADD:
            result += tl.load(extra + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask=inside)
    part = tl.program_id(0) * SIZE + tl.arange(0, BLOCK)
    held = tl.arange(0, BLOCK) < SIZE
    tl.store(weight_parts + part, tl.sum(by_weight, axis=0), mask=held)
    if CENTRED:
        tl.store(bias_parts + part, tl.sum(by_bias, axis=0), mask=held)


@triton.jit(do_not_specialize=["count"])
def sum_parts(parts, result, count, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        total += tl.load(parts + row * SIZE + col, mask=(row < count) & (col < SIZE), other=0.0)
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    result_dtype = result.dtype.element_ty
    tl.store(result + col, tl.sum(total, axis=0).to(result_dtype), mask=col < SIZE)


SUM_PARTS = Launch(block=32, warps=4, rows=64)


def summed(parts: Tensor, like: Tensor) -> Tensor:
    """Sum of [parts, N] over the parts, as float32, in the dtype of `like`."""
    count, size = parts.shape
    result = empty((size,), like)
    grid = (triton.cdiv(size, SUM_PARTS.block),)
    sum_parts[grid](
        parts, result, count, SIZE=size, BLOCK=SUM_PARTS.block, ROWS=SUM_PARTS.rows,
        num_warps=SUM_PARTS.warps,
    )  # fmt: skip
    return result


def forward(
    x: Tensor,
    extra: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    how: Launch | None = None,
) -> tuple[Tensor, ...]:
    """(y, total if there is an extra, mean if centred, rstd): launches `norm_forward`."""
    size, rows = x.shape[-1], x.numel() // max(1, x.shape[-1])
    how = how or forward_launch(size)
    x = x.contiguous()
    extra = None if extra is None else extra.contiguous()
    y, rstd = empty(x.shape, x), empty(x.shape[:-1], x, torch.float32)
    total = y if extra is None else empty(x.shape, extra)
    mean = empty(x.shape[:-1], x, torch.float32) if centred else rstd
    if rows:
        norm_forward[(how.grid(rows, x.device),)](
            x, x if extra is None else extra, weight.contiguous(),
            weight if bias is None else bias.contiguous(), y, total, mean, rstd, rows, eps,
            SIZE=size, BLOCK=how.block, ROWS=how.rows, STAGES=how.stages,
            CENTRED=centred, ADD=extra is not None, BIAS=bias is not None,
            num_warps=how.warps,
        )  # fmt: skip
    return (y, *([] if extra is None else [total]), *([mean] if centred else []), rstd)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    extra: Tensor | None,
    how: Launch | None = None,
) -> tuple[Tensor, ...]:
    """(grad_x, grad_weight, grad_bias if there is a mean): `norm_backward`, then `sum_parts`."""
    size, rows = x.shape[-1], x.numel() // max(1, x.shape[-1])
    how = how or backward_launch(size)
    x, grad, rstd = x.contiguous(), grad.contiguous(), rstd.contiguous()
    extra = None if extra is None else extra.contiguous()
    grad_x = empty(x.shape, x)
    programs = how.grid(rows, x.device)
    parts = empty((2 if mean is not None else 1, programs, size), x, torch.float32)
    if rows:
        norm_backward[(programs,)](
            grad, x, weight.contiguous(), rstd if mean is None else mean.contiguous(), rstd,
            x if extra is None else extra, grad_x, parts[0], parts[-1], rows,
            SIZE=size, BLOCK=how.block, ROWS=how.rows, STAGES=how.stages,
            CENTRED=mean is not None, ADD=extra is not None,
            num_warps=how.warps,
        )  # fmt: skip
    return (grad_x, *(summed(part, weight) for part in parts))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    if x.shape[-1] > LARGEST_FORWARD or x.dtype == torch.float64:
        return norms._rms(x, weight, eps)
    return forward(x, None, weight, None, eps, centred=False)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    if x.shape[-1] > LARGEST_FORWARD or x.dtype == torch.float64:
        return norms._add_rms(x, residual, weight, eps)
    return forward(x, residual, weight, None, eps, centred=False)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, extra: Tensor | None
) -> tuple[Tensor, ...]:
    if x.shape[-1] > LARGEST_BACKWARD or x.dtype == torch.float64:
        return norms._rms_backward(grad, x, weight, rstd, extra)
    return backward(grad, x, weight, None, rstd, extra)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    if x.shape[-1] > LARGEST_FORWARD or x.dtype == torch.float64:
        return norms._layer(x, weight, bias, eps)
    return forward(x, None, weight, bias, eps, centred=True)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    if x.shape[-1] > LARGEST_FORWARD or x.dtype == torch.float64:
        return norms._add_layer(x, residual, weight, bias, eps)
    return forward(x, residual, weight, bias, eps, centred=True)


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, extra: Tensor | None
) -> tuple[Tensor, ...]:
    if x.shape[-1] > LARGEST_BACKWARD or x.dtype == torch.float64:
        return norms._layer_backward(grad, x, weight, mean, rstd, extra)
    return backward(grad, x, weight, mean, rstd, extra)
