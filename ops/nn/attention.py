"""`attention`: softmax attention of [batch seq heads head_dim], and ALiBi's bias.

Masks compare positions, so any order of tokens may be given. Keys and values may have fewer heads
than queries. Where their heads are not cut as the queries' are, each device repeats those that its
own queries read: nothing moves forward, however heads and groups are aligned.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ...layouts.layout import LayoutLike, make
from ...layouts.place import constant
from ...layouts.reshard import reshard_one
from ...layouts.sharded import ShardedTensor
from ..attention import BY_SEQUENCE
from ..contract import einsum
from ..given import check_sharded
from ..index import index_select

_HALF = (torch.bfloat16, torch.float16)


def attention(
    q: ShardedTensor,
    k: ShardedTensor,
    v: ShardedTensor,
    *,
    causal: bool = False,
    positions: Any = None,
    kv_positions: Any = None,
    mask: Any = None,
    bias: Any = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    group: int | None = None,
    method: Literal["local"] = "local",
    out: LayoutLike | None = None,
) -> ShardedTensor:
    """Softmax attention of [batch seq heads head_dim]; keys and values may have fewer heads.

    A key counts where every condition given allows it: `causal`, `window`, a boolean `mask`. A
    query that sees no key gives zeros, and no gradient.

    Args:
        q: queries [batch, seq, heads, head_dim]; batch and heads cut by any axes.
        k: keys [batch, keys, kv_heads, head_dim]; cut as q, or with whole heads.
        v: values, as k.
        causal: only keys at the query's own position and before.
        positions: of the queries, integers [seq] or [batch, seq], plain or cut as q; read by
            `causal` and `window`. None counts from 0.
        kv_positions: of the keys. None is `positions` if there are as many keys as queries, else
            counts from 0.
        mask: broadcast to [batch, heads, query, key]; true where a key is seen, or added.
        bias: added to the scaled and capped scores, broadcast to [batch, heads, query, key].
        window: only the last `window` keys: 0 <= query position - key position < window.
        scale: of the scores; None is 1/sqrt(head_dim).
        softcap: scores become softcap * tanh(scores / softcap), before bias and masks.
        group: query head h reads kv head min(h // group, kv_heads - 1). None is
            heads / kv_heads. Say it where query heads are padded: 9 heads in groups of 3, padded to
            12, and 3 kv heads.
        method: "local": batch and heads may be cut; the keys not, nor the queries, unless
            `positions` are given.
        out: layout of the result.

    Returns:
        [batch, seq, heads, width of v], cut as q.

    Cost: nothing moves forward. Backward: where heads of k and v are whole and not in state R,
    their gradients are reduced (or, where each device reads its own heads, gathered) over the axes
    that cut q's heads. With only `causal` it is torch's fused causal kernel; any other condition
    is handed to that as a mask [batch, heads, query, key]; `softcap` holds the scores.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"data": 2, "tensor": 4})
    >>> q = sw.shard(torch.randn(2, 6, 8, 4), mesh, "batch/data seq heads/tensor head_dim")
    >>> k = sw.shard(torch.randn(2, 6, 2, 4), mesh, "batch/data seq kv_heads head_dim {R:tensor}")
    >>> sw.nn.attention(q, k, k, causal=True, window=3)
    f32[2/data 6 8/tensor 4] local[1 6 2 4] on mesh(data=2, tensor=4)
    """
    check_sharded("attention", q=q, k=k, v=v)
    _check(q, k, v, window, softcap, group, method)
    k, v, grouped = _fitted(q, k, v, group)
    plain = causal and positions is None and kv_positions is None and window is None
    fused = plain and mask is None and bias is None and softcap is None
    seen = None if fused else _seen(q, k, causal, positions, kv_positions, window)
    if bias is not None:
        _check_term("bias", bias, q, k)
    added = bias
    if mask is not None:
        _check_term("mask", mask, q, k)
        mask = _beside(mask, q)
        if mask.dtype == torch.bool:
            seen = mask if seen is None else seen & mask
        else:
            added = mask if added is None else _beside(added, q) + mask
    added = None if added is None else _beside(added, q)
    if softcap is None:
        result = _fused(q, k, v, fused, seen, added, scale, grouped)
    else:
        result = _capped(q, k, v, softcap, seen, added, scale)
    return result if out is None else reshard_one(result, out)


def _check(
    q: ShardedTensor,
    k: ShardedTensor,
    v: ShardedTensor,
    window: int | None,
    softcap: float | None,
    group: int | None,
    method: str,
) -> None:
    if method != "local":
        raise ValueError(f"attention: unknown method {method!r} (known: 'local')")
    if not q.ndim == k.ndim == v.ndim == 4 or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            "attention takes [batch seq heads head_dim], k and v alike; got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if window is not None and window < 1:
        raise ValueError(f"attention: window must be at least 1, got {window}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"attention: softcap must be positive, got {softcap}")
    heads, kv = q.shape[2], k.shape[2]
    if group is None and heads % kv:
        raise ValueError(
            f"attention: {kv} kv heads do not divide {heads} heads; "
            "where heads are padded, give the true group="
        )
    if group is not None and group < 1:
        raise ValueError(f"attention: group must be at least 1, got {group}")


def _fitted(
    q: ShardedTensor, k: ShardedTensor, v: ShardedTensor, group: int | None
) -> tuple[ShardedTensor, ShardedTensor, bool]:
    """Keys and values that each device's queries can read, and whether in fewer heads than q."""
    heads, kv = q.shape[2], k.shape[2]
    axes = q.layout.dims[2]
    even = heads % kv == 0 and group in (None, heads // kv)
    if even and (k.layout.dims[2] or v.layout.dims[2] or _aligned(q, kv, axes)):
        return k, v, heads != kv
    index = (torch.arange(heads) // (group or heads // kv)).clamp(max=kv - 1)
    here = reshard_one(constant(index, q), make((axes,)))
    return index_select(k, 2, here), index_select(v, 2, here), False


def _aligned(q: ShardedTensor, kv: int, axes: tuple[str, ...]) -> bool:
    """Whether the axes that cut q's heads cut kv heads into equal parts, and then the groups."""
    left = [kv, q.shape[2] // kv]
    for axis in axes:
        n = q.mesh.axes[axis]
        if left[0] == 1 and n > 1:
            left.pop(0)
        if not left or left[0] % n:
            return False
        left[0] //= n
    return True


def _seen(
    q: ShardedTensor, k: ShardedTensor, causal: bool, positions: Any, kv: Any, window: int | None
) -> Any:
    """Whether a query may see a key, [batch or 1, 1, query, key]; None: always."""
    if not causal and window is None:
        return None
    if kv is None and positions is not None and k.shape[1] == q.shape[1]:
        kv = positions
    at = torch.arange(q.shape[1]) if positions is None else positions
    of = torch.arange(k.shape[1]) if kv is None else kv
    at, of = (x if isinstance(x, ShardedTensor) else x.to(q.mesh.shard_device) for x in (at, of))
    for name, given, n in (("positions", at, q.shape[1]), ("kv_positions", of, k.shape[1])):
        if given.ndim not in (1, 2) or given.shape[-1] != n:
            raise ValueError(
                f"attention: {name} {tuple(given.shape)} must be [{n}] or [batch, {n}]"
            )
    distance = _wide(at)[..., :, None] - _wide(of)[..., None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _wide(positions: Any) -> Any:
    """[seq] or [batch, seq] as [batch or 1, 1, seq]."""
    return positions[None, None] if positions.ndim == 1 else positions[:, None]


def _check_term(name: str, term: Any, q: ShardedTensor, k: ShardedTensor) -> None:
    """Raise unless a mask or bias broadcasts to [batch, heads, query, key]."""
    if not isinstance(term, Tensor | ShardedTensor):
        raise TypeError(f"attention: {name} must be a tensor, got {type(term).__name__}")
    if term.ndim > 4:
        raise ValueError(f"attention: a mask or bias has at most 4 dims, got {term.ndim}")
    full = [q.shape[0], q.shape[2], q.shape[1], k.shape[1]]
    fits = zip(term.shape, full[4 - term.ndim :], strict=True)
    if any(n not in (1, want) for n, want in fits):
        raise ValueError(
            f"attention: {name} {list(term.shape)} does not broadcast to "
            f"[batch, heads, query, key] {full}"
        )


def _beside(term: Any, q: ShardedTensor) -> ShardedTensor:
    """What is broadcast to [batch heads query key], cut as q is: each device keeps its own part."""
    whole = term if isinstance(term, ShardedTensor) else constant(term, q)
    layout = whole.layout
    if layout.unreduced or layout.varying:
        return whole
    free = frozenset(a for a in q.mesh.axes if not isinstance(layout.state(a), int))
    dims = list(layout.dims)
    for dim, of in ((-4, 0), (-3, 2), (-2, 1)):
        if whole.ndim >= -dim and whole.shape[dim] != 1 and not layout.dims[dim]:
            dims[dim] = tuple(a for a in q.layout.dims[of] if a in free)
    cut = frozenset(a for axes in dims for a in axes)
    return reshard_one(whole, make(tuple(dims), frozenset(), layout.reduced - cut))


def _fused(
    q: ShardedTensor,
    k: ShardedTensor,
    v: ShardedTensor,
    causal: bool,
    seen: Any,
    added: Any,
    scale: float | None,
    grouped: bool,
) -> ShardedTensor:
    """Torch's fused attention, with an added mask where one is needed.

    Never with a boolean one: for a row without keys cuDNN's kernel (bfloat16 on an H100, torch
    2.11) then gives the mean of all values, where with -inf every kernel gives zeros.
    """
    t: Any = torch
    if added is not None:
        added = added.to(q.dtype)
    if seen is not None:
        kept = torch.zeros((), dtype=q.dtype) if added is None else added
        added = t.where(seen, kept, -math.inf)
    operands = (q, k, v) if added is None else (q, k, v, added)
    return BY_SEQUENCE(operands, (causal, scale, grouped))


def _capped(
    q: ShardedTensor,
    k: ShardedTensor,
    v: ShardedTensor,
    softcap: float,
    seen: Any,
    added: Any,
    scale: float | None,
) -> ShardedTensor:
    """The same step by step, since no fused kernel caps; the softmax at least in float32."""
    t: Any = torch
    kv = k.shape[2]
    parts: Any = q.unflatten(2, (kv, q.shape[2] // kv))  # pyright: ignore
    scores = einsum("b s k g d, b t k d -> b k g s t", parts, k)
    if scores.dtype in _HALF:
        scores = scores.to(torch.float32)
    factor = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    scores = t.tanh(scores * (factor / softcap)) * softcap
    if added is not None:
        scores = scores + _by_group(added, kv)
        visible = added > -math.inf
        seen = visible if seen is None else seen & visible
    if seen is None:
        weights = t.softmax(scores, -1)
    else:
        seen = _by_group(seen, kv)
        # the least number, not -inf: a row without keys is then even, and zeroed, never nan
        least = torch.finfo(scores.dtype).min
        weights = t.where(seen, t.softmax(t.where(seen, scores, least), -1), 0.0)
    y: Any = einsum("b k g s t, b t k e -> b s k g e", weights.to(v.dtype), v)
    return y.flatten(2, 3)


def _by_group(term: Any, kv: int) -> Any:
    """A mask or bias broadcast to [batch heads query key] as to [batch kv group query key]."""
    if term.ndim < 3:
        return term
    if term.shape[-3] == 1:
        return term.unsqueeze(-3)
    return term.unflatten(-3, (kv, term.shape[-3] // kv))


def alibi(
    heads: int, positions: Any, kv_positions: Any, *, dtype: torch.dtype = torch.float32
) -> Any:
    """ALiBi's bias: minus the distance of a key times a slope of the head, for `attention(bias=)`.

    Slopes are 2^(-8i/n) for i = 1 ... n heads; if n is no power of two, those of the next lower
    power, then every second one of the next higher.

    Args:
        heads: number of query heads.
        positions: of the queries, integers [seq] or [batch, seq].
        kv_positions: of the keys, likewise.
        dtype: of the bias.

    Returns:
        [heads, query, key], or [batch, heads, query, key]; a plain tensor for plain positions,
        which `attention` cuts as the queries are.

    Source: Press et al. 2021 (arXiv 2108.12409).

    >>> alibi(2, torch.tensor([2]), torch.arange(3))
    tensor([[[-0.1250, -0.0625,  0.0000]],
    <BLANKLINE>
            [[-0.0078, -0.0039,  0.0000]]])
    """
    if heads < 1:
        raise ValueError(f"alibi: heads must be at least 1, got {heads}")
    lower = 2 ** int(math.log2(heads))
    numbers = [(i + 1) * 8 / lower for i in range(lower)]
    numbers += [(i + 0.5) * 8 / lower for i in range(heads - lower)]
    at = _wide(positions) if positions.ndim == 2 else positions[None]
    of = _wide(kv_positions) if kv_positions.ndim == 2 else kv_positions[None]
    distance = (of[..., None, :] - at[..., :, None]).to(dtype)
    device = distance.mesh.shard_device if isinstance(distance, ShardedTensor) else distance.device
    slopes: Tensor = torch.tensor([2.0**-n for n in numbers], dtype=dtype, device=device)
    return distance * slopes[:, None, None]
