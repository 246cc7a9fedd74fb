"""Fewer collectives: those that are there twice, and those that are sent together; equal bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import NETS, collectives, counts, graph_of, noted, passed, ranks, same_bits
from lockstep import Lockstep, equal, gather, total, traced, wait
from torch import Tensor
from torch.fx import Node

from shardwise.ops.transforms.bucketing import bucketed, deduplicated
from shardwise.ops.transforms.order import is_collective, is_wait, size
from shardwise.ops.transforms.overlap import overlapped

_functional: Any = torch.ops._c10d_functional


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
