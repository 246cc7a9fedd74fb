"""Arguments of the ops of `cross_entropy` in float64, tiny, with odd sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from inputs import positive, real

LABELS = torch.tensor([3, 0, 9, -100])  # in the block, first, beyond it, ignored

SAMPLES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "cross_entropy_parts": lambda: (real(4, 7), LABELS, 0, 6),
    "cross_entropy_parts_backward": lambda: (
        real(4),
        real(4, seed=1),
        real(4, 7),
        LABELS,
        positive(4),
        2,
        8,
    ),
    "linear_cross_entropy_parts": lambda: (real(4, 3), real(7, 3), LABELS, 1, 7, 3),
    "linear_cross_entropy_parts_backward": lambda: (
        real(4),
        real(4, seed=1),
        real(4, 3),
        real(7, 3),
        LABELS,
        positive(4),
        1,
        7,
        3,
    ),
    "linear_cross_entropy": lambda: (
        real(4, 3),
        real(7, 3),
        torch.tensor([3, 0, 5, 2]),
        positive(4),
        6,
        3,
    ),
}
