"""Stopping on a signal: the step is finished, the state saved, and all processes stop together."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch

from ..meshlib.mesh import Mesh

SIGNALS = (signal.SIGTERM, signal.SIGINT)
IMPATIENCE = 1.0  # seconds after which another Ctrl-C means it; launchers pass the first one on


class Stop:
    """While it is entered, SIGTERM and SIGINT are noted instead of ending the program.

    A second Ctrl-C, a second or more after the first, interrupts as usual. Signals reach the main
    thread only; elsewhere nothing is noted.

    Attributes:
        signal: the name of what came, "" if nothing has.
    """

    def __init__(self) -> None:
        self.signal = ""
        self._at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._note) for each in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal and number == signal.SIGINT and now - self._at >= IMPATIENCE:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self._at = signal.Signals(number).name, now


def any_of(mesh: Mesh, *flags: bool) -> list[bool]:
    """Whether each flag is up in any process of the mesh; the same answer in all of them.

    Cost: one all_reduce of a byte per flag; nothing in a single process.

    >>> from shardwise import make_mesh
    >>> any_of(make_mesh({"data": 2}), True, False)
    [True, False]
    """
    if mesh.transport != "distributed" or mesh.size == 1:
        return list(flags)
    mine = torch.tensor(flags, dtype=torch.uint8, device=mesh.device)
    (most,) = mesh.comm.all_reduce([mine], tuple(mesh.axes), "max")
    return [bool(flag) for flag in most.tolist()]
