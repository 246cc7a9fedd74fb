"""Stochastic gradient descent, with momentum.

Source: Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning",
in the form of torch.optim.SGD (the velocity does not hold the learning rate).
"""

from __future__ import annotations

from typing import Any

import torch

from .base import Schedule, Transform, counter, zeros_like
from .flat import elementwise
from .many import Many
from .numbers import check


def trace(g: Many, mu: Many, momentum: Any, nesterov: bool) -> tuple[Many, Many]:
    """(direction, velocity) after one more gradient."""
    g = g.to(mu.dtype)
    mu = mu.mul_(momentum).add_(g)
    return ((mu * momentum).add_(g) if nesterov else mu), mu


def scale_by_momentum(
    momentum: float = 0.9, *, nesterov: bool = False, state_dtype: torch.dtype | None = None
) -> Transform:
    """The running sum of gradients, `mu = momentum * mu + g`.

    With Nesterov's look-ahead the direction is `g + momentum * mu`. State: mu, with the parameters'
    layouts. Communication: none.
    """
    check("scale_by_momentum", momentum=momentum)

    def kernel(s: Any, _: Any, g: Many, mu: Many) -> tuple[Many, ...]:
        return trace(g, mu, s.momentum, nesterov)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        move, mu = elementwise(
            kernel,
            [grads, state["mu"]],
            params,
            olds=[None, 1],
            scalars={"momentum": momentum},
        )
        return move, {"mu": mu}

    def init(params: Any) -> dict[str, Any]:
        return {"mu": zeros_like(params, state_dtype)}

    return Transform("scale_by_momentum", init, update)


def sgd(lr: Schedule, *, momentum: float = 0.0, nesterov: bool = False) -> Transform:
    """SGD; with momentum, heavy-ball or Nesterov's.

    Args:
        lr: learning rate, or a schedule: a function of the step, a tensor that counts from 0.
        momentum: how much of the velocity is kept; 0.0 keeps no state for it.
        nesterov: whether the gradient is added once more ahead.

    State: step, and with momentum mu, with the parameters' layouts. Communication: none.

    >>> import shardwise as sw
    >>> p = {"w": sw.full((2,), 1.0, sw.make_mesh({"data": 2}), "n/data")}
    >>> opt = sgd(0.5)
    >>> opt.step(p, opt.init(p), p)[0]["w"].full_tensor()
    tensor([0.5000, 0.5000])
    """
    check("sgd", lr=lr, momentum=momentum)
    moving = not (isinstance(momentum, int | float) and momentum == 0)
    if nesterov and not moving:
        raise ValueError("sgd: nesterov looks ahead along the momentum, got momentum=0.0")

    def init(params: Any) -> dict[str, Any]:
        state: dict[str, Any] = {"step": counter(params)}
        return state | {"mu": zeros_like(params)} if moving else state

    def kernel(s: Any, _: Any, g: Many, *mu: Many) -> tuple[Many, ...]:
        if not mu:
            return (g * -s.lr,)
        move, velocity = trace(g, mu[0], s.momentum, nesterov)
        return move * -s.lr, velocity

    def fused(s: Any, _: Any, g: Many, *rest: Many) -> tuple[Many, ...]:
        *mu, p = rest
        move, velocity = trace(g, mu[0], s.momentum, nesterov) if mu else (g, None)
        new = (p.add_(move * -s.lr).to(p.dtype),)
        return new if velocity is None else (*new, velocity)

    def run(f: Any, grads: Any, state: Any, params: Any, own: list[Any], donate: Any) -> Any:
        memory = [state["mu"]] if moving else []
        out = elementwise(
            f,
            [grads, *memory, *own],
            params,
            olds=[1 + len(memory) if own else None, *([1] if memory else [])],
            scalars={"lr": lr, "momentum": momentum, "step": state["step"]},
            donate=donate,
        )
        after = {"step": state["step"] + 1}
        return out[0], after | {"mu": out[1]} if moving else after

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return run(kernel, grads, state, params, [], ())

    def whole(grads: Any, state: Any, params: Any, *, donate: bool = False) -> tuple[Any, Any]:
        return run(
            fused,
            grads,
            state,
            params,
            [params],
            tuple(range(1, 3 if moving else 2)) if donate else (),
        )

    return Transform("sgd", init, update, fused=whole)
