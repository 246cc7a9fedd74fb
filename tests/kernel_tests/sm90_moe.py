"""What the static gate compiles of `moe`."""

from __future__ import annotations

from collections.abc import Callable

from static_gate import BF16, FP32, INT64, Case

from shardwise.kernels import moe_triton as m

INT32, UINT8 = "*i32", "*u8"


def sizes(size: int, copies: int) -> tuple[dict[str, int], int]:
    how = m.token_launch(size, copies)
    return {"SIZE": size, "COPIES": copies, "BLOCK": how.block, "ROWS": how.rows}, how.warps


def spread_tokens(size: int, copies: int, scaled: bool, write: bool, dots: bool) -> Case:
    types = {"x": BF16, "y": BF16, "position": INT32, "rows": BF16, "dots": FP32}
    flags = {"SCALED": scaled, "WRITE": write, "DOTS": dots}
    shape, warps = sizes(size, copies)
    return m.spread_tokens, {**types, "weights": FP32}, {**shape, **flags}, warps


def gather_tokens(size: int, copies: int, scaled: bool) -> Case:
    types = {"y": BF16, "position": INT32, "weights": FP32, "tokens": BF16}
    shape, warps = sizes(size, copies)
    return m.gather_tokens, types, {**shape, "SCALED": scaled}, warps


def expert_keys() -> Case:
    types = {"expert": INT64, "keys": UINT8, "count": "i32", "experts": "i32"}
    return m.expert_keys, types, {"BLOCK": m.ORDER.block}, m.ORDER.warps


def places_of_copies() -> Case:
    types = {"keys": UINT8, "order": INT64, "offsets": INT32, "position": INT32}
    types |= dict.fromkeys(("count", "experts", "steps"), "i32")
    return m.places_of_copies, types, {"BLOCK": m.ORDER.block}, m.ORDER.warps


CASES: dict[str, Callable[[], Case]] = {
    "expert_keys": expert_keys,
    "places_of_copies": places_of_copies,
    "permute 2048 k8": lambda: spread_tokens(2048, 8, False, True, False),
    "permute 4096 k2": lambda: spread_tokens(4096, 2, False, True, False),
    "unpermute 2048 k8": lambda: gather_tokens(2048, 8, True),
    "unpermute 4096 k2": lambda: gather_tokens(4096, 2, True),
    "unpermute 2048 k32": lambda: gather_tokens(2048, 32, True),
    "unpermute_backward 2048 k8": lambda: spread_tokens(2048, 8, True, True, True),
    "unpermute_backward 4096 k2": lambda: spread_tokens(4096, 2, True, True, True),
    "unpermute_backward 2048 k32": lambda: spread_tokens(2048, 32, True, True, True),
    "dots 2048 k8": lambda: spread_tokens(2048, 8, False, False, True),
}
# Ids of any number are masked one by one, a binary search reads one key at a time, and each copy
# of a token has a place and a weight; the rows themselves are read by 16 bytes.
NARROW = {"expert_keys": 8, "places_of_copies": 24, "dots 2048 k8": 16}
NARROW |= dict.fromkeys(("unpermute 2048 k8", "unpermute_backward 2048 k8"), 16)
NARROW |= dict.fromkeys(("unpermute 2048 k32", "unpermute_backward 2048 k32"), 32)
