"""Reading a manifest as hostile input: all is checked before anything is opened or allocated.

Checked in this order: length, text, JSON without duplicate keys, its hash, version, then names,
numbers and hashes one by one, then that the blocks of each tensor tile it, that no file holds a
tensor twice, and that each file is exactly as long as what it must hold. File names are a fixed
pattern, so no path can be said. Sizes are compared with the real files before a tensor is made.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from ..ops.keys import Key
from .errors import CheckpointError
from .manifest import DTYPES, FORMAT, VERSION, Block, Body, Entry, Manifest, Value

MAX_BYTES = 1 << 28  # of a manifest: 512 devices with 1,000 tensors each need a quarter of it
MAX_MEMBERS = 500_000  # of all its JSON objects together
MAX_DIMS = 64
MAX_TEXT = 1 << 16
MAX_NUMBER = 2**63
MAX_DIGITS = 1_000
_FILE = re.compile(r"shard-[0-9]{5,9}\.safetensors")
_HASH = re.compile(r"[0-9a-f]{64}")
_SEAL = re.compile(rb',"sha256":"([0-9a-f]{64})"}\n')
_SEAL_BYTES = len(',"sha256":""}\n') + 64


class _Bad(Exception):
    """What is wrong, and with which tensor; `parse` adds the file."""

    def __init__(
        self, problem: str, tensor: str = "", expected: Any = None, found: Any = None
    ) -> None:
        super().__init__(problem)
        self.details: dict[str, Any] = {"tensor": tensor, "expected": expected, "found": found}


def parse(text: bytes, file: Any, step: int | None = None) -> Manifest:
    """The manifest in this text.

    Args:
        text: the content of `manifest.json`.
        file: its name, for errors.
        step: what its directory says.

    Raises:
        CheckpointError: anything that is not as `manifest.write` makes it.
    """
    try:
        body = _members(text)
        found = _manifest(body)
        if step is not None and found.step != step:
            raise _Bad("the step differs from the directory's name", "", step, found.step)
    except _Bad as bad:
        raise CheckpointError(str(bad), file=file, **bad.details) from None
    return found


def _members(text: bytes) -> Mapping[str, Any]:
    """The JSON object, once its hash is right."""
    if len(text) > MAX_BYTES:
        raise _Bad("the manifest is too long", "", f"at most {MAX_BYTES} bytes", len(text))
    if text.count(b":") > 2 * MAX_MEMBERS:
        raise _Bad("the manifest has too many members", "", f"at most {MAX_MEMBERS}", "more")
    sealed = _SEAL.fullmatch(text[-_SEAL_BYTES:])
    if sealed is None:
        raise _Bad("the manifest is not whole: it does not end in its hash")
    digest = hashlib.sha256(text[:-_SEAL_BYTES] + b"}").hexdigest()
    if digest != sealed[1].decode():
        raise _Bad("the manifest is damaged: its sha256 differs", "", sealed[1].decode(), digest)
    try:
        body = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_float=_no_number,
            parse_constant=_no_number,
            parse_int=_integer,
        )
    except RecursionError:
        raise _Bad("the manifest is nested too deeply") from None
    except ValueError as error:
        raise _Bad(f"the manifest is no JSON: {error}") from None
    return _object(body, "the manifest")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise _Bad(f"the key {_short(twice)} is there twice")
    return found


def _no_number(text: str) -> Any:
    raise _Bad(f"{_short(text)} is not an integer; the format has no other numbers")


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _Bad(f"an integer of {len(text)} digits is too long")
    return int(text)


def _manifest(body: Mapping[str, Any]) -> Manifest:
    if body.get("format") != FORMAT:
        raise _Bad("not a checkpoint of this library", "", repr(FORMAT), _short(body.get("format")))
    version = body.get("version")
    if version != VERSION or isinstance(version, bool):
        raise _Bad("the version of the format is unknown here", "", VERSION, _short(version))
    names = ("format", "version", "step", "versions", "files", "values", "tensors", "sha256")
    _keys(body, names, "the manifest")
    step = _count(body["step"], "the step")
    versions = {
        _text(name, "a version's name"): _text(value, "a version")
        for name, value in _object(body["versions"], "versions").items()
    }
    files = _files(body["files"])
    numbered = list(files)
    values = {path: _value(path, v) for path, v in _object(body["values"], "values").items()}
    tensors = {
        path: _entry(path, entry, numbered)
        for path, entry in _object(body["tensors"], "tensors").items()
    }
    both = next((path for path in tensors if path in values), None)
    if both is not None:
        raise _Bad("stored both as tensor and as value", both)
    found = Manifest(step, tensors, values, files, versions)
    _check_contents(found)
    return found


def _files(rows: Any) -> dict[str, Body]:
    files: dict[str, Body] = {}
    for row in _list(rows, "files"):
        name, size, digest = _list(row, "a file", 3)
        if not isinstance(name, str) or not _FILE.fullmatch(name):
            raise _Bad(f"{_short(name)} is no name of a file here", "", _FILE.pattern, _short(name))
        if name in files:
            raise _Bad(f"the file {name} is listed twice")
        files[name] = Body(_count(size, f"the length of {name}"), _hash(digest, name))
    return files


def _entry(path: str, entry: Any, files: list[str]) -> Entry:
    _path(path)
    what = f"tensor {_short(path)}"
    entry = _object(entry, what)
    _keys(entry, ("dtype", "shape", "layout", "mesh", "blocks"), what)
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Bad("unknown dtype", path, " ".join(DTYPES), _short(dtype))
    shape = _counts(entry["shape"], "the shape", path)
    if math.prod(shape) * DTYPES[dtype].itemsize >= MAX_NUMBER:
        raise _Bad(f"the shape {list(shape)} is too large", path)
    mesh = {
        _text(axis, "an axis"): _count(size, "an axis size", path)
        for axis, size in _object(entry["mesh"], "a mesh").items()
    }
    blocks = tuple(_block(path, b, len(shape), files) for b in _list(entry["blocks"], "blocks"))
    check_tiling(path, shape, blocks)
    return Entry(DTYPES[dtype], shape, _text(entry["layout"], "a layout"), mesh, blocks)


def _block(path: str, row: Any, ndim: int, files: list[str]) -> Block:
    number, start, stop, digest = _list(row, "a block", 4)
    if _count(number, "a file's number", path) >= len(files):
        raise _Bad("a block in a file that is not listed", path, f"below {len(files)}", number)
    start, stop = _counts(start, "a start", path), _counts(stop, "a stop", path)
    if len(start) != ndim or len(stop) != ndim:
        raise _Bad("a block has another number of dims", path, ndim, f"{len(start)}, {len(stop)}")
    if any(a >= b for a, b in zip(start, stop, strict=True)):
        raise _Bad(f"the block {start} to {stop} holds nothing", path)
    return Block(files[number], start, stop, _hash(digest, path))


def check_tiling(path: str, shape: tuple[int, ...], blocks: tuple[Block, ...]) -> None:
    """Raise unless the blocks are the cells of a grid over the tensor: no gap, no overlap."""
    total, covered = math.prod(shape), sum(math.prod(block.shape) for block in blocks)
    for block in blocks:
        if any(b > n for b, n in zip(block.stop, shape, strict=True)):
            raise _Bad(f"the block {block} lies outside the shape", path, list(shape), str(block))
    if covered != total:
        what = "gap" if covered < total else "overlap"
        raise _Bad(f"{what}: the blocks hold another number of elements", path, total, covered)
    if not blocks:
        return
    cuts = [sorted({block.start[d] for block in blocks}) for d in range(len(shape))]
    ends = [dict(zip(c, [*c[1:], n], strict=True)) for c, n in zip(cuts, shape, strict=True)]
    seen: set[tuple[int, ...]] = set()
    for block in blocks:
        cell = tuple(ends[d][a] for d, a in enumerate(block.start))
        if block.start in seen or cell != block.stop:
            raise _Bad(f"the block {block} overlaps another", path)
        seen.add(block.start)


def _check_contents(manifest: Manifest) -> None:
    """No file holds a tensor twice, and each is as long as what it must hold."""
    for path, entry in manifest.tensors.items():
        names = [block.file for block in entry.blocks]
        if len(set(names)) != len(names):
            raise _Bad("two blocks in one file", path)
    for name, body in manifest.files.items():
        slots = manifest.slots(name)
        if not slots:
            raise _Bad(f"the file {name} holds no tensor")
        size = slots[-1].offset + slots[-1].bytes
        if body.bytes != size:
            raise _Bad(f"the length of {name} is not that of its tensors", "", size, body.bytes)


def _value(path: str, row: Any) -> Value:
    _path(path)
    kind, value = _list(row, f"value {_short(path)}", 2)
    check = _VALUES.get(kind) if isinstance(kind, str) else None
    if check is None:
        raise _Bad("unknown kind of value", path, " ".join(_VALUES), _short(kind))
    try:
        return check(value)
    except (_Bad, ValueError, TypeError):
        raise _Bad(f"not a value of kind {kind}: {_short(value)}", path) from None


def _float(value: Any) -> float:
    if not isinstance(value, str) or len(value) > 40:
        raise TypeError
    return float(value)


def _exactly(kind: type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise TypeError
        return value

    return check


def _key(value: Any) -> Key:
    first, second = (_count(word, "a word") for word in _list(value, "a key", 2))
    if max(first, second) >= 2**32:
        raise TypeError
    return Key((first, second))


_VALUES: Mapping[str, Callable[[Any], Value]] = {
    "int": _exactly(int),
    "float": _float,
    "bool": _exactly(bool),
    "str": _exactly(str),
    "none": _exactly(type(None)),
    "key": _key,
}


def _object(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _Bad(f"{what}: expected an object, found {_short(value)}")
    return value


def _list(value: Any, what: str, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        size = "" if length is None else f" of {length}"
        raise _Bad(f"{what}: expected a list{size}, found {_short(value)}")
    return value


def _keys(value: Mapping[str, Any], names: tuple[str, ...], what: str) -> None:
    if set(value) != set(names):
        odd = sorted(set(value) ^ set(names))
        raise _Bad(f"{what}: unknown or missing keys {_short(odd)}")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise _Bad(f"{what}: expected a short text, found {_short(value)}")
    return value


def _path(path: str) -> None:
    if len(path) > MAX_TEXT or path == "__metadata__":
        raise _Bad(f"{_short(path)} is no tree path")


def _count(value: Any, what: str, path: str = "") -> int:
    if type(value) is not int or not 0 <= value < MAX_NUMBER:
        raise _Bad(f"{what} must be from 0 to 2**63 - 1, found {_short(value)}", path)
    return value


def _counts(value: Any, what: str, path: str) -> tuple[int, ...]:
    values = _list(value, what)
    if len(values) > MAX_DIMS:
        raise _Bad(f"{what} has {len(values)} dims, at most {MAX_DIMS}", path)
    return tuple(_count(n, what, path) for n in values)


def _hash(value: Any, what: str) -> str:
    if not isinstance(value, str) or not _HASH.fullmatch(value):
        raise _Bad(f"{_short(what)}: {_short(value)} is no sha256")
    return value


def _short(value: Any) -> str:
    """A value for an error: cut short, however long or deep it is."""
    text = reprlib.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
