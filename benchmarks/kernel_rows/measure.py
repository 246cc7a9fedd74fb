"""Measuring: ceilings, medians without the host's part, peak memory, and a competitor's name."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
Versions = dict[str, Callable[..., Any]]


class Row(NamedTuple):
    """One line: an op at one size; seconds of each competitor; the floor in seconds."""

    name: str
    size: str
    floor: float
    seconds: dict[str, float]
    note: str = ""
    goal: str = ""


def seconds(call: Callable[..., Any], *args: Any, repeats: int = 20) -> float:
    """Median time of a call on the device, without the host's part."""
    for _ in range(3):
        call(*args)
    if not GPU:
        start = time.perf_counter()
        call(*args)
        return time.perf_counter() - start
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda._sleep(40_000_000)  # some 20 ms, in which the host queues the calls
    marks[0].record()
    for mark in marks[1:]:
        call(*args)
        mark.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    return statistics.median(times) / 1e3


def host_microseconds(call: Callable[[], Any], repeats: int = 200) -> float:
    """Median time for the host to issue a call."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        times.append((time.perf_counter() - start) / repeats * 1e6)
        if GPU:
            torch.cuda.synchronize()
    return statistics.median(times)


def ceilings() -> tuple[float, float]:
    """Bytes a second of a copy, operations a second of a square matmul."""
    count = 1 << 29 if GPU else 1 << 16
    a, b = torch.randn(2, count, device=DEVICE, dtype=torch.bfloat16)
    copy = 4 * count / seconds(b.copy_, a)
    del a, b
    n = 8192 if GPU else 64
    x, y = torch.randn(2, n, n, device=DEVICE, dtype=torch.bfloat16)
    return copy, 2 * n**3 / seconds(torch.mm, x, y)


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device=DEVICE).mul_(scale).bfloat16()


def both(f: Callable[..., Any], inputs: list[Tensor], grads: list[Tensor]) -> Callable[[], Any]:
    """Forward and backward of f, through autograd."""
    leaves = [x.detach().requires_grad_() for x in inputs]

    def run() -> Any:
        results = f(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        return torch.autograd.grad(results, leaves, grads)

    return run


def liger(name: str) -> Callable[..., Any] | None:
    """A function of Liger-Kernel, where it is installed."""
    if not GPU or importlib.util.find_spec("liger_kernel") is None:
        return None
    return getattr(importlib.import_module("liger_kernel.transformers.functional"), name, None)


def compiled(versions: Versions, wanted: bool) -> Versions:
    torch._dynamo.reset()
    made = {
        n: torch.compile(f, dynamic=False) if n == "compiled" else f for n, f in versions.items()
    }
    return made if wanted and GPU else {n: f for n, f in made.items() if n != "compiled"}


def peak_extra(run: Callable[[], Any]) -> int:
    """Bytes at the peak of a call beyond what it returns."""
    if not GPU:
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run()
    kept = sum(r.numel() * r.element_size() for r in results)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - kept
