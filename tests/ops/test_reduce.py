"""Sums, folds, moments and norms: audited in every layout, what moves, torch's arguments."""

from __future__ import annotations

import math

import pytest
import torch
from check import close, moves, placed, pulled, ran
from gallery import mesh, values

import shardwise as sw
from shardwise.ops.audit import report

SHAPE = (6, 12)


def with_zeros(shapes, rng):
    made = [torch.randn(s, generator=rng, dtype=torch.float64) for s in shapes]
    for v in made:
        v.view(-1)[::3] = 0
    return made


# op, states over the axis that cuts what is reduced -> the result's: all others as in table (d)
OPS = {
    "sum": (lambda x: x.sum(1), "U"),
    "sum of all": (lambda x: x.sum(), "U"),
    "sum keeping": (lambda x: torch.sum(x, (1,), keepdim=True), "U"),
    "mean": (lambda x: x.mean(1), "U"),
    "mean of all": (lambda x: torch.mean(x), "U"),
    "var": (lambda x: torch.var(x, 1), "I"),
    "var of all": (lambda x: x.var(correction=0), "I"),
    "std": (lambda x: torch.std(x, (1,), keepdim=True), "I"),
    "var_mean": (lambda x: torch.var_mean(x, 1), "I"),
    "std_mean": (lambda x: torch.std_mean(x, 1, correction=2), "I"),
    "norm": (lambda x: torch.norm(x, dim=1), "I"),
    "norm 1": (lambda x: torch.linalg.vector_norm(x, 1, 1), "U"),
    "norm 3": (lambda x: torch.linalg.vector_norm(x, 3, 1), "I"),
    "norm inf": (lambda x: torch.linalg.vector_norm(x, math.inf, 1), "I"),
    "norm -inf": (lambda x: torch.linalg.vector_norm(x, -math.inf, 1), "I"),
    "norm of all": (lambda x: torch.linalg.norm(x), "I"),
    "prod": (lambda x: torch.prod(x, 1), "I"),
    "prod of all": (lambda x: x.prod(), "I"),
}
NO_GRADIENT = {
    "count_nonzero": lambda x: torch.count_nonzero(x, 1),
    "any": lambda x: torch.any(x > 7, 1),
    "any of all": lambda x: (x > 3).any(),
    "any of numbers": lambda x: torch.any(x, 0),
    "all": lambda x: torch.all(x > -3, 1, keepdim=True),
    "all of all": lambda x: (x > -9).all(),
}


def expected(layout: str, name: str, to: str) -> str:
    """The result's layout of a [6 12] operand of which dim 1, or all, is reduced."""
    everything = "of all" in name
    cut = everything or "_/a" in layout.split()[1]
    dims = {True: "", False: "_/a" if layout.startswith("_/a") else "_"}[everything]
    dims += " _" if "keeping" in name or name == "std" else ""
    if "/a" in layout:
        state = " {U:a}" if cut and to == "U" else ""
    elif "U" in layout:
        state = " {U:a}" if "sum" in name or name.startswith("mean") else ""
    else:
        state = " {R:a}" if "R" in layout else ""
    return str(sw.Layout((dims + state).strip()))


@pytest.mark.parametrize("name", OPS)
def test_every_layout_on_one_axis_gives_the_state_of_the_table(name):
    op, to = OPS[name]
    found = report(op, [SHAPE])
    assert not found.wrong, found.wrong[:3]
    assert not found.choice
    for (_, layout), result in found.right.items():
        first = result.split(", ")[0]
        assert first == expected(layout, name, to), (layout, result)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("axes", [2, 3])
def test_random_layouts_on_more_axes(name, axes):
    found = report(OPS[name][0], [(12, 12)], axes=axes, samples=20)
    assert not found.wrong, found.wrong[:3]
    assert not found.choice


@pytest.mark.parametrize("name", NO_GRADIENT)
@pytest.mark.parametrize("axes", [1, 2])
def test_counts_and_truths_in_any_layout(name, axes):
    found = report(
        NO_GRADIENT[name],
        [SHAPE],
        axes=axes,
        differentiable=False,
        operands=lambda shapes, rng: [torch.randint(-3, 9, shapes[0], generator=rng)],
        samples=None if axes == 1 else 20,
    )
    assert not found.wrong, found.wrong[:3]
    assert not found.choice


def test_the_0_norm_counts_and_has_no_gradient():
    value = torch.tensor([[0.0, 2, 3], [0, 0, 5]], dtype=torch.float64)
    x = placed(value, mesh(a=3), "_ _/a")
    y, (g,), plan = pulled(lambda x: torch.linalg.vector_norm(x, 0, 1), [x], values(2))
    assert str(y) == "f64[2]{U:a}"
    assert y.full_tensor().tolist() == [2, 1]
    assert not g.full_tensor().any()
    assert not moves(plan, "forward")


@pytest.mark.parametrize("name", ["prod", "prod of all", "norm", "norm 3", "norm inf", "std"])
def test_gradients_at_zeros_are_those_of_torch(name):
    found = report(OPS[name][0], [(6, 6)], operands=with_zeros)
    assert not found.wrong, found.wrong[:3]
    zero = lambda shapes, rng: [torch.zeros(shapes[0], dtype=torch.float64)]  # noqa: E731
    found = report(OPS[name][0], [(6, 6)], operands=zero, samples=None)
    assert not [w for w in found.wrong if "{U" not in w.split("->")[0]], found.wrong[:3]


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize(
    ("op", "forward", "backward"),
    [
        (lambda x: x.sum(1), [], []),
        (lambda x: x.mean(1), [], []),
        (lambda x: x.var(1), [6, 6], [6]),
        (lambda x: x.std(1), [6, 6], [6]),
        (lambda x: x.norm(dim=1), [6], []),
        (lambda x: torch.linalg.vector_norm(x, 1, 1), [], []),
        (lambda x: torch.linalg.vector_norm(x, math.inf, 1), [6, 6], []),
    ],
)
def test_only_statistics_move(op, forward, backward, n):
    x = placed(values(*SHAPE), mesh(a=n), "_ _/a")
    _, _, plan = pulled(op, [x], values(6, seed=1))
    for phase, elements in (("forward", forward), ("backward", backward)):
        assert moves(plan, phase) == [("all_reduce", "a", 2 * (n - 1) / n * e) for e in elements]


def test_a_product_gathers_one_number_per_device():
    x = placed(values(*SHAPE), mesh(a=2), "_ _/a")
    _, _, plan = pulled(lambda x: x.prod(1), [x], values(6, seed=1))
    assert (moves(plan, "forward"), moves(plan, "backward")) == ([("all_gather", "a", 6.0)], [])


def test_integer_sums_are_reduced_at_once_and_widen_as_in_torch():
    x = sw.shard(torch.arange(12, dtype=torch.int32), mesh(a=2), "_/a")
    y, plan = ran(lambda: x.sum())
    assert str(y) == "i64[]"
    assert y.item() == 66
    assert [c.kind for c in plan.collectives] == ["all_reduce"]
    assert x.prod(dtype=torch.int64).dtype == torch.int64
    with pytest.raises(TypeError, match=r"mean of torch\.int32: cast to a floating type first"):
        x.mean()


def test_half_precision_means_do_not_overflow():
    x = sw.shard(torch.full((12,), 60000.0, dtype=torch.float16), mesh(a=2), "_/a")
    assert x.mean().full_tensor().item() == 60000.0


def test_the_variance_of_values_far_from_zero_loses_no_digits():
    value = values(6, 12) + 1e6
    x = placed(value, mesh(a=3), "_ _/a")
    torch.testing.assert_close(x.var(1).full_tensor(), value.var(1), rtol=1e-9, atol=0)


def test_out_names_the_result_of_a_protocol_too():
    x = placed(values(6, 12), mesh(a=2), "_ _/a")
    y = sw.ops.var(x, 1, out="_/a")
    assert str(y) == "f64[6/a]"
    close(y, values(6, 12).var(1))


def test_torchs_own_spellings():
    value = values(6, 12)
    x = placed(value, mesh(a=2), "_/a _")
    for op in (
        lambda x: x.var(False),
        lambda x: torch.var(x, 1, False, True),
        lambda x: torch.var(x, dim=(0, 1), unbiased=True),
        lambda x: x.std(dim=0, correction=0),
        lambda x: x.norm(),
        lambda x: torch.norm(x, 2, 1, True),
        lambda x: torch.norm(x, p="fro"),
        lambda x: torch.linalg.norm(x, 3, 1),
        lambda x: x.sum(dim=(-1,)),
        lambda x: x.sum(()),
        lambda x: x.sum(dtype=torch.float32).double(),
        lambda x: x.mean((0, 1), True),
        lambda x: torch.var_mean(x, False)[1],
    ):
        torch.testing.assert_close(op(x).full_tensor(), op(value), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="norms of matrices have no rule"):
        torch.linalg.norm(x, 2)
    with pytest.raises(ValueError, match="the nuclear norm has no rule"):
        x.norm("nuc")
    with pytest.raises(IndexError, match="dim 2 is out of range for a tensor with 2 dims"):
        x.sum(2)
    with pytest.raises(ValueError, match="names a dim twice"):
        x.sum((0, -2))


def test_zero_dims_and_empty_tensors():
    on = mesh(a=2)
    scalar = sw.shard(torch.tensor(3.0), on)
    for op in (torch.sum, torch.mean, torch.prod, torch.norm, torch.any, torch.amax):
        assert op(scalar).full_tensor() == op(torch.tensor(3.0))
    empty = sw.shard(torch.zeros(0, 4), on, "_/a _")
    assert empty.sum(0).full_tensor().tolist() == [0] * 4
    assert empty.prod(0).full_tensor().tolist() == [1] * 4
    assert empty.mean(0).full_tensor().isnan().all()
