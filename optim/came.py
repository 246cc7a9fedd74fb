"""CAME: Adafactor whose steps are weighted by how steady they are.

Source: Luo et al. 2023 (arXiv 2307.02047), algorithm 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layouts import tree
from ..layouts.tree import Mask
from .base import Schedule, Transform
from .factors import Factors, clipped, empty, factored, outer
from .flat import Active, here
from .numbers import check
from .recipe import recipe
from .sums import together, wide

STATE = ("row", "col", "nu")
STEADY = ("steady_row", "steady_col")


def scale_by_came(
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.9999,
    eps: tuple[float, float] = (1e-30, 1e-16),
    clip: float = 1.0,
    stacked: Mask | None = None,
) -> Transform:
    """The momentum of Adafactor's directions, over the root of their factored instability.

    Args:
        b1: decay of the momentum.
        b2: decay of the mean squares of gradients.
        b3: decay of the instability, the mean square of direction minus momentum.
        eps: added to the squares of gradients, and to the instability.
        clip: largest root mean square of a direction, per tensor.
        stacked: parameters whose dim 0 is a stack of layers, each clipped on its own.

    State: mu, with the parameters' layouts; row, col, steady_row, steady_col for tensors with two
    dims or more (dims before the last two are batch dims); nu for the others, which take the
    momentum as it is.

    Cost: all_reduces of rows and columns, not of matrices, all tensors together: 5 in a row.
    """
    check("came", b1=b1, b2=b2, b3=b3, eps=eps, clip=clip)

    def init(params: Any) -> dict[str, Any]:
        zeros = lambda p: torch.zeros_like(p, dtype=wide(p.dtype))  # noqa: E731
        return {
            "mu": tree.map(zeros, params),
            **empty(params, *STATE),
            **empty(params, *STEADY, None),
        }

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        with torch.no_grad():
            return _update(grads, state, params)

    def _update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        active = Active(params, grads)
        old = Factors(*(active.of(state[k]) for k in STATE))
        at = [here({"b1": b1, "b2": b2, "b3": b3}, p.device) for p in active.params]
        new, means = factored(active.grads, old, [1 - s.b2 for s in at], lambda g: g * g + eps[0])
        moves = []
        for g, row, col, nu, mean in zip(active.grads, *new, means, strict=True):
            if row is None:
                moves.append(together(lambda v, g: g.to(v.dtype) * v.rsqrt(), g, nu, g))
            else:
                moves.append(together(_over, g, row, col, mean, g))
        moves = clipped(moves, clip, active.takes(stacked))

        momenta, strays = [], []
        for s, u, mu in zip(at, moves, active.of(state["mu"]), strict=True):
            m = together(lambda m, u, s=s: m * s.b1 + u * (1 - s.b1), mu, mu, u)
            momenta.append(m)
            strays.append(together(torch.sub, u, u, m))
        matrices = [i for i, u in enumerate(moves) if u.ndim > 1]
        r, c = ([active.of(state[k])[i] for i in matrices] for k in STEADY)
        steady, means = factored(
            [strays[i] for i in matrices],
            Factors(r, c, [None] * len(matrices)),
            [1 - at[i].b3 for i in matrices],
            lambda x: x * x + eps[1],
        )
        out = list(momenta)
        for n, i in enumerate(matrices):
            m = momenta[i]
            out[i] = together(_over, m, steady.row[n], steady.col[n], means[n], m)

        after = {"mu": active.tree(momenta, state["mu"])}
        for name, values in zip(STATE, new, strict=True):
            after[name] = active.tree(values, state[name])
        for name, values in zip(STEADY, (steady.row, steady.col), strict=True):
            spread = [None] * len(moves)
            for n, i in enumerate(matrices):
                spread[i] = values[n]
            after[name] = active.tree(spread, state[name])
        return active.tree(out), after

    return Transform("scale_by_came", init, update, "reduction")


def _over(row: Tensor, col: Tensor, mean: Tensor, x: Tensor) -> Tensor:
    return x.to(row.dtype) * outer(row, col, mean).rsqrt()


def came(
    lr: Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.9999,
    eps: tuple[float, float] = (1e-30, 1e-16),
    clip: float = 1.0,
    weight_decay: float = 0.0,
    mask: Mask | None = None,
    stacked: Mask | None = None,
) -> Transform:
    """CAME.

    Args:
        lr: learning rate, or a schedule of the step.
        b1: decay of the momentum.
        b2: decay of the mean squares of gradients.
        b3: decay of the instability.
        eps: added to the squares of gradients, and to the instability.
        clip: largest root mean square of a direction, per tensor.
        weight_decay: times lr and the parameter.
        mask: which parameters decay; None is all.
        stacked: parameters whose dim 0 is a stack of layers, each clipped on its own.

    State and cost: see `scale_by_came`; and step.

    >>> import shardwise as sw
    >>> p = {"w": sw.full((4, 4), 1.0, sw.make_mesh({"data": 2}), "a/data b")}
    >>> opt = came(0.1)
    >>> sorted(opt.step(p, opt.init(p), p)[1])
    ['col', 'mu', 'nu', 'row', 'steady_col', 'steady_row', 'step']
    """
    direction = scale_by_came(b1=b1, b2=b2, b3=b3, eps=eps, clip=clip, stacked=stacked)
    return recipe("came", direction, lr, weight_decay, mask)
