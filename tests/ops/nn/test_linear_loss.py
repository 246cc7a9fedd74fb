"""`nn.linear_cross_entropy`: torch's numbers from hidden states, logits whole or never formed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check import close, placed, pulled, ran
from gallery import mesh, rng, values
from torch import Tensor

import shardwise as sw
from shardwise import nn
from shardwise.kernels import cross_entropy as kernel

B, S, D, V = 8, 6, 4, 24

# layouts of hidden, table and labels
ROWS = {
    "one device": ("b s d", "v d", "b s", {"a": 1}),
    "data": ("b/data s d", "v d", "b/data s", {"data": 4}),
    "labels elsewhere": ("b/data s d", "v d", "b s/data", {"data": 2}),
    "rows by two": ("b/x s/y d", "v d", "b/x s", {"x": 2, "y": 3}),
    "whole on four": ("b s d", "v d", "b s", {"a": 2, "b": 2}),
    "vocab": ("b s d", "v/t d", "b s", {"t": 3}),
    "data, vocab": ("b/data s d", "v/t d", "b/data s", {"data": 2, "t": 2}),
    "embed": ("b s d/t", "v d/t", "b s", {"t": 2}),
    "table's embed": ("b s d", "v d/t", "b s", {"t": 2}),
    "vocab by two": ("b s d", "v/x/y d", "b s/x", {"x": 2, "y": 3}),
    "owed": ("b s d {U:y}", "v d", "b s", {"y": 2}),
}
WHOLE = ("one device", "data", "labels elsewhere", "rows by two", "whole on four")

HIDDEN, TABLE = values(B, S, D), values(V, D, seed=2)
LABELS = torch.randint(17, (B, S), generator=rng(3))
SOME = LABELS.masked_fill(LABELS % 3 == 0, -100)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "padded": {"classes": 17},
    "padded sum": {"classes": 17, "reduction": "sum"},
    "a class is ignored": {"ignore_index": 3},
    "ignored beyond the classes": {"ignore_index": 255, "classes": 17},
}


def truth(hidden: Tensor, table: Tensor, labels: Tensor, *, classes: Any = None, **options: Any):
    logits = (hidden @ table.T)[..., :classes]
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), **options)


def labels_for(options: dict[str, Any]) -> Tensor:
    ignored = options.get("ignore_index", -100)
    return LABELS if ignored == 3 else torch.where(SOME == -100, ignored, LABELS)


def put(row: str, labels: Tensor = SOME) -> tuple[Any, Any, Any]:
    hidden, table, like, sizes = ROWS[row]
    on = mesh(**sizes)
    return placed(HIDDEN, on, hidden), placed(TABLE, on, table), placed(labels, on, like)


def one(labels: Tensor = SOME) -> tuple[Any, Any, Any]:
    return put("one device", labels)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_gradients_are_torch_s(name: str, row: str) -> None:
    options = OPTIONS[name]
    labels = labels_for(options)
    hidden, table, at = put(row, labels)
    leaves = [x.clone().requires_grad_() for x in (HIDDEN, TABLE)]
    want = truth(*leaves, labels, **options)
    cotangent = values(seed=4)
    y, grads, _ = pulled(
        lambda h, t: nn.linear_cross_entropy(h, t, at, **options), [hidden, table], cotangent
    )
    close(y, want)
    wanted = torch.autograd.grad(want, leaves, cotangent)
    for given, grad, expected in zip((hidden, table), grads, wanted, strict=True):
        close(grad, expected)
        assert grad.layout is given.layout.dual
    with torch.no_grad():
        close(nn.linear_cross_entropy(hidden, table, at, **options), want)


@pytest.mark.parametrize("budget", [1, 700, 4000])
def test_chunks_of_rows_change_nothing(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []

    def few(rows: int, vocab: int, itemsize: int) -> int:
        chosen.append(max(1, min(rows, budget // (vocab * itemsize))))
        return chosen[-1]

    monkeypatch.setattr(kernel, "chunk_rows", few)
    hidden, table, labels = put("data")
    leaves = [x.clone().requires_grad_() for x in (HIDDEN, TABLE)]
    want = truth(*leaves, SOME)
    y, grads, _ = pulled(
        lambda h, t: nn.linear_cross_entropy(h, t, labels),
        [hidden, table],
        torch.ones((), dtype=torch.float64),
    )
    close(y, want)
    for grad, expected in zip(grads, torch.autograd.grad(want, leaves), strict=True):
        close(grad, expected)
    assert chosen
    assert set(chosen) == {max(1, min(B * S // 4, budget // (V * 8)))}


@pytest.mark.parametrize("row", WHOLE)
def test_only_gradients_and_counts_move(row: str) -> None:
    hidden, table, labels = put(row)
    _, plan = ran(
        lambda: sw.value_and_grad(lambda p: nn.linear_cross_entropy(*p, labels))((hidden, table))
    )
    shapes = {
        c.phase: [d.shape for d in plan.collectives if d.phase == c.phase] for c in plan.collectives
    }
    is_cut = row not in ("one device", "whole on four")
    labels_moved = [(B, S // 2)] if row == "labels elsewhere" else []
    assert sorted(shapes.get("forward", [])) == sorted([*labels_moved, *[()] * is_cut])
    assert set(shapes.get("backward", [])) == ({(V, D)} if is_cut else set())


@pytest.mark.parametrize("row", ["data", "vocab"])
def test_nothing_to_count_is_nan_and_its_sum_is_zero(row: str) -> None:
    hidden, table, labels = put(row, torch.full((B, S), -100))
    assert nn.linear_cross_entropy(hidden, table, labels).full_tensor().isnan()
    loss, grads = sw.value_and_grad(lambda p: nn.linear_cross_entropy(*p, labels, reduction="sum"))(
        (hidden, table)
    )
    assert loss.item() == 0
    assert not any(g.full_tensor().any() for g in grads)


def test_padding_is_never_chosen_and_gets_no_gradient() -> None:
    on = mesh(data=2)
    wild = TABLE.clone()
    wild[17:] = 1e30
    hidden, labels = sw.shard(HIDDEN, on, "b/data s d"), sw.shard(SOME, on)
    loss, grad = sw.value_and_grad(
        lambda t: nn.linear_cross_entropy(hidden, t, labels, classes=17)
    )(sw.shard(wild, on))
    close(loss, truth(HIDDEN, TABLE, SOME, classes=17))
    assert not grad.full_tensor()[17:].any()


@pytest.mark.parametrize("row", ["one device", "data", "vocab"])
def test_grad_of_grad_is_torch_s(row: str) -> None:
    hidden, table, labels = put(row)
    direction = values(B, S, D, seed=5)

    def inner(h: Any, t: Any) -> Any:
        grad = sw.grad(lambda x: nn.linear_cross_entropy(x, t, labels))(h)
        return (grad * sw.shard(direction, h.mesh, h.layout)).sum()

    grads = sw.grad(lambda p: inner(*p))((hidden, table))
    leaves = [x.clone().requires_grad_() for x in (HIDDEN, TABLE)]
    (first,) = torch.autograd.grad(truth(*leaves, SOME), leaves[0], create_graph=True)
    wanted = torch.autograd.grad((first * direction).sum(), leaves)
    for grad, want in zip(grads, wanted, strict=True):
        close(grad, want)


@pytest.mark.parametrize("row", ["one device", "data", "vocab"])
def test_jvp_is_torch_s(row: str) -> None:
    hidden, table, labels = put(row)
    steps = values(B, S, D, seed=5), values(V, D, seed=6)
    tangents = tuple(
        sw.shard(v, x.mesh, x.layout) for v, x in zip(steps, (hidden, table), strict=True)
    )
    y, dy = sw.jvp(lambda h, t: nn.linear_cross_entropy(h, t, labels), (hidden, table), tangents)
    want, slope = torch.func.jvp(lambda h, t: truth(h, t, SOME), (HIDDEN, TABLE), steps)
    close(y, want)
    close(dy, slope)


@pytest.mark.parametrize("row", ["one device", "data"])
def test_vmap_over_tables_is_each_table_s_loss(row: str) -> None:
    hidden, table, labels = put(row)
    tables = values(3, V, D, seed=7)
    given = sw.shard(tables, table.mesh, "n v d")
    found = sw.vmap(lambda t: nn.linear_cross_entropy(hidden, t, labels))(given)
    close(found, torch.stack([truth(HIDDEN, t, SOME) for t in tables]))
    grads = sw.vmap(sw.grad(lambda t: nn.linear_cross_entropy(hidden, t, labels)))(given)
    want = torch.func.vmap(torch.func.grad(lambda t: truth(HIDDEN, t, SOME)))(tables)
    close(grads, want)


def test_half_precision_is_summed_in_float32() -> None:
    on = mesh(data=2)
    half = HIDDEN.bfloat16(), TABLE.bfloat16()
    given = sw.shard(half[0], on, "b/data s d"), sw.shard(half[1], on)
    labels = sw.shard(SOME, on, "b/data s")
    loss = nn.linear_cross_entropy(*given, labels)
    assert loss.dtype == torch.float32
    want = truth(half[0].float(), half[1].float(), SOME)
    torch.testing.assert_close(loss.full_tensor(), want, rtol=2**-7, atol=2**-7)  # bf16's logits


@pytest.mark.parametrize("wrong", [17, -1, 10**6])
def test_a_label_outside_the_classes_raises(wrong: int) -> None:
    bad = SOME.clone()
    bad[2, 3] = wrong
    for row in ("one device", "data", "vocab"):
        hidden, table, labels = put(row, bad)
        with pytest.raises(RuntimeError, match=r"a label lies outside 0\.\.16"):
            nn.linear_cross_entropy(hidden, table, labels, classes=17)
        logits = nn.dense(hidden, table.transpose(0, 1))
        with pytest.raises(RuntimeError, match=r"a label lies outside 0\.\.16"):
            nn.cross_entropy(logits, labels, classes=17)


def test_bad_input_says_what_is_wrong() -> None:
    hidden, table, labels = one()
    with pytest.raises(ValueError, match="30 classes of logits of width 24"):
        nn.linear_cross_entropy(hidden, table, labels, classes=30)
    with pytest.raises(ValueError, match=r"unknown reduction 'none' \(mean, sum\)"):
        nn.linear_cross_entropy(hidden, table, labels, reduction="none")  # pyright: ignore
    with pytest.raises(ValueError, match=r"\[8, 6, 4\] must end with the width of the"):
        nn.linear_cross_entropy(hidden, table.transpose(0, 1), labels)
    with pytest.raises(TypeError, match=r"labels must hold integers, got torch\.float64"):
        nn.linear_cross_entropy(hidden, table, labels.to(torch.float64))
    with pytest.raises(ValueError, match=r"labels \[6, 8\] must be \[8, 6\]"):
        nn.linear_cross_entropy(hidden, table, labels.transpose(0, 1))
    with pytest.raises(TypeError, match="table"):
        nn.linear_cross_entropy(hidden, TABLE, labels)  # pyright: ignore


CUT = {
    "two axes": ("b s v/x/y", {"x": 2, "y": 3}),
    "of size 1": ("b s v/x", {"x": 1}),
    "one of size 1": ("b/z s v/x/y", {"x": 1, "y": 2, "z": 2}),
}


@pytest.mark.parametrize("name", CUT)
def test_smooth_losses_of_half_precision_over_cut_classes(name: str) -> None:
    layout, sizes = CUT[name]
    logits = (values(B, S, V) * 3).bfloat16()
    options: dict[str, Any] = {"label_smoothing": 0.1}
    leaf = logits.float().requires_grad_()
    rows = leaf.flatten(0, 1)
    counts = (SOME != -100).flatten()
    want = F.cross_entropy(rows, SOME.flatten(), **options)
    want = want + 0.01 * (rows.logsumexp(-1) ** 2 * counts).sum() / counts.sum()
    on = mesh(**sizes)
    labels = sw.shard(SOME, on)
    loss, grad = sw.value_and_grad(lambda x: nn.cross_entropy(x, labels, z_loss=0.01, **options))(
        sw.shard(logits, on, layout)
    )
    assert (loss.dtype, grad.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(loss.full_tensor(), want, rtol=1e-5, atol=1e-5)
    (wanted,) = torch.autograd.grad(want, leaf)
    scale = float(wanted.abs().max())
    torch.testing.assert_close(grad.full_tensor().float(), wanted, rtol=2**-7, atol=2**-8 * scale)


def test_what_does_not_count_may_be_anything() -> None:
    mesh = sw.make_mesh({"data": 2})
    h, table = torch.randn(4, 6), torch.randn(8, 6)
    labels = torch.tensor([1, 2, 3, -100])
    plain = torch.nn.functional.cross_entropy(h @ table.T, labels)
    h[3] = float("inf")
    found = nn.linear_cross_entropy(*(sw.shard(x, mesh) for x in (h, table, labels)))
    torch.testing.assert_close(found.full_tensor(), plain)
    small = labels.clamp(min=0).to(torch.uint8)
    held = sw.shard(torch.randn(4, 6), mesh)
    assert nn.linear_cross_entropy(held, sw.shard(table, mesh), sw.shard(small, mesh)).ndim == 0


def test_where_no_label_counts_gradients_are_zero() -> None:
    mesh = sw.make_mesh({"data": 2})
    h, table = sw.shard(torch.randn(4, 6), mesh, "b/data e"), sw.shard(torch.randn(8, 6), mesh)
    labels = sw.shard(torch.full((4,), -100), mesh)
    value, grads = sw.value_and_grad(nn.linear_cross_entropy, (0, 1))(h, table, labels)
    assert value.full_tensor().isnan()
    assert not any(g.full_tensor().any() for g in grads)


def test_labels_are_checked_inside_transforms() -> None:
    mesh = sw.make_mesh({"data": 2})
    x = sw.shard(torch.zeros(3, 2, 8), mesh)
    labels = sw.shard(torch.tensor([[1, 2], [3, 99], [4, 5]]), mesh)
    with pytest.raises(RuntimeError, match=r"a label lies outside 0\.\.7"):
        sw.vmap(nn.cross_entropy)(x, labels)
    with pytest.raises(RuntimeError, match=r"a label lies outside 0\.\.7"):
        sw.jvp(lambda x: nn.cross_entropy(x, labels), (x,), (x,))
