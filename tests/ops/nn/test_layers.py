"""Norms, lookups, patches, dropout under every strategy's rows: values, gradients, what moves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from check import close, moves, placed, pulled, ran
from gallery import mesh, rng, values

import shardwise as sw
from shardwise import nn
from shardwise.ops.audit import report

# B S D V: batch, seq, embed, vocab
B, S, D, V = 8, 4, 12, 24
M = B * S

# layouts of x and of a scale; the axis that cuts the features; the sizes
NORMS = {
    "data": ("b/data s d", "d {R:data}", "", {"data": 4}),
    "1D": ("b s d", "d", "", {"t": 2}),
    "SP": ("b s/t d", "d {R:t}", "", {"t": 2}),
    "data, SP": ("b/data s/t d", "d {R:data,t}", "", {"data": 2, "t": 2}),
    "2D": ("b/row s d/col", "d/col {R:row}", "col", {"row": 2, "col": 2}),
    "2D of 3": ("b/row s d/col", "d/col {R:row}", "col", {"row": 2, "col": 3}),
    "3D": ("b/i/j s d/k", "d/k {R:i,j}", "k", {"i": 2, "j": 2, "k": 2}),
}


def norm(kind):
    return getattr(nn, kind)


def plain_norm(kind):
    function = F.rms_norm if kind == "rms_norm" else F.layer_norm
    eps = 1e-6 if kind == "rms_norm" else 1e-5
    return lambda x, *rest: function(x, (D,), *rest, eps=eps)


def operands(kind):
    made = [values(B, S, D) * 2 + 3, values(D, seed=1)]
    return made if kind == "rms_norm" else [*made, values(D, seed=2)]


@pytest.mark.parametrize("row", NORMS)
@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_norms_move_statistics_over_the_features_axis_only(kind, row):
    like, like_scale, axis, sizes = NORMS[row]
    on = mesh(**sizes)
    made = operands(kind)
    xs = [placed(v, on, to) for v, to in zip(made, (like, like_scale, like_scale), strict=False)]
    y, grads, plan = pulled(norm(kind), xs, values(B, S, D, seed=3))
    leaves = [v.requires_grad_() for v in made]
    want = plain_norm(kind)(*leaves)
    close(y, want)
    wants = torch.autograd.grad(want, leaves, values(B, S, D, seed=3))
    for g, w, x in zip(grads, wants, xs, strict=True):
        close(g, w)
        assert g.layout is x.layout.dual
    assert y.layout is xs[0].layout
    statistics = {"rms_norm": 1, "layer_norm": 2}[kind] if axis else 0
    rows = M // (on.size // sizes.get(axis, 1))  # [batch seq] of a device, M / q in 2D
    ring = 2 * (sizes.get(axis, 1) - 1) / sizes.get(axis, 1)
    assert moves(plan, "forward") == [("all_reduce", axis, ring * rows)] * statistics
    assert moves(plan, "backward") == moves(plan, "forward")


@pytest.mark.parametrize("row", ["data", "SP", "2D", "3D"])
def test_gradients_of_a_scale_are_summed_over_the_axes_of_the_rows_only(row):
    like, like_scale, axis, sizes = NORMS[row]
    on = mesh(**sizes)
    rest = like_scale.split(" {")[0]
    x, scale = placed(values(B, S, D), on, like), placed(values(D, seed=1), on, rest)
    _, (grad,), plan = pulled(lambda w: nn.rms_norm(x, w), [scale], values(B, S, D, seed=3))
    leaf = values(D, seed=1).requires_grad_()
    want = plain_norm("rms_norm")(values(B, S, D), leaf)
    close(grad, torch.autograd.grad(want, leaf, values(B, S, D, seed=3))[0])
    summed = [c for c in plan.collectives if c.phase == "backward"]
    over = {a for c in summed for a in c.axes}
    assert over == {a for a in on.axes if a != axis and a in like}
    widths = D // sizes.get(axis, 1)
    assert all(c.kind == "all_reduce" and c.elements <= 2 * widths for c in summed)


def test_large_means_lose_no_digits_where_the_features_are_cut():
    x = values(B, S, D) + 1e6
    for kind in ("rms_norm", "layer_norm"):
        y = norm(kind)(sw.shard(x, mesh(t=3), "b s d/t"))
        torch.testing.assert_close(y.full_tensor(), plain_norm(kind)(x), rtol=1e-9, atol=1e-9)


# layouts of ids, table and result
LOOKUPS = {
    "data": ("b/data s", "v d {R:data}", "b/data s d", {"data": 2}),
    "1D": ("b s", "v/t d", "b s d", {"t": 2}),
    "SP": ("b s", "v/t d", "b s/t d", {"t": 2}),
    "SP, cut ids": ("b s/t", "v/t d", "b s/t d", {"t": 2}),
    "2D": ("b/row s", "v/col d {R:row}", "b/row s d/col", {"row": 2, "col": 2}),
    "3D": ("b/i/j s", "v/j d/k {R:i}", "b/i/j s d/k", {"i": 2, "j": 2, "k": 2}),
}


@pytest.mark.parametrize("row", LOOKUPS)
def test_embedding_of_a_cut_vocabulary(row):
    like, like_table, out, sizes = LOOKUPS[row]
    on = mesh(**sizes)
    ids = torch.randint(V, (B, S), generator=rng(5))
    table = values(V, D)
    at = placed(ids, on, like)
    y, (grad,), plan = pulled(
        lambda t: nn.embedding(at, t, out=out), [placed(table, on, like_table)], values(B, S, D)
    )
    leaf = table.clone().requires_grad_()
    want = F.embedding(ids, leaf)
    close(y, want)
    close(grad, torch.autograd.grad(want, leaf, values(B, S, D))[0])
    assert y.layout is sw.Layout(out, 3)
    largest = max((c.elements for c in plan.collectives), default=0)
    assert largest <= 2 * B * S * D / 2  # never the table [V, D] or its gradient on all devices
    kinds = {c.kind for c in plan.collectives if c.phase == "forward"} - {"all_gather"}
    scattered = row in ("SP", "SP, cut ids", "2D", "3D")
    assert kinds == ({"reduce_scatter"} if scattered else {"all_reduce"} if row == "1D" else set())


# C P: channels, patch
C, P = 3, 2

# layouts of images, weight [pixel embed], bias, result
PATCHES = {
    "data": ("b/data c h w", "p d {R:data}", "d {R:data}", "b/data n d", {"data": 2}),
    "1D, whole": ("b c h w", "p d", "d", "b n d", {"t": 2}),
    "1D, cut": ("b c h w {R:t}", "p d/t", "d/t", "b n d/t", {"t": 2}),
    "SP": ("b c h w", "p d {R:t}", "d {R:t}", "b n/t d", {"t": 3}),
    "2D": ("b/row c h w", "p/row d/col", "d/col", "b/row n d/col", {"row": 2, "col": 2}),
    "2D, at use": (
        "b/row c h w",
        "p d/col {R:row}",
        "d/col {R:row}",
        "b/row n d/col",
        {"row": 2, "col": 2},
    ),
    "3D": ("b/i/j c h w", "p d/k {R:i,j}", "d/k", "b/i/j n d/k", {"i": 2, "j": 2, "k": 2}),
    "owed": ("b c h w", "p/t d", "d", "b n d", {"t": 2}),
}


@pytest.mark.parametrize("row", PATCHES)
def test_patches_are_a_convolution_whose_stride_is_its_kernel(row):
    *layouts, out, sizes = PATCHES[row]
    on = mesh(**sizes)
    images, kernel, bias = values(B, C, 4, 6), values(D, C, P, P, seed=1), values(D, seed=2)
    leaves = [v.requires_grad_() for v in (images, kernel, bias)]
    want = F.conv2d(*leaves, stride=P).flatten(2).transpose(1, 2)
    wants = torch.autograd.grad(want, leaves, values(B, 6, D, seed=3))
    wants = [wants[0], wants[1].flatten(1).T, wants[2]]
    made = [images.detach(), kernel.detach().flatten(1).T, bias.detach()]
    xs = [placed(v, on, to) for v, to in zip(made, layouts, strict=True)]
    y, grads, plan = pulled(
        lambda x, w, b: nn.patch_embedding(x, w, b, patch=P, out=out), xs, values(B, 6, D, seed=3)
    )
    close(y, want)
    for g, w in zip(grads, wants, strict=True):
        close(g, w)
    assert y.layout is sw.Layout(out, 3)
    if row not in ("2D", "owed"):
        assert not moves(plan, "forward")


def test_patch_weights_may_keep_the_dims_of_the_kernel():
    images, kernel = values(B, C, 4, 6), values(D, C, P, P, seed=1)
    on = mesh(data=2, t=2)
    x = sw.shard(images, on, "b/data c h w")
    w = sw.shard(kernel.permute(1, 2, 3, 0), on, "c p q d/t")
    y = nn.patch_embedding(x, w, patch=P)
    close(y, F.conv2d(images, kernel, stride=P).flatten(2).transpose(1, 2))
    assert str(y.layout) == "_/data _ _/t"
    with pytest.raises(ValueError, match="patches of 3 do not divide 4 x 6"):
        nn.patch_embedding(x, w, patch=3)
    with pytest.raises(ValueError, match="does not take 3 channels of 1 x 1 pixels"):
        nn.patch_embedding(x, w, patch=1)


def test_dropout_is_the_same_in_every_layout():
    """One mask, whatever the mesh and the layout; owed sums stay owed, gradients share it."""
    key = sw.random.key(3)
    once = nn.dropout(sw.shard(torch.ones(6, 12, dtype=torch.float64), mesh(a=1)), 0.4, key)
    kept = once.full_tensor()
    assert set(kept.unique().tolist()) == {0.0, 1 / 0.6}
    for axes in (1, 2):
        found = report(
            lambda x: nn.dropout(x, 0.4, key), [(6, 12)], reference=lambda x: x * kept, axes=axes
        )
        assert not found.wrong, found.wrong[:3]
        assert not found.choice
        assert all(layouts[1] == out for layouts, out in found.right.items())


@pytest.mark.parametrize("like", ["b/data s d", "b s d {R:data}", "b s d {U:data}", "b s/data d"])
def test_dropout_moves_nothing(like):
    x = placed(values(B, S, D), mesh(data=2), like)
    _, _, plan = pulled(lambda x: nn.dropout(x, 0.5, sw.random.key(0)), [x], values(B, S, D))
    assert not plan.collectives


def test_dropout_that_is_off_gives_its_operand_back():
    x = sw.shard(values(4), mesh(a=2), "n/a")
    assert nn.dropout(x, 0.0, sw.random.key(0)) is nn.dropout(x, 0.5, None) is x
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\), got 1"):
        nn.dropout(x, 1.0, sw.random.key(0))
    first, second = (ran(lambda n=n: nn.dropout(x, 0.5, sw.random.key(n)))[0] for n in (0, 5))
    assert not torch.equal(first.full_tensor(), second.full_tensor())
