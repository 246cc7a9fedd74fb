"""Layers where sharding needs thought; everything else is torch.nn.functional.

Pure functions of ShardedTensors. `out=` names the layout in which a result leaves, a strategy's
row: `dense(x, w, out=s["hidden"])`. A bias joins a product before its sum is reduced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F

from ...layouts.layout import LayoutLike, make
from ...layouts.reshard import reshard_one
from ...layouts.sharded import ShardedTensor
from .. import random
from ..contract import einsum
from ..normalize import layer_norm as _layer_norm
from ..normalize import rms_norm as _rms_norm
from ..random import Key

_LETTERS = [f"o{i}" for i in range(8)]


def dense(
    x: ShardedTensor,
    w: ShardedTensor | tuple[ShardedTensor, ...] | list[ShardedTensor],
    b: Any = None,
    *,
    out: Any = None,
    over: Mapping[str, str] | None = None,
    method: Literal["direct"] = "direct",
    inputs: int = 1,
) -> Any:
    """`x`'s last dims contracted with `w`'s first, plus a bias.

    Args:
        x: [..., in].
        w: [in, out...], any number of out dims; or a tuple of weights that share `x`, which is
            converted once.
        b: [out...], or a tuple beside a tuple of weights; joins before a sum is reduced.
        out: layout of the result, or a tuple of them.
        over: as in `einsum`.
        method: "direct".
        inputs: number of contracted dims, 2 for [heads, head_dim, embed].

    Returns:
        [..., out...], or a tuple.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"tensor": 2})
    >>> x = sw.shard(torch.ones(2, 3, 4), mesh, "b s d/tensor")
    >>> sw.nn.dense(x, sw.shard(torch.ones(4, 6), mesh, "d/tensor f"), out="b s f")
    f32[2 3 6] local[2 3 6] on mesh(tensor=2)
    """
    if isinstance(w, tuple | list):
        count = len(w)
        biases = b if isinstance(b, tuple | list) else (b,) * count
        outs = out if isinstance(out, tuple | list) else (out,) * count
        return tuple(
            dense(x, each, bias, out=to, over=over, method=method, inputs=inputs)
            for each, bias, to in zip(w, biases, outs, strict=True)
        )
    if method != "direct":
        raise ValueError(f"dense: unknown method {method!r} (known: 'direct')")
    batch = [f"i{n}" for n in range(x.ndim - inputs)]
    inner = [f"k{n}" for n in range(inputs)]
    outer = _LETTERS[: w.ndim - inputs]
    pattern = f"{' '.join(batch + inner)}, {' '.join(inner + outer)} -> {' '.join(batch + outer)}"
    if b is None:
        return einsum(pattern, x, w, out=out, over=over)
    try_first = (
        einsum(pattern, x, w, over=over) if out is None or _is_settled(x, w, inputs) else None
    )
    product = try_first if try_first is not None else einsum(pattern, x, w, out=out, over=over)
    total = product + b
    return total if out is None else reshard_one(total, out)


def _is_settled(x: ShardedTensor, w: ShardedTensor, inputs: int) -> bool:
    """Whether the types alone decide the product: no axis cuts different factors of x and w."""
    ahead = x.ndim - inputs
    for axis, state in w.layout.axes.items():
        other = x.layout.state(axis)
        if isinstance(state, int) and isinstance(other, int) and state != other - ahead:
            return False
    return True


def embedding(
    ids: ShardedTensor, table: ShardedTensor, *, out: LayoutLike | None = None
) -> ShardedTensor:
    """Rows of a table [vocab, embed] by integer ids; the vocabulary may be cut.

    Cost: with a cut vocabulary, the sum of partial lookups is reduced by `out`.
    """
    found = F.embedding(ids, table)  # pyright: ignore
    return found if out is None else reshard_one(found, out)  # pyright: ignore


def rms_norm(
    x: ShardedTensor, scale: ShardedTensor | None = None, *, eps: float = 1e-6
) -> ShardedTensor:
    """x / sqrt(mean(x^2) + eps) * scale over the last dim; if cut, only statistics move."""
    return _rms_norm(x, (x.shape[-1],), scale, eps)


def layer_norm(
    x: ShardedTensor,
    scale: ShardedTensor | None = None,
    bias: ShardedTensor | None = None,
    *,
    eps: float = 1e-5,
) -> ShardedTensor:
    """Zero mean and unit variance over the last dim, then scale and bias."""
    return _layer_norm(x, (x.shape[-1],), scale, bias, eps)


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


def rope(x: ShardedTensor, positions: Any, *, theta: float = 1e4) -> ShardedTensor:
    """Rotary positions: halves of each head rotated by angles position * theta^(-2i/head_dim).

    Args:
        x: [batch, seq, heads, head_dim].
        positions: integers [seq] or [batch, seq], sharded as x's own dims or plain.
        theta: base of the wavelengths.
    """
    half = x.shape[-1] // 2
    steps = torch.arange(half, dtype=torch.float32, device=x.mesh.shard_device)
    inverse = theta ** (-steps / half)
    angles = positions[..., None].to(torch.float32) * inverse
    angles = angles[..., None, :]
    cos, sin = torch.cos(angles).to(x.dtype), torch.sin(angles).to(x.dtype)
    first, second = torch.split(x, half, -1)  # pyright: ignore
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)  # pyright: ignore


def dropout(x: ShardedTensor, rate: float, key: Key | None) -> ShardedTensor:
    """Zeros with probability `rate`, the rest scaled by 1/(1-rate); the same mask on every mesh.

    Args:
        x: any layout; a sum that is owed stays owed.
        rate: 0 gives x back, as does key=None (evaluation).
        key: used once.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.ones(8), sw.make_mesh({"data": 2}), "n/data")
    >>> sw.nn.dropout(x, 0.5, sw.random.key(0)).full_tensor().unique()
    tensor([0., 2.])
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout: rate must be in [0, 1), got {rate}")
    if rate == 0 or key is None:
        return x
    kept = random.bernoulli(key, x.shape, x.mesh, make(x.layout.dims), p=1 - rate)
    return x * kept.to(x.dtype) * (1 / (1 - rate))


def cross_entropy(
    logits: ShardedTensor,
    labels: ShardedTensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    classes: int | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> ShardedTensor:
    """Cross-entropy with classes last; logits may be cut over classes and are never gathered.

    Args:
        logits: [..., classes].
        labels: integers [...].
        ignore_index: label that does not count.
        label_smoothing: share of the target spread over all classes.
        z_loss: weight of logsumexp^2, which keeps logits near zero.
        classes: true width of padded logits; the rest is masked out.
        reduction: "mean" divides by the global count of labels that are not ignored.

    Cost: with cut classes, one all_reduce(max) and two all_reduces of [...] forward, none backward.
    """
    if classes is not None and classes != logits.shape[-1]:
        inside = torch.arange(logits.shape[-1], device=logits.mesh.shard_device) < classes
        logits = torch.where(inside, logits, torch.finfo(logits.dtype).min)  # pyright: ignore
    each = -log_prob(logits, labels.clamp(0))
    if label_smoothing or z_loss:
        spread = torch.logsumexp(logits, -1)  # pyright: ignore
        width = classes or logits.shape[-1]
        if label_smoothing:
            shown = (
                logits
                if classes is None
                else torch.where(logits > torch.finfo(logits.dtype).min, logits, 0.0)  # pyright: ignore
            )
            uniform = spread - shown.sum(-1) / width
            each = each * (1 - label_smoothing) + uniform * label_smoothing
        if z_loss:
            each = each + z_loss * spread * spread
    counts = labels != ignore_index
    each = torch.where(counts, each, 0.0)  # pyright: ignore
    if reduction == "none":
        return each
    if reduction == "sum":
        return each.sum()
    return each.sum() / counts.sum()  # the count of integers is whole: the numerator stays owed


def log_prob(logits: ShardedTensor, labels: ShardedTensor) -> ShardedTensor:
    """log softmax(logits) at the labels: [...] for [..., classes]; classes may be cut.

    Out-of-range labels are the caller's to mask.
    """
    picked = torch.gather(logits, -1, labels.unsqueeze(-1)).squeeze(-1)  # pyright: ignore
    return picked - torch.logsumexp(logits, -1)  # pyright: ignore
