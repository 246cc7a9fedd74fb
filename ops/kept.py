"""What "cheap" recomputation keeps of a product that runs as many local ops.

Torch's selective checkpoint keeps the results of single ops. A panel product is a loop of them that
adds into a running sum; only its result is worth keeping. So its ops are hidden from torch's modes,
and its results are written here in the first run and read, instead of computed, in the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, cast

from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _pop_mode_temporarily,
)

Compute = Callable[[], list[Tensor]]


class _Run:
    """One run of a checkpointed region: its mode, the results kept so far, how many were asked."""

    def __init__(self, mode: Any, results: list[list[Tensor] | None], again: bool) -> None:
        self.mode, self.results, self.again = mode, results, again
        self.asked = 0


_RUNS: ContextVar[tuple[_Run, ...]] = ContextVar("runs", default=())


def regions(modes: tuple[Any, Any]) -> tuple[Any, Any]:
    """Contexts of a region's first and second run, around torch's modes for them."""
    results: list[list[Tensor] | None] = []
    return _Region(modes[0], results, False), _Region(modes[1], results, True)


class _Region(TorchDispatchMode):
    """Around a mode; itself never on the stack, and a mode by name, which tracing asks for."""

    def __init__(self, mode: Any, results: list[list[Tensor] | None], again: bool) -> None:
        self.mode, self.results, self.again = mode, results, again

    def __enter__(self) -> None:
        run = _Run(self.mode, self.results, self.again)
        self.token = _RUNS.set((*_RUNS.get(), run))
        self.mode.__enter__()

    def __exit__(self, *error: Any) -> Any:
        _RUNS.reset(self.token)
        return self.mode.__exit__(*error)


def kept(compute: Compute) -> list[Tensor]:
    """The results of `compute`: in the second run of a region, those of the first."""
    runs = _RUNS.get()
    return _kept(runs, compute) if runs else compute()


def _kept(runs: tuple[_Run, ...], compute: Compute) -> list[Tensor]:
    """Asks the innermost region first; what it lacks, the regions around it may have."""
    if not runs:
        return compute()
    run, number = runs[-1], runs[-1].asked
    run.asked += 1
    if run.again and number < len(run.results) and run.results[number] is not None:
        found = cast("list[Tensor]", run.results[number])
        run.results[number] = None  # used once, as torch's own
        return found
    with _hidden(run.mode):
        made = _kept(runs[:-1], compute)
    if not run.again:
        # apart from what is returned, to which autograd gives a history
        run.results.append([x.detach() for x in made])
    return made


@contextmanager
def _hidden(mode: Any) -> Iterator[None]:
    """Inside, this mode, the innermost, sees nothing; modes around it do."""
    with ExitStack() as stack:
        above = _get_current_dispatch_mode()
        if above is mode:
            stack.enter_context(_pop_mode_temporarily())
        yield
