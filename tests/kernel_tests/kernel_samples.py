"""For every defined op: arguments in float64, tiny, with odd sizes. A new op adds its row here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parents[2] / "kernels"
for file in sorted(FOLDER.glob("*.py")):
    if not file.stem.endswith("_triton") and file.stem != "__init__":
        importlib.import_module(f"shardwise.kernels.{file.stem}")  # defines its ops

from shardwise.kernels.registry import KERNELS as DEFINED  # noqa: E402

KERNELS = {name: k for name, k in DEFINED.items() if not name.startswith(("doc_", "test_"))}


def real(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + 100 * seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def positive(*shape: int) -> Tensor:
    return real(*shape, seed=9).abs() + 0.5


LABELS = torch.tensor([3, 0, 9, -100])  # in the block, first, beyond it, ignored

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
    "cross_entropy_parts": lambda: (real(4, 7), LABELS, 0),
    "cross_entropy_parts_backward": lambda: (
        real(4),
        real(4, seed=1),
        real(4, 7),
        LABELS,
        positive(4),
        2,
    ),
    "linear_cross_entropy_parts": lambda: (real(4, 3), real(7, 3), LABELS, 1, 3),
    "linear_cross_entropy_parts_backward": lambda: (
        real(4),
        real(4, seed=1),
        real(4, 3),
        real(7, 3),
        LABELS,
        positive(4),
        1,
        3,
    ),
    "linear_cross_entropy": lambda: (
        real(4, 3),
        real(7, 3),
        torch.tensor([3, 0, 6, 2]),
        positive(4),
        3,
    ),
}
