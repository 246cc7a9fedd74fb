"""Pointwise ops: tables (b) and (c) of the core study as data; functions and operators."""

from __future__ import annotations

import math
import operator

import numpy as np
import pytest
import torch
from check import close, moves, placed, pulled, ran
from gallery import mesh, values

import shardwise as sw
from shardwise import ops
from shardwise.ops import pointwise
from shardwise.ops.audit import report

# Operands A[d e] and B[d e], or B[e] where it "lacks" d. d, e: the dim that the axis cuts.
# A, B, whether B has d, result, forward, backward. None: a choice.
ADDITION = [
    ("d", "d", True, "d", [], []),
    ("d", "e", True, None, [], []),
    ("d", "R", True, "d", [], []),
    ("d", "R", False, "d", [], []),
    ("d", "I", True, "d", [], ["B AG"]),
    ("d", "I", False, "d", [], ["B AR"]),
    ("d", "U", True, "d", ["B RS"], ["B AG"]),
    ("d", "U", False, "d", ["B AR"], ["B AR"]),
    ("I", "I", True, "I", [], []),
    ("R", "R", True, "R", [], []),
    ("R", "I", True, "I", [], []),
    ("U", "U", True, "U", [], []),
    ("U", "R", True, "U", [], []),
    ("U", "I", True, "U", [], []),
    ("U", "I", False, "U", [], []),
]
NONLINEAR = [
    ("I", "I", True, "I", [], []),
    ("R", "R", True, "R", [], []),
    ("d", "d", True, "d", [], []),
    ("d", "R", True, "d", [], []),
    ("d", "R", False, "d", [], []),
    ("d", "I", True, "d", [], ["B AG"]),
    ("d", "I", False, "d", [], ["B AR"]),
    ("d", "U", True, "d", ["B RS"], ["B AG"]),
    ("d", "U", False, "d", ["B AR"], ["B AR"]),
    ("d", "e", True, None, [], []),
    ("R", "I", True, "I", [], []),
    ("U", "I", True, "I", ["A AR"], []),
    ("U", "R", True, "I", ["A AR"], []),
    ("U", "U", True, "I", ["A AR", "B AR"], []),
]
DIVISION = [
    *[row for row in NONLINEAR if row[:2] != ("U", "R")],
    ("U", "R", True, "U", [], []),
    ("R", "U", True, "I", ["B AR"], []),
    ("I", "U", True, "I", ["B AR"], []),
]
TABLES = [
    *[(name, *row) for name in ("add", "sub") for row in ADDITION],
    *[(name, *row) for name in ("maximum", "pow", "atan2") for row in NONLINEAR],
    *[("div", *row) for row in DIVISION],
]
KINDS = {"AR": "all_reduce", "RS": "reduce_scatter", "AG": "all_gather"}
D, E = 6, 12


def layout(state: str, dims: str) -> str:
    text = " ".join("_/a" if f == state else "_" for f in dims)
    return text + (f" {{{state}:a}}" if state in "RU" else "")


def reference(name, a, b, cotangent):
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    y = getattr(torch, name)(a, b)
    return y, *torch.autograd.grad(y, (a, b), cotangent)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize(("name", "a", "b", "has", "out", "forward", "backward"), TABLES)
def test_two_operands_combine_as_in_the_table(name, a, b, has, out, forward, backward, n):
    on = mesh(a=n)
    va, vb = values(D, E).abs() + 1, values(*((D, E) if has else (E,)), seed=1).abs() + 1
    x, y = placed(va, on, layout(a, "de")), placed(vb, on, layout(b, "de" if has else "e"))
    op = getattr(ops, name)
    if out is None:
        with pytest.raises(sw.LayoutError) as caught:
            op(x, y)
        assert caught.value.kind == "choice"
        return
    cotangent = values(D, E, seed=2)
    want, *want_grads = reference(name, va, vb, cotangent)
    z, grads, plan = pulled(op, [x, y], cotangent)
    assert z.layout is sw.Layout(layout(out, "de"))
    close(z, want, "value")
    for g, w in zip(grads, want_grads, strict=True):
        close(g, w, "gradient")
    size = {"A": va.numel(), "B": vb.numel()}
    share = {"AR": 2, "RS": 1, "AG": 1}
    for phase, casts in (("forward", forward), ("backward", backward)):
        assert sorted(moves(plan, phase)) == sorted(
            (KINDS[c[2:]], "a", share[c[2:]] * (n - 1) / n * size[c[0]]) for c in casts
        )


def test_a_sum_owed_is_taken_before_a_function_that_is_not_linear():
    value = values(6, 6)
    x = placed(value, mesh(a=2), "_ _ {U:a}")
    z, (g,), plan = pulled(torch.exp, [x], values(6, 6, seed=1))
    assert z.layout is sw.Layout("_ _")
    close(z, value.exp())
    close(g, value.exp() * values(6, 6, seed=1))
    assert (moves(plan, "forward"), moves(plan, "backward")) == ([("all_reduce", "a", 36.0)], [])


BINARY = ["add", "sub", "mul", "div", "maximum", "pow", "hypot", "logaddexp"]


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize(
    "shapes", [[(6, 6), (6, 6)], [(6, 6), (6,)], [(6, 1), (1, 6)], [(6, 6), ()]]
)
def test_binary_functions_in_any_layout_on_one_axis(name, shapes):
    found = report(getattr(torch, name), shapes, operands=positive)
    assert not found.wrong, found.wrong[:3]
    cut = {"(6, 6)": 2, "(6,)": 1, "(6, 1)": 1, "(1, 6)": 1, "()": 0}
    both = [cut[str(s)] for s in shapes]
    total = (both[0] + 3) * (both[1] + 3)
    clash = {((6, 6), (6, 6)): 2, ((6, 6), (6,)): 1, ((6, 1), (1, 6)): 1}.get(tuple(shapes), 0)
    assert (len(found.right), len(found.choice)) == (2 * (total - clash), 2 * clash)


def positive(shapes, rng):
    return [torch.rand(s, generator=rng, dtype=torch.float64) + 0.5 for s in shapes]


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("axes", [2, 3])
def test_binary_functions_in_random_layouts_on_more_axes(name, axes):
    for shapes in ([(6, 12), (6, 12)], [(12, 6), (6,)]):
        found = report(getattr(torch, name), shapes, axes=axes, operands=positive, samples=50)
        assert not found.wrong, found.wrong[:3]


INTEGER = {"bitwise_not"}


@pytest.mark.parametrize("name", [n for n in pointwise.UNARY if n not in INTEGER])
def test_unary_functions_equal_torch(name):
    def inside(shapes, rng):  # of every function's domain
        return [
            torch.rand(s, generator=rng, dtype=torch.float64) * 0.5
            + (1.25 if name == "acosh" else 0.25)
            for s in shapes
        ]

    function = getattr(torch, name)
    found = report(function, [(6, 6)], operands=inside)
    assert not found.wrong, found.wrong[:3]
    assert len(found.right) == 10


@pytest.mark.parametrize("name", pointwise.ACTIVATIONS)
def test_activations_equal_torch(name):
    function = getattr(torch.nn.functional, name)
    call = (lambda x: function(x, 0.1, 2.0)) if name == "threshold" else function
    found = report(call, [(6, 6)])
    assert not found.wrong, found.wrong[:3]
    assert len(found.right) == 10


OPERATORS = [
    operator.add, operator.sub, operator.mul, operator.truediv, operator.pow,
    operator.mod, operator.floordiv,
    operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
]  # fmt: skip


@pytest.mark.parametrize("op", OPERATORS, ids=lambda o: o.__name__)
@pytest.mark.parametrize("text", ["_/a _", "_ _", "_ _ {R:a}", "_ _ {U:a}"])
@pytest.mark.parametrize("other", [2, 0.5, True, "tensor", "numpy"])
def test_operators_take_numbers_and_plain_tensors_on_both_sides(op, text, other):
    value = values(6, 6).abs() + 1
    x = placed(value, mesh(a=2), text)
    number = {"tensor": values(6, 6, seed=3).abs() + 1, "numpy": np.float64(1.5)}.get(other, other)
    if op in (operator.mod, operator.floordiv, operator.eq, operator.ne) and text.endswith("{U:a}"):
        value = sw.reshard(x, "_ _").full_tensor()  # these see the last bit of a sum
    if op is operator.sub and other is True:
        return  # torch refuses it
    close_or_equal(op(x, number), op(value, number))
    close_or_equal(op(number, x), op(number, value))


def close_or_equal(actual, expected):
    if expected.dtype.is_floating_point:
        close(actual, expected)
    else:
        assert torch.equal(actual.full_tensor(), expected)


def test_logical_operators_and_masks():
    a, b = values(6) > 0, values(6, seed=1) > 0
    x, y = sw.shard(a, mesh(a=2), "n/a"), sw.shard(b, mesh(a=2))
    for got, want in (
        (x & y, a & b),
        (x | y, a | b),
        (x ^ y, a ^ b),
        (~x, ~a),
        (True & x, a),
        (a | y, a | b),
    ):
        assert torch.equal(got.full_tensor(), want)
        assert got.dtype == torch.bool


@pytest.mark.parametrize("name", ["add", "sub"])
@pytest.mark.parametrize("left", [True, False])
def test_a_number_beside_a_sum_counts_once(name, left):
    value = values(6)
    x = placed(value, mesh(a=3), "_ {U:a}")
    op = getattr(operator, name)
    z = op(x, 2.5) if left else op(2.5, x)
    assert z.layout.unreduced == {"a"}
    close(z, op(value, 2.5) if left else op(2.5, value))
    close(torch.add(x, 1.0, alpha=3), value + 3)
    close(torch.sub(x, placed(values(6), mesh(a=3), "_"), alpha=2), value - 2 * values(6))


def test_a_number_over_a_sum_is_not_linear_in_it():
    value = values(6).abs() + 1
    x = placed(value, mesh(a=2), "_ {U:a}")
    assert (x / 2).layout.unreduced == {"a"}
    z = 1 / x
    assert not z.layout.unreduced
    close(z, 1 / value)


def test_a_cast_to_integers_takes_the_sum_first():
    value = torch.tensor([0.6, 1.5, -2.7], dtype=torch.float64)
    x = placed(value, mesh(a=2), "_ {U:a}")
    assert torch.equal(x.to(torch.int64).full_tensor(), torch.tensor([0, 1, -2]))
    assert x.to(torch.float32).layout.unreduced == {"a"}
    assert x.bool().full_tensor().all()
    assert torch.equal(x.sum(dtype=torch.int64).full_tensor(), value.sum(dtype=torch.int64))


@pytest.mark.parametrize("mode", ["floor", "trunc"])
def test_a_rounded_quotient_takes_the_sum_first(mode):
    value = torch.tensor([3.5, -7.25, 9.75], dtype=torch.float64)
    x = placed(value, mesh(a=2), "_ {U:a}")
    assert torch.div(x, 2.0).layout.unreduced == {"a"}
    close(torch.div(x, 2.0, rounding_mode=mode), torch.div(value, 2.0, rounding_mode=mode))


@pytest.mark.parametrize("low", [0, 0.0, None])
def test_clamp_promotes_as_torch_does(low):
    value = torch.arange(6) - 3
    x = sw.shard(value, mesh(a=2), "n/a")
    for bounds in ((low, 1), (low, 1.5), (None, 2)):
        got, want = torch.clamp(x, *bounds), torch.clamp(value, *bounds)
        assert got.dtype == want.dtype
        assert torch.equal(got.full_tensor(), want)


def test_where_lets_a_sum_pass_only_beside_zero():
    value, mask = values(6), values(6, seed=1) > 0
    x, m = placed(value, mesh(a=2), "_ {U:a}"), sw.shard(mask, mesh(a=2))
    passed, plan = ran(lambda: torch.where(m, x, 0.0))
    assert passed.layout.unreduced == {"a"}
    assert not plan.collectives
    close(passed, torch.where(mask, value, 0.0))
    close(torch.where(m, 0, x), torch.where(mask, 0, value))
    summed = torch.where(m, x, 1.0)
    assert not summed.layout.unreduced
    close(summed, torch.where(mask, value, 1.0))
    close(x.masked_fill(m, 2.0), value.masked_fill(mask, 2.0))


def test_fused_names_equal_torch():
    a, b, c = values(6), values(6, seed=1), values(6, seed=2)
    for text in ("_/a", "_", "_ {U:a}"):
        x = placed(a, mesh(a=2), text)
        y, z = placed(b, mesh(a=2), "_"), placed(c, mesh(a=2), "_/a" if text == "_/a" else "_")
        close(torch.addcmul(x, y, z, value=0.5), torch.addcmul(a, b, c, value=0.5))
        close(torch.addcdiv(x, y, z, value=0.5), torch.addcdiv(a, b, c, value=0.5))
        close(torch.lerp(x, y, 0.25), torch.lerp(a, b, 0.25))
        close(torch.lerp(x, y, z), torch.lerp(a, b, c))


def test_functions_without_a_derivative_have_no_gradient():
    x = placed(values(6), mesh(a=2), "_/a")

    def f(x):
        assert not (x > 0).requires_grad
        assert not torch.floor(x).requires_grad
        assert (x * 1).requires_grad
        return (torch.floor(x) * x).sum()

    close(sw.grad(f)(x), values(6).floor())


def test_shapes_that_do_not_fit_say_so(golden):
    on = mesh(a=2)
    with pytest.raises(ValueError, match="do not fit") as caught:
        placed(values(4, 6), on, "_/a _") + placed(values(5), on, "_")
    golden("broadcast", str(caught.value))


@pytest.mark.parametrize("shapes", [((0,), (1,)), ((1,), (0,)), ((0, 6), (6,)), ((2, 0), (2, 1))])
def test_empty_tensors_broadcast_as_in_torch(shapes):
    a, b = (values(*s) for s in shapes)
    x, y = (sw.shard(v, mesh(a=2)) for v in (a, b))
    assert (x + y).shape == (a + b).shape
    assert math.prod((x * y).full_tensor().shape) == 0
