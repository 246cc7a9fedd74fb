"""What a transport owes: seven collectives over the axes of one mesh, nothing else.

A transport works on the *list of shards that this process holds*: all N of a simulated mesh, one of
a distributed mesh, one representative of an abstract mesh. It knows nothing of layouts, gradients
or records. Each call names mesh axes major to minor: devices that differ only on those axes form
one group, and a device's position in it is its mixed-radix index over the axes in the order given.
Blocks along a tensor dim lie in that order, so `dim/x/y` gathers with axes ("x", "y").

No method writes to its inputs, and no result aliases an input; results of one call may alias each
other only on the simulated transport's all_reduce and all_gather.

The distributed transport also has `start_all_reduce`, `start_all_gather` and
`start_reduce_scatter`: they return at once and give a `Finish`. On a GPU the wait is the current
stream's, not the host's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from torch import Tensor

Axes = tuple[str, ...]
Shards = Sequence[Tensor]
ReduceOp = Literal["sum", "max", "min"]
Finish = Callable[[], list[Tensor]]  # waits for what has begun; called once


class Transport(Protocol):
    """The collectives of one mesh. Shapes below are those of one shard; n is the group's size."""

    @property
    def name(self) -> Literal["simulated", "distributed", "abstract"]:
        """Which transport this is."""
        ...

    def all_reduce(self, shards: Shards, axes: Axes, op: ReduceOp = "sum") -> list[Tensor]:
        """Sum (or max, min) over the group; same shape."""
        ...

    def all_gather(self, shards: Shards, axes: Axes, dim: int) -> list[Tensor]:
        """Blocks of the group concatenated along `dim`, which becomes n times as long."""
        ...

    def reduce_scatter(self, shards: Shards, axes: Axes, dim: int) -> list[Tensor]:
        """Each device's own block, along `dim`, of the group's sum; `dim` becomes 1/n as long."""
        ...

    def all_to_all(
        self, shards: Shards, axes: Axes, split_dim: int, concat_dim: int
    ) -> list[Tensor]:
        """Cut along `split_dim`, send block j to position j, concatenate along `concat_dim`."""
        ...

    def permute(self, shards: Shards, axes: Axes, pairs: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Send the shard of position s to position t for each (s, t); zeros where none arrives."""
        ...

    def broadcast(self, shards: Shards, axes: Axes, root: int = 0) -> list[Tensor]:
        """The shard of position `root`, on every device of the group."""
        ...

    def reduce(self, shards: Shards, axes: Axes, root: int = 0) -> list[Tensor]:
        """The group's sum, on the device of position `root`; zeros on the others."""
        ...
