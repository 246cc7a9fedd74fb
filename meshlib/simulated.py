"""N devices in one process: shards in a list, collectives as exact moves between list entries.

Sums run in order of position, so results are bitwise repeatable. Replicated results alias one
tensor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from .traced import CAPTURES, watched
from .transport import Axes, ReduceOp, Shards

_REDUCE = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}


class SimulatedTransport:
    """All devices of a mesh with these axes, in row-major order."""

    name: Literal["simulated"] = "simulated"

    def __init__(self, axes: Mapping[str, int]) -> None:
        self.axes = dict(axes)
        self._groups: dict[Axes, list[list[int]]] = {}
        names = ", ".join(f"{name}={size}" for name, size in self.axes.items())
        self.key = f"{names}, simulated"

    def _is_group(self, axes: Axes) -> bool:
        return any(self.axes[axis] > 1 for axis in axes)

    def groups(self, axes: Axes) -> list[list[int]]:
        """Device numbers of every group over `axes`, each in order of position."""
        found = self._groups.get(axes)
        if found is None:
            names = list(self.axes)
            stride = {
                name: math.prod(self.axes[n] for n in names[i + 1 :])
                for i, name in enumerate(names)
            }

            def offsets(over: Sequence[str]) -> list[int]:
                steps = [range(0, self.axes[n] * stride[n], stride[n]) for n in over]
                return [sum(at) for at in itertools.product(*steps)]

            inner = offsets(axes)
            found = [[o + i for i in inner] for o in offsets([n for n in names if n not in axes])]
            self._groups[axes] = found
        return found

    def all_reduce(self, shards: Shards, axes: Axes, op: ReduceOp = "sum") -> list[Tensor]:
        if CAPTURES and self._is_group(axes):
            return watched(self, self.key, "all_reduce", shards, axes, op)
        out: list[Tensor] = list(shards)
        combine = _REDUCE[op]
        for group in self.groups(axes):
            total = (
                combine(shards[group[0]], shards[group[1]])
                if len(group) > 1
                else shards[group[0]].clone()
            )
            for i in group[2:]:
                total = combine(total, shards[i])
            out[group[0]] = total
            for i in group[1:]:
                out[i] = total.view_as(total)
        return out

    def all_gather(self, shards: Shards, axes: Axes, dim: int) -> list[Tensor]:
        if CAPTURES and self._is_group(axes):
            return watched(self, self.key, "all_gather", shards, axes, dim)
        out: list[Tensor] = list(shards)
        for group in self.groups(axes):
            whole = torch.cat([shards[i] for i in group], dim)
            out[group[0]] = whole
            for i in group[1:]:
                out[i] = whole.view_as(whole)
        return out

    def reduce_scatter(self, shards: Shards, axes: Axes, dim: int) -> list[Tensor]:
        if CAPTURES and self._is_group(axes):
            return watched(self, self.key, "reduce_scatter", shards, axes, dim)
        out: list[Tensor] = list(shards)
        for group in self.groups(axes):
            blocks = [shards[i].chunk(len(group), dim) for i in group]
            for j, i in enumerate(group):
                total = blocks[0][j] + blocks[1][j] if len(group) > 1 else blocks[0][j].clone()
                for row in blocks[2:]:
                    total = total + row[j]
                out[i] = total
        return out

    def all_to_all(
        self, shards: Shards, axes: Axes, split_dim: int, concat_dim: int
    ) -> list[Tensor]:
        if CAPTURES and self._is_group(axes):
            return watched(self, self.key, "all_to_all", shards, axes, split_dim, concat_dim)
        out: list[Tensor] = list(shards)
        for group in self.groups(axes):
            blocks = [shards[i].chunk(len(group), split_dim) for i in group]
            for j, i in enumerate(group):
                out[i] = torch.cat([row[j] for row in blocks], concat_dim)
        return out

    def permute(self, shards: Shards, axes: Axes, pairs: Sequence[tuple[int, int]]) -> list[Tensor]:
        if CAPTURES and self._is_group(axes):
            return watched(self, self.key, "permute", shards, axes, pairs)
        source = {t: s for s, t in pairs}
        out: list[Tensor] = list(shards)
        for group in self.groups(axes):
            for t, i in enumerate(group):
                s = source.get(t)
                out[i] = torch.zeros_like(shards[i]) if s is None else shards[group[s]].clone()
        return out

    def broadcast(self, shards: Shards, axes: Axes, root: int = 0) -> list[Tensor]:
        if CAPTURES and self._is_group(axes):
            return watched(self, self.key, "broadcast", shards, axes, root)
        out: list[Tensor] = list(shards)
        for group in self.groups(axes):
            whole = shards[group[root]].clone()
            for i in group:
                out[i] = whole.view_as(whole)
        return out

    def reduce(self, shards: Shards, axes: Axes, root: int = 0) -> list[Tensor]:
        if CAPTURES and self._is_group(axes):
            return watched(self, self.key, "reduce", shards, axes, root)
        out: list[Tensor] = list(shards)
        for group in self.groups(axes):
            total = shards[group[0]].clone()
            for i in group[1:]:
                total = total + shards[i]
            for i in group:
                out[i] = total if i == group[root] else torch.zeros_like(shards[i])
        return out
