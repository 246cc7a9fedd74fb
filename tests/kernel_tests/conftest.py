"""Tests of the kernels, which need torch alone: they also run where nothing else is installed.

On a bare GPU machine:

    python -m pytest --confcutdir=tests/kernel_tests tests/kernel_tests/test_device*.py

A family of ops is kernels/<name>.py with Triton in kernels/<name>_triton.py, and here

    samples_<name>.py       arguments of each op: every transform, opcheck (test_torture.py)
    interpret_<name>.py     its kernels, interpreted (test_interpreter.py runs the files)
    sm90_<name>.py          what the static gate compiles; its figures are in sm90/<name>.json
    test_device_<name>.py   on a GPU

with rows for its benchmark in benchmarks/kernel_rows/<name>.py.
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
