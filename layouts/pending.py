"""Conversions begun ahead of their use: the collective runs while something else computes.

Inside `begun(use, x)` a conversion gives a `Pending`: a ShardedTensor whose collective has started
and whose shards nobody has. `finish` waits for all of them and gives the tree with plain tensors.
Reading a pending tensor's shards before, in an op say, waits for it there: a value never depends on
when it was waited for, and nothing else has to know.

In the graph each pending tensor is two nodes. `_Issue`, made where the collective starts, and
`_Wait`, made where it ends, one for all tensors of a call. Backward runs nodes in the reverse
order of their making, so it meets `_Wait` first, which starts the dual collectives, then what was
computed between the two, then `_Issue`, which waits. A gradient never lies unfinished on an edge of
the graph: between the two nodes runs an empty tensor.

Records keep the collectives as they are written, one for each tensor, where they would run if
nothing were begun ahead; but what follows the first collective of a gradient's way, a sum over
another axis, is written after the wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import optree
import torch
from torch import Tensor

from ..meshlib import record
from ..meshlib.transport import Finish
from . import saving
from .convert import COLLECTORS, MOVES, Save, Step, noted, run, written
from .sharded import ShardedTensor, Type
from .way_back import Back, Way, arrive, begin, start


class Move:
    """One tensor's way to its use: conversions, of which the first that moves data runs ahead.

    Attributes:
        origin: what is converted; None once it is there.
        steps: the conversions, each with who asked for it and what it keeps for backward.
        back: what happens to the gradient after the duals of the steps.
        kind: the type after.
        out: the shards after, once somebody has waited.
        leaf: which tensors get the gradient; None: the origin's shards.
        way: of the gradient; the graph keeps it, and nothing else of the move.
        token: the edge between the two nodes.
    """

    def __init__(self, origin: ShardedTensor, kind: Type, back: Sequence[Back] = ()) -> None:
        self.origin: ShardedTensor | None = origin
        self.steps: list[tuple[Step, record.Context | None, Save]] = []
        self.back = list(back)
        self.kind = kind
        self.out: tuple[Tensor, ...] | None = None
        self.leaf: Sequence[Tensor] | None = None
        self.way: Way | None = None
        self.token: Tensor | None = None
        self.again: list[tuple[Sequence[Tensor], Step, list[Tensor], record.Context | None]] = []
        self._finish: Finish | None = None
        self._operand: Sequence[Tensor] = ()
        self._at = 0  # the step that has begun
        self.has_begun = False

    def extended(self, step: Step, by: record.Context | None, save: Save, kind: Type) -> Move:
        """The same way with one more step."""
        assert self.origin is not None
        longer = Move(self.origin, kind, self.back)
        longer.leaf = self.leaf
        longer.steps = [*self.steps, (step, by, save)]
        return longer

    def begin(self) -> None:
        """Start the first collective; its node in the graph is made here."""
        assert self.origin is not None
        self.has_begun = True
        shards = self.origin._shards
        if self.kind.grad:
            duals: list[Back] = [(step.dual, by) for step, by, _ in reversed(self.steps)]
            self.way = Way(duals + self.back, len(shards))
            self.token = _Issue.apply(self.way, *(shards if self.leaf is None else self.leaf))  # pyright: ignore
        shards = [s.detach() for s in shards]
        for step, by, _ in self.steps:
            if step.verb in MOVES:
                self._finish = start(step, shards)
                break
            shards = run(step, shards, by, False)
            self._at += 1
        self._operand = shards

    def ended(self) -> list[Tensor]:
        """Wait, and do the steps that are left."""
        shards, waiting = self._operand, self._finish
        self._operand, self._finish = (), None
        for step, by, save in self.steps[self._at :]:
            held = list(shards)
            if waiting is not None:
                if record.LOGS:
                    written(step, held[0], by, False)
                shards, waiting = waiting(), None
            else:
                shards = run(step, held, by, False)
            if save == "shard" and self.kind.grad and step.verb == "all_gather":
                self.again.append((shards, step, held, by))
        if not self.steps:
            shards = [s.view_as(s) for s in shards]
        return list(shards)

    def settle(self, out: Sequence[Tensor], group: saving.Group | None) -> None:
        """Take the shards as they have become, and say how gathers are done again."""
        self.out = tuple(out)
        for gathered, step, held, by in self.again:
            _gather_again(gathered, step, held, by, group)
        assert self.origin is not None
        if len(self.steps) == 1 and self.steps[0][0].verb == "none" and self.kind.grad:
            memo = getattr(self.origin, "_memo", None)  # many readers, one backward all_reduce
            if memo is None:
                memo = self.origin._memo = {}
            memo.setdefault(self.kind, self.out)
        self.origin, self.token, self.leaf = None, None, None
        self.again.clear()


def _gather_again(
    out: Sequence[Tensor],
    step: Step,
    held: list[Tensor],
    by: record.Context | None,
    group: saving.Group | None,
) -> None:
    def started() -> Finish:
        finish = start(step, held)

        def ended() -> list[Tensor]:
            if record.LOGS:
                written(step, held[0], by, False)
            return finish()

        return ended

    saving.regather(out, lambda: run(step, held, by, False), started, group)


class Pending(ShardedTensor):
    """A tensor whose collective runs; whoever reads its shards waits."""

    __slots__ = ("_move",)

    def __init__(self, move: Move, kind: Type) -> None:
        self._move = move
        self._type = kind

    @property
    def _shards(self) -> tuple[Tensor, ...]:  # pyright: ignore
        if self._move.out is None:
            if not self._move.has_begun:
                self._move.begin()
            _wait([self._move], None)
        assert self._move.out is not None
        return self._move.out

    def settled(self) -> ShardedTensor:
        """The same as a plain tensor."""
        result = ShardedTensor(self._shards, self._type)
        path = getattr(self, "_path", None)
        if path is not None:
            result._path = path
        return result


class Collector:
    """What takes conversions over while `use` runs, in their order."""

    def __init__(self) -> None:
        self.moves: list[Move] = []

    def takes(self, x: ShardedTensor, step: Step, grad: bool) -> bool:
        """Whether a collective of this conversion, or of its dual, can run ahead."""
        if step.mesh.transport != "distributed" or step.mesh.is_outside:
            return False
        is_open = isinstance(x, Pending) and x._move.out is None
        return is_open or step.verb in MOVES or (grad and step.dual.verb in MOVES)

    def add(self, x: ShardedTensor, step: Step, kind: Type, save: Save) -> Pending:
        """The converted tensor, pending."""
        by = record.context()
        if isinstance(x, Pending) and x._move.out is None:
            path = getattr(x, "_path", None)
            by = by and by._replace(path=by.path or path)
            move = x._move.extended(step, by, save, kind)
            if x._move in self.moves:  # a stop on the way; read after all, it starts its own
                self.moves.remove(x._move)
        else:
            move = Move(x, kind)
            by = by and noted(x, step, by)
            move.steps.append((step, by, save))
        return self.enter(move, x)

    def enter(self, move: Move, x: ShardedTensor) -> Pending:
        """A pending tensor of a move; `x` names it."""
        self.moves.append(move)
        result = Pending(move, move.kind)
        path = getattr(x, "_path", None)
        if path is not None:
            result._path = path
        return result


@contextmanager
def _collecting() -> Iterator[Collector]:
    collector = Collector()
    COLLECTORS.append(collector)
    try:
        yield collector
    finally:
        COLLECTORS.remove(collector)


class Begun:
    """A tree with pending tensors."""

    def __init__(self, tree: Any, moves: list[Move]) -> None:
        self._tree = tree
        self._moves = moves

    def finish(self, group: saving.Group | None = None) -> Any:
        """Wait, and give the tree with plain tensors.

        Args:
            group: whose gathers are done again together in the backward.
        """
        _wait([move for move in self._moves if move.out is None], group)
        pending: Any = self._tree
        tree = optree.tree_map(
            lambda v: v.settled() if isinstance(v, Pending) else v, pending, none_is_leaf=True
        )
        self._tree, self._moves = None, []
        return tree


def begun(use: Callable[[Any], Any], make: Callable[[], Any]) -> Begun:
    """`use(make())`, whose conversions have started and are not waited for.

    Args:
        use: a function of a tree that converts tensors of it; what else it does may wait.
        make: gives its argument.
    """
    with _collecting() as collector:
        tree = use(make())
    for move in collector.moves:
        if not move.has_begun:
            move.begin()
    return Begun(tree, collector.moves)


def _wait(moves: list[Move], group: saving.Group | None) -> None:
    """End all of these moves, by one node of the graph."""
    live = [move for move in moves if move.token is not None]
    for move in moves:
        if move.token is None:
            move.settle(move.ended(), group)
    if live:
        flat = iter(_Wait.apply(live, *[move.token for move in live]))  # pyright: ignore
        for move in live:
            move.settle([next(flat) for _ in move.kind.mesh.held], group)


class _Issue(torch.autograd.Function):
    """Where a collective starts. Its result is empty: the edge on which backward comes to wait."""

    @staticmethod
    def forward(ctx: Any, way: Way, *shards: Tensor) -> Tensor:
        ctx.way = way
        return shards[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, _edge: Any) -> Any:
        shards = arrive(ctx.way)
        return None, *([None] * ctx.way.count if shards is None else shards)


class _Wait(torch.autograd.Function):
    """Where collectives end; backward starts their duals."""

    @staticmethod
    def forward(ctx: Any, moves: list[Move], *edges: Tensor) -> tuple[Tensor, ...]:
        ctx.ways = [move.way for move in moves]
        ctx.set_materialize_grads(False)
        return tuple(shard for move in moves for shard in move.ended())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        at, arrived = len(grads), []
        for way in reversed(ctx.ways):  # as the nodes of single conversions would run
            at -= way.count
            mine = [g for g in grads[at : at + way.count] if g is not None]
            if mine:
                arrived.append((way, mine, way.steps))
        begin(arrived)
        return None, *[None] * len(ctx.ways)


def entering(whole: ShardedTensor, kind: Type, leaf: Sequence[Tensor], back: list[Back]) -> Any:
    """A tensor that is there, whose gradient goes to `leaf` by the way `back`; pending."""
    move = Move(whole, kind, back)
    move.leaf = leaf
    return COLLECTORS[-1].enter(move, whole)
