"""Optimizers equal torch.optim, on every mesh; norms and clipping equal torch's."""

from __future__ import annotations

import pytest
import torch

import shardwise as sw
from shardwise import optim
from shardwise.optim import schedules

SHAPES = {"w": (8, 12), "b": (12,), "stack": (3, 4, 6)}
LAYOUTS = {
    "whole": dict.fromkeys(SHAPES, "..."),
    "cut": {"w": "a/data b/tensor", "b": "a/tensor", "stack": "l a/data b/tensor"},
    "mixed": {"w": "a/tensor/data b", "b": "a", "stack": "l a b/data"},
}


def values(seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=rng, dtype=torch.float64) for k, s in SHAPES.items()}


@pytest.mark.parametrize("layouts", LAYOUTS)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_equals_torch(layouts: str, decay: float) -> None:
    mesh = sw.make_mesh({"data": 2, "tensor": 2})
    theirs = {k: v.clone().requires_grad_() for k, v in values(0).items()}
    other = torch.optim.AdamW(
        theirs.values(), lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=decay
    )
    opt = optim.adamw(1e-2, b2=0.99, eps=1e-6, weight_decay=decay)
    params = sw.shard(values(0), mesh, LAYOUTS[layouts])
    state = opt.init(params)
    for step in range(20):
        grads = values(step + 1)
        for k, p in theirs.items():
            p.grad = grads[k].clone()
        other.step()
        params, state = opt.step(sw.shard(grads, mesh, LAYOUTS[layouts]), state, params)
    for k, p in params.items():
        assert p.layout is sw.shard(values(0), mesh, LAYOUTS[layouts])[k].layout
        torch.testing.assert_close(p.full_tensor(), theirs[k].detach(), rtol=1e-12, atol=1e-12)
    assert optim.get(state, "step").item() == 20


@pytest.mark.parametrize("layouts", LAYOUTS)
def test_clipping_equals_torch(layouts: str) -> None:
    mesh = sw.make_mesh({"data": 2, "tensor": 2})
    grads = values(1)
    leaves = [v.clone().requires_grad_() for v in values(0).values()]
    for leaf, g in zip(leaves, grads.values(), strict=True):
        leaf.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_(leaves, 0.7)
    clip = optim.clip_by_global_norm(0.7)
    params = sw.shard(values(0), mesh, LAYOUTS[layouts])
    with sw.record() as plan:
        clipped, state = clip.update(
            sw.shard(grads, mesh, LAYOUTS[layouts]), clip.init(params), params
        )
    assert plan.count() <= 2  # one scalar sum; the axes that cut leaves differ in "mixed"
    assert optim.get(state, "norm").item() == pytest.approx(float(norm), rel=1e-12)
    for g, leaf in zip(clipped.values(), leaves, strict=True):
        torch.testing.assert_close(g.full_tensor(), leaf.grad, rtol=1e-12, atol=1e-12)


def test_a_norm_of_parts_is_refused() -> None:
    mesh = sw.make_mesh({"data": 2})
    g = {"w": sw.full((4,), 1.0, mesh, "n {U:data}")}
    with pytest.raises(
        sw.LayoutError, match=r"global_norm: w is f32\[4\]\{U:data\}, still a sum"
    ) as e:
        optim.global_norm(g)
    assert e.value.kind == "unreduced"


def test_weight_decay_mask_takes_paths() -> None:
    mesh = sw.make_mesh({"data": 1})
    opt = optim.adamw(0.1, weight_decay=0.5, mask="w*")
    params = {"w": sw.full((2,), 1.0, mesh), "b": sw.full((2,), 1.0, mesh)}
    zero = {k: sw.zeros((2,), mesh) for k in params}
    params, _ = opt.step(zero, opt.init(params), params)
    assert params["w"].full_tensor().tolist() == pytest.approx([0.95, 0.95])
    assert params["b"].full_tensor().tolist() == [1.0, 1.0]


def test_a_step_is_layout_stable_and_writes_nothing_in_place() -> None:
    mesh = sw.make_mesh({"data": 2, "tensor": 2})
    opt = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(schedules.cosine(1e-2, 10)))
    params = sw.shard(values(0), mesh, LAYOUTS["cut"])
    state = opt.init(params)
    before = [p.full_tensor().clone() for p in sw.tree.leaves(params)]
    grads = sw.shard(values(1), mesh, LAYOUTS["cut"])
    sw.check_stable(lambda p, s: opt.step(p, s, p), params, state)
    opt.step(grads, state, params)
    after = [p.full_tensor() for p in sw.tree.leaves(params)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (schedules.constant(0.3), [0.3] * 5),
        (schedules.linear(1.0, 0.0, 4), [1.0, 0.75, 0.5, 0.25, 0.0]),
        (schedules.cosine(2.0, 4), [2.0, 1.70710678, 1.0, 0.29289322, 0.0]),
        (schedules.warmup_cosine(1.0, warmup=2, steps=4), [0.5, 1.0, 1.0, 0.5, 0.0]),
    ],
)
def test_schedules(schedule: schedules.Function, expected: list[float]) -> None:
    mesh = sw.make_mesh({"data": 2})
    plain = [float(schedule(torch.tensor(i))) for i in range(5)]
    sharded = [schedule(sw.full((), i, mesh)).item() for i in range(5)]
    assert plain == pytest.approx(expected, abs=1e-6)
    assert sharded == pytest.approx(expected, abs=1e-6)


def test_bad_uses_are_named() -> None:
    with pytest.raises(ValueError, match="two transforms have one name"):
        optim.chain(optim.adamw(1.0), optim.adamw(1.0))
    mesh = sw.make_mesh({"data": 1})
    state = optim.adamw(1.0).init({"w": sw.zeros((2,), mesh)})
    with pytest.raises(KeyError, match="did you mean 'step'"):
        optim.get(state, "stop")
