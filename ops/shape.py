"""Ops that only change shape or the order of dims: local views, linear in their operand.

`reshape` is a factor rule from the common refinement of the old and the new shape, such as
"(a b) c -> a (b c)". Mesh axes fill the most major factor first. An axis that fits no factor, or
that would cut a minor part of a merged dim, is a choice. Everything else here names its dims one
to one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..layouts.layout import LayoutLike
from ..layouts.sharded import ShardedTensor, install
from .dispatch import Info, Local, Op, export
from .rules import Dims, Rule, letters

Over = Mapping[str, str] | None


def one_dim(dim: int, ndim: int) -> int:
    """A dim as a non-negative number.

    Raises:
        IndexError: out of range.
    """
    span = max(ndim, 1)
    if not -span <= dim < span:
        raise IndexError(f"dim {dim} is out of range for a tensor with {ndim} dims")
    return dim % span


def ints(args: Sequence[Any], given: Any = None) -> tuple[int, ...]:
    """Sizes or dims given apart, as one sequence, or by keyword."""
    if given is not None:
        args = given if isinstance(given, Sequence) else (given,)
    elif len(args) == 1 and isinstance(args[0], Sequence):
        args = args[0]
    return tuple(int(a) for a in args)


def refine(old: Sequence[int], new: Sequence[int]) -> Rule:
    """The rule of a reshape: the common refinement of two shapes with equally many elements.

    Dims without a common divisor, as in (3 4) to (4 3), need each other whole: blocked.

    >>> rule = refine((4, 6), (2, 12))
    >>> rule.inputs, rule.outputs
    (((('f0', 'f1'), ('f2',)),), ((('f0',), ('f1', 'f2')),))
    """
    sizes: dict[str, int] = {}
    blocked: set[str] = set()
    ins: list[list[str]] = [[] for _ in old]
    outs: list[list[str]] = [[] for _ in new]

    def factor(size: int, *dims: list[str], whole: bool = False) -> None:
        name = f"f{len(sizes)}"
        sizes[name] = size
        for dim in dims:
            dim.append(name)
        if whole:
            blocked.add(name)

    have, want = list(old), list(new)
    i = j = 0
    while math.prod(old) and (i < len(old) or j < len(new)):
        if i < len(old) and have[i] == 1:
            if old[i] == 1 and j < len(new) and new[j] == 1:
                factor(1, ins[i], outs[j])
                j += 1
            elif old[i] == 1:  # joins the next dim, as it would at any size
                factor(1, ins[i], *([outs[min(j, len(new) - 1)]] if new else []), whole=not new)
            i += 1
        elif j < len(new) and want[j] == 1:
            j += 1
        elif (common := math.gcd(have[i], want[j])) > 1:
            factor(common, ins[i], outs[j])
            have[i] //= common
            want[j] //= common
        else:
            before, after = 1, 1
            while before != after or before == 1:
                if before <= after:
                    factor(have[i], ins[i], whole=True)
                    before *= have[i]
                    have[i] = 1
                    i += 1
                else:
                    factor(want[j], outs[j], whole=True)
                    after *= want[j]
                    want[j] = 1
                    j += 1
    if not math.prod(old):
        paired = list(zip(old, new, strict=False))
        same = next((k for k, (a, b) in enumerate(paired) if a != b), len(paired))
        for k in range(same):
            factor(old[k], ins[k], outs[k])
        for dims, shape in ((ins, old), (outs, new)):
            for k in range(same, len(shape)):
                factor(shape[k], dims[k], whole=True)
    return Rule(
        (tuple(map(tuple, ins)),),
        (tuple(map(tuple, outs)),),
        sizes,
        frozenset(blocked),
        linear=frozenset((0,)),
    )


def view_rule(
    shape: Sequence[int],
    inputs: Dims,
    *outputs: Dims,
    blocked: Iterable[str] = (),
    sizes: Mapping[str, int] | None = None,
) -> Rule:
    """The rule of a linear op with one operand; sizes of the operand's own factors are read off."""
    known = {dim[0]: size for dim, size in zip(inputs, shape, strict=True) if len(dim) == 1}
    return Rule(
        (inputs,), outputs, {**known, **(sizes or {})}, frozenset(blocked), linear=frozenset((0,))
    )


def _reshape_local(info: Info) -> Local:
    shape = info.out_shape()
    return lambda x: x.reshape(shape)


_RESHAPE = {
    name: Op(name, lambda shapes, new: refine(shapes[0], new), _reshape_local)
    for name in ("reshape", "view", "flatten", "unflatten")
}


def _reshaped(
    name: str, x: ShardedTensor, shape: Sequence[int], out: Any, over: Over
) -> ShardedTensor:
    """Through the named op, with one -1 filled in."""
    shape = list(shape)
    free = [i for i, n in enumerate(shape) if n == -1]
    known = math.prod(n for n in shape if n != -1)
    bad = len(free) > 1 or any(n < -1 for n in shape) or (free and (not known or x.numel() % known))
    if free and not bad:
        shape[free[0]] = x.numel() // known
    if bad or math.prod(shape) != x.numel():
        raise ValueError(f"{name}: shape {tuple(shape)} does not fit {x.numel()} elements of {x}")
    return _RESHAPE[name]((x,), (tuple(shape),), out, over)


@export(torch.reshape, methods=["reshape"])
def reshape(
    x: ShardedTensor,
    *sizes: Any,
    shape: Any = None,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """The same elements in another shape; one size may be -1.

    Axes of a dim that is split stay on its most major new dim that they divide; a merged dim may
    be cut only along its most major part.

    Cost: none; a copy where torch needs one.

    Raises:
        LayoutError: kind "choice", where a cut does not fit the new shape.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.ones(2, 6, 8), sw.make_mesh({"tensor": 2}), "b s e/tensor")
    >>> x.reshape(2, 6, 4, -1)
    f32[2 6 4/tensor 2] local[2 6 2 2] on mesh(tensor=2)
    """
    return _reshaped("reshape", x, ints(sizes, shape), out, over)


@export(methods=["view"])
def view(
    x: ShardedTensor, *sizes: Any, out: LayoutLike | None = None, over: Over = None
) -> ShardedTensor:
    """As `reshape`; values are immutable, so nobody can see whether memory is shared."""
    if sizes and isinstance(sizes[0], torch.dtype):
        raise TypeError(
            "view: reading the bits as another dtype has no rule; use x.to(dtype) for the values"
        )
    return _reshaped("view", x, ints(sizes), out, over)


@export(methods=["view_as", "reshape_as"])
def reshape_as(x: ShardedTensor, other: Any) -> ShardedTensor:
    """`x` in the global shape of another tensor."""
    return _reshaped("reshape", x, other.shape, None, None)


@export(torch.flatten, torch.ravel, methods=["flatten", "ravel"])
def flatten(
    x: ShardedTensor,
    start_dim: int = 0,
    end_dim: int = -1,
    *,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """Dims `start_dim` to `end_dim` as one; it may be cut along the first of them only.

    >>> import torch, shardwise as sw
    >>> sw.shard(torch.ones(4, 3), sw.make_mesh({"data": 2}), "b/data d").flatten()
    f32[12/data] local[6] on mesh(data=2)
    """
    first, last = one_dim(start_dim, x.ndim), one_dim(end_dim, x.ndim)
    if first > last:
        raise ValueError(f"flatten: start_dim {start_dim} lies behind end_dim {end_dim}")
    shape = (*x.shape[:first], math.prod(x.shape[first : last + 1]), *x.shape[last + 1 :])
    return _reshaped("flatten", x, shape, out, over)


@export(torch.unflatten, methods=["unflatten"])
def unflatten(
    x: ShardedTensor,
    dim: int,
    sizes: Sequence[int],
    *,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """One dim as several, major to minor; one size may be -1."""
    at = one_dim(dim, x.ndim)
    known = math.prod(n for n in sizes if n != -1)
    full = [x.shape[at] // known if n == -1 and known else n for n in sizes]
    if math.prod(full) != x.shape[at]:
        raise ValueError(f"unflatten: {tuple(sizes)} does not fit size {x.shape[at]} of dim {dim}")
    return _reshaped("unflatten", x, (*x.shape[:at], *full, *x.shape[at + 1 :]), out, over)


def _permute_rule(shapes: Any, order: tuple[int, ...]) -> Rule:
    dims = tuple((n,) for n in letters(len(shapes[0])))
    return view_rule(shapes[0], dims, tuple(dims[d] for d in order))


def _permute_local(info: Info) -> Local:
    order = info.static[0]
    return lambda x: x.permute(order)


_PERMUTE = {
    name: Op(name, _permute_rule, _permute_local)
    for name in ("permute", "transpose", "movedim", "t")
}


@export(torch.permute, methods=["permute"])
def permute(
    x: ShardedTensor,
    *order: Any,
    dims: Any = None,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """The dims in another order, cuts with them.

    >>> import torch, shardwise as sw
    >>> sw.shard(torch.ones(4, 3), sw.make_mesh({"data": 2}), "b/data d").permute(1, 0)
    f32[3 4/data] local[3 2] on mesh(data=2)
    """
    asked = ints(order, dims)
    found = tuple(one_dim(d, x.ndim) for d in asked)
    if sorted(found) != list(range(x.ndim)):
        raise ValueError(f"permute: {asked} does not name each of {x.ndim} dims once")
    return _PERMUTE["permute"]((x,), (found,), out, over)


@export(
    torch.transpose, torch.swapaxes, torch.swapdims, methods=["transpose", "swapaxes", "swapdims"]
)
def transpose(
    x: ShardedTensor, dim0: int, dim1: int, *, out: LayoutLike | None = None, over: Over = None
) -> ShardedTensor:
    """Two dims exchanged, cuts with them."""
    order = list(range(x.ndim))
    a, b = one_dim(dim0, x.ndim), one_dim(dim1, x.ndim)
    if x.ndim:
        order[a], order[b] = order[b], order[a]
    return _PERMUTE["transpose"]((x,), (tuple(order),), out, over)


swapaxes = transpose


@export(torch.movedim, torch.moveaxis, methods=["movedim", "moveaxis"])
def movedim(
    x: ShardedTensor,
    source: Any,
    destination: Any,
    *,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """Dims moved to other places, the rest in their order."""
    start = [one_dim(d, x.ndim) for d in ints((source,))]
    end = [one_dim(d, x.ndim) for d in ints((destination,))]
    if len(start) != len(end) or len(set(start)) != len(start) or len(set(end)) != len(end):
        raise ValueError(
            f"movedim: {source} and {destination} must name equally many different dims"
        )
    rest = iter(d for d in range(x.ndim) if d not in start)
    to = dict(zip(end, start, strict=True))
    order = tuple(to[i] if i in to else next(rest) for i in range(x.ndim))
    return _PERMUTE["movedim"]((x,), (order,), out, over)


@export(torch.t, methods=["t"])
def t(x: ShardedTensor) -> ShardedTensor:
    """The transpose of a matrix; fewer dims stay as they are."""
    if x.ndim > 2:
        raise ValueError(f"t expects at most 2 dims, got {x.ndim}; use x.mT or x.transpose")
    return _PERMUTE["t"]((x,), (tuple(reversed(range(x.ndim))),))


install("T", property(lambda x: permute(x, *range(x.ndim)[::-1])))  # pyright: ignore
install("mT", property(lambda x: transpose(x, -2, -1)))  # pyright: ignore
