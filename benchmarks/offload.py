"""An AdamW step with its state on the device, on the host and on disk; and what the disk gives.

    python benchmarks/offload.py [--tensors 60] [--size 250000] [--repeat 5] [--folder FOLDER]

First table: seconds of a step, medians, all memories in turn within each repeat, and bytes per
step. Second: GiB/s of the spill files beside a plain sequential copy of the same bytes, `dd`-like,
16 MiB a call, in the same run and on the same disk; both write to new files that are flushed, and
read what was dropped from the page cache as far as the system does that. Without a GPU, "host" and
"device" are one memory: the first table then shows what moving costs, not what it saves.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import shardwise as sw
from shardwise import optim
from shardwise.layouts import spill

PIECE = 16 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tensors", type=int, default=60)
    parser.add_argument("--size", type=int, default=250_000, help="elements of each")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", default=None, help="on the disk to measure")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        spill.spill_to(folder)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        mesh = sw.make_mesh({"data": 1}, transport="simulated", device=device)
        count = given.tensors * given.size
        print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
        print(f"AdamW, {given.tensors} tensors, {count / 1e6:.1f}M parameters, float32")
        steps(mesh, given.tensors, given.size, given.repeat)
        disk(Path(folder), count * 4, given.repeat)
        spill.remove_all()


def steps(mesh: sw.Mesh, tensors: int, size: int, repeat: int) -> None:
    """Time one step in each memory."""
    resident = optim.adamw(1e-3)
    settings = {
        "device": resident,
        "host": optim.offload(resident, "host"),
        "host, master": optim.offload(optim.master(resident), "host"),
        "disk": optim.offload(resident, "disk"),
    }
    held: dict[str, Any] = {}
    times: dict[str, list[float]] = {name: [] for name in settings}
    moved: dict[str, int] = {}
    for name, opt in settings.items():
        dtype = torch.bfloat16 if "master" in name else torch.float32
        params = {
            f"w{i}": sw.shard(torch.randn(size, dtype=dtype), mesh, "n") for i in range(tensors)
        }
        held[name] = params, {k: p * 1e-3 for k, p in params.items()}, opt.init(params)
    for number in range(repeat + 1):
        for name, opt in settings.items():
            params, grads, state = held[name]
            synchronize()
            start = time.perf_counter()
            params, state = opt.step(grads, state, params, donate=True)
            synchronize()
            if number:  # the first step allocates
                times[name].append(time.perf_counter() - start)
            held[name] = params, grads, state
    for name, opt in settings.items():
        params, grads, state = held[name]
        with sw.record() as plan:
            opt.step(grads, state, params)
        moved[name] = int(sum(c.bytes for c in plan.copies))
    base = statistics.median(times["device"])
    print(f"\n{'state lies on':<16}{'seconds':>10}{'of resident':>13}{'MiB moved':>12}")
    for name, each in times.items():
        middle = statistics.median(each)
        print(f"{name:<16}{middle:>10.4f}{middle / base:>12.2f}x{moved[name] / 2**20:>12.1f}")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def disk(folder: Path, size: int, repeat: int) -> None:
    """Compare spill files with a plain copy."""
    data = torch.randint(0, 255, (size,), dtype=torch.uint8)
    into = torch.empty_like(data)
    rates: dict[str, list[float]] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = run()
        rates.setdefault(name, []).append(size / (time.perf_counter() - start) / 2**30)
        return result

    for _ in range(repeat):
        raw = folder / "raw"
        timed("raw write", lambda raw=raw: raw_write(raw, data))
        drop(raw)
        timed("raw read", lambda raw=raw: raw_read(raw, into))
        raw.unlink()
        (made,) = timed("spill write", lambda: flushed(spill.write([data], "data")))
        found = spill.behind(made)
        assert found is not None
        drop(found[0].path)
        timed("spill read", lambda made=made: spill.read(made, into))
        assert torch.equal(into, data)
        del made, found
    print(f"\n{'':<12}{'raw GiB/s':>12}{'spill GiB/s':>13}{'of raw':>9}   ({size / 2**20:.0f} MiB)")
    for way in ("write", "read"):
        plain, ours = (statistics.median(rates[f"{who} {way}"]) for who in ("raw", "spill"))
        print(f"{way:<12}{plain:>12.2f}{ours:>13.2f}{ours / plain:>8.2f}x")


def raw_write(path: Path, data: torch.Tensor) -> None:
    view = memoryview(data.numpy())  # pyright: ignore
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    for start in range(0, len(view), PIECE):
        os.write(descriptor, view[start : start + PIECE])
    os.fsync(descriptor)
    os.close(descriptor)


def raw_read(path: Path, into: torch.Tensor) -> None:
    view = memoryview(into.numpy())  # pyright: ignore
    descriptor = os.open(path, os.O_RDONLY)
    for start in range(0, len(view), PIECE):
        os.preadv(descriptor, [view[start : start + PIECE]], start)
    os.close(descriptor)


def flushed(made: list[torch.Tensor]) -> list[torch.Tensor]:
    """What was written is on the disk, as after the raw write."""
    found = spill.behind(made[0])
    assert found is not None
    descriptor = os.open(found[0].path, os.O_RDWR)
    os.fsync(descriptor)
    os.close(descriptor)
    return made


def drop(path: Path) -> None:
    """Ask the system to forget the file's pages."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


if __name__ == "__main__":
    main()
