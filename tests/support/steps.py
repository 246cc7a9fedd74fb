"""Training steps of a small GPT, by name: what `jit` has to leave as it is."""

from __future__ import annotations

from typing import Any

import torch

import shardwise as sw
from shardwise import models, optim, strategies

STEPS = ("data x 1D", "fsdp", "zero", "fsdp, all again", "cheap again", "accumulated")


def training(
    name: str, mesh: sw.Mesh, dtype: torch.dtype = torch.float64, layer: int = 2
) -> tuple[Any, Any, Any, Any]:
    """A step and its arguments.

    Args:
        name: one of STEPS: a strategy, an optimizer's layout, or what runs again in the backward.
        mesh: with axes "data" and "tensor".
        dtype: of everything.
        layer: blocks of the model.

    Returns:
        step, params, state, rows: `step(params, state, rows)` gives new params, new state and loss.
    """
    data = strategies.fsdp() if "fsdp" in name else strategies.data()
    recompute: Any = {"fsdp, all again": "all", "cheap again": "cheap"}.get(name, "none")
    strategy = (data * strategies.tensor_1d()).replace(
        precision=sw.Precision(dtype, dtype, dtype), recompute=recompute
    )
    config = models.GPT2Config(layer=layer, embed=16, heads=2, vocab=24, position=8)
    model = models.gpt2(config, strategy)
    params = model.init(sw.random.key(0), mesh)
    opt = optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(1e-2))
    if name == "zero":
        opt = optim.zero(opt, 2)
    gradient = sw.value_and_grad(model.loss, grads=opt.grads)
    if name == "accumulated":
        gradient = sw.accumulate(gradient, 2, dtype=dtype)
    tokens = torch.arange(8 * 9).reshape(8, 9) % 24
    rows = sw.shard({"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}, mesh, strategy["tokens"])

    def step(params: Any, state: Any, rows: Any) -> tuple[Any, Any, Any]:
        loss, grads = gradient(params, rows)
        return *opt.step(grads, state, params), loss

    return step, params, opt.init(params), rows


def shards(tree: Any) -> list[torch.Tensor]:
    """Copies of all shards that this process holds."""
    return [shard.clone() for x in sw.tree.leaves(tree) for shard in x.shards]


def gathered(mesh: sw.Mesh) -> tuple[Any, Any, Any]:
    """A step whose gathered parameters take most of its memory, and its arguments.

    Args:
        mesh: with an axis "data", over which parameters are cut.

    Returns:
        step, params, x: `step(params, x)` gives the loss and the gradients.
    """
    width, depth = 32, 6
    draw = torch.Generator().manual_seed(0)
    params = {
        f"w{i}": sw.shard(
            torch.randn(width, width, generator=draw, dtype=torch.float64) / 5, mesh, "a/data b"
        )
        for i in range(depth)
    }
    x = sw.shard(torch.randn(4, width, generator=draw, dtype=torch.float64), mesh, "n/data a")

    def loss(params: Any, x: Any) -> Any:
        for w in params.values():
            x = torch.tanh(x @ sw.reshard(w, "a b {R:data}"))
        return (x * x).mean()

    return sw.value_and_grad(loss), params, x
