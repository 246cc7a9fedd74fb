"""Types without memory: `eval_shape`, and `check_stable`, which holds a step to its state."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import optree

from ...layouts.layout import replicated
from ...layouts.sharded import ShardedTensor, write_type
from ...layouts.tree import items
from ...meshlib import record
from ...meshlib.errors import LayoutError, word
from ...meshlib.source import user_line
from ..plan import abstract


@contextmanager
def _unrecorded() -> Iterator[None]:
    """What is only evaluated abstractly does not run, so open records must not see it."""
    held = record.LOGS[:]
    record.LOGS.clear()
    try:
        yield
    finally:
        record.LOGS[:] = held


def eval_shape(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The types of what `f` returns, without running it on data.

    Args:
        f: a function of trees of ShardedTensors; it must not read values.
        *args: its arguments, on any mesh: only their types are used.
        **kwargs: passed on.

    Returns:
        The result's tree with ShardedTensors that hold no data, on the abstract twin of the
        arguments' mesh: the same axes, no devices.

    >>> import shardwise as sw
    >>> mesh = sw.make_mesh({"data": 512}, transport="abstract")
    >>> x = sw.zeros((4096, 8), mesh, "b/data d")
    >>> sw.eval_shape(lambda x: sw.ops.einsum("b i, b j -> i j", x, x), x)
    f32[8 8]{U:data} local[8 8] on mesh(data=512)
    """
    args, kwargs = abstract(args), abstract(kwargs)
    with _unrecorded():
        return f(*args, **kwargs)


def check_stable(f: Callable[..., Any], *args: Any) -> None:
    """Raise unless `f` returns its state in the layouts, shapes and dtypes it was given.

    Args:
        f: a step. It returns a new state of the structure of its first argument; or a tuple whose
            leading elements are new values of its leading arguments: `step(params, state, batch)`
            that returns (params, state, loss) is checked in its first two.
        *args: its arguments; nothing runs on their data.

    Raises:
        LayoutError: kind "drift", with every path that changes, before and after.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"data": 2})
    >>> w = sw.shard(torch.ones(4), mesh)
    >>> sw.check_stable(lambda w: w * 2, w)
    >>> sw.check_stable(lambda w: sw.reshard(w, "n/data"), w)
    Traceback (most recent call last):
    ...
    shardwise.meshlib.errors.LayoutError: check_stable: the state changes its type in 1 place
      w  f32[4] -> f32[4/data]
    """
    if not args:
        raise TypeError("check_stable: the step needs its state as first argument")
    result = eval_shape(f, *args)
    found = []
    for name, before, after in _pairs(f, args, result):
        found += drift(before, after, name)
    if found:
        raise LayoutError(
            word(
                f"the state changes its type in {len(found)} place{'s' * (len(found) > 1)}",
                op="check_stable",
                operands=[(path, f"{old} -> {new}") for path, old, new in found],
            ),
            kind="drift",
            op="check_stable",
            source=user_line(),
        )


def _pairs(
    f: Callable[..., Any], args: tuple[Any, ...], result: Any
) -> Iterator[tuple[str, Any, Any]]:
    """Name, state given, state returned."""
    names = _names(f, len(args))
    first = optree.tree_structure(args[0], none_is_leaf=True)
    if optree.tree_structure(result, none_is_leaf=True) == first or not isinstance(result, tuple):
        yield names[0], args[0], result
        return
    for number, (name, before, after) in enumerate(zip(names, args, result, strict=False)):
        same = optree.tree_structure(before, none_is_leaf=True) == optree.tree_structure(
            after, none_is_leaf=True
        )
        if number and (not same or _is_report(before, after)):
            return
        yield name, before, after


def _is_report(before: Any, after: Any) -> bool:
    """A scalar that stands where a batch stood: the loss, not a state."""
    return isinstance(after, ShardedTensor) and after.ndim == 0 and getattr(before, "ndim", 0) > 0


def _names(f: Callable[..., Any], count: int) -> list[str]:
    try:
        names = list(inspect.signature(f).parameters)
    except (TypeError, ValueError):
        names = []
    return [*names, *(f"argument {i}" for i in range(len(names), count))][:count]


def drift(before: Any, after: Any, name: str = "") -> list[tuple[str, str, str]]:
    """Paths of two trees whose layout, shape or dtype differ, with both types."""
    old, new = dict(items(before)), dict(items(after))
    found = []
    for path in dict.fromkeys([*old, *new]):
        a, b = (described(t[path]) if path in t else "nothing" for t in (old, new))
        if a != b:
            found.append((".".join(p for p in (name, path) if p), a, b))
    return found


def described(x: Any) -> str:
    """A leaf's type for comparison: dtype, sizes, axes and states; for other values their class."""
    if isinstance(x, ShardedTensor):
        return str(x)
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"plain {write_type(x.dtype, x.shape, replicated(len(x.shape)))}"
    return type(x).__name__
