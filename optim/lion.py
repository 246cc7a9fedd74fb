"""Lion: the sign of an interpolation between momentum and gradient.

Source: Chen et al. 2023 (arXiv 2302.06675), algorithm 2.
"""

from __future__ import annotations

from typing import Any

import torch

from ..layouts.tree import Mask
from .base import Schedule, Transform, zeros_like
from .flat import elementwise
from .many import Many
from .numbers import check
from .recipe import recipe


def scale_by_lion(
    *, b1: float = 0.9, b2: float = 0.99, state_dtype: torch.dtype | None = None
) -> Transform:
    """Lion's direction: sign(b1 * mu + (1 - b1) * g); then mu decays with b2.

    State: mu, with the parameters' layouts. Communication: none.
    """
    check("lion", b1=b1, b2=b2)

    def kernel(s: Any, _: Any, g: Many, mu: Many) -> tuple[Many, ...]:
        g = g.to(mu.dtype)
        return mu.lerp(g, 1 - s.b1).sign_(), mu.lerp_(g, 1 - s.b2)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        move, mu = elementwise(
            kernel, [grads, state["mu"]], params, olds=[None, 1], scalars={"b1": b1, "b2": b2}
        )
        return move, {"mu": mu}

    return Transform(
        "scale_by_lion", lambda params: {"mu": zeros_like(params, state_dtype)}, update
    )


def lion(
    lr: Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
    mask: Mask | None = None,
    state_dtype: torch.dtype | None = None,
) -> Transform:
    """Lion; its learning rate is some 3 to 10 times smaller than AdamW's, its decay larger.

    Args:
        lr: learning rate, or a schedule of the step.
        b1: weight of the momentum in the direction.
        b2: decay of the momentum.
        weight_decay: times lr and the parameter.
        mask: which parameters decay; None is all.
        state_dtype: of the momentum; None is the parameter's.

    State: step and mu. Communication: none.

    >>> import shardwise as sw
    >>> p = {"w": sw.full((2,), 1.0, sw.make_mesh({"data": 2}), "n/data")}
    >>> opt = lion(0.25)
    >>> opt.step(p, opt.init(p), p)[0]["w"].full_tensor()
    tensor([0.7500, 0.7500])
    """
    return recipe(
        "lion", scale_by_lion(b1=b1, b2=b2, state_dtype=state_dtype), lr, weight_decay, mask
    )
