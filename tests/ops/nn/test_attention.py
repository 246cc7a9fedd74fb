"""`nn.attention`: every option against the formula, under every strategy's rows, moving nothing."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check import close, moves, placed, pulled, ran
from gallery import mesh, values

import shardwise as sw
from shardwise import nn
from shardwise.ops.audit import report

# B S H G K: batch, seq, query heads, key-value heads, head_dim
B, S, H, G, K = 4, 6, 8, 4, 4

# layout of q; of k and v, {} is the states; sizes of the mesh
ROWS = {
    "one device": ("b s h d", "b s h d", {"a": 1}),
    "data": ("b/data s h d", "b/data s h d", {"data": 2}),
    "1D": ("b s h/tensor d", "b s h/tensor d", {"tensor": 2}),
    "1D finer than kv heads": ("b s h/tensor d", "b s h d {R:tensor}", {"tensor": 8}),
    "1D whole kv heads": ("b s h/tensor d", "b s h d", {"tensor": 4}),
    "2D": ("b/row s h/col d", "b/row s h/col d", {"row": 2, "col": 2}),
    "2D whole kv heads": ("b/row s h/col d", "b/row s h d {R:col}", {"row": 2, "col": 8}),
    "3D": ("b/i/k s h/j d", "b/i/k s h/j d", {"i": 2, "j": 2, "k": 2}),
    "3D whole kv heads": ("b/i/k s h/j d", "b/i/k s h d {R:j}", {"i": 2, "j": 8, "k": 2}),
    "heads by two axes": ("b s h/x/y d", "b s h d {R:x,y}", {"x": 2, "y": 4}),
    "data, 1D": ("b/data s h/t d", "b/data s h/t d", {"data": 2, "t": 2}),
}


def truth(q, k, v, *, seen=None, added=None, softcap=None, scale=None, of=None):
    """The formula, step by step on plain tensors; `of` names each query head's kv head."""
    of = torch.arange(q.shape[2]) // (q.shape[2] // k.shape[2]) if of is None else of
    k, v = k[:, :, of], v[:, :, of]
    scores = torch.einsum("bshd,bthd->bhst", q, k)
    scores = scores * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if added is not None:
        scores = scores + added
    if seen is not None:
        seen = seen.expand(scores.shape)
        empty = ~seen.any(-1, keepdim=True)
        scores = scores.masked_fill(~seen & ~empty, -math.inf)
        weights = scores.softmax(-1).masked_fill(empty, 0)
    else:
        weights = scores.softmax(-1)
    return torch.einsum("bhst,bthe->bshe", weights, v)


LOWER = torch.ones(S, S, dtype=torch.bool).tril()
PACKED = torch.tensor(
    [[0, 1, 2, 0, 1, 2], [5, 4, 3, 2, 1, 0], [0, 0, 1, 1, 2, 2], [3, 1, 4, 1, 5, 9]]
)
BAND = LOWER & ~LOWER.tril(-2)
ODD = values(B, 1, S, S, seed=7) > 0  # some rows may see nothing
BIAS = values(H, S, S, seed=8)
ALIBI = nn.alibi(H, torch.arange(S), torch.arange(S), dtype=torch.float64)
SEEN = (PACKED[:, :, None] >= PACKED[:, None])[:, None]

# options of attention; the same as a boolean mask and an added one
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "scale": ({"scale": 0.3}, {"scale": 0.3}),
    "causal": ({"causal": True}, {"seen": LOWER}),
    "positions [seq]": (
        {"causal": True, "positions": PACKED[3]},
        {"seen": PACKED[3][:, None] >= PACKED[3]},
    ),
    "positions [batch seq]": ({"causal": True, "positions": PACKED}, {"seen": SEEN}),
    "kv_positions": (
        {"causal": True, "kv_positions": torch.arange(S) + 2},  # the first two rows see nothing
        {"seen": LOWER.tril(-2)},
    ),
    "window": ({"window": 2}, {"seen": BAND}),
    "window, causal": ({"window": 2, "causal": True}, {"seen": BAND}),
    "window, positions": (
        {"window": 2, "positions": PACKED},
        {"seen": SEEN & (PACKED[:, :, None] - PACKED[:, None] < 2)[:, None]},
    ),
    "mask": ({"mask": ODD}, {"seen": ODD}),
    "added mask": ({"mask": BIAS, "causal": True}, {"seen": LOWER, "added": BIAS}),
    "mask, causal": ({"mask": ODD, "causal": True}, {"seen": ODD & LOWER}),
    "bias": ({"bias": BIAS, "mask": ODD}, {"added": BIAS, "seen": ODD}),
    "bias of one head": ({"bias": BIAS[:1]}, {"added": BIAS[:1]}),
    "alibi": (
        {
            "bias": nn.alibi(H, torch.arange(S), torch.arange(S), dtype=torch.float64),
            "causal": True,
        },
        {
            "added": -(2.0 ** -torch.arange(1.0, H + 1).double())[:, None, None]
            * (torch.arange(S)[:, None] - torch.arange(S)),
            "seen": LOWER,
        },
    ),
    "softcap": ({"softcap": 1.5, "scale": 0.7}, {"softcap": 1.5, "scale": 0.7}),
    "softcap, all": (
        {"softcap": 1.5, "causal": True, "window": 3, "mask": ODD, "bias": BIAS},
        {"softcap": 1.5, "seen": ODD & LOWER & ~LOWER.tril(-3), "added": BIAS},
    ),
}


def compare(options: Any, formula: Any, row: Any, kv: int = G, heads: int = H) -> sw.Plan:
    """Value, gradients and the record of a row against the formula."""
    like, like_kv, sizes = row
    on = mesh(**sizes)
    made = [values(B, S, heads, K), values(B, S, kv, K, seed=1), values(B, S, kv, 6, seed=2)]
    xs = [placed(v, on, to) for v, to in zip(made, (like, like_kv, like_kv), strict=True)]
    cotangent = values(B, S, heads, 6, seed=3)
    y, grads, plan = pulled(lambda q, k, v: nn.attention(q, k, v, **options), xs, cotangent)
    leaves = [v.requires_grad_() for v in made]
    want = truth(*leaves, **formula)
    close(y, want)
    for g, w in zip(grads, torch.autograd.grad(want, leaves, cotangent), strict=True):
        close(g, w)
    assert y.layout.dims == xs[0].layout.dims
    assert moves(plan, "forward") == []
    return plan


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("row", ["1D", "1D finer than kv heads", "3D", "2D whole kv heads"])
def test_options_equal_the_formula(name, row):
    plan = compare(*OPTIONS[name], ROWS[row])
    assert moves(plan, "backward") == []  # {R} leaves the sum to whoever made k and v


@pytest.mark.parametrize("row", ROWS)
def test_rows_of_every_strategy(row):
    for name in ("causal", "positions [batch seq]", "softcap, all"):
        compare(*OPTIONS[name], ROWS[row])


@pytest.mark.parametrize("kv", [1, 2, 4, 8])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_whole_kv_heads_reduce_their_gradients_once(kv, n):
    """k and v whole: free in state R, and an all_reduce or all_gather of the gradient without."""
    row = ("b s h/t d", "b s h d {R:t}", {"t": n})
    for name in ("causal", "softcap"):
        plan = compare(*OPTIONS[name], row, kv=kv)
        assert not plan.collectives
        plan = compare(*OPTIONS[name], ("b s h/t d", "b s h d", {"t": n}), kv=kv)
        sliced = kv % n == 0  # each device keeps its own heads
        kind, passes = ("all_gather", 1) if sliced else ("all_reduce", 2)
        elements = [passes * (n - 1) / n * B * S * kv * width for width in (K, 6)]
        assert sorted(moves(plan, "backward")) == [(kind, "t", e) for e in elements]


@pytest.mark.parametrize("n", [2, 3, 4, 6, 12])
def test_padded_heads_read_the_kv_head_of_their_true_group(n):
    of = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2])
    row = ("b s h/t d", "b s h d {R:t}", {"t": n})
    for options, formula in (OPTIONS["causal"], OPTIONS["softcap"]):
        plan = compare({**options, "group": 3}, {**formula, "of": of}, row, kv=3, heads=12)
        assert not plan.collectives
    ten = ("b s h/t d", "b s h d", {"t": 5})
    compare({"group": 3}, {"of": of[:10]}, ten, kv=3, heads=10)
    compare({"group": 4}, {}, ROWS["1D whole kv heads"], kv=2)


def test_cut_positions_masks_and_biases_equal_whole_ones():
    on = mesh(i=2, j=2, k=2)
    places = sw.shard(PACKED, on, "b/i/k s")
    cut = {
        "positions": places,
        "bias": sw.shard(BIAS, on, "h/j s t"),
        "mask": sw.shard(ODD, on, "b/i/k 1 s t"),
    }
    for softcap in (None, 1.5):
        compare_on(on, {**cut, "causal": True, "softcap": softcap})


def compare_on(on, options):
    made = [values(B, S, n, K, seed=n) for n in (H, G, G)]
    xs = [placed(v, on, "b/i/k s h/j d") for v in made]
    y, plan = ran(lambda: nn.attention(*xs, **options))
    assert not plan.collectives
    softcap = options["softcap"]
    close(y, truth(*made, seen=SEEN & ODD, added=BIAS, softcap=softcap))


def test_a_bias_that_is_learned_gets_its_gradient():
    on = mesh(data=2, tensor=2)
    made = [*(values(B, S, n, K, seed=n) for n in (H, G, G)), BIAS.clone()]
    layouts = ["b/data s h/tensor d"] * 3 + ["h/tensor s t"]
    for softcap in (None, 1.5):
        xs = [placed(v.detach(), on, to) for v, to in zip(made, layouts, strict=True)]
        y, grads, plan = pulled(
            lambda q, k, v, b, cap=softcap: nn.attention(q, k, v, bias=b, causal=True, softcap=cap),
            xs,
            values(B, S, H, K, seed=3),
        )
        leaves = [v.detach().requires_grad_() for v in made]
        want = truth(*leaves[:3], added=leaves[3], seen=LOWER, softcap=softcap)
        close(y, want)
        wants = torch.autograd.grad(want, leaves, values(B, S, H, K, seed=3))
        for g, w in zip(grads, wants, strict=True):
            close(g, w)
        assert moves(plan, "backward") == [("all_reduce", "data", H * S * S / 2)]


def test_queries_may_be_cut_where_positions_say_what_they_see():
    """The keys are whole: each device's queries compare their own positions."""
    on = mesh(a=3)
    made = [values(B, S, n, K, seed=n) for n in (H, G, G)]
    q = sw.shard(made[0], on, "b s/a h d")
    k, v = (sw.shard(x, on) for x in made[1:])
    for softcap in (None, 1.5):
        y, plan = ran(
            lambda cap=softcap: nn.attention(
                q, k, v, causal=True, positions=torch.arange(S), softcap=cap
            )
        )
        assert not plan.collectives
        assert y.layout is q.layout
        close(y, truth(*made, seen=LOWER, softcap=softcap))


def test_one_query_after_many_keys():
    q, k = values(2, 1, 4, 4), values(2, 6, 2, 4, seed=1)
    on = mesh(t=2)
    xs = [sw.shard(x, on, "b s h/t d") for x in (q, k, k)]
    y = nn.attention(*xs, causal=True, positions=torch.tensor([3]))
    close(y, truth(q, k, k, seen=torch.arange(6) <= 3))


def test_causal_alone_stays_torch_s_fused_kernel():
    made = [values(B, S, n, K, seed=n) for n in (H, G, G)]
    on = mesh(a=1)
    _, plan = ran(lambda: nn.attention(*[sw.shard(v, on) for v in made], causal=True))
    assert [o.name for o in plan.ops if o.flops] == ["attention"]
    assert "where" not in {o.name for o in plan.ops}


def test_no_boolean_mask_reaches_the_kernel():
    """Kernels disagree about rows without keys under a boolean mask; under -inf all give zeros."""
    made = [values(B, S, n, K, seed=n).bfloat16() for n in (H, G, G)]
    on = mesh(data=2)
    xs = [sw.shard(v, on, "b/data s h d") for v in made]
    for options in ({"mask": ODD}, {"kv_positions": torch.arange(S) + 2, "causal": True}):
        y, plan = ran(lambda o=options: nn.attention(*xs, **o))
        (kernel,) = [o for o in plan.ops if o.name == "attention"]
        assert [x.split("[")[0] for x in kernel.inputs] == ["bf16"] * 4
    assert not y.full_tensor()[:, :2].any()


def grouped(q, k, v):
    """Torch's own on [batch seq heads head_dim], 12 padded heads in groups of 4 on 2 kv heads."""
    of = (torch.arange(q.shape[2]) // 4).clamp(max=k.shape[2] - 1)
    args = (x.transpose(1, 2) for x in (q, k[:, :, of], v[:, :, of]))
    return F.scaled_dot_product_attention(*args, is_causal=True).transpose(1, 2)


def dim_cut(layout: str) -> int | None:
    return next((d for d, text in enumerate(layout.split()) if "/" in text), None)


@pytest.mark.parametrize("group", [None, 4])
def test_every_layout_of_one_axis(group):
    """Batch and heads of q run beside whole kv heads; what needs a dim whole is a choice."""

    def op(q, k):
        return nn.attention(q, k, k, causal=True, group=group)

    def plain(q, k):
        return grouped(q, k, k) if group else truth(q, k, k, seen=LOWER)

    found = report(op, [(6, 6, 12, 6), (6, 6, 2, 6)], reference=plain)
    assert not found.wrong, found.wrong[:3]
    batch, heads = 0, 2
    for _, q, k in found.choice:
        cut = (dim_cut(q), dim_cut(k))
        uneven = group and cut == (heads, heads)  # groups do not end where blocks do
        assert set(cut) - {batch, heads, None} or set(cut) == {batch, heads} or uneven, (q, k)
    for _, q, k in found.right:
        cut = (dim_cut(q), dim_cut(k))
        assert set(cut) <= {batch, heads, None}, (q, k)
        assert group or set(cut) != {batch, heads}, (q, k)  # uneven groups look k up: a sum


def drawn(draw, axes, dims):
    """A layout of [batch seq heads head_dim] with these axes on batch or heads, else any state."""
    texts, states = ["b", "s", "h", "d"], {"R": [], "U": []}
    for axis in axes:
        if axis in dims and draw.random() < 0.8:
            texts[dims[axis]] += f"/{axis}"
        elif (state := draw.choice("IRU")) != "I":
            states[state].append(axis)
    owed = " ".join(f"{k}:{','.join(v)}" for k, v in states.items() if v)
    return " ".join(texts) + (f" {{{owed}}}" if owed else "")


@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize("sizes", [{"a": 2, "b": 3}, {"a": 2, "b": 1, "c": 2}])
def test_random_layouts_on_more_axes(sizes, group):
    """Axes on q's batch and heads, on k's and v's batch only; unreduced and reduced in between."""
    on = mesh(**sizes)
    for seed in range(12):
        draw = random.Random(seed)
        # one axis on the batch: the order of several must agree between operands
        order = draw.sample(list(on.axes), len(on.axes))
        dims = {a: 2 if n else 0 for n, a in enumerate(order) if draw.random() < 0.8}
        rows = {a: d for a, d in dims.items() if d == 0}
        made = [values(12, S, 12, K), *(values(12, S, 2, K, seed=n) for n in (1, 2))]
        layouts = [drawn(draw, on.axes, at) for at in (dims, rows, rows)]
        xs = [placed(v, on, to, seed) for v, to in zip(made, layouts, strict=True)]
        cotangent = values(12, S, 12, K, seed=3)
        y, grads, _ = pulled(
            lambda q, k, v: nn.attention(q, k, v, causal=True, group=group), xs, cotangent
        )
        leaves = [v.requires_grad_() for v in made]
        want = grouped(*leaves) if group else truth(*leaves, seen=LOWER)
        close(y, want, str(layouts))
        for g, w in zip(grads, torch.autograd.grad(want, leaves, cotangent), strict=True):
            close(g, w, str(layouts))


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12, 14, 20])
def test_slopes_are_bloom_s(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    want = build_alibi_tensor(torch.ones(1, S), heads, torch.float32)  # up to a constant of the row
    ours = nn.alibi(heads, torch.zeros(1, dtype=torch.int64), torch.arange(S))
    torch.testing.assert_close(ours, want)
    on = mesh(data=2)
    at = sw.shard(PACKED, on, "b/data s")
    both = nn.alibi(heads, at, at)
    assert both.shape == (B, heads, S, S)
    assert str(both.layout) == "_/data _ _ _"
    torch.testing.assert_close(both.full_tensor(), nn.alibi(heads, PACKED, PACKED))


BAD = {
    "window must be at least 1, got 0": {"window": 0},
    "softcap must be positive, got 0": {"softcap": 0},
    "group must be at least 1": {"group": 0},
    "unknown method 'no'": {"method": "no"},
    r"positions \(5,\) must be \[6\]": {"causal": True, "positions": torch.arange(5)},
    "at most 4 dims, got 5": {"bias": torch.zeros(1, 1, 1, 1, 1)},
}


@pytest.mark.parametrize("words", BAD)
def test_bad_options_say_what_is_wrong(words):
    q = sw.shard(values(2, S, 4, 4), mesh(a=2))
    with pytest.raises(ValueError, match=words):
        nn.attention(q, q, q, **BAD[words])


def test_bad_shapes_say_what_is_wrong():
    on = mesh(a=2)
    q, k = sw.shard(values(2, S, 8, 4), on), sw.shard(values(2, S, 3, 4), on)
    with pytest.raises(ValueError, match=r"3 kv heads do not divide 8 heads.*give the true group="):
        nn.attention(q, k, k)
    with pytest.raises(ValueError, match="k and v alike"):
        nn.attention(q, k, q)
    with pytest.raises(ValueError, match="heads must be at least 1"):
        nn.alibi(0, torch.arange(2), torch.arange(2))


@pytest.mark.parametrize("seen", [{"causal": True}, {"mask": ODD}])
def test_second_derivatives_and_forward_mode(seen):
    made = values(B, S, H, K)
    lower = LOWER if "causal" in seen else ODD
    on = mesh(a=2)
    q = sw.shard(made, on, "b s h/a d")

    def loss(q):
        return (nn.attention(q, q, q, **seen) ** 2).sum()

    def plain(q):
        return (truth(q, q, q, seen=lower) ** 2).sum()

    def twice(f, grad):
        return lambda q: (grad(f)(q) ** 2).sum()

    def along(q):
        return nn.attention(q, q, q, **seen)

    _, tangent = sw.jvp(along, [q], [q])
    close(tangent, torch.func.jvp(lambda q: truth(q, q, q, seen=lower), (made,), (made,))[1])
    leaf = made.clone().requires_grad_()
    close(sw.hvp(loss, q, q), torch.autograd.functional.hvp(plain, made, made)[1])

    def grad(f):
        return lambda q: torch.autograd.grad(f(q), q, create_graph=True)[0]

    want = grad(twice(plain, grad))(leaf)
    close(sw.grad(twice(loss, sw.grad))(q), want)
    close(sw.grad(twice(sw.remat(loss), sw.grad))(q), want)


def test_a_cut_sequence_is_a_choice_in_the_callers_words():
    q = sw.shard(values(2, 8, 4, 4), mesh(t=4), "b s/t h e")
    with pytest.raises(sw.LayoutError) as caught:
        nn.attention(q, q, q, causal=True)
    assert str(caught.value).startswith("attention at test_attention.py:")
    assert "f64[2 8/t 4 4]" in str(caught.value)
    first = caught.value.fixes[0].code
    assert 'sw.reshard(q, "_ _ _/t _")' in first
    names = {"sw": sw, "nn": nn, "q": q}
    y = eval(first, names)
    close(y, nn.attention(*[sw.reshard(q, "b s h/t e")] * 3, causal=True).full_tensor())


def test_what_is_no_sharded_tensor_or_does_not_broadcast():
    q = sw.shard(values(2, S, 4, 4), mesh(a=2))
    with pytest.raises(TypeError, match=r"attention: k must be a ShardedTensor.*sw\.shard"):
        nn.attention(q, values(2, S, 4, 4), q)
    with pytest.raises(ValueError, match=r"attention: bias \[3, 3\] does not broadcast"):
        nn.attention(q, q, q, bias=torch.zeros(3, 3))
