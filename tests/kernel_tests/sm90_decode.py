"""What the static gate compiles of `decode`."""

from __future__ import annotations

from collections.abc import Callable

from static_gate import BF16, FP32, Case

from shardwise.kernels import decode_triton as d
from shardwise.kernels.launch import power_of_two

INT32 = "*i32"


def attend(dim: int, group: int, page: int) -> Case:
    how = d.decode_launch(dim, group, 2)
    types = dict.fromkeys(("q", "k_pages", "v_pages"), BF16) | {"out": FP32, "lse": FP32}
    types |= {"block_table": INT32, "lengths": INT32, "entries": "i32", "factor": "fp32"}
    sizes = {"KV_HEADS": 8, "GROUP": group, "DIM": dim, "PAGE": page, "WIDTH": power_of_two(dim)}
    sizes |= {"ROWS": how.rows, "BLOCK": how.block, "SPLITS": 3, "STAGES": how.stages}
    return d.attend, types, {**sizes, "PRECISION": "tf32"}, how.warps


def join(dim: int, splits: int) -> Case:
    types = {"outs": FP32, "lses": FP32, "out": BF16, "lse": FP32}
    sizes = {"DIM": dim, "WIDTH": power_of_two(dim), "SPLITS": splits}
    sizes |= {"PARTS": power_of_two(splits), "ROWS": d.JOIN.rows}
    return d.join, types, sizes, d.JOIN.warps


def write_rows(size: int) -> Case:
    types = dict.fromkeys(("k", "v", "k_pages", "v_pages"), BF16) | {"slots": INT32}
    return d.write_rows, types, {"SIZE": size, "BLOCK": d.WRITE.block}, d.WRITE.warps


CASES: dict[str, Callable[[], Case]] = {
    "attend d=128, 4 heads, page 16": lambda: attend(128, 4, 16),
    "attend d=128, 1 head, page 16": lambda: attend(128, 1, 16),
    "attend d=64, 8 heads, page 64": lambda: attend(64, 8, 64),
    "attend d=256, 16 heads, page 16": lambda: attend(256, 16, 16),
    "join d=128, 3 parts": lambda: join(128, 3),
    "join d=128, 132 parts": lambda: join(128, 132),
    "write_rows 1024": lambda: write_rows(1024),
}
# Each thread reads the page of each of its tokens, 4 bytes; keys and values come by 16.
NARROW = {name: 140 for name in CASES if name.startswith("attend")}
