"""`cross_entropy` and `log_prob` over classes that may be cut; logits are never gathered."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

from ...layouts.layout import LayoutLike, make
from ...layouts.reshard import reshard_one
from ...layouts.sharded import ShardedTensor
from ..given import check_sharded
from ..method import Method, check_method
from .dense import dense
from .parts import linear_loss, parts

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
        logits: [..., classes]; rows and classes may be cut by any axes. Half precision is summed
            in float32, and gives a loss in float32.
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
    check_classes("cross_entropy", classes, width)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"cross_entropy: unknown reduction {reduction!r} (mean, sum, none)")
    t: Any = torch
    labels = _beside(labels, logits)
    counts: Any = labels != ignore_index
    spread, target = parts(logits, t.where(counts, labels, 0), classes or width)
    each = spread - target
    if label_smoothing:
        even = spread - _sum_of(logits, classes or width) * (1 / (classes or width))
        each = each * (1 - label_smoothing) + even * label_smoothing
    if z_loss:
        each = each + z_loss * spread * spread
    each = t.where(counts, each, 0.0)
    if reduction == "none":
        return each
    if reduction == "sum":
        return each.sum()
    return each.sum() / counts.sum()  # the count of integers is whole: the numerator stays owed


def _sum_of(logits: ShardedTensor, classes: int) -> Any:
    """The sum of each row's true logits, at least in float32."""
    t: Any = torch
    wide: Any = logits.to(torch.float32) if logits.dtype in _HALF else logits
    if classes != logits.shape[-1]:
        inside = torch.arange(logits.shape[-1], device=logits.mesh.shard_device) < classes
        wide = t.where(inside, wide, 0.0)
    return wide.sum(-1)


def linear_cross_entropy(
    hidden: ShardedTensor,
    table: ShardedTensor,
    labels: ShardedTensor,
    *,
    ignore_index: int = -100,
    classes: int | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    out: LayoutLike | None = None,
    method: Method = "direct",
) -> ShardedTensor:
    """`cross_entropy(hidden table^T, labels)`, without holding all logits where vocab is whole.

    Args:
        hidden: [..., embed]; rows may be cut by any axes.
        table: [vocab, embed]; where either dim is cut, logits are formed in the layout `out`.
        labels: integers [...].
        ignore_index: label that does not count.
        classes: true number of rows of a padded table.
        reduction: as in `cross_entropy`.
        out: layout of logits where they are formed.
        method: of their product, as in `dense`.

    Returns:
        [], the sum over cut rows still owed.

    Cost: gradients included three products, as the plain form; at most `CHUNK_BYTES` (512 MiB) of
    logits at a time. Without gradients one product.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"data": 2})
    >>> h = sw.shard(torch.zeros(4, 8), mesh, "batch/data embed")
    >>> labels = sw.shard(torch.tensor([0, 4, 1, -100]), mesh, "batch/data")
    >>> table = sw.shard(torch.ones(5, 8), mesh)
    >>> sw.nn.linear_cross_entropy(h, table, labels).full_tensor()
    tensor(1.6094)
    """
    check_sharded("linear_cross_entropy", hidden=hidden, table=table, labels=labels)
    check_method("linear_cross_entropy", method)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"linear_cross_entropy: unknown reduction {reduction!r} (mean, sum)")
    if table.ndim != 2 or hidden.shape[-1:] != table.shape[1:]:
        raise ValueError(
            f"linear_cross_entropy: hidden {list(hidden.shape)} must end with the width of the "
            f"table {list(table.shape)}, which is [vocab, embed]"
        )
    check_classes("linear_cross_entropy", classes, table.shape[0])
    cut = (*hidden.layout.dims[-1], *table.layout.dims[0], *table.layout.dims[1])
    if cut or hidden.layout.unreduced or table.layout.unreduced:
        logits = dense(hidden, table.transpose(0, 1), out=out, method=method)  # pyright: ignore
        return cross_entropy(
            logits, labels, ignore_index=ignore_index, classes=classes, reduction=reduction
        )
    check_labels("linear_cross_entropy", hidden, labels)
    t: Any = torch
    labels = _beside(labels, hidden)
    counts: Any = labels != ignore_index
    scale = counts.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    total: Any = counts.sum() if reduction == "mean" else None
    if total is not None:
        scale = scale / t.clamp(total, min=1)
    kept, stop = t.where(counts, labels, 0), classes or table.shape[0]
    loss: Any = linear_loss(hidden, table, kept, scale, stop)
    # where no label counts: nan, as in torch, and no gradient
    return loss if total is None else loss + t.where(total == 0, math.nan, 0.0).to(loss.dtype)


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


def check_classes(function: str, classes: int | None, width: int) -> None:
    """Raise unless there are at least as many logits as classes."""
    if classes is not None and not 0 < classes <= width:
        raise ValueError(f"{function}: {classes} classes of logits of width {width}")


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
    """Labels [...] cut as the logits [..., classes] are, in a dtype that torch looks up by."""
    if labels.dtype not in (torch.int32, torch.int64):
        labels = labels.to(torch.int64)
    return reshard_one(labels, make(logits.layout.dims[:-1]))
