"""What one linear layer moves under 1D, 2D, 2.5D and 3D: the formulas of the literature, as whole
numbers, with float64 equality to the unsharded product in the same runs.

Y[M,N] = X[M,K] W[K,N]; elements that one device moves, by the ring convention. F-numbers are those
of the project's table of checkable facts about communication.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from check import close, moves, placed, pulled, ran
from gallery import mesh, values

import shardwise as sw
from shardwise import nn, ops

MATMUL = "m k, k n -> m n"


def linear(on: sw.Mesh, x_at: str, w_at: str, out: str, sizes: Any, **options: Any) -> Any:
    """Value and gradients checked against the unsharded ones; the record of both ways."""
    m, k, n = sizes
    a, b, c = values(m, k), values(k, n, seed=1), values(m, n, seed=2)
    x, w = placed(a, on, x_at), placed(b, on, w_at)
    y, grads, plan = pulled(lambda x, w: ops.einsum(MATMUL, x, w, out=out, **options), [x, w], c)
    assert y.layout is sw.Layout(out)
    assert [g.layout for g in grads] == [x.layout.dual, w.layout.dual]
    close(y, a @ b)
    close(grads[0], c @ b.T)
    close(grads[1], a.T @ c)
    return plan


def elements(plan: sw.Plan) -> tuple[float, float]:
    return plan.elements(phase="forward"), plan.elements(phase="backward")


def kinds(plan: sw.Plan, phase: str) -> list[tuple[str, str]]:
    return [(kind, axis) for kind, axis, _ in moves(plan, phase)]


# 1.1 and 1.2: one dimension, with and without the sequence cut in between ---------------------


def pair(stream: str, p: int, batch: int = 4, seq: int = 24, h: int = 12, ffn: int = 24) -> Any:
    """Column-parallel then row-parallel linear layers on a stream in this layout."""
    on = mesh(t=p)
    x, up, down = values(batch, seq, h), values(h, ffn, seed=1), values(ffn, h, seed=2)
    given = [placed(x, on, stream), placed(up, on, "d f/t"), placed(down, on, "f/t d")]

    def f(x: Any, up: Any, down: Any) -> Any:
        x = sw.reshard(x, "b s d {R:t}") if "t" in stream else x
        return nn.dense(nn.dense(x, up, out="b s f/t"), down, out=stream)

    c = values(batch, seq, h, seed=3)
    y, grads, plan = pulled(f, given, c)
    close(y, x @ up @ down)
    close(grads[0], c @ down.T @ up.T)
    close(grads[1], torch.einsum("bsd,bsf->df", x, c @ down.T))
    close(grads[2], torch.einsum("bsf,bsd->fd", x @ up, c))
    return plan, batch * seq * h


@pytest.mark.parametrize("p", [2, 3, 4])
def test_f13_a_column_and_row_pair_is_one_all_reduce_each_way(p: int) -> None:
    plan, stream = pair("b s d", p)
    each = 2 * (p - 1) * stream // p
    assert moves(plan, "forward") == [("all_reduce", "t", each)]
    assert moves(plan, "backward") == [("all_reduce", "t", each)]


@pytest.mark.parametrize("p", [2, 3, 4])
def test_f14_a_cut_sequence_swaps_the_all_reduce_and_nothing_else(p: int) -> None:
    plan, stream = pair("b s/t d", p)
    half = (p - 1) * stream // p
    assert moves(plan, "forward") == [("all_gather", "t", half), ("reduce_scatter", "t", half)]
    assert moves(plan, "backward") == [("all_gather", "t", half), ("reduce_scatter", "t", half)]
    without, _ = pair("b s d", p)
    assert elements(plan) == elements(without)


@pytest.mark.parametrize("p", [2, 3, 4])
def test_sequence_parallel_gathers_once_more_where_only_the_shard_is_saved(p: int) -> None:
    on = mesh(t=p)
    x, up = values(4, 24, 12), values(12, 24, seed=1)
    half = (p - 1) * x.numel() // p
    given = [placed(x, on, "b s/t d"), placed(up, on, "d f/t")]

    def loss(up: Any, x: Any, save: Any) -> Any:
        return (nn.dense(sw.reshard(x, "b s d {R:t}", save=save), up) ** 2).sum()

    for save, extra in (("gathered", 0), ("shard", half)):
        grad = sw.grad(lambda x, up: loss(up, x, save), (0, 1))  # noqa: B023
        (gx, gup), plan = ran(lambda: grad(*given))  # noqa: B023
        close(gx, 2 * x @ up @ up.T)
        close(gup, torch.einsum("bsd,bsf->df", x, 2 * x @ up))
        assert plan.elements(phase="regather") == extra
        assert elements(plan) == (half, half)


# 1.3: two dimensions ----------------------------------------------------------------------------

SQUARE = ("m/row k/col", "k/row n/col", "m/row n/col")
SIZES_2D = [(2, (96, 64, 80)), (2, (36, 36, 72)), (3, (36, 36, 72)), (3, (90, 18, 36)),
            (4, (96, 64, 80)), (4, (16, 48, 32))]  # fmt: skip


@pytest.mark.parametrize(("q", "sizes"), SIZES_2D)
def test_f1_to_f4_summa(q: int, sizes: Any) -> None:
    """Each of the three products moves (q-1)(MK+KN)/q^2; S_Y never appears."""
    m, k, n = sizes
    on = mesh(row=q, col=q)
    x, w = (q - 1) * m * k // q**2, (q - 1) * k * n // q**2
    plan = linear(on, *SQUARE, sizes, method="streamed")
    assert elements(plan) == (x + w, 2 * (x + w))
    assert plan.elements() * q**2 == 3 * (q - 1) * (m * k + k * n)  # F3, the whole mesh
    if (q, sizes) == (4, (96, 64, 80)):
        assert plan.elements(phase="forward") == 2112
        assert plan.elements() * q**2 == 101376
    # F4: per product q steps, each with one collective per group of either kind
    assert kinds(plan, "forward") == [("broadcast", "col"), ("broadcast", "row")] * q
    assert sorted(kinds(plan, "backward")) == sorted(
        [("broadcast", "row"), ("reduce", "col"), ("broadcast", "col"), ("reduce", "row")] * q
    )
    # F2: dX = dY.W^T broadcasts W and reduces X's shape; dW = X^T.dY the other way round
    for kind, axis, moved in (("broadcast", "row", w), ("reduce", "col", x),
                              ("broadcast", "col", x), ("reduce", "row", w)):  # fmt: skip
        assert plan.elements(phase="backward", kind=kind, axis=axis) == moved
    direct = linear(on, *SQUARE, sizes)
    assert moves(direct, "forward") == [("all_gather", "col", x), ("all_gather", "row", w)]
    assert sorted(moves(direct, "backward")) == [
        ("reduce_scatter", "col", x), ("reduce_scatter", "row", w),
    ]  # fmt: skip
    # F17: perfect balance
    for each in (plan, direct):
        assert each.flops == 3 * 2 * m * k * n / q**2


@pytest.mark.parametrize("which", ["AB", "AB^T", "A^T B"])
@pytest.mark.parametrize("method", ["streamed", "direct"])
def test_each_product_of_summa_as_a_product_of_its_own(which: str, method: Any) -> None:
    """AB^T and A^T B asked for by name, with the sum scattered over one axis."""
    on, (m, k, n) = mesh(row=4, col=4), (96, 64, 80)
    a, b, c = values(m, k), values(k, n, seed=1), values(m, n, seed=2)
    x, w, y = placed(a, on, SQUARE[0]), placed(b, on, SQUARE[1]), placed(c, on, SQUARE[2])
    programs = {
        "AB": (lambda: ops.einsum(MATMUL, x, w, out="m/row n/col", method=method), a @ b),
        "AB^T": (
            lambda: ops.einsum("m n, k n -> m k", y, w, out="m/row k/col", method=method), c @ b.T,
        ),
        "A^T B": (
            lambda: ops.einsum("m k, m n -> k n", x, y, out="k/row n/col", method=method), a.T @ c,
        ),
    }  # fmt: skip
    f, want = programs[which]
    z, plan = ran(f)
    close(z, want)
    assert z.layout is sw.Layout("_/row _/col")
    x_axis, w_axis = ("col", 3 * m * k // 16), ("row", 3 * k * n // 16)
    rows = {
        "AB": (("all_gather", *x_axis), ("all_gather", *w_axis)),
        "AB^T": (("all_gather", *w_axis), ("reduce_scatter", *x_axis)),
        "A^T B": (("all_gather", *x_axis), ("reduce_scatter", *w_axis)),
    }[which]
    if method == "streamed":  # the same moves, block by block
        verb = {"all_gather": "broadcast", "reduce_scatter": "reduce"}
        rows = tuple((verb[kind], axis, moved / 4) for kind, axis, moved in rows) * 4
    assert moves(plan, "forward") == list(rows)
    assert plan.elements() == 2112


# 1.4: two and a half dimensions -------------------------------------------------------------------

DEEP = ("m/depth/row k/col", "k/row n/col", "m/depth/row n/col")


@pytest.mark.parametrize("method", ["direct", "streamed"])
@pytest.mark.parametrize(("q", "d"), [(2, 1), (2, 2), (2, 4), (3, 2), (4, 2)])
def test_f6_tesseract(q: int, d: int, method: Any) -> None:
    m, k, n = (96, 64, 80) if q != 3 else (72, 18, 36)
    on = mesh(depth=d, row=q, col=q)
    plan = linear(on, *DEEP, (m, k, n), method=method)
    forward = (q - 1) * (m * k // d + k * n) // q**2
    depth = 2 * (d - 1) * k * n // (d * q**2)
    assert plan.elements(phase="forward") == forward
    assert plan.elements(axis="depth") == plan.elements(axis="depth", phase="backward") == depth
    backward = plan.elements(phase="backward") - depth
    assert backward == forward * (2 if method == "streamed" else 1)
    if (q, d) == (4, 2):
        assert (forward, depth) == (1536, 320)
        assert method == "direct" or backward == 3072
    assert plan.count(axis="depth", kind="all_reduce") == (1 if d > 1 else 0)
    assert plan.flops == 3 * 2 * m * k * n / (d * q**2)


@pytest.mark.parametrize("method", ["direct", "streamed"])
def test_f7_tesseract_of_depth_one_is_summa(method: Any) -> None:
    deep = linear(mesh(depth=1, row=4, col=4), *DEEP, (96, 64, 80), method=method)
    flat = linear(mesh(row=4, col=4), *SQUARE, (96, 64, 80), method=method)
    for phase in ("forward", "backward"):
        assert moves(deep, phase) == moves(flat, phase)


@pytest.mark.parametrize("d", [2, 3, 4])
def test_f8_tesseract_of_depth_alone_is_data_parallelism(d: int) -> None:
    sizes = _, k, n = 96, 60, 84
    plan = linear(mesh(depth=d, row=1, col=1), *DEEP, sizes, method="streamed")
    assert not moves(plan, "forward")
    assert moves(plan, "backward") == [("all_reduce", "depth", 2 * (d - 1) * k * n // d)]
    data = linear(mesh(depth=d), "m/depth k", "k n", "m/depth n", sizes)
    assert moves(data, "backward") == moves(plan, "backward")


# 1.5: the matmul of Solomonik and Demmel: depth splits the contracted dim ------------------------


@pytest.mark.parametrize(("n", "q", "c"), [(24, 4, 2), (24, 4, 1), (48, 4, 4), (36, 6, 3)])
def test_f15_true_2p5d(n: int, q: int, c: int) -> None:
    """Replicate over depth, there 1/c of SUMMA's sum each, reduce over depth: local code."""
    on = mesh(dep=c, row=q, col=q)
    a, b = values(n, n), values(n, n, seed=1)

    def first(value: torch.Tensor, at: str) -> sw.ShardedTensor:  # on depth 0 only
        stack = torch.stack([value, *(torch.zeros_like(value) for _ in range(c - 1))])
        return placed(stack, on, f"d/dep {at}")

    def spread(x: Any, at: str) -> Any:
        body = lambda x: ops.broadcast(x, "dep", 0)[0]  # noqa: E731
        out = f"{at} {{R:dep}}"
        return sw.shard_map(body, in_layouts=f"d/dep {at}", out_layouts=out)(x)

    @sw.shard_map(
        in_layouts=("m/row k/col/dep", "k/row/dep n/col"), out_layouts="d/dep m/row n/col"
    )
    def summa(x: Any, w: Any) -> Any:
        total = sum(
            ops.broadcast(x, "col", step) @ ops.broadcast(w, "row", step) for step in range(q)
        )
        return ops.reduce(total, "dep", 0)[None]

    def program(x: Any, w: Any) -> Any:
        return summa(spread(x, "m/row k/col"), spread(w, "k/row n/col"))

    x, w = first(a, "m/row k/col"), first(b, "k/row n/col")
    (y, pull), plan = ran(lambda: sw.vjp(program, x, w))
    block = n * n // q**2
    close(y, torch.stack([a @ b, *(torch.zeros_like(a) for _ in range(c - 1))]))
    assert plan.elements(kind="reduce") * c == (c - 1) * block
    assert plan.elements(axis="dep", kind="broadcast") * c == 2 * (c - 1) * block
    assert (plan.elements(axis="row") + plan.elements(axis="col")) * c == 2 * (q - 1) * block
    if (n, q, c) == (24, 4, 2):
        in_layers = plan.elements(axis="row") + plan.elements(axis="col")
        replicate = plan.elements(axis="dep", kind="broadcast")
        assert (in_layers, replicate, plan.elements(kind="reduce")) == (108, 36, 18)
    ones = values(c, n, n, seed=2)
    gx, gw = pull(placed(ones, on, "d/dep m/row n/col"))
    close(gx.full_tensor()[0], ones[0] @ b.T)
    close(gw.full_tensor()[0], a.T @ ones[0])


# 1.6: three dimensions ----------------------------------------------------------------------------

CUBE = ("m/i/j k/k", "k/k/i n/j", "m/i/k n/j")


@pytest.mark.parametrize(
    ("q", "sizes"),
    [(2, (128, 64, 96)), (2, (36, 36, 72)), (3, (36, 36, 72)), (3, (9, 54, 27)),
     (4, (128, 64, 96)), (4, (32, 16, 64))],
)  # fmt: skip
def test_f9_and_f10_the_cube(q: int, sizes: Any) -> None:
    m, k, n = sizes
    plan = linear(mesh(i=q, j=q, k=q), *CUBE, sizes)
    x, w, y = ((q - 1) * s // q**3 for s in (m * k, k * n, m * n))
    assert moves(plan, "forward") == [
        ("all_gather", "j", x), ("all_gather", "i", w), ("reduce_scatter", "k", y),
    ]  # fmt: skip
    backward = moves(plan, "backward")
    assert backward[0] == ("all_gather", "k", y)
    assert sorted(backward[1:]) == [("reduce_scatter", "i", w), ("reduce_scatter", "j", x)]
    assert plan.flops == 3 * 2 * m * k * n / q**3
    if (q, sizes) == (4, (128, 64, 96)):
        assert elements(plan) == (1248, 1248)
        received = {c.axes: math.prod(c.shape) * c.size for c in plan.collectives[:2]}
        assert received == {("j",): 512, ("i",): 384}


@pytest.mark.parametrize("q", [2, 3, 4])
def test_f10_two_linears_return_to_the_first_layout(q: int) -> None:
    on, m, h, f = mesh(i=q, j=q, k=q), q * q, 2 * q * q, 3 * q * q
    a, b, c = values(m, h), values(h, f, seed=1), values(f, h, seed=2)
    x, up, down = placed(a, on, CUBE[0]), placed(b, on, CUBE[1]), placed(c, on, "k/j/i n/k")

    def f2(x: Any, up: Any, down: Any) -> Any:
        return nn.dense(nn.dense(x, up, out=CUBE[2]), down, out=CUBE[0])

    g = values(m, h, seed=3)
    y, grads, plan = pulled(f2, [x, up, down], g)
    assert y.layout is x.layout
    close(y, a @ b @ c)
    close(grads[0], g @ c.T @ b.T)
    close(grads[1], a.T @ (g @ c.T))
    close(grads[2], (a @ b).T @ g)
    # the roles of j and k are exchanged in the second
    assert kinds(plan, "forward") == [
        ("all_gather", "j"), ("all_gather", "i"), ("reduce_scatter", "k"),
        ("all_gather", "k"), ("all_gather", "i"), ("reduce_scatter", "j"),
    ]  # fmt: skip
    total = (q - 1) * (m * h + h * f + m * f + m * f + f * h + m * h) // q**3
    assert elements(plan) == (total, total)


@pytest.mark.parametrize("q", [2, 3])
def test_the_cube_saves_what_it_gathered_or_gathers_it_again(q: int) -> None:
    m, k, n = 12 * q * q, 6 * q * q, 12 * q * q
    on = mesh(i=q, j=q, k=q)
    a, b = values(m, k), values(k, n, seed=1)
    again = (q - 1) * (m * k + k * n) // q**3
    peaks = {}
    for save, extra in (("gathered", 0), ("shard", again)):

        def loss(x: Any, w: Any) -> Any:
            y = ops.einsum(MATMUL, x, w, out=CUBE[2], save=save)  # noqa: B023
            return (y * y).sum()

        args = placed(a, on, CUBE[0]), placed(b, on, CUBE[1])
        grads, plan = ran(lambda: sw.grad(loss, (0, 1))(*args))  # noqa: B023
        close(grads[0], 2 * a @ b @ b.T)
        close(grads[1], 2 * a.T @ a @ b)
        assert plan.elements(phase="regather") == extra
        assert plan.count(phase="regather", kind="all_gather") == (2 if extra else 0)

        def chained(x: Any, w: Any, v: Any) -> Any:
            y = ops.einsum(MATMUL, x, w, out=CUBE[2], save=save)  # noqa: B023
            z = ops.einsum(MATMUL, y, v, out=CUBE[0], save=save)  # noqa: B023
            return (z * z).sum()

        third = placed(values(n, k, seed=2), on, "k/j/i n/k")
        peaks[save] = sw.plan(sw.grad(chained, (0, 1, 2)), *args, third).peak_memory // 8
    # while the second product runs, the first's gathered operands are held, or not
    assert peaks["gathered"] - peaks["shard"] >= (m * k + k * n) // q**2 - again


# Degenerate axes, bounds, and what must not matter ------------------------------------------------

ONES: dict[str, tuple[dict[str, int], tuple[str, str, str]]] = {
    "1d column": ({"t": 1}, ("m k", "k n/t", "m n/t")),
    "1d row": ({"t": 1}, ("m k/t", "k/t n", "m n")),
    "2d": ({"row": 1, "col": 1}, SQUARE),
    "2.5d": ({"depth": 1, "row": 1, "col": 1}, DEEP),
    "3d": ({"i": 1, "j": 1, "k": 1}, CUBE),
}


@pytest.mark.parametrize("method", ["direct", "streamed", "ring"])
@pytest.mark.parametrize("name", ONES)
def test_f5_axes_of_size_one_emit_nothing(name: str, method: Any) -> None:
    axes, layouts = ONES[name]
    plan = linear(mesh(**axes), *layouts, (8, 12, 16), method=method)
    assert not plan.collectives


def bound(m: int, n: int, k: int, p: int) -> float:
    """Al Daas et al.: no algorithm moves less, from and to even shares of inputs and output."""
    small, middle, large = sorted((m, n, k))
    if p <= large / middle:
        return (1 - 1 / p) * small * middle
    if p <= large * middle / small**2:
        return 2 * math.sqrt(m * n * k * small / p) - (large * small + middle * small) / p
    return 3 * (m * n * k / p) ** (2 / 3) - (m * n + m * k + n * k) / p


EVEN: dict[str, Any] = {
    "1d": lambda p: ({"t": p}, ("m/t k", "k n/t", "m n/t")),
    "1d, rows": lambda p: ({"t": p}, ("m k/t", "k/t n", "m/t n")),
    "data": lambda p: ({"t": p}, ("m/t k", "k/t n", "m/t n")),
    "2d": lambda p: ({"row": math.isqrt(p), "col": math.isqrt(p)}, SQUARE),
    "3d": lambda p: (dict.fromkeys("ijk", round(p ** (1 / 3))), CUBE),
}


@pytest.mark.parametrize("sizes", [(64, 64, 64), (256, 64, 64), (64, 256, 64), (64, 64, 512),
                                   (1024, 64, 64), (192, 128, 64)])  # fmt: skip
@pytest.mark.parametrize("method", ["direct", "streamed", "ring"])
def test_f12_no_layout_moves_less_than_the_bound(sizes: Any, method: Any) -> None:
    m, k, n = sizes
    for name, layout in EVEN.items():
        for p in {"2d": (4, 16), "3d": (8, 64)}.get(name, (2, 4, 8, 16, 64)):
            axes, (x_at, w_at, out) = layout(p)
            on = sw.make_mesh(axes, transport="abstract")
            x, w = sw.zeros((m, k), on, x_at), sw.zeros((k, n), on, w_at)
            made = sw.plan(lambda x, w: ops.einsum(MATMUL, x, w, out=out, method=method), x, w)  # noqa: B023
            moved, least = made.elements(), bound(m, n, k, p)
            assert moved >= least - 1e-9 * least, (name, p)
            if name == "3d" and m == k == n:  # F11: with equality
                q = axes["i"]
                assert moved == 3 * (q - 1) * m * m // q**3
                assert math.isclose(moved, least, rel_tol=1e-12)


STORED = {"1d": "k n/t", "1d, rows": "k/t n", "2d": "k/row n/col", "3d": "k/k/i n/j"}


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("method", ["direct", "streamed", "ring"])
def test_f16_storing_the_transpose_changes_no_volume(name: str, method: Any) -> None:
    axes, (x_at, w_at, out) = EVEN[name](8 if name == "3d" else 4)
    x_at = "m k" if name == "1d" else x_at
    m, k, n = 16, 32, 64
    on = mesh(**axes)
    plan = linear(on, x_at, w_at, out, (m, k, n), method=method)
    a, b, c = values(m, k), values(k, n, seed=1), values(m, n, seed=2)
    turned = " ".join(reversed(w_at.split()))
    y, grads, other = pulled(
        lambda x, w: ops.einsum("m k, n k -> m n", x, w, out=out, method=method),
        [placed(a, on, x_at), placed(b.T.contiguous(), on, turned)],
        c,
    )
    close(y, a @ b)
    close(grads[1], (a.T @ c).T)
    for phase in ("forward", "backward"):
        assert sorted(moves(other, phase)) == sorted(moves(plan, phase))


@pytest.mark.parametrize("p", [2, 4])
def test_f17_one_dimension_divides_the_work_evenly(p: int) -> None:
    m, k, n = 16, 32, 64
    for layouts in (("m k", "k n/t", "m n/t"), ("m k/t", "k/t n", "m n")):
        plan = linear(mesh(t=p), *layouts, (m, k, n))
        assert plan.flops == 3 * 2 * m * k * n / p
