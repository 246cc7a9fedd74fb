"""What interpreter tests share: canaries around every buffer, and grids run in reverse.

TRITON_INTERPRET=1 must be set before Triton is imported, so these tests have a process of their own
(test_interpreter.py starts it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shardwise.kernels import launch

GUARD = 4096  # elements on either side: more than any tile of these tests


def guarded(x: Tensor) -> Tensor:
    """A copy of x inside a larger buffer that holds NaN (or a huge integer) all around it."""
    fill = float("nan") if x.is_floating_point() else 1 << 40
    buffer = torch.full((x.numel() + 2 * GUARD,), fill, dtype=x.dtype)
    inner = buffer[GUARD : GUARD + x.numel()].view(x.shape)
    inner.copy_(x)
    return inner


class Canaries:
    """Replaces `launch.empty`: results are born as NaN, with NaN around them."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []

    def empty(self, shape: Any, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or like.dtype
        numel = int(torch.Size(shape).numel())
        fill = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
        buffer = torch.full((numel + 2 * GUARD,), fill, dtype=dtype)
        self.buffers.append((buffer, numel))
        return buffer[GUARD : GUARD + numel].view(tuple(shape))

    def check(self) -> None:
        """Nothing was written outside a result, and all of it was written."""
        for buffer, numel in self.buffers:
            outside = torch.cat([buffer[:GUARD], buffer[GUARD + numel :]])
            if buffer.is_floating_point():
                assert outside.isnan().all(), "a write outside a result"
                assert not buffer[GUARD : GUARD + numel].isnan().any(), "a result was not written"
            else:
                assert (outside == torch.iinfo(buffer.dtype).max).all(), "a write outside a result"


@contextmanager
def watched(*modules: Any, backwards: bool = False) -> Iterator[None]:
    """Run launchers of `modules` with canaries; `backwards`: the last program runs first."""
    from triton.runtime import interpreter

    builder, canaries = interpreter.interpreter_builder, Canaries()
    places = [m for m in (launch, *modules) if hasattr(m, "empty")]
    real_empty, real_index = launch.empty, builder.set_grid_idx

    def mirrored(*at: int) -> None:
        real_index(*(n - 1 - i for n, i in zip(builder.grid_dim, at, strict=True)))

    try:
        for module in places:
            module.empty = canaries.empty
        if backwards:
            builder.set_grid_idx = mirrored
        yield
    finally:
        builder.set_grid_idx = real_index
        for module in places:
            module.empty = real_empty
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
