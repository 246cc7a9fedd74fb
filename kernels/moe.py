"""Tokens sorted by expert, and back: what a mixture of experts needs around its grouped matmul.

Each of n tokens goes to k experts. Its n k copies are laid out expert after expert, tokens in their
order within each; `moe_order` says where each copy lies. Counting is on the device, no copy is
dropped and no group is padded. With p(i,j) the place of copy j of token i, all that follows is one
form, linear in tokens x [n, width], weights s [n, k] and rows y [n k, width] each,

    T(x, s, y) = sum over i, j of s(i,j) <x(i), y(p(i,j))>

and the ops are its three gradients, so each has the other two for its derivatives, of any order:

    moe_permute    dT/dy    rows(p(i,j)) = s(i,j) x(i)
    moe_unpermute  dT/dx    tokens(i) = sum over j of s(i,j) y(p(i,j))
    moe_dots       dT/ds    dots(i,j) = <x(i), y(p(i,j))>

They are gathers and scatters without a collision: no atomics, equal in every run. Sums are formed
in float32 and rounded once. Without weights s is 1.

An id outside [0, experts) is another device's expert. Such copies lie behind all experts, their
rows are 0 and nobody's, and their position is ~p, which is negative.

    rows, offsets, position = permute(x, expert, experts)
    hidden = activation(grouped_linear(rows, offsets, w_up))
    y = unpermute(grouped_linear(hidden, offsets, w_down), position, weights)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import wide
from .registry import define


def permute(x: Tensor, expert: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The copies of tokens, sorted by expert.

    Cost: reads x once and writes k copies of it, and sorts n k small keys.

    Args:
        x: tokens [n, width].
        expert: [n, k], integers; outside [0, experts): no expert of this device.
        experts: number of experts here.

    Returns:
        Rows [n k, width]; the end of each expert's rows, int32 [experts], as `F.grouped_mm` wants
        it; position [n, k] of each copy, int32, for `unpermute`.

    >>> import torch
    >>> from shardwise.kernels.moe import permute
    >>> x = torch.tensor([[1.0], [2.0], [3.0]])
    >>> rows, offsets, position = permute(x, torch.tensor([[1], [0], [1]]), experts=2)
    >>> rows.flatten().tolist(), offsets.tolist(), position.flatten().tolist()
    ([2.0, 1.0, 3.0], [1, 3], [1, 0, 2])
    """
    offsets, position = moe_order(expert, experts)
    return moe_permute(x, position, None), offsets, position


def unpermute(y: Tensor, position: Tensor, weights: Tensor | None = None) -> Tensor:
    """The weighted sum of the k rows of each token: [n, width].

    Cost: reads y and writes a k-th of it; its backward reads and writes y once.

    Args:
        y: rows [n k, width] as `permute` sorts them.
        position: [n, k], of `permute`.
        weights: [n, k]; None: 1.

    >>> import torch
    >>> from shardwise.kernels.moe import permute, unpermute
    >>> x = torch.tensor([[1.0], [2.0]])
    >>> rows, _, position = permute(x, torch.tensor([[0, 1], [1, 0]]), experts=2)
    >>> unpermute(rows, position, torch.full((2, 2), 0.25)).flatten().tolist()
    [0.5, 1.0]
    """
    return moe_unpermute(y, position, weights)


def grouped_linear(rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Each expert's rows times its matrix.

    Cost: 2 rows width out operations on a GPU in bf16, where it is `F.grouped_mm`; else each
    expert multiplies all rows, which needs no sizes of groups on the host.

    Args:
        rows: [rows, width], sorted by expert.
        offsets: where the rows of each expert end, int32 [experts].
        weights: [experts, width, out].

    Returns:
        [rows, out]. Rows behind the last expert's have no value that may be used.

    >>> import torch
    >>> from shardwise.kernels.moe import grouped_linear
    >>> weights = torch.tensor([[[2.0]], [[10.0]]])
    >>> ends = torch.tensor([1, 3], dtype=torch.int32)
    >>> grouped_linear(torch.tensor([[1.0], [2.0], [3.0]]), ends, weights).flatten().tolist()
    [2.0, 20.0, 30.0]
    """
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        return F.grouped_mm(rows, weights, offs=offsets)
    owner = torch.searchsorted(
        offsets, torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device), right=True
    )
    total = rows.new_zeros(rows.shape[0], weights.shape[-1])
    for expert, weight in enumerate(weights):
        total = total + torch.where((owner == expert).unsqueeze(-1), rows @ weight, 0)
    return total


def _order(expert: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    flat = expert.reshape(-1)
    keys = torch.where((flat >= 0) & (flat < experts), flat, experts)
    keys, order = torch.sort(keys, stable=True)
    each = torch.arange(experts, dtype=keys.dtype, device=keys.device)
    offsets = torch.searchsorted(keys, each, right=True)
    places = torch.arange(flat.numel(), device=keys.device)
    position = torch.empty_like(places).scatter(
        0, order, torch.where(keys < experts, places, ~places)
    )
    return offsets.to(torch.int32), position.view(expert.shape).to(torch.int32)


def _places(position: Tensor) -> tuple[Tensor, Tensor]:
    """Which copies have an expert here, and the places of all."""
    held = position >= 0
    return held, torch.where(held, position, ~position).long()


def _scaled(held: Tensor, weights: Tensor | None, like: Tensor) -> Tensor:
    """Weights [n, k, 1] as sums are formed, 0 where a copy is nobody's."""
    ones = held if weights is None else torch.where(held, weights, 0)
    return ones.to(wide(like.dtype)).unsqueeze(-1)


def _permute(x: Tensor, position: Tensor, weights: Tensor | None) -> Tensor:
    held, places = _places(position)
    each = torch.where(held.unsqueeze(-1), x.unsqueeze(1) * _scaled(held, weights, x), 0)
    back = torch.argsort(places.reshape(-1))
    return each.reshape(-1, x.shape[-1])[back].to(x.dtype)


def _unpermute(y: Tensor, position: Tensor, weights: Tensor | None) -> Tensor:
    held, places = _places(position)
    each = torch.where(held.unsqueeze(-1), y[places] * _scaled(held, weights, y), 0)
    return each.sum(1).to(y.dtype)


def _dots(x: Tensor, y: Tensor, position: Tensor) -> Tensor:
    held, places = _places(position)
    v = wide(x.dtype)
    return torch.where(held, (x.to(v).unsqueeze(1) * y[places].to(v)).sum(-1), 0)


def _both(grad: Tensor, y: Tensor, position: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return _permute(grad, position, weights), _dots(grad, y, position)


def _permute_backward(
    grad_rows: Tensor, x: Tensor, position: Tensor, weights: Tensor | None
) -> tuple[Tensor | None, ...]:
    by_weights = None
    if weights is not None:
        by_weights = moe_dots(x, grad_rows, position).to(weights.dtype)
    return moe_unpermute(grad_rows, position, weights), None, by_weights


def _unpermute_backward(
    grad_tokens: Tensor, y: Tensor, position: Tensor, weights: Tensor | None
) -> tuple[Tensor | None, ...]:
    if weights is None:
        return moe_permute(grad_tokens, position, None), None, None
    grad_y, dots = moe_unpermute_backward(grad_tokens, y, position, weights)
    return grad_y, None, dots.to(weights.dtype)


def _dots_backward(
    grad_dots: Tensor, x: Tensor, y: Tensor, position: Tensor
) -> tuple[Tensor | None, ...]:
    return moe_unpermute(y, position, grad_dots), moe_permute(x, position, grad_dots), None


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _both_backward(
    grad_rows: Tensor | None,
    grad_dots: Tensor | None,
    grad: Tensor,
    y: Tensor,
    position: Tensor,
    weights: Tensor,
) -> tuple[Tensor | None, ...]:
    by_grad = by_y = by_weights = None
    if grad_rows is not None:
        by_grad, _, by_weights = _permute_backward(grad_rows, grad, position, weights)
    if grad_dots is not None:
        more, by_y, _ = _dots_backward(grad_dots, grad, y, position)
        by_grad = _sum(by_grad, more)
    return by_grad, by_y, None, by_weights


def _statistic(x: Tensor, position: Tensor) -> Tensor:
    return x.new_empty(position.shape, dtype=wide(x.dtype))


def _rows(x: Tensor, position: Tensor) -> Tensor:
    return x.new_empty(position.numel(), x.shape[1])


moe_order = define(
    "moe_order(Tensor expert, int experts) -> (Tensor offsets, Tensor position)",
    twin=_order,
    cuda="moe_triton:order",
    fake=lambda expert, experts: (
        expert.new_empty(experts, dtype=torch.int32),
        expert.new_empty(expert.shape, dtype=torch.int32),
    ),
)

moe_permute = define(
    "moe_permute(Tensor x, Tensor position, Tensor? weights) -> (Tensor rows)",
    twin=_permute,
    cuda="moe_triton:permute",
    backward=_permute_backward,
    fake=lambda x, position, weights: _rows(x, position),
)

moe_unpermute = define(
    "moe_unpermute(Tensor y, Tensor position, Tensor? weights) -> (Tensor tokens)",
    twin=_unpermute,
    cuda="moe_triton:unpermute",
    backward=_unpermute_backward,
    fake=lambda y, position, weights: y.new_empty(position.shape[0], y.shape[1]),
)

moe_dots = define(
    "moe_dots(Tensor x, Tensor y, Tensor position) -> (Tensor dots)",
    twin=_dots,
    cuda="moe_triton:dots",
    backward=_dots_backward,
    fake=lambda x, y, position: _statistic(x, position),
)

moe_unpermute_backward = define(
    "moe_unpermute_backward(Tensor grad, Tensor y, Tensor position, Tensor weights)"
    " -> (Tensor rows, Tensor dots)",
    twin=_both,
    cuda="moe_triton:unpermute_backward",
    backward=_both_backward,
    fake=lambda grad, y, position, weights: (_rows(grad, position), _statistic(grad, position)),
)
