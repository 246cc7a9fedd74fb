"""GaLore: Adam in the few directions in which a matrix's gradient is large.

Source: Zhao et al. 2024 (arXiv 2403.03507), algorithm 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layouts import tree
from ..layouts.layout import make
from ..layouts.place import full
from ..layouts.reshard import reshard_one
from ..layouts.sharded import ShardedTensor, make_type
from ..layouts.tree import Mask
from .adam import direction, moments
from .base import Schedule, Transform, counter
from .flat import Active, elementwise, here
from .many import Many
from .numbers import check
from .recipe import recipe
from .sums import reduced_together, together, wide


def scale_by_galore(
    *,
    rank: int = 128,
    every: int = 200,
    scale: float = 0.25,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> Transform:
    """Adam's direction of the projected gradient, projected back; see `galore`."""
    check("galore", rank=rank, every=every, scale=scale, b1=b1, b2=b2, eps=eps)

    def is_low(p: ShardedTensor) -> bool:
        return p.ndim > 1 and min(p.shape[-2:]) > rank

    def is_left(p: ShardedTensor) -> bool:
        return p.shape[-2] <= p.shape[-1]

    def small(p: ShardedTensor) -> ShardedTensor:
        """Zeros as large as the projected gradient, cut where the parameter is."""
        shape, dims = list(p.shape), list(p.layout.dims)
        if is_low(p):
            gone = -2 if is_left(p) else -1
            shape[gone], dims[gone] = rank, ()
        layout = make(tuple(dims), memory=p.layout.memory)
        return full(shape, 0.0, p.mesh, layout, dtype=wide(p.dtype))

    def basis(p: ShardedTensor) -> ShardedTensor | None:
        """Zeros [..., side, rank], the same on all devices that share a matrix."""
        if not is_low(p):
            return None
        layout = make((*p.layout.dims[:-2], (), ()), memory=p.layout.memory)
        shape = (*p.shape[:-2], min(p.shape[-2:]), rank)
        return full(shape, 0.0, p.mesh, layout, dtype=wide(p.dtype))

    def init(params: Any) -> dict[str, Any]:
        return {
            "step": counter(params),
            "mu": tree.map(small, params),
            "nu": tree.map(small, params),
            "basis": tree.map(basis, params),
        }

    def found(g: ShardedTensor) -> ShardedTensor:
        """The leading singular vectors of whole gradients."""
        whole = reshard_one(g, make((*g.layout.dims[:-2], (), ())))
        shape = (*g.shape[:-2], min(g.shape[-2:]), rank)
        shards = tuple(_leading(s.to(wide(s.dtype)), rank, is_left(g)) for s in whole._shards)
        kind = make_type(g.mesh, whole.layout, shape, shards[0].dtype, False)
        return ShardedTensor(shards, kind)

    def block(q: ShardedTensor, g: ShardedTensor) -> ShardedTensor:
        """The rows of a basis that belong to this device's block of the gradient."""
        side = g.layout.dims[-2 if is_left(g) else -1]
        return reshard_one(q, make((*g.layout.dims[:-2], side, ())))

    def projected(g: ShardedTensor, q: ShardedTensor) -> ShardedTensor:
        """q^T g or g q: a sum over the devices that cut the side."""
        left = is_left(g)
        dims, shape = list(g.layout.dims), list(g.shape)
        gone = -2 if left else -1
        owes = frozenset(dims[gone])
        dims[gone], shape[gone] = (), rank
        parts = zip(g._shards, q._shards, strict=True)
        shards = tuple(q.mT @ g.to(q.dtype) if left else g.to(q.dtype) @ q for g, q in parts)
        kind = make_type(g.mesh, make(tuple(dims), owes), shape, shards[0].dtype, False)
        return ShardedTensor(shards, kind)

    def kernel(s: Any, _: Any, g: Many, mu: Many, nu: Many) -> tuple[Many, ...]:
        mu, nu = moments(s, g, mu, nu)
        return direction(s, mu, nu), mu, nu

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        with torch.no_grad():
            return _update(grads, state, params)

    def _update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        step = state["step"]
        now = step._shards[0]
        is_due = now.is_meta or int(now) % every == 0  # a plan shows the dearer step
        active = Active(params, grads)
        bases = active.of(state["basis"])
        blocks: list[Any] = [None] * len(bases)
        gradients = list(active.grads)
        for i, g in enumerate(active.grads):
            if bases[i] is not None:
                bases[i] = found(g) if is_due else bases[i]
                blocks[i] = block(bases[i], g)
                gradients[i] = projected(g, blocks[i])
        likes = tree.map(lambda m: m, state["mu"])
        moves, mu, nu = elementwise(
            kernel,
            [active.tree(reduced_together(gradients)), state["mu"], state["nu"]],
            likes,
            olds=[None, 1, 2],
            scalars={"b1": b1, "b2": b2, "eps": eps, "step": step},
        )
        out = []
        for u, g, q in zip(active.of(moves), active.grads, blocks, strict=True):
            if q is None:
                out.append(u)
                continue

            by = here({"scale": scale}, g.device).scale

            def back(u: Tensor, q: Tensor, left: bool = is_left(g), by: Any = by) -> Tensor:
                return (q @ u if left else u @ q.mT) * by

            out.append(together(back, g, u, q))
        return active.tree(out), {
            "step": step + 1,
            "mu": mu,
            "nu": nu,
            "basis": active.tree(bases, state["basis"]),
        }

    return Transform("scale_by_galore", init, update, "matrix")


def _leading(x: Tensor, rank: int, left: bool) -> Tensor:
    """The first singular vectors, left or right; the largest entry of each is positive."""
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    q = u[..., :rank] if left else vh[..., :rank, :].mT
    top = q.gather(-2, q.abs().argmax(-2, keepdim=True))
    return (q * torch.where(top < 0, -1.0, 1.0).to(q.dtype)).contiguous()


def galore(
    lr: Schedule,
    *,
    rank: int = 128,
    every: int = 200,
    scale: float = 0.25,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Mask | None = None,
) -> Transform:
    """GaLore: Adam whose means are held in a subspace that follows the gradient.

    Tensors with two dims or more (dims before the last two are batch dims) whose smaller side is
    longer than `rank` are projected onto their gradient's leading singular vectors; others take
    Adam.

    Args:
        lr: learning rate, or a schedule of the step.
        rank: dims of the subspace.
        every: steps between two choices of it.
        scale: of the projected updates.
        b1: decay of the mean of gradients.
        b2: decay of the mean of their squares.
        eps: added to the root.
        weight_decay: times lr and the parameter.
        mask: which parameters decay; None is all.

    State: step; mu, nu, one side `rank` long, the other cut as the parameter's; basis
    [..., smaller side, rank]. The step number is read by the host.

    Cost: an all_reduce of the projected gradients, of all leaves together, over the axes that cut
    the smaller side; every `every` steps an all_gather of the gradients and a singular value
    decomposition on every device.

    >>> import shardwise as sw
    >>> p = {"w": sw.full((4, 8), 1.0, sw.make_mesh({"data": 2}), "a/data b")}
    >>> galore(0.1, rank=2).init(p)["mu"]["w"].shape
    torch.Size([2, 8])
    """
    inner = scale_by_galore(rank=rank, every=every, scale=scale, b1=b1, b2=b2, eps=eps)
    return recipe("galore", inner, lr, weight_decay, mask)
