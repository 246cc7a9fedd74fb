"""`Precision`: the dtypes of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16,
    "float16": torch.float16, "float64": torch.float64,
}  # fmt: skip


@dataclass(frozen=True)
class Precision:
    """Dtypes: of stored parameters, of computation, of sums between devices.

    Raises:
        ValueError: a dtype that is none of float32, bfloat16, float16 and float64.
    """

    param: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32
    reduce: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name, dtype in vars(self).items():
            if dtype not in DTYPES.values():
                raise ValueError(
                    f"precision: {name} = {dtype!r}; expected torch.{', torch.'.join(DTYPES)}"
                )
