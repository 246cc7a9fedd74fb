"""Launches of the norms' and the loss's kernels: block sizes, warps, stages that are best on a GPU.

    python benchmarks/tune.py [--only rms_norm]

Prints for each kernel the shipped launch and the six fastest, with their share of a copy's
bandwidth in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from kernel_rows.cross_entropy import LOSS_SIZES
from kernel_rows.measure import DEVICE, GPU, ceilings, normal, seconds
from kernel_rows.norms import EPS, NORM_SIZES

from shardwise.kernels import norms
from shardwise.kernels.launch import Launch, power_of_two

# Per kind of kernel: tiles (None: a whole row), warps, stages, programs per multiprocessor.
TRIED: dict[str, tuple[tuple[int | None, ...], ...]] = {
    "forward": ((None,), (2, 4, 8, 16), (1, 2, 3), (0, 4, 8)),
    "backward": ((None,), (4, 8, 16), (1, 2, 3), (1, 2, 3, 4)),
    "read": ((4096, 8192, 16384), (4, 8, 16), (1, 2, 3), (0,)),
    "write": ((1024, 2048, 4096, 8192), (2, 4, 8), (1,), (0,)),
}


def tune(copy: float, only: str) -> None:
    from shardwise.kernels import cross_entropy_triton as tce
    from shardwise.kernels import norms_triton as tn

    rows, size = NORM_SIZES[0]
    x, g, w = normal(rows, size), normal(rows, size), normal(size)
    rstd = norms.rms_norm(x, w, EPS)[1]
    tokens, vocab = LOSS_SIZES[0]
    logits, labels = normal(tokens, vocab), torch.randint(0, vocab, (tokens,), device=DEVICE)
    lse, target = torch.ones(2, tokens, device=DEVICE)
    result, row, logit = logits.clone(), 2.0 * rows * size, 2.0 * tokens * vocab
    per_token = lse, target, logits, labels, lse, result, 0, vocab
    # Name, kind, the shipped launch, bytes moved, and the launcher; it takes the launch last.
    kernels: list[tuple[str, str, Launch, float, Callable[..., Any], tuple[Any, ...]]] = [
        ("rms_norm", "forward", tn.forward_launch(size), 2 * row,
         tn.forward, (x, None, w, None, EPS, False)),
        ("rms_norm_backward", "backward", tn.backward_launch(size), 3 * row,
         tn.backward, (g, x, w, None, rstd, None)),
        ("cross_entropy_parts", "read", tce.reading_launch(vocab), logit,
         tce.launch_parts, (logits, labels, lse, target, 0, vocab)),
        ("cross_entropy_parts_backward", "write", tce.writing_launch(vocab), 2 * logit,
         tce.launch_grad, per_token),
        ("loss_and_grad", "read", tce.reading_launch(vocab), 2 * logit,
         tce.launch_loss_and_grad, (result, labels, lse, target, vocab)),
    ]  # fmt: skip
    for name, kind, shipped, moved, launch, args in kernels:
        if only not in name:
            continue
        tried = [shipped]
        for tile, warps, stages, programs in itertools.product(*TRIED[kind]):
            if kind == "forward" and programs == 0 and stages != 1:
                continue  # no loop, nothing to fetch early
            block = tile or power_of_two(size)
            tried.append(Launch(block, warps or 1, 1, stages or 1, programs or 0))
        found = []
        for how in tried:
            try:
                found.append((seconds(launch, *args, how, repeats=10), how))
            except Exception as error:  # a launch that does not fit is a result as well
                print(f"{name}: {how}: {type(error).__name__}", flush=True)
        time_shipped = found[0][0]
        share = moved / copy / time_shipped
        print(f"{name}: shipped {time_shipped * 1e3:.3f} ms, {share:.3f} of copy, {shipped}")
        for t, how in sorted(found, key=lambda f: f[0])[:6]:
            print(f"    {t * 1e3:.3f} ms  {moved / copy / t:.3f} of copy  {how}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    args = parser.parse_args()
    if not GPU:
        print("tune.py needs a GPU")
        return
    copy, _ = ceilings()
    print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}; copy {copy / 1e9:.0f} GB/s")
    tune(copy, args.only)


if __name__ == "__main__":
    main()
