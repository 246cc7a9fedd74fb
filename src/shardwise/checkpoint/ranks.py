"""How the processes of a job agree on one checkpoint, by keys in the job's store.

No collective is used: a save may run in a thread beside a training step, and collectives of two
threads would meet in different orders. Every wait has an end, SHARDWISE_TIMEOUT seconds (600), and
an error of one process is told to all, so that all raise.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..layouts.sharded import ShardedTensor
from .errors import CheckpointError

_PAUSE = 0.005  # seconds between two looks into the store
_SERIAL = itertools.count()  # every process makes its agreements in the same order


@dataclass(frozen=True)
class Ranks:
    """The processes that act together; a single one where the tree lies on no distributed mesh.

    Attributes:
        rank: of this process.
        size: how many there are.
        store: of the job; None for a single process.
        prefix: of this agreement's keys.
    """

    rank: int = 0
    size: int = 1
    store: Any = None
    prefix: str = ""

    @property
    def is_first(self) -> bool:
        """Whether this process commits."""
        return self.rank == 0

    def tell(self, topic: str, message: Any) -> None:
        """Tell rank 0 (or, as rank 0, all) something that JSON holds."""
        if self.store is not None:
            self.store.set(self._key(topic, self.rank), json.dumps(message))

    def hear(self, topic: str, ranks: Sequence[int] = (0,)) -> list[Any]:
        """What these ranks told, once all of them have.

        Raises:
            CheckpointError: one of them did not within the time.
        """
        if self.store is None:
            return []
        keys = [self._key(topic, rank) for rank in ranks]
        seconds = float(os.environ.get("SHARDWISE_TIMEOUT", "600"))
        deadline = time.monotonic() + seconds
        try:
            while not self.store.check(keys):
                if time.monotonic() > deadline:
                    silent = [r for r, k in zip(ranks, keys, strict=True) if not self._has(k)]
                    raise CheckpointError(
                        f"no word from rank {', '.join(map(str, silent))} within {seconds:g} s "
                        f"({topic}); the last committed checkpoint stays"
                    )
                time.sleep(_PAUSE)
            return [json.loads(self.store.get(key)) for key in keys]
        except RuntimeError as error:
            raise CheckpointError(f"the job's store is gone ({topic}): {error}") from error

    def has_told(self, topic: str) -> bool:
        """Whether rank 0 has told something; does not wait."""
        return self.store is not None and self._has(self._key(topic, 0))

    def forget(self, topic: str) -> None:
        """Drop everybody's keys of a topic that all have heard."""
        if self.store is not None:
            for rank in range(self.size):
                self.store.delete_key(self._key(topic, rank))

    def _has(self, key: str) -> bool:
        return self.store.check([key])

    def _key(self, topic: str, rank: int) -> str:
        return f"{self.prefix}/{topic}/{rank}"


def acting(leaves: Sequence[Any]) -> Ranks:
    """The processes that hold these leaves: all of the job if one lies on a distributed mesh."""
    kinds = {x.mesh.transport for x in leaves if isinstance(x, ShardedTensor)}
    if "distributed" not in kinds:
        return Ranks()
    if "simulated" in kinds:
        raise CheckpointError("the tree lies on a simulated and on a distributed mesh; move one")
    from ..meshlib import distributed

    job = distributed.job()
    if job.size == 1:
        return Ranks()
    prefix = f"sw/checkpoint/{job.attempt}/{next(_SERIAL)}"
    return Ranks(job.rank, job.size, distributed._default_store(), prefix)
