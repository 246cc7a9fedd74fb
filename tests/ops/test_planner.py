"""The planner: `over`, `out`, `cheapest`; what is planned once; types that no axis size changes."""

from __future__ import annotations

import random

import pytest
import torch
from check import close, placed, ran
from gallery import mesh, values
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import layouts

import shardwise as sw
from shardwise import ops
from shardwise.ops.audit import layouts_of
from shardwise.ops.contract import _MATMUL
from shardwise.ops.pointwise import _CLAMP, _LERP_SCALAR, OPS


def both(a="_ _", b="_ _", on=None):
    on = on or mesh(a=2, b=3)
    return placed(values(6, 12), on, a), placed(values(12, 6, seed=1), on, b)


WANT = values(6, 12) @ values(12, 6, seed=1)

OVER = [  # A, B, over, result
    ("_/a _", "_ _/a", {"a": "m"}, "_/a _"),
    ("_/a _", "_ _/a", {"a": "n"}, "_ _/a"),
    ("_/a _", "_ _/a", {"a": "k"}, "_ _ {U:a}"),
    ("_/a _", "_ _/a", {"a": "replicated"}, "_ _"),
    ("_ _", "_ _", {"a": "m", "b": "n"}, "_/a _/b"),
    ("_ _", "_ _", {"a": "k"}, "_ _ {U:a}"),
    ("_ _/a/b", "_ _", {"b": "m"}, "_/b _ {U:a}"),
    ("_ _/a/b", "_ _", {"a": "m"}, "_/a _ {U:b}"),
    ("_ _ {U:a}", "_ _", {"a": "m"}, "_/a _"),
    ("_ _", "_ _", {"a": "reduced"}, "_ _ {R:a}"),
]


@pytest.mark.parametrize(("a", "b", "over", "result"), OVER)
def test_over_names_the_factor_that_an_axis_runs_over(a, b, over, result):
    x, y = both(a, b)
    z = ops.matmul(x, y, over=over)
    assert z.layout is sw.Layout(result)
    close(z, WANT)
    g = sw.grad(lambda x: ops.matmul(x, y, over=over).sum())(x)
    close(g, values(12, 6, seed=1).sum(1).expand(6, 12))


def test_over_refuses_what_the_op_has_not(golden):
    x, y = both()
    said = []
    for over in ({"c": "m"}, {"a": "q"}, {"a": "unreduced"}):
        with pytest.raises((sw.LayoutError, sw.MeshError)) as caught:
            ops.matmul(x, y, over=over)
        said.append(str(caught.value))
    golden("over", "\n".join(said))


OUT = [  # A, B, out, forward collectives
    ("_/a _", "_ _/a", "_/a _", ["all_gather"]),
    ("_/a _", "_ _/a", "_ _/a", ["all_gather"]),
    ("_/a _", "_/a _", "_/a _", ["all_gather"]),
    ("_ _/a", "_/a _", "_/a _", ["reduce_scatter"]),
    ("_ _/a", "_/a _", "_ _", ["all_reduce"]),
    ("_ _/a", "_/a _", "_ _ {R:a}", ["all_reduce"]),
    ("_ _/a", "_/a _", "...", []),
    ("_/a _/b", "_/a _/b", "_/a _/b", ["all_gather", "all_gather"]),  # SUMMA
    ("_ _", "_ _", "_/a _/b", []),
]


@pytest.mark.parametrize(("a", "b", "out", "kinds"), OUT)
def test_out_alone_settles_the_algorithm(a, b, out, kinds):
    x, y = both(a, b)
    z, plan = ran(lambda: ops.matmul(x, y, out=out))
    close(z, WANT)
    assert [c.kind for c in plan.collectives] == kinds
    if out != "...":
        assert z.layout is sw.Layout(out)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_out_settles_every_choice_whatever_it_is(data):
    on = mesh(**data.draw(st.sampled_from([{"a": 2, "b": 3}, {"a": 2, "b": 1, "c": 2}])))
    a, b, out = (data.draw(layouts((12, 12), on)) for _ in range(3))
    x, y = placed(values(12, 12), on, a), placed(values(12, 12, seed=1), on, b)
    for op, want in ((ops.matmul, x.full_tensor() @ y.full_tensor()), (ops.maximum, None)):
        z = op(x, y, out=str(out))
        assert z.layout is out
        close(z, torch.maximum(values(12, 12), values(12, 12, seed=1)) if want is None else want)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_cheapest_never_refuses_and_never_changes_a_value(data):
    on = mesh(**data.draw(st.sampled_from([{"a": 2, "b": 3}, {"a": 2, "b": 1, "c": 2}])))
    a, b = (data.draw(layouts((12, 12), on)) for _ in range(2))
    x, y = placed(values(12, 12), on, a), placed(values(12, 12, seed=1), on, b)
    with sw.cheapest():
        close(x @ y, values(12, 12) @ values(12, 12, seed=1))
        close(x + y, values(12, 12) + values(12, 12, seed=1))
        g = sw.grad(lambda x: (x * y).sum())(x)
    close(g, values(12, 12, seed=1))
    assert g.layout is a.dual


def test_operands_that_cut_a_dim_in_two_orders_follow_out():
    x, y = (
        placed(values(6, 6), mesh(a=2, b=3), "_/a/b _"),
        placed(values(6, 6), mesh(a=2, b=3), "_/b/a _"),
    )
    for out in ("_/a/b _", "_/b/a _"):
        z = ops.add(x, y, out=out)
        assert z.layout is sw.Layout(out)
        close(z, 2 * values(6, 6))
    with sw.cheapest():
        close(x * y, values(6, 6) ** 2)


def test_a_call_of_known_types_plans_nothing():
    x, y = both("_/a _", "_ _/b")
    cut = placed(values(6, 12), mesh(a=2, b=3), "_ _/a")

    def program():
        z = torch.exp(x @ y) + 1
        torch.clamp(z, 0.0, 2.0)
        torch.where(z > 0, z, 0.0)
        ops.matmul(cut, y, out="_/a _")
        sw.grad(lambda x: (x @ y).sum())(x)

    program()
    sizes = {name: len(op.cache) for name, op in OPS.items()} | {"matmul": len(_MATMUL.cache)}
    types = len(x._type.moves)
    for _ in range(3):
        program()
    assert sizes == {name: len(op.cache) for name, op in OPS.items()} | {
        "matmul": len(_MATMUL.cache)
    }
    assert types == len(x._type.moves)


def test_numbers_that_vary_do_not_grow_the_cache():
    x, _ = both()
    u = placed(values(6), mesh(a=2, b=3), "_ {U:a}")

    def step(lr):
        torch.lerp(x, x, lr)
        torch.clamp(x, -lr, lr)
        x * lr + lr - lr / x
        torch.add(x, x, alpha=lr)
        torch.addcmul(x, x, x, value=lr)
        u + lr
        x**lr

    caches = [*OPS.values(), _CLAMP, _LERP_SCALAR]
    step(0.5)
    before = [len(op.cache) for op in caches]
    for i in range(5):
        step(0.1 + i)
    assert before == [len(op.cache) for op in caches]


def test_a_new_shape_adds_one_entry():
    on = mesh(a=2, b=3)
    before = len(_MATMUL.cache)
    for rows in (34, 68):
        x, y = placed(values(rows, 14), on, "_/a _"), placed(values(14, 22), on, "_ _")
        for _ in range(3):
            x @ y
    assert len(_MATMUL.cache) == before + 2


def test_plans_are_kept_apart_by_grad_mode():
    x, y = both("_ _ {U:a}", "_ _")

    def f(y):
        with torch.no_grad():
            assert (x @ y).layout.unreduced == {"a"}
        z = x @ y
        assert not z.layout.unreduced
        return z.sum()

    sw.grad(f)(y)
    assert (x @ y).layout.unreduced == {"a"}


def test_axes_of_size_one_change_no_type_and_move_nothing():
    draw = random.Random(0)
    big, small = mesh(a=2, b=3), mesh(a=1, b=1)
    every = list(layouts_of((6, 6), big))
    value = values(6, 6)
    for _ in range(150):
        one, two = draw.choice(every), draw.choice(every)
        for op in (ops.matmul, ops.add, ops.maximum, ops.div):
            seen = []
            for on in (big, small):
                x, y = placed(value, on, one), placed(value, on, two)
                with sw.record() as plan:
                    try:
                        z = op(x, y)
                    except sw.LayoutError as error:
                        seen.append(error.kind)
                        continue
                seen.append(str(z.layout))
                if on is small:
                    assert not plan.collectives
                    close(z, op_value(op, value))
            assert seen[0] == seen[1], (op.__name__, str(one), str(two), seen)


def op_value(op, value):
    return getattr(torch, op.__name__)(value, value)


def test_no_records_on_axes_of_one_device_forward_or_backward():
    on = mesh(a=1, b=1)
    x, y = placed(values(6, 12), on, "_/a _ {U:b}"), placed(values(12, 6), on, "_ _/b")
    (_, g), plan = ran(lambda: sw.value_and_grad(lambda y: sw.reshard(x @ y, "_ _/a").sum())(y))
    assert not plan.collectives
    assert not plan.warnings
    assert g.layout is y.layout
    close(g, values(6, 12).sum(0)[:, None].expand(12, 6))


TRANSPORTS = [("_/a _", "_ _", "_ _"), ("_ _/a", "_/a _/b", "_/b _"), ("_ _ {U:a}", "_ _/b", "...")]


@pytest.mark.parametrize(("a", "b", "out"), TRANSPORTS)
def test_plans_are_the_same_on_an_abstract_mesh(a, b, out):
    on = mesh(a=2, b=3)
    x, y = both(a, b, on)

    def f(x, y):
        return sw.value_and_grad(lambda y: ops.matmul(x, y, out=out).sum())(y)

    _, executed = ran(lambda: f(x, y))
    planned = sw.plan(f, x, y)
    assert [(c.kind, c.axes, c.elements, c.phase) for c in planned.collectives] == [
        (c.kind, c.axes, c.elements, c.phase) for c in executed.collectives
    ]
