"""What needs a process of its own: Triton's interpreter, and a machine without Triton.

TRITON_INTERPRET must be set before Triton is imported, and it changes Triton for all that follows;
so each interpret_*.py is run by a fresh pytest.
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


def test_ops_work_where_triton_is_not_installed() -> None:
    code = """if True:
        import sys
        sys.modules["triton"] = None  # its import fails
        import torch
        import shardwise
        from shardwise.kernels import cross_entropy, norms
        x, w = torch.ones(2, 3, requires_grad=True), torch.ones(3)
        norms.rms_norm(x, w, 1e-5)[0].sum().backward()
        lse, _ = cross_entropy.cross_entropy_parts(torch.zeros(1, 2), torch.zeros(1).long(), 0, 2)
        print(lse.exp().item(), not any(name.endswith("_triton") for name in sys.modules))
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "2.0 True\n", done.stderr
