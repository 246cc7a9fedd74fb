"""Meshes: interned grids, positions and groups by name, sub-meshes, refinement, bad input."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from gallery import MESHES, mesh
from hypothesis import given
from hypothesis import strategies as st

import shardwise as sw
from shardwise.meshlib.mesh import abstract_twin, position
from shardwise.meshlib.simulated import SimulatedTransport


def test_the_same_axes_are_the_same_mesh():
    assert mesh(a=2, b=3) is mesh(a=2, b=3)
    assert mesh(a=2, b=3) is not mesh(b=3, a=2)
    assert copy.deepcopy({"m": mesh(a=2)})["m"] is mesh(a=2)
    assert str(mesh(data=2, tensor=4)) == "mesh(data=2, tensor=4)"
    assert str(mesh(data=2).at(data=0)) == "mesh()"


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_devices_count_in_axis_order_major_to_minor(sizes):
    on = mesh(**sizes)
    every = list(itertools.product(*(range(n) for n in sizes.values())))
    assert [tuple(c.values()) for c in on.coords] == every
    assert on.size == len(every)
    assert on.positions(tuple(on.axes)) == tuple(range(on.size))
    for axis in on.axes:
        assert on.positions((axis,)) == tuple(c[axis] for c in on.coords)


@given(st.permutations(["a", "b", "c"]), st.integers(1, 3))
def test_groups_partition_the_devices_and_follow_the_order_of_axes(order, count):
    on = mesh(a=2, b=3, c=2)
    axes = tuple(order[:count])
    groups = SimulatedTransport(on.axes).groups(axes)
    assert sorted(i for group in groups for i in group) == list(range(on.size))
    for group in groups:
        assert [position(on.axes, on.coords[i], axes) for i in group] == list(range(len(group)))
        others = [{a: v for a, v in on.coords[i].items() if a not in axes} for i in group]
        assert all(other == others[0] for other in others)


AT = [  # coordinates, axes left, device numbers on mesh(a=2, b=4)
    ({"a": 0}, {"b": 4}, (0, 1, 2, 3)),
    ({"a": -1}, {"b": 4}, (4, 5, 6, 7)),
    ({"b": 1}, {"a": 2}, (1, 5)),
    ({"b": (0, -1)}, {"a": 2, "b": 2}, (0, 3, 4, 7)),
    ({"b": (3, 0)}, {"a": 2, "b": 2}, (3, 0, 7, 4)),
    ({"a": 1, "b": 2}, {}, (6,)),
    ({"b": [2]}, {"a": 2, "b": 1}, (2, 6)),
    ({}, {"a": 2, "b": 4}, tuple(range(8))),
]


@pytest.mark.parametrize(("coords", "axes", "ranks"), AT)
def test_at_takes_a_sub_mesh_by_name(coords, axes, ranks):
    sub = mesh(a=2, b=4).at(**coords)
    assert dict(sub.axes) == axes
    assert sub.ranks == ranks
    assert sub.size == len(ranks)


def test_refine_names_the_same_devices_more_finely():
    on = mesh(data=2, tensor=4)
    fine = on.refine("tensor", row=2, col=2)
    assert dict(fine.axes) == {"data": 2, "row": 2, "col": 2}
    assert fine.ranks == on.ranks
    assert on.refine("tensor", tensor=4) is on
    assert dict(on.refine("data", data=1, d=2).axes) == {"data": 1, "d": 2, "tensor": 4}
    assert on.at(data=1).refine("tensor", x=4).ranks == (4, 5, 6, 7)


def test_an_abstract_mesh_has_any_size_and_one_shard():
    on = sw.make_mesh({"data": 512, "tensor": 8}, transport="abstract")
    assert (on.size, len(on.coords), on.shard_device.type) == (4096, 1, "meta")
    assert abstract_twin(mesh(a=2)).transport == "abstract"
    assert abstract_twin(on) is on
    assert abstract_twin(mesh(a=2)) is abstract_twin(mesh(a=2))


def test_minus_one_is_what_the_world_leaves():
    assert dict(sw.make_mesh({"data": -1, "tensor": 4}, transport="simulated").axes) == {
        "data": 1,
        "tensor": 4,
    }


def test_bad_meshes_say_what_is_wrong(golden):
    on = mesh(data=2, tensor=4)
    attempts = [
        lambda: sw.make_mesh({"data": 0}),
        lambda: sw.make_mesh({"data": 2.0}),
        lambda: sw.make_mesh({"data": True}),
        lambda: sw.make_mesh({"da ta": 2}),
        lambda: sw.make_mesh({"a": -1, "b": -1}),
        lambda: sw.make_mesh({"a": 2}, transport="simulate"),
        lambda: on.at(dat=0),
        lambda: on.at(data=2),
        lambda: on.at(data=()),
        lambda: on.at(data=(0, 0)),
        lambda: on.at(data=(0, -2)),
        lambda: on.refine("tensr", a=4),
        lambda: on.refine("tensor", a=2, b=3),
        lambda: on.refine("tensor", data=2, b=2),
        lambda: on.check_axes(["tensors"]),
    ]
    said = []
    for attempt in attempts:
        with pytest.raises(sw.MeshError) as caught:
            attempt()
        said.append(str(caught.value))
    golden("mesh", "\n".join(said))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("rows", [0, 6])
def test_collectives_of_one_process_move_exactly(dtype, rows):
    on = mesh(a=2, b=3)
    shards = [(torch.arange(rows * 6).reshape(rows, 6) + i).to(dtype) for i in range(6)]
    comm = on.comm
    for axes in (("a",), ("b",), ("a", "b"), ("b", "a")):
        n = on.group_size(axes)
        gathered = comm.all_gather(shards, axes, 1)
        assert gathered[0].shape == (rows, 6 * n)
        summed = comm.all_reduce(shards, axes)
        scattered = comm.reduce_scatter(shards, axes, 1)
        back = comm.all_gather(scattered, axes, 1)
        for s, b in zip(summed, back, strict=True):
            assert torch.equal(s, b)
        there = comm.all_to_all(shards, axes, 1, 0)
        for s, b in zip(shards, comm.all_to_all(there, axes, 0, 1), strict=True):
            assert torch.equal(s, b)
        ring = [(i, (i + 1) % n) for i in range(n)]
        moved = shards
        for _ in range(n):
            moved = comm.permute(moved, axes, ring)
        for s, b in zip(shards, moved, strict=True):
            assert torch.equal(s, b)
