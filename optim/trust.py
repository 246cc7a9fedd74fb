"""Layer-wise trust ratios: LAMB and LARS, whose steps are as long as the layer's weights ask.

Sources: You et al. 2020 (arXiv 1904.00962), algorithm 2 (LAMB); You et al. 2017 (arXiv 1708.03888),
algorithm 1 (LARS).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..layouts.tree import Mask
from .adam import scale_by_adam
from .base import Schedule, Transform, counter, zeros_like
from .flat import Active, elementwise, here
from .many import Many
from .numbers import RATE, check
from .scale import add_decayed_weights
from .sums import per_entry, squares, together

Ratio = Callable[[Tensor, Tensor], Tensor]


def trusted(updates: Any, params: Any, ratio: Ratio, stacked: Mask | None) -> Any:
    """Updates times ratio(norm of the parameter, norm of the update), per tensor.

    Cost: one all_reduce of two scalars per tensor, all tensors together, per set of axes.
    """
    active = Active(params, updates)
    stacks = active.takes(stacked)
    sums = squares([*active.params, *active.grads], [*stacks, *stacks])
    half = len(stacks)

    def scaled(u: Tensor, p2: Tensor, u2: Tensor) -> Tensor:
        factor = ratio(p2.sqrt(), u2.sqrt()).to(u.dtype)
        return u * per_entry(factor, u)

    return active.tree(
        [
            together(scaled, u, u, p2, u2)
            for u, p2, u2 in zip(active.grads, sums[:half], sums[half:], strict=True)
        ]
    )


def scale_by_lamb(*, stacked: Mask | None = None) -> Transform:
    """Updates times (norm of the parameter / norm of the update), per tensor; 1 where one is 0.

    Args:
        stacked: parameters whose dim 0 is a stack of layers, each with a ratio of its own, such as
            "blocks.*"; None is no one.

    Cost: one all_reduce of two scalars per tensor, all tensors together, per set of axes.
    """

    def ratio(p: Tensor, u: Tensor) -> Tensor:
        return torch.where((p > 0) & (u > 0), p / u, torch.ones_like(p))

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        with torch.no_grad():
            return trusted(grads, params, ratio, stacked), state

    return Transform("scale_by_lamb", lambda params: {}, update, "reduction")


def lamb(
    lr: Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    mask: Mask | None = None,
    stacked: Mask | None = None,
    state_dtype: torch.dtype | None = None,
) -> Transform:
    """LAMB: Adam's direction plus decay, as long as the parameter's own norm.

    Args:
        lr: learning rate, or a schedule of the step.
        b1: decay of the mean of gradients.
        b2: decay of the mean of their squares.
        eps: added to the root.
        weight_decay: times the parameter, inside the ratio.
        mask: which parameters decay; None is all.
        stacked: parameters whose dim 0 is a stack of layers, each with a ratio of its own.
        state_dtype: of the two means; None is the parameter's.

    State: step, mu, nu. Cost: one all_reduce of two scalars per tensor, all tensors together.

    >>> import shardwise as sw
    >>> p = {"w": sw.full((4,), 1.0, sw.make_mesh({"data": 2}), "n/data")}
    >>> opt = lamb(0.5)
    >>> opt.step(p, opt.init(p), p)[0]["w"].full_tensor()
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    check("lamb", lr=lr)
    direction = scale_by_adam(b1=b1, b2=b2, eps=eps, state_dtype=state_dtype)
    decay = add_decayed_weights(weight_decay, mask)
    trust = scale_by_lamb(stacked=stacked)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, after = direction.update(grads, state, params)
        updates, _ = decay.update(updates, {}, params)
        updates, _ = trust.update(updates, {}, params)
        return stepped(updates, lr, state["step"], params), after

    return Transform("lamb", direction.init, update, "reduction")


def stepped(updates: Any, lr: Schedule, step: Any, params: Any) -> Any:
    """-lr * updates."""
    return elementwise(
        lambda s, _, u: (u * -s.lr,),
        [updates],
        params,
        olds=[None],
        scalars={"lr": lr, "step": step},
    )[0]


def scale_by_lars(
    *,
    trust: float = 0.001,
    weight_decay: float = 0.0,
    eps: float = 0.0,
    mask: Mask | None = None,
    stacked: Mask | None = None,
) -> Transform:
    """trust * |p| / (|g| + weight_decay * |p| + eps) * (g + weight_decay * p), per tensor.

    The ratio is 1 where a norm is 0.

    Args:
        trust: the coefficient.
        weight_decay: of the penalty that is added to the gradient.
        eps: added to the denominator.
        mask: which parameters decay; None is all.
        stacked: parameters whose dim 0 is a stack of layers, each with a ratio of its own.

    Cost: one all_reduce of two scalars per tensor, all tensors together, per set of axes.
    """
    check("lars", {"eps": RATE}, trust=trust, eps=eps)
    decay = add_decayed_weights(weight_decay, mask)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        with torch.no_grad():
            return _lars(grads, params), state

    def _lars(grads: Any, params: Any) -> Any:
        active = Active(params, grads)
        decays = active.takes(mask) if mask is not None else [True] * len(active.params)
        stacks = active.takes(stacked)
        half = len(stacks)
        sums = squares([*active.params, *active.grads], [*stacks, *stacks])
        moves = active.of(decay.update(grads, {}, params)[0])
        out = []
        for u, p2, g2, has in zip(moves, sums[:half], sums[half:], decays, strict=True):
            s = here({"decay": weight_decay if has else 0.0, "trust": trust, "eps": eps}, u.device)

            def scaled(u: Tensor, p2: Tensor, g2: Tensor, s: Any = s) -> Tensor:
                p, g = p2.sqrt(), g2.sqrt()
                ratio = s.trust * p / (g + p * s.decay + s.eps)
                ratio = torch.where((p > 0) & (g > 0), ratio, torch.ones_like(p)).to(u.dtype)
                return u * per_entry(ratio, u)

            out.append(together(scaled, u, u, p2, g2))
        return active.tree(out)

    return Transform("scale_by_lars", lambda params: {}, update, "reduction")


def lars(
    lr: Schedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust: float = 0.001,
    eps: float = 0.0,
    mask: Mask | None = None,
    stacked: Mask | None = None,
) -> Transform:
    """LARS: SGD with momentum, each layer's rate in proportion to |p| / |g|.

    Args:
        lr: learning rate, or a schedule of the step.
        momentum: how much of the velocity, which holds the learning rate, is kept.
        weight_decay: of the penalty that is added to the gradient.
        trust: the coefficient of the layer's own rate.
        eps: added to the ratio's denominator.
        mask: which parameters decay; None is all.
        stacked: parameters whose dim 0 is a stack of layers, each with a ratio of its own.

    State: step, mu. Cost: one all_reduce of two scalars per tensor, all tensors together.

    >>> import shardwise as sw
    >>> p = {"w": sw.full((4,), 1.0, sw.make_mesh({"data": 2}), "n/data")}
    >>> opt = lars(1.0, trust=0.5)
    >>> opt.step(p, opt.init(p), p)[0]["w"].full_tensor()
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    check("lars", lr=lr, momentum=momentum)
    direction = scale_by_lars(
        trust=trust, weight_decay=weight_decay, eps=eps, mask=mask, stacked=stacked
    )

    def kernel(s: Any, _: Any, u: Many, mu: Many) -> tuple[Many, ...]:
        mu = mu.mul_(s.momentum).add_(u.to(mu.dtype) * s.lr)
        return -mu, mu

    def init(params: Any) -> dict[str, Any]:
        return {"step": counter(params), "mu": zeros_like(params)}

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, _ = direction.update(grads, {}, params)
        move, mu = elementwise(
            kernel,
            [updates, state["mu"]],
            params,
            olds=[None, 1],
            scalars={"lr": lr, "momentum": momentum, "step": state["step"]},
        )
        return move, {"step": state["step"] + 1, "mu": mu}

    return Transform("lars", init, update, "reduction")
