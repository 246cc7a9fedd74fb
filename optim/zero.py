"""ZeRO: states, gradients and parameters cut over the axis on which parameters are replicated.

| stage | cut over the axis            | gradients            | moves per step and device   |
|-------|------------------------------|----------------------|-----------------------------|
| 0     | nothing                      | come all_reduced     | 2 (N-1)/N of the parameters |
| 1     | state                        | owed, then scattered | 2 (N-1)/N                   |
| 2     | state, gradients             | come scattered       | 2 (N-1)/N                   |
| 3     | state, gradients, parameters | come scattered       | 3 (N-1)/N (by `fsdp`)       |

Stages are layouts. The inner transform is given parameters, gradients and state that are cut, and
its own rules make it right: sums over whole tensors are taken over the axis too, matrices that must
be whole are brought together. A state keeps its parameter's shape, so a checkpoint does not depend
on the number of devices.

Source: Rajbhandari et al. 2020 (arXiv 1910.02054), sections 5 and 7.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import optree
import torch

from ..layouts import tree
from ..layouts.layout import Layout, make, with_state
from ..layouts.reshard import reshard_one
from ..layouts.sharded import ShardedTensor
from ..meshlib import record
from ..meshlib.errors import LayoutError
from .base import Transform, settled
from .buckets import all_gathered, copies, find_cut, reduce_scattered
from .flat import check_meets

STAGES = (0, 1, 2, 3)


def zero(t: Transform, stage: int, *, axis: str | Sequence[str] = "data") -> Transform:
    """A transform whose state, gradients or parameters are cut over an axis.

    It goes outside: `zero(master(chain(clip, adamw)), 2)`. Give its `grads` to `value_and_grad`.

    Args:
        t: the transform; any, in any layout of the parameters.
        stage: 0 is `t`. 1: state is cut; gradients come unreduced and are scattered, each device
            updates its part of the parameters, and the new ones are gathered in their own dtype.
            2: gradients come scattered, layer by layer during the backward. 3: parameters are cut
            already, by the strategy `fsdp`; that is checked, and the rest is `t`.
        axis: the mesh axis, or several that are taken as one.

    State: that of `t`, cut over the axis behind what cuts the parameter. It is the first dim that
    can be cut behind dim 0 (the stack of layers, which gradients leave one by one), else dim 0. A
    parameter with no such dim stays whole; `init` warns of it, and `left_whole` lists it.

    Cost: stages 1 and 2, a reduce_scatter of gradients, in their own dtype (the `dtype` of
    `value_and_grad`), and an all_gather of parameters; a few launches for all leaves. With
    donate=True new parameters are written over the old ones. Of several micro-batches
    (`accumulate`), stage 1 scatters the sum and holds whole gradients; 2 and 3 scatter each.

    Raises:
        LayoutError: at stage 3, for parameters that could be cut but are not.
        MeshError: an axis that the mesh has not.

    >>> import shardwise as sw
    >>> p = {"w": sw.full((4, 6), 1.0, sw.make_mesh({"data": 2}))}
    >>> opt = zero(sw.optim.adam(0.1), 2)
    >>> state = opt.init(p)
    >>> print(state["mu"]["w"])
    f32[4 6/data]
    >>> _, g = sw.value_and_grad(lambda p: p["w"].sum(), grads=opt.grads)(p)
    >>> new, state = opt.step(g, state, p)
    >>> print(g["w"], new["w"])
    f32[4 6/data] f32[4 6]
    """
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    if stage not in STAGES:
        raise ValueError(f"zero: stage is one of {STAGES}, got {stage}")
    if stage == 0:
        return t
    made = _cut_already(t, axes) if stage == 3 else _cut_here(t, stage, axes)
    return replace(made, inside=lambda change: zero(change(t), stage, axis=axes))


def _cut_here(t: Transform, stage: int, axes: tuple[str, ...]) -> Transform:
    """Stages 1 and 2."""

    def init(params: Any) -> Any:
        _warn(params, axes, stage)
        return t.init(parts(params, axes))

    def wanted(params: Any) -> Any:
        if stage == 1:
            return tree.map(lambda p: owing(p, axes), params)
        if t.grads is settled:
            return tree.map(lambda p: part_layout(p, axes), params)
        return t.grads(parts(params, axes)) if callable(t.grads) else t.grads

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        small = parts(params, axes)
        updates, after = t.update(_scattered(grads, small), state, small)
        return _gathered(updates, params, grads), after

    def fused(grads: Any, state: Any, params: Any, *, donate: bool = False) -> tuple[Any, Any]:
        small = parts(params, axes, donate=donate, written=not t.holds_params)
        new, after = t.step(_scattered(grads, small), state, small, donate=donate)
        return _gathered(new, params, grads, keep=True, donate=donate), after

    return Transform(t.name, init, update, t.needs, wanted, fused)


def _cut_already(t: Transform, axes: tuple[str, ...]) -> Transform:
    """Stage 3."""

    def init(params: Any) -> Any:
        _check_cut(params, axes)
        _warn(params, axes, 3)
        return t.init(params)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        _check_cut(params, axes)
        return t.update(grads, state, params)

    def fused(grads: Any, state: Any, params: Any, *, donate: bool = False) -> tuple[Any, Any]:
        _check_cut(params, axes)
        return t.step(grads, state, params, donate=donate)

    return Transform(t.name, init, update, t.needs, t.grads, fused)


def left_whole(
    params: Any, axis: str | Sequence[str] = "data", *, stage: int = 1
) -> list[tuple[str, int]]:
    """Parameters that are not cut over all of the axes, with the bytes of one device's part.

    Args:
        params: the parameters.
        axis: the axis, or several, of `zero`.
        stage: 1 or 2: those that `zero` cannot cut; 3: those that the strategy has left whole.

    >>> import shardwise as sw
    >>> left_whole({"w": sw.full((3, 5), 1.0, sw.make_mesh({"data": 2}))})
    [('w', 60)]
    """
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    found = []
    for path, p in tree.items(params):
        if isinstance(p, ShardedTensor):
            layout = p.layout if stage == 3 else part_layout(p, axes)
            if _open(layout, axes):
                size = math.prod(layout.local_shape(p.shape, p.mesh)) * p.dtype.itemsize
                found.append((path, size))
    return found


def part_layout(p: ShardedTensor, axes: Sequence[str]) -> Layout:
    """The layout of a parameter's part: cut over the axes, behind what cuts it already.

    All axes go on one dim where one can be cut by all; dim 0 is tried last.
    """
    p.mesh.check_axes(tuple(axes))
    layout, todo = p.layout, _open(p.layout, axes)
    key = ("part", tuple(axes))
    if not todo:
        return layout
    found = p._type.moves.get(key)
    if found is None:
        found = layout
        order = [*range(1, p.ndim), *range(min(1, p.ndim))]
        for group in ([todo], [[a] for a in todo]):
            for some in group:
                local = found.local_shape(p.shape, p.mesh)
                n = p.mesh.group_size(tuple(some))
                dim = next((d for d in order if local[d] % n == 0), None)
                for a in some if dim is not None else ():
                    found = with_state(found, a, dim)  # pyright: ignore
            if found is not layout:
                break
        p._type.moves[key] = found
    return found


def _open(layout: Layout, axes: Sequence[str]) -> list[str]:
    """The axes that do not cut."""
    return [a for a in axes if not isinstance(layout.state(a), int)]


def owing(p: ShardedTensor, axes: Sequence[str]) -> Layout:
    """The layout of a gradient of which the sum over the axes is owed."""
    dual = p.layout.dual
    more = frozenset(_open(p.layout, axes))
    return make(
        dual.dims, dual.unreduced | more, dual.reduced - more, dual.varying, dual.memory, dual.at
    )


def parts(params: Any, axes: Sequence[str], *, donate: bool = False, written: bool = True) -> Any:
    """Each parameter's part on this device, a view.

    Args:
        params: the parameters.
        axes: what cuts them.
        donate: the step inside gives up what it is given: objects are its own.
        written: and it writes over them: their memory is its own too.
    """
    leaves, spec = optree.tree_flatten(params, none_is_leaf=True)
    small, views = list(leaves), []
    for i, p in enumerate(leaves):
        if isinstance(p, ShardedTensor) and (to := part_layout(p, axes)) is not p.layout:
            small[i] = _part(p, to)
            views.append(i)
        elif donate and isinstance(p, ShardedTensor):
            small[i] = ShardedTensor(p._shards, p._type)
    if donate and written:
        for i, x in zip(views, copies([small[i] for i in views]), strict=True):
            small[i] = x
    return spec.unflatten(small)


def _part(p: ShardedTensor, to: Layout) -> ShardedTensor:
    way = find_cut(p.layout, to, p.mesh, "replicated")
    with torch.no_grad():
        if way is None:
            return reshard_one(p, to)
        pairs = zip(p._shards, p.mesh.positions(way.axes), strict=True)
        shards = tuple(way.block(s, place) for s, place in pairs)
    return ShardedTensor(shards, p._type.with_layout(to, False))


def _scattered(grads: Any, small: Any) -> Any:
    """Gradients in the layouts of the parts."""
    leaves, spec = optree.tree_flatten(small, none_is_leaf=True)
    given: list[Any] = spec.flatten_up_to(grads)
    live = [i for i, g in enumerate(given) if g is not None and leaves[i] is not None]
    for i in live:
        check_meets(given[i], leaves[i], small, i)
    with record.acting("step", "gradient"):
        done = reduce_scattered([given[i] for i in live], [leaves[i].layout for i in live])
    for i, g in zip(live, done, strict=True):
        given[i] = g
    return spec.unflatten(given)


def _gathered(
    new: Any, params: Any, grads: Any, *, keep: bool = False, donate: bool = False
) -> Any:
    """New values in the parameters' layouts; those without a gradient stay (`keep`) or are None."""
    likes, spec = optree.tree_flatten(params, none_is_leaf=True)
    given: list[Any] = spec.flatten_up_to(grads)
    found: list[Any] = spec.flatten_up_to(new)
    live = [
        i for i, g in enumerate(given) if not (g is None or likes[i] is None or found[i] is None)
    ]
    out: list[Any] = list(likes) if keep else list(found)
    into = [likes[i] if donate and _owns_memory(likes[i]) else None for i in live]
    with record.acting("step", "reshard"):
        done = all_gathered([found[i] for i in live], [likes[i].layout for i in live], into)
    for i, x in zip(live, done, strict=True):
        out[i] = x
    return spec.unflatten(out)


def _owns_memory(x: ShardedTensor) -> bool:
    """Whether each shard is the only one in its memory: replicas of a simulated mesh share it."""
    if any(s.is_meta for s in x._shards):
        return False
    stores = [s.untyped_storage() for s in x._shards]
    return len({store.data_ptr() for store in stores}) == len(stores) and all(
        store.nbytes() == s.numel() * s.element_size()
        for store, s in zip(stores, x._shards, strict=True)
    )


def _warn(params: Any, axes: Sequence[str], stage: int) -> None:
    whole = left_whole(params, axes, stage=stage)
    if whole:
        listed = ", ".join(f"{path} ({size:,} B)" for path, size in whole)
        total = sum(size for _, size in whole)
        warnings.warn(
            f"zero: {len(whole)} parameters cannot be cut over {'/'.join(axes)!r}: no dim "
            f"{'behind dim 0, the stack of layers, ' if stage == 3 else ''}is divisible; "
            f"{total:,} B of them stay on each device, and their state: {listed}",
            stacklevel=3,
        )


def _check_cut(params: Any, axes: Sequence[str]) -> None:
    """Raise for parameters that are whole over an axis that could cut them."""
    wrong, items = [], [(path, p) for path, p in tree.items(params) if p is not None]
    for path, p in items:
        if isinstance(p, ShardedTensor):
            missing, to = _open(p.layout, axes), part_layout(p, axes)
            # Strategies cut no stack of layers over a data axis, and by all axes or none.
            dims = {to.state(a) for a in missing}
            can = all(dims) or (dims == {0} and not _is_stack(path, p, items))
            is_cut = not _open(to, axes) and can
            if missing and is_cut:
                wrong.append(f"{path} is {p}, whole over {', '.join(map(repr, missing))}")
    if wrong:
        raise LayoutError(
            "zero: stage 3 wants parameters that are cut at rest\n" + "\n".join(wrong) + "\n"
            f"cut them by the strategy: strategies.fsdp({axes[0]!r}) in the place of "
            f"strategies.data({axes[0]!r}), or by hand: "
            f'sw.reshard(params, ".../{"/".join(axes)}")',
            op="zero",
        )


def _is_stack(path: str, p: ShardedTensor, items: Sequence[tuple[str, Any]]) -> bool:
    """Whether dim 0 may count layers: of more than two dims, or as long as that of such a leaf.

    A stack of vectors looks like a matrix; it lies beside stacks of matrices.
    """
    if p.ndim != 2:
        return p.ndim > 2
    first, inside, _ = path.partition(".")
    return any(
        other.ndim > 2 and other.shape[0] == p.shape[0]
        for name, other in items
        if not inside or name.partition(".")[0] == first
    )
