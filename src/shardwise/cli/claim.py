"""The directories of a run: made and tried before the first step, and kept from other runs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..checkpoint.files import NO_LOCKS, Files
from ..meshlib.mesh import Mesh
from .config import Config, ConfigError
from .stop import any_of

LOCK = ".run.lock"  # beside the checkpoints' own, which is held during a save only


def checkpoints(config: Config) -> Path | None:
    """Where the run is saved; None where it is not."""
    table = config.checkpoint
    if table is None:
        return None
    return Path(table.path or Path(config.run.out) / "checkpoints")


@contextmanager
def claimed(config: Config, mesh: Mesh) -> Iterator[None]:
    """Hold the run's directories, made if need be. The first process holds them for its job.

    Raises:
        ConfigError: one cannot be made or written to, or another run holds it; in all processes.
    """
    folders = {"run.out": Path(config.run.out)}
    where = checkpoints(config)
    if where is not None:
        folders["checkpoint.path"] = where
    with ExitStack() as stack:
        problems = _claim(stack, folders) if mesh.is_first else []
        (is_refused,) = any_of(mesh, bool(problems))
        if is_refused:
            raise ConfigError(problems or ["the first process cannot have the run's directories"])
        yield


def _claim(stack: ExitStack, folders: Mapping[str, Path]) -> list[str]:
    """Lock each directory until the stack ends; what stands against it."""
    disk, problems = Files(), []
    held: set[Path] = set()
    for key, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if folder.resolve() in held:
                continue
            held.add(folder.resolve())
            descriptor = disk.open_lock(folder / LOCK)
            stack.callback(os.close, descriptor)
            disk.lock(descriptor)
        except BlockingIOError:
            problems.append(
                f"{key}: another run writes to {folder}: wait for its end, or choose another {key}"
            )
        except OSError as error:
            if error.errno not in NO_LOCKS:  # without locks a save still refuses a second writer
                problems.append(f"{key}: cannot write to {folder}: {error.strerror or error}")
    return problems
