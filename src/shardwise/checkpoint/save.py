"""Writing a checkpoint so that a crash at any instant leaves the last committed one whole.

    1. take the lock; remove what dead writers left
    2. make step-N.tmp-<random>; every device's file in it: written, hashed, synced
    3. the manifest, last; sync; sync the directory
    4. rename the directory to step-N: the commit; sync its parent
    5. move `latest`; then remove checkpoints beyond `keep`

In a job every process does the writing of step 2 for its own devices, rank 0 the rest.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import secrets
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..layouts.tree import leaves
from . import files, plan, steps
from .errors import CheckpointError
from .files import Files
from .manifest import NAME, Block, Body, Entry, Manifest, arranged, write
from .parse import parse
from .plan import Piece, Plan
from .ranks import Ranks, acting
from .read import check_contents

MAX_STEP = 10**18
_IN_FLIGHT: dict[Path, Pending] = {}


class Pending:
    """A save that may still be running.

    Attributes:
        path: the directory that it saves to.
        step: which step.

    >>> import tempfile, shardwise as sw
    >>> pending = sw.checkpoint.save(tempfile.mkdtemp(), {"seen": 7}, step=1, wait=False)
    >>> pending.wait()
    >>> pending.is_done
    True
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.step = step
        self._error: BaseException | None = None
        self._is_told = False
        self._ended = threading.Event()

    @property
    def is_done(self) -> bool:
        """Whether the writer has ended, well or not."""
        return self._ended.is_set()

    def wait(self, timeout: float | None = None) -> None:
        """Return once the checkpoint is committed.

        Args:
            timeout: seconds; None waits as long as it takes.

        Raises:
            CheckpointError: what the writer met, or the time is over.
        """
        if not self._ended.wait(timeout):
            raise CheckpointError(f"step {self.step} is still being written", file=self.path)
        self._is_told = True
        if self._error is not None:
            raise self._error

    def _run(self, commit: Any) -> None:
        try:
            commit()
        except BaseException as error:  # told by wait, by the next save, or at exit
            self._error = error
        finally:
            self._ended.set()

    def __repr__(self) -> str:
        state = "running" if not self.is_done else "failed" if self._error else "committed"
        return f"Pending(step {self.step} to {self.path}: {state})"


def save(path: Any, tree: Any, *, step: int, keep: int | None = None, wait: bool = True) -> Pending:
    """Commit a tree as the checkpoint of a step.

    Args:
        path: the directory of checkpoints, made if need be; one for each run. In a job all
            processes see it.
        tree: ShardedTensors on any mesh, torch tensors, random keys, int, float, bool, str, None.
            In a job every process gives the same tree, `path`, `step` and `keep`.
        step: its number; larger than that of every sound checkpoint in the directory.
        keep: how many of the newest checkpoints stay; None keeps all.
        wait: False returns once what this process writes is copied to host memory; a thread
            does the rest. A save that is still running is waited for first.

    Returns:
        The `Pending` whose `wait` raises what the writer met; already done if `wait`.

    Cost: each element is written once, by one of the devices that hold it.

    Raises:
        CheckpointError: a leaf that cannot be stored (a tensor that is still a sum among them), a
            step that is committed already or lies before one, processes that ask for different
            things, another writer, a failing disk, a
            process that failed or fell silent. The last committed checkpoint stays.

    >>> import tempfile, torch, shardwise as sw
    >>> folder, mesh = tempfile.mkdtemp(), sw.make_mesh({"data": 2})
    >>> w = sw.shard(torch.arange(4.0), mesh, "n/data")
    >>> _ = sw.checkpoint.save(folder, {"w": w, "lr": 0.1}, step=100)
    >>> sw.checkpoint.restore(folder, {"w": sw.shard(torch.zeros(4), mesh)})
    {'w': f32[4] local[4] on mesh(data=2)}
    """
    _check_number("step", step, 0, MAX_STEP)
    if keep is not None:
        _check_number("keep", keep, 1, MAX_STEP)
    root = Path(path).absolute()
    before = _IN_FLIGHT.get(root)
    if before is not None:
        _IN_FLIGHT.pop(root)
        if not before._is_told:
            before.wait()
    ranks = acting(leaves(tree))
    disk = files.CURRENT
    try:
        taken = plan.make(tree, is_first=ranks.is_first, is_joint=ranks.size > 1, copy=not wait)
    except BaseException as error:
        _abandon(ranks, error)
        raise
    pending = Pending(root, step)

    def commit() -> None:
        _commit(disk, root, step, keep, taken, ranks)

    if wait:
        pending._run(commit)
        pending.wait()
        return pending
    _IN_FLIGHT[root] = pending
    # No daemon: the interpreter waits for it, so that leaving the program does not lose the save.
    threading.Thread(target=pending._run, args=(commit,), name=f"checkpoint {step}").start()
    return pending


def _check_number(name: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int:
        raise TypeError(f"save: {name} must be an int, not {type(value).__name__}")
    if not least <= value <= most:
        raise CheckpointError(f"save: {name} must be from {least} to {most}, not {value}")


@atexit.register
def _tell_untold() -> None:
    """At exit, show the errors that nobody asked for."""
    for pending in _IN_FLIGHT.values():
        if pending._error is not None and not pending._is_told:
            sys.stderr.write(f"the save of step {pending.step} to {pending.path} failed:\n")
            traceback.print_exception(pending._error)


def _commit(
    disk: Files, root: Path, step: int, keep: int | None, taken: Plan, ranks: Ranks
) -> None:
    """Steps 1 to 5, of this process; whoever fails tells the others."""
    try:
        if ranks.is_first:
            _lead(disk, root, step, keep, taken, ranks)
        else:
            _follow(disk, root, step, keep, taken, ranks)
    except BaseException as error:
        _abandon(ranks, error)
        raise


def _abandon(ranks: Ranks, error: BaseException) -> None:
    """Tell the other processes that this one fails."""
    message = {"error": f"{type(error).__name__}: {error}"}
    for topic in ("begin", "end") if ranks.is_first else ("written",):
        with contextlib.suppress(RuntimeError):  # the store is gone with the job
            ranks.tell(topic, message)


def _heard(ranks: Ranks, topic: str, of: Sequence[int] = (0,)) -> list[dict[str, Any]]:
    """What these ranks told; raises what one of them met."""
    messages = ranks.hear(topic, of)
    for rank, message in zip(of, messages, strict=False):
        if "error" in message:
            raise CheckpointError(f"rank {rank} could not save: {message['error']}")
    return messages


def _lead(disk: Files, root: Path, step: int, keep: int | None, taken: Plan, ranks: Ranks) -> None:
    """What rank 0 does: everything but the other devices' files."""
    files.make_directories(disk, root)
    with files.exclusive(disk, root) as is_alone:
        if is_alone:
            for path in steps.leftovers(disk, root):
                files.remove(disk, path)
        _make_room(disk, root, step)
        temporary = root / f"{steps.directory(root, step).name}.tmp-{secrets.token_hex(8)}"
        with files.doing("making the directory", temporary):
            disk.mkdir(temporary)
        try:
            asked = {"step": step, "keep": keep}
            ranks.tell("begin", {"name": temporary.name, "path": str(root), "asked": asked})
            mine = {"digest": taken.digest, "files": _write_shards(disk, temporary, taken)}
            reports = [mine, *_heard(ranks, "written", range(1, ranks.size))]
            ranks.forget("written")
            text = _manifest(step, taken, reports, temporary)
            files.write_file(disk, temporary / NAME, [text])
            files.sync_directory(disk, temporary)
            with files.doing("committing", steps.directory(root, step)):
                disk.rename(temporary, steps.directory(root, step))
        except BaseException:
            with contextlib.suppress(CheckpointError):  # the next save removes it too
                files.remove(disk, temporary)
            raise
        try:
            files.sync_directory(disk, root)
            files.replace_file(disk, root / steps.LATEST, f"{steps.directory(root, step).name}\n")
            _prune(disk, root, keep)
        except CheckpointError as error:
            raise CheckpointError(f"step {step} is committed, but then: {error}") from error
    ranks.tell("end", {})


def _follow(
    disk: Files, root: Path, step: int, keep: int | None, taken: Plan, ranks: Ranks
) -> None:
    """What every other rank does: the files of its devices."""
    (begin,) = _heard(ranks, "begin")
    for name, mine in (("step", step), ("keep", keep)):
        if begin["asked"][name] != mine:
            raise CheckpointError(
                f"the processes save with different {name}: {name}={mine} on rank {ranks.rank}, "
                f"{name}={begin['asked'][name]} on rank 0"
            )
    try:
        if not (root / begin["name"]).is_dir():  # not by its spelling: mounts may differ
            raise CheckpointError(
                f"the processes save to different directories, path={root} on rank {ranks.rank} "
                f"and path={begin['path']} on rank 0; or rank {ranks.rank} does not see that one"
            )
        written = _write_shards(disk, root / begin["name"], taken)
    except CheckpointError:
        if ranks.has_told("end"):  # given up meanwhile, and the directory removed: say why
            _heard(ranks, "end")
        raise
    ranks.tell("written", {"digest": taken.digest, "files": written})
    _heard(ranks, "end")


def _make_room(disk: Files, root: Path, step: int) -> None:
    """Refuse a step that is committed or lies before one; set a damaged one of this step aside."""
    for other in (s for s in steps.committed(disk, root) if s >= step):
        where = steps.directory(root, other)
        if other > step and steps.damage(disk, root, other) is None:
            raise CheckpointError(
                f"step {step} lies before a committed one, which `latest` would still find; "
                "move the later ones away, or save to another directory",
                file=where,
            )
        if other == step:
            try:
                with steps.entered(disk, root, step) as found:
                    check_contents(disk, *found)
            except CheckpointError:
                aside = where.with_name(f"{where.name}.bad-{secrets.token_hex(8)}")
                with files.doing("setting aside", where):
                    disk.rename(where, aside)
            else:
                raise CheckpointError(
                    f"step {step} is committed already; a commit is never overwritten", file=where
                )


def _write_shards(disk: Files, temporary: Path, taken: Plan) -> dict[str, Any]:
    """Write this process's files; name to length, hash, and path, start, stop, hash per block."""
    written: dict[str, Any] = {}
    for device, pieces in sorted(taken.pieces.items()):
        name = f"shard-{device:05d}.safetensors"
        written[name] = _write_shard(disk, temporary / name, pieces, taken.tensors)
    return written


def _write_shard(
    disk: Files, path: Path, pieces: Sequence[Piece], tensors: Mapping[str, Entry]
) -> list[Any]:
    by_path = {piece.path: piece for piece in pieces}
    blocks = [(p, tensors[p], plan.block_of(piece, path.name)) for p, piece in by_path.items()]
    header, slots = arranged(blocks)
    whole = hashlib.sha256(header)
    rows: list[list[Any]] = []

    def content() -> Iterator[bytes | memoryview]:
        yield header
        for slot in slots:
            own = hashlib.sha256()
            for chunk in plan.chunks(plan.raw(by_path[slot.path].tensor)):
                own.update(chunk)
                whole.update(chunk)
                yield chunk
            rows.append([slot.path, slot.block.start, slot.block.stop, own.hexdigest()])

    files.write_file(disk, path, content())
    return [slots[-1].offset + slots[-1].bytes, whole.hexdigest(), rows]


def _manifest(step: int, taken: Plan, reports: Sequence[Mapping[str, Any]], where: Path) -> bytes:
    """The manifest of what all processes wrote, read back as a reader would."""
    odd = [rank for rank, report in enumerate(reports) if report["digest"] != taken.digest]
    if odd:
        raise CheckpointError(
            "the processes save different trees: leaves, values or plain tensors of rank "
            f"{', '.join(map(str, odd))} differ from those of rank 0",
        )
    bodies: dict[str, Body] = {}
    blocks: dict[str, list[Block]] = {path: [] for path in taken.tensors}
    written = {name: row for report in reports for name, row in report["files"].items()}
    for name, (size, digest, rows) in sorted(written.items()):
        bodies[name] = Body(size, digest)
        for path, start, stop, own in rows:
            blocks[path].append(Block(name, tuple(start), tuple(stop), own))
    tensors = {
        path: replace(entry, blocks=tuple(sorted(blocks[path], key=lambda block: block.start)))
        for path, entry in taken.tensors.items()
    }
    versions = {name: str(sys.modules[name].__version__) for name in ("shardwise", "torch")}
    text = write(Manifest(step, tensors, taken.values, bodies, versions))
    parse(text, where / NAME, step)
    return text


def _prune(disk: Files, root: Path, keep: int | None) -> None:
    """Remove sound checkpoints beyond the newest `keep`; each first loses its name, at once."""
    if keep is None:
        return
    sound = [s for s in steps.committed(disk, root) if steps.damage(disk, root, s) is None]
    for step in sound[:-keep]:
        where = steps.directory(root, step)
        dying = where.with_name(f"{where.name}.tmp-{secrets.token_hex(8)}")
        with files.doing("removing", where):
            disk.rename(where, dying)
        files.sync_directory(disk, root)  # else its name could come back without its content
        files.remove(disk, dying)
