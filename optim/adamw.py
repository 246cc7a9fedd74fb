"""AdamW: Adam's normalised step with weight decay beside it.

Source: Loshchilov and Hutter 2019 (arXiv 1711.05101), algorithm 2.
"""

from __future__ import annotations

from typing import Literal

import torch

from ..layouts.tree import Mask
from .adam import decoupled
from .base import Schedule, Transform
from .rounding import stochastic


def adamw(
    lr: Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    mask: Mask | None = None,
    state_dtype: torch.dtype | None = None,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    seed: int = 0,
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
        rounding: of new parameters in bfloat16: to the nearest value, or up or down with
            probabilities that keep the mean (see `stochastic`).
        seed: of the stochastic rounding's key.

    State: step (int64 scalar), mu and nu, with the parameters' layouts; with stochastic rounding
    also its key. Communication: none.

    >>> import shardwise as sw
    >>> p = {"w": sw.full((2,), 1.0, sw.make_mesh({"data": 2}), "n/data")}
    >>> opt = adamw(0.1, weight_decay=0.5)
    >>> opt.step(p, opt.init(p), p)[0]["w"].full_tensor()
    tensor([0.8500, 0.8500])
    """
    hyper = {"lr": lr, "b1": b1, "b2": b2, "eps": eps}
    plain = decoupled("adamw", hyper, weight_decay, mask, state_dtype)
    if rounding == "nearest":
        return plain
    if rounding != "stochastic":
        raise ValueError(f'adamw: rounding is "nearest" or "stochastic", not {rounding!r}')
    return stochastic(plain, seed=seed)
