"""Arguments of the ops of `random`: blocks of odd sizes that begin anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from inputs import real

from shardwise.kernels.random import key_of

SAMPLES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "random_words": lambda: (key_of(7), [4, 6, 9], [1, 3, 2], [2, 3, 5], 1),
    "random_uniform": lambda: (
        key_of(7),
        [4, 6, 9],
        [1, 3, 2],
        [2, 3, 5],
        0,
        -1.0,
        2.0,
        torch.float32,
    ),
    "random_mask": lambda: (key_of(7), [4, 6, 9], [1, 3, 2], [2, 3, 5], 0, 2**23),
    "random_key": lambda: (key_of(7), 3, 0, 0, 2**32 - 1),
    "dropout": lambda: (real(3, 5), key_of(7), 0, [6, 9], [3, 2], 2**23, 2.0),
}
