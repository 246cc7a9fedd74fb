"""`shard_map`: local code with named collectives, and its way in and out.

Inside, each argument is a ShardedTensor of *local* shape; an axis that cut it is in the state
*varying* (`{V:axis}`): each device has its own value. States of other axes are kept. Types stay
checked: what varies meets only what is equal on the devices, a varying scalar has no truth value,
and a result that still varies over an axis that its layout does not cut is an error. Gradients
follow the law of the states, so a sum is owed where one is owed and nothing is summed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any

import optree

from ...layouts.convert import relabelled
from ...layouts.layout import Layout, make, resolve
from ...layouts.reshard import find_route, follow, reshard_one
from ...layouts.sharded import ShardedTensor
from ...meshlib import record
from ...meshlib.errors import LayoutError, word
from ...meshlib.mesh import Mesh
from ...meshlib.source import user_line
from .leaves import vary

MESH: ContextVar[Mesh | None] = ContextVar("mesh", default=None)


def shard_map(
    f: Callable[..., Any] | None = None, *, in_layouts: Any, out_layouts: Any
) -> Callable[..., Any]:
    """A function of global ShardedTensors whose body is local code with named collectives.

    The body runs once, for all devices of a simulated mesh too.

    Args:
        f: the body; left out, `shard_map` is a decorator.
        in_layouts: the arguments' layouts, to which they are converted first; one for all, or a
            tree prefix of the arguments. The mesh is read from the arguments.
        out_layouts: the results' layouts, likewise. A result must vary over an axis that cuts it,
            or be equal on its devices: then each gives its copy.

    Returns:
        A function of the same arguments, differentiable.

    Cost: the conversions of the arguments to `in_layouts` and of the results' states; and what the
    body does.

    Raises:
        LayoutError: a result that varies over an axis that its layout does not cut.
        TypeError: no ShardedTensor among the arguments.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"data": 2})
    >>> x = sw.shard(torch.arange(4.0), mesh, "n/data")
    >>> @sw.shard_map(in_layouts="n/data", out_layouts="")
    ... def largest(x):
    ...     return sw.ops.all_reduce(x.sum(), "data")
    >>> largest(x), largest(x).item()
    (f32[] local[] on mesh(data=2), 6.0)
    """
    if f is None:
        return partial(shard_map, in_layouts=in_layouts, out_layouts=out_layouts)

    @wraps(f)
    def mapped(*args: Any, **kwargs: Any) -> Any:
        tree: Any = args
        leaves, spec = optree.tree_flatten(tree, none_is_leaf=True)
        mesh = next((x.mesh for x in leaves if isinstance(x, ShardedTensor)), None)
        if mesh is None:
            raise TypeError(
                "shard_map: the mesh is read from the arguments, and none is a ShardedTensor"
            )
        outer = frozenset().union(
            *(x.layout.varying for x in leaves if isinstance(x, ShardedTensor))
        )
        with record.acting("shard_map", "shard_map"):
            given = [
                _enter(x, to)
                for x, to in zip(leaves, _prefix(in_layouts, args, "in_layouts"), strict=True)
            ]
        token = MESH.set(mesh)
        try:
            result = f(*spec.unflatten(given), **kwargs)
        finally:
            MESH.reset(token)
        made, shape = optree.tree_flatten(result, none_is_leaf=True)
        wanted = _prefix(out_layouts, result, "out_layouts")
        with record.acting("shard_map", "shard_map"):
            return shape.unflatten(
                [_leave(y, to, outer) for y, to in zip(made, wanted, strict=True)]
            )

    return mapped


def _prefix(layouts: Any, tree: Any, what: str) -> list[Any]:
    """One layout per leaf of the tree."""
    try:
        return optree.broadcast_prefix(layouts, tree, none_is_leaf=True)
    except ValueError as error:
        raise ValueError(f"shard_map: {what} is no prefix of the tree: {error}") from None


def _enter(x: Any, to: Any) -> Any:
    """An argument as the body sees it: its block, varying over the axes that cut it."""
    if not isinstance(x, ShardedTensor) or to is None:
        return x
    x = _moved(x, resolve(to, x.ndim, x.layout, x.shape, x.mesh))
    old = x.layout
    cut = frozenset(a for axes in old.dims for a in axes)
    layout = make(((),) * x.ndim, old.unreduced, old.reduced, old.varying | cut, old.memory, old.at)
    return relabelled(x, layout, x.local_shape)


def _moved(x: ShardedTensor, target: Layout) -> ShardedTensor:
    """The tensor in another layout, recorded under the reason that is set."""
    target.check(x.shape, x.mesh, "shard_map")
    route = find_route(x._type, target)
    return reshard_one(x, target) if route is None else follow(x, route)


def _leave(y: Any, to: Any, outer: frozenset[str]) -> Any:
    """A result as a block of the global tensor that its layout says."""
    if not isinstance(y, ShardedTensor):
        return y
    if to is None:
        raise ValueError(f"shard_map: out_layouts has None for a result, {y}")
    now = y.layout
    has = make(now.dims, now.unreduced, now.reduced, now.varying & outer, now.memory, now.at)
    target: Layout = resolve(to, y.ndim, has, y.shape, y.mesh)
    if target.ndim != y.ndim:
        raise LayoutError(
            f"shard_map: out layout '{target}' speaks of {target.ndim} dims, but the result is {y}",
            kind="parse",
        )
    cut = [a for axes in target.dims for a in axes]
    y.mesh.check_axes(tuple(target.axes))
    for axis in y.mesh.axes:
        if axis not in cut and now.state(axis) == "varying" and axis not in outer:
            raise _refused(
                y, target, f"varies over {axis!r}, which '{target}' does not cut", VARIES, axis
            )
        if axis in cut and now.state(axis) == "unreduced":
            raise _refused(
                y, target, f"is a sum over {axis!r}, by which '{target}' cuts it", OWED, axis
            )
    y = vary(y, cut)
    varying = frozenset(cut) | target.varying
    inner = make(((),) * y.ndim, target.unreduced, target.reduced, varying, now.memory, now.at)
    y = _moved(y, inner)
    shape = [n * y.mesh.group_size(axes) for n, axes in zip(y.shape, target.dims, strict=True)]
    return relabelled(y, target, shape)


VARIES = (
    "ops.all_reduce(y, {axis!r})   its sum",
    "ops.all_gather(y, {axis!r}, dim)   all of it",
)
OWED = (
    "ops.reduce_scatter(y, {axis!r}, dim)   its block of the sum",
    "ops.all_reduce(y, {axis!r})   the sum, on each device",
)


def _refused(
    y: ShardedTensor, target: Layout, verdict: str, fixes: Sequence[str], axis: str
) -> LayoutError:
    lines = [f"\n  {number}. {fix.format(axis=axis)}" for number, fix in enumerate(fixes, 1)]
    return LayoutError(
        word(
            f"a result {verdict}",
            op="shard_map",
            source=user_line(),
            operands=[("result", str(y)), ("out_layouts", str(target))],
            mesh=y.mesh,
        )
        + f"\nbefore it is returned:{''.join(lines)}",
        op="shard_map",
        source=user_line(),
    )
