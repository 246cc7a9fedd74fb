"""Making ShardedTensors: shard, from_local, from_callback, full, constants, padding."""

from __future__ import annotations

import pytest
import torch
from check import close, placed
from gallery import MESHES, SHAPES, mesh, values
from hypothesis import given, settings
from strategies import cases

import shardwise as sw
from shardwise import layouts
from shardwise.ops.audit import layouts_of


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_global_value_comes_back_from_every_layout(sizes, shape):
    on = mesh(**sizes)
    value = values(*shape)
    for layout in list(layouts_of(shape, on))[:60]:
        x = sw.shard(value, on, layout)
        assert x.layout is layout
        close(x, value)


@settings(deadline=None)
@given(cases(count=1))
def test_the_three_makers_agree(case):
    (layout,) = case.layouts
    one = sw.shard(case.value, case.mesh, layout)
    two = sw.from_callback(lambda index: case.value[index], case.value.shape, case.mesh, layout)
    three = sw.from_local(one.shards, case.mesh, layout)
    assert one._type is two._type is three._type
    for a, b in zip(one.shards, two.shards, strict=True):
        assert torch.equal(a, b)
    close(three, case.value)
    close(
        sw.full(case.value.shape, 2.5, case.mesh, layout, dtype=torch.float64),
        torch.full_like(case.value, 2.5),
    )


def test_trees_take_one_layout_or_a_tree_of_them():
    on = mesh(a=2)
    tree = {"w": values(4, 6), "b": [values(4), None, 3]}
    one = sw.shard(tree, on, "... ")
    assert [str(v) for v in sw.tree.leaves(one)] == ["f64[4]", "None", "i64[]", "f64[4 6]"]
    two = sw.shard(tree, on, {"w": "_ _/a", "b": ["_/a", None, ""]})
    assert [str(two["w"]), str(two["b"][0])] == ["f64[4 6/a]", "f64[4/a]"]
    assert sw.shard([[1.0, 2.0]], on)[0][0].item() == 1.0


def test_shard_does_not_alias_the_callers_memory():
    value = values(4)
    x = sw.shard(value, mesh(a=2), "_")
    value.zero_()
    close(x, values(4))


def test_shard_is_not_differentiated_through():
    p = values(4).requires_grad_()
    x = sw.shard(p, mesh(a=2), "_/a")
    assert not x.requires_grad
    with pytest.raises(TypeError, match="reshard"):
        sw.shard(x, mesh(a=2))


def test_from_callback_asks_once_per_distinct_block():
    asked = []

    def fn(index):
        asked.append(index)
        return values(4, 6)[index]

    x = sw.from_callback(fn, (4, 6), mesh(a=2, b=3), "_/a _")
    assert len(asked) == 2
    close(x, values(4, 6))


def test_an_abstract_mesh_asks_for_nothing():
    on = sw.make_mesh({"data": 4096}, transport="abstract")
    x = sw.from_callback(
        lambda index: pytest.fail("called"), (8192,), on, "_/data", dtype=torch.bfloat16
    )
    assert (str(x), x.shards[0].device.type) == ("bf16[8192/data]", "meta")
    assert sw.shard(torch.zeros(8192, 2), on, "b/data d").local_shape == (2, 2)


def test_bad_blocks_say_what_is_wrong(golden):
    on = mesh(a=2, b=2)
    block = torch.zeros(2, 3)
    attempts = [
        lambda: sw.from_local([block] * 3, on, "_/a _"),
        lambda: sw.from_local(block, on, "_/a _"),
        lambda: sw.from_local([block, block, torch.zeros(2, 4), torch.zeros(1, 3)], on, "_/a _"),
        lambda: sw.from_local([block, block.double(), block, block], on, "_/a _"),
        lambda: sw.from_local([block] * 4, on, "_/a"),
        lambda: sw.from_local([block] * 4, on, "_/c _"),
        lambda: sw.from_callback(lambda index: torch.zeros(4, 3), (4, 3), on, "_/a _"),
        lambda: sw.shard(torch.zeros(4, 3), on, "_/a"),
        lambda: sw.shard(torch.zeros(4, 3), on, "_ _/a"),
        lambda: sw.full((3,), 1.0, on, "_/a"),
    ]
    said = []
    for attempt in attempts:
        with pytest.raises((sw.LayoutError, sw.MeshError)) as caught:
            attempt()
        said.append(str(caught.value))
    golden("place", "\n".join(said))


def test_integers_are_replicated_or_cut_only(golden):
    on = mesh(a=2)
    said = []
    for attempt in (
        lambda: sw.shard(torch.arange(4), on, "n {U:a}"),
        lambda: sw.from_local([torch.arange(4)] * 2, on, "n {U:a}"),
        lambda: sw.zeros((4,), on, "n {U:a}", dtype=torch.bool),
        lambda: sw.reshard(sw.shard(torch.arange(4), on), "n {U:a}"),
    ):
        with pytest.raises(sw.LayoutError) as caught:
            attempt()
        assert caught.value.kind == "meaningless"
        said.append(str(caught.value))
    golden("integers", "\n".join(said))


def test_a_plain_tensor_beside_a_sharded_one_is_a_constant():
    on = mesh(a=2)
    x, w = placed(values(4, 6), on, "_/a _"), values(6, 2)
    close(x @ w, values(4, 6) @ w)
    close(
        w.T @ sw.reshard(x, "_ _").T if hasattr(type(x), "T") else x @ w,
        (w.T @ values(4, 6).T) if hasattr(type(x), "T") else values(4, 6) @ w,
    )
    g = sw.grad(lambda x: (x * values(4, 6)).sum())(x)
    close(g, values(4, 6))


def test_padding_makes_a_dim_divisible():
    x = layouts.pad_to_multiple(torch.ones(5, 3), 0, 4)
    assert x.shape == (8, 3)
    assert x[5:].sum() == 0
    assert layouts.pad_to_multiple(torch.ones(5, 3), -1, 2).shape == (5, 4)
    same = torch.ones(4)
    assert layouts.pad_to_multiple(same, 0, 4) is same
