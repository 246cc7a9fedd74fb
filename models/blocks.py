"""Between our parameters and a checkpoint's tensors: the slices that a block is made of.

A `Source` says how a tensor's dims are merged from ours and who else lies in it. Reading takes the
block of a parameter by its global index, padding included (it is zero); writing gives back the
tensor without padding. Both hold one layer of one parameter beside the result.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layouts.layout import make
from ..layouts.reshard import reshard_one
from ..layouts.sharded import ShardedTensor
from ..ops.nn.param import Param, size_of
from .folder import Folder
from .names import Source

Index = Sequence[slice]
_DIM = re.compile(r"\(([^()]*)\)|(\S+)")


def merged(dims: str) -> list[list[str]]:
    """The file's dims, each as the names that are merged in it.

    >>> merged("(heads head_dim) embed")
    [['heads', 'head_dim'], ['embed']]
    """
    return [(inside or name).split() for inside, name in _DIM.findall(dims)]


def length(names: Sequence[str], sizes: Mapping[str, int]) -> int:
    """The size of a merged dim."""
    return math.prod(size_of(name, sizes) for name in names)


def file_shape(source: Source, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of the tensor in the file, from true sizes."""
    if source.shape:
        return tuple(length(names, sizes) for names in merged(source.shape))
    shape = [length(names, sizes) for names in merged(source.dims)]
    if source.parts:
        shape[source.along] = sum(length(part.split(), sizes) for part in source.parts)
    return tuple(shape)


def offset(source: Source, sizes: Mapping[str, int]) -> int:
    """Where a parameter begins along the dim that several share."""
    return sum(length(part.split(), sizes) for part in source.parts[: source.part])


def order(param: Param, source: Source) -> list[int]:
    """For each of the parameter's dims, its place among the file's dims taken apart."""
    flat = [name for names in merged(source.dims) for name in names]
    places = []
    for name in param.names[len(param.stacked) :]:
        at = flat.index(name)
        flat[at] = ""  # a name that stands twice is matched in order
        places.append(at)
    return places


def tensor_name(source: Source, layer: int | None) -> str:
    """The name of a layer's tensor."""
    return (
        source.name if layer is None else source.name.replace("{layer}", str(source.first + layer))
    )


def read_block(
    folder: Folder,
    source: Source,
    param: Param,
    index: Index,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
) -> Tensor:
    """A parameter's block at a global index, zero where there is padding.

    Args:
        folder: open checkpoint.
        source: where the parameter lies.
        param: its declaration.
        index: a slice per dim, stacked ones first, in padded sizes.
        sizes: true sizes.
        dtype: of the result.
    """
    block = torch.zeros([s.stop - s.start for s in index], dtype=dtype)
    stacked = len(param.stacked)
    own = index[stacked:]
    if not stacked:
        _fill(block, folder, source, param, own, sizes, None)
        return block
    for at, layer in enumerate(range(index[0].start, index[0].stop)):
        _fill(block[at], folder, source, param, own, sizes, layer)
    return block


def _fill(
    block: Tensor,
    folder: Folder,
    source: Source,
    param: Param,
    index: Index,
    sizes: Mapping[str, int],
    layer: int | None,
) -> None:
    """Copy one layer's slice of the file into the unpadded part of a block."""
    places = order(param, source)
    names = param.names[len(param.stacked) :]
    wanted: dict[int, tuple[int, int]] = {}  # place among the file's dims -> [start, stop)
    inside: list[slice] = []  # the part of the block that is no padding
    for place, name, cut in zip(places, names, index, strict=True):
        size = size_of(name, sizes)
        start, stop = min(cut.start, size), min(cut.stop, size)
        if start == stop:
            return
        wanted[place] = (start, stop)
        inside.append(slice(0, stop - start))
    ranges: list[tuple[int, int]] = []
    apart: list[int] = []
    inner: list[slice] = []
    place = 0
    for dim, parts in enumerate(merged(source.dims)):
        start, stop = wanted[place]  # of the outermost name: rows that follow each other
        rest = length(parts[1:], sizes)
        begin = offset(source, sizes) if source.parts and dim == source.along else 0
        ranges.append((begin + start * rest, begin + stop * rest))
        apart += [stop - start, *(size_of(name, sizes) for name in parts[1:])]
        inner.append(slice(None))
        inner += [slice(*wanted[place + i]) for i in range(1, len(parts))]
        place += len(parts)
    if source.shape:  # a reshape of the dims: rows where the first dim is the same, else all of it
        whole = [(0, n) for n in file_shape(source, sizes)]
        rows = [length(names, sizes) for names in merged(source.dims)]
        same = merged(source.shape)[0] == merged(source.dims)[0]
        found = folder.read(tensor_name(source, layer), [ranges[0], *whole[1:]] if same else whole)
        found = found.reshape([-1, *rows[1:]])
        cuts = [slice(None) if same else slice(*ranges[0]), *(slice(*r) for r in ranges[1:])]
        found = found[tuple(cuts)]
    else:
        found = folder.read(tensor_name(source, layer), ranges)
    found = found.reshape(apart)[tuple(inner)].permute(places)
    block[tuple(inside)].copy_(found)


def to_file(value: Tensor, source: Source, param: Param, sizes: Mapping[str, int]) -> Tensor:
    """One layer's whole value as its part of the file's tensor, padding cut off."""
    names = param.names[len(param.stacked) :]
    value = value[tuple(slice(0, size_of(name, sizes)) for name in names)]
    places = order(param, source)
    inverse = [places.index(i) for i in range(len(places))]
    shape = merged(source.shape or source.dims)
    return value.permute(inverse).reshape([length(n, sizes) for n in shape])


def layer_of(value: ShardedTensor, layer: int | None) -> Tensor:
    """The global value of one layer of a parameter, on the CPU; a collective.

    Where an axis cuts the layers themselves, it gathers the parameter's whole stack.
    """
    if layer is not None:
        dims = value.layout.dims
        one: Any = reshard_one(value, make(((), *dims[1:]))) if dims[0] else value
        value = one[layer]
    return value.full_tensor().detach().cpu()
