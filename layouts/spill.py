"""Files behind `@disk` tensors: private, sized before they are written, gone when the process is.

One file holds the shards of one tensor. Each process has one directory of mode 0700 under the root
(`SHARDWISE_SPILL`, or what `spill_to` was given, or the system's place for temporary files). It is
removed when the process ends: normally, by an exception, or by SIGTERM. A process that is killed
cannot remove its own; the next one that spills under the same root does, when it can take the lock
that the dead one held. Nothing here survives on purpose: checkpoints are for that.

A file is read with `pread`, after its size was compared, so that a file cut short raises an error
where a memory map would end the process. The map is what `shards` gives to everybody else.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import itertools
import os
import shutil
import signal
import stat
import tempfile
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PREFIX = "shardwise-spill"
ALIGN = 4096  # shards start on pages, so that maps and direct reads could
PIECE = 1 << 24  # bytes per read or write call
_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW


class SpillError(OSError):
    """A spill file could not be written or read; the tensor that was to be moved is unharmed."""


class Calls:
    """The system calls made here, in one place so that tests can let them fail."""

    def create(self, path: Path) -> int:
        """A new file of mode 0600, never an existing one."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN, 0o600)

    def open(self, path: Path, flags: int) -> int:
        """An existing file, never through a link."""
        return os.open(path, flags | _OPEN)

    def allocate(self, descriptor: int, size: int) -> None:
        """Reserve the blocks now: a full disk is met here, not in the middle of a write."""
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            os.truncate(descriptor, size)  # the file system cannot reserve

    def write(self, descriptor: int, data: memoryview, at: int) -> int:
        """Bytes written."""
        return os.pwrite(descriptor, data, at)

    def read(self, descriptor: int, into: memoryview, at: int) -> int:
        """Bytes read."""
        return os.preadv(descriptor, [into], at)

    def remove(self, path: Path) -> None:
        """Remove a file."""
        path.unlink(missing_ok=True)


CALLS = Calls()
_ROOT: list[Path] = []  # what `spill_to` was given
_HOMES: dict[Path, _Home] = {}
_LOCK = threading.RLock()


class _Home:
    """This process's directory under a root, and the lock that shows it alive."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        sweep(root)
        self.owner = os.getpid()
        self.path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}-{self.owner}-", dir=root))  # 0700
        self.lock = CALLS.create(self.path / "lock")
        fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.names = itertools.count()

    def remove(self) -> None:
        """Take the directory away; a forked child leaves its parent's."""
        if os.getpid() == self.owner:
            shutil.rmtree(self.path, ignore_errors=True)


def spill_to(root: str | os.PathLike[str] | None) -> None:
    """Put the files of `@disk` tensors made from now on under this directory.

    Args:
        root: a directory on the disk to use; None for `SHARDWISE_SPILL` or the system's temporary
            place, which may be memory.

    >>> from shardwise.layouts.spill import spill_to
    >>> spill_to(None)
    """
    _ROOT[:] = [] if root is None else [Path(root)]


def home() -> Path:
    """This process's private directory, made at its first use.

    >>> import stat
    >>> from shardwise.layouts.spill import home
    >>> oct(stat.S_IMODE(home().stat().st_mode))
    '0o700'
    """
    return _home().path


def _home() -> _Home:
    root = _ROOT[0] if _ROOT else Path(os.environ.get("SHARDWISE_SPILL") or tempfile.gettempdir())
    with _LOCK:
        found = _HOMES.get(root)
        if found is None or found.owner != os.getpid():
            try:
                made = _Home(root)
            except OSError as error:
                raise SpillError(
                    error.errno,
                    f"no directory for @disk tensors can be made under {root}: {error.strerror}; "
                    "name another by SHARDWISE_SPILL",
                ) from error
            if not _HOMES:
                atexit.register(remove_all)
                _on_sigterm()
            found = _HOMES[root] = made
        return found


def remove_all() -> None:
    """Remove this process's directories; their tensors cannot be read afterwards."""
    with _LOCK:
        for made in _HOMES.values():
            made.remove()
        _HOMES.clear()


def _on_sigterm() -> None:
    """Clean up on SIGTERM too, where nobody else handles it; then die of it as before."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return

    def leave(number: int, _frame: Any) -> None:
        remove_all()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, leave)


def sweep(root: Path) -> list[Path]:
    """Remove what killed processes of this user left under a root; gives what was removed.

    A directory is left over if its lock can be taken. One without a lock is being made or taken
    away: then the process that its name says must be gone.
    """
    gone = []
    for path in sorted(root.glob(f"{PREFIX}-*-*")):
        try:
            what = path.lstat()
        except FileNotFoundError:
            continue
        if not stat.S_ISDIR(what.st_mode) or what.st_uid != os.getuid():
            continue  # a link, or another user's
        if _is_dead(path):
            shutil.rmtree(path, ignore_errors=True)
            gone.append(path)
    return gone


def _is_dead(path: Path) -> bool:
    try:
        lock = CALLS.open(path / "lock", os.O_RDWR)
    except OSError:
        return not _runs(path.name.split("-")[2])
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(lock)
    return True


def _runs(pid: str) -> bool:
    if not pid.isdecimal():
        return True  # not a name of ours
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


class File:
    """One spill file: where each distinct shard of a tensor lies in it.

    Attributes:
        path: the file; removed when the last tensor on it is.
        size: its bytes.
        name: the tensor, for errors.
    """

    def __init__(self, path: Path, size: int, name: str) -> None:
        self.path, self.size, self.name = path, size, name
        self.owner = os.getpid()
        weakref.finalize(self, _discard, path, self.owner)


def _discard(path: Path, owner: int) -> None:
    if os.getpid() == owner:
        CALLS.remove(path)


_FILES: dict[int, tuple[File, int]] = {}  # mapped storage -> its file and where it starts there


def behind(tensor: Tensor) -> tuple[File, int] | None:
    """The file behind a tensor and the byte where it starts there, or None if it is in memory."""
    if not _FILES or tensor.device.type != "cpu":
        return None
    found = _FILES.get(tensor.untyped_storage()._cdata)
    if found is None:
        return None
    return found[0], found[1] + int(tensor.storage_offset()) * tensor.element_size()


def write(tensors: Sequence[Tensor], name: str = "", into: File | None = None) -> list[Tensor]:
    """Tensors in host memory, written to one file; gives tensors that are maps of it.

    Args:
        tensors: what to write; any strides. Each must be contiguous in the result.
        name: of the whole, for errors.
        into: a file of the same sizes to write over, in place of a new one: it needs no new space.

    Raises:
        SpillError: the disk is full or fails. Then nothing is left of a new file; what was to be
            written is still where it was.
    """
    sizes = [t.numel() * t.element_size() for t in tensors]
    starts = [0, *itertools.accumulate(-(-size // ALIGN) * ALIGN for size in sizes)]
    total = starts[-1]
    if not total:
        return [torch.empty_like(t) for t in tensors]
    if into is not None and into.size == total:
        file, descriptor = into, _opened(into, os.O_RDWR)
    else:
        within = _home()
        path = within.path / str(next(within.names))
        file, descriptor = None, _made(path, total, name)
    try:
        for tensor, start in zip(tensors, starts, strict=False):
            _put(descriptor, _bytes(tensor.contiguous()), start)
    except OSError as error:
        if file is None:
            CALLS.remove(path)  # pyright: ignore
        raise _trouble(error, name, total, path if file is None else file.path) from error  # pyright: ignore
    finally:
        os.close(descriptor)
    file = file or File(path, total, name)  # pyright: ignore
    return [
        _mapped(file, start, size, t) if size else torch.empty_like(t)
        for t, start, size in zip(tensors, starts, sizes, strict=False)
    ]


def _made(path: Path, size: int, name: str) -> int:
    try:
        descriptor = CALLS.create(path)
    except OSError as error:
        raise _trouble(error, name, size, path) from error
    try:
        CALLS.allocate(descriptor, size)
    except OSError as error:
        os.close(descriptor)
        CALLS.remove(path)
        raise _trouble(error, name, size, path) from error
    return descriptor


def _trouble(error: OSError, name: str, size: int, path: Path) -> SpillError:
    """The error of a write."""
    what = name or "a tensor"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        try:
            free = f"{shutil.disk_usage(path.parent).free:,} B are free"
        except OSError:
            free = "how much is free is not known"
        verdict = f"the disk is full: {size:,} B are needed, {free}"
    else:
        verdict = error.strerror or str(error)
    return SpillError(
        error.errno,
        f"{what} cannot be written under {path.parent.parent}: {verdict}. The tensor is where it "
        "was; name another disk by SHARDWISE_SPILL",
    )


def _put(descriptor: int, data: memoryview, at: int) -> None:
    done = 0
    while done < len(data):
        wrote = CALLS.write(descriptor, data[done : done + PIECE], at + done)
        if not wrote:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done += wrote


def _mapped(file: File, start: int, size: int, like: Tensor) -> Tensor:
    """A map of part of a file; what is written into it stays in memory."""
    whole = torch.UntypedStorage.from_file(str(file.path), shared=False, nbytes=start + size)
    flat = torch.empty(0, dtype=like.dtype)
    flat.set_(whole, start // like.element_size(), like.shape)  # pyright: ignore
    key = whole._cdata
    _FILES[key] = file, 0
    weakref.finalize(flat.untyped_storage(), _FILES.pop, key, None)
    return flat


def read(tensor: Tensor, into: Tensor) -> Tensor:
    """A mapped tensor's values, read from its file into a contiguous tensor in host memory.

    Raises:
        SpillError: the file is gone, has another size, or cannot be read.
    """
    found = behind(tensor)
    if found is None or not tensor.is_contiguous():
        return into.copy_(tensor)
    file, start = found
    descriptor = _opened(file, os.O_RDONLY)
    try:
        data, done = _bytes(into), 0
        while done < len(data):
            got = CALLS.read(descriptor, data[done : done + PIECE], start + done)
            if not got:
                raise SpillError(
                    errno.EIO, f"{file.path} of {file.name} ends at {start + done:,} B"
                )
            done += got
    except OSError as error:
        if isinstance(error, SpillError):
            raise
        raise SpillError(
            error.errno, f"{file.path} of {file.name} cannot be read: {error.strerror}"
        ) from error
    finally:
        os.close(descriptor)
    return into


def _opened(file: File, flags: int) -> int:
    """A spill file, open, of the size that it was given."""
    try:
        descriptor = CALLS.open(file.path, flags)
    except OSError as error:
        raise SpillError(
            error.errno, f"{file.path} of {file.name} cannot be opened: {error.strerror}"
        ) from error
    size = os.fstat(descriptor).st_size
    if size != file.size:
        os.close(descriptor)
        raise SpillError(
            errno.EIO, f"{file.path} of {file.name} has {size:,} B, not {file.size:,} B"
        )
    return descriptor


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # pyright: ignore
