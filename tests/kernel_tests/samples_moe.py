"""Arguments of the ops of `moe` in float64, tiny; some copies have no expert here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from inputs import real
from torch import Tensor

from shardwise.kernels import moe

EXPERT = torch.tensor([[2, 0], [7, 2], [0, -1], [2, 0]])


def position() -> Tensor:
    return moe._order(EXPERT, 3)[1]


SAMPLES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "moe_order": lambda: (EXPERT.clone(), 3),
    "moe_permute": lambda: (real(4, 3), position(), real(4, 2)),
    "moe_unpermute": lambda: (real(8, 3), position(), real(4, 2)),
    "moe_dots": lambda: (real(4, 3), real(8, 3), position()),
    "moe_unpermute_backward": lambda: (real(4, 3), real(8, 3), position(), real(4, 2)),
}
