"""Trees of parameters, gradients and layouts for tests of optimizers."""

from __future__ import annotations

from typing import Any

import torch

import shardwise as sw

AXES = {"x": 2, "y": 2, "z": 2}
SHAPES = {"w": (8, 16), "tall": (16, 8), "b": (8,), "stack": (4, 8, 16), "s": ()}
LAYOUTS: dict[str, dict[str, str]] = {
    "replicated": {"w": "i o", "tall": "i o", "b": "o", "stack": "l i o", "s": ""},
    "dim 0": {"w": "i/x o", "tall": "i/x o", "b": "o/x", "stack": "l i/x o", "s": ""},
    "dim 1": {"w": "i o/x", "tall": "i o/x", "b": "o", "stack": "l i o/x", "s": ""},
    "two dims": {"w": "i/x o/y", "tall": "i/y o/x", "b": "o/y", "stack": "l i/x o/y", "s": ""},
    "three axes": {
        "w": "i/x/y o/z",
        "tall": "i/z/x o/y",
        "b": "o/x/y/z",
        "stack": "l/z i/x o/y",
        "s": "",
    },
    "layers": {"w": "i/z/x o", "tall": "i o/x/z", "b": "o/z", "stack": "l/x/y i o/z", "s": ""},
}
Tree = dict[str, torch.Tensor]


def values(seed: int, dtype: torch.dtype = torch.float64) -> Tree:
    """Standard normal values of all shapes."""
    rng = torch.Generator().manual_seed(seed)
    return {
        k: torch.randn(s, generator=rng, dtype=torch.float64).to(dtype) for k, s in SHAPES.items()
    }


def matrices(tree: dict[str, Any]) -> dict[str, Any]:
    """The leaves that are matrices or stacks of them."""
    return {k: v for k, v in tree.items() if k in ("w", "tall", "stack")}


def run(
    opt: sw.optim.Transform,
    params: Tree,
    grads: list[Tree],
    layout: str = "replicated",
    grad_layout: str | None = None,
    *,
    donate: bool = False,
) -> tuple[Tree, Any]:
    """Global parameters after a step per gradient, and the last state."""
    mesh = sw.make_mesh(AXES)
    at = {k: LAYOUTS[layout][k] for k in params}
    sharded = sw.shard(params, mesh, at)
    state = opt.init(sharded)
    for g in grads:
        there = {k: LAYOUTS[grad_layout or layout][k] for k in params}
        before = sharded
        sharded, state = opt.step(sw.shard(g, mesh, there), state, sharded, donate=donate)
        for k, p in sharded.items():
            assert str(p) == str(before[k]), k
    return {k: p.full_tensor() for k, p in sharded.items()}, state


def close(ours: Tree, theirs: Tree, tolerance: float = 1e-12) -> None:
    """All leaves are equal up to a tolerance."""
    assert ours.keys() == theirs.keys()
    for k, p in ours.items():
        torch.testing.assert_close(
            p, theirs[k], rtol=tolerance, atol=tolerance, msg=lambda m, k=k: f"{k}: {m}"
        )
