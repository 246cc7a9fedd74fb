"""Scaled dot-product attention: batch and heads may be cut; keys and head_dim are needed whole.

The query's sequence may be cut where every query sees the same keys: not causal, and with a mask
that is cut as it is, or none. Fewer key-value heads are one factor of the query's heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..layouts.layout import LayoutLike
from ..layouts.sharded import ShardedTensor
from .dispatch import Info, Local, Op, export
from .rules import Dim, Dims, Rule


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
    causal, scale, grouped = info.static

    def attend(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )

    def attend_on_gpu(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        with sdpa_kernel(_KERNELS, set_priority=True):
            return attend(q, k, v, mask)

    return attend_on_gpu if info.mesh.device.type == "cuda" else attend


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
