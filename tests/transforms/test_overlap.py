"""Collectives that start early and are waited for late: distances, bytes in flight, equal bits."""

from __future__ import annotations

import pytest
import torch
from graphs import NETS, collectives, counts, graph_of, passed, ranks, same_bits
from lockstep import gather, total, traced
from torch import Tensor
from torch.fx import GraphModule, Node

from shardwise.ops.transforms.order import is_collective, is_wait, name_of, size
from shardwise.ops.transforms.overlap import INDUCTOR, overlapped


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


def test_inductor_is_told_to_keep_the_order() -> None:
    import torch._inductor.config as config

    assert dict(INDUCTOR) == {"reorder_for_peak_memory": False}
    assert all(hasattr(config, name) for name in INDUCTOR)
