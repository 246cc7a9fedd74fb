"""Seconds until a jitted training step has run: with an empty cache folder, and with a kept one.

    python benchmarks/compile.py [--processes 2]

Each row is a new Python process (or several, with Gloo between them) that makes a small GPT and
calls its step once. `capture` is the time to the graph, `compile` that of `compile_seconds` beside
it (passes and inductor), `first call` both and the run. The second row of a pair finds what the
first left in the folder (TORCHINDUCTOR_CACHE_DIR): graphs and kernels, by their content. Our passes
run before inductor and are in no key: another order of collectives is another graph.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

SIZES: dict[str, Any] = {"layer": 2, "embed": 64, "heads": 4, "vocab": 256, "position": 64}


def step() -> None:
    """One process of a row: print its seconds as JSON."""
    import torch

    import shardwise as sw
    from shardwise import models, optim, strategies
    from shardwise.ops.transforms import lowering

    torch.set_num_threads(1)
    mesh = sw.make_mesh({"data": -1, "tensor": 1})
    strategy = strategies.fsdp() * strategies.tensor_1d()
    f32 = torch.float32
    strategy = strategy.replace(precision=sw.Precision(f32, f32, f32))
    model = models.gpt2(models.GPT2Config(**SIZES), strategy)
    params = model.init(sw.random.key(0), mesh)
    opt = optim.adamw(1e-3)
    gradient = sw.value_and_grad(model.loss)
    tokens = torch.arange(8 * SIZES["position"]).reshape(8, -1) % SIZES["vocab"]
    batch = sw.shard({"tokens": tokens, "labels": tokens}, mesh, strategy["tokens"])

    @sw.jit(donate_argnums=(0, 1))
    def train(params: Any, state: Any, batch: Any) -> Any:
        loss, grads = gradient(params, batch)
        return *opt.step(grads, state, params), loss

    spent: list[float] = []
    capture = lowering.captured

    def timed(*args: Any) -> Any:
        begin = time.perf_counter()
        module = capture(*args)
        spent.append(time.perf_counter() - begin)
        return module

    lowering.captured = timed
    begin = time.perf_counter()
    train(params, opt.init(params), batch)[2].item()
    first = time.perf_counter() - begin
    if mesh.is_first:
        moved = [len(g.collectives) for g in (train.captured, train.graph)]
        print(json.dumps([spent[0], train.compile_seconds - spent[0], first, *moved]))


def run(processes: int, folder: str) -> list[float]:
    """What rank 0 of such processes prints."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"TORCHINDUCTOR_CACHE_DIR": folder, "WORLD_SIZE": str(processes)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    alone = {"TORCHINDUCTOR_CACHE_DIR": folder}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--step"],
            env=os.environ | (shared | {"RANK": str(rank)} if processes > 1 else alone),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    said = [each.communicate()[0] for each in started]
    if any(each.returncode for each in started):
        raise SystemExit("a process failed")
    return json.loads(said[0].splitlines()[-1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--step", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        step()
        return
    print(f"{'cache':<8}{'capture':>9}{'compile':>9}{'first call':>12}{'collectives':>14}")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("cold", "warm"):
            capture, compiling, first, before, after = run(options.processes, folder)
            print(
                f"{name:<8}{capture:>8.1f}s{compiling:>8.1f}s{first:>11.1f}s"
                f"{f'{before:.0f} -> {after:.0f}':>14}"
            )


if __name__ == "__main__":
    main()
