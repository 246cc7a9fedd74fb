"""Damage to files of a commit is never loaded: the error names the file and the tensor."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import same, state

import shardwise as sw
from shardwise.checkpoint import CheckpointError

FILES = ("shard-00000.safetensors", "shard-00001.safetensors", "manifest.json")
FIRST, SECOND, MANIFEST = FILES


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two commits; the tests damage the second."""
    for step in (1, 2):
        sw.checkpoint.save(tmp_path, state(step), step=step)
    return tmp_path


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def refused(root: Path) -> list[CheckpointError]:
    """The errors of restoring and verifying step 2, which must not succeed."""
    errors = []
    for act in (
        lambda: sw.checkpoint.restore(root, state(0)),
        lambda: sw.checkpoint.restore(root, state(0), step=2),
        lambda: sw.checkpoint.verify(root, 2),
    ):
        with pytest.raises(CheckpointError) as caught:
            act()
        errors.append(caught.value)
    # the one before is as it was, and is found or at least can be asked for
    assert same(sw.checkpoint.restore(root, state(0), step=1), state(1))
    return errors


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit(root: Path, name: str, part: float, bit: int) -> None:
    path = root / "step-00000002" / name
    flip(path, int(part * path.stat().st_size), bit)
    for error in refused(root):
        assert error.file.endswith(name) or name in str(error)
        assert error.tensor in (("",) if name == MANIFEST else ("w", "b"))


def test_a_flipped_bit_of_the_newest_offers_the_older_one(root: Path) -> None:
    path = root / "step-00000002" / FIRST
    flip(path, path.stat().st_size - 1)
    for act in (
        lambda: sw.checkpoint.restore(root, state(0)),
        lambda: sw.checkpoint.verify(root),
    ):
        with pytest.raises(CheckpointError, match="the newest sound one: step=1") as caught:
            act()
        assert caught.value.is_damage
    with pytest.raises(CheckpointError) as caught:  # it fits, but for a name: no damage
        sw.checkpoint.restore(root, {"nothing": 1})
    assert not caught.value.is_damage
    assert "sound" not in str(caught.value)
    shutil.rmtree(root / "step-00000001")
    with pytest.raises(CheckpointError, match="none is sound"):
        sw.checkpoint.restore(root, state(0))


def test_every_part_of_a_file_counts(tmp_path: Path) -> None:
    sw.checkpoint.save(tmp_path, {"t": torch.arange(3)}, step=1)
    for name in (FIRST, MANIFEST):
        path = tmp_path / "step-00000001" / name
        for at in range(0, path.stat().st_size, 3):
            flip(path, at, at % 8)
            with pytest.raises(CheckpointError, match=re.escape(name)):
                sw.checkpoint.restore(tmp_path, {"t": torch.zeros(3, dtype=torch.int64)})
            flip(path, at, at % 8)
    sw.checkpoint.verify(tmp_path)


def test_a_flipped_block_names_both_hashes(root: Path) -> None:
    path = root / "step-00000002" / SECOND
    flip(path, path.stat().st_size - 1)
    for error in refused(root):
        assert error.tensor in ("w", "b")
        assert str(path) == error.file
        assert re.fullmatch("[0-9a-f]{64}", error.expected)
        assert re.fullmatch("[0-9a-f]{64}", error.found)
        assert error.expected != error.found
        assert error.expected in str(error)
        assert error.found in str(error)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [0, 1, 8, -8, -1])
def test_a_truncated_file(root: Path, name: str, size: int) -> None:
    path = root / "step-00000002" / name
    os.truncate(path, size % path.stat().st_size)
    for error in refused(root):
        assert name in str(error)


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_more_at_its_end(root: Path, name: str) -> None:
    with open(root / "step-00000002" / name, "ab") as file:
        file.write(b"\n")
    for error in refused(root):
        assert name in str(error)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(root: Path, name: str) -> None:
    (root / "step-00000002" / name).unlink()
    for error in refused(root):
        assert name in str(error)
        assert name == MANIFEST or error.tensor in ("w", "b")


def _swap(a: Path, b: Path) -> None:
    other = a.with_name("other")
    a.rename(other)
    b.rename(a)
    other.rename(b)


SWAPS: dict[str, tuple[str, str]] = {
    "of two devices": (f"step-00000002/{FIRST}", f"step-00000002/{SECOND}"),
    "of two steps": (f"step-00000002/{SECOND}", f"step-00000001/{SECOND}"),
    "manifests": (f"step-00000002/{MANIFEST}", f"step-00000001/{MANIFEST}"),
}


@pytest.mark.parametrize("which", SWAPS)
def test_swapped_files(root: Path, which: str) -> None:
    a, b = SWAPS[which]
    _swap(root / a, root / b)
    for act in (
        lambda: sw.checkpoint.restore(root, state(0)),
        lambda: sw.checkpoint.restore(root, state(0), step=2),
        lambda: sw.checkpoint.verify(root, 2),
    ):
        with pytest.raises(CheckpointError, match=r"shard-0000|manifest"):
            act()


def test_swapped_directories(root: Path) -> None:
    _swap(root / "step-00000001", root / "step-00000002")
    with pytest.raises(CheckpointError, match="step differs from the directory's name"):
        sw.checkpoint.restore(root, state(0))


def _link(path: Path) -> None:
    real = path.with_name("real")
    path.rename(real)
    path.symlink_to(real)


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("become", [_link, _fifo, _folder], ids=lambda f: f.__name__)
def test_no_regular_file(root: Path, name: str, become: Callable[[Path], None]) -> None:
    become(root / "step-00000002" / name)
    for error in refused(root):
        assert name in str(error)


def test_a_commit_that_is_a_link(root: Path) -> None:
    _link(root / "step-00000002")
    for error in refused(root):
        assert "step-00000002" in str(error)


def test_stray_files_are_left_alone(root: Path) -> None:
    for stray in ("notes.txt", "step-00000002/notes.txt", "step-9", "step-00000007.old"):
        (root / stray).write_text("mine")
    assert sw.checkpoint.latest(root) == 2
    assert same(sw.checkpoint.restore(root, state(0)), state(2))
    sw.checkpoint.save(root, state(3), step=3, keep=1)
    assert sorted(p.name for p in root.iterdir()) == sorted(
        [".lock", "latest", "notes.txt", "step-00000003", "step-00000007.old", "step-9"]
    )


@pytest.mark.parametrize(
    "text", ["", "step-00000009\n", "step-00000001\n", "../../etc/passwd", "\0garbage", None]
)
def test_the_file_latest_is_only_a_hint(root: Path, text: str | None) -> None:
    (root / "latest").unlink()
    if text is not None:
        (root / "latest").write_text(text)
    assert sw.checkpoint.latest(root) == 2
    assert same(sw.checkpoint.restore(root, state(0)), state(2))


def test_the_newest_that_is_sound_is_offered(root: Path) -> None:
    (root / "step-00000002" / SECOND).unlink()
    assert sw.checkpoint.latest(root) == 1
    with pytest.raises(CheckpointError, match="the newest sound one: step=1"):
        sw.checkpoint.restore(root, state(0))
    shutil.rmtree(root / "step-00000001")
    assert sw.checkpoint.latest(root) is None
    with pytest.raises(CheckpointError, match="none is sound"):
        sw.checkpoint.restore(root, state(0))


def test_the_last_sound_one_is_never_pruned(root: Path) -> None:
    sw.checkpoint.save(root, state(3), step=3)
    for step in (2, 3):
        flip(root / f"step-{step:08d}" / MANIFEST, 40)
    sw.checkpoint.save(root, state(4), step=4, keep=2)
    assert same(sw.checkpoint.restore(root, state(0), step=1), state(1))
    assert same(sw.checkpoint.restore(root, state(0)), state(4))


def test_a_damaged_commit_is_set_aside_when_its_step_is_saved_again(root: Path) -> None:
    flip(root / "step-00000002" / SECOND, -1)
    sw.checkpoint.save(root, state(2), step=2)
    assert same(sw.checkpoint.restore(root, state(0)), state(2))
    (aside,) = root.glob("step-00000002.bad-*")
    assert (aside / SECOND).exists()


def _no(_: Any) -> None:
    raise AssertionError("a pickle was executed")


class Evil:
    def __reduce__(self) -> Any:
        return _no, (1,)


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_is_never_executed(root: Path, name: str) -> None:
    torch.save({"w": Evil()}, root / "step-00000002" / name)
    refused(root)
