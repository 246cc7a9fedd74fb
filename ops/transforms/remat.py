"""`remat`: run a function again in backward instead of keeping what it saves.

torch's non-reentrant checkpoint over the library's ops. The second run repeats the forward's
collectives; they are recorded in the phase "recompute". Casts that a parameter remembers are not
repeated: their shards are still there.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, Literal, cast

import optree
import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ...kernels.fp8 import fp8_linear
from ...layouts import memory, saving
from ...layouts.sharded import ShardedTensor
from ...meshlib import record
from ..kept import regions
from . import cheap
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
        recompute: "all" keeps the arguments only; "cheap" also the results of matmuls (streamed
            and ring ones with what they moved) and attention, so that only what is cheap runs
            again; "none" keeps everything.
        offload: what is kept for backward goes to the host, pinned beside a GPU, and comes back
            when needed: with "all" and "cheap" the activations among the arguments (what "cheap"
            keeps beside them stays), with "none" everything that the ops save. Parameters stay
            where they are. In records, what simulated devices share counts once.

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
        if not offload:
            return _again(f, args, kwargs, recompute)
        hooks = torch.autograd.graph.saved_tensors_hooks(_Leaving(args, kwargs), _return)
        with saving.under(hooks):
            if recompute == "none":
                return f(*args, **kwargs)
            return _again(f, args, kwargs, recompute, offload=True)

    return repeated


def _again(
    f: Callable[..., Any],
    args: Any,
    kwargs: Any,
    recompute: Recompute,
    offload: bool = False,
) -> Any:
    """`f` under torch's checkpoint.

    With `offload` its activations go in as tensors, which the checkpoint saves through the hooks;
    otherwise the function simply holds them. Parameters are held in both cases: they exist anyway.
    """
    both: Any = (args, kwargs)
    leaves, spec = optree.tree_flatten(both, none_is_leaf=True)
    sent = [i for i, x in enumerate(leaves) if offload and _is_activation(x)]
    shards = [s for i in sent for s in leaves[i]._shards]
    kinds = [(leaves[i]._type, len(leaves[i]._shards)) for i in sent]
    held = [None if i in set(sent) else x for i, x in enumerate(leaves)]
    runs = itertools.count()

    def body(*given: Tensor) -> Any:
        again = record.phase("recompute") if next(runs) else nullcontext()
        values, at = list(held), iter(given)
        for i, (kind, count) in zip(sent, kinds, strict=True):
            values[i] = ShardedTensor(tuple(next(at) for _ in range(count)), kind)
        inside, named = cast(Any, spec.unflatten(values))
        with saving.suspended(), again:
            return f(*inside, **named)

    contexts: Any = {"context_fn": _cheap} if recompute == "cheap" else {}
    del args, kwargs, both, leaves
    return checkpoint(body, *shards, use_reentrant=False, preserve_rng_state=False, **contexts)


def _is_activation(x: Any) -> bool:
    """Whether a value was made on the way here; parameters have a path, or are leaves."""
    return (
        isinstance(x, ShardedTensor)
        and x.requires_grad
        and getattr(x, "_path", None) is None
        and not any(s.is_leaf for s in x._shards)
    )


@lru_cache(maxsize=1)
def _kept() -> frozenset[Any]:
    """The overload packets of DEAR that this torch has, and the library's own."""
    known = {getattr(torch.ops.aten, name) for name in DEAR if hasattr(torch.ops.aten, name)}
    return frozenset({*known, fp8_linear.overloadpacket})


def _is_dear(op: Any) -> bool:
    return getattr(op, "overloadpacket", op) in _kept()


def _policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_dear(op) else CheckpointPolicy.PREFER_RECOMPUTE


def _cheap() -> Any:
    modes = cheap.modes(_is_dear) if cheap.is_traced() else None
    return regions(modes or create_selective_checkpoint_contexts(_policy))


@dataclass
class _Parked:
    """A saved tensor on the host, where it came from, and the number of devices in this process.

    Attributes:
        host: the copy; only its shape is there where a step is planned.
        back: the tensor on its device again, while somebody has it.
    """

    host: Tensor
    device: torch.device
    devices: int
    by: record.Context | None
    back: Any = None

    def copied(self, kind: Literal["to_host", "to_device"]) -> None:
        """Write the transfer to the open records, its bytes per device."""
        size = self.host.numel() * self.host.element_size() / self.devices
        phase: record.Phase = "forward" if kind == "to_host" else "backward"
        by = self.by or record.context() or record.Context()
        for log in record.LOGS:
            log.copies.append(record.Copy(kind, size, phase, by.source, by.path))


class _Leaving:
    """The pack hook of one call: what is saved goes to the host, each tensor once.

    What stays: parameters and other leaves, whose owner keeps them on the device anyway; what is on
    the host already; gathers that asked to be done again.
    """

    def __init__(self, args: Any, kwargs: Any) -> None:
        leaves = optree.tree_leaves((args, kwargs))  # pyright: ignore
        ours = [x for x in leaves if isinstance(x, ShardedTensor)]
        self.devices = len(ours[0]._shards) if ours else 1
        kept = [x for x in ours if getattr(x, "_path", None) is not None]
        self.kept = {s.untyped_storage()._cdata for x in kept for s in x._shards}
        self.parked: dict[Any, weakref.ref[_Parked]] = {}

    def __call__(self, tensor: Tensor) -> Any:
        packed = saving.pack(tensor)
        if not isinstance(packed, Tensor) or (tensor.is_leaf and tensor.requires_grad):
            return packed
        storage = tensor.untyped_storage()._cdata
        if storage in self.kept or memory.is_away(tensor) or not tensor.numel():
            return packed
        key = storage, tensor._version, tensor.size(), tensor.stride(), tensor.storage_offset()
        known = self.parked.get(key, lambda: None)()
        if known is not None:
            return known
        with memory.modes_off():
            host = memory.on_host(tensor, tensor.device)
            memory.away(host.copy_(tensor, non_blocking=True))
        parked = _Parked(host, tensor.device, self.devices, record.context())
        self.parked[key] = weakref.ref(parked)
        # A storage that is gone may be followed by another at its place.
        weakref.finalize(tensor.untyped_storage(), self.parked.pop, key, None)
        parked.copied("to_host")
        return parked


def _return(packed: Any) -> Tensor:
    if not isinstance(packed, _Parked):
        return saving.unpack(packed)
    ready = packed.back and packed.back()
    if ready is not None:
        return ready
    packed.copied("to_device")
    host = packed.host
    with memory.modes_off():
        back = torch.empty_like(host, device=packed.device).copy_(host, non_blocking=True)
    packed.back = weakref.ref(back)
    return back.view_as(back)  # under a meter this is what counts it
