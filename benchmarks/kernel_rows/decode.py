"""Attention of decoding over pages: the bytes of keys and values at the copy's bandwidth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.kernels import decode

from .measure import DEVICE, GPU, Row, Versions, normal, seconds

# Sequences, tokens of each, query heads, kv heads, d, page.
SIZES = (
    [
        (64, 4096, 32, 8, 128, 16),
        (64, 4096, 32, 8, 128, 64),
        (256, 512, 32, 8, 128, 16),
        (1, 131072, 32, 8, 128, 16),
        (1, 8192, 32, 8, 128, 16),
        (64, 2048, 32, 4, 64, 16),
    ]
    if GPU
    else [(2, 64, 4, 2, 32, 16)]
)


def gathered(pages: Tensor, table: Tensor) -> Tensor:
    """[batch, kv_heads, tokens, d] of whole sequences."""
    return pages[table.long()].flatten(1, 2).transpose(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=True)


def versions(table: Tensor, lengths: Tensor, dense: tuple[Tensor, Tensor]) -> Versions:
    """Ours and eager over pages; "sdpa" has the keys and values in a row already: no pages."""
    return {
        "ours": lambda q, k, v: decode.paged_attention(q, k, v, table, lengths),
        "eager": lambda q, k, v: sdpa(q, gathered(k, table), gathered(v, table)),
        "sdpa": lambda q, k, v: sdpa(q, *dense),
    }


def inputs(batch: int, tokens: int, kv_heads: int, dim: int, page: int) -> tuple[Any, ...]:
    entries = tokens // page
    table = torch.randperm(batch * entries, device=DEVICE).int().view(batch, entries)
    lengths = torch.full((batch,), tokens, device=DEVICE, dtype=torch.int32)
    k, v = (normal(batch * entries, page, kv_heads, dim) for _ in range(2))
    return k, v, table, lengths


def rows(copy: float) -> Iterator[Row]:
    for batch, tokens, heads, kv_heads, dim, page in SIZES:
        k, v, table, lengths = inputs(batch, tokens, kv_heads, dim, page)
        q = normal(batch, heads, dim)
        dense = tuple(gathered(pages, table).contiguous() for pages in (k, v))
        held = 4 * batch * tokens * kv_heads * dim
        label = f"{batch}x{tokens}x{kv_heads}x{dim}"
        with torch.no_grad():
            each = versions(table, lengths, (dense[0], dense[1]))
            times = {n: seconds(f, q, k, v) for n, f in each.items()}
            note = f"pages of {page}; eager gathers them, sdpa has none"
            if held < 150e6:
                note += "; cached by L2"
            yield Row("paged_attention", label, held / copy, times, note, "0.85")
        del dense, each
        if GPU:
            torch.cuda.empty_cache()
    tokens, size = (8192, (8, 128)) if GPU else (8, (2, 4))
    page = 16
    new = normal(2, tokens, *size)
    pages = normal(2, 2 * tokens // page, page, *size)
    slots = torch.randperm(2 * tokens, device=DEVICE)[:tokens]

    def eager() -> None:
        for kind in range(2):
            pages[kind].flatten(0, 1).index_copy_(0, slots, new[kind])

    times = {
        "ours": seconds(lambda: decode.write_kv_(new[0], new[1], pages[0], pages[1], slots)),
        "eager": seconds(eager),
    }
    yield Row("write_kv_", f"{tokens}x{size[0]}x{size[1]}", 4 * new.numel() / copy, times)
