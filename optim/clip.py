"""Clipping of gradients; the norm is kept in the state, for the log."""

from __future__ import annotations

from typing import Any

import torch

from ..layouts import tree
from ..layouts.place import full
from ..layouts.sharded import ShardedTensor
from .base import Transform, global_norm


def clip_by_global_norm(limit: float) -> Transform:
    """Scale all gradients so that their common 2-norm is at most `limit`.

    State "norm" holds it unclipped.

    Cost: one scalar all_reduce over the axes that cut any gradient.

    Source: Pascanu et al. 2013 (arXiv 1211.5063), algorithm 1.
    """

    def init(params: Any) -> dict[str, ShardedTensor]:
        first = next(p for p in tree.leaves(params) if isinstance(p, ShardedTensor))
        dtype = first.dtype if first.element_size() >= 4 else torch.float32
        return {"norm": full((), 0.0, first.mesh, "", dtype=dtype)}

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        norm = global_norm(grads)
        factor = torch.clamp(limit / (norm + 1e-6), max=1.0)  # pyright: ignore
        return tree.map(lambda g: (g * factor).to(g.dtype), grads), {"norm": norm}

    return Transform("clip_by_global_norm", init, update, "reduction")


def clip_by_value(limit: float) -> Transform:
    """Clamp each element of the gradients to [-limit, limit]."""

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return tree.map(lambda g: torch.clamp(g, -limit, limit), grads), state

    return Transform("clip_by_value", lambda params: {}, update)
