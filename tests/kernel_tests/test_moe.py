"""A mixture of experts through permute, grouped matmul and unpermute equals the dense sum."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from inputs import real
from torch import Tensor

from shardwise.kernels import moe

TOKENS, COPIES, EXPERTS, WIDTH, HIDDEN = 11, 3, 4, 5, 6


def experts_of(start: int, stop: int) -> Tensor:
    """COPIES different experts of each token; with a wider range some are elsewhere."""
    generator = torch.Generator().manual_seed(0)
    chosen = [torch.randperm(stop - start, generator=generator)[:COPIES] for _ in range(TOKENS)]
    return torch.stack(chosen) + start


def dense(x: Tensor, expert: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Every expert for every token, times its weight in the token's sum: 0 for most."""
    share = (F.one_hot(expert.clamp(0, EXPERTS), EXPERTS + 1) * weights.unsqueeze(-1)).sum(1)
    each = torch.einsum("eth,ehw->tew", torch.einsum("tw,ewh->eth", x, up).tanh(), down)
    return torch.einsum("te,tew->tw", share[:, :EXPERTS], each)


def grouped(x: Tensor, expert: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    rows, offsets, position = moe.permute(x, expert, EXPERTS)
    hidden = moe.grouped_linear(rows, offsets, up).tanh()
    return moe.unpermute(moe.grouped_linear(hidden, offsets, down), position, weights)


def operands() -> list[Tensor]:
    return [
        real(TOKENS, WIDTH),
        real(TOKENS, COPIES, seed=1),
        real(EXPERTS, WIDTH, HIDDEN, seed=2),
        real(EXPERTS, HIDDEN, WIDTH, seed=3),
    ]


@pytest.mark.parametrize(
    "expert",
    [experts_of(0, EXPERTS), experts_of(0, EXPERTS + 3), torch.full((TOKENS, COPIES), 2)],
    ids=["all here", "some elsewhere", "one for all"],
)
def test_layer_equals_the_dense_sum_in_values_and_gradients(expert: Tensor) -> None:
    def loss(f):
        return lambda x, w, up, down: f(x, expert, w, up, down).sin().sum()

    args = operands()
    found = grouped(args[0], expert, *args[1:])
    torch.testing.assert_close(found, dense(args[0], expert, *args[1:]), rtol=1e-12, atol=1e-12)
    places = (0, 1, 2, 3)
    grads = [torch.func.grad(loss(f), places)(*args) for f in (grouped, dense)]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)

    def squares(f):
        return lambda *a: sum((g * g).sum() for g in torch.func.grad(loss(f), places)(*a))

    second = [torch.func.grad(squares(f), places)(*args) for f in (grouped, dense)]
    torch.testing.assert_close(*second, rtol=1e-10, atol=1e-10)


def test_order_is_that_of_the_tokens_within_an_expert() -> None:
    expert = torch.tensor([[1, 0], [1, 7], [0, 1], [-1, 1]])
    x = torch.arange(4.0).unsqueeze(-1) + 1
    rows, offsets, position = moe.permute(x, expert, 3)
    assert rows.flatten().tolist() == [1, 3, 1, 2, 3, 4, 0, 0]
    assert offsets.tolist() == [2, 6, 6]
    assert position.tolist() == [[2, 0], [3, ~6], [1, 4], [~7, 5]]
    assert position.dtype == offsets.dtype == torch.int32


def test_blocks_of_experts_add_up_to_the_whole_layer() -> None:
    """Two devices with half of the experts each: ids are shifted, results are added."""
    x, weights, up, down = operands()
    expert = experts_of(0, EXPERTS)
    half = EXPERTS // 2
    parts = []
    for start in (0, half):
        rows, offsets, position = moe.permute(x, expert - start, half)
        hidden = moe.grouped_linear(rows, offsets, up[start : start + half]).tanh()
        y = moe.grouped_linear(hidden, offsets, down[start : start + half])
        parts.append(moe.unpermute(y, position, weights))
    whole = grouped(x, expert, weights, up, down)
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-12)


def test_rows_without_an_expert_are_never_read() -> None:
    """What a grouped matmul leaves behind its last group is anything, NaN as well."""
    expert = experts_of(0, EXPERTS + 3)
    x, weights = operands()[:2]
    rows, offsets, position = moe.permute(x, expert, EXPERTS)
    end = int(offsets[-1])
    assert end < len(rows), "no copy is elsewhere: the test would not see a thing"
    assert not rows[end:].any()
    y = torch.cat([rows[:end], torch.full_like(rows[end:], float("nan"))])
    leaves = [v.clone().requires_grad_() for v in (y, weights)]
    found = moe.unpermute(leaves[0], position, leaves[1])
    assert found.isfinite().all()
    grad_y, grad_weights = torch.autograd.grad(found.sum(), leaves)
    assert not grad_y[end:].any()
    assert grad_weights.isfinite().all()
    assert not grad_weights[expert >= EXPERTS].any()


def test_grouped_linear_is_torch_s_grouped_matmul() -> None:
    """bf16 on a CPU: what a GPU runs, beside what a CPU runs, to a unit in the last place."""
    ends = torch.tensor([16, 16, 40], dtype=torch.int32)
    rows, weights = real(40, 16).bfloat16(), real(3, 16, 32).bfloat16()
    theirs = F.grouped_mm(rows, weights, offs=ends)
    torch.testing.assert_close(
        moe.grouped_linear(rows, ends, weights), theirs, rtol=1e-2, atol=1e-2
    )
