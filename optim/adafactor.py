"""Adafactor: mean squares of a matrix held as one row of them and one column.

Source: Shazeer and Stern 2018 (arXiv 1804.04235), algorithms 4 and 5, with decoupled weight decay
and the constants of torch.optim.Adafactor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layouts.tree import Mask
from .base import Schedule, Transform, counter
from .factors import Factors, at_least, clipped, empty, factored, outer, root_mean_squares
from .flat import Active, here
from .numbers import Rule, check
from .sums import per_entry, together

FALLING: Rule = (lambda x: x <= 0, "at most 0")


def scale_by_adafactor(
    *,
    decay: float = -0.8,
    eps: float | None = None,
    clip: float = 1.0,
    stacked: Mask | None = None,
) -> Transform:
    """Gradients over the root of factored mean squares, clipped in root mean square.

    Args:
        decay: the newest square's weight at step t is t ** decay.
        eps: least root of the mean square; None is the gap between 1 and the next number.
        clip: largest root mean square of an update, per tensor.
        stacked: parameters whose dim 0 is a stack of layers, each clipped on its own.

    State: step; row, col: mean squares over the last dim and over the last but one, for tensors
    with two dims or more (dims before these are batch dims); nu: of the others.

    Cost: all_reduces of rows and columns, not of matrices, all tensors together: 3 in a row.
    """
    check("adafactor", {"decay": FALLING}, decay=decay, eps=eps, clip=clip)

    def init(params: Any) -> dict[str, Any]:
        return {"step": counter(params), **empty(params, "row", "col", "nu")}

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        with torch.no_grad():
            return _update(grads, state, params)

    def _update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        active = Active(params, grads)
        old = Factors(*(active.of(state[k]) for k in ("row", "col", "nu")))

        def weight(p: Any) -> Any:
            s = here({"step": state["step"], "decay": decay}, p.device)
            return (s.step + 1) ** s.decay

        weights = [weight(p) for p in active.params]
        new, means = factored(active.grads, old, weights, lambda g: g * g)
        moves = []
        for p, g, row, col, nu, mean in zip(active.params, active.grads, *new, means, strict=True):
            least = torch.finfo(p.dtype).eps if eps is None else here({"e": eps}, p.device).e
            if row is None:
                moves.append(together(lambda v, g, e=least: _over(v, g, e), g, nu, g))
                continue

            def move(r: Tensor, c: Tensor, m: Tensor, g: Tensor, e: Any = least) -> Tensor:
                return _over(outer(r, c, at_least(m, e)), g, e)

            moves.append(together(move, g, row, col, mean, g))
        moves = clipped(moves, clip, active.takes(stacked))
        return active.tree(moves), {
            "step": state["step"] + 1,
            **{
                name: active.tree(values, state[name])
                for name, values in zip(("row", "col", "nu"), new, strict=True)
            },
        }

    return Transform("scale_by_adafactor", init, update, "reduction")


def _over(v: Tensor, g: Tensor, eps: Any) -> Tensor:
    return g.to(v.dtype) * at_least(v, eps * eps).rsqrt()


def _least(a: Any, b: Any) -> Any:
    """The smaller of two numbers or scalar tensors."""
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return min(a, b)
    return torch.minimum(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b).double())


def adafactor(
    lr: Schedule = 0.01,
    *,
    decay: float = -0.8,
    eps: float | None = None,
    eps_scale: float = 1e-3,
    clip: float = 1.0,
    weight_decay: float = 0.0,
    mask: Mask | None = None,
    stacked: Mask | None = None,
) -> Transform:
    """Adafactor, with steps relative to the parameter's root mean square.

    Args:
        lr: the largest relative step, or a schedule: the step is min(lr, 1 / sqrt(t)).
        decay: the newest square's weight at step t is t ** decay.
        eps: least root of the mean square; None is the gap between 1 and the next number.
        eps_scale: least root mean square of a parameter.
        clip: largest root mean square of an update, per tensor.
        weight_decay: times lr and the parameter.
        mask: which parameters decay; None is all.
        stacked: parameters whose dim 0 is a stack of layers, each a tensor of its own.

    State: step, row, col, nu (see `scale_by_adafactor`). Cost: all_reduces of rows and columns, not
    of matrices, all tensors together: 4 in a row.

    >>> import shardwise as sw
    >>> p = {"w": sw.full((4, 4), 1.0, sw.make_mesh({"data": 2}), "a/data b")}
    >>> opt = adafactor(0.5)
    >>> opt.step(p, opt.init(p), p)[0]["w"].full_tensor()[0]
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    check("adafactor", lr=lr, eps_scale=eps_scale, weight_decay=weight_decay)
    direction = scale_by_adafactor(decay=decay, eps=eps, clip=clip, stacked=stacked)
    has_decay = not (isinstance(weight_decay, int | float) and weight_decay == 0)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        with torch.no_grad():
            moves, after = direction.update(grads, state, params)
            return _stepped(moves, state["step"], params), after

    def _stepped(moves: Any, step: Any, params: Any) -> Any:
        active = Active(params, moves)
        sizes = root_mean_squares(active.params, active.takes(stacked))
        decays = active.takes(mask) if mask is not None else [True] * len(sizes)
        out = []
        for u, p, size, has in zip(active.grads, active.params, sizes, decays, strict=True):
            s = here({"lr": lr, "step": step, "least": eps_scale, "decay": weight_decay}, p.device)

            def one(u: Tensor, p: Tensor, size: Tensor, s: Any = s, has: bool = has) -> Tensor:
                rate = _least(s.lr, (s.step + 1) ** -0.5)
                move = u * per_entry(size.clamp(min=s.least) * -rate, u)
                return move - p.to(move.dtype) * (s.lr * s.decay) if has and has_decay else move

            out.append(together(one, u, u, p, size))
        return active.tree(out)

    return Transform("adafactor", direction.init, update, "reduction")
