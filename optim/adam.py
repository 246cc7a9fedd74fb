"""Adam: steps normalised by running means of gradients and of their squares.

Source: Kingma and Ba 2015 (arXiv 1412.6980), algorithm 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Schedule, Transform, counter, zeros_like
from .flat import elementwise
from .fused import corrections, one_pass
from .many import Many
from .numbers import check


def moments(s: Any, g: Many, mu: Many, nu: Many) -> tuple[Many, Many]:
    """The running means after one more gradient, in float32 where they are held in less."""
    wide = torch.promote_types(mu.dtype, torch.float32)
    g, mu, nu = g.to(wide), mu.to(wide), nu.to(wide)
    return mu.lerp_(g, 1 - s.b1), nu.mul_(s.b2).addcmul_(g, g, 1 - s.b2)


def direction(s: Any, mu: Many, nu: Many) -> Many:
    """mean / (root of mean square + eps), both corrected."""
    first, second = corrections(s)
    root = nu.sqrt().div_(second**0.5).add_(s.eps).mul_(first)
    return mu / root


def stepped(s: Any, decay: Any, g: Many, mu: Many, nu: Many, p: Many) -> tuple[Many, ...]:
    """New parameters and means, of at least float32 and not rounded yet."""
    mu, nu = moments(s, g, mu, nu)
    first, second = corrections(s)
    root = nu.sqrt().div_(second**0.5).add_(s.eps)
    p = p.to(torch.promote_types(p.dtype, mu.dtype))
    if isinstance(decay, Tensor) or decay:
        p = p.mul_(1 - s.lr * decay)
    return p.addcdiv_(mu, root, -s.lr / first), mu, nu


def rounded(new: tuple[Many, ...], *olds: Many) -> tuple[Many, ...]:
    """Results in the dtypes of what they replace."""
    return tuple(each.to(old.dtype) for each, old in zip(new, olds, strict=True))


def adam_like(
    name: str,
    kernel: Any,
    hyper: dict[str, Any],
    *,
    state_dtype: torch.dtype | None = None,
    fused: Any = None,
    mask: Any = None,
) -> Transform:
    """A transform whose state is step, mu and nu, by a kernel (s, mark, g, mu, nu, p)."""
    from .scale import decayed

    named = {k: v for k, v in hyper.items() if k != "decay"}
    check(name, weight_decay=hyper.get("decay"), **named)

    def init(params: Any) -> dict[str, Any]:
        zeros = lambda: zeros_like(params, state_dtype)  # noqa: E731
        return {"step": counter(params), "mu": zeros(), "nu": zeros()}

    def run(kernel: Any, grads: Any, state: Any, params: Any, last: int | None, donate: Any) -> Any:
        out, mu, nu = elementwise(
            kernel,
            [grads, state["mu"], state["nu"], params],
            params,
            olds=[last, 1, 2],
            scalars=hyper | {"step": state["step"]},
            marks=decayed(mask, params),
            donate=donate,
        )
        return out, {"step": state["step"] + 1, "mu": mu, "nu": nu}

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return run(kernel, grads, state, params, None, ())

    def whole(grads: Any, state: Any, params: Any, *, donate: bool = False) -> tuple[Any, Any]:
        return run(fused, grads, state, params, 3, (1, 2, 3) if donate else ())

    return Transform(name, init, update, fused=whole if fused else None)


def scale_by_adam(
    *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, state_dtype: torch.dtype | None = None
) -> Transform:
    """Adam's direction, without learning rate: mean / (root of mean square + eps).

    State: step, mu and nu, with the parameters' layouts. Communication: none.
    """

    def kernel(s: Any, _: Any, g: Many, mu: Many, nu: Many, p: Many) -> tuple[Many, ...]:
        mean, square = moments(s, g, mu, nu)
        return direction(s, mean, square).to(mu.dtype), mean.to(mu.dtype), square.to(nu.dtype)

    hyper = {"b1": b1, "b2": b2, "eps": eps}
    return adam_like("scale_by_adam", kernel, hyper, state_dtype=state_dtype)


def adam(
    lr: Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    state_dtype: torch.dtype | None = None,
) -> Transform:
    """Adam.

    Args:
        lr: learning rate, or a schedule: a function of the step, a tensor that counts from 0.
        b1: decay of the mean of gradients.
        b2: decay of the mean of their squares.
        eps: added to the root.
        state_dtype: of the two means; None is the parameter's.

    State: step (int64 scalar), mu and nu, with the parameters' layouts. Communication: none.

    >>> import shardwise as sw
    >>> p = {"w": sw.full((2,), 1.0, sw.make_mesh({"data": 2}), "n/data")}
    >>> opt = adam(0.1)
    >>> opt.step(p, opt.init(p), p)[0]["w"].full_tensor()
    tensor([0.9000, 0.9000])
    """
    return decoupled("adam", {"lr": lr, "b1": b1, "b2": b2, "eps": eps}, 0.0, None, state_dtype)


def decoupled(
    name: str, hyper: dict[str, Any], decay: Any, mask: Any, state_dtype: torch.dtype | None
) -> Transform:
    """Adam with weight decay beside its direction (0.0 for none), also in one fused pass."""
    has_decay = not (isinstance(decay, int | float) and decay == 0)

    def kernel(s: Any, decays: bool, g: Many, mu: Many, nu: Many, p: Many) -> tuple[Many, ...]:
        mean, square = moments(s, g, mu, nu)
        move = direction(s, mean, square)
        if decays and has_decay:
            move = move.add_(p.to(move.dtype) * s.decay)
        return move.mul_(-s.lr), mean.to(mu.dtype), square.to(nu.dtype)

    def fused(s: Any, decays: bool, g: Many, mu: Many, nu: Many, p: Many) -> tuple[Many, ...]:
        decay = s.decay if decays and has_decay else 0.0
        found = one_pass(s, decay, g, mu, nu, p)
        return found or rounded(stepped(s, decay, g, mu, nu, p), p, mu, nu)

    return adam_like(
        name, kernel, hyper | {"decay": decay}, state_dtype=state_dtype, fused=fused, mask=mask
    )
