"""`vmap`: the mapped dim, with the axes that cut it, is invisible inside.

One `torch.func.vmap` runs over the flat shards of all devices. A mapped argument whose mapped dim
is cut by axis `data` is seen without that dim, *varying* over `data`: each device works on its own
entries. What varies meets only what is equal on the devices, cast to reduced, so the gradients of
weights that the function closes over are summed over `data` as without vmap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from ...layouts.convert import relabelled
from ...layouts.layout import Layout, make, with_state
from ...layouts.place import constant
from ...layouts.reshard import reshard_one
from ...layouts.sharded import ShardedTensor, make_type
from ...meshlib.errors import LayoutError, word
from ...meshlib.source import user_line
from ...meshlib.transport import Axes
from .leaves import flat, functorch, is_nested, mapped_over, outside, vary

InDims = Any  # an int or None, or a tree prefix of them


def vmap(
    f: Callable[..., Any],
    in_dims: InDims = 0,
    out_dims: InDims = 0,
    *,
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """`f` applied to every entry of a dim, all at once.

    Args:
        f: a function of tensors without that dim.
        in_dims: the mapped dim of each argument, None where it is not mapped; one for all, or a
            tree prefix of the arguments. Keyword arguments are not mapped.
        out_dims: where the dim goes in the results; None for a result that is the same for all
            entries.
        chunk_size: entries per device that run at once; None runs all.

    Returns:
        A function of the same arguments. The mapped dim's axes come back on the dim of the results.

    Cost: nothing moves, but for a mapped argument cut over these axes elsewhere. Gradient: that of
    `f`.

    Raises:
        LayoutError: kind "choice" if mapped dims are cut by different axes; a result for out_dims
            None that differs between entries.
        ValueError: nothing is mapped, or the mapped dims have different sizes.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"data": 2})
    >>> x, w = sw.shard(torch.ones(4, 3), mesh, "b/data d"), sw.shard(torch.ones(3), mesh)
    >>> sw.vmap(lambda x: (x * w).sum())(x)
    f32[4/data] local[2] on mesh(data=2)
    >>> per_entry = sw.grad(lambda w, x: (x * w).sum())
    >>> sw.vmap(per_entry, in_dims=(None, 0))(w, x)
    f32[4/data 3] local[2 3] on mesh(data=2)
    """

    def mapped(*args: Any, **kwargs: Any) -> Any:
        tree: Any = args
        leaves, spec = optree.tree_flatten(tree, none_is_leaf=True)
        dims = _dims(leaves, _prefix(in_dims, args, "in_dims"))
        leaves, axes, size = _aligned(leaves, dims)
        inside = [
            _inside(x, d, axes) if d is not None else x for x, d in zip(leaves, dims, strict=True)
        ]
        ways = tuple(d for x, d in zip(leaves, dims, strict=True) if d is not None for _ in flat(x))
        box: list[Any] = []

        def run(*shards: Tensor) -> tuple[Tensor, ...]:
            at = iter(shards)
            values = [
                _filled(x, at) if d is not None else x for x, d in zip(inside, dims, strict=True)
            ]
            with mapped_over(axes):
                result = f(*spec.unflatten(values), **kwargs)
                made, shape = optree.tree_flatten(result, none_is_leaf=True)
                to = _prefix(out_dims, result, "out_dims")
                made = [_leaving(v, d, axes) for v, d in zip(made, to, strict=True)]
            box[:] = made, shape, to
            return tuple(s for v, d in zip(made, to, strict=True) if _moves(v, d) for s in flat(v))

        given = [s for x, d in zip(leaves, dims, strict=True) if d is not None for s in flat(x)]
        out = iter(torch.func.vmap(run, in_dims=ways, chunk_size=chunk_size)(*given))
        made, shape, to = box
        return shape.unflatten(
            [
                _back(v, d, out, axes, size) if _moves(v, d) else outside(v)
                for v, d in zip(made, to, strict=True)
            ]
        )

    return mapped


def _prefix(dims: InDims, tree: Any, what: str) -> list[int | None]:
    """One entry per leaf of the tree."""
    try:
        given: Any = tuple(dims) if isinstance(dims, list) else dims
        return optree.broadcast_prefix(given, tree, none_is_leaf=True)
    except ValueError as error:
        raise ValueError(f"vmap: {what}={dims!r} is no prefix of the tree: {error}") from None


def _dims(leaves: Sequence[Any], dims: Sequence[int | None]) -> list[int | None]:
    """Non-negative mapped dims; None for what is no tensor."""
    found: list[int | None] = []
    for x, d in zip(leaves, dims, strict=True):
        if d is None or not isinstance(x, ShardedTensor | Tensor):
            found.append(None)
            continue
        if not -x.ndim <= d < x.ndim:
            raise IndexError(f"vmap: in_dims has {d} for a tensor with {x.ndim} dims")
        found.append(d % x.ndim)
    return found


def _aligned(leaves: list[Any], dims: Sequence[int | None]) -> tuple[list[Any], Axes, int]:
    """The leaves with all mapped dims cut by the same axes, the axes, and the size of the dim."""
    mapped = [(i, leaves[i], d) for i, d in enumerate(dims) if d is not None]
    if not mapped:
        raise ValueError("vmap: no argument is mapped")
    sizes = {x.shape[d] for _, x, d in mapped}
    if len(sizes) > 1:
        raise ValueError(f"vmap: the mapped dims have different sizes: {sorted(sizes)}")
    sharded = [(i, x, d) for i, x, d in mapped if isinstance(x, ShardedTensor)]
    cuts = list(dict.fromkeys(x.layout.dims[d] for _, x, d in sharded if x.layout.dims[d]))
    if len(cuts) > 1:
        raise LayoutError(
            word(
                "the mapped dims are cut by different axes: "
                f"{' and '.join('/'.join(c) for c in cuts)}"
                "\ncut them alike: sw.reshard(x, ...)",
                op="vmap",
                source=user_line(),
                operands=[(f"leaf {i}, dim {d}", str(x)) for i, x, d in sharded],
            ),
            kind="choice",
            op="vmap",
        )
    axes = cuts[0] if cuts else ()
    leaves = list(leaves)
    for i, x, d in mapped if axes else ():
        if isinstance(x, Tensor):
            leaves[i] = x = constant(x, sharded[0][1])
        if x.layout.dims[d] != axes:
            layout = x.layout
            for axis in axes:
                layout = with_state(layout, axis, d)
            leaves[i] = reshard_one(x, layout)
    return leaves, axes, sizes.pop()


def _inside(x: Any, d: int, axes: Axes) -> Any:
    """A mapped leaf's type inside: without its dim, varying over the axes that cut it."""
    if isinstance(x, Tensor):
        return x
    old = x.layout
    layout = make(
        old.dims[:d] + old.dims[d + 1 :],
        old.unreduced,
        old.reduced,
        old.varying | frozenset(axes),
        old.memory,
        old.at,
    )
    return relabelled(x, layout, x.shape[:d] + x.shape[d + 1 :])


def _filled(x: Any, shards: Any) -> Any:
    """The leaf with the shards that functorch hands in."""
    if isinstance(x, Tensor):
        return next(shards)
    return ShardedTensor(tuple(next(shards) for _ in x._shards), x._type)


def _moves(x: Any, d: int | None) -> bool:
    return d is not None and isinstance(x, ShardedTensor | Tensor)


def _leaving(x: Any, d: int | None, axes: Axes) -> Any:
    """A result ready to leave: varying over the axes, or, for out_dims None, equal everywhere."""
    if x is None:
        return None
    if not isinstance(x, ShardedTensor | Tensor):
        raise TypeError(f"vmap: the function must return tensors, got {type(x).__name__}")
    if d is not None:
        return vary(x, axes) if isinstance(x, ShardedTensor) else x
    level = functorch.maybe_current_level()
    mapped = any(functorch.maybe_get_level(s) == level for s in flat(x))
    if mapped or (isinstance(x, ShardedTensor) and x.layout.varying & frozenset(axes)):
        raise LayoutError(
            f"vmap: out_dims is None for a result that differs between entries: {x}\ngive it a dim",
            op="vmap",
        )
    return x


def _back(x: Any, d: int | None, shards: Any, axes: Axes, size: int) -> Any:
    """A result with the mapped dim, and its axes, at its place."""
    assert d is not None
    if isinstance(x, Tensor):
        return next(shards).movedim(0, d)
    mine = tuple(next(shards) for _ in x._shards)
    at = d % (x.ndim + 1)
    old: Layout = x.layout
    layout = make(
        (*old.dims[:at], axes, *old.dims[at:]),
        old.unreduced,
        old.reduced,
        old.varying - frozenset(axes),
        old.memory,
        old.at,
    )
    grad = x._type.grad and (is_nested() or any(s.requires_grad for s in mine))
    kind = make_type(x.mesh, layout, (*x.shape[:at], size, *x.shape[at:]), x.dtype, grad)
    return ShardedTensor(tuple(s.movedim(0, at) for s in mine), kind)
