"""Checkpoints of real processes: the bytes of the simulated mesh, all commit or all raise."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import Failing, Watched, same
from gallery import mesh
from processes import launch, report

import shardwise as sw
from shardwise.checkpoint import CheckpointError, files

pytestmark = pytest.mark.processes
SHAPE = (12, 12)


def value(step: int) -> torch.Tensor:
    return torch.arange(144.0).reshape(SHAPE) + step


def tree(on: sw.Mesh, step: int) -> dict[str, Any]:
    first, *_, last = [*on.axes, *on.axes]
    return {
        "w": sw.shard(value(step), on, f"a/{first} b"),
        "b": sw.shard(value(step)[0], on, f"a/{last}"),
        "r": sw.shard(value(step)[1], on),
        "key": sw.random.key(step),
        "seen": step,
        "plain": torch.arange(3) + step,
    }


def run(root: str, axes: dict[str, int]) -> dict[str, Any]:
    """Several saves, one asynchronous, errors of one rank, and restores."""
    on = sw.make_mesh(axes)
    rank = int(os.environ["RANK"])
    files.CURRENT = Watched()
    found: dict[str, Any] = {}
    if sw.checkpoint.latest(root) is None:
        sw.checkpoint.save(root, tree(on, 1), step=1)
        pending = sw.checkpoint.save(root, tree(on, 2), step=2, wait=False)
        sw.reshard(tree(on, 0)["w"], "a b").full_tensor()  # collectives meanwhile
        pending.wait()
    else:
        found["resumed"] = same(sw.checkpoint.restore(root, tree(on, 0)), tree(on, 2))
        return found

    found["restored"] = same(sw.checkpoint.restore(root, tree(on, 0)), tree(on, 2))
    found["other layout"] = torch.equal(
        sw.checkpoint.restore(root, {"w": sw.zeros(SHAPE, on, f"a b/{next(iter(axes))}")}, step=1)[
            "w"
        ].full_tensor(),
        value(1),
    )
    if rank == on.size - 1:  # the disk of the last rank fails
        files.CURRENT = Failing(0, only="write")
    found["one disk fails"] = raised(lambda: sw.checkpoint.save(root, tree(on, 3), step=3))
    files.CURRENT = Watched()
    if rank == 0:
        files.CURRENT = Failing(0, only="rename")
    found["the commit fails"] = raised(lambda: sw.checkpoint.save(root, tree(on, 3), step=3))
    files.CURRENT = Watched()
    found["trees differ"] = raised(
        lambda: sw.checkpoint.save(root, tree(on, 3) | {"seen": rank}, step=3)
    )
    found["plain tensors differ"] = raised(
        lambda: sw.checkpoint.save(root, tree(on, 3) | {"plain": torch.tensor([rank])}, step=3)
    )
    for name, given in {"step": (3 + rank, None), "keep": (3, 1 + rank)}.items():

        def differing(step: int = given[0], keep: int | None = given[1]) -> None:
            sw.checkpoint.save(root, tree(on, 3), step=step, keep=keep)

        found[f"{name} differs"] = raised(differing)
    elsewhere = root if rank == 0 else f"{root}-{rank}"
    found["path differs"] = raised(lambda: sw.checkpoint.save(elsewhere, tree(on, 3), step=3))
    leaf: Any = {1, 2} if rank == on.size - 1 else 7
    found["a leaf of one rank"] = raised(
        lambda: sw.checkpoint.save(root, tree(on, 3) | {"seen": leaf}, step=3, wait=False).wait()
    )
    wrong = tree(on, 0) | ({"nothing": 1} if rank == 1 else {})
    found["one cannot restore"] = raised(lambda: sw.checkpoint.restore(root, wrong))
    found["latest"] = sw.checkpoint.latest(root)
    found["restored again"] = same(sw.checkpoint.restore(root, tree(on, 0)), tree(on, 2))
    return found


def raised(f: Any) -> str:
    try:
        f()
    except CheckpointError as error:
        return str(error)
    return ""


def test_processes_write_what_the_simulated_mesh_writes(tmp_path: Path) -> None:
    axes = {"data": 2, "tensor": 2}
    outcomes = launch(run, 4, str(tmp_path / "real"), axes)
    for outcome in outcomes:
        found = outcome.value
        assert found["restored"] is True
        assert found["restored again"] is True
        assert found["other layout"] is True
        assert "No space left on device" in found["one disk fails"]
        assert outcome.rank == 3 or "rank 3" in found["one disk fails"]
        assert "No space left on device" in found["the commit fails"]
        assert outcome.rank == 0 or "rank 0" in found["the commit fails"]
        for case in ("trees differ", "plain tensors differ"):
            assert "save different trees" in found[case]
            assert "rank 1" in found[case]
        assert "the processes save with different step: step=" in found["step differs"]
        assert "the processes save with different keep: keep=" in found["keep differs"]
        assert "the processes save to different directories" in found["path differs"]
        assert "a set is none of" in found["a leaf of one rank"]
        assert "nothing: not stored" in found["one cannot restore"] or (
            "'nothing': not stored" in found["one cannot restore"]
        )
        assert found["latest"] == 2
    on = mesh(**axes)
    for step in (1, 2):
        sw.checkpoint.save(tmp_path / "simulated", tree(on, step), step=step)
    real, simulated = (
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (tmp_path / "real", tmp_path / "simulated")
    )
    assert real == simulated
    # and on another number of processes
    for outcome in launch(run, 3, str(tmp_path / "real"), {"x": 3}):
        assert outcome.value == {"resumed": True}


class Killing(Watched):
    """The process dies at its first write."""

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "write":
            os.kill(os.getpid(), signal.SIGKILL)


def dies(root: str, victim: int) -> None:
    """One rank is killed while it writes; the others must end, and soon."""
    on = sw.make_mesh({"data": 2})
    files.CURRENT = Watched()
    sw.checkpoint.save(root, tree(on, 1), step=1)
    tree(on, 1)["w"].full_tensor()  # both are through, before one of them dies
    if int(os.environ["RANK"]) == victim:
        files.CURRENT = Killing()
    error = raised(lambda: sw.checkpoint.save(root, tree(on, 2), step=2))
    sys.stderr.write(error)
    sys.stderr.flush()
    os._exit(3)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_in_a_save_ends_the_others(tmp_path: Path, victim: int) -> None:
    env = {"SHARDWISE_TIMEOUT": "2"}
    outcomes = launch(dies, 2, str(tmp_path), victim, must_succeed=False, env=env)
    other = outcomes[1 - victim]
    assert outcomes[victim].code == -9, report(outcomes)
    assert other.code == 3, report(outcomes)
    assert f"no word from rank {victim} within 2 s" in other.err or "store is gone" in other.err
    on = mesh(data=2)
    assert same(sw.checkpoint.restore(tmp_path, tree(on, 0)), tree(on, 1))
    sw.checkpoint.save(tmp_path, tree(on, 2), step=2)
    assert not [p for p in tmp_path.iterdir() if ".tmp-" in p.name]
