"""What the static gate compiles of `gemv`."""

from __future__ import annotations

from collections.abc import Callable

from static_gate import BF16, FP32, Case

from shardwise.kernels import gemv_triton as g

INT8, INT32 = "*i8", "*i32"


def int8_row(size: int) -> Case:
    types = {"x": BF16, "q": INT8, "scale": FP32, "result": BF16, "outs": "i32"}
    steps = -(-size // (g.INT8_ROW.block * 16))
    sizes = {"SIZE": size, "BLOCK": g.INT8_ROW.block, "ROWS": g.INT8_ROW.rows, "STEPS": steps}
    return g.int8_row, types, sizes, g.INT8_ROW.warps


def int4_row(size: int, group: int) -> Case:
    types = {"x": BF16, "packed": INT32, "scales": BF16, "zeros": BF16, "result": BF16}
    steps = -(-size // (g.INT4_ROW.block * 32))
    sizes = {"SIZE": size, "GROUP": group, "BLOCK": g.INT4_ROW.block, "ROWS": g.INT4_ROW.rows}
    return g.int4_row, {**types, "outs": "i32"}, {**sizes, "STEPS": steps}, g.INT4_ROW.warps


def int8_rows(size: int) -> Case:
    types = {"x": BF16, "q": INT8, "scale": FP32, "result": BF16, "outs": "i32", "count": "i32"}
    how = g.MATMUL
    sizes = {"SIZE": size, "BLOCK": how.block, "ROWS": how.rows, "STEPS": size // how.block}
    return g.int8_rows, types, {**sizes, "STAGES": how.stages, "PRECISION": "tf32"}, how.warps


def int4_rows(size: int, group: int) -> Case:
    types = {"x": BF16, "packed": INT32, "scales": BF16, "zeros": BF16, "result": BF16}
    types |= {"outs": "i32", "count": "i32"}
    how = g.MATMUL
    sizes = {"SIZE": size, "GROUP": group, "ROWS": how.rows, "STEPS": size // group}
    return g.int4_rows, types, {**sizes, "STAGES": how.stages, "PRECISION": "tf32"}, how.warps


CASES: dict[str, Callable[[], Case]] = {
    "int8_row 4096": lambda: int8_row(4096),
    "int8_row 14336": lambda: int8_row(14336),
    "int4_row 4096, groups of 128": lambda: int4_row(4096, 128),
    "int4_row 14336, groups of 128": lambda: int4_row(14336, 128),
    "int4_row 4096, groups of 32": lambda: int4_row(4096, 32),
    "int8_rows 4096": lambda: int8_rows(4096),
    "int4_rows 4096, groups of 128": lambda: int4_rows(4096, 128),
}
# x and the scales of groups are small: all programs read the same of x, 8 bytes at a time.
NARROW = {name: 40 for name in CASES if name.startswith("int4")}
