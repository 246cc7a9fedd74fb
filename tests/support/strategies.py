"""hypothesis strategies: meshes, layouts that fit a shape, and tensors in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from gallery import MESHES, mesh, values
from hypothesis import strategies as st

import shardwise as sw
from shardwise.layouts.layout import make

STATES = ("replicated", "unreduced", "reduced")


@dataclass(frozen=True)
class Case:
    """A value on a mesh, and several layouts that it can have there."""

    mesh: sw.Mesh
    value: torch.Tensor
    layouts: tuple[sw.Layout, ...]


@st.composite
def layouts(
    draw: st.DrawFn,
    shape: Sequence[int],
    on: sw.Mesh,
    states: Sequence[str] = STATES,
) -> sw.Layout:
    """Any layout that a tensor of this shape can have on the mesh, axes of a dim in any order."""
    dims: list[list[str]] = [[] for _ in shape]
    sets: dict[str, set[str]] = {state: set() for state in STATES}
    for axis in draw(st.permutations(list(on.axes))):
        fits = [
            d
            for d, n in enumerate(shape)
            if n % (on.group_size(tuple(dims[d])) * on.axes[axis]) == 0
        ]
        to = draw(st.sampled_from([*states, *fits]))
        if isinstance(to, int):
            dims[to].append(axis)
        else:
            sets[to].add(axis)
    return make(tuple(map(tuple, dims)), frozenset(sets["unreduced"]), frozenset(sets["reduced"]))


@st.composite
def cases(
    draw: st.DrawFn, count: int = 2, states: Sequence[str] = STATES, max_ndim: int = 3
) -> Case:
    """A mesh of the gallery, a shape whose dims may or may not be divisible, `count` layouts."""
    on = mesh(**draw(st.sampled_from(MESHES)))
    sizes = st.sampled_from([1, 2, 6, 12])
    shape = tuple(draw(st.lists(sizes, min_size=0, max_size=max_ndim)))
    value = values(*shape, seed=draw(st.integers(0, 9)))
    return Case(on, value, tuple(draw(layouts(shape, on, states)) for _ in range(count)))


@st.composite
def texts(draw: st.DrawFn) -> str:
    """Layout strings as people write them: any names, states in any order, places."""
    names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,5}|[0-9]{1,3}", fullmatch=True)
    axes = draw(st.permutations(["a", "b", "data", "pipe", "x1"]))
    items: list[str] = []
    at = 0
    for _ in range(draw(st.integers(0, 4))):
        take = draw(st.integers(0, 2))
        items.append("/".join([draw(names), *axes[at : at + take]]))
        at += take
    states: dict[str, list[str]] = {}
    for axis in axes[at:]:
        key = draw(st.sampled_from(["", "U", "R"]))
        if key:
            states.setdefault(key, []).append(axis)
    text = "  ".join(items)
    if states:
        text += " {" + " ".join(f"{k}:{','.join(v)}" for k, v in states.items()) + "}"
    text += draw(st.sampled_from(["", " @host", " @disk", " @stage=0", " @stage=0,-1 @host"]))
    return text
