"""Operations on lists as one a tensor: equal bits, and what others see is written as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from shardwise.ops.transforms import unrolled

List = list[Tensor]


def given() -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.rand(n, 3, dtype=torch.float64, generator=rng) + 0.5 for n in (4, 5, 4, 5)]


def lists(module: GraphModule) -> int:
    return sum("_foreach_" in str(n.target) for n in module.graph.nodes)


def left(f: Callable[[List, List], Any], fewest: int = 0) -> int:
    """How many operations on lists a pass leaves; values are the same bits, inputs included."""

    def flat(*xs: Tensor) -> Any:
        return f(list(xs[:2]), list(xs[2:]))

    module = make_fx(flat, tracing_mode="fake")(*given())
    assert lists(module)
    want, after = given(), given()
    wanted = module(*want)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unrolled, "FEWEST", fewest)
        unrolled.unrolled(module)
        module.graph.lint()
        module.recompile()
        first = str(module.graph)
        unrolled.unrolled(module)
        assert str(module.graph) == first
    found = module(*after)
    for a, b in zip([*found, *after], [*wanted, *want], strict=True):
        assert torch.equal(a, b)
    return lists(module)


t: Any = torch
OPS: dict[str, Callable[[List, List], Any]] = {
    "add": lambda a, b: t._foreach_add(a, b, alpha=3),
    "add number": lambda a, b: t._foreach_add(a, 2.0),
    "sub": lambda a, b: t._foreach_sub(a, b),
    "mul numbers": lambda a, b: t._foreach_mul(a, [2.0, 3.0]),
    "mul tensor": lambda a, b: t._foreach_mul(a, b[0][0, 0]),
    "div": lambda a, b: t._foreach_div(a, b),
    "lerp number": lambda a, b: t._foreach_lerp(a, b, 0.3),
    "lerp": lambda a, b: t._foreach_lerp(a, b, t._foreach_sqrt(b)),
    "addcmul": lambda a, b: t._foreach_addcmul(a, b, a, 0.5),
    "addcdiv": lambda a, b: t._foreach_addcdiv(a, b, a, value=0.5),
    "pow": lambda a, b: t._foreach_pow(a, 3.0),
    "maximum": lambda a, b: t._foreach_maximum(a, b),
    "sqrt, neg": lambda a, b: t._foreach_sqrt(t._foreach_abs(t._foreach_neg(a))),
}


@pytest.mark.parametrize("name", OPS)
def test_each_result_has_its_own_operation(name: str) -> None:
    assert left(OPS[name]) == 0


def test_small_tensors_and_unknown_operations_stay_lists() -> None:
    assert left(OPS["add"], fewest=14) == 1  # 13.5 elements on average
    assert left(OPS["add"], fewest=13) == 0
    assert left(lambda a, b: t._foreach_clamp_min(a, 0.7)) == 1
    assert left(lambda a, b: t._foreach_clamp_max(a, [0.7, 0.8])) == 1


def test_writes_to_own_results_become_results() -> None:
    def f(a: List, b: List) -> Any:
        new = t._foreach_mul(a, 0.9)
        early = [x.sum() for x in new]  # read before the write
        t._foreach_addcmul_(new, b, b, 0.1)
        t._foreach_add_(new, b, alpha=2)
        return *early, *new, *t._foreach_sqrt(new)

    assert left(f) == 0


def test_writes_to_what_others_see_stay() -> None:
    def inputs(a: List, b: List) -> Any:
        t._foreach_add_(a, b)
        return [x * 2 for x in a]

    def mixed(a: List, b: List) -> Any:
        new = t._foreach_mul(a, 2.0)
        t._foreach_add_([new[0], a[1]], b)
        return new

    def seen(a: List, b: List) -> Any:
        new = t._foreach_mul(a, 2.0)
        rows = [x.view(-1) for x in new]
        t._foreach_add_(new, b)
        return rows  # which show what is written later

    assert [left(f) for f in (inputs, mixed, seen)] == [1, 1, 1]
