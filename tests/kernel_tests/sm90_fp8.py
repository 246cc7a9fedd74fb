"""What the static gate compiles of `fp8`."""

from __future__ import annotations

from collections.abc import Callable

from static_gate import BF16, FP32, Case

from shardwise.kernels import fp8
from shardwise.kernels import fp8_triton as ours

FORMATS = {False: ("*fp8e4nv", fp8.EXPONENT[fp8.E4M3], 448.0),
           True: ("*fp8e5", fp8.EXPONENT[fp8.E5M2], 57344.0)}  # fmt: skip


def quantize(size: int, gradient: bool) -> Case:
    how, (pointer, exponent, end) = ours.TILE, FORMATS[gradient]
    types = {"x": BF16, "amax": BF16, "result": pointer, "transposed": pointer, "scale": FP32}
    constants = {"SIZE": size, "UNIT": fp8.MULTIPLE, "EXPONENT": exponent, "END": end}
    constants |= {"BLOCK": how.block, "ROWS": how.rows}
    return ours.quantize_tiles, {**types, "units": "i32"}, constants, how.warps


CASES: dict[str, Callable[[], Case]] = {
    "fp8_quantize 4096": lambda: quantize(4096, False),
    "fp8_quantize 4096 of a gradient": lambda: quantize(4096, True),
}
