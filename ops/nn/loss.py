"""`cross_entropy` and `log_prob` over classes that may be cut; logits are never gathered."""

from __future__ import annotations

from typing import Any, Literal

import torch

from ...layouts.layout import make
from ...layouts.reshard import reshard_one
from ...layouts.sharded import ShardedTensor
from ..given import check_sharded

_HALF = (torch.bfloat16, torch.float16)


def cross_entropy(
    logits: ShardedTensor,
    labels: ShardedTensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    classes: int | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> ShardedTensor:
    """Cross-entropy with classes last; logits may be cut over classes and are never gathered.

    Args:
        logits: [..., classes]; rows and classes may be cut by any axes. Half precision is widened
            to float32 first.
        labels: integers [...], cut anyhow: they are moved to where the logits' rows lie.
        ignore_index: label that does not count; any integer.
        label_smoothing: share of the target spread over all (true) classes.
        z_loss: weight of logsumexp^2, which keeps logits near zero.
        classes: true width of padded logits; the rest counts as never chosen.
        reduction: "mean" divides by the global count of labels that are not ignored; it is nan
            where all are, as in torch.

    Returns:
        [] or, with reduction "none", [...]; the sum over cut rows and classes is still owed.

    Cost: with cut classes, an all_reduce(max) and an all_reduce, each of [...], forward, none
    backward.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"data": 2, "tensor": 2})
    >>> logits = sw.shard(torch.zeros(4, 8), mesh, "batch/data vocab/tensor")
    >>> labels = sw.shard(torch.tensor([0, 4, 1, -100]), mesh, "batch/data")
    >>> sw.nn.cross_entropy(logits, labels)
    f32[]{U:data,tensor} local[] on mesh(data=2, tensor=2)
    >>> sw.nn.cross_entropy(logits, labels, classes=5, label_smoothing=0.1).full_tensor()
    tensor(1.6094)
    """
    check_labels("cross_entropy", logits, labels)
    width = logits.shape[-1]
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy: label_smoothing must be in [0, 1], got {label_smoothing}")
    if classes is not None and not 0 < classes <= width:
        raise ValueError(f"cross_entropy: {classes} classes of logits of width {width}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"cross_entropy: unknown reduction {reduction!r} (mean, sum, none)")
    t: Any = torch
    labels = _beside(labels, logits)
    counts: Any = labels != ignore_index
    if logits.dtype in _HALF:
        logits = logits.to(torch.float32)
    shown = logits
    if classes is not None and classes != width:
        inside = torch.arange(width, device=logits.mesh.shard_device) < classes
        logits = t.where(inside, logits, torch.finfo(logits.dtype).min)
        shown = t.where(inside, shown, 0.0)
    spread = t.logsumexp(logits, -1)
    each = spread - _picked(logits, t.where(counts, labels, 0))
    if label_smoothing:
        even = spread - shown.sum(-1) * (1 / (classes or width))  # pyright: ignore
        each = each * (1 - label_smoothing) + even * label_smoothing
    if z_loss:
        each = each + z_loss * spread * spread
    each = t.where(counts, each, 0.0)
    if reduction == "none":
        return each
    if reduction == "sum":
        return each.sum()
    return each.sum() / counts.sum()  # the count of integers is whole: the numerator stays owed


def log_prob(logits: ShardedTensor, labels: ShardedTensor) -> ShardedTensor:
    """log softmax(logits) at the labels: [...] for [..., classes]; classes may be cut.

    Out-of-range labels are the caller's to mask. Cost: as `cross_entropy`.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"tensor": 2})
    >>> logits = sw.shard(torch.zeros(3, 4), mesh, "n vocab/tensor")
    >>> sw.nn.log_prob(logits, sw.shard(torch.arange(3), mesh)).full_tensor()
    tensor([-1.3863, -1.3863, -1.3863])
    """
    check_labels("log_prob", logits, labels)
    picked: Any = _picked(logits, _beside(labels, logits))
    return picked - torch.logsumexp(logits, -1)  # pyright: ignore


def check_labels(function: str, logits: Any, labels: Any) -> None:
    """Raise unless labels are integers, one for each row of the logits, both on a mesh."""
    check_sharded(function, logits=logits, labels=labels)
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"{function}: labels must hold integers, got {labels.dtype}")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"{function}: labels {list(labels.shape)} must be {list(logits.shape[:-1])}, one for "
            f"each row of the logits {list(logits.shape)}"
        )


def _picked(logits: ShardedTensor, labels: Any) -> Any:
    """The logits at the labels; a sum that is owed where the classes are cut."""
    return torch.gather(logits, -1, labels.unsqueeze(-1)).squeeze(-1)  # pyright: ignore


def _beside(labels: ShardedTensor, logits: ShardedTensor) -> ShardedTensor:
    """Labels [...] cut as the logits [..., classes] are."""
    return reshard_one(labels, make(logits.layout.dims[:-1]))
