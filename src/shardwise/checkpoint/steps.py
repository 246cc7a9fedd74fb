"""The directory of checkpoints: which steps are committed, and which of them are sound.

    step-00000200/                   a commit: appears by one rename, never changes
    step-00000400.tmp-91c0...        being written, or left behind by a crash; never read
    step-00000400.bad-07ab...        a damaged commit that a save of the same step has set aside
    latest                           the newest commit's name, for people and scripts
    .lock                            held by whoever writes

The directories themselves are the truth: a crash between a commit and the move of `latest` loses
nothing, and a wrong `latest` does no harm.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import parse
from .errors import CheckpointError
from .files import Files, doing, let_go, opened, read_exactly
from .manifest import NAME, Manifest

LATEST = "latest"
_STEP = re.compile(r"step-([0-9]{8,19})")
_LEFTOVER = re.compile(r"(step-[0-9]{8,19}|latest)\.tmp-[0-9a-f]{16}")


def directory(root: Path, step: int) -> Path:
    """Where a step is committed."""
    return root / f"step-{step:08d}"


def committed(disk: Files, root: Path) -> list[int]:
    """Every step that has a directory, sound or not, oldest first."""
    try:
        with doing("listing", root):
            names = disk.list(root)
    except CheckpointError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return []
        raise
    found = [int(match[1]) for name in names if (match := _STEP.fullmatch(name))]
    return sorted(step for step in found if directory(root, step).name in names)


def leftovers(disk: Files, root: Path) -> list[Path]:
    """What dead writers left behind."""
    with doing("listing", root):
        return [root / name for name in disk.list(root) if _LEFTOVER.fullmatch(name)]


@contextmanager
def entered(disk: Files, root: Path, step: int) -> Iterator[tuple[Manifest, int, Path]]:
    """A commit's manifest and its open directory, once manifest and lengths of files are right.

    Raises:
        CheckpointError: no such step, a bad manifest, a file that is missing, no regular file, or
            of another length than the manifest says.
    """
    where = directory(root, step)
    if not os.path.lexists(where):
        steps = committed(disk, root)
        raise CheckpointError(
            "no checkpoint of this step", file=where, expected=step, found=steps or "none at all"
        )
    with doing("opening", where):
        descriptor = disk.open_directory(where)
    try:
        with opened(disk, NAME, descriptor, where) as (file, size):
            if size > parse.MAX_BYTES:
                raise CheckpointError(
                    "the manifest is too long",
                    file=where / NAME,
                    expected=f"at most {parse.MAX_BYTES} bytes",
                    found=size,
                )
            text = bytes(read_exactly(disk, file, size, 0, where / NAME))
        manifest = parse.parse(text, where / NAME, step)
        _check_lengths(manifest, descriptor, where)
        yield manifest, descriptor, where
    finally:
        let_go(disk, descriptor)


def _check_lengths(manifest: Manifest, descriptor: int, where: Path) -> None:
    for name, body in manifest.files.items():
        tensor = manifest.slots(name)[0].path
        try:
            status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
        except FileNotFoundError:
            raise CheckpointError("the file is missing", file=where / name, tensor=tensor) from None
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError("not a regular file", file=where / name, tensor=tensor)
        if status.st_size != body.bytes:
            raise CheckpointError(
                "the file has another length in bytes",
                file=where / name,
                tensor=tensor,
                expected=body.bytes,
                found=status.st_size,
            )


def damage(disk: Files, root: Path, step: int) -> CheckpointError | None:
    """What is wrong with a commit, contents aside; None if it is sound."""
    try:
        with entered(disk, root, step):
            return None
    except CheckpointError as error:
        return error


def newest(disk: Files, root: Path) -> int | None:
    """The newest sound step; None if there is none."""
    found = reversed(committed(disk, root))
    return next((step for step in found if damage(disk, root, step) is None), None)
