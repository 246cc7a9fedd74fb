"""Tiny runs of `shardwise train`: a file to write, and what a run of it gives."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from shardwise.cli import build, train
from shardwise.cli.config import Config, read_config
from shardwise.cli.report import Curve

PLAYS = Path(__file__).parents[2] / "examples/data/shakespeare"
FILE = """
[run]
steps = 6
eval_every = 4
out = "{out}"
[mesh]
data = 2
tensor = 2
[strategy]
preset = ["data", "tensor_1d"]
[model]
family = "gpt2"
layer = 1
embed = 16
heads = 2
[data]
text = "{text}"
seq = 16
batch = 4
split = 0.9
[optimizer]
lr = 3e-3
warmup = 2
clip_norm = 1.0
[checkpoint]
every = 2
"""


def file(folder: Path, name: str = "run") -> str:
    """A file whose run lies in a folder of the same name, with checkpoints."""
    play = folder / "play.md"
    if not play.exists():
        play.write_bytes((PLAYS / "hamlet.md").read_bytes()[:3000])
    path = folder / f"{name}.toml"
    path.write_text(FILE.format(out=folder / name, text=play))
    return str(path)


def config(path: str, *overrides: str) -> Config:
    """The file's configuration."""
    return read_config(
        path,
        families={name: family.config for name, family in build.FAMILIES.items()},
        presets=tuple(build.PRESETS),
        derived=build.DERIVED,
        overrides=overrides,
    )


def run(path: str, *overrides: str, resume: bool = False) -> tuple[Curve, str]:
    """Train with a short sample; the curve, and what was printed."""
    out = io.StringIO()
    console = Console(file=out, width=160, highlight=False)
    length, train.LENGTH = train.LENGTH, 2
    try:
        return train.train(config(path, *overrides), console, resume=resume), out.getvalue()
    finally:
        train.LENGTH = length
