"""Gradient transformations: pairs of pure functions, and the step that adds them up.

    init(params) -> state
    update(grads, state, params) -> (updates, state)
    step(grads, state, params) -> (params, state)      update, then add

Gradients come in any layout that leads to the parameters'; each transform says what it wants
(`grads`). State is a tree named by the transforms; its paths are checkpoint keys. Results have the
parameters' layouts and dtypes, so that a training step is layout-stable. A gradient that is None (a
frozen or unused parameter) leaves its parameter and its state as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..layouts import tree
from ..layouts.place import full
from ..layouts.sharded import ShardedTensor
from ..meshlib.errors import nearest
from ..meshlib.mesh import Mesh
from ..ops.transforms.donation import give_up
from .flat import check_sharded, elementwise

Needs = Literal["elementwise", "reduction", "matrix"]
Schedule = float | Callable[[Any], Any]
ORDER: tuple[Needs, ...] = ("elementwise", "reduction", "matrix")


def settled(params: Any) -> Any:
    """The layouts in which a transform reads gradients by default: the parameters' own."""
    return tree.map(lambda p: p.layout, params)


@dataclass(frozen=True)
class Transform:
    """A gradient transformation.

    Attributes:
        name: its key in a chain's state.
        init: params -> state.
        update: (grads, state, params) -> (updates, state).
        needs: what of a tensor one element's update depends on: itself, sums, or the whole matrix.
        grads: the gradient layouts it wants, a function of the parameters: `value_and_grad(grads=)`
            takes it. Others are brought to them.
        fused: (grads, state, params) -> (params, state) in one pass, or None.
        inside: of a wrapper that moves data between devices, a function that gives the same
            wrapper around its changed inner transform: `offload` goes in there. None elsewhere.
        holds_params: whether the state holds the parameters, so that a step reads none but it.
    """

    name: str
    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any], tuple[Any, Any]]
    needs: Needs = "elementwise"
    grads: Any = settled
    fused: Callable[..., Any] | None = None
    inside: Callable[[Callable[[Transform], Transform]], Transform] | None = None
    holds_params: bool = False

    def step(self, grads: Any, state: Any, params: Any, *, donate: bool = False) -> tuple[Any, Any]:
        """New parameters and state.

        Args:
            grads: gradients, a tree like params.
            state: from `init` or the last step.
            params: the parameters.
            donate: the caller gives up params and state: where it can, the step writes into their
                buffers, and reading them afterwards raises. Nothing else is written in place.

        Raises:
            LayoutError: kind "donated", for arguments that an earlier step was given.
        """
        with torch.no_grad():
            if self.fused is not None:
                new, after = self.fused(grads, state, params, donate=donate)
            else:
                updates, after = self.update(grads, state, params)
                new = apply_updates(params, updates, donate=donate)
        if donate:
            give_up([state, params], keep=[new, after, grads])
        return new, after


def apply_updates(params: Any, updates: Any, *, donate: bool = False) -> Any:
    """params + updates, in the parameters' layouts and dtypes; None leaves a parameter as it is.

    >>> import shardwise as sw
    >>> p = {"w": sw.full((2,), 1.0, sw.make_mesh({"data": 2}), "n/data")}
    >>> apply_updates(p, p)["w"].full_tensor()
    tensor([2., 2.])
    """

    def add(_s: Any, _mark: Any, u: Any, p: Any) -> Any:
        return (p.add_(u).to(p.dtype),)

    return elementwise(add, [updates, params], params, olds=[1], donate=(1,) if donate else ())[0]


def chain(*transforms: Transform) -> Transform:
    """Transforms one after another; the state is a dict by their names.

    >>> from shardwise import optim
    >>> optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-3)).name
    'clip_by_global_norm, adamw'
    """
    names = [t.name for t in transforms]
    if not names:
        raise ValueError("chain: of no transforms")
    if len(set(names)) != len(names):
        raise ValueError(f"chain: two transforms have one name: {names}")
    *first, last = transforms

    def init(params: Any) -> dict[str, Any]:
        return {t.name: t.init(params) for t in transforms}

    def before(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        after = {}
        for t in first:
            grads, after[t.name] = t.update(grads, state[t.name], params)
        return grads, after

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        grads, after = before(grads, state, params)
        grads, after[last.name] = last.update(grads, state[last.name], params)
        return grads, after

    def fused(grads: Any, state: Any, params: Any, *, donate: bool = False) -> tuple[Any, Any]:
        grads, after = before(grads, state, params)
        params, after[last.name] = last.step(grads, state[last.name], params, donate=donate)
        return params, after

    needs = hardest(*transforms)
    return Transform(", ".join(names), init, update, needs, transforms[0].grads, fused)


def hardest(*transforms: Transform) -> Needs:
    """What several transforms together need of a tensor."""
    return ORDER[max((ORDER.index(t.needs) for t in transforms), default=0)]


def named(t: Transform, name: str) -> Transform:
    """The same transform under another name: two of a kind in one chain.

    >>> from shardwise import optim
    >>> optim.chain(optim.named(optim.scale(2.0), "double"), optim.scale(0.1)).name
    'double, scale'
    """
    return Transform(name, t.init, t.update, t.needs, t.grads, t.fused)


def home(params: Any) -> Mesh:
    """The mesh of a state's scalars: every device that holds a parameter is on it.

    It is the parameters' own mesh, or the one of theirs that holds all the others; for disjoint
    sub-meshes a flat one over all their devices.
    """
    found = [(path, p) for path, p in tree.items(params) if p is not None]
    for path, p in found:
        check_sharded(p, path)
    meshes = list(dict.fromkeys(p.mesh for _, p in found))
    if not meshes:
        raise ValueError(
            "the transform got no parameters: an empty tree, or a mask that takes none"
        )
    ranks = sorted({rank for mesh in meshes for rank in mesh.ranks})
    for mesh in meshes:
        if len(mesh.ranks) == len(ranks):
            return mesh
    first = meshes[0]
    return Mesh({"device": len(ranks)}, first.transport, first.device, tuple(ranks), first.check)


def scalar(params: Any, value: float, dtype: torch.dtype | None = None) -> ShardedTensor:
    """A scalar of the state, on the parameters' mesh."""
    return full((), value, home(params), "", dtype=dtype)


def counter(params: Any) -> ShardedTensor:
    """A step count of zero on the parameters' mesh."""
    return scalar(params, 0, torch.int64)


def has_any(grads: Any) -> bool:
    """Whether any gradient is there: a step on none of them leaves parameters and state alone."""
    return any(g is not None for g in tree.leaves(grads))


def zeros_like(params: Any, dtype: torch.dtype | None = None) -> Any:
    """A tree of zeros in the parameters' layouts."""
    for path, p in tree.items(params):
        if p is not None:
            check_sharded(p, path)
    return tree.map(lambda p: torch.zeros_like(p, dtype=dtype), params)


def stepless(name: str, kernel: Callable[..., Any], **scalars: Any) -> Transform:
    """A transform without state, by a kernel (scalars, mark, g) -> (update,)."""

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return elementwise(kernel, [grads], params, olds=[None], scalars=scalars)[0], state

    return Transform(name, lambda params: {}, update)


def get(state: Any, name: str) -> Any:
    """The one leaf of a state whose last key is `name`: "norm", "step", ...

    Raises:
        KeyError: none, or several.
    """
    found = [(path, leaf) for path, leaf in tree.items(state) if path.split(".")[-1] == name]
    if len(found) != 1:
        known = {path.split(".")[-1] for path, _ in tree.items(state)}
        raise KeyError(
            f"{name!r} stands {len(found)} times in the state"
            + (f": {[p for p, _ in found]}" if found else nearest(name, sorted(known)))
        )
    return found[0][1]
