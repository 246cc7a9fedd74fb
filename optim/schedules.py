"""Learning rates as functions of the step, a tensor that counts from 0. They work on any tensor.

>>> import torch
>>> s = warmup_cosine(1.0, warmup=2, steps=4)
>>> [round(float(s(torch.tensor(i))), 3) for i in range(5)]
[0.5, 1.0, 1.0, 0.5, 0.0]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

Function = Callable[[Any], Any]


def constant(value: float) -> Function:
    """The same value at every step."""
    return lambda step: step.to(torch.float32) * 0 + value


def linear(start: float, end: float, steps: int) -> Function:
    """From start to end over `steps`, then end."""
    return lambda step: start + (end - start) * _progress(step, 0, steps)


def cosine(peak: float, steps: int, *, end: float = 0.0) -> Function:
    """Half a cosine from peak to end over `steps`, then end."""
    return warmup_cosine(peak, warmup=0, steps=steps, end=end)


def warmup_cosine(peak: float, *, warmup: int, steps: int, end: float = 0.0) -> Function:
    """Linear rise to peak over `warmup` steps, half a cosine to end at `steps`, then end."""

    def fall(step: Any) -> Any:
        return end + (peak - end) * 0.5 * (1 + torch.cos(math.pi * _progress(step, warmup, steps)))

    return warm(fall, warmup)


def warm(schedule: Function, steps: int) -> Function:
    """The schedule, times a linear rise over the first `steps`."""
    if not steps:
        return schedule
    return lambda step: torch.clamp((step.to(torch.float32) + 1) / steps, max=1.0) * schedule(step)


def _progress(step: Any, start: int, stop: int) -> Any:
    """0 at start, 1 from stop on."""
    return torch.clamp((step.to(torch.float32) - start) / max(1, stop - start), min=0.0, max=1.0)
