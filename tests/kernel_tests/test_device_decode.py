"""Paged attention on a GPU: within the rounding of its weights of float64, results poisoned."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from canaries import guarded, watched
from device_check import BITS, DEVICE, MODULES
from torch import Tensor

from shardwise.kernels import decode, decode_triton

# What torch warns of on a GPU (TF32 not used, say) is not what is tested here.
pytestmark = pytest.mark.filterwarnings("default")

DTYPES = pytest.mark.parametrize("dtype", BITS, ids=str)
# (lengths, heads, kv heads, d, page)
SHAPES = [
    ([4096, 1, 0, 777], 32, 8, 128, 16),
    ([300, 301, 65], 8, 8, 64, 64),
    ([1000], 12, 2, 96, 48),
    ([129, 2000], 40, 1, 128, 5),
    ([513, 77], 16, 1, 256, 32),
]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]


def inputs(
    lengths: list[int], heads: int, kv_heads: int, dim: int, page: int, dtype: torch.dtype
) -> Inputs:
    """Sequences with pages in any order, a fifth of them skipped; slots of no token hold NaN."""
    torch.manual_seed(sum(lengths) + dim)
    entries = -(-max(lengths) // page) + 2
    pool = len(lengths) * entries + 3
    table = torch.randperm(pool, device=DEVICE)[: len(lengths) * entries].int()
    table = table.view(len(lengths), entries)
    pages = torch.full((2, pool, page, kv_heads, dim), torch.nan, device=DEVICE)
    for b, length in enumerate(lengths):
        used = torch.arange(entries * page, device=DEVICE).view(entries, page) < length
        fresh = torch.randn(2, entries, page, kv_heads, dim, device=DEVICE)
        pages[:, table[b].long()] = torch.where(used[None, :, :, None, None], fresh, torch.nan)
    skipped = torch.rand(table.shape, device=DEVICE) < 0.2
    skipped[:, 0] = False
    table = torch.where(skipped, -1, table).int()
    q = torch.randn(len(lengths), heads, dim, device=DEVICE).to(dtype)
    k, v = pages.to(dtype)
    return q, k, v, table, torch.tensor(lengths, device=DEVICE, dtype=torch.int32), dim**-0.5


def check(args: Inputs, found: tuple[Tensor, Tensor]) -> None:
    """Against the twin in float64.

    Scores, of d products in float32, are off by at most 2^-20 of the sum of |q k| (about 100 here),
    so weights by 1e-4 of themselves. bf16 and float16 round each weight once more, by 2^-BITS, for
    the second matmul: together they move the result by that part of the sum of weights * |v|, and
    the result is rounded once.
    """
    q, k, v, table, lengths, scale = args
    exact, lse = decode._attention(q.double(), k.double(), v.double(), table, lengths, scale)
    sizes, _ = decode._attention(q.double(), k.double(), v.double().abs(), table, lengths, scale)
    unit = 0.0 if q.dtype == torch.float32 else 2.0 ** -BITS[q.dtype]
    bound = (unit + 1e-4) * sizes + 2.0 ** -BITS[q.dtype] * exact.abs() * 1.01 + 1e-7
    out, sums = found
    assert out.dtype == q.dtype
    assert out.isfinite().all()
    assert ((out.double() - exact).abs() <= bound).all()
    some = lse.isfinite()
    assert torch.equal(sums.isfinite(), some)
    assert (sums[~some] == -torch.inf).all()
    torch.testing.assert_close(sums[some].double(), lse[some], rtol=1e-5, atol=1e-4)


@DTYPES
@pytest.mark.parametrize("splits", [None, 1, 3, 40])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[1:]}")
def test_attention(
    shape: tuple[list[int], int, int, int, int], splits: int | None, dtype: torch.dtype
) -> None:
    args = inputs(*shape, dtype)
    held = [guarded(a) for a in args[:5]]
    with watched(*MODULES) as canaries:
        found = decode_triton.paged_attention(
            held[0], held[1], held[2], held[3], held[4], args[5], splits=splits
        )
        torch.cuda.synchronize()
    assert canaries.buffers, "no kernel ran"
    check(args, found)
    if splits is None:
        op = decode.paged_attention(*args)
        assert all(torch.equal(a, b) for a, b in zip(op, found, strict=True))


def test_two_runs_are_equal_to_the_bit() -> None:
    args = inputs([5000, 3333, 17], 32, 8, 128, 16, torch.bfloat16)
    first, *others = (decode.paged_attention(*args) for _ in range(4))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_captured_graph_reads_new_lengths_and_pages() -> None:
    args = inputs([2000, 1500], 32, 8, 128, 16, torch.bfloat16)
    q, k, v, table, lengths, scale = args
    decode.paged_attention(*args)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = decode.paged_attention(*args)
    lengths.copy_(torch.tensor([900, 1100], device=DEVICE))
    table[:, 3] = -1
    graph.replay()
    check((q, k, v, table, lengths, scale), found)


@DTYPES
def test_parts_merge_to_the_whole(dtype: torch.dtype) -> None:
    """Each part is rounded to the dtype, and so are the weights in it."""
    q, k, v, table, lengths, scale = inputs([1000, 40], 8, 2, 64, 16, dtype)
    mine = torch.arange(table.shape[1], device=DEVICE) % 3 == 0
    tables = [torch.where(m, table, -1) for m in (mine, ~mine)]
    parts = [decode.paged_attention(q, k, v, t, lengths, scale) for t in tables]
    outs, lses = (torch.stack([c.float() for c in column]) for column in zip(*parts, strict=True))
    out, lse = decode.merge(outs, lses)
    exact = decode._attention(q.double(), k.double(), v.double(), table, lengths, scale)
    largest = exact[0].abs().amax()
    assert (out.double() - exact[0]).abs().max() <= (2.0 ** (2 - BITS[dtype]) + 1e-4) * largest
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-5, atol=1e-4)


@DTYPES
@pytest.mark.parametrize("size", [(8, 128), (3, 1000)], ids=str)
def test_write(size: tuple[int, int], dtype: torch.dtype) -> None:
    k, v = torch.randn(2, 50, *size, device=DEVICE).to(dtype)
    slots = torch.randperm(40 * 16, device=DEVICE)[:50]
    slots[::7] = -1
    for index in (torch.int32, torch.int64):
        pages = torch.randn(2, 40, 16, *size, device=DEVICE).to(dtype)
        wanted = pages.clone()
        held = slots >= 0
        wanted[0].flatten(0, 1)[slots[held]] = k[held]
        wanted[1].flatten(0, 1)[slots[held]] = v[held]
        decode.write_kv_(k, v, pages[0], pages[1], slots.to(index))
        assert torch.equal(pages, wanted)


def test_what_was_written_is_attended_to() -> None:
    """One step of decoding: the token's keys and values go to their slots, then it attends."""
    args = inputs([64, 33], 8, 2, 64, 16, torch.bfloat16)
    q, k_pages, v_pages, table, lengths, scale = args
    table[:, -1] = torch.tensor([0, 1], device=DEVICE)  # a page of its own for the new token
    for pages in (k_pages, v_pages):
        pages[:2] = torch.nan
    place = (table.shape[1] - 1) * 16
    new_k, new_v = torch.randn(2, 2, 2, 64, device=DEVICE).bfloat16()
    decode.write_kv_(new_k, new_v, k_pages, v_pages, table[:, -1].long() * 16)
    alone = torch.full_like(table, -1)
    alone[:, -1] = table[:, -1]
    ends = torch.full_like(lengths, place + 1)
    out, _ = decode.paged_attention(q, k_pages, v_pages, alone, ends, scale)
    assert torch.equal(out, new_v.repeat_interleave(4, 1))
