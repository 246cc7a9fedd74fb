"""Tests of the kernels, which need torch alone: they also run where nothing else is installed.

On a bare GPU machine:

    python -m pytest --confcutdir=tests/kernel_tests tests/kernel_tests/test_device.py

A new op in kernels/<name>.py, with Triton in kernels/<name>_triton.py, is tested once it has a row
in kernel_samples.SAMPLES (every transform, opcheck), a file interpret_<name>.py (its kernels,
interpreted), rows in sm90_cases.CASES with `pytest --update-golden` for each Triton release in
sm90.json (the static gate), and a place in test_device.py.
"""

import importlib.util
import sys
import types
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for kernel_samples and the other helpers of this folder

if any(importlib.util.find_spec(name) is None for name in ("einops", "optree")):
    bare = types.ModuleType("shardwise")  # the package without what its __init__ imports
    bare.__path__ = [str(HERE.parents[1])]
    sys.modules["shardwise"] = bare
