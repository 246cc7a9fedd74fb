"""For every defined op its arguments, from the samples_<family>.py beside this file."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
for file in sorted((HERE.parents[1] / "kernels").glob("*.py")):
    if not file.stem.endswith("_triton") and file.stem != "__init__":
        importlib.import_module(f"shardwise.kernels.{file.stem}")  # defines its ops

from shardwise.kernels.registry import KERNELS as DEFINED  # noqa: E402

KERNELS = {name: k for name, k in DEFINED.items() if not name.startswith(("doc_", "test_"))}
SAMPLES: dict[str, Callable[[], tuple[Any, ...]]] = {
    name: sample
    for file in sorted(HERE.glob("samples_*.py"))
    for name, sample in importlib.import_module(file.stem).SAMPLES.items()
}
