"""Steps that are not taken: one select over parameters and state where a gradient is not finite.

The flag is one number that all devices agree on, so they take the same decision. A skipped step
leaves every leaf as it was, bit by bit, schedules and counters included.
"""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor

from ..layouts import tree
from ..layouts.sharded import ShardedTensor, make_type
from .base import Transform, has_any, scalar
from .flat import Active, elementwise, local
from .many import norms
from .numbers import check
from .sums import counted


def all_finite(grads: Any) -> ShardedTensor:
    """Whether no gradient holds inf or NaN: a bool scalar, the same on all devices.

    Cost: one scalar all_reduce over the axes that cut any gradient; sub-meshes add one more.

    >>> import shardwise as sw
    >>> g = {"w": sw.full((4,), float("inf"), sw.make_mesh({"data": 2}), "n/data")}
    >>> bool(all_finite(g))
    False
    """

    def bad(shards: list[Tensor]) -> Tensor:
        largest = norms(shards, torch.inf)
        return (~torch.isfinite(torch.stack([n.to(torch.float64) for n in largest]))).sum().float()

    return counted(grads, bad, torch.float32) == 0


def culprits(grads: Any) -> list[str]:
    """Paths of the gradients that hold inf or NaN on this process's devices."""
    return [
        path
        for path, g in tree.items(grads)
        if isinstance(g, ShardedTensor) and not all(s.isfinite().all() for s in g._shards)
    ]


def guarded(t: Transform, grads: Any, state: Any, params: Any) -> tuple[Any, Any, Any, Any]:
    """(flag, new params, new state, finite gradients): a step of `t`, or none.

    Where the flag is false the step runs on zeros and its results are dropped.
    """
    active = Active(params, grads)
    grads = active.tree(active.grads)
    flag = all_finite(grads)
    clean = tree.map(lambda g: _pick(flag, g, None), grads)
    new, after = t.step(clean, state, params)
    return flag, select(flag, new, params), select(flag, after, state), grads


def select(flag: ShardedTensor, new: Any, old: Any) -> Any:
    """Leaves of `new` where the flag is true, else of `old`; keys and numbers stay."""
    news, spec = optree.tree_flatten(new, none_is_leaf=True)
    olds: list[Any] = spec.flatten_up_to(old)
    return spec.unflatten(
        [
            _pick(flag, a, b) if isinstance(a, ShardedTensor) else a
            for a, b in zip(news, olds, strict=True)
        ]
    )


def _pick(flag: ShardedTensor, new: ShardedTensor, old: ShardedTensor | None) -> ShardedTensor:
    """torch.where on local tensors; zeros in place of None."""
    on = local(flag, new._shards[0].device)
    others: Any = (
        old._shards
        if old is not None
        else [torch.zeros((), dtype=new.dtype, device=on.device)] * len(new._shards)
    )
    shards = tuple(torch.where(on, a, b) for a, b in zip(new._shards, others, strict=True))
    kind = new._type
    return ShardedTensor(shards, make_type(kind.mesh, kind.layout, kind.shape, kind.dtype, False))


def moved(params: Any, new: Any, grads: Any) -> Any:
    """new - params, as updates; None without a gradient."""
    new = tree.map(lambda _, n: n, grads, new)
    return elementwise(lambda s, _, n, p: (n - p,), [new, params], params, olds=[None])[0]


def number(x: ShardedTensor) -> Any:
    """A scalar as the host reads it, or None on an abstract mesh."""
    shard = x._shards[0]
    return None if shard.is_meta else shard.item()


def skip_nonfinite(t: Transform, *, limit: int | None = 10) -> Transform:
    """A transform that does not step where a gradient holds inf or NaN.

    Args:
        t: the transform.
        limit: after so many skipped steps in a row the next one raises instead of trying on; None
            never raises and never waits for the device.

    State: skipped, how many steps were in all; streak, how many in a row; inner.

    Cost: one scalar all_reduce over the axes that cut any gradient. Gradients of which sums are
    owed are reduced first. Old and new state are held together: nothing is donated.

    Raises:
        FloatingPointError: at the step after `limit` skipped ones in a row.

    >>> import shardwise as sw
    >>> mesh = sw.make_mesh({"data": 2})
    >>> p = {"w": sw.full((2,), 1.0, mesh)}
    >>> opt = skip_nonfinite(sw.optim.sgd(0.5))
    >>> new, state = opt.step({"w": sw.full((2,), float("nan"), mesh)}, opt.init(p), p)
    >>> new["w"].full_tensor(), state["skipped"].item()
    (tensor([1., 1.]), 1)
    """
    check("skip_nonfinite", limit=limit)

    def init(params: Any) -> dict[str, Any]:
        zero = lambda: scalar(params, 0, torch.int64)  # noqa: E731
        return {"skipped": zero(), "streak": zero(), "inner": t.init(params)}

    def fused(grads: Any, state: Any, params: Any, *, donate: bool = False) -> tuple[Any, Any]:
        if not has_any(grads):
            return params, state
        if limit is not None and (number(state["streak"]) or 0) >= limit:
            raise FloatingPointError(
                f"skip_nonfinite: {limit} steps in a row had gradients that are not finite; "
                f"on this process's devices now: {culprits(grads) or 'none'}"
            )
        flag, new, inner, _ = guarded(t, grads, state["inner"], params)
        bad = (~flag).to(torch.int64)
        return new, {
            "skipped": state["skipped"] + bad,
            "streak": (state["streak"] + bad) * bad,
            "inner": inner,
        }

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        new, after = fused(grads, state, params)
        return moved(params, new, grads), after

    # Whether a leaf is updated hangs on all leaves: a sum over everything, at least.
    needs = "reduction" if t.needs == "elementwise" else t.needs
    return Transform(t.name, init, update, needs, t.grads, fused)
