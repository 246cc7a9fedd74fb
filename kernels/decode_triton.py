"""The paged attention of `decode.py` in Triton: one read of the keys and values, split over tokens.

A program has one sequence, one kv head and one part of the sequence. The query heads that share the
kv head are the rows (at least 16) of both matmuls, so the tensor cores take no time and the loop is
as fast as the pages arrive: a few tiles are in flight while one is worked on. A part is as many
whole tiles as the sequence's own length asks for, so ragged lengths are balanced without the host
knowing them. Parts end as results with their log-sum-exp in float32; a second kernel joins those of
a head, in order.
"""

# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton's annotations know neither a launch's num_warps nor that tl.range is iterated over.)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import decode
from .launch import Launch, empty, power_of_two, processors

LARGEST_DIM = 256  # wider heads need more shared memory than there is: torch computes them
LARGEST_GROUP = 64  # query heads of one kv head, which are rows of a tile
LOG2_E, LN_2 = 1.4426950408889634, 0.6931471805599453


def decode_launch(dim: int, group: int, itemsize: int) -> Launch:
    """How the attention is launched: tiles of 16 KiB of keys and as much of values, three deep."""
    width = power_of_two(dim)
    block = max(16, min(128, 16384 // (width * itemsize)))
    return Launch(block, warps=4, rows=max(16, power_of_two(group)), stages=3, programs=3)


def split_count(pairs: int, tokens: int, how: Launch, device: torch.device) -> int:
    """Parts of each sequence: four waves of programs, but at least two tiles a part.

    Args:
        pairs: sequences times kv heads.
        tokens: the most that a sequence can have.
        how: the launch.
        device: of the tensors.
    """
    wanted = -(-4 * how.programs * processors(device) // max(1, pairs))
    return max(1, min(wanted, tokens // (2 * how.block)))


@triton.jit(do_not_specialize=["entries"])
def attend(
    q, k_pages, v_pages, block_table, lengths, out, lse, entries, factor,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, part = tl.program_id(0), tl.program_id(2)
    sequence = tl.cast(tl.program_id(1), tl.int64)
    length = tl.minimum(tl.load(lengths + sequence), entries * PAGE).to(tl.int32)
    tiles = tl.cdiv(tl.cdiv(length, BLOCK), SPLITS)
    start = part * tiles * BLOCK
    end = tl.minimum(start + tiles * BLOCK, length)
    row, col, token = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    query = sequence * KV_HEADS * GROUP + head * GROUP + row
    within = (row[:, None] < GROUP) & (col[None, :] < DIM)
    queries = tl.load(q + query[:, None] * DIM + col[None, :], mask=within, other=0.0)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, WIDTH], tl.float32)
    table = block_table + sequence * entries
    page = tl.load(table + (start + token) // PAGE, mask=start + token < end, other=-1)
    for first in tl.range(start, end, BLOCK, num_stages=STAGES):
        n = first + token
        held = page >= 0
        at = (page.to(tl.int64) * PAGE + n % PAGE) * (KV_HEADS * DIM) + head * DIM
        keys = tl.load(
            k_pages + at[None, :] + col[:, None],
            mask=held[None, :] & (col[:, None] < DIM), other=0.0,
        )  # fmt: skip
        values = tl.load(
            v_pages + at[:, None] + col[None, :],
            mask=held[:, None] & (col[None, :] < DIM), other=0.0,
        )  # fmt: skip
        page = tl.load(table + (n + BLOCK) // PAGE, mask=n + BLOCK < end, other=-1)
        scores = tl.dot(queries, keys, input_precision=PRECISION) * factor
        scores = tl.where(held[None, :], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, axis=1))
        shift = tl.where(new == float("-inf"), 0.0, new)  # no token yet: -inf - -inf is NaN
        weights = tl.exp2(scores - shift[:, None])
        kept = tl.exp2(largest - shift)
        total = total * kept + tl.sum(weights, axis=1)
        result = tl.dot(
            weights.to(values.dtype), values, result * kept[:, None], input_precision=PRECISION
        )
        largest = new
    some = total > 0
    result = result / tl.where(some, total, 1.0)[:, None]
    joint = tl.where(some, (largest + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453,
                     float("-inf"))  # fmt: skip
    place = query * SPLITS + part
    tl.store(out + place[:, None] * DIM + col[None, :], result.to(out.dtype.element_ty), within)
    tl.store(lse + place, joint, mask=row < GROUP)


@triton.jit
def join(
    outs, lses, out, lse,
    DIM: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    head = tl.cast(tl.program_id(0), tl.int64)
    part, col = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    here = tl.load(lses + head * SPLITS + part, mask=part < SPLITS, other=float("-inf"))
    largest = tl.max(here, axis=0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp(here - shift), axis=0)
    divisor = tl.where(total > 0, total, 1.0)
    result = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, SPLITS, ROWS):
        n = first + tl.arange(0, ROWS)
        weight = tl.exp(tl.load(lses + head * SPLITS + n, n < SPLITS, float("-inf")) - shift)
        result += (weight / divisor)[:, None] * tl.load(
            outs + (head * SPLITS + n[:, None]) * DIM + col[None, :],
            mask=(n[:, None] < SPLITS) & (col[None, :] < DIM), other=0.0,
        )  # fmt: skip
    found = tl.sum(result, axis=0).to(out.dtype.element_ty)
    tl.store(out + head * DIM + col, found, mask=col < DIM)
    tl.store(lse + head, tl.where(total > 0, shift + tl.log(divisor), float("-inf")))


@triton.jit
def write_rows(
    k, v, k_pages, v_pages, slots, SIZE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.cast(tl.program_id(0), tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = (col < SIZE) & (slot >= 0)
    tl.store(k_pages + slot * SIZE + col, tl.load(k + token * SIZE + col, mask=held), mask=held)
    tl.store(v_pages + slot * SIZE + col, tl.load(v + token * SIZE + col, mask=held), mask=held)


JOIN = Launch(block=128, warps=4, rows=16)
WRITE = Launch(block=2048, warps=4)


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    how: Launch | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse): launches `attend`, and `join` where sequences are split."""
    batch, heads, dim = q.shape
    page, kv_heads = k_pages.shape[1:3]
    group, entries = heads // kv_heads, block_table.shape[1]
    mixed = not q.dtype == k_pages.dtype == v_pages.dtype
    if q.dtype == torch.float64 or mixed or dim > LARGEST_DIM or group > LARGEST_GROUP:
        return decode._attention(q, k_pages, v_pages, block_table, lengths, scale)
    how = how or decode_launch(dim, group, q.element_size())
    splits = splits or split_count(batch * kv_heads, entries * page, how, q.device)
    width = power_of_two(dim)
    out, lse = empty(q.shape, q), empty(q.shape[:-1], q, torch.float32)
    if not q.numel():
        return out, lse
    outs, lses = out, lse
    if splits > 1:
        outs = empty((batch, heads, splits, dim), q, torch.float32)
        lses = empty((batch, heads, splits), q, torch.float32)
    attend[(kv_heads, batch, splits)](
        q.contiguous(), k_pages.contiguous(), v_pages.contiguous(), block_table.contiguous(),
        lengths.contiguous(), outs, lses, entries, scale * LOG2_E,
        KV_HEADS=kv_heads, GROUP=group, DIM=dim, PAGE=page, WIDTH=max(16, width), ROWS=how.rows,
        BLOCK=how.block, SPLITS=splits, STAGES=how.stages,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=how.warps,
    )  # fmt: skip
    if splits > 1:
        join[(batch * heads,)](
            outs, lses, out, lse,
            DIM=dim, WIDTH=width, SPLITS=splits, PARTS=power_of_two(splits), ROWS=JOIN.rows,
            num_warps=JOIN.warps,
        )  # fmt: skip
    return out, lse


def write_kv_(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """Launches `write_rows`; shapes were looked at by `decode.write_kv_`."""
    tokens, size = k.shape[0], k.shape[1] * k.shape[2]
    if tokens and size:
        write_rows[(tokens, triton.cdiv(size, WRITE.block))](
            k.contiguous(), v.contiguous(), k_pages, v_pages, slots.contiguous(),
            SIZE=size, BLOCK=WRITE.block, num_warps=WRITE.warps,
        )  # fmt: skip
