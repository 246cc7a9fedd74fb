"""Arguments of the ops of `gemv` in float64, tiny, with odd sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from inputs import real

from shardwise.kernels.gemv import quantize_int4, quantize_int8

SAMPLES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "int8_linear": lambda: (real(2, 3, 5), *quantize_int8(real(5, 7), torch.float64)),
    "int4_linear": lambda: (real(3, 48), *quantize_int4(real(48, 5), 24, torch.float64), 24),
}
