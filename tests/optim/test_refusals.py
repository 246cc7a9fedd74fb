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
    with pytest.raises(TypeError, match=r"n is i64.*floating point"):
        opt.step(counts, opt.init(counts), counts)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: optim.adamw(-0.1), "adamw: lr is finite and at least 0, got -0.1"),
        (lambda: optim.sgd(float("nan")), "sgd: lr"),
        (lambda: optim.muon(float("inf")), "muon: lr"),
        (lambda: optim.lion("0.1"), "lion: lr"),
        (lambda: optim.lamb(-1), "lamb: lr"),
        (lambda: optim.lars(-1.0), "lars: lr"),
        (lambda: optim.adafactor(-1.0), "adafactor: lr"),
        (lambda: optim.adam(0.1, b1=1.0), "adam: b1 is at least 0 and less than 1, got 1.0"),
        (lambda: optim.adamw(0.1, b2=-0.1), "adamw: b2"),
        (lambda: optim.came(0.1, b3=1.5), "came: b3"),
        (lambda: optim.adam(0.1, eps=0.0), "adam: eps is more than 0, got 0.0"),
        (lambda: optim.came(0.1, eps=(1e-30, -1.0)), "came: eps"),
        (lambda: optim.lars(0.1, eps=-1.0), "lars: eps is finite and at least 0"),
        (lambda: optim.adamw(0.1, weight_decay=-1.0), "adamw: weight_decay"),
        (lambda: optim.lion(0.1, weight_decay=float("nan")), "lion: weight_decay"),
        (lambda: optim.lamb(0.1, weight_decay=-1.0), "weight_decay"),
        (lambda: optim.sgd(0.1, momentum=1.0), "sgd: momentum"),
        (lambda: optim.sgd(0.1, nesterov=True), "sgd: nesterov"),
        (lambda: optim.adafactor(clip=0.0), "adafactor: clip is more than 0"),
        (lambda: optim.adafactor(decay=0.8), "adafactor: decay is at most 0"),
        (lambda: optim.galore(0.1, rank=0), "galore: rank is a whole number, at least 1, got 0"),
        (lambda: optim.galore(0.1, every=0), "galore: every"),
        (lambda: optim.adam8bit(0.1, block=0), "adam8bit: block"),
        (lambda: optim.ema(optim.sgd(0.1), 1.0), "ema: decay"),
        (lambda: optim.clip_by_global_norm(0.0), "clip_by_global_norm: limit"),
        (lambda: optim.clip_by_value(-1.0), "clip_by_value: limit"),
        (lambda: optim.loss_scale(optim.sgd(0.1), every=0), "loss_scale: every"),
        (lambda: optim.schedules.warmup_cosine(1.0, warmup=5, steps=4), "warmup 5 is more than 4"),
        (lambda: optim.chain(), "chain: of no transforms"),
    ],
)
def test_numbers_are_checked_where_they_are_given(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_rates_may_be_schedules_tensors_and_zero() -> None:
    params = {"w": sw.full((4,), 1.0, sw.make_mesh(MESH))}
    for lr in (0, 0.0, torch.tensor(0.0), lambda step: step * 0.0):
        opt = optim.adamw(lr)
        new = opt.step(params, opt.init(params), params)[0]["w"]
        assert new.full_tensor().tolist() == [1.0] * 4


def test_empty_trees_and_matrices() -> None:
    mesh = sw.make_mesh(MESH)
    with pytest.raises(ValueError, match="the transform got no parameters"):
        optim.clip_by_global_norm(1.0).init({})
    params = {"none": sw.full((0, 4), 1.0, mesh), "w": sw.full((4, 4), 1.0, mesh)}
    opt = optim.muon(0.1)
    new, _ = opt.step(params, opt.init(params), params)
    assert new["none"].shape == (0, 4)
    assert not torch.equal(new["w"].full_tensor(), params["w"].full_tensor())


def test_stage_3_refuses_a_matrix_that_only_its_rows_let_be_cut() -> None:
    mesh = sw.make_mesh({"data": 2, "tensor": 2})
    p = {"w": sw.shard(torch.ones(4, 6), mesh, "a b/tensor")}
    with pytest.raises(sw.LayoutError, match=r"w is f32\[4 6/tensor\], whole over 'data'"):
        optim.zero(optim.adamw(0.1), 3).init(p)
