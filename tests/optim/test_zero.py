"""ZeRO moves nothing but where things lie: parameters equal the unsharded optimizer's."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from check import placed as split
from gallery import values
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from zeros import ONE, PLACES, Place, placed, start, train, trained

import shardwise as sw
from shardwise import optim
from shardwise import strategies as s

STEPS = 5
STAGES = (1, 2, 3)
MATRICES = {"*w_*": optim.muon(0.02, dtype=None, weight_decay=0.1), "*": optim.adamw(0.01)}
OPTIMIZERS: dict[str, optim.Transform] = {
    "sgd": optim.sgd(0.1),
    "nesterov": optim.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optim.adam(0.01),
    "adamw": optim.adamw(optim.schedules.linear(0.0, 0.01, 5), weight_decay=0.1, mask="*w_*"),
    "lion": optim.lion(0.01, weight_decay=0.1),
    "lamb": optim.lamb(0.01, weight_decay=0.1, stacked="blocks.*"),
    "lamb whole": optim.lamb(0.01),
    "lars": optim.lars(0.1, weight_decay=0.1, stacked="blocks.*"),
    "adafactor": optim.adafactor(0.05, weight_decay=0.1, stacked="blocks.*"),
    "came": optim.came(0.01, stacked="blocks.*", weight_decay=0.1),
    "galore": optim.galore(0.01, rank=2, every=3),
    "muon and adamw": optim.multi(MATRICES),
    "adam8bit": optim.adam8bit(0.01, block=6, least=100),
    "clipped": optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(0.01)),
    "by value": optim.chain(optim.clip_by_value(0.5), optim.sgd(0.1)),
    "masked": optim.masked(optim.adam(0.01), "*w_*"),
    "ema": optim.ema(optim.adam(0.01), 0.9),
    "master": optim.master(optim.adamw(0.01), dtype=torch.float64),
    "injected": optim.inject(optim.adamw, lr=0.01, b1=0.8, weight_decay=0.1),
    "skipping": optim.skip_nonfinite(optim.adamw(0.01)),
    "scaled": optim.loss_scale(optim.adamw(0.01), initial=4.0),
}
ONE_OF_EACH_NEED = ("clipped", "adafactor", "muon and adamw")
FULL = ("data x 1D",)
CASES = [
    (name, stage, place)
    for name in OPTIMIZERS
    for place in PLACES
    for stage in STAGES
    if place in FULL or name in ONE_OF_EACH_NEED
]
# A key's bias has no gradient but rounding, which Adam would divide by eps: here that is large.
TRAINED = optim.chain(
    optim.clip_by_global_norm(0.5), optim.adamw(0.01, weight_decay=0.1, eps=1e-4)
)


@cache
def gradients() -> list[Any]:
    """Global gradients of each step."""
    return [
        sw.tree.map(lambda p, at=at: values(*p.shape, seed=at + p.numel()), start())
        for at in range(STEPS)
    ]


@cache
def given(place: str, stage: int) -> tuple[Any, list[Any]]:
    """Parameters in the layouts of a strategy, and gradients as the stage asks for them."""
    at = PLACES.get(place, ONE)
    params = placed(at, stage)[1]
    wanted = optim.zero(optim.sgd(0.1), stage, axis=at.axes).grads(params)
    return params, [
        sw.tree.map(lambda g, p, to, n=n: split(g, p.mesh, to, n), grads, params, wanted)
        for n, grads in enumerate(gradients())
    ]


def fed(name: str, stage: int, place: str) -> tuple[dict[str, Tensor], Any]:
    """Global parameters and the state after steps with fixed gradients."""
    params, steps = given(place, stage)
    opt = optim.zero(OPTIMIZERS[name], stage, axis=PLACES.get(place, ONE).axes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if place == "data x 2.5D" else "error")
        state = opt.init(params)
    before = params
    for grads in steps:
        params, state = opt.step(grads, state, params)
    for a, b in zip(sw.tree.leaves(params), sw.tree.leaves(before), strict=True):
        assert a.layout is b.layout and a.dtype is b.dtype
    return {path: p.full_tensor() for path, p in sw.tree.items(params)}, state


@cache
def unsharded(name: str) -> tuple[dict[str, Tensor], Any]:
    return fed(name, 0, "one")


@pytest.mark.parametrize(("name", "stage", "place"), CASES)
def test_steps_equal_the_unsharded_optimizer(name: str, stage: int, place: str) -> None:
    expected, state = unsharded(name)
    found, ours = fed(name, stage, place)
    for path, p in found.items():
        torch.testing.assert_close(p, expected[path], rtol=1e-12, atol=1e-12, msg=lambda m, k=path: f"{k}: {m}")
    for (path, a), (other, b) in zip(sw.tree.items(ours), sw.tree.items(state), strict=True):
        assert path == other
        if isinstance(a, sw.ShardedTensor):
            assert a.shape == b.shape, path  # a checkpoint does not depend on the mesh
            torch.testing.assert_close(a.full_tensor(), b.full_tensor(), rtol=1e-10, atol=1e-10)
