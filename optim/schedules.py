"""Learning rates as functions of the step, a tensor (or a number) that counts from 0.

Values are float64, whatever the parameters are: a rate of 0.1 is not 0.1 in float32.

>>> import torch
>>> s = warmup_cosine(1.0, warmup=2, steps=4)
>>> [round(float(s(torch.tensor(i))), 3) for i in range(5)]
[0.5, 1.0, 1.0, 0.5, 0.0]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Function = Callable[[Any], Any]


def _count(step: Any) -> Any:
    """The step as a float64 tensor."""
    if hasattr(step, "to"):
        return step.to(torch.float64)
    return torch.tensor(step, dtype=torch.float64)


def constant(value: float) -> Function:
    """The same value at every step."""
    return lambda step: _count(step) * 0 + value


def linear(start: float, end: float, steps: int) -> Function:
    """From start to end over `steps`, then end."""
    return lambda step: start + (end - start) * _progress(step, 0, steps)


def cosine(peak: float, steps: int, *, end: float = 0.0) -> Function:
    """Half a cosine from peak to end over `steps`, then end."""
    return warmup_cosine(peak, warmup=0, steps=steps, end=end)


def warmup_cosine(peak: float, *, warmup: int, steps: int, end: float = 0.0) -> Function:
    """Linear rise to peak over `warmup` steps, half a cosine to end at `steps`, then end."""
    if warmup > steps:
        raise ValueError(f"warmup_cosine: warmup {warmup} is more than {steps} steps")

    def fall(step: Any) -> Any:
        return end + (peak - end) * 0.5 * (1 + torch.cos(math.pi * _progress(step, warmup, steps)))

    return warm(fall, warmup)


def warm(schedule: Function, steps: int) -> Function:
    """The schedule, times a linear rise over the first `steps`."""
    if not steps:
        return schedule
    return lambda step: torch.clamp((_count(step) + 1) / steps, max=1.0) * schedule(step)


def _progress(step: Any, start: int, stop: int) -> Any:
    """0 at start, 1 from stop on."""
    return torch.clamp((_count(step) - start) / max(1, stop - start), min=0.0, max=1.0)


def wsd(peak: float, *, warmup: int, steps: int, decay: int, end: float = 0.0) -> Function:
    """Warm-up, stable, decay: a linear rise, the peak, and a linear fall over the last steps.

    Source: Hu et al. 2024 (arXiv 2404.06395), section 4.

    Args:
        peak: the stable value.
        warmup: steps of the rise.
        steps: of all three together.
        decay: steps of the fall.
        end: the value at `steps` and after.

    >>> s = wsd(1.0, warmup=2, steps=8, decay=2)
    >>> [float(s(torch.tensor(i))) for i in (0, 1, 5, 6, 7, 8)]
    [0.5, 1.0, 1.0, 1.0, 0.5, 0.0]
    """
    if warmup + decay > steps:
        raise ValueError(f"wsd: warmup {warmup} and decay {decay} are more than {steps} steps")

    def fall(step: Any) -> Any:
        return peak + (end - peak) * _progress(step, steps - decay, steps)

    return warm(fall, warmup)


def polynomial(start: float, end: float, steps: int, *, power: float = 1.0) -> Function:
    """From start to end over `steps` as (1 - progress) ** power, then end.

    >>> float(polynomial(1.0, 0.0, 4, power=2.0)(torch.tensor(2)))
    0.25
    """
    return lambda step: end + (start - end) * (1 - _progress(step, 0, steps)) ** power


def piecewise(start: float, factors: Mapping[int, float]) -> Function:
    """A value that is multiplied by a factor at each of some steps.

    >>> s = piecewise(1.0, {2: 0.5, 4: 0.1})
    >>> [round(float(s(torch.tensor(i))), 3) for i in (0, 1, 2, 3, 4)]
    [1.0, 1.0, 0.5, 0.5, 0.05]
    """

    def value(step: Any) -> Any:
        count = _count(step)
        now = count * 0 + start
        for at, factor in factors.items():
            now = torch.where(count >= at, now * factor, now)
        return now

    return value


def join(schedules: Sequence[Function], boundaries: Sequence[int]) -> Function:
    """Schedules one after another, each counting from 0 where it begins.

    Args:
        schedules: n of them.
        boundaries: the n - 1 steps at which the next one takes over, rising.

    >>> s = join([constant(1.0), linear(0.5, 0.0, 2)], [3])
    >>> [float(s(torch.tensor(i))) for i in (0, 2, 3, 4, 5)]
    [1.0, 1.0, 0.5, 0.25, 0.0]
    """
    if len(boundaries) != len(schedules) - 1 or list(boundaries) != sorted(boundaries):
        raise ValueError(
            f"join: {len(schedules)} schedules need {len(schedules) - 1} rising boundaries, "
            f"got {list(boundaries)}"
        )

    def value(step: Any) -> Any:
        step = step if hasattr(step, "to") else torch.tensor(step)
        now = schedules[0](step)
        for schedule, at in zip(schedules[1:], boundaries, strict=True):
            later = torch.clamp(step - at, min=0)
            now = torch.where(step >= at, schedule(later), now)
        return now

    return value
