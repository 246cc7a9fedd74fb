"""Schedules equal their closed forms, on plain and on sharded steps."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import shardwise as sw
from shardwise import optim
from shardwise.optim import schedules

clip = lambda x: min(max(x, 0.0), 1.0)  # noqa: E731

FORMS: dict[str, tuple[schedules.Function, Callable[[int], float]]] = {
    "constant": (schedules.constant(0.3), lambda t: 0.3),
    "linear": (schedules.linear(2.0, 0.5, 10), lambda t: 2.0 - 1.5 * clip(t / 10)),
    "cosine": (
        schedules.cosine(2.0, 10, end=0.5),
        lambda t: 0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi * clip(t / 10))),
    ),
    "warmup_cosine": (
        schedules.warmup_cosine(2.0, warmup=3, steps=10),
        lambda t: clip((t + 1) / 3) * (1 + math.cos(math.pi * clip((t - 3) / 7))),
    ),
    "wsd": (
        schedules.wsd(2.0, warmup=3, steps=12, decay=4, end=0.1),
        lambda t: clip((t + 1) / 3) * (2.0 - 1.9 * clip((t - 8) / 4)),
    ),
    "polynomial": (
        schedules.polynomial(2.0, 0.5, 10, power=3.0),
        lambda t: 0.5 + 1.5 * (1 - clip(t / 10)) ** 3,
    ),
    "piecewise": (
        schedules.piecewise(2.0, {4: 0.5, 8: 0.1}),
        lambda t: 2.0 if t < 4 else 1.0 if t < 8 else 0.1,
    ),
    "join": (
        schedules.join(
            [schedules.linear(0.0, 2.0, 4), schedules.constant(2.0), schedules.cosine(2.0, 4)],
            [4, 8],
        ),
        lambda t: t / 2 if t < 4 else 2.0 if t < 8 else 1 + math.cos(math.pi * clip((t - 8) / 4)),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_closed_forms(name: str) -> None:
    schedule, form = FORMS[name]
    mesh = sw.make_mesh({"x": 2})
    expected = [form(t) for t in range(15)]
    assert [float(schedule(torch.tensor(t))) for t in range(15)] == pytest.approx(
        expected, abs=1e-6
    )
    assert [schedule(sw.full((), t, mesh)).item() for t in range(15)] == pytest.approx(
        expected, abs=1e-6
    )


def test_wrong_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="warmup 5 and decay 6 are more than 10 steps"):
        schedules.wsd(1.0, warmup=5, steps=10, decay=6)
    with pytest.raises(ValueError, match="2 schedules need 1 rising boundaries"):
        schedules.join([schedules.constant(1.0)] * 2, [3, 4])


@pytest.mark.parametrize("name", FORMS)
def test_values_are_float64_of_tensors_and_numbers(name: str) -> None:
    schedule, form = FORMS[name]
    mesh = sw.make_mesh({"x": 2})
    for t in range(15):
        for step in (t, torch.tensor(t), sw.full((), t, mesh)):
            value = schedule(step)
            assert value.dtype is torch.float64
            assert value.item() == pytest.approx(form(t), rel=1e-14, abs=1e-15)


def test_a_constant_schedule_is_the_number() -> None:
    p = {"w": sw.full((4,), 1.0, sw.make_mesh({"x": 2}), dtype=torch.float64)}
    new = []
    for lr in (0.1, schedules.constant(0.1)):
        opt = optim.adamw(lr)
        new.append(opt.step(p, opt.init(p), p)[0]["w"].full_tensor())
    assert torch.equal(*new)
