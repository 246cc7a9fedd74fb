"""The conversion table: values, adjoints, backward rows, forward mode, vmap, memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from check import close, moves, paired, placed, pulled, ran
from gallery import mesh, rng, values

import shardwise as sw
from shardwise.layouts.convert import TABLE, Convert, Step, convert, convert_shards
from shardwise.ops.audit import split

NAMES = {"I": "replicated", "R": "reduced", "U": "unreduced"}

# DESIGN section 3: row -> what it does, the backward row, what that does
ROWS = {
    ("S", "R"): ("all_gather", ("U", "S"), "reduce_scatter"),
    ("S", "I"): ("all_gather", ("I", "S"), "slice"),
    ("S", "S"): ("all_to_all", ("S", "S"), "all_to_all"),
    ("U", "S"): ("reduce_scatter", ("S", "R"), "all_gather"),
    ("U", "I"): ("all_reduce", ("I", "R"), "none"),
    ("U", "R"): ("all_reduce", ("U", "R"), "all_reduce"),
    ("I", "S"): ("slice", ("S", "I"), "all_gather"),
    ("I", "R"): ("none", ("U", "I"), "all_reduce"),
    ("I", "U"): ("keep", ("R", "I"), "none"),
    ("R", "S"): ("slice", ("S", "U"), "place"),
    ("R", "I"): ("none", ("I", "U"), "keep"),
    ("R", "U"): ("keep", ("R", "U"), "keep"),
    ("S", "U"): ("place", ("R", "S"), "slice"),
}
MOVING = {"all_gather", "reduce_scatter", "all_reduce", "all_to_all"}


def cost(verb: str, full: int, n: int) -> float:
    """Elements per device by the ring convention, of a tensor with `full` elements on the axis."""
    if n == 1 or verb not in MOVING:
        return 0
    share = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "all_to_all": 1 / n}[verb]
    return share * (n - 1) / n * full


def instances(ndim: int = 2):
    """Every row with every dim that it can cut: (from, to), as layouts over axis a."""
    for before, after in ROWS:
        for i in range(ndim) if before == "S" else (None,):
            for j in range(ndim) if after == "S" else (None,):
                if i is None or i != j:
                    yield before, after, i, j


def text(letter: str, dim: int | None, ndim: int = 2) -> str:
    if letter == "S":
        return " ".join("_/a" if d == dim else "_" for d in range(ndim))
    return " ".join("_" * ndim) + (f" {{{letter}:a}}" if letter in "RU" else "")


ROWS_AND_SIZES = [(*row, n) for row in instances() for n in (1, 2, 3, 4)]


def test_the_table_is_the_design():
    assert {row: verb for row, verb in TABLE.items() if "V" not in row} == {
        row: verb for row, (verb, _, _) in ROWS.items()
    }
    for row, (_, dual, verb) in ROWS.items():
        step = Step(mesh(a=2), ("a",), *(NAMES.get(s, i) for i, s in enumerate(row)))
        assert (step.dual.letters, step.dual.verb) == (dual, verb)
        assert step.dual.dual == step


@pytest.mark.parametrize(("before", "after", "i", "j", "n"), ROWS_AND_SIZES)
def test_a_row_keeps_the_value_and_its_gradient_is_its_adjoint(before, after, i, j, n):
    on = mesh(a=n)
    value = values(12, 12)
    x = placed(value, on, text(before, i))
    to = NAMES.get(after, j)
    cotangent = values(12, 12, seed=5)
    y, (back,), plan = pulled(lambda x: convert(x, "a", to), [x], cotangent)
    assert y.layout is sw.Layout(text(after, j))
    assert back.layout is x.layout.dual
    close(y, value)
    close(back, cotangent)
    given = split(cotangent, on, y.layout.dual, rng(1))
    assert paired(y, given) == pytest.approx(paired(x, back), rel=1e-12)
    verb, _, backward = ROWS[before, after]
    for phase, what in (("forward", verb), ("backward", backward)):
        moved = cost(what, 144, n)
        assert moves(plan, phase) == ([(what, "a", moved)] if moved else [])


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("before", "after", "i", "j", "n"), [r for r in ROWS_AND_SIZES if r[-1] == 3]
)
def test_forward_mode_and_vmap_commute_with_a_row(before, after, i, j, n):
    on = mesh(a=n)
    step = Step(on, ("a",), NAMES.get(before, i), NAMES.get(after, j))
    x = placed(values(6, 6), on, text(before, i)).shards
    t = placed(values(6, 6, seed=1), on, text(before, i), seed=1).shards

    def f(*shards):
        return tuple(convert_shards(step, shards, None))

    plain, tangent = torch.func.jvp(f, x, t)
    for got, want in zip((*plain, *tangent), (*f(*x), *f(*t)), strict=True):
        assert torch.equal(got, want)
    both = [torch.stack([a, b], 1) for a, b in zip(x, t, strict=True)]
    for got, one, two in zip(
        torch.func.vmap(f, in_dims=1, out_dims=1)(*both), f(*x), f(*t), strict=True
    ):
        assert torch.equal(got, torch.stack([one, two], 1))

    def loss(*shards):
        return sum((y**3).sum() for y in f(*shards))

    gradient = torch.func.grad(loss, argnums=tuple(range(n)))
    mapped = torch.func.vmap(gradient, in_dims=1)(*both)
    for got, one, two in zip(mapped, gradient(*x), gradient(*t), strict=True):
        torch.testing.assert_close(got, torch.stack([one, two]), rtol=1e-13, atol=1e-13)
    mapped_jvp = torch.func.vmap(lambda a: torch.func.jvp(f, a, a)[1], in_dims=1)(tuple(both))
    for got, one in zip(mapped_jvp, f(*x), strict=True):
        assert torch.equal(got[0], one)


@pytest.mark.parametrize(
    ("before", "after", "i", "j", "n"), [r for r in ROWS_AND_SIZES if r[-1] in (2, 3)]
)
def test_second_derivatives_go_through_a_row(before, after, i, j, n):
    on = mesh(a=n)
    value, v = values(6, 6), values(6, 6, seed=1)
    x = placed(value, on, text(before, i))
    to = NAMES.get(after, j)

    def f(x):
        return (convert(x, "a", to) ** 3).sum()

    def along(x):
        g = sw.grad(f)(x)
        return (g * placed(v, on, "_ _")).sum()

    plain = value.clone().requires_grad_()
    want = torch.func.grad(lambda x: (torch.func.grad(lambda y: (y**3).sum())(x) * v).sum())(plain)
    close(sw.grad(f)(x), 3 * value**2)
    close(sw.grad(along)(x), want)


JOINT = [
    ("U", "replicated", "all_reduce", 1.5),
    ("U", "reduced", "all_reduce", 1.5),
    ("U", 0, "reduce_scatter", 0.75),
]


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize(("before", "to", "verb", "volume"), JOINT)
def test_a_set_of_axes_moves_in_one_joint_group(before, to, verb, volume, order):
    on = mesh(a=2, b=2)
    value = values(8, 4)
    x = placed(value, on, "_ _ {U:a,b}")
    y, plan = ran(lambda: convert(x, order, to))
    close(y, value)
    assert [(c.kind, c.elements, set(c.axes)) for c in plan.collectives] == [
        (verb, volume * 32, {"a", "b"})
    ]
    if to == 0:
        assert y.layout.dims == (order, ())


@pytest.mark.parametrize("n", list(itertools.product((2, 3), (1, 2))))
def test_joint_rows_are_adjoint_too(n):
    on = mesh(a=n[0], b=n[1])
    value, cotangent = values(12, 12), values(12, 12, seed=3)
    for start, axes, to in [
        ("_ _ {U:a,b}", ("b", "a"), 1),
        ("_ _ {R:a,b}", ("a", "b"), 0),
        ("_ _", ("a", "b"), "unreduced"),
        ("_/a/b _", ("a", "b"), "reduced"),
        ("_/b/a _", ("b", "a"), 1),
        ("_/a/b _", ("a", "b"), "unreduced"),
        ("_/a/b _", ("b",), 1),
        ("_/a _/b", ("b",), 0),
    ]:
        x = placed(value, on, start)
        y, (back,), _ = pulled(lambda x, axes=axes, to=to: convert(x, axes, to), [x], cotangent)
        close(y, value)
        close(back, cotangent)
        assert paired(y, split(cotangent, on, y.layout.dual, rng(1))) == pytest.approx(
            paired(x, back)
        )


def test_what_no_row_does_says_so(golden):
    on = mesh(a=2, b=2)
    x = placed(values(8, 6), on, "_/a/b _")
    said = []
    for start, axes, to in [
        (x, "a", "replicated"),
        (x, ("b",), "varying"),
        (placed(values(8, 6), on, "_/a _ {U:b}"), ("a", "b"), "replicated"),
        (placed(values(5, 6), on, "_ _ {U:a}"), "a", 0),
        (x, "c", "replicated"),
    ]:
        try:
            said.append(str(convert(start, axes, to)))
        except (sw.LayoutError, sw.MeshError) as error:
            said.append(str(error))
    golden("convert", "\n".join(said))


def test_many_readers_of_a_replicated_tensor_cost_one_backward_all_reduce():
    on = mesh(a=3)
    w = placed(values(6), on, "_")
    x = placed(values(6, 6), on, "_/a _")

    def loss(w):
        return ((x * w).sum() + (x @ w).sum() + (x * convert(w, "a", "reduced")).sum()) * 1.0

    (_, g), plan = ran(lambda: sw.value_and_grad(loss)(w))
    assert plan.count(kind="all_reduce", phase="backward") == 1
    close(g, 3 * values(6, 6).sum(0))


def test_casting_back_returns_the_original():
    w = placed(values(6), mesh(a=2), "_")

    def loss(w):
        there = convert(w, "a", "reduced")
        assert convert(there, "a", "replicated") is w
        assert convert(w, "a", "reduced")._shards[0] is there._shards[0]
        return (there * there).sum()

    _, plan = ran(lambda: sw.grad(loss)(w))
    assert plan.count(phase="backward") == 1


@pytest.mark.parametrize("first", [True, False])
def test_a_cast_is_not_remembered_across_grad_modes(first):
    w = placed(values(6), mesh(a=2), "_")
    x = placed(values(6, 6), mesh(a=2), "_/a _")

    def loss(w):
        if first:
            with torch.no_grad():
                convert(w, "a", "reduced")
                x * w
        y = (x * w).sum()
        if not first:
            with torch.no_grad():
                x * w
        return y + (x * w).sum()

    close(sw.grad(loss)(w), 2 * values(6, 6).sum(0))


@pytest.mark.parametrize("to", ["reduced", "unreduced", 0])
def test_a_conversion_under_no_grad_gives_a_constant(to):
    w = placed(values(6), mesh(a=2), "_")

    def loss(w):
        with torch.no_grad():
            fixed = convert(w, "a", to)
        assert not fixed.requires_grad
        return (fixed * w).sum()

    close(sw.grad(loss)(w), values(6))


def test_sums_can_be_taken_in_a_wider_dtype_both_ways():
    on = mesh(a=4)
    small = torch.tensor([[256.0], [1.0], [1.0], [1.0]]).bfloat16()
    u = sw.from_local([row.clone() for row in small], on, "_ {U:a}")
    for to, options in itertools.product(("replicated", 0), ({}, {"reduce_dtype": torch.float32})):
        if to == 0:
            u = sw.from_local([row.repeat(4) for row in small], on, "_ {U:a}")
        y = convert(u, "a", to, **options)
        assert y.dtype == torch.bfloat16
        assert float(y.full_tensor()[0]) == (260.0 if options else 256.0)  # 259 rounds to 260
    w = sw.shard(torch.ones(1).bfloat16(), on)
    parts = sw.from_local(list(small), on, "_/a")

    def loss(w, options):
        return (convert(w, "a", "reduced", **options) * parts).sum()

    for options, want in (({}, 256.0), ({"reduce_dtype": torch.float32}, 260.0)):
        assert float(sw.grad(lambda w, o=options: loss(w, o))(w).full_tensor()) == want


def test_every_conversion_is_a_node_on_every_device():
    x = placed(values(6), mesh(a=3), "_")

    def f(x):
        y = convert(x, "a", "unreduced")
        assert all(s.grad_fn is not None and Convert.__name__ in s.grad_fn.name() for s in y.shards)
        return y.sum()

    sw.grad(f)(x)
