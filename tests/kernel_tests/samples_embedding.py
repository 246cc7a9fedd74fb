"""Arguments of the ops of `embedding` in float64, tiny; ids repeat, and some lie elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from inputs import real

IDS = torch.tensor([[7, 3, 9], [3, 2, 3]])  # in the block [3, 8): 7, 3, 3, 3

SAMPLES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "embedding_lookup": lambda: (real(5, 3), IDS.clone(), 3, 5),
    "embedding_backward": lambda: (real(2, 3, 3), IDS.clone(), 3, 5),
}
