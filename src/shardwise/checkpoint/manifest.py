"""The manifest of a checkpoint: what is stored, where, and what it must hash to.

A checkpoint is a directory of safetensors files and one `manifest.json`. Per tensor the manifest
lists the blocks that tile it, each by its global index, its file and its hash; per file its length
and hash. Values that are not tensors (numbers, texts, random keys) are in the manifest itself.

The header of each safetensors file follows from the manifest (`header`): readers compare bytes, so
that no header is ever trusted. The last member of the manifest is the hash of all before it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..meshlib.errors import format_bytes
from ..ops.keys import Key

FORMAT = "shardwise checkpoint"
VERSION = 1
NAME = "manifest.json"
Value = int | float | bool | str | Key | None

# The names that safetensors gives to dtypes.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Block:
    """A box of a tensor that lies in one file: from `start` up to, not including, `stop`."""

    file: str
    start: tuple[int, ...]
    stop: tuple[int, ...]
    sha256: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    def __str__(self) -> str:
        return index_text(self.start, self.stop)


@dataclass(frozen=True)
class Entry:
    """A stored tensor. `layout` and `mesh` say how it lay; nothing is read by them."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    layout: str
    mesh: Mapping[str, int]
    blocks: tuple[Block, ...]

    @property
    def bytes(self) -> int:
        """Of the whole tensor, each element once."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Body:
    """A file: its length in bytes and the sha256 of them all."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Slot:
    """Where in a file the bytes of a block lie."""

    path: str
    entry: Entry
    block: Block
    offset: int  # from the start of the file
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds; prints as a table.

    Attributes:
        step: the training step.
        tensors: tree path to stored tensor.
        values: tree path to number, text, random key or None.
        files: name to length and hash.
        versions: of shardwise and torch, as they wrote it.
    """

    step: int
    tensors: Mapping[str, Entry]
    values: Mapping[str, Value]
    files: Mapping[str, Body]
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def paths(self) -> list[str]:
        """Every path, tensors first."""
        return [*self.tensors, *self.values]

    @cached_property
    def _content(self) -> dict[str, tuple[bytes, tuple[Slot, ...]]]:
        inside: dict[str, list[tuple[str, Entry, Block]]] = {name: [] for name in self.files}
        for path, entry in self.tensors.items():
            for block in entry.blocks:
                inside[block.file].append((path, entry, block))
        return {name: arranged(blocks) for name, blocks in inside.items()}

    def header(self, file: str) -> bytes:
        """The bytes that the file must start with."""
        return self._content[file][0]

    def slots(self, file: str) -> tuple[Slot, ...]:
        """The blocks in a file, in order."""
        return self._content[file][1]

    def __str__(self) -> str:
        return table(self)


def arranged(
    blocks: Sequence[tuple[str, Entry, Block]],
) -> tuple[bytes, tuple[Slot, ...]]:
    """The safetensors header of a file with these blocks, and where each of them lies.

    Larger elements come first, so that every block is aligned, then paths in order. The metadata
    has each block's global index: a file can be understood without its manifest.
    """
    ordered = sorted(blocks, key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {
        "__metadata__": {path: f"{block} of {list(entry.shape)}" for path, entry, block in ordered}
    }
    at = 0
    ends: list[int] = []
    for path, entry, block in ordered:
        ends.append(at + math.prod(block.shape) * entry.dtype.itemsize)
        header[path] = {
            "dtype": NAMES[entry.dtype],
            "shape": block.shape,
            "data_offsets": [at, ends[-1]],
        }
        at = ends[-1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    starts = [0, *ends][: len(ends)]
    slots = tuple(
        Slot(path, entry, block, 8 + len(text) + a, b - a)
        for (path, entry, block), a, b in zip(ordered, starts, ends, strict=True)
    )
    return len(text).to_bytes(8, "little") + text, slots


def index_text(start: Sequence[int], stop: Sequence[int]) -> str:
    """A global index for a reader: "[0:4, 8:16]"."""
    return f"[{', '.join(f'{a}:{b}' for a, b in zip(start, stop, strict=True))}]"


def write_value(value: Value) -> list[Any]:
    """A value as JSON can hold it, exactly: floats by their shortest digits, "inf", "nan"."""
    if isinstance(value, Key):
        return ["key", list(value.words)]
    if isinstance(value, float):
        return ["float", repr(value)]
    return [KINDS[type(value)], value]


KINDS: dict[type, str] = {
    int: "int", float: "float", bool: "bool", str: "str", type(None): "none", Key: "key"
}  # fmt: skip


def write(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`, sealed by their hash."""
    files = list(manifest.files)
    numbers = {name: i for i, name in enumerate(files)}
    body: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "versions": dict(manifest.versions),
        "files": [[name, body.bytes, body.sha256] for name, body in manifest.files.items()],
        "values": {path: write_value(value) for path, value in manifest.values.items()},
        "tensors": {
            path: {
                "dtype": NAMES[entry.dtype],
                "shape": list(entry.shape),
                "layout": entry.layout,
                "mesh": dict(entry.mesh),
                "blocks": [
                    [numbers[block.file], list(block.start), list(block.stop), block.sha256]
                    for block in entry.blocks
                ],
            }
            for path, entry in manifest.tensors.items()
        },
    }
    return seal(body)


def seal(body: Mapping[str, Any]) -> bytes:
    """The text of a JSON object with the hash of that text as last member."""
    text = json.dumps(body, separators=(",", ":"), allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f'{text[:-1]},"sha256":"{digest}"}}\n'.encode()


def table(manifest: Manifest) -> str:
    """The manifest for a reader: one line per tensor and value."""
    rows = [
        (
            path or "(root)",
            f"{NAMES[entry.dtype].lower()}{list(entry.shape)}",
            format_bytes(entry.bytes),
            f"{len(entry.blocks)} block{'s' * (len(entry.blocks) != 1)}",
            entry.layout,
        )
        for path, entry in manifest.tensors.items()
    ]
    rows += [
        (path or "(root)", KINDS[type(value)], "", "", str(value))
        for path, value in manifest.values.items()
    ]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(4)]
    total = sum(entry.bytes for entry in manifest.tensors.values())
    elements = sum(math.prod(entry.shape) for entry in manifest.tensors.values())
    lines = [
        f"step {manifest.step}: {len(manifest.tensors)} tensors, {elements} elements, "
        f"{format_bytes(total)} in {len(manifest.files)} files"
    ]
    for row in rows:
        cells = [f"{text:<{n}}" for text, n in zip(row, widths, strict=False)]
        lines.append(("  " + "  ".join([*cells, row[-1]])).rstrip())
    return "\n".join(lines)
