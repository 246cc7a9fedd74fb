"""Tensor parallelism of one small Llama: bytes moved, peak memory and time of a training step.

    python benchmarks/tensor_parallel.py

Two tables. On 8 simulated devices, in this process: what each strategy moves and holds per device
(from the plan of the same step) and how long the step takes, as a ratio to the same model on one
device: the price of simulating 8. On 4 Gloo processes of this machine: the same, beside the same
model in plain torch under DTensor's `parallelize_module` (1D), in the same run. Float32, one thread
a process; medians of rounds that take turns. The ceilings: one device's step, and on processes a
step that only computes (no collective), which is what 1D would cost with free communication.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import shardwise as sw
from shardwise import models, strategies

CONFIG = {"layer": 2, "embed": 256, "heads": 8, "kv_heads": 8, "ffn": 768, "vocab": 512}
BATCH, SEQ = 8, 128
Strategies = dict[str, tuple[sw.Strategy, dict[str, int]]]
ON_8: Strategies = {
    "data": (strategies.data(), {"data": 8}),
    "fsdp": (strategies.fsdp(), {"data": 8}),
    "1D": (strategies.tensor_1d(), {"tensor": 8}),
    "1D + sequence": (strategies.sequence_parallel(), {"tensor": 8}),
    "data x 1D": (strategies.data() * strategies.tensor_1d(), {"data": 2, "tensor": 4}),
    "2.5D direct": (
        strategies.tensor_2p5d(method="direct"),
        {"depth": 2, "row": 2, "col": 2},
    ),
    "2.5D streamed": (strategies.tensor_2p5d(), {"depth": 2, "row": 2, "col": 2}),
    "3D": (strategies.tensor_3d(), {"i": 2, "j": 2, "k": 2}),
}
ON_4: Strategies = {
    "data": (strategies.data(), {"data": 4}),
    "fsdp": (strategies.fsdp(), {"data": 4}),
    "1D": (strategies.tensor_1d(), {"tensor": 4}),
    "1D + sequence": (strategies.sequence_parallel(), {"tensor": 4}),
    "2D direct": (strategies.tensor_2d(method="direct"), {"row": 2, "col": 2}),
    "2D streamed": (strategies.tensor_2d(), {"row": 2, "col": 2}),
}


def batch() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(CONFIG["vocab"], (BATCH, SEQ + 1), generator=rng)
    return {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def prepared(strategy: sw.Strategy, axes: dict[str, int]) -> tuple[Callable[[], Any], sw.Plan]:
    """A call of one step (loss and gradients), and the plan of it."""
    model = models.llama(models.LlamaConfig(**CONFIG), strategy)  # pyright: ignore
    step = sw.value_and_grad(model.loss)
    mesh = sw.make_mesh(axes)
    params = model.init(sw.random.key(0), mesh)
    rows = sw.shard(batch(), mesh, strategy["tokens"])
    plan = sw.plan(step, params, rows)
    return lambda: step(params, rows), plan


def medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of each call; the calls take turns."""
    for call in calls.values():
        call()
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def table(title: str, plans: dict[str, sw.Plan], times: dict[str, float], against: str) -> None:
    print(f"\n{title}")
    print(
        f"{'strategy':<24}{'fwd KiB':>9}{'bwd KiB':>9}{'collectives':>13}{'peak MiB':>10}"
        f"{'ms':>9}{'ratio':>8}"
    )
    for name, ms in times.items():
        moved = f"{'':>9}{'':>9}{'':>13}{'':>10}"
        if name in plans:
            p = plans[name]
            forward = p.bytes(phase="forward")
            back = p.bytes(phase="backward") + p.bytes(phase="regather")
            moved = (
                f"{forward / 1024:>9,.0f}{back / 1024:>9,.0f}{p.count():>13}"
                f"{p.peak_memory / 2**20:>10.1f}"
            )
        print(f"{name:<24}{moved}{ms:>9.1f}{ms / times[against]:>8.2f}")


class Layer(nn.Module):
    """One Llama layer in plain torch."""

    def __init__(self) -> None:
        super().__init__()
        d, f = CONFIG["embed"], CONFIG["ffn"]
        self.attn_norm, self.mlp_norm = nn.RMSNorm(d, 1e-5), nn.RMSNorm(d, 1e-5)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(d, f, bias=False), nn.Linear(d, f, bias=False)
        self.down = nn.Linear(f, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.attn_norm(x)
        heads = (-1, CONFIG["embed"] // CONFIG["heads"])
        q, k, v = (w(h).unflatten(-1, heads).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        a = F.scaled_dot_product_attention(turn(q, cos, sin), turn(k, cos, sin), v, is_causal=True)
        x = x + self.wo(a.transpose(1, 2).flatten(2))
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Plain(nn.Module):
    """The same Llama in plain torch."""

    def __init__(self) -> None:
        super().__init__()
        d = CONFIG["embed"]
        self.embed = nn.Embedding(CONFIG["vocab"], d)
        self.layers = nn.ModuleList(Layer() for _ in range(CONFIG["layer"]))
        self.norm = nn.RMSNorm(d, 1e-5)
        self.head = nn.Linear(d, CONFIG["vocab"], bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        half = CONFIG["embed"] // CONFIG["heads"] // 2
        angles = torch.arange(tokens.shape[1])[:, None] * 1e4 ** (-torch.arange(half) / half)
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, torch.cos(angles), torch.sin(angles))
        return self.head(self.norm(x))


def plain_step(model: nn.Module, rows: dict[str, Tensor]) -> Callable[[], Any]:
    """Loss and gradients of a torch module; `model` may be parallelized."""

    def call() -> Any:
        logits = model(rows["tokens"])
        loss = F.cross_entropy(logits.flatten(0, 1), rows["labels"].flatten())
        loss.backward()
        for p in model.parameters():
            p.grad = None
        return loss

    return call


def dtensor_step() -> Callable[[], Any]:
    """DTensor's 1D: columns, rows and the vocabulary cut, the loss in parallel."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        loss_parallel,
        parallelize_module,
    )

    model = Plain()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    table: dict[str, Any] = {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    for number in range(CONFIG["layer"]):
        for name in ("wq", "wk", "wv", "gate", "up"):
            table[f"layers.{number}.{name}"] = ColwiseParallel()
        for name in ("wo", "down"):
            table[f"layers.{number}.{name}"] = RowwiseParallel()
    call = plain_step(parallelize_module(model, mesh, table), batch())

    def step() -> Any:
        with loss_parallel():
            return call()

    return step


def simulated(rounds: int) -> None:
    made = {name: prepared(*row) for name, row in ON_8.items()}
    one = prepared(strategies.data(), {"data": 1})
    calls = {"plain torch, 1 device": plain_step(Plain(), batch()), "ours, 1 device": one[0]}
    calls |= {name: call for name, (call, _) in made.items()}
    plans = {name: plan for name, (_, plan) in made.items()} | {"ours, 1 device": one[1]}
    table("8 simulated devices", plans, medians(calls, rounds), "ours, 1 device")


def worker(rounds: int) -> None:
    """One of the Gloo processes; the first prints."""
    made = {name: prepared(*row) for name, row in ON_4.items()}
    calls = {name: call for name, (call, _) in made.items()}
    plans = {name: plan for name, (_, plan) in made.items()}
    calls["DTensor 1D"] = dtensor_step()
    times = medians(calls, rounds)
    if dist.get_rank() == 0:
        table("4 Gloo processes, per process", plans, times, "1D")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        worker(given.rounds)
        return
    print(f"torch {torch.__version__}, {json.dumps(CONFIG)}, batch {BATCH} x {SEQ}, float32")
    simulated(given.rounds)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"]
    subprocess.run([*launch, __file__, "--rounds", str(given.rounds)], check=True)


if __name__ == "__main__":
    main()
