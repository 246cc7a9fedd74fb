"""The lookup and its gradient of `embedding.py` in Triton.

The gradient needs no atomics: the ids are sorted, so the rows of one id are a segment of the sorted
positions, and each kernel knows from the sorted ids alone what is its own:

    block_keys      the ids as sort keys, as short as the block allows (a radix sort goes by bytes)
    segment_starts  where the segment of each id starts, by binary search
    sum_chunks      positions come in chunks of CHUNK; a chunk of a single id is summed, in float32
    sum_long        segments longer than a chunk: their chunks' sums, and the rows at either end.
                    The program of a segment's first chunk border has it; so no list is needed.
    sum_short       all other ids, a tile of them at a time; ids that nothing names are zeros

An id that fills the whole batch costs a loop over 1 / CHUNK of it, and its chunks run side by side.
"""

# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton's annotations know neither a launch's num_warps nor that tl.range is iterated over.)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import embedding
from .launch import Launch, empty, power_of_two

CHUNK = 32  # positions; longer segments are split
SHORT_KEYS = (1 << 16) - 1  # ids of a block, and one key for ids of no block, that 16 bits can name
KEYS = STARTS = Launch(block=1024, warps=4)


def columns(size: int, largest: int = 1024) -> int:
    """Elements of a row that a tile holds: `size` in equal parts where they are wide enough."""
    block = size & -size  # the largest power of two that divides the size
    return min(largest, block if block >= 128 else max(32, power_of_two(size)))


def lookup_launch(size: int) -> Launch:
    """How the lookup is launched: 32 elements a thread."""
    block = columns(size)
    return Launch(block, warps=4, rows=max(1, 4096 // block))


def short_launch(size: int) -> Launch:
    """How `sum_short` is launched: 16 elements a thread, of several ids."""
    block = columns(size)
    return Launch(block, warps=4, rows=max(1, 2048 // block))


def long_launch(size: int) -> Launch:
    """How `sum_chunks` and `sum_long` are launched: 16 to 32 elements a thread, of one id."""
    block = columns(size, 512)
    return Launch(block, warps=max(1, block // 128), rows=4)


@triton.jit(do_not_specialize=["count", "start", "size"])
def lookup_rows(
    table, ids, result, count, start, size,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)
    col = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)[None, :]
    local = tl.load(ids + row, mask=row < count, other=-1).to(tl.int64) - start
    known = (local >= 0) & (local < size) & (row < count)
    local = tl.where(known, local, 0)[:, None]
    v = tl.load(table + local * SIZE + col, mask=known[:, None] & (col < SIZE), other=0.0)
    row = row.to(tl.int64)[:, None]
    tl.store(result + row * SIZE + col, v, mask=(row < count) & (col < SIZE))


@triton.jit(do_not_specialize=["count", "start", "size"])
def block_keys(ids, keys, count, start, size, LOW: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    local = tl.load(ids + i, mask=i < count, other=0).to(tl.int64) - start
    local = tl.where((local >= 0) & (local < size), local, size)  # no block's ids come last
    tl.store(keys + i, (local - LOW).to(keys.dtype.element_ty), mask=i < count)


@triton.jit(do_not_specialize=["count", "size", "steps"])
def segment_starts(
    keys, starts, count, size, steps, LOW: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Of each id 0..size the number of positions whose id is smaller, by halving [first, last]."""
    v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.zeros([BLOCK], tl.int32)
    last = tl.zeros([BLOCK], tl.int32) + count
    for _ in range(steps):
        middle = (first + last) // 2
        open_ = first < last
        key = tl.load(keys + middle, mask=open_, other=0).to(tl.int32) + LOW
        first = tl.where(open_ & (key < v), middle + 1, first)
        last = tl.where(open_ & (key >= v), middle, last)
    tl.store(starts + v, first, mask=v <= size)


@triton.jit
def add_rows(
    total, grad, order, first, end, col,
    SIZE: tl.constexpr, ROWS: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """`total` [ROWS, BLOCK] plus the rows at the positions [first, end), or at order[position]."""
    for p in range(first, end, ROWS):
        at = p + tl.arange(0, ROWS)
        row = at.to(tl.int64)
        if SORTED:
            row = tl.load(order + at, mask=at < end, other=0).to(tl.int64)
        mask = (at < end)[:, None] & (col < SIZE)
        v = tl.load(grad + row[:, None] * SIZE + col, mask=mask, other=0.0)
        total += v.to(tl.float32)
    return total


@triton.jit(do_not_specialize=["size"])
def sum_chunks(
    grad, keys, order, parts, size,
    SIZE: tl.constexpr, LOW: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    chunk = tl.program_id(0) // tiles
    col = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    first = chunk * CHUNK  # all chunks are full: the rest of the positions has no program
    v = tl.load(keys + first).to(tl.int32) + LOW
    alone = v == tl.load(keys + first + CHUNK - 1).to(tl.int32) + LOW
    if alone & (v < size):
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        total = add_rows(
            total, grad, order, first, first + CHUNK, col[None, :], SIZE, ROWS, SORTED=True
        )
        at = tl.cast(chunk, tl.int64) * SIZE + col
        tl.store(parts + at, tl.sum(total, axis=0), mask=col < SIZE)


@triton.jit(do_not_specialize=["size"])
def sum_long(
    grad, keys, order, starts, parts, result, size,
    SIZE: tl.constexpr, LOW: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    chunk = tl.program_id(0) // tiles
    col = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    border = chunk * CHUNK
    v = tl.load(keys + border).to(tl.int32) + LOW
    if v < size:
        first, end = tl.load(starts + v), tl.load(starts + v + 1)
        if (end - first > CHUNK) & (border - first < CHUNK):
            total = tl.zeros([ROWS, BLOCK], tl.float32)
            c, full = col[None, :], end // CHUNK
            total = add_rows(total, grad, order, first, border, c, SIZE, ROWS, SORTED=True)
            total = add_rows(total, parts, order, chunk, full, c, SIZE, ROWS, SORTED=False)
            total = add_rows(total, grad, order, full * CHUNK, end, c, SIZE, ROWS, SORTED=True)
            total = tl.sum(total, axis=0).to(result.dtype.element_ty)
            tl.store(result + tl.cast(v, tl.int64) * SIZE + col, total, mask=col < SIZE)


@triton.jit(do_not_specialize=["size"])
def sum_short(
    grad, order, starts, result, size,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    v = (tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)
    col = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)[None, :]
    first = tl.load(starts + v, mask=v < size, other=0)
    length = tl.load(starts + v + 1, mask=v < size, other=0) - first
    mine = length <= CHUNK
    length = tl.where(mine, length, 0)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for j in range(tl.max(length, axis=0)):
        row = tl.load(order + first + j, mask=j < length, other=0).to(tl.int64)
        mask = (j < length)[:, None] & (col < SIZE)
        total += tl.load(grad + row[:, None] * SIZE + col, mask=mask, other=0.0).to(tl.float32)
    at = v.to(tl.int64)[:, None] * SIZE + col
    mask = (mine & (v < size))[:, None] & (col < SIZE)
    tl.store(result + at, total.to(result.dtype.element_ty), mask=mask)


def lookup(table: Tensor, ids: Tensor, start: int, size: int) -> Tensor:
    if table.dtype == torch.float64:
        return embedding._lookup(table, ids, start, size)
    width, count = table.shape[1], ids.numel()
    how = lookup_launch(width)
    result = empty((*ids.shape, width), table)
    if count and width:
        grid = triton.cdiv(count, how.rows) * triton.cdiv(width, how.block)
        lookup_rows[(grid,)](
            table.contiguous(), ids.contiguous(), result, count, start, size,
            SIZE=width, BLOCK=how.block, ROWS=how.rows, num_warps=how.warps,
        )  # fmt: skip
    return result


def sorted_ids(ids: Tensor, start: int, size: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Sorted keys, their positions before, where each id's segment starts, and the lowest key."""
    count = ids.numel()
    low = 1 << 15 if size < SHORT_KEYS else 0
    keys = empty((count,), ids, torch.int16 if low else torch.int32)
    block_keys[(triton.cdiv(count, KEYS.block),)](
        ids.contiguous(), keys, count, start, size,
        LOW=low, BLOCK=KEYS.block, num_warps=KEYS.warps,
    )  # fmt: skip
    keys, order = torch.sort(keys, stable=True)
    starts = empty((size + 1,), ids, torch.int32)
    segment_starts[(triton.cdiv(size + 1, STARTS.block),)](
        keys, starts, count, size, count.bit_length(),
        LOW=low, BLOCK=STARTS.block, num_warps=STARTS.warps,
    )  # fmt: skip
    return keys, order, starts, low


def backward(grad: Tensor, ids: Tensor, start: int, size: int) -> Tensor:
    if grad.dtype == torch.float64:
        return embedding._backward(grad, ids, start, size)
    width, count = grad.shape[-1], ids.numel()
    if not (count and size and width):
        return grad.new_zeros(size, width)
    grad = grad.contiguous()
    keys, order, starts, low = sorted_ids(ids.reshape(-1), start, size)
    result = empty((size, width), grad)
    how = long_launch(width)
    tiles = triton.cdiv(width, how.block)
    chunks = count // CHUNK
    shape = {"SIZE": width, "CHUNK": CHUNK, "BLOCK": how.block, "ROWS": how.rows}
    if chunks:
        # Chunks of several ids stay as they are: nothing reads them.
        parts = torch.empty(chunks, width, dtype=torch.float32, device=grad.device)
        sum_chunks[(chunks * tiles,)](
            grad, keys, order, parts, size, LOW=low, num_warps=how.warps, **shape
        )
        borders = triton.cdiv(count, CHUNK)
        sum_long[(borders * tiles,)](
            grad, keys, order, starts, parts, result, size,
            LOW=low, num_warps=how.warps, **shape,
        )  # fmt: skip
    how = short_launch(width)
    sum_short[(triton.cdiv(size, how.rows) * triton.cdiv(width, how.block),)](
        grad, order, starts, result, size,
        SIZE=width, CHUNK=CHUNK, BLOCK=how.block, ROWS=how.rows, num_warps=how.warps,
    )  # fmt: skip
    return result
