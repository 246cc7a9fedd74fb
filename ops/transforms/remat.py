"""`remat`: run a function again in backward instead of keeping what it saves.

torch's non-reentrant checkpoint over the library's ops. The second run repeats the forward's
collectives; they are recorded in the phase "recompute". Casts that a parameter remembers are not
repeated: their shards are still there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from typing import Any, Literal

import optree
import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ...layouts import saving
from ...layouts.sharded import ShardedTensor
from ...meshlib import record
from .leaves import under_functorch

Recompute = Literal["none", "cheap", "all"]
# Overloads that cost arithmetic: what "cheap" keeps.
DEAR = (
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "convolution",
    "_scaled_mm",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
)


def remat(
    f: Callable[..., Any], *, recompute: Recompute = "all", offload: bool = False
) -> Callable[..., Any]:
    """`f`, run again in backward instead of keeping its activations; results are the same bits.

    Args:
        f: any function; it must give the same when it runs again (random numbers come from keys).
        recompute: "all" keeps the arguments only; "cheap" also the results of matmuls and
            attention, so that only what is cheap runs again; "none" keeps everything.
        offload: what is kept for backward goes to the host, pinned beside a GPU, and comes back
            when needed.

    Cost: the forward of `f` once more, its collectives too, in the phase "recompute"; "cheap" no
    matmuls. A gather with `save="shard"` inside is simply part of what runs again.

    Inside `vmap` and `jvp` (and `hvp`), where torch has no checkpoint, it is the plain call.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.arange(4.0), sw.make_mesh({"data": 2}), "n/data")
    >>> sw.grad(lambda x: sw.remat(torch.sin)(x).sum())(x).full_tensor()
    tensor([ 1.0000,  0.5403, -0.4161, -0.9900])
    """
    if recompute not in ("none", "cheap", "all"):
        raise ValueError(f"remat: recompute must be 'none', 'cheap' or 'all', got {recompute!r}")
    if recompute == "none" and not offload:
        return f

    @wraps(f)
    def repeated(*args: Any, **kwargs: Any) -> Any:
        if under_functorch() or not torch.is_grad_enabled():
            return f(*args, **kwargs)
        with _to_host(args) if offload else nullcontext():
            if recompute == "none":
                return f(*args, **kwargs)
            runs = itertools.count()

            def body() -> Any:
                again = record.phase("recompute") if next(runs) else nullcontext()
                with saving.suspended(), again:
                    return f(*args, **kwargs)

            contexts: Any = {"context_fn": _cheap} if recompute == "cheap" else {}
            return checkpoint(body, use_reentrant=False, preserve_rng_state=False, **contexts)

    return repeated


@lru_cache(maxsize=1)
def _kept() -> frozenset[Any]:
    """The overload packets of DEAR that this torch has."""
    return frozenset(
        getattr(torch.ops.aten, name) for name in DEAR if hasattr(torch.ops.aten, name)
    )


def _policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    dear = getattr(op, "overloadpacket", op) in _kept()
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


_cheap = partial(create_selective_checkpoint_contexts, _policy)


def _to_host(args: Any) -> AbstractContextManager[None]:
    """Hooks that keep what is saved on the host; a gather that asked for it stays its shard."""
    shards = next(
        (len(x._shards) for x in optree.tree_leaves(args) if isinstance(x, ShardedTensor)), 1
    )
    return saving.under(torch.autograd.graph.saved_tensors_hooks(partial(_leave, shards), _return))


@dataclass(frozen=True)
class _Parked:
    """A saved tensor on the host, where it came from, and the number of devices in this process."""

    host: Tensor | None  # None: only its shape is planned
    like: tuple[Any, ...]  # size, stride, dtype
    device: torch.device
    devices: int

    def copied(self, kind: Literal["to_host", "to_device"]) -> None:
        """Write the transfer to the open records, its bytes per device."""
        by = record.context()
        if by is not None:
            size, _, dtype = self.like
            count = size.numel() * dtype.itemsize / self.devices
            phase: record.Phase = "forward" if kind == "to_host" else "backward"
            for log in record.LOGS:
                log.copies.append(record.Copy(kind, count, phase, by.source, by.path))


def _leave(devices: int, tensor: Tensor) -> Any:
    packed = saving.pack(tensor)
    if not isinstance(packed, Tensor) or tensor.device.type == "cpu":
        return packed
    like = tensor.size(), tensor.stride(), tensor.dtype
    host = None
    if not tensor.is_meta:
        host = torch.empty(tensor.size(), dtype=tensor.dtype, device="cpu", pin_memory=True)
        host.copy_(tensor, non_blocking=True)
    parked = _Parked(host, like, tensor.device, devices)
    parked.copied("to_host")
    return parked


def _return(packed: Any) -> Tensor:
    if not isinstance(packed, _Parked):
        return saving.unpack(packed)
    packed.copied("to_device")
    if packed.host is None:
        size, stride, dtype = packed.like
        return torch.empty_strided(size, stride, dtype=dtype, device=packed.device)
    return packed.host.to(packed.device, non_blocking=True)
