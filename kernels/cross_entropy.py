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

Shapes: logits [..., vocab], labels [...]; in the linear ops hidden [rows, width], weight [vocab,
width], labels and scale [rows]. Logits have the dtype of `hidden`; all sums are formed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import wide
from .registry import by_twin, define, rows

CHUNK_BYTES = 1 << 29  # logits held at a time by the linear ops, unless the caller says otherwise


def chunk_rows(vocab: int, itemsize: int, budget: int = CHUNK_BYTES) -> int:
    """Rows whose logits fit into `budget` bytes: a multiple of 128 where that is possible.

    >>> chunk_rows(128256, 2), chunk_rows(32000, 2), chunk_rows(1 << 30, 4)
    (2048, 8320, 1)
    """
    fitting = max(1, budget // (vocab * itemsize))
    return fitting if fitting < 128 else fitting // 128 * 128


def _held(labels: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Which labels lie in the block [start, start + size), and where (0 for the others)."""
    local = labels - start
    held = (local >= 0) & (local < size)
    return held, torch.where(held, local, 0)


def _parts(logits: Tensor, labels: Tensor, start: int) -> tuple[Tensor, Tensor]:
    v = logits.to(wide(logits.dtype))
    held, local = _held(labels, start, logits.shape[-1])
    target = v.gather(-1, local.unsqueeze(-1)).squeeze(-1)
    return torch.logsumexp(v, -1), torch.where(held, target, 0.0)


def _parts_backward(
    grad_lse: Tensor, grad_target: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, start: int
) -> Tensor:
    v = logits.to(wide(logits.dtype))
    held, local = _held(labels, start, logits.shape[-1])
    grad = torch.exp(v - lse.unsqueeze(-1)) * grad_lse.unsqueeze(-1)
    grad = grad.scatter_add(-1, local.unsqueeze(-1), (grad_target * held).unsqueeze(-1))
    return grad.to(logits.dtype)


def _linear_parts(
    hidden: Tensor, weight: Tensor, labels: Tensor, start: int, chunk: int
) -> tuple[Tensor, Tensor]:
    each = [
        _parts(h @ weight.T, t, start)
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
    chunk: int,
) -> tuple[Tensor, Tensor]:
    grad_hidden, grad_weight = [], torch.zeros_like(weight)
    per_row = (grad_lse, grad_target, hidden, labels, lse)
    for gl, gt, h, t, s in zip(*(a.split(chunk) for a in per_row), strict=True):
        grad = _parts_backward(gl, gt, h @ weight.T, t, s, start)
        grad_hidden.append(grad @ weight)
        grad_weight = grad_weight + grad.T @ h
    return torch.cat(grad_hidden), grad_weight


def _linear(
    hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lse, target = _linear_parts(hidden, weight, labels, 0, chunk)
    each = lse - target
    grads = _linear_parts_backward(scale, -scale, hidden, weight, labels, lse, 0, chunk)
    return (each * scale).sum(), each, *grads


def _zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def _cross_entropy_parts_backward(
    grad_lse: Tensor | None,
    grad_target: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    start: int,
) -> tuple[Tensor, None]:
    grads = _zeros(grad_lse, lse), _zeros(grad_target, lse)
    return cross_entropy_parts_backward(*grads, logits, labels, lse, start), None


def _linear_cross_entropy_parts_backward(
    grad_lse: Tensor | None,
    grad_target: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    lse: Tensor,
    start: int,
    chunk: int,
) -> tuple[Tensor, Tensor, None]:
    grads = _zeros(grad_lse, lse), _zeros(grad_target, lse)
    operands = hidden, weight, labels, lse, start, chunk
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
            chunk=chunk,
        )
    )


_through_twin = by_twin("linear_cross_entropy")


def _statistic(labels: Tensor, like: Tensor) -> Tensor:
    return labels.new_empty(labels.shape, dtype=wide(like.dtype))


cross_entropy_parts_backward = define(
    "cross_entropy_parts_backward(Tensor grad_lse, Tensor grad_target, Tensor logits,"
    " Tensor labels, Tensor lse, int start) -> (Tensor grad_logits)",
    twin=_parts_backward,
    cuda="cross_entropy_triton:parts_backward",
    backward=by_twin("cross_entropy_parts_backward"),
    fake=lambda grad_lse, grad_target, logits, labels, lse, start: logits.new_empty(logits.shape),
    vmap=rows(
        lambda: cross_entropy_parts_backward, "grad_lse", "grad_target", "logits", "labels", "lse"
    ),
)

cross_entropy_parts = define(
    "cross_entropy_parts(Tensor logits, Tensor labels, int start) -> (Tensor lse, Tensor target)",
    twin=_parts,
    cuda="cross_entropy_triton:parts",
    backward=_cross_entropy_parts_backward,
    fake=lambda logits, labels, start: (_statistic(labels, logits), _statistic(labels, logits)),
    vmap=rows(lambda: cross_entropy_parts, "logits", "labels"),
)

linear_cross_entropy_parts_backward = define(
    "linear_cross_entropy_parts_backward(Tensor grad_lse, Tensor grad_target, Tensor hidden,"
    " Tensor weight, Tensor labels, Tensor lse, int start, int chunk)"
    " -> (Tensor grad_hidden, Tensor grad_weight)",
    twin=_linear_parts_backward,
    cuda="cross_entropy_triton:linear_parts_backward",
    backward=by_twin("linear_cross_entropy_parts_backward"),
    fake=lambda grad_lse, grad_target, hidden, weight, labels, lse, start, chunk: (
        hidden.new_empty(hidden.shape),
        weight.new_empty(weight.shape),
    ),
)

linear_cross_entropy_parts = define(
    "linear_cross_entropy_parts(Tensor hidden, Tensor weight, Tensor labels, int start, int chunk)"
    " -> (Tensor lse, Tensor target)",
    twin=_linear_parts,
    cuda="cross_entropy_triton:linear_parts",
    backward=_linear_cross_entropy_parts_backward,
    fake=lambda hidden, weight, labels, start, chunk: (
        _statistic(labels, hidden),
        _statistic(labels, hidden),
    ),
)

linear_cross_entropy = define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor labels, Tensor scale, int chunk)"
    " -> (Tensor loss, Tensor each, Tensor grad_hidden, Tensor grad_weight)",
    twin=_linear,
    cuda="cross_entropy_triton:linear",
    backward=_linear_cross_entropy_backward,
    fake=lambda hidden, weight, labels, scale, chunk: (
        hidden.new_empty((), dtype=wide(hidden.dtype)),
        _statistic(labels, hidden),
        hidden.new_empty(hidden.shape),
        weight.new_empty(weight.shape),
    ),
)
