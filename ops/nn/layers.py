"""Layers where sharding needs thought and that need no file of their own: lookup, norms, dropout.

Pure functions of ShardedTensors. `out=` names the layout in which a result leaves, a strategy's
row: `embedding(ids, table, out=s["hidden"])`.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from ...layouts.layout import LayoutLike, make
from ...layouts.reshard import reshard_one
from ...layouts.sharded import ShardedTensor
from .. import random
from ..normalize import layer_norm as _layer_norm
from ..normalize import rms_norm as _rms_norm
from ..random import Key


def embedding(
    ids: Any, table: ShardedTensor, *, out: LayoutLike | None = None
) -> ShardedTensor:
    """Rows of a table [vocab, embed] by integer ids; the vocabulary may be cut.

    Ids that are cut by an axis of the vocabulary are gathered over it: they are the small side.

    Cost: with a cut vocabulary, the sum of partial lookups is reduced by `out`.
    """
    if isinstance(ids, ShardedTensor):
        whole = frozenset(table.layout.dims[0])
        kept = make(tuple(tuple(a for a in axes if a not in whole) for axes in ids.layout.dims))
        ids = reshard_one(ids, kept)
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
