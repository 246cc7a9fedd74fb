"""Collectives that are watched: one dispatcher op each, which a trace shows as one line.

Where a dispatch mode is on (a trace, fake tensors, a counter), the distributed transport calls the
op `shardwise_comm::all_gather(x, mesh, axes, dim, number)` and so on; its kernel is the transport's
own method, so that an op means what the call means. The simulated transport does so only inside
`capturing`, with all shards of the mesh in one list (overload `shards`). Meshes and axes are named
by strings, which graphs and caches can hold.

`number` makes every op of a capture unique, so that nothing merges two collectives on one device
that another device keeps apart. It is the entry's place in the capture's log.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .abstract import AbstractTransport
from .transport import Axes, Transport

# What each collective takes after the axes; the types are those of a dispatcher schema.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "all_reduce": ("str op",),
    "all_gather": ("int dim",),
    "reduce_scatter": ("int dim",),
    "all_to_all": ("int split_dim", "int concat_dim"),
    "permute": ("int[] pairs",),
    "broadcast": ("int root",),
    "reduce": ("int root",),
}
NAMESPACE = "shardwise_comm"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_TRANSPORTS: dict[str, Transport] = {}


class Capture:
    """A running capture: the log that its collectives are written to."""

    def __init__(self, log: Any) -> None:
        self._log = log
        self._last = -1
        self._unwritten = 0

    def number(self, kind: str) -> int:
        """Place in the log of the collective that runs now; negative for one not written there."""
        entries = self._log.collectives
        last = len(entries) - 1
        if last > self._last and entries[last].kind == kind:
            self._last = last
            return last
        self._unwritten += 1
        return -self._unwritten


CAPTURES: list[Capture] = []  # the open ones; empty in normal running


@contextmanager
def capturing(log: Any) -> Iterator[None]:
    """Number the collectives inside the block by their entries in a log, on any transport."""
    capture = Capture(log)
    CAPTURES.append(capture)
    try:
        yield
    finally:
        CAPTURES.remove(capture)


def transport_of(name: str) -> Transport:
    """The transport that an op names."""
    return _TRANSPORTS[name]


def call(node_arguments: Sequence[Any], kind: str) -> tuple[Transport, Axes, tuple[Any, ...], int]:
    """An op's arguments after its tensors, read: transport, axes, what the method takes, number."""
    mesh, axes, *rest, number = node_arguments
    extra = tuple(rest)
    if kind == "permute":
        flat = iter(rest[0])
        extra = (tuple(zip(flat, flat, strict=True)),)
    return _TRANSPORTS[mesh], tuple(axes.split("/")), extra, number


def watched(
    transport: Transport, key: str, kind: str, shards: Sequence[Tensor], axes: Axes, *extra: Any
) -> list[Tensor]:
    """The collective as an op.

    Args:
        transport: whose method it is.
        key: the transport's name, the same in all processes and runs of a program.
        kind: the method.
        shards: its first operand.
        axes: its second.
        *extra: the others.
    """
    _TRANSPORTS[key] = transport
    op = getattr(getattr(torch.ops, NAMESPACE), kind)
    number = CAPTURES[-1].number(kind) if CAPTURES else -1
    if kind == "permute":
        extra = ([position for pair in extra[0] for position in pair],)
    if transport.name == "distributed":
        return [op.default(shards[0], key, "/".join(axes), *extra, number)]
    return op.shards(list(shards), key, "/".join(axes), *extra, number)


def _run(kind: str, x: Any, *arguments: Any) -> Any:
    """Kernel of both overloads: the method itself; an op's results may not share memory."""
    transport, axes, extra, _ = call(arguments, kind)
    method = getattr(transport, kind)
    if isinstance(x, Tensor):
        return method([x], axes, *extra)[0]
    return [shard.clone() for shard in method(x, axes, *extra)]


def _fake(kind: str, x: Any, *arguments: Any) -> Any:
    """Shapes and dtypes of the results."""
    transport, axes, extra, _ = call(arguments, kind)
    shapes = AbstractTransport(transport.axes)  # pyright: ignore
    is_one = isinstance(x, Tensor)
    out = getattr(shapes, kind)([x] if is_one else x, axes, *extra)
    return out[0] if is_one else out


def _define() -> None:
    # The tag: a constant must not be communicated while a trace folds constants.
    tags = (torch.Tag.nondeterministic_seeded,)
    for kind, arguments in ARGUMENTS.items():
        rest = ", ".join(("str mesh", "str axes", *arguments, "int number"))
        for name, schema in {
            kind: f"{kind}(Tensor x, {rest}) -> Tensor",
            f"{kind}.shards": f"{kind}.shards(Tensor[] x, {rest}) -> Tensor[]",
        }.items():
            _LIBRARY.define(schema, tags=tags)
            for device in ("CPU", "CUDA"):
                _LIBRARY.impl(name, partial(_run, kind), device)
            torch.library.register_fake(f"{NAMESPACE}::{name}", partial(_fake, kind), lib=_LIBRARY)


_define()
