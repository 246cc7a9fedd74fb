"""Donation: arguments whose memory a function may take, and the error of reading them later."""

from __future__ import annotations

from typing import Any, NoReturn

import optree

from ...layouts.sharded import ShardedTensor
from ...meshlib.errors import LayoutError
from ...meshlib.source import user_line


class _Gone:
    """In place of the shards of a tensor that was donated: any use of them raises."""

    def __init__(self, source: str) -> None:
        self.source = source

    def _refuse(self, *_: Any) -> NoReturn:
        raise LayoutError(
            f"this tensor was donated at {self.source}, which took its memory\n"
            "use what that call returned",
            kind="donated",
        )

    __iter__ = __len__ = __getitem__ = _refuse


def give_up(gone: Any, keep: Any) -> None:
    """Take the shards from all tensors of `gone` that `keep` does not hold too."""
    kept = {id(x) for x in optree.tree_leaves(keep)}
    shards: Any = _Gone(user_line())
    for x in optree.tree_leaves(gone):
        if isinstance(x, ShardedTensor) and id(x) not in kept:
            x._shards = shards
