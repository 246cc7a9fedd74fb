"""Collectives that have begun, and the way back of gradients that run ahead of their use.

A gradient's way back is a row of casts and conversions. `begin` does what moves nothing and starts
the first collective; `arrive` waits for it, does the rest and gives the gradient. Where a second
collective follows, over another axis, it starts for all tensors that began together.

Owed sums that are all_reduced leave in buckets: laid end to end, reduced by one collective, cut
again. Each element meets the same elements as alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..meshlib import record
from ..meshlib.transport import Axes, Finish
from .convert import MOVES, SUMS, Step, convert_shards, run, written
from .memory import modes_off

BUCKET = 25 << 20  # bytes of owed sums that go by one all_reduce

Back = tuple[Step | torch.dtype, record.Context | None]  # a conversion or cast of the gradient


def start(step: Step, shards: Sequence[Tensor]) -> Finish:
    """Begin a step that moves data; nothing is recorded."""
    wide = step.reduce_dtype
    verb, axes, comm = step.verb, step.axes, step.mesh.comm
    if wide is not None and verb in SUMS and shards[0].dtype != wide:
        narrow = shards[0].dtype
        inner = start(Step(step.mesh, axes, step.before, step.after), [s.to(wide) for s in shards])
        return lambda: [s.to(narrow) for s in inner()]
    begin = getattr(comm, f"start_{verb}", None)
    if begin is None:
        done = run(step, shards, None, False)
        return lambda: done
    dims = {"all_gather": (step.before,), "reduce_scatter": (step.after,)}
    with modes_off():
        return begin(shards, axes, *dims.get(verb, ()))


class Way:
    """A gradient's way back: what two nodes of the graph share.

    Attributes:
        steps: conversions and casts, each with who asked for it.
        count: of the shards.
        begun: the collective that runs, and what follows it.
        others: ways that began with this one, which also have another collective to come.
    """

    def __init__(self, steps: list[Back], count: int) -> None:
        self.steps = steps
        self.count = count
        self.begun: tuple[Finish, list[Back]] | None = None
        self.others: list[Way] = []


def _back(what: Step | torch.dtype, shards: Sequence[Tensor], by: Any) -> Sequence[Tensor]:
    if isinstance(what, torch.dtype):
        return [s.to(what) for s in shards]
    return convert_shards(what, shards, by, True)


def begin(gradients: Sequence[tuple[Way, Sequence[Tensor], list[Back]]]) -> None:
    """Start the next collective of each gradient."""
    buckets, more = _Buckets(), []
    for way, grads, steps in gradients:
        way.begun = _next(grads, steps, buckets)
        way.others = []
        if any(_moves(what) for what, _ in way.begun[1]):
            more.append(way)
    buckets.close()
    for way in more:
        way.others = more


def _next(
    grads: Sequence[Tensor], steps: list[Back], buckets: _Buckets
) -> tuple[Finish, list[Back]]:
    """The next collective of one gradient, started, and what follows it."""
    plain = torch.is_grad_enabled()  # whoever differentiates the gradient needs a graph of it
    for number, (what, by) in enumerate(steps):
        if not plain and isinstance(what, Step) and _moves(what):
            if record.LOGS:
                wide = what.reduce_dtype if what.verb in SUMS else None
                written(what, grads[0] if wide is None else grads[0].to(wide), by, True)
            is_owed = what.verb == "all_reduce"
            finish = buckets.add(what, grads) if is_owed else start(what, grads)
            return finish, steps[number + 1 :]
        grads = _back(what, grads, by)
    done = list(grads)
    return lambda: done, []


def arrive(way: Way) -> Sequence[Tensor] | None:
    """Wait for a gradient, and do what is left of its way; None if there is none."""
    if way.begun is None:
        return None
    while way.others:
        _go_on(way.others)
    (finish, rest), way.begun = way.begun, None
    shards: Sequence[Tensor] = finish()
    for what, by in rest:
        shards = _back(what, shards, by)
    return shards


def _go_on(ways: list[Way]) -> None:
    """Wait for these gradients' collectives and start those that follow, together."""
    arrived = []
    for way in list(ways):
        assert way.begun is not None
        finish, rest = way.begun
        arrived.append((way, finish(), rest))
    ways.clear()
    begin(arrived)


def _moves(what: Step | torch.dtype) -> bool:
    return isinstance(what, Step) and what.verb in MOVES


class _Bucket:
    """Owed sums of one dtype over one group."""

    def __init__(self, step: Step, narrow: torch.dtype) -> None:
        self.step = step
        self.narrow = narrow
        self.members: list[Tensor] = []
        self.bytes = 0
        self._parts: list[Tensor] | None = None
        self._finish: Finish | None = None

    def begin(self) -> None:
        """Start the collective."""
        flat = self.members[0]
        if len(self.members) > 1:
            flat = torch.cat([m.reshape(-1) for m in self.members])
        self._finish = start(self.step, [flat])

    def part(self, number: int) -> list[Tensor]:
        """A member's sum."""
        if self._parts is None:
            assert self._finish is not None
            (flat,), self._finish = self._finish(), None
            sizes = [m.numel() for m in self.members]
            parts = flat.view(-1).split(sizes)
            self._parts = [p.view(m.shape) for p, m in zip(parts, self.members, strict=True)]
            self.members = []
        return [self._parts[number].to(self.narrow)]


class _Buckets:
    """The buckets that one backward of `_Wait` fills."""

    def __init__(self) -> None:
        self._open: dict[tuple[Any, Axes, torch.dtype, torch.dtype], _Bucket] = {}

    def add(self, step: Step, grads: Sequence[Tensor]) -> Finish:
        """Lay a gradient into a bucket, which starts when it is full; what waits for its sum."""
        (grad,) = grads
        wide = step.reduce_dtype or grad.dtype
        key = (step.mesh, step.axes, wide, grad.dtype)
        bucket = self._open.get(key)
        if bucket is None:
            plain = Step(step.mesh, step.axes, step.before, step.after)
            bucket = self._open[key] = _Bucket(plain, grad.dtype)
        number = len(bucket.members)
        bucket.members.append(grad.to(wide))
        bucket.bytes += grad.numel() * wide.itemsize
        if bucket.bytes >= BUCKET:
            self._open.pop(key).begin()
        return lambda: bucket.part(number)

    def close(self) -> None:
        """Start those that are not full."""
        for bucket in self._open.values():
            bucket.begin()
        self._open.clear()
