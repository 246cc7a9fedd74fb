"""Runs under the variables of torchrun: killed and restarted, and told to stop.

A rank that is killed ends the others within seconds, with a message that names it; a restarted job
goes on from the last commit and ends with the losses of a run that nothing disturbed, bit for bit.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import runs
from processes import launch

from shardwise import checkpoint
from shardwise.cli import step as steps
from shardwise.cli import train
from shardwise.cli.main import main

pytestmark = pytest.mark.processes
WAIT = {"SHARDWISE_TIMEOUT": "30"}
STEPS, EVERY = 6, 2


def command(file: str, *options: str) -> list[str]:
    return ["train", file, "--set", "checkpoint.async=false", *options]


def job(arguments: list[str], rank: int = -1, at: int = -1, number: int = 0) -> None:
    """What each process runs: the command. One rank gets a signal at the beginning of a step."""
    train.LENGTH = 2
    if rank == int(os.environ["RANK"]):
        train.make_step = signalled(train.make_step, at, number)
    raise SystemExit(main(arguments))


def signalled(make: Callable[..., steps.Step], at: int, number: int) -> Callable[..., steps.Step]:
    """`make_step`, whose steps on data are counted; one of them sends this process a signal."""

    @functools.wraps(make)
    def made(*args: object, **keywords: object) -> steps.Step:
        step, count = make(*args, **keywords), 0

        def counted(params: object, state: object, batch: dict, key: object) -> tuple:  # type: ignore[type-arg]
            nonlocal count
            if batch["tokens"].mesh.transport == "distributed":
                count += 1
                if count == at:
                    os.kill(os.getpid(), number)
            return step(params, state, batch, key)

        return counted

    return made


def losses(folder: Path) -> list[float]:
    return json.loads((folder / "loss.json").read_text())["losses"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run of two processes from start to end."""
    folder = tmp_path_factory.mktemp("whole")
    launch(job, 2, command(file(folder)), timeout=120, env=WAIT)
    return losses(folder / "run")


def file(folder: Path) -> str:
    path = Path(runs.file(folder))
    path.write_text(path.read_text().replace("tensor = 2\n[", "tensor = 1\n["))
    return str(path)


def test_a_killed_rank_stops_the_others_and_a_restart_ends_alike(
    tmp_path: Path, undisturbed: list[float]
) -> None:
    arguments = command(file(tmp_path))
    began = time.monotonic()
    left, dead = launch(
        job, 2, arguments, 1, STEPS - 1, signal.SIGKILL, env=WAIT, must_succeed=False
    )
    assert dead.code == -signal.SIGKILL
    assert left.code == 1
    assert left.seconds - dead.seconds < 10
    assert time.monotonic() - began < 60
    assert "one of ranks 0-1 died, or came too late" in left.err
    assert "over data of mesh(data=2, tensor=1)" in left.err
    saved = tmp_path / "run/checkpoints"
    assert checkpoint.latest(saved) == STEPS - EVERY

    first, _ = launch(job, 2, [*arguments, "--resume"], timeout=120, env=WAIT)
    assert f"going on from step {STEPS - EVERY}" in first.out
    assert losses(tmp_path / "run") == undisturbed


def test_a_signal_to_one_rank_saves_and_ends_all_with_status_0(
    tmp_path: Path, undisturbed: list[float]
) -> None:
    arguments = command(file(tmp_path))
    first, second = launch(job, 2, arguments, 1, 3, signal.SIGTERM, timeout=120, env=WAIT)
    assert (first.code, second.code) == (0, 0)
    assert "saved step 3 in" in first.out
    assert "stopped by another process; go on with --resume" in first.out
    assert checkpoint.latest(tmp_path / "run/checkpoints") == 3
    # On another number of processes sums have another order: the same up to rounding.
    curve, shown = runs.run(arguments[1], resume=True)
    assert "going on from step 3" in shown
    assert curve.losses[:3] == undisturbed[:3]
    assert curve.losses == pytest.approx(undisturbed, abs=1e-5)
