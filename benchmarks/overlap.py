"""What communication costs when it runs under the computation, and when it waits.

    torchrun --nproc-per-node 2 benchmarks/overlap.py

One training step's loss and gradients of a GPT, bf16, under FSDP (gathered again in the backward)
and under data parallelism, one process per GPU. In one run, taking turns:

    waiting   every collective is waited for where it is called
    ahead     the library's default: a layer's gathers one layer ahead, its gradients one behind
    compute   the same step whose collectives move nothing (wrong numbers, the same arithmetic)
    moving    the collectives of the step alone, one after another, nothing computed

Exposed is what a step takes beyond its computation; hidden is the share of the communication that
`ahead` takes out of `waiting`. Medians of rounds, in ms, of the slowest process. The ceiling of
`ahead` is max(compute, moving). Without GPUs: Gloo processes and a tiny model, to try it out; there
the threads that move data take cores from the computation, so the times say nothing of GPUs.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import shardwise as sw
from shardwise import models, strategies
from shardwise.meshlib import record
from shardwise.meshlib.distributed import DistributedTransport
from shardwise.ops.transforms import scan

LARGE: dict[str, Any] = {"layer": 12, "embed": 2048, "heads": 16, "vocab": 50304, "position": 1024}
TINY: dict[str, Any] = {"layer": 4, "embed": 128, "heads": 4, "vocab": 512, "position": 64}
STARTS = ("start_all_gather", "start_reduce_scatter", "start_all_reduce")
Call = Callable[[], Any]


def prepared(strategy: sw.Strategy, config: dict[str, Any], rows: int) -> Call:
    """A call of one step: loss and gradients."""
    mesh = sw.make_mesh({"data": -1})
    model = models.gpt2(models.GPT2Config(**config), strategy)
    params = model.init(sw.random.key(0), mesh)
    rng = torch.Generator().manual_seed(0)
    raw = torch.randint(config["vocab"], (rows * mesh.size, config["position"] + 1), generator=rng)
    batch = {"tokens": raw[:, :-1].contiguous(), "labels": raw[:, 1:].contiguous()}
    data = sw.shard(batch, mesh, strategy["tokens"])
    step = sw.value_and_grad(model.loss)
    return lambda: step(params, data)


def waiting(call: Call) -> Call:
    """The same call, with nothing ahead."""

    def slow() -> None:
        asked = scan.can_run_ahead
        scan.can_run_ahead = lambda _values: False
        try:
            call()
        finally:
            scan.can_run_ahead = asked

    return slow


@contextmanager
def silent() -> Iterator[None]:
    """Collectives inside give tensors of the right shape and move nothing."""
    n = sw.make_mesh({"data": -1}).size

    def all_reduce(_self: Any, shards: Any, _axes: Any, _op: str = "sum") -> Any:
        return lambda: [shards[0].clone()]

    def all_gather(_self: Any, shards: Any, _axes: Any, dim: int) -> Any:
        return lambda: [torch.cat([shards[0]] * n, dim)]

    def reduce_scatter(_self: Any, shards: Any, _axes: Any, dim: int) -> Any:
        return lambda: [shards[0].chunk(n, dim)[0].clone()]

    real = {name: getattr(DistributedTransport, name) for name in STARTS}
    fake = (all_gather, reduce_scatter, all_reduce)
    for name, method in zip(STARTS, fake, strict=True):
        setattr(DistributedTransport, name, method)
    try:
        yield
    finally:
        for name, method in real.items():
            setattr(DistributedTransport, name, method)


def computing(call: Call) -> Call:
    """The same call, moving nothing."""

    def alone() -> None:
        with silent():
            waiting(call)()

    return alone


def moving(call: Call) -> tuple[Call, float]:
    """The collectives of a call, nothing computed; and the bytes that a device moves."""
    mesh = sw.make_mesh({"data": -1})
    with record.opened(record.Log()) as log:
        call()
    operands = {
        (c.shape, c.dtype): torch.zeros(math.prod(c.shape), dtype=c.dtype, device=mesh.device)
        for c in log.collectives
    }
    comm = mesh.comm

    def alone() -> None:
        for c in log.collectives:
            x = [operands[c.shape, c.dtype]]
            if c.kind == "all_reduce":
                comm.all_reduce(x, c.axes, c.reduce or "sum")
            elif c.kind == "all_gather":
                comm.all_gather(x, c.axes, 0)
            else:
                comm.reduce_scatter(x, c.axes, 0)

    return alone, sum(c.bytes for c in log.collectives)


def settled(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Milliseconds of each call on the slowest process; the calls take turns."""
    mesh = sw.make_mesh({"data": -1})
    for call in calls.values():
        call()
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            settled(mesh.device)
            mesh.comm.all_reduce([torch.zeros(1, device=mesh.device)], ("data",))
            settled(mesh.device)
            start = time.perf_counter()
            call()
            settled(mesh.device)
            took = torch.tensor([time.perf_counter() - start], device=mesh.device)
            times[name].append(float(mesh.comm.all_reduce([took], ("data",), "max")[0]) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rows", type=int, default=4, help="sequences per process")
    parser.add_argument("--layers", type=int, default=0, help="of the model; 0 is its own")
    given = parser.parse_args()
    mesh = sw.make_mesh({"data": -1})
    if mesh.transport != "distributed":
        parser.error("start it with torchrun --nproc-per-node 2 (or more)")
    cuda = mesh.device.type == "cuda"
    config = dict(LARGE if cuda else TINY)
    config["layer"] = given.layers or config["layer"]
    dtype = torch.bfloat16 if cuda else torch.float32
    precision = sw.Precision(dtype, dtype, dtype)
    if mesh.is_first:
        where = torch.cuda.get_device_name() if cuda else "Gloo on the CPU"
        print(f"torch {torch.__version__}, {mesh.size} x {where}; {config}, {given.rows} rows each")
        names = ("waiting", "ahead", "compute", "moving", "exposed", "hidden", "GB/s")
        print(f"{'strategy':<10}" + "".join(f"{name:>10}" for name in names))
    for name, strategy in {"fsdp": strategies.fsdp(), "data": strategies.data()}.items():
        call = prepared(strategy.replace(precision=precision), config, given.rows)
        alone, size = moving(call)
        calls = {
            "waiting": waiting(call),
            "ahead": call,
            "compute": computing(call),
            "moving": alone,
        }
        ms = medians(calls, given.rounds)
        exposed = ms["ahead"] - ms["compute"]
        hidden = (ms["waiting"] - ms["ahead"]) / ms["moving"]
        row = [*ms.values(), exposed]
        if mesh.is_first:
            rate = size / ms["moving"] / 1e6
            print(
                f"{name:<10}"
                + "".join(f"{x:>10.2f}" for x in row)
                + f"{hidden:>10.0%}{rate:>10.2f}"
            )


if __name__ == "__main__":
    main()
