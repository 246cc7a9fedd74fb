"""The planner: operand types and a factor rule in, conversions and the result's layout out.

On each mesh axis an op runs in one *mode*, and the types decide which:

    mode         operands must be                                     result
    factor f     cut on f if they have it, else reduced               cut on f if kept,
                                                                      else unreduced
    replicated   all replicated                                       replicated
    reduced      all reduced                                          reduced
    unreduced    addition: all unreduced; otherwise one operand that  unreduced
                 the op is linear in, the others reduced
    varying      all varying or reduced (shard_map, vmap)             varying

 1. some operands cut, all on one factor: that factor;
 2. none cut, some unreduced: addition carries them; one alone is carried past reduced or
    undifferentiated others; otherwise every unreduced operand is all_reduced to replicated;
 3. only replicated and reduced: that state; where both meet, replicated;
 4. cut on different factors, or on a blocked one without a protocol: a choice.

A choice is settled by `over` (axis to factor), by `out` (the result's layout), or by
`sw.cheapest()`; else it is a `Choice`, from which `ops/choices.py` words the error and its fixes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from ..layouts.layout import Layout, State, make, resolve, with_state
from ..layouts.reshard import Route, find_route, moved
from ..layouts.sharded import Type, make_type
from ..meshlib.mesh import Mesh
from .rules import Dims, Rule

Mode = str  # a factor, or one of STATES
STATES = ("replicated", "reduced", "unreduced", "varying")
LINK_BYTES, DEVICE_FLOPS = 2e11, 4e14  # per second: about an NVLink and an H100 in bf16
CHEAPEST: ContextVar[bool] = ContextVar("cheapest", default=False)


@contextmanager
def cheapest() -> Any:
    """Inside, choices take the fastest route (bytes and FLOPs) instead of raising; it is recorded.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"tensor": 2})
    >>> x = sw.shard(torch.ones(4, 8), mesh, "b k/tensor")
    >>> w = sw.shard(torch.ones(8, 2), mesh, "k n/tensor")
    >>> with sw.cheapest():
    ...     (x @ w).layout
    Layout('_ _ {U:tensor}')
    """
    token = CHEAPEST.set(True)
    try:
        yield
    finally:
        CHEAPEST.reset(token)


@dataclass(frozen=True)
class Spot:
    """Where an axis is in one operand: its state, or the factor that it cuts (None: none fits)."""

    state: State
    factor: str | None = None


@dataclass(frozen=True)
class Decision:
    """What to do: a target layout per operand and the route there, and the results' layouts."""

    modes: Mapping[str, Mode]
    targets: tuple[Layout, ...]
    routes: tuple[Route, ...]
    outputs: tuple[Layout, ...]
    blocked: frozenset[str]  # blocked or reduced factors that are cut: a protocol must run
    moved: float  # elements per device, forward
    orders: Mapping[str, tuple[str, ...]]  # factor to the axes that cut it


class Choice(Exception):
    """Rule 4: the axis at fault, why, and the modes to choose from."""

    def __init__(self, axis: str, why: str, options: Mapping[str, list[Mode]]) -> None:
        super().__init__(why)
        self.axis = axis
        self.why = why
        self.options = options


class Unfit(Exception):
    """These modes cannot be laid out: an axis order, an indivisible factor, or a merge."""

    def __init__(self, axis: str, why: str) -> None:
        super().__init__(why)
        self.axis = axis
        self.why = why


def spots(dims: Dims, kind: Type, sizes: Mapping[str, int]) -> dict[str, Spot]:
    """Where each axis of an operand stands. Axes fill the most major factor of a dim first."""
    key = ("spots", dims, *[sizes[f] for factors in dims for f in factors])
    known = kind.moves.get(key)
    if known is None:
        known = kind.moves[key] = _spots(dims, kind, sizes)
    return known


def _spots(dims: Dims, kind: Type, sizes: Mapping[str, int]) -> dict[str, Spot]:
    layout, mesh = kind.layout, kind.mesh
    found: dict[str, Spot] = {
        axis: Spot(state) for axis, state in layout.axes.items() if not isinstance(state, int)
    }
    for number, (factors, axes) in enumerate(zip(dims, layout.dims, strict=True)):
        left = [sizes[f] for f in factors]
        at = 0
        for axis in axes:
            n = mesh.axes[axis]
            while at < len(left) - 1 and left[at] == 1 and n > 1:
                at += 1
            if at < len(left) and left[at] % n == 0:
                left[at] //= n
                found[axis] = Spot(number, factors[at])
            else:
                found[axis] = Spot(number, None)
                at = len(left)
    return found


def decide(
    rule: Rule,
    kinds: Sequence[Type],
    grads: Sequence[bool],
    *,
    over: Mapping[str, Mode] | None = None,
    out: str | Layout | None = None,
    has_protocol: bool = False,
) -> Decision:
    """The cheapest decision that the rules, `over` and `out` leave.

    Raises:
        Choice: rule 4 applies and nothing settles it.
    """
    mesh = kinds[0].mesh
    if all(not k.layout.axes for k in kinds) and out is None and not over:
        return _nothing(rule, kinds)
    where = [spots(d, k, rule.sizes) for d, k in zip(rule.inputs, kinds, strict=True)]
    axes = sorted(set(over or ()).union(*where), key=list(mesh.axes).index)
    options: dict[str, list[Mode]] = {}
    problem: tuple[str, str] | None = None
    for axis in axes:
        named = (over or {}).get(axis)
        if named in rule.blocked and not has_protocol:
            mode, why = None, "the op needs that dim whole"
        elif named is not None:
            mode, why = named, ""
        else:
            mode, why = mode_of(axis, rule, where, grads, has_protocol)
        if mode is not None:
            options[axis] = [mode]
        else:
            problem = problem or (axis, why)
            options[axis] = choices(axis, rule, where)
    if problem is None or out is not None or CHEAPEST.get():
        wide = problem is not None and CHEAPEST.get()
        best = _best(rule, kinds, mesh, options, out, where, wide)
        if isinstance(best, Unfit) and (out is not None or CHEAPEST.get()):
            ways = list(dict.fromkeys([*options[best.axis], *elsewhere(best.axis, rule, where)]))
            options = {**options, best.axis: ways}
            best = _best(rule, kinds, mesh, options, out, where, wide, any_order=True)
        if isinstance(best, Decision):
            return best
        problem = (best.axis, best.why)
        options = {**options, best.axis: options.get(best.axis) or choices(best.axis, rule, where)}
    raise Choice(*problem, options)


def _nothing(rule: Rule, kinds: Sequence[Type]) -> Decision:
    """All operands replicated on every axis: the commonest case on one device."""
    like = kinds[0].layout
    return Decision(
        {},
        tuple(k.layout for k in kinds),
        ((),) * len(kinds),
        tuple(make(((),) * len(dims), memory=like.memory, at=like.at) for dims in rule.outputs),
        frozenset(),
        0,
        {},
    )


def mode_of(
    axis: str,
    rule: Rule,
    where: Sequence[Mapping[str, Spot]],
    grads: Sequence[bool],
    has_protocol: bool,
) -> tuple[Mode | None, str]:
    """The mode that rules 1 to 3 give an axis, or None and the reason why it is a choice."""
    at = [spot.get(axis, Spot("replicated")) for spot in where]
    cut = [s for s in at if isinstance(s.state, int)]
    states = [s.state for s in at]
    if "varying" in states:
        return ("varying", "") if not cut else (None, "it varies in one operand and cuts another")
    if cut:
        factors = {s.factor for s in cut}
        if None in factors:
            return None, "it does not fit the new shape"
        if len(factors) > 1:
            return None, "it is wanted twice"
        (factor,) = factors
        assert factor is not None
        if factor in rule.blocked and not has_protocol:
            return None, "the op needs that dim whole"
        return factor, ""
    owed = [i for i, s in enumerate(states) if s == "unreduced"]
    if owed:
        if rule.joint:
            return "unreduced", ""
        if len(owed) == 1 and owed[0] in rule.linear:
            others = [i for i in range(len(states)) if i != owed[0]]
            if all(states[i] == "reduced" or not grads[i] for i in others):
                return "unreduced", ""
        return "replicated", ""
    heard = [s for s, g in zip(states, grads, strict=True) if g] or states
    return ("reduced" if set(heard) == {"reduced"} else "replicated"), ""


def choices(axis: str, rule: Rule, where: Sequence[Mapping[str, Spot]]) -> list[Mode]:
    """The factors that an operand is cut on by the axis and the op can run on."""
    found: list[Mode] = []
    for spot in where:
        factor = spot.get(axis, Spot("replicated")).factor
        if factor is not None and factor not in rule.blocked and factor not in found:
            found.append(factor)
    return found


def elsewhere(axis: str, rule: Rule, where: Sequence[Mapping[str, Spot]]) -> list[Mode]:
    """Other modes for a choice: a kept factor of an operand that the axis cuts, or replicated."""
    found: list[Mode] = []
    kept = frozenset().union(*(rule.factors(dims) for dims in rule.outputs))
    for spot, dims in zip(where, rule.inputs, strict=True):
        if isinstance(spot.get(axis, Spot("replicated")).state, int):
            found += [
                f
                for dim in dims
                for f in dim
                if f in kept and f not in rule.blocked and f not in rule.reduced and f not in found
            ]
    return [*found, "replicated"]


def _best(
    rule: Rule,
    kinds: Sequence[Type],
    mesh: Mesh,
    options: Mapping[str, list[Mode]],
    out: str | Layout | None,
    where: Sequence[Mapping[str, Spot]],
    wide: bool,
    any_order: bool = False,
) -> Decision | Unfit:
    """The decision that moves least, over all combinations of the options that `out` leaves.

    `any_order`: operands that cut a factor in different orders of axes may be converted to one of
    them.
    """
    if out is not None:
        options = _favoured(rule, options, out, mesh, where)
    if wide:
        options = {
            axis: list(dict.fromkeys([*modes, *elsewhere(axis, rule, where)]))
            if len(modes) != 1
            else modes
            for axis, modes in options.items()
        }
    best: Decision | None = None
    least = math.inf
    failure: Unfit | None = None
    several = math.prod(map(len, options.values())) > 1
    for combination in itertools.product(*options.values()):
        modes = dict(zip(options, combination, strict=True))
        try:
            laid = [lay_out(rule, kinds, modes)]
        except Unfit as unfit:
            failure = failure or unfit
            laid = list(in_each_order(rule, kinds, modes)) if any_order else []
        for found in laid:
            cost = found.moved
            if out is not None and (several or len(laid) > 1):
                cost += _after(rule, found, kinds, out)
            if cost < least:
                best, least = found, cost
    if best is None:
        if failure is None:
            axis = next(a for a, modes in options.items() if not modes)
            failure = Unfit(axis, "the op needs that dim whole")
        return failure
    return best


def seconds(decision: Decision, rule: Rule, kinds: Sequence[Type]) -> float:
    """A rough time: bytes over a fast link, plus two FLOPs per point of the factors' local space.

    Only ratios matter here: a route that repeats work on every device must not look free.
    """
    mesh = kinds[0].mesh
    cut = math.prod(mesh.group_size(axes) for axes in decision.orders.values())
    points = math.prod(rule.sizes.values()) / cut
    return bytes_of(kinds, decision) / LINK_BYTES + 2 * points / DEVICE_FLOPS


def _favoured(
    rule: Rule,
    options: Mapping[str, list[Mode]],
    out: str | Layout,
    mesh: Mesh,
    where: Sequence[Mapping[str, Spot]],
) -> dict[str, list[Mode]]:
    """In a choice, the factor that `out` cuts by the axis if an operand has it; else all."""
    if all(len(modes) == 1 for modes in options.values()):
        return dict(options)
    dims = rule.outputs[0]
    wanted = resolve(out, len(dims))
    found: dict[str, list[Mode]] = {}
    for axis, modes in options.items():
        at = wanted.state(axis)
        named = [f for f in dims[at]] if isinstance(at, int) else []
        hit = [f for f in named if f in modes]
        if not hit and not modes and named:  # blocked: another factor that an operand has
            hit = [f for f in named if f in elsewhere(axis, rule, where)]
        found[axis] = hit or list(modes) if len(modes) != 1 else list(modes)
    return found


def _after(rule: Rule, found: Decision, kinds: Sequence[Type], out: str | Layout) -> float:
    """Elements that the conversion of the result to `out` moves."""
    shape = [math.prod(rule.sizes[f] for f in dim) for dim in rule.outputs[0]]
    first = kinds[0]
    kind = _virtual(first, shape, found.outputs[0])
    target = resolve(out, len(shape), found.outputs[0], shape, first.mesh)
    return route_cost(kind, target)[0]


def _virtual(like: Type, shape: Sequence[int], layout: Layout) -> Type:
    return make_type(like.mesh, layout, shape, like.dtype, like.grad)


def route_cost(kind: Type, target: Layout) -> tuple[float, Route]:
    """Elements moved per device from a type to a layout, and the route."""
    route = find_route(kind, target)
    if route is None:
        return math.inf, ()
    total = 0.0
    now = kind
    for number, move in enumerate(route, 1):
        total += moved(now, move)
        if number < len(route):
            now = now.with_layout(after(now.layout, move))
    return total, route


def after(layout: Layout, move: Any) -> Layout:
    """The layout behind one conversion."""
    axes, to = move
    for axis in axes if isinstance(to, int) else reversed(axes):
        layout = with_state(layout, axis, to)
    return layout


def in_each_order(
    rule: Rule, kinds: Sequence[Type], modes: Mapping[str, Mode]
) -> Iterator[Decision]:
    """Where operands cut a factor in different orders: the decisions that follow each one's."""
    for lead in range(len(kinds)):
        with suppress(Unfit):
            yield lay_out(rule, kinds, modes, lead)


def lay_out(
    rule: Rule, kinds: Sequence[Type], modes: Mapping[str, Mode], lead: int | None = None
) -> Decision:
    """Targets, routes and result layouts for one mode per axis.

    Args:
        rule: of the op.
        kinds: of the operands.
        modes: axis to mode.
        lead: the operand whose order of axes wins; None refuses different orders.

    Raises:
        Unfit: an order of axes, an indivisible factor or a merged dim that has no layout.
    """
    mesh = kinds[0].mesh
    where = [spots(d, k, rule.sizes) for d, k in zip(rule.inputs, kinds, strict=True)]
    orders = _orders(rule, kinds, where, modes, mesh, lead)
    targets: list[Layout] = []
    for number, (dims, kind) in enumerate(zip(rule.inputs, kinds, strict=True)):
        has = rule.factors(dims)
        states: dict[str, set[str]] = {"unreduced": set(), "reduced": set(), "varying": set()}
        for axis, mode in modes.items():
            now = where[number].get(axis, Spot("replicated")).state
            state = _required(rule, mode, now, has)
            if state in states:
                states[state].add(axis)
        targets.append(
            make(
                _cut(dims, orders, rule.sizes, mesh),
                frozenset(states["unreduced"]),
                frozenset(states["reduced"]),
                frozenset(states["varying"]),
                kind.layout.memory,
                kind.layout.at,
            )
        )
    outputs = tuple(
        _result(rule, dims, modes, orders, mesh, kinds[0].layout) for dims in rule.outputs
    )
    costs = [route_cost(k, t) for k, t in zip(kinds, targets, strict=True)]
    total = sum(cost for cost, _ in costs)
    if total == math.inf:
        raise Unfit(next(iter(modes)), "no conversion leads there")
    needed = frozenset(m for m in modes.values() if m in rule.blocked or m in rule.reduced)
    return Decision(
        modes, tuple(targets), tuple(r for _, r in costs), outputs, needed, total, orders
    )


def _required(rule: Rule, mode: Mode, now: State, has: frozenset[str]) -> str:
    """The state that a mode asks of an operand on an axis ("cut" where it has the factor)."""
    if mode == "varying":
        return "varying" if now == "varying" else "reduced"
    if mode == "unreduced":
        return "unreduced" if rule.joint or now == "unreduced" else "reduced"
    if mode in ("replicated", "reduced"):
        return mode
    return "cut" if mode in has else "reduced"


def _orders(
    rule: Rule,
    kinds: Sequence[Type],
    where: Sequence[Mapping[str, Spot]],
    modes: Mapping[str, Mode],
    mesh: Mesh,
    lead: int | None,
) -> dict[str, tuple[str, ...]]:
    """Per factor the axes that cut it, major to minor: the operands' own order, or Unfit."""
    orders: dict[str, tuple[str, ...]] = {}
    for factor in dict.fromkeys(m for m in modes.values() if m not in STATES):
        if factor not in rule.sizes:
            raise Unfit(
                next(a for a, m in modes.items() if m == factor), f"the op has no factor {factor!r}"
            )
        mine = [a for a, m in modes.items() if m == factor]
        have = []
        for spot, kind in zip(where, kinds, strict=True):
            ordered = [a for axes in kind.layout.dims for a in axes if a in mine]
            have.append([a for a in ordered if spot[a].factor == factor])
        order = list(max(have, key=len) if lead is None else have[lead])
        order += [a for other in have for a in other if a not in order]
        order = list(dict.fromkeys([*order, *mine]))
        for other in have:
            if (
                lead is None
                and other != order[: len(other)]
                and all(
                    spot.get(a, Spot("replicated")).factor in (None, factor)
                    for spot in where
                    for a in mine
                )
            ):
                raise Unfit(
                    other[0],
                    f"operands cut one dim in the orders {'/'.join(order)} and {'/'.join(other)}",
                )
        over = math.prod(mesh.axes[a] for a in order)
        if rule.sizes[factor] % over:
            raise Unfit(
                order[-1],
                f"size {rule.sizes[factor]} is not divisible by {over} ({'/'.join(order)})",
            )
        orders[factor] = tuple(order)
    return orders


def _cut(
    dims: Dims, orders: Mapping[str, tuple[str, ...]], sizes: Mapping[str, int], mesh: Mesh
) -> tuple[tuple[str, ...], ...]:
    """Axes per dim. A minor factor of a dim can be cut only where the major ones are used up."""
    result: list[tuple[str, ...]] = []
    for factors in dims:
        axes: list[str] = []
        whole = True  # every factor so far is used up
        for factor in factors:
            mine = orders.get(factor, ())
            n = math.prod(mesh.axes[a] for a in mine)
            if mine and not whole:  # also an axis of size 1: types do not depend on sizes
                raise Unfit(mine[0], "it would cut a minor part of a merged dim")
            axes += mine
            whole = whole and n == sizes[factor]
        result.append(tuple(axes))
    return tuple(result)


def _result(
    rule: Rule,
    dims: Dims,
    modes: Mapping[str, Mode],
    orders: Mapping[str, tuple[str, ...]],
    mesh: Mesh,
    like: Layout,
) -> Layout:
    """The result's layout: kept factors stay cut, summed ones leave a sum owed."""
    has = rule.factors(dims)
    states: dict[str, set[str]] = {"unreduced": set(), "reduced": set(), "varying": set()}
    for axis, mode in modes.items():
        if mode in states:
            states[mode].add(axis)
        elif mode not in STATES and mode not in has:
            states["unreduced"].add(axis)
    return make(
        _cut(dims, orders, rule.sizes, mesh),
        frozenset(states["unreduced"]),
        frozenset(states["reduced"]),
        frozenset(states["varying"]),
        like.memory,
        like.at,
    )


def bytes_of(kinds: Sequence[Type], decision: Decision) -> float:
    """Bytes per device that the operands' conversions move."""
    return sum(
        route_cost(k, t)[0] * k.dtype.itemsize for k, t in zip(kinds, decision.targets, strict=True)
    )
