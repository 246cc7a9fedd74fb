"""The layout grammar: what is written is what is read back, and what is wrong says so."""

from __future__ import annotations

import pytest
from gallery import mesh
from hypothesis import given
from strategies import cases, texts

import shardwise as sw
from shardwise.layouts.layout import resolve


@given(texts())
def test_any_string_prints_as_one_that_reads_back_as_itself(text):
    layout = sw.Layout(text)
    assert sw.Layout(str(layout)) is layout
    assert str(sw.Layout(str(layout))) == str(layout)
    assert layout.dual.dual is layout


@given(cases(count=1))
def test_any_layout_prints_as_a_string_that_reads_back_as_itself(case):
    (layout,) = case.layouts
    assert sw.Layout(str(layout)) is layout
    for axis in case.mesh.axes:
        state = layout.state(axis)
        swapped = {"unreduced": "reduced", "reduced": "unreduced"}.get(state, state)
        assert layout.dual.state(axis) == swapped


PRINTED = {
    "b/data s d/tensor {U:pipe}": "_/data _ _/tensor {U:pipe}",
    "": "",
    "x y": "_ _",
    "64/data 12": "_/data _",
    "_ {R:z,a U:pipe,data}": "_ {U:data,pipe R:a,z}",
    "_ {R:a} {U:b}": "_ {U:b R:a}",
    "{ U:a , b }": "{U:a,b}",
    "b/data/pipe{U:t}": "_/data/pipe {U:t}",
    "embed @host": "_ @host",
    "embed @pipe=0,-1 @host": "_ @host @pipe=0,-1",
    "n {V:a}": "_ {V:a}",
}


@pytest.mark.parametrize(("text", "printed"), list(PRINTED.items()))
def test_layouts_print_in_one_way(text, printed):
    assert str(sw.Layout(text)) == printed
    assert repr(sw.Layout(text)) == f"Layout({printed!r})"


def test_names_are_not_part_of_a_layout():
    assert sw.Layout("b/data s") is sw.Layout("q/data r") is sw.Layout("_/data 7")


WRONG = [
    "batch/data seq/data",
    "batch/data/data",
    "batch/data {U:data}",
    "batch {U:data R:data}",
    "... seq ...",
    "... seq/data {R:data} .../tensor",
    "batch se-q",
    "batch/ seq",
    "/data",
    "batch/data/",
    "batch {data}",
    "batch {X:data}",
    "batch {U:data",
    "batch U:data}",
    "batch {U:}",
    "batch {U:1}",
    "batch @gpu",
    "batch @pipe=x",
    "batch @host @disk",
    "batch @pipe=0 @pipe=1",
    "batch, seq",
]


def test_bad_strings_name_the_token_at_fault(golden):
    said = []
    for text in WRONG:
        with pytest.raises(sw.LayoutError) as caught:
            sw.Layout(text, 3)
        assert caught.value.kind == "parse"
        said.append(str(caught.value))
    golden("notation", "\n".join(said))


def test_layouts_that_do_not_fit_a_tensor_say_what_does_not(golden):
    on = mesh(data=2, tensor=4)
    x = sw.zeros((8, 6, 4), on)
    said = []
    for text in ("b s", "b s d e", "b/date s d", "b s/tensor d", "b s/data/tensor d", "a b c d ...",
                 "... d {R:tensr}"):  # fmt: skip
        with pytest.raises((sw.LayoutError, sw.MeshError)) as caught:
            sw.reshard(x, text)
        said.append(f"{type(caught.value).__name__}: {caught.value}")
    with pytest.raises(sw.LayoutError) as caught:
        sw.zeros((3, 5), on, ".../data")
    said.append(str(caught.value))
    with pytest.raises(sw.LayoutError) as caught:
        sw.Layout("... d")
    said.append(str(caught.value))
    with pytest.raises(sw.LayoutError) as caught:
        sw.Layout("b s", 3)
    said.append(str(caught.value))
    golden("layout_fit", "\n".join(said))


# has, string, what it means for a tensor of shape (8, 3, 12) on mesh(a=2, b=4)
UNSPOKEN = [
    ("_/a _ _", "...", "_/a _ _"),
    ("_/a _ _ {U:b}", "... d", "_/a _ _ {U:b}"),
    ("_/a _ _", "... d/b", "_/a _ _/b"),
    ("_/a _ _", "b ... d/a", "_ _ _/a"),
    ("_/a _ _", "... d/a", "_ _ _/a"),  # an axis that is named elsewhere leaves the unspoken dim
    ("_/a/b _ _", "... {R:a}", "_/b _ _ {R:a}"),  # a named state wins over an unspoken dim
    ("_/a _ _ {R:b}", "... {U:b}", "_/a _ _ {U:b}"),
    ("_ _ _ {U:a R:b}", "... s d/a", "_ _ _/a {R:b}"),
    ("_ _ _", ".../a", "_/a _ _"),
    ("_ _ _/b", ".../a", "_/a _ _/b"),
    ("_/b _ _", ".../a", "_/b/a _ _"),
    ("_/a _ _/b", ".../b", "_/a/b _ _"),
    ("_ _ _", "b .../b", "_ _ _/b"),  # the first that it divides: 12, not 3
    ("_ _ _", ".../b/a", "_/b/a _ _"),
    ("_ _ _ @host", "... d/a", "_ _ _/a @host"),
    ("_/a _ _", "b s d ...", "_ _ _"),
]


@pytest.mark.parametrize(("has", "text", "means"), UNSPOKEN)
def test_three_dots_keep_what_is_not_spoken_about(has, text, means):
    on = mesh(a=2, b=4)
    assert resolve(text, 3, sw.Layout(has), (8, 3, 12), on) is sw.Layout(means)


def test_a_new_tensor_has_nothing_where_dots_stand():
    on = mesh(a=2, b=4)
    assert sw.zeros((8, 3), on, "...").layout is sw.Layout("_ _")
    assert sw.zeros((8, 3), on, "... d").layout is sw.Layout("_ _")
    assert sw.zeros((3, 8), on, ".../b {U:a}").layout is sw.Layout("_ _/b {U:a}")
