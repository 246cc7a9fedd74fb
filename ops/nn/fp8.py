"""`dense` with precision="fp8": the product of local blocks in 8-bit floating point.

The rule is that of the einsum, and so are the collectives, but a sum that is owed in an operand is
reduced before it is rounded. Each device scales its own blocks: the scales are powers of two, so
that an element is rounded as it would be on any other mesh (`kernels/fp8.py` says where it is not).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...kernels import fp8
from ...layouts.reshard import find_route, follow
from ...layouts.sharded import ShardedTensor, make_type
from ...meshlib import record
from ..contract import EINSUM, flops
from ..dispatch import Info, Local, Op, Prepared, typed
from ..rules import Rule


def _rule(shapes: Sequence[Any], pattern: str) -> Rule:
    return replace(EINSUM.rule(shapes, pattern), linear=frozenset())


def _local(info: Info) -> Local:
    if len({kind.dtype for kind in info.kinds}) > 1:
        return EINSUM.local(info)  # which says what is wrong
    kept = {factor for dim in info.rule.outputs[0] for factor in dim}
    inner = sum(dim[0] not in kept for dim in info.rule.inputs[1])
    return lambda x, w: _products(x, (w,), inner)[0]


def _products(x: Tensor, weights: Sequence[Tensor], inner: int) -> list[Tensor]:
    """One local x times several weights side by side; `inner` dims are contracted."""
    batch, width = x.shape[: x.ndim - inner], math.prod(x.shape[x.ndim - inner :])
    flat = [w.reshape(width, math.prod(w.shape[inner:])) for w in weights]
    whole = flat[0] if len(flat) == 1 else torch.cat(flat, 1)
    y = fp8.linear(x.reshape(math.prod(batch), width), whole)
    parts = y.split([w.shape[1] for w in flat], 1) if len(flat) > 1 else (y,)
    return [p.reshape(*batch, *w.shape[inner:]) for p, w in zip(parts, weights, strict=True)]


FP8 = Op("dense", _rule, _local, flops=flops)


def multiply_together(
    x: ShardedTensor,
    weights: Sequence[Any],
    statics: Sequence[tuple[Any, ...]],
    outs: Sequence[Any],
    over: Mapping[str, str] | None,
    inner: int,
) -> list[ShardedTensor]:
    """Products of one tensor with several, on the way to `outs`.

    Where all want `x` in one layout it is converted and quantised once and multiplied with the
    weights' local blocks side by side, which share a scale.
    """
    pairs = [typed((x, w)) for w in weights]
    plans: list[Prepared] = []
    for pair, static, out in zip(pairs, statics, outs, strict=True):
        plan = FP8.planned(pair, static, out, over, toward=True)
        assert plan is not None
        plans.append(plan)
    targets = {plan.decision.targets[0] for plan in plans}
    if len(targets) > 1 or len({k.dtype for plan in plans for k in plan.kinds}) > 1:
        return [
            FP8.toward(pair, static, out, over)
            for pair, static, out in zip(pairs, statics, outs, strict=True)
        ]
    with record.acting("dense", plans[0].why) if record.LOGS else nullcontext():
        moved = _moved(pairs[0][0], plans[0], 0)
        used = [_moved(w, plan, 1) for (_, w), plan in zip(pairs, plans, strict=True)]
        blocks = zip(moved._shards, *(w._shards for w in used), strict=True)
        each = [_products(block, ws, inner) for block, *ws in blocks]
        columns = zip(*each, strict=True)
        return [
            _result(plan, (moved, w), tuple(shards))
            for plan, w, shards in zip(plans, used, columns, strict=True)
        ]


def _moved(x: ShardedTensor, plan: Prepared, number: int) -> ShardedTensor:
    """An operand in the layout that its plan wants."""
    route = find_route(x._type, plan.decision.targets[number])
    assert route is not None
    return follow(x, route)


def _result(
    plan: Prepared, operands: tuple[ShardedTensor, ShardedTensor], shards: tuple[Tensor, ...]
) -> ShardedTensor:
    """The shards of a product with their type, on the record."""
    shape = [math.prod(plan.rule.sizes[f] for f in dim) for dim in plan.rule.outputs[0]]
    mesh = plan.kinds[0].mesh
    grad = torch.is_grad_enabled() and any(k.grad for k in plan.kinds)
    kind = make_type(mesh, plan.decision.outputs[0], shape, shards[0].dtype, grad)
    result = ShardedTensor(shards, kind)
    if record.LOGS:
        record.op("dense", tuple(map(str, operands)), str(result), plan.flops, mesh)
    return result
