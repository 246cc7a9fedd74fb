"""Weights of int8 and int4 for few rows of x: the codes' bytes at the copy's bandwidth.

Each call takes the next of a few copies of the weight, so that none is found in the L2 cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from shardwise.kernels import gemv

from .measure import GPU, Row, Versions, normal, seconds

SIZES = [(4096, 4096), (4096, 14336), (14336, 4096)] if GPU else [(256, 96)]
ROWS = (1, 2, 4, 16)
GROUP = 128
CACHE = 160e6 if GPU else 1.0  # bytes that surely push a weight out of L2
GOALS = {"int8": "0.80", "int4": "0.65"}


def turns(make: Callable[[], tuple[Tensor, ...]], size: float) -> Callable[[], tuple[Tensor, ...]]:
    """The next of enough copies of a weight of `size` bytes, at each call."""
    first = make()
    held = [first] + [tuple(t.clone() for t in first) for _ in range(int(CACHE // size))]
    return itertools.cycle(held).__next__


def works(call: Callable[[], Any]) -> bool:
    """Whether a peer runs here: torch's own packed matmuls are not built for every device."""
    try:
        call()
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return True


def int8_peer(w: Tensor) -> Callable[[Tensor], Tensor]:
    q, scale = gemv.quantize_int8(w, torch.bfloat16)
    take = turns(lambda: (q, scale), q.numel())
    return lambda x: torch.ops.aten._weight_int8pack_mm(x, *take())


def int4_peer(w: Tensor) -> Callable[[Tensor], Tensor]:
    """torch's kernel with its own packing; codes of any value will do for a time."""
    size, outs = w.shape
    codes = torch.randint(0, 255, (outs, size // 2), device=w.device, dtype=torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    table = normal(size // GROUP, outs, 2)
    take = turns(lambda: (packed, table), size * outs / 2)

    def run(x: Tensor) -> Tensor:
        weight, scales_and_zeros = take()
        return torch.ops.aten._weight_int4pack_mm(x, weight, GROUP, scales_and_zeros)

    return run


def versions(kind: str, w: Tensor) -> tuple[Versions, float]:
    """The competing functions of x, and the bytes of the quantised weight."""
    size, outs = w.shape
    take_plain = turns(lambda: (w,), w.numel() * 2)
    if kind == "int8":
        eight = gemv.quantize_int8(w, torch.bfloat16)
        held = size * outs + 2.0 * outs
        take = turns(lambda: eight, held)
        ours: Callable[[Tensor], Tensor] = lambda x: gemv.int8_linear(x, *take())  # noqa: E731
        peer = int8_peer
    else:
        four = gemv.quantize_int4(w, GROUP, torch.bfloat16)
        held = size * outs / 2 + 4.0 * four[1].numel()
        take = turns(lambda: four, held)
        ours = lambda x: gemv.int4_linear(x, *take(), group=GROUP)  # type: ignore[misc]  # noqa: E731
        peer = int4_peer
    found: Versions = {"ours": ours, "bf16": lambda x: x @ take_plain()[0]}
    x = normal(1, size)
    if GPU and works(lambda: peer(w)(x)):
        found["torch"] = peer(w)
    return found, held


def rows(copy: float) -> Iterator[Row]:
    for size, outs in SIZES:
        w = normal(size, outs, scale=size**-0.5)
        for kind, goal in GOALS.items():
            each, held = versions(kind, w)
            for count in ROWS:
                x = normal(count, size)
                moved = held + 2 * count * (size + outs)
                with torch.no_grad():
                    times = {n: seconds(f, x, repeats=50) for n, f in each.items()}
                name = f"{kind}_linear, rows {count}"
                note = "bf16 has the weight of bf16"
                goal_here = goal if count == 1 else ""
                yield Row(name, f"{size}x{outs}", moved / copy, times, note, goal_here)
            del each
