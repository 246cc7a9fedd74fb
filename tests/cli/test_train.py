"""`shardwise train`: one file on any mesh gives one loss curve; it prints, learns, refuses."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import launch
from rich.console import Console

import shardwise as sw
from shardwise import models, strategies
from shardwise.cli import build, text
from shardwise.cli.config import read_config
from shardwise.cli.main import main
from shardwise.cli.train import Curve, train

PLAYS = Path(__file__).parents[2] / "examples/data/shakespeare"
FILE = """
[run]
steps = 8
log_every = 4
out = "{out}"
[mesh]
{mesh}
[strategy]
preset = [{preset}]
[model]
family = "gpt2"
layer = 2
embed = 32
heads = 4
dropout = 0.0
[data]
text = "{text}"
seq = 32
batch = 8
split = 0.9
[optimizer]
lr = 3e-3
warmup = 2
clip_norm = 1.0
"""
MESHES = {
    "one": ("data = 1\ntensor = 1", '"data", "tensor_1d"'),
    "2 x 2": ("data = 2\ntensor = 2", '"data", "tensor_1d"'),
    "2 x 2 x 2": ("data = 2\ndepth = 2\ntensor = 2", '"data", "data(depth)", "tensor_1d"'),
    "fsdp": ("data = 2\ntensor = 2", '"fsdp", "tensor_1d"'),
    "2d": ("row = 2\ncol = 2", '"tensor_2d"'),
    "cube of other names": ("a = 2\nb = 2\nc = 2", '"tensor_3d(a, b, c)"'),
}


def written(folder: Path, mesh: str = "one", **changes: str) -> Path:
    """A small run's file."""
    play = folder / "play.md"
    if not play.exists():
        play.write_bytes((PLAYS / "hamlet.md").read_bytes()[:40_000])
    axes, preset = MESHES[mesh]
    body = FILE.format(out=folder / "out", mesh=axes, preset=preset, text=play)
    for old, new in changes.items():
        body = body.replace(old, new)
    path = folder / f"{mesh.replace(' ', '')}.toml"
    path.write_text(body)
    return path


def curve(file: str, *overrides: str) -> tuple[Curve, str]:
    """Train, and what it printed."""
    config = read_config(
        file,
        families={name: family.config for name, family in build.FAMILIES.items()},
        presets=tuple(build.PRESETS),
        derived=build.DERIVED,
        overrides=overrides,
    )
    out = io.StringIO()
    return train(config, Console(file=out, width=120, highlight=False)), out.getvalue()


@pytest.fixture(autouse=True)
def _short_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardwise.cli.train.LENGTH", 12)


def in_process(file: str) -> torch.Tensor:
    """What each of several processes runs: its losses."""
    return torch.tensor(curve(file)[0].losses, dtype=torch.float64)


def test_one_file_gives_one_curve_on_every_mesh(tmp_path: Path) -> None:
    losses = {mesh: curve(str(written(tmp_path, mesh)))[0].losses for mesh in MESHES}
    for mesh, found in losses.items():
        assert found == pytest.approx(losses["one"], abs=1e-5), mesh


@pytest.mark.processes
def test_four_gloo_processes_give_the_same_curve(tmp_path: Path) -> None:
    expected = curve(str(written(tmp_path, "one")))[0].losses
    file = str(written(tmp_path, "2 x 2"))
    for outcome in launch(in_process, 4, file, timeout=120):
        assert outcome.value.tolist() == pytest.approx(expected, abs=1e-5)


def test_micro_batches_give_the_same_curve(tmp_path: Path) -> None:
    whole = curve(str(written(tmp_path, "2 x 2")))[0].losses
    parts = curve(str(written(tmp_path, "2 x 2")), "data.micro_batches=2")[0].losses
    assert parts == pytest.approx(whole, abs=1e-5)


def test_it_prints_mesh_layouts_collectives_scores_and_a_sample(tmp_path: Path) -> None:
    found, shown = curve(str(written(tmp_path, "2 x 2")))
    assert "mesh(data=2, tensor=2): 4 simulated devices on cpu" in shown
    assert re.search(
        r"blocks\.w_up +\[2 32 128/tensor\] +embed ffn/tensor \{R:data\} +16,384", shown
    )
    assert "collectives of one step, per device" in shown
    for words in ("unigram", "gzip -9", "lzma", "this run", "a sample", "ROMEO", "tokens/s"):
        assert words in shown
    assert found.losses[-1] < found.losses[0]
    data = json.loads((tmp_path / "out/loss.json").read_text())
    assert data["losses"] == found.losses
    assert (tmp_path / "out/loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_it_learns_past_the_unigram_baseline(tmp_path: Path) -> None:
    file = written(tmp_path, "one", **{"steps = 8": "steps = 150", "lr = 3e-3": "lr = 5e-3"})
    found, shown = curve(str(file))
    unigram = next(line for line in shown.splitlines() if "unigram" in line)
    assert found.validation[-1][1] < float(unigram.split("│")[2]) - 0.3
    assert found.losses[0] == pytest.approx(math.log(256), abs=0.2)


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(written(tmp_path))
    assert main(["train", file, "--set", "run.steps=3"]) == 0
    assert main(["train", file, "--set", "run.stepz=2"]) == 2
    assert "did you mean 'steps'" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "none.toml")]) == 2
    assert main(["train", file, "--set", "model.heads=3"]) == 2
    assert "embed 32 is not a multiple of heads 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mesh.tensor=8"], "dim 'heads' of size 4 (heads, attended) is not divisible by 8"),
        (
            ["mesh.data=3"],
            "dim 'batch' of size 8 (tokens, images, labels and 7 more) is not divisible by 3",
        ),
        (
            ["mesh={row = 2, col = 4}", "strategy.preset=['tensor_2d']"],
            "axes 'row', 'col' are the sides of a square, so they must be of one size",
        ),
        (["strategy.preset=['tensor_2d(a, b, c)']"], "tensor_2d takes 2 axes (row, col)"),
        (["strategy.preset=['tensor_1d(kw=cut)']"], "unknown option 'kw' (known: 'kv')"),
        (["model.preset=gpt2-smal"], "gpt2 has no size 'gpt2-smal'; did you mean 'gpt2-xl'?"),
        (['strategy.preset=["data(dato)"]'], "unknown axis 'dato'"),
        (["data.text=nowhere"], "no such file or folder: nowhere"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(
    overrides: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments: list[Any] = ["train", str(written(tmp_path))]
    for override in overrides:
        arguments += ["--set", override]
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert words in shown.err
    assert "step" not in shown.out


def test_a_named_size_with_padding_and_rows_of_the_file(tmp_path: Path) -> None:
    """SmolLM2's 3 key-value heads on 4 devices, made small; one row of the preset replaced."""
    file = written(
        tmp_path,
        "one",
        **{
            "data = 1\ntensor = 1": "tensor = 4",
            '"data", "tensor_1d"': '"sequence_parallel"',
            'family = "gpt2"': 'family = "llama"\npreset = "smollm2-135m"\npad.kv_heads = 4',
            "layer = 2": "layer = 1",
            "embed = 32": "embed = 36\nffn = 64\nhead_dim = 4",
            "\nheads = 4\n": "\n",
            "dropout = 0.0": "",
            "[data]": '[strategy.rest]\nfinal_norm = "embed/tensor"\n[data]',
        },
    )
    found, shown = curve(str(file), "run.steps=3")
    assert re.search(r"blocks\.w_k +\[1 36 4/tensor 4\]", shown)
    assert re.search(r"blocks\.w_q +\[1 36 12/tensor 4\]", shown)
    assert re.search(r"final_norm +\[36/tensor\] +embed \{R:tensor\}", shown)
    assert found.losses[-1] < found.losses[0]


def test_a_model_is_loaded_from_a_hugging_face_folder(tmp_path: Path) -> None:
    config = models.GPT2Config(layer=2, embed=32, heads=4, vocab=256, position=32)
    model = models.gpt2(config, strategies.data())
    params = model.init(sw.random.key(7), sw.make_mesh({"data": 1}, transport="simulated"))
    models.save(tmp_path / "model", model, params)
    changes = {
        'family = "gpt2"': f'load = "{tmp_path / "model"}"',
        "layer = 2\n": "",
        "embed = 32\n": "",
        "heads = 4\n": "",
        "dropout = 0.0\n": "",
    }
    losses = {
        mesh: curve(str(written(tmp_path, mesh, **changes)), "run.steps=2")[0].losses
        for mesh in ("one", "2 x 2")
    }
    assert losses["one"] == pytest.approx(losses["2 x 2"], abs=1e-5)
    data = text.encode(text.split_text((tmp_path / "play.md").read_bytes(), 0.9)[0])
    batch = text.batches(data, seq=32, batch=8, seed=0, step=0)
    first = model.loss(params, sw.shard(batch, params["embed"].mesh, "batch seq"))
    assert losses["one"][0] == pytest.approx(sw.reshard(first, "").item(), abs=1e-6)
