"""Contractions: einsum, matmul and their kin, lowered to `matmul` on views.

`torch.einsum` copies operands whose contraction has several dims and so hides from autograd what it
saves; here two operands become one (batched) matmul of permuted, reshaped views. Linear in each
operand: a sum that is owed in one passes when the others are reduced or undifferentiated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layouts import notation
from ..layouts.convert import Save
from ..layouts.layout import LayoutLike
from ..layouts.reshard import reshard_one
from ..layouts.sharded import ShardedTensor, install
from ..meshlib.errors import LayoutError
from .dispatch import Info, Local, Op, binary, export
from .planner import decide
from .pointwise import OPS
from .rules import Dims, Rule, make

Letters = tuple[str, ...]
Method = Literal["direct"]


@cache
def pair(a: Letters, b: Letters, out: Letters) -> tuple[Letters, Letters, Letters, Letters]:
    """Letters of a two-operand contraction: batch, only in a, only in b, contracted."""
    batch = tuple(x for x in out if x in a and x in b)
    left = tuple(x for x in out if x in a and x not in b)
    right = tuple(x for x in out if x in b and x not in a)
    inner = tuple(x for x in a if x in b and x not in out)
    return batch, left, right, inner


def contract(a: Tensor, b: Tensor, da: Letters, db: Letters, out: Letters) -> Tensor:
    """One contraction of two local tensors as a matmul of views; letters name the dims."""
    a, da = _summed(a, da, (*db, *out))
    b, db = _summed(b, db, (*da, *out))
    batch, left, right, inner = pair(da, db, out)
    size = dict(zip(da, a.shape, strict=True)) | dict(zip(db, b.shape, strict=True))

    def flat(x: Tensor, have: Letters, *groups: Letters) -> Tensor:
        order = [have.index(c) for group in groups for c in group]
        x = x.permute(order) if order != sorted(order) else x
        return x.reshape(
            [size[c] for c in groups[0]] + [math.prod(size[c] for c in g) for g in groups[1:]]
        )

    if not inner and not left and not right:
        result = flat(a, da, batch) * flat(b, db, batch)
        made = batch
    elif (
        not batch and len(right) <= 1 and len(inner) == 1 and da[-1] == inner[0] and left == da[:-1]
    ):
        # x[..., k] @ w[k, n]: matmul folds the leading dims itself
        w = b if db == (*inner, *right) else b.permute([db.index(c) for c in (*inner, *right)])
        result = a @ w
        made = (*left, *right)
    else:
        product = flat(a, da, batch, left, inner) @ flat(b, db, batch, inner, right)
        made = (*batch, *left, *right)
        result = product.reshape([size[c] for c in made])
    if made != out:
        result = result.permute([made.index(c) for c in out])
    return result


def _summed(x: Tensor, have: Letters, used: Letters) -> tuple[Tensor, Letters]:
    """Sum out the letters that nothing else has."""
    alone = [i for i, c in enumerate(have) if c not in used]
    if not alone:
        return x, have
    return x.sum(alone), tuple(c for c in have if c in used)


def _local(info: Info) -> Local:
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
    x, have = _summed(x, have, out)
    return x.permute([have.index(c) for c in out])


def _broadcast_local(info: Info, out: Letters) -> Local:
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


_EINSUM = Op("einsum", _einsum_rule, _local, flops=flops)


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
    """A contraction, as `torch.einsum`: what is in no result is summed.

    Args:
        pattern: "b s d, d f -> b s f"; single letters may stand together, as in torch.
        *operands: any number.
        out: the result's layout; it also settles a choice. Its names must not contradict the
            pattern's.
        over: mesh axis to the pattern's letter that the axis runs over, where the types leave a
            choice.
        method: "direct".
        save: of gathers: keep the whole for backward, or the "shard" and gather again.
        reduce_dtype: in which a sum that `out` reduces is taken.

    Returns:
        Cut on each axis as its letter; unreduced over axes that cut a summed letter.

    Raises:
        LayoutError: kind "choice", with fixes, where operands are cut on different letters by one
            axis.
        ValueError: sizes that do not fit, a bad pattern.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"data": 2, "tensor": 2})
    >>> x = sw.shard(torch.ones(4, 8), mesh, "b/data k/tensor")
    >>> w = sw.shard(torch.ones(8, 6), mesh, "k/tensor n")
    >>> sw.ops.einsum("b k, k n -> b n", x, w)
    f32[4/data 6]{U:tensor} local[2 6] on mesh(data=2, tensor=2)
    """
    if operands and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if method != "direct":
        raise ValueError(f"einsum: unknown method {method!r} (known: 'direct')")
    if out is not None and not isinstance(out, Tensor | ShardedTensor):
        _names_agree(pattern, out)
    pattern = " ".join(pattern.split())
    if out is not None and (save != "gathered" or reduce_dtype is not None):
        return _converted_after(pattern, operands, out, over, save, reduce_dtype)
    return _EINSUM(operands, (pattern,), out, over)


def _converted_after(
    pattern: str,
    operands: tuple[ShardedTensor, ...],
    out: LayoutLike,
    over: Mapping[str, str] | None,
    save: Save,
    reduce_dtype: torch.dtype | None,
) -> ShardedTensor:
    """With options for the conversions: the planner's decision, carried out by `reshard`."""
    rule = _einsum_rule([x.shape for x in operands], pattern)
    kinds = [x._type for x in operands]
    grads = [k.grad and torch.is_grad_enabled() for k in kinds]
    decision = decide(rule, kinds, grads, over=over, out=out)
    moved = [
        reshard_one(x, target, save=save, reduce_dtype=reduce_dtype)
        for x, target in zip(operands, decision.targets, strict=True)
    ]
    return reshard_one(_EINSUM(moved, (pattern,)), out, save=save, reduce_dtype=reduce_dtype)


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


_MATMUL = Op("matmul", _matmul_rule, lambda info: torch.matmul, flops=flops)
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
    return _MATMUL((x, y), (), out, over)


install("__matmul__", _matmul_fast)
install("__rmatmul__", lambda x, y: matmul(y, x))


def _linear_rule(shapes: Sequence[Any], *_: Any) -> Rule:
    return make("... k, n k -> ... n", shapes, linear=(0, 1))


_LINEAR = Op("linear", _linear_rule, lambda _: F.linear, flops=flops)


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
    if bias is None:
        return _LINEAR((x, weight), (), out, over)
    product = _LINEAR((x, weight), (), None, over) if out is None else _joined(x, weight, over, out)
    return OPS["add"]((product, bias), (), out)


def _joined(x: Any, weight: Any, over: Mapping[str, str] | None, out: LayoutLike) -> ShardedTensor:
    """The product with sums still owed: the bias is added once and the sum is moved once."""
    try:
        return _LINEAR((x, weight), (), None, over)
    except LayoutError:
        return _LINEAR((x, weight), (), out, over)


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
