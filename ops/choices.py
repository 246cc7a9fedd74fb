"""When the types leave a choice: the error's words, and fixes that the planner itself has tried.

Each fix is a whole expression that can be pasted. It is found by laying the op out in each mode
that the axis could run in, so its bytes are those that it will move; the backward's are the dual
conversions'.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from ..layouts.convert import DUAL, LETTER, TABLE
from ..layouts.layout import Layout, State, with_state
from ..layouts.reshard import Route, find_route, moved
from ..layouts.sharded import ShardedTensor, Type, make_type, write_type
from ..meshlib.errors import Fix, LayoutError, format_bytes, word
from ..meshlib.source import Call, user_call
from .planner import (
    Choice,
    Decision,
    Spot,
    Unfit,
    after,
    decide,
    elsewhere,
    in_each_order,
    lay_out,
    spots,
)
from .rules import Rule

MOST = 4  # fixes shown


def refuse(
    name: str,
    rule: Rule,
    operands: Sequence[ShardedTensor],
    grads: Sequence[bool],
    choice: Choice,
    has_arguments: bool,
) -> LayoutError:
    """The LayoutError of a choice that nothing settles.

    Where the user's expression cannot be read and the op has arguments besides its operands, a fix
    is the statement that converts them, not the whole call.
    """
    call = user_call(operands)
    names = _names(call, operands)
    kinds = [x._type for x in operands]
    callee = None if has_arguments and not call.text else name
    fixes = _fixes(callee, rule, kinds, grads, choice, call, names)
    verdict = f"axis {choice.axis!r}{_explain(rule, kinds, choice, names)}"
    text = word(
        verdict,
        op=name,
        source=call.line,
        operands=list(zip(names, map(str, operands), strict=True)),
        mesh=operands[0].mesh,
        fixes=fixes,
    )
    return LayoutError(text, kind="choice", op=name, source=call.line, fixes=fixes)


def _names(call: Call, operands: Sequence[ShardedTensor]) -> list[str]:
    """The user's own words for the operands, else their tree paths, else numbers."""
    if call.operands:
        return list(call.operands)
    return [getattr(x, "_path", None) or f"x{i}" for i, x in enumerate(operands)]


def _explain(rule: Rule, kinds: Sequence[Type], choice: Choice, names: Sequence[str]) -> str:
    """The verdict: which factors the axis cuts, in which operands."""
    if choice.why != "it is wanted twice":
        return choice.why.removeprefix("it") if choice.why.startswith("it ") else f": {choice.why}"
    parts = []
    for dims, kind, name in zip(rule.inputs, kinds, names, strict=True):
        spot = spots(dims, kind, rule.sizes).get(choice.axis, Spot("replicated"))
        if spot.factor is None:
            continue
        for output in rule.outputs[:1]:
            at = [i for i, dim in enumerate(output) if spot.factor in dim]
            if spot.factor in rule.blocked:
                parts.append(f"a dim of {_short(name)} that the op needs whole")
                continue
            parts.append(
                f"dim {at[0]} of the result through {_short(name)}"
                if at
                else f"the contracted factor of {_short(name)}"
            )
    return f" is wanted twice: it cuts {', and '.join(dict.fromkeys(parts))}"


def _short(name: str) -> str:
    """The last part of a dotted name: enough where the operands are listed below."""
    return name.rsplit(".", 1)[-1] if name.replace(".", "").isidentifier() else name


def _fixes(
    name: str | None,
    rule: Rule,
    kinds: Sequence[Type],
    grads: Sequence[bool],
    choice: Choice,
    call: Call,
    names: Sequence[str],
) -> list[Fix]:
    where = [spots(d, k, rule.sizes) for d, k in zip(rule.inputs, kinds, strict=True)]
    options = {
        axis: modes if len(modes) == 1 and axis != choice.axis else _ways(axis, modes, rule, where)
        for axis, modes in choice.options.items()
    }
    found: list[tuple[float, int, Fix]] = []
    for combination in itertools.islice(itertools.product(*options.values()), 64):
        modes = dict(zip(options, combination, strict=True))
        try:
            laid = [lay_out(rule, kinds, modes)]
        except Unfit:
            laid = list(in_each_order(rule, kinds, modes))
        for decision in laid:
            fix = _fix(name, rule, kinds, grads, decision, call, names)
            found.append((fix.bytes, len(found), fix))
    found.sort(key=lambda item: item[:2])
    return list({fix.code: fix for _, _, fix in found}.values())[:MOST]


def _ways(axis: str, modes: list[str], rule: Rule, where: Sequence[dict[str, Spot]]) -> list[str]:
    """Modes to try for a choice: the operands' own factors; where one does not serve, a move."""
    return modes if len(modes) > 1 else list(dict.fromkeys([*modes, *elsewhere(axis, rule, where)]))


def _fix(
    name: str | None,
    rule: Rule,
    kinds: Sequence[Type],
    grads: Sequence[bool],
    decision: Decision,
    call: Call,
    names: Sequence[str],
) -> Fix:
    """The expression that makes a decision the only one, its collectives, and its bytes."""
    shape = [math.prod(rule.sizes[f] for f in dim) for dim in rule.outputs[0]]
    result = decision.outputs[0]
    by_out = call.is_operator and any(decision.routes) and not result.unreduced and len(kinds) == 2
    routes: list[tuple[Type, Route, bool]] = []
    if by_out:  # what the op itself does when it is told `out`
        decision = decide(rule, kinds, grads, out=result)
        made = make_type(kinds[0].mesh, decision.outputs[0], shape, kinds[0].dtype)
        routes = [(made, find_route(made, result) or (), any(grads))]
        code = f'ops.{name}({", ".join(names)}, out="{result}")'
    changes: dict[int, str] = {}
    for number, (kind, route, target) in enumerate(
        zip(kinds, decision.routes, decision.targets, strict=True)
    ):
        if route and _asked(kind, target) is not kind.layout:
            changes[number] = f'sw.reshard({names[number]}, "{_asked(kind, target)}")'
    if not by_out:
        code = _code(name, call, names, changes)
    operand_routes = list(zip(kinds, decision.routes, grads, strict=True))
    parts = [costs(*each) for each in (*operand_routes, *routes)]
    ahead = [step for part in parts for step in part[0]]
    behind = [step for part in parts for step in part[1]]
    text = ", ".join(f"{verb} {size}" for verb, size in ahead) or "nothing moves"
    if behind:
        same = [verb for verb, _ in ahead] == [verb for verb, _ in behind]
        text += ", backward " + ", ".join(
            size if same else f"{verb} {size}" for verb, size in behind
        )
    if result.unreduced:
        text += f"; gives {write_type(kinds[0].dtype, shape, result)}"
    return Fix(code, text, int(sum(part[2] for part in parts)))


def _asked(kind: Type, target: Layout) -> Layout:
    """The target without the casts that the op makes by itself."""
    for axis in target.reduced:
        if kind.layout.state(axis) == "replicated" or not kind.dtype.is_floating_point:
            target = with_state(target, axis, "replicated")
    return target


def _code(name: str | None, call: Call, names: Sequence[str], changes: dict[int, str]) -> str:
    if call.text and call.spans:
        return call.replaced(changes)
    if name is None:
        return "; ".join(f"{names[i]} = {text}" for i, text in changes.items())
    arguments = ", ".join(changes.get(i, n) for i, n in enumerate(names))
    return f"ops.{name}({arguments})"


Words = list[tuple[str, str]]  # verb and size


def costs(kind: Type, route: Route, grad: bool) -> tuple[Words, Words, float]:
    """What a route moves, in words, forward and backward, and its forward bytes.

    The backward of a cast from replicated to reduced is left out: it comes with the operands, not
    with the choice.
    """
    ahead: Words = []
    behind: Words = []
    total = 0.0
    item = kind.dtype.itemsize
    now = kind
    for move in route:
        axes, to = move
        before = now.layout.state(axes[0])
        row = LETTER.get(before, "S"), LETTER.get(to, "S")
        count = moved(now, move) * item
        total += count
        if count:
            ahead.append((TABLE[row], format_bytes(count)))
        reached = make_type(now.mesh, after(now.layout, move), now.shape, now.dtype, now.grad)
        if grad and row != ("I", "R"):
            dual = make_type(now.mesh, reached.layout.dual, now.shape, now.dtype, False)
            back = moved(dual, (axes, _dual_state(before))) * item
            if back:
                behind.insert(0, (TABLE[DUAL[row[1]], DUAL[row[0]]], format_bytes(back)))
        now = reached
    return ahead, behind, total


def _dual_state(state: State) -> State:
    swapped: dict[State, State] = {"reduced": "unreduced", "unreduced": "reduced"}
    return swapped.get(state, state)
