"""Softmax and the norms: audited in every layout, collectives against the table, robust numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from check import close, moves, placed, pulled, ran
from gallery import mesh, values

import shardwise as sw
from shardwise.ops.audit import report

SHAPE = (6, 12)
ROWS = {
    "softmax": lambda x: torch.softmax(x, 1),
    "log_softmax": lambda x: F.log_softmax(x, dim=-1),
    "softmin": lambda x: F.softmin(x, dim=1),
    "logsumexp": lambda x: torch.logsumexp(x, 1),
    "logsumexp of all": lambda x: x.logsumexp((0, 1), keepdim=True),
    "rms_norm": lambda x: F.rms_norm(x, (12,)),
    "rms_norm of two dims": lambda x: F.rms_norm(x, (6, 12), eps=1e-3),
    "layer_norm": lambda x: F.layer_norm(x, (12,)),
    "layer_norm of two dims": lambda x: torch.layer_norm(x, (6, 12)),
    "normalize": lambda x: F.normalize(x),
    "normalize by 1": lambda x: F.normalize(x, 1.0, dim=0),
}
WEIGHTED = {
    "rms_norm": lambda x, w: F.rms_norm(x, (12,), w, 1e-6),
    "layer_norm": lambda x, w: F.layer_norm(x, (12,), w),
    "layer_norm with bias only": lambda x, b: F.layer_norm(x, (12,), None, b),
}


@pytest.mark.parametrize("name", ROWS)
def test_every_layout_on_one_axis_is_right_and_none_is_a_choice(name):
    found = report(ROWS[name], [SHAPE])
    assert not found.wrong, found.wrong[:3]
    assert (len(found.right), len(found.choice)) == (10, 0)
    for (_, layout), result in found.right.items():
        if "logsumexp" not in name:
            assert result == ("_ _" if "U" in layout else layout)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("axes", [2, 3])
def test_random_layouts_on_more_axes(name, axes):
    found = report(ROWS[name], [SHAPE], axes=axes, samples=25)
    assert not found.wrong, found.wrong[:3]
    assert not found.choice


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_weight_is_cut_as_x_is_and_is_a_choice_where_only_it_is_cut(name):
    found = report(WEIGHTED[name], [SHAPE, (12,)])
    assert not found.wrong, found.wrong[:3]
    cut, uncut = "_/a", ("_/a _", "_ _", "_ _ {R:a}", "_ _ {U:a}")
    want = {(f"mesh(a={n})", x, cut) for n in (2, 3) for x in uncut}
    assert set(found.choice) == want
    assert len(found.right) == 40 - len(want)


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("axes", [2, 3])
def test_weights_in_random_layouts_on_more_axes(name, axes):
    found = report(WEIGHTED[name], [SHAPE, (12,)], axes=axes, samples=40)
    assert not found.wrong, found.wrong[:3]


def test_layer_norm_with_weight_and_bias_in_random_layouts():
    op = lambda x, w, b: F.layer_norm(x, (12,), w, b, 1e-3)  # noqa: E731
    for axes, samples in ((1, None), (2, 60), (3, 40)):
        found = report(op, [SHAPE, (12,), (12,)], axes=axes, samples=samples)
        assert not found.wrong, found.wrong[:3]


COUNTS = {  # elements of one all_reduce operand [6], per phase; m: a maximum
    "softmax": ("m+", "+"),
    "log_softmax": ("m+", "+"),
    "logsumexp": ("m+", ""),
    "rms_norm": ("+", "+"),
    "layer_norm": ("++", "++"),
}


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", COUNTS)
def test_over_a_cut_dim_only_statistics_move(name, n):
    x = placed(values(*SHAPE), mesh(a=n), "_ _/a")
    y, _, plan = pulled(ROWS[name], [x], values(*((6,) if name == "logsumexp" else SHAPE), seed=1))
    assert y.layout is sw.Layout("_" if name == "logsumexp" else "_ _/a")
    for phase, wanted in zip(("forward", "backward"), COUNTS[name], strict=True):
        seen = [c for c in plan.collectives if c.phase == phase]
        assert "".join("m" if c.reduce == "max" else "+" for c in seen) == wanted
        assert {(c.kind, c.axes, c.elements) for c in seen} <= {
            ("all_reduce", ("a",), 2 * (n - 1) / n * 6)
        }
    assert {c.op for c in plan.collectives} == {name}
    assert {c.why for c in plan.collectives} == {"statistics", "gradient"} - (
        {"gradient"} if name == "logsumexp" else set()
    )


@pytest.mark.parametrize(
    ("weight", "backward"), [("_ {R:a}", []), ("_", [("all_gather", "a", 6.0)]), ("_/a", [])]
)
def test_a_replicated_weight_costs_a_gather_of_its_gradient(weight, backward):
    x, w = placed(values(*SHAPE), mesh(a=2), "_ _/a"), placed(values(12), mesh(a=2), weight)
    _, _, plan = pulled(lambda x, w: F.rms_norm(x, (12,), w), [x, w], values(*SHAPE, seed=1))
    statistic = ("all_reduce", "a", 6.0)
    assert moves(plan, "forward") == [statistic]
    assert sorted(moves(plan, "backward")) == sorted([*backward, statistic])


@pytest.mark.parametrize("name", ["softmax", "rms_norm", "layer_norm"])
def test_nothing_moves_where_other_dims_are_cut(name):
    x = placed(values(*SHAPE), mesh(a=2), "_/a _")
    _, _, plan = pulled(ROWS[name], [x], values(*SHAPE, seed=1))
    assert not plan.collectives


def test_large_numbers_lose_nothing():
    value = values(*SHAPE) + 1e6
    x = placed(value, mesh(a=3), "_ _/a")
    torch.testing.assert_close(
        F.layer_norm(x, (12,)).full_tensor(), F.layer_norm(value, (12,)), rtol=1e-8, atol=1e-8
    )
    big = placed(value * 1e3, mesh(a=3), "_ _/a")
    close(torch.softmax(big, 1), torch.softmax(big.full_tensor(), 1))
    close(torch.logsumexp(big, 1), torch.logsumexp(big.full_tensor(), 1))


def test_rows_of_minus_infinity():
    value = values(*SHAPE)
    value[0], value[1, :6] = -torch.inf, -torch.inf
    x = placed(value, mesh(a=2), "_ _/a")
    assert torch.equal(torch.softmax(x, 1).full_tensor().isnan(), torch.softmax(value, 1).isnan())
    got, want = torch.logsumexp(x, 1).full_tensor(), torch.logsumexp(value, 1)
    assert got[0] == want[0] == -torch.inf
    close(got[1:], want[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_dtypes_take_their_statistics_in_float32(dtype):
    value = values(6, 768).to(dtype)
    x = sw.shard(value, mesh(a=2), "_ _/a")
    bound = torch.finfo(dtype).eps * 4
    for op in (
        lambda x: torch.softmax(x, 1),
        lambda x: F.layer_norm(x, (768,)),
        lambda x: F.rms_norm(x, (768,)),
    ):
        got, want = op(x), op(value.double())
        assert got.dtype == dtype
        torch.testing.assert_close(got.full_tensor().double(), want, rtol=bound, atol=bound / 100)
    assert torch.softmax(x, 1, dtype=torch.float64).dtype == torch.float64


def test_group_norm_may_cut_batch_and_groups():
    op = lambda x, w, b: F.group_norm(x, 6, w, b)  # noqa: E731
    found = report(op, [(6, 12, 6), (12,), (12,)], samples=200)
    assert not found.wrong, found.wrong[:3]
    assert not [
        c for c in found.choice if c[1].startswith(("_/a", "_ _/a")) and "/a" not in c[2] + c[3]
    ]
    assert [c for c in found.choice if c[1] == "_ _ _/a"]


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_has_the_statistics_of_the_global_batch(training):
    mean, var = values(12), values(12, seed=1).abs()

    def op(x, w, b):
        given = (None, None) if training else (mean, var)
        return F.batch_norm(x, *given, w, b, training)

    found = report(op, [(6, 12, 6), (12,), (12,)], samples=60)
    assert not found.wrong, found.wrong[:3]
    x = sw.shard(values(6, 12), mesh(a=2), "_/a _")
    with pytest.raises(TypeError, match="nothing is written in place"):
        F.batch_norm(x, mean, var, training=True)


def test_cosine_similarity():
    op = lambda x, y: F.cosine_similarity(x, y, dim=1)  # noqa: E731
    found = report(op, [SHAPE, SHAPE])
    assert not found.wrong, found.wrong[:3]
    assert len(found.choice) == 4  # cut on two dims


def test_softmax_composes_with_transforms():
    value, tangent = values(4, 12), values(4, 12, seed=1)
    x, t = (placed(v, mesh(a=2), "_ _/a") for v in (value, tangent))
    for name in ("softmax", "layer_norm", "rms_norm", "logsumexp"):
        op = ROWS[name]
        close(sw.jvp(op, (x,), (t,))[1], torch.func.jvp(op, (value,), (tangent,))[1])
    f = lambda x: (torch.softmax(x, -1) ** 2).sum()  # noqa: E731
    close(sw.vmap(sw.grad(f))(x), torch.func.vmap(torch.func.grad(f))(value))
    close(sw.hvp(f, x, t), torch.func.jvp(torch.func.grad(f), (value,), (tangent,))[1])


def test_out_and_torchs_own_spellings():
    value = values(4, 12)
    x = sw.shard(value, mesh(a=2), "_ _/a")
    assert sw.ops.softmax(x, 1, out="_/a _").layout is sw.Layout("_/a _")
    assert F.softmax(x, 1, 3, torch.float32).dtype == torch.float32
    assert x.log_softmax(1, torch.float32).dtype == torch.float32
    close(torch.special.logsumexp(x, 1), value.logsumexp(1))
    with pytest.raises(TypeError, match="softmax: say which dim"):
        F.softmax(x)
    with pytest.raises(ValueError, match=r"normalized_shape \(6,\) is not the end of \(4, 12\)"):
        F.layer_norm(x, (6,))
    with pytest.raises(ValueError, match=r"a weight of shape \(6,\) beside \(12,\)"):
        F.layer_norm(x, (12,), torch.ones(6))


def test_a_choice_lists_fixes_that_run():
    x = sw.shard(values(4, 12), mesh(a=2))
    w = sw.shard(values(12), mesh(a=2), "_/a")
    with pytest.raises(sw.LayoutError) as caught:
        F.layer_norm(x, (12,), w)
    assert caught.value.kind == "choice"
    y, plan = ran(lambda: sw.ops.layer_norm(x, (12,), w, out="_ _"))
    close(y, F.layer_norm(values(4, 12), (12,), values(12)))
    assert [c.kind for c in plan.collectives] == ["all_gather"]
