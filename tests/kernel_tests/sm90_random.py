"""What the static gate compiles of `random`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from static_gate import BF16, FP32, INT64, Case

from shardwise.kernels import random_triton as random

BYTES = "*u8"
INTEGERS = ("salt", "count", "group0", "first", "rows1", "rows2", "step0", "step1", "step2")


def fill(what: Any, x: str, y: str, width: int, levels: int, skipped: int = 0) -> Case:
    types = dict.fromkeys((*INTEGERS, "below"), "i32")
    types |= {"x": x, "y": y, "key": INT64, "seed": "i64", "low": "fp32", "scale": "fp32"}
    is_flat = width % 8 == 0 and skipped == 0
    sizes = {"WIDTH": width, "SKIPPED": skipped, "COUNT": levels, "BLOCK": random.LAUNCH.block}
    flags = {"WHAT": what, "DATA": True, "FLAT": is_flat}
    return random.fill, types, {**sizes, **flags}, random.LAUNCH.warps


def derive() -> Case:
    counter = dict.fromkeys(("c0", "c1", "c2", "c3"), "i32")
    return random.derive, {"key": INT64, "y": INT64, **counter}, {}, 1


CASES: dict[str, Callable[[], Case]] = {
    "dropout bf16 4096": lambda: fill(random.DROPOUT, BF16, BF16, 4096, 1),
    "dropout bf16 cut sequence": lambda: fill(random.DROPOUT, BF16, BF16, 4096, 2),
    "dropout fp32 768": lambda: fill(random.DROPOUT, FP32, FP32, 768, 1),
    "dropout bf16 odd columns": lambda: fill(random.DROPOUT, BF16, BF16, 50257, 1, 1),
    "uniform bf16 4096": lambda: fill(random.UNIFORM, BF16, BF16, 4096, 1),
    "mask 4096": lambda: fill(random.MASK, BYTES, BYTES, 4096, 1),
    "words 4096": lambda: fill(random.WORDS, INT64, INT64, 4096, 1),
    "derive": derive,
}
# Fills read nothing but the key, and rows of odd columns have no 16 bytes in line.
NARROW = {
    "dropout bf16 odd columns": 18,
    "uniform bf16 4096": 2,
    "mask 4096": 2,
    "words 4096": 2,
    "derive": 2,
}
