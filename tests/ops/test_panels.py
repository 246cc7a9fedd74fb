"""Streamed and ring products: the same types, values and derivatives as direct, panel by panel."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from check import close, moves, placed, pulled
from gallery import mesh, values

import shardwise as sw
from shardwise import ops
from shardwise.ops.audit import report

PATTERN = "b s d, d f -> b s f"
A, B = values(8, 6, 8), values(8, 8, seed=1)
C = values(8, 6, 8, seed=2)
METHODS = ("streamed", "ring")

# mesh, x, w, out -> which collectives replace which, forward. An operand that rests cut over
# another axis, or owes nothing there, must keep what it has.
SQUARE = {"row": 2, "col": 2}
CASES: dict[str, tuple[dict[str, int], str, str, str]] = {
    "square": (SQUARE, "b/row s d/col", "d/row f/col", "b/row s f/col"),
    "columns first": ({"col": 2, "row": 2}, "b/row s d/col", "d/row f/col", "b/row s f/col"),
    "square, transposed": (SQUARE, "b/row s d/col", "d/row f/col", "b s/row f/col"),
    "square, weight transposed": (SQUARE, "b/row s d/col", "d/col f/row", "b/row s f/col"),
    "square, rows contracted": (SQUARE, "b/col s d/row", "d/row f/col", "b/row s f/col"),
    "square in depth": (
        {"depth": 2, **SQUARE}, "b/depth/row s d/col", "d/row f/col {R:depth}",
        "b/depth/row s f/col",
    ),
    "square, depth replicated": (
        {"depth": 2, **SQUARE}, "b/depth/row s d/col", "d/row f/col", "b/depth/row s f/col",
    ),
    "square, a sum in depth": (
        {"depth": 2, **SQUARE}, "b/row s d/depth/col", "d/depth/row f/col", "b/row s f/col",
    ),
    "square, data cut elsewhere": (
        {"data": 2, **SQUARE}, "b/row s/data d/col", "d/row f/col {R:data}",
        "b/row s/data f/col",
    ),
    "not a square": ({"row": 2, "col": 4}, "b/row s d/col", "d/row f/col", "b/row s f/col"),
    "rows gathered": ({"t": 4}, "b/t s d", "d f/t", "b s f/t"),
    "middle dim gathered": ({"t": 2}, "b s/t d", "d f/t", "b s f/t"),
    "contracted dim gathered": ({"t": 4}, "b s d/t", "d f/t", "b s f/t"),
    "weight gathered, contracted": ({"t": 4}, "b/t s d", "d/t f", "b/t s f"),
    "weight gathered, kept": ({"t": 4}, "b/t s d", "d f/t", "b/t s f"),
    "rows scattered": ({"t": 4}, "b s d/t", "d/t f", "b/t s f"),
    "features scattered": ({"t": 4}, "b s d/t", "d/t f", "b s f/t"),
    "replicated": ({"t": 4}, "b s d", "d/t f", "b s f/t"),
    "two axes on a dim": ({"a": 2, "t": 2}, "b/a/t s d", "d f/t {R:a}", "b/a s f/t"),
    "minor axis first": ({"a": 2, "t": 2}, "b/t/a s d", "d f/a {R:t}", "b/t s f/a"),
    "cube": ({"i": 2, "j": 2, "k": 2}, "b/i/j s d/k", "d/k/i f/j", "b/i/k s f/j"),
    "a sum stays owed": ({"a": 2, "t": 2}, "b/t s d {U:a}", "d f/t {R:a}", "b s f/t {U:a}"),
    "one device": ({"t": 1}, "b/t s d", "d f/t", "b s f/t"),
    "one row": ({"row": 1, "col": 1}, "b/row s d/col", "d/row f/col", "b/row s f/col"),
}  # fmt: skip


def product(out: str, method: Any, **options: Any) -> Any:
    return lambda x, w: ops.einsum(PATTERN, x, w, out=out, method=method, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_types_values_and_gradients_are_those_of_direct(name: str, method: str) -> None:
    axes, x_at, w_at, out = CASES[name]
    on = mesh(**axes)
    x, w = placed(A, on, x_at), placed(B, on, w_at)
    y, grads, _ = pulled(product(out, method), [x, w], C)
    same, direct, _ = pulled(product(out, "direct"), [x, w], C)
    assert y._type is same._type
    assert [g._type for g in grads] == [g._type for g in direct]
    close(y, A @ B)
    close(grads[0], C @ B.T)
    close(grads[1], torch.einsum("bsd,bsf->df", A, C))


# Forward and backward rows of each case that a panel product takes: (kind, axis, how many). Two
# backward products: each moves its panels again.
ROWS: dict[tuple[str, str], tuple[list[Any], list[Any]]] = {
    ("streamed", "square"): (
        [("broadcast", "col", 2), ("broadcast", "row", 2)],
        [("broadcast", "col", 2), ("broadcast", "row", 2), ("reduce", "col", 2),
         ("reduce", "row", 2)],
    ),
    ("streamed", "square, weight transposed"): (
        [("broadcast", "row", 2), ("reduce", "col", 2)],
        [("broadcast", "col", 4), ("broadcast", "row", 2), ("reduce", "row", 2)],
    ),
    ("streamed", "not a square"): (
        [("all_gather", "col", 1), ("all_gather", "row", 1)],
        [("reduce_scatter", "col", 1), ("reduce_scatter", "row", 1)],
    ),
    ("streamed", "rows gathered"): ([("all_gather", "t", 1)], [("reduce_scatter", "t", 1)]),
    ("streamed", "square in depth"): (
        [("broadcast", "col", 2), ("broadcast", "row", 2)],
        [("broadcast", "col", 2), ("broadcast", "row", 2), ("reduce", "col", 2),
         ("reduce", "row", 2)],
    ),
    ("streamed", "square, depth replicated"): (
        [("broadcast", "col", 2), ("broadcast", "row", 2)],
        [("all_reduce", "depth", 1), ("broadcast", "col", 2), ("broadcast", "row", 2),
         ("reduce", "col", 2), ("reduce", "row", 2)],
    ),
    ("ring", "rows gathered"): ([("permute", "t", 3)], [("permute", "t", 6)]),
    ("ring", "middle dim gathered"): ([("permute", "t", 1)], [("permute", "t", 2)]),
    ("ring", "contracted dim gathered"): ([("permute", "t", 3)], [("permute", "t", 6)]),
    ("ring", "weight gathered, contracted"): ([("permute", "t", 3)], [("permute", "t", 6)]),
    ("ring", "weight gathered, kept"): ([("permute", "t", 3)], [("permute", "t", 6)]),
    ("ring", "rows scattered"): ([("permute", "t", 3)], [("permute", "t", 6)]),
    ("ring", "features scattered"): ([("permute", "t", 3)], [("permute", "t", 6)]),
    ("ring", "cube"): (
        [("all_gather", "i", 1), ("all_gather", "j", 1), ("permute", "k", 1)], None,
    ),
    ("ring", "one device"): ([], []),
    ("streamed", "one row"): ([], []),
}  # fmt: skip


@pytest.mark.parametrize(("method", "name"), ROWS)
def test_what_moves(method: str, name: str) -> None:
    axes, x_at, w_at, out = CASES[name]
    on = mesh(**axes)
    _, _, plan = pulled(product(out, method), [placed(A, on, x_at), placed(B, on, w_at)], C)
    for phase, rows in zip(("forward", "backward"), ROWS[method, name], strict=True):
        found = sorted((kind, axis) for kind, axis, _ in moves(plan, phase))
        counted = [(*key, len(list(each))) for key, each in itertools.groupby(found)]
        if rows is not None:
            if name == "cube":  # which of three equal moves becomes the ring is not the point
                assert sum(n for *_, n in counted) == 3
                assert "permute" in {kind for kind, *_ in counted}
            else:
                assert counted == rows, phase
    if method == "ring":
        direct = pulled(product(out, "direct"), [placed(A, on, x_at), placed(B, on, w_at)], C)[2]
        assert plan.elements(phase="forward") == direct.elements(phase="forward")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("pattern", "shapes"),
    [
        ("m k, k n -> m n", [(6, 12), (12, 6)]),
        ("h m k, h k n -> h m n", [(6, 6, 6), (6, 6, 6)]),
        ("b h d, h d e -> b e", [(6, 6, 2), (6, 2, 6)]),
        ("m k, k n -> n m", [(6, 6), (6, 6)]),
        ("m, n -> m n", [(6,), (6,)]),
    ],
)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_any_layouts_give_the_unsharded_value_and_gradients(axes, pattern, shapes, method) -> None:
    plain = pattern.replace(" ", "")  # for torch: "mk,kn->mn"

    def op(x: Any, y: Any) -> Any:
        with sw.cheapest():
            return ops.einsum(pattern, x, y, method=method)

    found = report(
        op,
        shapes,
        axes=axes,
        reference=lambda x, y: torch.einsum(plain, x, y),
        samples=None if axes == 1 else 40,
    )
    assert not found.wrong, found.wrong[:3]
    assert found.right


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["square", "rows gathered", "features scattered", "cube"])
def test_second_derivatives_and_forward_mode(name: str, method: str) -> None:
    axes, x_at, w_at, out = CASES[name]
    on = mesh(**axes)
    x, w = placed(A, on, x_at), placed(B, on, w_at)
    f = product(out, method)

    def loss(x: Any, w: Any) -> Any:
        return (torch.tanh(f(x, w)) ** 2).sum()

    def plain(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(x @ w) ** 2).sum()

    t, u = values(8, 6, 8, seed=5), values(8, 8, seed=6)
    tangents = (placed(t, on, x_at), placed(u, on, w_at))
    value, tangent = sw.jvp(f, (x, w), tangents)
    close(value, A @ B)
    close(tangent, t @ B + A @ u)
    got = sw.hvp(lambda both: loss(*both), (x, w), tangents)
    leaves = [A.clone().requires_grad_(), B.clone().requires_grad_()]
    _, want = torch.autograd.functional.hvp(plain, tuple(leaves), (t, u))
    for one, other in zip(got, want, strict=True):
        close(one, other)
    first = sw.grad(lambda x: (sw.grad(loss)(x, w) ** 2).sum())(x)
    grad = torch.autograd.grad(plain(*leaves), leaves[0], create_graph=True)[0]
    close(first, torch.autograd.grad((grad**2).sum(), leaves[0])[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mapped", [(0, None), (None, 0), (0, 0), (1, 2)])
@pytest.mark.parametrize("name", ["square", "weight gathered, kept", "features scattered"])
def test_vmap_of_the_product_and_of_its_gradient(name: str, mapped: Any, method: str) -> None:
    axes, x_at, w_at, out = CASES[name]
    on = mesh(**axes)

    def stacked(value: torch.Tensor, at: str, dim: int | None, seed: int) -> Any:
        if dim is None:
            return placed(value, on, at), [value] * 3
        every = torch.stack([value, 2 * value, values(*value.shape, seed=seed)], dim)
        names, _, states = at.partition("{")
        dims = names.split()
        dims.insert(dim, "v")
        return placed(every, on, " ".join(dims) + ("{" + states if states else "")), [
            *every.unbind(dim)
        ]

    (x, xs), (w, ws) = stacked(A, x_at, mapped[0], 7), stacked(B, w_at, mapped[1], 8)
    f = product(out, method)
    close(
        sw.vmap(f, in_dims=mapped)(x, w), torch.stack([a @ b for a, b in zip(xs, ws, strict=True)])
    )
    g = sw.vmap(sw.grad(lambda x, w: (f(x, w) ** 2).sum(), (0, 1)), in_dims=mapped)(x, w)
    close(g[0], torch.stack([2 * a @ b @ b.T for a, b in zip(xs, ws, strict=True)]))
    want = [2 * torch.einsum("bsd,bsf->df", a, a @ b) for a, b in zip(xs, ws, strict=True)]
    close(g[1], torch.stack(want))


@pytest.mark.parametrize("q", [2, 3, 4])
def test_a_stream_holds_one_panel_of_each_operand(q: int) -> None:
    """Peak bytes, forward: direct holds S/q of each operand gathered, streamed S/q^2."""
    m, k, n = 12 * q, 6 * q * q, 18 * q
    on = sw.make_mesh({"row": q, "col": q}, transport="abstract")
    x, w = sw.zeros((m, k), on, "m/row k/col"), sw.zeros((k, n), on, "k/row n/col")
    peaks, blocks = {}, (m * k + k * n) // q**2
    for method in ("direct", "streamed"):
        f = partial(ops.einsum, "m k, k n -> m n", out="m/row n/col", method=method)
        made = sw.plan(f, x, w)
        peaks[method] = made.peak_memory // 4
        assert made.flops == 2 * m * k * n / q**2
    at_rest = blocks + m * n // q**2
    assert peaks["direct"] == at_rest + (m * k + k * n) // q
    assert peaks["streamed"] == at_rest + (m * k + k * n) // q**2


@pytest.mark.parametrize("q", [2, 3, 4])
def test_a_stream_of_sums_holds_one_part(q: int) -> None:
    """X.W^T: a panel of W, and of the result what is done, one part and what is reduced of it."""
    m, n, k = 6 * q, 60 * q, 6 * q * q
    on = sw.make_mesh({"row": q, "col": q}, transport="abstract")
    x, w = sw.zeros((m, n), on, "m/row n/col"), sw.zeros((k, n), on, "k/row n/col")
    f = partial(ops.einsum, "m n, k n -> m k", out="m/row k/col", method="streamed")
    rest, panel, part = (m * n + k * n + m * k) // q**2, k * n // q**2, m * k // q**2
    assert panel > part
    assert sw.plan(f, x, w).peak_memory // 4 == rest + panel + part


@pytest.mark.parametrize("q", [2, 4])
def test_a_stream_saves_blocks_only(q: int) -> None:
    """Held between forward and backward: what direct gathers is gone, forward and backward."""
    m, k, n = 24 * q, 6 * q * q, 12 * q
    on = sw.make_mesh({"row": q, "col": q}, transport="abstract")
    x, w = sw.zeros((m, k), on, "m/row k/col"), sw.zeros((k, n), on, "k/row n/col")
    peaks = {}
    for method in ("direct", "streamed"):
        f = partial(ops.einsum, "m k, k n -> m n", out="m/row n/col", method=method)
        both = sw.grad(lambda x, w: f(x, w).sum(), (0, 1))  # noqa: B023
        peaks[method] = sw.plan(both, x, w).peak_memory // 4
    gathered, panels = (m * k + k * n) // q, (m * k + k * n) // q**2
    assert peaks["direct"] - peaks["streamed"] >= gathered - panels


@pytest.mark.parametrize("q", [2, 3, 4])
def test_a_ring_holds_two_panels(q: int) -> None:
    on = sw.make_mesh({"t": q}, transport="abstract")
    m, k, n = 6 * q * q, 12, 24 * q
    x, w = sw.zeros((m, k), on, "m/t k"), sw.zeros((k, n), on, "k n/t")
    f = {
        method: lambda x, w, how=method: ops.einsum(
            "m k, k n -> m n", x, w, out="m n/t", method=how
        )
        for method in ("direct", "ring")
    }
    rest = (m * k + k * n + m * n) // q
    assert sw.plan(f["direct"], x, w).peak_memory // 4 == rest + m * k
    part, panel = m * n // q**2, m * k // q  # a part is written into the result when it is whole
    passing = panel * (1 if q == 2 else 2)  # the panel at hand, and the one that arrives
    assert sw.plan(f["ring"], x, w).peak_memory // 4 == rest + max(panel + part, passing)


def test_sums_in_a_wider_dtype() -> None:
    on = mesh(row=4, col=4)
    x = sw.shard(values(8, 16).bfloat16(), on, "m/row k/col")
    w = sw.shard(values(16, 8, seed=1).bfloat16(), on, "k/row n/col")
    for method in METHODS:
        f = partial(
            ops.einsum,
            "m k, k n -> m n",
            out="m/row n/col",
            method=method,
            reduce_dtype=torch.float32,
        )
        with sw.record() as plan:
            y, pull = sw.vjp(f, x, w)
            grads = pull(sw.full((8, 8), 1.0, on, "m/row n/col", dtype=torch.bfloat16))
        assert y.dtype == grads[0].dtype == grads[1].dtype == torch.bfloat16
        reduced = [c for c in plan.collectives if c.kind in ("reduce", "reduce_scatter")]
        assert reduced
        assert {c.dtype for c in reduced} == {torch.float32}
        want = x.full_tensor().double() @ w.full_tensor().double()
        assert (y.full_tensor().double() - want).abs().max() < 0.1


def test_a_constant_operand_is_not_moved_backward() -> None:
    on = mesh(row=2, col=2)
    x, w = placed(A, on, "b/row s d/col"), placed(B, on, "d/row f/col")
    f = product("b/row s f/col", "streamed")
    y, grads, plan = pulled(lambda x: f(x, w), [x], C)
    close(y, A @ B)
    close(grads[0], C @ B.T)
    assert sorted(moves(plan, "backward")) == [
        ("broadcast", "row", 8), ("broadcast", "row", 8),
        ("reduce", "col", 48), ("reduce", "col", 48),
    ]  # fmt: skip


def test_what_does_not_qualify_runs_direct() -> None:
    """Three operands, sums of one alone, and letters that only one tensor has."""
    on = mesh(t=2)
    a, b = values(4, 6), values(6, 4, seed=1)
    x, y = placed(a, on, "m/t k"), placed(b, on, "k n/t")
    for method in METHODS:
        z = ops.einsum("m k, k n, m j -> n j", x, y, x, out="n/t j", method=method)
        close(z, torch.einsum("mk,kn,mj->nj", a, b, a))
        close(ops.einsum("m k -> m", x, method=method), a.sum(1))
        z = ops.einsum("m k, j n -> m n", x, y, out="m n/t", method=method)
        close(z, torch.einsum("mk,jn->mn", a, b))
        counts = sw.shard(torch.arange(24).reshape(4, 6), on, "m/t k")
        z = ops.einsum("m k, n k -> m n", counts, counts, out="m n/t", method=method)
        assert torch.equal(z.full_tensor(), counts.full_tensor() @ counts.full_tensor().T)
    with pytest.raises(ValueError, match="einsum: unknown method 'summa'"):
        ops.einsum("m k, k n -> m n", x, y, method="summa")  # pyright: ignore


@pytest.mark.parametrize("reduce_dtype", [None, torch.float32])
def test_half_precision_is_rounded_once_however_many_panels(reduce_dtype) -> None:
    on = mesh(row=8, col=8)
    a, b = (values(*shape, seed=i).bfloat16() for i, shape in enumerate([(64, 512), (512, 64)]))
    x, w = sw.shard(a, on, "m/row k/col"), sw.shard(b, on, "k/row n/col")
    want = a.double() @ b.double()
    errors = {}
    for method in ("direct", *METHODS):
        options: dict[str, Any] = {"method": method, "reduce_dtype": reduce_dtype}
        y = ops.einsum("m k, k n -> m n", x, w, out="m/row n/col", **options)
        errors[method] = (y.full_tensor().double() - want).abs().mean()
    for method in METHODS:
        assert errors[method] < 1.2 * errors["direct"], errors


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["square", "square, transposed", "features scattered"])
def test_cheap_recomputation_keeps_the_product(name: str, method: str) -> None:
    axes, x_at, w_at, out = CASES[name]
    on = mesh(**axes)
    x, w = placed(A, on, x_at), placed(B, on, w_at)
    f = product(out, method)

    def loss(x: Any, w: Any) -> Any:
        return (torch.tanh(f(torch.sin(x), w)) ** 2).sum()

    want = sw.grad(loss, (0, 1))(x, w)
    wrapped = sw.remat(loss, recompute="cheap")
    for wrap in (wrapped, sw.remat(wrapped), sw.remat(wrapped, recompute="cheap")):
        with sw.record() as plan:
            got = sw.grad(wrap, (0, 1))(x, w)
        for one, other in zip(got, want, strict=True):
            assert one._type is other._type
            assert torch.equal(one.full_tensor(), other.full_tensor())
        if wrap is wrapped:
            kinds = {c.kind for c in plan.collectives if c.phase == "recompute"}
            assert not kinds & {"permute", "broadcast", "reduce"}
