"""Passes over the graph of a step: fewer collectives, earlier starts, less memory; equal bits."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lockstep import GROUP, Lockstep, Net, equal, gather, scatter, total, traced, wait
from processes import launch
from torch import Tensor
from torch.fx import GraphModule, Node

from shardwise.meshlib.record import Collective
from shardwise.ops.budget import BudgetError
from shardwise.ops.meter import Meter
from shardwise.ops.transforms.bucketing import bucketed, deduplicated
from shardwise.ops.transforms.lifetimes import peak_bytes
from shardwise.ops.transforms.order import is_collective, is_wait, name_of, size
from shardwise.ops.transforms.overlap import INDUCTOR, overlapped
from shardwise.ops.transforms.recompute import INDUCTOR_FUSES, recomputed

_functional: Any = torch.ops._c10d_functional
NETS = {
    "sharded": Net(),
    "three ranks": Net(ranks=3, width=12),
    "whole": Net(is_sharded=False),
}
GPT = Net(layers=4, rows=4, length=16, width=16)


@functools.cache
def graph_of(net: Net) -> GraphModule:
    """The graph of a net's step; copy it before a pass."""
    return net.graph()


def counts(module: GraphModule) -> dict[str, int]:
    """How many collectives of each name a graph has."""
    found: dict[str, int] = {}
    for node in module.graph.nodes:
        if is_collective(node):
            found[name_of(node)] = found.get(name_of(node), 0) + 1
    return found


def collectives(module: GraphModule) -> list[Node]:
    return [node for node in module.graph.nodes if is_collective(node)]


def ranks(*shape: int, n: int = 2, count: int = 1) -> list[list[Tensor]]:
    """Inputs of every rank."""
    return [[torch.randn(shape) for _ in range(count)] for _ in range(n)]


def noted(node: Node, phase: Any, size: int = 4) -> None:
    """Give a collective a record, as the lowering does."""
    node.meta["collective"] = Collective(
        "all_gather", ("data",), 2, size, 4.0 * size, torch.float32, (size,), None, phase,
        "train.py:1", "use", f"w{size}", "use",
    )  # fmt: skip


def same_bits(module: GraphModule, before: GraphModule, inputs: list[list[Tensor]]) -> bool:
    return equal(Lockstep(module)(inputs), Lockstep(before)(inputs))


def passed(module: GraphModule, *passes: Callable[[GraphModule], Any]) -> GraphModule:
    """A copy after some passes."""
    module = copy.deepcopy(module)
    for one in passes:
        assert one(module) is module
    return module


# Collectives that are there twice.


def twice(x: Tensor) -> list[Tensor]:
    """The same gather twice, once of a view of a cast and once of the same view of another."""
    one = gather(x.to(torch.float64).view(2, -1), 2)
    two = gather(x.to(torch.float64).view(2, -1), 2)
    return [one.sum(0), two * 3.0, total(x), total(x, "max")]


def test_the_same_value_is_sent_once() -> None:
    before = traced(twice, torch.randn(4))
    after = passed(before, deduplicated)
    assert counts(before) == {"all_gather_into_tensor": 2, "all_reduce": 2}
    assert counts(after) == {"all_gather_into_tensor": 1, "all_reduce": 2}  # a sum and a maximum
    assert sum(map(is_wait, after.graph.nodes)) == 3
    assert same_bits(after, before, ranks(4))


def test_other_groups_are_other_collectives() -> None:
    def step(x: Tensor) -> list[Tensor]:
        return [wait(_functional.all_reduce(x, "sum", g)) for g in ("0", "1")]

    assert counts(passed(traced(step, torch.randn(4)), deduplicated)) == {"all_reduce": 2}


@pytest.mark.parametrize(("phase", "left"), [("forward", 1), ("regather", 2), ("recompute", 2)])
def test_what_saves_memory_is_not_undone(phase: str, left: int) -> None:
    def step(x: Tensor) -> list[Tensor]:
        return [gather(x, 2).sum(), gather(x, 2).exp()]

    before = traced(step, torch.randn(4))
    first, second = collectives(before)
    noted(first, "forward")
    noted(second, phase)
    after = passed(before, deduplicated)
    assert len(collectives(after)) == left
    assert same_bits(after, before, ranks(4))


def test_what_may_differ_from_rank_to_rank_is_never_merged() -> None:
    def step(x: Tensor) -> list[Tensor]:  # on another rank the second slice starts elsewhere
        return [total(x[0:2]), total(x[0:2])]

    assert counts(passed(traced(step, torch.randn(4)), deduplicated)) == {"all_reduce": 2}


def test_a_value_that_is_overwritten_is_another_value() -> None:
    def step(x: Tensor, y: Tensor) -> list[Tensor]:
        return [total(x), total(x.copy_(y))]

    before = traced(step, torch.randn(4), torch.randn(4))
    given = next(iter(before.graph.nodes))
    second = collectives(before)[1]
    second.args = (given, *second.args[1:])  # reads the same node, but after the write
    before.recompile()
    after = passed(before, deduplicated, bucketed, overlapped)
    assert counts(after) == {"all_reduce": 2}
    inputs = ranks(4, count=2)
    one = Lockstep(after)(copy.deepcopy(inputs))
    two = Lockstep(before)(copy.deepcopy(inputs))
    assert equal(one, two)
    assert not torch.equal(one[0][0], one[0][1])


# Buckets.


@pytest.mark.parametrize("name", NETS)
def test_buckets_leave_one_collective_of_each_kind(name: str) -> None:
    net = NETS[name]
    before = graph_of(net)
    after = passed(before, bucketed)
    n = len(net.shapes)
    if net.is_sharded:
        assert counts(before) == {
            "all_gather_into_tensor": n, "reduce_scatter_tensor": n, "all_reduce": 2,
        }  # fmt: skip
        # Norm and loss do not depend on each other.
        expected = {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1, "all_reduce": 1}
    else:
        assert counts(before) == {"all_reduce": n + 2}
        expected = {"all_reduce": 2}  # the norm is taken of summed gradients
    assert counts(after) == expected
    assert same_bits(after, before, net.inputs())


def test_no_bucket_is_larger_than_the_cap() -> None:
    net = NETS["sharded"]
    before = graph_of(net)
    cap = 2000  # the largest parameters have 1024 bytes
    after = passed(before, lambda m: bucketed(m, cap=cap))
    full = [max(size(c), size(c.all_input_nodes[0])) for c in collectives(after)]
    assert max(full) <= cap
    assert 6 < len(full) < 20
    assert same_bits(after, before, net.inputs())
    one_by_one = passed(before, lambda m: bucketed(m, cap=31))
    assert counts(one_by_one)["all_gather_into_tensor"] == len(net.shapes)


def test_members_are_near_each_other() -> None:
    net = NETS["sharded"]
    before = graph_of(net)
    after = passed(before, lambda m: bucketed(m, window=3))
    # Twelve gathers in a row: with three later ones allowed, four to a bucket.
    assert counts(after)["all_gather_into_tensor"] == 3
    assert same_bits(after, before, net.inputs())


def test_what_depends_on_a_member_is_no_member() -> None:
    def step(x: Tensor, y: Tensor) -> list[Tensor]:
        a = total(x)
        b = total(a * 2.0)
        return [a, b, total(y)]

    before = traced(step, torch.randn(4), torch.randn(4))
    after = passed(before, bucketed)
    assert counts(after) == {"all_reduce": 2}
    assert same_bits(after, before, ranks(4, count=2))


def crossed(x: Tensor, y: Tensor) -> list[Tensor]:
    a = total(x)
    b = gather(a, 2)  # after a
    c = gather(y, 2)
    d = total(c)  # after c: with a and d joined and b and c joined, each waits for the other
    return [b, d]


def between(x: Tensor, y: Tensor) -> list[Tensor]:
    a = total(x)
    early = a.sin()
    b = gather(y, 2)
    c = total(b)  # joined with a, so that `early` comes after b
    return [c, gather(early, 2)]


@pytest.mark.parametrize("step", [crossed, between])
def test_two_buckets_never_wait_for_each_other(step: Callable[..., list[Tensor]]) -> None:
    before = traced(step, torch.randn(4), torch.randn(4))
    after = passed(before, bucketed)
    assert sum(counts(after).values()) == 3
    assert same_bits(after, before, ranks(4, count=2))


def test_members_are_alike() -> None:
    def step(x: Tensor, y: Tensor) -> list[Tensor]:
        parts = [total(x), total(y), total(x, "max"), total(x * 2.0), gather(x, 2)]
        return [*parts, wait(_functional.all_reduce(x + 1.0, "sum", "1"))]

    inputs = [[torch.randn(4), torch.randn(4, dtype=torch.float64)] for _ in range(2)]
    before = traced(step, *inputs[0])
    after = passed(before, bucketed)
    assert counts(after) == {"all_reduce": 4, "all_gather_into_tensor": 1}
    assert same_bits(after, before, inputs)


def test_a_gather_for_the_backward_is_joined_with_its_like_only() -> None:
    def step(a: Tensor, b: Tensor) -> list[Tensor]:
        return [gather(x, 2) for x in (a, b, a, b)]

    before = traced(step, torch.randn(4), torch.randn(4))
    for node, phase in zip(collectives(before), ["forward"] * 2 + ["regather"] * 2, strict=True):
        noted(node, phase)
    after = passed(before, deduplicated, bucketed)
    assert [c.meta["collective"].phase for c in collectives(after)] == ["forward", "regather"]
    assert same_bits(after, before, ranks(4, count=2))


def test_records_are_joined() -> None:
    def step(a: Tensor, b: Tensor) -> list[Tensor]:
        return [gather(a, 2), gather(b, 2)]

    before = traced(step, torch.randn(4), torch.randn(6))
    for node, number in zip(collectives(before), (4, 6), strict=True):
        noted(node, "forward", number)
    (node,) = collectives(passed(before, bucketed))
    entry = node.meta["collective"]
    assert (entry.elements, entry.bytes, entry.shape, entry.path) == (10, 40.0, (10,), None)
    assert (entry.op, entry.source, entry.kind) == ("use", "train.py:1", "all_gather")


def test_values_of_new_nodes_are_known() -> None:
    net = NETS["sharded"]
    after = passed(graph_of(net), bucketed)
    inputs = iter(net.inputs()[0])
    env: dict[Node, Any] = {}
    for node in after.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(inputs)
        elif node.op == "call_function":
            known = node.meta["val"]
            if is_collective(node) or is_wait(node):  # shapes only
                env[node] = torch.zeros(known.shape) if is_collective(node) else env[node.args[0]]
            else:
                args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), env.__getitem__)
                env[node] = node.target(*args, **kwargs)
            if isinstance(known, Tensor):
                found = env[node]
                assert (known.shape, known.dtype) == (found.shape, found.dtype), node
                assert known.stride() == found.stride(), node


# Starts and waits.


def distance(module: GraphModule, kind: str) -> float:
    """Mean number of ops that compute between starts and waits of a kind."""
    nodes = list(module.graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    found = []
    for node in collectives(module):
        if name_of(node) == kind:
            between = nodes[place[node] + 1 : min(place[u] for u in node.users)]
            found.append(sum(not name_of(n) and n.op == "call_function" for n in between))
    return sum(found) / len(found)


def flights(module: GraphModule) -> list[int]:
    """Bytes in flight whenever a collective starts."""
    flying: dict[Node, int] = {}
    found = []
    for node in module.graph.nodes:
        if is_collective(node):
            flying[node] = size(node) + sum(map(size, node.all_input_nodes))
            found.append(sum(flying.values()))
        elif is_wait(node):
            flying.pop(node.args[0], None)
    return found


@pytest.mark.parametrize("name", NETS)
def test_collectives_run_beside_computation(name: str) -> None:
    net = NETS[name]
    before = graph_of(net)
    after = passed(before, overlapped)
    assert counts(after) == counts(before)
    for kind in counts(before):
        assert distance(before, kind) == 0.0
        assert distance(after, kind) > 10.0
    assert same_bits(after, before, net.inputs())
    assert str(passed(after, overlapped).graph) == str(after.graph)


def test_bytes_in_flight_stay_within_the_window() -> None:
    net = NETS["sharded"]
    before = graph_of(net)
    wide = passed(before, overlapped)
    window = 4000  # the largest gather needs 1536
    narrow = passed(before, lambda m: overlapped(m, window=window))
    assert max(flights(wide)) > window
    assert max(flights(narrow)) <= window
    for kind in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        assert 0.0 < distance(narrow, kind) < distance(wide, kind)
    alone = passed(before, lambda m: overlapped(m, window=1))
    largest = [size(c) + sum(map(size, c.all_input_nodes)) for c in collectives(alone)]
    assert flights(alone) == largest  # nothing flies beside another
    for module in (narrow, alone):
        assert same_bits(module, before, net.inputs())


def test_gathers_come_in_the_order_of_their_use() -> None:
    def step(a: Tensor, b: Tensor) -> list[Tensor]:
        late, early = gather(a, 2), gather(b, 2)
        first = early * 2.0
        return [first, first.exp() + late]

    before = traced(step, torch.randn(4), torch.randn(4))
    assert [str(c.args[0]) for c in collectives(before)] == ["a_1", "b_1"]
    after = passed(before, overlapped)
    assert [str(c.args[0]) for c in collectives(after)] == ["b_1", "a_1"]
    assert same_bits(after, before, ranks(4, count=2))


def test_a_collective_of_anothers_result_waits_no_earlier() -> None:
    def step(x: Tensor, y: Tensor) -> list[Tensor]:
        a, last = total(x), y
        for _ in range(5):
            last = last.sin()
        return [gather(a, 2), gather(torch.cat([a, y]), 2), last]

    before = traced(step, torch.randn(4), torch.randn(4))
    after = passed(before, overlapped)
    assert distance(after, "all_reduce") == 5.0
    assert same_bits(after, before, ranks(4, count=2))


def delays(module: GraphModule) -> list[int]:
    """Number of ops that compute between each gradient and its reduce_scatter."""
    nodes = list(module.graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    found = []
    for node in nodes:
        if name_of(node) == "reduce_scatter_tensor":
            between = nodes[place[node.all_input_nodes[0]] + 1 : place[node]]
            found.append(sum(not name_of(n) for n in between))
    return sorted(found)


def test_a_gradient_is_sent_when_it_is_ready() -> None:
    before = graph_of(NETS["sharded"])
    assert sum(delays(before)) > 100  # autograd puts them after the layer
    assert sum(delays(passed(before, overlapped))) == 0
    # A full window delays them no further than they were.
    full = passed(before, lambda m: overlapped(m, window=2000))
    assert 0 < sum(delays(full)) < sum(delays(before))


# All passes: random programs, hash seeds, processes.


def program(seed: int, n: int) -> Callable[..., list[Tensor]]:
    """Ops and collectives on vectors, at random."""

    def step(*given: Tensor) -> list[Tensor]:
        draw = random.Random(seed)
        known = list(given)
        for _ in range(draw.randint(5, 40)):
            a, b = draw.choice(known), draw.choice(known)
            kind = draw.randrange(6)
            if kind == 0:
                known.append(total(a, draw.choice(["sum", "max"])) * 0.5)
            elif kind == 1:
                known.append(gather(a, n).view(n, -1)[draw.randrange(n)])
            elif kind == 2:
                known.append(scatter(torch.cat([a, b] * n)[: n * a.numel()], n).neg())
            elif kind == 3:
                known.append(a + b)
            elif kind == 4:
                known.append(a.sin())
            else:
                known.append(a * b.view(2, -1).t().reshape(-1))
        return known[-draw.randint(1, 4) :]

    return step


def everything(module: GraphModule, window: int = 300, cap: int = 400) -> GraphModule:
    """All passes, with limits that bind in small graphs."""
    deduplicated(module)
    bucketed(module, cap=cap, window=6)
    return overlapped(module, window=window)


@pytest.mark.parametrize("seed", range(24))
def test_random_programs_keep_their_bits(seed: int) -> None:
    n = 2 + seed % 2
    inputs = ranks(4, n=n, count=3)
    before = traced(program(seed, n), *inputs[0])
    after = passed(before, everything)
    assert same_bits(after, before, inputs)
    assert len(collectives(after)) <= len(collectives(before))
    peak = peak_bytes(before)
    small = copy.deepcopy(before)
    try:
        recomputed(small, int(peak * 0.8), again=("all_gather",))
    except BudgetError as error:
        assert str(small.graph) == str(before.graph)
        recomputed(small, int(peak * 0.8) + error.shortfall, again=("all_gather",))
    assert peak_bytes(small) <= peak
    assert same_bits(passed(small, everything), before, inputs)


def test_random_programs_reach_every_case() -> None:
    """The programs above join and drop collectives, and some may not be joined."""
    joined = kept = 0
    for seed in range(24):
        n = 2 + seed % 2
        before = traced(program(seed, n), *ranks(4, n=n, count=3)[0])
        after = passed(before, everything)
        joined += len(collectives(before)) - len(collectives(after))
        kept += len(collectives(after))
    assert joined > 20
    assert kept > 50


TEXT = """
from lockstep import Net
from shardwise.ops.transforms.bucketing import bucketed, deduplicated
from shardwise.ops.transforms.overlap import overlapped
from shardwise.ops.transforms.recompute import recomputed
module = recomputed(deduplicated(Net().graph()), 36000, again=("all_gather",))
print(overlapped(bucketed(module, cap=3000), window=9000).graph)
"""


def test_every_process_comes_to_the_same_graph() -> None:
    path = os.pathsep.join(map(str, (Path(__file__).parents[2] / "src", "tests/support")))
    path = os.pathsep.join([path, str(Path(__file__).parents[1] / "support")])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TEXT],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    texts = [process.communicate(timeout=120)[0] for process in started]
    assert "reduce_scatter_tensor" in texts[0]
    assert texts[0] == texts[1]


def on_gloo() -> list[Any]:
    """The step after all passes, and as it is, on real processes."""
    dist.init_process_group("gloo")
    net = NETS["sharded"]
    rank = dist.get_rank()
    name = dist.group.WORLD.group_name  # pyright: ignore
    assert name == GROUP
    before = graph_of(net)
    after = passed(before, everything)
    with torch.no_grad():
        results = [[list(m(*net.inputs()[rank]))] for m in (before, after)]
    messages = [(name_of(c), list(c.meta["val"].shape)) for c in collectives(after)]
    dist.destroy_process_group()
    return [equal(*results), len(collectives(after)), messages]


@pytest.mark.processes
def test_processes_agree_bit_for_bit() -> None:
    outcomes = launch(on_gloo, 2)
    assert outcomes[0].value[0] is True
    assert outcomes[0].value[1] < 26
    assert outcomes[0].value == outcomes[1].value


# Memory.


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
    net = Net(**{**vars(GPT), "is_sharded": is_sharded})
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
    net = Net(ranks=4, layers=4, rows=1, length=2, width=16)  # gathered parameters take most
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


def test_inductor_is_told_to_keep_the_order() -> None:
    import torch._inductor.config as config

    assert dict(INDUCTOR) == {"reorder_for_peak_memory": False}
    assert all(hasattr(config, name) for name in INDUCTOR)
