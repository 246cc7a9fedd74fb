"""Donation: arguments that a step may write into, and the error of reading them afterwards."""

from __future__ import annotations

from typing import Any, NoReturn

from ..layouts import tree
from ..layouts.sharded import ShardedTensor
from ..meshlib.errors import LayoutError


class _Given:
    """In place of the shards of a tensor that was donated: any use of them raises."""

    def _refuse(self, *_: Any) -> NoReturn:
        raise LayoutError(
            "this tensor was donated to an optimizer step, which wrote over its memory\n"
            "use what the step returned: params, state = opt.step(grads, state, params, "
            "donate=True)",
            kind="donated",
            op="step",
        )

    __iter__ = __len__ = __getitem__ = _refuse


_GIVEN: Any = _Given()


def give_up(gone: Any, keep: Any) -> None:
    """Take the shards from all tensors of `gone` that `keep` does not hold too."""
    kept = {id(x) for x in tree.leaves(keep)}
    for x in tree.leaves(gone):
        if isinstance(x, ShardedTensor) and id(x) not in kept:
            x._shards = _GIVEN
