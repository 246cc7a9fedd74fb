"""Streamed and ring products, and the collectives that they are made of, on Gloo processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import launch

import shardwise as sw
from shardwise import nn, ops

pytestmark = pytest.mark.processes
MESHES = {4: {"row": 2, "col": 2}, 8: {"depth": 2, "row": 2, "col": 2}}


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def products(axes: dict[str, int]) -> dict[str, tuple[tuple[int, ...], str, str, str]]:
    """Name -> sizes, layouts of x and w, and of the result."""
    deep = "/depth" if "depth" in axes else ""
    held = " {R:depth}" if deep else ""
    found = {
        "square": ((8, 12, 4), f"m{deep}/row k/col", f"k/row n/col{held}", f"m{deep}/row n/col"),
        "gather": ((8, 12, 4), "m/col k", "k n/col", "m n/col"),
        "gather, contracted": ((8, 12, 4), "m k/row", "k n/row", "m n/row"),
        "weight": ((8, 12, 4), "m/row k", "k/row n", "m/row n"),
        "scatter": ((8, 12, 4), "m k/col", "k/col n", "m/col n"),
    }
    return {"square": found["square"]} if deep else found


def everywhere(mesh: sw.Mesh) -> dict[str, Any]:
    """Values, gradients and volumes of every product by every method, and of shared operands."""
    found: dict[str, Any] = {}
    for name, ((m, k, n), x_at, w_at, out) in products(dict(mesh.axes)).items():
        for method in ("direct", "streamed", "ring"):
            x, w = sw.shard(values(m, k), mesh, x_at), sw.shard(values(k, n, seed=1), mesh, w_at)
            f = lambda x, w: ops.einsum("m k, k n -> m n", x, w, out=out, method=method)  # noqa: B023, E731
            with sw.record() as plan:
                y, pull = sw.vjp(f, x, w)
                gx, gw = pull(sw.shard(values(m, n, seed=2), mesh, y.layout.dual))
            key = f"{name} {method}"
            found[key] = y.full_tensor()
            found[f"{key}, x"], found[f"{key}, w"] = gx.full_tensor(), gw.full_tensor()
            found[f"{key}, moved"] = torch.tensor(
                [plan.elements(phase=p) for p in ("forward", "backward")], dtype=torch.float64
            )
    x = sw.shard(values(4, 2, 8), mesh, "b/row s d/col")
    ws = [sw.shard(values(8, n, seed=n), mesh, "d/row f/col") for n in (4, 8)]
    for method in ("streamed", "ring"):
        both = nn.dense(x, tuple(ws), out="b/row s f/col", method=method)
        found[f"shared {method}"] = torch.cat([y.full_tensor() for y in both], -1)

    @sw.shard_map(in_layouts="_/col _", out_layouts="_/col _")
    def rooted(x: Any) -> Any:
        return ops.reduce(torch.tanh(ops.broadcast(x, "col", 1) * x), "col", 0)

    x = sw.shard(values(8, 6), mesh, "_/col _")
    y, pull = sw.vjp(rooted, x)
    found["rooted"], found["rooted, x"] = y.full_tensor(), pull(x)[0].full_tensor()
    return found


def distributed(size: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    mesh = sw.make_mesh(MESHES[size], check=size == 4)
    assert mesh.transport == "distributed"
    return everywhere(mesh)


@pytest.mark.parametrize("size", MESHES)
def test_gloo_equals_the_simulation(size: int) -> None:
    expected = everywhere(sw.make_mesh(MESHES[size], transport="simulated", device="cpu"))
    for name, ((m, k, n), *_) in products(MESHES[size]).items():
        want = values(m, k) @ values(k, n, seed=1)
        torch.testing.assert_close(expected[f"{name} direct"], want, rtol=1e-12, atol=1e-12)
    for outcome in launch(distributed, size, size, timeout=120):
        assert outcome.value.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(
                outcome.value[key], value, rtol=1e-12, atol=1e-12, msg=f"{outcome.rank} {key}"
            )
