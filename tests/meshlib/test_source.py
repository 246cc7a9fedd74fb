"""The user's line and words, read from the frame that called the library."""

from __future__ import annotations

import linecache
from contextlib import suppress

import pytest

from shardwise.meshlib import source

# program, number of operands, the names found, is it an operator
CALLS = [
    ("f(x, y)", ("x", "y"), False),
    ("x.f(y)", ("x", "y"), False),
    ("f('a b -> b', x, y)", ("x", "y"), False),
    ("f(2, x, y)", ("x", "y"), False),
    ("f(n, x, y)", ("x", "y"), False),  # a name of something else is no operand
    ("f(x, p['w'])", ("x", "p['w']"), False),
    ("f(f(x), y)", None, False),  # the inner call has one operand only
    ("f(*[x, y])", (), False),
    ("f(x,\n  y)", (), False),
    ("f(x, y) + 1", ("x", "y"), False),
]


class Thing:
    def f(self, other):
        return see(self, other)


def see(*operands):
    found.append(source.user_call([o for o in operands if isinstance(o, Thing)]))


found: list[source.Call] = []


def run(text):
    """Run a program at line 3 of user.py, whose helper `f` stands for an op of the library."""
    found.clear()
    padded = "\n\n" + text
    linecache.cache["user.py"] = (len(padded), None, padded.splitlines(True), "user.py")
    x, y = Thing(), Thing()
    names = {"f": see, "x": x, "y": y, "n": 3, "p": {"w": y}}
    exec(compile(padded, "user.py", "exec"), names)


@pytest.fixture
def _see_is_ours(monkeypatch):
    """Frames of this file count as the library's, so that the user's is the program's."""
    monkeypatch.setattr(source, "_INNER", (*source._INNER, __file__))


@pytest.mark.usefixtures("_see_is_ours")
@pytest.mark.parametrize(("text", "names", "is_operator"), CALLS)
def test_operands_are_named_in_the_users_words(text, names, is_operator):
    with suppress(TypeError):  # a program may go on to add None to a number
        run(text)
    call = found[-1]
    assert call.line == "user.py:3"
    if names is not None:
        assert call.operands == names
        assert call.is_operator is is_operator


def test_an_expression_is_rewritten_in_place():
    call = source.Call("", "x @ params.w", ("x", "params.w"), ((0, 1), (4, 12)), True)
    assert call.replaced({1: "g(params.w)"}) == "x @ g(params.w)"
    assert call.replaced({0: "a", 1: "b"}) == "a @ b"
    assert call.replaced({}) == "x @ params.w"


def test_the_line_is_the_users_not_the_librarys():
    import shardwise as sw

    with sw.record() as plan:
        sw.reshard(sw.full((4,), 1.0, sw.make_mesh({"a": 2}, device="cpu"), "_/a"), "_")
    assert plan.collectives[0].source.startswith("test_source.py:")
