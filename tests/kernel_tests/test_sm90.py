"""The static gate: every kernel becomes good sm_90 code, on a machine without a GPU.

Figures of each Triton release that was looked at are in sm90.json; a change shows there in review.
`pytest --update-golden tests/kernel_tests/test_sm90.py` writes those of the installed release.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
from sm90_cases import CASES, figures

FILE = Path(__file__).parent / "sm90.json"
SHARED_LIMIT = 227 * 1024
NARROW_LOADS = 8  # statistics and labels of a row; a stream that loads narrowly has more


def loads(found: dict[str, Any], wide: bool) -> int:
    counts = found["instructions"].items()
    return sum(
        n for op, n in counts if op.startswith(("LDG.", "LDGSTS")) and (".128" in op) == wide
    )


@pytest.mark.parametrize("name", CASES)
def test_kernel_is_good_sm90_code(name: str, request: pytest.FixtureRequest) -> None:
    found = figures(CASES[name]())
    assert found["stack"] == 0, "registers are spilled"
    assert not any(op.startswith(("LDL", "STL")) for op in found["instructions"])
    assert found["shared"] <= SHARED_LIMIT
    assert loads(found, wide=True) >= 1, "no load of 16 bytes"
    assert loads(found, wide=False) <= NARROW_LOADS, "a stream is loaded narrowly"
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    if request.config.getoption("--update-golden", default=False):
        known.setdefault(triton.__version__, {})[name] = found
        FILE.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    if triton.__version__ not in known:
        pytest.skip(f"sm90.json has no figures of Triton {triton.__version__}; limits hold")
    assert known[triton.__version__][name] == found


def test_no_figures_of_kernels_that_are_gone() -> None:
    for version, cases in json.loads(FILE.read_text()).items():
        assert set(cases) == set(CASES), version
