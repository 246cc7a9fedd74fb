"""The small pieces that optimizers are chained from: factors and weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..layouts import tree
from ..layouts.tree import Mask, matches
from .base import Schedule, Transform, counter, stepless
from .flat import elementwise
from .many import Many
from .numbers import check


def scale(factor: Schedule) -> Transform:
    """Updates times a number.

    >>> import shardwise as sw
    >>> g = {"w": sw.full((2,), 3.0, sw.make_mesh({"data": 2}))}
    >>> sw.optim.scale(-0.5).update(g, {}, g)[0]["w"].full_tensor()
    tensor([-1.5000, -1.5000])
    """
    return stepless("scale", lambda s, _, g: (g * s.factor,), factor=factor)


def scale_by_schedule(schedule: Callable[[Any], Any]) -> Transform:
    """Updates times a function of the step, a tensor that counts from 0. State: step."""

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        scalars = {"step": state["step"], "factor": schedule}
        times = lambda s, _, g: (g * s.factor,)  # noqa: E731
        out = elementwise(times, [grads], params, olds=[None], scalars=scalars)[0]
        return out, {"step": state["step"] + 1}

    return Transform("scale_by_schedule", lambda params: {"step": counter(params)}, update)


def decayed(mask: Mask | None, params: Any) -> list[bool]:
    """Per leaf, whether a mask takes it; None takes all."""
    return [
        mask is None or (p is not None and matches(mask, path, p)) for path, p in tree.items(params)
    ]


def add_decayed_weights(weight_decay: float, mask: Mask | None = None) -> Transform:
    """Updates plus `weight_decay` times the parameters.

    Before the optimizer's own part it is the L2 penalty, behind it AdamW's decay.

    Args:
        weight_decay: the factor.
        mask: which parameters decay, a glob over paths or a function of (path, leaf); None is all.
    """
    check("add_decayed_weights", weight_decay=weight_decay)

    def add(s: Any, decays: bool, g: Many, p: Many) -> tuple[Many]:
        return ((p * s.rate).add_(g),) if decays else (g,)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        out = elementwise(
            add,
            [grads, params],
            params,
            olds=[None],
            scalars={"rate": weight_decay},
            marks=decayed(mask, params),
        )
        return out[0], state

    return Transform("add_decayed_weights", lambda params: {}, update)
