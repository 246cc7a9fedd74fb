"""One contraction of two local tensors, as a matmul of permuted, reshaped views.

Dims are named by letters. Pure torch: knows nothing of meshes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

Letters = tuple[str, ...]


@cache
def pair(a: Letters, b: Letters, out: Letters) -> tuple[Letters, Letters, Letters, Letters]:
    """Letters of a two-operand contraction: batch, only in a, only in b, contracted."""
    batch = tuple(x for x in out if x in a and x in b)
    left = tuple(x for x in out if x in a and x not in b)
    right = tuple(x for x in out if x in b and x not in a)
    inner = tuple(x for x in a if x in b and x not in out)
    return batch, left, right, inner


def contract(a: Tensor, b: Tensor, da: Letters, db: Letters, out: Letters) -> Tensor:
    """One contraction of two local tensors; letters name the dims."""
    a, da = summed(a, da, (*db, *out))
    b, db = summed(b, db, (*da, *out))
    batch, left, right, inner = pair(da, db, out)
    if not inner and not left and not right:
        first, second = (
            x.permute([have.index(c) for c in batch]) for x, have in ((a, da), (b, db))
        )
        return _ordered(first * second, batch, out)
    first, second = lowered(a, b, da, db, out)
    return raised(first @ second, da, db, out, sizes(a, b, da, db))


def sizes(a: Tensor, b: Tensor, da: Letters, db: Letters) -> dict[str, int]:
    """Size of each letter."""
    return dict(zip(da, a.shape, strict=True)) | dict(zip(db, b.shape, strict=True))


def lowered(a: Tensor, b: Tensor, da: Letters, db: Letters, out: Letters) -> tuple[Tensor, Tensor]:
    """The operands as [batch, left, inner] and [batch, inner, right], whose product it is.

    Without batch letters they have two dims: torch would run a batch of one, or of the leading dims
    of a larger operand, as such.
    """
    batch, left, right, inner = pair(da, db, out)
    size = sizes(a, b, da, db)

    def flat(x: Tensor, have: Letters, *groups: Letters) -> Tensor:
        order = [have.index(c) for group in groups for c in group]
        x = x.permute(order) if order != sorted(order) else x
        return x.reshape([math.prod(size[c] for c in group) for group in groups])

    ahead = (batch,) if batch else ()
    return flat(a, da, *ahead, left, inner), flat(b, db, *ahead, inner, right)


def raised(
    product: Tensor, da: Letters, db: Letters, out: Letters, size: Mapping[str, int]
) -> Tensor:
    """The product of what `lowered` made, with its dims as the letters of `out`."""
    batch, left, right, _ = pair(da, db, out)
    made = (*batch, *left, *right)
    return _ordered(product.reshape([size[c] for c in made]), made, out)


def product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """x @ y, two or three dims, in this dtype: not rounded to the operands' first."""
    if x.dtype == dtype:
        return x @ y
    if _widens(x, dtype):
        return (torch.mm if x.ndim == 2 else torch.bmm)(x, y, out_dtype=dtype)
    return x.to(dtype) @ y.to(dtype)


def added(total: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """total + x @ y in the dtype of the total, in place where one kernel does that."""
    if total.dtype == x.dtype:
        return (torch.addmm if x.ndim == 2 else torch.baddbmm)(total, x, y, out=total)
    return total.add_(product(x, y, total.dtype))


def _widens(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether a matmul's kernel can leave its float32 sum of half-precision terms unrounded."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return half and dtype == torch.float32 and x.device.type in ("cuda", "meta")


def _ordered(x: Tensor, made: Letters, out: Letters) -> Tensor:
    return x if made == out else x.permute([made.index(c) for c in out])


def summed(x: Tensor, have: Letters, used: Letters) -> tuple[Tensor, Letters]:
    """Sum out the letters that nothing else has."""
    alone = [i for i, c in enumerate(have) if c not in used]
    if not alone:
        return x, have
    return x.sum(alone), tuple(c for c in have if c in used)
