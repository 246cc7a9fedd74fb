"""A function that moves data in every way there is: what a graph of it has to leave as it is."""

from __future__ import annotations

from typing import Any

import torch

import shardwise as sw
from shardwise.layouts.convert import convert

KINDS = {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "permute", "broadcast"}
KINDS |= {"reduce"}
CUTS = ("a b", "a/data b", "a b/data", "a/tensor/data b", "a/data/tensor b", "a b {U:data,tensor}")
TO = ("a b", "a b/data", "a/data/tensor b", "a b/tensor/data")


def kinds(mesh: sw.Mesh) -> dict[str, Any]:
    """Arguments of `everything` on a mesh with axes "data" and "tensor".

    Numbers are whole, so that sums are the same in any order.
    """
    whole = torch.arange(16 * 8, dtype=torch.float64).reshape(16, 8)
    inputs = {cut: sw.shard(whole, mesh, cut) for cut in CUTS}
    for dtype in (torch.bool, torch.int16, torch.complex64, torch.bfloat16):
        inputs[str(dtype)] = sw.shard((whole % 3).to(dtype), mesh, "a/data b/tensor")
    return inputs


def everything(inputs: dict[str, Any]) -> dict[str, Any]:
    """Each collective, over one axis and over two in both orders, of several dtypes."""
    made: dict[str, Any] = {}
    for name, x in inputs.items():
        if name not in CUTS:
            made[name] = sw.reshard(x, "a b")
            continue
        for to in TO:
            made[f"{name} to {to}"] = sw.reshard(x, to) * 2

    def local(x: Any) -> dict[str, Any]:
        one = sw.ops.permute(x, "data", [(0, 1)])
        return {
            "largest": sw.ops.all_reduce(x, "data", "max"),
            "sum": sw.ops.all_reduce(x, "data"),
            "there": sw.ops.broadcast(x, "data", 1),
            "here": sw.ops.reduce(x, "data", 1),
            "moved": one + 1,
            "turned": sw.ops.all_to_all(x, "data", 1, 0),
        }

    layouts = {
        "largest": "a b",
        "sum": "a b",
        "there": "a b {R:data}",
        "here": "a/data b",
        "moved": "a/data b",
        "turned": "a b/data",
    }
    made |= sw.shard_map(local, in_layouts="a/data b", out_layouts=layouts)(inputs["a/data b"])
    # A sum that is kept on one device of the axis is not read on the others: it runs all the same.
    whole = convert(inputs["a b {U:data,tensor}"], ("data", "tensor"), "reduced")
    made["kept"] = convert(whole, "data", "unreduced")
    return made
