"""What every Triton launcher shares: how a kernel is launched, and where its results are put.

Triton itself is imported by the `*_triton` modules alone, at their first use on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

INTERPRETED_PROCESSORS = 3  # stands for a GPU's number when Triton's interpreter runs on a CPU


@dataclass(frozen=True)
class Launch:
    """How one kernel is launched for one size of row: the numbers that tuning changes.

    Attributes:
        block: elements of a row that one tile holds, a power of two.
        warps: warps (32 threads each) of one program.
        rows: rows of one tile.
        stages: tiles in flight in a loop; 1 loads a tile when it is needed.
        programs: programs per multiprocessor, each looping over tiles; 0: one program per tile.
    """

    block: int
    warps: int
    rows: int = 1
    stages: int = 1
    programs: int = 0

    def grid(self, rows: int, device: torch.device) -> int:
        """Number of programs for so many rows."""
        tiles = -(-rows // self.rows)
        return min(tiles, self.programs * processors(device)) if self.programs else tiles


@functools.cache
def processors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous result beside `like`; tests replace this to put canaries around results."""
    return torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def wide(dtype: torch.dtype) -> torch.dtype:
    """Where sums are formed: float64 for float64, float32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
