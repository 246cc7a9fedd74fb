"""The ops of `moe.py` in Triton: a program has a token, and a tile of its k copies at a time.

The token's row is read or written once, its copies' rows each once, at the places that `position`
names; a thread holds the same columns of all copies, so a sum over copies stays inside it.
"""

# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton's annotations know neither a launch's num_warps nor that tl.range is iterated over.)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import moe
from .launch import Launch, empty, power_of_two

SHORT_KEYS = ((torch.uint8, 255), (torch.int16, 32767), (torch.int32, 2**31 - 1))
ORDER = Launch(block=1024, warps=4)
LARGEST_K = 32  # more copies of a token do not fit into registers: torch does it


def token_launch(size: int, copies: int) -> Launch:
    """How a token's program is launched: 8 columns a thread, of all copies; `rows` is k padded."""
    part = size & -size
    rows = power_of_two(copies)
    block = min(1024 if rows <= 8 else 512, part if part >= 256 else max(64, power_of_two(size)))
    return Launch(block, warps=max(1, block * max(1, rows // 8) // 256), rows=rows)


@triton.jit(do_not_specialize=["count", "experts"])
def expert_keys(expert, keys, count, experts, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    e = tl.load(expert + i, mask=i < count, other=0).to(tl.int64)
    e = tl.where((e >= 0) & (e < experts), e, experts)  # no expert of ours comes last
    tl.store(keys + i, e.to(keys.dtype.element_ty), mask=i < count)


@triton.jit(do_not_specialize=["count", "experts", "steps"])
def places_of_copies(
    keys, order, offsets, position, count, experts, steps, BLOCK: tl.constexpr
):  # fmt: skip
    """Where each copy lies, and where each expert ends, by halving [first, last]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + i, mask=i < count, other=0).to(tl.int32)
    at = tl.load(order + i, mask=i < count, other=0)
    tl.store(position + at, tl.where(key < experts, i, -1 - i), mask=i < count)
    if tl.program_id(0) * BLOCK < experts:
        first = tl.zeros([BLOCK], tl.int32)
        last = tl.zeros([BLOCK], tl.int32) + count
        for _ in range(steps):
            middle = (first + last) // 2
            open_ = first < last
            key = tl.load(keys + middle, mask=open_, other=0).to(tl.int32)
            first = tl.where(open_ & (key <= i), middle + 1, first)
            last = tl.where(open_ & (key > i), middle, last)
        tl.store(offsets + i, first, mask=i < experts)


@triton.jit
def copies_of(
    position, weights, token, COPIES: tl.constexpr, ROWS: tl.constexpr, SCALED: tl.constexpr
):  # fmt: skip
    """Of a token's copies: which exist, which have an expert here, place and weight, [ROWS, 1]."""
    copy = tl.arange(0, ROWS)[:, None]
    exists = copy < COPIES
    at = token * COPIES + copy
    place = tl.load(position + at, mask=exists, other=-1)
    held = place >= 0
    place = tl.where(held, place, -1 - place).to(tl.int64)
    scale = tl.full([ROWS, 1], 1.0, tl.float32)
    if SCALED:
        scale = tl.load(weights + at, mask=exists, other=0.0).to(tl.float32)
    return at, exists, held, place, scale


@triton.jit
def spread_tokens(
    x, y, position, weights, rows, dots,
    SIZE: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    SCALED: tl.constexpr, WRITE: tl.constexpr, DOTS: tl.constexpr,
):  # fmt: skip
    """WRITE: rows(place) = scale x. DOTS: dots = <x, y(place)>."""
    token = tl.cast(tl.program_id(0), tl.int64)
    at, exists, held, place, scale = copies_of(position, weights, token, COPIES, ROWS, SCALED)
    col = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([ROWS, 1], tl.float32)
    for first in range(0, SIZE, BLOCK):
        c = first + col
        v = tl.load(x + token * SIZE + c, mask=c < SIZE, other=0.0).to(tl.float32)
        if DOTS:
            other = tl.load(y + place * SIZE + c, mask=held & (c < SIZE), other=0.0)
            total += tl.sum(v * other.to(tl.float32), axis=1, keep_dims=True)
        if WRITE:
            result = tl.where(held, v * scale, 0.0)
            result = result.to(rows.dtype.element_ty)
            tl.store(rows + place * SIZE + c, result, mask=exists & (c < SIZE))
    if DOTS:
        tl.store(dots + at, tl.where(held, total, 0.0), mask=exists)


@triton.jit
def gather_tokens(
    y, position, weights, tokens,
    SIZE: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """tokens = sum of scale y(place) over the copies."""
    token = tl.cast(tl.program_id(0), tl.int64)
    _, _, held, place, scale = copies_of(position, weights, token, COPIES, ROWS, SCALED)
    col = tl.arange(0, BLOCK)
    for first in range(0, SIZE, BLOCK):
        c = first + col
        mask = held & (c < SIZE)[None, :]
        v = tl.load(y + place * SIZE + c[None, :], mask=mask, other=0.0).to(tl.float32)
        total = tl.sum(tl.where(held, v * scale, 0.0), axis=0)
        tl.store(tokens + token * SIZE + c, total.to(tokens.dtype.element_ty), mask=c < SIZE)


def order(expert: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    count = expert.numel()
    dtype = next(dtype for dtype, largest in SHORT_KEYS if experts <= largest)
    offsets = empty((experts,), expert, torch.int32)
    position = empty(expert.shape, expert, torch.int32)
    if not count:
        return offsets.zero_(), position
    keys = empty((count,), expert, dtype)
    expert_keys[(triton.cdiv(count, ORDER.block),)](
        expert.contiguous(), keys, count, experts, BLOCK=ORDER.block, num_warps=ORDER.warps
    )
    keys, copies = torch.sort(keys, stable=True)
    places_of_copies[(triton.cdiv(max(count, experts), ORDER.block),)](
        keys, copies, offsets, position, count, experts, count.bit_length(),
        BLOCK=ORDER.block, num_warps=ORDER.warps,
    )  # fmt: skip
    return offsets, position


def torch_does(x: Tensor, position: Tensor) -> bool:
    """Whether a call is left to torch: float64, or too many copies of a token."""
    return x.dtype == torch.float64 or position.shape[1] > LARGEST_K


def spread(
    x: Tensor,
    y: Tensor | None,
    position: Tensor,
    weights: Tensor | None,
    write: bool,
) -> tuple[Tensor, ...]:
    """(rows if `write`, dots if there is a y): launches `spread_tokens`."""
    (tokens, copies), size = position.shape, x.shape[1]
    how = token_launch(size, copies)
    x, position = x.contiguous(), position.contiguous()
    rows = empty((tokens * copies, size), x) if write else x
    dots = x if y is None else empty(position.shape, x, torch.float32)
    if tokens and copies:
        spread_tokens[(tokens,)](
            x, x if y is None else y.contiguous(), position,
            x if weights is None else weights.contiguous(), rows, dots,
            SIZE=size, COPIES=copies, BLOCK=how.block, ROWS=how.rows,
            SCALED=weights is not None, WRITE=write, DOTS=y is not None, num_warps=how.warps,
        )  # fmt: skip
    return (*([rows] if write else []), *([] if y is None else [dots]))


def permute(x: Tensor, position: Tensor, weights: Tensor | None) -> Tensor:
    if torch_does(x, position):
        return moe._permute(x, position, weights)
    return spread(x, None, position, weights, write=True)[0]


def unpermute(y: Tensor, position: Tensor, weights: Tensor | None) -> Tensor:
    if torch_does(y, position):
        return moe._unpermute(y, position, weights)
    (tokens, copies), size = position.shape, y.shape[1]
    if not copies:
        return y.new_zeros(tokens, size)
    how = token_launch(size, copies)
    result = empty((tokens, size), y)
    if tokens:
        gather_tokens[(tokens,)](
            y.contiguous(), position.contiguous(),
            y if weights is None else weights.contiguous(), result,
            SIZE=size, COPIES=copies, BLOCK=how.block, ROWS=how.rows,
            SCALED=weights is not None, num_warps=how.warps,
        )  # fmt: skip
    return result


def dots(x: Tensor, y: Tensor, position: Tensor) -> Tensor:
    if torch_does(x, position):
        return moe._dots(x, y, position)
    return spread(x, y, position, None, write=False)[0]


def unpermute_backward(
    grad: Tensor, y: Tensor, position: Tensor, weights: Tensor
) -> tuple[Tensor, ...]:
    if torch_does(grad, position):
        return moe._both(grad, y, position, weights)
    return spread(grad, y, position, weights, write=True)
