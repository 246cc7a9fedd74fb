"""Joining, taking apart, slicing, padding and block-dependent ops: every layout against torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check import close, moves, placed, ran
from gallery import mesh, values

import shardwise as sw
from shardwise.ops.audit import report

Call = Callable[[Any], Any]

# name: the op, a shape, and the dims of which a cut is a choice
ONE: dict[str, tuple[Call, tuple[int, ...], set[int]]] = {
    "split": (lambda x: torch.split(x, 4, -1), (6, 6), {1}),
    "split by lengths": (lambda x: x.split([1, 5], 0), (6, 6), {0}),
    "split into the whole": (lambda x: torch.split(x, 6, 1), (6, 6), set()),
    "chunk": (lambda x: x.chunk(4, 0), (6, 6), {0}),
    "tensor_split": (lambda x: torch.tensor_split(x, 4, 0), (6, 6), {0}),
    "tensor_split at": (lambda x: x.tensor_split([2, -1], 0), (6, 6), {0}),
    "unbind": (lambda x: x.unbind(1), (6, 6), {1}),
    "iterate": (lambda x: tuple(row * 2 for row in x), (6, 6), {0}),
    "slices": (lambda x: x[:, 1:-1:2, None, ..., -1], (6, 6, 6, 6), {1, 3}),
    "whole slices": (lambda x: x[0:6, ..., None, :9], (6, 6), set()),
    "narrow": (lambda x: x.narrow(1, -3, 2), (6, 6), {1}),
    "select": (lambda x: torch.select(x, 1, -1), (6, 6), {1}),
    "roll": (lambda x: torch.roll(x, 1, 1), (6, 12), set()),
    "roll back": (lambda x: x.roll(-1, 1), (6, 12), set()),
    "roll by a block": (lambda x: x.roll(-6, 1), (6, 12), set()),
    "roll over a block": (lambda x: x.roll(7, -1), (6, 12), set()),
    "roll two dims": (lambda x: torch.roll(x, (1, -2), (1, 0)), (6, 12), set()),
    "roll one dim twice": (lambda x: torch.roll(x, (1, 4), (1, 1)), (6, 12), set()),
    "roll flat": (lambda x: torch.roll(x, 1), (6, 6), {1}),
    "flip": (lambda x: torch.flip(x, dims=(0, 1)), (6, 6), set()),
    "tril": (lambda x: torch.tril(x), (6, 6, 12), set()),
    "tril below": (lambda x: x.tril(-2), (6, 6, 12), set()),
    "triu": (lambda x: torch.triu(x, 3), (6, 12), set()),
    "diagonal": (lambda x: torch.diagonal(x, 1, -1, 0), (6, 6, 12), {0, 2}),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 0, -1, 0)), (6, 6, 6), {0, 2}),
    "pad with a value": (lambda x: F.pad(x, (1, 2), value=2.0), (6, 6), {1}),
    "pad reflect": (lambda x: F.pad(x, (1, 2), mode="reflect"), (6, 6, 6), {2}),
    "pad circular": (lambda x: F.pad(x, (1, 2), mode="circular"), (6, 6, 6), {2}),
}  # fmt: skip


@pytest.mark.parametrize("name", ONE)
def test_every_layout_on_one_axis(name: str) -> None:
    op, shape, choices = ONE[name]
    found = report(op, [shape])
    assert not found.wrong, found.wrong[0]
    cuts = {" ".join("_/a" if k == dim else "_" for k in range(len(shape))) for dim in choices}
    assert set(found.choice) == {(f"mesh(a={n})", cut) for n in (2, 3) for cut in cuts}


@pytest.mark.parametrize("name", ONE)
def test_sampled_layouts_on_two_axes(name: str) -> None:
    op, shape, _ = ONE[name]
    found = report(op, [shape], axes=2, samples=20)
    assert not found.wrong, found.wrong[0]
    assert found.right


@pytest.mark.parametrize(
    "op",
    [
        lambda x: torch.roll(x, (5, -1), (0, 1)),
        lambda x: x.flip(0, 1),
        lambda x: x.tril(1) + x.triu(-2),
        lambda x: torch.cat([x, 2 * x], 1),
        lambda x: x[:, 1:3].unbind(1),
    ],
)
def test_sampled_layouts_on_three_axes(op: Call) -> None:
    found = report(op, [(12, 12)], axes=3, samples=25)
    assert not found.wrong, found.wrong[0]
    assert found.right


PAIRS: dict[str, tuple[Callable[[Any, Any], Any], tuple[int, ...]]] = {
    "cat": (lambda x, y: torch.cat([x, y], 1), (6, 12)),
    "stack": (lambda x, y: torch.stack((x, y), -1), (6, 6)),
}


def test_cat_wants_the_joined_dim_whole_in_every_operand() -> None:
    found = report(PAIRS["cat"][0], [(6, 6), (6, 12)])
    assert not found.wrong, found.wrong[0]
    assert {key[1:] for key in found.choice} == {
        key[1:] for key in [*found.right, *found.choice] if "_ _/a" in key[1:]
    }


def test_stack_is_a_choice_only_where_two_dims_are_wanted() -> None:
    found = report(PAIRS["stack"][0], [(6, 6), (6, 6)])
    assert not found.wrong, found.wrong[0]
    assert {key[1:] for key in found.choice} == {("_/a _", "_ _/a"), ("_ _/a", "_/a _")}


@pytest.mark.parametrize("name", PAIRS)
def test_joining_is_linear_in_all_operands_together(name: str) -> None:
    op, shape = PAIRS[name]
    found = report(op, [(6, 6), shape])
    owed = {key[1:]: out for key, out in found.right.items() if "_ _ {U:a}" in key[1:]}
    assert {out for pair, out in owed.items() if "/a" not in "".join(pair)} <= {
        "_ _ {U:a}",
        "_ _ _ {U:a}",
    }
    found = report(op, [(6, 6), shape], axes=2, samples=60)
    assert not found.wrong, found.wrong[0]


def test_three_operands_and_a_constant_join() -> None:
    a, c = values(4, 6), values(2, 6, seed=1)
    x, y = placed(a, mesh(a=2), "_ _ {U:a}"), placed(a, mesh(a=2), "_ _")
    z = torch.cat([x, c, y])
    assert str(z.layout) == "_ _ {U:a}"
    close(z, torch.cat([a, c, a]))
    close(torch.cat([x, torch.zeros(0, dtype=a.dtype)]), a)
    assert str(torch.concat([placed(a, mesh(a=2), "_/a _")]).layout) == "_/a _"


def test_a_cut_dim_is_joined_where_out_says() -> None:
    a = values(4, 6)
    x = placed(a, mesh(a=2), "_/a _")
    close(sw.ops.cat([x, x], out="_ _/a"), torch.cat([a, a]))
    with pytest.raises(sw.LayoutError) as caught:
        torch.cat([x, x])
    assert caught.value.kind == "choice"
    assert caught.value.fixes


def test_unbind_has_one_backward() -> None:
    x = placed(values(6, 4), mesh(a=2), "_ _/a")
    shard = x.shards[0].clone().requires_grad_()
    kind = x._type.with_layout(x.layout, True)
    parts = sw.ShardedTensor((shard, x.shards[1].clone().requires_grad_()), kind).unbind()
    nodes = {part.shards[0].grad_fn for part in parts}
    assert len(nodes) == 1
    assert "Unbind" in type(nodes.pop()).__name__


@pytest.mark.parametrize(
    ("shift", "elements"), [(1, [12]), (-1, [12]), (4, [48]), (5, [48 - 12, 12])]
)
def test_roll_moves_only_what_changes_its_device(shift: int, elements: list[int]) -> None:
    x = placed(values(12, 12), mesh(a=3), "_/a _")
    with sw.record() as plan:
        y = x.roll(shift, 0)
    assert sorted(moves(plan, "forward")) == sorted([("permute", "a", n) for n in elements])
    close(y, x.full_tensor().roll(shift, 0))


def test_flip_moves_the_blocks_once_and_back_once() -> None:
    x = placed(values(12, 12), mesh(a=3), "_/a _")
    with sw.record() as plan:
        y, pull = sw.vjp(lambda x: x.flip(0), x)
        pull(y)
    assert moves(plan, "forward") == [("permute", "a", 48)]
    assert moves(plan, "backward") == [("permute", "a", 48)]


@pytest.mark.parametrize("op", [lambda x: x.roll(1, 0), lambda x: x.flip(0)])
def test_out_is_the_layout_of_a_permuted_result(op: Call) -> None:
    x = placed(values(12, 12), mesh(a=3), "_/a _")
    assert str(sw.ops.roll(x, 1, 0, out="_ _/a").layout) == "_ _/a"
    assert str(sw.ops.flip(x, 0, out="_ _").layout) == "_ _"
    assert op(x).layout is x.layout


def test_triangles_and_whole_slices_move_nothing() -> None:
    x = placed(values(12, 12), mesh(a=3, b=2), "_/a _/b")
    with sw.record() as plan:
        x.tril().triu(-3)[..., None]
    assert not plan.collectives


@pytest.mark.parametrize(
    "index",
    [0, -1, (1, 2), (slice(1, None),), (..., 0), (None, ..., None), (slice(None), slice(0, 0)),
     (slice(-3, -1), 2), (slice(None, None, 4), ...), (slice(5, 2),), (0, ..., slice(1, 99, 2))],
)  # fmt: skip
def test_indices_mean_what_they_mean_in_torch(index: Any) -> None:
    x = values(4, 6, 5)
    close(placed(x, mesh(a=2), "_ _ _ {U:a}")[index], x[index])


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda x: x[4], IndexError),
        (lambda x: x[0, 0, 0], IndexError),
        (lambda x: x[..., ...], IndexError),
        (lambda x: x[::-1], ValueError),
        (lambda x: x["a"], TypeError),
        (lambda x: x[True], TypeError),
        (lambda x: x.narrow(0, 3, 2), IndexError),
        (lambda x: x.select(1, 6), IndexError),
        (lambda x: x.split([1, 2]), ValueError),
        (lambda x: torch.cat([x, x[:, 1:]]), ValueError),
        (lambda x: torch.stack([x, x[:, 1:]]), ValueError),
        (lambda x: x.sum().unbind(), IndexError),
        (lambda x: F.pad(x, (1,)), ValueError),
        (lambda x: F.pad(x, (-4, -4)), ValueError),
        (lambda x: x[0].tril(), ValueError),
        (lambda x: x.roll((1, 2), 0), ValueError),
        (lambda x: x.flip(0, 0), ValueError),
        (lambda x: x.diagonal(0, 1, 1), ValueError),
    ],
)
def test_mistakes_are_named(call: Call, error: type[Exception]) -> None:
    with pytest.raises(error):
        call(placed(values(4, 6), mesh(a=2), "_ _ {R:a}"))


def test_nothing_is_written_in_place() -> None:
    x = placed(values(4), mesh(a=2), "_/a")
    with pytest.raises(TypeError, match="in place"):
        x[0] = 1.0


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.cat([x, x]),
        lambda x: x[0],
        lambda x: x.narrow(0, 1, 2),
        lambda x: F.pad(x, (0, 0, 1, 1)),
        lambda x: torch.diagonal(x),
    ],
)
def test_every_fix_of_a_cut_dim_runs_as_it_stands(call: Call) -> None:
    x = placed(values(4, 6), mesh(a=2), "_/a _")
    with pytest.raises(sw.LayoutError) as caught:
        call(x)
    assert caught.value.fixes
    for fix in caught.value.fixes:
        made, plan = ran(
            lambda code=fix.code: eval(code, {"sw": sw, "torch": torch, "F": F, "x": x})
        )
        assert sum(c.bytes for c in plan.collectives) == fix.bytes
        close(made, call(x.full_tensor()))


def test_ops_pass_through_the_transforms() -> None:
    a = values(3, 4, 6)
    x = placed(a, mesh(a=2), "_ _/a _")
    close(sw.vmap(lambda x: x.roll(1, 0).tril().flatten())(x), a.roll(1, 1).tril().flatten(1))
    twice = sw.grad(lambda x: sw.grad(lambda x: (x.flip(1) ** 3)[:, :, 1:].sum())(x).sum())(x)
    close(twice, torch.cat([torch.zeros(3, 4, 1, dtype=a.dtype), 6 * a[..., 1:]], 2))
