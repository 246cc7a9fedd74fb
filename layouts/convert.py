"""The conversion table: every communication is a row, and one rule gives each row's gradient.

    from -> to   S            I            R            U
    S            all_to_all   all_gather   all_gather   place
    I            slice                     none         keep
    R            slice        none                      keep
    U            reduce_scatter all_reduce all_reduce

S sharded, I replicated, R reduced, U unreduced. The backward of `a -> b` is the row `dual(b) ->
dual(a)`, where the dual swaps R and U. Inside `shard_map` there is also V, varying: its own dual,
moved into and out of R and U by "none". Conversions are linear, so their forward-mode derivative is
themselves, and they commute with vmap.

`Convert` is the one autograd Function. It is a node on *every* device, so that all devices meet in
the same backward collectives. It is called through the C `apply` of its base class, which skips the
binding of the signature (`docs/architecture.md`); under functorch through its own
`apply`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..meshlib import record
from ..meshlib.errors import LayoutError
from ..meshlib.mesh import Mesh
from ..meshlib.transport import Axes
from . import saving
from .layout import Layout, State, make
from .sharded import ShardedTensor, Type, make_type

Save = Literal["gathered", "shard"]
Verb = Literal[
    "all_gather", "all_to_all", "reduce_scatter", "all_reduce", "slice", "keep", "place", "none"
]

TABLE: dict[tuple[str, str], Verb] = {
    ("S", "R"): "all_gather",
    ("S", "I"): "all_gather",
    ("S", "S"): "all_to_all",
    ("U", "S"): "reduce_scatter",
    ("U", "I"): "all_reduce",
    ("U", "R"): "all_reduce",
    ("I", "S"): "slice",
    ("I", "R"): "none",
    ("I", "U"): "keep",
    ("R", "S"): "slice",
    ("R", "I"): "none",
    ("R", "U"): "keep",
    ("S", "U"): "place",
    ("R", "V"): "none",
    ("V", "U"): "none",
}
DUAL = {"S": "S", "I": "I", "R": "U", "U": "R", "V": "V"}
LETTER: dict[Any, str] = {"replicated": "I", "reduced": "R", "unreduced": "U", "varying": "V"}
MOVES: frozenset[Verb] = frozenset({"all_gather", "all_to_all", "reduce_scatter", "all_reduce"})

SUMS: frozenset[Verb] = frozenset({"all_reduce", "reduce_scatter"})
COLLECTORS: list[Any] = []  # open ones take conversions over, to begin them ahead of their use


@dataclass(frozen=True, slots=True)
class Step:
    """One row of the table at work: mesh and axes (major to minor), from and to which state."""

    mesh: Mesh
    axes: Axes
    before: State
    after: State
    reduce_dtype: torch.dtype | None = None  # sums on the way are taken in it

    @property
    def letters(self) -> tuple[str, str]:
        """The row, as two letters."""
        return LETTER.get(self.before, "S"), LETTER.get(self.after, "S")

    @property
    def verb(self) -> Verb:
        """What the row does to the shards."""
        return TABLE[self.letters]

    @property
    def dual(self) -> Step:
        """The backward row."""
        return Step(self.mesh, self.axes, _dual(self.after), _dual(self.before), self.reduce_dtype)

    def shifted(self) -> Step:
        """The same step on tensors with one more leading dim (vmap)."""
        before, after = _shifted(self.before), _shifted(self.after)
        return Step(self.mesh, self.axes, before, after, self.reduce_dtype)


def _shifted(state: State) -> State:
    return state + 1 if isinstance(state, int) else state


def _dual(state: State) -> State:
    swapped: dict[State, State] = {"reduced": "unreduced", "unreduced": "reduced"}
    return swapped.get(state, state)


def written(step: Step, operand: Tensor, by: record.Context | None, backward: bool) -> None:
    """Write the collective of a step to the open records."""
    record.collective(
        step.verb,  # pyright: ignore
        step.mesh,
        step.axes,
        operand,
        by,
        "sum" if step.verb in SUMS else None,
        backward,
    )


def run(
    step: Step, shards: Sequence[Tensor], by: record.Context | None, backward: bool
) -> list[Tensor]:
    """Do one step on shards; recorded where data moves. Results never are the inputs themselves."""
    mesh, axes, verb = step.mesh, step.axes, step.verb
    wide = step.reduce_dtype
    if wide is not None and verb in SUMS and shards[0].dtype != wide:
        narrow = shards[0].dtype
        plain = Step(mesh, axes, step.before, step.after)
        return [s.to(narrow) for s in run(plain, [s.to(wide) for s in shards], by, backward)]
    if verb in MOVES and record.LOGS:
        written(step, shards[0], by, backward)
    if verb == "none":
        return [s.view_as(s) for s in shards]
    comm = mesh.comm
    if verb == "all_reduce":
        return comm.all_reduce(shards, axes)
    if verb == "all_gather":
        return comm.all_gather(shards, axes, step.before)  # pyright: ignore
    if verb == "reduce_scatter":
        return comm.reduce_scatter(shards, axes, step.after)  # pyright: ignore
    if verb == "all_to_all":
        return comm.all_to_all(shards, axes, step.after, step.before)  # pyright: ignore
    places = mesh.positions(axes)
    if verb == "keep":
        return [
            s.view_as(s) if p == 0 else torch.zeros_like(s)
            for s, p in zip(shards, places, strict=True)
        ]
    n = mesh.group_size(axes)
    if verb == "slice":
        dim: int = step.after  # pyright: ignore
        size = shards[0].shape[dim] // n
        return [s.narrow(dim, p * size, size) for s, p in zip(shards, places, strict=True)]
    return [_placed(s, step.before, p, n) for s, p in zip(shards, places, strict=True)]  # pyright: ignore


def _placed(block: Tensor, dim: int, place: int, n: int) -> Tensor:
    """The block at its place in a tensor of zeros."""
    shape = list(block.shape)
    size = shape[dim]
    shape[dim] = size * n
    out = block.new_zeros(shape)
    out.narrow(dim, place * size, size).copy_(block)
    return out


def in_front(shards: Sequence[Tensor], dims: Sequence[int | None], size: int) -> list[Tensor]:
    """Shards with vmap's dim of `size` first; where one has it not, the same for every entry."""
    return [
        s.unsqueeze(0).expand(size, *s.shape) if d is None else s.movedim(d, 0)
        for s, d in zip(shards, dims, strict=True)
    ]


class Convert(torch.autograd.Function):
    """A step on all shards of this process, with its dual as derivative."""

    @staticmethod
    def forward(step: Step, by: Any, backward: bool, *shards: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        return tuple(run(step, shards, by, backward))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: D102
        ctx.step, ctx.by = inputs[0], inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # noqa: D102
        return None, None, None, *convert_shards(ctx.step.dual, grads, ctx.by, True)

    @staticmethod
    def jvp(ctx: Any, _step: Any, _by: Any, _backward: Any, *tangents: Tensor) -> Any:  # noqa: D102
        return tuple(convert_shards(ctx.step, tangents, None))

    @staticmethod
    def vmap(info: Any, dims: Any, step: Step, by: Any, backward: bool, *shards: Tensor) -> Any:  # noqa: D102
        front = in_front(shards, dims[3:], info.batch_size)
        return tuple(convert_shards(step.shifted(), front, by, backward)), (0,) * len(shards)


# the C apply: no signature binding
_apply = super(torch.autograd.Function, Convert).apply  # pyright: ignore
_functorch = torch._C._are_functorch_transforms_active
_grad_enabled = torch.is_grad_enabled
_forward_ad = torch.autograd.forward_ad


def convert_shards(
    step: Step, shards: Sequence[Tensor], by: record.Context | None, backward: bool = False
) -> Sequence[Tensor]:
    """A differentiable step on shards."""
    if _functorch():
        return Convert.apply(step, by, backward, *shards)
    if (
        _grad_enabled() and any(s.requires_grad for s in shards)
    ) or _forward_ad._current_level >= 0:
        return _apply(step, by, backward, *shards)
    return run(step, shards, by, backward)


def planned(
    kind: Type, axes: Axes, to: State, reduce_dtype: torch.dtype | None = None
) -> tuple[Step, Type] | None:
    """The step and the new type of a conversion, or None if it does nothing; cached on the type.

    Raises:
        LayoutError: a mixed set of axes, an axis that is not last on its dim, an indivisible dim.
    """
    key = (axes, to, reduce_dtype)
    if key in kind.moves:
        return kind.moves[key]
    layout = kind.layout
    kind.mesh.check_axes(axes)
    states: set[State] = {layout.state(a) for a in axes}
    if len(states) != 1:
        raise LayoutError(f"convert: axes {axes} are in different states in '{layout}'")
    before = states.pop()
    found: tuple[Step, Type] | None = None
    if before != to:
        found = _plan(kind, axes, before, to, reduce_dtype)
    kind.moves[key] = found
    return found


def _plan(
    kind: Type, axes: Axes, before: State, to: State, reduce_dtype: torch.dtype | None
) -> tuple[Step, Type]:
    layout = kind.layout
    dims = [list(d) for d in layout.dims]
    if isinstance(before, int):
        here = dims[before]
        axes = tuple(a for a in here if a in axes)  # the order on the dim
        if tuple(here[len(here) - len(axes) :]) != axes:
            raise LayoutError(
                f"convert: only the last axes of a dim can be removed; dim {before} of '{layout}' "
                f"ends with {here[-1]!r}, not {axes[-1]!r}: use reshard"
            )
        dims[before] = here[: len(here) - len(axes)]
    if isinstance(to, int):
        dims[to] += list(axes)
    if (LETTER.get(before, "S"), LETTER.get(to, "S")) not in TABLE:
        raise LayoutError(f"convert: no row of the table leads from {before!r} to {to!r}")
    moving = frozenset(axes)
    sets = {
        state: (getattr(layout, state) - moving) | (moving if to == state else frozenset())
        for state in ("unreduced", "reduced", "varying")
    }
    new = make(
        tuple(map(tuple, dims)),
        sets["unreduced"],
        sets["reduced"],
        sets["varying"],
        layout.memory,
        layout.at,
    )
    return Step(kind.mesh, axes, before, to, reduce_dtype), kind.with_layout(new)


def convert(
    x: ShardedTensor,
    axes: str | Sequence[str],
    to: State,
    *,
    save: Save = "gathered",
    reduce_dtype: torch.dtype | None = None,
) -> ShardedTensor:
    """One row of the table: `x` with `axes` in state `to`, same global value.

    Args:
        x: in one state over all of `axes`; if that is sharded, they are the last axes of one dim.
        axes: one axis or several, moved as one joint group; cut dims get them in this order.
        to: a dim to cut, or "replicated", "reduced", "unreduced".
        save: of a gather: "gathered" keeps the whole for backward, "shard" gathers again there.
        reduce_dtype: in which sums are taken, forward and backward; None keeps the tensor's own.

    Cost: the row's collective (see `docs/layouts.md`). Gradient: the dual row. A conversion that
    moves nothing is remembered, so that many readers of one tensor cost one backward all_reduce.

    Raises:
        LayoutError: no such row, or an indivisible dim.

    >>> import shardwise as sw
    >>> x = sw.full((4,), 1.0, sw.make_mesh({"data": 2}), "n {U:data}")
    >>> sw.layouts.convert(x, "data", 0)
    f32[4/data] local[2] on mesh(data=2)
    """
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    kind = x._type
    move = planned(kind, axes, to, reduce_dtype)
    if move is None:
        return x
    step, after = move
    grad = kind.grad and _grad_enabled()
    if grad != after.grad:
        after = after.with_layout(after.layout, grad)
    if COLLECTORS and COLLECTORS[-1].takes(x, step, grad):
        return COLLECTORS[-1].add(x, step, after, save)
    if step.verb == "none":
        return _relabel(x, step, after, grad)
    by = record.context()
    if by is not None:
        by = noted(x, step, by)
    out = tuple(convert_shards(step, x._shards, by))
    if save == "shard" and grad and step.verb == "all_gather" and not _functorch():
        held = [s.detach() for s in x._shards]
        saving.regather(out, lambda: run(step, held, by, False))
    result = ShardedTensor(out, after)
    path = getattr(x, "_path", None)
    if path is not None:
        result._path = path
    return result


def _relabel(x: ShardedTensor, step: Step, after: Type, grad: bool) -> ShardedTensor:
    """A conversion that moves nothing: remembered on its source and its result, per grad mode."""
    if not grad:  # under no_grad the result is a constant, as in torch
        shards = tuple(s.detach() for s in x._shards) if x._type.grad else x._shards
        result = ShardedTensor(shards, after)
    elif _functorch():
        return ShardedTensor(tuple(convert_shards(step, x._shards, record.context())), after)
    else:
        origin = getattr(x, "_origin", None)
        if origin is not None and origin._type is after:
            return origin
        memo = getattr(x, "_memo", None)
        if memo is None:
            memo = x._memo = {}
        shards = memo.get(after)
        if shards is None:
            by = record.context()
            if by is not None:
                by = noted(x, step, by)
            shards = memo[after] = tuple(convert_shards(step, x._shards, by))
        result = ShardedTensor(shards, after)
        result._origin = x
    path = getattr(x, "_path", None)
    if path is not None:
        result._path = path
    return result


def noted(x: ShardedTensor, step: Step, by: record.Context) -> record.Context:
    """The context with the parameter's path; warns when the same tensor moves twice."""
    path = getattr(x, "_path", None)
    if step.verb in ("all_gather", "all_reduce") and step.mesh.group_size(step.axes) > 1:
        done = "gathered" if step.verb == "all_gather" else "reduced"
        what = f"{x} is {done} over {'/'.join(step.axes)}"
        record.moved_twice((id(x._shards[0]), step.axes, step.verb), what, x._shards[0])
    return by._replace(path=path) if path is not None and by.path is None else by


def relabelled(
    x: ShardedTensor, layout: Layout, shape: Sequence[int] | None = None
) -> ShardedTensor:
    """The same shards read as another type: a reinterpretation, for shard_map and vmap only."""
    kind = x._type
    sizes = kind.shape if shape is None else shape
    return ShardedTensor(x._shards, make_type(kind.mesh, layout, sizes, kind.dtype, kind.grad))
