"""Whole matrices on the devices: orthogonalise matrices that are cut, by sharing them out.

Matrices of one shape and layout are stacked; one all_to_all per axis that cuts them gives each
device some whole matrices instead of a block of every one; it works on its own, and another
all_to_all brings the blocks back. One or two matrices are gathered instead, which is cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layouts.layout import make
from ..layouts.reshard import reshard_one
from ..layouts.sharded import ShardedTensor, make_type
from .sums import together

Fold = tuple[int, int]  # leading batch dims, then dims of the matrix's rows
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(
    x: Tensor,
    *,
    steps: int = 5,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = 1e-7,
) -> Tensor:
    """Matrices [..., r, c] with their singular values moved to about 1, in their own dtype.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; a quintic
    iteration with the steepest slope at 0 that still keeps values in about 0.7 ... 1.2.

    Cost: per step 2 min(r, c)^2 max(r, c) + min(r, c)^3 multiplications.

    >>> x = newton_schulz(torch.diag(torch.tensor([3.0, 1.0])))
    >>> bool((torch.linalg.svdvals(x) - 1).abs().max() < 0.35)
    True
    """
    a, b, c = coefficients
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def on_whole_matrices(
    f: Callable[[Tensor], Tensor], leaves: Sequence[ShardedTensor], folds: Sequence[Fold]
) -> list[ShardedTensor]:
    """A function of batches of matrices on leaves of any layout; shapes and layouts are kept.

    Args:
        f: [batch, rows, cols] to the same shape, each matrix on its own.
        leaves: [batch ..., rows ..., cols ...].
        folds: per leaf, the numbers of batch dims and of row dims.

    Cost: per shape and layout, for each axis that cuts rows or columns, two all_to_alls of the
    local blocks; for one or two matrices an all_gather. Axes that cut batch dims cost nothing.
    """
    out: list[Any] = [None] * len(leaves)
    groups: dict[Any, list[int]] = {}
    for i, (x, fold) in enumerate(zip(leaves, folds, strict=True)):
        groups.setdefault((x._type, fold), []).append(i)
    for (_, fold), members in groups.items():
        for i, y in zip(members, _one_group(f, [leaves[i] for i in members], fold), strict=True):
            out[i] = y
    return out


def _one_group(f: Any, leaves: Sequence[ShardedTensor], fold: Fold) -> list[ShardedTensor]:
    kind = leaves[0]._type
    batch, dims = fold[0], kind.layout.dims
    over = tuple(a for axes in dims[:batch] for a in axes)
    cut = tuple(a for axes in dims[batch:] for a in axes)
    local = math.prod(kind.local_shape[:batch]) * len(leaves)  # matrices that a device has part of
    n = kind.mesh.group_size(cut)
    shared = cut and local > 2
    extra = -local % n if shared else 0

    # Dim 0 of the stack counts the devices of `over` first: another order than that of the global
    # dims, of which f does not know, undone below.
    tail = kind.local_shape[batch:]
    stacks = []
    for shards in zip(*(x._shards for x in leaves), strict=True):
        parts = [s.reshape(-1, *tail) for s in shards]
        if extra:
            parts.append(parts[0].new_zeros(extra, *tail))
        stacks.append(torch.cat(parts))
    here = make((over, *dims[batch:]))
    shape = ((local + extra) * kind.mesh.group_size(over), *kind.shape[batch:])
    stack = ShardedTensor(tuple(stacks), make_type(kind.mesh, here, shape, kind.dtype, False))
    whole = make(((*over, *cut) if shared else over, *(() for _ in tail)))
    stack = reshard_one(stack, whole)
    rows = math.prod(kind.shape[batch : batch + fold[1]])

    def matrices(s: Tensor) -> Tensor:
        return f(s.reshape(s.shape[0], rows, -1)).reshape(s.shape)

    stack = reshard_one(together(matrices, stack, stack), here)
    size = math.prod(kind.local_shape[:batch])
    results = []
    for k in range(len(leaves)):
        shards = tuple(
            s[k * size : (k + 1) * size].reshape(kind.local_shape) for s in stack._shards
        )
        results.append(
            ShardedTensor(
                shards, make_type(kind.mesh, kind.layout, kind.shape, shards[0].dtype, False)
            )
        )
    return results


def default_fold(x: ShardedTensor) -> Fold:
    """The last two dims are the matrix, all before them batch dims."""
    return x.ndim - 2, 1
