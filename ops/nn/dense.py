"""`dense`: products of activations and weights; a bias joins before their sum is reduced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from ...layouts.layout import LayoutLike
from ...layouts.sharded import ShardedTensor
from ...meshlib import record
from ..contract import EINSUM
from ..dispatch import Op
from ..given import check_operands
from ..method import Method, arrive, check_method, multiply, multiply_all
from ..pointwise import OPS
from .fp8 import FP8, multiply_together

Accuracy = Literal["default", "fp8"]


def dense(
    x: ShardedTensor | Sequence[ShardedTensor],
    w: ShardedTensor | Sequence[ShardedTensor],
    b: Any = None,
    *,
    out: Any = None,
    over: Mapping[str, str] | None = None,
    method: Method = "direct",
    precision: Accuracy = "default",
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
        precision: "fp8" multiplies in 8-bit floating point, forward (e4m3) and backward (e5m2
            gradients), what is not float64: to some 4 % of a result's size, root mean square,
            twice as fast where all sizes are in the thousands, and a byte is kept for an element
            of `x`. Each device scales its own blocks, by powers of two, so that values depend on
            the mesh only in elements some 2^-14 of the block's largest. A block with a size that
            is no multiple of 16 is multiplied as by default. Second derivatives raise.
        inputs: number of contracted dims, 2 for [heads, head_dim, embed]; a tuple beside a tuple
            of `x`.

    Returns:
        [..., out...], or a tuple.

    Raises:
        LayoutError: kind "choice", where the types leave one that neither `out` nor `over` settles.
        ValueError: an unknown method or precision, fp8 with another method than "direct", tuples
            of different lengths, `inputs` or a bias that does not fit.
        TypeError: neither `x` nor `w` is a ShardedTensor.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"tensor": 2})
    >>> x = sw.shard(torch.ones(2, 3, 4), mesh, "b s d/tensor")
    >>> sw.nn.dense(x, sw.shard(torch.ones(4, 6), mesh, "d/tensor f"), out="b s f")
    f32[2 3 6] local[2 3 6] on mesh(tensor=2)
    """
    check_method("dense", method)
    if precision != "default":
        _check_precision(precision, method)
    if record.LOGS:
        with record.acting("dense"):
            return _dense(x, w, b, out, over, method, precision, inputs)
    return _dense(x, w, b, out, over, method, precision, inputs)


def _check_precision(precision: str, method: str) -> None:
    if precision not in get_args(Accuracy):
        known = ", ".join(map(repr, get_args(Accuracy)))
        raise ValueError(f"dense: unknown precision {precision!r} (known: {known})")
    if method != "direct":
        raise ValueError(f"dense: precision 'fp8' needs method 'direct', not {method!r}")


def _dense(
    x: Any,
    w: Any,
    b: Any,
    out: Any,
    over: Mapping[str, str] | None,
    method: Method,
    precision: Accuracy,
    inputs: Any,
) -> Any:
    op = FP8 if precision == "fp8" else EINSUM
    if isinstance(x, tuple | list):
        return _added(op, x, w, b, out, over, method, inputs)
    if not isinstance(inputs, int):
        raise TypeError("dense: a tuple of inputs needs a tuple of x")
    for each in w if isinstance(w, tuple | list) else (w,):
        check_operands("dense", (x, each))
    if not isinstance(w, tuple | list):
        _check_bias(b, w, inputs)
        static = _static(x, w, inputs)
        if method == "direct" and b is None:
            return op((x, w), static, out, over)
        free = b is None
        product = multiply(op, (x, w), static, out, over, method=method, scatter=free)
        return _finished(product, b, out)
    count = len(w)
    biases, outs = _each(b, count, "b"), _each(out, count, "out")
    for bias, each in zip(biases, w, strict=True):
        _check_bias(bias, each, inputs)
    statics = [_static(x, each, inputs) for each in w]
    if op is FP8:
        products = multiply_together(x, w, statics, outs, over, inputs)
    else:
        scatter = [bias is None for bias in biases]
        products = multiply_all(op, x, w, statics, outs, over, method=method, scatter=scatter)
    return tuple(map(_finished, products, biases, outs))


def _added(
    op: Op,
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
        product = multiply(op, (x, each), static, out, over, method=method, scatter=False)
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
