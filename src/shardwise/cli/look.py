"""`shardwise plan`, `show` and `inspect`: what a run would do, and what one has saved.

A planned mesh is abstract: a file for a thousand devices is planned on a laptop, without memory.
An axis of size -1 counts as 1, since there are no processes to share out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint
from ..checkpoint import Manifest
from ..layouts.layout import Layout
from ..layouts.picture import Picture
from ..layouts.place import zeros
from ..layouts.show import show
from ..layouts.strategy import Strategy
from ..meshlib.mesh import Mesh, make_mesh
from ..models import Model
from ..ops import random
from ..ops.plan import Plan, plan
from . import build
from .config import Config
from .optimizer import build_optimizer
from .step import make_step

VIEWS = ("strategy", "mesh")


def planned(config: Config) -> Plan:
    """The plan of one training step: loss, gradients and optimizer.

    Raises:
        LayoutError: a strategy that does not fit model and mesh.
    """
    mesh = abstract(config)
    strategy, model = parts(config, mesh)
    micro = config.data.micro_batches
    model.check(mesh, batch=config.data.batch // micro, seq=config.data.seq)
    params = model.init(random.key(0), mesh)
    optimizer = build_optimizer(config, model.declaration)
    shape = (config.data.batch, config.data.seq)
    rows = zeros(shape, mesh, strategy["tokens"], dtype=torch.int64)
    step = make_step(
        model, optimizer, micro, is_scaled=config.optimizer.loss_scale is not None, donate=True
    )
    return plan(step, params, optimizer.init(params), {"tokens": rows, "labels": rows})


def shown(config: Config, view: str) -> Picture:
    """The picture of a file's strategy or mesh."""
    mesh = abstract(config)
    if view == "mesh":
        return show(mesh)
    strategy, model = parts(config, mesh)
    sizes = {**model.config.sizes, "batch": config.data.batch, "seq": config.data.seq}
    return show(strategy, mesh=mesh, sizes=sizes)


def drawn(text: str) -> Picture:
    """Who holds what of a layout: sizes stand in the place of names, `64/data 512/tensor`.

    The mesh has every axis of the text with 2 devices; `axis=4` behind the layout says otherwise.

    >>> print(drawn("4/data 6 data=2"))
    f32[4/data 6] on mesh(data=2)
    each device holds 2 x 6 (48 B)
    rows: dim 0 4/data; columns: dim 1 6
    cells: devices (data)
    <BLANKLINE>
          0:6
        ┌─────┐
    0:2 │ (0) │
        ├─────┤
    2:4 │ (1) │
        └─────┘
    """
    given = dict(re.findall(r"(?<!@)\b([A-Za-z_]\w*)=(\d+)", text))
    layout = re.sub(r"(?<!@)\b[A-Za-z_]\w*=\d+", "", text).strip()
    words = re.sub(r"\{[^{}]*\}", "", layout).split()
    names = [word.split("/")[0] for word in words if not word.startswith("@")]
    if not all(name.isdigit() for name in names):
        raise ValueError(f"{text!r}: write sizes in the place of names, as in '64/data 512'")
    axes: Mapping[str, int] = {
        axis: int(given.get(axis, 2)) for axis in re.findall(r"[/:,]([A-Za-z_]\w*)", layout)
    }
    mesh = make_mesh({**axes, **{k: int(v) for k, v in given.items()}} or {"device": 1}, transport="abstract")  # fmt: skip  # noqa: E501
    return show(zeros([int(n) for n in names], mesh, Layout(layout)))


def inspected(text: str, step: int | None, verify: bool) -> Manifest:
    """The manifest of a directory of checkpoints, or of one `step-…` directory in it.

    Args:
        text: the path.
        step: which; None takes the newest.
        verify: whether to compare every byte with its hash.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = Path(text)
    named = re.fullmatch(r"step-(\d+)", path.name)
    if named and step is None:
        path, step = path.parent, int(named[1])
    if verify:
        checkpoint.verify(path, step)
    return checkpoint.inspect(path, step)


def as_json(manifest: Manifest) -> str:
    """A manifest for other programs; tensors without their blocks."""
    tensors = {
        path: {
            "dtype": str(entry.dtype).removeprefix("torch."),
            "shape": list(entry.shape),
            "bytes": entry.bytes,
            "layout": entry.layout,
            "mesh": dict(entry.mesh),
            "blocks": len(entry.blocks),
        }
        for path, entry in manifest.tensors.items()
    }
    values = {k: str(v) if isinstance(v, random.Key) else v for k, v in manifest.values.items()}
    files = {
        name: {"bytes": body.bytes, "sha256": body.sha256} for name, body in manifest.files.items()
    }
    found = {"step": manifest.step, "tensors": tensors, "values": values, "files": files}
    return json.dumps(found | {"versions": dict(manifest.versions)})


def abstract(config: Config) -> Mesh:
    """The file's mesh without devices."""
    axes = {name: max(size, 1) for name, size in config.mesh.axes.items()}
    return make_mesh(axes, transport="abstract")


def parts(config: Config, mesh: Mesh) -> tuple[Strategy, Model]:
    """The file's strategy and model."""
    strategy = build.build_strategy(config)
    model: Any = build.build_model(config.model, config.data.seq, strategy, mesh)[0]
    return strategy, model
