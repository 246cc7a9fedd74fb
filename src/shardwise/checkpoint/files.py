"""Durable file operations, one method per system call so that a test can fail or kill at each.

What makes a write durable: the file's own fsync, then an fsync of the directory that names it. What
makes a change of several files one change: it is made under another name, and one rename shows it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import CheckpointError, from_os

CHUNK = 1 << 24  # bytes per write and per read: bounds what is held beside the tensors
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


class Files:
    """The system calls that a save and a restore make; nothing else touches the disk."""

    def mkdir(self, path: Path) -> None:
        """Make a directory that is not there yet."""
        os.mkdir(path)

    def create(self, path: Path) -> int:
        """Open a file that is not there yet, for writing."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)

    def open_lock(self, path: Path) -> int:
        """Open the lock file, made if need be."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)

    def lock(self, descriptor: int) -> None:
        """Take the lock or raise BlockingIOError; the kernel drops it when the process dies."""
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def open_directory(self, path: Path) -> int:
        """Open a directory, never through a link."""
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)

    def open_file(self, name: str, directory: int) -> int:
        """Open a file of an open directory, never through a link, and never wait for a FIFO."""
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write some of the bytes; how many."""
        return os.write(descriptor, data)

    def read(self, descriptor: int, size: int, offset: int) -> bytes:
        """Read at most `size` bytes."""
        return os.pread(descriptor, size, offset)

    def fsync(self, descriptor: int) -> None:
        """Wait until the file or directory is on the device."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close it."""
        os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        """Give a directory its name; fails where a directory with content has it already."""
        os.rename(old, new)

    def replace(self, old: Path, new: Path) -> None:
        """Give a file its name, in place of whatever file had it."""
        os.replace(old, new)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        """Remove an empty directory."""
        os.rmdir(path)

    def list(self, path: Path) -> list[str]:
        """Names in a directory, sorted."""
        return sorted(os.listdir(path))


CURRENT = Files()  # what save and restore use; tests put a failing one here


@contextlib.contextmanager
def doing(what: str, file: Path | str, tensor: str = "") -> Iterator[None]:
    """Word every OSError inside as a CheckpointError about this file."""
    try:
        yield
    except OSError as error:
        raise from_os(error, what, file, tensor) from error


def let_go(disk: Files, descriptor: int) -> None:
    """Close what was not written to: nothing can be lost by it, so no error counts."""
    with contextlib.suppress(OSError):
        disk.close(descriptor)


def sync_directory(disk: Files, path: Path) -> None:
    """Make the names in a directory durable."""
    with doing("syncing the directory", path):
        descriptor = disk.open_directory(path)
        try:
            disk.fsync(descriptor)
        finally:
            let_go(disk, descriptor)


def make_directories(disk: Files, path: Path) -> None:
    """Make a directory and its missing parents, each durable."""
    if path.is_dir():
        return
    make_directories(disk, path.parent)
    with doing("making the directory", path):
        try:
            disk.mkdir(path)
        except FileExistsError:  # another process of the job was faster
            if not path.is_dir():
                raise
            return
    sync_directory(disk, path.parent)


def write_file(disk: Files, path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """A new file with these bytes, on the device when this returns."""
    with doing("writing", path):
        descriptor = disk.create(path)
        try:
            for chunk in chunks:
                left = memoryview(chunk)
                while left:
                    left = left[disk.write(descriptor, left[:CHUNK]) :]
            disk.fsync(descriptor)
        finally:
            disk.close(descriptor)


def replace_file(disk: Files, path: Path, text: str) -> None:
    """Put a small file in the place of the one that has its name, at once and durably."""
    other = path.with_name(f"{path.name}.tmp-{secrets.token_hex(8)}")
    write_file(disk, other, [text.encode()])
    with doing("replacing", path):
        disk.replace(other, path)
    sync_directory(disk, path.parent)


def remove(disk: Files, path: Path) -> None:
    """Remove a file, a link, or a directory with what it holds; links are not followed."""
    with doing("removing", path):
        try:
            is_directory = stat.S_ISDIR(os.lstat(path).st_mode)
            if is_directory:
                for name in disk.list(path):
                    remove(disk, path / name)
                disk.rmdir(path)
            else:
                disk.unlink(path)
        except FileNotFoundError:
            return


def open_regular(disk: Files, name: str, directory: int, where: Path) -> tuple[int, int]:
    """A regular file of an open directory: its descriptor and size in bytes."""
    with doing("opening", where / name):
        descriptor = disk.open_file(name, directory)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        let_go(disk, descriptor)
        raise CheckpointError("not a regular file", file=where / name)
    return descriptor, status.st_size


@contextlib.contextmanager
def opened(disk: Files, name: str, directory: int, where: Path) -> Iterator[tuple[int, int]]:
    """The same, closed at the end."""
    descriptor, size = open_regular(disk, name, directory, where)
    try:
        yield descriptor, size
    finally:
        let_go(disk, descriptor)


def read_exactly(disk: Files, descriptor: int, size: int, offset: int, where: Path) -> bytearray:
    """These bytes of a file, all of them."""
    data = bytearray()
    while len(data) < size:
        with doing("reading", where):
            part = disk.read(descriptor, min(size - len(data), CHUNK), offset + len(data))
        if not part:
            raise CheckpointError("the file ends early", file=where, expected=size, found=len(data))
        data += part
    return data


@contextlib.contextmanager
def exclusive(disk: Files, root: Path) -> Iterator[bool]:
    """Hold the only right to write in a checkpoint directory; False where the disk has no locks.

    Raises:
        CheckpointError: another writer holds it.
    """
    path = root / ".lock"
    with doing("opening the lock", path):
        descriptor = disk.open_lock(path)
    try:
        held = True
        try:
            disk.lock(descriptor)
        except BlockingIOError as error:
            raise CheckpointError(
                "another writer is saving to this directory; one job, one directory", file=root
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise from_os(error, "locking", path) from error
            held = False
        yield held
    finally:
        let_go(disk, descriptor)
