"""Saves beside a running program, several writers, and which checkpoints stay."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import Failing, Watched, same, state
from gallery import mesh
from processes import environment

import shardwise as sw
from shardwise.checkpoint import CheckpointError, files


class Held(Watched):
    """A disk whose first write waits until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.free = threading.Event(), threading.Event()

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "write":
            self.begun.set()
            assert self.free.wait(20)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    disk = Held()
    monkeypatch.setattr(files, "CURRENT", disk)
    return disk


def test_an_asynchronous_save_stores_what_was_there_at_the_call(tmp_path: Path, held: Held) -> None:
    plain, block = torch.arange(4.0), torch.arange(6.0)
    x = sw.from_local([block[:3], block[3:]], mesh(a=2), "n/a")
    pending = sw.checkpoint.save(tmp_path, {"plain": plain, "x": x}, step=1, wait=False)
    assert held.begun.wait(20)
    plain.fill_(9)  # a donated update writes into old storage
    block.fill_(9)
    assert not pending.is_done
    assert "running" in repr(pending)
    assert sw.checkpoint.latest(tmp_path) is None
    with pytest.raises(CheckpointError, match="still being written"):
        pending.wait(timeout=0.01)
    held.free.set()
    pending.wait()
    assert "committed" in repr(pending)
    back = sw.checkpoint.restore(tmp_path, {"plain": plain, "x": x})
    assert torch.equal(back["plain"], torch.arange(4.0))
    assert torch.equal(back["x"].full_tensor(), torch.arange(6.0))


def test_a_second_save_waits_for_the_first(tmp_path: Path, held: Held) -> None:
    first = sw.checkpoint.save(tmp_path, state(1), step=1, wait=False)
    assert held.begun.wait(20)
    threading.Timer(0.05, held.free.set).start()
    sw.checkpoint.save(tmp_path, state(2), step=2)
    assert first.is_done
    assert same(sw.checkpoint.restore(tmp_path, state(0), step=1), state(1))
    assert same(sw.checkpoint.restore(tmp_path, state(0)), state(2))


def test_saves_to_two_directories_do_not_wait_for_each_other(tmp_path: Path, held: Held) -> None:
    first = sw.checkpoint.save(tmp_path / "a", state(1), step=1, wait=False)
    assert held.begun.wait(20)
    files.CURRENT = Watched()
    sw.checkpoint.save(tmp_path / "b", state(2), step=2)
    assert not first.is_done
    held.free.set()
    first.wait()


def test_a_background_error_is_raised_by_wait_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CURRENT", Failing(0, errno.ENOSPC, "write"))
    pending = sw.checkpoint.save(tmp_path, state(1), step=1, wait=False)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="No space left on device"):
            pending.wait()
    assert "failed" in repr(pending)
    monkeypatch.setattr(files, "CURRENT", Watched())
    sw.checkpoint.save(tmp_path, state(1), step=1)  # told already: not raised again


def test_a_background_error_that_nobody_asked_for_is_raised_by_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CURRENT", Failing(0, errno.EIO, "fsync"))
    sw.checkpoint.save(tmp_path, state(1), step=1, wait=False)
    monkeypatch.setattr(files, "CURRENT", Watched())
    with pytest.raises(CheckpointError, match="Input/output error"):
        sw.checkpoint.save(tmp_path, state(2), step=2)
    assert sw.checkpoint.latest(tmp_path) is None
    sw.checkpoint.save(tmp_path, state(3), step=3)
    assert same(sw.checkpoint.restore(tmp_path, state(0)), state(3))


PROGRAM = """if True:
    import sys, torch, shardwise as sw
    from disks import Failing, Watched, state
    from shardwise.checkpoint import files
    good, bad = sys.argv[1:]
    files.CURRENT = Watched()
    sw.checkpoint.save(good, state(1), step=1, wait=False)
    files.CURRENT = Failing(0, only="write")
    sw.checkpoint.save(bad, state(1), step=1, wait=False)
"""


def test_a_program_that_ends_first_loses_neither_the_save_nor_the_error(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "good"), str(tmp_path / "bad")],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert same(sw.checkpoint.restore(tmp_path / "good", state(0)), state(1))
    assert "the save of step 1" in done.stderr
    assert "No space left on device" in done.stderr
    assert sw.checkpoint.latest(tmp_path / "bad") is None


def test_two_writers_of_one_directory(tmp_path: Path, held: Held) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    pending = sw.checkpoint.save(tmp_path / "real", state(1), step=1, wait=False)
    assert held.begun.wait(20)
    with pytest.raises(CheckpointError, match="another writer is saving to this directory"):
        sw.checkpoint.save(link, state(2), step=2)
    held.free.set()
    pending.wait()
    assert same(sw.checkpoint.restore(tmp_path / "real", state(0)), state(1))
    assert [p.name for p in (tmp_path / "real").glob("step*")] == ["step-00000001"]


class Late(Watched):
    """Another writer commits the same step just before this one does, on a disk without locks."""

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "rename":
            files.CURRENT = Unlocked()
            sw.checkpoint.save(args[0].parent, state(9), step=1)

    def lock(self, descriptor: int) -> None:
        raise OSError(errno.ENOTSUP, "no locks")


class Unlocked(Watched):
    def lock(self, descriptor: int) -> None:
        raise OSError(errno.ENOTSUP, "no locks")


def test_two_writers_on_a_disk_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CURRENT", Late())
    with pytest.raises(CheckpointError, match=r"committing.*not empty"):
        sw.checkpoint.save(tmp_path, state(1), step=1)
    assert same(sw.checkpoint.restore(tmp_path, state(0)), state(9))
    sw.checkpoint.verify(tmp_path)


def test_a_lock_that_fails_for_another_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CURRENT", Failing(0, errno.EIO, "lock"))
    with pytest.raises(CheckpointError, match="locking"):
        sw.checkpoint.save(tmp_path, state(1), step=1)


def test_without_locks_the_leftovers_of_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "step-00000001.tmp-0123456789abcdef"
    other.mkdir()
    monkeypatch.setattr(files, "CURRENT", Unlocked())
    sw.checkpoint.save(tmp_path, state(2), step=2)
    assert other.exists()
    monkeypatch.setattr(files, "CURRENT", Watched())
    sw.checkpoint.save(tmp_path, state(3), step=3)
    assert not other.exists()


def test_leftovers_are_removed_without_following_links(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "data").write_text("mine")
    root = tmp_path / "root"
    left = root / "step-00000001.tmp-0123456789abcdef"
    left.mkdir(parents=True)
    (left / "link").symlink_to(precious)
    (root / "step-00000002.tmp-0123456789abcdef").symlink_to(precious)
    (root / "latest.tmp-0123456789abcdef").write_text("step-0")
    sw.checkpoint.save(root, state(3), step=3)
    assert sorted(p.name for p in root.iterdir()) == [".lock", "latest", "step-00000003"]
    assert (precious / "data").read_text() == "mine"


def test_a_commit_is_never_overwritten(tmp_path: Path) -> None:
    sw.checkpoint.save(tmp_path, state(1), step=1)
    for wait in (True, False):
        with pytest.raises(CheckpointError, match="step 1 is committed already"):
            sw.checkpoint.save(tmp_path, state(2), step=1, wait=wait).wait()
    assert same(sw.checkpoint.restore(tmp_path, state(0)), state(1))


def test_a_step_before_the_last_commit_is_refused(tmp_path: Path) -> None:
    sw.checkpoint.save(tmp_path, state(5), step=5)
    with pytest.raises(CheckpointError, match="step 4 lies before a committed one"):
        sw.checkpoint.save(tmp_path, state(4), step=4)
    (tmp_path / "step-00000005").rename(tmp_path / "elsewhere")
    sw.checkpoint.save(tmp_path, state(4), step=4)
    assert sw.checkpoint.latest(tmp_path) == 4


@pytest.mark.parametrize(
    ("keep", "left"), [(1, [6]), (2, [5, 6]), (9, [2, 3, 5, 6]), (None, [2, 3, 5, 6])]
)
def test_the_newest_stay(tmp_path: Path, keep: int | None, left: list[int]) -> None:
    for step in (2, 3, 5):
        sw.checkpoint.save(tmp_path, state(step), step=step)
    sw.checkpoint.save(tmp_path, state(6), step=6, keep=keep)
    assert sorted(int(p.name[5:]) for p in tmp_path.glob("step-*")) == left
    assert (tmp_path / "latest").read_text() == "step-00000006\n"
    for step in left:
        assert same(sw.checkpoint.restore(tmp_path, state(0), step=step), state(step))


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"step": -1}, CheckpointError, "step must be from 0"),
        ({"step": 10**18 + 1}, CheckpointError, "step must be from 0"),
        ({"step": 1.0}, TypeError, "step must be an int, not float"),
        ({"step": True}, TypeError, "step must be an int, not bool"),
        ({"step": 1, "keep": 0}, CheckpointError, "keep must be from 1"),
        ({"step": 1, "keep": "all"}, TypeError, "keep must be an int, not str"),
    ],
)
def test_numbers_out_of_range(
    tmp_path: Path, options: dict[str, Any], kind: type[Exception], match: str
) -> None:
    with pytest.raises(kind, match=match):
        sw.checkpoint.save(tmp_path / "new", {}, **options)
    assert not (tmp_path / "new").exists()


def test_large_steps_sort_by_number(tmp_path: Path) -> None:
    for step in (0, 99_999_999, 100_000_000, 10**18):
        sw.checkpoint.save(tmp_path, state(1), step=step)
        assert sw.checkpoint.latest(tmp_path) == step


@pytest.mark.parametrize("act", ["restore", "inspect", "verify"])
def test_where_nothing_is(tmp_path: Path, act: str) -> None:
    arguments = (state(0),) if act == "restore" else ()
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="no checkpoint here"):
            getattr(sw.checkpoint, act)(folder, *arguments)
        assert sw.checkpoint.latest(folder) is None
    sw.checkpoint.save(tmp_path, state(3), step=3)
    with pytest.raises(
        CheckpointError, match=r"no checkpoint of this step: expected 4, found \[3\]"
    ):
        getattr(sw.checkpoint, act)(tmp_path, *arguments, step=4)


def test_a_file_where_the_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file.*Not a directory|File exists"):
        sw.checkpoint.save(tmp_path / "file", state(1), step=1)
    with pytest.raises(CheckpointError, match="Not a directory"):
        sw.checkpoint.latest(tmp_path / "file")


def test_directories_are_made_and_may_be_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pending = sw.checkpoint.save("a/b/c", state(1), step=1, wait=False)
    monkeypatch.chdir("/")
    pending.wait()
    assert sw.checkpoint.latest(os.path.join(tmp_path, "a", "b", "c")) == 1
