"""What a gather keeps for backward: with `save="shard"` the shard, gathered again if needed.

Autograd saves the *gathered* tensor in whatever op reads it. While a `value_and_grad` is open and a
gather asked for "shard", saved-tensor hooks recognise the storage of its result and save a recipe
instead: the source shards, the step, and the view's geometry. The second gather is recorded in the
phase "regather".
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..meshlib import record
from ..meshlib.transport import Finish

_RECIPES: dict[int, tuple[_Recipe, int]] = {}  # storage -> recipe and shard number
_SCOPES: list[list[Any]] = []  # one per open value_and_grad: the hooks that it pushed


class _Recipe:
    """How to gather again. Results wait here until every simulated device has taken its own.

    Simulated devices of one group share one gathered tensor: `shares` says how many read each.
    """

    def __init__(
        self, again: Callable[[], Sequence[Tensor]], begin: Callable[[], Finish] | None = None
    ) -> None:
        self.again = again
        self.begin = begin
        self.group: Group | None = None
        self.saves = 0  # how often it stands for a saved tensor
        self.started: Finish | None = None
        self.shares: dict[int, int] = {}
        self.ready: dict[int, list[Any]] = {}

    def start(self) -> None:
        """Begin to gather again, if anything will ask for it."""
        if self.begin is not None and self.saves and self.started is None:
            with torch.no_grad():
                self.started = self.begin()

    def take(self, number: int) -> Tensor:
        if number not in self.ready:
            if self.group is not None:
                self.group.reach()
            started, self.started = self.started, None
            with record.phase("regather"), torch.no_grad():
                whole = self.again() if started is None else started()
            self.ready = {i: [whole[i], n] for i, n in self.shares.items()}
        waiting = self.ready[number]
        waiting[1] -= 1
        if not waiting[1]:
            del self.ready[number]
        return waiting[0]


class Group:
    """Gathers that backward does again together, and one group ahead: those of a layer.

    When backward asks for the first of a group, the group before it starts as well.

    Args:
        before: the group made before, whose backward comes next.
    """

    def __init__(self, before: Group | None) -> None:
        self.before = before
        self._recipes: list[weakref.ref[_Recipe]] = []
        self._left = 0  # saved tensors that have not been asked for since the group started

    def add(self, recipe: _Recipe) -> None:
        """One more gather of the group."""
        recipe.group = self
        self._recipes.append(weakref.ref(recipe))

    def reach(self) -> None:
        """Called for each saved tensor of the group."""
        self._start()
        self._left -= 1
        if self.before is not None:
            self.before._start()

    def _start(self) -> None:
        if self._left > 0:
            return
        recipes = [recipe for ref in self._recipes if (recipe := ref()) is not None]
        self._left = sum(recipe.saves for recipe in recipes)
        for recipe in reversed(recipes):  # about the order in which backward needs them
            recipe.start()


@contextmanager
def scope() -> Iterator[None]:
    """The forward of one value_and_grad: hooks pushed by gathers inside are popped at its end."""
    pushed: list[Any] = []
    _SCOPES.append(pushed)
    try:
        yield
    finally:
        _SCOPES.pop()
        for hooks in reversed(pushed):
            hooks.__exit__(None, None, None)


@contextmanager
def suspended() -> Iterator[None]:
    """Gathers inside keep the whole: a checkpoint around them already decides what is saved."""
    held = _SCOPES[:]
    _SCOPES.clear()
    try:
        yield
    finally:
        _SCOPES[:] = held


@contextmanager
def under(hooks: Any) -> Iterator[None]:
    """Other hooks, which ask `pack` and `unpack` first; gathers inside push none of their own."""
    with hooks:
        _SCOPES.append([hooks])
        try:
            yield
        finally:
            _SCOPES.pop()


def regather(
    out: Sequence[Tensor],
    again: Callable[[], Sequence[Tensor]],
    begin: Callable[[], Finish] | None = None,
    group: Group | None = None,
) -> None:
    """Ask that `out` be saved as the recipe `again`, which gathers it anew.

    Args:
        out: the gathered shards.
        again: gathers them once more.
        begin: the same in two parts, so that it can start ahead; together with
        group: whose gathers start together.
    """
    if not _SCOPES:
        return
    if not _SCOPES[-1]:
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
        hooks.__enter__()
        _SCOPES[-1].append(hooks)
    recipe = _Recipe(again, begin)
    if group is not None:
        group.add(recipe)
    for number, tensor in enumerate(out):
        storage = tensor.untyped_storage()
        known = _RECIPES.get(storage._cdata)
        if known is None or known[0] is not recipe:
            known = _RECIPES[storage._cdata] = recipe, number
            weakref.finalize(storage, _RECIPES.pop, storage._cdata, None)
        recipe.shares[known[1]] = recipe.shares.get(known[1], 0) + 1


def pack(tensor: Tensor) -> Any:
    """What is saved of a tensor: itself, or the recipe of a gather."""
    found = _RECIPES.get(tensor.untyped_storage()._cdata)
    if found is None:
        return tensor
    found[0].saves += 1
    return *found, tensor.size(), tensor.stride(), tensor.storage_offset()


def unpack(saved: Any) -> Tensor:
    """The tensor again."""
    if isinstance(saved, Tensor):
        return saved
    recipe, number, size, stride, offset = saved
    return recipe.take(number).as_strided(size, stride, offset)
