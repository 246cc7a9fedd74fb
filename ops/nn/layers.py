"""Layers where sharding needs thought and that need no file of their own: lookup, norms, dropout.

Pure functions of ShardedTensors. `out=` names the layout in which a result leaves, a strategy's
row: `embedding(ids, table, out=s["hidden"])`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...layouts.layout import LayoutLike, make
from ...layouts.reshard import reshard_one
from ...layouts.sharded import ShardedTensor
from ..dispatch import Info, Op
from ..given import check_sharded
from ..normalize import layer_norm as _layer_norm
from ..normalize import rms_norm as _rms_norm
from ..random import Key, dropped
from ..rules import Rule
from ..rules import make as make_rule


def embedding(ids: Any, table: ShardedTensor, *, out: LayoutLike | None = None) -> ShardedTensor:
    """Rows of a table [vocab, embed] by integer ids; the vocabulary may be cut.

    Args:
        ids: integers [...], plain or cut; by an axis of the vocabulary, they are gathered over it:
            they are the small side.
        table: [vocab, embed]; both dims may be cut.
        out: layout of the result.

    Raises:
        IndexError: an id outside the vocabulary, where torch looks.

    Returns:
        [..., embed]: unreduced over the axes that cut the vocabulary, unless `out` says more.

    Cost: the reduction to `out`: an all_reduce or a reduce_scatter of the result. Backward the
    gradient of the result is gathered, never one of the table.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"tensor": 2})
    >>> table = sw.shard(torch.arange(8.0).view(4, 2), mesh, "vocab/tensor embed")
    >>> ids = sw.shard(torch.tensor([3, 0]), mesh)
    >>> sw.nn.embedding(ids, table, out="seq/tensor embed").full_tensor()
    tensor([[6., 7.],
            [0., 1.]])
    """
    check_sharded("embedding", table=table)
    if isinstance(ids, ShardedTensor):
        whole = frozenset(table.layout.dims[0])
        kept = make(tuple(tuple(a for a in axes if a not in whole) for axes in ids.layout.dims))
        ids = reshard_one(ids, kept)
    try:
        found = F.embedding(ids, table)  # pyright: ignore
    except (IndexError, RuntimeError) as error:
        if "index out of range" not in str(error) and "an index lies outside" not in str(error):
            raise
        raise IndexError(f"embedding: an id lies outside 0..{table.shape[0] - 1}") from None
    return found if out is None else reshard_one(found, out)  # pyright: ignore


def rms_norm(
    x: ShardedTensor, scale: ShardedTensor | None = None, *, eps: float = 1e-6
) -> ShardedTensor:
    """x / sqrt(mean(x^2) + eps) * scale over the last dim; if cut, only statistics move.

    Args:
        x: [..., embed].
        scale: [embed], cut as x is.
        eps: added to the mean square.

    Cost where the last dim is cut: an all_reduce of one number per row over the axes that cut it,
    forward and backward. The gradient of `scale` is summed over the axes that cut the rows.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"row": 2, "col": 2})
    >>> x = sw.shard(torch.full((2, 4), 3.0), mesh, "batch/row embed/col")
    >>> scale = sw.shard(torch.ones(4), mesh, "embed/col {R:row}")
    >>> sw.nn.rms_norm(x, scale)
    f32[2/row 4/col] local[1 2] on mesh(row=2, col=2)
    """
    check_sharded("rms_norm", x=x)
    return _rms_norm(x, (x.shape[-1],), scale, eps)


def layer_norm(
    x: ShardedTensor,
    scale: ShardedTensor | None = None,
    bias: ShardedTensor | None = None,
    *,
    eps: float = 1e-5,
) -> ShardedTensor:
    """Zero mean and unit variance over the last dim, then scale and bias.

    Args:
        x: [..., embed].
        scale: [embed], cut as x is.
        bias: as scale.
        eps: added to the variance.

    Cost where the last dim is cut: as `rms_norm`, twice (mean, then variance around it).

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.tensor([[1.0, 3.0]]), sw.make_mesh({"tensor": 2}), "b d/tensor")
    >>> sw.nn.layer_norm(x).full_tensor()
    tensor([[-1.0000,  1.0000]])
    """
    check_sharded("layer_norm", x=x)
    return _layer_norm(x, (x.shape[-1],), scale, bias, eps)


def _dropout_local(info: Info) -> list[Callable[..., Tensor]]:
    """One function per held shard: each makes the part of the mask that lies over its block."""
    shape = tuple(info.kinds[0].shape)
    offsets = [info.offsets(f) for (f,) in info.rule.inputs[0]]
    starts = zip(*offsets, strict=True) if offsets else [()] * len(info.mesh.held)

    def at(start: tuple[int, ...]) -> Callable[..., Tensor]:
        return lambda x, key, rate: dropped(x, key, rate, shape, start)

    return [at(tuple(start)) for start in starts]


def _dropout_rule(shapes: Sequence[Sequence[int]]) -> Rule:
    return make_rule("... -> ...", shapes, linear=(0,))


_dropout = Op("dropout", _dropout_rule, _dropout_local)


def dropout(x: ShardedTensor, rate: float, key: Key | None) -> ShardedTensor:
    """Zeros with probability `rate`, the rest scaled by 1/(1-rate); the same mask on every mesh.

    Args:
        x: any layout; a sum that is owed stays owed.
        rate: 0 gives x back, as does key=None (evaluation).
        key: used once.

    Cost: one pass over x, and one in backward, which makes the mask again; nothing is kept but the
    key. Nothing moves.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.ones(8), sw.make_mesh({"data": 2}), "n/data")
    >>> sw.nn.dropout(x, 0.5, sw.random.key(0)).full_tensor().unique()
    tensor([0., 2.])
    """
    check_sharded("dropout", x=x)
    if not 0 <= rate < 1:
        raise ValueError(f"dropout: rate must be in [0, 1), got {rate}")
    if not x.is_floating_point():
        raise TypeError(f"dropout: x must be of floating point, got {x}")
    if rate == 0 or key is None:
        return x
    return _dropout((x, key, rate))
