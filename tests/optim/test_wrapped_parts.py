"""Wrappers at their edges: no gradients at all, narrow parameters, every number injected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizers import AXES, LAYOUTS, close, run, values

import shardwise as sw
from shardwise import optim

GRADS = [values(i + 1) for i in range(2)]


# no gradients at all


@pytest.mark.parametrize(
    "wrap",
    [
        optim.skip_nonfinite,
        optim.loss_scale,
        lambda t: optim.chain(optim.clip_by_global_norm(1.0), t),
    ],
)
def test_a_part_without_gradients_is_left_alone(wrap: Any) -> None:
    mesh, layouts = sw.make_mesh(AXES), LAYOUTS["two dims"]
    params = sw.shard(values(0), mesh, layouts)
    opt = optim.multi({"w": wrap(optim.sgd(0.1, momentum=0.9)), "*": optim.sgd(0.1)})
    grads = {**sw.shard(GRADS[0], mesh, layouts), "w": None}
    state = opt.init(params)
    new, after = opt.step(grads, state, params)
    updates, also = opt.update(grads, state, params)
    assert new["w"] is params["w"]
    assert updates["w"] is None
    assert not torch.equal(new["b"].full_tensor(), params["b"].full_tensor())
    for leaf in ("mu", "norm", "skipped", "scale", "good"):
        for path, x in sw.tree.items(state["w"]):
            if leaf in path.split(".") and x is not None:
                found = dict(sw.tree.items(after["w"]))[path], dict(sw.tree.items(also["w"]))[path]
                assert all(torch.equal(y.full_tensor(), x.full_tensor()) for y in found)


# means of narrow parameters


@pytest.mark.parametrize("wrap", [lambda t: t, optim.master])
def test_a_mean_of_bfloat16_parameters_moves(wrap: Any) -> None:
    mesh = sw.make_mesh({"x": 2})
    params = {"w": sw.full((4,), 1.0, mesh, "n/x", dtype=torch.bfloat16)}
    grads = {"w": sw.full((4,), -1.0, mesh, "n/x", dtype=torch.bfloat16)}
    opt = optim.ema(wrap(optim.sgd(0.5)), 0.999)
    state = opt.init(params)
    mean, p = 1.0, 1.0
    for _ in range(4):
        params, state = opt.step(grads, state, params)
        p += 0.5
        mean += 0.001 * (p - mean)
    assert state["ema"]["w"].dtype is torch.float32
    assert state["ema"]["w"].full_tensor().tolist() == pytest.approx([mean] * 4, rel=1e-6)


# numbers in the state that no foreach function takes


@pytest.mark.parametrize(
    ("factory", "hyper"),
    [
        (optim.adafactor, {"lr": 0.1, "eps": 1e-3, "clip": 0.5, "eps_scale": 1e-2}),
        (optim.came, {"lr": 0.1, "clip": 0.5}),
        (optim.galore, {"lr": 0.1, "rank": 2, "scale": 0.5, "eps": 1e-6}),
        (optim.muon, {"lr": 0.1, "eps": 1e-3, "momentum": 0.5}),
        (optim.lars, {"lr": 0.1, "trust": 0.5, "eps": 1e-3}),
        (optim.lamb, {"lr": 0.1, "eps": 1e-3}),
        (optim.adam8bit, {"lr": 0.1, "eps": 1e-3, "b1": 0.5}),
        (optim.clip_by_value, {"limit": 0.5}),
        (optim.clip_by_global_norm, {"limit": 0.5}),
        (optim.scale, {"factor": 0.5}),
    ],
)
def test_numbers_of_every_optimizer_may_be_injected(factory: Any, hyper: Any) -> None:
    only = {k: v for k, v in values(0).items() if k in ("w", "tall", "stack")}
    grads = [{k: g[k] for k in only} for g in GRADS[:2]]
    plain, _ = run(factory(**hyper), only, grads, "two dims")
    injected, state = run(optim.inject(factory, **hyper), only, grads, "two dims")
    close(injected, plain)
    assert set(state["hyper"]) == {k for k, v in hyper.items() if isinstance(v, float)}
