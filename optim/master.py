"""Master copies: parameters in few bits, updated in float32.

Source: Micikevicius et al. 2018 (arXiv 1710.03740), section 3.1.
"""

from __future__ import annotations

from typing import Any

import torch

from ..layouts import tree
from .base import Transform
from .flat import elementwise
from .many import Many


def master(t: Transform, *, dtype: torch.dtype = torch.float32) -> Transform:
    """A transform of copies in a wider dtype; the parameters are those copies, rounded.

    Args:
        t: the transform; gradients, parameters and state are `dtype` for it.
        dtype: of the copies.

    State: master, with the parameters' layouts; inner. Communication: that of `t`. In a chain it
    must come last.

    >>> import torch, shardwise as sw
    >>> p = {"w": sw.full((2,), 1.0, sw.make_mesh({"data": 2}), dtype=torch.bfloat16)}
    >>> opt = master(sw.optim.sgd(2.0**-10))
    >>> new, state = opt.step(p, opt.init(p), p)
    >>> new["w"].full_tensor()[0].item(), state["master"]["w"].full_tensor()[0].item()
    (1.0, 0.9990234375)
    """

    def init(params: Any) -> dict[str, Any]:
        copies = tree.map(lambda p: p.to(dtype) if p.dtype is not dtype else p * 1, params)
        return {"master": copies, "inner": t.init(copies)}

    def stepped(grads: Any, state: Any, params: Any, donate: bool) -> tuple[Any, Any]:
        """The copies after a step."""
        wide = elementwise(lambda s, _, g: (g.to(dtype),), [grads], params, olds=[None])[0]
        return t.step(wide, state["inner"], state["master"], donate=donate)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        copies, inner = stepped(grads, state, params, False)

        def away(s: Any, _: Any, g: Many, p: Many, copy: Many) -> tuple[Many]:
            return (copy.to(p.dtype).to(dtype).sub_(p.to(dtype)),)

        updates = elementwise(away, [grads, params, copies], params, olds=[None])[0]
        return updates, {"master": copies, "inner": inner}

    def fused(grads: Any, state: Any, params: Any, *, donate: bool = False) -> tuple[Any, Any]:
        copies, inner = stepped(grads, state, params, donate)
        narrow = lambda s, _, g, p, copy: (copy.to(p.dtype),)  # noqa: E731
        new = elementwise(narrow, [grads, params, copies], params, olds=[1])[0]
        return new, {"master": copies, "inner": inner}

    return Transform(t.name, init, update, t.needs, t.grads, fused, holds_params=True)
