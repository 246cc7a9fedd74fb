"""A memory budget: peaks that are true to the byte, and values computed again; equal bits."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from graphs import NETS, collectives, counts, everything, graph_of, noted, passed, same_bits
from lockstep import Net, total, traced
from torch import Tensor
from torch.fx import GraphModule

from shardwise.ops.budget import BudgetError
from shardwise.ops.meter import Meter
from shardwise.ops.transforms.bucketing import bucketed, deduplicated
from shardwise.ops.transforms.lifetimes import peak_bytes
from shardwise.ops.transforms.order import name_of
from shardwise.ops.transforms.overlap import overlapped
from shardwise.ops.transforms.recompute import INDUCTOR_FUSES, recomputed


def measured(module: GraphModule, inputs: list[Tensor]) -> int:
    """The peak of a real run of a graph without collectives, or with those of the fake backend."""
    meter = Meter()
    for x in inputs:
        meter.hold(x)
    with meter, torch.no_grad():
        module(*inputs)
    return meter.peak


@contextlib.contextmanager
def fake_group(size: int) -> Iterator[None]:
    """A group whose collectives cost memory but move nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", NETS)
def test_the_peak_is_the_allocators_to_the_byte(name: str) -> None:
    net = NETS[name]
    module = copy.deepcopy(graph_of(net))
    with fake_group(net.ranks):
        assert peak_bytes(module) == measured(module, net.inputs()[0])
        everything(module)
        assert peak_bytes(module) == measured(module, net.inputs()[0])


@pytest.mark.parametrize(
    ("is_sharded", "again"), [(True, ()), (True, ("all_gather",)), (False, ())]
)
def test_a_budget_is_kept(is_sharded: bool, again: tuple[str, ...]) -> None:
    net = Net(layers=2, rows=4, length=12, width=8, is_sharded=is_sharded)
    before = graph_of(net)
    peak = peak_bytes(before)
    after = passed(before, lambda m: recomputed(m, int(peak * 0.6), again=again))
    assert peak_bytes(after) <= int(peak * 0.6)
    with fake_group(net.ranks):
        assert measured(after, net.inputs()[0]) == peak_bytes(after)
    assert same_bits(after, before, net.inputs())
    twice = [n for n in after.graph.nodes if n.meta.get("recomputed")]
    assert twice
    if not again:
        assert counts(after) == counts(before)


def test_a_gather_runs_again_if_it_may() -> None:
    net = Net(ranks=4, layers=3, rows=1, length=2, width=16)  # gathered parameters take most
    before = copy.deepcopy(graph_of(net))
    for node in collectives(before):
        if name_of(node) == "all_gather_into_tensor":
            noted(node, "forward")
    budget = int(peak_bytes(before) * 0.85)
    after = passed(before, lambda m: recomputed(m, budget, again=("all_gather",)))
    with pytest.raises(BudgetError):
        passed(before, lambda m: recomputed(m, budget))
    assert counts(after)["all_gather_into_tensor"] > counts(before)["all_gather_into_tensor"]
    assert counts(after)["reduce_scatter_tensor"] == counts(before)["reduce_scatter_tensor"]
    phases = [n.meta["collective"].phase for n in collectives(after) if "collective" in n.meta]
    assert sorted(dict.fromkeys(phases)) == ["forward", "regather"]
    assert counts(passed(after, deduplicated)) == counts(after)
    assert same_bits(passed(after, deduplicated, bucketed, overlapped), before, net.inputs())


def test_an_impossible_budget_is_refused_and_nothing_changes() -> None:
    before = graph_of(NETS["whole"])
    module = copy.deepcopy(before)
    peak = peak_bytes(before)
    with pytest.raises(BudgetError) as caught:
        recomputed(module, 20_000)
    least = 20_000 + caught.value.shortfall
    assert f"the least peak is {least:,} B" in str(caught.value)
    assert "no choice of values to recompute fits 20,000 B per device" in str(caught.value)
    assert least < peak
    assert str(module.graph) == str(before.graph)
    assert peak_bytes(recomputed(module, least)) <= least


def test_without_a_budget_or_need_nothing_changes() -> None:
    before = graph_of(NETS["whole"])
    for budget in (None, peak_bytes(before), "1GiB"):
        assert str(passed(before, lambda m, b=budget: recomputed(m, b)).graph) == str(before.graph)


def test_cheap_values_go_before_matmuls() -> None:
    def step(x: Tensor, w: Tensor) -> list[Tensor]:
        a = x @ w  # 16 KiB each; a is read again at the end, b too
        b = a.exp()
        c = (b @ w).sin()
        return [(c @ w + a).sum(0) + b.sum(0)]

    inputs = [[torch.randn(64, 64), torch.randn(64, 64)]]
    before = traced(step, *inputs[0])
    after = passed(before, lambda m: recomputed(m, peak_bytes(before) - 16_384))
    twice = [n.target for n in after.graph.nodes if n.meta.get("recomputed")]
    assert twice == [torch.ops.aten.exp.default]
    assert same_bits(after, before, inputs)


def test_what_one_kernel_makes_and_reads_takes_no_memory() -> None:
    def step(x: Tensor, y: Tensor) -> list[Tensor]:
        a = torch._foreach_mul([x, y], 2.0)
        b = torch._foreach_add(a, 1.0)
        return [*torch._foreach_sqrt(b), b[0]]

    module = traced(step, torch.randn(256), torch.randn(256))
    assert peak_bytes(module) == 6 * 1024  # inputs, and two lists at a time
    # The results, and that part of `b` which is a result; `a` and the other part are in registers.
    assert peak_bytes(module, fused=("_foreach_",)) == 5 * 1024
    with pytest.raises(BudgetError):
        recomputed(module, 5 * 1024)
    recomputed(module, 5 * 1024, fused=INDUCTOR_FUSES)


@pytest.mark.parametrize("kind", ["rand", "write", "all_reduce"])
def test_some_values_are_never_computed_again(kind: str) -> None:
    def step(x: Tensor) -> list[Tensor]:
        if kind == "rand":
            long = torch.bernoulli(x.sigmoid())
        elif kind == "all_reduce":
            long = total(x)
        else:
            long = x.exp()
        y = x.sin() * 2.0
        y = (y.cos() + y).sum()
        if kind == "write":
            x.copy_(x * 2.0)
        return [y, (long * x).sum()]

    module = traced(step, torch.randn(1024))
    text = str(module.graph)
    with pytest.raises(BudgetError):
        recomputed(module, peak_bytes(module) - 4096, again=("all_gather",))
    assert str(module.graph) == text
