"""Shapes only: one representative meta shard stands for every device of a mesh of any size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from .transport import Axes, ReduceOp, Shards


class AbstractTransport:
    """Shape arithmetic of the collectives; no data, no devices."""

    name: Literal["abstract"] = "abstract"

    def __init__(self, axes: Mapping[str, int]) -> None:
        self.axes = dict(axes)

    def _resized(self, shards: Shards, *changes: tuple[int, int, int]) -> list[Tensor]:
        out = []
        for shard in shards:
            shape = list(shard.shape)
            for dim, times, over in changes:
                shape[dim] = shape[dim] * times // over
            out.append(shard.new_empty(shape))
        return out

    def _size(self, axes: Axes) -> int:
        return math.prod(self.axes[a] for a in axes)

    def all_reduce(self, shards: Shards, axes: Axes, op: ReduceOp = "sum") -> list[Tensor]:
        return self._resized(shards)

    def all_gather(self, shards: Shards, axes: Axes, dim: int) -> list[Tensor]:
        return self._resized(shards, (dim, self._size(axes), 1))

    def reduce_scatter(self, shards: Shards, axes: Axes, dim: int) -> list[Tensor]:
        return self._resized(shards, (dim, 1, self._size(axes)))

    def all_to_all(
        self, shards: Shards, axes: Axes, split_dim: int, concat_dim: int
    ) -> list[Tensor]:
        n = self._size(axes)
        return self._resized(shards, (concat_dim, n, 1), (split_dim, 1, n))

    def permute(self, shards: Shards, axes: Axes, pairs: Sequence[tuple[int, int]]) -> list[Tensor]:
        return self._resized(shards)

    def broadcast(self, shards: Shards, axes: Axes, root: int = 0) -> list[Tensor]:
        return self._resized(shards)

    def reduce(self, shards: Shards, axes: Axes, root: int = 0) -> list[Tensor]:
        return self._resized(shards)
