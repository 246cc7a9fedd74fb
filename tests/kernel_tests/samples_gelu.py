"""Arguments of the ops of `gelu` in float64, tiny, with odd sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from inputs import real

SAMPLES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "gelu_backward_sum": lambda: (real(2, 3, 5), real(2, 3, 5, seed=1), True),
}
