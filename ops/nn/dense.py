"""`dense`: products of activations and weights; a bias joins before their sum is reduced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...layouts.layout import LayoutLike
from ...layouts.sharded import ShardedTensor
from ...meshlib import record
from ..contract import EINSUM
from ..given import check_operands
from ..method import Method, arrive, check_method, multiply, multiply_all
from ..pointwise import OPS


def dense(
    x: ShardedTensor | Sequence[ShardedTensor],
    w: ShardedTensor | Sequence[ShardedTensor],
    b: Any = None,
    *,
    out: Any = None,
    over: Mapping[str, str] | None = None,
    method: Method = "direct",
    inputs: int | Sequence[int] = 1,
) -> Any:
    """`x`'s last dims contracted with `w`'s first, plus a bias.

    Args:
        x: [..., in]; or a tuple beside a tuple of weights: the products are added, before their
            sum is reduced, and give one result.
        w: [in, out...], any number of out dims; or a tuple of weights that share one `x`, which is
            converted or moved once for all of them, and give a tuple.
        b: [out...], or a tuple beside a tuple of results; joins before a sum is reduced.
        out: layout of the result, or a tuple of them.
        over: as in `einsum`.
        method: as in `einsum`. A ring does not scatter a sum that a bias or another product joins.
        inputs: number of contracted dims, 2 for [heads, head_dim, embed]; a tuple beside a tuple
            of `x`.

    Returns:
        [..., out...], or a tuple.

    Raises:
        LayoutError: kind "choice", where the types leave one that neither `out` nor `over` settles.
        ValueError: an unknown method, tuples of different lengths, `inputs` or a bias that does
            not fit.
        TypeError: neither `x` nor `w` is a ShardedTensor.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"tensor": 2})
    >>> x = sw.shard(torch.ones(2, 3, 4), mesh, "b s d/tensor")
    >>> sw.nn.dense(x, sw.shard(torch.ones(4, 6), mesh, "d/tensor f"), out="b s f")
    f32[2 3 6] local[2 3 6] on mesh(tensor=2)
    """
    check_method("dense", method)
    if record.LOGS:
        with record.acting("dense"):
            return _dense(x, w, b, out, over, method, inputs)
    return _dense(x, w, b, out, over, method, inputs)


def _dense(
    x: Any, w: Any, b: Any, out: Any, over: Mapping[str, str] | None, method: Method, inputs: Any
) -> Any:
    if isinstance(x, tuple | list):
        return _added(x, w, b, out, over, method, inputs)
    if not isinstance(inputs, int):
        raise TypeError("dense: a tuple of inputs needs a tuple of x")
    for each in w if isinstance(w, tuple | list) else (w,):
        check_operands("dense", (x, each))
    if not isinstance(w, tuple | list):
        _check_bias(b, w, inputs)
        static = _static(x, w, inputs)
        if method == "direct" and b is None:
            return EINSUM((x, w), static, out, over)
        free = b is None
        product = multiply(EINSUM, (x, w), static, out, over, method=method, scatter=free)
        return _finished(product, b, out)
    count = len(w)
    biases, outs = _each(b, count, "b"), _each(out, count, "out")
    for bias, each in zip(biases, w, strict=True):
        _check_bias(bias, each, inputs)
    products = multiply_all(
        EINSUM,
        x,
        w,
        [_static(x, each, inputs) for each in w],
        outs,
        over,
        method=method,
        scatter=[bias is None for bias in biases],
    )
    return tuple(map(_finished, products, biases, outs))


def _added(
    xs: Sequence[ShardedTensor],
    w: Any,
    b: Any,
    out: LayoutLike | None,
    over: Mapping[str, str] | None,
    method: Method,
    inputs: int | Sequence[int],
) -> ShardedTensor:
    """The sum of several products, owed until all have joined it."""
    if not isinstance(w, tuple | list) or len(w) != len(xs):
        raise ValueError(f"dense: {len(xs)} tensors x need a tuple of as many weights")
    total = None
    for x, each, dims in zip(xs, w, _each(inputs, len(xs), "inputs"), strict=True):
        check_operands("dense", (x, each))
        static = _static(x, each, dims)
        _check_bias(b, each, dims)
        product = multiply(EINSUM, (x, each), static, out, over, method=method, scatter=False)
        total = product if total is None else OPS["add"]((total, product))
    assert total is not None
    return _finished(total, b, out)


def _check_bias(b: Any, w: Any, inputs: int) -> None:
    """Raise unless a bias has the weight's out dims: a broadcast one is another thing."""
    if b is not None and tuple(getattr(b, "shape", ())) != tuple(w.shape[inputs:]):
        raise ValueError(
            f"dense: b {list(getattr(b, 'shape', ()))} must be {list(w.shape[inputs:])}, the out "
            f"dims of w {list(w.shape)}"
        )


def _finished(product: ShardedTensor, b: Any, out: LayoutLike | None) -> ShardedTensor:
    """The product with its bias, in the layout asked for."""
    if b is not None:
        return OPS["add"]((product, b), (), out)
    return product if out is None else arrive(product, out, "dense")


def _each(value: Any, count: int, what: str) -> Sequence[Any]:
    """One per product: a tuple as it is, anything else for all."""
    if not isinstance(value, tuple | list):
        return (value,) * count
    if len(value) != count:
        raise ValueError(f"dense: {len(value)} of {what} for {count} products")
    return value


def _static(x: ShardedTensor, w: ShardedTensor, inputs: int) -> tuple[str]:
    """The einsum pattern."""
    if not 0 < inputs <= min(x.ndim, w.ndim):
        raise ValueError(
            f"dense: inputs={inputs} must be at least 1 and no more than the dims of x "
            f"{list(x.shape)} and w {list(w.shape)}"
        )
    batch = [f"i{n}" for n in range(x.ndim - inputs)]
    inner = [f"k{n}" for n in range(inputs)]
    outer = [f"o{n}" for n in range(w.ndim - inputs)]
    return (f"{' '.join(batch + inner)}, {' '.join(inner + outer)} -> {' '.join(batch + outer)}",)
