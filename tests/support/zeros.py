"""What tests of ZeRO share: strategies of a tiny GPT-2, its parameters and batch, and training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tiny import TINY, drawn
from torch import Tensor

import shardwise as sw
from shardwise import optim
from shardwise import strategies as s

F64 = sw.Precision(torch.float64, torch.float64, torch.float64)
SQUARE, CUBE = {"row": 2, "col": 2}, {"i": 2, "j": 2, "k": 2}
ROWS = 8


@dataclass(frozen=True)
class Place:
    """A strategy without ZeRO, the one for stage 3, a mesh, and the axes that ZeRO cuts over.

    Some vectors are too short for both axes of `data x 2.5D`.
    """

    plain: sw.Strategy
    cut: sw.Strategy
    mesh: dict[str, int]
    axes: str | tuple[str, ...] = "data"
    leaves_some_whole: bool = False


def _place(rest: sw.Strategy | None, mesh: dict[str, int]) -> Place:
    plain, cut = s.data(), s.fsdp()
    return Place(plain if rest is None else plain * rest, cut if rest is None else cut * rest, mesh)


def _deep(mesh: dict[str, int]) -> Place:
    """2.5D: its depth is a data axis beside `data`."""
    flat = s.tensor_2d()
    return Place(
        s.data() * s.data("depth") * flat,
        s.fsdp() * s.fsdp("depth") * flat,
        mesh,
        ("data", "depth"),
        True,
    )


PLACES = {
    "data": _place(None, {"data": 4}),
    "data x 1D": _place(s.tensor_1d(), {"data": 2, "tensor": 2}),
    "two data axes": Place(
        s.data() * s.data("depth"),
        s.fsdp() * s.fsdp("depth"),
        {"data": 2, "depth": 2},
        ("data", "depth"),
    ),
    "data x sequence": _place(s.sequence_parallel(), {"tensor": 2, "data": 2}),
    "data x 2D": _place(s.tensor_2d(method="direct"), {"data": 2, **SQUARE}),
    "2.5D over depth": Place(
        s.tensor_2p5d(), s.fsdp("depth") * s.tensor_2d(), {"depth": 2, **SQUARE}, "depth"
    ),
    "data x 2.5D": _deep({"data": 2, "depth": 2, **SQUARE}),
    "data x 3D": _place(s.tensor_3d(), {"data": 2, **CUBE}),
}


ONE = Place(s.data(), s.data(), {"data": 1})


@cache
def of_gpt2() -> Any:
    return TINY["gpt2"]()


@cache
def start(dtype: torch.dtype = torch.float64) -> Any:
    """Global parameters."""
    of = of_gpt2()
    return sw.tree.map(lambda x: x.to(dtype), drawn(of.make(of.config, s.data())))


def placed(
    place: Place, stage: int, dtype: torch.dtype = torch.float64, tied: str = "per_use"
) -> tuple[Any, Any, Any]:
    """The model, its parameters and its batch."""
    of = of_gpt2()
    strategy = place.cut if stage == 3 else place.plain
    strategy = strategy.replace(precision=sw.Precision(dtype, dtype, dtype), tied=tied)
    mesh = sw.make_mesh(place.mesh)
    model = of.make(of.config, strategy)
    layouts = strategy.layouts(model.declaration, of.config, mesh)
    params = sw.shard(start(dtype), mesh, layouts)
    batch = {k: sw.shard(v, mesh, strategy["tokens"]) for k, v in of.batch(ROWS).items()}
    return model, params, batch


def begun(opt: optim.Transform, stage: int, place: Place, params: Any) -> Any:
    """The first state; what stays whole is warned of."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        state = opt.init(params)
    assert [w.category for w in seen] == [UserWarning] * (place.leaves_some_whole and stage > 0)
    return state


def train(
    place: Place,
    stage: int,
    t: optim.Transform,
    steps: int = 5,
    *,
    dtype: torch.dtype = torch.float64,
    donate: bool = False,
    micro: int = 1,
    tied: str = "per_use",
) -> Iterator[tuple[Any, Any, Any]]:
    """Gradients, parameters and state after each step."""
    model, params, batch = placed(place, stage, dtype, tied)
    opt = optim.zero(t, stage, axis=place.axes)
    state = begun(opt, stage, place, params)
    vg = sw.value_and_grad(model.loss, grads=opt.grads)
    if micro > 1:
        vg = sw.accumulate(vg, micro, weight=lambda b: (b["labels"] != -100).sum())
    for _ in range(steps):
        _, grads = vg(params, batch)
        params, state = opt.step(grads, state, params, donate=donate)
        yield grads, params, state


def trained(*args: Any, **options: Any) -> dict[str, Tensor]:
    """Global parameters after the last step."""
    params: Any = None
    for state in train(*args, **options):
        params = state[1]
    return {path: p.full_tensor() for path, p in sw.tree.items(params)}
