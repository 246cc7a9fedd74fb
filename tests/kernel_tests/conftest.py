"""Tests of the kernels, which need torch alone: they also run where nothing else is installed.

On a bare GPU machine:

    python -m pytest --confcutdir=tests/kernel_tests tests/kernel_tests/test_device.py
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
