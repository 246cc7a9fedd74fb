"""An optimizer from its direction: decay beside it, then the learning rate."""

from __future__ import annotations

from typing import Any

from ..layouts.tree import Mask
from .base import Schedule, Transform, counter
from .flat import elementwise
from .many import Many
from .numbers import check
from .scale import decayed


def recipe(
    name: str,
    direction: Transform,
    lr: Schedule,
    weight_decay: float = 0.0,
    mask: Mask | None = None,
) -> Transform:
    """-lr * (direction + weight_decay * parameter); the state is the direction's, and step.

    Args:
        name: of the transform.
        direction: a transform whose state is a dict.
        lr: learning rate, or a schedule of the step.
        weight_decay: the factor of the decay.
        mask: which parameters decay; None is all.
    """
    check(name, lr=lr, weight_decay=weight_decay)
    has_decay = not (isinstance(weight_decay, int | float) and weight_decay == 0)

    def init(params: Any) -> dict[str, Any]:
        return {"step": counter(params), **direction.init(params)}

    def finish(s: Any, decays: bool, u: Many, p: Many) -> tuple[Many]:
        if decays and has_decay:
            u = u + p.to(u.dtype) * s.decay
        return (u * -s.lr,)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, after = direction.update(grads, state, params)
        updates = elementwise(
            finish,
            [updates, params],
            params,
            olds=[None],
            scalars={"lr": lr, "decay": weight_decay, "step": state["step"]},
            marks=decayed(mask, params),
        )[0]
        return updates, {**after, "step": state["step"] + 1}

    return Transform(name, init, update, direction.needs, direction.grads)
