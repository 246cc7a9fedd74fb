"""When the types leave a choice: the error's words, and fixes that the planner itself has tried.

Each fix is a whole expression that can be pasted. It is found by laying the op out in each mode that the axis
could run in, so its bytes are those that it will move; the backward's are the dual conversions'.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from ..layouts.convert import DUAL, LETTER, TABLE
from ..layouts.layout import Layout, LayoutLike, with_state
from ..layouts.reshard import Route, moved
from ..layouts.sharded import ShardedTensor, Type, make_type, write_type
from ..meshlib.errors import Fix, LayoutError, format_bytes, word
from ..meshlib.source import Call, user_call
from .planner import Choice, Decision, Spot, Unfit, after, elsewhere, in_each_order, lay_out, spots
from .rules import Rule

MOST = 4  # fixes shown


def refuse(
    name: str,
    rule: Rule,
    operands: Sequence[ShardedTensor],
    grads: Sequence[bool],
    choice: Choice,
    out: LayoutLike | None,
) -> LayoutError:
    """The LayoutError of a choice that nothing settles."""
    call = user_call(len(operands))
    names = _names(call, operands)
    kinds = [x._type for x in operands]
    fixes = _fixes(name, rule, kinds, grads, choice, call, names)
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
            parts.append(
                f"dim {at[0]} of the result through {name}"
                if at
                else f"the contracted factor of {name}"
            )
    return f" is wanted twice: it cuts {', and '.join(dict.fromkeys(parts))}"


def _fixes(
    name: str,
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
    """Modes to try for a choice: the operands' own factors; where none serves, a move elsewhere."""
    return modes or elsewhere(axis, rule, where)


def _fix(
    name: str,
    rule: Rule,
    kinds: Sequence[Type],
    grads: Sequence[bool],
    decision: Decision,
    call: Call,
    names: Sequence[str],
) -> Fix:
    """The expression that makes a decision the only one, its collectives, and its bytes."""
    forward: list[str] = []
    backward: list[str] = []
    total = 0.0
    changes: dict[int, str] = {}
    for number, (kind, route, target) in enumerate(
        zip(kinds, decision.routes, decision.targets, strict=True)
    ):
        if not route:
            continue
        ahead, behind, cost = costs(kind, route, grads[number])
        forward += ahead
        backward += behind
        total += cost
        if ahead or kind.layout.state(next(iter(route))[0][0]) not in ("replicated", "reduced"):
            changes[number] = f'sw.reshard({names[number]}, "{_asked(kind, target)}")'
    text = ", ".join(forward) or "nothing moves"
    if backward:
        text += f", backward {', '.join(backward)}"
    shape = [math.prod(rule.sizes[f] for f in dim) for dim in rule.outputs[0]]
    gives = write_type(kinds[0].dtype, shape, decision.outputs[0])
    if decision.outputs[0].unreduced:
        text += f"; gives {gives}"
    code = _code(name, call, names, changes)
    if call.is_operator and changes and not decision.outputs[0].unreduced and len(kinds) == 2:
        code = f'ops.{name}({", ".join(names)}, out="{decision.outputs[0]}")'
    return Fix(code, text, int(total))


def _asked(kind: Type, target: Layout) -> Layout:
    """The target without the casts that the op makes by itself."""
    for axis in target.reduced:
        if kind.layout.state(axis) == "replicated":
            target = with_state(target, axis, "replicated")
    return target


def _code(name: str, call: Call, names: Sequence[str], changes: dict[int, str]) -> str:
    if call.text and call.spans:
        return call.replaced(changes)
    arguments = ", ".join(changes.get(i, n) for i, n in enumerate(names))
    return f"ops.{name}({arguments})"


def costs(kind: Type, route: Route, grad: bool) -> tuple[list[str], list[str], float]:
    """What a route moves, in words, forward and backward, and its forward bytes."""
    ahead: list[str] = []
    behind: list[str] = []
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
            ahead.append(f"{TABLE[row]} {format_bytes(count)}")
        reached = make_type(now.mesh, after(now.layout, move), now.shape, now.dtype, now.grad)
        if grad:
            dual = make_type(
                now.mesh, reached.layout.dual, now.shape, now.dtype, False
            )
            back = moved(dual, (axes, _dual_state(before))) * item
            if back:
                behind.insert(0, f"{TABLE[DUAL[row[1]], DUAL[row[0]]]} {format_bytes(back)}")
        now = reached
    return ahead, behind, total


def _dual_state(state: int | str) -> int | str:
    return {"reduced": "unreduced", "unreduced": "reduced"}.get(state, state)  # type: ignore[call-overload,arg-type]


