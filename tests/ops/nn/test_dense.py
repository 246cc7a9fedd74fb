"""dense: a bias joins before a sum is reduced, also where `out` decides; operands move once."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from check import close, moves, placed, pulled
from gallery import mesh, values

import shardwise as sw
from shardwise import nn, ops

B, S, K, N = 8, 3, 8, 8
X, W, BIAS = values(B, S, K), values(K, N, seed=1), values(N, seed=2)
COTANGENT = values(B, S, N, seed=3)


def cube(q: int = 2) -> sw.Mesh:
    return mesh(i=q, j=q, k=q)


# layouts of x, w, b and out: the cube's, at rest and at use, 1D row parallel, the square's
CASES: dict[str, tuple[dict[str, int], str, str, str, str]] = {
    "cube at rest": (
        {"i": 2, "j": 2, "k": 2}, "b/i/j s d/k", "d/k/i f/j", "f/j {R:i}", "b/i/k s f/j",
    ),
    "cube at use": (
        {"i": 2, "j": 2, "k": 2}, "b/i s d/k {R:j}", "d/k f/j {R:i}", "f/j {R:i}", "b/i/k s f/j",
    ),
    "row parallel": ({"t": 4}, "b s d/t", "d/t f", "f", "b s f"),
    "row parallel, scattered": ({"t": 4}, "b s d/t", "d/t f", "f", "b/t s f"),
    "square": ({"row": 2, "col": 2}, "b/row s d/col", "d/row f/col", "f/col {R:row}",
               "b/row s f/col"),
}  # fmt: skip


@pytest.mark.parametrize("method", ["direct", "streamed", "ring"])
@pytest.mark.parametrize("name", CASES)
def test_a_bias_joins_before_the_sum_is_reduced(name: str, method: Any) -> None:
    axes, *layouts, out = CASES[name]
    on = mesh(**axes)
    xs = [placed(v, on, to) for v, to in zip((X, W, BIAS), layouts, strict=True)]
    y, grads, plan = pulled(
        lambda x, w, b: nn.dense(x, w, b, out=out, method=method), xs, COTANGENT
    )
    bare = pulled(lambda x, w: nn.dense(x, w, out=out, method=method), xs[:2], COTANGENT)[2]
    assert y.layout is sw.Layout(out)
    assert [g.layout for g in grads] == [x.layout.dual for x in xs]
    close(y, X @ W + BIAS)
    close(grads[0], COTANGENT @ W.T)
    close(grads[1], torch.einsum("bsk,bsn->kn", X, COTANGENT))
    close(grads[2], COTANGENT.sum((0, 1)))
    # by the other methods too, though a sum that a bias joins is not scattered panel by panel
    assert plan.elements(phase="forward") == bare.elements(phase="forward")
    if method == "direct":
        assert moves(plan, "forward") == moves(bare, "forward")
        assert sorted(moves(plan, "backward")) == sorted(moves(bare, "backward"))
    summed = {a for a, s in xs[0].layout.axes.items() if s == 2}
    assert not [m for m in moves(plan, "backward") if m[0] == "all_reduce" and m[1] in summed]


def test_the_bias_of_linear_joins_where_out_decides() -> None:
    on = cube()
    x = placed(X, on, "b/i/j s d/k")
    w = placed(W.T.contiguous(), on, "f/j d/k/i")
    b = placed(BIAS, on, "f/j {R:i}")
    out = "b/i/k s f/j"
    y, grads, plan = pulled(lambda *a: ops.linear(*a, out=out), [x, w, b], COTANGENT)
    close(y, X @ W + BIAS)
    close(grads[2], COTANGENT.sum((0, 1)))
    assert [(kind, axis) for kind, axis, _ in moves(plan, "forward")] == [
        ("all_gather", "j"), ("all_gather", "i"), ("reduce_scatter", "k"),
    ]  # fmt: skip
    assert not plan.count(kind="all_reduce")


@pytest.mark.parametrize("method", ["direct", "streamed", "ring"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("axes", "x_at", "w_at", "out"),
    [
        ({"row": 2, "col": 2}, "b/row s d/col", "d/row f/col", "b/row s f/col"),
        ({"t": 4}, "b/t s d", "d f/t", "b s f/t"),
        ({"t": 4}, "b s/t d", "d f/t", "b s f/t"),
    ],
)
def test_a_tuple_of_weights_shares_one_move(axes, x_at, w_at, out, with_bias, method) -> None:
    on, x_value = mesh(**axes), values(8, 4, 8)
    n = 2 if len(axes) == 2 else 4
    ws = [values(8, m, seed=m) for m in (8, 16, 4)]
    bs = [values(m, seed=9 + m) for m in (8, 16, 4)]
    b_at = w_at.split()[1] + (" {R:row}" if "row" in axes else "")
    x = placed(x_value, on, x_at)
    given = [placed(w, on, w_at) for w in ws]
    biases = [placed(b, on, b_at) for b in bs]

    args = [x, *given, *(biases if with_bias else [])]
    joined = torch.cat(ws, 1)
    parts = nn.dense(x, tuple(given), tuple(biases) if with_bias else None, out=out, method=method)
    for part, w, b in zip(parts, ws, bs, strict=True):
        close(part, x_value @ w + (b if with_bias else 0))
        assert part.layout is sw.Layout(out)
    cotangents = [values(8, 4, m, seed=20 + m) for m in (8, 16, 4)]

    def total(x, *rest):
        ys = nn.dense(x, rest[:3], rest[3:] or None, out=out, method=method)
        return sum((y * placed(c, on, out)).sum() for y, c in zip(ys, cotangents, strict=True))

    with sw.record() as plan:
        _, grads = sw.value_and_grad(total, tuple(range(len(args))))(*args)
    close(grads[0], sum(c @ w.T for c, w in zip(cotangents, ws, strict=True)))
    for g, c in zip(grads[1:4], cotangents, strict=True):
        close(g, torch.einsum("bsk,bsn->kn", x_value, c))
    assert [g.layout for g in grads] == [a.layout.dual for a in args]
    size = {"x": x_value.numel(), "w": joined.numel()}
    over = "col" if len(axes) == 2 else "t"
    blocks = n * n if len(axes) == 2 else n
    assert plan.elements(phase="forward", axis=over) == (n - 1) * size["x"] // blocks
    times = 1 if method == "direct" or (method == "streamed" and len(axes) == 1) else 2
    assert plan.elements(phase="backward", axis=over) == times * (n - 1) * size["x"] // blocks
    assert not plan.warnings


def test_added_products_are_reduced_once() -> None:
    """PaLM: attention's and the MLP's outputs join before the one all_reduce of a layer."""
    on = mesh(t=2)
    a, w_o = values(4, 3, 2, 4), values(2, 4, 6, seed=1)
    u, w_down, bias = values(4, 3, 8, seed=2), values(8, 6, seed=3), values(6, seed=4)
    xs = [
        placed(a, on, "b s h/t d"), placed(u, on, "b s f/t"),
        placed(w_o, on, "h/t d e"), placed(w_down, on, "f/t e"), placed(bias, on, "e"),
    ]  # fmt: skip
    y, grads, plan = pulled(
        lambda a, u, w, v, b: nn.dense((a, u), (w, v), b, out="b s e", inputs=(2, 1)),
        xs,
        values(4, 3, 6, seed=5),
    )
    close(y, torch.einsum("bshd,hde->bse", a, w_o) + u @ w_down + bias)
    close(grads[0], torch.einsum("bse,hde->bshd", values(4, 3, 6, seed=5), w_o))
    close(grads[4], values(4, 3, 6, seed=5).sum((0, 1)))
    assert moves(plan, "forward") == [("all_reduce", "t", 4 * 3 * 6)]
    assert not moves(plan, "backward")


def test_wrong_arguments_are_named() -> None:
    on = mesh(t=2)
    x, w = placed(values(4, 8), on, "b d"), placed(values(8, 4), on, "d f")
    for call, text in {
        lambda: nn.dense(x, w, method="rings"): "dense: unknown method 'rings'",
        lambda: nn.dense((x, x), (w,)): "2 tensors x need a tuple of as many weights",
        lambda: nn.dense((x, x), w): "2 tensors x need a tuple of as many weights",
        lambda: nn.dense(x, (w, w), out=("b f",)): "1 of out for 2 products",
    }.items():
        with pytest.raises(ValueError, match=text.replace("(", r"\(")):
            call()
    with pytest.raises(TypeError, match="a tuple of inputs needs a tuple of x"):
        nn.dense(x, w, inputs=(1,))


@pytest.mark.parametrize("method", ["direct", "streamed", "ring"])
def test_the_plan_of_a_call_is_kept(method: Any) -> None:
    on = mesh(row=2, col=2)
    x, w = placed(values(4, 8), on, "b/row d/col"), placed(values(8, 4), on, "d/row f/col")
    first, second = (nn.dense(x, w, out="b/row f/col", method=method) for _ in range(2))
    assert first._type is second._type
    assert all(torch.equal(a, b) for a, b in zip(first.shards, second.shards, strict=True))


def test_every_rank_of_weight_and_number_of_inputs() -> None:
    on = mesh(row=2, col=2)
    for inputs, outs in itertools.product((1, 2), (0, 1, 2)):
        x = values(4, 3, *(4, 2)[:inputs])
        w = values(*(4, 2)[:inputs], *(4, 2)[:outs], seed=1)
        dims = "d/col e"[: 5 + 2 * (inputs == 2)]
        kept = "f/col g"[: (0, 5, 7)[outs]]
        given = placed(x, on, f"b/row s {dims}")
        weight = placed(w, on, f"{dims.replace('col', 'row')} {kept}")
        for method in ("direct", "streamed", "ring"):
            y = nn.dense(given, weight, out=f"b/row s {kept}", inputs=inputs, method=method)
            close(y, torch.tensordot(x, w, inputs), f"{inputs} {outs} {method}")
