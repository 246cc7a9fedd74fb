"""Stochastic rounding of bfloat16 parameters: up or down, so that the mean is right.

A bfloat16 has 8 bits of precision: an update below 1/256 of its parameter is lost when the sum is
rounded to the nearest. Rounded up with the probability of the remainder, it is kept on average, and
no float32 copy is held.

Source: Gupta et al. 2015 (arXiv 1502.02551), section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layouts import tree
from ..layouts.place import from_callback
from ..layouts.sharded import ShardedTensor
from ..meshlib import philox
from ..ops import random
from .base import Transform, apply_updates
from .flat import elementwise
from .many import Many


def stochastic(t: Transform, *, seed: int = 0) -> Transform:
    """A transform whose new bfloat16 parameters are rounded stochastically.

    The random bits depend on the key, the step, the parameter's path and the global index only:
    rounding is the same on every mesh. Other dtypes are rounded to the nearest. It must be the last
    of a chain: its updates are those that reach the rounded values.

    Args:
        t: a transform whose state is a dict with "step".
        seed: of the key.

    State: that of `t`, and key. Communication: none; the step number is read by the host.
    """

    def init(params: Any) -> dict[str, Any]:
        state = t.init(params)
        if "step" not in state:
            raise ValueError(f"stochastic: {t.name} counts no step in its state")
        return {**state, "key": random.key(seed)}

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        key = state["key"]
        inner = {k: v for k, v in state.items() if k != "key"}
        updates, after = t.update(grads, inner, params)
        now = step_key(key, state["step"])
        items = [(path, p) for path, p in tree.items(params) if p is not None]
        values = iter(
            [
                noise(random.fold_in(now, path), p) if p.dtype is torch.bfloat16 else p
                for path, p in items
            ]
        )
        drawn = tree.map(lambda _: next(values), params)  # skips None
        return elementwise(_reach, [updates, params, drawn], params, olds=[None])[0], {
            **after,
            "key": key,
        }

    def fused(grads: Any, state: Any, params: Any, *, donate: bool = False) -> tuple[Any, Any]:
        updates, state = update(grads, state, params)
        return apply_updates(params, updates, donate=donate), state

    return Transform(t.name, init, update, t.needs, t.grads, fused)


def step_key(key: random.Key, step: ShardedTensor) -> random.Key:
    """The key of a step; of step 0 on an abstract mesh, where no step has a number."""
    shard = step._shards[0]
    return random.fold_in(key, 0 if shard.is_meta else int(shard))


def noise(key: random.Key, x: ShardedTensor) -> ShardedTensor:
    """16 random bits per element, in the layout of `x`."""

    def draw(index: Any) -> Tensor:
        return philox.words(key.words, tuple(x.shape), index, device=x.mesh.device) >> 16

    return from_callback(draw, x.shape, x.mesh, x.layout, dtype=torch.int32)


def _reach(_s: Any, _mark: Any, u: Many, p: Many, bits: Many) -> tuple[Many]:
    """The update, in float32, that takes a parameter to a stochastically rounded sum."""
    if p.dtype is not torch.bfloat16:
        return (u,)
    wide = p.to(torch.float32)
    return ((wide + u.to(torch.float32)).map(rounded, bits).sub_(wide),)


def rounded(x: Tensor, bits: Tensor) -> Tensor:
    """Float32 values that bfloat16 holds: `x` plus bits below its last place, cut off.

    >>> rounded(torch.tensor([1.0]), torch.tensor([65535], dtype=torch.int32))
    tensor([1.])
    """
    moved = (x.view(torch.int32) + bits).bitwise_and_(-65536).view(torch.float32)
    return torch.where(torch.isfinite(x), moved, x)
