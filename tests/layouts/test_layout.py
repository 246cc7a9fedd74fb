"""Layouts place blocks: local shapes, indices that tile the tensor, divisibility."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from gallery import mesh
from hypothesis import given
from strategies import cases

import shardwise as sw


@given(cases(count=1, states=["replicated"]))
def test_blocks_tile_the_tensor_exactly(case):
    (layout,) = case.layouts
    covered = torch.zeros(case.value.shape, dtype=torch.int64)
    for coord in case.mesh.coords:
        index = layout.index(case.value.shape, case.mesh, coord)
        covered[index] += 1
        assert case.value[index].shape == layout.local_shape(case.value.shape, case.mesh)
    copies = case.mesh.group_size(
        tuple(a for a in case.mesh.axes if layout.state(a) == "replicated")
    )
    assert bool((covered == copies).all())


@given(cases(count=1, states=["replicated"]))
def test_the_index_is_the_block_that_shard_puts_there(case):
    x = sw.shard(case.value, case.mesh, case.layouts[0])
    for coord, block in zip(case.mesh.coords, x.shards, strict=True):
        assert torch.equal(block, case.value[x.layout.index(x.shape, x.mesh, coord)])


def test_axes_of_a_dim_are_major_to_minor():
    on = mesh(a=2, b=3)
    starts = {
        text: [sw.Layout(text).index((6,), on, c)[0].start for c in on.coords]
        for text in ("n/a/b", "n/b/a")
    }
    assert starts == {"n/a/b": [0, 1, 2, 3, 4, 5], "n/b/a": [0, 2, 4, 1, 3, 5]}


def test_layouts_are_one_object_after_copy_and_pickle():
    layout = sw.Layout("b/data s {U:pipe} @host")
    assert copy.deepcopy(layout) is layout
    assert pickle.loads(pickle.dumps(layout)) is layout
    assert {layout: 1}[sw.Layout("x/data y {U:pipe} @host")] == 1


def test_a_layout_says_the_state_of_every_axis():
    layout = sw.Layout("b/data s/pipe/row d {U:col R:tensor}")
    assert [layout.state(a) for a in ("data", "pipe", "row", "col", "tensor", "other")] == [
        0, 1, 1, "unreduced", "reduced", "replicated",
    ]  # fmt: skip
    assert layout.dims == (("data",), ("pipe", "row"), ())
    assert layout.unreduced == {"col"}
    assert layout.reduced == {"tensor"}
    assert (layout.memory, dict(layout.at), layout.ndim) == ("device", {}, 3)
    assert dict(sw.Layout("_ @pipe=0,-1").at) == {"pipe": (0, -1)}


def test_an_indivisible_dim_names_dim_axis_sizes_and_the_helper(golden):
    on = mesh(data=2, tensor=4)
    said = []
    for text in ("b/tensor d", "b d/data/tensor", "b/data d/tensor"):
        with pytest.raises(sw.LayoutError) as caught:
            sw.shard(torch.zeros(7, 12), on, text)
        assert caught.value.kind == "indivisible"
        said.append(str(caught.value))
    golden("indivisible", "\n".join(said))
