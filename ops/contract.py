"""Contractions: einsum, matmul and their kin, lowered to `matmul` on views.

`torch.einsum` copies operands whose contraction has several dims and so hides from autograd what it
saves; here two operands become one (batched) matmul of permuted, reshaped views. Linear in each
operand: a sum that is owed in one passes when the others are reduced or undifferentiated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layouts import notation
from ..layouts.convert import Save
from ..layouts.layout import LayoutLike
from ..layouts.sharded import ShardedTensor, install
from ..meshlib.errors import LayoutError, word
from ..meshlib.source import user_line
from .dispatch import Info, Local, Op, binary, export
from .given import check_operands
from .method import Method, arrive, check_method, multiply
from .pointwise import OPS
from .product import Letters, contract, summed
from .rules import Dims, Rule, make


def _local(info: Info) -> Local:
    return _one_dtype("einsum", info, _contraction(info))


def _one_dtype(name: str, info: Info, run: Callable[..., Any]) -> Local:
    """`run`; where its operands have several dtypes, torch's refusal in the library's words."""
    if len({kind.dtype for kind in info.kinds}) < 2:
        return run

    def tried(*operands: Any) -> Any:
        try:
            return run(*operands)
        except RuntimeError:
            raise TypeError(
                word(
                    "operands have several dtypes; convert one: x.to(y.dtype)",
                    op=name,
                    source=user_line(),
                    operands=[(f"operand {i}", str(k)) for i, k in enumerate(info.kinds)],
                )
            ) from None

    return tried


def _contraction(info: Info) -> Callable[..., Any]:
    """The local function of an einsum."""
    inputs = [tuple(dim[0] if dim else "" for dim in dims) for dims in info.rule.inputs]
    out = tuple(dim[0] for dim in info.rule.outputs[0])
    if any("" in letters for letters in inputs):
        return _broadcast_local(info, out)
    if len(inputs) == 1:
        return lambda x: _one(x, inputs[0], out)
    if len(inputs) == 2:
        first, second = inputs
        return lambda a, b: contract(a, b, first, second, out)

    def several(*operands: Tensor) -> Tensor:
        result, have = operands[0], inputs[0]
        for number in range(1, len(operands)):
            later = {c for letters in inputs[number + 1 :] for c in letters} | set(out)
            last = number == len(operands) - 1
            keep = (
                out
                if last
                else tuple(c for c in dict.fromkeys((*have, *inputs[number])) if c in later)
            )
            result = contract(result, operands[number], have, inputs[number], keep)
            have = keep
        return result

    return several


def _one(x: Tensor, have: Letters, out: Letters) -> Tensor:
    x, have = summed(x, have, out)
    return x.permute([have.index(c) for c in out])


def _broadcast_local(info: Info, out: Letters) -> Callable[..., Any]:
    """matmul with broadcast batch dims: torch's own."""
    return torch.matmul


def flops(info: Info) -> float:
    """Two per multiply-add, per device."""
    return 2.0 * math.prod(info.size(f) for f in info.rule.sizes)


@cache
def letters_of(pattern: str) -> tuple[tuple[Dims, ...], Dims]:
    """Factors of an einsum pattern: words apart, or single letters as in torch.

    Raises:
        ValueError: no "->", a result letter that no operand has, one letter twice in an operand.
    """
    if pattern.count("->") != 1:
        raise ValueError(f"einsum pattern {pattern!r}: write operands -> result")
    left, right = pattern.split("->")
    sides = [*left.split(","), right]
    spaced = any(" " in side.strip() for side in sides)
    parsed = []
    for side in sides:
        words = side.split() if spaced else list(side.strip())
        if any(not re.fullmatch(r"[A-Za-z_]\w*", w) for w in words):
            raise ValueError(f"einsum pattern {pattern!r}: cannot read {side.strip()!r}")
        if len(set(words)) != len(words):
            raise ValueError(
                f"einsum pattern {pattern!r}: a letter stands twice in {side.strip()!r}"
            )
        parsed.append(tuple((w,) for w in words))
    known = {f for dims in parsed[:-1] for f in dims}
    for factor in parsed[-1]:
        if factor not in known:
            raise ValueError(f"einsum pattern {pattern!r}: {factor[0]!r} is in no operand")
    return tuple(parsed[:-1]), parsed[-1]


def _einsum_rule(shapes: Sequence[Any], pattern: str) -> Rule:
    inputs, output = letters_of(pattern)
    if len(inputs) != len(shapes):
        raise ValueError(
            f"einsum pattern {pattern!r} has {len(inputs)} operands, got {len(shapes)}"
        )
    sizes: dict[str, int] = {}
    for number, (dims, shape) in enumerate(zip(inputs, shapes, strict=True)):
        if len(dims) != len(shape):
            raise ValueError(
                f"einsum pattern {pattern!r}: operand {number} has {len(shape)} dims, "
                f"not {len(dims)}"
            )
        for (factor,), size in zip(dims, shape, strict=True):
            if sizes.setdefault(factor, size) != size:
                raise ValueError(
                    f"einsum pattern {pattern!r}: {factor!r} has sizes {sizes[factor]} and {size}"
                )
    return Rule(inputs, (output,), sizes, linear=frozenset(range(len(shapes))))


EINSUM = Op("einsum", _einsum_rule, _local, flops=flops)


@export(torch.einsum)
def einsum(
    pattern: str,
    *operands: ShardedTensor,
    out: LayoutLike | None = None,
    over: Mapping[str, str] | None = None,
    method: Method = "direct",
    save: Save = "gathered",
    reduce_dtype: torch.dtype | None = None,
) -> ShardedTensor:
    """A contraction: what is in no result is summed.

    The notation is that of `torch.einsum` with names for letters, if you like, and less of it: the
    result is always written, no "...", no letter twice in an operand, and sizes are equal, a 1
    broadcasts with nothing.

    Args:
        pattern: "b s d, d f -> b s f"; single letters may stand together, as in torch.
        *operands: any number.
        out: the result's layout; it also settles a choice. Its names must not contradict the
            pattern's.
        over: mesh axis to the pattern's letter that the axis runs over, where the types leave a
            choice.
        method: of a product of two: "direct" gathers operands whole; "streamed" and "ring" move
            them panel by panel, where `ops/method.py` says that they can.
        save: of gathers: keep the whole for backward, or the "shard" and gather again.
        reduce_dtype: in which a sum that `out` reduces is taken, and that over panels, which is
            float32 at least.

    Returns:
        Cut on each axis as its letter; unreduced over axes that cut a summed letter.

    Raises:
        LayoutError: kind "choice", with fixes, where operands are cut on different letters by one
            axis.
        ValueError: sizes that do not fit, a bad pattern, an unknown `method` or `save`.
        TypeError: no operand is a ShardedTensor, or they have several dtypes.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"data": 2, "tensor": 2})
    >>> x = sw.shard(torch.ones(4, 8), mesh, "b/data k/tensor")
    >>> w = sw.shard(torch.ones(8, 6), mesh, "k/tensor n")
    >>> sw.ops.einsum("b k, k n -> b n", x, w)
    f32[4/data 6]{U:tensor} local[2 6] on mesh(data=2, tensor=2)
    """
    if operands and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    check_operands("einsum", operands)
    check_method("einsum", method)
    if save not in get_args(Save):
        known = ", ".join(map(repr, get_args(Save)))
        raise ValueError(f"einsum: unknown save {save!r} (known: {known})")
    if out is not None and not isinstance(out, Tensor | ShardedTensor):
        _names_agree(pattern, out)
    static = (" ".join(pattern.split()),)
    if method == "direct" and (out is None or (save == "gathered" and reduce_dtype is None)):
        return EINSUM(operands, static, out, over)
    options: dict[str, Any] = {"save": save, "reduce_dtype": reduce_dtype}
    product = multiply(EINSUM, operands, static, out, over, method=method, **options)
    return product if out is None else arrive(product, out, "einsum", **options)


def _names_agree(pattern: str, out: LayoutLike) -> None:
    """A name in `out` that the pattern puts at another position is a mistake, not a rename."""
    if not isinstance(out, str) or "..." in out:
        return
    output = [dim[0] for dim in letters_of(" ".join(pattern.split()))[1]]
    for position, name in enumerate(notation.parse(out).names):
        if name in output and output.index(name) != position:
            raise LayoutError(
                f"einsum {pattern!r}: out={out!r} has {name!r} at dim {position}, "
                f"the pattern at dim {output.index(name)}",
                kind="parse",
                op="einsum",
            )


def _matmul_rule(shapes: Sequence[Any], *_: Any) -> Rule:
    a, b = (len(s) for s in shapes)
    if not a or not b:
        raise ValueError("matmul needs operands with at least one dim")
    left = "k" if a == 1 else "... m k"
    right = "k" if b == 1 else "... k n"
    result = " ".join(["...", *(["m"] if a > 1 else []), *(["n"] if b > 1 else [])])
    if a <= 2 and b <= 2:
        left, right, result = (
            t.replace("... ", "").replace("...", "") for t in (left, right, result)
        )
    if shapes[0][-1] != shapes[1][-2 if b > 1 else 0]:
        raise ValueError(
            f"sizes {shapes[0][-1]} and {shapes[1][-2 if b > 1 else 0]} "
            "of the contracted dim do not fit"
        )
    if "..." in result and "..." not in left:
        left = "... " + left if a > 1 else left
    return make(f"{left}, {right} -> {result}", shapes, linear=(0, 1))


_MATMUL = Op(
    "matmul", _matmul_rule, lambda info: _one_dtype("matmul", info, torch.matmul), flops=flops
)
_matmul_fast = binary(_MATMUL, lambda x, y: _MATMUL((x, y)))


@export(
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.mv,
    torch.dot,
    methods=["matmul", "mm", "bmm", "mv", "dot"],
)
def matmul(
    x: Any,
    y: Any,
    *,
    out: LayoutLike | None = None,
    over: Mapping[str, str] | None = None,
) -> ShardedTensor:
    """`torch.matmul`, with broadcast batch dims. Factors: m, k, n and the batch's.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"tensor": 2})
    >>> x = sw.shard(torch.ones(4, 8), mesh, "b k")
    >>> x @ sw.shard(torch.ones(8, 6), mesh, "k n/tensor")
    f32[4 6/tensor] local[4 3] on mesh(tensor=2)
    """
    if out is None and over is None and type(x) is ShardedTensor and type(y) is ShardedTensor:
        return _matmul_fast(x, y)
    check_operands("matmul", (x, y))
    return _MATMUL((x, y), (), out, over)


install("__matmul__", _matmul_fast)
install("__rmatmul__", lambda x, y: matmul(y, x))


def _linear_rule(shapes: Sequence[Any], *_: Any) -> Rule:
    return make("... k, n k -> ... n", shapes, linear=(0, 1))


_LINEAR = Op("linear", _linear_rule, lambda info: _one_dtype("linear", info, F.linear), flops=flops)


@export(F.linear)
def linear(
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    out: LayoutLike | None = None,
    over: Mapping[str, str] | None = None,
) -> ShardedTensor:
    """`torch.nn.functional.linear`: weight is [n, k]. The bias joins before a sum is reduced.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"tensor": 2})
    >>> x = sw.shard(torch.ones(4, 8), mesh, "b k/tensor")
    >>> w = sw.shard(torch.ones(6, 8), mesh, "n k/tensor")
    >>> torch.nn.functional.linear(x, w, sw.shard(torch.ones(6), mesh)).full_tensor()[0, 0]
    tensor(9.)
    """
    check_operands("linear", (x, weight))
    if bias is None:
        return _LINEAR((x, weight), (), out, over)
    return OPS["add"]((_LINEAR.toward((x, weight), (), out, over), bias), (), out)


@export(torch.addmm, methods=["addmm"])
def addmm(bias: Any, x: Any, y: Any, *, beta: float = 1, alpha: float = 1) -> ShardedTensor:
    """`beta * bias + alpha * (x @ y)`."""
    product = matmul(x, y)
    product = product if alpha == 1 else product * alpha
    return product + (bias if beta == 1 else bias * beta)


@export(torch.baddbmm, methods=["baddbmm"])
def baddbmm(bias: Any, x: Any, y: Any, *, beta: float = 1, alpha: float = 1) -> ShardedTensor:
    """`beta * bias + alpha * (x @ y)`, batched."""
    return addmm(bias, x, y, beta=beta, alpha=alpha)


@export(torch.outer, methods=["outer"])
def outer(x: Any, y: Any, *, out: LayoutLike | None = None) -> ShardedTensor:
    """The outer product of two vectors."""
    return einsum("m, n -> m n", x, y, out=out)
