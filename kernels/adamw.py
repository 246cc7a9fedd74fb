"""AdamW on many tensors at once, with optional stochastic rounding of bfloat16 parameters.

With g a gradient, p its parameter, m and v the running means, and three factors of the step

    m' = m + (1 - b1) (g - m)
    v' = b2 v + (1 - b2) g^2
    p' = kept p + rate m' / (sqrt(v') / root + eps)

where root = sqrt(1 - b2^count), rate = -lr / (1 - b1^count) and kept = 1 - lr * decay. All of it is
float32 (float64 for float64); m', v' and p' are rounded once, and p' is made of the unrounded m'
and v'. The factors are a tensor, so that nothing waits for a step number or a learning rate.

Stochastic rounding adds 16 random bits below the last place of a bfloat16 and cuts them off. The
bits are the upper half of the Philox words that `meshlib/philox.py` gives the element's place in
the GLOBAL tensor, so the result is the same on every mesh. A leaf's key is folded from the step and
from the leaf's name where the step number lies: `adamw_keys`.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from .random import WORD, philox, place
from .registry import define

NUMBERS = 8  # of a place: first row, first column, width, n1, n2, step0, step1, step2
LEVELS = 3
FOLD_NUMBER, FOLD_NAME = 3 * 2**30 + 1, 3 * 2**30 + 2  # salts of keys that are made from keys
Lists = tuple[list[Tensor], list[Tensor], list[Tensor]]


@functools.lru_cache(maxsize=4096)
def name_words(name: str) -> tuple[int, int, int]:
    """The three words that stand for a leaf's name when it is folded into a key."""
    digest = hashlib.blake2b(name.encode(), digest_size=12).digest()
    a, b, c = struct.unpack("<3I", digest)
    return a, b, c


@functools.lru_cache(maxsize=4096)
def numbers(
    shape: tuple[int, ...], start: tuple[int, ...], size: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Where a block lies in its global tensor, as the eight numbers that `adamw` takes.

    Args:
        shape: of the global tensor.
        start: global index of the block's first element.
        size: of the block.

    Returns:
        First row, first column, columns of the block; then the rows of its middle and inner level
        and the steps of all three, for row r the global first + r // (n1 n2) step0
        + r // n2 % n1 step1 + r % n2 step2. None for what has more levels or 2^32 rows.

    >>> numbers((4, 6, 8), (0, 3, 4), (4, 3, 4))
    (3, 4, 4, 4, 3, 0, 6, 1)
    """
    levels, first, column, width = place(shape, start, size)
    rows = 1
    for n in shape[:-1]:
        rows *= n
    if len(levels) > LEVELS or rows >= 2**32:
        return None
    (_, s0), (n1, s1), (n2, s2) = ((1, 0),) * (LEVELS - len(levels)) + levels
    return first, column, width, n1, n2, s0, s1, s2


def _bits(key: Tensor, at: Sequence[int], numel: int) -> Tensor:
    """16 random bits for each element of a flat block, as int32."""
    first, column, width, n1, n2, s0, s1, s2 = at
    e = torch.arange(numel, device=key.device)
    r, c = e // width, e % width + column
    row = first + r // (n1 * n2) * s0 + r // n2 % n1 * s1 + r % n2 * s2
    words = torch.stack(philox((c // 4, row & WORD, row >> 32, 0), key), -1)
    return (words.gather(-1, (c % 4)[:, None])[:, 0] >> 16).to(torch.int32)


def _rounded(x: Tensor, bits: Tensor) -> Tensor:
    moved = (x.view(torch.int32) + bits).bitwise_and(-65536).view(torch.float32)
    return torch.where(torch.isfinite(x), moved, x)


def _adamw(
    params: list[Tensor], grads: list[Tensor], mu: list[Tensor], nu: list[Tensor],
    factors: Tensor, b1: float, b2: float, eps: float, keys: Tensor | None, places: Sequence[int],
) -> Lists:  # fmt: skip
    out: Lists = ([], [], [])
    for i, (p, g, m, v) in enumerate(zip(params, grads, mu, nu, strict=True)):
        wide = torch.float64 if torch.float64 in (p.dtype, m.dtype, v.dtype) else torch.float32
        root, rate, kept = factors.to(wide).unbind()
        grad, old = g.to(wide), p.to(wide)
        mean = m.to(wide).lerp(grad, 1 - b1)
        square = (v.to(wide) * b2).addcmul(grad, grad, value=1 - b2)
        new = old * kept + mean / (square.sqrt() / root + eps) * rate
        if keys is not None and p.dtype == torch.bfloat16:
            at = places[NUMBERS * i : NUMBERS * (i + 1)]
            new = _rounded(new, _bits(keys[i], at, p.numel()).view(p.shape))
        for column, value, like in zip(out, (new, mean, square), (p, m, v), strict=True):
            column.append(value.to(like.dtype, copy=True).contiguous())
    return out


def _like(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors]


def _keys(key: Tensor, step: Tensor, names: Tensor) -> Tensor:
    number = step.to(torch.int64)
    now = torch.stack(philox((number & WORD, number >> 32 & WORD, 0, FOLD_NUMBER), key)[:2], -1)
    a, b, c = names.unbind(-1)
    return torch.stack(philox((a, b, c, FOLD_NAME), now)[:2], -1)


adamw = define(
    "adamw(Tensor[] params, Tensor[] grads, Tensor[] mu, Tensor[] nu, Tensor factors, float b1,"
    " float b2, float eps, Tensor? keys, int[] places)"
    " -> (Tensor[] new_params, Tensor[] new_mu, Tensor[] new_nu)",
    twin=_adamw,
    cuda="adamw_triton:adamw",
    fake=lambda params, grads, mu, nu, *rest: (_like(params), _like(mu), _like(nu)),
)

adamw_keys = define(
    "adamw_keys(Tensor key, Tensor step, Tensor names) -> Tensor keys",
    twin=_keys,
    cuda="adamw_triton:adamw_keys",
    fake=lambda key, step, names: key.new_empty((names.shape[0], 2)),
)
