"""Run one program on N processes of this machine and collect what each of them did.

A program is a function at the top of a module (its file is loaded again in every process) or the
text of a script. What the function returns (tensors, numbers, strings and containers of them) comes
back as `Outcome.value`, so that a test can call the same function here, on a simulated mesh, and
compare. The processes have the variables that torchrun would set. One leader imports torch, which
takes seconds, and forks them: real processes with sockets of their own, at the price of one start.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).resolve().parents[2] / "src"
GRACE = 10.0  # seconds that the others have once one process has failed
START = 60.0  # seconds that the leader may take to import torch on a busy machine


@dataclass(frozen=True)
class Outcome:
    """How one process ended.

    Attributes:
        rank: of the process.
        code: exit status; negative for a signal, None where the deadline killed it.
        out: its stdout.
        err: its stderr.
        seconds: from the fork to its end.
        value: what the function returned; None for a script and for a process that failed.
    """

    rank: int
    code: int | None
    out: str
    err: str
    seconds: float
    value: Any = None


class ProcessesFailed(AssertionError):
    """A process of a launch did not end with status 0; the text holds the output of all."""


def launch(
    program: Callable[..., Any] | str,
    size: int,
    *args: Any,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
    must_succeed: bool = True,
    preload: Sequence[str] = (),
) -> list[Outcome]:
    """Run the program on `size` processes and wait for all of them.

    Args:
        program: a function at the top of a module, or the text of a script.
        size: number of processes.
        *args: arguments of the function, or `sys.argv[1:]` of the script; anything JSON holds.
        timeout: seconds after which whoever still runs is killed. Once one process has failed the
            others have 10 seconds at most.
        env: variables on top of those that torchrun would set.
        must_succeed: whether to raise if a process ends with another status than 0.
        preload: modules that the leader imports, once for all processes.

    Raises:
        ProcessesFailed: with the output of every process.
    """
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        task = _task(program, home, size, args, timeout) | {"preload": list(preload)}
        (home / "task.json").write_text(json.dumps(task))
        _lead(home, environment() | dict(env or {}), timeout)
        ends = json.loads((home / "ends.json").read_text())
        outcomes = [_outcome(home, rank, *end) for rank, end in enumerate(ends)]
    if must_succeed and any(outcome.code != 0 for outcome in outcomes):
        raise ProcessesFailed(report(outcomes))
    return outcomes


def report(outcomes: Sequence[Outcome]) -> str:
    """Every process's status and output, for an assertion's text."""
    parts = [""]
    for one in outcomes:
        status = "killed at the deadline" if one.code is None else f"status {one.code}"
        parts.append(f"--- rank {one.rank}: {status} after {one.seconds:.1f} s")
        parts += [text.rstrip() for text in (one.out, one.err) if text.strip()]
    return "\n".join(parts)


def environment() -> dict[str, str]:
    """This process's variables, with the package and tests/support importable and one thread."""
    paths = [str(SOURCES), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    mine = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
    }
    return dict(os.environ) | mine


def _task(
    program: Callable[..., Any] | str, home: Path, size: int, args: Sequence[Any], timeout: float
) -> dict[str, Any]:
    if isinstance(program, str):
        script = home / "program.py"
        script.write_text(program)
        file, name = str(script), None
    else:
        file, name = program.__code__.co_filename, program.__name__
    return {"file": file, "name": name, "args": args, "size": size, "timeout": timeout}


def _lead(home: Path, variables: Mapping[str, str], timeout: float) -> None:
    leader = subprocess.Popen(
        [sys.executable, __file__, str(home)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=variables,
        start_new_session=True,
    )
    try:
        text, _ = leader.communicate(timeout=START + timeout)
    finally:
        # Its group holds the processes too; it is a group of our own, so nobody else is in it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader.pid, signal.SIGKILL)
        leader.wait()
    if leader.returncode != 0:
        raise ProcessesFailed(text.decode(errors="replace"))


def _outcome(home: Path, rank: int, code: int | None, seconds: float) -> Outcome:
    out, err = ((home / f"{rank}.{kind}").read_text(errors="replace") for kind in ("out", "err"))
    value = None
    if code == 0 and (home / f"{rank}.pt").exists():
        import torch

        value = torch.load(home / f"{rank}.pt", weights_only=True)
    return Outcome(rank, code, out, err, seconds, value)


def _free_port() -> int:
    # Below the range from which the kernel gives ports to others between this test and the use.
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _main(home: Path) -> None:
    """The leader: fork every process, wait for them, write how they ended."""
    import torch  # noqa: F401  once, for all of them

    task = json.loads((home / "task.json").read_text())
    for name in task["preload"]:
        importlib.import_module(name)
    gc.freeze()  # collections in a child then leave the shared pages alone: a faster exit
    size, port = task["size"], _free_port()
    children: dict[int, int] = {}
    for rank in range(size):
        child = os.fork()
        if child == 0:
            _become(home, rank, size, port)
            _run(home, task)
            return  # and leave as any program does, with its exit handlers
        children[child] = rank
    (home / "ends.json").write_text(json.dumps(_wait(children, task["timeout"])))


def _become(home: Path, rank: int, size: int, port: int) -> None:
    for kind, number in (("out", 1), ("err", 2)):
        with open(home / f"{rank}.{kind}", "wb") as file:
            os.dup2(file.fileno(), number)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def _run(home: Path, task: dict[str, Any]) -> None:
    import torch

    if task["name"] is None:
        sys.argv = [task["file"], *map(str, task["args"])]
        runpy.run_path(task["file"], run_name="__main__")
        return
    file = Path(task["file"])
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    value = getattr(module, task["name"])(*task["args"])
    if value is not None:
        torch.save(value, home / f"{os.environ['RANK']}.pt")


def _wait(children: dict[int, int], timeout: float) -> list[tuple[int | None, float]]:
    started = time.monotonic()
    deadline = started + timeout
    ends: dict[int, tuple[int | None, float]] = {}
    while len(ends) < len(children):
        child, status = os.waitpid(-1, os.WNOHANG)
        now = time.monotonic()
        if child:
            code = os.waitstatus_to_exitcode(status)
            ends[children[child]] = (code, now - started)
            deadline = deadline if code == 0 else min(deadline, now + GRACE)
        elif now > deadline:
            for late in (pid for pid, rank in children.items() if rank not in ends):
                os.kill(late, signal.SIGKILL)
                os.waitpid(late, 0)
                ends[children[late]] = (None, now - started)
        else:
            time.sleep(0.01)
    return [ends[rank] for rank in range(len(children))]


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
