"""Arguments of the ops of `adamw`, tiny, with odd sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from inputs import positive, real

SHAPES = ((3, 5), (7,), ())
FACTORS = (0.25, -0.02, 0.995)

SAMPLES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "adamw": lambda: (
        [real(*s) for s in SHAPES],
        [real(*s, seed=1) for s in SHAPES],
        [real(*s, seed=2) for s in SHAPES],
        [positive(*s) for s in SHAPES],
        torch.tensor(FACTORS, dtype=torch.float64),
        0.9,
        0.99,
        1e-8,
        None,
        [],
    ),
    "adamw_keys": lambda: (
        torch.tensor([7, 2**32 - 1]),
        torch.tensor(3),
        torch.tensor([[1, 2, 3], [2**32 - 1, 5, 2**31]]),
    ),
}
