"""What the static gate compiles of `norms`."""

from __future__ import annotations

from collections.abc import Callable

from static_gate import BF16, FP32, Case

from shardwise.kernels import norms_triton as norms


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
}
