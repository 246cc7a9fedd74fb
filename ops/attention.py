"""Scaled dot-product attention: batch and heads may be cut; keys and head_dim are needed whole.

The query's sequence may be cut where every query sees the same keys: not causal, and with a mask
that is cut as it is, or none. Fewer key-value heads are one factor of the query's heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..layouts.layout import LayoutLike
from ..layouts.sharded import ShardedTensor
from .dispatch import Info, Local, Op, export
from .rules import Dim, Dims, Rule
from .transforms.leaves import depth, under_functorch


def _rule(shapes: Sequence[Any], causal: bool, scale: float | None, grouped: bool) -> Rule:
    q, k, v = shapes[:3]
    if min(len(s) for s in (q, k, v)) < 2 or not len(q) == len(k) == len(v):
        raise ValueError("attention takes [..., heads, seq, head_dim] with equally many dims")
    if q[-1] != k[-1] or k[-2] != v[-2]:
        raise ValueError(f"sizes of q {tuple(q)}, k {tuple(k)}, v {tuple(v)} do not fit")
    batch = [f"b{i}" for i in range(len(q) - 2)]
    sizes = {"s": q[-2], "t": k[-2], "d": q[-1], "e": v[-1]}
    sizes |= {name: q[i] for i, name in enumerate(batch)}
    ahead_q: list[Dim] = [(name,) for name in batch]
    ahead_k = list(ahead_q)
    if grouped:
        heads, kv = q[-3], k[-3]
        if heads % kv or v[-3] != kv:
            raise ValueError(f"{heads} heads are no multiple of {kv} key-value heads")
        last = batch[-1]
        sizes[last], sizes["g"] = kv, heads // kv
        ahead_q[-1] = (last, "g")
    for i, name in enumerate(batch[: len(batch) - grouped]):
        if not q[i] == k[i] == v[i]:
            raise ValueError(f"sizes {q[i]}, {k[i]}, {v[i]} of dim {i} ({name}) do not fit")
    inputs: list[Dims] = [
        (*ahead_q, ("s",), ("d",)),
        (*ahead_k, ("t",), ("d",)),
        (*ahead_k, ("t",), ("e",)),
    ]
    if len(shapes) > 3:
        names: list[Dim] = [*ahead_q, ("s",), ("t",)]
        mask = shapes[3]
        inputs.append(
            tuple(
                () if n == 1 and math.prod(sizes[f] for f in dim) != 1 else dim
                for dim, n in zip(names[len(names) - len(mask) :], mask, strict=True)
            )
        )
    blocked = {"t", "d", *(("s",) if causal else ())}
    return Rule(
        tuple(inputs),
        ((*ahead_q, ("s",), ("e",)),),
        sizes,
        blocked=frozenset(blocked),
        linear=frozenset((2,)),
    )


def _local(info: Info) -> Local:
    return local(*info.static, on_gpu=info.mesh.device.type == "cuda")


def local(causal: bool, scale: float | None, grouped: bool, *, on_gpu: bool) -> Local:
    """Torch's attention of local tensors, with derivatives of every order.

    Its fused kernels have a first derivative only, backward. Forward mode, and gradients that are
    nested inside a functorch transform, take the composition of differentiable ops instead; a
    backward pass that is itself differentiated takes that one's gradients.
    """

    def attend(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )

    def attend_on_gpu(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        with sdpa_kernel(_KERNELS, set_priority=True):
            return attend(q, k, v, mask)

    def composed(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        return torch.ops.aten._scaled_dot_product_attention_math(
            q, k, v, mask, 0.0, causal, None, scale=scale, enable_gqa=grouped
        )[0]

    fused = attend_on_gpu if on_gpu else attend

    def attended(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        if _forward_ad._current_level >= 0 or (under_functorch() and depth() > 1):
            return composed(q, k, v, mask)
        result = fused(q, k, v, mask)
        if not result.requires_grad or under_functorch():
            return result
        return _again_differentiable(composed, result, q, k, v, mask)

    return attended


_forward_ad = torch.autograd.forward_ad


class _Twice(torch.autograd.Function):
    """The result of a fused kernel; where its backward must have a graph, that of `composed`."""

    @staticmethod
    def forward(ctx: Any, composed: Any, result: Any, *inputs: Any) -> Any:
        ctx.composed = composed
        ctx.save_for_backward(*inputs)
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        if not torch.is_grad_enabled():
            return None, grad, *(None for _ in ctx.needs_input_grad[2:])
        # views: q, k and v may be one tensor, and each has its own gradient
        inputs = [None if x is None else x.view_as(x) for x in ctx.saved_tensors]
        needed: Any = [x for x, need in zip(inputs, ctx.needs_input_grad[2:], strict=True) if need]
        found = iter(torch.autograd.grad(ctx.composed(*inputs), needed, grad, create_graph=True))
        # none for the fused kernel's result: its own backward then has nothing to do
        return None, None, *(next(found) if n else None for n in ctx.needs_input_grad[2:])


# the C apply: no signature binding
_again_differentiable = super(torch.autograd.Function, _Twice).apply  # pyright: ignore


def _flops(info: Info) -> float:
    """Two products of every query with every key, per device."""
    points = math.prod(info.size(f) for f in info.rule.sizes if f not in ("d", "e"))
    return 2.0 * points * (info.size("d") + info.size("e"))


# cuDNN's first: 1.7 ms against 2.5 of flash, forward and backward, causal, bf16, 32 heads over 4,
# 8 x 2048 tokens, head_dim 64, on an H100 with torch 2.11.
_KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_ATTENTION = Op("scaled_dot_product_attention", _rule, _local, flops=_flops)


def _swapped(dims: Sequence[Any]) -> tuple[Any, ...]:
    """[..., heads, seq, width] as [..., seq, heads, width], and back."""
    return (*dims[:-3], dims[-2], dims[-3], dims[-1])


def _rule_by_sequence(shapes: Sequence[Any], *static: Any) -> Rule:
    rule = _rule([*map(_swapped, shapes[:3]), *shapes[3:]], *static)
    inputs = (*map(_swapped, rule.inputs[:3]), *rule.inputs[3:])
    return replace(rule, inputs=inputs, outputs=(_swapped(rule.outputs[0]),))


def _local_by_sequence(info: Info) -> Local:
    attended: Any = _local(info)

    def swapped(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        heads = [x.transpose(-2, -3) for x in (q, k, v)]
        return attended(*heads, mask).transpose(-2, -3)

    return swapped


# The same of [batch seq heads head_dim]: its errors speak of these dims.
BY_SEQUENCE = Op("attention", _rule_by_sequence, _local_by_sequence, flops=_flops)


@export(F.scaled_dot_product_attention)
def scaled_dot_product_attention(
    query: ShardedTensor,
    key: ShardedTensor,
    value: ShardedTensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    out: LayoutLike | None = None,
    over: Mapping[str, str] | None = None,
) -> ShardedTensor:
    """Softmax attention over the keys.

    Args:
        query: [..., heads, seq, head_dim].
        key: [..., kv_heads, keys, head_dim].
        value: [..., kv_heads, keys, width].
        attn_mask: broadcast to [..., heads, seq, keys]: true where a key is seen, or added.
        dropout_p: must be 0: use nn.dropout with a key.
        is_causal: a query sees keys up to its own place.
        scale: of the scores; None is 1/sqrt(head_dim).
        enable_gqa: fewer key-value heads.
        out: layout of the result.
        over: mesh axis to factor, where the types leave a choice.

    Raises:
        LayoutError: kind "choice": keys, head_dim, or a causal query's sequence cut.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"data": 2, "tensor": 2})
    >>> q = sw.shard(torch.randn(2, 4, 6, 8), mesh, "b/data h/tensor s d")
    >>> torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    f32[2/data 4/tensor 6 8] local[1 2 6 8] on mesh(data=2, tensor=2)
    """
    if dropout_p:
        raise ValueError("attention: dropout_p must be 0 here; use nn.dropout with a key")
    operands = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    return _ATTENTION(operands, (is_causal, scale, enable_gqa), out, over)
