"""Optimizers on Gloo processes do what they do on a simulated mesh, sub-meshes included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import launch

import shardwise as sw
from shardwise import optim

pytestmark = pytest.mark.processes
SHAPES = {"w": (8, 16), "v": (8, 16), "u": (8, 16), "b": (8,)}


def values(seed: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=rng, dtype=torch.float64) for k, s in SHAPES.items()}


def programs() -> dict[str, optim.Transform]:
    matrices = optim.multi({"b": optim.sgd(0.1), "*": optim.muon(0.1, dtype=None)})
    return {
        "clipped": optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(0.1)),
        "lamb": optim.lamb(0.1),
        "adafactor": optim.adafactor(0.1),
        "came": optim.came(0.1),
        "galore": optim.galore(0.1, rank=3, every=2),
        "muon": matrices,
        "skipping": optim.skip_nonfinite(optim.adam8bit(0.1, block=4, least=100)),
        "scaled": optim.loss_scale(optim.inject(optim.lion, lr=0.1), initial=4.0),
    }


def whole_mesh(mesh: sw.Mesh) -> dict[str, Any]:
    """Three steps of each optimizer over one mesh; the second gradient is not finite for some."""
    layouts = {"w": "i/x o", "v": "i/x o/y", "u": "i/y o", "b": "o"}
    found = {}
    for name, opt in programs().items():
        params = sw.shard(values(0), mesh, layouts)
        state = opt.init(params)
        for step in range(1, 4):
            grads = values(step)
            if step == 2 and name in ("skipping", "scaled"):
                grads["v"][7, 15] = float("nan")
            params, state = opt.step(sw.shard(grads, mesh, layouts), state, params)
        found |= {f"{name} {k}": p.full_tensor() for k, p in params.items()}
    return found


def sub_meshes(mesh: sw.Mesh) -> dict[str, Any]:
    """Steps on parameters of which each process holds some."""
    first, last = mesh.at(x=0), mesh.at(x=1)
    place = {"w": (first, "i/y o"), "v": (last, "i o/y"), "u": (mesh, "i/x o/y"), "b": (last, "o")}
    found = {}
    for name in ("clipped", "lamb", "skipping", "scaled", "adafactor"):
        for kept in (("w", "v", "u", "b"), ("w", "v", "b")):
            opt = programs()[name]
            cut = lambda seed: {k: sw.shard(values(seed)[k], *place[k]) for k in kept}  # noqa: B023, E731
            params = cut(0)
            state = opt.init(params)
            for step in range(1, 4):
                params, state = opt.step(cut(step), state, params)
            for k, p in params.items():
                if not p.mesh.is_outside:
                    found[f"{name} {len(kept)} {k}"] = p.full_tensor()
    return found


def distributed(which: str) -> Any:
    """One of the functions above, on the processes of a launch."""
    found = {"whole": whole_mesh, "sub": sub_meshes}[which](sw.make_mesh({"x": 2, "y": 2}))
    torch.distributed.destroy_process_group()
    return found


@pytest.mark.parametrize("which", ["whole", "sub"])
def test_processes_equal_the_simulated_mesh(which: str) -> None:
    mesh = sw.make_mesh({"x": 2, "y": 2})
    expected = {"whole": whole_mesh, "sub": sub_meshes}[which](mesh)
    outcomes = launch(distributed, 4, which)
    seen = set()
    for outcome in outcomes:
        for k, value in outcome.value.items():
            seen.add(k)
            torch.testing.assert_close(
                value, expected[k], rtol=1e-11, atol=1e-11, msg=lambda m, k=k: f"{k}: {m}"
            )
    assert seen == set(expected)
