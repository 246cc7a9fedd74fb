"""Torch's distributed checkpoints: ours read by DTensor programs, theirs by us, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import launch
from torch import nn

import shardwise as sw
from shardwise import interop, optim

pytestmark = [
    pytest.mark.processes,
]


def values() -> dict[str, Any]:
    """Of every sort: cut by two axes in both orders, whole, a scalar, bf16, integers."""
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
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
    return sw.tree.map(
        lambda v, row: sw.zeros(v.shape, mesh, row, dtype=v.dtype), values(), rows
    )


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

    torch.distributed.init_process_group("gloo")
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
    torch.distributed.destroy_process_group()
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


@pytest.mark.parametrize("size", [2, 4])
def test_ours_comes_back(size: int, tmp_path: Path) -> None:
    other = 6 - size
    launch(write, size, size, str(tmp_path))
    launch(read_ours, size, size, str(tmp_path))
    launch(read_ours, other, other, str(tmp_path))
    launch(read_as_dtensors, other, other, str(tmp_path))


@pytest.mark.parametrize("size", [2, 4])
def test_a_checkpoint_of_fsdp_is_read(size: int, tmp_path: Path) -> None:
    wrote = launch(write_fsdp, size, size, str(tmp_path))[0].value
    assert len(wrote) == 8
    for outcome in launch(read_fsdp, 2, 2, str(tmp_path)):
        assert outcome.value.keys() == wrote.keys()
        for name, value in wrote.items():
            assert torch.equal(outcome.value[name], value), name


def test_a_checkpoint_is_read_without_a_job(tmp_path: Path) -> None:
    launch(write, 2, 2, str(tmp_path))
    expected = values()["blocks"][0]["w"]
    state = {"params.blocks.0.w": torch.zeros_like(expected)}
    dcp.load(state, checkpoint_id=str(tmp_path), no_dist=True)
    x = sw.shard(state["params.blocks.0.w"], sw.make_mesh({"data": 4}), "i/data o")
    assert torch.equal(x.full_tensor(), expected)
