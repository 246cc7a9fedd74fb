"""Losses: audited in every layout; GLOBAL counts; what cross-entropy of cut classes moves."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from check import close, moves, placed, pulled, ran
from gallery import mesh, rng, values

import shardwise as sw
from shardwise.ops.audit import report

C = 12


def classes(*shape, seed=5, ignore=True):
    made = torch.randint(C, shape, generator=rng(seed))
    if ignore:
        made.view(-1)[::3] = -100
    return made


def labelled(shapes, generator):
    """Logits, class numbers of which some do not count, and weights."""
    made = [torch.randn(shapes[0], generator=generator, dtype=torch.float64), classes(*shapes[1])]
    return made + [
        torch.rand(s, generator=generator, dtype=torch.float64) + 0.5 for s in shapes[2:]
    ]


def shares(shapes, generator):
    return [torch.rand(s, generator=generator, dtype=torch.float64) * 0.8 + 0.1 for s in shapes]


def signs(shapes, generator):
    *first, last = shapes
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in first]
    return [*made, torch.randint(2, last, generator=generator) * 2 - 1]


# Elementwise: op, shapes, operands, those without gradient, choices on one axis of size 2.
PAIR, ROW = [(6, 12)] * 2, [(6,)] * 3
ELEMENTWISE = {
    "mse": (F.mse_loss, PAIR, shares, (), 2),
    "mse sum": (lambda x, y: F.mse_loss(x, y, reduction="sum"), PAIR, shares, (), 2),
    "mse none": (lambda x, y: F.mse_loss(x, y, reduction="none"), PAIR, shares, (), 2),
    "mse weighted": (lambda x, y, w: F.mse_loss(x, y, weight=w), ROW, shares, (), 0),
    "l1": (F.l1_loss, PAIR, shares, (), 2),
    "smooth l1": (lambda x, y: F.smooth_l1_loss(x, y, beta=0.3), PAIR, shares, (), 2),
    "huber": (lambda x, y: F.huber_loss(x, y, delta=0.3), PAIR, shares, (), 2),
    "huber weighted": (lambda x, y, w: F.huber_loss(x, y, weight=w), ROW, shares, (), 0),
    "bce": (F.binary_cross_entropy, PAIR, shares, (), 2),
    "bce weighted": (lambda x, y, w: F.binary_cross_entropy(x, y, w), ROW, shares, (1, 2), 0),
    "bce logits": (F.binary_cross_entropy_with_logits, PAIR, shares, (), 2),
    "bce logits weighted": (
        lambda x, y, w: F.binary_cross_entropy_with_logits(x, y, w, pos_weight=w),
        ROW, shares, (1, 2), 0,
    ),
    "kl": (lambda x, y: F.kl_div(x, y, reduction="batchmean"), PAIR, shares, (), 2),
    "kl of logs": (partial(F.kl_div, reduction="sum", log_target=True), PAIR, shares, (), 2),
    "poisson": (lambda x, y: F.poisson_nll_loss(x, y, full=True), PAIR, shares, (1,), 2),
    "gaussian": (partial(F.gaussian_nll_loss, full=True), [PAIR[0]] * 3, shares, (), None),
    "gaussian rows": (F.gaussian_nll_loss, [*PAIR, (6,)], shares, (), None),
    "gaussian clamped": (partial(F.gaussian_nll_loss, eps=0.5), ROW, shares, (), 0),
    "gaussian number": (lambda x, y: F.gaussian_nll_loss(x, y, 0.7), PAIR, shares, (), 2),
    "soft margin": (F.soft_margin_loss, PAIR, signs, (1,), 2),
    "hinge": (lambda x, y: F.hinge_embedding_loss(x, y, 0.5), PAIR, signs, (1,), 2),
    "margin ranking": (lambda x, y, t: F.margin_ranking_loss(x, y, t, 0.1), ROW, signs, (2,), 0),
    "cosine": (partial(F.cosine_embedding_loss, margin=0.1), [*PAIR, (6,)], signs, (2,), None),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_losses_in_any_layout(name):
    op, shapes, operands, no_grad, choices = ELEMENTWISE[name]
    found = report(op, shapes, operands=operands, no_grad=no_grad)
    assert not found.wrong, found.wrong[:3]
    if choices is not None:
        assert len(found.choice) == 2 * choices  # operands cut on two dims, on two meshes
    for axes in (2, 3):
        found = report(op, shapes, operands=operands, no_grad=no_grad, axes=axes, samples=15)
        assert not found.wrong, found.wrong[:3]


def test_weighted_l1_under_our_own_name():
    """`F.l1_loss` of torch 2.13 drops `weight` before any class of tensors sees it."""
    found = report(
        lambda x, y, w: sw.ops.l1_loss(x, y, weight=w),
        ROW,
        reference=lambda x, y, w: F.l1_loss(x, y, weight=w),
        operands=shares,
    )
    assert not found.wrong, found.wrong[:3]
    assert not found.choice


CROSS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1},
    "ignoring class 3": {"ignore_index": 3},
}


@pytest.mark.parametrize("name", CROSS)
def test_cross_entropy_in_any_layout(name):
    def operands(shapes, generator):
        made = labelled(shapes, generator)
        return [made[0], made[1].clamp(0)] if "ignoring" in name else made

    op = lambda x, t: F.cross_entropy(x, t, **CROSS[name])  # noqa: E731
    found = report(op, [(6, C), (6,)], operands=operands)
    assert not found.wrong, found.wrong[:3]
    assert found.choice == [(f"mesh(a={n})", "_ _/a", "_/a") for n in (2, 3)]
    for axes in (2, 3):
        found = report(op, [(6, C, 6), (6, 6)], operands=operands, axes=axes, samples=25)
        assert not found.wrong, found.wrong[:3]
        assert found.right


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weighted_cross_entropy_in_any_layout(reduction, smoothing):
    op = lambda x, t, w: F.cross_entropy(x, t, w, reduction=reduction, label_smoothing=smoothing)  # noqa: E731
    for axes, samples in ((1, None), (2, 25), (3, 15)):
        found = report(
            op, [(6, C), (6,), (C,)], operands=labelled, no_grad=(2,), axes=axes, samples=samples
        )
        assert not found.wrong, found.wrong[:3]
        if axes == 1:  # weights cut where the logits are not, and labels cut where the classes are
            assert len(found.choice) == 2 * (4 * 2 + 4)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_with_probabilities_in_any_layout(smoothing, weighted):
    op = lambda x, t, *w: F.cross_entropy(x, t, *w, label_smoothing=smoothing)  # noqa: E731
    shapes = [(6, C), (6, C), *([(C,)] if weighted else [])]
    for axes, samples in ((1, None), (2, 25)):
        found = report(op, shapes, operands=shares, no_grad=(2,), axes=axes, samples=samples)
        assert not found.wrong, found.wrong[:3]
        if axes == 1 and not weighted:  # only the target is cut over classes, or both on two dims
            assert len(found.choice) == 2 * 5


@pytest.mark.parametrize("shapes", [[(6, C), (6,), (C,)], [(6, C, 6), (6, 6)], [(C,), ()]])
def test_nll_in_any_layout(shapes):
    def operands(shapes, generator):
        made = labelled(shapes, generator)
        return made if shapes[1] else [made[0], torch.tensor(4)]

    for op in (F.nll_loss, lambda *a: F.nll_loss(*a, reduction="none")):
        found = report(op, shapes, operands=operands, no_grad=(2,))
        assert not found.wrong, found.wrong[:3]
        assert not [
            c for c in found.choice if c[1].startswith("_/a") and "/a" not in "".join(c[2:])
        ]
        found = report(op, shapes, operands=operands, no_grad=(2,), axes=2, samples=20)
        assert not found.wrong, found.wrong[:3]


def test_one_row_of_classes():
    x = placed(values(C), mesh(a=2), "_/a")
    y, (g,), _ = pulled(
        lambda x: F.cross_entropy(x, torch.tensor(7)), [x], torch.ones((), dtype=torch.float64)
    )
    leaf = values(C).requires_grad_()
    want = F.cross_entropy(leaf, torch.tensor(7))
    close(y, want)
    close(g, torch.autograd.grad(want, leaf)[0])


@pytest.mark.parametrize("n", [2, 3])
def test_cut_classes_exchange_statistics_only_and_never_logits(n):
    x = placed(values(6, C), mesh(a=n), "_ _/a")
    t = sw.shard(classes(6), x.mesh)
    with sw.record() as plan:
        y, pull = sw.vjp(lambda x: F.cross_entropy(x, t), x)
        (g,) = pull(sw.full((), 1.0, x.mesh, "", dtype=torch.float64))
    assert y.layout is sw.Layout("")
    assert moves(plan, "forward") == [("all_reduce", "a", 2 * (n - 1) / n * 6)] * 3
    assert [c.reduce for c in plan.collectives] == ["max", "sum", "sum"]
    assert moves(plan, "backward") == []
    assert g.layout is x.layout


def test_a_cut_batch_reduces_only_the_count():
    x, t = placed(values(6, C), mesh(a=2), "_/a _"), sw.shard(classes(6), mesh(a=2), "_/a")
    y, plan = ran(lambda: F.cross_entropy(x, t))
    assert str(y) == "f64[]{U:a}"
    assert [(c.kind, c.elements, c.dtype) for c in plan.collectives] == [
        ("all_reduce", 1, torch.int64)
    ]


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize(
    "name", ["cross_entropy", "nll_loss", "mse_loss", "binary_cross_entropy_with_logits"]
)
def test_means_over_a_cut_batch_have_the_gradients_of_one_device(name, n):
    """torch's DTensor multiplies these gradients by the number of devices."""
    loss = getattr(F, name)
    value, w = values(6, C), values(C, C, seed=1)
    target = classes(6) if name in ("cross_entropy", "nll_loss") else values(6, C, seed=2)
    x = sw.shard(value, mesh(a=n), "_/a _")
    t = sw.shard(target, x.mesh, "_/a _" if target.ndim == 2 else "_/a")
    got, g = sw.value_and_grad(lambda w: loss(x @ w, t))(sw.shard(w, x.mesh))
    leaf = w.clone().requires_grad_()
    want = loss(value @ leaf, target)
    (want_g,) = torch.autograd.grad(want, leaf)
    assert abs(got.item() - want.item()) < 1e-12
    close(g, want_g)


@pytest.mark.parametrize("n", [2, 3])
def test_uneven_counts_of_ignored_labels_weigh_tokens_not_devices(n):
    target = torch.full((6,), -100)
    target[:1] = 3  # all that counts lies on the first device
    value = values(6, C)
    x, t = sw.shard(value, mesh(a=n), "_/a _"), sw.shard(target, mesh(a=n), "_/a")
    got, g = sw.value_and_grad(lambda x: F.cross_entropy(x, t))(x)
    leaf = value.clone().requires_grad_()
    want = F.cross_entropy(leaf, target)
    assert abs(got.item() - want.item()) < 1e-12
    close(g, torch.autograd.grad(want, leaf)[0])


@pytest.mark.parametrize("layout", ["_/a _", "_ _/a", "_ _"])
def test_a_mean_of_nothing_is_nan_as_in_torch(layout):
    x = sw.shard(values(6, C), mesh(a=2), layout)
    none = torch.full((6,), -100)
    for loss in (F.cross_entropy, F.nll_loss):
        assert math.isnan(loss(x, none).full_tensor().item())
        assert math.isnan(loss(values(6, C), none).item())
        assert loss(x, none, reduction="sum").full_tensor().item() == 0


def test_narrow_logits_take_their_statistics_in_float32():
    value = values(6, 4 * C).bfloat16()
    x = sw.shard(value, mesh(a=2), "_ _/a")
    loss = F.cross_entropy(x, classes(6))
    assert loss.dtype == torch.bfloat16
    want = F.cross_entropy(value.double(), classes(6))
    torch.testing.assert_close(loss.full_tensor().double(), want, rtol=2**-7, atol=0)


def test_bad_arguments_say_so():
    x = sw.shard(values(6, C), mesh(a=2))
    with pytest.raises(
        TypeError, match="cross_entropy: size_average and reduce are torch's old spelling"
    ):
        F.cross_entropy(x, classes(6), size_average=True)
    with pytest.raises(
        ValueError, match=r"mse_loss: reduction is 'avg' \(known: 'none', 'mean', 'sum'\)"
    ):
        F.mse_loss(x, x, reduction="avg")
    with pytest.raises(ValueError, match="do not fit"):
        F.cross_entropy(x, classes(5))
    with pytest.raises(TypeError, match="nonsense"):
        sw.ops.mse_loss(x, x, nonsense=1)


def test_out_names_the_layout_of_the_loss():
    x = sw.shard(values(6, C), mesh(a=2), "_/a _")
    assert sw.ops.mse_loss(x, x, out="").layout is sw.Layout("")
    assert sw.ops.cross_entropy(x, classes(6), reduction="none", out="_").layout is sw.Layout("_")


def test_they_compose_with_vmap_and_jvp():
    value, tangent = values(6, C), values(6, C, seed=1)
    t = classes(6, ignore=False)
    x, d = (placed(v, mesh(a=2), "_ _/a") for v in (value, tangent))
    f = lambda x: F.cross_entropy(x, t)  # noqa: E731
    close(sw.jvp(f, (x,), (d,))[1], torch.func.jvp(f, (value,), (tangent,))[1])
    got = sw.vmap(sw.grad(lambda x, t: F.cross_entropy(x, t)))(x, sw.shard(t, x.mesh))
    close(got, torch.func.vmap(torch.func.grad(F.cross_entropy))(value, t))


def test_it_plans_on_an_abstract_mesh():
    grid = sw.make_mesh({"data": 64, "tensor": 8}, transport="abstract")
    x = sw.zeros((128, 16, 64), grid, "b/data v/tensor s")
    t = sw.zeros((128, 64), grid, "b/data s", dtype=torch.int64)
    made = sw.plan(lambda x: F.cross_entropy(x, t), x)
    assert [(c.axes, c.elements) for c in made.collectives] == [
        *[(("tensor",), 2 * 7 / 8 * 2 * 64)] * 3,
        (("data",), 2 * 63 / 64),
    ]
    v = sw.zeros((128, 4), grid, "b/data d") + 1
    assert str(F.gaussian_nll_loss(v, v, v)) == "f32[]{U:data}"
