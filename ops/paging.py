"""Paging: run a schedule of uses in a bounded memory, moving few bytes.

What an op needs must be on the device. To make room, a tensor that may leave goes to the host. With
tensors of one size, all with a copy there, it is best to take the one whose next use is farthest
(Belady). Otherwise no simple rule does: `decide` takes the best of several, at the budget and at
fixed smaller ones, so that a larger budget never costs more.

Source: Belady 1966, "A study of replacement algorithms".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush

NEVER = 1 << 60
WORK = 200_000  # uses in the schedule times capacities that are tried


@dataclass(frozen=True)
class Schedule:
    """What a step needs on the device, and when.

    Attributes:
        uses: per op the numbers of the tensors that must be there.
        sizes: bytes per device of each tensor.
        given: whether it exists before the step, with a copy on the host; others are made by the
            first op that uses them.
        until: the last op after which somebody may still hold it; `NEVER` past the end.
        can_leave: whether it may go to the host between two uses.
        names: of the tensors, and of the ops' lines, for people.
        lines: source line of each op.
    """

    uses: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    given: tuple[bool, ...]
    until: tuple[int, ...]
    can_leave: tuple[bool, ...]
    names: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()

    @cached_property
    def times(self) -> list[list[int]]:
        """Per tensor the ops that use it."""
        found: list[list[int]] = [[] for _ in self.sizes]
        for at, needed in enumerate(self.uses):
            for i in dict.fromkeys(needed):
                found[i].append(at)
        return found

    def least(self, pinned: Collection[int] = ()) -> tuple[int, int]:
        """The fewest bytes with which the step can run, and the op that needs them.

        At each op: what it uses, and what is alive and cannot leave.
        """
        change = [0] * (len(self.uses) + 1)
        fixed = set(pinned)
        for i, times in enumerate(self.times):
            if i in fixed:
                change[0] += self.sizes[i]
            elif not self.can_leave[i] and times:
                change[times[0]] += self.sizes[i]
                change[min(self.until[i] + 1, len(self.uses))] -= self.sizes[i]
        need, worst, held = 0, 0, 0
        for at, needed in enumerate(self.uses):
            held += change[at]
            now = held + sum(self.sizes[i] for i in needed if self.can_leave[i] and i not in fixed)
            if now > need:
                need, worst = now, at
        return need, worst


@dataclass(frozen=True)
class Paging:
    """How a schedule runs in a given capacity.

    Attributes:
        peak: the most bytes on the device.
        to_device: bytes that come.
        to_host: bytes that go.
        left: tensors that went to the host at some time.
    """

    peak: int
    to_device: int
    to_host: int
    left: frozenset[int]

    @property
    def traffic(self) -> int:
        """Bytes both ways."""
        return self.to_device + self.to_host


Rule = Callable[[int, int, int, bool], float]
# (next use, last use, size, has a copy on the host) -> the tensor with the largest number leaves
RULES: dict[str, Rule] = {
    "farthest": lambda after, before, size, clean: after,
    "farthest, free first": lambda after, before, size, clean: after + (NEVER if clean else 0),
    "farthest and largest": lambda after, before, size, clean: min(after, 1 << 30) * size,
    "least recent": lambda after, before, size, clean: -before,
}


def paging(
    schedule: Schedule, capacity: int, rule: str = "farthest", pinned: Collection[int] = ()
) -> Paging | None:
    """Run a schedule in a capacity; None if an op's tensors do not fit.

    Args:
        schedule: the step.
        capacity: bytes per device.
        rule: which tensor leaves, a key of `RULES`.
        pinned: tensors that are on the device from the start and never leave.

    >>> step = Schedule(((0,), (1,), (0,), (1,)), (4, 4), (True, True), (9, 9), (True, True))
    >>> paging(step, 8).to_device, paging(step, 4).to_device, paging(step, 3)
    (8, 16, None)
    """
    choose, times, sizes = RULES[rule], schedule.times, schedule.sizes
    fixed = set(pinned)
    here = set(fixed)
    clean = {i for i, given in enumerate(schedule.given) if given}
    held = peak = sum(sizes[i] for i in fixed)
    came = went = 0
    left: set[int] = set()
    ends: dict[int, list[int]] = {}
    for i, until in enumerate(schedule.until):
        if until < len(schedule.uses) and i not in fixed:
            ends.setdefault(until, []).append(i)
    done = [0] * len(sizes)  # uses so far; an entry of the queue holds as long as there are no more
    queue: list[tuple[float, int, int]] = []

    for at, needed in enumerate(schedule.uses):
        now = dict.fromkeys(needed)
        new = [i for i in now if i not in here]
        more = sum(sizes[i] for i in new)
        while held + more > capacity:
            if not queue:
                return None
            _, i, uses = heappop(queue)
            if uses != done[i] or i not in here or i in now:
                continue  # those of this op come back into the queue below
            here.discard(i)
            held -= sizes[i]
            left.add(i)
            if i not in clean:
                went += sizes[i]
                clean.add(i)
        for i in new:
            here.add(i)
            if schedule.given[i] or done[i]:
                came += sizes[i]
        held += more
        peak = max(peak, held)
        for i in now:
            done[i] += 1
            if schedule.can_leave[i] and i not in fixed:
                after = times[i][done[i]] if done[i] < len(times[i]) else NEVER
                heappush(queue, (-choose(after, at, sizes[i], i in clean), i, done[i]))
        for i in ends.get(at, ()):
            if i in here:
                here.discard(i)
                held -= sizes[i]
    return Paging(peak, came, went, frozenset(left))


def decide(
    schedule: Schedule, budget: int, arguments: Sequence[int]
) -> tuple[Paging, frozenset[int]]:
    """The paging that moves least within a budget, and the arguments at rest on the device.

    Capacities are tried on a grid that does not depend on the budget: a larger budget only adds
    candidates.
    """
    found: tuple[Paging, frozenset[int]] | None = None
    for capacity in _grid(schedule, budget):
        for rule in RULES:
            free = paging(schedule, capacity, rule)
            if free is None:
                continue
            stay = _at_rest(schedule, capacity, free, arguments)
            fixed = paging(schedule, capacity, rule, stay) if stay else None
            for made, pinned in ((fixed, stay), (free, frozenset[int]())):
                if made is not None and (found is None or _cost(made) < _cost(found[0])):
                    found = made, pinned
    assert found is not None
    return found


def _cost(made: Paging) -> tuple[int, int]:
    return made.traffic, made.peak


def _grid(schedule: Schedule, budget: int) -> list[int]:
    """Capacities from the least that works up to all, as far as the budget goes."""
    least, _ = schedule.least()
    total = sum(schedule.sizes)
    unit = math.gcd(*schedule.sizes) or 1
    points = max(16, min(256, WORK // max(1, sum(map(len, schedule.uses)))))
    step = max(unit, -(-(total - least) // points))
    capacities = [*range(least, total, step), max(total, least)]
    return [c for c in capacities if c <= budget]


def _at_rest(
    schedule: Schedule, capacity: int, free: Paging, arguments: Sequence[int]
) -> frozenset[int]:
    """Arguments that can be on the device all the time: of those that never left, the first used.

    The longer an argument is not needed, the more it costs to keep it.
    """
    times = schedule.times
    stay = sorted(
        (i for i in arguments if i not in free.left),
        key=lambda i: times[i][0] if times[i] else NEVER,
    )
    fits, too_many = 0, len(stay) + 1
    while too_many - fits > 1:
        half = (fits + too_many) // 2
        if schedule.least(stay[:half])[0] <= capacity:
            fits = half
        else:
            too_many = half
    return frozenset(stay[:fits])
