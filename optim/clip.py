"""Clipping of gradients; the norm is kept in the state, for the log."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..layouts import tree
from ..layouts.sharded import ShardedTensor
from .base import Schedule, Transform, has_any, scalar, stepless
from .flat import elementwise
from .many import Many
from .numbers import check
from .sums import global_norm, wide


def clip_by_global_norm(limit: Schedule) -> Transform:
    """Scale all gradients so that their common 2-norm is at most `limit`.

    State: norm, before clipping. Gradients may be replicated, cut, and on several sub-meshes; each
    element counts once.

    Cost: one scalar all_reduce over the axes that cut any gradient.

    Raises:
        LayoutError: kind "unreduced", for gradients of which a sum is owed.

    Source: Pascanu et al. 2013 (arXiv 1211.5063), algorithm 1.

    >>> import shardwise as sw
    >>> g = {"w": sw.full((4,), 1.0, sw.make_mesh({"data": 2}), "n/data")}
    >>> clip = clip_by_global_norm(1.0)
    >>> clipped, state = clip.update(g, clip.init(g), g)
    >>> state["norm"].item(), clipped["w"].full_tensor()
    (2.0, tensor([0.5000, 0.5000, 0.5000, 0.5000]))
    """
    check("clip_by_global_norm", limit=limit)

    def init(params: Any) -> dict[str, ShardedTensor]:
        dtypes = [wide(p.dtype) for p in tree.leaves(params) if isinstance(p, ShardedTensor)]
        return {"norm": scalar(params, 0.0, max(dtypes, key=lambda d: d.itemsize, default=None))}

    def shrink(s: Any, _: Any, g: Many) -> tuple[Many]:
        factor = s.limit / (s.norm + 1e-6)
        return (g * (factor.clamp(max=1.0) if isinstance(factor, Tensor) else min(factor, 1.0)),)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        if not has_any(grads):
            return grads, state
        norm = global_norm(grads).to(state["norm"].dtype)
        scalars = {"norm": norm, "limit": limit}
        return elementwise(shrink, [grads], grads, olds=[None], scalars=scalars)[0], {"norm": norm}

    return Transform("clip_by_global_norm", init, update, "reduction")


def clip_by_value(limit: float) -> Transform:
    """Clamp each element of the gradients to [-limit, limit].

    >>> import shardwise as sw
    >>> g = {"w": sw.full((2,), 3.0, sw.make_mesh({"data": 2}))}
    >>> clip_by_value(1.0).update(g, {}, g)[0]["w"].full_tensor()
    tensor([1., 1.])
    """
    check("clip_by_value", limit=limit)
    return stepless("clip_by_value", lambda s, _, g: (g.clamp(-s.limit, s.limit),), limit=limit)
