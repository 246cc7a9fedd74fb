"""Muon: momentum, orthogonalised: every direction of a matrix moves equally far.

Sources: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the match of
AdamW's root mean square from Liu et al. 2025 (arXiv 2502.16982).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ..layouts import tree
from ..layouts.sharded import ShardedTensor
from ..layouts.tree import Mask
from .base import Schedule, Transform, zeros_like
from .flat import Active, elementwise, here
from .many import Many
from .numbers import check
from .orthogonal import COEFFICIENTS, Fold, default_fold, newton_schulz, on_whole_matrices
from .recipe import recipe
from .sgd import trace
from .sums import together

Match = Literal["spectral", "adamw", "none"]


def scale_by_muon(
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    steps: int = 5,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = 1e-7,
    match: Match = "spectral",
    weights: Literal["in out", "out in"] = "in out",
    fold: Callable[[str, Any], Fold] | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
) -> Transform:
    """The running sum of gradients, orthogonalised as whole matrices; see `muon`."""
    check("muon", momentum=momentum, eps=eps)

    def init(params: Any) -> dict[str, Any]:
        return {"mu": zeros_like(params)}

    def kernel(s: Any, _: Any, g: Many, mu: Many) -> tuple[Many, ...]:
        return trace(g, mu, s.momentum, nesterov)

    def orthogonal(x: Tensor) -> Tensor:
        y = x if dtype is None else x.to(dtype)
        least = here({"eps": eps}, x.device).eps
        return newton_schulz(y, steps=steps, coefficients=coefficients, eps=least).to(x.dtype)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        with torch.no_grad():
            moves, mu = elementwise(
                kernel,
                [grads, state["mu"]],
                params,
                olds=[None, 1],
                scalars={"momentum": momentum},
            )
            # A matrix without elements moves nowhere.
            active = Active(params, tree.map(lambda m: m if m.numel() else None, moves))
            folds = [_fold(path, p) for path, p in zip(active.paths, active.params, strict=True)]
            done = on_whole_matrices(orthogonal, active.grads, folds)
            lengths = [_length(x, f) for x, f in zip(done, folds, strict=True)]
            scaled = [
                together(lambda t, k=k: t * k, x, x) for x, k in zip(done, lengths, strict=True)
            ]
            return active.tree(scaled), {"mu": mu}

    def _fold(path: str, p: ShardedTensor) -> Fold:
        if p.ndim < 2:
            raise ValueError(
                f"muon: {path} is {p}, no matrix; give it another optimizer:\n"
                f'optim.multi({{"{path}": optim.adamw(lr), "*": optim.muon(lr)}})'
            )
        found = default_fold(p) if fold is None else fold(path, p)
        if found[0] < 0 or found[1] < 1 or found[0] + found[1] >= p.ndim:
            raise ValueError(
                f"muon: fold gave {found[0]} batch and {found[1]} row dims for {path}, which has "
                f"{p.ndim} dims: none is left for the columns"
            )
        return found

    def _length(x: ShardedTensor, found: Fold) -> float:
        batch, rows = found
        r = math.prod(x.shape[batch : batch + rows])
        c = math.prod(x.shape[batch + rows :])
        fan_out, fan_in = (c, r) if weights == "in out" else (r, c)
        return {
            "spectral": math.sqrt(max(1.0, fan_out / fan_in)),
            "adamw": 0.2 * math.sqrt(max(r, c)),
            "none": 1.0,
        }[match]

    return Transform("scale_by_muon", init, update, "matrix")


def muon(
    lr: Schedule,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    mask: Mask | None = None,
    steps: int = 5,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = 1e-7,
    match: Match = "spectral",
    weights: Literal["in out", "out in"] = "in out",
    fold: Callable[[str, Any], Fold] | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
) -> Transform:
    """Muon, for the matrices of hidden layers; vectors, embeddings and heads want another one.

    Args:
        lr: learning rate, or a schedule of the step.
        momentum: how much of the running sum is kept.
        nesterov: whether the gradient is added once more ahead.
        weight_decay: times lr and the parameter.
        mask: which parameters decay; None is all.
        steps: Newton-Schulz steps.
        coefficients: of their quintic.
        eps: least norm of a matrix.
        match: how long an update is: "spectral" sqrt(max(1, fan out / fan in)), "adamw" 0.2 *
            sqrt(larger side), "none" 1.
        weights: whether a matrix is [in, out], as in `nn.dense`, or [out, in], as in torch.nn.
        fold: (path, leaf) -> (number of batch dims, number of row dims); None takes the last two
            dims as the matrix, so that stacked layers are matrices of their own.
        dtype: in which matrices are multiplied; None is the parameter's.

    State: step; mu, with the parameters' layouts.

    Cost: matrices that are cut are shared out: two all_to_alls of the local blocks for all matrices
    of one shape and layout together, or one all_gather for one or two matrices; then 15 matrix
    products each.

    Raises:
        ValueError: for a parameter that is no matrix.

    >>> import shardwise as sw
    >>> p = {"w": sw.full((4, 4), 1.0, sw.make_mesh({"data": 2}), "a/data b")}
    >>> opt = muon(0.1)
    >>> opt.step(p, opt.init(p), p)[0]["w"]
    f32[4/data 4] local[2 4] on mesh(data=2)
    """
    direction = scale_by_muon(
        momentum=momentum,
        nesterov=nesterov,
        steps=steps,
        coefficients=coefficients,
        eps=eps,
        match=match,
        weights=weights,
        fold=fold,
        dtype=dtype,
    )
    return recipe("muon", direction, lr, weight_decay, mask)
