"""Disks that fail, and programs that die, at a chosen system call of a save.

Run as a program, this file saves step 1, then forks a child for every system call of the save of
step 2 and kills it there; a test looks at what is left.

    python disks.py HOME      -> HOME/<mode>/<n>/, and HOME/ends.json with how each child ended

Modes: "kill" dies before the call; "half" writes half of what a write was given and dies; "power"
dies and loses all that no fsync made durable; "async" dies in the thread of an asynchronous save.
"""

from __future__ import annotations

import errno
import gc
import inspect
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import shardwise as sw
from shardwise.checkpoint import files
from shardwise.checkpoint.files import Files

CALLS = [name for name, _ in inspect.getmembers(Files, inspect.isfunction)]


class Watched(Files):
    """Notes every call, and syncs nothing: no test could see it, but all would wait for it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Path | None]] = []
        self.descriptors: dict[int, Path] = {}

    def where(self, args: tuple[Any, ...]) -> Path | None:
        """What a call is about: its path, or that of its descriptor."""
        return args[0] if isinstance(args[0], Path) else self.descriptors.get(args[0])

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        """Called before each call."""

    def after(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        """Called after each call."""


def _watch(name: str) -> Callable[..., Any]:
    real = getattr(Files, name)

    def call(self: Watched, *args: Any) -> Any:
        self.before(name, args)
        self.calls.append((name, self.where(args)))
        result = None if name == "fsync" else real(self, *args)
        if name in ("create", "open_directory", "open_lock"):
            self.descriptors[result] = args[0]
        self.after(name, args, result)
        return result

    return call


for _name in CALLS:
    setattr(Watched, _name, _watch(_name))


class Failing(Watched):
    """The n-th call of some kind raises an OSError."""

    def __init__(self, at: int, code: int = errno.ENOSPC, only: str = "") -> None:
        super().__init__()
        self.at, self.code, self.only = at, code, only
        self.failed: tuple[str, list[str]] | None = None
        self._count = 0

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        if self.only and name != self.only:
            return
        if self._count == self.at:
            self._count += 1
            self.failed = (name, [str(p) for p in (self.where(args), *args) if isinstance(p, Path)])
            if name == "close":  # a close that fails has closed all the same
                os.close(args[0])
            raise OSError(self.code, os.strerror(self.code))
        self._count += 1


class Dying(Watched):
    """The process kills itself at the n-th call."""

    def __init__(self, at: int, mode: str) -> None:
        super().__init__()
        self.at, self.mode = at, mode
        self.dirty: list[Path] = []  # files with bytes that no fsync made durable
        # Names that no fsync of their directory made durable: directory, path, how to take it back.
        self.undo: list[tuple[Path, Path, Callable[[Path], Any]]] = []
        self.replaced: bytes | None = None

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        if len(self.calls) == self.at:
            if self.mode == "half" and name == "write":
                os.write(args[0], args[1][: len(args[1]) // 2])
            if self.mode == "power":
                self._lose()
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "replace":
            self.replaced = args[1].read_bytes() if args[1].exists() else None

    def after(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        if name == "fsync":
            path = self.descriptors[args[0]]
            self.dirty = [p for p in self.dirty if p != path]
            self.undo = [entry for entry in self.undo if entry[0] != path]
        elif name == "write":
            self.dirty.append(self.descriptors[args[0]])
        elif name in ("mkdir", "create"):
            self.undo.append((args[0].parent, args[0], _vanish))
        elif name in ("rename", "replace"):
            old, new = args
            was = self.replaced
            self.dirty = [_moved(p, old, new) for p in self.dirty]
            self.undo = [(_moved(d, old, new), _moved(p, old, new), f) for d, p, f in self.undo]
            back = (lambda p: os.rename(p, old)) if name == "rename" else partial(_put_back, was)
            self.undo.append((new.parent, new, back))

    def _lose(self) -> None:
        for path in self.dirty:
            if path.exists():
                os.truncate(path, 0)
        for _, path, back in reversed(self.undo):
            if path.exists():
                back(path)


def _moved(path: Path, old: Path, new: Path) -> Path:
    return new / path.relative_to(old) if path.is_relative_to(old) else path


def _vanish(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def _put_back(old: bytes | None, path: Path) -> None:
    if old is None:
        path.unlink()
    else:
        path.write_bytes(old)


def state(step: int) -> dict[str, Any]:
    """A small training state that differs from step to step in every leaf."""
    mesh = sw.make_mesh({"data": 2}, transport="simulated", device="cpu")
    return {
        "w": sw.shard(torch.arange(8.0).reshape(4, 2) + step, mesh, "a/data b"),
        "b": sw.shard(torch.full((3,), step, dtype=torch.int64), mesh),
        "key": sw.random.key(step),
        "seen": 100 * step,
    }


def same(a: Any, b: Any) -> bool:
    """Two trees of the same paths, bit for bit."""
    old, new = dict(sw.tree.items(a)), dict(sw.tree.items(b))
    return old.keys() == new.keys() and all(_equal(old[path], new[path]) for path in old)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, sw.ShardedTensor):
        a, b = a.full_tensor(), b.full_tensor()
    if isinstance(a, torch.Tensor):
        one, two = a.contiguous().reshape(-1), b.contiguous().reshape(-1)
        same_type = a.dtype == b.dtype and a.shape == b.shape
        return same_type and torch.equal(one.view(torch.uint8), two.view(torch.uint8))
    return type(a) is type(b) and (a == b or a != a)


def calls_of_a_save(root: Path) -> list[str]:
    """The system calls of the save of step 2, in order."""
    files.CURRENT = disk = Watched()
    sw.checkpoint.save(root, state(1), step=1)
    disk.calls.clear()
    sw.checkpoint.save(root, state(2), step=2, keep=1)
    return [name for name, _ in disk.calls]


MODES = ("kill", "half", "power", "async")


def _main(home: Path) -> None:
    names = calls_of_a_save(home / "count")
    ends: dict[str, dict[str, int]] = {}
    for mode in MODES:
        points = [
            i
            for i, name in enumerate(names)
            if (mode != "half" or name == "write") and (mode != "async" or i % 3 == 0)
        ]
        ends[mode] = {str(at): _die(home / mode / str(at), at, mode) for at in points}
    (home / "ends.json").write_text(json.dumps({"calls": names, "ends": ends}))


def _die(root: Path, at: int, mode: str) -> int:
    """How a child ended that was killed at this call of the save of step 2."""
    files.CURRENT = Watched()
    sw.checkpoint.save(root, state(1), step=1)
    child = os.fork()
    if child == 0:
        files.CURRENT = Dying(at, mode)
        sw.checkpoint.save(root, state(2), step=2, keep=1, wait=mode != "async").wait()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # children then copy fewer pages
    _main(Path(sys.argv[1]))
