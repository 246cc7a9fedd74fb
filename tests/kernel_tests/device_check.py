"""What the device tests share: an op on guarded inputs with poisoned results, against float64."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from canaries import guarded, watched
from torch import Tensor

from shardwise.kernels import norms
from shardwise.kernels.registry import KERNELS

FOLDER = Path(__file__).parents[2] / "kernels"
MODULES = tuple(
    importlib.import_module(f"shardwise.kernels.{file.stem}")
    for file in sorted(FOLDER.glob("*_triton.py"))
)
DEVICE = torch.device("cuda")
BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}  # of the significand
SLACK = 3e-6  # of a row's largest element; a sum of N terms in float32 by halves has log2(N) 2^-24
STATISTIC = 1e-5


def within_half_ulp(found: Tensor, exact: Tensor, slack: float) -> None:
    """Each element rounds the exact one, up to `slack` times the largest of its row, in float32.

    The slack covers sums in float32, whose error is relative to their terms, not to their value.
    """
    assert found.isfinite().all()
    ulp = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=1e-30))) + 1 - BITS[found.dtype])
    if found.dtype == torch.float16:
        ulp = ulp.clamp(min=2.0**-24)
    largest = exact.abs().amax(-1, keepdim=True) if exact.dim() else exact.abs()
    excess = (found.double() - exact).abs() - 0.5 * ulp - slack * largest.clamp(min=1e-3)
    assert excess.max() <= 0, f"by {(excess / ulp).max():.3f} ulp"


def check(name: str, args: tuple[Any, ...], slacks: tuple[float, ...], shift: int = 0) -> None:
    """Op `name` on guarded inputs and poisoned results against its twin in float64."""
    kernel = KERNELS[name]
    held = [guarded(a, shift) if isinstance(a, Tensor) else a for a in args]
    with watched(*MODULES) as canaries:
        found = kernel.op(*held)
        torch.cuda.synchronize()
    assert canaries.buffers, "no kernel ran"
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    exact = kernel.twin(*wide)
    found, exact = (r if isinstance(r, tuple) else (r,) for r in (found, exact))
    for a, b, slack in zip(found, exact, slacks, strict=True):
        within_half_ulp(a, b, slack)
    for a, b in zip(held, args, strict=True):
        assert not isinstance(a, Tensor) or torch.equal(a, b), "an input was changed"


def norm_inputs(rows: int, size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(rows + size)
    made = {n: torch.randn(rows, size, device=DEVICE).to(dtype) for n in ("x", "extra", "grad")}
    made |= {n: (torch.randn(size, device=DEVICE) + 1).to(dtype) for n in ("weight", "bias")}
    _, mean, rstd = norms._layer(made["x"].float(), made["weight"].float(), None, 1e-5)
    return {**made, "mean": mean, "rstd": rstd}
