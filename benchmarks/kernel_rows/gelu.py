"""The gradient of gelu with its sum over rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from shardwise.kernels import gelu

from .measure import GPU, Row, Versions, compiled, normal, seconds

SIZES = [(32768, 3072), (16384, 8192)] if GPU else [(64, 96)]


def plain(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    backward: Any = torch.ops.aten.gelu_backward
    result = backward(grad, x, approximate="tanh")
    return result, result.sum(0)


def rows(copy: float) -> Iterator[Row]:
    for count, size in SIZES:
        versions: Versions = {
            "ours": lambda g, x: gelu.gelu_backward_sum(g, x, True),
            "eager": plain,
            "compiled": plain,
        }
        operands = normal(count, size), normal(count, size)
        times = {n: seconds(f, *operands) for n, f in compiled(versions, True).items()}
        floor = 6 * count * size / copy
        yield Row("gelu_backward_sum", f"{count}x{size}", floor, times, goal="0.90")
