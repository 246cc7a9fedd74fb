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
    """Dtypes: of stored parameters, of computation, of sums between devices; and whether fp8.

    With `fp8` the linear layers of a model's blocks take their products in 8-bit floating point,
    where they are wide enough for it to pay; all else stays in `compute`, results too.

    Raises:
        ValueError: a dtype that is none of float32, bfloat16, float16 and float64.
        TypeError: `fp8` is no bool.

    >>> import torch, shardwise as sw
    >>> sw.Precision(compute=torch.bfloat16, fp8=True).fp8
    True
    """

    param: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32
    reduce: torch.dtype = torch.float32
    fp8: bool = False

    def __post_init__(self) -> None:
        for name, dtype in self.dtypes.items():
            if dtype not in DTYPES.values():
                raise ValueError(
                    f"precision: {name} = {dtype!r}; expected torch.{', torch.'.join(DTYPES)}"
                )
        if not isinstance(self.fp8, bool):
            raise TypeError(f"precision: fp8 = {self.fp8!r}; expected True or False")

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtypes by name."""
        return {"param": self.param, "compute": self.compute, "reduce": self.reduce}
