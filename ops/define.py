"""`op`: a rule string makes a local function an op of sharded tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..layouts.layout import LayoutLike
from .dispatch import Info, Local, Op
from .rules import make, parse


def op(
    rule: str,
    *,
    blocked: Iterable[str] = (),
    reduced: Mapping[str, str] | None = None,
    lookup: Iterable[str] = (),
    window: Mapping[str, int] | None = None,
    linear: Sequence[int] = (),
    name: str | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function of local tensors an op of ShardedTensors.

    Args:
        rule: operands -> results over factors, e.g. "m k, k n -> m n". A factor missing from the
            results is summed, unless `reduced` says otherwise.
        blocked: factors that the function needs whole; cut, they are a choice.
        reduced: factor to the operation that reduces it ("max"); cut, it is a choice too.
        lookup: factors that an index picks from; the function must give zeros for what it does not
            hold.
        window: factor to the border that it needs; treated as blocked.
        linear: operands in which the function is linear, the others fixed: a sum that is owed
            passes them.
        name: in records and errors; None is the function's own.

    Returns:
        A decorator. The op takes its operands in order, keyword arguments that are passed to the
        function (hashable), and `out=` and `over=`.

    Raises:
        ValueError: a rule that cannot be read, or names a factor that it has not.

    >>> import torch, shardwise as sw
    >>> @sw.op("b k, k -> b", linear=(0, 1))
    ... def dot(x, w):
    ...     return x @ w
    >>> mesh = sw.make_mesh({"tensor": 2})
    >>> x = sw.shard(torch.ones(3, 4), mesh, "b k/tensor")
    >>> dot(x, sw.shard(torch.ones(4), mesh, "k/tensor"))
    f32[3]{U:tensor} local[3] on mesh(tensor=2)
    """
    inputs, _ = parse(rule)
    known = {f for dims in inputs for dim in dims for f in dim}
    whole = {*blocked, *(reduced or {}), *(window or {})}
    for factor in {*whole, *lookup}:
        if factor not in known:
            raise ValueError(f"op {rule!r}: no operand has the factor {factor!r}")
    if any(not 0 <= i < len(inputs) for i in linear):
        raise ValueError(f"op {rule!r}: linear={tuple(linear)} names an operand that there is not")

    def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
        def local(info: Info) -> Local:
            keywords = dict(info.static)
            return (lambda *tensors: fn(*tensors, **keywords)) if keywords else fn

        made = Op(
            name or fn.__name__,
            lambda shapes, *_: make(rule, shapes, blocked=whole, lookup=lookup, linear=linear),
            local,
        )

        def call(
            *operands: Any,
            out: LayoutLike | None = None,
            over: Mapping[str, str] | None = None,
            **keywords: Any,
        ) -> Any:
            if len(operands) != len(inputs):
                raise TypeError(f"{made.name} takes {len(inputs)} operands, got {len(operands)}")
            return made(operands, tuple(sorted(keywords.items())), out, over)

        call.__name__ = call.__qualname__ = made.name
        call.__doc__ = fn.__doc__
        return call

    return decorate
