"""What "cheap" recomputation keeps inside a trace: the results of the dear ops, by order.

Torch's own modes keep everything there, for a partitioner to choose from, and then expect the
second run to repeat the first op by op; a second run that finds a cast remembered does not. These
keep what the policy says, as torch's do outside of a trace.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


def is_traced() -> bool:
    """Whether ops are being written into a graph."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def modes(is_dear: Callable[[Any], bool]) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Of the first run and the second, which gets the results of dear ops from the first."""
    saved: dict[Any, list[Any]] = {}
    return _First(saved, is_dear), _Second(saved)


class _First(TorchDispatchMode):
    def __init__(self, saved: dict[Any, list[Any]], is_dear: Callable[[Any], bool]) -> None:
        super().__init__()
        self.saved, self.is_dear = saved, is_dear

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.is_dear(func):
            # Detached: autograd will hang the first run's graph on `out` itself.
            self.saved.setdefault(func, []).append(
                pytree.tree_map_only(Tensor, lambda x: x.detach(), out)
            )
        return out


class _Second(TorchDispatchMode):
    def __init__(self, saved: dict[Any, list[Any]]) -> None:
        super().__init__()
        self.saved = saved
        self.at: Counter[Any] = Counter()

    def __enter__(self) -> Any:
        self.at.clear()
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self.saved:
            return func(*args, **(kwargs or {}))
        self.at[func] += 1
        # Detached once more: a backward that runs twice takes the same results.
        found = self.saved[func][self.at[func] - 1]
        return pytree.tree_map_only(Tensor, lambda x: x.detach(), found)
