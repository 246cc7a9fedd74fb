"""Awkward meshes, shapes and layouts that every law must survive."""

from __future__ import annotations

from collections.abc import Mapping

import torch

import shardwise as sw

MESHES: tuple[Mapping[str, int], ...] = (
    {"a": 1},
    {"a": 2},
    {"a": 3},
    {"a": 2, "b": 3},
    {"b": 3, "a": 2},  # axes out of alphabetical order
    {"a": 2, "b": 1, "c": 2},  # an inert axis between two real ones
    {"a": 2, "b": 2, "c": 2},
)
SHAPES: tuple[tuple[int, ...], ...] = ((), (12,), (12, 1), (1, 12), (12, 12), (0, 12), (12, 2, 12))


def mesh(**axes: int) -> sw.Mesh:
    """A simulated mesh on the CPU, whatever the machine."""
    return sw.make_mesh(axes, transport="simulated", device="cpu")


def rng(seed: int = 0) -> torch.Generator:
    """A generator of one's own."""
    return torch.Generator().manual_seed(seed)


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal float64 numbers."""
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)
