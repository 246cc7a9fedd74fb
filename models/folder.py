"""Checkpoint folders: config.json and safetensors files, read in slices, written in a stream.

    config.json
    model.safetensors                     or, from `FILE_BYTES` on,
    model-00001-of-00002.safetensors ...  and model.safetensors.index.json (weight_map)

A safetensors file is 8 bytes of header length, a JSON header (name -> dtype, shape, offsets), and
the tensors' bytes in row-major order. Nothing in a folder is trusted: names stay inside it, and
what does not fit is a ValueError that says what was found.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
GENERATION = "generation_config.json"
FILE_BYTES = 5 * 10**9  # Hugging Face's limit of one file
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
Ranges = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


class Folder:
    """An open checkpoint: what is in it, and slices of its tensors.

    Attributes:
        path: of the folder.
        config: config.json.
        files: the JSON files that are kept: config.json and, if there is one,
            generation_config.json.
        specs: tensor name to shape and dtype.
    """

    def __init__(self, path: Path, files: Mapping[str, Any]) -> None:
        self.path = path
        self.config = read_json(path / CONFIG)
        self.files = {CONFIG: self.config}
        if (path / GENERATION).exists():
            self.files[GENERATION] = read_json(path / GENERATION)
        self._files = files  # tensor name -> open file
        self.specs = {name: _spec(file, name) for name, file in files.items()}

    def read(self, name: str, ranges: Ranges) -> Tensor:
        """The block [start, stop) along each dim of a tensor; only its bytes are read."""
        block = self._files[name].get_slice(name)
        return block[tuple(slice(start, stop) for start, stop in ranges)]


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Folder]:
    """A folder, open for reading.

    Raises:
        FileNotFoundError: no such folder, no config.json, no safetensors.
        ValueError: damaged or hostile files.
    """
    from safetensors import SafetensorError, safe_open

    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder")
    listed = _listed(root)
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for file, names in listed.items():
            try:
                handle: Any = stack.enter_context(safe_open(root / file, "pt"))
            except FileNotFoundError:
                raise ValueError(f"{root / INDEX} names {file}, which is missing") from None
            except SafetensorError as error:
                raise ValueError(f"{root / file} is no safetensors file: {error}") from None
            found = set(handle.keys())
            if names is not None and found != names:
                raise ValueError(
                    f"{root / file} and {INDEX} differ: only in the file "
                    f"{sorted(found - names)}, only in the index {sorted(names - found)}"
                )
            files |= dict.fromkeys(found, handle)
        yield Folder(root, files)


def _listed(root: Path) -> dict[str, set[str] | None]:
    """The folder's files, and the tensors that the index promises in each."""
    if (root / SINGLE).exists():
        return {SINGLE: None}
    if not (root / INDEX).exists():
        old = sorted(p.name for p in root.glob("*.bin"))
        hint = f"; {old[0]} holds pickles, which are not read: convert it" if old else ""
        raise FileNotFoundError(f"{root} has neither {SINGLE} nor {INDEX}{hint}")
    table = read_json(root / INDEX).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{root / INDEX} has no weight_map")
    listed: dict[str, set[str] | None] = {}
    for name, file in table.items():
        if not _is_plain(file):
            raise ValueError(f"{root / INDEX}: {name!r} lies in {file!r}, no file of this folder")
        names = listed.setdefault(file, set())
        assert names is not None
        names.add(name)
    return listed


def _is_plain(file: Any) -> bool:
    """Whether an entry of the index is the bare name of a safetensors file."""
    if not isinstance(file, str) or not file.endswith(".safetensors"):
        return False
    return not any(c in file for c in "/\\\0:") and not file.startswith(".")


def _spec(file: Any, name: str) -> Spec:
    view = file.get_slice(name)
    code = view.get_dtype()
    if code not in DTYPES:
        raise ValueError(f"tensor {name!r} has dtype {code}; known: {', '.join(DTYPES)}")
    return Spec(tuple(view.get_shape()), DTYPES[code])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, expected an object")
    return found


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON object to a file, as `save_pretrained` lays it out."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_file(file: BinaryIO, specs: Mapping[str, Spec], make: Callable[[str], Tensor]) -> None:
    """A safetensors file, written tensor by tensor.

    Args:
        file: open for writing.
        specs: of its tensors, in the order in which they lie.
        make: name to value; called in order, one value at a time.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, spec in specs.items():
        header[name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.bytes],
        }
        at += spec.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for name in specs:
        file.write(make(name).contiguous().reshape(-1).view(torch.uint8).numpy().data)


def divided(specs: Mapping[str, Spec], limit: int) -> dict[str, dict[str, Spec]]:
    """File name to its tensors: filled in order up to a limit of bytes, named as in the Hub."""
    groups: list[dict[str, Spec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if groups[-1] and size + spec.bytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = spec
        size += spec.bytes
    if len(groups) == 1:
        names = [SINGLE]
    else:
        names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    # within a file: wide dtypes first, so that each tensor is aligned; then by name
    ordered = [
        dict(sorted(g.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))) for g in groups
    ]
    return dict(zip(names, ordered, strict=True))


def index_of(files: Mapping[str, Mapping[str, Spec]]) -> dict[str, Any]:
    """The contents of model.safetensors.index.json."""
    total = sum(spec.bytes for specs in files.values() for spec in specs.values())
    where = {name: file for file, specs in files.items() for name in specs}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A scratch folder beside `path` that takes its name when all is written, or vanishes.

    Raises:
        FileExistsError: `path` exists and is not an empty folder.
    """
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists; nothing is overwritten")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        os.replace(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
