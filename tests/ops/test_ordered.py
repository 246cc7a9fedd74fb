"""Running sums, sort, topk: audited in every layout, what moves over a cut dim."""

from __future__ import annotations

import pytest
import torch
from check import close, moves, placed, pulled, ran
from gallery import mesh, values

import shardwise as sw
from shardwise.ops.audit import report

SHAPE = (6, 12)
OPS = {
    "cumsum": lambda x: torch.cumsum(x, 1),
    "cumsum 0": lambda x: x.cumsum(0),
    "cumprod": lambda x: x.cumprod(-1),
    "logcumsumexp": lambda x: torch.logcumsumexp(x, 1),
    "sort": lambda x: torch.sort(x, 1),
    "sort down": lambda x: x.sort(0, True),
    "argsort": lambda x: x.argsort(1),
    "msort": lambda x: torch.msort(x),
    "topk": lambda x: torch.topk(x, 3, 1),
    "topk of many": lambda x: x.topk(8, 1, largest=False),
    "topk of none": lambda x: x.topk(0, 1),
}
WHOLE = {
    "kthvalue": lambda x: torch.kthvalue(x, 2, 1),
    "median": lambda x: x.median(1, keepdim=True),
}


@pytest.mark.parametrize("name", OPS)
def test_every_layout_on_one_axis_is_right_and_none_is_a_choice(name):
    found = report(OPS[name], [SHAPE])
    assert not found.wrong, found.wrong[:3]
    assert (len(found.right), len(found.choice)) == (10, 0)
    for (_, layout), result in found.right.items():
        if "topk" not in name and "U" not in layout:
            assert result.split(", ")[0] == layout
    if name.startswith("cumsum"):
        assert found.right["mesh(a=2)", "_ _ {U:a}"] == "_ _ {U:a}"


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("axes", [2, 3])
def test_random_layouts_on_more_axes(name, axes):
    found = report(OPS[name], [(12, 12)], axes=axes, samples=30)
    assert not found.wrong, found.wrong[:3]
    assert not found.choice


@pytest.mark.parametrize("name", WHOLE)
def test_a_cut_dim_is_a_choice_where_there_is_no_protocol(name):
    found = report(WHOLE[name], [SHAPE])
    assert not found.wrong, found.wrong[:3]
    assert found.choice == [("mesh(a=2)", "_ _/a"), ("mesh(a=3)", "_ _/a")]
    found = report(WHOLE[name], [(12, 12)], axes=2, samples=30)
    assert not found.wrong, found.wrong[:3]


def test_the_median_of_all_is_of_the_flattened_tensor():
    value = values(5, 3)
    assert sw.shard(value, mesh(a=2)).median().item() == value.median().item()


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", ["cumsum", "cumprod", "logcumsumexp"])
def test_running_sums_gather_one_total_per_block(name, n):
    x = placed(values(*SHAPE), mesh(a=n), "_ _/a")
    _, _, plan = pulled(OPS[name], [x], values(*SHAPE, seed=1))
    one = [("all_gather", "a", (n - 1) / n * 6 * n)]
    assert (moves(plan, "forward"), moves(plan, "backward")) == (one, one)


@pytest.mark.parametrize("n", [2, 3])
def test_a_sort_goes_to_another_dim_and_back(n):
    x = placed(values(*SHAPE), mesh(a=n), "_ _/a")
    y, _, plan = pulled(lambda x: x.sort(1).values, [x], values(*SHAPE, seed=1))
    assert y.layout is x.layout
    there = ("all_to_all", "a", (n - 1) / n * 72 / n)
    assert moves(plan, "forward") == [there] * 3  # values, and values and indices back
    assert moves(plan, "backward") == [there] * 2


def test_a_sort_of_the_only_dim_gathers():
    x = placed(values(12), mesh(a=2), "_/a")
    y, _, plan = pulled(lambda x: x.sort().values, [x], values(12, seed=1))
    assert y.layout is x.layout
    close(y, values(12).sort().values)
    assert moves(plan, "forward") == [("all_gather", "a", 6.0)]
    assert moves(plan, "backward") == [("all_gather", "a", 6.0)]


def test_a_stable_sort_keeps_the_order_of_ties():
    value = torch.randint(3, (4, 12), generator=torch.Generator().manual_seed(0))
    x = sw.shard(value, mesh(a=2), "_ _/a")
    got, want = x.sort(1, stable=True), torch.sort(value, dim=1, stable=True)
    assert torch.equal(got.values.full_tensor(), want.values)
    assert torch.equal(got.indices.full_tensor(), want.indices)


@pytest.mark.parametrize(("n", "k", "own"), [(2, 3, 3), (3, 3, 3), (3, 8, 4)])
def test_topk_gathers_candidates_only(n, k, own):
    x = placed(values(*SHAPE), mesh(a=n), "_ _/a")
    y, _, plan = pulled(lambda x: x.topk(k, 1).values, [x], values(6, k, seed=1))
    assert y.layout is sw.Layout("_ _")
    assert moves(plan, "forward") == [("all_gather", "a", (n - 1) * 6 * own)] * 2
    assert moves(plan, "backward") == []


def test_nothing_moves_where_other_dims_are_cut():
    x = placed(values(*SHAPE), mesh(a=2), "_/a _")
    for op in (lambda x: x.cumsum(1), lambda x: x.sort(1).values, lambda x: x.topk(2, 1).indices):
        y, plan = ran(lambda op=op: op(x))
        assert (y.layout, len(plan.collectives)) == (x.layout, 0)


def test_integers_widen_as_in_torch():
    x = sw.shard(torch.ones(6, dtype=torch.int32), mesh(a=3), "_/a")
    assert str(x.cumsum(0)) == "i64[6/a]"
    assert x.cumsum(0).full_tensor().tolist() == [1, 2, 3, 4, 5, 6]
    assert str(x.cumsum(0, dtype=torch.float32)) == "f32[6/a]"


def test_bad_arguments_say_so():
    x = sw.shard(values(4, 6), mesh(a=2))
    with pytest.raises(ValueError, match="topk: k is 7, but dim 1 of"):
        x.topk(7)
    with pytest.raises(IndexError, match="dim 2 is out of range"):
        x.cumsum(2)


def test_they_run_under_vmap():
    value = values(4, 12)
    x = placed(value, mesh(a=2), "_ _/a")
    close(sw.vmap(lambda x: x.cumsum(0))(x), value.cumsum(1))
    close(sw.vmap(lambda x: x.sort(0).values)(x), value.sort(1).values)
    close(sw.vmap(lambda x: x.topk(3, 0).values)(x), value.topk(3, 1).values)
