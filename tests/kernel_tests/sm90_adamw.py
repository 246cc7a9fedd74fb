"""What the static gate compiles of `adamw`."""

from __future__ import annotations

from collections.abc import Callable

import triton.language as tl
from static_gate import FP32, INT64, Case

from shardwise.kernels import adamw, adamw_triton

DTYPES = {"fp32": (tl.float32,) * 4, "bf16": (tl.bfloat16,) * 4}
DTYPES["mixed"] = (tl.bfloat16, tl.bfloat16, tl.float32, tl.float32)


def update(dtypes: str, rounding: bool = False, even: bool = True) -> Case:
    how = adamw_triton.LAUNCH
    types = {"leaves": INT64, "blocks": "*i32", "factors": FP32}
    types |= {"keys": INT64 if rounding else FP32}
    types |= dict.fromkeys(("near1", "b2", "near2", "eps"), "fp32")
    constants = dict(zip("PGMV", DTYPES[dtypes], strict=True))
    constants |= {"BLOCK": how.block, "FIELDS": adamw_triton.FIELDS}
    constants |= {"EVEN": even, "ROUND": rounding}
    return adamw_triton.update, types, constants, how.warps


def fold() -> Case:
    how = adamw_triton.FOLD
    types = dict.fromkeys(("key", "step", "names", "keys"), INT64) | {"count": "i32"}
    salts = {"NUMBER": adamw.FOLD_NUMBER - 2**32, "NAME": adamw.FOLD_NAME - 2**32}
    return adamw_triton.fold, types, salts | {"BLOCK": how.block}, how.warps


CASES: dict[str, Callable[[], Case]] = {
    "fp32": lambda: update("fp32"),
    "mixed": lambda: update("mixed"),
    "bf16": lambda: update("bf16"),
    "bf16 rounded": lambda: update("bf16", True),
    "mixed rounded": lambda: update("mixed", True),
    "bf16 rounded, uneven": lambda: update("bf16", True, even=False),
    "fold": lambda: fold(),
}
# The last block of a leaf is masked and read element by element: eight loads of each stream, beside
# those of the tables. Whole blocks load 16 bytes (LDG.E.128 in the figures) where they lie aligned.
TABLES = 50
NARROW = {name: TABLES + 4 * 8 for name in CASES} | {"bf16 rounded, uneven": TABLES + 2 * 4 * 8}
