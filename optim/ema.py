"""Running means of parameters, for evaluation: sharded, saved and offloaded as they are.

Source: Polyak and Juditsky 1992, with exponential weights.
"""

from __future__ import annotations

from typing import Any

import torch

from ..layouts import tree
from .base import Transform, apply_updates
from .flat import elementwise
from .many import Many
from .numbers import check
from .sums import wide


def ema(t: Transform, decay: float = 0.999, *, dtype: torch.dtype | None = None) -> Transform:
    """A transform that also keeps a running mean of the new parameters.

    Args:
        t: the transform.
        decay: how much of the mean is kept at each step; it starts at the first parameters.
        dtype: of the mean; None is the parameter's, but at least float32: in bfloat16 a mean with
            a decay above 0.99 stands still.

    State: ema, with the parameters' layouts; inner. Communication: that of `t`.

    >>> import shardwise as sw
    >>> p = {"w": sw.full((2,), 1.0, sw.make_mesh({"data": 2}), "n/data")}
    >>> opt = ema(sw.optim.sgd(1.0), 0.75)
    >>> new, state = opt.step(p, opt.init(p), p)
    >>> state["ema"]["w"].full_tensor()
    tensor([0.7500, 0.7500])
    """
    check("ema", decay=decay)

    def init(params: Any) -> dict[str, Any]:
        mean = tree.map(lambda p: p.to(wide(p.dtype) if dtype is None else dtype) * 1, params)
        return {"ema": mean, "inner": t.init(params)}

    def blend(s: Any, _: Any, p: Many, mean: Many) -> tuple[Many]:
        return (mean.lerp_(p.to(mean.dtype), 1 - s.decay),)

    def averaged(params: Any, mean: Any, donate: bool = False) -> Any:
        return elementwise(
            blend,
            [params, mean],
            params,
            olds=[1],
            scalars={"decay": decay},
            donate=(1,) if donate else (),
        )[0]

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, inner = t.update(grads, state["inner"], params)
        new = apply_updates(params, updates)
        return updates, {"ema": averaged(new, state["ema"]), "inner": inner}

    def fused(grads: Any, state: Any, params: Any, *, donate: bool = False) -> tuple[Any, Any]:
        new, inner = t.step(grads, state["inner"], params, donate=donate)
        return new, {"ema": averaged(new, state["ema"], donate), "inner": inner}

    return Transform(t.name, init, update, t.needs, t.grads, fused)
