"""A run that stops and goes on ends with the bits of one that did not stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from disks import same
from gallery import mesh

import shardwise as sw
from shardwise import models, optim, strategies

CONFIG = models.GPT2Config(layer=2, embed=16, heads=4, vocab=32, position=8, dropout=0.1)
WHERE = {
    "data": (mesh(data=4), strategies.data()),
    "fsdp and 1d": (mesh(data=2, tensor=2), strategies.fsdp() * strategies.tensor_1d()),
    "fsdp": (mesh(data=4), strategies.fsdp()),
}


class Run:
    """Training whose whole state is one tree: parameters, moments, key and position."""

    def __init__(self, name: str) -> None:
        self.mesh, self.strategy = WHERE[name]
        self.model = models.gpt2(CONFIG, self.strategy)
        self.optimizer = optim.adamw(1e-2)
        params = self.model.init(sw.random.key(0), self.mesh)
        self.state: dict[str, Any] = {
            "params": params,
            "opt": self.optimizer.init(params),
            "key": sw.random.key(1),
            "seen": 0,
            "losses": [0.0],
        }

    def step(self) -> None:
        s = self.state
        rng = torch.Generator().manual_seed(s["seen"])
        tokens = torch.randint(0, 32, (4, 9), generator=rng)
        batch = sw.shard(
            {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}, self.mesh, "batch/data seq"
        )
        key, now = sw.random.split(s["key"], 2)
        loss, grads = sw.value_and_grad(lambda p: self.model.loss(p, batch, key=now))(s["params"])
        params, opt = self.optimizer.step(grads, s["opt"], s["params"])
        self.state = {
            "params": params,
            "opt": opt,
            "key": key,
            "seen": s["seen"] + 4,
            "losses": [loss.item()],
        }


@pytest.mark.parametrize("name", WHERE)
def test_resuming_three_times_is_bitwise_one_run(tmp_path: Path, name: str) -> None:
    straight = Run(name)
    for _ in range(6):
        straight.step()
    for step in (2, 4, 6):
        run = Run(name)  # a new program
        if sw.checkpoint.latest(tmp_path) is not None:
            run.state = sw.checkpoint.restore(tmp_path, run.state)
        for _ in range(2):
            run.step()
        sw.checkpoint.save(tmp_path, run.state, step=step, keep=1, wait=step != 4).wait()
    assert same(sw.checkpoint.restore(tmp_path, straight.state), straight.state)


@pytest.mark.parametrize("after", WHERE)
def test_going_on_elsewhere_loads_the_same_numbers(tmp_path: Path, after: str) -> None:
    run = Run("fsdp and 1d")
    for _ in range(2):
        run.step()
    sw.checkpoint.save(tmp_path, run.state, step=2)
    other = Run(after)
    other.state = sw.checkpoint.restore(tmp_path, other.state)
    assert same(other.state, run.state)
    run.step()
    other.step()
    assert abs(run.state["losses"][0] - other.state["losses"][0]) < 1e-5  # float32
