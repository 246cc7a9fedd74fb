"""Placement: which tensors of a step live on the host so that its peak fits a device budget.

A step is traced once on the abstract mesh, without memory: which tensors each op needs, when each
is made and when nobody holds it any more. On that schedule tensors are paged (`paging`): what an op
needs must be on the device; to make room, a tensor that may leave goes to the host, the one whose
next use is farthest. So everything is decided before anything is allocated. Arguments that never
leave are at rest on the device, the others on the host. Temporaries cannot leave; arguments,
results and what the forward saves for the backward can.

Source: Fang et al. 2021 (arXiv 2108.05818), which samples a step where this traces it.
"""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import optree
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..layouts import memory as memories
from ..layouts import tree
from ..layouts.sharded import ShardedTensor
from ..meshlib import record
from ..meshlib.errors import format_bytes
from .meter import Meter
from .paging import NEVER, Schedule, decide, paging
from .plan import abstract

UNITS = {"B": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}


class BudgetError(ValueError):
    """No placement fits the budget.

    Attributes:
        shortfall: bytes per device that are missing.
    """

    def __init__(self, text: str, shortfall: int) -> None:
        super().__init__(text)
        self.shortfall = shortfall


@dataclass(frozen=True)
class Placement:
    """Where the tensors of a step live.

    Attributes:
        memory: tree path of each argument to "device" or "host".
        activations: what the forward saves and the host keeps meanwhile: name to bytes.
        budget: bytes per device that were allowed.
        peak: bytes per device at the worst op.
        resident: the peak if everything stayed on the device.
        to_device: bytes per device and step that come from the host.
        to_host: bytes per device and step that go there.
        sizes: bytes per device of each argument.
    """

    memory: Mapping[str, Literal["device", "host"]]
    activations: Mapping[str, int]
    budget: int
    peak: int
    resident: int
    to_device: int
    to_host: int
    sizes: Mapping[str, int] = field(default_factory=dict)

    def __getitem__(self, path: str) -> str:
        return self.memory[path]

    @property
    def traffic(self) -> int:
        """Bytes per device and step, both ways."""
        return self.to_device + self.to_host

    def put(self, value: Any, name: str) -> Any:
        """An argument of the step with its tensors where they belong.

        Args:
            value: the argument: a tree of ShardedTensors.
            name: its name in the step's signature.
        """
        paths = iter([path for path, _ in tree.items(value)])

        def one(x: Any) -> Any:
            path = _joined(name, next(paths))
            return memories.to_memory(x, self.memory[path]) if path in self.memory else x

        return optree.tree_map(one, value, none_is_leaf=True)

    def __str__(self) -> str:
        width = max((len(p) for p in (*self.memory, *self.activations)), default=0)
        lines = [
            f"{path:<{width}}  {where:<6}  {format_bytes(self.sizes.get(path, 0))}"
            for path, where in self.memory.items()
        ]
        lines += [
            f"{name:<{width}}  host    {format_bytes(size)}, saved for the backward"
            for name, size in self.activations.items()
        ]
        lines.append(
            f"peak {format_bytes(self.peak)} per device of {format_bytes(self.budget)} allowed; "
            f"{format_bytes(self.resident)} if everything stayed"
        )
        lines.append(
            f"per step {format_bytes(self.to_device)} to the device, "
            f"{format_bytes(self.to_host)} to the host"
        )
        return "\n".join(lines)


def place(step: Callable[..., Any], *args: Any, budget: int | str) -> Placement:
    """Where to keep what a step reads, so that its peak fits a budget; nothing is allocated.

    Args:
        step: a function of trees of ShardedTensors; it must not read values.
        *args: its arguments, on any mesh: only their types are used. They are taken to be held by
            the caller during the step.
        budget: bytes per device, or a text such as "70GiB".

    Returns:
        The memory of each argument by tree path, the activations that leave, and the predicted peak
        and traffic. Bring parameters by `Strategy.use`, states by `optim.offload`, activations by
        `remat(offload=True)`.

    Raises:
        BudgetError: some op needs more than the budget even with all else on the host; the message
            says how much is missing and what that op needs.

    >>> import shardwise as sw
    >>> mesh = sw.make_mesh({"data": 2}, transport="abstract")
    >>> ws = [sw.zeros((64, 64), mesh, "i o") for _ in range(3)]
    >>> def step(ws, x):
    ...     for w in ws:
    ...         x = x @ w
    ...     return x
    >>> print(place(step, ws, sw.zeros((8, 64), mesh, "b/data d"), budget="40KiB"))
    ws.0  host    16 KiB
    ws.1  device  16 KiB
    ws.2  host    16 KiB
    x     device  1 KiB
    peak 35 KiB per device of 40 KiB allowed; 51 KiB if everything stayed
    per step 32 KiB to the device, 0 B to the host
    """
    allowed = budget if isinstance(budget, int) else parse_bytes(budget)
    schedule, arguments = trace(step, *args)
    need, worst = schedule.least()
    if need > allowed:
        raise BudgetError(_too_small(schedule, allowed, need, worst), need - allowed)
    best, pinned = decide(schedule, allowed, list(arguments.values()))
    whole = paging(schedule, NEVER, pinned=list(arguments.values()))
    assert whole is not None
    kept = set(arguments.values())
    return Placement(
        {path: "device" if i in pinned else "host" for path, i in arguments.items()},
        {
            schedule.names[i]: schedule.sizes[i]
            for i in sorted(best.left)
            if i not in kept and schedule.until[i] < len(schedule.uses)
        },
        allowed,
        best.peak,
        whole.peak,
        best.to_device,
        best.to_host,
        {path: schedule.sizes[i] for path, i in arguments.items()},
    )


def trace(step: Callable[..., Any], *args: Any) -> tuple[Schedule, dict[str, int]]:
    """The schedule of a step, run on the abstract mesh, and its arguments' numbers by path."""
    args = abstract(args)
    tracer = _Tracer()
    arguments: dict[str, int] = {}
    for name, value in zip(_names(step, len(args)), args, strict=True):
        for path, x in tree.items(value):
            if isinstance(x, ShardedTensor):
                number = tracer.given(x._shards[0], _joined(name, path))
                arguments[_joined(name, path)] = number
    with record.opened(record.Log()), tracer:
        result = step(*args)
    for x in optree.tree_leaves(result):  # pyright: ignore
        if isinstance(x, ShardedTensor):
            tracer.results(x._shards[0])
    return tracer.schedule(), arguments


class _Tracer(Meter):
    """Notes which device tensors each op touches, and when they are made and dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[int, int] = {}
        self.sizes: list[int] = []
        self.names: list[str] = []
        self.given_: list[bool] = []
        self.until: list[int] = []
        self.leaves: list[bool] = []
        self.saved: list[bool] = []
        self.is_result: set[int] = set()
        self.uses: list[tuple[int, ...]] = []
        self.lines: list[str] = []

    def given(self, tensor: Tensor, name: str) -> int:
        """Count an argument, wherever it lies now; the caller holds it all the time."""
        memories.home(tensor)
        self.hold(tensor)
        number = self.numbers[tensor.untyped_storage()._cdata]
        self.names[number], self.given_[number], self.leaves[number] = name, True, True
        self.until[number] = NEVER
        return number

    def results(self, tensor: Tensor) -> None:
        """Note a result: it stays, and may go to the host once it is made."""
        number = self.numbers.get(tensor.untyped_storage()._cdata)
        if number is not None:
            self.is_result.add(number)

    def hold(self, tensor: Tensor) -> None:
        """Number a storage that was not seen before."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.numbers or memories.is_away(tensor):
            return
        super().hold(tensor)
        by = record.context()
        number = self.numbers[storage._cdata] = len(self.sizes)
        self.sizes.append(storage.nbytes())
        self.names.append(f"{by.op or 'value'} at {by.source}" if by is not None else "value")
        self.given_.append(False)
        self.until.append(NEVER)
        self.leaves.append(False)
        self.saved.append(not _is_backward())
        weakref.finalize(storage, self._end, storage._cdata, number)

    def _end(self, key: int, number: int) -> None:
        self.numbers.pop(key, None)
        if not self.given_[number]:
            self.until[number] = len(self.uses) - 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the op, then note what it touched."""
        known = len(self.sizes)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if len(self.sizes) == known and not func._schema.is_mutable:
            return out  # a view: nothing is read
        touched = []
        for x in tree_leaves((args, kwargs, out)):
            if isinstance(x, Tensor):
                number = self.numbers.get(x.untyped_storage()._cdata)
                if number is not None and number not in touched:
                    touched.append(number)
        if _is_backward():
            for number in touched:
                # Made in the forward and read in the backward: saved.
                self.leaves[number] = self.leaves[number] or self.saved[number]
        by = record.context()
        self.uses.append(tuple(touched))
        self.lines.append(f"{func.__name__.split('.')[0]} at {by.source}" if by else "")
        return out

    def schedule(self) -> Schedule:
        """What was noted."""
        for number in self.is_result:
            self.until[number], self.leaves[number] = NEVER, True
        return Schedule(
            tuple(self.uses),
            tuple(self.sizes),
            tuple(self.given_),
            tuple(self.until),
            tuple(self.leaves),
            tuple(self.names),
            tuple(self.lines),
        )


def _is_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _names(step: Callable[..., Any], count: int) -> list[str]:
    """Names of a step's arguments."""
    try:
        known = [
            p.name
            for p in inspect.signature(step).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):
        known = []
    return [known[i] if i < len(known) else str(i) for i in range(count)]


def _joined(name: str, path: str) -> str:
    return f"{name}.{path}" if path else name


def _too_small(schedule: Schedule, budget: int, need: int, worst: int) -> str:
    """The text of a budget that cannot be met."""
    alive = [
        i
        for i, times in enumerate(schedule.times)
        if not schedule.can_leave[i] and times and times[0] <= worst <= schedule.until[i]
    ]
    needed = sorted({*schedule.uses[worst], *alive}, key=lambda i: -schedule.sizes[i])
    line = schedule.lines[worst] if schedule.lines else f"op {worst}"
    rows = [f"  {schedule.sizes[i]:>16,} B  {schedule.names[i]}" for i in needed[:6]]
    if len(needed) > 6:
        rest = sum(schedule.sizes[i] for i in needed[6:])
        rows.append(f"  {rest:>16,} B  {len(needed) - 6} more")
    return "\n".join(
        [
            f"no placement fits {budget:,} B per device: {need - budget:,} B are missing",
            f"{line} needs {need:,} B at once, with all else on the host:",
            *rows,
            "cut these tensors over more devices, or take smaller micro-batches",
        ]
    )


def parse_bytes(text: str) -> int:
    """Bytes of a text such as "70GiB".

    >>> parse_bytes("1.5 KiB")
    1536
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]iB|B)\s*", text)
    if found is None:
        raise ValueError(f"{text!r} is no size; write a number and one of {', '.join(UNITS)}")
    return int(float(found[1]) * (1 << UNITS[found[2]]))
