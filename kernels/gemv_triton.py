"""The linear maps of `gemv.py` in Triton, for at most LARGEST_ROWS rows of x.

One row of x: a program has a few outputs. Each of its threads reads 16 bytes of codes of each of
them at a time, several loads in flight, and multiplies them with the same numbers of x. Sums stay
in the thread's registers till the end. The tensor cores would not help: it is the codes' bytes
that take the time.

More rows: they are padded to 16 columns of a matmul on the tensor cores, and the weight's codes,
which bf16 and float16 hold exactly, are its rows. Groups of int4 are scaled in the accumulator.

Where there are few outputs, programs also share the inputs out; a second kernel adds their parts in
a fixed order.
"""

# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton's annotations know neither a launch's num_warps nor that tl.range is iterated over.)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gemv
from .launch import Launch, empty, processors
from .norms_triton import summed

LARGEST_ROWS = 16
LARGEST_GROUP = 1024  # a tile has whole groups
# One row of x: a block counts pieces of 16 bytes. A thread has 4 in flight; more
# outputs to a program would take registers, and so programs, from a multiprocessor.
INT8_ROW = Launch(block=256, warps=4, rows=2, programs=4)
INT4_ROW = Launch(block=128, warps=4, rows=4, programs=4)
# More rows: a block is inputs of a tile of int8 (one of int4 is one group).
MATMUL = Launch(block=128, warps=4, rows=32, stages=4, programs=4)


def split_count(outs: int, tiles: int, how: Launch, device: torch.device) -> int:
    """Parts of the inputs: 1 where outputs alone make enough programs, two for each processor.

    Args:
        outs: outputs of the map.
        tiles: tiles of its inputs.
        how: the launch.
        device: of the tensors.
    """
    programs, wanted = -(-outs // how.rows), how.programs * processors(device)
    return 1 if 2 * programs >= wanted else max(1, min(tiles, wanted // programs))


@triton.jit(do_not_specialize=["outs"])
def int8_row(
    x, q, scale, result, outs,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    top = tl.program_id(0) * ROWS
    q += top.to(tl.int64) * SIZE
    row, chunk = tl.arange(0, ROWS), tl.arange(0, BLOCK)[None, :, None]
    held = row < outs - top
    k = chunk * 16 + tl.arange(0, 16)[None, None, :]
    code_at = row[:, None, None] * SIZE + k
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(STEPS):
        first = (tl.program_id(1) * STEPS + step) * (BLOCK * 16)
        inside = k < SIZE - first
        code = tl.load(q + first + code_at, mask=held[:, None, None] & inside, other=0)
        v = tl.load(x + first + k, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(code.to(tl.float32) * v, axis=2)
    y = tl.sum(total, axis=1) * tl.load(scale + top + row, mask=held, other=0.0).to(tl.float32)
    tl.store(result + tl.program_id(1) * outs + top + row, y.to(result.dtype.element_ty), mask=held)


@triton.jit
def nibble(words, J: tl.constexpr):
    """The j-th code of each word as float32.

    Bits 4j to 4j + 3 of the significand of 2^(23 - 4j) are worth the code: an `or` and a
    subtraction do what a shift, an `and` and a slow conversion would. Codes of the upper half are
    moved down first, below the exponent.
    """
    UNIT: tl.constexpr = 16 ** (J % 4)  # what a 1 of the code is worth in the word
    part = words if J < 4 else words >> 16
    exponent: tl.constexpr = (127 + 23 - 4 * (J % 4)) * 8388608
    bits = (part & (15 * UNIT)) | exponent
    return bits.to(tl.float32, bitcast=True) - (8388608 // UNIT)


@triton.jit(do_not_specialize=["outs"])
def int4_row(
    x, packed, scales, zeros, result, outs,
    SIZE: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    WORDS: tl.constexpr = GROUP // 8  # of a group
    QUADS: tl.constexpr = WORDS // 4  # of 16 bytes; a block has whole groups
    top = tl.program_id(0) * ROWS
    packed += top.to(tl.int64) * (SIZE // 8)
    scales += top.to(tl.int64) * (SIZE // GROUP)
    zeros += top.to(tl.int64) * (SIZE // GROUP)
    row, quad, i = tl.arange(0, ROWS), tl.arange(0, BLOCK), tl.arange(0, 4)[None, None, :]
    held = row < outs - top
    word = row[:, None, None] * (SIZE // 8) + quad[None, :, None] * 4 + i
    table = row[:, None] * (SIZE // GROUP) + (quad // QUADS)[None, :]
    k = (quad // QUADS * GROUP + quad % QUADS * 4)[None, :, None] + i
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(STEPS):
        first = (tl.program_id(1) * STEPS + step) * BLOCK
        inside = quad < SIZE // 32 - first
        both = held[:, None] & inside[None, :]
        words = tl.load(packed + first * 4 + word, mask=both[:, :, None], other=0)
        group = first // QUADS
        scale = tl.load(scales + group + table, mask=both, other=0.0).to(tl.float32)
        zero = tl.load(zeros + group + table, mask=both, other=0.0).to(tl.float32)
        products = tl.zeros([ROWS, BLOCK, 4], tl.float32)
        sums = tl.zeros([1, BLOCK, 4], tl.float32)
        for j in tl.static_range(8):
            v = tl.load(x + first * 32 + j * WORDS + k, mask=inside[None, :, None], other=0.0)
            products += nibble(words, j) * v.to(tl.float32)
            sums += v.to(tl.float32)
        total += scale * (tl.sum(products, axis=2) - zero * tl.sum(sums, axis=2))
    y = tl.sum(total, axis=1).to(result.dtype.element_ty)
    tl.store(result + tl.program_id(1) * outs + top + row, y, mask=held)


@triton.jit(do_not_specialize=["outs", "count"])
def int8_rows(
    x, q, scale, result, outs, count,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, m = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, 16)
    held = row < outs
    codes = q + row[:, None].to(tl.int64) * SIZE
    total = tl.zeros([ROWS, 16], tl.float32)
    first = tl.program_id(1) * STEPS
    for step in tl.range(first, first + STEPS, num_stages=STAGES):
        k = step * BLOCK + tl.arange(0, BLOCK)
        code = tl.load(codes + k[None, :], held[:, None] & (k[None, :] < SIZE), other=0)
        v = tl.load(
            x + m[None, :] * SIZE + k[:, None], (m[None, :] < count) & (k[:, None] < SIZE), 0.0
        )
        total = tl.dot(code.to(v.dtype), v, total, input_precision=PRECISION)
    total *= tl.load(scale + row, mask=held, other=0.0).to(tl.float32)[:, None]
    at = (tl.program_id(1) * count + m[None, :]) * outs + row[:, None]
    inside = held[:, None] & (m[None, :] < count)
    tl.store(result + at, total.to(result.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["outs", "count"])
def int4_rows(
    x, packed, scales, zeros, result, outs, count,
    SIZE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    WORDS: tl.constexpr = GROUP // 8
    row, m = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, 16)
    held, i = row < outs, tl.arange(0, WORDS)
    word = packed + row[:, None].to(tl.int64) * (SIZE // 8)
    start = row.to(tl.int64) * (SIZE // GROUP)
    total = tl.zeros([ROWS, 16], tl.float32)
    first = tl.program_id(1) * STEPS
    last = tl.minimum(first + STEPS, SIZE // GROUP)
    for group in tl.range(first, last, num_stages=STAGES):
        words = tl.load(word + group * WORDS + i[None, :], mask=held[:, None], other=0)
        scale = tl.load(scales + start + group, mask=held, other=0.0).to(tl.float32)
        zero = tl.load(zeros + start + group, mask=held, other=0.0).to(tl.float32)
        products = tl.zeros([ROWS, 16], tl.float32)
        sums = tl.zeros([16], tl.float32)
        for j in tl.static_range(8):
            k = group * GROUP + j * WORDS + i
            v = tl.load(x + m[None, :] * SIZE + k[:, None], mask=m[None, :] < count, other=0.0)
            code = nibble(words, j).to(v.dtype)
            products = tl.dot(code, v, products, input_precision=PRECISION)
            sums += tl.sum(v.to(tl.float32), axis=0)
        total += scale[:, None] * (products - zero[:, None] * sums[None, :])
    at = (tl.program_id(1) * count + m[None, :]) * outs + row[:, None]
    inside = held[:, None] & (m[None, :] < count)
    tl.store(result + at, total.to(result.dtype.element_ty), mask=inside)


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _run(
    x: Tensor, weight: tuple[Tensor, ...], outs: int, tiles: int, how: Launch, splits: int | None,
    kernel: Any, sizes: dict[str, Any], counted: bool,
) -> Tensor:  # fmt: skip
    """Launch a kernel over outputs and parts of the inputs; add the parts where there are more."""
    count = x.numel() // x.shape[-1]
    splits = min(splits or split_count(outs, tiles, how, x.device), tiles)
    steps = -(-tiles // splits)
    splits = -(-tiles // steps)  # none is without tiles
    shape = (*x.shape[:-1], outs)
    alone = splits == 1
    result = empty(shape, x) if alone else empty((splits, count * outs), x, torch.float32)
    kernel[(-(-outs // how.rows), splits)](
        x, *weight, result, outs, *([count] if counted else []),
        **sizes, ROWS=how.rows, STEPS=steps, num_warps=how.warps,
    )  # fmt: skip
    return result if alone else summed(result, x).view(shape)


def int8_linear(
    x: Tensor, q: Tensor, scale: Tensor, how: Launch | None = None, splits: int | None = None
) -> Tensor:
    """y: launches `int8_row` for one row of x, `int8_rows` for a few, torch's matmul for many."""
    size, outs = x.shape[-1], q.shape[0]
    count = x.numel() // max(1, size)
    if x.dtype == torch.float64 or not 0 < count <= LARGEST_ROWS or not outs:
        return gemv._int8(x, q, scale)
    x, weight = x.contiguous(), (q.contiguous(), scale.contiguous())
    how = how or (INT8_ROW if count == 1 else MATMUL)
    inputs = how.block * (16 if count == 1 else 1)
    sizes: dict[str, Any] = {"SIZE": size, "BLOCK": how.block}
    if count > 1:
        sizes |= {"STAGES": how.stages, "PRECISION": _precision(x)}
    kernel = int8_row if count == 1 else int8_rows
    return _run(x, weight, outs, -(-size // inputs), how, splits, kernel, sizes, counted=count > 1)


def int4_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group: int,
    how: Launch | None = None,
    splits: int | None = None,
) -> Tensor:
    """y: launches `int4_row` for one row of x, `int4_rows` for a few, torch's matmul for many.

    Groups of other than 32, 64, 128, ... inputs, and for a few rows those below 128, are torch's.
    """
    size, outs = x.shape[-1], packed.shape[0]
    count = x.numel() // max(1, size)
    regular = (32 if count == 1 else 128) <= group <= LARGEST_GROUP and group & (group - 1) == 0
    if x.dtype == torch.float64 or not (0 < count <= LARGEST_ROWS and outs and regular):
        return gemv._int4(x, packed, scales, zeros, group)
    x = x.contiguous()
    weight = (packed.contiguous(), scales.contiguous(), zeros.contiguous())
    how = how or (INT4_ROW if count == 1 else MATMUL)
    sizes: dict[str, Any] = {"SIZE": size, "GROUP": group}
    if count == 1:
        sizes |= {"BLOCK": how.block}
        tiles, kernel = -(-(size // 32) // how.block), int4_row
    else:
        sizes |= {"STAGES": how.stages, "PRECISION": _precision(x)}
        tiles, kernel = size // group, int4_rows
    return _run(x, weight, outs, tiles, how, splits, kernel, sizes, counted=count > 1)
