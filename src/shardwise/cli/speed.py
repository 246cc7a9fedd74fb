"""How fast a run is: tokens per second, share of the card's peak (MFU), the most memory held.

Time is taken between the lines that a run prints. Nothing is waited for in between, and evaluations
and saves stop the clock. The first interval holds compilation and warm-up: it is named, and is not
part of the run's average.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..meshlib.errors import format_bytes
from ..meshlib.mesh import Mesh
from ..models import Model
from ..models.flops import flops_per_token, multiplied

# Words of a card's name -> FLOP/s of dense bfloat16 products by NVIDIA's datasheets, where those
# quote "with sparsity" half of it: A100 (2021), H100 and H100 NVL (2024), H200 (2024), L40S (2023),
# HGX B200 (2024). The first row that fits counts.
PEAKS: tuple[tuple[str, float], ...] = (
    ("H100 PCIe", 756.5e12),
    ("H100 NVL", 835.5e12),
    ("H200 NVL", 835.5e12),
    ("H100", 989.4e12),
    ("H200", 989.4e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("B200", 2250e12),
)


def peak_of(card: str) -> float | None:
    """Dense bfloat16 FLOP/s of a card by its name; None for CPUs, unknown cards, slices of one.

    >>> peak_of("NVIDIA H100 80GB HBM3"), peak_of("NVIDIA A100-SXM4-80GB"), peak_of("cpu")
    (989400000000000.0, 312000000000000.0, None)
    """
    words = set(card.replace("-", " ").split())
    if "MIG" in words:
        return None
    return next((peak for key, peak in PEAKS if words.issuperset(key.split())), None)


@dataclass(frozen=True)
class Speed:
    """What one line says; prints as it is shown.

    Attributes:
        step: how many are done.
        tokens_per_second: of the whole job.
        tokens_per_second_device: of one device.
        tflops: TFLOP/s of one device, `causal` FLOPs.
        mfu: share of the card's peak, `causal` FLOPs; None where no peak is known.
        mfu_full: likewise, attention counted in full.
        peak_bytes: the most memory that this process held on its device so far.
        peak_kind: "allocated": of tensors on a GPU; "resident": of the process, on a CPU.
        is_first: whether compilation and warm-up are in it.
    """

    step: int
    tokens_per_second: float
    tokens_per_second_device: float
    tflops: float
    mfu: float | None
    mfu_full: float | None
    peak_bytes: int
    peak_kind: str
    is_first: bool

    def __str__(self) -> str:
        if self.mfu is None or self.mfu_full is None:
            share = f"{_flops(self.tflops * 1e12)}/s a device"
        else:
            share = f"MFU {self.mfu:.1%} ({self.mfu_full:.1%} full)"
        kind = "" if self.peak_kind == "allocated" else " resident"
        parts = [
            f"{self.tokens_per_second:,.0f} tokens/s",
            f"{self.tokens_per_second_device:,.0f} a device",
            share,
            f"peak {format_bytes(self.peak_bytes)}{kind}",
        ]
        return ", ".join([*parts, "with warm-up"] if self.is_first else parts)


@dataclass(frozen=True)
class Ruler:
    """What a run's speed is measured by.

    Attributes:
        tokens: of a step, over all devices.
        devices: physical ones; those of a simulated mesh are one.
        multiplied: parameters that every token is multiplied by.
        causal: FLOPs per token, attention by half of the pairs.
        full: likewise, by all of them.
        card: the device's name.
        peak: its FLOP/s; None where it is not known.
    """

    tokens: int
    devices: int
    multiplied: int
    causal: int
    full: int
    card: str
    peak: float | None

    def __str__(self) -> str:
        """The definition, in words and numbers."""
        lines = [
            f"FLOPs a token: causal {self.causal:,} = 6 N + 6 layer heads head_dim seq, "
            f"full {self.full:,} with 12 in place of the second 6",
            f"  N = {self.multiplied:,} parameters that multiply (no gains, no biases, no tables "
            "that are only looked up); what is computed again does not count",
        ]
        if self.peak is None:
            lines.append(
                f"  no peak is known of {self.card}: the causal FLOPs a second are shown, not MFU"
            )
        else:
            lines.append(
                f"  MFU = causal (and full) FLOPs a second and device / {self.peak:.4g}, dense "
                f"bfloat16 of {self.card} by its datasheet, whatever the run's precision"
            )
        return "\n".join(lines)

    def speed(self, step: int, count: int, seconds: float, *, is_first: bool, mesh: Mesh) -> Speed:
        """The speed of `count` steps, the last of them `step`."""
        rate = count * self.tokens / max(seconds, 1e-9)
        each = rate / self.devices
        size, kind = peak_memory(mesh.device)
        return Speed(
            step,
            rate,
            each,
            each * self.causal / 1e12,
            each * self.causal / self.peak if self.peak else None,
            each * self.full / self.peak if self.peak else None,
            size,
            kind,
            is_first,
        )


def ruler(model: Model, mesh: Mesh, *, batch: int, seq: int) -> Ruler:
    """What the speed of a model on a mesh is measured by."""
    is_gpu = mesh.device.type == "cuda"
    card = torch.cuda.get_device_name(mesh.device) if is_gpu else mesh.device.type
    return Ruler(
        tokens=batch * seq,
        devices=mesh.size if mesh.transport == "distributed" else 1,
        multiplied=multiplied(model),
        causal=flops_per_token(model, seq),
        full=flops_per_token(model, seq, causal=False),
        card=card,
        peak=peak_of(card) if is_gpu else None,
    )


def peak_memory(device: torch.device) -> tuple[int, str]:
    """The most bytes that this process held on its device so far, and of what kind they are."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "allocated"
    import resource  # not on every system

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024), "resident"


@dataclass
class Clock:
    """Seconds of steps, between lines; it runs from the beginning.

    Attributes:
        ruler: by which speeds are measured.
        mesh: its device is waited for before time is read.
        lines: every speed so far.
        steps: of all intervals but the first.
        total: their seconds.
    """

    ruler: Ruler
    mesh: Mesh
    lines: list[Speed] = field(default_factory=list)
    steps: int = 0
    total: float = 0.0

    def __post_init__(self) -> None:
        self._count, self._seconds, self._since = 0, 0.0, time.perf_counter()

    def tick(self) -> None:
        """One more step has been given to the device."""
        self._count += 1

    def line(self, step: int) -> Speed:
        """The speed since the last line."""
        self._stop()
        is_first = not self.lines
        made = self.ruler.speed(step, self._count, self._seconds, is_first=is_first, mesh=self.mesh)
        self.lines.append(made)
        if not is_first:
            self.steps += self._count
            self.total += self._seconds
        self._count, self._seconds, self._since = 0, 0.0, time.perf_counter()
        return made

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside takes no time."""
        self._stop()
        try:
            yield
        finally:
            self._wait()
            self._since = time.perf_counter()

    def average(self, step: int) -> Speed | None:
        """The speed of all steps after the first line; None before the second."""
        if not self.steps:
            return self.lines[-1] if self.lines else None
        return self.ruler.speed(step, self.steps, self.total, is_first=False, mesh=self.mesh)

    def as_json(self) -> dict[str, Any]:
        """The definition and all lines, by the names of their fields."""
        return {"measured_by": vars(self.ruler), "lines": [vars(line) for line in self.lines]}

    def _stop(self) -> None:
        self._wait()
        self._seconds += time.perf_counter() - self._since

    def _wait(self) -> None:
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)


def _flops(number: float) -> str:
    scales = ((12, "T"), (9, "G"), (6, "M"))
    power, prefix = next((s for s in scales if number >= 10 ** s[0]), (3, "k"))
    return f"{number / 10**power:.4g} {prefix}FLOP"
