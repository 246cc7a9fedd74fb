"""Leaves of a transform: taken apart into flat shards, typed again inside, put together after.

What every transform shares: which leaves are differentiated, how deep transforms are nested, and
which mesh axes an open `vmap` has taken: a tensor that is differentiated inside has, like each
mapped value, one gradient per entry of the mapped dim, so it enters *varying* over those axes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import optree
import torch
from torch import Tensor

from ...layouts.convert import convert
from ...layouts.layout import MAPPED, Layout, with_state
from ...layouts.reshard import reshard_one
from ...layouts.sharded import ShardedTensor, make_type
from ...layouts.tree import items
from ...meshlib.errors import LayoutError
from .entry import Entry, entry

_DEPTH: ContextVar[int] = ContextVar("depth", default=0)
functorch: Any = torch._C._functorch  # pyright: ignore
under_functorch = torch._C._are_functorch_transforms_active


def unwrapped(x: Tensor) -> Tensor:
    """The tensor inside all of functorch's wrappers: every entry of a batch at once."""
    inner: Any = torch._C._functorch  # pyright: ignore
    while inner.is_functorch_wrapped_tensor(x):
        x = inner.get_unwrapped(x)
    return x


@contextmanager
def nested() -> Iterator[None]:
    """Inside, gradients keep their own graph, so that an outer transform can differentiate them."""
    token = _DEPTH.set(_DEPTH.get() + 1)
    try:
        yield
    finally:
        _DEPTH.reset(token)


def is_nested() -> bool:
    """Whether a gradient transform is already open around this call."""
    return _DEPTH.get() > 0


def depth() -> int:
    """How many gradient transforms are open around this call."""
    return _DEPTH.get()


@contextmanager
def mapped_over(axes: Sequence[str]) -> Iterator[None]:
    """Inside, these axes belong to the mapped dim of a vmap."""
    token = MAPPED.set(MAPPED.get() | frozenset(axes))
    try:
        yield
    finally:
        MAPPED.reset(token)


@contextmanager
def without_hooks() -> Iterator[None]:
    """Inside, no saved-tensor hooks, which torch.func.vjp refuses: what is saved stays as it is."""
    auto: Any = torch._C._autograd  # pyright: ignore
    held = []
    while (top := auto._top_saved_tensors_default_hooks(False)) is not None:
        held.append(top)
        auto._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(held):
            auto._push_saved_tensors_default_hooks(pack, unpack)


def vary(x: ShardedTensor, axes: Sequence[str]) -> ShardedTensor:
    """The same value, varying over these axes: gathered or reduced first where it must be."""
    left = [a for a in axes if a in x.mesh.axes and x.layout.state(a) != "varying"]
    if not left:
        return x
    layout = x.layout
    for axis in left:
        layout = with_state(layout, axis, "reduced")
    return convert(reshard_one(x, layout), left, "varying")


def entering(tree: Any) -> Any:
    """Arguments as a gradient transform takes them: inside vmap, floats vary over its axes."""
    axes = sorted(MAPPED.get())
    if not axes:
        return tree
    return optree.tree_map(
        lambda x: vary(x, axes) if isinstance(x, ShardedTensor) and is_differentiable(x) else x,
        tree,
        none_is_leaf=True,
    )


class Inputs:
    """The differentiated leaves of some arguments.

    Args:
        tree: the arguments.
        layouts: per leaf the layout in which it enters, None for its own.
        asked: per leaf the layout asked of its gradient, None for the dual.
        dtype: the dtype asked of the gradients.
    """

    def __init__(
        self,
        tree: Any,
        layouts: Sequence[Layout | None] | None = None,
        asked: Sequence[Layout | None] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.values, self.spec = optree.tree_flatten(tree, none_is_leaf=True)
        self.paths = [path for path, _ in items(tree)]
        self.live = [i for i, v in enumerate(self.values) if is_differentiable(v)]
        self.layouts = layouts or [None] * len(self.values)
        self.entries: list[Entry | None] = [None] * len(self.values)
        # An outer transform must see the cast into the layout inside.
        if self.keep or under_functorch():
            for i, layout in enumerate(self.layouts):
                self.values[i] = (
                    self.values[i] if layout is None else reshard_one(self.values[i], layout)
                )
        elif asked is not None:
            ways = zip(self.values, self.layouts, asked, self.paths, strict=True)
            self.entries = [entry(*way, dtype) for way in ways]

    @property
    def shards(self) -> list[Tensor]:
        """The flat shards of all differentiated leaves."""
        return [s for i in self.live for s in flat(self.values[i])]

    @property
    def keep(self) -> bool:
        """Whether an outer transform or graph will differentiate what comes out."""
        return is_nested() or any(s.requires_grad for s in self.shards)

    def fresh(self) -> list[Tensor]:
        """Leaves of a new graph; still part of the old one where that needs a gradient."""
        found: list[Tensor] = []
        for i in self.live:
            way = self.entries[i]
            shards = flat(self.values[i]) if way is None else way.leaf()
            found += [
                s.view_as(s) if s.requires_grad else s.detach().requires_grad_() for s in shards
            ]
        return found

    def typed(self, shards: Sequence[Tensor]) -> Any:
        """The arguments again, with these shards for the differentiated leaves."""
        values = list(self.values)
        at = iter(shards)
        for i in self.live:
            old = values[i]
            if isinstance(old, Tensor):
                values[i] = next(at)
                continue
            mine = tuple(next(at) for _ in old._shards)
            way = self.entries[i]
            if way is not None:
                values[i] = way.entered(mine)
                continue
            layout = self.layouts[i] or old.layout
            values[i] = ShardedTensor(mine, make_type(old.mesh, layout, old.shape, old.dtype, True))
            named(values[i], self.paths[i] or getattr(old, "_path", None))
        return self.spec.unflatten(values)

    def gradients(self, shards: Sequence[Tensor], keep: bool) -> list[Any]:
        """One gradient per leaf, None for leaves that have none; layouts are the duals."""
        found: list[Any] = [None] * len(self.values)
        at = iter(shards)
        for i in self.live:
            old = self.values[i]
            if isinstance(old, Tensor):
                found[i] = next(at)
                continue
            way = self.entries[i]
            layout = (self.layouts[i] or old.layout).dual if way is None else way.asked
            mine = tuple(next(at) for _ in old._shards)
            grad = keep and (under_functorch() or any(s.requires_grad for s in mine))
            kind = make_type(old.mesh, layout, old.shape, mine[0].dtype, grad)
            if mine[0].shape != kind.local_shape:
                raise LayoutError(
                    f"gradient of {self.paths[i]} has local shape {tuple(mine[0].shape)}, expected "
                    f"{tuple(kind.local_shape)} of {kind}"
                )
            found[i] = ShardedTensor(mine, kind)
            named(found[i], self.paths[i] or getattr(old, "_path", None))
        return found


def is_differentiable(x: Any) -> bool:
    """Floating tensors, sharded or plain."""
    return isinstance(x, ShardedTensor | Tensor) and (
        x.dtype.is_floating_point or x.dtype.is_complex
    )


def flat(x: ShardedTensor | Tensor) -> tuple[Tensor, ...]:
    """The shards of a value."""
    return x._shards if isinstance(x, ShardedTensor) else (x,)


def floats(tree: Any) -> list[Any]:
    """The differentiable leaves of a tree."""
    return [v for v in optree.tree_leaves(tree) if is_differentiable(v)]


def outside(tree: Any) -> Any:
    """Values from inside a functorch level that has closed, one level up."""
    bare = functorch.unwrap_if_dead

    def one(x: Any) -> Any:
        if isinstance(x, ShardedTensor):
            return carrying_path(ShardedTensor(tuple(bare(s) for s in x._shards), x._type), x)
        return bare(x) if isinstance(x, Tensor) else x

    return optree.tree_map(one, tree, none_is_leaf=True)


def detached(tree: Any) -> Any:
    """The tensors of a tree without their graph."""
    return optree.tree_map(
        lambda v: v.detach() if isinstance(v, ShardedTensor | Tensor) else v,
        tree,
        none_is_leaf=True,
    )


def carrying_path(new: ShardedTensor, old: Any) -> ShardedTensor:
    """`new`, named in records and errors as `old` is."""
    return named(new, getattr(old, "_path", None))


def named(x: ShardedTensor, path: str | None) -> ShardedTensor:
    """`x` with this tree path, if there is one, in records and errors."""
    if path:
        x._path = path
    return x
