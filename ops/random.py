"""Random tensors: values depend on the key and the GLOBAL index only.

The same key gives the same initial weights and the same dropout mask on every mesh and every
layout, on CPU and GPU: each device computes its own block (`meshlib/philox.py`). Keys are explicit;
a key is used once, then split or folded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layouts.layout import LayoutLike, make, resolve
from ..layouts.place import from_callback
from ..layouts.sharded import ShardedTensor
from ..meshlib import philox
from ..meshlib.mesh import Mesh


class PaddedShape(tuple[int, ...]):
    """A shape whose dims are rounded up from `true` ones.

    Drawn values are those of the true shape, wherever they lie; beyond it they are zero.

    >>> shape = PaddedShape((4, 6), true=(3, 5))
    >>> shape, shape.true
    ((4, 6), (3, 5))
    """

    true: tuple[int, ...]

    def __new__(cls, sizes: Iterable[int], *, true: Iterable[int]) -> PaddedShape:
        """The shape `sizes`, of which `true` is the part that is no padding."""
        made = super().__new__(cls, sizes)
        made.true = tuple(true)
        return made


@dataclass(frozen=True)
class Key:
    """A random key of 64 bits; a leaf of trees, kept in checkpoints."""

    words: tuple[int, int]

    def __str__(self) -> str:
        return f"key({self.words[0]:08x}{self.words[1]:08x})"


def key(seed: int) -> Key:
    """The key of a seed.

    >>> from shardwise import random
    >>> random.key(0) == random.key(0), random.key(0) == random.key(1)
    (True, False)
    """
    return Key(philox.seed(seed))


def split(key: Key, n: int) -> list[Key]:
    """`n` keys that are independent of each other and of `key`."""
    return [Key(words) for words in philox.split(key.words, n)]


def fold_in(key: Key, data: int | str) -> Key:
    """A key made from a key and a number or a name: a step, a layer, a parameter's path."""
    return Key(philox.fold_in(key.words, data))


def _fill(
    draw: Callable[..., Tensor],
    key: Key,
    shape: Sequence[int],
    mesh: Mesh,
    layout: LayoutLike,
    dtype: torch.dtype | None,
    **options: Any,
) -> ShardedTensor:
    """A tensor whose every block is drawn where it lies."""
    size = tuple(int(n) for n in shape)
    true = shape.true if isinstance(shape, PaddedShape) else size
    kind = dtype or torch.get_default_dtype()

    def block(index: tuple[slice, ...]) -> Tensor:
        inside = tuple(
            slice(min(part.start, n), min(part.stop, n))
            for part, n in zip(index, true, strict=True)
        )
        drawn = draw(key.words, true, inside, dtype=kind, device=mesh.device, **options)
        if inside == index:
            return drawn
        padded = drawn.new_zeros([part.stop - part.start for part in index])
        padded[tuple(slice(n) for n in drawn.shape)] = drawn
        return padded

    return from_callback(
        block,
        size,
        mesh,
        resolve(layout, len(size), None, size, mesh),
        dtype=kind,
    )


def normal(
    key: Key,
    shape: Sequence[int],
    mesh: Mesh,
    layout: LayoutLike = "...",
    *,
    mean: float = 0.0,
    std: float = 1.0,
    dtype: torch.dtype | None = None,
) -> ShardedTensor:
    """Normal numbers, equal on every mesh.

    >>> import shardwise as sw
    >>> one, four = sw.make_mesh({"data": 1}), sw.make_mesh({"data": 4})
    >>> draw = lambda mesh: sw.random.normal(sw.random.key(7), (8, 3), mesh, "n/data d")
    >>> bool((draw(one).full_tensor() == draw(four).full_tensor()).all())
    True
    """
    return _fill(philox.normal, key, shape, mesh, layout, dtype, mean=mean, std=std)


def truncated_normal(
    key: Key,
    shape: Sequence[int],
    mesh: Mesh,
    layout: LayoutLike = "...",
    *,
    mean: float = 0.0,
    std: float = 1.0,
    dtype: torch.dtype | None = None,
) -> ShardedTensor:
    """Normal numbers no further than two deviations from the mean."""
    return _fill(philox.truncated_normal, key, shape, mesh, layout, dtype, mean=mean, std=std)


def uniform(
    key: Key,
    shape: Sequence[int],
    mesh: Mesh,
    layout: LayoutLike = "...",
    *,
    low: float = 0.0,
    high: float = 1.0,
    dtype: torch.dtype | None = None,
) -> ShardedTensor:
    """Uniform numbers in [low, high)."""
    return _fill(philox.uniform, key, shape, mesh, layout, dtype, low=low, high=high)


def randint(
    key: Key,
    shape: Sequence[int],
    mesh: Mesh,
    layout: LayoutLike = "...",
    *,
    low: int = 0,
    high: int,
    dtype: torch.dtype = torch.int64,
) -> ShardedTensor:
    """Integers in [low, high)."""
    return _fill(philox.randint, key, shape, mesh, layout, dtype, low=low, high=high)


def bernoulli(
    key: Key, shape: Sequence[int], mesh: Mesh, layout: LayoutLike = "...", *, p: float = 0.5
) -> ShardedTensor:
    """True with probability `p`."""
    return _fill(philox.bernoulli, key, shape, mesh, layout, torch.bool, p=p)


def _where(x: ShardedTensor) -> LayoutLike:
    """The layout of values drawn beside `x`: cut as it is, equal elsewhere."""
    return make(x.layout.dims)


def normal_like(key: Key, x: ShardedTensor) -> ShardedTensor:
    """Standard normal numbers with the shape, cut dims and dtype of `x`."""
    return normal(key, x.shape, x.mesh, _where(x), dtype=x.dtype)


def categorical(key: Key, logits: ShardedTensor, *, classes: int | None = None) -> ShardedTensor:
    """One class per row, drawn with probabilities softmax(logits); the last dim, which may be cut.

    Gumbel's maximum: every device draws the noise of its own classes; one draw for all devices.

    Args:
        key: used once.
        logits: [..., classes].
        classes: true width of padded logits: no other class is drawn, and the draws are those
            without padding.

    >>> import torch, shardwise as sw
    >>> logits = sw.shard(torch.tensor([[0.0, 100.0]]), sw.make_mesh({"tensor": 2}), "b v/tensor")
    >>> sw.random.categorical(sw.random.key(0), logits).full_tensor()
    tensor([1])
    """
    true = (*logits.shape[:-1], logits.shape[-1] if classes is None else classes)
    tiny = torch.finfo(torch.float64).tiny

    def gumbel(index: tuple[slice, ...]) -> Tensor:
        """The noise of a block; -inf in padding, whose logits then do not count."""
        inside = (
            *index[:-1],
            slice(*(min(i, true[-1]) for i in (index[-1].start, index[-1].stop))),
        )
        u = philox.uniform(key.words, true, inside, dtype=torch.float64, device=logits.device)
        noise = -torch.log(-torch.log(u + tiny) + tiny)
        width = index[-1].stop - index[-1].start
        return torch.nn.functional.pad(noise, (0, width - noise.shape[-1]), value=-math.inf)

    noise = from_callback(gumbel, logits.shape, logits.mesh, _where(logits), dtype=torch.float64)
    return torch.argmax(logits.to(torch.float64) + noise, -1)  # pyright: ignore


def permutation(key: Key, n: int) -> Tensor:
    """A random order of 0 ... n-1, equal in every process."""
    words = philox.uniform(key.words, (n,), (slice(0, n),), dtype=torch.float64)
    return torch.argsort(words, stable=True)
