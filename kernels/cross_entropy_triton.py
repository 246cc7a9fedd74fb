"""The cross-entropy of `cross_entropy.py` in Triton; the matmuls of its linear form are torch's.

Rows longer than a tile are read in a loop with a running maximum. Backward programs take the rows
in reverse, so that the rows which the forward read last are still in the cache. `loss_and_grad`
reads a row twice and writes its gradient over it; the second read comes out of the cache.
"""

# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton's annotations know neither a launch's num_warps nor that tl.range is iterated over.)
from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cross_entropy as twins
from .cross_entropy import counted, weighted
from .launch import Launch, empty, power_of_two


def reading_launch(size: int) -> Launch:
    """How the kernels that loop over a row are launched."""
    block = min(8192, max(32, power_of_two(size)))
    return Launch(block, warps=min(8, max(1, block // 512)), stages=2 if block < size else 1)


def writing_launch(size: int) -> Launch:
    """How the elementwise backward is launched: one program for a tile of a row."""
    block = min(4096, max(32, power_of_two(size)))
    return Launch(block, warps=min(4, max(1, block // 512)))


@triton.jit
def row_lse(at, SIZE: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Full tiles without masks; what is left in a smaller one, which reads padding too.

    A mask that ends at any number makes loads narrow, and masks in the loop cost registers.
    """
    FULL: tl.constexpr = COUNT // BLOCK * BLOCK
    col = tl.arange(0, BLOCK)
    largest = float("-inf")
    shift = 0.0
    total = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, FULL, BLOCK, num_stages=STAGES):
        v = tl.load(at + first + col).to(tl.float32)
        largest = tl.maximum(largest, tl.max(v, axis=0))
        new = tl.where(largest == float("-inf"), 0.0, largest)  # no -inf - -inf
        total = total * tl.exp(shift - new) + tl.exp(v - new)
        shift = new
    whole = tl.sum(total, axis=0)
    if FULL < COUNT:
        rest = FULL + tl.arange(0, triton.next_power_of_2(COUNT - FULL))
        v = tl.load(at + rest, mask=rest < SIZE, other=float("-inf")).to(tl.float32)
        v = tl.where(rest < COUNT, v, float("-inf"))
        largest = tl.maximum(largest, tl.max(v, axis=0))
        new = tl.where(largest == float("-inf"), 0.0, largest)
        whole = whole * tl.exp(shift - new) + tl.sum(tl.exp(v - new), axis=0)
        shift = new
    return shift + tl.log(whole)


@triton.jit(do_not_specialize=["start"])
def parts_forward(
    logits, labels, lse, target, start,
    SIZE: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at = logits + tl.cast(row, tl.int64) * SIZE
    label = tl.load(labels + row) - start
    held = (label >= 0) & (label < COUNT)
    wanted = tl.load(at + label, mask=held, other=0.0).to(tl.float32)
    tl.store(target + row, wanted)
    tl.store(lse + row, row_lse(at, SIZE, COUNT, BLOCK, STAGES))


@triton.jit(do_not_specialize=["start", "rows"])
def parts_grad(
    grad_lse, grad_target, logits, labels, lse, result, start, rows,
    SIZE: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    row = rows - 1 - tl.program_id(0) // tiles
    col = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    at = tl.cast(row, tl.int64) * SIZE + col
    v = tl.load(logits + at, mask=col < SIZE, other=0.0).to(tl.float32)
    label = tl.load(labels + row) - start
    s = tl.load(lse + row)
    s = tl.where(s == float("-inf"), 0.0, s)  # a block of padding alone
    grad = tl.exp(v - s) * tl.load(grad_lse + row)
    grad = tl.where(col == label, grad + tl.load(grad_target + row), grad)
    grad = tl.where(col < COUNT, grad, 0.0)
    tl.store(result + at, grad.to(result.dtype.element_ty), mask=col < SIZE)


@triton.jit
def loss_and_grad(
    logits, labels, scale, loss,
    SIZE: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at = logits + tl.cast(row, tl.int64) * SIZE
    label = tl.load(labels + row)
    held = (label >= 0) & (label < COUNT)
    wanted = tl.load(at + label, mask=held, other=0.0).to(tl.float32)
    s = tl.load(scale + row)
    lse = row_lse(at, SIZE, COUNT, BLOCK, STAGES)
    tl.store(loss + row, lse - wanted)
    FULL: tl.constexpr = COUNT // BLOCK * BLOCK
    for first in tl.range(0, FULL, BLOCK, num_stages=STAGES):
        col = first + tl.arange(0, BLOCK)
        p = tl.exp(tl.load(at + col).to(tl.float32) - lse)
        grad = tl.where(col == label, p - 1.0, p) * s
        tl.store(at + col, grad.to(logits.dtype.element_ty))
    for first in tl.range(FULL, SIZE, BLOCK):
        col = first + tl.arange(0, BLOCK)
        p = tl.exp(tl.load(at + col, mask=col < SIZE, other=0.0).to(tl.float32) - lse)
        grad = tl.where(col == label, p - 1.0, p) * s
        grad = tl.where(col < COUNT, grad, 0.0)
        tl.store(at + col, grad.to(logits.dtype.element_ty), mask=col < SIZE)


def launch_parts(
    logits: Tensor, labels: Tensor, lse: Tensor, target: Tensor, start: int, stop: int,
    how: Launch | None = None,
) -> None:  # fmt: skip
    """Fill lse and target of contiguous logits [rows, size]."""
    size = logits.shape[-1]
    count = counted(size, start, stop)
    how = how or reading_launch(size)
    if labels.numel():
        parts_forward[(labels.numel(),)](
            logits, labels, lse, target, start,
            SIZE=size, COUNT=count, BLOCK=how.block, STAGES=how.stages, num_warps=how.warps,
        )  # fmt: skip


def launch_grad(
    grad_lse: Tensor, grad_target: Tensor, logits: Tensor, labels: Tensor, lse: Tensor,
    result: Tensor, start: int, stop: int, how: Launch | None = None,
) -> None:  # fmt: skip
    """Fill `result`, which may be the logits themselves, with their gradient."""
    size = logits.shape[-1]
    count = counted(size, start, stop)
    how = how or writing_launch(size)
    if labels.numel():
        parts_grad[(labels.numel() * triton.cdiv(size, how.block),)](
            grad_lse, grad_target, logits, labels, lse, result, start, labels.numel(),
            SIZE=size, COUNT=count, BLOCK=how.block, num_warps=how.warps,
        )  # fmt: skip


def launch_loss_and_grad(
    logits: Tensor, labels: Tensor, scale: Tensor, loss: Tensor, stop: int,
    how: Launch | None = None,
) -> None:  # fmt: skip
    """Fill loss [rows]; the logits become `scale` times the gradient of each row's loss."""
    size = logits.shape[-1]
    count = counted(size, 0, stop)
    how = how or reading_launch(size)
    if labels.numel():
        loss_and_grad[(labels.numel(),)](
            logits, labels, scale, loss,
            SIZE=size, COUNT=count, BLOCK=how.block, STAGES=how.stages, num_warps=how.warps,
        )  # fmt: skip


def parts(logits: Tensor, labels: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    if logits.dtype == torch.float64:
        return twins._parts(logits, labels, start, stop)
    lse, target = (empty(labels.shape, logits, torch.float32) for _ in range(2))
    launch_parts(logits.contiguous(), labels.contiguous(), lse, target, start, stop)
    return lse, target


def parts_backward(
    grad_lse: Tensor, grad_target: Tensor, logits: Tensor, labels: Tensor, lse: Tensor,
    start: int, stop: int,
) -> Tensor:  # fmt: skip
    if logits.dtype == torch.float64:
        return twins._parts_backward(grad_lse, grad_target, logits, labels, lse, start, stop)
    logits, labels, result = logits.contiguous(), labels.contiguous(), empty(logits.shape, logits)
    per_row = grad_lse.contiguous(), grad_target.contiguous(), logits, labels, lse.contiguous()
    launch_grad(*per_row, result, start, stop)
    return result


def linear_parts(
    hidden: Tensor, weight: Tensor, labels: Tensor, start: int, stop: int, chunk: int
) -> tuple[Tensor, Tensor]:
    if hidden.dtype == torch.float64:
        return twins._linear_parts(hidden, weight, labels, start, stop, chunk)
    labels = labels.contiguous()
    lse, target = (empty(labels.shape, hidden, torch.float32) for _ in range(2))
    logits = empty((min(chunk, len(hidden)), len(weight)), hidden)
    per_row = hidden, labels, lse, target
    for h, t, s, g in zip(*(a.split(chunk) for a in per_row), strict=True):
        torch.mm(h, weight.T, out=logits[: len(h)])
        launch_parts(logits[: len(h)], t, s, g, start, stop)
    return lse, target


def linear_parts_backward(
    grad_lse: Tensor,
    grad_target: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    lse: Tensor,
    start: int,
    stop: int,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    operands = grad_lse, grad_target, hidden, weight, labels, lse
    if hidden.dtype == torch.float64:
        return twins._linear_parts_backward(*operands, start, stop, chunk)
    gl, gt, hidden, weight, labels, lse = (a.contiguous() for a in operands)

    def fill(logits: Tensor, at: slice) -> None:
        launch_grad(gl[at], gt[at], logits, labels[at], lse[at], logits, start, stop)

    return _grads(hidden, weight, chunk, fill)


def linear(
    hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, stop: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if hidden.dtype == torch.float64:
        return twins._linear(hidden, weight, labels, scale, stop, chunk)
    labels, scale = labels.contiguous(), scale.contiguous()
    each = empty(labels.shape, hidden, torch.float32)

    def fill(logits: Tensor, at: slice) -> None:
        launch_loss_and_grad(logits, labels[at], scale[at], each[at], stop)

    grads = _grads(hidden.contiguous(), weight.contiguous(), chunk, fill)
    return weighted(each, scale), each, *grads


def _grads(
    hidden: Tensor, weight: Tensor, chunk: int, fill: Callable[[Tensor, slice], None]
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight; `fill(logits, rows)` turns logits into their gradient."""
    grad_hidden, grad_weight = empty(hidden.shape, hidden), empty(weight.shape, weight)
    buffer = empty((min(chunk, len(hidden)), len(weight)), hidden)
    for first in range(0, len(hidden), chunk):
        h = hidden[first : first + chunk]
        at, logits = slice(first, first + len(h)), buffer[: len(h)]
        torch.mm(h, weight.T, out=logits)
        fill(logits, at)
        torch.mm(logits, weight, out=grad_hidden[at])
        if first:
            grad_weight.addmm_(logits.T, h)
        else:
            torch.mm(logits.T, h, out=grad_weight)
    return grad_hidden, grad_weight if len(hidden) else grad_weight.zero_()
