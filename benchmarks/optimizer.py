"""Step time of AdamW over 300 tensors and 100M parameters: torch's fused and foreach, and ours.

    python benchmarks/optimizer.py [--width 576] [--devices 2] [--rounds 9]
    torchrun --nproc-per-node 2 benchmarks/optimizer.py

The tensors are those of 25 transformer layers. First on one device: torch's two ways, ours resident
and ours with the state in host memory. Then data parallel on N devices (simulated in this process,
which does the work of all of them; under torchrun one per process): local gradients in, new
parameters on every device out, with whole states and with ZeRO-1. Under torchrun also torch's: one
flat all_reduce, then fused AdamW or ZeroRedundancyOptimizer. Medians over rounds in which the
variants take turns; all must agree on the parameters in the end.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import shardwise as sw
from shardwise import optim

LAYERS = 25
HYPER: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
OURS = optim.adamw(1e-3, weight_decay=0.01)
Values = dict[str, torch.Tensor]
Step = Callable[[], None]


def draw(width: int, device: torch.device, seed: int) -> Values:
    """25 layers of 12 tensors: six matrices, two gains, four biases."""
    d, rng = width, torch.Generator(device).manual_seed(seed)
    shapes = {
        **dict.fromkeys(("w_q", "w_k", "w_v", "w_o"), (d, d)),
        "w_up": (d, 4 * d), "w_down": (4 * d, d), "b_up": (4 * d,),
        **dict.fromkeys(("attn_norm", "mlp_norm", "b_q", "b_o", "b_down"), (d,)),
    }  # fmt: skip
    return {
        f"{layer}.{name}": torch.randn(shape, generator=rng, device=device)
        for layer in range(LAYERS)
        for name, shape in shapes.items()
    }


class Torch:
    """AdamW of torch, over parameters of its own."""

    def __init__(self, params: Values, grads: Values, make: Callable[[Any], Any]) -> None:
        self.params = [torch.nn.Parameter(p.clone()) for p in params.values()]
        self.grads = list(grads.values())
        self.optimizer = make(self.params)

    def step(self) -> None:
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g
        self.optimizer.step()

    def reduced_step(self) -> None:
        """After a sum of all gradients over the processes, in one bucket."""
        flat = torch.cat([g.view(-1) for g in self.grads])
        dist.all_reduce(flat)
        parts = flat.split([g.numel() for g in self.grads])
        for p, g in zip(self.params, parts, strict=True):
            p.grad = g.view_as(p)
        self.optimizer.step()

    def values(self) -> list[torch.Tensor]:
        return [p.detach() for p in self.params]


class Ours:
    """A transform of ours; parameters and state are donated to each step."""

    def __init__(self, params: Values, grads: Any, mesh: sw.Mesh, opt: Any, reduce: bool) -> None:
        self.opt, self.grads, self.reduce = opt, grads, reduce
        self.params = sw.shard(params, mesh)
        self.whole = {name: p.layout for name, p in self.params.items()}
        self.state = opt.init(self.params)

    def step(self) -> None:
        grads = sw.reshard(self.grads, self.whole) if self.reduce else self.grads
        self.params, self.state = self.opt.step(grads, self.state, self.params, donate=True)

    def values(self) -> list[torch.Tensor]:
        return [p.shards[0] for p in self.params.values()]


def measure(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each; they take turns, so that a slow moment hits all."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for number in range(rounds + 2):
        for name, step in steps.items():
            wait()
            start = time.perf_counter()
            step()
            wait()
            if number > 1:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def compare(title: str, variants: dict[str, Any], rounds: int, device: torch.device) -> None:
    """Time them, check that they agree, print."""
    steps = {name: getattr(v, "call", None) or v.step for name, v in variants.items()}
    found = measure(steps, rounds, device)
    first, *rest = variants.values()
    for other in rest:
        for a, b in zip(first.values(), other.values(), strict=True):
            torch.testing.assert_close(a, b.to(a.device), rtol=1e-4, atol=1e-5)
    if int(os.environ.get("RANK", "0")):
        return
    base = next(iter(found.values()))
    print(f"\n{title}")
    for name, value in found.items():
        print(f"  {name:<44}{value:>10.2f} ms{value / base:>8.2f}x")


def one_device(params: Values, grads: Values, device: torch.device) -> dict[str, Any]:
    mesh = sw.make_mesh({"data": 1}, transport="simulated", device=device)
    ours = sw.shard(grads, mesh)
    return {
        "torch fused": Torch(params, grads, lambda p: torch.optim.AdamW(p, fused=True, **HYPER)),
        "torch foreach": Torch(
            params, grads, lambda p: torch.optim.AdamW(p, foreach=True, **HYPER)
        ),
        "ours": Ours(params, ours, mesh, OURS, False),
        "ours, state and update @host": Ours(params, ours, mesh, optim.offload(OURS), False),
    }


def many_devices(params: Values, grads: Values, mesh: sw.Mesh) -> dict[str, Any]:
    local = list(grads.values())
    owed = {
        name: sw.from_local([g] * len(mesh.held), mesh, sw.Layout("... {U:data}", g.ndim))
        for name, g in grads.items()
    }
    found: dict[str, Any] = {
        "ours, states whole": Ours(params, owed, mesh, OURS, True),
        "ours, ZeRO-1": Ours(params, owed, mesh, optim.zero(OURS, 1), False),
    }
    if mesh.transport != "distributed":
        return found
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def fused(p: Any) -> Any:
        return torch.optim.AdamW(p, fused=True, **HYPER)

    def cut(p: Any) -> Any:
        return ZeroRedundancyOptimizer(p, torch.optim.AdamW, foreach=True, **HYPER)

    made = dict(zip(grads, local, strict=True))
    theirs = {
        "torch fused, states whole": Torch(params, made, fused),
        "torch ZeroRedundancyOptimizer": Torch(params, made, cut),
    }
    for one in theirs.values():
        one.call = one.reduced_step  # type: ignore[attr-defined]
    return theirs | found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=576, help="576 makes 100M parameters")
    parser.add_argument("--devices", type=int, default=2, help="simulated; torchrun says its own")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    launched = "WORLD_SIZE" in os.environ
    mesh = sw.make_mesh({"data": -1 if launched else given.devices})
    device = mesh.device
    params, grads = (draw(given.width, device, seed) for seed in (0, 1))
    if mesh.is_first:
        total = sum(p.numel() for p in params.values())
        what = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        print(
            f"torch {torch.__version__} on {what}, {torch.get_num_threads()} threads: "
            f"{len(params)} tensors, {total / 1e6:.1f}M float32 parameters"
        )
    if not launched:
        compare("one device", one_device(params, grads, device), given.rounds, device)
    where = "processes" if launched else "simulated devices, all in this process"
    compare(f"{mesh.size} {where}", many_devices(params, grads, mesh), given.rounds, device)


if __name__ == "__main__":
    main()
