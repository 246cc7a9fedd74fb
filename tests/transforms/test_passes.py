"""All passes together: random programs, hash seeds, processes; equal bits."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from graphs import NETS, collectives, everything, graph_of, passed, ranks, same_bits
from lockstep import GROUP, equal, gather, scatter, total, traced
from processes import launch
from torch import Tensor

from shardwise.ops.budget import BudgetError
from shardwise.ops.transforms.lifetimes import peak_bytes
from shardwise.ops.transforms.order import name_of
from shardwise.ops.transforms.recompute import recomputed


def program(seed: int, n: int) -> Callable[..., list[Tensor]]:
    """Ops and collectives on vectors, at random."""

    def step(*given: Tensor) -> list[Tensor]:
        draw = random.Random(seed)
        known = list(given)
        for _ in range(draw.randint(5, 40)):
            a, b = draw.choice(known), draw.choice(known)
            kind = draw.randrange(6)
            if kind == 0:
                known.append(total(a, draw.choice(["sum", "max"])) * 0.5)
            elif kind == 1:
                known.append(gather(a, n).view(n, -1)[draw.randrange(n)])
            elif kind == 2:
                known.append(scatter(torch.cat([a, b] * n)[: n * a.numel()], n).neg())
            elif kind == 3:
                known.append(a + b)
            elif kind == 4:
                known.append(a.sin())
            else:
                known.append(a * b.view(2, -1).t().reshape(-1))
        return known[-draw.randint(1, 4) :]

    return step


SEEDS = [*range(8), *(pytest.param(n, marks=pytest.mark.slow) for n in range(8, 24))]


@pytest.mark.parametrize("seed", SEEDS)
def test_random_programs_keep_their_bits(seed: int) -> None:
    n = 2 + seed % 2
    inputs = ranks(4, n=n, count=3)
    before = traced(program(seed, n), *inputs[0])
    after = passed(before, everything)
    assert same_bits(after, before, inputs)
    assert len(collectives(after)) <= len(collectives(before))
    peak = peak_bytes(before)
    small = copy.deepcopy(before)
    try:
        recomputed(small, int(peak * 0.8), again=("all_gather",))
    except BudgetError as error:
        assert str(small.graph) == str(before.graph)
        recomputed(small, int(peak * 0.8) + error.shortfall, again=("all_gather",))
    assert peak_bytes(small) <= peak
    assert same_bits(passed(small, everything), before, inputs)


def test_random_programs_reach_every_case() -> None:
    """The programs above join and drop collectives, and some may not be joined."""
    joined = kept = 0
    for seed in range(24):
        n = 2 + seed % 2
        before = traced(program(seed, n), *ranks(4, n=n, count=3)[0])
        after = passed(before, everything)
        joined += len(collectives(before)) - len(collectives(after))
        kept += len(collectives(after))
    assert joined > 20
    assert kept > 50


TEXT = """
from lockstep import Net
from shardwise.ops.transforms.bucketing import bucketed, deduplicated
from shardwise.ops.transforms.overlap import overlapped
from shardwise.ops.transforms.recompute import recomputed
module = recomputed(deduplicated(Net(layers=1).graph()), 20000, again=("all_gather",))
print(overlapped(bucketed(module, cap=3000), window=9000).graph)
"""


def test_every_process_comes_to_the_same_graph() -> None:
    path = os.pathsep.join(map(str, (Path(__file__).parents[2] / "src", "tests/support")))
    path = os.pathsep.join([path, str(Path(__file__).parents[1] / "support")])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TEXT],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    texts = [process.communicate(timeout=120)[0] for process in started]
    assert "reduce_scatter_tensor" in texts[0]
    assert texts[0] == texts[1]


def on_gloo() -> list[Any]:
    """The step after all passes, and as it is, on real processes."""
    dist.init_process_group("gloo")
    net = NETS["sharded"]
    rank = dist.get_rank()
    name = dist.group.WORLD.group_name  # pyright: ignore
    assert name == GROUP
    before = graph_of(net)
    after = passed(before, everything)
    with torch.no_grad():
        results = [[list(m(*net.inputs()[rank]))] for m in (before, after)]
    messages = [(name_of(c), list(c.meta["val"].shape)) for c in collectives(after)]
    dist.destroy_process_group()
    return [equal(*results), len(collectives(after)), messages]


@pytest.mark.processes
def test_processes_agree_bit_for_bit() -> None:
    outcomes = launch(on_gloo, 2)
    assert outcomes[0].value[0] is True
    assert outcomes[0].value[1] < 26
    assert outcomes[0].value == outcomes[1].value
