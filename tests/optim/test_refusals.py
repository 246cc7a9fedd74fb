"""What transforms refuse: gradients that do not fit, and numbers that mean nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import shardwise as sw
from shardwise import optim

MESH = {"data": 2}
OPTIMIZERS: dict[str, optim.Transform] = {
    "sgd": optim.sgd(0.1),
    "adamw": optim.adamw(0.1),
    "lamb": optim.lamb(0.1),
    "lars": optim.lars(0.1),
    "muon": optim.muon(0.1),
    "adafactor": optim.adafactor(0.1),
    "came": optim.came(0.1),
    "adam8bit": optim.adam8bit(0.1),
    "galore": optim.galore(0.1, rank=2),
    "clipped": optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(0.1)),
    "master": optim.master(optim.adamw(0.1)),
    "loss scale": optim.loss_scale(optim.adamw(0.1)),
    "zero": optim.zero(optim.adamw(0.1), 1),
    "zero 2": optim.zero(optim.muon(0.1), 2),
}


@pytest.mark.parametrize("shape", [(2, 6), (4, 1), (1, 6), (6,), (4, 6, 1)], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_of_another_shape_are_refused(name: str, shape: tuple[int, ...]) -> None:
    mesh, opt = sw.make_mesh(MESH), OPTIMIZERS[name]
    params = {"in": {"w": sw.full((4, 6), 1.0, mesh)}}
    grads = {"in": {"w": sw.full(shape, 1.0, mesh)}}
    said = r"in\.w: a gradient of shape \(.*\) for a parameter of shape \(4, 6\)"
    state = opt.init(params)
    with pytest.raises(ValueError, match=said):
        opt.step(grads, state, params)
    with pytest.raises(ValueError, match=said):
        optim.apply_updates(params, grads)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_are_sharded_tensors(name: str) -> None:
    mesh, opt = sw.make_mesh(MESH), OPTIMIZERS[name]
    mixed = {"a": sw.full((4, 6), 1.0, mesh), "w": torch.ones(4, 6)}
    with pytest.raises(TypeError, match="w: a parameter is a ShardedTensor, got a Tensor"):
        opt.init(mixed)


def test_gradients_are_sharded_tensors_and_parameters_floating_point() -> None:
    mesh, opt = sw.make_mesh(MESH), optim.adamw(0.1)
    params = {"w": sw.full((4,), 1.0, mesh)}
    with pytest.raises(TypeError, match="w: the gradient is a Tensor"):
        opt.step({"w": torch.ones(4)}, opt.init(params), params)
    counts = {"n": sw.full((4,), 1, mesh, dtype=torch.int64)}
    with pytest.raises(TypeError, match="n is i64.*floating point"):
        opt.step(counts, opt.init(counts), counts)


def test_a_chain_has_a_transform() -> None:
    with pytest.raises(ValueError, match="chain: of no transforms"):
        optim.chain()
