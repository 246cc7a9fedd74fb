"""Trees: paths are stable names, None is kept, masks take leaves by name."""

from __future__ import annotations

from typing import NamedTuple

from check import placed
from gallery import mesh, values
from hypothesis import given
from hypothesis import strategies as st

import shardwise as sw
from shardwise.layouts import tree


class Layer(NamedTuple):
    w: object
    b: object


def test_paths_read_as_people_write_them():
    params = {"blocks": [Layer(1, None), Layer(3, 4)], "norm": {"scale": (5,)}}
    assert tree.items(params) == [
        ("blocks.0.w", 1), ("blocks.0.b", None), ("blocks.1.w", 3),
        ("blocks.1.b", 4), ("norm.scale.0", 5),
    ]  # fmt: skip
    assert tree.leaves(params) == [1, None, 3, 4, 5]
    assert tree.items(7) == [("", 7)]


TREES = st.recursive(
    st.one_of(st.none(), st.integers()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3),
        st.builds(Layer, inner, inner),
    ),
)


@given(TREES)
def test_parts_combine_to_the_whole(params):
    taken, rest = tree.partition(params, lambda path, leaf: leaf is not None and leaf % 2 == 0)
    assert tree.combine(taken, rest) == params
    assert len(tree.leaves(taken)) == len(tree.leaves(params))


@given(TREES)
def test_map_keeps_the_shape_and_none(params):
    doubled = tree.map(lambda a, b: a + b, params, params)
    assert tree.leaves(doubled) == [None if v is None else 2 * v for v in tree.leaves(params)]
    assert [p for p, _ in tree.items(doubled)] == [p for p, _ in tree.items(params)]


def test_masks_are_globs_over_paths_or_functions():
    assert tree.matches("*.bias", "blocks.0.bias", None)
    assert not tree.matches("bias", "blocks.0.bias", None)
    assert tree.matches(lambda path, leaf: leaf == 3, "x", 3)


def test_a_sharded_tensor_is_a_leaf():
    x = placed(values(4), mesh(a=2), "_/a")
    params = {"w": x, "n": None}
    doubled = sw.tree.map(lambda v: v * 2, params)
    assert doubled["w"].layout is x.layout
    assert sw.tree.items(params)[1][0] == "w"
    assert sw.tree.items(params)[1][1] is x
