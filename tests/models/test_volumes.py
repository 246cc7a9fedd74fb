"""What one transformer layer moves: the table of the literature, as whole numbers.

A layer here is its six products (q, k, v, out, up, down) and attention: norms and biases, which
move vectors, are left out. Elements per device, ring convention.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F

import shardwise as sw
from shardwise import nn, strategies

DECLARED = {
    "w_q": nn.Param("embed -> heads head_dim"),
    "w_k": nn.Param("embed -> heads head_dim"),
    "w_v": nn.Param("embed -> heads head_dim"),
    "w_o": nn.Param("heads head_dim -> embed"),
    "w_up": nn.Param("embed -> ffn"),
    "w_down": nn.Param("ffn -> embed"),
}


def layer(p: Any, x: sw.ShardedTensor, s: sw.Strategy) -> sw.ShardedTensor:
    p, method = s.use(p), s.option("matmul")
    h = sw.reshard(x, s["block_in"])
    qkv = nn.dense(
        h, (p["w_q"], p["w_k"], p["w_v"]), out=(s["heads"], s["kv"], s["kv"]), method=method
    )
    a = nn.attention(*qkv, causal=True, out=s["attended"])
    x = x + nn.dense(a, p["w_o"], out=s["hidden"], inputs=2, method=method)
    h = sw.reshard(x, s["block_in"])
    u = F.gelu(nn.dense(h, p["w_up"], out=s["ffn"], method=method))
    return x + nn.dense(u, p["w_down"], out=s["hidden"], method=method)


def planned(
    s: sw.Strategy, axes: dict[str, int], *, b: int, seq: int, h: int, heads: int
) -> sw.Plan:
    """One layer's forward and backward, with a cotangent in place."""
    mesh = sw.make_mesh(axes, transport="abstract")
    sizes = {"embed": h, "heads": heads, "head_dim": h // heads, "ffn": 4 * h}
    params = nn.init(sw.random.key(0), DECLARED, sizes, mesh, s)
    x = sw.zeros((b, seq, h), mesh, s["hidden"])
    y = sw.zeros((b, seq, h), mesh, sw.Layout(s["hidden"], 3).dual)

    def both(params: Any, x: Any, y: Any) -> Any:
        return sw.vjp(lambda p, x: layer(p, x, s), params, x)[1](y)

    return sw.plan(both, params, x, y)


def forward_backward(plan: sw.Plan) -> tuple[float, float]:
    return plan.elements(phase="forward"), plan.elements(phase="backward")


SIZES = [(8, 6, 24, 12), (16, 8, 48, 8)]  # batch, seq, embed, heads


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize(("b", "seq", "h", "heads"), SIZES)
def test_1d_and_sequence_parallel(p: int, b: int, seq: int, h: int, heads: int) -> None:
    seq = 2 * seq
    each = 4 * (p - 1) * b * seq * h // p
    sizes: Any = {"b": b, "seq": seq, "h": h, "heads": heads}
    one = planned(strategies.tensor_1d(), {"tensor": p}, **sizes)
    assert forward_backward(one) == (each, each)
    assert {c.kind for c in one.collectives} == {"all_reduce"}
    assert one.count(phase="forward") == one.count(phase="backward") == 2
    sequence = planned(strategies.sequence_parallel(), {"tensor": p}, **sizes)
    assert forward_backward(sequence) == (each, each)
    for phase in ("forward", "backward"):
        kinds = [c.kind for c in sequence.collectives if c.phase == phase]
        assert sorted(kinds) == ["all_gather"] * 2 + ["reduce_scatter"] * 2


@pytest.mark.parametrize(("q", "d"), [(2, 1), (2, 2), (2, 4), (4, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize(("b", "seq", "h", "heads"), [(24, 6, 24, 12), (48, 8, 48, 24)])
@pytest.mark.parametrize("method", ["direct", "streamed"])
def test_2d_and_2p5d(q: int, d: int, b: int, seq: int, h: int, heads: int, method: Any) -> None:
    stream, weights = b * seq * h, 12 * h * h
    forward = (q - 1) * (7 * stream // d + weights) // q**2
    depth = 2 * (d - 1) * weights // (d * q**2)
    s = strategies.tensor_2p5d(method=method)
    plan = planned(s, {"depth": d, "row": q, "col": q}, b=b, seq=seq, h=h, heads=heads)
    twice = 2 if method == "streamed" else 1
    assert plan.elements(phase="forward") == forward
    assert plan.elements(phase="backward", axis="row") + plan.elements(
        phase="backward", axis="col"
    ) == (twice * forward)
    assert plan.elements(phase="backward", axis="depth") == depth
    if d == 1:
        flat = planned(
            strategies.tensor_2d(method=method),
            {"row": q, "col": q},
            b=b,
            seq=seq,
            h=h,
            heads=heads,
        )
        listed = [[(c.kind, c.axes, c.elements) for c in p.collectives] for p in (plan, flat)]
        assert listed[0] == listed[1]


@pytest.mark.parametrize(
    ("q", "b", "seq", "h", "heads"), [(2, 8, 6, 24, 12), (3, 18, 6, 36, 18), (4, 32, 8, 64, 16)]
)
def test_3d(q: int, b: int, seq: int, h: int, heads: int) -> None:
    each = (q - 1) * (16 * b * seq * h + 12 * h * h) // q**3
    plan = planned(strategies.tensor_3d(), {"i": q, "j": q, "k": q}, b=b, seq=seq, h=h, heads=heads)
    assert forward_backward(plan) == (each, each)


@pytest.mark.parametrize("save", ["gathered", "shard"])
def test_data_and_fsdp(save: Any) -> None:
    n, h = 4, 24
    sizes: Any = {"b": 8, "seq": 6, "h": h, "heads": 12}
    weights = 12 * h * h
    data = planned(strategies.data(), {"data": n}, **sizes)
    assert forward_backward(data) == (0, 2 * (n - 1) * weights // n)
    fsdp = planned(strategies.fsdp(save=save), {"data": n}, **sizes)
    once = (n - 1) * weights // n
    assert forward_backward(fsdp) == (once, once)


@pytest.mark.parametrize(
    ("strategy", "axes"),
    [
        (strategies.tensor_1d(), {"tensor": 1}),
        (strategies.sequence_parallel(), {"tensor": 1}),
        (strategies.tensor_2d(), {"row": 1, "col": 1}),
        (strategies.tensor_2d(method="direct"), {"row": 1, "col": 1}),
        (strategies.tensor_3d(), {"i": 1, "j": 1, "k": 1}),
    ],
)
def test_axes_of_size_one_move_nothing(strategy: sw.Strategy, axes: dict[str, int]) -> None:
    assert not planned(strategy, axes, b=8, seq=6, h=24, heads=12).collectives


GPT3: Any = {"seq": 2048, "h": 12288, "heads": 96}
ON_64 = {
    "1d": (strategies.tensor_1d(), {"tensor": 64}),
    "2d": (strategies.tensor_2d(), {"row": 8, "col": 8}),
    "2.5d": (strategies.tensor_2p5d(), {"depth": 4, "row": 4, "col": 4}),
    "3d": (strategies.tensor_3d(), {"i": 4, "j": 4, "k": 4}),
}


@pytest.mark.parametrize(
    ("b", "expected"),
    [
        (
            64,
            {"1d": 6341787648, "2d": 1431306240, "2.5d": 868220928, "3d": 1292894208},
        ),
        (1, {"1d": 99090432, "2d": None, "2.5d": None, "3d": None}),
    ],
)
def test_gpt3_layer_on_64_devices(b: int, expected: dict[str, int | None]) -> None:
    """The crossover: weights move in 2D and up, so they pay only where tokens outweigh them."""
    least = {64: "2.5d", 1: "1d"}[b]
    moved = {}
    for name, (strategy, axes) in ON_64.items():
        if b == 1:  # the layers' rows cut the batch: 64 sequences of 1/64 of the length are alike
            plan = planned(
                strategy,
                axes,
                b=64,
                seq=GPT3["seq"] // 64,
                h=12288,
                heads=96 if name != "1d" else 64,
            )
        else:
            plan = planned(strategy, axes, b=b, seq=2048, h=12288, heads=96 if name != "1d" else 64)
        moved[name] = plan.elements(phase="forward")
        if expected[name] is not None:
            assert moved[name] == expected[name], name
    assert min(moved, key=moved.__getitem__) == least
