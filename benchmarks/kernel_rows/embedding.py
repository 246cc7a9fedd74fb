"""Lookup in a block of the vocabulary, and the deterministic gradient of the table."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.kernels import embedding

from .measure import DEVICE, GPU, Row, Versions, compiled, normal, seconds

# ids, width, vocabulary: GPT-2 and Llama
SIZES = [(32768, 768, 50304), (16384, 2048, 32000)] if GPU else [(64, 96, 50)]


def skewed(count: int, vocab: int) -> Tensor:
    """Ids as text has them: the n-th most frequent word has 1/n of the first's share."""
    share = 1 / torch.arange(1, vocab + 1, device=DEVICE).float()
    names = torch.randperm(vocab, device=DEVICE)
    return names[torch.multinomial(share, count, replacement=True)]


def masked(table: Tensor, ids: Tensor) -> Tensor:
    """What torch has for a block: the vocabulary is cut in two, and this is the first half."""
    inside = ids < table.shape[0]
    rows = F.embedding(torch.where(inside, ids, 0), table)
    return torch.where(inside.unsqueeze(-1), rows, 0)


def gradient(grad: Tensor, ids: Tensor, size: int) -> Tensor:
    """What autograd of `F.embedding` runs."""
    return torch.ops.aten.embedding_dense_backward(grad, ids, size, -1, False)


def added(grad: Tensor, ids: Tensor, size: int) -> Tensor:
    return grad.new_zeros(size, grad.shape[1]).index_add(0, ids, grad)


def lookup_versions(block: bool) -> Versions:
    plain = masked if block else lambda table, ids: F.embedding(ids, table)
    return {
        "ours": lambda table, ids: embedding.embedding_lookup(table, ids, 0, len(table)),
        "eager": plain,
        "compiled": plain,
    }


def rows(copy: float) -> Iterator[Row]:
    for count, width, vocab in SIZES:
        table, grad, label = normal(vocab, width), normal(count, width), f"{count}x{width}"
        row = width * 2
        drawn = torch.randint(0, vocab, (count,), device=DEVICE)
        for block in (False, True):
            held = table[: vocab // 2] if block else table
            floor = count * row * (1.5 if block else 2) / copy
            versions = compiled(lookup_versions(block), True)
            times = {n: seconds(f, held, drawn) for n, f in versions.items()}
            name = "embedding_lookup" + (", half a vocabulary" if block else "")
            yield Row(name, label, floor, times, goal="0.85")
        for kind, ids in {"drawn": drawn, "as text": skewed(count, vocab)}.items():
            versions: Versions = {
                "ours": lambda g, i, v=vocab: embedding.embedding_backward(g, i, 0, v),
                "eager": lambda g, i, v=vocab: gradient(g, i, v),
                "index_add": lambda g, i, v=vocab: added(g, i, v),
                "compiled": lambda g, i, v=vocab: gradient(g, i, v),
            }
            times = {n: seconds(f, grad, ids) for n, f in compiled(versions, True).items()}
            floor = (count + vocab) * row / copy
            note = "index_add and compiled add by atomics"
            yield Row(f"embedding_backward, ids {kind}", label, floor, times, note, "faster: eager")
