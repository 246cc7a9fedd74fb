"""Comparison helpers: values, pairings and what moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gallery import rng
from torch import Tensor

import shardwise as sw
from shardwise.ops.audit import split


def placed(
    value: Tensor, mesh: sw.Mesh, layout: str | sw.Layout, seed: int = 0
) -> sw.ShardedTensor:
    """The value in a layout; what is unreduced lies in uneven random parts."""
    return split(value, mesh, sw.Layout(layout, value.ndim), rng(seed))


def close(actual: sw.ShardedTensor | Tensor, expected: Tensor, what: str = "") -> None:
    """Equal to 1e-12 of the largest number: the promise of the library."""
    whole = actual.full_tensor() if isinstance(actual, sw.ShardedTensor) else actual
    assert whole.shape == expected.shape, (what, whole.shape, expected.shape)
    if not expected.numel():
        return
    scale = max(float(expected.detach().abs().max()), 1.0)
    off = float((whole.detach() - expected.detach()).abs().max())
    assert off <= 1e-12 * scale, f"{what}: off by {off} of {scale}"


def paired(x: sw.ShardedTensor, y: sw.ShardedTensor) -> float:
    """<x, y> for y in the dual layout: the sum over devices, a replicated value counted once."""
    assert y.layout is x.layout.dual
    copies = x.mesh.group_size(tuple(a for a in x.mesh.axes if x.layout.state(a) == "replicated"))
    return sum(float((a * b).sum()) for a, b in zip(x.shards, y.shards, strict=True)) / copies


def moves(plan: sw.Plan, phase: str) -> list[tuple[str, str, float]]:
    """(kind, axes, elements) of each collective of a phase, in order."""
    return [(c.kind, ",".join(c.axes), c.elements) for c in plan.collectives if c.phase == phase]


def ran(f: Callable[[], Any]) -> tuple[Any, sw.Plan]:
    """The result of `f` and the record of its run."""
    with sw.record() as plan:
        result = f()
    return result, plan


def pulled(
    f: Callable[..., sw.ShardedTensor],
    xs: Sequence[sw.ShardedTensor],
    cotangent: Tensor,
    seed: int = 1,
) -> tuple[sw.ShardedTensor, tuple[sw.ShardedTensor, ...], sw.Plan]:
    """Value, gradients and the record of both ways, for a cotangent of this global value."""
    with sw.record() as plan:
        y, pull = sw.vjp(f, *xs)
        grads = pull(split(cotangent, y.mesh, y.layout.dual, rng(seed)))
    return y, grads, plan
