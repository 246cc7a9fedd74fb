"""What the static gate compiles of `gelu`."""

from __future__ import annotations

from collections.abc import Callable

from static_gate import BF16, FP32, Case

from shardwise.kernels import gelu_triton as kernels


def backward(size: int, tanh: bool) -> Case:
    how = kernels.strip_launch(size)
    types = dict.fromkeys(("grad", "x", "grad_x"), BF16) | {"parts": FP32, "rows": "i32"}
    sizes = {"SIZE": size, "BLOCK": how.block, "ROWS": how.rows, "STRIPS": -(-size // how.block)}
    return kernels.gelu_backward, types, {**sizes, "STAGES": how.stages, "TANH": tanh}, how.warps


CASES: dict[str, Callable[[], Case]] = {
    "gelu_backward 3072 tanh": lambda: backward(3072, True),
    "gelu_backward 4096": lambda: backward(4096, False),
}
