"""`run.jit`: the same losses and checkpoints, one program a run, and what is refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import runs

from shardwise import make_mesh
from shardwise.cli import jitting
from shardwise.cli.main import main

ONE = ("mesh={data=1}", 'strategy.preset=["data"]')
KINDS: dict[str, tuple[str, ...]] = {
    "plain": ONE,
    "tensor": ("model.dropout=0.1", "mesh={tensor=2}", 'strategy.preset=["tensor_1d"]'),
    "mixed": (
        *ONE, "data.micro_batches=2", "model.dropout=0.1", "precision.param=bfloat16",
        "precision.compute=bfloat16", "precision.master=true", "optimizer.ema=0.9",
    ),
    "scaled": (*ONE, "optimizer.loss_scale=dynamic", "strategy.recompute=all"),
}  # fmt: skip


@pytest.fixture
def _as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that run op by op: what the compiler makes of them has tests of its own."""
    monkeypatch.setitem(jitting.OPTIONS, "backend", "eager")


@pytest.mark.usefixtures("_as_it_is")
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_step_gives_the_same_losses_from_one_program(kind: str, tmp_path: Path) -> None:
    options = (*KINDS[kind], "run.steps=5")
    plain, shown = runs.run(runs.file(tmp_path, "plain"), *options)
    assert "the step runs op by op" in shown
    found, shown = runs.run(runs.file(tmp_path, "jit"), *options, "run.jit=true")
    assert "the step is compiled" in shown
    assert re.findall(r"^step (\d+): compiled the step in [\d.]+ s$", shown, re.M) == ["1"]
    assert found.losses == pytest.approx(plain.losses, abs=1e-6)
    assert found.validation[-1] == (5, pytest.approx(plain.validation[-1][1], abs=1e-5))


@pytest.mark.usefixtures("_as_it_is")
@pytest.mark.parametrize("first", ["true", "false"])
def test_a_run_goes_on_from_a_checkpoint_of_the_other_kind(first: str, tmp_path: Path) -> None:
    file, other = runs.file(tmp_path, "parts"), "false" if first == "true" else "true"
    constant = ("optimizer.schedule=constant", "optimizer.warmup=0")
    whole = runs.run(runs.file(tmp_path, "whole"), *ONE, *constant, "run.steps=5")[0]
    runs.run(file, *ONE, *constant, "run.steps=3", f"run.jit={first}")
    rest, shown = runs.run(file, *ONE, *constant, "run.steps=5", f"run.jit={other}", resume=True)
    assert "going on from step 3" in shown
    assert f'run.jit: "{first}" when it was saved, now "{other}"' in shown
    assert rest.losses == pytest.approx(whole.losses, abs=1e-6)


# Inductor imports what torch itself calls deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_the_compiler_gives_the_same_losses(tmp_path: Path) -> None:
    options = (*ONE, "run.steps=3", "model.embed=8", "model.heads=1", "model.dropout=0.1")
    plain = runs.run(runs.file(tmp_path, "plain"), *options)[0]
    found, shown = runs.run(runs.file(tmp_path, "jit"), *options, "run.jit=true")
    assert shown.count("compiled the step in") == 1
    assert found.losses == pytest.approx(plain.losses, abs=1e-5)


@pytest.mark.usefixtures("_as_it_is")
def test_bad_steps_are_counted_between_lines(tmp_path: Path) -> None:
    wild = (*ONE, "optimizer.lr=1e30", "optimizer.schedule=constant", "optimizer.clip_norm=1e9")
    with pytest.raises(FloatingPointError, match="steps in a row had gradients that are not"):
        runs.run(runs.file(tmp_path), *wild, "optimizer.skip_nonfinite=2", "run.jit=true")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("memory.optimizer=host", 'memory.optimizer = "host" moves tensors between memories'),
        ("memory.parameters=host", 'memory.parameters = "host" moves tensors between memories'),
        ("memory.activations=host", 'memory.activations = "host" moves tensors'),
        ("run.check=true", "run.check = true compares collectives while the step runs"),
        ("optimizer.name=galore", 'optimizer.name = "galore" depends on a count'),
    ],
)
def test_what_no_compiled_step_has_is_refused_by_name(
    override: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", runs.file(tmp_path), "--set", override, "--set", "run.jit=true"]) == 2
    assert words in capsys.readouterr().err
    config = runs.config(runs.file(tmp_path), override)  # "auto" runs op by op
    is_jitted, told = jitting.is_wanted(config, make_mesh({"data": 1}))
    assert (is_jitted, told) == (False, "the step runs op by op")


def test_a_word_that_is_no_switch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", runs.file(tmp_path), "--set", "run.jit=yes"]) == 2
    assert 'run.jit: expected true, false or "auto", found "yes"' in capsys.readouterr().err
    assert main(["train", runs.file(tmp_path), "--set", "run.jit=1"]) == 2
    assert 'run.jit: expected true, false or "auto", found 1' in capsys.readouterr().err
