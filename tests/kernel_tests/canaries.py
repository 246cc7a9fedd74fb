"""Canaries around every buffer of a launch, and, under Triton's interpreter, grids in reverse.

TRITON_INTERPRET=1 must be set before Triton is imported, so interpreter tests have a process of
their own (test_interpreter.py starts it). The canaries serve the device tests too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from shardwise.kernels import launch

GUARD = 4096  # elements on either side: more than any tile of these tests


def guarded(x: Tensor, shift: int = 0) -> Tensor:
    """A copy of x in a larger buffer of NaN (or a huge integer), `shift` elements off alignment."""
    real = x.is_floating_point()
    fill = float("nan") if real else min(1 << 40, torch.iinfo(x.dtype).max)
    buffer = torch.full((x.numel() + 2 * GUARD + shift,), fill, dtype=x.dtype, device=x.device)
    inner = buffer[GUARD + shift : GUARD + shift + x.numel()].view(x.shape)
    inner.copy_(x)
    return inner


OUTSIDE = 112  # exact in every dtype, float8 and int8 as well


class Canaries:
    """Replaces `launch.empty`: results are born as NaN, with a number of no kernel around them.

    The number is not NaN, so that a NaN read beside an input and written beside a result is seen.
    """

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []

    def empty(self, shape: Any, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        numel = int(torch.Size(shape).numel())
        dtype = dtype or like.dtype
        buffer = torch.full((numel + 2 * GUARD,), OUTSIDE, dtype=dtype, device=like.device)
        inner = buffer[GUARD : GUARD + numel].view(tuple(shape))
        if dtype.is_floating_point:
            inner.fill_(float("nan"))
        self.buffers.append((buffer, numel))
        return inner

    def check(self) -> None:
        """Nothing was written outside a result, and all of it was written."""
        for buffer, numel in self.buffers:
            outside = torch.cat([buffer[:GUARD], buffer[GUARD + numel :]])
            assert (outside == OUTSIDE).all(), "a write outside a result"
            assert not buffer[GUARD : GUARD + numel].isnan().any(), "a result was not written"


@contextmanager
def reversed_grids() -> Iterator[None]:
    """The interpreter runs the last program first."""
    from triton.runtime.interpreter import interpreter_builder as builder

    real = builder.set_grid_idx
    builder.set_grid_idx = lambda *at: real(
        *(n - 1 - i for n, i in zip(builder.grid_dim, at, strict=True))
    )
    try:
        yield
    finally:
        builder.set_grid_idx = real


@contextmanager
def watched(*modules: Any, backwards: bool = False) -> Iterator[Canaries]:
    """Run launchers of `modules` with canaries; `backwards`: the last program runs first."""
    canaries, real = Canaries(), launch.empty
    places = [m for m in (launch, *modules) if hasattr(m, "empty")]
    try:
        for module in places:
            module.empty = canaries.empty
        with reversed_grids() if backwards else nullcontext():
            yield canaries
    finally:
        for module in places:
            module.empty = real
    canaries.check()


def compare(
    launcher: Callable[..., Any],
    twin: Callable[..., Any],
    args: tuple[Any, ...],
    modules: tuple[Any, ...],
    *,
    atol: float,
    rtol: float,
    backwards: bool = False,
) -> None:
    """Launcher, interpreted, on guarded inputs against the twin in float64."""
    held = [guarded(a) if isinstance(a, Tensor) else a for a in args]
    with watched(*modules, backwards=backwards):
        found = launcher(*held)
    exact = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    wanted = twin(*exact)
    found, wanted = (r if isinstance(r, tuple) else (r,) for r in (found, wanted))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=atol, rtol=rtol)
    for a, b in zip(held, args, strict=True):
        assert not isinstance(a, Tensor) or torch.equal(a, b), "an input was changed"
