"""Shape ops: every layout against torch, which cuts are a choice, and torch's signatures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from check import close, placed
from gallery import mesh, values
from hypothesis import given, settings
from hypothesis import strategies as st

import shardwise as sw
from shardwise.ops.audit import report
from shardwise.ops.shape import refine

# name: the op, a shape, and the cuts (dim, axis size; None: any size) that are a choice
OPS: dict[str, tuple[Callable[[Any], Any], tuple[int, ...], set[tuple[int, int | None]]]] = {
    "split a dim": (lambda x: x.reshape(6, 3, 2, -1), (6, 6, 6), {(1, 2)}),
    "merge two dims": (lambda x: torch.reshape(x, (36, 6)), (6, 6, 6), {(1, None)}),
    "no common part": (lambda x: x.view(4, 9, 6), (6, 6, 6), {(0, 3), (1, None)}),
    "flatten": (lambda x: torch.flatten(x, 1), (6, 6, 6), {(2, None)}),
    "ravel": (lambda x: x.ravel(), (6, 6), {(1, None)}),
    "unflatten": (lambda x: x.unflatten(-1, (2, -1)), (6, 6), {(1, 3)}),
    "view_as": (lambda x: x.view_as(torch.empty(3, 2, 6)), (6, 6), {(0, 2)}),
    "size-1 dims come and go": (lambda x: x.reshape(1, 6, 1, 6), (6, 1, 6), set()),
    "permute": (lambda x: x.permute(2, 0, -2), (6, 6, 6), set()),
    "transpose": (lambda x: torch.transpose(x, 0, -1), (6, 6, 6), set()),
    "T and mT": (lambda x: x.T * x.mT + x.t(), (6, 6), set()),
    "movedim": (lambda x: torch.movedim(x, (0, 1), (-1, 0)), (6, 6, 6), set()),
    "expand": (lambda x: x.expand(3, -1, 6, 6), (6, 1, 6), set()),
    "broadcast_to": (lambda x: torch.broadcast_to(x, (2, 6, 6)), (6,), set()),
    "expand_as": (lambda x: x.expand_as(torch.empty(2, 6, 6)), (6, 6), set()),
    "squeeze": (lambda x: torch.squeeze(x), (6, 1, 6, 1), set()),
    "unsqueeze": (lambda x: x.unsqueeze(-2).squeeze((1, -1)), (6, 6), set()),
    "repeat": (lambda x: x.repeat(2, 1, 3), (6, 6), {(1, None)}),
    "tile": (lambda x: torch.tile(x, (2,)), (6, 6), {(1, None)}),
    "repeat_interleave": (lambda x: torch.repeat_interleave(x, 2, dim=0), (6, 6), set()),
    "repeat_interleave flat": (lambda x: x.repeat_interleave(3), (6, 6), {(1, None)}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_every_layout_on_one_axis(name: str) -> None:
    op, shape, choices = OPS[name]
    found = report(op, [shape])
    assert not found.wrong, found.wrong[0]
    expected = set()
    for dim, size in choices:
        cut = " ".join("_/a" if k == dim else "_" for k in range(len(shape)))
        expected |= {(f"mesh(a={n})", cut) for n in (2, 3) if size in (None, n)}
    assert set(found.choice) == expected


@pytest.mark.parametrize("name", OPS)
def test_sampled_layouts_on_two_axes(name: str) -> None:
    op, shape, _ = OPS[name]
    found = report(op, [shape], axes=2, samples=20)
    assert not found.wrong, found.wrong[0]
    assert found.right


@pytest.mark.parametrize(
    "op",
    [
        lambda x: x.reshape(12, 4, 3, 12),
        lambda x: x.reshape(144, 12),
        lambda x: x.permute(2, 0, 1),
        lambda x: x.repeat(1, 2, 1),
        lambda x: x.unsqueeze(1).expand(-1, 3, -1, -1),
    ],
)
def test_sampled_layouts_on_three_axes(op: Callable[[Any], Any]) -> None:
    found = report(op, [(12, 12, 12)], axes=3, samples=20)
    assert not found.wrong, found.wrong[0]
    assert found.right


def test_axes_fill_the_most_major_factor_first() -> None:
    x = placed(values(8, 3), mesh(a=2, b=2), "_/a/b _")
    assert str(x.reshape(2, 4, 3).layout) == "_/a _/b _"
    assert str(x.reshape(4, 2, 3).layout) == "_/a/b _ _"
    assert str(x.reshape(2, 4, 3).reshape(8, 3).layout) == "_/a/b _"


def test_a_choice_lists_fixes_that_run() -> None:
    x = placed(values(2, 6, 4), mesh(a=2), "_ _/a _")
    with pytest.raises(sw.LayoutError) as caught:
        x.reshape(12, 4)
    assert caught.value.kind == "choice"
    assert caught.value.fixes
    assert 'sw.reshard(x, "_/a _ _")' in str(caught.value)
    close(x.reshape(12, 4, out="_/a _"), x.full_tensor().reshape(12, 4))
    with sw.cheapest():
        assert str(x.reshape(12, 4).layout) == "_/a _"


def test_nothing_is_recorded() -> None:
    x = placed(values(8, 6), mesh(a=2), "_/a _ ")
    with sw.record() as plan:
        x.reshape(2, 4, 6).permute(2, 0, 1).unsqueeze(0).expand(3, -1, -1, -1).flatten(0, 1)
    assert not plan.collectives


def test_an_axis_of_size_1_follows_its_dim() -> None:
    x = placed(values(1, 6, 8), mesh(a=1), "_/a _ _")
    assert str(x.reshape(1, 6, 2, 4).layout) == "_/a _ _ _"
    assert str(x.reshape(6, 8).layout) == "_/a _"
    assert str(placed(values(8), mesh(a=1), "_/a").reshape(1, 8).layout) == "_ _/a"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_refinement_fits_both_shapes(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([0, 1, 12, 36, 60, 64]))

    def shape() -> tuple[int, ...]:
        left, dims = size, []
        for _ in range(data.draw(st.integers(0, 3))):
            part = data.draw(
                st.sampled_from([d for d in range(1, left + 1) if left % d == 0] or [1])
            )
            dims.append(part)
            left = left // part
        if left != 1 or not dims:
            dims.append(left)
        return tuple(dims)

    old, new = shape(), shape()
    rule = refine(old, new)
    for dims, wanted in ((rule.inputs[0], old), (rule.outputs[0], new)):
        assert [torch.Size(rule.sizes[f] for f in dim).numel() for dim in dims] == list(wanted)
    kept = [
        [f for dim in dims for f in dim if f not in rule.blocked]
        for dims in (*rule.inputs, *rule.outputs)
    ]
    assert kept[0] == kept[1]


def test_empty_tensors_keep_their_shapes() -> None:
    x = sw.zeros((0, 6, 4), mesh(a=2), "_ _/a _")
    assert x.permute(1, 0, 2).shape == (6, 0, 4)
    assert sw.zeros((0, 6, 4), mesh(a=2)).reshape(0, 24).shape == (0, 24)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.reshape((3, 8)),
        lambda x: x.reshape([3, -1]),
        lambda x: torch.reshape(x, shape=(3, 8)),
        lambda x: x.view(2, 3, 4),
        lambda x: torch.permute(x, dims=(1, 0)),
        lambda x: torch.swapaxes(x, 0, 1),
        lambda x: x.swapdims(0, 1),
        lambda x: torch.moveaxis(x, 0, 1),
        lambda x: x.expand(2, *x.shape),
        lambda x: x.expand(size=(2, 4, 6)),
        lambda x: x.repeat((1, 2)),
        lambda x: x.tile(2, 1),
        lambda x: torch.tile(x, dims=(2, 2)),
        lambda x: torch.unsqueeze(x, dim=0),
        lambda x: x.flatten(start_dim=0, end_dim=1),
        lambda x: torch.broadcast_tensors(x, x.unsqueeze(0))[0],
    ],
)
def test_signatures_are_torchs(call: Callable[[Any], Any]) -> None:
    x = values(4, 6)
    close(call(placed(x, mesh(a=2), "_ _ {R:a}")), call(x))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda x: x.reshape(5, 5), ValueError),
        (lambda x: x.reshape(-1, -1), ValueError),
        (lambda x: x.reshape(-1, 5), ValueError),
        (lambda x: x.view(torch.int64), TypeError),
        (lambda x: x.permute(0, 0), ValueError),
        (lambda x: x.transpose(0, 2), IndexError),
        (lambda x: x.expand(5, 6), ValueError),
        (lambda x: x.unflatten(0, (3, 3)), ValueError),
        (lambda x: x.flatten(1, 0), ValueError),
        (lambda x: x.repeat(2), ValueError),
        (lambda x: torch.movedim(x, (0, 1), (0,)), ValueError),
        (lambda x: x.unsqueeze(0).t(), ValueError),
        (lambda x: x.repeat_interleave(torch.tensor([1, 2, 3, 4]), 0), sw.LayoutError),
    ],
)
def test_mistakes_are_named(call: Callable[[Any], Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        call(placed(values(4, 6), mesh(a=2), "_/a _"))


def test_a_new_extent_may_be_cut_by_name() -> None:
    x = placed(values(6), mesh(a=2), "_ {R:a}")
    y = sw.ops.repeat_interleave(x.unsqueeze(1).expand(6, 4), 2, 0)
    assert str(y.layout) == "_ _ {R:a}"
    z = sw.ops.expand(x, 4, 6, over={"a": "e0"})
    assert str(z.layout) == "_/a _"
    close(z, x.full_tensor().expand(4, 6))
