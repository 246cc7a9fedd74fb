"""Norms and cross-entropy: this library's kernels, torch eager, torch.compile, Liger if present.

    python benchmarks/kernels.py                    # the table; about 3 minutes on one H100
    python benchmarks/kernels.py --tune             # block sizes, warps, stages of each kernel
    python benchmarks/kernels.py --only cross --json out.json

Ceilings of the same run come first: bandwidth of a copy (bytes read and written) and an 8192^3 bf16
matmul. In brackets: the bytes that the op must move, at the copy's bandwidth, over its time; for
the linear loss, the time of its three matmuls over its time. Medians of calls that are queued
behind a sleeping kernel, so that no host time is in them; host time per call has a table of its
own. Each set of operands is larger than the L2 cache. Without a GPU the sizes are tiny and the
numbers mean nothing: the run only shows that everything works.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import json
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if any(importlib.util.find_spec(name) is None for name in ("einops", "optree")):
    bare = types.ModuleType("shardwise")  # kernels need torch alone: a bare GPU machine will do
    bare.__path__ = [str(ROOT)]
    sys.modules["shardwise"] = bare
elif importlib.util.find_spec("shardwise") is None:
    sys.path.insert(0, str(ROOT / "src"))

from shardwise.kernels import cross_entropy as ce  # noqa: E402
from shardwise.kernels import norms  # noqa: E402
from shardwise.kernels.launch import Launch, power_of_two  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
EPS = 1e-5
NORM_SIZES = [(16384, 4096), (32768, 768), (16384, 2048), (8192, 8192)] if GPU else [(64, 96)]
COMPILED_SIZES = NORM_SIZES[:1]  # compiling takes seconds: where the goal is stated
LOSS_SIZES = [(8192, 128256), (16384, 32000)] if GPU else [(8, 300)]
LINEAR_SIZES = [(16384, 4096, 128256), (16384, 2048, 32000)] if GPU else [(16, 8, 300)]
GOALS = {
    "rms_norm forward": "0.95",
    "rms_norm forward+backward": "0.87",
    "add_rms_norm forward": "0.95",
    "add_rms_norm forward+backward": "0.87",
    "layer_norm forward": "0.95",
    "layer_norm forward+backward": "0.87",
    "cross_entropy forward+backward": "2.2 ms at 8192x128256",
    "linear_cross_entropy forward+backward": "0.91, 0.6 GB extra",
}


class Row(NamedTuple):
    """One line: an op at one size; seconds of each competitor; the floor in seconds."""

    name: str
    size: str
    floor: float
    seconds: dict[str, float]
    note: str = ""


def seconds(call: Callable[..., Any], *args: Any, repeats: int = 20) -> float:
    """Median time of a call on the device, without the host's part."""
    for _ in range(3):
        call(*args)
    if not GPU:
        start = time.perf_counter()
        call(*args)
        return time.perf_counter() - start
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda._sleep(40_000_000)  # some 20 ms, in which the host queues the calls
    marks[0].record()
    for mark in marks[1:]:
        call(*args)
        mark.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
    return statistics.median(times) / 1e3


def host_microseconds(call: Callable[[], Any], repeats: int = 200) -> float:
    """Median time for the host to issue a call."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        times.append((time.perf_counter() - start) / repeats * 1e6)
        if GPU:
            torch.cuda.synchronize()
    return statistics.median(times)


def ceilings() -> tuple[float, float]:
    """Bytes a second of a copy, operations a second of a square matmul."""
    count = 1 << 29 if GPU else 1 << 16
    a, b = torch.randn(2, count, device=DEVICE, dtype=torch.bfloat16)
    copy = 4 * count / seconds(b.copy_, a)
    del a, b
    n = 8192 if GPU else 64
    x, y = torch.randn(2, n, n, device=DEVICE, dtype=torch.bfloat16)
    return copy, 2 * n**3 / seconds(torch.mm, x, y)


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device=DEVICE).mul_(scale).bfloat16()


def both(f: Callable[..., Any], inputs: list[Tensor], grads: list[Tensor]) -> Callable[[], Any]:
    """Forward and backward of f, through autograd."""
    leaves = [x.detach().requires_grad_() for x in inputs]

    def run() -> Any:
        results = f(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        return torch.autograd.grad(results, leaves, grads)

    return run


def liger(name: str) -> Callable[..., Any] | None:
    """A function of Liger-Kernel, where it is installed."""
    if not GPU or importlib.util.find_spec("liger_kernel") is None:
        return None
    return getattr(importlib.import_module("liger_kernel.transformers.functional"), name, None)


def plain_rms(x: Tensor, w: Tensor) -> Tensor:
    v = x.float()
    return (v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + EPS) * w).to(x.dtype)


def add_rms(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = x + r
    return F.rms_norm(total, total.shape[-1:], w, EPS), total


def plain_add_rms(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    total = x + r
    return plain_rms(total, w), total


Versions = dict[str, Callable[..., Any]]


def norm_versions(size: int) -> Iterator[tuple[str, int, int, Versions]]:
    """Name, number of operands [rows, size] and of vectors, and the competing functions."""
    rms: Versions = {
        "ours": lambda x, w: norms.rms_norm(x, w, EPS)[0],
        "eager": lambda x, w: F.rms_norm(x, (size,), w, EPS),
        "compiled": plain_rms,
    }
    if (peer := liger("liger_rms_norm")) is not None:
        rms["liger"] = lambda x, w: peer(x, w, EPS)
    yield "rms_norm", 1, 1, rms
    yield (
        "add_rms_norm",
        2,
        1,
        {
            "ours": lambda x, r, w: norms.add_rms_norm(x, r, w, EPS)[:2],
            "eager": add_rms,
            "compiled": plain_add_rms,
        },
    )
    layer: Versions = {
        "ours": lambda x, w, b: norms.layer_norm(x, w, b, EPS)[0],
        "eager": lambda x, w, b: F.layer_norm(x, (size,), w, b, EPS),
        "compiled": lambda x, w, b: F.layer_norm(x, (size,), w, b, EPS),
    }
    if (peer_layer := liger("liger_layer_norm")) is not None:
        layer["liger"] = lambda x, w, b: peer_layer(x, w, b, EPS)
    yield "layer_norm", 1, 2, layer


def compiled(versions: Versions, wanted: bool) -> Versions:
    torch._dynamo.reset()
    made = {
        n: torch.compile(f, dynamic=False) if n == "compiled" else f for n, f in versions.items()
    }
    return made if wanted and GPU else {n: f for n, f in made.items() if n != "compiled"}


def norm_rows(copy: float) -> Iterator[Row]:
    for rows, size in NORM_SIZES:
        for name, wide, vectors, versions in norm_versions(size):
            versions = compiled(versions, (rows, size) in COMPILED_SIZES)
            operands = [normal(rows, size) for _ in range(wide)]
            operands += [normal(size) for _ in range(vectors)]
            grads = [normal(rows, size) for _ in range(wide)]
            label, element = f"{rows}x{size}", rows * size * 2
            with torch.no_grad():
                times = {n: seconds(f, *operands) for n, f in versions.items()}
            yield Row(f"{name} forward", label, 2 * wide * element / copy, times)
            times = {n: seconds(both(f, operands, grads)) for n, f in versions.items()}
            moved = (5 if wide == 1 else 8) * element  # x y | g x dx, or x r y t | gy gt t dx
            yield Row(f"{name} forward+backward", label, moved / copy, times)


def loss_ours(logits: Tensor, labels: Tensor) -> Tensor:
    lse, target = ce.cross_entropy_parts(logits, labels, 0)
    return (lse - target).mean()


def loss_rows(copy: float) -> Iterator[Row]:
    for rows, vocab in LOSS_SIZES:
        logits, labels = normal(rows, vocab), torch.randint(0, vocab, (rows,), device=DEVICE)
        versions: Versions = {
            "ours": loss_ours,
            "eager": lambda x, t: F.cross_entropy(x.float(), t),
            "compiled": lambda x, t: F.cross_entropy(x.float(), t),
        }
        if (peer := liger("liger_cross_entropy")) is not None:
            versions["liger"] = lambda x, t, peer=peer: peer(x, t)[
                0
            ]  # last: it overwrites the logits
        times, forward = {}, {}
        for n, f in compiled(versions, rows == 8192).items():
            with torch.no_grad():
                forward[n] = seconds(f, logits, labels, repeats=10)
            ones = [torch.ones((), device=DEVICE)]
            run = both(lambda x, f=f, t=labels: f(x, t), [logits], ones)
            times[n] = seconds(run, repeats=10)
        element = rows * vocab * 2
        yield Row("cross_entropy forward", f"{rows}x{vocab}", element / copy, forward)
        yield Row("cross_entropy forward+backward", f"{rows}x{vocab}", 3 * element / copy, times)


def linear_rows() -> Iterator[Row]:
    for rows, width, vocab in LINEAR_SIZES:
        h, w = normal(rows, width), normal(vocab, width, scale=0.02)
        labels = torch.randint(0, vocab, (rows,), device=DEVICE)
        scale = torch.full((rows,), 1 / rows, device=DEVICE)
        logits = normal(rows, vocab)
        products = [(h, w.T), (logits, w), (logits.T, h)]
        floor = sum(seconds(torch.mm, *pair, repeats=5) for pair in products)
        del logits, products
        times, extra = {}, {}
        for n, f in linear_versions(labels, scale, ce.chunk_rows(vocab, 2)).items():
            run = both(f, [h, w], [torch.ones((), device=DEVICE)])
            times[n] = seconds(run, repeats=5)
            extra[n] = peak_extra(run)
        note = "peak over grads: " + ", ".join(f"{n} {b / 1e9:.2f} GB" for n, b in extra.items())
        size = f"{rows}x{width}x{vocab}"
        yield Row("linear_cross_entropy forward+backward", size, floor, times, note)


def linear_versions(labels: Tensor, scale: Tensor, chunk: int) -> Versions:
    def ours(h: Tensor, w: Tensor) -> Tensor:
        return ce.linear_cross_entropy(h, w, labels, scale, chunk)[0]

    def recomputing(h: Tensor, w: Tensor) -> Tensor:
        lse, target = ce.linear_cross_entropy_parts(h, w, labels, 0, chunk)
        return (lse - target).mean()

    def eager(h: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy((h @ w.T).float(), labels)

    return {"ours": ours, "recomputing": recomputing, "eager": eager}


def peak_extra(run: Callable[[], Any]) -> int:
    """Bytes at the peak of a call beyond what it returns."""
    if not GPU:
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run()
    kept = sum(r.numel() * r.element_size() for r in results)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - kept


def show(row: Row) -> None:
    """One line per op: milliseconds and, in brackets, the fraction of the ceiling."""
    ours = row.seconds["ours"]
    parts = [f"{n} {t * 1e3:8.3f} ({row.floor / t:4.2f})" for n, t in row.seconds.items()]
    faster = min(t for n, t in row.seconds.items() if n != "ours") / ours
    goal = GOALS.get(row.name, "")
    line = f"{row.name:38} {row.size:18} floor {row.floor * 1e3:7.3f}  " + "  ".join(parts)
    print(f"{line}  best other/ours {faster:4.2f}  goal {goal}  {row.note}", flush=True)


def host_table() -> None:
    x, w = normal(8, 64), normal(64)
    leaves = [x.detach().requires_grad_(), w.detach().requires_grad_()]
    calls = {
        "ours, no grad": lambda: norms.rms_norm(x, w, EPS),
        "ours, grad": lambda: norms.rms_norm(*leaves, EPS),
        "eager, no grad": lambda: F.rms_norm(x, (64,), w, EPS),
        "eager, grad": lambda: F.rms_norm(leaves[0], (64,), leaves[1], EPS),
    }
    for name, call in calls.items():
        print(
            f"host time of rms_norm 8x64, {name:15} {host_microseconds(call):6.1f} us", flush=True
        )


# --- Tuning ---------------------------------------------------------------------------------------
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
    per_token = lse, target, logits, labels, lse, result, 0
    # Name, kind, the shipped launch, bytes moved, and the launcher; it takes the launch last.
    kernels: list[tuple[str, str, Launch, float, Callable[..., Any], tuple[Any, ...]]] = [
        ("rms_norm", "forward", tn.forward_launch(size), 2 * row,
         tn.forward, (x, None, w, None, EPS, False)),
        ("rms_norm_backward", "backward", tn.backward_launch(size), 3 * row,
         tn.backward, (g, x, w, None, rstd, None)),
        ("cross_entropy_parts", "read", tce.reading_launch(vocab), logit,
         tce.launch_parts, (logits, labels, lse, target, 0)),
        ("cross_entropy_parts_backward", "write", tce.writing_launch(vocab), 2 * logit,
         tce.launch_grad, per_token),
        ("loss_and_grad", "read", tce.reading_launch(vocab), 2 * logit,
         tce.launch_loss_and_grad, (result, labels, lse, target)),
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
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--tune", action="store_true", help="try launches instead (GPU)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    copy, matmul = ceilings()
    card = torch.cuda.get_device_name() if GPU else "CPU, tiny sizes"
    print(f"{card}; torch {torch.__version__}; copy {copy / 1e9:.0f} GB/s; "
          f"matmul {matmul / 1e12:.0f} TFLOP/s", flush=True)  # fmt: skip
    if args.tune:
        tune(copy, args.only)
        return
    found = []
    sources = {"norm": norm_rows(copy), "cross_entropy": loss_rows(copy), "linear": linear_rows()}
    for name, rows in sources.items():
        if args.only and args.only not in name:
            continue
        for row in rows:
            show(row)
            found.append(row._asdict())
    host_table()
    if args.json:
        args.json.write_text(json.dumps({"card": card, "copy": copy, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
