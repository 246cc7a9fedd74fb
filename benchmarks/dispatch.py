"""Cost of one op: plain torch, this library, torch's DTensor, in one run.

    python benchmarks/dispatch.py

Microseconds per op, 16x16 float32, one thread; medians over rounds that take turns, so that a slow
moment hits all three. "over" is what a row adds to plain torch or its ratio. The aims stand in the
last column.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

import shardwise as sw

SIZE = 16


def measure(calls: dict[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, float]:
    """Median microseconds per call; the calls take turns."""
    for call in calls.values():
        for _ in range(200):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            times[name].append((time.perf_counter() - start) / repeats * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def operands(make: Callable[[torch.Tensor], Any]) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(make(torch.randn(SIZE, SIZE, generator=generator)) for _ in range(2)) + tuple(
        make(torch.randn(SIZE, generator=generator)) for _ in range(2)
    )


OPS: dict[str, Callable[..., Any]] = {
    "add": lambda x, y, w, b: x + y,
    "matmul": lambda x, y, w, b: x @ y,
    "layer_norm": lambda x, y, w, b: F.layer_norm(x, (SIZE,), w, b),
    "sw.nn.layer_norm": lambda x, y, w, b: layer_norm(x, w, b),
}


def layer_norm(x: Any, w: Any, b: Any) -> Any:
    """Ours by its own name, where x is ours: without the detour through `__torch_function__`."""
    if isinstance(x, sw.ShardedTensor):
        return sw.nn.layer_norm(x, w, b)
    return F.layer_norm(x, (SIZE,), w, b)


def backward_of(op: Callable[..., Any], plain: tuple[Any, ...]) -> Callable[[], object]:
    """Forward and backward of an op, over leaves that need a gradient."""

    def call() -> object:
        y = op(*plain)
        shard = y._shards[0] if isinstance(y, sw.ShardedTensor) else y
        return torch.autograd.grad(shard, leaves, seed, allow_unused=True)

    leaves = [t._shards[0] if isinstance(t, sw.ShardedTensor) else t for t in plain]
    seed = torch.ones(SIZE, SIZE)
    return call


def dtensor_backward(op: Callable[..., Any], leaves: tuple[Any, ...], seed: torch.Tensor) -> Callable[[], object]:  # fmt: skip  # noqa: E501
    return lambda: torch.autograd.grad(op(*leaves), leaves, seed, allow_unused=True)


def ours(mesh: sw.Mesh, grad: bool) -> tuple[object, ...]:
    """Operands on a mesh; leaves of a graph as value_and_grad makes them."""
    made = operands(lambda t: sw.shard(t, mesh))
    if not grad:
        return made
    from shardwise.ops.transforms.leaves import Inputs

    inputs = Inputs(list(made))
    return tuple(inputs.typed(inputs.fresh()))


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}")
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        print("  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore
    device_mesh = init_device_mesh("cpu", (1,))
    mesh = sw.make_mesh({"data": 1}, transport="simulated", device="cpu")
    print(f"torch {torch.__version__}, {SIZE}x{SIZE} float32, one thread, us per op (medians)")

    plain = operands(lambda t: t)
    mine = ours(mesh, False)
    theirs = operands(lambda t: distribute_tensor(t, device_mesh, [Replicate()]))
    rows = []
    for name, op in OPS.items():
        calls = {
            "torch": lambda op=op: op(*plain),
            "ours": lambda op=op: op(*mine),
            "dtensor": lambda op=op: op(*theirs),
        }
        with torch.no_grad():
            t = measure(calls, options.rounds, options.repeats)
        rows.append([name, *(f"{t[k]:.2f}" for k in t), f"+{t['ours'] - t['torch']:.2f}",
                     f"+{t['dtensor'] - t['torch']:.2f}", "<= +2"])  # fmt: skip
    table("forward", ["op", "torch", "ours", "DTensor", "ours over", "DTensor over", "aim"], rows)

    plain = operands(lambda t: t.requires_grad_())
    mine = ours(mesh, True)
    theirs = operands(
        lambda t: distribute_tensor(t, device_mesh, [Replicate()]).detach().requires_grad_()
    )
    seed = distribute_tensor(torch.ones(SIZE, SIZE), device_mesh, [Replicate()])
    rows = []
    for name, op in OPS.items():
        calls = {
            "torch": backward_of(op, plain),
            "ours": backward_of(op, mine),
            "dtensor": dtensor_backward(op, theirs, seed),
        }
        t = measure(calls, options.rounds, max(1, options.repeats // 5))
        rows.append([name, *(f"{t[k]:.1f}" for k in t), f"{t['ours'] / t['torch']:.2f}x",
                     f"{t['dtensor'] / t['torch']:.2f}x", "<= 1.25x"])  # fmt: skip
    table("forward + backward", ["op", "torch", "ours", "DTensor", "ours", "DTensor", "aim"], rows)

    eight = sw.make_mesh({"data": 2, "tensor": 2, "depth": 2}, transport="simulated", device="cpu")
    plain = operands(lambda t: t)
    mine = ours(eight, False)
    rows = []
    for name, op in OPS.items():
        calls = {
            "torch": lambda op=op: [op(*plain) for _ in range(8)],
            "ours": lambda op=op: op(*mine),
        }
        with torch.no_grad():
            t = measure(calls, options.rounds, max(1, options.repeats // 8))
        rows.append(
            [
                name,
                f"{t['torch']:.1f}",
                f"{t['ours']:.1f}",
                f"{t['ours'] - t['torch']:+.1f}",
                "<= +5",
            ]
        )
    table("8 simulated devices, forward", ["op", "8 x torch", "ours", "over", "aim"], rows)

    rows = []
    for name, layouts in {
        "matmul": ("b/data k/tensor", "k/tensor n/depth"),
        "add": ("b/data d/tensor", "b/data d"),
        "layer_norm": ("b/data d {R:tensor}", "d"),
    }.items():
        rows.append([name, *first_call(name, layouts, eight)])
    table("first call of a new (op, layouts, shapes), ms", ["op", "ours, 3 axes", "aim"], rows)
    dist.destroy_process_group()


def first_call(name: str, layouts: tuple[str, str], mesh: sw.Mesh) -> list[str]:
    """Median over shapes not seen before, less a call seen before.

    Torch sees the local shapes first, so that its own first-call cost does not count as ours.
    """
    local: dict[str, Callable[..., object]] = {
        "matmul": lambda a, b: a @ b,
        "add": lambda a, b: a + b[: a.shape[0], : a.shape[1]],
        "layer_norm": lambda a, b: F.layer_norm(a, b.shape, b, b),
    }
    times = []
    for number in range(1, 31):
        size = 8 * number + 128
        x = sw.shard(torch.randn(size, size), mesh, layouts[0])
        y = sw.shard(
            torch.randn(size) if name == "layer_norm" else torch.randn(size, size), mesh, layouts[1]
        )
        op = {
            "matmul": lambda x=x, y=y: x @ y,
            "add": lambda x=x, y=y: x + y,
            "layer_norm": lambda x=x, y=y, size=size: F.layer_norm(x, (size,), y, y),
        }[name]
        local[name](x.shards[0], y.shards[0])
        start = time.perf_counter()
        op()
        first = time.perf_counter() - start
        start = time.perf_counter()
        op()
        times.append((first - (time.perf_counter() - start)) * 1e3)
    return [f"{statistics.median(times[3:]):.3f}", "<= 0.3"]


if __name__ == "__main__":
    main()
