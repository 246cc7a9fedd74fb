"""AdamW: Adam's normalised step with weight decay beside it.

Source: Loshchilov and Hutter 2019 (arXiv 1711.05101), algorithm 2.
"""

from __future__ import annotations

from typing import Any

import torch

from ..layouts import tree
from ..layouts.sharded import ShardedTensor
from ..layouts.tree import Mask, matches
from .base import Schedule, Transform, counter, scheduled


def adamw(
    lr: Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    mask: Mask | None = None,
    state_dtype: torch.dtype | None = None,
) -> Transform:
    """AdamW.

    Args:
        lr: learning rate, or a schedule: a function of the step, a tensor that counts from 0.
        b1: decay of the mean of gradients.
        b2: decay of the mean of their squares.
        eps: added to the root.
        weight_decay: times lr and the parameter.
        mask: which parameters decay, a glob over paths or a function of (path, leaf); None is all.
        state_dtype: of the two means; None is the parameter's.

    State: step (int64 scalar), mu and nu, with the parameters' layouts. Communication: none.
    """

    def init(params: Any) -> dict[str, Any]:
        zeros = lambda p: torch.zeros_like(p, dtype=state_dtype)  # noqa: E731
        return {
            "step": counter(params),
            "mu": tree.map(zeros, params),
            "nu": tree.map(zeros, params),
        }

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        step = state["step"] + 1
        rate = scheduled(lr, state["step"])
        mu = tree.map(lambda m, g: torch.lerp(m, g.to(m.dtype), 1 - b1), state["mu"], grads)
        nu = tree.map(
            lambda v, g: torch.lerp(v, g.to(v.dtype) * g.to(v.dtype), 1 - b2), state["nu"], grads
        )
        count = step.to(torch.float64)
        first, second = 1 - b1**count, 1 - b2**count
        decays = [
            weight_decay if mask is None or matches(mask, path, p) else 0.0
            for path, p in tree.items(params)
        ]
        at = iter(decays)

        def one(m: ShardedTensor, v: ShardedTensor, p: ShardedTensor) -> Any:
            decay = next(at)
            move = (m / first.to(m.dtype)) / (torch.sqrt(v / second.to(v.dtype)) + eps)
            if decay:
                move = move + p.to(move.dtype) * decay
            return move * (-rate if isinstance(rate, float) else -rate.to(move.dtype))

        return tree.map(one, mu, nu, params), {"step": step, "mu": mu, "nu": nu}

    return Transform("adamw", init, update)
