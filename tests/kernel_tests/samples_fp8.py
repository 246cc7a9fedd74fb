"""Arguments of the ops of `fp8` in float64, which is not quantised, with sizes that are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from inputs import positive, real

SAMPLES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "fp8_quantize": lambda: (real(3, 5), positive(), False),
    "fp8_linear": lambda: (real(3, 5), real(5, 4), None, None),
    "fp8_linear_backward": lambda: (
        real(3, 4),
        None,
        real(5, 3),
        positive(),
        real(5, 4, seed=1),
        positive(),
    ),
}
