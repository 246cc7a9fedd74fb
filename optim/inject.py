"""Hyper-parameters in the state: saved with it, read from it, changed in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .base import Transform, counter, scalar


def inject(factory: Callable[..., Transform], **hyper: Any) -> Transform:
    """A transform whose numeric hyper-parameters are leaves of the state.

    Args:
        factory: an optimizer, such as `optim.adamw`.
        **hyper: its arguments. Numbers become state leaves, from which each step reads them.
            Schedules are evaluated at every step and their value kept beside. Anything else (masks,
            flags, dtypes, integers) is passed on.

    State: hyper: scalars by name; step, if there is a schedule; inner.

    >>> import shardwise as sw
    >>> p = {"w": sw.full((2,), 1.0, sw.make_mesh({"data": 2}))}
    >>> opt = inject(sw.optim.sgd, lr=0.5)
    >>> state = opt.init(p)
    >>> state["hyper"]["lr"] = state["hyper"]["lr"] * 0.5
    >>> opt.step(p, state, p)[0]["w"].full_tensor()
    tensor([0.7500, 0.7500])
    """
    numbers = {k: v for k, v in hyper.items() if isinstance(v, float)}
    schedules = {k: v for k, v in hyper.items() if k == "lr" and callable(v)}
    schedules |= {k: v.schedule for k, v in hyper.items() if isinstance(v, Scheduled)}
    fixed = {k: v for k, v in hyper.items() if k not in numbers and k not in schedules}

    def made(values: Any) -> Transform:
        return factory(**fixed, **values)

    plain = made({**numbers, **dict.fromkeys(schedules, 0.0)})

    def init(params: Any) -> dict[str, Any]:
        step = counter(params)
        first = {k: _at(f, step) for k, f in schedules.items()}
        kept = {k: scalar(params, v, torch.float64) for k, v in numbers.items()}
        state: dict[str, Any] = {
            "hyper": {k: (kept | first)[k] for k in hyper if k in kept | first}
        }
        if schedules:
            state["count"] = step
        return state | {"inner": plain.init(params)}

    def current(state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The values of this step, and the state's own part after it."""
        values = dict(state["hyper"])
        values |= {k: _at(f, state["count"]) for k, f in schedules.items()}
        after: dict[str, Any] = {"hyper": values}
        if schedules:
            after["count"] = state["count"] + 1
        return values, after

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        values, after = current(state)
        updates, inner = made(values).update(grads, state["inner"], params)
        return updates, after | {"inner": inner}

    def fused(grads: Any, state: Any, params: Any, *, donate: bool = False) -> tuple[Any, Any]:
        values, after = current(state)
        params, inner = made(values).step(grads, state["inner"], params, donate=donate)
        return params, after | {"inner": inner}

    return Transform(plain.name, init, update, plain.needs, plain.grads, fused)


class Scheduled:
    """Marks a function as a schedule for `inject`: of any hyper-parameter, not of lr alone.

    >>> from shardwise import optim
    >>> t = optim.inject(optim.adamw, lr=1e-3, b2=optim.Scheduled(lambda step: 1 - 1 / (step + 10)))
    """

    def __init__(self, schedule: Callable[[Any], Any]) -> None:
        self.schedule = schedule


def _at(schedule: Callable[[Any], Any], step: Any) -> Any:
    """A schedule's value as a float64 scalar."""
    value = schedule(step)
    return value.to(torch.float64) if hasattr(value, "to") else step.to(torch.float64) * 0 + value
