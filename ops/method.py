"""How a product of two runs: gathering operands whole, or as a panel product where one fits.

The planner decides as for any op; its decision is then read as a `Form` (`ops/panels.py`):

    move       a gather of an operand along a factor, or the scatter, along one, of the result's sum
               that `out` asks for
    streamed   two moves along the same factor over two axes of equal size: SUMMA. Y = X.W gathers
               both along the contracted factor; X.W^T and X^T.Y gather one and scatter the result
    ring       one move; of several the largest, the others are conversions

Whatever does not fit runs direct: three operands, integers, axes of different size, a letter that
only one tensor has, a sum that a bias must join before it is scattered. Types, values and gradients
are the same under every method.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from ..layouts.convert import Save
from ..layouts.layout import Layout, LayoutLike, with_state
from ..layouts.reshard import find_route, follow
from ..layouts.sharded import ShardedTensor, Type, make_type
from ..meshlib import record
from .dispatch import Op, Prepared, typed, wanted
from .panels import Form, multiplied
from .planner import route_cost

Method = Literal["direct", "streamed", "ring"]


@dataclass(frozen=True)
class Schedule:
    """A panel product, the layouts in which its operands enter, and that in which it leaves."""

    form: Form
    enter: tuple[Layout, Layout]
    leave: Layout


@dataclass(frozen=True)
class Move:
    """One tensor of a product (0, 1, or 2 the result) that a panel product can move."""

    tensor: int
    axis: str
    factor: str
    rest: Layout  # in which its blocks are
    elements: float  # that the conversion would move


def is_inexact(dtype: torch.dtype) -> bool:
    """Whether a sum of this dtype may stay owed."""
    return dtype.is_floating_point or dtype.is_complex


def check_method(op: str, method: str) -> None:
    """Raise for a method that there is not."""
    if method not in get_args(Method):
        known = ", ".join(map(repr, get_args(Method)))
        raise ValueError(f"{op}: unknown method {method!r} (known: {known})")


def schedule(
    prepared: Prepared,
    out: LayoutLike | None,
    method: Method,
    scatter: bool,
    reduce_dtype: torch.dtype | None = None,
) -> Schedule | None:
    """The panel product that carries out a decision; None where only the direct way fits.

    Args:
        prepared: the plan of a product.
        out: of the call.
        method: not "direct".
        scatter: whether a sum may be reduced on the way: nothing joins it.
        reduce_dtype: in which sums are taken.
    """
    rule, kinds, decision = prepared.rule, prepared.kinds, prepared.decision
    names = [tuple(dim[0] if dim else "" for dim in dims) for dims in (*rule.inputs, *rule.outputs)]
    letters = [c for have in names for c in have]
    if len(names) != 3 or any(c == "" or letters.count(c) < 2 for c in letters):
        return None
    if kinds[0].dtype != kinds[1].dtype:
        return None
    if any(k.layout.memory != "device" or not is_inexact(k.dtype) for k in kinds):
        return None
    mesh = kinds[0].mesh
    every = [*_gathers(prepared, 0), *_gathers(prepared, 1)]
    every += _scatters(prepared, out) if scatter else []
    ways = (
        [(move,) for move in every]
        if method == "ring"
        else [
            (one, other)
            for one, other in itertools.combinations(every, 2)
            if one.factor == other.factor
            and one.tensor != other.tensor
            and mesh.axes[one.axis] == mesh.axes[other.axis]
        ]
    )
    moves = max(ways, key=lambda way: sum(move.elements for move in way), default=())
    if not moves:
        return None
    axes = [next((m.axis for m in moves if m.tensor == n), None) for n in range(3)]
    rest = [*decision.targets, decision.outputs[0]]
    for move in moves:
        rest[move.tensor] = move.rest
    ring = method == "ring"
    form = Form(mesh, (*names,), moves[0].factor, (*axes,), ring, wide=reduce_dtype)  # pyright: ignore
    return Schedule(form, (rest[0], rest[1]), rest[2])


def _gathers(prepared: Prepared, number: int) -> list[Move]:
    """Gathers of an operand that panels can replace: of the last axis of a dim, to reduced."""
    kind, target = prepared.kinds[number], prepared.decision.targets[number]
    found = []
    for axis, dim in kind.layout.axes.items():
        if isinstance(dim, int) and target.state(axis) == "reduced":
            rest = with_state(target, axis, dim)
            elements = _saved(kind, rest, target)
            if elements:
                found.append(
                    Move(number, axis, prepared.rule.inputs[number][dim][0], rest, elements)
                )
    return found


def _scatters(prepared: Prepared, out: LayoutLike | None) -> list[Move]:
    """Sums of the result that `out` cuts."""
    rule, first = prepared.rule, prepared.kinds[0]
    natural = prepared.decision.outputs[0]
    if out is None or not natural.unreduced:
        return []
    shape = [math.prod(rule.sizes[f] for f in dim) for dim in rule.outputs[0]]
    kind = make_type(first.mesh, natural, shape, first.dtype, first.grad)
    target = wanted("einsum", out, natural, shape, first.mesh)
    found = []
    for axis in sorted(natural.unreduced):
        dim = target.state(axis)
        if isinstance(dim, int):
            rest = with_state(natural, axis, dim)
            elements = _saved(kind, rest, target, before=True)
            if elements:
                found.append(Move(2, axis, rule.outputs[0][dim][0], rest, elements))
    return found


def _saved(kind: Type, rest: Layout, target: Layout, before: bool = False) -> float:
    """Elements that the one conversion moves which panels replace; 0 where it is not on the way.

    It stands between `rest` and the target, or, `before`, between the type and `rest`.
    """
    mesh = kind.mesh
    for size, axes in zip(kind.shape, rest.dims, strict=True):
        if size % mesh.group_size(axes):
            return 0
    middle = kind.with_layout(rest)
    one, other = route_cost(kind, rest)[0], route_cost(middle, target)[0]
    if one + other > route_cost(kind, target)[0]:
        return 0
    return one if before else other


def multiply(
    op: Op,
    operands: Sequence[Any],
    static: tuple[Any, ...],
    out: LayoutLike | None,
    over: Mapping[str, str] | None,
    *,
    method: Method = "direct",
    save: Save = "gathered",
    reduce_dtype: torch.dtype | None = None,
    scatter: bool = True,
) -> ShardedTensor:
    """A product on the way to `out`, by a method; its sums are left owed but for those it moves.

    Args:
        op: einsum.
        operands: of the op.
        static: of the op.
        out: settles choices.
        over: likewise.
        method: "direct", "streamed" or "ring".
        save: of gathers.
        reduce_dtype: in which sums are taken.
        scatter: whether a panel product may reduce the result's sum, because nothing joins it.
    """
    if method == "direct" and save == "gathered" and reduce_dtype is None:
        return op.toward(operands, static, out, over)
    operands = typed(operands)
    plan = op.planned(operands, static, out, over, toward=True)
    assert plan is not None
    found = _scheduled(plan, out, method, scatter, reduce_dtype)
    with _acting(op.name, plan.why):
        moved = [
            _moved(x, to, save, reduce_dtype)
            for x, to in zip(operands, _enter(plan, found), strict=True)
        ]
        return _carried_out(op, plan, found, moved, static)


def _acting(name: str, why: record.Why) -> AbstractContextManager[None]:
    """Names what moves inside, where that is recorded."""
    return record.acting(name, why) if record.LOGS else nullcontext()


def _enter(plan: Prepared, found: Schedule | None) -> tuple[Layout, ...]:
    """The layouts in which operands enter the product."""
    return plan.decision.targets if found is None else found.enter


def _carried_out(
    op: Op,
    plan: Prepared,
    found: Schedule | None,
    moved: Sequence[ShardedTensor],
    static: tuple[Any, ...],
) -> ShardedTensor:
    """The product of operands that have entered."""
    if found is None:
        return op(moved, static)
    shards = multiplied(found.form, [x._shards for x in moved], record.context())
    return _result(op.name, plan, found.leave, moved, shards)


def _scheduled(
    plan: Prepared,
    out: LayoutLike | None,
    method: Method,
    scatter: bool,
    reduce_dtype: torch.dtype | None = None,
) -> Schedule | None:
    """`schedule`, once per plan and method."""
    if method == "direct":
        return None
    key = (method, scatter, reduce_dtype)
    if key not in plan.schedules:
        plan.schedules[key] = schedule(plan, out, method, scatter, reduce_dtype)
    return plan.schedules[key]


def _moved(
    x: ShardedTensor, to: Layout, save: Save = "gathered", reduce_dtype: torch.dtype | None = None
) -> ShardedTensor:
    route = find_route(x._type, to)
    assert route is not None
    return follow(x, route, save, reduce_dtype)


def _result(
    name: str, plan: Prepared, leave: Layout, operands: Sequence[ShardedTensor], shards: Any
) -> ShardedTensor:
    """The shards of a panel product with their type, on the record."""
    first = plan.kinds[0]
    shape = [math.prod(plan.rule.sizes[f] for f in dim) for dim in plan.rule.outputs[0]]
    grad = torch.is_grad_enabled() and any(k.grad for k in plan.kinds)
    result = ShardedTensor(
        tuple(shards), make_type(first.mesh, leave, shape, shards[0].dtype, grad)
    )
    if record.LOGS:
        record.op(name, tuple(map(str, operands)), str(result), plan.flops, first.mesh)
    return result


def arrive(
    x: ShardedTensor,
    out: LayoutLike,
    name: str,
    save: Save = "gathered",
    reduce_dtype: torch.dtype | None = None,
) -> ShardedTensor:
    """The product in the layout that `out` asks for."""
    with _acting(name, "out"):
        return _moved(x, wanted(name, out, x.layout, x.shape, x.mesh), save, reduce_dtype)


def multiply_all(
    op: Op,
    x: ShardedTensor,
    weights: Sequence[Any],
    statics: Sequence[tuple[Any, ...]],
    outs: Sequence[LayoutLike | None],
    over: Mapping[str, str] | None,
    *,
    method: Method = "direct",
    scatter: Sequence[bool],
) -> list[ShardedTensor]:
    """Products of one tensor with several, on the way to `outs`: it is converted, or moved, once.

    Where a panel product moves `x`, the weights' local blocks are joined and it moves once for all.
    """
    pairs = [typed((x, w)) for w in weights]
    plans = []
    for pair, static, out in zip(pairs, statics, outs, strict=True):
        plan = op.planned(pair, static, out, over, toward=True)
        assert plan is not None
        plans.append(plan)
    found = [
        _scheduled(plan, out, method, free)
        for plan, out, free in zip(plans, outs, scatter, strict=True)
    ]
    if _fit_together(found):
        return _joined(op, x, [w for _, w in pairs], plans, found)
    moved: dict[Layout, ShardedTensor] = {}
    results = []
    for plan, how, (_, w), static in zip(plans, found, pairs, statics, strict=True):
        to, other = _enter(plan, how)
        with _acting(op.name, plan.why):
            if to not in moved:
                moved[to] = _moved(x, to)
            results.append(_carried_out(op, plan, how, (moved[to], _moved(w, other)), static))
    return results


def _fit_together(found: Sequence[Schedule | None]) -> bool:
    """Whether the schedules move `x` alike, so that it can move once for all."""
    first = found[0]
    if len(found) < 2 or first is None or first.form.axes[0] is None:
        return False
    keys = {
        (s.form.axes, s.form.factor, s.form.letters[0], s.enter[0]) if s else None for s in found
    }
    return len(keys) == 1


def _joined(
    op: Op,
    x: ShardedTensor,
    weights: Sequence[ShardedTensor],
    plans: Sequence[Any],
    found: Sequence[Any],
) -> list[ShardedTensor]:
    """One panel product with the weights' blocks side by side, their own dims flattened."""
    form = found[0].form
    batch = [c for c in form.letters[0] if c in form.letters[2]]
    inner = [c for c in form.letters[0] if c not in form.letters[2]]
    letters = (form.letters[0], (*inner, "*"), (*batch, "*"))
    with _acting(op.name, plans[0].why):
        moved = [_moved(x, found[0].enter[0])]
        moved += [_moved(w, s.enter[1]) for w, s in zip(weights, found, strict=True)]
        # [inner..., out...] -> [inner..., all of out]
        blocks = [[w.reshape(*w.shape[: len(inner)], -1) for w in m._shards] for m in moved[1:]]
        side = [torch.cat(row, -1) for row in zip(*blocks, strict=True)]
        whole = multiplied(
            replace(form, letters=letters), [moved[0]._shards, side], record.context()
        )
        widths = [b[0].shape[-1] for b in blocks]
        parts = zip(*(y.split(widths, -1) for y in whole), strict=True)
        return [
            _result(op.name, plan, s.leave, (x, w), [
                y.reshape(*y.shape[:-1], *m.local_shape[len(inner) :]) for y in ys
            ])
            for plan, s, w, m, ys in zip(plans, found, weights, moved[1:], parts, strict=True)
        ]  # fmt: skip
