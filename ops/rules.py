"""Factor rules: what an op does to each dim, as an einsum-like signature over factors.

    "m k, k n -> m n"        matmul: k is in no result, so it is summed
    "... n -> ... n"         softmax with blocked={"n"}: the op needs all of n at once
    "v e, ... -> ... e"      embedding with lookup={"v"}: a cut v gives a sum of partial lookups
    "(a b) c -> a b c"       reshape: a dim of several factors, major to minor

A factor is *pointwise* (in operand and result), *summed* (in no result), *reduced* by another
operation (max, ...), *blocked* (needed whole), *looked up*, or *windowed*. A rule also says in
which operands the op is linear, each with the others fixed, and whether it is linear in all of them
together (addition).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

Dim = tuple[str, ...]
Dims = tuple[Dim, ...]
Shape = Sequence[int]
_NONE: frozenset[str] = frozenset()
_TOKEN = re.compile(r"\(([^()]*)\)|(\.\.\.|[A-Za-z_]\w*|1)")


@dataclass(frozen=True)
class Rule:
    """The signature of one op call; `sizes` are the factors' global sizes.

    Attributes:
        inputs: per operand, per dim, its factors; () is a dim of size 1 that is broadcast.
        outputs: the same per result.
        sizes: factor to global size.
        blocked: factors that the op needs whole.
        reduced: factor to the operation that reduces it, where that is not a sum.
        lookup: factors that an index picks from; cut, they give partial results that add up.
        window: factor to the border it needs from its neighbours.
        linear: operands in which the op is linear, the others fixed.
        joint: whether it is linear in all operands together.
    """

    inputs: tuple[Dims, ...]
    outputs: tuple[Dims, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    blocked: frozenset[str] = _NONE
    reduced: Mapping[str, str] = field(default_factory=dict)
    lookup: frozenset[str] = _NONE
    window: Mapping[str, int] = field(default_factory=dict)
    linear: frozenset[int] = frozenset()
    joint: bool = False

    def factors(self, dims: Dims) -> frozenset[str]:
        """All factors of an operand or result."""
        return frozenset(f for dim in dims for f in dim)


@cache
def parse(text: str) -> tuple[tuple[Dims, ...], tuple[Dims, ...]]:
    """Operands and results of a rule string; "..." stays as the factor "...".

    Raises:
        ValueError: no "->", a stray character.

    >>> parse("(a b) c -> a b c")
    (((('a', 'b'), ('c',)),), ((('a',), ('b',), ('c',)),))
    """
    sides = text.split("->")
    if len(sides) != 2:
        raise ValueError(f"rule {text!r}: write operands -> results")
    left, right = (tuple(_dims(part, text) for part in side.split(",")) for side in sides)
    return left, right


def _dims(part: str, text: str) -> Dims:
    dims: list[Dim] = []
    end = 0
    for found in _TOKEN.finditer(part):
        if part[end : found.start()].strip():
            raise ValueError(f"rule {text!r}: cannot read {part[end : found.start()].strip()!r}")
        end = found.end()
        if found[1] is not None:
            dims.append(tuple(found[1].split()))
        else:
            dims.append(() if found[2] == "1" else (found[2],))
    if part[end:].strip():
        raise ValueError(f"rule {text!r}: cannot read {part[end:].strip()!r}")
    return tuple(dims)


@cache
def expand(text: str, ndims: tuple[int, ...]) -> tuple[tuple[Dims, ...], tuple[Dims, ...]]:
    """The rule with "..." spelled out for operands of these ndims, aligned from the right.

    >>> expand("... n -> ... n", (3,))
    (((('i1',), ('i0',), ('n',)),), ((('i1',), ('i0',), ('n',)),))
    """
    inputs, outputs = parse(text)
    widest = 0
    for dims, ndim in zip(inputs, ndims, strict=True):
        own = sum(dim != ("...",) for dim in dims)
        if ("...",) in dims:
            widest = max(widest, ndim - own)
        if ndim < own or (ndim != own and ("...",) not in dims):
            raise ValueError(f"rule {text!r}: an operand with {ndim} dims does not fit")

    def spelled(dims: Dims, count: int) -> Dims:
        at = dims.index(("...",)) if ("...",) in dims else None
        if at is None:
            return dims
        return (*dims[:at], *((f"i{k}",) for k in reversed(range(count))), *dims[at + 1 :])

    filled = tuple(
        spelled(dims, ndim - sum(dim != ("...",) for dim in dims))
        for dims, ndim in zip(inputs, ndims, strict=True)
    )
    return filled, tuple(spelled(dims, widest) for dims in outputs)


def make(
    text: str,
    shapes: Sequence[Shape],
    *,
    blocked: Iterable[str] = (),
    reduced: Mapping[str, str] | None = None,
    lookup: Iterable[str] = (),
    window: Mapping[str, int] | None = None,
    linear: Iterable[int] = (),
    joint: bool = False,
    sizes: Mapping[str, int] | None = None,
) -> Rule:
    """The rule for operands of these global shapes: sizes read off, size-1 dims made broadcast.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    inputs, outputs = expand(text, tuple(map(len, shapes)))
    return sized(
        Rule(
            inputs,
            outputs,
            dict(sizes or {}),
            frozenset(blocked),
            dict(reduced or {}),
            frozenset(lookup),
            dict(window or {}),
            frozenset(linear),
            joint,
        ),
        shapes,
    )


def sized(rule: Rule, shapes: Sequence[Shape]) -> Rule:
    """The rule with factor sizes read from the operands' shapes; a broadcast 1 loses its factor."""
    sizes = dict(rule.sizes)
    for dims, shape in zip(rule.inputs, shapes, strict=True):
        for dim, size in zip(dims, shape, strict=True):
            if len(dim) == 1:
                known = sizes.get(dim[0], 1)
                if known != size and known != 1 and size != 1:
                    raise ValueError(f"sizes {known} and {size} do not fit (factor {dim[0]!r})")
                sizes[dim[0]] = size if known == 1 else known
    inputs = tuple(
        tuple(
            () if len(dim) == 1 and size == 1 and sizes[dim[0]] != 1 else dim
            for dim, size in zip(dims, shape, strict=True)
        )
        for dims, shape in zip(rule.inputs, shapes, strict=True)
    )
    return replace(rule, inputs=inputs, sizes=sizes)


def pointwise(ndims: Sequence[int]) -> str:
    """The rule string of a broadcasting op over operands with these ndims."""
    return ", ".join("..." for _ in ndims) + " -> ..."


def letters(ndim: int, prefix: str = "d") -> list[str]:
    """Names d0 ... for the dims of one operand."""
    return [f"{prefix}{i}" for i in range(ndim)]
