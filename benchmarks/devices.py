"""CPU against GPU: random values, and the losses of a small GPT, on one GPU.

    python benchmarks/devices.py

Prints how many values of each draw differ and by how much, and the largest difference of five
training losses between a simulated mesh on the CPU and one on the GPU.
"""

from __future__ import annotations

from typing import Any

import torch

import shardwise as sw
from shardwise import models, optim, strategies
from shardwise.meshlib import philox

SHAPES = ((1000,), (257, 1023), (3, 5, 7), (64, 1), (2048, 2048))
FLOATS = (torch.float32, torch.float64, torch.bfloat16)
DRAWS: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "uniform": (philox.uniform, [{"dtype": d} for d in FLOATS]),
    "normal": (philox.normal, [{"dtype": d} for d in FLOATS]),
    "truncated_normal": (philox.truncated_normal, [{"dtype": d} for d in FLOATS]),
    "randint": (philox.randint, [{"high": 1000003}]),
    "bernoulli": (philox.bernoulli, [{"p": 0.3}]),
}


def draws() -> None:
    """Values that differ between the two devices, per draw."""
    print(f"{'draw':<18}{'options':<28}{'values':>10}{'differ':>9}{'by at most':>12}")
    for name, (draw, options) in DRAWS.items():
        for given in options:
            count, differ, most = 0, 0, 0.0
            for shape in SHAPES:
                index = tuple(slice(0, n) for n in shape)
                a = draw((1, 2), shape, index, device="cpu", **given)
                b = draw((1, 2), shape, index, device="cuda", **given).cpu()
                count += a.numel()
                differ += int((a != b).sum())
                most = max(most, float((a.double() - b.double()).abs().max()))
            print(f"{name:<18}{given!s:<28}{count:>10}{differ:>9}{most:>12.2g}")


def losses(device: str, dtype: torch.dtype) -> list[float]:
    """Five steps of a GPT with dropout, FSDP, tensor parallelism and recomputation."""
    mesh = sw.make_mesh({"data": 2, "tensor": 2}, transport="simulated", device=device)
    s = (strategies.fsdp() * strategies.tensor_1d()).replace(
        precision=sw.Precision(dtype, dtype, dtype), recompute="all"
    )
    config = models.GPT2Config(layer=2, embed=64, heads=4, vocab=96, position=32, dropout=0.1)
    model = models.gpt2(config, s)
    params = model.init(sw.random.key(0), mesh)
    opt = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-3))
    state = opt.init(params)
    gradient = sw.value_and_grad(lambda p, batch, key: model.loss(p, batch, key=key))
    rng = torch.Generator().manual_seed(0)
    found = []
    for step in range(5):
        raw = torch.randint(96, (8, 33), generator=rng)
        batch = sw.shard({"tokens": raw[:, :-1], "labels": raw[:, 1:]}, mesh, s["tokens"])
        loss, grads = gradient(params, batch, sw.random.fold_in(sw.random.key(1), step))
        params, state = opt.step(grads, state, params)
        found.append(loss.item())
    return found


def main() -> None:
    if not torch.cuda.is_available():
        print("needs a GPU")
        return
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    draws()
    for dtype in (torch.float64, torch.float32):
        pairs = zip(losses("cpu", dtype), losses("cuda", dtype), strict=True)
        print(f"losses, {dtype}: differ by at most {max(abs(a - b) for a, b in pairs):.2g}")


if __name__ == "__main__":
    main()
