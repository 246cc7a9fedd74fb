"""`load` and `save`: Hugging Face checkpoints onto any mesh, and back, bit by bit.

Loading asks for each block of each parameter by its global index and reads only that from the
files: no process ever holds more than its own blocks and one layer's slice. Saving gathers one
tensor at a time and streams it to disk.

`families` says how each config.json is read and written, `Model.names` where parameters lie.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase as fits
from functools import reduce
from typing import Any

import optree
import torch
from torch import Tensor

from ..layouts.place import from_callback
from ..layouts.strategy import Strategy
from ..layouts.tree import items
from ..meshlib.errors import MeshError
from ..meshlib.mesh import Mesh
from ..ops.nn.param import Param
from . import blocks
from .families import Family, family_of, family_with, read_config
from .folder import (
    CONFIG,
    FILE_BYTES,
    GENERATION,
    INDEX,
    Folder,
    Spec,
    divided,
    index_of,
    opened,
    replacing,
    write_file,
    write_json,
)
from .model import Model
from .names import Source

_OLD = ((".weight", ".gamma"), (".bias", ".beta"))  # norms of early files


def load(
    path: str | os.PathLike[str],
    mesh: Mesh,
    strategy: Strategy,
    *,
    dtype: torch.dtype | None = None,
    pad: Mapping[str, int] | None = None,
) -> tuple[Model, Any]:
    """A model and its parameters from a Hugging Face folder, laid out as the strategy says.

    Args:
        path: a folder with config.json and model.safetensors, or an index and its files.
        mesh: where to.
        strategy: its rows at rest; bound to the model.
        dtype: of the parameters; None keeps the file's. Blocks are converted one by one.
        pad: dim to the multiple that its size is rounded up to (vocab, heads, kv_heads, ffn), for
            axes that do not divide it. Padding is zero and changes no result.

    Returns:
        (model, params). The model's `names` are spelled as the files spell them.

    Cost: reads this process's blocks once; holds them and one layer's slice. Nothing is sent.

    Raises:
        FileNotFoundError: no folder, config.json or safetensors.
        TypeError: no Strategy.
        ValueError: a dtype or tensors that are not floating; an unknown family; missing, unexpected
            or mis-shaped tensors (all of them, with both shapes); damaged files; an index that
            leaves the folder.
        LayoutError: sizes that the strategy cannot cut on this mesh; see `pad`.
    """
    if not isinstance(strategy, Strategy):
        raise TypeError(f"load: strategy = {strategy!r}; expected a Strategy, as strategies.data()")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"load: dtype = {dtype}; parameters are floating-point numbers")
    with opened(path) as folder:
        family = family_of(folder.config, str(path))
        config = read_config(family, folder.config, str(path))
        if pad:
            config = replace(config, pad=dict(pad))
        model = family.make(config, strategy)
        model = replace(model, names=match(model, family, folder), files=folder.files)
        model.check_heads(mesh)
        layouts = strategy.layouts(model.declaration, config, mesh)
        made = []
        leaves = optree.tree_leaves(layouts)
        for (path_, param), layout in zip(items(model.declaration), leaves, strict=True):
            made.append(_loaded(folder, model, path_, param, mesh, layout, dtype))
    return model, optree.tree_structure(model.declaration).unflatten(made)


def _loaded(
    folder: Folder,
    model: Model,
    path: str,
    param: Param,
    mesh: Mesh,
    layout: Any,
    dtype: torch.dtype | None,
) -> Any:
    """One parameter, its blocks read one by one."""
    source, config = model.names[path], model.config
    names = {blocks.tensor_name(source, layer) for layer in _layers(param, config.true_sizes)}
    kind = dtype or reduce(torch.promote_types, (folder.specs[name].dtype for name in names))

    def block(index: tuple[slice, ...]) -> Tensor:
        return blocks.read_block(folder, source, param, index, config.true_sizes, kind)

    return from_callback(block, param.shape(config), mesh, layout, dtype=kind)


def match(model: Model, family: Family, folder: Folder) -> dict[str, Source]:
    """The place of each parameter in the folder, spelled as there.

    Raises:
        ValueError: all missing, unexpected and mis-shaped tensors.
    """
    sizes = model.config.true_sizes
    if sizes["layer"] > len(folder.specs):
        raise ValueError(
            f"{folder.path}: {CONFIG} says {sizes['layer']} layers, but there are only "
            f"{len(folder.specs)} tensors"
        )
    found: dict[str, Source] = {}
    problems: list[str] = []
    known: set[str] = set()
    for path, param in items(model.declaration):
        source = _spelled(model.names[path], family.prefix, folder.specs)
        found[path] = source
        shape = blocks.file_shape(source, sizes)
        for layer in _layers(param, sizes):
            name = blocks.tensor_name(source, layer)
            if name in known and not source.parts:
                continue
            spec = folder.specs.get(name)
            if spec is None:
                if name not in known:
                    problems.append(f"missing     {name} {list(shape)}")
            elif spec.shape != shape and name not in known:
                problems.append(
                    f"mis-shaped  {name} {list(spec.shape)}, but {CONFIG} says {list(shape)}"
                )
            elif not spec.dtype.is_floating_point and name not in known:
                problems.append(f"not floating  {name} holds {spec.dtype}")
            known.add(name)
    is_other = False
    for name in sorted(set(folder.specs) - known):
        copied = next((found.get(p) for like, p in family.copies.items() if fits(name, like)), None)
        if copied is not None:
            if not _is_copy(folder, name, copied.name):
                problems.append(f"not a copy  {name} differs from {copied.name}, which it repeats")
        elif not any(fits(name, pattern) for pattern in family.ignored):
            problems.append(f"unexpected  {name} {list(folder.specs[name].shape)}")
            is_other = True
    named = folder.config.get("architectures") or ["no class"]
    if is_other and not set(map(str, named)) & set(family.heads):
        problems.append(
            f"{CONFIG} names {', '.join(map(str, named))}; heads that are read are those of "
            f"{', '.join(family.heads) or 'no other class'}"
        )
    if problems:
        raise ValueError("\n  ".join([f"{folder.path} does not fit its {CONFIG}:", *problems]))
    return found


def _layers(param: Param, sizes: Mapping[str, int]) -> Sequence[int | None]:
    return range(sizes[param.stacked[0]]) if param.stacked else (None,)


def _spelled(source: Source, prefix: str, specs: Mapping[str, Spec]) -> Source:
    """The row with its name as the files have it: with or without the prefix, new or old."""
    bare = source.name.removeprefix(prefix)
    spellings = [source.name, prefix + bare, bare]
    for new, old in _OLD:
        if source.name.endswith(new):
            spellings += [name.removesuffix(new) + old for name in spellings[:3]]
    for name in spellings:
        if blocks.tensor_name(replace(source, name=name), 0) in specs:
            return replace(source, name=name)
    return source


def _is_copy(folder: Folder, name: str, other: str) -> bool:
    """Whether two tensors are equal, compared in slices of rows."""
    spec = folder.specs[name]
    if spec != folder.specs.get(other):
        return False
    step = max(1, 2**22 // max(1, spec.shape[-1]))
    for start in range(0, spec.shape[0], step):
        ranges = [(start, min(start + step, spec.shape[0])), *((0, n) for n in spec.shape[1:])]
        if not torch.equal(folder.read(name, ranges), folder.read(other, ranges)):
            return False
    return True


def save(
    path: str | os.PathLike[str], model: Model, params: Any, *, file_bytes: int = FILE_BYTES
) -> None:
    """A Hugging Face folder: config.json and safetensors that `from_pretrained` reads.

    A model that was loaded keeps what its config.json and generation_config.json said besides.
    Tensors have the names, shapes and bits that they were loaded with; padding is cut off. The
    folder appears whole or not at all. Under torchrun call it in every process; one writes.

    Args:
        path: of the new folder.
        model: the model.
        params: its parameters, in any layout; their dtype is kept.
        file_bytes: files are filled up to this size.

    Cost: gathers one tensor at a time (all_gather of each cut dim); holds one.

    Raises:
        FileExistsError: the folder exists and is not empty.
        ValueError: a model of no known family, or parameters of another model.
        MeshError: (torchrun) the writing process failed; raised in every process.
    """
    family = family_with(model.config)
    parts = _parts(model, params)
    specs = _specs(model, parts)
    mesh = next(iter(parts.values()))[0][2].mesh
    config = _config(model, family)
    kinds = {str(spec.dtype).removeprefix("torch.") for spec in specs.values()}
    if len(kinds) == 1:
        config = {**config, "dtype": kinds.pop()}
    waiting = dict.fromkeys(specs)

    def value(name: str) -> Tensor:
        waiting.pop(name)
        return _gathered(model, parts[name], specs[name])

    files = divided(specs, file_bytes)
    failure: Exception | None = None
    if mesh.is_first:
        try:
            _write(path, files, {**model.files, CONFIG: config}, value)
        except Exception as error:
            failure = error
            if mesh.transport != "distributed":
                raise
    for name in [n for held in files.values() for n in held if n in waiting]:
        value(name)  # the other processes' part in gathering, or what a failed writer still owes
    if mesh.transport != "distributed":
        return
    from ..meshlib.distributed import agree

    said = f"save to {os.fspath(path)}: {failure or 'written'}"
    try:
        agree(mesh.comm, hashlib.blake2b(said.encode(), digest_size=16).digest(), said)
    except MeshError as error:
        raise error from failure


# keys of config.json that repeat what our config says: kept only where it has not changed
_STALE = ("rope_parameters", "layer_types", "n_ctx", "dtype", "torch_dtype")


def _config(model: Model, family: Family) -> dict[str, Any]:
    """config.json: ours, and what the one that the model was loaded from says besides."""
    ours, found = family.config_to(model.config), model.files.get(CONFIG)
    if found is None:
        return ours
    is_same = read_config(family, found, CONFIG) == replace(model.config, pad={})
    if not is_same:
        return {**{k: v for k, v in found.items() if k not in _STALE}, **ours}
    kept = {k: v for k, v in found.items() if k not in ("dtype", "torch_dtype")}
    return {**kept, "architectures": ours["architectures"]}


def _write(
    path: str | os.PathLike[str],
    files: Mapping[str, Mapping[str, Spec]],
    known: Mapping[str, Mapping[str, Any]],
    value: Callable[[str], Tensor],
) -> None:
    """The folder of a checkpoint, tensor by tensor."""
    with replacing(path) as scratch:
        for file, held in files.items():
            with open(scratch / file, "wb") as stream:
                write_file(stream, held, value)
        if len(files) > 1:
            write_json(scratch / INDEX, index_of(files))
        for name in (CONFIG, GENERATION):
            if name in known:
                write_json(scratch / name, known[name])


Part = tuple[Source, Param, Any, int | None]


def _parts(model: Model, params: Any) -> dict[str, list[Part]]:
    """Tensor name to the parameters in it, in order."""
    sizes = model.config.true_sizes
    values = dict(items(params))
    declared = dict(items(model.declaration))
    if values.keys() != declared.keys():
        odd = sorted(values.keys() ^ declared.keys())
        raise ValueError(f"save: the parameters are not this model's: {', '.join(odd)}")
    found: dict[str, list[Part]] = {}
    for path, param in declared.items():
        source, shape = model.names[path], param.shape(model.config)
        if tuple(values[path].shape) != shape:
            raise ValueError(f"save: {path} has shape {tuple(values[path].shape)}, not {shape}")
        for layer in _layers(param, sizes):
            name = blocks.tensor_name(source, layer)
            found.setdefault(name, []).append((source, param, values[path], layer))
    for parts in found.values():
        parts.sort(key=lambda part: part[0].part)
    return found


def _specs(model: Model, parts: Mapping[str, list[Part]]) -> dict[str, Spec]:
    sizes = model.config.true_sizes
    return {
        name: Spec(
            blocks.file_shape(group[0][0], sizes),
            reduce(torch.promote_types, (value.dtype for _, _, value, _ in group)),
        )
        for name, group in parts.items()
    }


def _gathered(model: Model, parts: Sequence[Part], spec: Spec) -> Tensor:
    """The whole tensor of a file."""
    sizes = model.config.true_sizes
    values = [
        blocks.to_file(blocks.layer_of(value, layer), source, param, sizes)
        for source, param, value, layer in parts
    ]
    whole = values[0] if len(values) == 1 else torch.cat(values, parts[0][0].along)
    return whole.to(spec.dtype)
