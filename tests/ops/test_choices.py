"""Errors of ops, to the letter; every fix of a choice runs, is right, moves what it says."""

from __future__ import annotations

import linecache
import random

import pytest
import torch
from check import close, placed
from gallery import mesh, values

import shardwise as sw
from shardwise import ops
from shardwise.ops.audit import layouts_of


def program(line: int, text: str, **names):
    """Run a program whose first line stands at `line` of train.py; its namespace."""
    source = "\n" * (line - 1) + text
    linecache.cache["train.py"] = (len(source), None, source.splitlines(True), "train.py")
    names.update(sw=sw, ops=ops, torch=torch)
    exec(compile(source, "train.py", "exec"), names)
    return names


def refused(text: str, line: int = 12, error=sw.LayoutError, **names):
    with pytest.raises(error) as caught:
        program(line, text, **names)
    return caught.value


class Params:
    """A node of the user's with attributes."""

    def __init__(self, w):
        self.w = w


def test_an_axis_that_is_wanted_twice_is_the_example_of_the_manual(golden):
    on = mesh(data=2, tensor=4)
    x = sw.shard(torch.randn(8, 64), on, "b/data k/tensor")
    w = sw.shard(torch.randn(64, 32), on, "k n/tensor")
    error = refused(
        "def loss(x, w):\n    params = Params(w)\n    return (x @ params.w).sum()\n"
        "sw.value_and_grad(loss, argnums=(0, 1))(x, w)\n",
        line=10, x=x, w=w, Params=Params,
    )  # fmt: skip
    assert (error.kind, error.op, error.source) == ("choice", "matmul", "train.py:12")
    assert [fix.bytes for fix in error.fixes] == [768, 1536]
    golden("wanted_twice", str(error))


def test_the_same_choice_without_gradients_and_as_a_call(golden):
    on = mesh(data=2, tensor=4)
    names = {
        "x": sw.shard(torch.randn(8, 64), on, "b/data k/tensor"),
        "w": sw.shard(torch.randn(64, 32), on, "k n/tensor"),
    }
    texts = ("x @ w", "torch.matmul(x, w)", "x.matmul(w)", "ops.einsum('b k, k n -> b n', x, w)",
             "torch.nn.functional.linear(x, w.transpose(0, 1))",
             "getattr(ops, 'matmul')(*[x, w])")  # fmt: skip
    golden("choices", "\n".join(str(refused(text, **names)) for text in texts))


def test_other_choices_say_what_is_wanted(golden):
    on = mesh(a=2, b=3)

    def place(layout, *shape):
        return placed(values(*shape), on, layout)

    said = [
        refused("x + y", x=place("_/a _", 6, 6), y=place("_ _/a", 6, 6)),
        refused("x * y", x=place("_/a/b _", 6, 6), y=place("_/b/a _", 6, 6)),
        refused("x @ y", x=place("_ _/a/b", 6, 6), y=place("_/b/a _", 6, 6)),
        refused("x @ y", x=place("_/a _", 6, 6), y=place("_ _/a", 6, 6)),
        refused("x - y", x=place("_/a _/b", 6, 6), y=place("_/b _/a", 6, 6)),
    ]
    assert all(error.kind == "choice" and error.fixes for error in said)
    golden("other_choices", "\n".join(map(str, said)))


def test_values_that_no_device_knows_are_not_given(golden):
    on = mesh(a=2, b=3)
    said = []
    for layout, shape in (
        ("{U:a,b}", ()),
        ("_/a", (2,)),
        ("_ {U:a}", (1,)),
        ("_/a", (6,)),
        ("_", (3,)),
    ):
        x = placed(values(*shape), on, layout)
        for text in ("x.item()", "float(x)", "bool(x)", "int(x)", "if x: pass"):
            error = refused(text, x=x)
            assert error.kind == ("unreduced" if "U" in layout else "meaningless")
            said.append(str(error))
    golden("scalars", "\n".join(said))


@pytest.mark.parametrize("layout", ["", "{R:a}", "{R:a,b}"])
def test_replicated_and_reduced_scalars_are_numbers(layout):
    x = placed(torch.tensor(2.5), mesh(a=2, b=3), layout)
    assert (x.item(), float(x), bool(x), int(x)) == (2.5, 2.5, True, 2)


def test_meshes_are_not_mixed(golden):
    one, two = mesh(a=2), mesh(b=2)
    x, y, z = (
        placed(values(4, 4), one, "_/a _"),
        placed(values(4, 4), two, "_/b _"),
        placed(values(4, 4), one.at(a=0), "_ _"),
    )
    said = [
        refused(text, x=x, y=y, z=z, error=sw.MeshError)
        for text in (
            "x + y",
            "x @ z",
            "torch.where(x > 0, x, y)",
            "ops.einsum('a b, b c -> a c', x, y)",
        )
    ]
    golden("mixed_meshes", "\n".join(map(str, said)))


def test_nothing_is_written_in_place(golden):
    x = placed(values(4), mesh(a=2), "_/a")
    plain = values(4)
    before = [s.clone() for s in x.shards]
    texts = ("x.add_(1)", "x[0] = 1", "x.zero_()", "torch.relu_(x)", "p.add_(x)",
             "torch.add(x, x, out=p)", "ops.add(x, x, out=p)",
             "torch.nn.functional.relu6(x, inplace=True)", "torch.nn.init.normal_(x)")  # fmt: skip
    said = [
        f"{type(e).__name__}: {e}"
        for e in (refused(t, error=(TypeError, sw.LayoutError), x=x, p=plain) for t in texts)
    ]
    golden("in_place", "\n".join(said))
    for a, b in zip(before, x.shards, strict=True):
        assert torch.equal(a, b)
    y = x
    y += 1
    assert y is not x
    close(x, values(4))


def test_an_op_without_a_rule_is_named(golden):
    x = placed(values(4, 4), mesh(a=2), "_/a _")
    texts = ("torch.linalg.eigvals(x)", "x.geqrf()", "torch.fft.fft(x)")
    said = [refused(text, x=x) for text in texts]
    assert all(error.kind == "no rule" for error in said)
    golden("no_rule", "\n".join(map(str, said)))


def test_a_plain_tensor_that_needs_a_gradient_is_no_constant(golden):
    x = placed(values(4), mesh(a=2), "_/a")
    p = values(4).requires_grad_()
    said = [refused(text, x=x, p=p) for text in ("x * p", "p + x", "torch.where(x > 0, x, p)")]
    golden("plain_grad", "\n".join(map(str, said)))
    with torch.no_grad():
        close(x * p, values(4) ** 2)


def test_unknown_names_come_with_the_nearest(golden):
    on = mesh(data=2, tensor=2)
    x = placed(values(4, 4), on, "_/data _")
    texts = ("sw.reshard(x, 'b/date k')", "sw.shard(torch.ones(4), x.mesh, 'b/tensr')",
             "x.mesh.at(dat=0)", "x.mesh.refine('tnsor', row=2)",
             "ops.matmul(x, x, over={'tenso': 'm'})",
             "ops.matmul(x, x, out='_/dta _')")  # fmt: skip
    said = [refused(text, error=(sw.MeshError, sw.LayoutError), x=x) for text in texts]
    golden("unknown_axis", "\n".join(map(str, said)))


def forward(text, names):
    with sw.record() as plan:
        result = eval(text, names)
    return result, plan


def choice_of(call, x, y):
    """The error of a call that is a choice, which must offer fixes; None where it runs."""
    try:
        program(1, call, x=x, y=y)
    except sw.LayoutError as error:
        refusal = error
    else:
        return None
    assert refusal.kind == "choice", refusal
    assert refusal.fixes, refusal
    return refusal


CALLS = {
    "x + y": torch.add,
    "x * y": torch.mul,
    "ops.maximum(x, y)": torch.maximum,
    "x @ y": torch.matmul,
    "torch.matmul(x, y)": torch.matmul,
    "ops.einsum('m k, n k -> n m', x, y)": lambda x, y: y @ x.T,
}


@pytest.mark.parametrize(
    "sizes", [{"a": 2}, {"a": 3}, {"a": 2, "b": 3}, {"a": 2, "b": 1, "c": 2}], ids=str
)
@pytest.mark.parametrize("call", CALLS)
def test_every_fix_runs_is_right_and_moves_its_bytes(call, sizes):
    on = mesh(**sizes)
    shape = (6, 6) if "c" not in sizes else (4, 4)
    a, b = values(*shape), values(*shape, seed=1)
    want = CALLS[call](a, b)
    every = list(layouts_of(shape, on))
    draw = random.Random(0)
    pairs = [(draw.choice(every), draw.choice(every)) for _ in range(60 if len(sizes) > 1 else 40)]
    tried = 0
    for one, two in pairs:
        x, y = placed(a, on, one), placed(b, on, two)
        names = {"x": x, "y": y, "ops": ops, "sw": sw, "torch": torch}
        error = choice_of(call, x, y)
        for fix in error.fixes if error else ():
            result, plan = forward(fix.code, names)
            close(result, want, fix.code)
            assert int(plan.bytes()) == fix.bytes, (str(error), fix, str(plan))
            tried += 1
    assert tried


def test_fixes_are_ordered_by_their_bytes():
    on = mesh(data=2, tensor=4)
    x = sw.shard(torch.randn(8, 64), on, "b/data k/tensor")
    w = sw.shard(torch.randn(64, 32), on, "k n/tensor")
    error = refused("x @ w", x=x, w=w)
    assert [f.bytes for f in error.fixes] == sorted(f.bytes for f in error.fixes)
