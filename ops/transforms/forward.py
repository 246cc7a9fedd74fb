"""Forward mode: `jvp`, and `hvp`, the Hessian times a vector, as forward over reverse.

Tangents have their primal's layout: a conversion is linear, so its forward-mode derivative is
itself. One `torch.func.jvp` runs over the flat shards of all devices; a `grad` inside takes its
`torch.func.vjp` engine.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import optree
import torch
from torch import Tensor

from ...layouts.sharded import ShardedTensor, make_type
from ...meshlib.errors import LayoutError
from .grad import grad
from .leaves import Inputs, entering, flat, is_differentiable, nested, outside


def jvp(f: Callable[..., Any], primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    """The value of `f` and its derivative along `tangents`.

    Args:
        f: any outputs, a tree.
        primals: its arguments, trees; all floats in them are differentiated.
        tangents: trees of the same structure, each tensor with its primal's layout, shape and
            dtype. None stands for zero, and for what is not differentiated (integers, plain
            values).

    Returns:
        (outputs, their tangents). A tangent has its output's layout; None for outputs that are not
        floats.

    Cost: each collective of `f` once more, on the tangent.

    Raises:
        LayoutError: a tangent of another type than its primal.
        ValueError: trees that differ, or nothing to differentiate.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.arange(4.0), sw.make_mesh({"data": 2}), "n/data")
    >>> _, t = sw.jvp(lambda x: (x * x).sum(), (x,), (sw.shard(torch.ones(4), x.mesh, "n/data"),))
    >>> t, t.full_tensor()
    (f32[]{U:data} local[] on mesh(data=2), tensor(12.))
    """
    inputs = Inputs(entering(tuple(primals)))
    if not inputs.live:
        raise ValueError("jvp: the arguments hold no floating tensor")
    directions = _matched(inputs, entering(tuple(tangents)))
    keep = inputs.keep or any(t.requires_grad for t in directions)
    box: list[Any] = []

    def traced(*shards: Tensor) -> tuple[Tensor, ...]:
        with nested(), torch.enable_grad():
            box[:] = optree.tree_flatten(f(*inputs.typed(shards)), none_is_leaf=True)
        return tuple(s for v in box[0] if is_differentiable(v) for s in flat(v))

    _load_decompositions()
    pair: Any = torch.func.jvp(traced, tuple(inputs.shards), tuple(directions))
    values, derivatives = pair
    leaves, spec = outside(box[0]), box[1]
    return spec.unflatten(_typed(leaves, values, keep)), spec.unflatten(
        _typed([v if is_differentiable(v) else None for v in leaves], derivatives, keep)
    )


@lru_cache(maxsize=1)
def _load_decompositions() -> None:
    """What torch imports on the first forward-mode call; its warning is not the user's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def _matched(inputs: Inputs, tangents: Any) -> list[Tensor]:
    """The flat shards of the tangents, checked against their primals; zeros for None."""
    given = optree.tree_leaves(tangents, none_is_leaf=True)
    if len(given) != len(inputs.values):
        given = optree.broadcast_prefix(
            tangents, inputs.spec.unflatten(inputs.values), none_is_leaf=True
        )
    found: list[Tensor] = []
    for i in inputs.live:
        primal, tangent = inputs.values[i], given[i]
        if tangent is None:
            found += [torch.zeros_like(s) for s in flat(primal)]
            continue
        name = inputs.paths[i]
        if type(tangent) is not type(primal):
            raise TypeError(
                f"jvp: the tangent of {name} must be a {type(primal).__name__}, "
                f"got {type(tangent).__name__}"
            )
        if isinstance(primal, ShardedTensor):
            want = make_type(primal.mesh, primal.layout, primal.shape, primal.dtype)
            if make_type(tangent.mesh, tangent.layout, tangent.shape, tangent.dtype) is not want:
                raise LayoutError(
                    f"jvp: the tangent of {name} must have its primal's type, {want}, got {tangent}"
                    f"\nconvert it: sw.reshard(tangent, {str(primal.layout)!r})",
                    op="jvp",
                )
        found += flat(tangent)
    return found


def _typed(leaves: Sequence[Any], shards: Sequence[Tensor], keep: bool) -> list[Any]:
    """Leaves with these shards where they are differentiable."""
    at = iter(shards)
    found: list[Any] = []
    for old in leaves:
        if not is_differentiable(old):
            found.append(old)
        elif isinstance(old, Tensor):
            found.append(next(at))
        else:
            mine = tuple(next(at) for _ in old._shards)
            found.append(ShardedTensor(mine, old._type.with_layout(old.layout, keep)))
    return found


def hvp(f: Callable[[Any], Any], x: Any, v: Any) -> Any:
    """The Hessian of a scalar function at `x`, times `v`: the product alone, no Hessian.

    Args:
        f: x -> scalar loss.
        x: a tree.
        v: a tree of the same structure, with the layouts of `x`.

    Returns:
        A tree like `x` whose layouts are the duals of those of `x`.

    Cost: a gradient in forward mode: the gradient's collectives twice.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.arange(4.0), sw.make_mesh({"data": 2}), "n/data")
    >>> v = sw.shard(torch.ones(4), x.mesh, "n/data")
    >>> sw.hvp(lambda x: (x**3).sum(), x, v).full_tensor()
    tensor([ 0.,  6., 12., 18.])
    """
    return jvp(grad(f), (x,), (v,))[1]
