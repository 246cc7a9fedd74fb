"""One layer ahead: what brings the next layer's parameters to use runs while this one computes.

A `Unit` is one iteration of a `scan` on a distributed mesh. Its conversions start before the
iteration in front of it computes; its own first act is to wait for them. In the backward its owed
gradients are reduced while the layer before it runs, and gathers that are done again, those of
`save="shard"` and those of a checkpoint, start one layer ahead too. So at most two layers are
gathered at a time, and the gradients of at most two are on their way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch

from ...layouts import pending, saving
from ...layouts.sharded import ShardedTensor
from .leaves import carrying_path, depth, under_functorch

Use = Callable[[Any], Any]
_watchers: Callable[[], int] = torch._C._len_torch_dispatch_stack


def can_run_ahead(values: Sequence[Any]) -> bool:
    """Whether there is anything to begin ahead, and nobody who watches or differentiates it."""
    return (
        any(_moves(x) for x in values)
        and not _watchers()  # a trace schedules its collectives itself
        and depth() <= 1  # a gradient of a gradient needs the plain nodes
        and not under_functorch()
        and torch.autograd.forward_ad._current_level < 0
    )


def _moves(x: Any) -> bool:
    return (
        isinstance(x, ShardedTensor)
        and x.mesh.transport == "distributed"
        and not x.mesh.is_outside
        and x.mesh.size > 1
    )


class Unit:
    """One iteration's parameters.

    Args:
        use: what brings them to use.
        make: gives them at rest.
        before: the iteration in front of this one.
    """

    def __init__(self, use: Use, make: Callable[[], Any], before: Unit | None) -> None:
        self.group = saving.Group(before.group if before is not None else None)
        self._use = use
        self._before = before
        self._begun: pending.Begun | None = None
        self._was_used = False
        self._variable: list[bool] = []  # which leaves at use have gradients
        self.at_rest: Any = None

        def made() -> Any:
            self.at_rest = make()
            return self.at_rest

        self._begun = pending.begun(use, made)

    def taken(self) -> Any:
        """The parameters at use. Called again where a checkpoint runs the iteration again."""
        if not self._was_used:
            self._was_used = True
            begun, self._begun = self._begun, None
            assert begun is not None
            used = begun.finish(self.group)
            self._variable = [_is_variable(x) for x in optree.tree_leaves(used, none_is_leaf=True)]
            return used
        self._begin_again()
        begun, self._begun = self._begun, None
        if self._before is not None:
            self._before._begin_again()
        assert begun is not None
        with torch.no_grad():
            used = begun.finish()
        # Its ops must save what they saved the first time; nobody asks for these gradients.
        leaves, spec = optree.tree_flatten(used, none_is_leaf=True)
        pairs = zip(leaves, self._variable, strict=True)
        return spec.unflatten([_as_variable(x) if varies else x for x, varies in pairs])

    def _begin_again(self) -> None:
        if self._begun is None:
            with torch.no_grad():
                self._begun = pending.begun(self._use, lambda: self.at_rest)


def _is_variable(x: Any) -> bool:
    return isinstance(x, ShardedTensor | torch.Tensor) and x.requires_grad


def _as_variable(x: Any) -> Any:
    """The value as a leaf of a new graph."""
    if isinstance(x, torch.Tensor):
        return x.detach().requires_grad_()
    shards = tuple(s.detach().requires_grad_() for s in x._shards)
    return carrying_path(ShardedTensor(shards, x._type.with_layout(x.layout, True)), x)
