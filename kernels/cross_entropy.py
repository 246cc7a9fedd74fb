"""Cross-entropy of a block of the vocabulary, from logits or straight from the hidden states.

`cross_entropy_parts` gives each row's lse = log sum exp(logits) over the block, and the logit of
the row's label where the block holds it, else 0. Blocks meet in two small sums, outside:

    M = max over blocks of lse (a constant),  L = M + log sum exp(lse - M),  loss = L - sum target

so no logit travels. The row's largest logit and the sum of exponentials come as one number, their
lse: it is smooth, where the largest logit is not, and the gradient needs nothing else.

`linear_cross_entropy_parts` forms logits = hidden weight^T for `chunk` rows at a time and forgets
them; its backward forms them again: four matmuls of that size, and any cut of the vocabulary.
`linear_cross_entropy` has the whole vocabulary and the weight of each row in the loss, so it makes
the gradients while it has the logits: three matmuls, what a loss without chunks costs, without
ever holding more than chunk x vocabulary logits. Its loss is the sum of scale times each row's
loss: a mean has scale 1/count, and a row that does not count has scale 0, whatever its label.

A vocabulary may be padded, so that its products are aligned: logits from number `stop` on do not
count and get no gradient.

Shapes: logits [..., vocab], labels [...]; in the linear ops hidden [rows, width], weight [vocab,
width], labels and scale [rows]. Logits have the dtype of `hidden`; all sums are formed in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .launch import wide
from .registry import by_twin, define, rows

CHUNK_BYTES = 1 << 29  # logits held at a time by the linear ops, unless the caller says otherwise


def chunk_rows(rows: int, vocab: int, itemsize: int, budget: int = CHUNK_BYTES) -> int:
    """Rows of a chunk: the fewest even chunks whose logits fit into `budget` bytes.

    In multiples of 128, where that many rows fit.

    >>> chunk_rows(16384, 128256, 2), chunk_rows(16384, 32000, 2), chunk_rows(3, 1 << 30, 4)
    (2048, 8192, 1)
    """
    fitting = max(1, budget // (vocab * itemsize))
    step = 128 if fitting >= 128 else 1
    fitting -= fitting % step
    chunks = max(1, -(-rows // fitting))
    each = -(-rows // chunks)
    return max(1, -(-each // step) * step)


def weighted(each: Tensor, scale: Tensor) -> Tensor:
    """Sum of each loss times its scale; one that does not count may be anything, also nan."""
    return torch.where(scale == 0, 0.0, each * scale).sum()


def counted(size: int, start: int, stop: int) -> int:
    """How many of `size` logits from number `start` on come before number `stop`.

    >>> counted(8, 0, 20), counted(8, 16, 20), counted(8, 24, 20)
    (8, 4, 0)
    """
    return min(max(stop - start, 0), size)


def _held(labels: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Which labels lie among the `count` logits from `start` on, and where (0 for the others)."""
    local = labels - start
    held = (local >= 0) & (local < count)
    return held, torch.where(held, local, 0)


def _true(logits: Tensor, start: int, stop: int) -> tuple[Tensor, int]:
    """The logits in the dtype of sums, padding as -inf; and how many are no padding."""
    v, count = logits.to(wide(logits.dtype)), counted(logits.shape[-1], start, stop)
    if count < logits.shape[-1]:
        padding = torch.arange(logits.shape[-1], device=logits.device) >= count
        v = v.masked_fill(padding, -math.inf)
    return v, count


def _parts(logits: Tensor, labels: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    v, count = _true(logits, start, stop)
    held, local = _held(labels, start, count)
    target = v.gather(-1, local.unsqueeze(-1)).squeeze(-1)
    return torch.logsumexp(v, -1), torch.where(held, target, 0.0)


def _parts_backward(
    grad_lse: Tensor,
    grad_target: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    start: int,
    stop: int,
) -> Tensor:
    v, count = _true(logits, start, stop)
    held, local = _held(labels, start, count)
    lse = torch.where(lse == -math.inf, 0.0, lse)  # a block of padding alone
    grad = torch.exp(v - lse.unsqueeze(-1)) * grad_lse.unsqueeze(-1)
    grad = grad.scatter_add(-1, local.unsqueeze(-1), (grad_target * held).unsqueeze(-1))
    return grad.to(logits.dtype)


def _linear_parts(
    hidden: Tensor, weight: Tensor, labels: Tensor, start: int, stop: int, chunk: int
) -> tuple[Tensor, Tensor]:
    each = [
        _parts(h @ weight.T, t, start, stop)
        for h, t in zip(hidden.split(chunk), labels.split(chunk), strict=True)
    ]
    lse, target = zip(*each, strict=True)
    return torch.cat(lse), torch.cat(target)


def _linear_parts_backward(
    grad_lse: Tensor,
    grad_target: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    lse: Tensor,
    start: int,
    stop: int,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    grad_hidden, grad_weight = [], torch.zeros_like(weight)
    per_row = (grad_lse, grad_target, hidden, labels, lse)
    for gl, gt, h, t, s in zip(*(a.split(chunk) for a in per_row), strict=True):
        grad = _parts_backward(gl, gt, h @ weight.T, t, s, start, stop)
        grad_hidden.append(grad @ weight)
        grad_weight = grad_weight + grad.T @ h
    return torch.cat(grad_hidden), grad_weight


def _linear(
    hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, stop: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lse, target = _linear_parts(hidden, weight, labels, 0, stop, chunk)
    each = lse - target
    grads = _linear_parts_backward(scale, -scale, hidden, weight, labels, lse, 0, stop, chunk)
    return weighted(each, scale), each, *grads


def _zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def _cross_entropy_parts_backward(
    grad_lse: Tensor | None,
    grad_target: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    start: int,
    stop: int,
) -> tuple[Tensor, None]:
    grads = _zeros(grad_lse, lse), _zeros(grad_target, lse)
    return cross_entropy_parts_backward(*grads, logits, labels, lse, start, stop), None


def _linear_cross_entropy_parts_backward(
    grad_lse: Tensor | None,
    grad_target: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    lse: Tensor,
    start: int,
    stop: int,
    chunk: int,
) -> tuple[Tensor, Tensor, None]:
    grads = _zeros(grad_lse, lse), _zeros(grad_target, lse)
    operands = hidden, weight, labels, lse, start, stop, chunk
    return (*linear_cross_entropy_parts_backward(*grads, *operands), None)


def _linear_cross_entropy_backward(
    grad_loss: Tensor | None,
    grad_each: Tensor | None,
    grad_grad_hidden: Tensor | None,
    grad_grad_weight: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    stop: int,
    chunk: int,
    each: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradients made by the forward, times the loss's; all else goes through the twin."""
    others = grad_each, grad_grad_hidden, grad_grad_weight
    if all(g is None for g in others):
        if grad_loss is None:
            return None, None, None, None
        by_loss = grad_loss.to(grad_hidden.dtype)
        return grad_hidden * by_loss, grad_weight * by_loss, None, each * grad_loss
    return tuple(
        _through_twin(
            grad_loss=grad_loss,
            grad_each=grad_each,
            grad_grad_hidden=grad_grad_hidden,
            grad_grad_weight=grad_grad_weight,
            hidden=hidden,
            weight=weight,
            labels=labels,
            scale=scale,
            stop=stop,
            chunk=chunk,
        )
    )


_through_twin = by_twin("linear_cross_entropy")


def _statistic(labels: Tensor, like: Tensor) -> Tensor:
    return labels.new_empty(labels.shape, dtype=wide(like.dtype))


cross_entropy_parts_backward = define(
    "cross_entropy_parts_backward(Tensor grad_lse, Tensor grad_target, Tensor logits,"
    " Tensor labels, Tensor lse, int start, int stop) -> (Tensor grad_logits)",
    twin=_parts_backward,
    cuda="cross_entropy_triton:parts_backward",
    backward=by_twin("cross_entropy_parts_backward"),
    fake=lambda grad_lse, grad_target, logits, labels, lse, start, stop: logits.new_empty(
        logits.shape
    ),
    vmap=rows(
        lambda: cross_entropy_parts_backward, "grad_lse", "grad_target", "logits", "labels", "lse"
    ),
)

cross_entropy_parts = define(
    "cross_entropy_parts(Tensor logits, Tensor labels, int start, int stop)"
    " -> (Tensor lse, Tensor target)",
    twin=_parts,
    cuda="cross_entropy_triton:parts",
    backward=_cross_entropy_parts_backward,
    fake=lambda logits, labels, start, stop: (
        _statistic(labels, logits),
        _statistic(labels, logits),
    ),
    vmap=rows(lambda: cross_entropy_parts, "logits", "labels"),
)

linear_cross_entropy_parts_backward = define(
    "linear_cross_entropy_parts_backward(Tensor grad_lse, Tensor grad_target, Tensor hidden,"
    " Tensor weight, Tensor labels, Tensor lse, int start, int stop, int chunk)"
    " -> (Tensor grad_hidden, Tensor grad_weight)",
    twin=_linear_parts_backward,
    cuda="cross_entropy_triton:linear_parts_backward",
    backward=by_twin("linear_cross_entropy_parts_backward"),
    fake=lambda grad_lse, grad_target, hidden, weight, labels, lse, start, stop, chunk: (
        hidden.new_empty(hidden.shape),
        weight.new_empty(weight.shape),
    ),
)

linear_cross_entropy_parts = define(
    "linear_cross_entropy_parts(Tensor hidden, Tensor weight, Tensor labels, int start, int stop,"
    " int chunk)"
    " -> (Tensor lse, Tensor target)",
    twin=_linear_parts,
    cuda="cross_entropy_triton:linear_parts",
    backward=_linear_cross_entropy_parts_backward,
    fake=lambda hidden, weight, labels, start, stop, chunk: (
        _statistic(labels, hidden),
        _statistic(labels, hidden),
    ),
)

linear_cross_entropy = define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, Tensor scale, int stop,"
    " int chunk)"
    " -> (Tensor loss, Tensor each, Tensor grad_hidden, Tensor grad_weight)",
    twin=_linear,
    cuda="cross_entropy_triton:linear",
    backward=_linear_cross_entropy_backward,
    fake=lambda hidden, weight, labels, scale, stop, chunk: (
        hidden.new_empty((), dtype=wide(hidden.dtype)),
        _statistic(labels, hidden),
        hidden.new_empty(hidden.shape),
        weight.new_empty(weight.shape),
    ),
)
