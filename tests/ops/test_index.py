"""Lookups and scatters: every layout against torch, cut vocabularies, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check import close, placed
from gallery import mesh, rng, values
from torch import Tensor

import shardwise as sw
from shardwise.ops.audit import report

HIGH = 6  # ids lie below


def made(shapes: Sequence[Sequence[int]], generator: torch.Generator) -> list[Tensor]:
    """Values, ids, and, if there is a third shape, values again."""

    def draw(shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ids = torch.randint(0, HIGH, tuple(shapes[1]), generator=generator)
    return [draw(shapes[0]), ids, *(draw(s) for s in shapes[2:])]


Pairs = list[tuple[str, str]]
PICKED: Pairs = [("_/a _", "_/a"), ("_ _/a", "_/a")]
GATHERED: Pairs = [("_/a _", "_ _/a"), ("_ _/a", "_/a _"), ("_ _/a", "_ _/a")]
CUT = ("_/a _", "_ _/a")

# name: the op of (values, ids), shapes, pairs of layouts that are a choice
LOOKUPS: dict[str, tuple[Callable[[Any, Any], Any], list[tuple[int, ...]], Pairs]] = {
    "[]": (lambda x, i: x[:, i], [(6, 6), (6,)], PICKED),
    "[] negative": (lambda x, i: x[:, i - 6], [(6, 6), (6,)], PICKED),
    "[] and a slice": (lambda x, i: x[1:, i], [(6, 6), (6,)], [*PICKED, ("_/a _", "_")]),
    "index_select": (lambda x, i: torch.index_select(x, 0, i), [(6, 6), (12,)], PICKED),
    "embedding": (lambda x, i: F.embedding(i, x), [(6, 6), (12,)], PICKED),
    "padded": (lambda x, i: F.embedding(i, x, padding_idx=-4), [(6, 6), (12,)], PICKED),
    "gather": (lambda x, i: torch.gather(x, 1, i), [(6, 6), (6, 12)], GATHERED),
    "gather a prefix": (
        lambda x, i: x.gather(1, i),
        [(12, 6), (6, 12)],
        [
            *((a, b) for a in CUT for b in CUT),
            ("_/a _", "_ _"),
            *((a, "_/a _") for a in ("_ _", "_ _ {R:a}", "_ _ {U:a}")),
        ],
    ),
    "take_along_dim": (
        lambda x, i: torch.take_along_dim(x, i, dim=1),
        [(6, 6), (6, 12)],
        GATHERED,
    ),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_every_lookup_on_one_axis(name: str) -> None:
    op, shapes, choices = LOOKUPS[name]
    found = report(op, shapes, operands=made)
    assert not found.wrong, found.wrong[0]
    assert {key[1:] for key in found.choice} == set(choices)


@pytest.mark.parametrize("name", LOOKUPS)
def test_sampled_lookups_on_two_axes(name: str) -> None:
    op, shapes, _ = LOOKUPS[name]
    found = report(op, shapes, operands=made, axes=2, samples=40)
    assert not found.wrong, found.wrong[0]
    assert found.right


def test_sampled_embeddings_on_three_axes() -> None:
    found = report(
        lambda x, i: F.embedding(i, x, 2), [(12, 12), (12,)], operands=made, axes=3, samples=40
    )
    assert not found.wrong, found.wrong[0]
    assert found.right


@pytest.mark.parametrize("padding", [None, 2])
def test_embeddings_by_our_kernels_on_every_layout(
    padding: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What CUDA tensors run, on a CPU: there the same ops are plain torch."""
    seen = []

    def always(table: Tensor, cut: bool) -> bool:
        seen.append(cut)
        return True

    monkeypatch.setattr("shardwise.ops.index._in_order", always)
    found = report(lambda x, i: F.embedding(i, x, padding), [(6, 6), (12,)], operands=made)
    assert not found.wrong, found.wrong[0]
    assert {key[1:] for key in found.choice} == set(PICKED)
    assert set(seen) == {False, True}
    table = placed(values(6, 4), mesh(a=2), "_/a _")
    with pytest.raises(RuntimeError, match="outside"):
        F.embedding(sw.shard(torch.tensor([0, 6]), mesh(a=2)), table)


def test_a_cut_vocabulary_leaves_a_sum_and_moves_nothing() -> None:
    table = placed(values(6, 4), mesh(a=2), "_/a _")
    ids = torch.tensor([[5, 0, 2]])
    with sw.record() as plan:
        y = sw.ops.embedding(ids, table)
    assert not plan.collectives
    assert str(y.layout) == "_ _ _ {U:a}"
    close(sw.ops.embedding(ids, table, out="_ _ _/a"), table.full_tensor()[ids])


def test_an_integer_lookup_is_reduced_at_once() -> None:
    x = sw.shard(torch.arange(6) * 10, mesh(a=2), "n/a")
    y = x[torch.tensor([5, 0])]
    assert str(y.layout) == "_"
    assert y.full_tensor().tolist() == [50, 0]


def test_a_looked_up_infinity_stays_in_its_block() -> None:
    x = sw.shard(torch.tensor([torch.inf, 1.0]), mesh(a=2), "n/a")
    assert x[torch.tensor([1])].full_tensor().tolist() == [1.0]


@pytest.mark.parametrize("layout", ["_/a _", "_ _/a"])
@pytest.mark.parametrize("bad", [-1, 6])
def test_an_id_outside_the_table_raises(layout: str, bad: int) -> None:
    table = placed(values(6, 4), mesh(a=2), layout)
    with pytest.raises((IndexError, RuntimeError), match=r"out of range|outside"):
        F.embedding(sw.shard(torch.tensor([0, bad]), mesh(a=2)), table)


def test_one_hot_on_every_layout_and_by_blocks() -> None:
    ids = torch.randint(0, 6, (6, 6), generator=rng())
    found = report(
        lambda i: F.one_hot(i, 6), [(6, 6)], operands=lambda *_: [ids], differentiable=False
    )
    assert not found.wrong, found.wrong[0]
    assert not found.choice
    x = sw.shard(ids, mesh(a=2))
    blocks = sw.ops.one_hot(x, 6, out="_ _ _/a")
    assert torch.equal(blocks.full_tensor(), F.one_hot(ids, 6))


# name: the op of (x, ids, src), shapes; `dim` is the last
SCATTERS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "scatter_add": (lambda x, i, s: torch.scatter_add(x, 1, i, s), [(6, 6), (6, 12), (6, 12)]),
    "scatter_add a prefix": (
        lambda x, i, s: x.scatter_add(1, i, s[:, :12]),
        [(12, 6), (6, 12), (12, 24)],
    ),
    "index_add": (lambda x, i, s: x.index_add(1, i, s, alpha=2), [(6, 6), (12,), (6, 12)]),
}


@pytest.mark.parametrize("name", SCATTERS)
def test_every_scatter_on_one_axis(name: str) -> None:
    op, shapes = SCATTERS[name]
    reference = op
    if "prefix" in name:  # torch's own backward wants the source as long as the index
        op, reference = (
            lambda x, i, s: x.scatter_add(1, i, s),
            lambda x, i, s: x.scatter_add(1, i, s[:6, :12]),
        )
    found = report(op, shapes, operands=made, reference=reference)
    assert not found.wrong, found.wrong[0]
    assert found.right


@pytest.mark.parametrize("name", ["scatter_add", "index_add"])
def test_sampled_scatters_on_two_axes(name: str) -> None:
    op, shapes = SCATTERS[name]
    found = report(op, shapes, operands=made, axes=2, samples=40)
    assert not found.wrong, found.wrong[0]
    assert found.right


def test_which_scatters_are_a_choice() -> None:
    op, shapes = SCATTERS["scatter_add"]
    found = report(op, shapes, operands=made)

    def parts(key: tuple[str, ...]) -> set[str]:
        """The factors that the axis cuts: b batch, v of x, k of index and source."""
        x, ids, src = key[1:]
        cut = {"b": "_/a _", "v": "_ _/a"}
        return {f for f, t in cut.items() if x == t} | {
            {"v": "k"}.get(f, f) for f, t in cut.items() if t in (ids, src)
        }

    assert all(len(parts(key)) > 1 for key in found.choice)
    assert all(len(parts(key)) <= 1 for key in found.right)


@pytest.mark.parametrize(
    ("x", "src", "result"),
    [
        ("_/a", "_", "_/a"),  # into a cut dim: each device keeps its own range
        ("_", "_/a", "_ {U:a}"),  # cut entries: the sum is owed, x counts once
        ("_ {U:a}", "_ {R:a}", "_ {U:a}"),
        ("_ {U:a}", "_/a", "_ {U:a}"),
    ],
)
def test_scatter_layouts(x: str, src: str, result: str) -> None:
    ids = torch.tensor([5, 0, 0, 3])
    base, added = values(6), values(4, seed=1)
    index = sw.shard(ids, mesh(a=2), "k/a") if "/a" in src else ids
    with sw.record() as plan:
        y = placed(base, mesh(a=2), x).scatter_add(0, index, placed(added, mesh(a=2), src))
    assert not plan.collectives
    assert str(y.layout) == result
    close(y, base.scatter_add(0, ids, added))


def test_a_scalar_and_a_list_index() -> None:
    x = values(6, 4)
    y = placed(x, mesh(a=2), "_/a _")
    close(y[sw.shard(torch.tensor(3), mesh(a=2))], x[3])
    close(y[[0, -1]], x[[0, -1]])
    close(y[..., range(2)], x[..., [0, 1]])


def test_lookups_pass_through_vmap() -> None:
    x = placed(values(6, 4), mesh(a=2), "_/a _")
    ids = torch.tensor([[0, 5], [3, 3]])

    def local(ids: Tensor) -> tuple[Tensor, ...]:
        kind = sw.shard(torch.zeros(2, dtype=torch.int64), mesh(a=2))._type
        return F.embedding(sw.ShardedTensor((ids, ids), kind), x)._shards

    first, second = torch.vmap(local)(ids)
    close(first + second, x.full_tensor()[ids])


@pytest.mark.parametrize(
    "call",
    [
        lambda x, mask: x[mask],
        lambda x, mask: torch.masked_select(x, mask),
        lambda x, mask: x.masked_select(mask),
        lambda x, mask: torch.nonzero(mask),
        lambda x, mask: mask.argwhere(),
        lambda x, mask: F.one_hot(mask.long()),
    ],
)
def test_a_shape_that_depends_on_values_is_meaningless(call: Callable[..., Any]) -> None:
    x = placed(values(4, 6), mesh(a=2), "_/a _")
    with pytest.raises(sw.LayoutError) as caught:
        call(x, x > 0)
    assert caught.value.kind == "meaningless"
    assert "test_index.py" in caught.value.source


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda x, i: x[i, i], sw.LayoutError),
        (lambda x, i: x[i.double()], TypeError),
        (lambda x, i: F.embedding(i, x, max_norm=1.0), TypeError),
        (lambda x, i: F.embedding(i, x, padding_idx=9), ValueError),
        (lambda x, i: x.gather(0, i), ValueError),
        (lambda x, i: x.gather(1, torch.zeros(9, 6, dtype=torch.int64)), ValueError),
        (lambda x, i: x.index_select(0, i.unsqueeze(0)), ValueError),
        (lambda x, i: x.index_add(0, i, x), ValueError),
        (lambda x, i: x.scatter_add(0, torch.zeros(9, 6, dtype=torch.int64), x), ValueError),
    ],
)
def test_mistakes_are_named(call: Callable[..., Any], error: type[Exception]) -> None:
    x = placed(values(6, 6), mesh(a=2), "_ _ {R:a}")
    with pytest.raises(error):
        call(x, torch.tensor([0, 1]))
