"""The two error classes of the library, and the one function that words a layout problem.

Every message has the same five parts: the op with the user's line and the verdict, the operands
with their full types, the mesh, and numbered fixes with their cost. `layouts` and `ops` say what is
wrong; this file only puts it into words.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "choice", "meaningless", "no rule", "indivisible", "unreduced", "drift", "donated", "parse"
]


@dataclass(frozen=True)
class Fix:
    """One way out of a LayoutError: an expression to paste, what it communicates, and its bytes.

    `bytes` is per device, forward, by the ring convention (see `docs/architecture.md`).
    """

    code: str
    collectives: str
    bytes: int


class MeshError(ValueError):
    """Trouble with a mesh: an unknown axis, two meshes in one op, a wrong world size."""


class LayoutError(ValueError):
    """Trouble with a layout; `kind` says which sort, `fixes` how to go on.

    Attributes:
        kind: "choice" (several meanings, name one), "meaningless" (no layout makes it right), "no
            rule" (the library has no rule for the op), "indivisible", "unreduced", "drift",
            "donated", "parse".
        op: the op's name, "" where there is none.
        source: the user's line, as "train.py:12".
        fixes: expressions that were tried by the planner, cheapest first.

    >>> import shardwise as sw
    >>> sw.Layout("b/x s/x")
    Traceback (most recent call last):
    ...
    shardwise.meshlib.errors.LayoutError: layout 'b/x s/x': axis 'x' is used twice, by dims 0 and 1
    """

    def __init__(
        self,
        message: str,
        *,
        kind: Kind = "meaningless",
        op: str = "",
        source: str = "",
        fixes: Sequence[Fix] = (),
    ) -> None:
        super().__init__(message)
        self.kind: Kind = kind
        self.op = op
        self.source = source
        self.fixes: tuple[Fix, ...] = tuple(fixes)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the closest known one, and all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known: {', '.join(map(repr, known)) or 'none'})"


def format_bytes(count: float) -> str:
    """Bytes for a reader: 768 B, 1.5 KiB, 2 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.4g} {unit}"
        count /= 1024
    raise AssertionError


def word(
    verdict: str,
    *,
    op: str = "",
    source: str = "",
    operands: Sequence[tuple[str, str]] = (),
    mesh: object | None = None,
    fixes: Sequence[Fix] = (),
    lead: str = "choose:",
) -> str:
    """The text of a problem: verdict, operands by name and type, mesh, numbered fixes."""
    where = " at ".join(part for part in (op, source) if part)
    lines = [f"{where}: {verdict}" if where else verdict]
    width = max((len(name) for name, _ in operands), default=0)
    lines += [f"  {name:<{width}}  {kind}" for name, kind in operands]
    if mesh is not None:
        lines.append(f"  on {mesh}")
    if fixes:
        lines.append(lead)
        width = max(len(fix.code) for fix in fixes)
        lines += [
            f"  {number}. {fix.code:<{width}}   {fix.collectives}".rstrip()
            for number, fix in enumerate(fixes, 1)
        ]
    return "\n".join(lines)
