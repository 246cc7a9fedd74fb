"""AdamW in one pass equals AdamW in plain operations, and its bits do not depend on the mesh."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import shardwise as sw
from shardwise import optim
from shardwise.kernels import adamw as kernels
from shardwise.optim import fused

MODULES = [sys.modules[f"shardwise.optim.{name}"] for name in ("adam", "adamw")]
SHAPES = {"w": (24, 20), "b": (7,), "stack": (4, 3, 10), "scale": ()}
LAYOUTS: dict[str, dict[str, str]] = {
    "whole": dict.fromkeys(SHAPES, "..."),
    "rows": {"w": "i/x j", "b": "n", "stack": "l/x i j", "scale": ""},
    "columns": {"w": "i j/x", "b": "n", "stack": "l i j/y", "scale": ""},
    "both": {"w": "i/y j/x", "b": "n", "stack": "l/x i j/y", "scale": ""},
}
SCHEDULE = optim.schedules.warmup_cosine(0.1, warmup=2, steps=10)


def values(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=rng).to(dtype) for k, s in SHAPES.items()}


@contextmanager
def plain() -> Iterator[None]:
    """No one pass: plain operations."""
    real = [m.one_pass for m in MODULES]
    for m in MODULES:
        m.one_pass = lambda *a, **k: None
    try:
        yield
    finally:
        for m, f in zip(MODULES, real, strict=True):
            m.one_pass = f


@contextmanager
def counted() -> Iterator[list[bool]]:
    """Whether each pass that was asked for was made."""
    made: list[bool] = []
    real = [m.one_pass for m in MODULES]

    def count(f: Callable[..., Any]) -> Callable[..., Any]:
        def run(*a: Any, **k: Any) -> Any:
            result = f(*a, **k)
            made.append(result is not None)
            return result

        return run

    for m, f in zip(MODULES, real, strict=True):
        m.one_pass = count(f)
    try:
        yield made
    finally:
        for m, f in zip(MODULES, real, strict=True):
            m.one_pass = f


def trained(
    opt: Any, layout: str = "whole", dtype: torch.dtype = torch.float32, *,
    donate: bool = False, steps: int = 3, sizes: tuple[int, int] = (2, 2),
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Parameters and means after some steps, as whole tensors."""
    mesh = sw.make_mesh({"x": sizes[0], "y": sizes[1]})
    params = sw.shard(values(0, dtype), mesh, LAYOUTS[layout])
    state = opt.init(params)
    for i in range(steps):
        grads = sw.shard(values(i + 1, dtype), mesh, LAYOUTS[layout])
        params, state = opt.step(grads, state, params, donate=donate)
    found = {f"p.{k}": p.full_tensor() for k, p in params.items()}
    for name in ("mu", "nu"):
        found |= {f"{name}.{k}": x.full_tensor() for k, x in state[name].items()}
    return found


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "opt",
    [optim.adamw(0.1), optim.adam(0.1), optim.adamw(SCHEDULE, mask="w", weight_decay=0.3)],
    ids=["adamw", "adam", "mask and schedule"],
)
def test_one_pass_equals_plain_operations(opt: Any, layout: str, donate: bool) -> None:
    with counted() as made:
        found = trained(opt, layout, donate=donate)
    assert made
    assert all(made)
    with plain():
        wanted = trained(opt, layout)
    for k, x in found.items():
        # Rounded in other sums: three steps, each a few units in the last place of numbers below 4.
        torch.testing.assert_close(x, wanted[k], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_the_bits_do_not_depend_on_the_mesh(layout: str) -> None:
    wanted = trained(optim.adamw(0.1), sizes=(1, 1))
    for k, x in trained(optim.adamw(0.1), layout).items():
        assert torch.equal(x, wanted[k]), k


@pytest.mark.filterwarnings("ignore:zero. 2 parameters cannot be cut:UserWarning")
@pytest.mark.parametrize("stage", [1, 2])
def test_zero_stages_have_the_same_bits(stage: int) -> None:
    mesh = sw.make_mesh({"z": 2})
    opt = optim.zero(optim.adamw(0.1), stage, axis="z")
    params = sw.shard(values(0, torch.float32), mesh, dict.fromkeys(SHAPES, "..."))
    state = opt.init(params)
    for i in range(3):
        grads = sw.shard(values(i + 1, torch.float32), mesh, dict.fromkeys(SHAPES, "..."))
        params, state = opt.step(grads, state, params)
    wanted = trained(optim.adamw(0.1), sizes=(1, 1))
    for k, p in params.items():
        assert torch.equal(p.full_tensor(), wanted[f"p.{k}"]), k


def test_a_donated_step_writes_over_its_operands_and_takes_them_away() -> None:
    mesh = sw.make_mesh({"x": 1})
    params = sw.shard(values(0, torch.float32), mesh)
    opt = optim.adamw(0.1)
    state = opt.init(params)
    grads = sw.shard(values(1, torch.float32), mesh)
    before = {k: p.shards[0].clone() for k, p in params.items()}
    opt.step(grads, state, params)
    assert all(torch.equal(p.shards[0], before[k]) for k, p in params.items())
    places = {k: p.shards[0].data_ptr() for k, p in params.items()}
    places |= {f"mu.{k}": p.shards[0].data_ptr() for k, p in state["mu"].items()}
    owned = opt.step(grads, state, params)  # of memory that nobody else has
    at = {k: p.shards[0].data_ptr() for k, p in owned[0].items()}
    new, after = opt.step(grads, owned[1], owned[0], donate=True)
    assert {k: p.shards[0].data_ptr() for k, p in new.items()} == at
    with pytest.raises(sw.LayoutError, match="donated"):
        owned[0]["w"].full_tensor()
    with pytest.raises(sw.LayoutError, match="donated"):
        owned[1]["mu"]["w"].full_tensor()
    assert after["step"].full_tensor().item() == 2
    assert grads["w"].full_tensor().isfinite().all()


def test_strided_shards_and_recorded_steps_have_the_same_bits() -> None:
    mesh = sw.make_mesh({"x": 2})
    held = values(0, torch.float32)["w"]
    opt = optim.adamw(0.1)
    found = []
    for block in (held, held.T.contiguous().T):
        p = {"w": sw.from_local([block, block.clone()], mesh, "i j")}
        with sw.record():
            found.append(opt.step(p, opt.init(p), p)[0]["w"].full_tensor())
        found.append(opt.step(p, opt.init(p), p)[0]["w"].full_tensor())
    assert all(torch.equal(x, found[0]) for x in found[1:])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_other_dtypes_and_traces_are_plain() -> None:
    with counted() as made:
        trained(optim.adamw(0.1), dtype=torch.float64, steps=1)
        trained(optim.adamw(0.1), dtype=torch.bfloat16, steps=1)
    assert made
    assert not any(made)
    mesh = sw.make_mesh({"x": 1})
    p = sw.shard(values(0, torch.float32), mesh)
    opt = optim.adamw(0.1)
    state = opt.init(p)
    with counted() as made:
        new, _ = sw.jit(lambda g, s, q: opt.step(g, s, q))(p, state, p)
    assert made
    assert not any(made)
    for k, x in opt.step(p, state, p)[0].items():
        torch.testing.assert_close(new[k].full_tensor(), x.full_tensor(), rtol=1e-6, atol=1e-6)


def test_means_in_bfloat16_are_formed_in_float32() -> None:
    """A mean of squares that keeps 0.999 of itself stands still where each product is rounded."""
    p = torch.ones(1, dtype=torch.bfloat16)
    mesh = sw.make_mesh({"x": 1})
    params = {"w": sw.shard(p, mesh)}
    opt = optim.adamw(0.1, b2=0.9)
    state = opt.init(params)
    exact, nearest = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.bfloat16)
    for i in range(5):
        g = torch.full((1,), 0.3 + 0.1 * i, dtype=torch.bfloat16)
        _, state = opt.step({"w": sw.shard(g, mesh)}, state, params)
        exact = nearest.double() * 0.9 + g.double() ** 2 * (1 - 0.9)
        nearest = exact.to(torch.bfloat16)
        assert torch.equal(state["nu"]["w"].full_tensor(), nearest)


@pytest.mark.parametrize("state_dtype", [None, torch.float32], ids=["bf16", "fp32 means"])
def test_stochastic_rounding_is_that_of_the_whole_tensors(state_dtype: Any) -> None:
    """Each layout gives the bits of the kernel's twin on whole tensors, with keys by path."""
    opt = optim.adamw(0.1, rounding="stochastic", seed=5, state_dtype=state_dtype)
    found = [trained(opt, layout, torch.bfloat16, donate=d) for layout in LAYOUTS for d in (0, 1)]
    p = values(0, torch.bfloat16)
    wide = state_dtype or torch.bfloat16
    mu, nu = ({k: torch.zeros(s, dtype=wide) for k, s in SHAPES.items()} for _ in range(2))
    key = torch.tensor(sw.random.key(5).words)
    places = [n for s in SHAPES.values() for n in kernels.numbers(s, (0,) * len(s), s) or ()]
    names = torch.tensor([kernels.name_words(k) for k in p])
    for i in range(3):
        factors = torch.tensor(
            [
                math.sqrt(1 - 0.999 ** (i + 1)),
                -0.1 / (1 - 0.9 ** (i + 1)),
                1 - 0.1 * 0.01,
            ],
            dtype=torch.float64,
        )
        keys = kernels.adamw_keys(key, torch.tensor(i), names)
        g = values(i + 1, torch.bfloat16)
        lists = [list(x.values()) for x in (p, g, mu, nu)]
        new = kernels.adamw(*lists, factors, 0.9, 0.999, 1e-8, keys, places)
        p, mu, nu = (dict(zip(SHAPES, column, strict=True)) for column in new)
    for each in found[1:]:
        assert all(torch.equal(x, found[0][k]) for k, x in each.items())
    for k, x in p.items():
        # The sum before it is rounded may differ by a unit of float32: one element in 10^4 at most.
        assert (found[0][f"p.{k}"] != x).double().mean() <= 0.002, k
    assert not torch.equal(found[0]["p.w"], trained(optim.adamw(0.1), dtype=torch.bfloat16)["p.w"])


def test_places_are_those_of_the_layout() -> None:
    mesh = sw.make_mesh({"x": 2, "y": 2})
    x = sw.full((4, 6, 8), 0.0, mesh, "a/x b c/y")
    assert fused.places(x._type) == (
        kernels.numbers((4, 6, 8), (0, 0, 0), (2, 6, 4)),
        kernels.numbers((4, 6, 8), (0, 0, 4), (2, 6, 4)),
        kernels.numbers((4, 6, 8), (2, 0, 0), (2, 6, 4)),
        kernels.numbers((4, 6, 8), (2, 0, 4), (2, 6, 4)),
    )
