"""Dispatch: repeated calls, types that sizes do not change, texts that point elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import shardwise as sw


def placed(shape: tuple[int, ...], layout: str, **axes: int) -> sw.ShardedTensor:
    return sw.shard(
        torch.arange(float(torch.Size(shape).numel())).reshape(shape), sw.make_mesh(axes), layout
    )


SINGLE: dict[str, Callable[[Any], Any]] = {
    "unbind": lambda x: x.unbind(0),
    "split": lambda x: x.split(1, 0),
    "chunk": lambda x: x.chunk(1, 0),
}


@pytest.mark.parametrize("name", SINGLE)
def test_a_list_of_one_stays_a_list_when_called_again(name: str) -> None:
    x = placed((1, 6), "l e/a", a=2)
    for _ in range(3):
        (only,) = SINGLE[name](x)
        assert only.full_tensor().flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_a_stack_of_one_layer_trains_for_several_steps() -> None:
    w = {"w": placed((1, 6, 6), "layer a b/x", x=2)}
    x = placed((4, 6), "n a", x=2)

    def loss(w: Any) -> Any:
        y, _ = sw.scan(lambda y, p: (sw.reshard(y @ p["w"], "n a"), None), x, w)
        return y.sum()

    for _ in range(3):
        _, grads = sw.value_and_grad(loss)(w)
        w = sw.tree.map(lambda p, g: p - 0.1 * g, w, grads)
    assert w["w"].layout is sw.Layout("_ _ _/x")


@pytest.mark.parametrize("transport", ["simulated", "abstract"])
def test_flops_are_those_of_one_device(transport: Any) -> None:
    mesh = sw.make_mesh({"a": 4}, transport=transport)
    x, w = sw.zeros((8, 16), mesh, "m/a k"), sw.zeros((16, 8), mesh, "k n")
    with sw.record() as plan:
        x @ w
    assert plan.flops == plan.ops[0].flops == 2 * 2 * 16 * 8
    with sw.record() as plan:
        w.T @ w
    assert plan.flops == 2 * 8 * 16 * 8


MERGES: dict[str, Callable[[Any], Any]] = {
    "flatten": lambda x: x.flatten(),
    "reshape": lambda x: x.reshape(2, -1),
    "tile": lambda x: x.tile((2,)),
    "exp": lambda x: x.exp(),
    "sum": lambda x: x.sum(0),
}


LAYOUTS = ("m/b n/a", "m n/a", "m/a n", "m/b/a n")
# Which part of a divided dim its second axis cuts does depend on sizes: docs/architecture.md.
CASES = [(n, to) for n in MERGES for to in LAYOUTS if (n, to) != ("reshape", "m/b/a n")]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_types_do_not_depend_on_axis_sizes(name: str, layout: str) -> None:
    def typed(a: int, b: int) -> str:
        try:
            return str(MERGES[name](placed((24, 12), layout, a=a, b=b)).layout)
        except sw.LayoutError as error:
            return error.kind

    assert len({typed(a, b) for a, b in ((1, 1), (2, 1), (1, 2), (2, 2))}) == 1


def test_fixes_of_a_method_with_a_signed_number_run() -> None:
    x = placed((12, 6), "a b/x", x=2)
    with pytest.raises(sw.LayoutError) as error:
        x.reshape(-1)
    assert error.value.fixes
    for fix in error.value.fixes:
        code = compile(fix.code, "fix", "eval")
        made = eval(code, {"x": x, "sw": sw})
        assert made.full_tensor().tolist() == x.full_tensor().flatten().tolist()


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda x: F.dropout(x, 0.5), r"sw\.nn\.dropout\(x, rate, key\)"),
        (lambda x: x.sum().backward(), r"sw\.value_and_grad\(f\)"),
        (lambda x: x.numpy(), r"x\.full_tensor\(\)"),
        (lambda x: x.requires_grad_(), r"sw\.grad\(f, argnums"),
        (lambda x: torch.rand_like(x), r"sw\.random\.uniform"),
    ],
)
def test_what_means_something_else_here_says_what_to_use(use: Any, words: str) -> None:
    with pytest.raises(sw.LayoutError, match=words):
        use(placed((4, 2), "a/x b", x=2))


def test_a_plan_refuses_unknown_kinds_and_axes() -> None:
    x = placed((4, 2), "a/x b", x=2)
    with sw.record() as plan:
        sw.reshard(x, "a b")
    with pytest.raises(ValueError, match="did you mean 'all_reduce'"):
        plan.count(kind="all_reduc")
    with pytest.raises(sw.MeshError, match="unknown axis 'z'"):
        plan.count(axis="z")


def test_a_scalar_formats_as_its_number() -> None:
    mesh = sw.make_mesh({"x": 2})
    assert f"{sw.full((), 1.25, mesh):.1f}" == "1.2"
    assert f"{sw.full((), 1.25, mesh)}" == "f32[]"
    with pytest.raises(sw.LayoutError, match="still a sum"):
        f"{sw.full((), 1.25, mesh, '{U:x}'):.1f}"


def test_a_plain_input_of_a_norm_is_a_constant() -> None:
    g = placed((6,), "n", x=2)
    y = F.layer_norm(torch.ones(4, 6), (6,), g)
    assert y.full_tensor().abs().max() == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: sw.ops.add(torch.ones(2), torch.ones(2)),  # pyright: ignore
        lambda: sw.ops.add(1, 2),  # pyright: ignore
    ],
)
def test_operands_without_a_mesh_are_refused(call: Any) -> None:
    with pytest.raises(TypeError, match="no operand is a ShardedTensor"):
        call()
