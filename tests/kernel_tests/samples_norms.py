"""Arguments of the ops of `norms` in float64, tiny, with odd sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from inputs import positive, real

SAMPLES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "rms_norm": lambda: (real(2, 3, 5), real(5), 1e-3),
    "rms_norm_backward": lambda: (
        real(3, 5),
        real(3, 5, seed=1),
        real(5),
        positive(3),
        real(3, 5, seed=2),
    ),
    "add_rms_norm": lambda: (real(3, 5), real(3, 5, seed=1), real(5), 1e-3),
    "layer_norm": lambda: (real(2, 3, 5), real(5), real(5, seed=1), 1e-3),
    "layer_norm_backward": lambda: (
        real(3, 5),
        real(3, 5, seed=1),
        real(5),
        real(3),
        positive(3),
        real(3, 5, seed=2),
    ),
    "add_layer_norm": lambda: (real(3, 5), real(3, 5, seed=1), real(5), real(5, seed=1), 1e-3),
}
