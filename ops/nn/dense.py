"""`dense`: the product of activations and weights, with a bias that joins before a sum is reduced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ...layouts.reshard import reshard_one
from ...layouts.sharded import ShardedTensor
from ..contract import einsum

_LETTERS = [f"o{i}" for i in range(8)]


def dense(
    x: ShardedTensor,
    w: ShardedTensor | tuple[ShardedTensor, ...] | list[ShardedTensor],
    b: Any = None,
    *,
    out: Any = None,
    over: Mapping[str, str] | None = None,
    method: Literal["direct"] = "direct",
    inputs: int = 1,
) -> Any:
    """`x`'s last dims contracted with `w`'s first, plus a bias.

    Args:
        x: [..., in].
        w: [in, out...], any number of out dims; or a tuple of weights that share `x`, which is
            converted once.
        b: [out...], or a tuple beside a tuple of weights; joins before a sum is reduced.
        out: layout of the result, or a tuple of them.
        over: as in `einsum`.
        method: "direct".
        inputs: number of contracted dims, 2 for [heads, head_dim, embed].

    Returns:
        [..., out...], or a tuple.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"tensor": 2})
    >>> x = sw.shard(torch.ones(2, 3, 4), mesh, "b s d/tensor")
    >>> sw.nn.dense(x, sw.shard(torch.ones(4, 6), mesh, "d/tensor f"), out="b s f")
    f32[2 3 6] local[2 3 6] on mesh(tensor=2)
    """
    if isinstance(w, tuple | list):
        count = len(w)
        biases = b if isinstance(b, tuple | list) else (b,) * count
        outs = out if isinstance(out, tuple | list) else (out,) * count
        return tuple(
            dense(x, each, bias, out=to, over=over, method=method, inputs=inputs)
            for each, bias, to in zip(w, biases, outs, strict=True)
        )
    if method != "direct":
        raise ValueError(f"dense: unknown method {method!r} (known: 'direct')")
    batch = [f"i{n}" for n in range(x.ndim - inputs)]
    inner = [f"k{n}" for n in range(inputs)]
    outer = _LETTERS[: w.ndim - inputs]
    pattern = f"{' '.join(batch + inner)}, {' '.join(inner + outer)} -> {' '.join(batch + outer)}"
    if b is None:
        return einsum(pattern, x, w, out=out, over=over)
    try_first = (
        einsum(pattern, x, w, over=over) if out is None or _is_settled(x, w, inputs) else None
    )
    product = try_first if try_first is not None else einsum(pattern, x, w, out=out, over=over)
    total = product + b
    return total if out is None else reshard_one(total, out)


def _is_settled(x: ShardedTensor, w: ShardedTensor, inputs: int) -> bool:
    """Whether the types alone decide the product: no axis cuts different factors of x and w."""
    ahead = x.ndim - inputs
    for axis, state in w.layout.axes.items():
        other = x.layout.state(axis)
        if isinstance(state, int) and isinstance(other, int) and state != other - ahead:
            return False
    return True
