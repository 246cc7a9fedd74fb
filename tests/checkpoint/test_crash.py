"""A save that dies, or whose disk fails, at any system call leaves a whole committed checkpoint."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import disks
import pytest
from disks import Failing, Watched, same, state
from processes import environment

import shardwise as sw
from shardwise.checkpoint import CheckpointError, files

POINTS = 56  # system calls of the save; a test below says so if this is no longer right
WRITES = (6, 7, 11, 12, 13, 17, 28)


@pytest.fixture(scope="module")
def died(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Directories that a killed save of step 2 left behind, one per mode and call."""
    home = tmp_path_factory.mktemp("died")
    done = subprocess.run(
        [sys.executable, disks.__file__, str(home)],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return home, json.loads((home / "ends.json").read_text())


def test_every_system_call_is_a_point(tmp_path: Path) -> None:
    calls = disks.calls_of_a_save(tmp_path)
    assert len(calls) == POINTS
    assert tuple(i for i, name in enumerate(calls) if name == "write") == WRITES


@pytest.mark.parametrize(
    ("mode", "at"),
    [(mode, at) for mode in ("kill", "power") for at in range(POINTS)]
    + [("async", at) for at in range(0, POINTS, 3)]
    + [("half", at) for at in WRITES],
)
def test_a_killed_save_leaves_the_last_commit_whole(
    died: tuple[Path, dict[str, Any]], mode: str, at: int
) -> None:
    home, report = died
    root = home / mode / str(at)
    assert report["ends"][mode][str(at)] == -9
    step = sw.checkpoint.latest(root)
    committed = report["calls"].index("rename")
    # Without power, a rename that was not synced may be undone: the old commit is then the last.
    synced = committed + (3 if mode == "power" else 1)
    assert step == (2 if at >= synced else 1)
    assert same(sw.checkpoint.restore(root, state(0)), state(step))
    sw.checkpoint.verify(root)
    sw.checkpoint.save(root, state(3), step=3, keep=2)
    assert same(sw.checkpoint.restore(root, state(0)), state(3))
    left = {path.name for path in root.iterdir()}
    assert left == {".lock", "latest", f"step-{step:08d}", "step-00000003"}
    assert (root / "latest").read_text() == "step-00000003\n"


@pytest.mark.parametrize("at", range(POINTS))
def test_a_failing_disk_leaves_the_last_commit_whole(
    tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sw.checkpoint.save(tmp_path, state(1), step=1)
    disk = Failing(at)
    monkeypatch.setattr(files, "CURRENT", disk)
    failed = None
    try:
        sw.checkpoint.save(tmp_path, state(2), step=2, keep=1)
    except (CheckpointError, OSError) as error:
        failed = error
    monkeypatch.setattr(files, "CURRENT", Watched())
    assert disk.failed is not None
    name, where = disk.failed
    step = sw.checkpoint.latest(tmp_path)
    assert step is not None
    if failed is None:
        # What was only read could not be closed, or an old checkpoint, which stays, be read.
        assert step == 2
        assert name in ("close", "open_directory", "open_file", "read")
    else:
        assert isinstance(failed, CheckpointError)
        assert "No space left on device" in str(failed)
        assert not where or any(path in str(failed) for path in where)
    assert same(sw.checkpoint.restore(tmp_path, state(0)), state(step))
    if step == 1:
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "latest", "step-00000001"]
    sw.checkpoint.save(tmp_path, state(3), step=3)
    assert not [p.name for p in tmp_path.iterdir() if ".tmp-" in p.name]


@pytest.mark.parametrize(
    ("only", "code"),
    [
        ("mkdir", errno.EROFS),
        ("create", errno.EACCES),
        ("write", errno.EIO),
        ("write", errno.EDQUOT),
        ("fsync", errno.EIO),
        ("rename", errno.EACCES),
        ("replace", errno.EACCES),
        ("open_lock", errno.EROFS),
        ("open_lock", errno.EACCES),
    ],
)
@pytest.mark.parametrize("wait", [True, False])
def test_the_error_names_the_file_and_the_reason(
    tmp_path: Path, only: str, code: int, wait: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sw.checkpoint.save(tmp_path, state(1), step=1)
    disk = Failing(0, code, only)
    monkeypatch.setattr(files, "CURRENT", disk)
    with pytest.raises(CheckpointError) as caught:
        sw.checkpoint.save(tmp_path, state(2), step=2, wait=wait).wait()
    assert os.strerror(code) in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    step = 2 if only == "replace" else 1  # the commit was made; only `latest` could not be moved
    assert ("is committed, but then" in str(caught.value)) == (step == 2)
    monkeypatch.setattr(files, "CURRENT", Watched())
    assert same(sw.checkpoint.restore(tmp_path, state(0)), state(step))


def test_order_of_a_save_on_the_disk(tmp_path: Path, disk: Watched) -> None:
    """Files synced, then the manifest, then the directory, then the name, then `latest`."""
    sw.checkpoint.save(tmp_path, state(1), step=1)
    events = []
    for name, path in disk.calls:
        if name in ("create", "fsync", "rename", "replace") and path is not None:
            short = path.name.split(".tmp-")[0] if path != tmp_path else "root"
            events.append(f"{name} {short}")
    assert events == [
        "create shard-00000.safetensors",
        "fsync shard-00000.safetensors",
        "create shard-00001.safetensors",
        "fsync shard-00001.safetensors",
        "create manifest.json",
        "fsync manifest.json",
        "fsync step-00000001",
        "rename step-00000001",
        "fsync root",
        "create latest",
        "fsync latest",
        "replace latest",
        "fsync root",
    ]
