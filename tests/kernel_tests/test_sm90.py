"""The static gate: every kernel becomes good sm_90 code, on a machine without a GPU.

Figures of each Triton release that was looked at are in sm90/<family>.json; a change shows there in
review. `pytest --update-golden tests/kernel_tests/test_sm90.py [-k family]` writes those of the
installed release.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
from static_gate import figures

HERE = Path(__file__).parent
SHARED_LIMIT = 227 * 1024
NARROW_LOADS = 8  # statistics and labels of a row; a stream that loads narrowly has more
FAMILIES = {
    f.stem.removeprefix("sm90_"): importlib.import_module(f.stem)
    for f in sorted(HERE.glob("sm90_*.py"))
}
# Where a kernel reads scattered short rows, its family says NARROW = {case: loads that are narrow}.
CASES = [(family, name) for family, module in FAMILIES.items() for name in module.CASES]


def loads(found: dict[str, Any], wide: bool) -> int:
    counts = found["instructions"].items()
    return sum(
        n for op, n in counts if op.startswith(("LDG.", "LDGSTS")) and (".128" in op) == wide
    )


@pytest.mark.parametrize(("family", "name"), CASES)
def test_kernel_is_good_sm90_code(family: str, name: str, request: pytest.FixtureRequest) -> None:
    module, file = FAMILIES[family], HERE / "sm90" / f"{family}.json"
    found = figures(module.CASES[name]())
    assert found["stack"] == 0, "registers are spilled"
    assert not any(op.startswith(("LDL", "STL")) for op in found["instructions"])
    assert found["shared"] <= SHARED_LIMIT
    narrow = getattr(module, "NARROW", {}).get(name)
    if narrow is None:
        assert loads(found, wide=True) >= 1, "no load of 16 bytes"
    assert loads(found, wide=False) <= (narrow or NARROW_LOADS), "a stream is loaded narrowly"
    known = json.loads(file.read_text()) if file.exists() else {}
    if request.config.getoption("--update-golden", default=False):
        known.setdefault(triton.__version__, {})[name] = found
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    if triton.__version__ not in known:
        pytest.skip(f"sm90/ has no figures of Triton {triton.__version__}; limits hold")
    assert known[triton.__version__][name] == found


@pytest.mark.parametrize("family", FAMILIES)
def test_no_figures_of_kernels_that_are_gone(family: str) -> None:
    for version, cases in json.loads((HERE / "sm90" / f"{family}.json").read_text()).items():
        assert set(cases) == set(FAMILIES[family].CASES), version
