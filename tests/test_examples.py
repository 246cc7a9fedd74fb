"""The example programs run and do what they say."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name))


def test_a_3d_gpt_from_scratch_is_short_and_learns() -> None:
    assert len((EXAMPLES / "gpt_3d.py").read_text().splitlines()) <= 120
    losses = example("gpt_3d.py")["main"](steps=12, batch=8)
    assert losses[0] > math.log(256)  # drawn at random, it knows less than nothing
    assert losses[-1] < 4.0


def test_a_llama_sharded_five_ways_gives_the_same_logits() -> None:
    program = example("llama_five_ways.py")
    found = program["main"]()
    assert len(found) == 5
    first, *others = found.values()
    for logits in others:
        torch.testing.assert_close(logits, first, rtol=1e-4, atol=1e-5)
