"""Cross-entropy, from logits and from hidden states."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.kernels import cross_entropy as ce

from .measure import (
    DEVICE,
    GPU,
    Row,
    Versions,
    both,
    compiled,
    liger,
    normal,
    peak_extra,
    seconds,
)  # fmt: skip

LOSS_SIZES = [(8192, 128256), (16384, 32000)] if GPU else [(8, 300)]
LINEAR_SIZES = [(16384, 4096, 128256), (16384, 2048, 32000)] if GPU else [(16, 8, 300)]


def rows(copy: float) -> Iterator[Row]:
    yield from loss_rows(copy)
    yield from linear_rows()


def loss_ours(logits: Tensor, labels: Tensor) -> Tensor:
    lse, target = ce.cross_entropy_parts(logits, labels, 0, logits.shape[-1])
    return (lse - target).mean()


def loss_rows(copy: float) -> Iterator[Row]:
    for rows, vocab in LOSS_SIZES:
        logits, labels = normal(rows, vocab), torch.randint(0, vocab, (rows,), device=DEVICE)
        versions: Versions = {
            "ours": loss_ours,
            "eager": lambda x, t: F.cross_entropy(x.float(), t),
            "compiled": lambda x, t: F.cross_entropy(x.float(), t),
        }
        if (peer := liger("liger_cross_entropy")) is not None:
            versions["liger"] = lambda x, t, peer=peer: peer(x, t)[
                0
            ]  # last: it overwrites the logits
        times, forward = {}, {}
        for n, f in compiled(versions, rows == 8192).items():
            with torch.no_grad():
                forward[n] = seconds(f, logits, labels, repeats=10)
            ones = [torch.ones((), device=DEVICE)]
            run = both(lambda x, f=f, t=labels: f(x, t), [logits], ones)
            times[n] = seconds(run, repeats=10)
        element = rows * vocab * 2
        yield Row("cross_entropy forward", f"{rows}x{vocab}", element / copy, forward)
        yield Row(
            "cross_entropy forward+backward",
            f"{rows}x{vocab}",
            3 * element / copy,
            times,
            goal="2.2 ms at 8192x128256",
        )


def linear_rows() -> Iterator[Row]:
    for rows, width, vocab in LINEAR_SIZES:
        h, w = normal(rows, width), normal(vocab, width, scale=0.02)
        labels = torch.randint(0, vocab, (rows,), device=DEVICE)
        scale = torch.full((rows,), 1 / rows, device=DEVICE)
        logits = normal(rows, vocab)
        products = [(h, w.T), (logits, w), (logits.T, h)]
        floor = sum(seconds(torch.mm, *pair, repeats=5) for pair in products)
        del logits, products
        times, extra = {}, {}
        for n, f in linear_versions(labels, scale, ce.chunk_rows(rows, vocab, 2)).items():
            run = both(f, [h, w], [torch.ones((), device=DEVICE)])
            times[n] = seconds(run, repeats=5)
            extra[n] = peak_extra(run)
        note = "peak over grads: " + ", ".join(f"{n} {b / 1e9:.2f} GB" for n, b in extra.items())
        size = f"{rows}x{width}x{vocab}"
        yield Row(
            "linear_cross_entropy forward+backward", size, floor, times, note, "0.91, 0.6 GB extra"
        )


def linear_versions(labels: Tensor, scale: Tensor, chunk: int) -> Versions:
    def ours(h: Tensor, w: Tensor) -> Tensor:
        return ce.linear_cross_entropy(h, w, labels, scale, len(w), chunk)[0]

    def recomputing(h: Tensor, w: Tensor) -> Tensor:
        lse, target = ce.linear_cross_entropy_parts(h, w, labels, 0, len(w), chunk)
        return (lse - target).mean()

    def eager(h: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy((h @ w.T).float(), labels)

    return {"ours": ours, "recomputing": recomputing, "eager": eager}
