"""`shardwise doctor`: what this machine has, and what mesh a program would get on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

import torch

from ..meshlib.errors import MeshError, format_bytes
from ..meshlib.mesh import is_launched
from .config import Config

# Package to what needs it.
OPTIONAL = {
    "rich": "train",
    "matplotlib": "train: the picture of the loss",
    "safetensors": "models.load and models.save",
    "transformers": "tests against Hugging Face",
    "triton": "kernels on a GPU",
}
REQUIRED = ("shardwise", "torch", "einops", "optree")  # imported with the package


def doctor(config: Config | None = None) -> dict[str, Any]:
    """Versions, devices, optional packages, and the mesh; nothing is started.

    Args:
        config: of a file, whose mesh is looked at; None looks at a mesh of one axis.
    """
    world = int(os.environ.get("WORLD_SIZE", "1")) if is_launched() else 1
    return {
        "python": platform.python_version(),
        "packages": {name: sys.modules[name].__version__ for name in REQUIRED},
        "optional": {name: _version(name) for name in OPTIONAL},
        "devices": _devices(),
        "cpus": os.cpu_count(),
        "processes": world,
        "transport": "distributed" if is_launched() else "simulated",
        "backend": "nccl" if torch.cuda.is_available() else "gloo",
        "mesh": _mesh(config, world),
    }


def lines(found: dict[str, Any]) -> str:
    """The same for a reader.

    >>> print(lines(doctor()).splitlines()[0].split()[0])
    python
    """
    rows = [("python", found["python"])]
    rows += [(name, version) for name, version in found["packages"].items()]
    rows += [
        (name, version or f"not there; needed for {OPTIONAL[name]}")
        for name, version in found["optional"].items()
    ]
    rows += [("device", line) for line in found["devices"] or ["no GPU"]]
    rows += [("processors", found["cpus"])]
    count = found["processes"]
    started = f"{count} processes" if found["transport"] == "distributed" else "this process alone"
    rows += [("started as", f"{started}: meshes are {found['transport']}")]
    rows += [("backend", f"{found['backend']}, under torchrun")]
    rows += [("mesh", found["mesh"])]
    return "\n".join(f"{name:<12} {text}" for name, text in rows)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        kind = torch.cuda.get_device_properties(index)
        version = f"sm_{kind.major}{kind.minor}"
        found.append(f"cuda:{index} {kind.name}, {format_bytes(kind.total_memory)}, {version}")
    return found


def _mesh(config: Config | None, world: int) -> str:
    """The mesh that `make_mesh` would make, or why it would not."""
    axes = dict(config.mesh.axes) if config else {"data": -1 if is_launched() else 1}
    try:
        sizes = _sizes(axes, world)
    except MeshError as error:
        return f"none: {error}"
    return f"mesh({', '.join(f'{name}={size}' for name, size in sizes.items())})"


def _sizes(axes: dict[str, int], world: int) -> dict[str, int]:
    """Sizes with the free one filled in; MeshError where the processes do not fit."""
    known = 1
    for size in axes.values():
        known *= max(size, 1)
    text = ", ".join(f"{name}={size}" for name, size in axes.items())
    is_free = -1 in axes.values()
    if is_launched() and (world % known if is_free else world != known):
        raise MeshError(f"mesh({text}) does not fit {world} processes")
    left = max(1, world // known)
    return {name: left if size == -1 else size for name, size in axes.items()}
