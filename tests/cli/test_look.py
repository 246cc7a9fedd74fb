"""`shardwise plan` and `shardwise show`: a run's communication and layouts without running it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
        (["plan", FILE, "--set", "mesh.tensor=3"], "dim 'heads' of size 4"),
    ],
)
def test_bad_input_is_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
