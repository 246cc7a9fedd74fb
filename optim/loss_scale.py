"""Loss scaling: gradients of a loss times a factor, so that float16 holds the small ones.

Source: Micikevicius et al. 2018 (arXiv 1710.03740), section 3.2; the schedule of
torch.amp.GradScaler, with Megatron's hysteresis.
"""

from __future__ import annotations

from typing import Any

import torch

from .base import Transform, has_any, scalar
from .finite import culprits, guarded, moved, number
from .flat import elementwise
from .many import Many
from .numbers import check


def loss_scale(
    t: Transform,
    *,
    initial: float = 2.0**15,
    dynamic: bool = True,
    growth: float = 2.0,
    backoff: float = 0.5,
    every: int = 2000,
    hysteresis: int = 1,
    minimum: float = 1.0,
    maximum: float = 2.0**24,
) -> Transform:
    """A transform of gradients of `scale * loss`; multiply the loss by `get(state, "scale")`.

    Gradients are divided by the scale. Where one is not finite the step is skipped, bit by bit, and
    the scale shrinks; after enough finite steps it grows.

    Args:
        t: the transform.
        initial: the first scale.
        dynamic: whether the scale moves; if not, steps are only skipped.
        growth: factor after `every` finite steps in a row.
        backoff: factor after `hysteresis` overflows.
        every: finite steps in a row before growth.
        hysteresis: overflows, since the scale last moved, before it shrinks.
        minimum: least scale; an overflow there raises.
        maximum: largest scale.

    State: scale (float32); good: finite steps in a row; left: overflows that are still forgiven;
    skipped; inner.

    Cost: one scalar all_reduce over the axes that cut any gradient. With `dynamic` the host reads
    the flag, to raise at the minimum.

    Raises:
        FloatingPointError: an overflow at the minimal scale, naming the gradients.

    >>> import shardwise as sw
    >>> mesh = sw.make_mesh({"data": 2})
    >>> p = {"w": sw.full((2,), 1.0, mesh)}
    >>> opt = loss_scale(sw.optim.sgd(1.0), initial=4.0)
    >>> state = opt.init(p)
    >>> new, state = opt.step({"w": sw.full((2,), 2.0, mesh)}, state, p)  # of 4 * loss
    >>> new["w"].full_tensor()
    tensor([0.5000, 0.5000])
    """
    check("loss_scale", initial=initial, growth=growth, backoff=backoff, every=every)
    check("loss_scale", hysteresis=hysteresis, minimum=minimum, maximum=maximum)

    def init(params: Any) -> dict[str, Any]:
        count = lambda n=0: scalar(params, n, torch.int64)  # noqa: E731
        return {
            "scale": scalar(params, initial, torch.float32),
            "good": count(),
            "left": count(hysteresis),
            "skipped": count(),
            "inner": t.init(params),
        }

    def unscaled(s: Any, _: Any, g: Many) -> tuple[Many]:
        return ((g if g.dtype.itemsize >= 4 else g.to(torch.float32)) * (1 / s.scale),)

    def fused(grads: Any, state: Any, params: Any, *, donate: bool = False) -> tuple[Any, Any]:
        if not has_any(grads):
            return params, state
        small = elementwise(
            unscaled, [grads], params, olds=[None], scalars={"scale": state["scale"]}
        )[0]
        flag, new, inner, _ = guarded(t, small, state["inner"], params)
        if dynamic and number(flag) is False and number(state["scale"]) <= minimum:
            raise FloatingPointError(
                f"loss_scale: gradients are not finite at the minimal scale {minimum:g}; "
                f"on this process's devices: {culprits(grads) or 'none'}"
            )
        bad = (~flag).to(torch.int64)
        after = {"skipped": state["skipped"] + bad, "inner": inner}
        return new, _moved_scale(state, flag, bad) | after

    def _moved_scale(state: Any, flag: Any, bad: Any) -> dict[str, Any]:
        good, left = (state["good"] + 1) * (1 - bad), state["left"] - bad
        scale = state["scale"]
        if not dynamic:
            return {"scale": scale, "good": good, "left": state["left"]}
        grows = good >= every
        shrinks = left <= 0
        factor = grows.to(scale.dtype) * (growth - 1) + shrinks.to(scale.dtype) * (backoff - 1) + 1
        moves = (grows | shrinks).to(torch.int64)
        return {
            "scale": torch.clamp(scale * factor, minimum, maximum),  # pyright: ignore
            "good": good * (1 - grows.to(torch.int64)),
            "left": left * (1 - moves) + moves * hysteresis,
        }

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        new, after = fused(grads, state, params)
        return moved(params, new, grads), after

    # Whether a leaf is updated hangs on all leaves: a sum over everything, at least.
    needs = "reduction" if t.needs == "elementwise" else t.needs
    return Transform(t.name, init, update, needs, t.grads, fused)
