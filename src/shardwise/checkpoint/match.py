"""Which stored tensor each leaf of `like` gets; everything that does not fit, in one error."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..layouts.sharded import ShardedTensor
from .errors import CheckpointError
from .manifest import KINDS, NAMES, Entry, Manifest

_MOST_LISTED = 20


def matched(
    manifest: Manifest, leaves: Sequence[tuple[str, Any]], rename: Mapping[str, str], where: Path
) -> list[str]:
    """The stored path of each leaf.

    Args:
        manifest: what is stored.
        leaves: paths and leaves of `like`.
        rename: stored path, or start of one, to what it is called in `like`.
        where: the directory of the checkpoint, for errors.

    Raises:
        CheckpointError: a leaf that is not stored, or has another kind, shape or dtype; a rename of
            nothing, or of two paths to one.
    """
    named = renamed(manifest.paths, rename, where)
    found: list[str] = []
    problems: list[tuple[str, str, Any, Any]] = []
    seen: set[str] = set()
    for path, leaf in leaves:
        stored = named.get(path)
        if path in seen:
            problems.append((path, "two leaves of `like` have this path", None, None))
        elif stored is None:
            unused = [p for p in named if p not in dict(leaves)]
            problems.append((path, "not stored" + _nearest(path, unused), None, None))
        else:
            found.append(stored)
            wants, has = described(leaf), stored_as(manifest, stored)
            if wants != has:
                called = "" if stored == path else f" (stored as {stored!r})"
                problems.append((path, f"another type{called}", wants, has))
        seen.add(path)
    if problems:
        _raise(problems, where)
    return found


def _raise(problems: Sequence[tuple[str, str, Any, Any]], where: Path) -> None:
    path, problem, wants, has = problems[0]
    if len(problems) == 1:
        raise CheckpointError(
            problem, file=where, tensor=path or "(root)", expected=wants, found=has
        )
    lines = [
        f"{p or '(root)'}: {text}" + ("" if a is None else f": expected {a}, found {b}")
        for p, text, a, b in problems[:_MOST_LISTED]
    ]
    if len(problems) > _MOST_LISTED:
        lines.append(f"and {len(problems) - _MOST_LISTED} more")
    error = CheckpointError(
        f"{len(problems)} leaves do not fit:\n  " + "\n  ".join(lines), file=where
    )
    error.tensor, error.expected, error.found = path, wants, has
    raise error


def renamed(paths: Sequence[str], rename: Mapping[str, str], where: Path) -> dict[str, str]:
    """Path in `like` to stored path; the longest start that a rename names counts.

    >>> renamed(["old.w", "step"], {"old": "new"}, Path())
    {'step': 'step', 'new.w': 'old.w'}
    """
    fixed: dict[str, str] = {}
    same: dict[str, str] = {}
    used: set[str] = set()
    for path in paths:
        start = max((s for s in rename if _starts(path, s)), key=len, default=None)
        if start is None:
            same[path] = path
            continue
        used.add(start)
        rest = path[len(start) :].lstrip(".") if start else path
        called = ".".join(part for part in (rename[start], rest) if part)
        if called in fixed:
            raise CheckpointError(
                f"rename gives the name {called!r} to two stored paths: {fixed[called]!r} too",
                file=where,
                tensor=path,
            )
        fixed[called] = path
    idle = [start for start in rename if start not in used]
    if idle:
        raise CheckpointError(
            f"rename is from stored path to path in `like`, but {idle[0]!r} is not stored"
            + _nearest(idle[0], paths),
            file=where,
            tensor=idle[0],
        )
    return {**same, **fixed}


def _starts(path: str, start: str) -> bool:
    return not start or path == start or path.startswith(f"{start}.")


def _nearest(path: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(path, list(known)[:2000], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def described(leaf: Any) -> str:
    """A leaf's kind for comparison: dtype and global shape, or the class of a value."""
    if isinstance(leaf, ShardedTensor | Tensor):
        dtype = NAMES.get(leaf.dtype, str(leaf.dtype))
        return f"{dtype.lower()}{list(leaf.shape)}"
    return KINDS.get(type(leaf), type(leaf).__name__)


def stored_as(manifest: Manifest, path: str) -> str:
    """The same of what is stored."""
    entry: Entry | None = manifest.tensors.get(path)
    if entry is None:
        return KINDS[type(manifest.values[path])]
    return f"{NAMES[entry.dtype].lower()}{list(entry.shape)}"
