"""Factor rules: strings to signatures, "..." aligned from the right, broadcast sizes."""

from __future__ import annotations

import pytest

from shardwise.ops.rules import Rule, expand, make, parse, pointwise


def test_a_rule_string_names_the_factors_of_every_dim():
    assert parse("m k, k n -> m n") == (((("m",), ("k",)), (("k",), ("n",))), ((("m",), ("n",)),))
    assert parse("(a b) 1 c -> a b c") == (((("a", "b"), (), ("c",)),), ((("a",), ("b",), ("c",)),))
    assert parse("n ->") == (((("n",),),), ((),))
    assert parse("n -> n, n")[1] == ((("n",),), (("n",),))


@pytest.mark.parametrize("text", ["m k", "a -> b -> c", "a? -> a", "(a -> a", "a+b -> a"])
def test_what_cannot_be_read_is_named(text):
    with pytest.raises(ValueError, match="rule"):
        parse(text)


def test_dots_stand_for_dims_aligned_from_the_right():
    assert expand("..., ... -> ...", (3, 1)) == (
        ((("i2",), ("i1",), ("i0",)), (("i0",),)),
        ((("i2",), ("i1",), ("i0",)),),
    )
    assert expand("b ... n, n -> ... n", (4, 1))[1] == ((("i1",), ("i0",), ("n",)),)
    with pytest.raises(ValueError, match="does not fit"):
        expand("m k -> m", (3,))
    with pytest.raises(ValueError, match="does not fit"):
        expand("... m k -> ... m", (1,))


SHAPES = [  # shapes, the factors of operand 0, of operand 1, sizes
    ([(6, 4), (6, 4)], [("i1",), ("i0",)], [("i1",), ("i0",)], {"i1": 6, "i0": 4}),
    ([(6, 4), (1, 4)], [("i1",), ("i0",)], [(), ("i0",)], {"i1": 6, "i0": 4}),
    ([(6, 1), (1, 4)], [("i1",), ()], [(), ("i0",)], {"i1": 6, "i0": 4}),
    ([(1, 4), (4,)], [("i1",), ("i0",)], [("i0",)], {"i1": 1, "i0": 4}),
    ([(1,), (1,)], [("i0",)], [("i0",)], {"i0": 1}),
    ([(0, 4), (1, 4)], [("i1",), ("i0",)], [(), ("i0",)], {"i1": 0, "i0": 4}),
    ([(1, 4), (0, 4)], [(), ("i0",)], [("i1",), ("i0",)], {"i1": 0, "i0": 4}),
]


@pytest.mark.parametrize(("shapes", "first", "second", "sizes"), SHAPES)
def test_a_broadcast_size_one_loses_its_factor(shapes, first, second, sizes):
    rule = make(pointwise([len(s) for s in shapes]), shapes)
    assert rule.inputs == (tuple(first), tuple(second))
    assert rule.sizes == sizes


@pytest.mark.parametrize("shapes", [[(6,), (4,)], [(0,), (4,)], [(4,), (0,)], [(2, 3), (3, 2)]])
def test_sizes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match="do not fit"):
        make(pointwise([len(s) for s in shapes]), shapes)


def test_what_a_rule_says_is_kept():
    rule = make(
        "v e, n -> n e",
        [(8, 4), (6,)],
        lookup={"v"},
        linear=(0,),
        blocked={"n"},
        reduced={"e": "max"},
    )
    assert (rule.lookup, rule.linear, rule.blocked, rule.reduced) == (
        {"v"},
        {0},
        {"n"},
        {"e": "max"},
    )
    assert rule.factors(rule.inputs[0]) == {"v", "e"}
    assert Rule(((),), ((),)).factors(()) == frozenset()
