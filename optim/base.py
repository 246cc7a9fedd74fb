"""Gradient transformations: pairs of pure functions, and the step that adds them up.

    init(params) -> state
    update(grads, state, params) -> (updates, state)
    step(grads, state, params) -> (params, state)      update, then add

Gradients arrive with the parameters' layouts (replicated or cut; a sum that is owed is refused
where it is read). State is a tree named by the transforms; its paths are checkpoint keys. Results
have the parameters' layouts and dtypes, so that a training step is layout-stable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..layouts import tree
from ..layouts.place import full
from ..layouts.reshard import reshard_one
from ..layouts.sharded import ShardedTensor
from ..meshlib.errors import LayoutError, nearest

Schedule = float | Callable[[Any], Any]


@dataclass(frozen=True)
class Transform:
    """A gradient transformation.

    Attributes:
        name: its key in a chain's state.
        init: params -> state.
        update: (grads, state, params) -> (updates, state).
        needs: what of a tensor one element's update depends on: itself, sums, or the whole matrix.
        grads: the gradient layouts it wants; None takes the duals.
        fused: (grads, state, params) -> (params, state) in one pass, or None.
    """

    name: str
    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any], tuple[Any, Any]]
    needs: Literal["elementwise", "reduction", "matrix"] = "elementwise"
    grads: Any = None
    fused: Callable[..., Any] | None = None

    def step(self, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        """New parameters and state; nothing is written in place."""
        with torch.no_grad():
            if self.fused is not None:
                return self.fused(grads, state, params)
            updates, state = self.update(grads, state, params)
            return apply_updates(params, updates), state


def apply_updates(params: Any, updates: Any) -> Any:
    """params + updates, in the parameters' layouts and dtypes."""

    def one(p: ShardedTensor, u: ShardedTensor | None) -> ShardedTensor:
        if u is None:
            return p
        return reshard_one((p + u).to(p.dtype), p.layout)

    return tree.map(one, params, updates)


def chain(*transforms: Transform) -> Transform:
    """Transforms one after another; the state is a dict by their names.

    >>> from shardwise import optim
    >>> optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-3)).name
    'clip_by_global_norm, adamw'
    """
    names = [t.name for t in transforms]
    if len(set(names)) != len(names):
        raise ValueError(f"chain: two transforms have one name: {names}")

    def init(params: Any) -> dict[str, Any]:
        return {t.name: t.init(params) for t in transforms}

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        after = {}
        for t in transforms:
            grads, after[t.name] = t.update(grads, state[t.name], params)
        return grads, after

    order = ("elementwise", "reduction", "matrix")
    needs = max((t.needs for t in transforms), key=order.index, default="elementwise")
    return Transform(", ".join(names), init, update, needs)  # pyright: ignore


def counter(params: Any) -> ShardedTensor:
    """A step count of zero on the parameters' mesh."""
    first = next(p for p in tree.leaves(params) if isinstance(p, ShardedTensor))
    return full((), 0, first.mesh, "", dtype=torch.int64)


def scheduled(schedule: Schedule, step: ShardedTensor) -> Any:
    """The schedule's value at a step."""
    return schedule(step) if callable(schedule) else schedule


def global_norm(grads: Any) -> ShardedTensor:
    """The 2-norm of all leaves together: one scalar all_reduce.

    Raises:
        LayoutError: kind "unreduced": a norm of parts of a sum means nothing.
    """
    total: Any = None
    for path, g in tree.items(grads):
        if not isinstance(g, ShardedTensor):
            continue
        if g.layout.unreduced:
            raise LayoutError(
                f"global_norm: {path} is {g}, "
                f"still a sum over {sorted(g.layout.unreduced)}; "
                "a norm of parts means nothing\n"
                f'reduce it first: sw.reshard({path}, "{_settled(g)}")',
                kind="unreduced",
                op="global_norm",
            )
        g = g.to(torch.float32) if g.element_size() < 4 else g
        part = (g * g).sum()
        total = part if total is None else total + part
    if total is None:
        raise ValueError("global_norm: no gradients")
    return torch.sqrt(total)  # pyright: ignore


def _settled(g: ShardedTensor) -> str:
    return " ".join("/".join(("_", *axes)) for axes in g.layout.dims)


def get(state: Any, name: str) -> Any:
    """The one leaf of a state whose last key is `name`: "norm", "step", ...

    Raises:
        KeyError: none, or several.
    """
    found = [(path, leaf) for path, leaf in tree.items(state) if path.split(".")[-1] == name]
    if len(found) != 1:
        known = {path.split(".")[-1] for path, _ in tree.items(state)}
        raise KeyError(
            f"{name!r} stands {len(found)} times in the state"
            + (f": {[p for p, _ in found]}" if found else nearest(name, sorted(known)))
        )
    return found[0][1]
