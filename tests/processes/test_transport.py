"""The distributed transport equals the simulated one, tells every rank of errors, ends cleanly."""

from __future__ import annotations

import itertools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import Outcome, environment, launch, report
from torch import Tensor

from shardwise.meshlib.distributed import DistributedTransport, agree, job, rank_text, shutdown
from shardwise.meshlib.errors import MeshError
from shardwise.meshlib.mesh import Mesh, make_mesh
from shardwise.meshlib.simulated import SimulatedTransport

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool)
MOVED = (*DTYPES, torch.float8_e4m3fn, torch.int16, torch.complex64)  # moves only
pytestmark = pytest.mark.processes
GOLDEN = Path(__file__).parent / "golden"

Call = Callable[[Any, Sequence[Tensor]], list[Tensor]]


def orders(axes: Mapping[str, int]) -> list[tuple[str, ...]]:
    """Every subset of the axes in every order."""
    counts = range(1, len(axes) + 1)
    return [order for n in counts for order in itertools.permutations(axes, n)]


def calls(axes: tuple[str, ...], n: int, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    """Every collective over `axes` for shards of shape (n, 2n, 3)."""
    ring = [(i, (i + 1) % n) for i in range(n)]
    some = [(0, n - 1), (0, 0)]  # one sender, two receivers; zeros elsewhere
    for dim in (0, 1, -1):
        yield f"all_gather {dim}", lambda t, xs, d=dim: t.all_gather(xs, axes, d)
    for dims in ((0, 1), (1, 0), (1, 1), (0, -1)):
        yield f"all_to_all {dims}", lambda t, xs, d=dims: t.all_to_all(xs, axes, *d)
    for pairs in (ring, some, []):
        yield f"permute {pairs}", lambda t, xs, p=pairs: t.permute(xs, axes, p)
    for root in {0, n - 1}:
        yield f"broadcast {root}", lambda t, xs, r=root: t.broadcast(xs, axes, r)
    if dtype not in DTYPES:
        return
    for op in ("sum", "max", "min"):
        yield f"all_reduce {op}", lambda t, xs, o=op: t.all_reduce(xs, axes, o)
    for root in {0, n - 1}:
        yield f"reduce {root}", lambda t, xs, r=root: t.reduce(xs, axes, r)
    for dim in (0, 1):
        yield f"reduce_scatter {dim}", lambda t, xs, d=dim: t.reduce_scatter(xs, axes, d)


def shards_for(size: int, n: int, dtype: torch.dtype, layout: str) -> list[Tensor]:
    """One shard per device: small whole numbers, so that sums are exact in every dtype."""
    make = torch.Generator().manual_seed(n)
    shape = {"plain": (n, 2 * n, 3), "transposed": (3, 2 * n, n), "strided": (n, 2 * n, 6)}[layout]
    whole = torch.randint(0, 5, (size, *shape), generator=make).to(dtype)
    if layout == "transposed":
        whole = whole.transpose(1, 3)
    return list(whole[..., ::2] if layout == "strided" else whole)


def same(got: Tensor, want: Tensor) -> bool:
    """Equal bit for bit, dtype and shape too."""
    if got.dtype != want.dtype or got.shape != want.shape:
        return False
    return torch.equal(*(x.contiguous().view(-1).view(torch.uint8) for x in (got, want)))


def compare(mesh: Mesh, dtypes: Sequence[torch.dtype], layouts: Sequence[str]) -> tuple[int, str]:
    """Every collective over every order of axes: how many were compared, and which differ."""
    simulated = SimulatedTransport(mesh.axes)
    me = mesh.ranks.index(job().rank)
    count = 0
    wrong: list[str] = []
    for axes, dtype, layout in itertools.product(orders(mesh.axes), dtypes, layouts):
        n = mesh.group_size(axes)
        xs = shards_for(mesh.size, n, dtype, layout)
        mine = xs[me].to(mesh.device)
        before = mine.clone()
        for name, call in calls(axes, n, dtype):
            want = call(simulated, xs)[me]
            (got,) = call(mesh.comm, [mine])
            count += 1
            aliased = got.untyped_storage().data_ptr() == mine.untyped_storage().data_ptr()
            if not same(got.cpu(), want) or not same(mine, before) or aliased:
                wrong.append(f"{name} over {axes}, {dtype}, {layout}")
    return count, "; ".join(wrong)


def everything(
    axes: dict[str, int], dtypes: list[str], layouts: list[str], device: str
) -> tuple[int, str]:
    mesh = make_mesh(axes, device=device)
    return compare(mesh, [getattr(torch, name) for name in dtypes], layouts)


def names(dtypes: Sequence[torch.dtype]) -> list[str]:
    return [str(dtype).removeprefix("torch.") for dtype in dtypes]


ALL, PLAIN = names(MOVED), names((torch.float32, torch.bool))
STRIDES = ["plain", "transposed", "strided"]


@pytest.mark.parametrize(
    ("axes", "dtypes", "layouts"),
    [
        ({"a": 2}, ALL, STRIDES),
        ({"a": 3}, ALL, STRIDES),
        ({"a": 2, "one": 1, "b": 2}, [*PLAIN, "bfloat16"], ["transposed"]),
    ],
    ids=str,
)
def test_every_collective_equals_the_simulated_one(
    axes: dict[str, int], dtypes: list[str], layouts: list[str]
) -> None:
    for one in launch(everything, math.prod(axes.values()), axes, dtypes, layouts, "cpu"):
        count, wrong = one.value
        assert wrong == ""
        assert count >= 9 * len(dtypes) * len(layouts)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs")
def test_every_collective_on_nccl_equals_the_simulated_one() -> None:
    for one in launch(everything, 2, {"a": 2}, ALL, STRIDES, "cuda"):
        assert one.value[1] == ""


def sub_meshes() -> dict[str, Any]:
    """Meshes of some processes, in orders of ranks that do not ascend; then 2 x 2 x 2."""
    mesh = make_mesh({"a": 2, "b": 4}, device="cpu")
    rank = job().rank
    found: dict[str, Any] = {}
    picks: list[dict[str, Any]] = [
        {"a": 0},
        {"a": 1, "b": (3, 1)},
        {"b": (2, 0, 1)},
        {"a": (1, 0), "b": (0, -1)},
        {"b": 0},
    ]
    for pick in picks:
        sub = mesh.at(**pick)
        if rank in sub.ranks:
            found[str(pick)] = compare(sub, [torch.float32], ["plain"])
        elif not sub.is_outside:
            found[str(pick)] = (0, "held by a process that is no member")
    # Processes have made different numbers of groups by now; groups of all of them still work.
    (total,) = mesh.comm.all_reduce([torch.tensor(rank)], ("b",))
    cube = mesh.refine("b", b=2, c=2)
    found["after"] = compare(cube, [torch.float32, torch.bool], ["plain"])
    found["scalar"] = int(total)
    return found


def test_sub_meshes_of_some_processes_and_then_a_cube_of_all() -> None:
    for one in launch(sub_meshes, 8):
        found = dict(one.value)
        assert found.pop("scalar") == (6 if one.rank < 4 else 22)
        assert found["after"][0] >= 15 * 2 * 16
        assert {wrong for _, wrong in found.values()} == {""}


def awkward() -> dict[str, bool]:
    """Scalars, empty tensors, expanded ones, complex sums, groups of one."""
    mesh = make_mesh({"a": 2, "one": 1}, device="cpu")
    comm, rank = mesh.comm, job().rank
    scalar, empty = torch.tensor(2.5), torch.empty(0, 4)
    wide = torch.tensor([[1.0 + rank]]).expand(4, 2)
    alone = torch.ones(2, 2, dtype=torch.bfloat16)
    (twice,) = comm.all_reduce([scalar], ("a",))
    (most,) = comm.all_reduce([torch.tensor(rank == 1)], ("a",), "sum")
    return {
        "scalar": twice.item() == 5.0 and twice.shape == () and scalar.item() == 2.5,
        "scalar bool": bool(most) and most.view(torch.uint8).item() == 1,
        "empty gather": comm.all_gather([empty], ("a",), 1)[0].shape == (0, 8),
        "empty scatter": comm.reduce_scatter([empty], ("a",), 1)[0].shape == (0, 2),
        "empty exchange": comm.all_to_all([empty], ("a",), 1, 0)[0].shape == (0, 2),
        "empty permute": comm.permute([empty], ("a",), [(0, 1)])[0].shape == (0, 4),
        "expanded": comm.all_reduce([wide], ("a",))[0].tolist() == [[3.0, 3.0]] * 4,
        "complex": comm.all_reduce([torch.tensor(1j)], ("a",))[0].item() == 2j,
        "both trues": comm.all_reduce([torch.tensor(True)], ("a",))[0].view(torch.uint8).item()
        == 1,
        "one": all(
            same(call(comm, [alone])[0], alone)
            for name, call in calls(("one",), 1, torch.bfloat16)
            if name != "permute []"
        ),
        "one, nothing sent": comm.permute([alone], ("one",), [])[0].sum().item() == 0,
        "no axes": same(comm.all_gather([alone], (), 0)[0], alone),
        "no group": isinstance(comm, DistributedTransport) and comm.process_group(("one",)) is None,
    }


def test_awkward_tensors() -> None:
    for one in launch(awkward, 2):
        assert [name for name, right in one.value.items() if not right] == []


def mismatches() -> dict[str, str]:
    """Every sort of disagreement, on one mesh that goes on working; the error's text by name."""
    mesh = make_mesh({"a": 2, "b": 2}, device="cpu", check=True)
    comm, rank = mesh.comm, job().rank
    last, x = rank == 3, torch.ones(4, 4)
    texts: dict[str, str] = {}

    def attempt(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
            texts[name] = "no error"
        except MeshError as error:
            texts[name] = str(error)

    attempt("agreement", lambda: comm.all_gather([x], ("a",), 1))
    attempt("shape", lambda: comm.all_reduce([x[:2] if last else x], ("a",)))
    attempt("dtype", lambda: comm.all_reduce([x.int() if last else x], ("a",)))
    attempt("op", lambda: comm.all_reduce([x], ("a",), "max" if rank % 2 else "sum"))
    attempt("axis", lambda: comm.all_reduce([x], ("a",) if rank < 2 else ("b",)))
    attempt("order of axes", lambda: comm.all_gather([x], ("a", "b") if last else ("b", "a"), 0))
    attempt("dim", lambda: comm.all_gather([x], ("a",), int(last)))
    gather, scatter = comm.all_gather, comm.reduce_scatter
    attempt("kind", lambda: (scatter if last else gather)([x], ("a",), 0))
    attempt("root", lambda: comm.broadcast([x], ("b",), int(last)))
    attempt("reduce", lambda: comm.reduce([x], ("b",), int(last)))
    attempt("pairs", lambda: comm.permute([x], ("b",), [(0, 1)] if last else [(1, 0)]))
    attempt("dims", lambda: comm.all_to_all([x], ("a",), *((0, 1) if last else (1, 0))))
    attempt("long", lambda: comm.permute([x], ("a",), [(0, 0)] * (50 + last)))
    attempt("agree", lambda: agree(comm, bytes(8), "params.w"))
    attempt("digest", lambda: agree(comm, bytes([rank % 2] * 8), "params.w at train.py:12"))
    attempt("again", lambda: comm.all_reduce([x], ("a", "b")))
    return texts


def test_a_checked_mesh_raises_the_same_on_all_ranks(request: pytest.FixtureRequest) -> None:
    texts = [one.value for one in launch(mismatches, 4)]
    assert texts == [texts[0]] * 4
    found = "".join(f"## {name}\n{text}\n\n" for name, text in texts[0].items())
    golden = GOLDEN / "mismatches.txt"
    if request.config.getoption("--update-golden", default=False):
        golden.write_text(found)
    assert found == golden.read_text()


def lifetime(how: str, folder: str) -> str:
    """Start, leave and start again, or use the job that the user made; meshes work each time."""

    def init(name: str) -> None:
        where = f"file://{folder}/{name}"
        dist.init_process_group("gloo", where, rank=int(os.environ["RANK"]), world_size=2)

    if how == "user":
        init("first")
    first = job("cpu")
    mesh = make_mesh({"a": 2}, device="cpu")
    assert job("cpu") is first
    assert make_mesh({"a": -1}, device="cpu") is mesh
    with pytest.raises(MeshError, match="this job runs on cpu, not cuda:0"):
        job("cuda:0")
    if how == "user":  # whose end has no barrier either, and whose start does not wait for all
        mesh.comm.all_reduce([torch.ones(1)], ("a",))
    shutdown()
    if how == "user":
        assert dist.is_initialized()
        dist.destroy_process_group()
        init("second")
    again = make_mesh({"a": 2}, device="cpu")
    assert again is not mesh
    assert job().attempt != first.attempt
    assert again.comm.all_reduce([torch.tensor(1)], ("a",))[0] == 2
    if how == "user":
        dist.destroy_process_group()
    return first.backend


@pytest.mark.parametrize("how", ["ours", "user"])
def test_a_job_can_be_left_and_started_again(how: str, tmp_path: Path) -> None:
    for one in launch(lifetime, 2, how, str(tmp_path)):
        assert one.value == "gloo"
        assert one.err == ""


def fails(how: str) -> None:
    """Rank 1 of three goes in some way while the others wait for it."""
    mesh = make_mesh({"a": 3}, device="cpu")
    x = torch.ones(8)
    mesh.comm.all_reduce([x], ("a",))
    print("before")
    if job().rank == 1:
        if how == "raises":
            raise ValueError("the user's own error")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exits":
            sys.exit(3)
        time.sleep(4)  # twice the timeout
    mesh.comm.all_gather([x], ("a",), 0)
    print("after")


@pytest.mark.parametrize(
    ("how", "code", "timeout"),
    [("raises", 1, 100), ("killed", -9, 100), ("exits", 3, 100), ("late", 1, 2)],
)
def test_others_end_soon_after_a_rank_has_gone(how: str, code: int, timeout: int) -> None:
    env = {"SHARDWISE_TIMEOUT": str(timeout)}
    outcomes = launch(fails, 3, how, must_succeed=False, env=env)
    gone, others = outcomes[1], (outcomes[0], outcomes[2])
    assert gone.code == code, report(outcomes)
    for one in others:
        assert one.code == 1, report(outcomes)  # and not None: killed 10 s after the first end
        assert one.out == "before\n"
        assert (
            "in all_gather over a of mesh(a=3): one of ranks 0-2 died, or came too late" in one.err
        )
    if how == "raises":
        assert "ValueError: the user's own error" in gone.err


SCRIPT = """
import os, signal, sys, torch
from shardwise.meshlib.mesh import make_mesh
mesh = make_mesh({"a": -1}, device="cpu")
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
if sys.argv[1:] == ["dies"] and attempt == "0" and not mesh.is_first:
    os.kill(os.getpid(), signal.SIGKILL)
(total,) = mesh.comm.all_reduce([torch.ones(3)], ("a",))
print(f"attempt {attempt} total {total.tolist()}\\n", end="")
"""


def torchrun(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    script = folder / "program.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1"]
    return subprocess.run(
        [*command, "--nproc-per-node", "2", str(script), *args],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_torchrun_starts_and_ends_without_a_word(tmp_path: Path) -> None:
    done = torchrun(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "attempt 0 total [2.0, 2.0, 2.0]\n" * 2


def test_torchrun_restarts_a_job_of_which_a_process_was_killed(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "dies")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "attempt 1 total [2.0, 2.0, 2.0]\n" * 2


def test_a_distributed_mesh_outside_a_job_says_how_to_start_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(MeshError, match="start this program with torchrun --nproc-per-node N"):
        make_mesh({"a": 1}, transport="distributed", device="cpu")


def test_importing_starts_nothing() -> None:
    script = (
        "import shardwise.meshlib.distributed, torch.distributed as d; print(d.is_initialized())"
    )
    outcomes: list[Outcome] = launch(script, 1)
    assert outcomes[0].out == "False\n"


def test_ranks_print_as_runs() -> None:
    assert [rank_text(ranks) for ranks in ([3], [5, 0, 2, 1], [0, 2])] == [
        "rank 3",
        "ranks 0-2, 5",
        "ranks 0, 2",
    ]
