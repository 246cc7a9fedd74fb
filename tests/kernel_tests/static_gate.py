"""The static gate: what a kernel compiles to on sm_90, on a machine without a GPU.

A case is (kernel, types of its run-time arguments, its constexprs, warps). Pointers are "*bf16" and
the like; sizes come from the launchers' own functions, so what is gated is what runs.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

Case = tuple[Any, dict[str, str], dict[str, Any], int]
BF16, FP32, INT64 = "*bf16", "*fp32", "*i64"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def figures(case: Case) -> dict[str, Any]:
    """Registers, bytes of spills and shared memory, and memory instructions by width, on sm_90."""
    kernel, types, constants, warps = case
    names = [p.name for p in kernel.params]
    signature = {n: types.get(n, "constexpr") for n in names}
    aligned = {  # what a launch finds out: torch's pointers are multiples of 16 bytes
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"
    }
    source = ASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert used is not None
    found = Counter(re.findall(r"\b((?:LDG|STG|LDGSTS|LDL|STL|HGMMA)\b[.A-Z0-9x]*)", text))
    return {
        "warps": warps,
        "registers": int(used[1]),
        "stack": int(used[2]),
        "shared": compiled.metadata.shared,
        "instructions": dict(sorted(found.items())),
    }
