"""AdamW over many tensors: bytes per parameter at the copy's bandwidth, and the host's time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from shardwise.kernels import adamw

from .measure import DEVICE, GPU, Row, host_microseconds, seconds

LAYERS = 25  # of 12 tensors, 300 in all
WIDTHS = (2048, 576) if GPU else (8,)  # 1.26e9 and 1e8 parameters
HYPER: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
B1, B2, EPS = 0.9, 0.999, 1e-8
NAMES = {"fp32": (torch.float32, 28), "bf16 rounded": (torch.bfloat16, 14)}
GOAL = "0.90; host 500 us"
Step = Callable[[], Any]


def shapes(d: int) -> list[tuple[int, ...]]:
    """Of 25 layers: six matrices, two gains, four biases."""
    layer: list[tuple[int, ...]] = [(d, d)] * 4 + [(d, 4 * d), (4 * d, d), (4 * d,)] + [(d,)] * 5
    return layer * LAYERS


def drawn(width: int, dtype: torch.dtype) -> list[list[Tensor]]:
    """Parameters, gradients and the two means."""
    made = [
        [torch.randn(s, device=DEVICE, dtype=dtype).mul_(0.02) for s in shapes(width)]
        for _ in range(4)
    ]
    for v in made[3]:
        v.abs_()
    return made


def ours(held: list[list[Tensor]], rounded: bool) -> Step:
    """In place on a GPU; the op, which makes new tensors, elsewhere."""
    names = torch.tensor([adamw.name_words(str(i)) for i in range(len(held[0]))], device=DEVICE)
    places = [n for p in held[0] for n in adamw.numbers(p.shape, (0,) * p.ndim, p.shape) or ()]
    key, number = torch.tensor([1, 2], device=DEVICE), torch.tensor(7, device=DEVICE)
    factors = torch.tensor([0.1, -1e-3, 0.99999], device=DEVICE)

    def step() -> Any:
        keys = adamw.adamw_keys(key, number, names) if rounded else None
        if not GPU:
            return adamw.adamw(*held, factors, B1, B2, EPS, keys, places)
        from shardwise.kernels import adamw_triton

        return adamw_triton.run(
            held, (held[0], *held[2:]), factors, B1, B2, EPS, keys, places if rounded else ()
        )

    return step


def torch_s(held: list[list[Tensor]], **how: bool) -> Step:
    """Torch's optimizer, with states of the parameters' dtype."""
    params = [torch.nn.Parameter(p) for p in held[0]]
    for p, g in zip(params, held[1], strict=True):
        p.grad = g
    optimizer = torch.optim.AdamW(params, **HYPER, **how)  # pyright: ignore
    return optimizer.step


def rows(copy: float) -> Iterator[Row]:
    for width in WIDTHS:
        for name, (dtype, bytes_each) in NAMES.items():
            held = drawn(width, dtype)
            numel = sum(p.numel() for p in held[0])
            steps = {"ours": ours(held, name == "bf16 rounded")}
            if GPU:  # on a CPU their first step takes seconds
                steps |= {"torch fused": torch_s(held, fused=True)}
                if width != WIDTHS[0]:  # its temporaries are as large as all else
                    steps |= {"foreach": torch_s(held, foreach=True)}
            times = {n: seconds(f, repeats=10) for n, f in steps.items()}
            host = {n: host_microseconds(f, repeats=10) for n, f in steps.items()}
            note = "host " + ", ".join(f"{n} {us:.0f} us" for n, us in host.items())
            label = f"{len(held[0])}, {numel / 1e6:.0f}e6"
            yield Row(f"adamw {name}", label, numel * bytes_each / copy, times, note, GOAL)
            del held, steps
