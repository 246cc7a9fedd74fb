"""The log: which collectives and ops ran, on which axis, how many bytes, at whose line and why.

`layouts` and `ops` write here at the moment data moves or an op runs; `ops/plan.py` reads it into a
`Plan`. Nothing is written, and nothing but one truth test is paid, while no log is open.

Ring convention, per device: all_gather and reduce_scatter of a full tensor of V over n devices move
(n-1)/n V, all_reduce 2(n-1)/n V, all_to_all (n-1)/n of the local buffer, permute the local buffer.
A broadcast or reduce of a block of V makes n-1 of the n devices move V: (n-1)/n V on average, which
is exact for the whole of a loop in which each device is the root once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from .mesh import Mesh
from .source import user_line
from .transport import Axes, ReduceOp

Kind = Literal[
    "all_gather", "reduce_scatter", "all_reduce", "all_to_all", "permute", "broadcast", "reduce"
]  # fmt: skip
Phase = Literal["forward", "backward", "recompute", "regather", "report"]
Why = Literal[
    "planned", "statistics", "out", "use", "reshard", "gradient", "value", "cheapest", "shard_map"
]

# (times, of what): the local operand L or the full tensor V of the group.
VOLUME: dict[str, tuple[int, Literal["full", "local"]]] = {
    "all_gather": (1, "full"),
    "reduce_scatter": (1, "full"),
    "all_reduce": (2, "full"),
    "all_to_all": (1, "local"),
    "broadcast": (1, "local"),
    "reduce": (1, "local"),
}


@dataclass(frozen=True)
class Collective:
    """One collective as it ran, or would run.

    Attributes:
        kind: which of the seven.
        axes: mesh axes of the group; several form one joint group.
        size: devices in the group.
        elements: moved per device, ring convention; whole numbers but for tensors smaller than the
            group and blocks of a broadcast or reduce that the group does not divide.
        bytes: `elements` times the item size.
        dtype: of what is moved.
        shape: of the local operand.
        reduce: "sum", "max" or "min" for the three reducing kinds.
        phase: forward, backward, recompute, regather, report (the loss value).
        source: the user's line; a backward row names its forward line.
        op: the user's op.
        path: of the parameter that is moved, or None.
        why: the reason the library had.
        repeat: how many times it runs (in a scan that was traced once).
    """

    kind: Kind
    axes: Axes
    size: int
    elements: float
    bytes: float
    dtype: torch.dtype
    shape: tuple[int, ...]
    reduce: ReduceOp | None
    phase: Phase
    source: str
    op: str
    path: str | None
    why: Why
    repeat: int = 1


@dataclass(frozen=True)
class Copy:
    """One transfer between device, host and disk: bytes per device."""

    kind: Literal["to_host", "to_device", "read", "write"]
    bytes: float
    phase: Phase
    source: str
    path: str | None


@dataclass(frozen=True)
class OpRecord:
    """One op as it ran: the types in and out, as printed; FLOPs per device (0 if unknown)."""

    name: str
    source: str
    inputs: tuple[str, ...]
    output: str
    flops: float
    phase: Phase


class Context(NamedTuple):
    """Who acts: an op, its line and its reason; each conversion carries it into the backward."""

    op: str = ""
    source: str = ""
    why: Why = "planned"
    path: str | None = None


@dataclass
class Log:
    """What has been written so far. `flops` counts local arithmetic where a counter ran."""

    collectives: list[Collective] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    ops: list[OpRecord] = field(default_factory=list)
    gathers: dict[tuple[int, Axes, str], tuple[int, object]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    mesh: Mesh | None = None
    memory: dict[str, int] = field(default_factory=dict)  # bytes per device by kind


LOGS: list[Log] = []  # the open logs; empty in normal running, and then nothing below is called
_NOBODY = Context()
_CONTEXT: ContextVar[Context] = ContextVar("context", default=_NOBODY)
_PHASE: ContextVar[Phase] = ContextVar("phase", default="forward")


@contextmanager
def opened(log: Log) -> Iterator[Log]:
    """Write to `log` inside the block."""
    LOGS.append(log)
    try:
        yield log
    finally:
        LOGS.remove(log)


@contextmanager
def acting(
    op: str | None = None, why: Why | None = None, path: str | None = None
) -> Iterator[None]:
    """Name the op and reason of what moves inside the block; an outer op keeps its name."""
    now = _CONTEXT.get()
    token = _CONTEXT.set(
        Context(now.op or op or "", now.source or user_line(), why or now.why, path or now.path)
    )
    try:
        yield
    finally:
        _CONTEXT.reset(token)


@contextmanager
def phase(name: Phase) -> Iterator[None]:
    """Mark what runs inside the block as recompute, regather or report."""
    token = _PHASE.set(name)
    try:
        yield
    finally:
        _PHASE.reset(token)


def context() -> Context | None:
    """What a conversion keeps for its backward; None while no log is open."""
    if not LOGS:
        return None
    now = _CONTEXT.get()
    return now if now.source else now._replace(source=user_line())


def volume(kind: str, local: int, n: int) -> float:
    """Elements that one device moves for a collective with a local operand of `local` elements."""
    if n == 1:
        return 0
    times, of = VOLUME.get(kind, (1, "whole"))
    if of == "whole":
        return local
    full = local * n if kind == "all_gather" else local
    moved = times * (n - 1) * full
    return moved // n if moved % n == 0 else moved / n


def collective(
    kind: Kind,
    mesh: Mesh,
    axes: Axes,
    operand: torch.Tensor,
    by: Context | None,
    reduce: ReduceOp | None = None,
    backward: bool = False,
) -> None:
    """Write one collective to every open log. Groups of one device write nothing."""
    axes = tuple(a for a in axes if mesh.axes[a] > 1)
    if not LOGS or not axes or mesh.is_outside:
        return
    by = by or context() or Context()
    n = mesh.group_size(axes)
    elements = volume(kind, operand.numel(), n)
    now = _PHASE.get()
    entry = Collective(
        kind,
        axes,
        n,
        elements,
        elements * operand.element_size(),
        operand.dtype,
        tuple(operand.shape),
        reduce,
        "backward" if backward and now == "forward" else now,
        by.source,
        by.op,
        by.path,
        "gradient" if backward else by.why,
    )
    for log in LOGS:
        log.mesh = log.mesh or mesh
        log.collectives.append(entry)


def copied(
    kind: Literal["to_host", "to_device", "read", "write"],
    size: float,
    mesh: Mesh,
    by: Context | None,
    backward: bool = False,
) -> None:
    """Write one transfer between memories, its bytes per device, to every open log."""
    by = by or context() or Context()
    now = _PHASE.get()
    entry = Copy(
        kind,
        size,
        "backward" if backward and now == "forward" else now,
        by.source or user_line(),
        by.path,
    )
    for log in LOGS:
        log.mesh = log.mesh or mesh
        log.copies.append(entry)


def op(name: str, inputs: tuple[str, ...], output: str, flops: float, mesh: Mesh) -> None:
    """Write one op to every open log."""
    by = context() or Context()
    entry = OpRecord(name, by.source, inputs, output, flops, _PHASE.get())
    for log in LOGS:
        log.mesh = log.mesh or mesh
        log.ops.append(entry)


def holds(kind: str, size: int) -> None:
    """Write how many bytes per device a kind of tensor takes (parameters, gradients)."""
    for log in LOGS:
        log.memory[kind] = max(log.memory.get(kind, 0), size)


def moved_twice(key: tuple[int, Axes, str], what: str, owner: object) -> None:
    """Warn when the same tensor is gathered or reduced a second time over the same axes."""
    if _PHASE.get() == "recompute":  # the second run of a checkpoint is no mistake of the user's
        return
    by = context() or Context()
    for log in LOGS:
        seen = log.gathers.get(key)
        if seen is not None and seen[1] is owner:
            log.warnings.append(f"{what} again at {by.source}; convert once and use the result")
        log.gathers[key] = ((seen[0] if seen else 0) + 1, owner)
