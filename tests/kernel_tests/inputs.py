"""Numbers that the samples of all families are made of: float64, the same in every run."""

from __future__ import annotations

import torch
from torch import Tensor


def real(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers."""
    generator = torch.Generator().manual_seed(sum(shape) + 100 * seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def positive(*shape: int) -> Tensor:
    """Numbers of at least one half."""
    return real(*shape, seed=9).abs() + 0.5
