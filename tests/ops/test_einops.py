"""rearrange, reduce and repeat against einops, and einops' own functions on ShardedTensors."""

from __future__ import annotations

from typing import Any

import einops
import pytest
import torch
from check import close, placed
from gallery import mesh, values

import shardwise as sw
from shardwise.ops.audit import report

# pattern, sizes, shape, cuts (dim, axis size; None: any) that are a choice
REARRANGE: list[tuple[str, dict[str, int], tuple[int, ...], set[tuple[int, int | None]]]] = [
    ("a b c -> c a b", {}, (6, 6, 6), set()),
    ("a b c->(a b) c", {}, (6, 6, 6), {(1, None)}),
    ("a (b c) -> a b c", {"b": 2}, (6, 6), {(1, 3)}),
    ("a (b c) -> (c a) b", {"b": 3}, (6, 6), {(0, None), (1, 2)}),
    ("(a b) ... -> a ... b", {"b": 2}, (6, 6, 6), {(0, 2)}),
    ("a ... 1 -> 1 (a ...)", {}, (6, 6, 1), {(1, None)}),
    ("... i0 -> i0 ...", {}, (6, 6), set()),
    ("a b -> a 1 b ()", {}, (6, 6), set()),
]


def _cuts(shape: tuple[int, ...], choices: set[tuple[int, int | None]]) -> set[tuple[str, str]]:
    return {
        (f"mesh(a={n})", " ".join("_/a" if k == dim else "_" for k in range(len(shape))))
        for dim, size in choices
        for n in (2, 3)
        if size in (None, n)
    }


@pytest.mark.parametrize(("pattern", "sizes", "shape", "choices"), REARRANGE)
def test_rearrange_on_every_layout(
    pattern: str,
    sizes: dict[str, int],
    shape: tuple[int, ...],
    choices: set[tuple[int, int | None]],
) -> None:
    def theirs(x: Any) -> Any:
        return einops.rearrange(x, pattern, **sizes)

    found = report(lambda x: sw.ops.rearrange(x, pattern, **sizes), [shape], reference=theirs)
    assert not found.wrong, found.wrong[0]
    assert set(found.choice) == _cuts(shape, choices)
    found = report(theirs, [shape])  # einops itself, through the backend
    assert not found.wrong, found.wrong[0]
    assert set(found.choice) == _cuts(shape, choices)


@pytest.mark.parametrize(
    "pattern", ["a b c -> c (a b)", "a (b k) c -> b a (k c)", "... c -> c ..."]
)
@pytest.mark.parametrize("axes", [2, 3])
def test_rearrange_on_sampled_layouts(pattern: str, axes: int) -> None:
    sizes = {"k": 2} if "k" in pattern else {}
    found = report(
        lambda x: sw.ops.rearrange(x, pattern, **sizes),
        [(12, 12, 12)],
        reference=lambda x: einops.rearrange(x, pattern, **sizes),
        axes=axes,
        samples=25,
    )
    assert not found.wrong, found.wrong[0]
    assert found.right


@pytest.mark.parametrize(
    ("pattern", "sizes", "choices"),
    [
        ("a b -> (a k) b", {"k": 2}, set()),
        ("a b -> 2 a (k b)", {"k": 2}, {(1, None)}),
        ("a b -> a k b", {"k": 3}, set()),
        ("... -> ... 3", {}, set()),
    ],
)
def test_repeat_on_every_layout(
    pattern: str, sizes: dict[str, int], choices: set[tuple[int, int | None]]
) -> None:
    def theirs(x: Any) -> Any:
        return einops.repeat(x, pattern, **sizes)

    for op in (lambda x: sw.ops.repeat(x, pattern, **sizes), theirs):
        found = report(op, [(6, 6)], reference=theirs)
        assert not found.wrong, found.wrong[0]
        assert set(found.choice) == _cuts((6, 6), choices)
    found = report(
        lambda x: sw.ops.repeat(x, pattern, **sizes), [(6, 6)], reference=theirs, axes=2, samples=20
    )
    assert not found.wrong, found.wrong[0]


@pytest.mark.parametrize("kind", ["sum", "mean"])
@pytest.mark.parametrize(
    ("pattern", "sizes", "choices"),
    [
        ("(a k) b -> b a", {"k": 2}, {(0, 2)}),
        ("a b -> ", {}, set()),
        ("a ... -> () ...", {}, set()),
    ],
)
def test_linear_reductions_on_every_layout(
    kind: str, pattern: str, sizes: dict[str, int], choices: set[tuple[int, int | None]]
) -> None:
    def theirs(x: Any) -> Any:
        return einops.reduce(x, pattern, kind, **sizes)

    for op in (lambda x: sw.ops.reduce(x, pattern, kind, **sizes), theirs):
        found = report(op, [(6, 6)], reference=theirs)
        assert not found.wrong, found.wrong[0]
        assert set(found.choice) == _cuts((6, 6), choices)
    found = report(
        lambda x: sw.ops.reduce(x, pattern, kind, **sizes),
        [(6, 6)],
        reference=theirs,
        axes=2,
        samples=20,
    )
    assert not found.wrong, found.wrong[0]


@pytest.mark.parametrize("kind", ["max", "min", "prod"])
def test_other_reductions_agree_with_einops(kind: str) -> None:
    x = values(6, 4)
    y = placed(x, mesh(a=2), "_ _/a")
    want = einops.reduce(x, "(a k) b -> b a", kind, k=2)
    close(sw.ops.reduce(y, "(a k) b -> b a", kind, k=2), want)
    close(einops.reduce(y, "(a k) b -> b a", kind, k=2), want)


def test_any_and_all_and_a_function_of_dims() -> None:
    x = values(6, 4)
    y = placed(x, mesh(a=2), "_ _/a")
    for kind in ("any", "all"):
        want = einops.reduce(x > 0, "a b -> b", kind)
        assert torch.equal(sw.ops.reduce(y > 0, "a b -> b", kind).full_tensor(), want)
    close(sw.ops.reduce(y, "a b -> b", lambda v, dims: v.sum(dims)), x.sum(0))


def test_the_patterns_names_settle_a_choice() -> None:
    x = placed(values(2, 6, 4), mesh(a=2), "_ _/a _")
    with pytest.raises(sw.LayoutError) as caught:
        sw.ops.rearrange(x, "b s d -> (b s) d")
    assert caught.value.kind == "choice"
    want = einops.rearrange(x.full_tensor(), "b s d -> (b s) d")
    close(sw.ops.rearrange(x, "b s d -> (b s) d", over={"a": "b"}), want)
    assert str(sw.ops.rearrange(x, "b s d -> (b s) d", out="_ _/a").layout) == "_ _/a"


def test_lists_are_stacked_and_packing_works() -> None:
    a, b = values(4, 6), values(4, 6, seed=1)
    x, y = (placed(v, mesh(a=2), "_/a _") for v in (a, b))
    want = einops.rearrange([a, b], "k b c -> b (k c)")
    close(sw.ops.rearrange([x, y], "k b c -> b (k c)"), want)
    close(einops.rearrange([x, y], "k b c -> b (k c)"), want)
    packed, shapes = einops.pack([x, y.reshape(4, 2, 3)], "b *")
    close(packed, torch.cat([a, b], 1))
    close(einops.unpack(packed, shapes, "b *")[1], b.reshape(4, 2, 3))
    close(einops.einsum(x, y, "b c, b d -> c d"), a.T @ b)


def test_a_rearrangement_moves_nothing() -> None:
    x = placed(values(8, 6, 4), mesh(a=2), "_/a _ _")
    with sw.record() as plan:
        sw.ops.rearrange(x, "(b k) s d -> b (s k) d", k=2)
    assert not plan.collectives


@pytest.mark.parametrize(
    "call",
    [
        lambda x: sw.ops.rearrange(x, "a b c -> a b c"),
        lambda x: sw.ops.rearrange(x, "a b -> a"),
        lambda x: sw.ops.rearrange(x, "a b"),
        lambda x: sw.ops.rearrange(x, "(a c) b -> a c b"),
        lambda x: sw.ops.rearrange(x, "(a c) b -> a c b", c=5),
        lambda x: sw.ops.rearrange(x, "a b -> b a", c=5),
        lambda x: sw.ops.rearrange(x, "a 1 -> a"),
        lambda x: sw.ops.repeat(x, "a b -> a b k"),
        lambda x: sw.ops.repeat(x, "a b -> a 2"),
        lambda x: sw.ops.reduce(x, "a b -> a c", "sum"),
        lambda x: sw.ops.reduce(x, "a b -> a", "median"),
        lambda x: sw.ops.rearrange(x, "a b -> ... a b"),
    ],
)
def test_mistakes_are_einops_errors(call: Any) -> None:
    with pytest.raises(einops.EinopsError):
        call(placed(values(4, 6), mesh(a=2), "_/a _"))


def test_the_mean_of_integers_is_refused() -> None:
    x = sw.shard(torch.arange(4), mesh(a=2), "n/a")
    with pytest.raises(TypeError, match="cast"):
        sw.ops.reduce(x, "n -> ", "mean")
