"""Transforms of a part of the parameters: `masked` takes some, `multi` gives each part its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..layouts import tree
from ..layouts.tree import Mask, matches
from .base import Transform, hardest


def masked(t: Transform, mask: Mask) -> Transform:
    """A transform of the leaves that a mask takes; other gradients pass as they are.

    Args:
        t: the transform; it sees a tree with None in place of the others.
        mask: a glob over paths, or a function of (path, leaf).

    State: that of `t`, with None for the others.

    Raises:
        ValueError: for a mask that takes no leaf.

    >>> import shardwise as sw
    >>> mesh = sw.make_mesh({"data": 2})
    >>> g = {name: sw.full((2,), 4.0, mesh) for name in ("w", "b")}
    >>> t = masked(sw.optim.clip_by_value(1.0), "w")
    >>> [x.full_tensor()[0].item() for x in t.update(g, t.init(g), g)[0].values()]
    [1.0, 4.0]
    """

    def init(params: Any) -> Any:
        taken = _taken(params, mask)
        if not any(x is not None for x in tree.leaves(taken)):
            raise ValueError(f"masked: {mask!r} takes no parameter of {_paths(params)}")
        return t.init(taken)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        inside = _part(grads, params, mask)
        updates, state = t.update(inside, state, _taken(params, mask))
        return tree.combine(updates, _part(grads, params, mask, False)), state

    return Transform(t.name, init, update, t.needs, t.grads)


def multi(parts: Mapping[str, Transform]) -> Transform:
    """Each parameter by the transform of the first glob that matches its path.

    Args:
        parts: glob over paths to transform; put the general ones last.

    State: a dict by the globs.

    Raises:
        ValueError: for a parameter that no glob matches, or a glob that is first for none.

    >>> from shardwise import optim
    >>> muon_inside = optim.multi({"*embed*": optim.adamw(3e-4), "*.w_*": optim.muon(2e-2),
    ...     "*": optim.adamw(3e-4, weight_decay=0.0)})
    >>> muon_inside.needs
    'matrix'
    """

    def owner(path: str) -> str | None:
        return next((glob for glob in parts if matches(glob, path, None)), None)

    def masks(params: Any) -> dict[str, Mask]:
        owners = {path: owner(path) for path, p in tree.items(params) if p is not None}
        orphans = [path for path, glob in owners.items() if glob is None]
        if orphans:
            raise ValueError(f"multi: none of {list(parts)} matches {orphans}")
        idle = [glob for glob in parts if glob not in owners.values()]
        if idle:
            raise ValueError(f"multi: {idle} come first for no parameter of {_paths(params)}")
        return {glob: (lambda path, _, glob=glob: owner(path) == glob) for glob in parts}

    def init(params: Any) -> dict[str, Any]:
        own = masks(params)
        return {glob: t.init(_taken(params, own[glob])) for glob, t in parts.items()}

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        own = masks(params)
        updates: Any = tree.map(lambda _: None, params)
        after = {}
        for glob, t in parts.items():
            mine = _part(grads, params, own[glob])
            done, after[glob] = t.update(mine, state[glob], _taken(params, own[glob]))
            updates = tree.combine(updates, done)
        return updates, after

    def fused(grads: Any, state: Any, params: Any, *, donate: bool = False) -> tuple[Any, Any]:
        own = masks(params)
        new: Any = tree.map(lambda _: None, params)
        after = {}
        for glob, t in parts.items():
            mine, taken = _part(grads, params, own[glob]), _taken(params, own[glob])
            done, after[glob] = t.step(mine, state[glob], taken, donate=donate)
            new = tree.combine(new, done)
        return new, after

    return Transform("multi", init, update, hardest(*parts.values()), fused=fused)


def _taken(params: Any, mask: Mask) -> Any:
    """The parameters that a mask takes; None elsewhere."""
    return tree.partition(params, _present(mask))[0]


def _present(mask: Mask) -> Mask:
    return lambda path, leaf: leaf is not None and matches(mask, path, leaf)


def _part(grads: Any, params: Any, mask: Mask, taken: bool = True) -> Any:
    """The gradients of parameters that a mask takes (or not); None elsewhere."""
    marks = iter([p is not None and matches(mask, path, p) for path, p in tree.items(params)])
    return tree.partition(grads, lambda *_: next(marks) is taken)[0]


def _paths(params: Any) -> list[str]:
    return [path for path, _ in tree.items(params)]
