"""Torch's distributed checkpoints: ours read by DTensor programs, theirs by us, bit for bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import launch
from torch import nn

import shardwise as sw
from shardwise import interop, optim

pytestmark = pytest.mark.processes


def values() -> dict[str, Any]:
    """Of every sort: cut by two axes in both orders, whole, a scalar, bf16, integers."""
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64)  # noqa: E731
    return {
        "blocks": [{"w": draw(8, 12), "b": draw(12)} for _ in range(2)],
        "embed": draw(16, 4).bfloat16(),
        "count": torch.arange(8),
        "scale": draw(),
    }


LAYOUTS = {
    2: [
        {"w": "i/x o", "b": "o", "embed": "v e/x", "count": "n/x", "scale": ""},
        {"w": "i o/x", "b": "o/x", "embed": "v/x e", "count": "n", "scale": ""},
    ],
    4: [
        {"w": "i/y/x o", "b": "o/x", "embed": "v/x e/y", "count": "n/x/y", "scale": ""},
        {"w": "i o/x/y", "b": "o", "embed": "v/y/x e", "count": "n/y", "scale": ""},
    ],
}
MESHES = {2: {"x": 2}, 4: {"x": 2, "y": 2}}


def layouts(number: int, which: int) -> Any:
    rows = LAYOUTS[number][which]
    return {
        "blocks": [{"w": rows["w"], "b": rows["b"]} for _ in range(2)],
        **{key: rows[key] for key in ("embed", "count", "scale")},
    }


def empty(mesh: sw.Mesh, rows: Any) -> Any:
    """Something to load into."""
    return sw.tree.map(lambda v, row: sw.zeros(v.shape, mesh, row, dtype=v.dtype), values(), rows)


def check(tree: Any, expected: Any) -> None:
    found = dict(sw.tree.items(tree))
    wanted = dict(sw.tree.items(expected))
    assert found.keys() == wanted.keys()
    for path, value in wanted.items():
        full = found[path].full_tensor()
        assert full.dtype == value.dtype, path
        assert torch.equal(full, value), path


def write(size: int, folder: str) -> None:
    """Our parameters and an optimizer's state, by torch's checkpoint."""
    mesh = sw.make_mesh(MESHES[size])
    tree = sw.shard(values(), mesh, layouts(size, 0))
    w = {"w": tree["blocks"][0]["w"]}
    opt = optim.adamw(0.1)
    _, state = opt.step(w, opt.init(w), w)
    shared = interop.to_dtensor({"params": tree, "opt": state, "epoch": 3}, copy=False)
    dcp.save(shared, checkpoint_id=folder)


def read_ours(size: int, folder: str) -> None:
    """It comes back in another layout, on this number of processes."""
    mesh = sw.make_mesh(MESHES[size])
    rows = layouts(size, 1)
    w = {"w": sw.zeros((8, 12), mesh, rows["blocks"][0]["w"], dtype=torch.float64)}
    blank = {"params": empty(mesh, rows), "opt": optim.adamw(0.1).init(w), "epoch": 0}
    state = interop.to_dtensor(blank)
    dcp.load(state, checkpoint_id=folder)
    back = interop.from_dtensor(state, copy=False)
    assert back["epoch"] == 3
    check(back["params"], values())
    types = sw.tree.map(lambda x: x._type, back["params"])
    assert types == sw.tree.map(lambda x: x._type, blank["params"])
    check(blank["params"], sw.tree.map(torch.zeros_like, values()))  # not written into
    grad = values()["blocks"][0]["w"]
    opt = optim.adamw(0.1)
    one = sw.make_mesh({"one": 1}, transport="simulated")
    plain = {"w": sw.shard(grad, one)}
    _, expected = opt.step(plain, opt.init(plain), plain)
    check(back["opt"], sw.tree.map(lambda x: x.full_tensor(), expected))


def read_as_dtensors(size: int, folder: str) -> None:
    """A program of DTensors alone reads it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, zeros

    dm = init_device_mesh("cpu", (size,))
    expected = dict(sw.tree.items(values()))
    state = {
        f"params.{k}": zeros(
            v.shape, dtype=v.dtype, device_mesh=dm, placements=[Shard(0)] if v.ndim else None
        )
        for k, v in expected.items()
    }
    dcp.load(state, checkpoint_id=folder)
    for path, value in expected.items():
        assert torch.equal(state[f"params.{path}"].full_tensor(), value), path


def write_fsdp(size: int, folder: str) -> dict[str, torch.Tensor]:
    """A module under FSDP2 (on 4 processes over tensor parallelism), after a step of AdamW."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5))
    dm = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("data", "tensor"))
    if size == 4:
        parallelize_module(module, dm["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(module, mesh=dm["data"])
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.ones(4, 6)).square().sum().backward()
    optimizer.step()
    params, state = get_state_dict(module, optimizer)
    dcp.save({"model": params, "optim": state}, checkpoint_id=folder)
    full = {name: p.full_tensor() for name, p in params.items()}
    full |= {f"mu.{n}": s["exp_avg"].full_tensor() for n, s in state["state"].items()}
    if size == 4:  # the live ones: the order of both axes is read off their placements
        ours = interop.from_dtensor({n: p for n, p in params.items() if p.shape[0] % 4 == 0})
        assert str(ours["0.weight"].layout) == "_/tensor/data _"
        for name, p in ours.items():
            assert dict(p.mesh.axes) == {"data": 2, "tensor": 2}
            assert torch.equal(p.full_tensor(), full[name])
            assert interop.to_dtensor(p).placements == params[name].placements
    return full


def read_fsdp(size: int, folder: str) -> dict[str, torch.Tensor]:
    """Its parameters and moments on our mesh, cut the other way."""
    mesh = sw.make_mesh({"tensor": size})
    s = sw.strategies.rows({"0.weight": "out/tensor in", "0.bias": "out/tensor",
                            "2.weight": "out in/tensor", "2.bias": "out"})  # fmt: skip
    module = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5))
    with torch.no_grad():  # all that is compared comes from the file
        for p in module.parameters():
            p.zero_()
    params = interop.module_params(module, mesh, s)
    blank = {
        "model": params,
        "optim": {"state": {name: {"exp_avg": p} for name, p in params.items()}},
    }
    state = interop.to_dtensor(blank)
    dcp.load(state, checkpoint_id=folder)
    back = interop.from_dtensor(state, copy=False)
    assert str(back["model"]["2.weight"]) == "f32[5 8/tensor]"
    full = {name: p.full_tensor() for name, p in back["model"].items()}
    moments = back["optim"]["state"].items()
    return full | {f"mu.{name}": m["exp_avg"].full_tensor() for name, m in moments}


def first(folder: str) -> dict[str, torch.Tensor]:
    """On 2 processes: both sorts of checkpoint are written, ours is read."""
    write(2, f"{folder}/ours2")
    read_ours(2, f"{folder}/ours2")
    return write_fsdp(2, f"{folder}/fsdp2")


def second(folder: str) -> dict[str, torch.Tensor]:
    """On 4: those of 2 are read, others written."""
    read_ours(4, f"{folder}/ours2")
    read_as_dtensors(4, f"{folder}/ours2")
    write(4, f"{folder}/ours4")
    read_ours(4, f"{folder}/ours4")
    return write_fsdp(4, f"{folder}/fsdp4")


def third(folder: str) -> list[dict[str, torch.Tensor]]:
    """On 2 again: all that is left."""
    read_ours(2, f"{folder}/ours4")
    read_as_dtensors(2, f"{folder}/ours4")
    return [read_fsdp(2, f"{folder}/fsdp{size}") for size in (2, 4)]


def test_checkpoints_of_torch(tmp_path: Path) -> None:
    folder = str(tmp_path)
    wrote = [launch(first, 2, folder)[0].value, launch(second, 4, folder)[0].value]
    for outcome in launch(third, 2, folder):
        for theirs, ours in zip(wrote, outcome.value, strict=True):
            assert len(theirs) == 8
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                assert value.abs().min() > 0
                assert torch.equal(ours[name], value), name
    # and with no job at all, as global values
    expected = values()["blocks"][0]["w"]
    state = {"params.blocks.0.w": torch.zeros_like(expected)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it assumes a single process
        dcp.load(state, checkpoint_id=tmp_path / "ours4", no_dist=True)
    x = sw.shard(state["params.blocks.0.w"], sw.make_mesh({"data": 4}), "i/data o")
    assert torch.equal(x.full_tensor(), expected)
