"""Largest and smallest entries: audited in every layout, what moves, gradients between ties."""

from __future__ import annotations

import pytest
import torch
from check import close, placed, pulled, ran
from gallery import mesh, values

import shardwise as sw
from shardwise.ops.audit import report

SHAPE = (6, 12)
OPS = {
    "amax": lambda x: torch.amax(x, 1),
    "amax of all": lambda x: x.amax(),
    "amax keeping": lambda x: x.amax((0, 1), keepdim=True),
    "amin": lambda x: torch.amin(x, (0,)),
    "aminmax": lambda x: torch.aminmax(x, dim=1),
    "max of all": lambda x: torch.max(x),
    "min of all": lambda x: x.min(),
    "max": lambda x: torch.max(x, 1),
    "min keeping": lambda x: x.min(0, keepdim=True),
    "argmax": lambda x: torch.argmax(x, 1),
    "argmax of all": lambda x: x.argmax(),
    "argmax of all keeping": lambda x: torch.argmax(x, None, True),
    "argmin keeping": lambda x: torch.argmin(x, 0, keepdim=True),
}


def tied(*shape, seed=0):
    """Numbers of which many are equal."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(4, shape, generator=rng).double()


@pytest.mark.parametrize("name", OPS)
def test_every_layout_on_one_axis_is_right_and_none_is_a_choice(name):
    found = report(OPS[name], [SHAPE])
    assert not found.wrong, found.wrong[:3]
    assert (len(found.right), len(found.choice)) == (10, 0)
    for (_, layout), result in found.right.items():
        state = layout.partition("{")[2]
        assert ("{R:a}" in result) == state.startswith("R"), (layout, result)
        assert "{U" not in result


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("axes", [2, 3])
def test_random_layouts_on_more_axes(name, axes):
    found = report(OPS[name], [(12, 12)], axes=axes, samples=30)
    assert not found.wrong, found.wrong[:3]
    assert not found.choice


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize(
    "layout", ["_/a _", "_ _/a", "_/a _/b", "_ _/a/b", "_ _/b/a", "_ _ {R:a}", "_/b _ {R:a}"]
)
def test_ties_go_where_torch_puts_them(name, layout):
    value = tied(*SHAPE)
    x = placed(value, mesh(a=2, b=3), layout)
    leaf = value.clone().requires_grad_()
    want = OPS[name](leaf)
    want = [want] if isinstance(want, torch.Tensor) else list(want)
    made, pull = sw.vjp(OPS[name], x)
    flat = [made] if isinstance(made, sw.ShardedTensor) else list(made)
    for got, w in zip(flat, want, strict=True):
        assert torch.equal(got.full_tensor(), w)
        assert got.dtype == w.dtype
    real = [(g, w) for g, w in zip(flat, want, strict=True) if w.requires_grad]
    if not real:
        return
    cotangents = [values(*w.shape, seed=3) for _, w in real]
    (g,) = pull(
        [placed(c, y.mesh, y.layout.dual) for c, (y, _) in zip(cotangents, real, strict=True)]
    )
    close(g, torch.autograd.grad([w for _, w in real], leaf, cotangents)[0])


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize(
    ("op", "plain", "with_gradient"),
    [
        (lambda x: x.amax(1), ["max"], ["max", "sum"]),
        (lambda x: x.min(1).values, ["min", "min"], ["min", "min", "sum"]),
        (lambda x: x.max(1).values, ["max", "min"], ["max", "min", "sum"]),
        (lambda x: x.argmax(1), ["max", "min"], ["max", "min"]),
    ],
)
def test_small_all_reduces_finish_and_the_backward_moves_nothing(op, plain, with_gradient, n):
    x = placed(values(*SHAPE), mesh(a=n), "_ _/a")
    y, plan = ran(lambda: op(x))
    assert y.layout is sw.Layout("_")
    assert [(c.kind, c.reduce, c.elements) for c in plan.collectives] == [
        ("all_reduce", r, 2 * (n - 1) / n * 6) for r in plain
    ]
    with sw.record() as plan:
        y, pull = sw.vjp(op, x)
        if y.dtype.is_floating_point:
            pull(placed(values(6), x.mesh, y.layout.dual))
    assert [(c.reduce, c.phase) for c in plan.collectives] == [
        (r, "forward") for r in with_gradient
    ]
    assert {c.why for c in plan.collectives} == {"statistics"}
    assert plan.collectives[0].op in ("amax", "max", "min", "argmax")


def test_all_reduces_of_dims_cut_by_several_axes_are_one():
    x = placed(values(*SHAPE), mesh(a=2, b=3), "_/a _/b")
    y, plan = ran(lambda: x.amax())
    assert y.item() == values(*SHAPE).max().item()
    assert [(c.axes, c.size) for c in plan.collectives] == [(("a", "b"), 6)]


def test_nothing_moves_where_other_dims_are_cut():
    x = placed(values(*SHAPE), mesh(a=2), "_/a _")
    for op in (lambda x: x.amax(1), lambda x: x.max(1).values, lambda x: x.argmax(1)):
        y, plan = ran(lambda op=op: op(x))
        assert (y.layout, len(plan.collectives)) == (sw.Layout("_/a"), 0)


def test_infinities_and_nans_are_found():
    inf, nan = float("inf"), float("nan")
    value = torch.tensor(
        [[-inf, -inf, -inf, -inf], [0, inf, inf, 1], [0, 1, nan, 2], [1, 2, 3, nan]]
    )
    x = placed(value.double(), mesh(a=2), "_ _/a")
    for op in (torch.max, torch.min):
        got, want = op(x, 1), op(value.double(), 1)
        assert torch.equal(got.values.full_tensor().nan_to_num(9), want.values.nan_to_num(9))
        assert torch.equal(got.indices.full_tensor(), want.indices)
    leaf = value[:2].double().requires_grad_()
    y, (g,), _ = pulled(
        lambda x: x.amax(1),
        [placed(value[:2].double(), mesh(a=2), "_ _/a")],
        torch.ones(2).double(),
    )
    assert y.full_tensor().tolist() == [-inf, inf]
    assert torch.equal(g.full_tensor(), torch.autograd.grad(leaf.amax(1).sum(), leaf)[0])


def test_two_operands_are_maximum():
    x, y = (placed(values(6, 6, seed=s), mesh(a=2), "_/a _") for s in (0, 1))
    close(torch.max(x, y), torch.maximum(values(6, 6), values(6, 6, seed=1)))
    close(x.min(y), torch.minimum(values(6, 6), values(6, 6, seed=1)))


def test_integers_keep_their_dtype_and_are_replicated():
    x = sw.shard(torch.arange(12).reshape(2, 6), mesh(a=3), "_ _/a")
    values, indices = x.max(1)
    assert (str(values), str(indices)) == ("i64[2]", "i64[2]")
    assert values.full_tensor().tolist() == [5, 11]
    assert x.max().item() == 11


def test_they_run_under_vmap_and_jvp():
    value = tied(4, 12)
    x = placed(value, mesh(a=2), "_ _/a")
    for op in (torch.amax, lambda x, d: torch.max(x, d).values, torch.logsumexp):
        close(sw.vmap(lambda x, op=op: op(x, 0))(x), op(value, 1))
        got = sw.vmap(sw.grad(lambda x, op=op: op(x, 0)))(x)
        close(got, torch.func.vmap(torch.func.grad(lambda v, op=op: op(v, 0)))(value))
        t = placed(values(4, 12, seed=2), mesh(a=2), "_ _/a")
        _, tangent = sw.jvp(lambda x, op=op: op(x, 1), (x,), (t,))
        close(
            tangent,
            torch.func.jvp(lambda v, op=op: op(v, 1), (value,), (values(4, 12, seed=2),))[1],
        )


def test_out_names_the_layout_of_the_values():
    x = placed(values(6, 12), mesh(a=2), "_ _/a")
    assert sw.ops.amax(x, 1, out="_/a").layout is sw.Layout("_/a")
    found = sw.ops.max(x, 1, out="_/a")
    assert (found.values.layout, found.indices.layout) == (sw.Layout("_/a"), sw.Layout("_"))
