"""Ops: every torch function that has a rule, under torch's name, plus `out=` and `over=`."""

from . import (
    attention,
    blocks,
    broadcast,
    contract,
    einops,
    extreme,
    index,
    join,
    losses,
    moments,
    normalize,
    ordered,
    pointwise,
    reduce,
    scans,
    scatter,
    shape,
    slicing,
    softmax,
)
from .audit import audit as audit

_ROOMS = (
    pointwise,
    contract,
    reduce,
    shape,
    broadcast,
    join,
    slicing,
    blocks,
    index,
    scatter,
    einops,
    extreme,
    moments,
    softmax,
    normalize,
    attention,
    scans,
    ordered,
    losses,
)
for _room in _ROOMS:
    globals().update(
        {
            name: value
            for name, value in vars(_room).items()
            if callable(value)
            and not name.startswith("_")
            and getattr(value, "__module__", "") == _room.__name__
        }
    )

# After the rooms: inside shard_map `permute` is the collective (torch's own stays the method
# x.permute(...)), and so is `reduce` with an axis and a position.
from .transforms.collectives import all_gather as all_gather  # noqa: E402
from .transforms.collectives import all_reduce as all_reduce  # noqa: E402
from .transforms.collectives import all_to_all as all_to_all  # noqa: E402
from .transforms.collectives import axis_index as axis_index  # noqa: E402
from .transforms.collectives import broadcast as broadcast  # noqa: E402
from .transforms.collectives import permute as permute  # noqa: E402
from .transforms.collectives import reduce as reduce  # noqa: E402
from .transforms.collectives import reduce_scatter as reduce_scatter  # noqa: E402
