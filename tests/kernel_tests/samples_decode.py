"""Arguments of the ops of `decode` in float64, tiny, with odd sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from inputs import real

SAMPLES: dict[str, Callable[[], tuple[Any, ...]]] = {
    # two sequences of 5 and 4 tokens, one of which has a page that is skipped
    "paged_attention": lambda: (
        real(2, 4, 3),
        real(5, 2, 2, 3, seed=1),
        real(5, 2, 2, 3, seed=2),
        torch.tensor([[4, 1, 0], [2, -1, 3]], dtype=torch.int32),
        torch.tensor([5, 6], dtype=torch.int32),
        0.7,
    ),
}
