"""Losses. A mean divides by the GLOBAL count, so value and gradient are those of one device.

Each loss is an elementwise formula, or a probability per row, and one reduction: all of them take any layout,
and a sum that is owed stays owed until it is read. The kernels of `torch.nn.functional` are run without
reduction; none of them ever sees a local count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812

from ..layouts.sharded import ShardedTensor
from .dispatch import Op, export
from .rules import make, pointwise

Reduction = Literal["none", "mean", "sum"]


def reduced(each: Any, reduction: str) -> ShardedTensor:
    """Elements, their global mean, or their sum."""
    if reduction == "none":
        return each  # type: ignore[no-any-return]
    if reduction == "sum":
        return each.sum()  # type: ignore[no-any-return]
    if reduction == "mean":
        return each.mean()  # type: ignore[no-any-return]
    raise ValueError(f"reduction {reduction!r} (known: 'none', 'mean', 'sum')")


def _local(function: Callable[..., Any]) -> Any:
    def local(info: Any) -> Any:
        keywords = dict(info.static)
        return lambda *tensors: function(*tensors, reduction="none", **keywords)

    return local


# Elementwise losses of two tensors (and of three): name -> keyword arguments, in torch's order.
ELEMENTWISE: dict[str, tuple[str, ...]] = {
    "mse_loss": (),
    "l1_loss": (),
    "smooth_l1_loss": ("beta",),
    "huber_loss": ("delta",),
    "hinge_embedding_loss": ("margin",),
    "poisson_nll_loss": ("log_input", "full", "eps"),
    "kl_div": ("log_target",),
    "margin_ranking_loss": ("margin",),
    "gaussian_nll_loss": ("full", "eps"),
}
OPERANDS = {"margin_ranking_loss": 3, "gaussian_nll_loss": 3}


def _define(name: str) -> Any:
    function, known, count = getattr(F, name), ELEMENTWISE[name], OPERANDS.get(name, 2)
    op = Op(
        name,
        lambda shapes, *_: make(pointwise([len(s) for s in shapes]), shapes),
        _local(function),
    )

    def call(*args: Any, reduction: str = "mean", **keywords: Any) -> ShardedTensor:
        named = ("input", "target") if count == 2 else ("input1", "input2", "target")
        tensors = list(args[:count])
        tensors += [keywords.pop(n) for n in named[len(tensors) :] if n in keywords]
        if "var" in keywords:
            tensors.append(keywords.pop("var"))
        given = dict(zip(known, args[count:], strict=False)) | keywords
        for old in ("size_average", "reduce"):
            if given.pop(old, None) is not None:
                raise TypeError(f"{name}: {old} is torch's old spelling; use reduction=")
        if given.pop("weight", None) is not None:
            raise TypeError(f"{name}: multiply by the weight with reduction='none', then reduce")
        unknown = set(given) - set(known)
        if unknown:
            raise TypeError(f"{name}: unknown {sorted(unknown)} (known: {', '.join(known)})")
        if reduction == "batchmean" and name == "kl_div":
            first = next(t for t in tensors if isinstance(t, ShardedTensor))
            return op(tensors, tuple(sorted(given.items()))).sum() / first.shape[0]  # type: ignore[no-any-return]
        return reduced(op(tensors, tuple(sorted(given.items()))), reduction)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"`torch.nn.functional.{name}`; the mean is over the GLOBAL count."
    return export(function)(call)


for _name in ELEMENTWISE:
    globals()[_name] = _define(_name)


@export(F.soft_margin_loss)
def soft_margin_loss(input: Any, target: Any, *, reduction: str = "mean") -> ShardedTensor:  # noqa: A002
    """log(1 + exp(-target * input)), targets 1 and -1."""
    return reduced(F.softplus(-target * input), reduction)


def _weighted(each: Any, weight: Any, reduction: str) -> ShardedTensor:
    return reduced(each if weight is None else each * weight, reduction)


_BCE = Op(
    "binary_cross_entropy",
    lambda shapes, *_: make(pointwise([len(s) for s in shapes]), shapes),
    _local(F.binary_cross_entropy),
)
_BCE_LOGITS = Op(
    "binary_cross_entropy_with_logits",
    lambda shapes, *_: make(pointwise([len(s) for s in shapes]), shapes),
    _local(F.binary_cross_entropy_with_logits),
)


@export(F.binary_cross_entropy)
def binary_cross_entropy(
    input: Any,  # noqa: A002
    target: Any,
    weight: Any = None,
    *,
    reduction: str = "mean",
) -> ShardedTensor:
    """Binary cross-entropy of probabilities."""
    return _weighted(_BCE((input, target)), weight, reduction)


@export(F.binary_cross_entropy_with_logits)
def binary_cross_entropy_with_logits(
    input: Any,  # noqa: A002
    target: Any,
    weight: Any = None,
    *,
    reduction: str = "mean",
    pos_weight: Any = None,
) -> ShardedTensor:
    """Binary cross-entropy of logits; positives times `pos_weight`."""
    if pos_weight is None:
        return _weighted(_BCE_LOGITS((input, target)), weight, reduction)
    softplus = F.softplus(-input)
    each = (1 - target) * input + (1 + (pos_weight - 1) * target) * softplus
    return _weighted(each, weight, reduction)


@export(F.nll_loss)
def nll_loss(
    input: ShardedTensor,  # noqa: A002
    target: Any,
    weight: Any = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> ShardedTensor:
    """Negative log-likelihood: minus the log-probability at the target, classes in dim 1 (or 0).

    The mean is weighted and divided by the global weight of the targets that count.
    """
    return _picked(input, target, weight, ignore_index, reduction)


def _picked(
    scores: Any, target: Any, weight: Any, ignore_index: int, reduction: str
) -> ShardedTensor:
    dim = 0 if scores.ndim == 1 else 1
    counts = target != ignore_index
    safe = torch.where(counts, target, 0)
    at = torch.gather(scores, dim, safe.unsqueeze(dim)).squeeze(dim)
    share = counts.to(scores.dtype)
    if weight is not None:
        share = share * torch.gather(weight, 0, safe.reshape(safe.numel())).reshape(tuple(safe.shape))
    each = -(at * share)
    if reduction == "none":
        return each  # type: ignore[no-any-return]
    total = each.sum()
    if reduction == "sum":
        return total  # type: ignore[no-any-return]
    if reduction != "mean":
        raise ValueError(f"reduction {reduction!r} (known: 'none', 'mean', 'sum')")
    return total / share.sum()  # type: ignore[no-any-return]


@export(F.cross_entropy)
def cross_entropy(
    input: ShardedTensor,  # noqa: A002
    target: Any,
    weight: Any = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> ShardedTensor:
    """Cross-entropy of logits, classes in dim 1 (or 0), which may be cut; logits are never gathered.

    Args:
        input: logits [batch, classes, ...] or [classes].
        target: class numbers [batch, ...], or probabilities of the logits' shape.
        weight: per class.
        ignore_index: class number that does not count.
        reduction: "mean" is over the global weight of the targets that count.
        label_smoothing: share of the target spread over all classes.

    Cost over cut classes: all_reduce(max) and two all_reduces of the targets' shape, none backward.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"tensor": 2})
    >>> logits = sw.shard(torch.zeros(3, 4), mesh, "b v/tensor")
    >>> torch.nn.functional.cross_entropy(logits, sw.shard(torch.tensor([0, 1, 2]), mesh)).full_tensor()
    tensor(1.3863)
    """
    dim = 0 if input.ndim == 1 else 1
    width = input.shape[dim]
    total = torch.logsumexp(input, dim)  # type: ignore[arg-type]
    along = weight if weight is None else weight.reshape(tuple(-1 if d == dim else 1 for d in range(input.ndim)))
    if tuple(target.shape) == tuple(input.shape):
        if label_smoothing:
            target = target * (1 - label_smoothing) + label_smoothing / width
        shares = target if along is None else target * along
        each = (shares * (torch.unsqueeze(total, dim) - input)).sum(dim)  # type: ignore[arg-type]
        if reduction == "mean":
            rows = math.prod(input.shape) // width
            return each.sum() / rows  # type: ignore[no-any-return]
        return reduced(each, reduction)
    counts = target != ignore_index
    safe = torch.where(counts, target, 0)
    at = torch.gather(input, dim, safe.unsqueeze(dim)).squeeze(dim)  # type: ignore[arg-type]
    share = counts.to(input.dtype)
    if weight is not None:
        share = share * torch.gather(weight, 0, safe.reshape(safe.numel())).reshape(tuple(safe.shape))
    each = (total - at) * share
    if label_smoothing:
        per_class = torch.unsqueeze(total, dim) - input  # type: ignore[arg-type, operator]
        spread = (per_class if along is None else per_class * along).sum(dim) * counts.to(input.dtype)
        each = each * (1 - label_smoothing) + spread * (label_smoothing / width)
    if reduction == "none":
        return each  # type: ignore[no-any-return]
    if reduction == "sum":
        return each.sum()  # type: ignore[no-any-return]
    if reduction != "mean":
        raise ValueError(f"reduction {reduction!r} (known: 'none', 'mean', 'sum')")
    return each.sum() / share.sum()  # type: ignore[no-any-return]
