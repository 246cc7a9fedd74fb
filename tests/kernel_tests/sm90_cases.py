"""What the static gate compiles: each kernel at the sizes and launches that are shipped.

A case is (kernel, types of its run-time arguments, its constexprs, warps). Pointers are "*bf16" and
the like; sizes come from the launchers' own functions, so what is gated is what runs.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shardwise.kernels import cross_entropy_triton as ce
from shardwise.kernels import norms_triton as norms

Case = tuple[Any, dict[str, str], dict[str, Any], int]
BF16, FP32, INT64 = "*bf16", "*fp32", "*i64"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def norm_forward(size: int, centred: bool, add: bool) -> Case:
    how = norms.forward_launch(size)
    types = dict.fromkeys(("x", "extra", "weight", "bias", "y", "total"), BF16)
    types |= {"mean": FP32, "rstd": FP32, "rows": "i32", "eps": "fp32"}
    flags = {"CENTRED": centred, "ADD": add, "BIAS": centred}
    sizes = {"SIZE": size, "BLOCK": how.block, "ROWS": how.rows, "STAGES": how.stages}
    return norms.norm_forward, types, {**sizes, **flags}, how.warps


def norm_backward(size: int, centred: bool, add: bool) -> Case:
    how = norms.backward_launch(size)
    types = dict.fromkeys(("grad", "x", "weight", "extra", "grad_x"), BF16)
    types |= dict.fromkeys(("mean", "rstd", "weight_parts", "bias_parts"), FP32)
    flags = {"CENTRED": centred, "ADD": add}
    sizes = {"SIZE": size, "BLOCK": how.block, "ROWS": how.rows, "STAGES": how.stages}
    return norms.norm_backward, {**types, "rows": "i32"}, {**sizes, **flags}, how.warps


def sum_parts(size: int) -> Case:
    how = norms.SUM_PARTS
    types = {"parts": FP32, "result": BF16, "count": "i32"}
    sizes = {"SIZE": size, "BLOCK": how.block, "ROWS": how.rows}
    return norms.sum_parts, types, sizes, how.warps


def ce_parts(size: int) -> Case:
    how = ce.reading_launch(size)
    types = {"logits": BF16, "labels": INT64, "lse": FP32, "target": FP32, "start": "i32"}
    return (
        ce.parts_forward,
        types,
        {"SIZE": size, "BLOCK": how.block, "STAGES": how.stages},
        how.warps,
    )


def ce_grad(size: int) -> Case:
    how = ce.writing_launch(size)
    types = dict.fromkeys(("grad_lse", "grad_target", "lse"), FP32)
    types |= {"logits": BF16, "labels": INT64, "result": BF16, "start": "i32", "rows": "i32"}
    return ce.parts_grad, types, {"SIZE": size, "BLOCK": how.block}, how.warps


def ce_loss_and_grad(size: int) -> Case:
    how = ce.reading_launch(size)
    types = {"logits": BF16, "labels": INT64, "scale": FP32, "loss": FP32}
    return (
        ce.loss_and_grad,
        types,
        {"SIZE": size, "BLOCK": how.block, "STAGES": how.stages},
        how.warps,
    )


CASES: dict[str, Callable[[], Case]] = {
    "rms_norm 768": lambda: norm_forward(768, False, False),
    "rms_norm 4096": lambda: norm_forward(4096, False, False),
    "add_rms_norm 4096": lambda: norm_forward(4096, False, True),
    "add_layer_norm 4096": lambda: norm_forward(4096, True, True),
    "add_layer_norm 16384": lambda: norm_forward(16384, True, True),
    "add_layer_norm 32768": lambda: norm_forward(32768, True, True),
    "rms_norm_backward 768": lambda: norm_backward(768, False, True),
    "rms_norm_backward 4096": lambda: norm_backward(4096, False, True),
    "layer_norm_backward 4096": lambda: norm_backward(4096, True, True),
    "layer_norm_backward 8192": lambda: norm_backward(8192, True, True),
    "sum_parts 4096": lambda: sum_parts(4096),
    "cross_entropy_parts 128256": lambda: ce_parts(128256),
    "cross_entropy_parts_backward 128256": lambda: ce_grad(128256),
    "loss_and_grad 32000": lambda: ce_loss_and_grad(32000),
    "loss_and_grad 128256": lambda: ce_loss_and_grad(128256),
}


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
