"""Reading blocks: only those that are needed, each checked against its hash before it counts.

A block is read a slab at a time; what a reader needs of it is copied out as it passes. So beside
the tensors themselves at most 16 MiB, or one row of a block, is held.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError
from .files import CHUNK, Files, let_go, open_regular, read_exactly
from .manifest import Manifest, Slot

_MOST_OPEN = 128  # files at a time
Box = tuple[tuple[int, int], ...]  # start and stop per dim, global


class Target:
    """A box of a tensor that is being put together, in host memory."""

    def __init__(self, box: Box, dtype: torch.dtype) -> None:
        self.box = box
        self.tensor = torch.empty([b - a for a, b in box], dtype=dtype)

    def touches(self, start: Sequence[int], stop: Sequence[int]) -> bool:
        """Whether it shares an element with another box."""
        return all(a < d and c < b for (a, b), c, d in zip(self.box, start, stop, strict=True))

    def take(self, slab: Tensor, start: Sequence[int]) -> None:
        """Copy what it needs of a slab that starts there."""
        stop = [a + n for a, n in zip(start, slab.shape, strict=True)]
        if not self.touches(start, stop):
            return
        here, there = [], []
        for (a, b), c, d in zip(self.box, start, stop, strict=True):
            low, high = max(a, c), min(b, d)
            here.append(slice(low - a, high - a))
            there.append(slice(low - c, high - c))
        self.tensor[tuple(here)] = slab[tuple(there)]


class Reader:
    """The open files of one commit; the header of each is checked when it is first opened."""

    def __init__(self, disk: Files, manifest: Manifest, directory: int, where: Path) -> None:
        self.disk = disk
        self.manifest = manifest
        self.directory = directory
        self.where = where
        self._open: dict[str, int] = {}
        self._slots = {
            (slot.path, name): slot for name in manifest.files for slot in manifest.slots(name)
        }

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            let_go(self.disk, descriptor)

    def file(self, name: str) -> int:
        """A file's descriptor."""
        if name not in self._open:
            if len(self._open) == _MOST_OPEN:
                let_go(self.disk, self._open.pop(next(iter(self._open))))
            self._open[name] = open_regular(self.disk, name, self.directory, self.where)[0]
            self.header(name)
        return self._open[name]

    def header(self, name: str) -> bytes:
        """The header of a file, which must be the one that the manifest implies."""
        expected = self.manifest.header(name)
        found = read_exactly(self.disk, self._open[name], len(expected), 0, self.where / name)
        if found != expected:
            at = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
            raise CheckpointError(
                f"the header is not what the manifest says, from byte {at} on",
                file=self.where / name,
                tensor=self.manifest.slots(name)[0].path,
                expected=expected[at : at + 24],
                found=found[at : at + 24],
            )
        return bytes(found)

    def fill(self, path: str, targets: Sequence[Target]) -> None:
        """Read every block of a tensor that one of the boxes touches."""
        for block in self.manifest.tensors[path].blocks:
            touched = [t for t in targets if t.touches(block.start, block.stop)]
            if touched:
                slot = self._slots[path, block.file]
                file = self.file(block.file)
                read_slot(self.disk, slot, file, self.where / block.file, touched)


def read_slot(
    disk: Files,
    slot: Slot,
    file: int,
    where: Path,
    targets: Sequence[Target] = (),
    whole: Any = None,
) -> None:
    """Read a block into the targets that touch it.

    Args:
        disk: the system calls.
        slot: which block.
        file: the open file.
        where: its name, for errors.
        targets: boxes of the block's tensor.
        whole: a hash of the file, to be fed with the block's bytes.

    Raises:
        CheckpointError: the bytes are not those that were saved.
    """
    digest = hashlib.sha256()
    shape, start = slot.block.shape, slot.block.start
    rows = shape[0] if shape else 1
    row_bytes = slot.bytes // rows
    step = max(1, CHUNK // row_bytes)
    for row in range(0, rows, step):
        count = min(step, rows - row)
        offset = slot.offset + row * row_bytes
        data = read_exactly(disk, file, count * row_bytes, offset, where)
        digest.update(data)
        if whole is not None:
            whole.update(data)
        if targets:
            slab = torch.frombuffer(data, dtype=torch.uint8).view(slot.entry.dtype)
            slab = slab.reshape(count, *shape[1:]) if shape else slab.reshape(())
            for target in targets:
                target.take(slab, (start[0] + row, *start[1:]) if shape else ())
    if digest.hexdigest() != slot.block.sha256:
        raise CheckpointError(
            f"the block {slot.block} is damaged: its sha256 differs",
            file=where,
            tensor=slot.path,
            expected=slot.block.sha256,
            found=digest.hexdigest(),
        )


def check_contents(disk: Files, manifest: Manifest, directory: int, where: Path) -> None:
    """Read every byte of a commit that was entered.

    Raises:
        CheckpointError: the first file or block that is not as it was saved.
    """
    with Reader(disk, manifest, directory, where) as reader:
        for name, body in manifest.files.items():
            file = reader.file(name)
            whole = hashlib.sha256(reader.header(name))
            for slot in manifest.slots(name):
                read_slot(disk, slot, file, where / name, whole=whole)
            if whole.hexdigest() != body.sha256:
                raise CheckpointError(
                    "the file is damaged: its sha256 differs",
                    file=where / name,
                    tensor=manifest.slots(name)[0].path,
                    expected=body.sha256,
                    found=whole.hexdigest(),
                )
