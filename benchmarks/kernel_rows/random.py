"""Random fill, and dropout: its mask is made twice and stored never."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.kernels import random

from .measure import DEVICE, GPU, Row, Versions, both, compiled, normal, seconds

SIZES = [(16384, 4096), (32768, 768), (4096, 16384)] if GPU else [(64, 96)]
RATE = 0.1


def rows(copy: float) -> Iterator[Row]:
    for count, width in SIZES:
        yield from dropout_rows(copy, count, width)
    for count, width in SIZES[:1]:
        yield from fill_rows(copy, count, width)


def dropout_rows(copy: float, count: int, width: int) -> Iterator[Row]:
    key = random.key_of(7, DEVICE)
    rest = ((count, width), (0, 0), random.level(1 - RATE), 1 / (1 - RATE))
    versions: Versions = {
        "ours": lambda x: random.dropout(x, key, 0, *rest),
        "eager": lambda x: F.dropout(x, RATE),
        "compiled": lambda x: F.dropout(x, RATE),
    }
    x, grad = normal(count, width), normal(count, width)
    times, forward = {}, {}
    for n, f in compiled(versions, (count, width) == SIZES[0]).items():
        with torch.no_grad():
            forward[n] = seconds(f, x)
        times[n] = seconds(both(f, [x], [grad]))
    label, element = f"{count}x{width}", count * width * 2
    yield Row("dropout forward", label, 2 * element / copy, forward, goal="0.90")
    yield Row("dropout forward+backward", label, 4 * element / copy, times, goal="0.90")


def fill_rows(copy: float, count: int, width: int) -> Iterator[Row]:
    key, shape = random.key_of(7, DEVICE), (count, width)
    out = {d: torch.empty(shape, dtype=d, device=DEVICE) for d in (torch.bfloat16, torch.float32)}
    mask = torch.empty(shape, dtype=torch.bool, device=DEVICE)

    def uniform(dtype: torch.dtype) -> Tensor:
        return random.random_uniform(key, shape, (0, 0), shape, 0, 0.0, 1.0, dtype)

    label, numbers = f"{count}x{width}", count * width
    for dtype, y in out.items():
        times = {
            "ours": seconds(lambda dtype=dtype: uniform(dtype)),
            "eager": seconds(lambda y=y: y.uniform_()),
        }
        name = str(dtype).removeprefix("torch.")
        # A copy reads as much as it writes; a fill writes only.
        yield Row(f"uniform {name}", label, numbers * y.element_size() / copy, times, goal="0.80")
    times = {
        "ours": seconds(
            lambda: random.random_mask(key, shape, (0, 0), shape, 0, random.level(0.5))
        ),
        "eager": seconds(lambda: mask.bernoulli_(0.5)),
    }
    yield Row("mask", label, numbers / copy, times)
