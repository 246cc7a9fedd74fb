"""Random numbers of a block that depend on a key and on global indices only.

Philox4x32-10 turns a key of 64 bits and a counter of 128 bits into four 32-bit words. It keeps no
state, so any device computes its own block and gets what one device alone would have had there:

    f(key, shape, index) == f(key, shape, whole)[index]    bit for bit, for every function below

How an element of the global tensor finds its word: drop the trailing dims of size 1 of the global
shape; the last dim left is the column, the flat index of the dims before it is the row. The element
takes word `column % 4` of the counter `(column // 4, row % 2**32, row // 2**32, salt)`. So `[N, 1]`
is drawn like `[N]`, not at four words per row; `[N, 2]` and `[N, 3]` do waste words. Columns stay
below 2**34, rows below 2**63. In Triton the words of rows below 2**32 and salt 0 are
`tl.philox(key0 | key1 << 32, column // 4, row, 0, 0)`.

Which salts (word 3 of the counter) mean what:

    [0, 2**30)         the `salt` arguments below: independent draws under one key
    salt + 2**31       low halves of 64-bit draws, which are float64 values and `randint`
    3 * 2**30 and up   keys made from keys, by `split` and `fold_in`

The word under the salt itself is always the high half, so float64 draws refine the float32 ones,
and masks and integers are the same in every dtype. Uniform values, integers and masks are exact on
every device. Normals are computed in float64 and rounded once to float32: two math libraries that
differ in the last places of a float64 change about one float32 value in 1e8, in its last place
(none of ten million between an x86 CPU and an H100).

A key that is data, in a compiled step, is given as a source of words instead (`Source`): a function
of (shape, start, size, salt), such as an op on its tensor. Nothing is written in place then.

Two functions drawn with the same key, salt and shape use the same words, so they depend on each
other: split the key, or fold something in.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox4x32-10).
"""

from __future__ import annotations

import hashlib
import math
import operator
import struct
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor

Key = tuple[int, int]
Counter = tuple[int, int, int, int]
Block = tuple[slice, ...]
Device = torch.device | str
# (global shape, start, size, salt) of a block to its words, int64 of that size. The block may go on
# beyond the last column; its first one is a multiple of four.
Source = Callable[[tuple[int, ...], tuple[int, ...], tuple[int, ...], int], Tensor]
# One tensor of words, or its high and its low halves, to values; may write into its arguments.
# All have the shape [2, 2, rows, groups]: entry [i, j] is word 2 * j + i of each counter.
Finish = Callable[..., Tensor]
Constants = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # of counter words 0 and 2
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # added to the key after each round
_WORD = 2**32 - 1

_LOW_HALF = 2**31
_SPLIT, _FOLD_INT, _FOLD_STR = (3 * 2**30 + i for i in range(3))

# Counters per step. On CPU 3 MiB of scratch, for the last-level cache: smaller steps gain less by
# locality than the calls cost. An accelerator wants few and large launches.
_STEP_CPU, _STEP_OTHER = 2**16, 2**20


# Keys


def seed(value: int) -> Key:
    """Key of a seed: its low and its high 32 bits, so different seeds are different keys.

    Args:
        value: at least 0 and below 2**64.

    Raises:
        ValueError: if the value is out of that range; it is not reduced silently.

    >>> seed(7), seed(2**32 + 1)
    ((7, 0), (1, 1))
    """
    return _halves(value, "seed")


def split(key: Key, n: int) -> list[Key]:
    """List of n keys, independent of each other and of the key; a larger n only appends.

    >>> split(seed(0), 3)[:2] == split(seed(0), 2)
    True
    """
    if n < 0:
        raise ValueError(f"split: {n} keys asked for; the number must be at least 0")
    return [_derive(key, split_counter(i)) for i in range(n)]


def split_counter(i: int) -> Counter:
    """The counter whose first two words are key i of `split`."""
    return (*_halves(i, "split"), 0, _SPLIT)


def fold_in(key: Key, data: int | str) -> Key:
    """Key made of a key and a number or a name: a step, a layer's index, a parameter's path.

    Args:
        key: the key to derive from.
        data: an integer, at least 0 and below 2**64, or any string. 1 and "1" give different keys.

    Raises:
        ValueError: if an integer is out of that range.

    >>> fold_in(seed(0), "blocks.w_up") == fold_in(seed(0), "blocks.w_down")
    False
    """
    return _derive(key, fold_counter(data))


def fold_counter(data: int | str) -> Counter:
    """The counter whose first two words are the key of `fold_in`.

    >>> fold_counter(2**32 + 5)
    (5, 1, 0, 3221225473)
    """
    if isinstance(data, str):
        digest = hashlib.blake2b(data.encode(), digest_size=12).digest()
        first, second, third = struct.unpack("<3I", digest)
        return first, second, third, _FOLD_STR
    return (*_halves(data, "fold_in"), 0, _FOLD_INT)


def philox4x32(counter: Counter, key: Key) -> Counter:
    """Four words of one counter, in plain integers: the definition, and the oracle of the tests.

    >>> [hex(word) for word in philox4x32((0, 0, 0, 0), (0, 0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    for k0, k1 in _round_keys(key):
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b & _WORD, a >> 32 ^ c3 ^ k1, a & _WORD
    return c0, c1, c2, c3


# Values


def words(
    key: Key | Source,
    shape: tuple[int, ...],
    index: Block,
    *,
    device: Device = "cpu",
    salt: int = 0,
) -> Tensor:
    """Block of 32-bit words, as int64: what all other functions are made of.

    Args:
        key: from `seed`, `split` or `fold_in`, or a source of words.
        shape: of the global tensor.
        index: the block, one slice of step 1 per dim.
        device: where to compute; on "meta" only shape and dtype come out.
        salt: at least 0 and below 2**30; other salts give independent values.

    Returns:
        int64, in [0, 2**32), with the shape of the block.

    >>> words((0, 0), (2, 3), (slice(0, 1), slice(1, 3)))
    tensor([[3781805453, 3159862348]])
    """

    def finish(high: Tensor) -> Tensor:
        return high

    return _generate(key, shape, index, finish, torch.int64, device, (salt,))


def uniform(
    key: Key | Source,
    shape: tuple[int, ...],
    index: Block,
    *,
    low: float = 0.0,
    high: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: Device = "cpu",
    salt: int = 0,
) -> Tensor:
    """Block of uniform values in [low, high): `low + (high - low) * u`.

    In float32, u is the top 24 bits of the word times 2**-24; in float64 the top 53 bits of 64,
    which refine the same 24. Other dtypes are the float32 values rounded, so bfloat16 and float16
    can give `high` itself; so can bounds other than 0 and 1, by the rounding of the sum.

    >>> uniform(seed(0), (2, 3), (slice(0, 2), slice(0, 1)))
    tensor([[0.3990],
            [0.4172]])
    """

    def finish(first: Tensor, *second: Tensor) -> Tensor:
        if second:
            values = _fraction(first, *second, offset=0.0)
        else:
            values = first.bitwise_right_shift_(8).to(torch.float32).mul_(2.0**-24)
        if (low, high) != (0.0, 1.0):
            values.mul_(high - low).add_(low)
        return values

    return _generate(key, shape, index, finish, dtype, device, _float_salts(dtype, salt))


def normal(
    key: Key | Source,
    shape: tuple[int, ...],
    index: Block,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: Device = "cpu",
    salt: int = 0,
) -> Tensor:
    """Block of normal values, by Box and Muller, in float64 up to one rounding to float32.

    Columns 2j and 2j + 1 of a row share their words: the first gives the radius, the second the
    angle, and the columns take its cosine and its sine. The uniform values in between have 32 bits,
    or 53 for float64, so values reach out to 6.7 standard deviations, or 8.6. Other dtypes are the
    float32 values rounded.

    >>> normal(seed(0), (4,), (slice(0, 4),), std=0.02)
    tensor([ 0.0198, -0.0185, -0.0124, -0.0096])
    """

    def finish(*halves: Tensor) -> Tensor:
        values = _fraction(*halves, offset=0.5)
        radius, angle = values[0], values[1]
        radius.log_().mul_(-2.0).sqrt_().mul_(std)
        angle.mul_(2.0 * math.pi)
        cosines = angle.cos().mul_(radius)
        angle.sin_().mul_(radius)
        radius.copy_(cosines)
        if mean != 0.0:
            values.add_(mean)
        return _rounded(values, dtype)

    return _generate(key, shape, index, finish, dtype, device, _float_salts(dtype, salt))


def truncated_normal(
    key: Key | Source,
    shape: tuple[int, ...],
    index: Block,
    *,
    lower: float = -2.0,
    upper: float = 2.0,
    mean: float = 0.0,
    std: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: Device = "cpu",
    salt: int = 0,
) -> Tensor:
    """Block of normal values on condition that `lower <= (x - mean) / std <= upper`.

    By the inverse of the distribution function, in float64 up to one rounding to float32, which may
    cross a bound that the dtype does not hold. The bounds are in standard deviations and may be
    infinite. `std` belongs to the normal before it is cut: by default the values have 0.8796 of it.

    >>> truncated_normal(seed(0), (4,), (slice(0, 4),), lower=0.0)
    tensor([0.4971, 1.4066, 1.0412, 0.8028])
    """
    # Probabilities near 1 have no small differences, those near 0 do: draw an upper tail mirrored.
    sign = -1.0 if lower > 0.0 else 1.0
    near, far = (lower, upper) if sign > 0.0 else (-upper, -lower)
    below = _normal_cdf(near)
    inside = _normal_cdf(far) - below

    def finish(*halves: Tensor) -> Tensor:
        probability = _fraction(*halves, offset=0.5).mul_(inside).add_(below)
        probability.clamp_(max=1.0 - 2.0**-53)  # sums that round to 1 would be infinitely far out
        values = _inverse_normal_cdf(probability)
        return _rounded(values.clamp_(near, far).mul_(sign * std).add_(mean), dtype)

    return _generate(key, shape, index, finish, dtype, device, _float_salts(dtype, salt))


def randint(
    key: Key | Source,
    shape: tuple[int, ...],
    index: Block,
    *,
    low: int = 0,
    high: int,
    dtype: torch.dtype = torch.int64,
    device: Device = "cpu",
    salt: int = 0,
) -> Tensor:
    """Block of integers in [low, high): `low + w * (high - low) // 2**64` for 64 random bits w.

    The probability of each is within 2**-64 of `1 / (high - low)`. The dtype does not change them.

    Raises:
        ValueError: if there is no integer in the range, or the dtype does not hold them all.

    >>> randint(seed(0), (8,), (slice(0, 8),), high=10)
    tensor([3, 8, 7, 6, 9, 3, 6, 0])
    """
    info = torch.iinfo(dtype)
    if not info.min <= low < high <= info.max + 1:
        raise ValueError(
            f"randint: [{low}, {high}) must hold an integer and lie in "
            f"[{info.min}, {info.max + 1}) of {dtype}"
        )
    span_high, span_low = divmod(high - low, 2**32)

    def finish(first: Tensor, second: Tensor) -> Tensor:
        # Long multiplication in digits of 32 bits; int64 wraps to the bits of the unsigned product.
        middle = _upper(second * span_low).add_(first * span_low)
        values = _upper(middle)
        if span_high:
            middle = (second * span_high).add_(middle & _WORD)
            values.add_(first * span_high).add_(_upper(middle))
        return values.add_(low)

    return _generate(key, shape, index, finish, dtype, device, (salt, salt + _LOW_HALF))


def bernoulli(
    key: Key | Source,
    shape: tuple[int, ...],
    index: Block,
    *,
    p: float,
    dtype: torch.dtype = torch.bool,
    device: Device = "cpu",
    salt: int = 0,
) -> Tensor:
    """Block of values that are true with probability p: exactly `uniform(..., dtype=float32) < p`.

    So p counts as its float32 value, rounded up to a multiple of 2**-24.

    >>> bernoulli(seed(0), (6,), (slice(0, 6),), p=0.5)
    tensor([ True, False, False, False, False,  True])
    """
    (rounded,) = struct.unpack("f", struct.pack("f", p))
    threshold = math.ceil(rounded * 2**24) << 8

    def finish(high: Tensor) -> Tensor:
        return high < threshold

    return _generate(key, shape, index, finish, dtype, device, (salt,))


# Key material


def _halves(value: int, name: str) -> Key:
    number = operator.index(value)
    if not 0 <= number < 2**64:
        raise ValueError(f"{name}: {number} is out of range; it must be at least 0 and below 2**64")
    return number & _WORD, number >> 32


def _derive(key: Key, counter: Counter) -> Key:
    return philox4x32(counter, key)[:2]


def _round_keys(key: Key) -> Iterator[Key]:
    for i in range(_ROUNDS):
        yield (key[0] + i * _KEY_STEPS[0]) & _WORD, (key[1] + i * _KEY_STEPS[1]) & _WORD


# From words to values


def _float_salts(dtype: torch.dtype, salt: int) -> tuple[int, ...]:
    return (salt, salt + _LOW_HALF) if dtype == torch.float64 else (salt,)


def _fraction(high: Tensor, low: Tensor | None = None, *, offset: float) -> Tensor:
    """Float64 `(k + offset) / 2**bits`: k is the word, or the top 53 bits of both halves."""
    if low is None:
        return high.to(torch.float64).add_(offset).mul_(2.0**-32)
    bits = high.bitwise_left_shift_(21).bitwise_or_(low.bitwise_right_shift_(11))
    return bits.to(torch.float64).add_(offset).mul_(2.0**-53)


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values if dtype == torch.float64 else values.to(torch.float32)


def _upper(product: Tensor) -> Tensor:
    return product.bitwise_right_shift(32).bitwise_and_(_WORD)


_inverse_normal_cdf = cast(
    Callable[[Tensor], Tensor],
    torch.special.ndtri,
)


def _normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


# Blocks


def _generate(
    key: Key | Source,
    shape: tuple[int, ...],
    index: Block,
    finish: Finish,
    dtype: torch.dtype,
    device: Device,
    salts: tuple[int, ...],
) -> Tensor:
    """Block of `finish(words of each salt)`, computed in steps that stay in the cache."""
    spans = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
    out = torch.empty([len(span) for span in spans], dtype=dtype, device=device)
    if out.is_meta or out.numel() == 0:
        return out
    if callable(key):
        return _from_source(key, shape, spans, finish, dtype, salts)
    rows, columns = _rows_and_columns(shape, spans, out.device)
    target = out.view(len(rows), len(columns))
    first, last = columns.start // 4, -(-columns.stop // 4)
    row_step, group_step = _steps(len(rows), last - first, out.device)
    constants = _constants(key, out.device)
    scratch = [
        torch.empty(6 * row_step * group_step, dtype=torch.int64, device=out.device) for _ in salts
    ]
    for i in range(0, len(rows), row_step):
        some = rows[i : i + row_step, None]
        for g in range(first, last, group_step):
            groups = torch.arange(g, min(g + group_step, last), device=out.device)
            halves = [
                _mix(some, groups, salt, constants, memory)
                for salt, memory in zip(salts, scratch, strict=True)
            ]
            values = _interleave(finish(*halves))
            at = max(columns.start, 4 * g)
            to = min(columns.stop, 4 * (g + group_step))
            part = target[i : i + row_step, at - columns.start : to - columns.start]
            part.copy_(values[:, at - 4 * g : to - 4 * g])
    return out


def _column_dim(shape: tuple[int, ...]) -> int:
    """The dim of the columns: the last one, but trailing dims of global size 1 do not count."""
    last = len(shape) - 1
    while last > 0 and shape[last] == 1:
        last -= 1
    return last


def _rows_and_columns(
    shape: tuple[int, ...], spans: list[range], device: torch.device
) -> tuple[Tensor, range]:
    """Row numbers and columns of a block."""
    last = _column_dim(shape)
    rows = torch.zeros(1, dtype=torch.int64, device=device)
    for size, span in zip(shape[:last], spans[:last], strict=True):
        inner = torch.arange(span.start, span.stop, device=device)
        rows = (rows[:, None] * size + inner).flatten()
    return rows, spans[last] if shape else range(1)


def _from_source(
    source: Source,
    shape: tuple[int, ...],
    spans: list[range],
    finish: Finish,
    dtype: torch.dtype,
    salts: tuple[int, ...],
) -> Tensor:
    """The block of a source of words, all at once."""
    block = [len(span) for span in spans]
    if not shape:
        shape, spans = (1,), [range(1)]
    last = _column_dim(shape)
    columns = spans[last]
    first, stop = columns.start // 4, -(-columns.stop // 4)
    start = tuple(4 * first if i == last else span.start for i, span in enumerate(spans))
    size = tuple(4 * (stop - first) if i == last else len(s) for i, s in enumerate(spans))

    def finished(*halves: Tensor) -> Tensor:
        return finish(*(half.clone() for half in halves))

    halves = [
        source(shape, start, size, salt).view(-1, stop - first, 2, 2).permute(3, 2, 0, 1)
        for salt in salts
    ]
    values = torch.func.functionalize(finished)(*halves).permute(2, 3, 1, 0).flatten(1)
    skipped = columns.start - 4 * first
    return values[:, skipped : skipped + len(columns)].reshape(block).to(dtype)


def _steps(rows: int, groups: int, device: torch.device) -> tuple[int, int]:
    """Rows and groups of four columns per step: many short rows, or an even part of a long one."""
    limit = _STEP_CPU if device.type == "cpu" else _STEP_OTHER
    if groups <= limit:
        return min(rows, limit // groups), groups
    parts = -(-groups // limit)
    return 1, -(-groups // parts)


def _constants(key: Key, device: torch.device) -> Constants:
    """Multipliers, mask, shift as CPU scalars, cheaper to pass than numbers; keys of the rounds."""
    scalars = torch.tensor([*_MULTIPLIERS, _WORD, 32], device="cpu").unbind()
    keys = torch.tensor(list(_round_keys(key)), device=device)[:, :, None, None].unbind()
    return scalars, keys


def _mix(rows: Tensor, groups: Tensor, salt: int, constants: Constants, memory: Tensor) -> Tensor:
    """Words [2, 2, rows, groups] of the counters (group, row low, row high, salt), see `Finish`.

    Words 0 and 2 are multiplied, words 1 and 3 only xored: these keep rubbish above bit 31 until
    the end. Before the second round's xor each word depends on the row or on the group alone, so
    there is little to compute. The result lies in `memory`.
    """
    (a, b, mask, shift), keys = constants
    shape = (2, 2, rows.shape[0], groups.shape[0])
    cells = shape[2] * shape[3]
    result = memory[: 4 * cells].view(shape)
    spare = memory[4 * cells : 6 * cells].view(shape[1:])

    by_group, by_row = groups * a, (rows >> shift) * b
    c0, c1 = ((by_row >> shift) ^ rows ^ keys[0][0]) & mask, by_row & mask
    c2, c3 = ((by_group >> shift) ^ salt ^ keys[0][1]) & mask, by_group & mask
    by_row, by_group = c0 * a, c2 * b

    even, odd = result[0], result[1]
    word0, word2 = even[0], even[1]
    odds, spares = (odd, odd[0], odd[1]), (spare, spare[0], spare[1])
    torch.bitwise_xor(((by_group >> shift) ^ keys[1][0]) & mask, c1, out=word0)
    torch.bitwise_xor(((by_row >> shift) ^ keys[1][1]) & mask, c3, out=word2)
    odds[1].copy_(by_group)
    odds[2].copy_(by_row)
    # An even number of rounds is left, so the last product lands in `result`.
    for pair in keys[2:]:
        torch.mul(word2, b, out=spares[1])
        torch.mul(word0, a, out=spares[2])
        torch.bitwise_right_shift(spares[0], shift, out=even)
        even.bitwise_xor_(odds[0])
        even.bitwise_xor_(pair)
        even.bitwise_and_(mask)
        odds, spares = spares, odds
    odd.bitwise_and_(mask)
    return result


def _interleave(values: Tensor) -> Tensor:
    """Values [2, 2, rows, groups] to [rows, 4 * groups], in the order of the words."""
    _, _, rows, groups = values.shape
    out = torch.empty(rows, groups, 4, dtype=values.dtype, device=values.device)
    # Four long copies: one call would walk along the short dim.
    for word in range(4):
        out[:, :, word].copy_(values[word % 2, word // 2])
    return out.view(rows, 4 * groups)
