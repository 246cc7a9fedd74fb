"""AdamW: Adam's normalised step with weight decay beside it.

Source: Loshchilov and Hutter 2019 (arXiv 1711.05101), algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..kernels import adamw as kernels
from ..layouts import tree
from ..layouts.sharded import ShardedTensor
from ..layouts.tree import Mask
from ..ops import random
from .adam import decoupled, rounded, stepped
from .base import Schedule, Transform
from .flat import elementwise, local
from .fused import key_words, names, one_pass, places
from .many import Many
from .rounding import noise, step_key, stochastic
from .rounding import rounded as cut
from .scale import decayed


def adamw(
    lr: Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    mask: Mask | None = None,
    state_dtype: torch.dtype | None = None,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    seed: int = 0,
) -> Transform:
    """AdamW.

    Args:
        lr: learning rate, or a schedule: a function of the step, a tensor that counts from 0.
        b1: decay of the mean of gradients.
        b2: decay of the mean of their squares.
        eps: added to the root.
        weight_decay: times lr and the parameter.
        mask: which parameters decay, a glob over paths or a function of (path, leaf); None is all.
        state_dtype: of the two means; None is the parameter's.
        rounding: of new parameters in bfloat16: to the nearest value, or up or down with
            probabilities that keep the mean (see `stochastic`).
        seed: of the stochastic rounding's key.

    State: step (int64 scalar), mu and nu, with the parameters' layouts; with stochastic rounding
    also its key. Communication: none.

    >>> import shardwise as sw
    >>> p = {"w": sw.full((2,), 1.0, sw.make_mesh({"data": 2}), "n/data")}
    >>> opt = adamw(0.1, weight_decay=0.5)
    >>> opt.step(p, opt.init(p), p)[0]["w"].full_tensor()
    tensor([0.8500, 0.8500])
    """
    hyper = {"lr": lr, "b1": b1, "b2": b2, "eps": eps}
    plain = decoupled("adamw", hyper, weight_decay, mask, state_dtype)
    if rounding == "nearest":
        return plain
    if rounding != "stochastic":
        raise ValueError(f'adamw: rounding is "nearest" or "stochastic", not {rounding!r}')
    return _drawn(stochastic(plain, seed=seed), {**hyper, "decay": weight_decay}, mask)


def _drawn(plain: Transform, hyper: dict[str, Any], mask: Mask | None) -> Transform:
    """The transform with a step that rounds its sums in float32, in one pass where there is one."""

    def fused(grads: Any, state: Any, params: Any, *, donate: bool = False) -> tuple[Any, Any]:
        likes = tree.items(params)
        key, count = state["key"], state["step"]

        def kernel(s: Any, decays: bool, g: Many, mu: Many, nu: Many, p: Many) -> tuple[Many, ...]:
            decay = s.decay if decays else 0.0
            if p.dtype is not torch.bfloat16:
                found = one_pass(s, decay, g, mu, nu, p)
                return found or rounded(stepped(s, decay, g, mu, nu, p), p, mu, nu)
            some = [likes[i] for i in s.members]
            found = one_pass(s, decay, g, mu, nu, p, draw=lambda at: _keys(key, count, some, at))
            if found:
                return found
            new, mean, square = stepped(s, decay, g, mu, nu, p)
            now = step_key(key, count)
            bits = [b for path, x in some for b in noise(random.fold_in(now, path), x)._shards]
            new = new.to(torch.float32).map(cut, Many(bits))
            return rounded((new, mean, square), p, mu, nu)

        new, mu, nu = elementwise(
            kernel,
            [grads, state["mu"], state["nu"], params],
            params,
            olds=[3, 1, 2],
            scalars=hyper | {"step": state["step"]},
            marks=decayed(mask, params),
            donate=(1, 2, 3) if donate else (),
        )
        return new, {"step": state["step"] + 1, "mu": mu, "nu": nu, "key": key}

    return replace(plain, fused=fused)


def _keys(
    key: random.Key,
    count: ShardedTensor,
    some: Sequence[tuple[str, ShardedTensor]],
    device: torch.device,
) -> tuple[Tensor, list[int]] | None:
    """Per shard its key, made where the step number lies, and its place in the global tensor."""
    found = [at for _, x in some for at in places(x._type)]
    if any(at is None for at in found):
        return None
    paths = tuple(path for path, x in some for _ in x._shards)
    keys = kernels.adamw_keys(
        key_words(key.words, device), local(count, device), names(paths, device)
    )
    return keys, [n for at in found if at is not None for n in at]
