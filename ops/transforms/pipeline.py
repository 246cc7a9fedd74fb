"""The passes over the lowered graph of a step, one after another, with the consent of all ranks.

A result on whose order of collectives two ranks disagree, or that is above the memory budget on one
of them, is used on none: passes are left out until there is one that all can use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from ..budget import BudgetError
from . import bucketing, overlap
from .agreement import agreed, calls, refused
from .lifetimes import peak_bytes
from .lowering import collectives, copied
from .options import Options
from .recompute import INDUCTOR_FUSES, recomputed

Module = torch.fx.GraphModule


def optimized(module: Module, options: Options, devices: int | None) -> Module:
    """A graph after the passes, or as it is where ranks would disagree on their order.

    A memory budget holds for what comes out: passes that take memory for speed are left out, the
    last one first, where the peak would be above the budget with them.

    Args:
        module: where `devices` is None, lowered.
        options: which passes.
        devices: how many of them this process computes for, alone; None where there are several
            processes, and then all of them call this, whether their own graphs communicate or not.

    Raises:
        BudgetError: recomputation does not bring the peak within the budget; with several
            processes the same error on all, even if the step would fit on some.
    """
    chosen = options.chosen
    has_budget = "recompute" in chosen
    if devices is not None:
        return _budgeted(module, options, devices) if has_budget else module
    if not chosen:
        return module
    first = chosen.index("recompute") + 1 if has_budget else 0
    start = module
    for name in chosen[:first]:
        start = _run(name, copied(start), options)
    for last in range(len(chosen), first - 1, -1) if has_budget else (len(chosen),):
        found = copied(start)
        for name in chosen[first:last]:
            found = _run(name, found, options)
        found.graph.lint()
        if agreed(calls(collectives(found)), _fits(found, options)):
            return found
    # Where no collective runs again the order is the captured one, which all ranks have.
    return _budgeted(module, options, None, again=((),)) if has_budget else module


def _run(name: str, module: Module, options: Options) -> Module:
    """One pass over a graph between processes, which it may change in place."""
    if name == "duplicates":
        return bucketing.deduplicated(module)
    if name == "recompute":
        return _budgeted(module, options, None)
    if name == "bucket":
        return bucketing.bucketed(module, options.bucket_bytes)
    return overlap.overlapped(module, options.window_bytes)


def _budgeted(
    module: Module,
    options: Options,
    devices: int | None,
    again: Sequence[tuple[str, ...]] = ((), ("all_gather",)),
) -> Module:
    """The graph within the memory budget; gathers run again only where nothing else is enough."""
    refusal: BudgetError | None = None
    for kinds in again if devices is None else ((),):
        found, refusal = copied(module), None
        try:
            recomputed(
                found,
                options.memory_budget,
                again=kinds,
                fused=_fused(options),
                devices=devices or 1,
            )
        except BudgetError as error:
            refusal = error
        if devices is None:
            refusal = refused(refusal)
        if refusal is None:
            return found
    assert refusal is not None
    raise refusal


def _fits(module: Module, options: Options) -> bool:
    if "recompute" not in options.chosen:
        return True
    return peak_bytes(module, _fused(options)) <= cast(int, options.memory_budget)


def _fused(options: Options) -> tuple[str, ...]:
    """Ops of which the backend makes one kernel."""
    return INDUCTOR_FUSES if options.backend == "inductor" else ()
