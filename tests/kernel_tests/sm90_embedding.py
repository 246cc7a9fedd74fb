"""What the static gate compiles of `embedding`."""

from __future__ import annotations

from collections.abc import Callable

from static_gate import BF16, FP32, INT64, Case

from shardwise.kernels import embedding_triton as e

INT16, INT32 = "*i16", "*i32"


def lookup_rows(size: int) -> Case:
    how = e.lookup_launch(size)
    types = {"table": BF16, "ids": INT64, "result": BF16}
    types |= dict.fromkeys(("count", "start", "size"), "i32")
    return e.lookup_rows, types, {"SIZE": size, "BLOCK": how.block, "ROWS": how.rows}, how.warps


def block_keys() -> Case:
    types = {"ids": INT64, "keys": INT16} | dict.fromkeys(("count", "start", "size"), "i32")
    return e.block_keys, types, {"LOW": 1 << 15, "BLOCK": e.KEYS.block}, e.KEYS.warps


def segment_starts() -> Case:
    types = {"keys": INT16, "starts": INT32} | dict.fromkeys(("count", "size", "steps"), "i32")
    return e.segment_starts, types, {"LOW": 1 << 15, "BLOCK": e.STARTS.block}, e.STARTS.warps


def long_sizes(size: int) -> tuple[dict[str, int], int]:
    how = e.long_launch(size)
    sizes = {"SIZE": size, "LOW": 1 << 15, "CHUNK": e.CHUNK, "BLOCK": how.block, "ROWS": how.rows}
    return sizes, how.warps


def sum_chunks(size: int) -> Case:
    types = {"grad": BF16, "keys": INT16, "order": INT64, "parts": FP32, "size": "i32"}
    return e.sum_chunks, types, *long_sizes(size)


def sum_long(size: int) -> Case:
    types = {"grad": BF16, "keys": INT16, "order": INT64, "starts": INT32, "parts": FP32}
    return e.sum_long, {**types, "result": BF16, "size": "i32"}, *long_sizes(size)


def sum_short(size: int) -> Case:
    how = e.short_launch(size)
    types = {"grad": BF16, "order": INT64, "starts": INT32, "result": BF16, "size": "i32"}
    sizes = {"SIZE": size, "CHUNK": e.CHUNK, "BLOCK": how.block, "ROWS": how.rows}
    return e.sum_short, types, sizes, how.warps


CASES: dict[str, Callable[[], Case]] = {
    "lookup_rows 768": lambda: lookup_rows(768),
    "lookup_rows 4096": lambda: lookup_rows(4096),
    "block_keys": block_keys,
    "segment_starts": segment_starts,
    "sum_chunks 768": lambda: sum_chunks(768),
    "sum_long 768": lambda: sum_long(768),
    "sum_long 4096": lambda: sum_long(4096),
    "sum_short 768": lambda: sum_short(768),
    "sum_short 4096": lambda: sum_short(4096),
}
# Ids of any number are masked one by one, and a binary search reads one key at a time.
NARROW = {"block_keys": 8, "segment_starts": 8}
