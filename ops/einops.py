"""einops: `rearrange`, `reduce` and `repeat` as one op each, with the pattern as factor rule.

The pattern is read by einops' own parser, so its grammar is einops'. Its axes are the rule's
factors: `over=` and errors speak of them. `einops.rearrange(x, ...)` and the others work on
ShardedTensors too, through a backend made of the same views and reductions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from einops import EinopsError
from einops._backends import AbstractBackend
from einops.parsing import AnonymousAxis, ParsedExpression, _ellipsis

from ..layouts.layout import LayoutLike
from ..layouts.sharded import ShardedTensor
from .dispatch import Info, Local, Op
from .join import stack
from .rules import Dims, Rule

Over = Mapping[str, str] | None
Sizes = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Pattern:
    """A pattern on one shape: factors per dim of both sides, and every factor's global size."""

    inputs: Dims
    outputs: Dims
    sizes: Mapping[str, int]

    @property
    def flat(self) -> tuple[str, ...]:
        """The operand's factors in order."""
        return tuple(f for dim in self.inputs for f in dim)

    @property
    def gone(self) -> tuple[str, ...]:
        """Factors that the result lacks."""
        kept = {f for dim in self.outputs for f in dim}
        return tuple(f for f in self.flat if f not in kept)


@cache
def _sides(pattern: str) -> tuple[ParsedExpression, ParsedExpression]:
    parts = pattern.split("->")
    if len(parts) != 2:
        raise EinopsError(f"pattern {pattern!r}: write left -> right")
    left, right = (ParsedExpression(part) for part in parts)
    if right.has_ellipsis and not left.has_ellipsis:
        raise EinopsError(f"pattern {pattern!r}: '...' stands on the right only")
    if left.has_ellipsis_parenthesized:
        raise EinopsError(f"pattern {pattern!r}: '...' cannot stand in parentheses on the left")
    return left, right


def _factors(
    side: ParsedExpression, rest: tuple[str, ...], sizes: dict[str, int], mark: str
) -> Dims:
    """The dims of a side; "..." spelled out, numbers named by side and place."""
    dims: list[tuple[str, ...]] = []
    for composite in side.composition:
        if composite == _ellipsis:
            dims += [(name,) for name in rest]
            continue
        dim: list[str] = []
        for axis in composite:
            if axis == _ellipsis:
                dim += rest
            elif isinstance(axis, AnonymousAxis):
                name = f"{mark}{len(dims)}_{len(dim)}"
                sizes[name] = axis.value
                dim.append(name)
            else:
                dim.append(axis)
        dims.append(tuple(dim))
    return tuple(dims)


@cache
def fit(name: str, pattern: str, shape: tuple[int, ...], given: Sizes) -> Pattern:
    """The pattern on a shape: each dim may leave one size to be found.

    Raises:
        EinopsError: an unknown or unneeded axis, sizes that do not fit.
    """
    left, right = _sides(pattern)
    rest: tuple[str, ...] = ()
    if left.has_ellipsis:
        count = len(shape) - (len(left.composition) - 1)
        rest = tuple(f"...{k}" for k in range(max(count, 0)))  # no name that a pattern can hold
    sizes = dict(given)
    inputs = _factors(left, rest, sizes, "n")
    if len(inputs) != len(shape):
        raise EinopsError(f"{name} {pattern!r}: the tensor has {len(shape)} dims {tuple(shape)}")
    for dim, size in zip(inputs, shape, strict=True):
        unknown = [f for f in dim if f not in sizes]
        known = math.prod(sizes[f] for f in dim if f in sizes)
        if len(unknown) > 1:
            raise EinopsError(
                f"{name} {pattern!r}: give the size of {unknown[0]!r} or {unknown[1]!r}"
            )
        if unknown and known and size % known == 0:
            sizes[unknown[0]] = size // known
        elif unknown or known != size:
            raise EinopsError(
                f"{name} {pattern!r}: size {size} is not {'*'.join(dim) or 1} with {dict(given)}"
            )
    outputs = _factors(right, rest, sizes, "m")
    mine, theirs = ({f for dim in dims for f in dim} for dims in (inputs, outputs))
    loose = [f for f, _ in given if f not in mine | theirs]
    unsized = [f for f in theirs if f not in sizes]
    if loose or unsized:
        what = f"axis {loose[0]!r} has no place" if loose else f"axis {unsized[0]!r} has no size"
        raise EinopsError(f"{name} {pattern!r}: {what}")
    if name == "rearrange" and mine != theirs:
        raise EinopsError(f"rearrange {pattern!r}: {sorted(mine ^ theirs)} stand on one side only")
    if name == "repeat" and mine - theirs:
        raise EinopsError(f"repeat {pattern!r}: {sorted(mine - theirs)} are missing on the right")
    if name == "reduce" and theirs - mine:
        raise EinopsError(f"reduce {pattern!r}: {sorted(theirs - mine)} are missing on the left")
    return Pattern(inputs, outputs, {f: sizes[f] for f in sizes if f in mine | theirs})


def _rule(name: str) -> Callable[..., Rule]:
    def rule(shapes: Sequence[Any], pattern: str, given: Sizes, *_: Any) -> Rule:
        found = fit(name, pattern, tuple(shapes[0]), given)
        return Rule((found.inputs,), (found.outputs,), found.sizes, linear=frozenset((0,)))

    return rule


def _local(info: Info) -> Local:
    """Taken apart, summed, put in order, grown and merged."""
    found = Pattern(info.rule.inputs[0], info.rule.outputs[0], info.rule.sizes)
    apart = [info.size(f) for f in found.flat]
    gone = [found.flat.index(f) for f in found.gone]
    scale = info.static[2] if len(info.static) > 2 else 1
    kept = [f for f in found.flat if f not in found.gone]
    wanted = [f for dim in found.outputs for f in dim]
    order = [kept.index(f) for f in wanted if f in kept]
    grown = [info.size(f) for f in wanted]
    thin = [info.size(f) if f in kept else 1 for f in wanted]
    merged = info.out_shape()

    def local(x: Any) -> Any:
        x = x.reshape(apart)
        if gone:
            x = x.sum(gone)
        if scale != 1:
            x = x * scale
        x = x.permute(order)
        if thin != grown:
            x = x.reshape(thin).expand(grown)
        return x.reshape(merged)

    return local


_REARRANGE = Op("rearrange", _rule("rearrange"), _local)
_REPEAT = Op("repeat", _rule("repeat"), _local)
_REDUCE = Op("reduce", _rule("reduce"), _local)


def _one(x: Any) -> ShardedTensor:
    """A list of tensors stacked, as einops does."""
    return stack(x) if isinstance(x, list | tuple) else x


def rearrange(
    x: Any, pattern: str, *, out: LayoutLike | None = None, over: Over = None, **sizes: int
) -> ShardedTensor:
    """`einops.rearrange`: dims split, moved and merged.

    Args:
        x: a ShardedTensor, or a list of them (stacked as a first dim).
        pattern: einops' grammar. Mesh axes fill the most major part of a dim first; a merged dim
            may be cut only along its most major part, else it is a choice.
        out: the result's layout.
        over: mesh axis to an axis of the pattern.
        **sizes: of the pattern's axes.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.ones(2, 6, 8), sw.make_mesh({"tensor": 2}), "b s e/tensor")
    >>> sw.ops.rearrange(x, "b s (h d) -> b h s d", h=4)
    f32[2 4/tensor 6 2] local[2 2 6 2] on mesh(tensor=2)
    """
    return _REARRANGE((_one(x),), (pattern, _frozen(sizes)), out, over)


def repeat(
    x: Any, pattern: str, *, out: LayoutLike | None = None, over: Over = None, **sizes: int
) -> ShardedTensor:
    """`einops.repeat`: as `rearrange`, with new axes along which the values repeat.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.arange(2), sw.make_mesh({"data": 2}), "n/data")
    >>> sw.ops.repeat(x, "n -> (n k)", k=2).full_tensor()
    tensor([0, 0, 1, 1])
    """
    return _REPEAT((_one(x),), (pattern, _frozen(sizes)), out, over)


def reduce(
    x: Any, pattern: str, op: Any, *, out: LayoutLike | None = None, over: Over = None, **sizes: int
) -> ShardedTensor:
    """`einops.reduce`: axes missing on the right are reduced.

    Args:
        x: a ShardedTensor, or a list of them (stacked as a first dim).
        pattern: einops' grammar.
        op: "sum", "mean", "max", "min", "prod", "any", "all", or a function of (tensor, dims).
        out: the result's layout.
        over: mesh axis to an axis of the pattern ("sum" and "mean").
        **sizes: of the pattern's axes.

    Returns:
        Over axes that cut a reduced part: unreduced for "sum" and "mean" (divided by the global
        count), else what the reduction itself gives.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.arange(8.0).reshape(4, 2), sw.make_mesh({"data": 2}), "b/data d")
    >>> y = sw.ops.reduce(x, "(b k) d -> b d", "mean", k=2)
    >>> y, y.full_tensor()[:, 0]
    (f32[2/data 2] local[1 2] on mesh(data=2), tensor([1., 5.]))
    """
    x, given = _one(x), _frozen(sizes)
    found = fit("reduce", pattern, tuple(x.shape), given)
    if op in ("sum", "mean"):
        if op == "mean" and not x.dtype.is_floating_point and not x.dtype.is_complex:
            raise TypeError(
                f"reduce: the mean of {x.dtype} is no {x.dtype}; cast to a floating type first"
            )
        scale = 1 / max(1, math.prod(found.sizes[f] for f in found.gone)) if op == "mean" else 1
        return _REDUCE((x,), (pattern, given, scale), out, over)
    plain = {f: f"f{k}" for k, f in enumerate(found.flat)}
    kept = [plain[f] for f in found.flat if f not in found.gone]
    gone = [plain[f] for f in found.gone]
    every = {plain[f]: found.sizes[f] for f in found.flat}
    apart = f"{_text(found.inputs, plain)} -> {' '.join([*kept, *gone])}"
    y = _REARRANGE((x,), (apart, _frozen(every)))
    y = _reduced(y, op, tuple(range(len(kept), y.ndim)))
    together = f"{' '.join(kept)} -> {_text(found.outputs, plain)}"
    some = _frozen({f: every[f] for f in kept})
    return _REARRANGE((y,), (together, some), out)


def _frozen(sizes: Mapping[str, int]) -> Sizes:
    return tuple(sorted((name, int(size)) for name, size in sizes.items()))


def _text(dims: Dims, names: Mapping[str, str]) -> str:
    return " ".join(f"({' '.join(names[f] for f in dim)})" for dim in dims)


def _reduced(x: ShardedTensor, op: Any, dims: tuple[int, ...]) -> ShardedTensor:
    """One of einops' reductions over dims, by the ops of that name."""
    if not isinstance(op, str):
        return op(x, dims)
    if op in ("max", "min"):
        return getattr(torch, f"a{op}")(x, dims) if dims else x
    if op not in ("sum", "mean", "prod", "any", "all"):
        raise EinopsError(f"reduce: unknown reduction {op!r}")
    if op in ("sum", "mean"):
        return getattr(torch, op)(x, dims) if dims else x
    for dim in sorted(dims, reverse=True):
        x = getattr(torch, op)(x, dim)
    return x


class ShardwiseBackend(AbstractBackend):
    """What einops' own functions call for a ShardedTensor; einops finds it by the class."""

    framework_name = "shardwise"

    def is_appropriate_type(self, tensor: Any) -> bool:
        """Ours only."""
        return isinstance(tensor, ShardedTensor)

    def shape(self, x: Any) -> tuple[int, ...]:
        """Global shape."""
        return tuple(x.shape)

    def reshape(self, x: Any, shape: Sequence[int]) -> Any:
        """A view rule."""
        return x.reshape(tuple(shape))

    def transpose(self, x: Any, axes: Sequence[int]) -> Any:
        """All dims reordered."""
        return x.permute(tuple(axes))

    def reduce(self, x: Any, operation: Any, reduced_axes: Sequence[int]) -> Any:
        """One reduction."""
        return _reduced(x, operation, tuple(reduced_axes))

    def stack_on_zeroth_dimension(self, tensors: list[Any]) -> Any:
        """A list of tensors as one."""
        return stack(tensors)

    def add_axis(self, x: Any, new_position: int) -> Any:
        """A dim of size 1."""
        return x.unsqueeze(new_position)

    def add_axes(self, x: Any, n_axes: int, pos2len: Mapping[int, int]) -> Any:
        """New dims along which values repeat."""
        sizes = [-1] * n_axes
        for position, length in pos2len.items():
            x = self.add_axis(x, position)
            sizes[position] = length
        return x.expand(sizes)

    def tile(self, x: Any, repeats: Sequence[int]) -> Any:
        """Dims repeated whole."""
        return x.repeat(*repeats)

    def concat(self, tensors: list[Any], axis: int) -> Any:
        """One behind the other."""
        return torch.cat(tensors, axis)

    def is_float_type(self, x: Any) -> bool:
        """Whether a mean makes sense."""
        return x.dtype.is_floating_point or x.dtype.is_complex

    def einsum(self, pattern: str, *x: Any) -> Any:
        """The contraction."""
        return torch.einsum(pattern, *x)
