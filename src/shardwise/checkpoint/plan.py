"""What a save writes, and who writes it.

The unit is a block: a box of a tensor by its global index, whatever mesh it lies on. Each block
has one owner among the devices that hold it, so nothing is written twice; which one depends on the
path, so that replicated tensors are spread over the devices. Each device writes one file.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layouts.layout import make as make_layout
from ..layouts.sharded import ShardedTensor
from ..layouts.tree import items
from ..meshlib.mesh import position
from .errors import CheckpointError
from .files import CHUNK
from .manifest import KINDS, NAMES, Block, Entry, Value, write_value

_LARGEST = 10**900  # integers beyond it are refused; readers stop at 1,000 digits


@dataclass(frozen=True)
class Piece:
    """A block that this process writes: the part of `path` from `start`, now in `tensor`."""

    path: str
    start: tuple[int, ...]
    tensor: Tensor


@dataclass(frozen=True)
class Plan:
    """A tree taken apart.

    Attributes:
        tensors: path to the tensor's entry, without blocks.
        values: path to what is no tensor.
        pieces: number of a device to the blocks that it writes, of the devices of this process.
        digest: equal in all processes that save the same tree.
    """

    tensors: Mapping[str, Entry]
    values: Mapping[str, Value]
    pieces: Mapping[int, Sequence[Piece]]
    digest: str


def make(tree: Any, *, is_first: bool, is_joint: bool, copy: bool) -> Plan:
    """Take a tree apart.

    Args:
        tree: of ShardedTensors, tensors, keys, numbers, texts and None.
        is_first: whether this process writes what every process has: plain tensors.
        is_joint: whether other processes save the same tree; then plain tensors are compared.
        copy: whether to copy what is written to host memory now, so that later changes of the
            tensors' storage do not matter.

    Raises:
        CheckpointError: leaves that cannot be stored, all of them listed.
    """
    tensors: dict[str, Entry] = {}
    values: dict[str, Value] = {}
    pieces: dict[int, list[Piece]] = {}
    problems: list[str] = []
    digest = hashlib.sha256()
    for path, leaf in items(tree):
        problem = _refusal(path, leaf)
        if path in tensors or path in values:
            problem = "two leaves of the tree have this path"
        if problem:
            problems.append(f"{path or '(root)'}: {problem}")
        elif isinstance(leaf, ShardedTensor):
            mesh = dict(leaf.mesh.axes)
            tensors[path] = Entry(leaf.dtype, tuple(leaf.shape), str(leaf.layout), mesh, ())
            for device, piece in _owned(path, leaf):
                pieces.setdefault(device, []).append(piece)
        elif isinstance(leaf, Tensor):
            tensors[path] = Entry(leaf.dtype, tuple(leaf.shape), "plain", {}, ())
            if is_joint:
                digest.update(hash_of(leaf).encode())
            if is_first and leaf.numel():
                start = (0,) * leaf.ndim
                pieces.setdefault(0, []).append(Piece(path, start, leaf.detach()))
        else:
            values[path] = leaf
    if problems:
        raise CheckpointError("cannot be saved:\n  " + "\n  ".join(problems))
    written = {path: write_value(value) for path, value in values.items()}
    types = [(p, str(e.dtype), e.shape, e.layout, dict(e.mesh)) for p, e in tensors.items()]
    digest.update(json.dumps([types, written]).encode())
    if copy:
        pieces = {
            device: [
                Piece(p.path, p.start, p.tensor.to("cpu", copy=True, non_blocking=False))
                for p in group
            ]
            for device, group in pieces.items()
        }
    return Plan(tensors, values, pieces, digest.hexdigest())


def _refusal(path: str, leaf: Any) -> str:
    """Why a leaf cannot be stored; "" where it can."""
    if path == "__metadata__":
        return "safetensors keeps this name for itself"
    if isinstance(leaf, ShardedTensor):
        if leaf.layout.unreduced:
            axes = ", ".join(sorted(leaf.layout.unreduced))
            return f"{leaf} is still a sum over {axes}; save the sum: {_reduced(leaf)}"
        if leaf.layout.varying:
            return f"{leaf} differs over {', '.join(sorted(leaf.layout.varying))} with no claim how"
        if leaf.mesh.transport == "abstract":
            return f"{leaf} lies on an abstract mesh and has no numbers"
    if isinstance(leaf, ShardedTensor | Tensor):
        if leaf.dtype not in NAMES:
            return f"safetensors has no name for {leaf.dtype}"
        if isinstance(leaf, Tensor) and leaf.device.type == "meta":
            return "a meta tensor has no numbers"
        if isinstance(leaf, Tensor) and (leaf.layout != torch.strided or leaf.is_quantized):
            return "only dense tensors are stored"
        return ""
    if type(leaf) not in KINDS:
        return (
            f"a {type(leaf).__name__} is none of ShardedTensor, torch.Tensor, Key, int, float, "
            "bool, str, None"
        )
    if isinstance(leaf, int) and abs(leaf) > _LARGEST:
        return "an integer of more than 900 digits"
    return ""


def _reduced(x: ShardedTensor) -> str:
    whole = make_layout(x.layout.dims, reduced=x.layout.reduced)
    return f'sw.reshard(x, "{whole}")'


def _owned(path: str, x: ShardedTensor) -> Iterator[tuple[int, Piece]]:
    """The blocks of x that devices of this process own, with the device's number."""
    mesh, layout = x.mesh, x.layout
    if mesh.is_outside or not x.numel():
        return
    spare = tuple(a for a in mesh.axes if not isinstance(layout.state(a), int))
    owner = zlib.crc32(path.encode()) % mesh.group_size(spare)
    every = tuple(mesh.axes)
    for coord, shard in zip(mesh.coords, x.shards, strict=True):
        if position(mesh.axes, coord, spare) == owner:
            index = layout.index(x.shape, mesh, coord)
            device = mesh.ranks[position(mesh.axes, coord, every)]
            yield device, Piece(path, tuple(s.start for s in index), shard.detach())


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's elements in row-major order; a view where it lies so on the host."""
    host = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return host.reshape(-1).view(torch.uint8).numpy().data


def chunks(data: memoryview) -> Iterator[memoryview]:
    """The bytes a part at a time."""
    for at in range(0, len(data), CHUNK):
        yield data[at : at + CHUNK]


def hash_of(tensor: Tensor) -> str:
    """The sha256 of a tensor's bytes."""
    return hashlib.sha256(raw(tensor)).hexdigest()


def block_of(piece: Piece, file: str) -> Block:
    """Where a piece lies, its hash not being known yet."""
    stop = tuple(a + n for a, n in zip(piece.start, piece.tensor.shape, strict=True))
    return Block(file, piece.start, stop, "")
