"""`scan`: a loop over stacked layers, with lax.scan's contract.

The stack is taken apart once, by one unbind, whose backward is one stack: reading layers by index
writes a stack of zeros per layer. Casts of a layer's parameters are made on its slice, so gathers
and gradient reductions happen layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from ...layouts.layout import with_state
from ...layouts.reshard import reshard_one
from ...layouts.sharded import ShardedTensor
from ...layouts.tree import items
from ...meshlib.errors import LayoutError, word
from ...meshlib.source import user_line
from ..join import unbind
from .ahead import Unit, Use, can_run_ahead
from .leaves import carrying_path
from .remat import Recompute, remat
from .shapes import drift


def scan(
    f: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any,
    *,
    use: Use | None = None,
    recompute: Recompute = "none",
    offload: bool = False,
) -> tuple[Any, Any]:
    """A loop over dim 0 of the leaves of `xs`: `carry, y = f(carry, x)`, layer after layer.

    Args:
        f: (carry, slice of xs) -> (carry, y). The carry keeps its types: tree, layouts, shapes,
            dtypes.
        carry: what goes from one iteration to the next, a tree.
        xs: a tree of tensors with equal sizes of dim 0, which no axis may cut.
        use: applied to each slice before `f` gets it, as `strategy.use`: `f(carry, use(x))`. On a
            distributed mesh its collectives run one iteration ahead, under the computation of the
            one in front, and those of its backward one iteration behind.
        recompute: what `remat` does with each iteration, `use` included.
        offload: what an iteration keeps for its backward lies on the host meanwhile.

    Returns:
        (last carry, all y stacked on a new dim 0). A y of None stays None.

    Cost: one copy of each stacked gradient. Gradients of a layer are reduced when its backward is
    done.

    Raises:
        LayoutError: kind "drift", if the carry changes its type, with paths; a scanned dim that is
            cut.
        ValueError: no leaves, or unequal sizes of dim 0.

    >>> import torch, shardwise as sw
    >>> w = sw.shard(torch.ones(3, 4), sw.make_mesh({"data": 2}), "layer n/data")
    >>> sw.scan(lambda c, w: (c + w, c.sum()), w.sum(0), w)
    (f32[4/data] local[2] on mesh(data=2), f32[3]{U:data} local[3] on mesh(data=2))
    """
    values, spec = optree.tree_flatten(xs, none_is_leaf=True)
    paths = [path for path, _ in items(xs)]
    length = _length(values, paths)
    slices = [_unbound(x, path) for x, path in zip(values, paths, strict=True)]

    def at_rest(number: int) -> Any:
        return spec.unflatten([s(number) for s in slices])

    if use is not None and can_run_ahead(values):
        run = _ahead(f, use, at_rest, length, recompute, offload)
    else:
        body = remat(f if use is None else _using(f, use), recompute=recompute, offload=offload)
        run = lambda carry, number: body(carry, at_rest(number))  # noqa: E731

    made: list[Any] = []
    shape: Any = None
    for number in range(length):
        result = run(carry, number)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(f"scan: the function returns (carry, y), got {type(result).__name__}")
        after, y = result
        _check(carry, after, number)
        carry = after
        leaves, mine = optree.tree_flatten(y, none_is_leaf=True)
        if shape is not None and mine != shape:
            raise ValueError(
                f"scan: y of iteration {number} is another tree than before: {mine}, {shape}"
            )
        shape = mine
        made.append(leaves)
    return carry, shape.unflatten([_stacked(column) for column in zip(*made, strict=True)])


def _using(f: Callable[[Any, Any], Any], use: Use) -> Callable[[Any, Any], Any]:
    return lambda carry, x: f(carry, use(x))


def _ahead(
    f: Callable[[Any, Any], Any],
    use: Use,
    at_rest: Callable[[int], Any],
    length: int,
    recompute: Recompute,
    offload: bool,
) -> Callable[[Any, int], Any]:
    """An iteration that first starts what the next one uses."""
    units = [Unit(use, lambda: at_rest(0), None)]

    def layer(carry: Any, _at_rest: Any, unit: Unit) -> Any:
        return f(carry, unit.taken())

    body = remat(layer, recompute=recompute, offload=offload)

    def run(carry: Any, number: int) -> Any:
        unit = units.pop()
        if number + 1 < length:
            units.append(Unit(use, lambda: at_rest(number + 1), unit))
        return body(carry, unit.at_rest, unit)

    return run


def _length(values: Sequence[Any], paths: Sequence[str]) -> int:
    """The size of dim 0 that all leaves share."""
    sizes: dict[int, str] = {}
    for x, path in zip(values, paths, strict=True):
        if not isinstance(x, ShardedTensor | Tensor):
            continue
        if not x.ndim:
            raise ValueError(
                f"scan: {path or 'xs'} is a scalar; each leaf of xs needs a dim to scan"
            )
        sizes.setdefault(x.shape[0], path)
    if len(sizes) != 1:
        found = ", ".join(f"{path or 'xs'} has {size}" for size, path in sizes.items())
        raise ValueError(
            f"scan: the leaves of xs need one size of dim 0: {found or 'there are no tensors'}"
        )
    (length,) = sizes
    if not length:
        raise ValueError("scan: dim 0 of xs is empty")
    return length


def _unbound(x: Any, path: str) -> Callable[[int], Any]:
    """The slices of a leaf by number; what is no tensor is the same in each."""
    if isinstance(x, Tensor):
        return x.unbind(0).__getitem__
    if not isinstance(x, ShardedTensor):
        return lambda _number: x
    axes = [a for a in x.layout.dims[0] if x.mesh.axes[a] > 1]
    if axes:
        whole = str(x.layout).replace("/".join(("_", *x.layout.dims[0])), "_", 1)
        raise LayoutError(
            word(
                f"the scanned dim 0 is cut by axis {axes[0]!r}, so no device has all layers"
                f"\ngather it: sw.reshard(x, {whole!r})"
                ", or run layers on their devices: sw.pipeline",
                op="scan",
                source=user_line(),
                operands=[(path or "xs", str(x))],
                mesh=x.mesh,
            ),
            op="scan",
            source=user_line(),
        )
    layout = x.layout
    for axis in layout.dims[0]:  # of one device: all layers are there
        layout = with_state(layout, axis, "reduced")
    entry = getattr(x, "_entry", None)
    if entry is not None:
        return entry()
    parts = [carrying_path(part, x) for part in unbind(reshard_one(x, layout), 0)]
    return parts.__getitem__


def _check(before: Any, after: Any, number: int) -> None:
    """Raise if the carry changes its type."""
    changed = drift(before, after)
    if changed or optree.tree_structure(before) != optree.tree_structure(after):
        raise LayoutError(
            word(
                f"the carry changes its type in iteration {number}"
                "\nconvert it at the end of the function: sw.reshard(carry, layout)",
                op="scan",
                source=user_line(),
                operands=[(path or "carry", f"{old} -> {new}") for path, old, new in changed],
            ),
            kind="drift",
            op="scan",
            source=user_line(),
        )


def _stacked(column: Sequence[Any]) -> Any:
    first = column[0]
    if first is None:
        return None
    if not isinstance(first, ShardedTensor | Tensor):
        raise TypeError(f"scan: y holds tensors or None, got {type(first).__name__}")
    return torch.stack(list(column))
