"""Paged attention, interpreted (collected by test_interpreter.py in its own process)."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from canaries import GUARD, compare, guarded, watched

from shardwise.kernels import decode, decode_triton
from shardwise.kernels.launch import Launch

MODULES = (decode_triton,)
SMALL = Launch(block=16, warps=4, rows=16, stages=2, programs=1)  # more tiles than sizes ask for
TOLERANCE = {
    torch.float32: {"atol": 2e-6, "rtol": 2e-6},
    torch.float16: {"atol": 3e-3, "rtol": 1e-3},  # weights are rounded for the second matmul
}
KINDS = pytest.mark.parametrize(
    ("dtype", "backwards"),
    [(torch.float32, False), (torch.float32, True), (torch.float16, False)],
    ids=["float32", "float32 reversed", "float16"],
)


def inputs(
    lengths: list[int], heads: int, kv_heads: int, dim: int, page: int, dtype: torch.dtype
) -> tuple[Any, ...]:
    """Sequences with pages in any order; slots that belong to no token hold NaN."""
    torch.manual_seed(sum(lengths) + dim)
    entries = max(1, -(-max(lengths) // page)) + 1
    pool = len(lengths) * entries + 2
    table = torch.randperm(pool)[: len(lengths) * entries].view(len(lengths), entries)
    pages = torch.randn(2, pool, page, kv_heads, dim).to(dtype)
    for b, length in enumerate(lengths):
        used = torch.arange(entries * page).view(entries, page) < length
        held = pages[:, table[b]]
        pages[:, table[b]] = torch.where(used[None, :, :, None, None], held, torch.nan)
    q = torch.randn(len(lengths), heads, dim).to(dtype)
    ends = torch.tensor(lengths, dtype=torch.int32)
    return q, pages[0], pages[1], table.to(torch.int32), ends, dim**-0.5


def unmarked(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same with numbers for NaN, which `compare` could not find unchanged."""
    return tuple(a.nan_to_num(7.0) if isinstance(a, torch.Tensor) else a for a in args)


@KINDS
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page"),
    [(4, 2, 32, 16), (3, 3, 24, 3), (10, 2, 40, 40), (20, 1, 64, 8)],
)
def test_kernel_equals_its_twin(
    heads: int, kv_heads: int, dim: int, page: int, splits: int, dtype: torch.dtype, backwards: bool
) -> None:
    args = unmarked(inputs([37, 1, 70], heads, kv_heads, dim, page, dtype))
    how = Launch(16, 4, rows=max(16, 1 << (heads // kv_heads - 1).bit_length()), stages=2)
    compare(
        partial(decode_triton.paged_attention, how=how, splits=splits), decode._attention, args,
        MODULES, backwards=backwards, **TOLERANCE[dtype],
    )  # fmt: skip


@pytest.mark.parametrize("splits", [1, 3])
def test_slots_of_no_token_are_not_read(splits: int) -> None:
    args = inputs([0, 5, 33], 4, 2, 16, 8, torch.float32)
    args[3][2, 1] = -1  # skipped: a window with a sink
    args[3][1, 0] = -1  # all tokens of the sequence
    wanted = decode._attention(*args)
    assert wanted[0].isfinite().all()
    assert not wanted[0][:2].any()
    assert wanted[1].isinf().all(1).tolist() == [True, True, False]
    with watched(*MODULES):
        found = decode_triton.paged_attention(*args, how=SMALL, splits=splits)
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-6)


def test_the_launch_of_the_size() -> None:
    args = unmarked(inputs([130, 257], 2, 2, 64, 16, torch.float32))
    compare(
        decode_triton.paged_attention, decode._attention, args, MODULES, atol=2e-6, rtol=2e-6
    )  # fmt: skip


def test_parts_of_the_tokens_merge_to_the_whole() -> None:
    q, k, v, table, lengths, scale = unmarked(inputs([37, 60], 4, 2, 32, 4, torch.float32))
    mine = torch.arange(table.shape[1]) % 2 == 0
    parts = [
        decode_triton.paged_attention(q, k, v, torch.where(m, table, -1), lengths, scale)
        for m in (mine, ~mine)
    ]
    outs, lses = (torch.stack(column) for column in zip(*parts, strict=True))
    found = decode.merge(outs, lses)
    wanted = decode_triton.paged_attention(q, k, v, table, lengths, scale)
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-6)


def test_what_the_kernel_has_no_room_for_is_torch_s() -> None:
    args = unmarked(inputs([5], 2, 1, decode_triton.LARGEST_DIM + 8, 4, torch.float32))
    found = decode_triton.paged_attention(*args)
    torch.testing.assert_close(found, decode._attention(*args))


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("size", [(2, 8), (3, 1000)], ids=str)
def test_write(size: tuple[int, int], backwards: bool) -> None:
    slots = torch.tensor([6, -1, 0, 11], dtype=torch.int32)
    pages = [guarded(torch.full((4, 3, *size), 7.0)) for _ in range(2)]
    k, v = torch.randn(2, 4, *size)
    wanted = [p.clone() for p in pages]
    decode.write_kv_(k, v, wanted[0], wanted[1], slots)
    with watched(backwards=backwards):
        decode_triton.write_kv_(guarded(k), guarded(v), pages[0], pages[1], guarded(slots))
    for page, whole in zip(pages, wanted, strict=True):
        assert torch.equal(page, whole)
        around = page._base
        assert around is not None
        outside = torch.cat([around[:GUARD], around[GUARD + page.numel() :]])
        assert outside.isnan().all(), "a write outside the pages"
    assert torch.equal(pages[0].flatten(0, 1)[6], k[0])
