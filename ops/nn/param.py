"""`Param`: the declaration of a parameter.

Names of its dims, what is contracted, how it starts; no devices.

    Param("embed -> heads head_dim")     a weight: embed is contracted, so fan-in is its size
    Param("vocab embed", normal(0.02))   a table
    Param("embed", constant(1.0))        a gain

Sizes come from a mapping or a config by name. Initial values depend on the key, the path and the
global index only: the same on every mesh and under every strategy.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optree
import torch

from ...layouts.layout import Layout
from ...layouts.place import full
from ...layouts.sharded import ShardedTensor
from ...layouts.strategy import Strategy
from ...meshlib.errors import nearest
from ...meshlib.mesh import Mesh
from .. import random
from ..random import Key

Init = Callable[[Key, Sequence[int], Mesh, Layout, torch.dtype, int], ShardedTensor]


def fan_in(gain: float = 1.0) -> Init:
    """Normal values with deviation gain / sqrt(size of the contracted dims)."""

    def init(key: Key, shape: Any, mesh: Mesh, layout: Layout, dtype: torch.dtype, fan: int) -> Any:
        return random.normal(
            key, shape, mesh, layout, std=gain / math.sqrt(max(1, fan)), dtype=dtype
        )

    return init


def normal(std: float) -> Init:
    """Normal values with this deviation."""

    def init(key: Key, shape: Any, mesh: Mesh, layout: Layout, dtype: torch.dtype, fan: int) -> Any:
        return random.normal(key, shape, mesh, layout, std=std, dtype=dtype)

    return init


def constant(value: float) -> Init:
    """One value."""

    def init(key: Key, shape: Any, mesh: Mesh, layout: Layout, dtype: torch.dtype, fan: int) -> Any:
        return full(shape, value, mesh, layout, dtype=dtype)

    return init


_FAN_IN = fan_in()


@dataclass(frozen=True)
class Param:
    """A declared parameter.

    Args:
        dims: "embed -> ffn" (what is contracted before the arrow), or just names; integers allowed.
        init: initial values.
        dtype: None takes the strategy's parameter dtype.

    >>> Param("embed -> heads head_dim").shape({"embed": 8, "heads": 2, "head_dim": 4})
    (8, 2, 4)
    """

    dims: str
    init: Init = _FAN_IN
    dtype: torch.dtype | None = None
    stacked: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ahead, arrow, behind = self.dims.partition("->")
        words = [*ahead.split(), *behind.split()]
        bad = next((w for w in words if not re.fullmatch(r"[A-Za-z_]\w*|[1-9]\d*", w)), None)
        why = (
            "has no dims; a single number is Param('1')"
            if not words
            else f"cannot read {bad!r}; write names or sizes, 'in -> out' or 'a b'"
            if bad is not None
            else "has nothing before its arrow"
            if arrow and not ahead.strip()
            else ""
        )
        named = [w for w in words if not w.isdigit()]
        twice = next((w for w in named if named.count(w) > 1), None)
        if not why and twice is not None:
            why = f"has {twice!r} twice; dims need names of their own"
        if why:
            raise ValueError(f"Param({self.dims!r}) {why}")

    @property
    def names(self) -> tuple[str, ...]:
        """All dims, stacked ones first."""
        return self.stacked + tuple(self.dims.replace("->", " ").split())

    def shape(self, sizes: Mapping[str, int] | Any) -> tuple[int, ...]:
        """Global shape under these sizes."""
        return tuple(size_of(name, sizes) for name in self.names)

    def fan(self, sizes: Mapping[str, int] | Any) -> int:
        """Size of the contracted dims; 1 where there are none."""
        if "->" not in self.dims:
            return 1
        return math.prod(size_of(name, sizes) for name in self.dims.split("->")[0].split())


def size_of(name: str, sizes: Mapping[str, int] | Any) -> int:
    """The size of a named dim, in a mapping, a config's `sizes`, or as an attribute.

    Raises:
        KeyError: an unknown name, with the nearest.
    """
    if name.isdigit():
        return int(name)
    sizes = getattr(sizes, "sizes", sizes)
    if isinstance(sizes, Mapping):
        if name in sizes:
            return int(sizes[name])
        raise KeyError(f"no size for dim {name!r}{nearest(name, sizes)}")
    value = getattr(sizes, name, None)
    if value is None:
        known = [n for n in dir(sizes) if isinstance(getattr(sizes, n, None), int) and n[0] != "_"]
        raise KeyError(f"no size for dim {name!r}{nearest(name, known)}")
    return int(value)


def stack(tree: Any, dim: str = "layer") -> Any:
    """The declaration with a leading dim on every parameter; it is no fan-in.

    >>> stack({"w": Param("embed -> ffn")})["w"].names
    ('layer', 'embed', 'ffn')
    """
    return optree.tree_map(lambda p: replace(p, stacked=(dim, *p.stacked)), tree)


def init(
    key: Key, declaration: Any, sizes: Mapping[str, int] | Any, mesh: Mesh, strategy: Strategy
) -> Any:
    """Initial parameters at rest.

    Args:
        key: every parameter's own key is folded from it and its path.
        declaration: a tree of Param.
        sizes: a mapping or an object with the dims' sizes.
        mesh: where to.
        strategy: its rows at rest.

    Returns:
        The same tree of ShardedTensors; equal values on every mesh, and with padding the same as
        without. Leaves that a `.../axis` row cannot cut are left whole, and a warning lists them
        with their bytes per device.

    Raises:
        LayoutError: rows that do not fit, all of them, before anything is made.

    >>> import shardwise as sw
    >>> from shardwise import nn, strategies
    >>> mesh = sw.make_mesh({"data": 2, "tensor": 2})
    >>> s = strategies.data() * strategies.tensor_1d()
    >>> declared = {"w_up": nn.Param("embed -> ffn")}
    >>> nn.init(sw.random.key(0), declared, {"embed": 4, "ffn": 8}, mesh, s)
    {'w_up': f32[4 8/tensor] local[4 4] on mesh(data=2, tensor=2)}
    """
    if not isinstance(key, Key):
        raise TypeError(f"init: key = {key!r}; expected a key, such as random.key(0)")
    true = getattr(sizes, "true_sizes", sizes)  # what a config's sizes are without padding
    layouts = strategy.layouts(declaration, sizes, mesh)
    whole = strategy.left_whole(declaration, sizes, mesh, layouts)
    if whole:
        listed = ", ".join(f"{path} ({size:,} bytes)" for path, size in whole)
        warnings.warn(
            f"left whole, since no dim can be cut as the strategy asks: {listed}", stacklevel=2
        )
    paths, params, spec = optree.tree_flatten_with_path(declaration)
    made = []
    for path, param, layout in zip(paths, params, optree.tree_leaves(layouts), strict=True):
        own = random.fold_in(key, ".".join(map(str, path)))
        dtype = param.dtype or strategy.precision.param
        shape = random.PaddedShape(param.shape(sizes), true=param.shape(true))
        made.append(param.init(own, shape, mesh, layout, dtype, param.fan(true)))
    return spec.unflatten(made)
