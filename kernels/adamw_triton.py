"""AdamW of `adamw.py` in Triton: one launch for all leaves, found through a table of addresses.

Table of leaves, int64 [leaves, FIELDS]: addresses of parameter, gradient, two means and the three
results; elements; row of the key; place in the global tensor. Table of blocks, int32 [blocks, 2]:
leaf, and which of its blocks. Both are kept on the device as long as they serve: the second depends
on sizes alone, the first on addresses, which stay where parameters and state are donated.

Results may be written over the operands: each element is read and written by one thread, once.

Leaves whose tensors all begin at multiples of 16 bytes (and, for stochastic rounding, whose rows
are whole groups of the four words of a counter) are `EVEN`; the others have a launch of their own,
with narrow loads and a counter for each element. The last block of a leaf is masked.

The additions that the compilers of torch contract are contracted here by name, and no others:
`enable_fp_fusion` is off, divisions and roots are rounded to the nearest.
"""

# pyright: basic, reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (Triton's annotations know neither a launch's num_warps nor that tl.range is iterated over.)
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import adamw as plain
from .adamw import NUMBERS
from .launch import Launch, empty

LAUNCH = Launch(block=2048, warps=8)  # eight elements a thread: 16 bytes of bfloat16
FIELDS = 17
SIZE, KEY, PLACE = (tl.constexpr(i) for i in (7, 8, 9))
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def pointers(
    leaf, FIELD: tl.constexpr, start, TYPE: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr
):
    """Where the elements of a block lie, of the leaf's tensor number FIELD."""
    first = tl.load(leaf + FIELD).to(tl.pointer_type(TYPE), bitcast=True) + start
    at = first + tl.arange(0, BLOCK)
    if EVEN:
        at = tl.multiple_of(at, 16)  # of the runs' first pointers; the compiler loads 16 bytes
    return at


@triton.jit
def global_row(row, first, n1, n2, step0, step1, step2):
    """Number of a block's row in the global tensor, modulo 2^32."""
    outer = row // n2
    return first + (outer // n1) * step0 + (outer % n1) * step1 + (row % n2) * step2


@triton.jit
def random_bits(leaf, start, keys, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """The upper 16 bits of the words of a block's elements."""
    key = keys + 2 * tl.load(leaf + KEY)
    seed = tl.load(key) | (tl.load(key + 1) << 32)
    first = tl.load(leaf + PLACE).to(tl.int32)
    column0 = tl.load(leaf + PLACE + 1)
    width = tl.load(leaf + PLACE + 2)
    row0, into = (start // width).to(tl.int32), (start % width).to(tl.int32)
    width = width.to(tl.int32)
    n1, n2 = tl.load(leaf + PLACE + 3).to(tl.int32), tl.load(leaf + PLACE + 4).to(tl.int32)
    step0 = tl.load(leaf + PLACE + 5).to(tl.int32)
    step1 = tl.load(leaf + PLACE + 6).to(tl.int32)
    step2 = tl.load(leaf + PLACE + 7).to(tl.int32)
    if EVEN:  # noqa: SIM108
        e = into + tl.arange(0, BLOCK // 4) * 4
    else:
        e = into + tl.arange(0, BLOCK)
    down = e // width
    row = global_row(row0 + down, first, n1, n2, step0, step1, step2)
    column = column0 + (e - down * width)
    zero = tl.zeros_like(row)
    w0, w1, w2, w3 = tl.philox(seed, (column // 4).to(tl.int32), row, zero, zero)
    if EVEN:
        word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    else:
        which = column % 4
        low, high = tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3)
        word = tl.where(which < 2, low, high)
    return (word >> 16).to(tl.int32)


@triton.jit
def one_block(
    leaf, start, inside, root, rate, kept, keys, near1, b2, near2, eps,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    BLOCK: tl.constexpr, EVEN: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    p = tl.load(pointers(leaf, 0, start, P, BLOCK, EVEN), mask=inside).to(tl.float32)
    g = tl.load(pointers(leaf, 1, start, G, BLOCK, EVEN), mask=inside).to(tl.float32)
    m = tl.load(pointers(leaf, 2, start, M, BLOCK, EVEN), mask=inside).to(tl.float32)
    v = tl.load(pointers(leaf, 3, start, V, BLOCK, EVEN), mask=inside).to(tl.float32)
    m = tl.fma(g - m, near1, m)
    v = tl.fma(g * g, near2, v * b2)
    p = p * kept + tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + eps) * rate
    if ROUND:
        bits = p.to(tl.int32, bitcast=True)
        moved = (bits + random_bits(leaf, start, keys, BLOCK, EVEN)) & -65536
        # Infinities and NaN have all bits of the exponent set.
        bits = tl.where((bits & 0x7F800000) == 0x7F800000, bits, moved)
        p = bits.to(tl.float32, bitcast=True)
    tl.store(pointers(leaf, 4, start, P, BLOCK, EVEN), p.to(P), mask=inside)
    tl.store(pointers(leaf, 5, start, M, BLOCK, EVEN), m.to(M), mask=inside)
    tl.store(pointers(leaf, 6, start, V, BLOCK, EVEN), v.to(V), mask=inside)


@triton.jit
def update(
    leaves, blocks, factors, keys, near1, b2, near2, eps,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    BLOCK: tl.constexpr, FIELDS: tl.constexpr, EVEN: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    block = blocks + 2 * tl.program_id(0)
    leaf = leaves + tl.load(block) * FIELDS
    start = tl.load(block + 1).to(tl.int64) * BLOCK
    left = tl.load(leaf + SIZE) - start
    root, rate, kept = tl.load(factors), tl.load(factors + 1), tl.load(factors + 2)
    if left >= BLOCK:  # without a mask, loads are 16 bytes wide
        one_block(
            leaf, start, None, root, rate, kept, keys, near1, b2, near2, eps,
            P, G, M, V, BLOCK, EVEN, ROUND,
        )  # fmt: skip
    else:
        one_block(
            leaf, start, tl.arange(0, BLOCK) < left, root, rate, kept, keys, near1, b2, near2, eps,
            P, G, M, V, BLOCK, EVEN, ROUND,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def fold(
    key, step, names, keys, count,
    NUMBER: tl.constexpr, NAME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    zero = tl.zeros_like(i)
    seed = tl.load(key) | (tl.load(key + 1) << 32)
    now = tl.load(step)
    low, high = now.to(tl.int32) + zero, (now >> 32).to(tl.int32) + zero
    k0, k1, _, _ = tl.philox(seed, low, high, zero, zero + NUMBER)
    at = names + 3 * i
    a = tl.load(at, mask=i < count, other=0).to(tl.int32)
    b = tl.load(at + 1, mask=i < count, other=0).to(tl.int32)
    c = tl.load(at + 2, mask=i < count, other=0).to(tl.int32)
    # The key of the step differs from no lane to another, but tl.philox takes one number for all.
    seed = tl.max(k0.to(tl.int64), axis=0) | (tl.max(k1.to(tl.int64), axis=0) << 32)
    w0, w1, _, _ = tl.philox(seed, a, b, c, zero + NAME)
    tl.store(keys + 2 * i, w0.to(tl.int64), mask=i < count)
    tl.store(keys + 2 * i + 1, w1.to(tl.int64), mask=i < count)


FOLD = Launch(block=128, warps=4)


class Tables:
    """The tables of a launch: of leaves, of blocks, and how many blocks there are.

    Args:
        addresses: seven lists, one number a leaf.
        sizes: elements of each leaf.
        rows: of each leaf's key.
        places: eight numbers a leaf, or none.
        block: elements of a block.
        device: where the tables are read.
    """

    def __init__(
        self,
        addresses: tuple[tuple[int, ...], ...],
        sizes: tuple[int, ...],
        rows: tuple[int, ...],
        places: tuple[int, ...],
        block: int,
        device: torch.device,
    ) -> None:
        numbers: list[int] = []
        for i, size in enumerate(sizes):
            numbers += [column[i] for column in addresses]
            numbers += [size, rows[i]]
            numbers += places[NUMBERS * i : NUMBERS * (i + 1)] or (0, 0, 1, 1, 1, 0, 0, 0)
        counts = (torch.tensor(sizes) + (block - 1)) // block
        self.count = int(counts.sum())
        leaf = torch.repeat_interleave(counts)
        pairs = torch.stack([leaf, torch.arange(self.count) - (counts.cumsum(0) - counts)[leaf]], 1)
        self.held = [torch.tensor(numbers), pairs.to(torch.int32)]
        if device.type == "cuda":  # the host does not wait for the device's earlier work
            self.held = [t.pin_memory() for t in self.held]
        self.leaves, self.blocks = (t.to(device, non_blocking=True) for t in self.held)


KEPT = 16
_tables: OrderedDict[Any, Tables] = OrderedDict()  # the last ones, by what they were made of
_captured: list[Tables] = []  # those of CUDA graphs, which read them at every replay


def tables(*made_of: Any) -> Tables:
    """The kept tables, or new ones; while a graph is captured they are kept for good.

    A graph that is captured after a first step on the same tensors finds its tables on the device.
    """
    device: torch.device = made_of[-1]
    on_gpu = device.type == "cuda"
    # A copy in one stream is not waited for by another.
    key = (torch.cuda.current_stream(device).cuda_stream if on_gpu else 0, *made_of)
    capturing = on_gpu and torch.cuda.is_current_stream_capturing()
    if capturing:
        found = next((t for k, t in _tables.items() if k[1:] == made_of), None)
        found = found or Tables(*made_of)
        _captured.append(found)
        return found
    found = _tables.pop(key, None) or Tables(*made_of)
    _tables[key] = found
    if len(_tables) > KEPT:
        _tables.popitem(last=False)
    return found


def run(
    operands: Sequence[Sequence[Tensor]],
    results: Sequence[Sequence[Tensor]],
    factors: Tensor,
    b1: float,
    b2: float,
    eps: float,
    keys: Tensor | None,
    places: Sequence[int],
    how: Launch = LAUNCH,
) -> None:
    """Write the step's results; contiguous tensors, one dtype a list, none of them float64.

    Args:
        operands: parameters, gradients and the two means.
        results: new parameters and means; tensors of `operands` where they may be written over.
        factors: float32 [3]: root, rate, kept.
        b1: decay of the mean of gradients.
        b2: decay of the mean of squares.
        eps: added to the root.
        keys: int64 [leaves, 2] for stochastic rounding.
        places: eight numbers a leaf, with keys.
        how: block and warps.
    """
    params = operands[0]
    device = params[0].device
    lists = (*operands, *results)
    addresses = [[t.data_ptr() for t in column] for column in lists]
    sizes = [t.numel() for t in params]
    rounding = keys is not None and params[0].dtype == torch.bfloat16
    even, loose = [], []
    for i, size in enumerate(sizes):
        if not size:
            continue
        fine = not any(column[i] % 16 for column in addresses)
        if fine and rounding:
            column, width = places[NUMBERS * i + 1], places[NUMBERS * i + 2]
            fine = column % 4 == 0 and (width % 4 == 0 or width == size)
        (even if fine else loose).append(i)
    types = {n: TYPES[c[0].dtype] for n, c in zip("PGMV", operands, strict=True)}
    for members in (even, loose):
        if not members:
            continue
        at = [n for i in members for n in places[NUMBERS * i : NUMBERS * (i + 1)]]
        found = tables(
            tuple(tuple(column[i] for i in members) for column in addresses),
            tuple(sizes[i] for i in members),
            tuple(members),
            tuple(at) if rounding else (),
            how.block,
            device,
        )
        update[(found.count,)](
            found.leaves, found.blocks, factors, keys if rounding else factors,
            1 - b1, b2, 1 - b2, eps,
            **types, BLOCK=how.block, FIELDS=FIELDS, EVEN=members is even, ROUND=rounding,
            num_warps=how.warps, enable_fp_fusion=False,
        )  # fmt: skip


def takes(*lists: Sequence[Tensor]) -> bool:
    """Whether the kernel computes with these dtypes."""
    return all(t.dtype in TYPES for column in lists for t in column[:1])


def adamw(
    params: list[Tensor], grads: list[Tensor], mu: list[Tensor], nu: list[Tensor],
    factors: Tensor, b1: float, b2: float, eps: float, keys: Tensor | None, places: Sequence[int],
) -> plain.Lists:  # fmt: skip
    lists = (params, grads, mu, nu)
    if not params or not takes(*lists) or any(len({t.dtype for t in c}) > 1 for c in lists):
        return plain._adamw(*lists, factors, b1, b2, eps, keys, places)
    operands = [[t.contiguous() for t in column] for column in lists]
    results = [[empty(t.shape, t) for t in column] for column in (params, mu, nu)]
    run(operands, results, factors.to(torch.float32), b1, b2, eps, keys, places)
    return results[0], results[1], results[2]


def adamw_keys(key: Tensor, step: Tensor, names: Tensor) -> Tensor:
    count = names.shape[0]
    keys = empty((count, 2), key)
    if count:
        fold[(triton.cdiv(count, FOLD.block),)](
            key.contiguous(), step.to(torch.int64).contiguous(), names.contiguous(), keys, count,
            NUMBER=plain.FOLD_NUMBER - 2**32, NAME=plain.FOLD_NAME - 2**32, BLOCK=FOLD.block,
            num_warps=FOLD.warps,
        )  # fmt: skip
    return keys
