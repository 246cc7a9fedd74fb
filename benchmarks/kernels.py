"""Every kernel beside torch eager, torch.compile and other peers, as shares of this run's ceilings.

    python benchmarks/kernels.py                    # the table, a family of kernel_rows/ at a time
    python benchmarks/kernels.py --only cross_entropy fp8 --json out.json
    python benchmarks/tune.py                       # block sizes, warps, stages of each kernel

Ceilings of the same run come first: bandwidth of a copy (bytes read and written) and an 8192^3 bf16
matmul. In brackets: the floor (for most ops the bytes that it must move, at the copy's bandwidth)
over its time. Medians of calls that are queued behind a sleeping kernel, so that no host time is in
them; host time per call has a table of its own. Each set of operands is larger than the L2 cache.
Without a GPU the sizes are tiny and the numbers mean nothing: the run only shows that all works.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
if any(importlib.util.find_spec(name) is None for name in ("einops", "optree")):
    bare = types.ModuleType("shardwise")  # kernels need torch alone: a bare GPU machine will do
    bare.__path__ = [str(ROOT)]
    sys.modules["shardwise"] = bare
elif importlib.util.find_spec("shardwise") is None:
    sys.path.insert(0, str(ROOT / "src"))
sys.path.insert(0, str(Path(__file__).parent))

from kernel_rows.measure import (  # noqa: E402
    GPU,
    Row,
    ceilings,
    host_microseconds,
    normal,
)  # fmt: skip

from shardwise.kernels import norms  # noqa: E402

FAMILIES = sorted(
    file.stem
    for file in (ROOT / "benchmarks" / "kernel_rows").glob("*.py")
    if file.stem not in ("__init__", "measure")
)


def show(row: Row) -> None:
    """One line per op: milliseconds and, in brackets, the fraction of the ceiling."""
    ours = row.seconds["ours"]
    parts = [f"{n} {t * 1e3:8.3f} ({row.floor / t:4.2f})" for n, t in row.seconds.items()]
    faster = min((t for n, t in row.seconds.items() if n != "ours"), default=ours) / ours
    line = f"{row.name:38} {row.size:18} floor {row.floor * 1e3:7.3f}  " + "  ".join(parts)
    print(f"{line}  best other/ours {faster:4.2f}  goal {row.goal or '-'}  {row.note}", flush=True)


def host_table() -> None:
    x, w = normal(8, 64), normal(64)
    leaves = [x.detach().requires_grad_(), w.detach().requires_grad_()]
    calls = {
        "ours, no grad": lambda: norms.rms_norm(x, w, 1e-5),
        "ours, grad": lambda: norms.rms_norm(*leaves, 1e-5),
        "eager, no grad": lambda: F.rms_norm(x, (64,), w, 1e-5),
        "eager, grad": lambda: F.rms_norm(leaves[0], (64,), leaves[1], 1e-5),
    }
    for name, call in calls.items():
        print(
            f"host time of rms_norm 8x64, {name:15} {host_microseconds(call):6.1f} us", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    copy, matmul = ceilings()
    card = torch.cuda.get_device_name() if GPU else "CPU, tiny sizes"
    print(f"{card}; torch {torch.__version__}; copy {copy / 1e9:.0f} GB/s; "
          f"matmul {matmul / 1e12:.0f} TFLOP/s", flush=True)  # fmt: skip
    found = []
    for family in args.only:
        for row in importlib.import_module(f"kernel_rows.{family}").rows(copy):
            show(row)
            found.append(row._asdict())
        if GPU:
            torch.cuda.empty_cache()
    host_table()
    if args.json:
        args.json.write_text(json.dumps({"card": card, "copy": copy, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
