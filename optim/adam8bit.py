"""Adam with states of one byte per value.

Source: Dettmers et al. 2022 (arXiv 2110.02861).
"""

from __future__ import annotations

from typing import Any

import torch

from ..layouts import tree
from ..layouts.layout import Layout, make
from ..layouts.place import full
from ..layouts.reshard import reshard_one
from ..layouts.sharded import ShardedTensor, make_type
from ..layouts.tree import Mask
from .adam import corrections
from .base import Schedule, Transform, counter
from .codes import decode, encode
from .flat import Active, here
from .numbers import check
from .recipe import recipe
from .sums import wide

NAMES = (("mu", True), ("nu", False))


def scale_by_adam8bit(
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    block: int = 256,
    least: int = 4096,
) -> Transform:
    """Adam's direction, its means held in eight bits; see `adam8bit`."""
    check("adam8bit", b1=b1, b2=b2, eps=eps, block=block)

    def is_coded(p: ShardedTensor) -> bool:
        return p.ndim > 0 and p.numel() >= least

    def fits(p: ShardedTensor) -> bool:
        """Whether no block is cut by the parameter's layout."""
        n = p.mesh.group_size(p.layout.dims[-1])
        return n == 1 or (p.shape[-1] // n) % block == 0

    def working(p: ShardedTensor) -> Layout:
        """The layout of the arithmetic: the last dim whole if its cuts go through blocks."""
        dims = p.layout.dims
        return make(dims if not is_coded(p) or fits(p) else (*dims[:-1], ()))

    def empty(p: ShardedTensor, is_scale: bool) -> ShardedTensor | None:
        """Zero codes and scales; for small tensors the values themselves, and no scales."""
        memory = p.layout.memory
        if is_scale and not is_coded(p):
            return None
        if is_scale:
            shape = (*p.shape[:-1], -(-p.shape[-1] // block))
            layout = make(working(p).dims, memory=memory)
            return full(shape, 0.0, p.mesh, layout, dtype=torch.float32)
        layout = make(p.layout.dims, memory=memory)
        dtype = torch.uint8 if is_coded(p) else wide(p.dtype)
        return full(p.shape, 0, p.mesh, layout, dtype=dtype)

    def init(params: Any) -> dict[str, Any]:
        state: dict[str, Any] = {"step": counter(params)}
        for name, signed in NAMES:
            state[name] = tree.map(lambda p, s=signed: _zeroed(empty(p, False), s), params)
            state[f"{name}_scale"] = tree.map(lambda p: empty(p, True), params)
        return state

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        with torch.no_grad():
            return _update(grads, state, params)

    def _update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        active = Active(params, grads)
        names = ("mu", "nu", "mu_scale", "nu_scale")
        columns = [active.of(state[name]) for name in names]
        after: list[list[Any]] = [[] for _ in names]
        moves = []
        for p, g, *old in zip(active.params, active.grads, *columns, strict=True):
            hyper = {"b1": b1, "b2": b2, "eps": eps, "step": state["step"]}
            s = here(hyper, p.device)
            at = working(p)
            inside = [None if x is None else reshard_one(x, at) for x in (g, *old)]
            held = range(len(p._shards))
            results = [
                _one(s, *(None if x is None else x._shards[k] for x in inside)) for k in held
            ]
            u, *new = (_typed(column, p, at) for column in zip(*results, strict=True))
            moves.append(reshard_one(u, p.layout))
            for into, x, like in zip(after, new, old, strict=True):
                into.append(None if like is None else reshard_one(x, like.layout))
        updated = {
            name: active.tree(values, state[name])
            for name, values in zip(names, after, strict=True)
        }
        return active.tree(moves), {"step": state["step"] + 1, **updated}

    def _one(s: Any, g: Any, mu: Any, nu: Any, mu_scale: Any, nu_scale: Any) -> tuple[Any, ...]:
        if mu_scale is not None:
            mu = decode(mu, mu_scale, block, True)
            nu = decode(nu, nu_scale, block, False)
        g = g.to(mu.dtype)
        mu = mu * s.b1 + g * (1 - s.b1)
        nu = nu * s.b2 + g * g * (1 - s.b2)
        first, second = corrections(s)
        u = (mu / first) / ((nu / second).sqrt() + s.eps)
        if mu_scale is None:
            return u, mu, nu, None, None
        mu, mu_scale = encode(mu, block, True)
        nu, nu_scale = encode(nu, block, False)
        return u, mu, nu, mu_scale, nu_scale

    def _typed(shards: tuple[Any, ...], p: ShardedTensor, at: Layout) -> Any:
        if shards[0] is None:
            return None
        last = shards[0].shape[-1:].numel() * p.mesh.group_size(at.dims[-1]) if p.ndim else 1
        shape = (*p.shape[:-1], last) if p.ndim else ()
        return ShardedTensor(shards, make_type(p.mesh, at, shape, shards[0].dtype, False))

    return Transform("scale_by_adam8bit", init, update)


def _zeroed(x: Any, signed: bool) -> Any:
    """Codes of the value 0."""
    if x.dtype is not torch.uint8:
        return x
    code = int(encode(torch.zeros(1), 1, signed)[0])
    return full(x.shape, code, x.mesh, x.layout, dtype=torch.uint8)


def adam8bit(
    lr: Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Mask | None = None,
    block: int = 256,
    least: int = 4096,
) -> Transform:
    """Adam(W) with 2 + 8 / block bytes of state per parameter instead of 8.

    Args:
        lr: learning rate, or a schedule of the step.
        b1: decay of the mean of gradients.
        b2: decay of the mean of their squares.
        eps: added to the root.
        weight_decay: times lr and the parameter.
        mask: which parameters decay; None is all.
        block: values along the last dim of the global tensor that share a scale.
        least: smaller tensors (by their global size) keep plain means.

    A positive mean square is never rounded to 0, so where the gradients of one block span more than
    three decades, the steps of the smallest are shorter than Adam's, not longer.

    State: step; mu, nu: codes uint8 with the parameters' shapes and layouts; mu_scale, nu_scale:
    [..., blocks]. Values do not depend on the mesh.

    Cost: none where the last dim is whole or its local size is a multiple of `block`. Otherwise the
    gradient and the codes are gathered along it: choose a `block` that divides the local size.

    >>> import shardwise as sw
    >>> p = {"w": sw.full((64, 256), 1.0, sw.make_mesh({"data": 2}), "a/data b")}
    >>> state = adam8bit(0.1).init(p)
    >>> print(state["mu"]["w"], state["mu_scale"]["w"])
    u8[64/data 256] f32[64/data 1]
    """
    direction = scale_by_adam8bit(b1=b1, b2=b2, eps=eps, block=block, least=least)
    return recipe("adam8bit", direction, lr, weight_decay, mask)
