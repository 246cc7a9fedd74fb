"""Layouts and placements mean the same blocks; trees go to DTensors and back bit for bit."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from processes import environment, launch
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

import shardwise as sw
from shardwise import interop
from shardwise.interop.dtensors import placements, read_placements
from shardwise.layouts.layout import make

SIZES = {"x": 2, "y": 3, "z": 4}


def every_cut(axes: tuple[str, ...], ndim: int) -> list[sw.Layout]:
    """Every layout of `ndim` dims that cuts with some of the axes, in every order."""
    found = []
    for count in range(len(axes) + 1):
        for order in itertools.permutations(axes, count):
            for where in itertools.product(range(ndim), repeat=count):
                pairs = list(zip(order, where, strict=True))
                found.append(tuple(tuple(a for a, d in pairs if d == n) for n in range(ndim)))
    return [make(dims) for dims in dict.fromkeys(found)]


def test_placements_mean_the_same_blocks_in_every_order() -> None:
    mesh, shape = sw.make_mesh(SIZES), (24, 48)
    layouts = every_cut(tuple(SIZES), 2)
    strided = 0
    for layout in layouts:
        torchs = placements(layout, SIZES)
        strided += any(isinstance(p, _StridedShard) for p in torchs)
        assert read_placements(torchs, shape, mesh) is layout
        for coord in mesh.coords:
            local, offset = _compute_local_shape_and_global_offset(
                shape, tuple(SIZES.values()), list(coord.values()), torchs
            )
            ours = layout.index(shape, mesh, coord)
            assert tuple(local) == tuple(s.stop - s.start for s in ours), (layout, coord)
            assert tuple(offset) == tuple(s.start for s in ours), (layout, coord)
    # k axes make k! (k + 1) ordered cuts of 2 dims, of which 2^k are in mesh order
    assert len(layouts) == 1 + 3 * 2 + 3 * 6 + 24
    assert strided == len(layouts) - (1 + 3 * 2 + 3 * 4 + 8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b", [Replicate(), Replicate(), Replicate()]),
        ("a/x/z b/y", [Shard(0), Shard(1), Shard(0)]),
        ("a {U:x R:y}", [Partial("sum"), Replicate(), Replicate()]),
        ("a/z/x {U:y}", [_StridedShard(0, split_factor=4), Partial("sum"), Shard(0)]),
        ("a/z/x/y", [_StridedShard(0, split_factor=4), _StridedShard(0, split_factor=4), Shard(0)]),
    ],
)
def test_placements_by_hand(text: str, expected: list[Any]) -> None:
    assert placements(sw.Layout(text), SIZES) == expected


@pytest.mark.parametrize(
    ("given", "shape", "text"),
    [
        ([Shard(0), Replicate(), Replicate()], (5, 4), "dim 0 of size 5 is not divisible"),
        ([Partial("avg"), Replicate(), Replicate()], (4,), "on axis 'x' has no counterpart"),
        (
            [_StridedShard(0, split_factor=2), Replicate(), Shard(0)],
            (24,),
            "are no order of axes",
        ),
    ],
)
def test_placements_without_a_layout_are_refused(given: Any, shape: Any, text: str) -> None:
    with pytest.raises(sw.LayoutError, match=text):
        read_placements(given, shape, sw.make_mesh(SIZES))


def test_other_transports_are_refused() -> None:
    for mesh in (sw.make_mesh({"x": 2}), sw.make_mesh({"x": 2}, transport="abstract")):
        with pytest.raises(sw.MeshError, match=r"torchrun --nproc-per-node 2, or .*full_tensor"):
            interop.to_dtensor({"w": sw.zeros((4,), mesh, "a/x"), "step": 3})
        with pytest.raises(sw.MeshError, match="torchrun --nproc-per-node 2"):
            interop.to_device_mesh(mesh)


def test_import_does_not_load_torchs_dtensor() -> None:
    code = (
        "import sys, shardwise; shardwise.interop.module_params;"
        "print('torch.distributed.tensor' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


# On processes: each function runs in every one of them, and asserts there.


def conversions(sizes: dict[str, int]) -> int:
    """Every layout of a tensor, to a DTensor and back, compared with torch's own reading of it."""
    mesh = sw.make_mesh(sizes)
    dm = interop.to_device_mesh(mesh)
    assert dm.mesh_dim_names == tuple(sizes)
    assert tuple(dm.mesh.shape) == tuple(sizes.values())
    assert interop.from_device_mesh(dm) is mesh
    assert interop.to_device_mesh(mesh) is dm
    value = torch.arange(8.0 * 12, dtype=torch.float64).reshape(8, 12)
    states = [*every_cut(tuple(sizes), 2)]
    states += [sw.Layout(f"a b {{{s}:{axis}}}") for s in "UR" for axis in sizes]
    states += [sw.Layout(f"a/{a} b {{U:{b}}}") for a, b in itertools.permutations(sizes, 2)]
    for layout in states:
        x = sw.shard(value, mesh, layout)
        if layout.unreduced:  # parts that differ, or the sum would not show
            x = sw.reshard(x, layout) + sw.reshard(sw.shard(value, mesh), layout)
        expected = x.full_tensor()
        tree = interop.to_dtensor({"x": [x, 3, None]})
        there = tree["x"][0]
        assert tree["x"][1:] == [3, None]
        assert there.shape == (8, 12)
        assert there.stride() == (12, 1)
        assert there.dtype == torch.float64
        assert torch.equal(there.full_tensor(), expected), layout
        back = interop.from_dtensor(tree)["x"][0]
        if 1 not in sizes.values():  # the place of an axis of size 1 says nothing
            assert back.layout is make(layout.dims, layout.unreduced), (layout, back)
        assert back.mesh is mesh
        assert torch.equal(back.full_tensor(), expected), layout
        local = x.to_local().clone()
        there.to_local().zero_()  # its memory is its own
        assert torch.equal(x.to_local(), local)
    return len(states)


def from_torch(sizes: dict[str, int]) -> int:
    """DTensors that torch made, on its own device mesh and on slices of it."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = sw.make_mesh(sizes)
    value = torch.arange(8.0 * 12).reshape(8, 12)
    named = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    bare = init_device_mesh("cpu", tuple(sizes.values()))
    choices = [Shard(0), Shard(1), Replicate()]
    count = 0
    for given in itertools.product(choices, repeat=len(sizes)):
        for dm, theirs in ((named, None), (bare, mesh)):
            dt = distribute_tensor(value.clone(), dm, given)
            x = interop.from_dtensor(dt, mesh=theirs)
            assert x.mesh is mesh
            assert torch.equal(x.full_tensor(), value), given
            again = interop.to_dtensor(x)
            assert again.placements == tuple(given)
            dt.to_local().zero_()
            assert torch.equal(x.full_tensor(), value), given
            count += 1
    moving = distribute_tensor(value, named, [Shard(0)] * len(sizes))
    for copy in (True, False):  # a collective that torch has not waited for
        arrived = interop.from_dtensor(moving.redistribute(placements=given), copy=copy)
        assert type(arrived.to_local()) is torch.Tensor
        assert torch.equal(arrived.to_local(), value)
    with pytest.raises(sw.MeshError, match="pass names="):
        interop.from_dtensor(distribute_tensor(value, bare, [Shard(0)] * len(sizes)))
    assert interop.from_device_mesh(bare, tuple(sizes)) is mesh
    wide = sw.make_mesh({"other": math.prod(sizes.values())})
    with pytest.raises(sw.MeshError, match="not over the devices"):
        interop.from_dtensor(distribute_tensor(value, named, given), mesh=wide)
    for axis in sizes:  # slices are sub-meshes
        part = distribute_tensor(value, named[axis], [Shard(0)])
        x = interop.from_dtensor(part)
        assert dict(x.mesh.axes) == {axis: sizes[axis]}
        assert torch.equal(x.full_tensor(), value)
        assert x.mesh is mesh.at(**{a: mesh.coords[0][a] for a in sizes if a != axis})
        assert torch.equal(interop.to_dtensor(x).full_tensor(), value)
    with pytest.raises(sw.LayoutError, match="not divisible"):
        interop.from_dtensor(distribute_tensor(torch.ones(5), named, [Shard(0)] * len(sizes)))
    return count


def refusals(sizes: dict[str, int]) -> None:
    """What a DTensor cannot say, and sub-meshes that this process is no part of."""
    mesh = sw.make_mesh(sizes)
    first = next(iter(sizes))
    x = sw.shard(torch.ones(8), mesh, f"a/{first}")
    with pytest.raises(sw.LayoutError, match="detach"):
        sw.grad(lambda x: interop.to_dtensor(x).sum())(x)
    with pytest.raises(sw.LayoutError, match="@device"):
        interop.to_dtensor(sw.reshard(x, "... @host"))
    with pytest.raises(sw.MeshError, match="do not count up"):
        interop.to_device_mesh(mesh.at(**{first: (1, 0)}))
    alone = mesh.at(**dict.fromkeys(sizes, (0,)))
    y = sw.shard(torch.ones(8), alone, f"a/{first}")
    there = interop.to_dtensor(y)
    assert there.shape == (8,)
    assert there.to_local().numel() == (0 if alone.is_outside else 8)
    back = interop.from_dtensor(there)
    assert back.mesh is alone
    assert back.shards == () or torch.equal(back.to_local(), torch.ones(8))
    torch.manual_seed(torch.distributed.get_rank())  # the first parameters are equal all the same
    module = torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 4))
    with pytest.raises(
        sw.MeshError, match=r"module_params at test_dtensors.py:\d+: the parameters"
    ):
        interop.module_params(module, mesh, sw.strategies.rows({"*": "..."}))
    shared = interop.to_dtensor(x, copy=False)
    assert shared.to_local().data_ptr() == x.to_local().data_ptr()
    assert interop.from_dtensor(shared, copy=False).to_local().data_ptr() == x.to_local().data_ptr()


def everything(sizes: dict[str, int]) -> list[int]:
    counts = [conversions(sizes), from_torch(sizes)]
    refusals(sizes)
    return counts


@pytest.mark.processes
@pytest.mark.parametrize("sizes", [{"x": 2, "y": 1}, {"x": 2, "y": 2}], ids=str)
def test_processes(sizes: dict[str, int]) -> None:
    for outcome in launch(everything, math.prod(sizes.values()), sizes):
        assert outcome.value == [11 + 4 + 2, 2 * 3**2]
