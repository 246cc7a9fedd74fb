"""The cache of a causal model: keys, values and positions of the tokens that it has read.

    k, v        [layer batch length kv_heads head_dim], laid out as the row `kv`, in the compute
                dtype; slots from `used` on hold nothing yet
    positions   [1 length] or, where prompts are padded, [batch length]: plain, equal everywhere;
                `NEVER` where there is nothing to see
    used        slots that are filled

Masks compare positions, so a slot at `NEVER` is later than every query and seen by none. A step
writes by `where` over the whole length: its plan is that of the step before, whatever `used` is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..layouts.place import zeros
from ..layouts.reshard import reshard
from ..layouts.sharded import ShardedTensor
from ..layouts.strategy import Strategy
from ..meshlib.mesh import Mesh
from ..ops.index import index_select
from ..ops.pointwise import where
from ..ops.transforms.scan import scan

NEVER = 2**30
Cache = Mapping[str, Any]


def empty(sizes: Mapping[str, int], s: Strategy, batch: int, length: int, mesh: Mesh) -> Cache:
    """A cache for `length` tokens.

    Args:
        sizes: padded sizes of the model's dims.
        s: its strategy: row `kv`, compute dtype.
        batch: sequences.
        length: longest prompt and answer together.
        mesh: where to.

    Cost: 2 layer batch length kv_heads head_dim elements, cut as the row says.

    Raises:
        LayoutError: a batch or heads that the row's axes do not divide; a row that cuts the
            sequence.
    """
    shape = (sizes["layer"], batch, length, sizes["kv_heads"], sizes["head_dim"])
    k, v = (zeros(shape, mesh, f"layer {s['kv']}", dtype=s.precision.compute) for _ in range(2))
    positions = torch.full((1, length), NEVER, device=mesh.shard_device)
    return {"k": k, "v": v, "positions": positions, "used": 0}


def advance(cache: Cache, batch: int, seq: int, mask: Any) -> tuple[Cache, Tensor]:
    """The cache with `seq` more positions, and the positions [1 or batch, seq] of the new tokens.

    Args:
        cache: before.
        batch: sequences of the new tokens.
        seq: new tokens of each.
        mask: [batch seq] plain: false at padding, which nobody sees and which counts no position;
            None is all true.

    Raises:
        ValueError: another batch than the cache's, or no room.
    """
    _, rows, length = cache["k"].shape[:3]
    used, known = cache["used"], cache["positions"]
    if batch != rows:
        raise ValueError(f"decode: {batch} sequences, but the cache was made for {rows}")
    if used + seq > length:
        raise ValueError(f"decode: {used} + {seq} tokens do not fit in a cache of length {length}")
    true = torch.ones(1, seq, dtype=torch.bool) if mask is None else mask != 0
    true = true.to(known.device)
    count = (known != NEVER).sum(1, keepdim=True)
    positions = (count + true.cumsum(1) - 1).clamp(min=0)
    known = known.expand(max(len(known), len(true)), -1).clone()
    known[:, used : used + seq] = torch.where(true, positions, NEVER)
    return {**cache, "positions": known, "used": used + seq}, positions


def run_cached(
    run: Callable[[Any, ShardedTensor, Any], ShardedTensor],
    x: ShardedTensor,
    stacked: Any,
    cache: Cache,
    s: Strategy,
) -> tuple[ShardedTensor, Cache]:
    """The stream through all layers, each of which recalls and remembers.

    Args:
        run: (one layer's parameters at rest, x, recall) -> x; `recall` is that of `Place`.
        x: the stream of the new tokens.
        stacked: parameters of the blocks.
        cache: advanced by the new tokens.
        s: the strategy.
    """
    length, seq = cache["k"].shape[2], x.shape[1]
    slots = torch.arange(length, device=x.mesh.shard_device)
    offset = slots - (cache["used"] - seq)
    is_new = ((offset >= 0) & (offset < seq))[:, None, None]
    source = offset.clamp(0, seq - 1)

    def write(new: ShardedTensor, old: ShardedTensor) -> ShardedTensor:
        spread = new if seq == 1 else index_select(new, 1, source)
        return reshard(where(is_new, spread.to(old.dtype), old), s["kv"])

    def layer(x: ShardedTensor, given: Any) -> tuple[ShardedTensor, Any]:
        p, old = given
        made: dict[str, ShardedTensor] = {}

        def recall(k: ShardedTensor, v: ShardedTensor) -> tuple[Any, Any, Tensor]:
            made["k"], made["v"] = write(k, old["k"]), write(v, old["v"])
            return made["k"], made["v"], cache["positions"]

        return run(p, x, recall), made

    x, made = scan(layer, x, (stacked, {"k": cache["k"], "v": cache["v"]}))
    return x, {**cache, **made}
