"""Whole training steps on one GPU: tokens per second, share of the matmul ceiling, peak memory.

    python benchmarks/training.py [--models gpt2-124m llama-1.1b] [--steps 10]

Loss, gradients and AdamW of this library's models on a mesh of one device, bf16 parameters and
states: eager, and as one graph by `sw.jit`. The ceiling is an 8192^3 bf16 matmul measured in the
same run; what counts as work is `shardwise.models.flops`, causal attention by half. Medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import shardwise as sw
from shardwise import models, optim, strategies
from shardwise.models.flops import flops_per_token

BF16 = torch.bfloat16
MODELS: dict[str, tuple[Any, Callable[..., Any], int, int]] = {
    "gpt2-124m": (models.GPT2Config(pad={"vocab": 128}), models.gpt2, 32, 1024),
    "llama-1.1b": (
        models.LlamaConfig(layer=22, embed=2048, heads=32, kv_heads=4, ffn=5632, vocab=32000),
        models.llama,
        8,
        2048,
    ),
}


def seconds(call: Callable[[], Any], steps: int) -> float:
    """Median seconds of a call, the device waited for."""
    times = []
    for number in range(steps + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if number > 1:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def ceiling() -> float:
    """TFLOP/s of an 8192^3 bf16 matmul."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=BF16) for _ in range(2))
    return 2 * 8192**3 / seconds(lambda: a @ b, 20) / 1e12


def trained(name: str, steps: int, compiled: bool) -> tuple[float, float, float]:
    """Tokens per second, GiB at the peak, seconds of compilation."""
    config, make, batch, seq = MODELS[name]
    strategy = strategies.data().replace(precision=sw.Precision(BF16, BF16, BF16))
    mesh = sw.make_mesh({"data": 1})
    model = make(config, strategy)
    params = model.init(sw.random.key(0), mesh)
    optimizer = optim.adamw(1e-4)
    state = optimizer.init(params)
    tokens = sw.shard(torch.randint(config.vocab, (batch, seq)), mesh, strategy["tokens"])
    rows = {"tokens": tokens, "labels": tokens}
    gradient = sw.value_and_grad(model.loss)

    def step(params: Any, state: Any, rows: Any) -> tuple[Any, Any, Any]:
        loss, grads = gradient(params, rows)
        return *optimizer.step(grads, state, params, donate=not compiled), loss

    run = sw.jit(step, donate_argnums=(0, 1)) if compiled else step
    held = [params, state]
    del params, state

    def once() -> None:
        given = held[0], held[1]
        held.clear()
        p, s, _ = run(*given, rows)
        held.extend((p, s))

    torch.cuda.reset_peak_memory_stats()
    taken = seconds(once, steps)
    compile_seconds = run.compile_seconds if compiled else 0.0
    return batch * seq / taken, torch.cuda.max_memory_allocated() / 2**30, compile_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("training.py needs a GPU")
        return
    top = ceiling()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, matmul {top:.0f} TFLOP/s")
    print(f"{'model':<14}{'mode':<8}{'tokens/s':>10}{'of matmul':>11}{'GiB':>7}{'compile s':>11}")
    for name in given.models:
        config, make, _, seq = MODELS[name]
        model = make(config, strategies.data())
        flops = flops_per_token(model, seq)
        for mode in ("eager", "jit"):
            rate, peak, compiling = trained(name, given.steps, mode == "jit")
            share = rate * flops / top / 1e12
            print(
                f"{name:<14}{mode:<8}{rate:>10,.0f}{share:>11.2f}{peak:>7.1f}{compiling:>11.1f}",
                flush=True,
            )
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
