"""ZeRO on Gloo processes trains as on a simulated mesh, and each process holds its share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import launch

import shardwise as sw
from shardwise import models, optim, strategies

pytestmark = pytest.mark.processes
STEPS = 3


def training(stage: int) -> dict[str, Any]:
    """A tiny GPT-2 after some donated steps: parameters, volumes, bytes of the state."""
    mesh = sw.make_mesh({"data": 2, "tensor": 2})
    strategy = strategies.fsdp() if stage == 3 else strategies.data()
    double = sw.Precision(torch.float64, torch.float64, torch.float64)
    strategy = (strategy * strategies.tensor_1d()).replace(precision=double)
    config = models.GPT2Config(layer=2, embed=16, heads=4, vocab=24, position=8)
    model = models.gpt2(config, strategy)
    params = model.init(sw.random.key(0), mesh)
    tokens = torch.arange(32).reshape(4, 8) % 24
    batch = sw.shard({"tokens": tokens, "labels": tokens}, mesh, strategy["tokens"])
    t = optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(0.01, eps=1e-4))
    opt = optim.zero(t, stage)
    state = opt.init(params)
    vg = sw.value_and_grad(model.loss, grads=opt.grads)
    with sw.record() as plan:
        for _ in range(STEPS):
            _, grads = vg(params, batch)
            params, state = opt.step(grads, state, params, donate=True)
    moments = [x for x in sw.tree.leaves(state["adamw"]) if x.ndim]
    return {
        "bytes": sum(x.shards[0].untyped_storage().nbytes() for x in moments),
        "whole": sum(x.numel() * 8 for x in moments),
        "moved": plan.elements(axis="data"),
        "params": {k: p.full_tensor() for k, p in sw.tree.items(params)},
    }


def program() -> dict[str, Any]:
    """All stages."""
    return {str(stage): training(stage) for stage in (0, 1, 2, 3)}


def test_stages_on_processes_equal_the_simulated_mesh() -> None:
    expected = program()
    outcomes = launch(program, 4)
    for outcome in outcomes:
        for stage, found in outcome.value.items():
            for key in ("bytes", "whole", "moved"):
                assert found[key] == expected[stage][key], (stage, key)
            for path, p in found["params"].items():
                for reference in (expected[stage], expected["0"]):
                    torch.testing.assert_close(
                        p, reference["params"][path], rtol=1e-12, atol=1e-12, msg=f"{stage} {path}"
                    )
    whole = expected["0"]["bytes"]
    assert all(expected[stage]["bytes"] == whole // 2 for stage in "123")
