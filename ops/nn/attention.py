"""`attention`: softmax attention of [batch seq heads head_dim], keys and values in fewer heads."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F

from ...layouts.layout import LayoutLike
from ...layouts.reshard import reshard_one
from ...layouts.sharded import ShardedTensor


def attention(
    q: ShardedTensor,
    k: ShardedTensor,
    v: ShardedTensor,
    *,
    causal: bool = False,
    mask: Any = None,
    scale: float | None = None,
    method: Literal["local"] = "local",
    out: LayoutLike | None = None,
) -> ShardedTensor:
    """Softmax attention of [batch seq heads head_dim]; keys and values may have fewer heads.

    Args:
        q: queries [batch, seq, heads, head_dim].
        k: keys [batch, seq, kv_heads, head_dim]; heads is a multiple of kv_heads.
        v: values, as k.
        causal: a query sees keys at its own position and before.
        mask: broadcast to [batch, heads, query, key]; true where a key is seen, or added.
        scale: of the scores; None is 1/sqrt(head_dim).
        method: "local": batch and heads may be cut, the sequence not.
        out: layout of the result.
    """
    if method != "local":
        raise ValueError(f"attention: unknown method {method!r} (known: 'local')")
    grouped = k.shape[2] != q.shape[2]
    result = F.scaled_dot_product_attention(
        q.transpose(1, 2),  # pyright: ignore
        k.transpose(1, 2),  # pyright: ignore
        v.transpose(1, 2),  # pyright: ignore
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=grouped,
    ).transpose(1, 2)
    return result if out is None else reshard_one(result, out)  # pyright: ignore
