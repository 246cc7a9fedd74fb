"""Runs interpret_*.py under Triton's interpreter, each in a process of its own.

The variable must be set before Triton is imported, and it changes Triton for the whole process.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("file", sorted(HERE.glob("interpret_*.py")), ids=lambda file: file.stem)
def test_interpreted(file: Path) -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    cut = f"--confcutdir={HERE}"
    quiet = ["-p", "no:cacheprovider", "-W", "ignore:Conversion of an array:DeprecationWarning"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *quiet, cut, str(file)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
