"""Options of `jit`: its own by name, the rest inductor's; a misspelt one is an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ...meshlib.errors import nearest
from ..budget import parse_bytes

PASSES = ("duplicates", "recompute", "bucket", "overlap")  # in the order in which they run
BACKENDS = ("inductor", "eager")


@dataclass(frozen=True)
class Options:
    """What `jit(options=...)` says.

    Attributes:
        backend: "inductor", or "eager": the graph as it is.
        passes: which of PASSES; None takes all with inductor and none with "eager". All but
            "recompute", which needs a memory_budget, are for graphs between processes.
        bucket_bytes: collectives are joined up to this size, per device.
        window_bytes: operands and results of collectives in flight at once, per device.
        memory_budget: the most bytes that a device may hold at the worst moment of the whole step,
            arguments (parameters, optimizer state, batch) included; or a text such as "70GiB".
            Values are computed again, and fsdp's gathers run again, until the step fits, and
            passes that would exceed it are left out; a step that cannot fit raises BudgetError on
            all ranks. Workspace inside ops and the allocator's gaps come on top. None recomputes
            nothing.
        cuda_graph: launches are recorded once and replayed (`replay.py`); None does so on a GPU
            where nothing communicates.
        inductor: options of inductor, as `torch.compile(options=...)` takes them.
    """

    backend: str = "inductor"
    passes: tuple[str, ...] | None = None
    bucket_bytes: int = 25 << 20
    window_bytes: int = 512 << 20
    memory_budget: int | str | None = None
    cuda_graph: bool | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @property
    def chosen(self) -> tuple[str, ...]:
        """The passes that run, in order."""
        wanted = self.passes
        if wanted is None:
            wanted = PASSES if self.backend == "inductor" else ("recompute",)
        return tuple(
            name
            for name in PASSES
            if name in wanted and (name != "recompute" or self.memory_budget is not None)
        )


def parsed(given: Mapping[str, Any]) -> Options:
    """The options, checked.

    Raises:
        ValueError: an unknown option, backend or pass, with the nearest known name.
    """
    ours = {f.name for f in fields(Options)} - {"inductor"}
    mine = {name: value for name, value in given.items() if name in ours}
    rest = {name: value for name, value in given.items() if name not in ours}
    if rest:
        import torch._inductor

        known = set(torch._inductor.list_options())
        for name in rest:
            if name not in known:
                raise ValueError(
                    f"jit: unknown option {name!r}{nearest(name, sorted(ours | known))}"
                )
    backend = mine.get("backend", "inductor")
    if backend not in BACKENDS:
        raise ValueError(
            f"jit: unknown backend {backend!r} (known: {', '.join(BACKENDS)})"
            + nearest(backend, BACKENDS)
        )
    passes = mine.get("passes")
    if passes is not None:
        passes = (passes,) if isinstance(passes, str) else tuple(passes)
        for name in passes:
            if name not in PASSES:
                raise ValueError(f"jit: unknown pass {name!r}{nearest(name, PASSES)}")
        mine["passes"] = passes
    if isinstance(mine.get("memory_budget"), str):
        mine["memory_budget"] = parse_bytes(mine["memory_budget"])
    for name in ("bucket_bytes", "window_bytes", "memory_budget"):
        value = mine.get(name)
        if value is not None and (not isinstance(value, int) or value < 0):
            raise ValueError(f"jit: {name} is a number of bytes, got {value!r}")
    return Options(**mine, inductor=rest)
