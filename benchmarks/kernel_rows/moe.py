"""MoE: sorting tokens by expert, and their weighted sum; alone, and around a grouped matmul."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.kernels import moe

from .measure import DEVICE, GPU, Row, Versions, both, compiled, normal, seconds

# tokens, width, copies of a token, experts, hidden width of an expert
SIZES = [(32768, 2048, 8, 128, 768), (16384, 4096, 2, 8, 14336)] if GPU else [(32, 16, 2, 4, 8)]


def eager_permute(x: Tensor, expert: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a model written in torch does: argsort, bincount by comparison, index_select."""
    flat = expert.reshape(-1)
    order = torch.argsort(flat, stable=True)
    ends = (flat.unsqueeze(0) == torch.arange(experts, device=x.device).unsqueeze(1)).sum(1)
    token = order // expert.shape[1]
    return x.index_select(0, token), ends.cumsum(0).to(torch.int32), order


def eager_unpermute(y: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    n, k = weights.shape
    scaled = (y * weights.reshape(-1)[order].unsqueeze(-1)).to(y.dtype)
    return y.new_zeros(n, y.shape[1]).index_add(0, order // k, scaled)


def ours_layer(x: Tensor, expert: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    rows, ends, position = moe.permute(x, expert, len(up))
    hidden = F.silu(moe.grouped_linear(rows, ends, up))
    return moe.unpermute(moe.grouped_linear(hidden, ends, down), position, weights)


def eager_layer(x: Tensor, expert: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    rows, ends, order = eager_permute(x, expert, len(up))
    hidden = F.silu(moe.grouped_linear(rows, ends, up))
    return eager_unpermute(moe.grouped_linear(hidden, ends, down), order, weights)


def rows(copy: float) -> Iterator[Row]:
    for size in SIZES:
        yield from permutations(copy, *size[:-1])
        yield from layers(*size)


def routed(tokens: int, copies: int, experts: int) -> tuple[Tensor, Tensor]:
    """Different experts for each token, and a weight for each copy."""
    expert = torch.rand(tokens, experts, device=DEVICE).argsort(1)[:, :copies].contiguous()
    return expert, torch.rand(tokens, copies, device=DEVICE)


def permutations(copy: float, tokens: int, width: int, copies: int, experts: int) -> Iterator[Row]:
    label = f"{tokens}x{width} k{copies} E{experts}"
    x, y, grad = normal(tokens, width), normal(tokens * copies, width), normal(tokens, width)
    expert, weights = routed(tokens, copies, experts)
    _, position = moe.moe_order(expert, experts)
    order = eager_permute(x, expert, experts)[2]
    row = tokens * width * 2 / copy
    once = (1 + copies) * row  # tokens once, their copies once

    times = {
        "ours": seconds(lambda: moe.moe_order(expert, experts)),
        "eager": seconds(lambda: torch.argsort(expert.reshape(-1), stable=True)),
    }
    # ids of 8 bytes, positions of 4
    yield Row("moe_order", label, tokens * copies * 12 / copy, times, "eager: argsort alone")

    versions: Versions = {
        "ours": lambda v: moe.permute(v, expert, experts)[0],
        "eager": lambda v: eager_permute(v, expert, experts)[0],
        "compiled": lambda v: eager_permute(v, expert, experts)[0],
    }
    versions = compiled(versions, True)
    with torch.no_grad():
        times = {n: seconds(f, x) for n, f in versions.items()}
    yield Row("moe permute forward", label, once, times, "with its order", "0.80")
    times = {n: seconds(both(f, [x], [y]), repeats=10) for n, f in versions.items()}
    yield Row("moe permute forward+backward", label, 2 * once, times, goal="0.80")
    times = {
        "ours": seconds(lambda: moe.moe_permute(x, position, None)),
        "eager": seconds(lambda: x.index_select(0, order // copies)),
    }
    yield Row("moe_permute alone", label, once, times, goal="0.85")

    versions = {
        "ours": lambda v, w: moe.moe_unpermute(v, position, w),
        "eager": lambda v, w: eager_unpermute(v, order, w),
        "compiled": lambda v, w: eager_unpermute(v, order, w),
    }
    versions = compiled(versions, True)
    with torch.no_grad():
        times = {n: seconds(f, y, weights) for n, f in versions.items()}
    yield Row("moe unpermute forward", label, once, times, goal="0.85")
    run = {n: both(f, [y, weights], [grad]) for n, f in versions.items()}
    times = {n: seconds(f, repeats=10) for n, f in run.items()}
    floor = once + (1 + 2 * copies) * row
    yield Row("moe unpermute forward+backward", label, floor, times, goal="0.80")


def layers(tokens: int, width: int, copies: int, experts: int, hidden: int) -> Iterator[Row]:
    """The whole layer beside its matmuls at 700 TFLOP/s, the floor; both have the same matmuls."""
    label = f"{tokens}x{width} k{copies} E{experts}"
    expert, weights = routed(tokens, copies, experts)
    operands = [
        normal(tokens, width),
        weights,
        normal(experts, width, hidden, scale=0.02),
        normal(experts, hidden, width, scale=0.02),
    ]
    grads = [normal(tokens, width)]
    floor = 2 * 2 * tokens * copies * width * hidden / 700e12
    versions: Versions = {
        "ours": lambda x, *others: ours_layer(x, expert, *others),
        "eager": lambda x, *others: eager_layer(x, expert, *others),
    }
    with torch.no_grad():
        times = {n: seconds(f, *operands, repeats=5) for n, f in versions.items()}
    published = experts == 128  # the shape whose times are known: Liger 7.3 ms, 28.2 ms
    yield Row("moe layer forward", label, floor, times, goal="5.0 ms" if published else "")
    run = {n: both(f, operands, grads) for n, f in versions.items()}
    times = {n: seconds(f, repeats=5) for n, f in run.items()}
    goal = "17 ms" if published else ""
    yield Row("moe layer forward+backward", label, 3 * floor, times, goal=goal)
