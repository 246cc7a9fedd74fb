"""Norms, and the residual addition fused into them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.kernels import norms

from .measure import GPU, Row, Versions, both, compiled, liger, normal, seconds

EPS = 1e-5
NORM_SIZES = [(16384, 4096), (32768, 768), (16384, 2048), (8192, 8192)] if GPU else [(64, 96)]
COMPILED_SIZES = NORM_SIZES[:1]  # compiling takes seconds: where the goal is stated
GOALS = ("0.95", "0.87")  # of the copy's bandwidth: forward, forward + backward


def plain_rms(x: Tensor, w: Tensor) -> Tensor:
    v = x.float()
    return (v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + EPS) * w).to(x.dtype)


def add_rms(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = x + r
    return F.rms_norm(total, total.shape[-1:], w, EPS), total


def plain_add_rms(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = x + r
    return plain_rms(total, w), total


def norm_versions(size: int) -> Iterator[tuple[str, int, int, Versions]]:
    """Name, number of operands [rows, size] and of vectors, and the competing functions."""
    rms: Versions = {
        "ours": lambda x, w: norms.rms_norm(x, w, EPS)[0],
        "eager": lambda x, w: F.rms_norm(x, (size,), w, EPS),
        "compiled": plain_rms,
    }
    if (peer := liger("liger_rms_norm")) is not None:
        rms["liger"] = lambda x, w: peer(x, w, EPS)
    yield "rms_norm", 1, 1, rms
    yield (
        "add_rms_norm",
        2,
        1,
        {
            "ours": lambda x, r, w: norms.add_rms_norm(x, r, w, EPS)[:2],
            "eager": add_rms,
            "compiled": plain_add_rms,
        },
    )
    layer: Versions = {
        "ours": lambda x, w, b: norms.layer_norm(x, w, b, EPS)[0],
        "eager": lambda x, w, b: F.layer_norm(x, (size,), w, b, EPS),
        "compiled": lambda x, w, b: F.layer_norm(x, (size,), w, b, EPS),
    }
    if (peer_layer := liger("liger_layer_norm")) is not None:
        layer["liger"] = lambda x, w, b: peer_layer(x, w, b, EPS)
    yield "layer_norm", 1, 2, layer


def rows(copy: float) -> Iterator[Row]:
    for count, size in NORM_SIZES:
        for name, wide, vectors, versions in norm_versions(size):
            versions = compiled(versions, (count, size) in COMPILED_SIZES)
            operands = [normal(count, size) for _ in range(wide)]
            operands += [normal(size) for _ in range(vectors)]
            grads = [normal(count, size) for _ in range(wide)]
            label, element = f"{count}x{size}", count * size * 2
            with torch.no_grad():
                times = {n: seconds(f, *operands) for n, f in versions.items()}
            yield Row(f"{name} forward", label, 2 * wide * element / copy, times, goal=GOALS[0])
            times = {n: seconds(both(f, operands, grads)) for n, f in versions.items()}
            moved = (5 if wide == 1 else 8) * element  # x y | g x dx, or x r y t | gy gt t dx
            yield Row(f"{name} forward+backward", label, moved / copy, times, goal=GOALS[1])
