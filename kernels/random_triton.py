"""The random numbers of `random.py` in Triton: four elements for one counter, mask in registers.

A program holds `block` elements as block / 4 counters. Philox gives four tensors of words;
interleaved, they are in the order of the elements. A block whose rows are multiples of eight
columns, from a column that four divides, is one flat range of memory with 16-byte loads; any other
is addressed row by row.

Rows are numbered by up to three levels, see `random.place`. What has more of them, 2^32 rows,
2^33 columns, 2^31 counters or float64 is the twin's.
"""

# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton's annotations know neither a launch's num_warps nor that tl.range is iterated over.)
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import random
from .launch import Launch, empty
from .random import Ints

LAUNCH = Launch(block=2048, warps=4)
LEVELS = 3  # of rows
WORDS, UNIFORM, MASK, DROPOUT = (tl.constexpr(i) for i in range(4))  # what `fill` makes


@triton.jit
def global_row(row, first, rows1, rows2, step0, step1, step2, COUNT: tl.constexpr):
    """Number of a block's row in the global tensor, modulo 2^32."""
    if COUNT == 3:
        outer = row // rows2
        part = (outer // rows1) * step0 + (outer % rows1) * step1
        return first + part + (row % rows2) * step2
    if COUNT == 2:
        return first + (row // rows2) * step1 + (row % rows2) * step2
    return first + row * step2


@triton.jit(
    do_not_specialize=[
        "seed", "salt", "count", "group0", "first", "rows1", "rows2", "step0", "step1", "step2",
        "below",
    ]
)  # fmt: skip
def fill(
    x, y, key, seed, salt, count, group0, first, rows1, rows2, step0, step1, step2, below,
    low, scale,
    WIDTH: tl.constexpr, SKIPPED: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
    WHAT: tl.constexpr, DATA: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    PER_ROW: tl.constexpr = (SKIPPED + WIDTH + 3) // 4
    begin = tl.program_id(0) * (BLOCK // 4)
    group = begin + tl.arange(0, BLOCK // 4)
    row = tl.zeros_like(group)
    if COUNT > 0:
        row = group // PER_ROW
        group = group % PER_ROW
    number = global_row(row, first, rows1, rows2, step0, step1, step2, COUNT)
    if DATA:
        seed = tl.load(key) | (tl.load(key + 1) << 32)
    w0, w1, w2, w3 = tl.philox(seed, group0 + group, number, 0, salt)
    word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    top = (word >> 8).to(tl.int32)

    e = tl.arange(0, BLOCK)
    if FLAT:  # `count` is of eights here: the compiler sees that no 16 bytes are cut by the mask
        at = tl.cast(begin, tl.int64) * 4 + e
        inside = at < tl.cast(count, tl.int64) * 8
    else:
        line, column = begin + e // 4, e % 4 - SKIPPED
        inside = line < count
        if COUNT > 0:
            column += (line % PER_ROW) * 4
            at = tl.cast(line // PER_ROW, tl.int64) * WIDTH + column
        else:
            column += line * 4
            at = tl.cast(column, tl.int64)
        inside = inside & (column >= 0) & (column < WIDTH)
    if WHAT == WORDS:
        tl.store(y + at, word.to(tl.int64), mask=inside)
    elif WHAT == UNIFORM:
        value = top.to(tl.float32) * 5.9604644775390625e-08 * scale + low
        tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)
    elif WHAT == MASK:
        tl.store(y + at, (top < below).to(tl.uint8), mask=inside)
    else:
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        value *= tl.where(top < below, scale, 0.0)
        tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["c0", "c1", "c2", "c3"])
def derive(key, y, c0, c1, c2, c3):
    seed = tl.load(key) | (tl.load(key + 1) << 32)
    w0, w1, _, _ = tl.philox(seed, c0, c1, c2, c3)
    tl.store(y, w0.to(tl.int64))
    tl.store(y + 1, w1.to(tl.int64))


def fits(shape: Ints, start: Ints, size: Ints) -> bool:
    """Whether the kernel's numbers hold the block."""
    levels, _, _, width = random.place(tuple(shape), tuple(start), tuple(size))
    counters = math.prod(size) // max(width, 1) * (width // 4 + 2)
    return (
        len(levels) <= LEVELS and math.prod(shape[:-1]) < 2**32 and counters < 2**31 - LAUNCH.block
    )


def signed(word: int) -> int:
    """A word of 32 bits as the signed number that Triton passes as int32."""
    return word - (1 << 32) if word >> 31 else word


def launch_fill(
    x: Tensor | None,
    y: Tensor,
    key: Tensor | None,
    seed: int,
    shape: Ints,
    start: Ints,
    what: Any,
    *,
    salt: int = 0,
    below: int = 0,
    low: float = 0.0,
    scale: float = 1.0,
    how: Launch = LAUNCH,
) -> None:
    """Fill `y`, a block of a tensor of this shape."""
    if not y.numel():
        return
    levels, first, column, width = random.place(tuple(shape), tuple(start), tuple(y.shape))
    skipped, rows = column % 4, y.numel() // width
    groups = rows * ((skipped + width + 3) // 4)
    is_flat = width % 8 == 0 and skipped == 0
    (_, step0), (rows1, step1), (rows2, step2) = ((1, 0),) * (LEVELS - len(levels)) + levels
    fill[(triton.cdiv(4 * groups, how.block),)](
        y if x is None else x, y, y if key is None else key, seed, signed(salt),
        groups // 2 if is_flat else groups, column // 4, signed(first % 2**32), rows1, rows2,
        signed(step0 % 2**32), signed(step1 % 2**32), signed(step2 % 2**32), below, low, scale,
        WIDTH=0 if is_flat and not levels else width, SKIPPED=skipped, COUNT=len(levels),
        BLOCK=how.block, WHAT=what, DATA=key is not None, FLAT=is_flat,
        num_warps=how.warps, enable_fp_fusion=False,
    )  # fmt: skip


def words(key: Tensor, shape: Ints, start: Ints, size: Ints, salt: int) -> Tensor:
    if not fits(shape, start, size):
        return random._words_twin(key, shape, start, size, salt)
    y = empty(size, key, torch.int64)
    launch_fill(None, y, key.contiguous(), 0, shape, start, WORDS, salt=salt)
    return y


def uniform(
    key: Tensor, shape: Ints, start: Ints, size: Ints, salt: int, low: float, high: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    if not fits(shape, start, size) or dtype == torch.float64:
        return random._uniform(key, shape, start, size, salt, low, high, dtype)
    y = empty(size, key, dtype)
    options = {"salt": salt, "low": low, "scale": high - low}
    launch_fill(None, y, key.contiguous(), 0, shape, start, UNIFORM, **options)
    return y


def mask(key: Tensor, shape: Ints, start: Ints, size: Ints, salt: int, below: int) -> Tensor:
    if not fits(shape, start, size):
        return random._mask(key, shape, start, size, salt, below)
    y = empty(size, key, torch.uint8)
    launch_fill(None, y, key.contiguous(), 0, shape, start, MASK, salt=salt, below=below)
    return y.view(torch.bool)


def derived(key: Tensor, c0: int, c1: int, c2: int, c3: int) -> Tensor:
    y = empty(key.shape, key)
    derive[(1,)](key.contiguous(), y, *map(signed, (c0, c1, c2, c3)), num_warps=1)
    return y


def dropout(
    x: Tensor, key: Tensor | None, seed: int, shape: Ints, start: Ints, below: int, scale: float
) -> Tensor:
    if not fits(shape, start, x.shape) or x.dtype == torch.float64:
        return random._dropout(x, key, seed, shape, start, below, scale)
    x = x.contiguous()
    y = empty(x.shape, x)
    key = None if key is None else key.contiguous()
    launch_fill(x, y, key, seed, shape, start, DROPOUT, below=below, scale=scale)
    return y
