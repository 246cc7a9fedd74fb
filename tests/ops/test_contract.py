"""Contractions: table (a) of the core study as data, and every layout on two and three axes."""

from __future__ import annotations

import math

import pytest
import torch
from check import close, moves, placed, pulled
from gallery import mesh, values

import shardwise as sw
from shardwise import ops
from shardwise.ops.audit import report

# h in both and kept, m only in A, n only in B, k in both and summed. States: the factor that the
# axis cuts, or I replicated, R reduced, U unreduced. Columns: A, B, result, forward and backward of
# the casts; a cast is (operand, row). None: a choice.
MULTILINEAR = [
    ("h", "h", "h", [], []),
    ("k", "k", "U", [], []),
    ("h", "R", "h", [], []),
    ("k", "R", "U", [], []),
    ("h", "I", "h", [], ["B AG"]),
    ("k", "I", "U", [], ["B AG"]),
    ("h", "U", "h", ["B RS"], ["B AG"]),
    ("k", "U", "U", ["B RS"], ["B AG"]),
    ("m", "R", "m", [], []),
    ("m", "I", "m", [], ["B AR"]),
    ("m", "U", "m", ["B AR"], ["B AR"]),
    ("m", "h", None, [], []),
    ("m", "k", None, [], []),
    ("m", "n", None, [], []),
    ("h", "k", None, [], []),
    ("h", "n", None, [], []),
    ("k", "h", None, [], []),
    ("k", "n", None, [], []),
    ("I", "I", "I", [], []),
    ("R", "R", "R", [], []),
    ("R", "I", "I", [], []),
    ("U", "R", "U", [], []),
    ("U", "I", "I", ["A AR"], []),
    ("U", "U", "I", ["A AR", "B AR"], []),
]
MIRROR = {"m": "n", "n": "m", "A": "B", "B": "A"}
FACTORS = {"A": "hmk", "B": "hnk", "out": "hmn"}
SIZES = {"h": 6, "m": 12, "n": 6, "k": 12}
KINDS = {"AR": "all_reduce", "RS": "reduce_scatter", "AG": "all_gather"}
PATTERN = "h m k, h n k -> h m n"


def mirrored(rows):
    """The table with its symmetric half."""
    seen = {}
    for a, b, out, forward, backward in rows:
        seen[a, b] = (out, forward, backward)
        flip = lambda s: None if s is None else MIRROR.get(s, s)  # noqa: E731
        casts = [[MIRROR[c[0]] + c[1:] for c in side] for side in (forward, backward)]
        seen.setdefault((flip(b), flip(a)), (flip(out), *casts))
    return [(a, b, *rest) for (a, b), rest in seen.items()]


def layout(state: str, factors: str) -> str:
    dims = " ".join("_/a" if f == state else "_" for f in factors)
    return dims + (f" {{{state}:a}}" if state in "RU" else "")


def expected(casts, n):
    """(kind, axis, elements) of casts: AR of the whole operand, RS and AG of the whole too."""
    size = {x: math.prod(SIZES[f] for f in FACTORS[x]) for x in "AB"}
    share = {"AR": 2, "RS": 1, "AG": 1}
    return sorted((KINDS[c[2:]], "a", share[c[2:]] * (n - 1) / n * size[c[0]]) for c in casts)


def operands(a, b, n):
    on = mesh(a=n)
    va = values(*(SIZES[f] for f in FACTORS["A"]))
    vb = values(*(SIZES[f] for f in FACTORS["B"]), seed=1)
    return va, vb, placed(va, on, layout(a, "hmk")), placed(vb, on, layout(b, "hnk"))


def test_the_table_speaks_of_every_pair():
    pairs = {(a, b) for a, b, *_ in mirrored(MULTILINEAR)}
    assert pairs == {(a, b) for a in "hmkIRU" for b in "hnkIRU"}


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize(("a", "b", "out", "forward", "backward"), mirrored(MULTILINEAR))
def test_two_operands_combine_as_in_the_table(a, b, out, forward, backward, n):
    va, vb, x, y = operands(a, b, n)
    if out is None:
        with pytest.raises(sw.LayoutError) as caught:
            ops.einsum(PATTERN, x, y)
        assert caught.value.kind == "choice"
        assert caught.value.fixes
        return
    want = torch.einsum("hmk,hnk->hmn", va, vb)
    cotangent = values(*want.shape, seed=2)
    z, grads, plan = pulled(lambda x, y: ops.einsum(PATTERN, x, y), [x, y], cotangent)
    assert z.layout is sw.Layout(layout(out, "hmn"))
    close(z, want)
    close(grads[0], torch.einsum("hmn,hnk->hmk", cotangent, vb))
    close(grads[1], torch.einsum("hmn,hmk->hnk", cotangent, va))
    assert [g.layout for g in grads] == [x.layout.dual, y.layout.dual]
    assert sorted(moves(plan, "forward")) == expected(forward, n)
    assert sorted(moves(plan, "backward")) == expected(backward, n)


# With B undifferentiated: rows of the table that change (the daggers, and U past a constant).
CONSTANT = [
    ("h", "I", "h"),
    ("k", "I", "U"),
    ("m", "I", "m"),
    ("U", "I", "U"),
    ("U", "R", "U"),
    ("I", "R", "I"),
    ("R", "I", "R"),
]


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize(("a", "b", "out"), CONSTANT)
def test_an_undifferentiated_operand_costs_no_backward(a, b, out, n):
    va, vb, x, y = operands(a, b, n)
    want = torch.einsum("hmk,hnk->hmn", va, vb)
    cotangent = values(*want.shape, seed=2)
    z, grads, plan = pulled(lambda x: ops.einsum(PATTERN, x, y), [x], cotangent)
    assert z.layout is sw.Layout(layout(out, "hmn"))
    close(z, want)
    close(grads[0], torch.einsum("hmn,hnk->hmk", cotangent, vb))
    assert not plan.collectives


ALONE = [("k", "U"), ("h", "h"), ("m", "m"), ("I", "I"), ("R", "R"), ("U", "U")]


@pytest.mark.parametrize(("a", "out"), ALONE)
def test_one_operand_is_summed_where_it_lies(a, out):
    va, _, x, _ = operands(a, "I", 2)
    z, (g,), plan = pulled(lambda x: ops.einsum("h m k -> m h", x), [x], values(12, 6))
    assert z.layout is sw.Layout(layout(out, "mh"))
    close(z, va.sum(2).T)
    close(g, values(12, 6).T[:, :, None].expand(6, 12, 12))
    assert not plan.collectives


def test_a_tensor_that_stands_twice_is_reduced_once():
    value = values(6, 6)
    x = placed(value, mesh(a=2), "_ _ {U:a}")
    z, (g,), plan = pulled(lambda x: x @ x, [x], values(6, 6, seed=1))
    close(z, value @ value)
    assert moves(plan, "forward") == [("all_reduce", "a", 36.0)]
    assert moves(plan, "backward") == []
    close(g, values(6, 6, seed=1) @ value.T + value.T @ values(6, 6, seed=1))


AUDITED = {
    "matmul": (torch.matmul, [(6, 12), (12, 6)], None),
    "batched": (torch.matmul, [(6, 6, 12), (6, 12, 6)], None),
    "broadcast": (torch.matmul, [(6, 6, 12), (12, 6)], None),
    "broadcast one": (torch.matmul, [(1, 6, 6), (6, 6, 6)], None),
    "vector": (torch.matmul, [(6, 12), (12,)], None),
    "vector left": (torch.matmul, [(12,), (12, 6)], None),
    "vectors": (torch.matmul, [(12,), (12,)], None),
    "linear": (torch.nn.functional.linear, [(6, 12), (6, 12)], None),
    "einsum": (
        lambda x, y: ops.einsum("b h q d, b h k d -> b h q k", x, y),
        [(6, 1, 6, 6), (6, 1, 6, 6)],
        lambda x, y: torch.einsum("bhqd,bhkd->bhqk", x, y),
    ),
    "einsum of two sums": (
        lambda x, y: ops.einsum("bshd,hde->bse", x, y),
        [(6, 6, 6, 1), (6, 1, 6)],
        lambda x, y: torch.einsum("bshd,hde->bse", x, y),
    ),
    "outer": (
        lambda x, y: ops.einsum("m, n -> n m", x, y),
        [(6,), (6,)],
        lambda x, y: torch.outer(y, x),
    ),
}


@pytest.mark.parametrize("name", AUDITED)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_any_layouts_give_the_unsharded_value_and_gradients(name, axes):
    op, shapes, reference = AUDITED[name]
    found = report(op, shapes, axes=axes, reference=reference, samples=None if axes == 1 else 60)
    assert not found.wrong, found.wrong[:3]
    assert found.right


def test_three_operands_combine_as_counted():
    found = report(
        lambda x, y, z: ops.einsum("m k, k l, l n -> m n", x, y, z),
        [(6, 6), (6, 6), (6, 6)],
        reference=lambda x, y, z: x @ y @ z,
    )
    assert not found.wrong, found.wrong[:3]
    assert len(found.right) + len(found.choice) == 250
    assert (len(found.right), len(found.choice)) == (174, 76)


def test_bias_joins_a_sum_once():
    on = mesh(a=3)
    x, w, b = (
        placed(values(6, 12), on, "_ _/a"),
        placed(values(6, 12, seed=1), on, "_ _/a"),
        placed(values(6), on, "_"),
    )
    cotangent = values(6, 6, seed=4)
    z, grads, plan = pulled(torch.nn.functional.linear, [x, w, b], cotangent)
    assert z.layout is sw.Layout("_ _ {U:a}")
    close(z, values(6, 12) @ values(6, 12, seed=1).T + values(6))
    close(grads[2], cotangent.sum(0))
    assert not plan.collectives


BAD = [
    ("b s d, d f", "no arrow"),
    ("b s, d f -> b z", "unknown letter"),
    ("b b, d f -> b f", "twice"),
    ("b s, d -> b", "rank"),
    ("b s, s f, f g -> b g", "count"),
    ("b s, b f -> s f", "sizes"),
    ("b! s, s f -> b f", "token"),
]


def test_bad_patterns_and_sizes_say_what_is_wrong(golden):
    on = mesh(a=2)
    x, y = placed(values(4, 6), on, "_ _"), placed(values(8, 2), on, "_ _")
    said = []
    for pattern, _ in BAD:
        with pytest.raises(ValueError, match=r".") as caught:
            ops.einsum(pattern, x, y)
        said.append(str(caught.value))
    for wrong in (lambda: x @ y, lambda: ops.einsum("b s, s f -> b f", x, x, out="s b"),
                  lambda: ops.einsum("b s, t s -> b t", x, x, out="t/a b")):  # fmt: skip
        with pytest.raises(ValueError, match=r".") as caught:
            wrong()
        said.append(str(caught.value))
    golden("contract", "\n".join(said))


@pytest.mark.parametrize("save", ["gathered", "shard"])
def test_out_with_options_gives_summa(save):
    on = mesh(row=2, col=2)
    a, b = values(4, 8), values(8, 4, seed=1)
    x, y = placed(a, on, "m/row k/col"), placed(b, on, "k/row n/col")

    def f(x, y):
        return ops.einsum("m k, k n -> m n", x, y, out="m/row n/col", save=save)

    z, grads, plan = pulled(f, [x, y], values(4, 4))
    close(z, a @ b)
    close(grads[0], values(4, 4) @ b.T)
    close(grads[1], a.T @ values(4, 4))
    assert [(c.kind, c.axes) for c in plan.collectives if c.phase == "forward"] == [
        ("all_gather", ("col",)), ("all_gather", ("row",)),
    ]  # fmt: skip
