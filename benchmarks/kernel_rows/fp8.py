"""fp8: the quantiser against a copy, and a linear layer against bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from shardwise.kernels import fp8

from .measure import GPU, Row, both, compiled, normal, seconds

QUANTIZED = [(8192, 4096), (16384, 4096), (16384, 14336), (1024, 4096)] if GPU else [(64, 96)]
LINEAR = [(8192, 4096, 4096), (16384, 4096, 14336), (16384, 14336, 4096), (16384, 2048, 8192)]
LINEAR = LINEAR if GPU else [(32, 64, 48)]
PEAK = 1550e12  # operations a second: the best published 8-bit product


def plain_quantize(x: Tensor, amax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both copies in plain torch."""
    scale, inverse = fp8.powers(amax, fp8.E4M3)
    rows = (x.float() * inverse).clamp(-448, 448).to(fp8.E4M3)
    return rows, rows.t().contiguous(), scale


def product(x: Tensor, w: Tensor) -> Tensor:
    """The 8-bit product alone, of operands that are quantised already."""
    one = torch.ones((), device=x.device)
    return fp8.scaled_matmul(x, one, w, one, torch.bfloat16, fast=True)


def rows(copy: float) -> Iterator[Row]:
    for count, size in QUANTIZED:
        x = normal(count, size)
        amax, label = fp8.largest(x), f"{count}x{size}"
        versions = {
            "ours": lambda x, amax: fp8.fp8_quantize(x, amax, False),
            "eager": plain_quantize,
            "compiled": plain_quantize,
        }
        versions = compiled(versions, (count, size) in QUANTIZED[:2])
        times = {n: seconds(f, x, amax) for n, f in versions.items()}
        yield Row("fp8 quantise row + column", label, 4 * x.numel() / copy, times, goal="0.87")
        times = {"ours": seconds(fp8.largest, x), "eager": seconds(lambda x: x.abs().amax(), x)}
        yield Row("fp8 largest magnitude", label, 2 * x.numel() / copy, times)
    for count, inner, outer in LINEAR:
        operands = [normal(count, inner), normal(inner, outer, scale=inner**-0.5)]
        grads, label = [normal(count, outer)], f"{count}x{inner}x{outer}"
        moved = 2 * count * inner * outer
        a = fp8.fp8_quantize(operands[0], None, False)[0]
        b = fp8.fp8_quantize(operands[1], None, False)[1]
        times = {"ours": seconds(product, a, b), "eager": seconds(torch.mm, *operands)}
        note = "eager is bfloat16"
        yield Row("fp8 product alone", label, moved / PEAK, times, note)
        versions = {"ours": fp8.linear, "eager": torch.mm, "compiled": fp8.linear}
        versions = compiled(versions, (count, inner, outer) in LINEAR[:1])
        with torch.no_grad():
            times = {n: seconds(f, *operands) for n, f in versions.items()}
        yield Row("fp8 linear forward", label, moved / PEAK, times, note)
        times = {n: seconds(both(f, operands, grads)) for n, f in versions.items()}
        yield Row(
            "fp8 linear forward+backward", label, 3 * moved / PEAK, times,
            f"{note}; ours takes {times['eager'] / times['ours']:.2f} times less, goal 1.6",
        )  # fmt: skip
