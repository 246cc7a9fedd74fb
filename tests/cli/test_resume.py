"""A run that stops and goes on: the same losses, other meshes, what is refused or noted."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import runs

from shardwise import checkpoint, make_mesh
from shardwise.cli import state, text
from shardwise.cli.claim import claimed
from shardwise.cli.config import ConfigError
from shardwise.cli.main import main
from shardwise.cli.settings import compare
from shardwise.cli.stop import Stop, any_of

KINDS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "mixed": (
        "data.micro_batches=2",
        "model.dropout=0.1",
        "optimizer.ema=0.9",
        "zero.stage=2",
        "precision.param=bfloat16",
        "precision.rounding=stochastic",
    ),
    "scaled": ("optimizer.loss_scale=dynamic", "precision.master=true", "memory.optimizer=host"),
    "on disk": ("memory.optimizer=disk", "optimizer.schedule=wsd", "optimizer.decay=2"),
}
MESHES = {
    "one device": ("mesh={data = 1, tensor = 1}",),
    "four of data, cut": ("mesh={data = 4, tensor = 1}", "zero.stage=3"),
    "a square": ("mesh={row = 2, col = 2}", 'strategy.preset=["tensor_2d"]'),
}


def interrupted(monkeypatch: pytest.MonkeyPatch, at: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal while the step `at` is under way."""
    whole = text.batches

    def batches(*args: Any, step: int, **keywords: Any) -> Any:
        if step == at:
            monkeypatch.setattr(text, "batches", whole)
            os.kill(os.getpid(), number)
        return whole(*args, step=step, **keywords)

    monkeypatch.setattr(text, "batches", batches)


def hashes(folder: Path) -> dict[str, list[str]]:
    """What the newest checkpoint holds, by tensor."""
    tensors = checkpoint.inspect(folder / "checkpoints").tensors
    return {path: [block.sha256 for block in entry.blocks] for path, entry in tensors.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_goes_on_bit_for_bit(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = KINDS[kind]
    whole, _ = runs.run(runs.file(tmp_path, "whole"), *options)
    file = runs.file(tmp_path, "parts")
    interrupted(monkeypatch, at=2)
    part, shown = runs.run(file, *options)
    assert part.losses == whole.losses[:3]
    assert "stopped by SIGTERM; go on with --resume" in shown
    assert "a sample" not in shown
    rest, shown = runs.run(file, *options, resume=True)
    assert "going on from step 3 in" in shown
    assert (rest.steps, rest.losses) == (whole.steps, whole.losses)
    assert rest.validation == whole.validation
    assert hashes(tmp_path / "parts") == hashes(tmp_path / "whole")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of 6 steps that was stopped after 3, for copies; and a whole one."""
    folder = tmp_path_factory.mktemp("runs")
    runs.run(runs.file(folder, "whole"))
    with pytest.MonkeyPatch.context() as patch:
        interrupted(patch, at=2, number=signal.SIGINT)
        runs.run(runs.file(folder, "run"), "checkpoint.async=false")
    return folder


def copied(stopped: Path, to: Path) -> str:
    """A copy of the stopped run."""
    source = stopped / "run/checkpoints"
    for path in source.rglob("*"):
        if path.is_file():
            target = to / "run/checkpoints" / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return runs.file(to)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_run_goes_on_on_another_mesh(mesh: str, stopped: Path, tmp_path: Path) -> None:
    whole = json.loads((stopped / "whole/loss.json").read_text())["losses"]
    curve, shown = runs.run(copied(stopped, tmp_path), *MESHES[mesh], resume=True)
    assert "changed since it was saved:" in shown
    assert curve.losses[:3] == whole[:3]
    assert curve.losses == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.seed=1", "run.seed: 0 when it was saved, now 1"),
        ("data.batch=8", "data.batch: 4 when it was saved, now 8"),
        ("data.split=0.8", "data.split: 0.9 when it was saved, now 0.8"),
        ("model.embed=32", "model.embed: 16 when it was saved, now 32"),
        ("optimizer.name=lion", 'optimizer.name: "adamw" when it was saved, now "lion"'),
        ("optimizer.ema=0.9", "optimizer.ema: not set when it was saved, now 0.9"),
        ("optimizer.skip_nonfinite=0", "optimizer.skip_nonfinite: 10 when it was saved, now 0"),
        ("precision.param=bfloat16", 'precision.param: "float32" when it was saved'),
        ("optimizer.loss_scale=dynamic", 'loss_scale: not set when it was saved, now "dynamic"'),
        ("optimizer.loss_scale=64", "optimizer.loss_scale: not set when it was saved, now 64.0"),
        (
            "memory.optimizer=disk",
            'memory.optimizer: "device" when it was saved, now "disk"; a state on disk takes no '
            "step back: optimizer.skip_nonfinite: 10 when it was saved, now 0",
        ),
    ],
)
def test_another_run_is_refused(
    override: str, words: str, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(stopped / "run.toml")
    assert main(["train", file, "--resume", "--set", override]) == 2
    shown = capsys.readouterr()
    assert "holds another run: set these back, or choose another path" in shown.err
    assert words in shown.err
    assert "collectives" not in shown.out


def test_another_text_is_refused(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copied(stopped, tmp_path)
    play = tmp_path / "play.md"
    play.write_bytes(play.read_bytes()[:-1] + b"!")
    assert main(["train", file, "--resume"]) == 2
    assert "data.text: " in capsys.readouterr().err


def test_what_does_not_matter_is_noted(stopped: Path, tmp_path: Path) -> None:
    _, shown = runs.run(
        copied(stopped, tmp_path),
        "run.steps=4",
        "optimizer.lr=1e-3",
        "optimizer.clip_norm=2.0",
        "zero.stage=1",
        "memory.optimizer=host",
        "run.log_every=1",
        resume=True,
    )
    lines = re.findall(r"^  (\S+): .* when it was saved, now .*$", shown, re.MULTILINE)
    assert sorted(lines) == [
        "memory.optimizer", "optimizer.clip_norm", "optimizer.lr", "run.steps", "zero.stage",
    ]  # fmt: skip


def test_a_state_moves_to_disk_and_back_where_no_step_is_taken_back(tmp_path: Path) -> None:
    file, plain = runs.file(tmp_path), "optimizer.skip_nonfinite=0"
    runs.run(file, plain, "run.steps=2")
    _, shown = runs.run(file, plain, "run.steps=3", "memory.optimizer=disk", resume=True)
    assert '  memory.optimizer: "device" when it was saved, now "disk"\n' in shown
    curve, _ = runs.run(file, plain, "run.steps=4", resume=True)
    assert curve.steps == [0, 1, 2, 3]


def test_settings_are_told_by_the_keys_of_the_file() -> None:
    old = {"mesh.axes.data": 2, "optimizer.hyper.b1": 0.9, "optimizer.loss_scale.initial": 8.0}
    old["optimizer.loss_scale.is_dynamic"] = False
    new = old | {"mesh.axes.data": 4, "optimizer.hyper.b1": 0.8}
    new |= {"optimizer.loss_scale.initial": 2.0**15, "optimizer.loss_scale.is_dynamic": True}
    assert compare(old, new, "here") == [
        "  mesh.data: 2 when it was saved, now 4",
        "  optimizer.b1: 0.9 when it was saved, now 0.8",
        '  optimizer.loss_scale: 8.0 when it was saved, now "dynamic"',
    ]


def test_a_key_of_another_version_is_noted_and_not_refused() -> None:
    known = {"model.embed": 8, "run.steps": 3, "run.log_every": 1}
    newer = known | {"model.window": 4, "run.log_every": 2}
    assert compare(known, newer, "here") == ["  model.window: not set when it was saved, now 4"]
    assert compare(newer, known, "here") == ["  model.window: 4 when it was saved, now not set"]
    with pytest.raises(ConfigError, match="here holds another run"):
        compare(known, newer | {"model.embed": 16}, "here")


def test_a_state_of_another_form_is_refused_with_what_changed(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A key that no rule knows: the comparison of paths and dtypes finds it."""
    file = copied(stopped, tmp_path)
    assert main(["train", file, "--resume", "--set", "optimizer.state_dtype=bfloat16"]) == 1
    shown = capsys.readouterr().err
    assert "expected bf16" in shown
    assert 'optimizer.state_dtype: not set when it was saved, now "bfloat16"' in shown


def test_a_used_directory_is_refused_without_resume(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(stopped / "run.toml")]) == 2
    assert "holds a run saved at step 3: go on with it by --resume" in capsys.readouterr().err


def test_resume_without_a_checkpoint_begins(tmp_path: Path) -> None:
    curve, shown = runs.run(runs.file(tmp_path), "run.steps=1", resume=True)
    assert "no checkpoint in" in shown
    assert curve.steps == [0]
    again, shown = runs.run(runs.file(tmp_path), "run.steps=1", resume=True)
    assert "going on from step 1" in shown
    assert again.losses == curve.losses


def test_resume_without_the_table_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(runs.file(tmp_path))
    file.write_text(file.read_text().replace("[checkpoint]\nevery = 2\n", ""))
    assert main(["train", str(file), "--resume"]) == 2
    assert "the file has no [checkpoint]" in capsys.readouterr().err
    runs.run(str(file), "run.steps=1")
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_damaged_newest_is_refused_and_the_sound_one_named(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copied(stopped, tmp_path)
    saved = tmp_path / "run/checkpoints"
    body = next((saved / "step-00000003").glob("shard-*"))
    whole = body.read_bytes()

    def refused() -> str:
        assert main(["train", file, "--resume", "--set", "run.steps=5"]) == 1
        return capsys.readouterr().err

    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-1]):
        body.write_bytes(damaged)
        shown = refused()
        assert body.name in shown
        assert "the newest sound one: step=2" in shown
        assert f"move step-00000003 out of {saved}" in shown
        assert "other settings" not in shown
    (saved / "step-00000003/manifest.json").unlink()
    assert "the newest sound one: step=2" in refused()
    (saved / "step-00000003").rename(tmp_path / "away")
    curve, shown = runs.run(file, resume=True)
    assert "going on from step 2" in shown
    assert curve.steps == list(range(6))
    for step in saved.glob("step-*"):
        (step / "manifest.json").write_text("{}")
    assert "none is sound" in refused()
    assert main(["train", file]) == 2
    assert "holds a run saved at step 6" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["run.out", "checkpoint.path"])
def test_directories_are_made_before_the_first_step(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("a file")
    override = f"{key}={tmp_path}/taken/here"
    assert main(["train", runs.file(tmp_path), "--set", override]) == 2
    shown = capsys.readouterr()
    assert f"{key}: cannot write to {tmp_path}/taken/here: Not a directory" in shown.err
    assert "step 1" not in shown.out


def test_two_runs_in_one_directory_are_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = runs.file(tmp_path)
    mesh = make_mesh({"data": 2})
    with claimed(runs.config(file, f"checkpoint.path={tmp_path}/kept"), mesh):
        assert main(["train", file]) == 2
        assert f"run.out: another run writes to {tmp_path}/run" in capsys.readouterr().err
        same = ["--set", f"run.out={tmp_path}/other", "--set", f"checkpoint.path={tmp_path}/kept"]
        assert main(["train", file, *same]) == 2
        assert "checkpoint.path: another run writes to" in capsys.readouterr().err
    with claimed(runs.config(file, f"checkpoint.path={tmp_path}/run"), mesh):
        pass  # one directory for both; and the first run has let go


def test_saves_are_due_every_so_often_and_never_wait_for_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves: list[tuple[int, bool]] = []

    class Slow:
        """A save that is still written while the next two steps run."""

        def __init__(self, step: int) -> None:
            self.step = step

        @property
        def is_done(self) -> bool:
            self.looks = getattr(self, "looks", 0) + 1
            return self.looks > 3

        def wait(self) -> None:
            pass

    def save(_path: Any, tree: Any, *, step: int, keep: int, wait: bool) -> Slow:
        assert (tree["step"], keep) == (step, 3)
        saves.append((step, wait))
        return Slow(step)

    monkeypatch.setattr(state.checkpoint, "save", save)
    runs.run(runs.file(tmp_path), "run.steps=8", "run.eval_every=100")
    # Due after 2, 4, 6; at 4 and 5 the first is still being written. 8 is the last, and waited for.
    assert saves == [(2, False), (6, False), (8, True)]


def test_old_checkpoints_go(tmp_path: Path) -> None:
    runs.run(
        runs.file(tmp_path), "checkpoint.every=1", "checkpoint.keep=2", "checkpoint.async=false"
    )
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*"))
    assert kept == ["step-00000005", "step-00000006"]


def test_signals_are_noted_and_a_late_second_interrupt_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with Stop() as stop:
        assert stop.signal == ""
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # a launcher passes it on
        assert stop.signal == "SIGINT"
        later = time.monotonic() + 2
        monkeypatch.setattr(time, "monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_one_process_agrees_with_itself() -> None:
    import shardwise as sw

    assert any_of(sw.make_mesh({"data": 2}), True, False) == [True, False]
