"""`cross_entropy` and `log_prob` over classes that may be cut; logits are never gathered."""

from __future__ import annotations

from typing import Literal

import torch

from ...layouts.layout import make
from ...layouts.reshard import reshard_one
from ...layouts.sharded import ShardedTensor


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
        logits: [..., classes].
        labels: integers [...].
        ignore_index: label that does not count.
        label_smoothing: share of the target spread over all classes.
        z_loss: weight of logsumexp^2, which keeps logits near zero.
        classes: true width of padded logits; the rest is masked out.
        reduction: "mean" divides by the global count of labels that are not ignored.

    Cost: with cut classes, one all_reduce(max) and two all_reduces of [...] forward, none backward.
    Labels (integers) are moved to where the logits' rows lie.
    """
    labels = _beside(labels, logits)
    if classes is not None and classes != logits.shape[-1]:
        inside = torch.arange(logits.shape[-1], device=logits.mesh.shard_device) < classes
        logits = torch.where(inside, logits, torch.finfo(logits.dtype).min)  # pyright: ignore
    each = -log_prob(logits, labels.clamp(0))
    if label_smoothing or z_loss:
        spread = torch.logsumexp(logits, -1)  # pyright: ignore
        width = classes or logits.shape[-1]
        if label_smoothing:
            shown = (
                logits
                if classes is None
                else torch.where(logits > torch.finfo(logits.dtype).min, logits, 0.0)  # pyright: ignore
            )
            uniform = spread - shown.sum(-1) / width
            each = each * (1 - label_smoothing) + uniform * label_smoothing
        if z_loss:
            each = each + z_loss * spread * spread
    counts = labels != ignore_index
    each = torch.where(counts, each, 0.0)  # pyright: ignore
    if reduction == "none":
        return each
    if reduction == "sum":
        return each.sum()
    return each.sum() / counts.sum()  # the count of integers is whole: the numerator stays owed


def log_prob(logits: ShardedTensor, labels: ShardedTensor) -> ShardedTensor:
    """log softmax(logits) at the labels: [...] for [..., classes]; classes may be cut.

    Out-of-range labels are the caller's to mask.
    """
    labels = _beside(labels, logits)
    picked = torch.gather(logits, -1, labels.unsqueeze(-1)).squeeze(-1)  # pyright: ignore
    return picked - torch.logsumexp(logits, -1)  # pyright: ignore


def _beside(labels: ShardedTensor, logits: ShardedTensor) -> ShardedTensor:
    """Labels [...] cut as the logits [..., classes] are."""
    return reshard_one(labels, make(logits.layout.dims[:-1]))
