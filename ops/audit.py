"""Brute force against a wrong rule and a missing one: every layout of every operand, in float64.

For each combination of operand states the op runs on a simulated mesh with asymmetric parts of what
is unreduced, and its value and gradients are compared with the unsharded op's. Cotangents are
random; where the result is reduced, they are split at random over the devices.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..layouts.layout import Layout, make
from ..layouts.place import from_local
from ..layouts.reshard import cut
from ..layouts.sharded import ShardedTensor
from ..meshlib.errors import LayoutError
from ..meshlib.mesh import Mesh, make_mesh
from .transforms.grad import vjp

SIZES = {1: ({"a": 2}, {"a": 3}), 2: ({"a": 2, "b": 3},), 3: ({"a": 2, "b": 1, "c": 2},)}
TOLERANCE = 1e-10


@dataclass
class Report:
    """What an audit saw: layouts that ran right, that are a choice, and what went wrong."""

    right: dict[tuple[str, ...], str] = field(default_factory=dict)  # operand layouts -> result's
    choice: list[tuple[str, ...]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def layouts_of(shape: Sequence[int], mesh: Mesh, *, integer: bool = False) -> Iterator[Layout]:
    """Every layout that a tensor of this shape can have on the mesh."""
    states: list[Any] = [*range(len(shape)), "I"] + ([] if integer else ["R", "U"])
    seen = set()
    for order in itertools.permutations(mesh.axes):
        for at in itertools.product(states, repeat=len(order)):
            dims: list[list[str]] = [[] for _ in shape]
            for axis, state in zip(order, at, strict=True):
                if isinstance(state, int):
                    dims[state].append(axis)
            if any(n % mesh.group_size(tuple(axes)) for n, axes in zip(shape, dims, strict=True)):
                continue
            where = {
                s: frozenset(a for a, t in zip(order, at, strict=True) if t == s) for s in "UR"
            }
            layout = make(tuple(map(tuple, dims)), where["U"], where["R"])
            if layout not in seen:
                seen.add(layout)
                yield layout


def split(value: Tensor, mesh: Mesh, layout: Layout, rng: torch.Generator) -> ShardedTensor:
    """A value in a layout, what is unreduced cut into uneven random parts."""
    owed = tuple(sorted(layout.unreduced))
    blocks = cut(value, mesh, make(layout.dims, frozenset(), layout.reduced))
    if owed:
        n = mesh.group_size(owed)
        parts = torch.randn(n, *value.shape, generator=rng, dtype=value.dtype) * 3
        parts[0] += value - parts.sum(0)
        pieces = [cut(part, mesh, make(layout.dims)) for part in parts]
        blocks = [pieces[p][i] for i, p in enumerate(mesh.positions(owed))]
    return from_local([b.clone() for b in blocks], mesh, layout)


def report(
    op: Callable[..., Any],
    shapes: Sequence[Sequence[int]],
    *,
    axes: int = 1,
    reference: Callable[..., Any] | None = None,
    operands: Callable[[Sequence[Sequence[int]], torch.Generator], Sequence[Tensor]] | None = None,
    differentiable: bool = True,
    samples: int | None = None,
    seed: int = 0,
    no_grad: Sequence[int] = (),
) -> Report:
    """Run the audit and say what it saw.

    Args:
        op: takes ShardedTensors; also plain tensors, unless `reference` is given.
        shapes: global shapes of the operands; every dim a multiple of 6, or 1, to be cut by 2 and
            3.
        axes: number of mesh axes, 1 to 3.
        reference: the same on plain tensors.
        operands: makes the values (default: normal numbers).
        differentiable: compare gradients too.
        samples: draw that many combinations of layouts at random; None takes all.
        seed: of values and samples.
        no_grad: operands that need no gradient; integer ones never do.
    """
    found = Report()
    for sizes in SIZES[axes]:
        mesh = make_mesh(sizes, transport="simulated", device="cpu")
        rng = torch.Generator().manual_seed(seed)
        values = (
            operands(shapes, rng)
            if operands
            else [torch.randn(*s, generator=rng, dtype=torch.float64) for s in shapes]
        )
        every = [
            list(layouts_of(v.shape, mesh, integer=not v.dtype.is_floating_point)) for v in values
        ]
        combinations: Any = itertools.product(*every)
        if samples is not None:
            draw = random.Random(seed)
            combinations = [tuple(draw.choice(ls) for ls in every) for _ in range(samples)]
        for layouts in combinations:
            _try(op, reference or op, values, layouts, mesh, rng, differentiable, no_grad, found)
    return found


def _try(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    values: Sequence[Tensor],
    layouts: Sequence[Layout],
    mesh: Mesh,
    rng: torch.Generator,
    differentiable: bool,
    no_grad: Sequence[int],
    found: Report,
) -> None:
    key = (str(mesh), *map(str, layouts))
    live = [
        i
        for i, v in enumerate(values)
        if differentiable and v.dtype.is_floating_point and i not in no_grad
    ]
    sharded = [
        split(v, mesh, to, rng)
        if v.dtype.is_floating_point
        else from_local(cut(v, mesh, to), mesh, to)
        for v, to in zip(values, layouts, strict=True)
    ]

    def partial(*xs: ShardedTensor) -> Any:
        full = list(sharded)
        for i, x in zip(live, xs, strict=True):
            full[i] = x
        return op(*full)

    try:
        result, pull = vjp(partial, *[sharded[i] for i in live])
    except LayoutError as error:
        if error.kind == "choice":
            found.choice.append(key)
        else:
            found.wrong.append(f"{key}: {error}")
        return
    leaves = [v.clone().requires_grad_(i in live) for i, v in enumerate(values)]
    expected = reference(*leaves)
    outs, wants = _flat(result), _flat(expected)
    cotangents, given = [], []
    for out, want in zip(outs, wants, strict=True):
        if out.shape != want.shape:
            found.wrong.append(f"{key}: shape {tuple(out.shape)}, expected {tuple(want.shape)}")
            return
        if not _close(out.full_tensor(), want.detach()):
            found.wrong.append(
                f"{key} -> {out}: value off by {_off(out.full_tensor(), want.detach())}"
            )
            return
        if want.dtype.is_floating_point and live:
            g = torch.randn(want.shape, generator=rng, dtype=want.dtype)
            cotangents.append(split(g, mesh, out.layout.dual, rng))
            if want.requires_grad:
                given.append((want, g))
    found.right[key] = ", ".join(str(out.layout) for out in outs)
    if not given:
        return
    grads = torch.autograd.grad(
        [w for w, _ in given],
        [leaves[i] for i in live],
        [g for _, g in given],
        allow_unused=True,
        materialize_grads=True,
    )
    for i, mine, theirs in zip(live, pull(_like(result, cotangents)), grads, strict=True):
        if mine.layout is not layouts[i].dual:
            found.wrong.append(
                f"{key}: gradient {i} has layout '{mine.layout}', not the dual of '{layouts[i]}'"
            )
        try:
            whole = mine.full_tensor()
        except LayoutError as error:
            found.wrong.append(f"{key} -> {outs}: gradient {i}: {error}")
            continue
        if not _close(whole, theirs):
            found.wrong.append(f"{key} -> {outs}: gradient {i} off by {_off(whole, theirs)}")


def _flat(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple | list) else [result]


def _like(result: Any, cotangents: list[Any]) -> Any:
    return cotangents if isinstance(result, tuple | list) else cotangents[0]


def _close(a: Tensor, b: Tensor) -> bool:
    if not b.dtype.is_floating_point:
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)


def _off(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def audit(op: Callable[..., Any], shapes: Sequence[Sequence[int]], *, axes: int = 1) -> None:
    """Compare an op with itself unsharded: all layouts, value and gradient, in float64.

    Args:
        op: a function of tensors that runs on ShardedTensors and on plain ones (a torch function).
        shapes: global shapes; sizes that 6 divides let every cut be tried.
        axes: mesh axes; with 2 or 3, 300 combinations are drawn at random.

    Raises:
        AssertionError: listing every combination with a wrong value, gradient or gradient layout.

    >>> import torch, shardwise as sw
    >>> sw.ops.audit(torch.mul, [(6, 6), (6, 6)])
    """
    found = report(op, shapes, axes=axes, samples=None if axes == 1 else 300)
    if found.wrong or not found.right:
        raise AssertionError("\n".join(found.wrong[:20]) or "no combination of layouts runs")
