"""FLOPs and peak bytes of what runs, counted under a dispatch mode; on meta tensors too.

FLOPs come from torch's own registry of formulas. Bytes count each storage once, from its first use
to the end of its life; workspace inside a kernel is not seen. Memory of the host is left out.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..kernels.fp8 import FLOPS
from ..layouts import memory


@functools.cache
def formulas() -> Mapping[Any, Callable[..., Any]]:
    """FLOPs of an op from its operands: torch's formulas, and those of our kernels."""
    # Not at the top: it loads Triton where that is installed, and few programs count FLOPs.
    from torch.utils.flop_counter import flop_registry

    return {**flop_registry, **FLOPS}


class Meter(TorchDispatchMode):
    """Counts for all shards of this process together; divide by their number for one device."""

    def __init__(self) -> None:
        super().__init__()
        self._formulas = formulas()
        self.flops = 0.0
        self.live = 0
        self.peak = 0
        self._seen: set[int] = set()

    def hold(self, tensor: Tensor) -> None:
        """Count a tensor's storage from now on, if it is device memory."""
        if memory.is_away(tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the op, then count it."""
        out = func(*args, **(kwargs or {}))
        formula = self._formulas.get(getattr(func, "overloadpacket", func))
        if formula is not None:
            counted = _with_all_heads(args) if "attention" in str(func) else args
            self.flops += formula(*counted, **(kwargs or {}), out_val=out)
        off = memory.any_away(args)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                if off:  # what is computed from host memory lies there
                    memory.away(leaf)
                self.hold(leaf)
        return out


def _with_all_heads(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Operands of attention as torch's formulas want them: as many key heads as query heads."""
    heads = max(x.shape[1] for x in args if isinstance(x, Tensor) and x.ndim == 4)
    return tuple(
        torch.empty(x.shape[0], heads, *x.shape[2:], device="meta", dtype=x.dtype)
        if isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] != heads
        else x
        for x in args
    )
