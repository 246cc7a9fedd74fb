"""Every strategy on a mesh that fits it, and a model's loss and gradients under it, in float64."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from tiny import TINY, Tiny, drawn

import shardwise as sw
from shardwise import strategies as s
from shardwise.layouts.notation import parse

F64 = sw.Precision(torch.float64, torch.float64, torch.float64)
ONE, FOUR = {"tensor": 1}, {"tensor": 4}


def every(kv: Any) -> dict[str, tuple[sw.Strategy, dict[str, int]]]:
    """Strategy and mesh by name; `kv` says what happens to key and value heads."""
    one, sequence = s.tensor_1d(kv=kv), s.sequence_parallel(kv=kv)
    two, direct = s.tensor_2d(kv=kv), s.tensor_2d(method="direct", kv=kv)
    deep, three = s.tensor_2p5d(kv=kv), s.tensor_3d(kv=kv)
    square, cube = {"row": 2, "col": 2}, {"i": 2, "j": 2, "k": 2}
    return {
        "1: all axes of size 1": (s.data() * one * three, {"data": 1, "tensor": 1, **dict.fromkeys("ijk", 1)}),  # noqa: E501
        "4: data": (s.data(), {"data": 4}),
        "4: fsdp": (s.fsdp(), {"data": 4}),
        "4: 1D": (one, FOUR),
        "4: sequence": (sequence, FOUR),
        "4: sequence, ring": (sequence.replace(matmul="ring", activations={"block_in": sequence["hidden"]}), FOUR),  # noqa: E501
        "4: 2D direct": (direct, square),
        "4: 2D streamed": (two, square),
        "8: data x 1D": (s.data() * one, {"data": 2, "tensor": 4}),
        "8: fsdp x sequence": (s.fsdp() * sequence, {"data": 4, "tensor": 2}),
        "8: 2.5D": (deep, {"depth": 2, **square}),
        "8: 1D inside 2.5D's depth": (s.tensor_1d("depth", kv=kv) * direct, {"depth": 2, **square}),
        "8: 3D": (three, cube),
        "8: 3D, recomputed, regathered": (three.replace(recompute="all", save="shard"), cube),
        "9: 2D direct": (direct, {"row": 3, "col": 3}),
        "9: 2D streamed": (two, {"row": 3, "col": 3}),
        "16: 2.5D": (deep, {"depth": 4, **square}),
        "16: data x 3D": (s.data() * three, {"data": 2, **cube}),
        "16: fsdp x 3D": (s.fsdp() * three, {"data": 2, **cube}),
    }  # fmt: skip


@cache
def tiny(name: str) -> Tiny:
    return TINY[name]()


def placed(batch: Any, strategy: sw.Strategy, mesh: sw.Mesh) -> Any:
    """Each entry cut as its row says: tokens [batch seq], images, or one number a sample."""
    rows = {1: strategy["labels"], 2: strategy["tokens"], 4: strategy["images"]}
    return {k: sw.shard(v, mesh, rows[v.ndim]) for k, v in batch.items()}


def rows_of(strategy: sw.Strategy, axes: dict[str, int]) -> int:
    """A batch that every activation's row can cut, at least 4."""
    cuts = [dim for row in strategy.activations.values() for dim in batch_axes(row)]
    n = math.lcm(*(math.prod(axes[a] for a in dim) for dim in cuts))
    return n * max(1, 4 // n)


def batch_axes(row: str) -> list[tuple[str, ...]]:
    parsed = parse(row)
    return [d for name, d in zip(parsed.names, parsed.dims, strict=True) if name == "batch"]


def trained(name: str, case: str, on: sw.Mesh | None = None) -> tuple[Any, Any, Any]:
    """Parameters, loss and gradients of a tiny model under a strategy; `on`: its mesh."""
    of = tiny(name)
    strategy, axes = every(of.kv)[case]
    strategy = strategy.replace(precision=F64)
    mesh = sw.make_mesh(axes) if on is None else on
    model = of.make(of.config, strategy)
    batch = placed(of.batch(rows_of(strategy, axes)), strategy, mesh)
    params = sw.shard(drawn(model), mesh, strategy.layouts(model.declaration, of.config, mesh))
    loss, grads = sw.value_and_grad(model.loss)(params, batch)
    return params, loss, grads
