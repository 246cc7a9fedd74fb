"""Losses. A mean divides by the GLOBAL count, so value and gradient are those of one device.

An elementwise loss is torch's own function without reduction, and one sum or mean: in any layout,
and what is owed stays owed. The reduction never sees a local count: torch's DTensor, which does,
gets gradients wrong by the number of devices. `cross_entropy` over cut classes exchanges statistics
and never gathers logits.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layouts.layout import LayoutLike
from ..layouts.place import constant
from ..layouts.reshard import reshard_one
from ..layouts.sharded import ShardedTensor
from .broadcast import squeeze, unsqueeze
from .dispatch import Info, Local, Op, export
from .index import gather
from .meet import leads, settled, widened
from .pointwise import clamp, to, where
from .reduce import mean, sum
from .rules import Dim, Dims, Rule, make, pointwise, sized
from .shape import reshape
from .softmax import logsumexp

Over = Mapping[str, str] | None
REDUCTIONS = ("none", "mean", "sum")
TENSORS = ("input", "target", "input1", "input2", "weight", "pos_weight", "var")


def _check_reduction(name: str, reduction: str, *old: Any, more: tuple[str, ...] = ()) -> None:
    """Raise unless a reduction is known and torch's old spellings of it are unused."""
    if any(o is not None for o in old):
        raise TypeError(f"{name}: size_average and reduce are torch's old spelling; use reduction=")
    if reduction not in (*REDUCTIONS, *more):
        known = ", ".join(map(repr, (*REDUCTIONS, *more)))
        raise ValueError(f"{name}: reduction is {reduction!r} (known: {known})")


def _reduced(each: ShardedTensor, reduction: str, count: Any = None) -> ShardedTensor:
    """The elements, their sum, or their mean: over their global number, or over `count`."""
    if reduction == "none":
        return each
    if reduction == "mean" and count is None:
        return mean(each)
    return sum(each) if reduction == "sum" else sum(each) / count


def _asked(x: ShardedTensor, out: LayoutLike | None) -> ShardedTensor:
    return x if out is None else reshard_one(x, out)


def _gaussian(
    input: Tensor,
    target: Tensor,
    var: Any,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "none",
) -> Tensor:
    """`F.gaussian_nll_loss` without its check of values, which a meta tensor has not."""
    spread = torch.as_tensor(var, dtype=input.dtype, device=input.device)
    spread = (
        spread + (spread.clamp(min=eps) - spread).detach()
    )  # the clamp has no slope, as in torch
    loss = 0.5 * (torch.log(spread) + (input - target) ** 2 / spread)
    return loss + 0.5 * math.log(2 * math.pi) if full else loss


# Elementwise losses: what is run, and whether a mean divides by the sum of the weights.
# (torch 2.13 drops the weight of `F.l1_loss` before any class sees it; `ops.l1_loss` has it.)
ELEMENTWISE: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "mse_loss": (F.mse_loss, True),
    "l1_loss": (F.l1_loss, True),
    "smooth_l1_loss": (F.smooth_l1_loss, False),
    "huber_loss": (F.huber_loss, False),
    "binary_cross_entropy": (F.binary_cross_entropy, False),
    "binary_cross_entropy_with_logits": (F.binary_cross_entropy_with_logits, False),
    "kl_div": (F.kl_div, False),
    "soft_margin_loss": (F.soft_margin_loss, False),
    "hinge_embedding_loss": (F.hinge_embedding_loss, False),
    "poisson_nll_loss": (F.poisson_nll_loss, False),
    "gaussian_nll_loss": (_gaussian, False),
    "margin_ranking_loss": (F.margin_ranking_loss, False),
}


def _elementwise_local(function: Callable[..., Tensor]) -> Callable[[Info], Local]:
    def local(info: Info) -> Local:
        names, keywords = info.static[0], dict(info.static[1])

        def loss(*tensors: Any) -> Tensor:
            return function(**dict(zip(names, tensors, strict=True)), reduction="none", **keywords)

        return loss

    return local


def _define(name: str) -> Callable[..., ShardedTensor]:
    function, by_weight = ELEMENTWISE[name]
    theirs = getattr(F, name)
    signature = inspect.signature(theirs)
    more = ("batchmean",) if name == "kl_div" else ()
    op = Op(
        name,
        lambda shapes, *_: make(pointwise([len(s) for s in shapes]), shapes),
        _elementwise_local(function),
    )

    def call(
        *args: Any, out: LayoutLike | None = None, over: Over = None, **keywords: Any
    ) -> ShardedTensor:
        bound = signature.bind(*args, **keywords)
        bound.apply_defaults()
        given = dict(bound.arguments)
        reduction = given.pop("reduction")
        _check_reduction(
            name, reduction, given.pop("size_average", None), given.pop("reduce", None), more=more
        )
        tensors = {k: v for k, v in given.items() if k in TENSORS and v is not None}
        rest = {k: v for k, v in given.items() if k not in TENSORS}
        var = tensors.get("var")
        if isinstance(var, ShardedTensor | Tensor) and var.ndim == tensors["input"].ndim - 1:
            tensors["var"] = var.unsqueeze(-1)  # one variance per row
        each = op(
            tuple(tensors.values()), (tuple(tensors), tuple(sorted(rest.items()))), None, over
        )
        count = None
        if by_weight and "weight" in tensors and reduction == "mean":
            weight = tensors["weight"]
            count = settled(sum(weight)) if isinstance(weight, ShardedTensor) else weight.sum()
        if reduction == "batchmean":
            count = each.shape[0]
        return _asked(_reduced(each, reduction, count), out)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"`torch.nn.functional.{name}` in any layout; the mean is over the GLOBAL count."
    return export(theirs)(call)


for _name in ELEMENTWISE:
    globals()[_name] = _define(_name)


@export(F.cosine_embedding_loss)
def cosine_embedding_loss(
    input1: Any,
    input2: Any,
    target: Any,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    out: LayoutLike | None = None,
) -> ShardedTensor:
    """1 - cos where the target is 1, max(0, cos - margin) where it is -1, of rows [..., width].

    Cost: where an axis cuts the width, three all_reduces of the targets' size; backward none.
    """
    _check_reduction("cosine_embedding_loss", reduction, size_average, reduce)
    tiny = 1e-12  # torch's own
    first: Any = settled(sum(input1 * input1, -1))
    second: Any = settled(sum(input2 * input2, -1))
    product: Any = settled(sum(input1 * input2, -1))
    cosine = product / ((first + tiny) * (second + tiny)).sqrt()
    near: Any = where(target == 1, 1 - cosine, 0)
    far: Any = where(target == -1, clamp(cosine - margin, 0), 0)
    return _asked(_reduced(near + far, reduction), out)


# Classes: logits [batch, classes, ...] or [classes].


def _operands(*tensors: Any) -> list[Any]:
    """Plain tensors as constants beside the sharded ones; None stays."""
    like = next(t for t in tensors if isinstance(t, ShardedTensor))
    return [constant(t, like) if isinstance(t, Tensor) else t for t in tensors]


def _share(target: Any, weight: Any, ignore_index: int) -> tuple[Any, Any, Any]:
    """Which targets count, the class of each (0 where it does not), and its weight, or None."""
    counts = target != ignore_index
    classes = where(counts, target, 0)
    return counts, classes, None if weight is None else settled(weight[classes])


def _count(counts: ShardedTensor, share: ShardedTensor | None) -> ShardedTensor:
    """What a mean divides by: the global weight of the targets that count."""
    if share is None:
        return sum(counts)
    return settled(sum(where(counts, share, 0)))


def _at(x: ShardedTensor, dim: int, classes: ShardedTensor) -> Any:
    """The entry of each target's class; a sum over the axes that cut the classes."""
    return squeeze(gather(x, dim, unsqueeze(classes, dim)), dim)


@export(F.nll_loss)
def nll_loss(
    input: ShardedTensor,
    target: Any,
    weight: Any = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    out: LayoutLike | None = None,
) -> ShardedTensor:
    """Minus the log-probability at the target: classes in dim 1, or 0 of one dim, which may be cut.

    Args:
        input: log-probabilities [batch, classes, ...] or [classes].
        target: class numbers [batch, ...].
        weight: per class.
        size_average: must be None.
        ignore_index: class number that does not count.
        reduce: must be None.
        reduction: "mean" is over the global weight of the targets that count.
        out: the result's layout.

    Cost: nothing moves but the count (and the weights, where cut); over cut classes the result is a
    sum owed.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.tensor([[-1.0, -2.0]]), sw.make_mesh({"tensor": 2}), "b v/tensor")
    >>> torch.nn.functional.nll_loss(x, torch.tensor([1])).full_tensor()
    tensor(2.)
    """
    _check_reduction("nll_loss", reduction, size_average, reduce)
    input, target, weight = _operands(input, target, weight)
    counts, classes, share = _share(
        target, None if weight is None else weight.detach(), ignore_index
    )
    each = -_at(input, 0 if input.ndim == 1 else 1, classes)
    each = where(counts, each if share is None else each * share, 0)
    count = _count(counts, share) if reduction == "mean" else None
    return _asked(_reduced(each, reduction, count), out)


def _rule(shapes: Sequence[Any], ignore: int, smoothing: float) -> Rule:
    x, target = shapes[:2]
    names: list[Dim] = (
        [("v",)] if len(x) == 1 else [("n",), ("v",), *((f"d{i}",) for i in range(len(x) - 2))]
    )
    kept: Dims = tuple(n for n in names if n != ("v",))
    whole = len(target) == len(x)
    if len(target) != len(x if whole else kept):
        raise ValueError(f"logits {tuple(x)} and targets {tuple(target)} do not fit")
    inputs = (tuple(names), tuple(names) if whole else kept, *((("v",),) for _ in shapes[2:]))
    return sized(Rule(inputs, (kept,), blocked=frozenset("v")), shapes)


def _local(info: Info) -> Local:
    ignore, smoothing = info.static

    def loss(x: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        return F.cross_entropy(
            x, target, weight, ignore_index=ignore, label_smoothing=smoothing, reduction="none"
        )

    return loss


def _cut(operands: Sequence[Any], static: tuple[Any, ...]) -> ShardedTensor:
    """logsumexp, whose backward moves nothing, less one sum of what the classes' devices hold."""
    x, target, *rest = operands
    ignore, smoothing = static
    dtype, dim = x.dtype, 0 if x.ndim == 1 else 1
    x, width = widened(x), x.shape[dim]
    weight = rest[0] if rest else None
    along = (
        None if weight is None else reshape(weight, [-1 if d == dim else 1 for d in range(x.ndim)])
    )
    total = logsumexp(x, dim)
    if target.ndim == x.ndim:
        shares = target * (1 - smoothing) + smoothing / width if smoothing else target
        shares = shares if along is None else shares * along
        each = total * settled(sum(shares, dim)) - settled(sum(shares * x, dim))
        return to(each, dtype)
    counts, classes, share = _share(target, weight, ignore)
    owed = _at(x, dim, classes)
    owed = owed if share is None else owed * share
    if smoothing:
        spread = smoothing / width
        owed = owed * (1 - smoothing) + sum(x if along is None else x * along, dim) * spread
        weights = width if weight is None else settled(sum(weight))
        share = (1 if share is None else share) * (1 - smoothing) + weights * spread
    each = (total if share is None else total * share) - settled(owed)
    return to(where(counts, each, 0), dtype)


# With the protocol, and without: uncut logits beside cut weights or probabilities are a choice.
_CROSS = (Op("cross_entropy", _rule, _local), Op("cross_entropy", _rule, _local, protocol=_cut))


@export(F.cross_entropy)
def cross_entropy(
    input: ShardedTensor,
    target: Any,
    weight: Any = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    out: LayoutLike | None = None,
    over: Over = None,
) -> ShardedTensor:
    """Cross-entropy of logits, which are never gathered: classes may be cut.

    Args:
        input: logits [batch, classes, ...] or [classes].
        target: class numbers [batch, ...], or probabilities of the logits' shape.
        weight: per class; undifferentiated.
        size_average: must be None.
        ignore_index: class number that does not count.
        reduce: must be None.
        reduction: "mean" is over the global weight of the targets that count: nan where none does.
        label_smoothing: share of the target spread over all classes.
        out: the result's layout.
        over: mesh axis to factor, where the types leave a choice.

    Cost over cut classes: an all_reduce(max) and two all_reduces of the targets' shape (three for
    probabilities); backward none.

    Raises:
        LayoutError: kind "choice": weights or probabilities cut over classes where the logits are
            not.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"tensor": 2})
    >>> logits = sw.shard(torch.zeros(3, 4), mesh, "b v/tensor")
    >>> torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2]))
    f32[] local[] on mesh(tensor=2)
    """
    _check_reduction("cross_entropy", reduction, size_average, reduce)
    input, target, weight = _operands(input, target, weight)
    weight = None if weight is None else weight.detach()
    dim = 0 if input.ndim == 1 else 1
    is_class = target.ndim != input.ndim
    others = [] if weight is None else [(weight, (0,))]
    able = leads(input, (dim,), others if is_class else [*others, (target, (dim,))])
    operands = (input, target) if weight is None else (input, target, weight)
    each = _CROSS[able](operands, (ignore_index, label_smoothing), None, over)
    count = None
    if reduction == "mean" and is_class:
        if weight is None:
            count = _count(target != ignore_index, None)
        else:
            counts, _, share = _share(target, weight, ignore_index)
            count = _count(counts, share)
    elif reduction == "mean":
        count = math.prod(input.shape) // input.shape[dim]
    return _asked(_reduced(each, reduction, count), out)
