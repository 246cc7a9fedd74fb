"""Random tensors: values depend on the key and the GLOBAL index only.

The same key gives the same initial weights and the same dropout mask on every mesh and every
layout, on CPU and GPU: each device computes its own block (`meshlib/philox.py`). Keys are explicit;
a key is used once, then split or folded.

A key that is an argument of a `jit`ted function is data there: one program serves all keys.

On a GPU uniform numbers and masks come from a kernel; so does dropout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels import random as kernels
from ..layouts.layout import LayoutLike, make, resolve
from ..layouts.place import from_callback
from ..layouts.sharded import ShardedTensor
from ..meshlib import philox
from ..meshlib.mesh import Mesh
from .keys import Key as Key
from .keys import drawable, sent, tensor_of
from .keys import key as key


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


def split(key: Key, n: int) -> list[Key]:
    """`n` keys that are independent of each other and of `key`."""
    if key.data is None:
        return [Key(words) for words in philox.split(key.words, n)]
    return [Key(kernels.random_key(key.data, *philox.split_counter(i))) for i in range(n)]


def fold_in(key: Key, data: int | str) -> Key:
    """A key made from a key and a number or a name: a step, a layer, a parameter's path."""
    if key.data is None:
        return Key(philox.fold_in(key.words, data))
    return Key(kernels.random_key(key.data, *philox.fold_counter(data)))


def _key_of(key: Key, device: torch.device) -> Any:
    """What `philox` takes: the words of a key, or a source of words where it is data."""
    if key.data is None:
        return key.words
    data = sent(key.data, device)

    def source(shape: Any, start: Any, size: Any, salt: int) -> Tensor:
        return kernels.random_words(data, shape, start, size, salt)

    return source


# One block each: (key, global shape, its index, dtype, device, options). What a kernel makes it
# makes on a GPU, and where the key is data: there plain torch would be a hundred lines of program.


def _plain(
    draw: Callable[..., Tensor], key: Key, *place: Any, device: torch.device, **options: Any
) -> Tensor:
    return draw(_key_of(key, device), *place, device=device, **options)


def _by_kernel(key: Key, device: torch.device) -> bool:
    return device.type == "cuda" or (key.data is not None and device.type != "meta")


def _uniform_block(
    key: Key,
    shape: tuple[int, ...],
    index: tuple[slice, ...],
    *,
    low: float = 0.0,
    high: float = 1.0,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    if dtype not in _ROUNDED or not _by_kernel(key, device):
        return _plain(
            philox.uniform, key, shape, index, low=low, high=high, dtype=dtype, device=device
        )
    start, size = _start_and_size(index)
    return kernels.random_uniform(tensor_of(key, device), shape, start, size, 0, low, high, dtype)


def _bernoulli_block(
    key: Key,
    shape: tuple[int, ...],
    index: tuple[slice, ...],
    *,
    p: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    if not _by_kernel(key, device):
        return philox.bernoulli(_key_of(key, device), shape, index, p=p, dtype=dtype, device=device)
    start, size = _start_and_size(index)
    return kernels.random_mask(tensor_of(key, device), shape, start, size, 0, kernels.level(p))


def dropped(
    x: Tensor, key: Key, rate: float, shape: tuple[int, ...], start: tuple[int, ...]
) -> Tensor:
    """Dropout of the block of a tensor of this shape that begins at `start`."""
    seed = 0 if key.data is not None else kernels.seed_of(key.words)
    data = None if key.data is None else sent(key.data, x.device)
    below, scale = kernels.level(1 - rate), 1 / (1 - rate)
    return kernels.dropout(x, data, seed, shape, start, below, scale)


_NORMAL, _TRUNCATED, _RANDINT = (
    partial(_plain, draw) for draw in (philox.normal, philox.truncated_normal, philox.randint)
)
_ROUNDED = (torch.float32, torch.bfloat16, torch.float16)  # float64 takes more words


def _start_and_size(index: tuple[slice, ...]) -> tuple[list[int], list[int]]:
    return [part.start for part in index], [part.stop - part.start for part in index]


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
    key = drawable(key)

    def block(index: tuple[slice, ...]) -> Tensor:
        inside = tuple(
            slice(min(part.start, n), min(part.stop, n))
            for part, n in zip(index, true, strict=True)
        )
        drawn = draw(key, true, inside, dtype=kind, device=mesh.device, **options)
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
    return _fill(_NORMAL, key, shape, mesh, layout, dtype, mean=mean, std=std)


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
    return _fill(
        _TRUNCATED,
        key,
        shape,
        mesh,
        layout,
        dtype,
        mean=mean,
        std=std,
    )


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
    return _fill(_uniform_block, key, shape, mesh, layout, dtype, low=low, high=high)


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
    return _fill(_RANDINT, key, shape, mesh, layout, dtype, low=low, high=high)


def bernoulli(
    key: Key, shape: Sequence[int], mesh: Mesh, layout: LayoutLike = "...", *, p: float = 0.5
) -> ShardedTensor:
    """True with probability `p`."""
    return _fill(_bernoulli_block, key, shape, mesh, layout, torch.bool, p=p)


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
    key = drawable(key)

    def gumbel(index: tuple[slice, ...]) -> Tensor:
        """The noise of a block; -inf in padding, whose logits then do not count."""
        inside = (
            *index[:-1],
            slice(*(min(i, true[-1]) for i in (index[-1].start, index[-1].stop))),
        )
        u = _plain(philox.uniform, key, true, inside, dtype=torch.float64, device=logits.device)
        noise = -torch.log(-torch.log(u + tiny) + tiny)
        width = index[-1].stop - index[-1].start
        return torch.nn.functional.pad(noise, (0, width - noise.shape[-1]), value=-math.inf)

    noise = from_callback(gumbel, logits.shape, logits.mesh, _where(logits), dtype=torch.float64)
    return torch.argmax(logits.to(torch.float64) + noise, -1)  # pyright: ignore


def permutation(key: Key, n: int) -> Tensor:
    """A random order of 0 ... n-1, equal in every process."""
    key = drawable(key)
    device = torch.device("cpu") if key.data is None else key.data.device
    place = ((n,), (slice(0, n),))
    words = _plain(philox.uniform, key, *place, dtype=torch.float64, device=device)
    return torch.argsort(words, stable=True)
