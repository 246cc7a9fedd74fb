"""From a call to its result: one lookup by the operands' interned types, then the local torch call.

An `Op` is a name, a factor rule and a local function. On the first call with given types the
planner decides and the result is kept as a `Prepared`; later calls find it. A call whose plan
converts nothing touches no autograd Function and no context.

`rule(shapes, *static)` gives the Rule; `local(info)` gives the function that runs on local tensors,
or one function per held shard where the result depends on the block's place. `protocol(operands,
static)` runs instead where a blocked factor is cut: a few other ops that exchange statistics only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from ..layouts.layout import Layout, LayoutLike, resolve, with_state
from ..layouts.memory import VIEWS, refuse_disk
from ..layouts.place import constant
from ..layouts.reshard import Route, find_route, follow, reshard_one
from ..layouts.sharded import TORCH, ShardedTensor, Type, install, make_type
from ..meshlib import record
from ..meshlib.errors import LayoutError, MeshError, nearest, word
from ..meshlib.mesh import Mesh
from ..meshlib.source import user_line
from .choices import refuse
from .planner import CHEAPEST, Choice, Decision, decide
from .rules import Rule

Local = Callable[..., Any] | list[Callable[..., Any]]
_grad_enabled = torch.is_grad_enabled


@dataclass(frozen=True)
class Info:
    """What a local function may depend on: rule, static arguments, and where each block lies."""

    rule: Rule
    static: tuple[Any, ...]
    mesh: Mesh
    kinds: tuple[Type, ...]  # of the operands, after their conversions
    decision: Decision

    def size(self, factor: str) -> int:
        """Local size of a factor."""
        return self.rule.sizes[factor] // self.mesh.group_size(self.axes(factor))

    def axes(self, factor: str) -> tuple[str, ...]:
        """The axes that cut a factor."""
        return self.decision.orders.get(factor, ())

    def offsets(self, factor: str) -> list[int]:
        """Global index of the first local entry of a factor, per held shard."""
        size = self.size(factor)
        return [p * size for p in self.mesh.positions(self.axes(factor))]

    def out_shape(self, number: int = 0) -> tuple[int, ...]:
        """Local shape of a result."""
        return tuple(math.prod(self.size(f) for f in dim) for dim in self.rule.outputs[number])


class Prepared:
    """A planned call: conversions of the operands, the local function, the results' types."""

    __slots__ = (
        "decision", "flops", "fn", "fns", "kinds", "moves", "out", "out_routes", "outs", "plain",
        "protocol", "rule", "schedules", "several", "why",
    )  # fmt: skip

    rule: Rule
    kinds: Sequence[Type]
    decision: Decision
    out: LayoutLike | None
    flops: float  # of one device
    several: bool  # whether the local function gives a tuple
    moves: tuple[Route, ...] | None  # None: no operand is converted
    fn: Callable[..., Any]
    fns: list[Callable[..., Any]] | None
    outs: tuple[Type, ...] | None  # of the results before out_routes; known after the first run
    out_routes: tuple[Route, ...] | None
    protocol: bool
    plain: Any  # the result's Type where nothing but the local call is needed, else None
    why: record.Why
    schedules: dict[Any, Any]  # panel products that carry the decision out, by method


class Op:
    """One op: its rule and local function, and the calls prepared so far."""

    def __init__(
        self,
        name: str,
        rule: Callable[..., Rule],
        local: Callable[[Info], Local],
        *,
        protocol: Callable[..., Any] | None = None,
        differentiable: bool = True,
        flops: Callable[[Info], float] | None = None,
    ) -> None:
        self.name = name
        self.rule = rule
        self.local = local
        self.protocol = protocol
        self.differentiable = differentiable
        self.flops = flops
        self.cache: dict[Any, Prepared] = {}
        self.cache_toward: dict[Any, Prepared] = {}  # of calls that leave the result unconverted
        # Those that convert nothing and give one result, under short keys: (types, grad) of
        # unary and binary calls, (static, grad, types) of all others.
        self.fast: dict[Any, Prepared] = {}

    def __call__(
        self,
        operands: Sequence[Any],
        static: tuple[Any, ...] = (),
        out: LayoutLike | None = None,
        over: Mapping[str, str] | None = None,
    ) -> Any:
        """Run the op. Operands are ShardedTensors, plain tensors (constants) or numbers."""
        if out is None and over is None and not record.LOGS:
            try:
                short = (static, _grad_enabled(), *[x._type for x in operands])
            except AttributeError:  # a number or a plain tensor among them
                short = None
            ready = self.fast.get(short)
            if ready is not None:
                return rerun(ready, *operands)
        else:
            short = None
        if out is not None and isinstance(out, Tensor | ShardedTensor):
            raise TypeError(
                f"{self.name}: out= names the result's layout here, a string; "
                "nothing is written in place"
            )
        prepared = self.planned(operands, static, out, over)
        if prepared is None:
            return self(typed(operands), static, out, over)
        result = self.run(prepared, operands, static)
        if short is not None and prepared.plain is not None and not CHEAPEST.get():
            self.fast[short] = prepared
        return result

    def toward(
        self,
        operands: Sequence[Any],
        static: tuple[Any, ...] = (),
        out: LayoutLike | None = None,
        over: Mapping[str, str] | None = None,
    ) -> Any:
        """Run the op on the way to `out`, which settles choices; the result is left unconverted.

        For what must join a sum before it is reduced, such as a bias.
        """
        if out is None:
            return self(operands, static, None, over)
        operands = typed(operands)
        prepared = self.planned(operands, static, out, over, toward=True)
        assert prepared is not None
        return self.run(prepared, operands, static)

    def planned(
        self,
        operands: Sequence[Any],
        static: tuple[Any, ...],
        out: LayoutLike | None,
        over: Mapping[str, str] | None,
        *,
        toward: bool = False,
    ) -> Prepared | None:
        """The plan of a call, from the cache if its types were seen before.

        `toward`: `out` settles choices, but the result is not converted to it. None where a plain
        tensor stands among the operands.
        """
        cache = self.cache_toward if toward else self.cache
        key = (
            static,
            out,
            tuple(over.items()) if over else None,
            _grad_enabled(),
            CHEAPEST.get(),
            *[x._type if type(x) is ShardedTensor else type(x) for x in operands],
        )
        prepared = cache.get(key)
        if prepared is None and not any(isinstance(x, Tensor) for x in operands):
            prepared = self.prepare(operands, static, out, over)
            if toward:
                prepared.out = None
            cache[key] = prepared
        return prepared

    def prepare(
        self,
        operands: Sequence[Any],
        static: tuple[Any, ...],
        out: LayoutLike | None,
        over: Mapping[str, str] | None,
    ) -> Prepared:
        """Plan a call whose types were not seen before."""
        tensors = [x for x in operands if isinstance(x, ShardedTensor)]
        if not tensors:
            raise TypeError(f"{self.name}: {_NO_MESH}")
        kinds = [x._type for x in tensors]
        mesh = kinds[0].mesh
        for number, kind in enumerate(kinds):
            if kind.mesh is not mesh:
                raise MeshError(
                    word(
                        f"operands 0 and {number} lie on two meshes, {mesh} and {kind.mesh}"
                        "\nmove one: sw.reshard(x, layout, mesh=...)",
                        op=self.name,
                        source=user_line(),
                        operands=[(f"operand {i}", str(x)) for i, x in enumerate(tensors)],
                    )
                )
        if self.name not in VIEWS:
            refuse_disk(self.name, kinds)
        if len({k.layout.memory for k in kinds}) > 1 and any(k.shape for k in kinds):
            raise LayoutError(
                word(
                    "operands lie in different memories\n"
                    "move one: sw.reshard(x, '... @host') or '... @device'",
                    op=self.name,
                    source=user_line(),
                    operands=[(f"operand {i}", str(x)) for i, x in enumerate(tensors)],
                )
            )
        try:
            rule = self.rule([k.shape for k in kinds], *static)
        except ValueError as error:
            if isinstance(error, LayoutError):
                raise
            raise ValueError(
                word(
                    str(error),
                    op=self.name,
                    source=user_line(),
                    operands=[(f"operand {i}", str(x)) for i, x in enumerate(tensors)],
                )
            ) from None
        if len(tensors) < len(operands):
            rule = replace(rule, linear=_among_tensors(rule.linear, operands))
        _check_over(self.name, over, rule, tensors)
        enabled = _grad_enabled()
        grads = [k.grad and enabled for k in kinds]
        try:
            decision = decide(
                rule, kinds, grads, over=over, out=out, has_protocol=self.protocol is not None
            )
        except Choice as choice:
            raise refuse(self.name, rule, tensors, grads, choice, bool(static)) from None
        prepared = Prepared()
        prepared.protocol = bool(decision.blocked)
        prepared.moves = decision.routes if any(decision.routes) else None
        prepared.why = "cheapest" if CHEAPEST.get() else "out" if (out or over) else "planned"
        prepared.outs = prepared.plain = None
        prepared.schedules = {}
        prepared.fns = None
        prepared.out_routes = None
        prepared.flops, prepared.several = 0.0, False
        prepared.rule, prepared.kinds, prepared.decision, prepared.out = rule, kinds, decision, out
        if out is not None:
            shape = [math.prod(rule.sizes[f] for f in dim) for dim in rule.outputs[0]]
            wanted(self.name, out, decision.outputs[0], shape, mesh)
        if not prepared.protocol:
            after = tuple(k.with_layout(t) for k, t in zip(kinds, decision.targets, strict=True))
            info = Info(rule, static, mesh, after, decision)
            local = self.local(info)
            if self.flops is not None:
                prepared.flops = self.flops(info)
            if isinstance(local, list):
                prepared.fns = local
            else:
                prepared.fn = local
        return prepared

    def settle(self, prepared: Prepared, results: Sequence[Tensor]) -> tuple[Type, ...]:
        """Types of the results, once their dtypes are seen; and the conversions that follow."""
        rule, decision = prepared.rule, prepared.decision
        mesh = prepared.kinds[0].mesh
        grad = self.differentiable and _grad_enabled() and any(k.grad for k in prepared.kinds)
        outs = tuple(
            make_type(
                mesh,
                layout,
                tuple(math.prod(rule.sizes[f] for f in dim) for dim in dims),
                value.dtype,
                grad and (value.dtype.is_floating_point or value.dtype.is_complex),
            )
            for layout, dims, value in zip(decision.outputs, rule.outputs, results, strict=True)
        )
        routes: list[Route] = []
        for number, kind in enumerate(outs):
            target = kind.layout
            if prepared.out is not None and number == 0:
                target = wanted(self.name, prepared.out, kind.layout, kind.shape, mesh)
            elif target.unreduced and not (kind.dtype.is_floating_point or kind.dtype.is_complex):
                target = _settled(target)  # a sum of integers cannot stay owed
            route = find_route(kind, target)
            if route is None:
                raise LayoutError(f"{self.name}: no conversion leads from {kind} to '{target}'")
            routes.append(route)
        if any(routes):
            prepared.out_routes = tuple(routes)
        elif prepared.moves is None and prepared.fns is None and not prepared.several:
            prepared.plain = outs[0]
        prepared.outs = outs
        return outs

    def run(self, prepared: Prepared, operands: Sequence[Any], static: tuple[Any, ...]) -> Any:
        """Run a prepared call."""
        if record.LOGS:
            with record.acting(self.name, prepared.why):
                result = self._run(prepared, operands, static)
                if not prepared.protocol:
                    record.op(
                        self.name,
                        tuple(str(x) for x in operands if isinstance(x, ShardedTensor)),
                        ", ".join(map(str, result)) if isinstance(result, tuple) else str(result),
                        prepared.flops,
                        prepared.kinds[0].mesh,
                    )
                return result
        return self._run(prepared, operands, static)

    def _run(self, prepared: Prepared, operands: Sequence[Any], static: tuple[Any, ...]) -> Any:
        if prepared.moves is not None:
            operands = _converted(operands, prepared.moves)
        if prepared.protocol:
            assert self.protocol is not None
            if record.LOGS:
                with record.acting(why="statistics"):
                    result = self.protocol(operands, static)
            else:
                result = self.protocol(operands, static)
            return result if prepared.out is None else _asked(result, prepared.out)
        columns = [x._shards if type(x) is ShardedTensor else repeat(x) for x in operands]
        if prepared.fns is None:
            fn = prepared.fn
            results = [fn(*row) for row in zip(*columns)]  # noqa: B905 - repeat() is endless
        else:
            results = [fn(*row) for fn, *row in zip(prepared.fns, *columns)]  # noqa: B905
        several = prepared.several = isinstance(results[0], tuple)
        outs = prepared.outs or self.settle(prepared, results[0] if several else results[:1])
        if not several:
            return _finish(ShardedTensor(tuple(results), outs[0]), prepared, 0)
        return tuple(
            _finish(ShardedTensor(shards, outs[number]), prepared, number)
            for number, shards in enumerate(zip(*results, strict=True))
        )


def typed(operands: Sequence[Any]) -> Sequence[Any]:
    """Operands with plain tensors as constants on the others' mesh."""
    if not any(isinstance(x, Tensor) for x in operands):
        return operands
    like = next((x for x in operands if isinstance(x, ShardedTensor)), None)
    if like is None:
        raise TypeError(_NO_MESH)
    return [constant(x, like) if isinstance(x, Tensor) else x for x in operands]


_NO_MESH = "no operand is a ShardedTensor: place one with sw.shard(x, mesh, layout)"


def _among_tensors(positions: frozenset[int], operands: Sequence[Any]) -> frozenset[int]:
    """Positions among all operands as positions among the sharded: `1 / u` is not linear in u."""
    places = [i for i, x in enumerate(operands) if isinstance(x, ShardedTensor)]
    return frozenset(number for number, i in enumerate(places) if i in positions)


def _check_over(
    name: str, over: Mapping[str, str] | None, rule: Rule, operands: Sequence[ShardedTensor]
) -> None:
    """Raise unless `over` names axes of the mesh and factors of the rule."""
    if not over:
        return
    mesh = operands[0].mesh
    mesh.check_axes(list(over))
    for axis, mode in over.items():
        if mode not in rule.sizes and mode not in ("replicated", "reduced"):
            raise LayoutError(
                word(
                    f"over= names {mode!r} for axis {axis!r}, but the op has no such factor"
                    + nearest(mode, [*rule.sizes, "replicated"]),
                    op=name,
                    source=user_line(),
                    operands=[(f"operand {i}", str(x)) for i, x in enumerate(operands)],
                    mesh=mesh,
                ),
                kind="parse",
                op=name,
                source=user_line(),
            )


def _settled(layout: Layout) -> Layout:
    """The layout with every owed sum reduced to replicated."""
    for axis in layout.unreduced:
        layout = with_state(layout, axis, "replicated")
    return layout


def _asked(result: Any, out: LayoutLike) -> Any:
    """What a protocol gave, the first result in the layout that `out` names."""
    several = isinstance(result, tuple)
    first = result[0] if several else result
    with record.acting(why="out"):
        first = reshard_one(first, out)
    return (first, *result[1:]) if several else first


def _finish(x: ShardedTensor, prepared: Prepared, number: int) -> ShardedTensor:
    if prepared.out_routes is None or not prepared.out_routes[number]:
        return x
    if record.LOGS:
        with record.acting(why="out" if prepared.why == "out" else "planned"):
            return follow(x, prepared.out_routes[number])
    return follow(x, prepared.out_routes[number])


def _converted(operands: Sequence[Any], moves: tuple[Route, ...]) -> list[Any]:
    """Operands after their conversions; one that stands twice is converted once."""
    done: dict[tuple[int, Route], ShardedTensor] = {}
    routes = iter(moves)
    result: list[Any] = []
    for x in operands:
        if type(x) is not ShardedTensor:
            result.append(x)
            continue
        route = next(routes)
        if route:
            key = (id(x), route)
            y = done.get(key)
            if y is None:
                y = done[key] = follow(x, route)
            result.append(y)
        else:
            result.append(x)
    return result


def wanted(name: str, out: LayoutLike, layout: Layout, shape: Sequence[int], mesh: Mesh) -> Layout:
    """The layout that `out` asks of a result."""
    target = resolve(out, len(shape), layout, shape, mesh)
    target.check(shape, mesh, f"{name}: out")
    return target


def unary(op: Op) -> Callable[[ShardedTensor], ShardedTensor]:
    """A call with one operand and no arguments, at the least overhead."""
    fast = op.fast

    def call(x: ShardedTensor) -> ShardedTensor:
        prepared = fast.get((x._type, _grad_enabled()))
        if prepared is None or record.LOGS:
            return _first(op, (x,), (x._type, _grad_enabled()))
        shards = x._shards
        fn = prepared.fn
        if len(shards) == 1:
            return ShardedTensor((fn(shards[0]),), prepared.plain)
        return ShardedTensor(tuple([fn(s) for s in shards]), prepared.plain)

    return call


def binary(op: Op, general: Callable[..., Any]) -> Callable[..., Any]:
    """A call with two ShardedTensors and no arguments, at least overhead; else the general one."""
    fast = op.fast

    def call(x: Any, y: Any) -> Any:
        try:
            key = (x._type, y._type, _grad_enabled())
        except AttributeError:  # a number or a plain tensor
            return general(x, y)
        prepared = fast.get(key)
        if prepared is None or record.LOGS:
            return _first(op, (x, y), key)
        a, b = x._shards, y._shards
        fn = prepared.fn
        if len(a) == 1:
            return ShardedTensor((fn(a[0], b[0]),), prepared.plain)
        return ShardedTensor(tuple([fn(s, t) for s, t in zip(a, b)]), prepared.plain)  # noqa: B905

    return call


def rerun(ready: Prepared, *operands: ShardedTensor) -> ShardedTensor:
    """A call whose plan converts nothing and gives one result, once its key was found."""
    fn = ready.fn
    columns = [x._shards for x in operands]
    if len(columns[0]) == 1:
        return ShardedTensor((fn(*[c[0] for c in columns]),), ready.plain)
    return ShardedTensor(tuple([fn(*row) for row in zip(*columns)]), ready.plain)  # noqa: B905


def _first(op: Op, operands: tuple[ShardedTensor, ...], key: Any) -> ShardedTensor:
    """The general path; afterwards the short key leads to a plan that converts nothing."""
    result = op(operands)
    if not CHEAPEST.get():
        general = ((), None, None, key[-1], False, *key[:-1])
        prepared = op.cache.get(general)
        if prepared is not None and prepared.plain is not None and not prepared.protocol:
            op.fast[key] = prepared
    return result


def export(*functions: Any, methods: Sequence[str] = ()) -> Callable[[Any], Any]:
    """Register a public function for torch's own functions and as methods of ShardedTensor."""

    def register(ours: Any) -> Any:
        for function in functions:
            TORCH[function] = ours
        for method in methods:
            install(method, ours)
            theirs = getattr(Tensor, method, None)
            if theirs is not None:
                TORCH.setdefault(theirs, ours)
        return ours

    return register
