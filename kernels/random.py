"""Random numbers by key and place, and dropout whose mask is never stored.

Philox4x32-10 makes four 32-bit words of a key (64 bits) and a counter (128 bits). The element at
(row, column) of the GLOBAL tensor, row being the flat index of all dims but the last, takes

    word column % 4 of the counter (column // 4, row, 0, salt)

so a block of the tensor is made where it lies: `shape` and `start` say where that is. Trailing dims
of global size 1 do not count. The bits are those of `meshlib/philox.py`.

    uniform    u = (word >> 8) 2^-24,   low + (high - low) u      in float32, rounded once
    mask       word >> 8 < below                                  true with probability below 2^-24
    dropout    y = x scale where the mask is true, else x 0

Dropout is linear in x, so its derivative is itself on the gradient, with the same key: backward
makes the mask again, at two bytes read and two written an element.

A key is an int64 tensor [2] of its two words, an input like any other: one compiled step serves all
keys. Dropout also takes it as a number, `seed`, which costs no copy to the device.
"""

from __future__ import annotations

import functools
import math
import struct
from typing import Any

import torch
from torch import Tensor

from .registry import define

WORD = 2**32 - 1
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # of counter words 0 and 2
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # added to the key after each round
ROUND_STEPS = [[i * step for step in KEY_STEPS] for i in range(ROUNDS)]
STEP = 2**16  # counters at a time in plain torch, so that they stay in the cache

Place = tuple[tuple[tuple[int, int], ...], int, int, int]
Ints = tuple[int, ...]


def seed_of(words: tuple[int, int]) -> int:
    """The key's words as one signed number, low word first.

    >>> seed_of((1, 0)), seed_of((0, 2**31))
    (1, -9223372036854775808)
    """
    number = words[0] | words[1] << 32
    return number - (1 << 64 if number >> 63 else 0)


def key_of(seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The key tensor of such a number.

    >>> key_of(seed_of((3, 2**32 - 1)))
    tensor([         3, 4294967295])
    """
    return torch.tensor([seed & WORD, seed >> 32 & WORD], device=device)


def level(p: float) -> int:
    """`below` of a probability: p as float32, rounded up to a multiple of 2^-24.

    >>> level(0.5), level(1.0)
    (8388608, 16777216)
    """
    (rounded,) = struct.unpack("f", struct.pack("f", p))
    return math.ceil(rounded * 2**24)


@functools.lru_cache(maxsize=4096)
def place(shape: Ints, start: Ints, size: Ints) -> Place:
    """Where the rows and columns of a block lie in the global tensor.

    Args:
        shape: of the global tensor.
        start: global index of the block's first element.
        size: of the block; leading dims beyond those of `shape` see the same numbers.

    Returns:
        ((rows, step), ...) from the outermost dim in, what can be merged is; the first row; the
        first column; columns of the block.

    >>> place((4, 6, 8), (2, 0, 0), (2, 6, 8))
    (((12, 1),), 12, 0, 8)
    >>> place((4, 6, 8), (0, 3, 4), (4, 3, 4))
    (((4, 6), (3, 1)), 3, 4, 4)
    """
    extra = len(size) - len(shape)
    last = len(shape) - 1
    while last > 0 and shape[last] == 1:
        last -= 1
    levels: list[tuple[int, int]] = []
    first, step = 0, 1
    for i in range(last - 1, -1, -1):
        _outer(levels, size[extra + i], step)
        first += start[i] * step
        step *= shape[i]
    for i in range(extra - 1, -1, -1):
        _outer(levels, size[i], 0)
    if not shape:
        return tuple(levels), 0, 0, 1
    return tuple(levels), first, start[last], size[extra + last]


def _outer(levels: list[tuple[int, int]], count: int, step: int) -> None:
    """Put a dim before the others, into the first of them where that is whole."""
    if count == 1:
        return
    if levels and levels[0][0] * levels[0][1] == step:
        levels[0] = (count * levels[0][0], levels[0][1])
    else:
        levels.insert(0, (count, step))


def philox(counter: tuple[Any, Any, Any, Any], key: Tensor) -> tuple[Any, Any, Any, Any]:
    """Four words of each counter; counter words are int64 tensors or numbers.

    >>> [hex(int(w)) for w in philox((0, 0, 0, 0), key_of(0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    steps = torch.tensor(ROUND_STEPS, device=key.device)
    for k0, k1 in zip(*((key + steps) & WORD).T.unbind(), strict=True):
        a, b = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # int64 wraps to the right bits
        c0, c2 = ((b >> 32) ^ c1 ^ k0) & WORD, ((a >> 32) ^ c3 ^ k1) & WORD
        c1, c3 = b, a  # only xored: what is above bit 31 goes in the end
    return c0, c1 & WORD, c2, c3 & WORD


def _words(key: Tensor, shape: Ints, start: Ints, size: Ints, salt: int) -> Tensor:
    """Words of a block as int64 [*size], in plain torch."""
    levels, first, column, width = place(tuple(shape), tuple(start), tuple(size))
    rows = torch.full((1,), first, dtype=torch.int64, device=key.device)
    for count, step in levels:
        inner = torch.arange(count, device=key.device) * step
        rows = (rows.unsqueeze(1) + inner).flatten()
    if not math.prod(size):
        return rows.new_empty(tuple(size))
    groups = torch.arange(column // 4, -(-(column + width) // 4), device=key.device)
    skipped = column % 4
    parts = []
    for some in rows.split(max(1, STEP // len(groups))):
        row = some.unsqueeze(1)
        words = torch.stack(philox((groups, row & WORD, row >> 32, salt), key), -1)
        parts.append(words.flatten(1)[:, skipped : skipped + width])
    return torch.cat(parts).reshape(tuple(size))


def _words_twin(key: Tensor, shape: Ints, start: Ints, size: Ints, salt: int) -> Tensor:
    return _words(key, shape, start, size, salt).contiguous()


def _uniform(
    key: Tensor, shape: Ints, start: Ints, size: Ints, salt: int, low: float, high: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    values = (_words(key, shape, start, size, salt) >> 8).to(torch.float32) * 2.0**-24
    return (values * (high - low) + low).to(dtype).contiguous()


def _mask(key: Tensor, shape: Ints, start: Ints, size: Ints, salt: int, below: int) -> Tensor:
    return (_words(key, shape, start, size, salt) >> 8 < below).contiguous()


def _dropout(
    x: Tensor, key: Tensor | None, seed: int, shape: Ints, start: Ints, below: int, scale: float
) -> Tensor:
    key = key_of(seed, x.device) if key is None else key
    size = x.shape[x.ndim - len(shape) :]  # what lies before them shares the mask
    kept = _mask(key, shape, start, size, 0, below)
    return (x * kept.to(x.dtype) * scale).contiguous()


def _derived(key: Tensor, c0: int, c1: int, c2: int, c3: int) -> Tensor:
    return torch.stack(philox((c0, c1, c2, c3), key)[:2], -1)


def _backward(
    grad_y: Tensor | None, key: Tensor | None, seed: int, shape: Ints, start: Ints, below: int,
    scale: float,
) -> tuple[Tensor | None, None]:  # fmt: skip
    if grad_y is None:
        return None, None
    return dropout(grad_y, key, seed, shape, start, below, scale), None


def _dropout_vmap(info: Any, dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    """A batch of x with one key: one more leading dim, which shares the mask."""
    x, key = args[:2]
    if dims[1] is None:
        return dropout(x.movedim(dims[0], 0), key, *args[2:]), 0
    xs = [x if dims[0] is None else x.select(dims[0], i) for i in range(info.batch_size)]
    keys = key.movedim(dims[1], 0)
    return torch.stack([dropout(a, k, *args[2:]) for a, k in zip(xs, keys, strict=True)]), 0


def _each_key(op: Any) -> Any:
    """The rule for vmap of an op whose one tensor is a key: a call for each."""

    def rule(info: Any, dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        keys = args[0].movedim(dims[0], 0)
        return torch.stack([op()(key, *args[1:]) for key in keys]), 0

    return rule


def _empty(key: Tensor, size: Ints, dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(size), dtype=dtype, device=key.device)


random_words = define(
    "random_words(Tensor key, int[] shape, int[] start, int[] size, int salt) -> Tensor words",
    twin=_words_twin,
    cuda="random_triton:words",
    fake=lambda key, shape, start, size, salt: _empty(key, size, torch.int64),
    vmap=_each_key(lambda: random_words),
)

random_uniform = define(
    "random_uniform(Tensor key, int[] shape, int[] start, int[] size, int salt, float low,"
    " float high, ScalarType dtype) -> Tensor y",
    twin=_uniform,
    cuda="random_triton:uniform",
    fake=lambda key, shape, start, size, salt, low, high, dtype: _empty(key, size, dtype),
    vmap=_each_key(lambda: random_uniform),
)

random_mask = define(
    "random_mask(Tensor key, int[] shape, int[] start, int[] size, int salt, int below)"
    " -> Tensor mask",
    twin=_mask,
    cuda="random_triton:mask",
    fake=lambda key, shape, start, size, salt, below: _empty(key, size, torch.bool),
    vmap=_each_key(lambda: random_mask),
)

random_key = define(
    "random_key(Tensor key, int c0, int c1, int c2, int c3) -> Tensor derived",
    twin=_derived,
    cuda="random_triton:derived",
    fake=lambda key, c0, c1, c2, c3: torch.empty_like(key),
    vmap=_each_key(lambda: random_key),
)

dropout = define(
    "dropout(Tensor x, Tensor? key, int seed, int[] shape, int[] start, int below, float scale)"
    " -> Tensor y",
    twin=_dropout,
    cuda="random_triton:dropout",
    backward=_backward,
    fake=lambda x, key, seed, shape, start, below, scale: torch.empty(
        x.shape, dtype=x.dtype, device=x.device
    ),
    vmap=_dropout_vmap,
)
