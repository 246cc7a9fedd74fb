"""What a run says of its speed: the count that MFU is made of, what is timed, what is written."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import runs
import torch

import shardwise as sw
from shardwise import models, strategies
from shardwise.cli import speed
from shardwise.cli.speed import Clock, Ruler, peak_of, ruler

ONE = ("mesh={data=1}", 'strategy.preset=["data"]')
H100 = "NVIDIA H100 80GB HBM3"


def measure(card: str = "cpu", tokens: int = 1000, devices: int = 2) -> Ruler:
    """A ruler of round numbers."""
    return Ruler(tokens, devices, 100, 600, 700, card, peak_of(card))


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        (H100, 989.4e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A10", None),  # no part of A100
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", None),
    ],
)
def test_a_card_has_the_peak_of_its_datasheet(card: str, peak: float | None) -> None:
    assert peak_of(card) == peak


def test_mfu_is_flops_a_second_and_device_over_the_peak() -> None:
    mesh = sw.make_mesh({"data": 2}, transport="simulated")
    rate = 989.4e12 / 600  # tokens a second and device of the causal count at the peak
    made = measure(H100).speed(8, 4, 4 * 1000 / (0.3 * rate * 2), is_first=False, mesh=mesh)
    assert made.tokens_per_second == pytest.approx(0.6 * rate)
    assert made.tokens_per_second_device == pytest.approx(0.3 * rate)
    assert made.tflops == pytest.approx(0.3 * 989.4)
    assert (made.mfu, made.mfu_full) == (pytest.approx(0.3), pytest.approx(0.35))
    assert "MFU 30.0% (35.0% full)" in str(made)
    assert made.peak_kind == "resident"  # the mesh is on the CPU
    plain = measure().speed(8, 4, 2.0, is_first=True, mesh=mesh)
    assert (plain.mfu, plain.mfu_full) == (None, None)
    assert str(plain).startswith("2,000 tokens/s, 1,000 a device, 600 kFLOP/s a device, peak ")
    assert str(plain).endswith(" resident, with warm-up")


def test_the_definition_is_in_words_and_numbers() -> None:
    config = models.GPT2Config(layer=2, embed=8, heads=2, vocab=16, position=4)
    model = models.gpt2(config, strategies.data())
    mesh = sw.make_mesh({"data": 4}, transport="simulated")
    found = ruler(model, mesh, batch=8, seq=4)
    assert (found.tokens, found.devices, found.multiplied) == (32, 1, 16 * 8 + 2 * 12 * 8 * 8)
    text = str(found)
    assert f"causal {found.causal:,} = 6 N + 6 layer heads head_dim seq" in text
    assert f"full {found.full:,}" in text
    assert f"N = {found.multiplied:,} parameters" in text
    assert "no peak is known of cpu" in text
    assert "what is computed again does not count" in text
    with_peak = str(measure(H100))
    assert f"/ 9.894e+14, dense bfloat16 of {H100} by its datasheet" in with_peak


def test_the_clock_leaves_out_the_first_interval_and_pauses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock(measure(tokens=10, devices=1), sw.make_mesh({"data": 1}, transport="simulated"))
    assert clock.average(0) is None

    def steps(count: int, seconds: float) -> None:
        for _ in range(count):
            clock.tick()
            now[0] += seconds

    steps(2, 100.0)  # compilation
    first = clock.line(2)
    assert (first.tokens_per_second, first.is_first) == (pytest.approx(0.1), True)
    only = clock.average(2)
    assert only is first  # nothing else is known: it says that it has warm-up in it
    steps(2, 1.0)
    with clock.paused():
        now[0] += 50.0
    steps(2, 1.0)
    assert clock.line(6).tokens_per_second == pytest.approx(10.0)
    steps(4, 3.0)
    assert clock.line(10).tokens_per_second == pytest.approx(10 / 3)
    average = clock.average(10)
    assert average is not None
    assert average.tokens_per_second == pytest.approx(80 / 16)
    assert not average.is_first


def test_peak_memory_of_a_process_grows_with_what_it_holds() -> None:
    before, kind = speed.peak_memory(torch.device("cpu"))
    kept = torch.ones(64 << 20)  # 256 MiB
    after, _ = speed.peak_memory(torch.device("cpu"))
    assert kind == "resident"
    assert before > 50 << 20  # Python and torch alone
    assert after >= before
    assert after > kept.nbytes


def test_a_run_prints_the_definition_once_and_writes_its_lines(tmp_path: Path) -> None:
    _, shown = runs.run(runs.file(tmp_path), *ONE, "run.steps=5", "run.log_every=2")
    assert shown.count("FLOPs a token: causal ") == 1
    number = r"[\d.,]+"
    line = rf"loss {number}, {number} tokens/s, {number} a device, {number} [kMGT]FLOP/s a device, "
    found = re.findall(rf"^step (\d): {line}peak {number} [MG]iB resident(.*)$", shown, re.M)
    assert found == [("2", ", with warm-up"), ("4", ""), ("5", "")]
    assert re.search(r"resident after the first line$", shown, re.M)
    written = json.loads((tmp_path / "run/loss.json").read_text())["speed"]
    assert [entry["step"] for entry in written["lines"]] == [2, 4, 5]
    assert [entry["is_first"] for entry in written["lines"]] == [True, False, False]
    for entry in written["lines"]:
        assert entry["tokens_per_second"] == entry["tokens_per_second_device"] > 0
        assert entry["mfu"] is None
        assert entry["peak_kind"] == "resident"
    measured = written["measured_by"]
    assert (measured["tokens"], measured["card"], measured["peak"]) == (64, "cpu", None)
    assert measured["full"] - measured["causal"] == 6 * 1 * 16 * 16


def test_losses_are_read_where_a_line_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else waits for the device: not the count of skipped steps, not the loss."""
    read: list[int] = []
    plain = sw.ShardedTensor.__float__
    monkeypatch.setattr(
        sw.ShardedTensor, "__float__", lambda x: (read.append(1), plain(x))[1], raising=True
    )
    told: list[int] = []
    printed = Clock.line

    def line(clock: Clock, step: int) -> speed.Speed:
        told.append(len(read))
        return printed(clock, step)

    monkeypatch.setattr(Clock, "line", line)
    options = (*ONE, "run.steps=7", "run.log_every=3", "run.eval_every=100", "checkpoint.every=50")
    runs.run(runs.file(tmp_path), *options)
    assert told == [3, 6, 7]
