"""Buckets move what single conversions move: the same values, fewer collectives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from check import placed
from gallery import values

import shardwise as sw
from shardwise.optim import buckets

AXES = {"x": 2, "y": 2, "z": 3}
SHAPES = [(12, 12), (24, 12, 2), (12,), (12, 24, 12), ()]
# Whole and cut: over one axis, behind another, over two as one, on two dims, another order.
PAIRS = [
    ("... ", ".../x"),
    ("... {R:y}", ".../x {R:y}"),
    ("first/z ...", "first/z/x ..."),
    ("first/y ...", "first/y/z/x ..."),
    ("... last/z", "... last/z/x/y"),
    ("first/z ... last/x", "first/z ... last/x/y"),
    ("first/x ...", "first/y/x ..."),
    ("...", "first/x ... last/y"),
    ("...", "..."),
]


def pairs(mesh: sw.Mesh) -> list[tuple[Any, sw.Layout, sw.Layout]]:
    """A value with each pair of layouts that fits it, dims of different lengths mixed."""
    found = []
    for n, shape in enumerate(SHAPES):
        value = values(*shape, seed=n)
        for whole, cut in PAIRS:
            try:
                ends = [sw.shard(value, mesh, to).layout for to in (whole, cut)]
            except sw.LayoutError:
                continue
            found.append((value, *ends))
    return found


def owed(whole: sw.Layout, cut: sw.Layout) -> str:
    """The whole layout with sums owed over what the cut adds."""
    more = sorted({a for d in cut.dims for a in d} - {a for d in whole.dims for a in d})
    dims = " ".join("/".join(("_", *axes)) for axes in whole.dims)
    states = " ".join(
        f"{k}:{','.join(v)}" for k, v in (("U", more), ("R", sorted(whole.reduced))) if v
    )
    return dims + (f" {{{states}}}" if states else "")


@pytest.mark.parametrize("size", [0, 1000, 2**26])
def test_scattering_and_gathering_equal_single_conversions(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "SIZE", size)
    mesh = sw.make_mesh(AXES)
    found = pairs(mesh)
    assert len(found) > 30
    gathers = [sw.shard(value, mesh, cut) for value, _, cut in found]
    with sw.record() as together:
        whole = buckets.all_gathered(gathers, [to for _, to, _ in found])
    with sw.record() as apart:
        alone = [sw.reshard(x, to) for x, (_, to, _) in zip(gathers, found, strict=True)]
    check(whole, alone, together, apart, size)

    sums = [placed(value, mesh, owed(to, cut), n) for n, (value, to, cut) in enumerate(found)]
    with sw.record() as together:
        parts = buckets.reduce_scattered(sums, [cut for _, _, cut in found])
    with sw.record() as apart:
        alone = [sw.reshard(x, cut) for x, (_, _, cut) in zip(sums, found, strict=True)]
    check(parts, alone, together, apart, size)


def check(ours: Any, alone: Any, together: sw.Plan, apart: sw.Plan, size: int) -> None:
    for a, b in zip(ours, alone, strict=True):
        assert a._type is b._type
        assert all(torch.equal(s, t) for s, t in zip(a.shards, b.shards, strict=True))
    assert together.elements() == apart.elements()
    if size:
        assert together.count() < apart.count()
    else:
        assert together.count() == apart.count()


def test_results_have_memory_of_their_own_and_go_into_buffers() -> None:
    mesh = sw.make_mesh({"x": 2})
    xs = [sw.shard(values(*shape), mesh, "a b/x") for shape in ((4, 6), (2, 8))]
    layouts = [sw.Layout("a b")] * 2
    into = [
        sw.ShardedTensor(tuple(torch.zeros(x.shape, dtype=x.dtype) for _ in range(2)), t._type)
        for x, t in zip(xs, buckets.all_gathered(xs, layouts), strict=True)
    ]
    done = buckets.all_gathered(xs, layouts, [into[0], None])
    assert [s.data_ptr() for s in done[0].shards] == [s.data_ptr() for s in into[0].shards]
    for x, y in zip(xs, done, strict=True):
        assert torch.equal(y.full_tensor(), x.full_tensor())
        assert all(s.untyped_storage().nbytes() == s.numel() * 8 for s in y.shards)
    sums = [placed(values(*x.shape), mesh, "a b {U:x}") for x in xs]
    for y in buckets.reduce_scattered(sums, [x.layout for x in xs]):
        assert all(s.untyped_storage().nbytes() == s.numel() * 8 for s in y.shards)


def test_dtypes_and_meshes_have_buckets_of_their_own() -> None:
    one, other = sw.make_mesh({"x": 2}), sw.make_mesh({"x": 2, "y": 1})
    xs = [
        sw.shard(values(4).to(dtype), mesh, "a/x")
        for mesh in (one, other)
        for dtype in (torch.float64, torch.bfloat16)
        for _ in range(2)
    ]
    with sw.record() as plan:
        done = buckets.all_gathered(xs, [sw.Layout("a")] * len(xs))
    assert plan.count() == 4
    for x, y in zip(xs, done, strict=True):
        assert torch.equal(x.full_tensor(), y.full_tensor())


def test_nothing_to_move() -> None:
    assert (
        buckets.all_gathered([], []) == buckets.reduce_scattered([], []) == buckets.copies([]) == []
    )
