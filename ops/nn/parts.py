"""What a loss needs of logits whose classes may be cut: two numbers per row and block of classes.

`parts` gives each row's log sum of exponentials over a block, and its label's logit where the block
holds it, else 0: one pass over the logits, by `kernels.cross_entropy`. Blocks meet in a logsumexp
and a sum of [rows, blocks], which is cut where the classes are; logits never move.

`linear_loss` never has all logits: it goes from hidden states to the loss, some rows at a time, and
makes the gradients on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels import cross_entropy as kernel
from ...layouts.sharded import ShardedTensor
from ..dispatch import Info, Local, Op
from ..rules import Rule, letters, sized
from ..transforms.leaves import under_functorch, unwrapped


def _checked(labels: Tensor, stop: int) -> None:
    """Raise, on a GPU later, where a label is none of the classes: it would have no loss."""
    labels = unwrapped(labels)
    known = ((labels >= 0) & (labels < stop)).all()
    torch._assert_async(known, f"a label lies outside 0..{stop - 1}")  # pyright: ignore


def _parts_rule(shapes: Sequence[Any], blocks: int | None, stop: int) -> Rule:
    logits, labels = shapes
    names = letters(len(labels))
    rows = tuple((n,) for n in names)
    if blocks is None:
        return sized(Rule(((*rows, ("w",)), rows), (rows, rows), blocked=frozenset("w")), shapes)
    sizes = {"block": blocks, "w": logits[-1] // blocks}
    inputs = ((*rows, ("block", "w")), rows)
    outputs = ((*rows, ("block",)),) * 2
    return sized(Rule(inputs, outputs, sizes, blocked=frozenset("w")), shapes)


def _parts_local(info: Info) -> Local:
    blocks, stop = info.static
    if blocks is None:

        def whole(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            _checked(labels, stop)
            return tuple(kernel.cross_entropy_parts(logits, labels, 0, stop))

        return whole

    def block(number: int) -> Callable[..., Any]:
        def part(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            _checked(labels, stop)
            start = number * logits.shape[-1]
            found = kernel.cross_entropy_parts(logits, labels, start, stop)
            return tuple(x.unsqueeze(-1) for x in found)

        return part

    return [block(number) for number in info.offsets("block")]


_PARTS = Op("cross_entropy_parts", _parts_rule, _parts_local)


def parts(logits: ShardedTensor, labels: ShardedTensor, stop: int) -> tuple[Any, Any]:
    """Log sum of exponentials of each row, and its label's logit: whole, and a sum still owed.

    Args:
        logits: [..., classes], in any layout; half precision is summed in float32.
        labels: [...], all in 0..stop-1, cut as the rows.
        stop: true number of classes; logits behind are padding.

    Cost: with cut classes an all_reduce(max) and an all_reduce of [...].
    """
    axes = logits.layout.dims[-1]
    if not axes:
        return _PARTS((logits, labels), (None, stop))
    lse, target = _PARTS((logits, labels), (logits.mesh.group_size(axes), stop))
    t: Any = torch
    return t.logsumexp(lse, -1), target.sum(-1)


def _linear_rule(shapes: Sequence[Any], stop: int) -> Rule:
    rows = tuple((n,) for n in letters(len(shapes[2])))
    inputs = ((*rows, ("embed",)), (("vocab",), ("embed",)), rows, rows)
    return sized(Rule(inputs, ((),), blocked=frozenset(("vocab", "embed"))), shapes)


def _linear_local(info: Info) -> Local:
    (stop,) = info.static
    hidden, table = info.kinds[:2]
    trains = torch.is_grad_enabled() and (hidden.grad or table.grad)

    def loss(hidden: Tensor, table: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        _checked(labels, stop)
        rows = hidden.reshape(-1, hidden.shape[-1])
        labels, scale = labels.reshape(-1), scale.reshape(-1)
        chunk = kernel.chunk_rows(len(rows), len(table), table.element_size())
        if trains or under_functorch():
            return kernel.linear_cross_entropy(rows, table, labels, scale, stop, chunk)[0]
        lse, target = kernel.linear_cross_entropy_parts(rows, table, labels, 0, stop, chunk)
        return kernel.weighted(lse - target, scale)

    return loss


def _linear_flops(info: Info) -> float:
    return 2.0 * math.prod(info.size(f) for f in info.rule.sizes)


_LINEAR = Op("linear_cross_entropy", _linear_rule, _linear_local, flops=_linear_flops)


def linear_loss(hidden: Any, table: Any, labels: Any, scale: Any, stop: int) -> Any:
    """Sum over rows of `scale` times the cross-entropy of hidden table^T, without all its logits.

    Args:
        hidden: [..., embed], rows cut anyhow.
        table: [vocab, embed], whole.
        labels: [...], all in 0..stop-1.
        scale: [...], each row's weight in the loss.
        stop: true number of classes.

    Returns:
        [], a sum still owed over the axes that cut rows.

    Cost: three products of that size, gradients included. It holds `kernels.CHUNK_BYTES` of logits.
    """
    return _LINEAR((hidden, table, labels, scale), (stop,))
