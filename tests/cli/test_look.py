"""`plan`, `show`, `inspect`, `doctor`: what a run would do, what it saved, what is there."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shardwise as sw
from shardwise.cli.main import main

FILE = str(Path(__file__).parents[2] / "examples/gpt_text.toml")
SMALL = ["--set", "model.layer=1", "--set", "model.embed=32", "--set", "data.seq=16"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_plan_prints_the_collectives_of_one_step(capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "plan", FILE, *SMALL)
    assert "over tensor: " in shown
    assert "FLOPs per device" in shown
    data = json.loads(run(capsys, "plan", FILE, "--json", *SMALL))
    kinds = {c["kind"] for c in data["collectives"]}
    assert kinds == {"all_reduce"}


def test_plan_is_of_any_size_of_mesh(capsys: pytest.CaptureFixture[str]) -> None:
    big = ["--set", "mesh.data=256", "--set", "data.batch=1024", "--set", "mesh.depth=2"]
    assert "over data: " in run(capsys, "plan", FILE, *SMALL, *big)


def test_plan_holds_the_whole_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    """On an abstract mesh too: ZeRO, offload, scaled losses, micro-batches."""
    options = ("zero.stage=2", "memory.optimizer=host", "optimizer.loss_scale=dynamic")
    more = [word for option in (*options, "data.micro_batches=2") for word in ("--set", option)]
    data = json.loads(run(capsys, "plan", FILE, "--json", *SMALL, *more))
    assert {c["kind"] for c in data["collectives"]} == {
        "all_reduce", "reduce_scatter", "all_gather",
    }  # fmt: skip
    assert {c["kind"] for c in data["copies"]} == {"to_host", "to_device"}


def test_plan_compares_two_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(capsys, "plan", FILE, "--diff", FILE, *SMALL) == "no difference\n"
    text = Path(FILE).read_text().replace('"tensor_1d"', '"sequence_parallel"')
    other = tmp_path / "other.toml"
    other.write_text(text.replace("data/shakespeare", str(Path(FILE).parent / "data/shakespeare")))
    shown = run(capsys, "plan", FILE, "--diff", str(other), *SMALL)
    assert "reduce_scatter" in shown


def test_show_draws_mesh_strategy_and_layouts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "mesh(data=2, depth=1, tensor=2)" in run(capsys, "show", FILE, "mesh")
    assert "heads 4/tensor" in run(capsys, "show", FILE, "strategy")
    assert "heads 4/tensor" in run(capsys, "show", FILE)
    assert "f32[8/x 4/y]{U:z}" in run(capsys, "show", "8/x 4/y {U:z}")
    assert "on mesh(tensor=4)" in run(capsys, "show", "8 512/tensor tensor=4")
    for name in ("who.svg", "who.png", "who.txt"):
        assert run(capsys, "show", "8/x 4", "--save", str(tmp_path / name)) == ""
        assert (tmp_path / name).stat().st_size > 100


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "batch/data"], "write sizes in the place of names"),
        (["show", "6/x x=4"], "not divisible"),
        (["show", "8/x", "--save", "who.bmp"], "bmp"),
        (["show", "nowhere.toml"], "No such file"),
        (["plan", FILE, "--set", "model.vocab=100"], "model.vocab = 100: data.tokenizer 'bytes'"),
        (["plan", FILE, "--set", "mesh.tensor=3"], "dim 'heads' of size 4"),
    ],
)
def test_bad_input_is_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_inspect_shows_and_verifies_a_checkpoint(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "saved"
    mesh = sw.make_mesh({"data": 2})
    for step in (1, 2):
        tree = {"w": sw.full((4, 6), 1.0, mesh, "a/data b"), "key": sw.random.key(0), "step": step}
        sw.checkpoint.save(folder, tree, step=step)
    assert run(capsys, "inspect", str(folder)).startswith("step 2: 1 tensors, 24 elements, 96 B")
    assert run(capsys, "inspect", str(folder), "--step", "1").startswith("step 1: ")
    assert run(capsys, "inspect", str(folder / "step-00000001")).startswith("step 1: ")
    assert "every byte is as it was written" in run(capsys, "inspect", str(folder), "--verify")
    data = json.loads(run(capsys, "inspect", str(folder), "--json", "--verify"))
    assert data["step"] == 2
    assert data["values"] == {"key": str(sw.random.key(0)), "step": 2}
    assert data["tensors"]["w"] == {
        "dtype": "float32", "shape": [4, 6], "bytes": 96, "layout": "_/data _",
        "mesh": {"data": 2}, "blocks": 2,
    }  # fmt: skip
    assert [body["bytes"] for body in data["files"].values()] == [
        path.stat().st_size for path in sorted((folder / "step-00000002").glob("shard-*"))
    ]

    body = next((folder / "step-00000002").glob("shard-*"))
    raw = body.read_bytes()
    body.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert main(["inspect", str(folder)]) == 0  # the manifest is sound
    assert main(["inspect", str(folder), "--verify"]) == 1
    assert body.name in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "nothing")]) == 1
    assert "no checkpoint here" in capsys.readouterr().err


def test_doctor_tells_versions_devices_and_the_mesh(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = json.loads(run(capsys, "doctor", FILE, "--set", "mesh.depth=4", "--json"))
    assert data["packages"]["torch"] == torch.__version__
    assert data["packages"]["shardwise"] == sw.__version__
    assert set(data["optional"]) == {"rich", "matplotlib", "safetensors", "transformers", "triton"}
    assert (data["processes"], data["transport"]) == (1, "simulated")
    assert data["mesh"] == "mesh(data=2, depth=4, tensor=2)"
    assert len(data["devices"]) == torch.cuda.device_count()
    shown = run(capsys, "doctor")
    assert "this process alone: meshes are simulated" in shown
    assert shown.splitlines()[-1] == "mesh         mesh(data=1)"

    started = {"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    shown = run(capsys, "doctor", FILE)  # nothing is started, nobody is waited for
    assert "8 processes: meshes are distributed" in shown
    assert shown.splitlines()[-1] == "mesh         mesh(data=2, depth=2, tensor=2)"
    shown = run(capsys, "doctor", FILE, "--set", "mesh.data=3")
    assert "mesh(data=3, depth=-1, tensor=2) does not fit 8 processes" in shown
    monkeypatch.setattr("importlib.metadata.version", missing)
    assert "triton       not there; needed for kernels on a GPU" in run(capsys, "doctor")


def missing(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


def test_a_reader_that_has_read_enough_is_no_error(tmp_path: Path) -> None:
    tree = {f"{i:04d}": i for i in range(5000)}  # more than a pipe holds
    sw.checkpoint.save(tmp_path, tree, step=1)
    command = [sys.executable, "-m", "shardwise", "inspect", str(tmp_path), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("zero.stage=1", "zero.axis=nope"), "zero.axis: no axis 'nope' in [mesh]; its axes: data"),
        (
            ("optimizer.schedule=wsd", "optimizer.warmup=6", "optimizer.decay=5", "run.steps=10"),
            "optimizer.decay: optimizer.warmup, 6, and decay, 5, are more than run.steps, 10",
        ),
    ],
)
def test_tables_that_do_not_fit_are_told_before_anything_is_shown(
    options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word for option in options for word in ("--set", option)]
    assert main(["train", FILE, *given]) == 2
    shown = capsys.readouterr()
    assert words in shown.err
    assert shown.out == ""
