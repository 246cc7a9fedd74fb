"""The same program simulated and on Gloo processes: values, gradients, layouts and records agree.

Values agree up to the order of sums; a program that only moves data agrees bit for bit.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import launch

import shardwise as sw
from shardwise import models, optim, strategies

pytestmark = pytest.mark.processes
MESHES: dict[int, list[dict[str, int]]] = {
    2: [{"data": 2, "tensor": 1}, {"data": 1, "tensor": 2}],
    3: [{"data": 3, "tensor": 1}],
    4: [{"data": 2, "tensor": 2}],
    8: [{"data": 2, "depth": 2, "tensor": 2}],
}


def everywhere(mesh: sw.Mesh) -> dict[str, Any]:
    """Conversions, ops over cut dims, a model's training and random draws on one mesh."""
    found: dict[str, Any] = {}
    found.update(conversions(mesh))
    found.update(ops(mesh))
    if mesh.size != 3:
        found.update(training(mesh))
    return found


def conversions(mesh: sw.Mesh) -> dict[str, Any]:
    value = torch.arange(24.0 * 12, dtype=torch.float64).reshape(24, 12)
    axes = list(mesh.axes)
    layouts = ["a b", *(f"a/{x} b" for x in axes), *(f"a b/{x}" for x in axes)]
    layouts += [f"a b {{U:{x}}}" for x in axes] + [f"a b {{R:{x}}}" for x in axes]
    layouts += [f"a/{'/'.join(axes)} b", f"a/{'/'.join(reversed(axes))} b"]
    found = {}
    for i, (before, after) in enumerate(itertools.product(layouts, layouts)):
        x = sw.shard(value, mesh, before)
        y, pull = sw.vjp(lambda x: sw.reshard(x, after), x)  # noqa: B023
        g = sw.shard(value + 1, mesh, y.layout.dual)
        found[f"reshard {i} {before} to {after}"] = y.full_tensor()
        found[f"back {i} {before} to {after}"] = pull(g)[0].full_tensor()
    return found


def ops(mesh: sw.Mesh) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(1)
    value = torch.randn(24, 12, generator=rng, dtype=torch.float64)
    weight = torch.randn(12, generator=rng, dtype=torch.float64)
    programs = {
        "softmax": lambda x, w: torch.softmax(x, -1) * x,
        "layer_norm": lambda x, w: F.layer_norm(x, (12,), w, w),
        "rms_norm": lambda x, w: F.rms_norm(x, (12,), w),
        "logsumexp": lambda x, w: torch.logsumexp(x, 1),
        "max": lambda x, w: torch.amax(x, 1) * torch.amax(x, 0).sum(),
        "cumsum": lambda x, w: torch.cumsum(x, 1) * x,
        "norm": lambda x, w: torch.linalg.vector_norm(x),
        "variance": lambda x, w: x.var(1),
        "matmul": lambda x, w: sw.ops.matmul(x.T, x, out="a b"),
        "sort": lambda x, w: torch.sort(x, 1).values * w,
        "roll": lambda x, w: torch.roll(x, 5, 1) * x,
        "gather": lambda x, w: torch.gather(x, 1, sw.reshard(torch.argsort(x, 1), "... b")) * w,
        "loss": lambda x, w: F.cross_entropy(x, torch.argmax(x, 1)),
    }
    found = {}
    last = list(mesh.axes)[-1]
    for (name, f), layout in itertools.product(
        programs.items(), (f"a b/{last}", f"a/{last} b", "a b")
    ):
        with sw.record() as plan:
            y, pull = sw.vjp(f, sw.shard(value, mesh, layout), sw.shard(weight, mesh))
            g = sw.full(y.shape, 0.5, mesh, y.layout.dual, dtype=torch.float64)
            gx, gw = pull(g)
        key = f"{name} on {layout}"
        found[key] = y.full_tensor()
        found[f"{key}, gradients"] = torch.cat([gx.full_tensor().flatten(), gw.full_tensor()])
        found[f"{key}, moved"] = torch.tensor(
            [plan.elements(phase=p) for p in ("forward", "backward")]
        )
    return found


def training(mesh: sw.Mesh) -> dict[str, Any]:
    """Four steps of a GPT with dropout under data x tensor parallelism and FSDP."""
    f64 = torch.float64
    found: dict[str, Any] = {}
    base = strategies.tensor_1d()
    if "depth" in mesh.axes:
        base = strategies.data("depth") * base
    for name, strategy in {
        "data": strategies.data() * base,
        "fsdp": strategies.fsdp() * base,
    }.items():
        strategy = strategy.replace(precision=sw.Precision(f64, f64, f64), recompute="all")
        config = models.GPT2Config(layer=2, embed=16, heads=2, vocab=24, position=8, dropout=0.1)
        model = models.gpt2(config, strategy)
        params = model.init(sw.random.key(0), mesh)
        opt = optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(1e-2))
        state = opt.init(params)
        rng = torch.Generator().manual_seed(2)
        losses = []
        for step in range(4):
            raw = torch.randint(24, (8, 9), generator=rng)
            batch = sw.shard(
                {"tokens": raw[:, :-1], "labels": raw[:, 1:]}, mesh, strategy["tokens"]
            )
            key = sw.random.fold_in(sw.random.key(1), step)
            loss, grads = sw.value_and_grad(lambda p: model.loss(p, batch, key=key))(params)  # noqa: B023
            params, state = opt.step(grads, state, params)
            losses.append(loss.item())
        found[f"{name} losses"] = torch.tensor(losses, dtype=f64)
        found[f"{name} weights"] = params["blocks"]["w_up"].full_tensor()
        found[f"{name} norm"] = torch.tensor(optim.get(state, "norm").item(), dtype=f64)
    return found


def distributed(index: int) -> dict[str, Any]:
    """What each process runs: the meshes of as many devices as there are processes."""
    torch.set_num_threads(1)
    size = sw.make_mesh({"all": -1}).size
    mesh = sw.make_mesh(MESHES[size][index], check=size == 2)
    assert mesh.transport == "distributed"
    return everywhere(mesh)


@pytest.mark.parametrize(("size", "index"), [(n, i) for n in MESHES for i in range(len(MESHES[n]))])
def test_gloo_equals_the_simulation(size: int, index: int) -> None:
    mesh = sw.make_mesh(MESHES[size][index], transport="simulated")
    expected = everywhere(mesh)
    for outcome in launch(distributed, size, index, timeout=200):
        assert outcome.value.keys() == expected.keys()
        for key, value in expected.items():
            other = outcome.value[key]
            if key.startswith(("reshard", "back")) and "U:" not in key and "R:" not in key:
                assert torch.equal(other, value), (outcome.rank, key)
            torch.testing.assert_close(
                other, value, rtol=1e-11, atol=1e-11, msg=f"{outcome.rank} {key}"
            )
