"""Attention: batch, heads, and queries that see all keys may be cut; the rest is a choice."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from check import close, moves, placed, pulled
from gallery import mesh, values

import shardwise as sw
from shardwise.ops.audit import report

# B H S T D: batch, heads, queries, keys, head_dim
B, H, S, D = 6, 6, 6, 12
QKV = [(B, H, S, D)] * 3


def attend(**options):
    return lambda q, k, v, *mask: F.scaled_dot_product_attention(q, k, v, *mask, **options)


def dims_cut(layout: str) -> set[int]:
    return {d for d, text in enumerate(layout.split()) if "/" in text}


@pytest.mark.parametrize("causal", [False, True])
def test_every_layout_on_one_axis(causal):
    found = report(attend(is_causal=causal), QKV, samples=150)
    assert not found.wrong, found.wrong[:3]
    batch_or_heads = {0, 1}
    for _, q, k, v in found.choice:
        cuts = [dims_cut(x) for x in (q, k, v)]
        both = set().union(*cuts)
        blocked = bool((cuts[1] | cuts[2]) - {0, 1, 3} or (cuts[0] | cuts[1]) & {3})
        assert blocked or len(both) > 1 or (causal and 2 in cuts[0]), (q, k, v)
    for _, q, k, v in found.right:
        for cut in (dims_cut(k), dims_cut(q) - ({2} if not causal else set())):
            assert cut <= batch_or_heads, (q, k, v)
        assert dims_cut(v) <= batch_or_heads | {3}


def drawn(factors, shape, cuts, draw):
    """A layout of one operand: each axis cuts its factor there, or is in a state."""
    dims, states = ["_"] * len(factors), {"R": [], "U": []}
    for axis, factor in cuts.items():
        if factor in factors and shape[factors.index(factor)] > 1 and draw.random() < 0.7:
            dims[factors.index(factor)] += f"/{axis}"
        elif (state := draw.choice("IRU")) != "I":
            states[state].append(axis)
    text = " ".join(f"{k}:{','.join(v)}" for k, v in states.items() if v)
    return " ".join(dims) + (f" {{{text}}}" if text else "")


def agrees(op, shapes, names, sizes, seed):
    """Value and gradients of one random combination that no axis makes a choice."""
    draw = random.Random(seed)
    on = mesh(**sizes)
    cuts = dict(zip(sizes, draw.sample("bhs--", len(sizes)), strict=True))
    made = [values(*shape, seed=i) for i, shape in enumerate(shapes)]
    xs = [
        placed(v, on, drawn(f, v.shape, cuts, draw), seed) for v, f in zip(made, names, strict=True)
    ]
    leaves = [v.requires_grad_() for v in made]
    want = op(*leaves)
    y, grads, _ = pulled(op, xs, values(*want.shape, seed=9))
    close(y, want, str(xs))
    for g, w in zip(
        grads, torch.autograd.grad(want, leaves, values(*want.shape, seed=9)), strict=True
    ):
        close(g, w, str(xs))


MESHES = [{"a": 2, "b": 3}, {"a": 2, "b": 1, "c": 2}]


@pytest.mark.parametrize("sizes", MESHES)
def test_random_layouts_on_more_axes(sizes):
    for seed in range(25):
        agrees(attend(), [(12, 12, 12, 4)] * 3, ["bhsd", "bhtd", "bhte"], sizes, seed)
        agrees(
            attend(enable_gqa=True),
            [(12, 24, 12, 4), *[(12, 12, 6, 4)] * 2],
            ["bhsd", "bhtd", "bhte"],
            sizes,
            seed,
        )


def test_cut_batch_heads_and_queries_move_nothing_forward():
    on = mesh(b=2, h=3, s=2)
    q = placed(values(B, H, S, D), on, "_/b _/h _/s _")
    k, v = (placed(values(B, H, S, D, seed=s), on, "_/b _/h _ _") for s in (1, 2))
    y, grads, plan = pulled(attend(), [q, k, v], values(B, H, S, D, seed=3))
    assert y.layout is q.layout
    assert moves(plan, "forward") == []
    keys = B * H * S * D / 6
    assert (
        moves(plan, "backward") == [("all_reduce", "s", keys)] * 2
    )  # gradients of keys and values
    leaves = [values(B, H, S, D, seed=s).requires_grad_() for s in range(3)]
    want = attend()(*leaves)
    close(y, want)
    for g, w in zip(
        grads, torch.autograd.grad(want, leaves, values(B, H, S, D, seed=3)), strict=True
    ):
        close(g, w)


def test_fewer_key_value_heads_share_the_axis_of_the_heads():
    op = attend(enable_gqa=True, is_causal=True)
    shapes = [(6, 12, 6, 6), (6, 6, 6, 6), (6, 6, 6, 6)]
    found = report(op, shapes, samples=60)
    assert not found.wrong, found.wrong[:3]
    on = mesh(a=2)
    q, k, v = (placed(values(*n, seed=i), on, "_ _/a _ _") for i, n in enumerate(shapes))
    y, _, plan = pulled(op, [q, k, v], values(*shapes[0], seed=3))
    assert (y.layout, len(plan.collectives)) == (q.layout, 0)
    close(y, op(*[values(*n, seed=i) for i, n in enumerate(shapes)]))


def test_heads_cut_finer_than_the_key_value_heads_are_a_choice():
    on = mesh(a=4)
    q = sw.shard(values(2, 8, 6, 4), on, "_ _/a _ _")
    k = sw.shard(values(2, 2, 6, 4), on)
    with pytest.raises(sw.LayoutError) as caught:
        F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    assert caught.value.kind == "choice"


MASKS = {
    "bool [s t]": (6, 6),
    "bias [s t]": (6, 6),
    "bias [b 1 s t]": (6, 1, 6, 6),
    "bias [1 h 1 t]": (1, 6, 1, 6),
    "bias [b h s t]": (6, 6, 6, 6),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_broadcast_and_are_cut_with_what_they_mask(name):
    def operands(shapes, rng):
        made = [torch.randn(s, generator=rng, dtype=torch.float64) for s in shapes]
        if "bool" in name:
            made[3] = (made[3] > 0) | torch.eye(6, dtype=torch.bool)
        return made

    shape = MASKS[name]
    found = report(attend(), [(6, 6, 6, 6)] * 3 + [shape], operands=operands, samples=60)
    assert not found.wrong, found.wrong[:3]
    if "bias" in name:
        big = tuple(12 if n > 1 else 1 for n in shape)
        for sizes in MESHES:
            for seed in range(10):
                agrees(
                    attend(),
                    [(12, 12, 12, 4)] * 3 + [big],
                    ["bhsd", "bhtd", "bhte", "bhst"[4 - len(big) :]],
                    sizes,
                    seed,
                )


def test_a_mask_is_sliced_where_the_queries_are_cut():
    q = sw.shard(values(2, 2, 6, 4), mesh(a=3), "_ _ _/a _")
    k = sw.shard(values(2, 2, 6, 4, seed=1), q.mesh)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    y = F.scaled_dot_product_attention(q, k, k, mask)
    assert y.layout is q.layout
    close(
        y,
        F.scaled_dot_product_attention(
            values(2, 2, 6, 4), *[values(2, 2, 6, 4, seed=1)] * 2, is_causal=True
        ),
    )


def test_sizes_and_scale():
    q, k, v = values(2, 2, 6, 4), values(2, 2, 8, 4, seed=1), values(2, 2, 8, 6, seed=2)
    xs = [placed(t, mesh(a=2), "_ _/a _ _") for t in (q, k, v)]
    close(
        F.scaled_dot_product_attention(*xs, scale=0.3),
        F.scaled_dot_product_attention(q, k, v, scale=0.3),
    )
    three = [placed(t[0], mesh(a=2), "_/a _ _") for t in (q, k, v)]
    close(F.scaled_dot_product_attention(*three), F.scaled_dot_product_attention(q[0], k[0], v[0]))


def test_an_unreduced_value_passes_where_nothing_else_has_a_gradient():
    q = sw.shard(values(2, 2, 6, 4), mesh(a=2))
    v = placed(values(2, 2, 6, 4, seed=1), q.mesh, "_ _ _ _ {U:a}")
    y = F.scaled_dot_product_attention(q, q, v)
    assert str(y.layout) == "_ _ _ _ {U:a}"
    close(
        y,
        F.scaled_dot_product_attention(
            values(2, 2, 6, 4), values(2, 2, 6, 4), values(2, 2, 6, 4, seed=1)
        ),
    )


def test_bad_input_says_what_is_wrong():
    q = sw.shard(values(2, 2, 6, 4), mesh(a=2))
    with pytest.raises(ValueError, match=r"dropout_p must be 0 here; use nn\.dropout with a key"):
        F.scaled_dot_product_attention(q, q, q, dropout_p=0.1)
    with pytest.raises(ValueError, match="sizes of q"):
        F.scaled_dot_product_attention(q, q, sw.shard(values(2, 2, 5, 4), q.mesh))
    k = sw.shard(values(2, 3, 6, 4), q.mesh)
    with pytest.raises(ValueError, match="2 heads are no multiple of 3 key-value heads"):
        F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    with pytest.raises(sw.LayoutError) as caught:
        F.scaled_dot_product_attention(*[sw.reshard(q, "_ _ _/a _")] * 3, is_causal=True)
    assert caught.value.kind == "choice"


def test_out_settles_a_choice():
    value = values(2, 2, 6, 4)
    q = sw.shard(value, mesh(a=2), "_ _ _/a _")
    y = sw.ops.scaled_dot_product_attention(q, q, q, is_causal=True, out="b h/a s d")
    assert y.layout is sw.Layout("_ _/a _ _")
    close(y, F.scaled_dot_product_attention(value, value, value, is_causal=True))
