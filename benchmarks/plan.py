"""Time to plan one training step of a GPT on a mesh that nobody has at hand.

    python benchmarks/plan.py

Seconds for value and gradients on the abstract mesh {data 512, tensor 8}, in one process on CPU: no
data, no devices. The first row pays torch's own imports. FLOPs are compared with 6 N per token plus
attention, counted in full.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch

import shardwise as sw
from shardwise import models, strategies

SIZES: dict[str, dict[str, Any]] = {
    "warm-up (2 layers)": {"layer": 2, "embed": 256, "heads": 8, "position": 128},
    "GPT-2 124M": {"layer": 12, "embed": 768, "heads": 16, "position": 1024},
    "GPT-2 XL": {"layer": 48, "embed": 1600, "heads": 32, "position": 1024},
    "GPT-3 175B": {"layer": 96, "embed": 12288, "heads": 96, "position": 2048},
}
PRESETS = {
    "data x 1D": strategies.data() * strategies.tensor_1d(),
    "fsdp x 1D": strategies.fsdp() * strategies.tensor_1d(),
}


def main() -> None:
    mesh = sw.make_mesh({"data": 512, "tensor": 8}, transport="abstract")
    print(f"torch {torch.__version__}, {mesh}, one sequence a data rank, bf16")
    print(
        f"{'model':<20}{'strategy':<12}{'seconds':>8}{'collectives':>12}{'peak GiB':>10}"
        f"{'FLOPs / formula':>17}"
    )
    for name, sizes in SIZES.items():
        for label, strategy in PRESETS.items():
            bf16 = torch.bfloat16
            strategy = strategy.replace(precision=sw.Precision(bf16, bf16, bf16), recompute="none")
            config = models.GPT2Config(**{"vocab": 50304, **sizes})
            model = models.gpt2(config, strategy)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # small tensors stay whole over 512 devices
                params = model.init(sw.random.key(0), mesh)
            shape = (512, config.position)
            tokens = sw.zeros(shape, mesh, strategy["tokens"], dtype=torch.int64)
            start = time.perf_counter()
            plan = sw.plan(
                sw.value_and_grad(model.loss), params, {"tokens": tokens, "labels": tokens}
            )
            seconds = time.perf_counter() - start
            weights = 12 * config.layer * config.embed**2 + config.vocab * config.embed
            per_token = 6 * weights + 12 * config.layer * config.embed * config.position
            formula = per_token * config.position / 8
            print(
                f"{name:<20}{label:<12}{seconds:>8.2f}{plan.count():>12}"
                f"{plan.peak_memory / 2**30:>10.1f}{plan.flops / formula:>17.4f}"
            )


if __name__ == "__main__":
    main()
