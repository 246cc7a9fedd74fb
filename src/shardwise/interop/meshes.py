"""`Mesh` and torch's `DeviceMesh`: the same names, sizes, order and ranks; groups are shared.

Nothing is sent, so the processes that hold a sub-mesh can convert it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch

from ..meshlib.errors import MeshError
from ..meshlib.mesh import Mesh

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def to_device_mesh(mesh: Mesh) -> DeviceMesh:
    """The DeviceMesh with the same axes over the same processes; one per mesh.

    Args:
        mesh: a distributed mesh; one that this process is no part of too.

    Raises:
        MeshError: a simulated or abstract mesh: torch has one device per process; or devices whose
            ranks do not count up along an axis, which torch's groups cannot say.

    >>> import shardwise as sw
    >>> to_device_mesh(sw.make_mesh({"data": 2}))
    Traceback (most recent call last):
    ...
    shardwise.meshlib.errors.MeshError: to_device_mesh: mesh(data=2) is simulated, and a \
DeviceMesh has one device per process; start the program with torchrun --nproc-per-node 2
    """
    if mesh.transport != "distributed":
        raise MeshError(
            f"to_device_mesh: {mesh} is {mesh.transport}, and a DeviceMesh has one device per "
            f"process; start the program with torchrun --nproc-per-node {mesh.size}"
        )
    return _device_mesh(mesh)


@cache
def _device_mesh(mesh: Mesh) -> DeviceMesh:
    from torch.distributed.device_mesh import DeviceMesh

    from ..meshlib import distributed

    ranks = torch.tensor(mesh.ranks).view(*mesh.axes.values())
    for dim, (axis, size) in enumerate(mesh.axes.items()):
        if size > 1 and not bool((ranks.diff(dim=dim) > 0).all()):
            raise MeshError(
                f"to_device_mesh: along axis {axis!r} of {mesh} the ranks do not count up "
                f"({list(mesh.ranks)}); make the sub-mesh with ascending coordinates"
            )
    kind, names = mesh.device.type, tuple(mesh.axes)
    if mesh.is_outside:
        return DeviceMesh(kind, ranks, mesh_dim_names=names, _init_backend=False)
    transport = mesh.comm
    assert isinstance(transport, distributed.DistributedTransport)
    current = distributed.job()
    alone = (current.rank,)
    groups = [  # torch wants a group for an axis of size 1 too
        transport.process_group((axis,))
        or distributed._process_group(alone, current.attempt, mesh.device)
        for axis in names
    ]
    return DeviceMesh.from_group(groups, kind, mesh=ranks, mesh_dim_names=names)


def from_device_mesh(dm: DeviceMesh, names: Sequence[str] | None = None) -> Mesh:
    """The mesh with the same axes over the same processes.

    The job that torch started is used as it is; groups of its own are made per axis, so every
    process of the DeviceMesh must call this.

    Args:
        dm: a DeviceMesh or a slice of one.
        names: of its dims; None takes `dm.mesh_dim_names`.

    Raises:
        MeshError: no names, or not one per dim; or a device that this job does not run on.
    """
    from ..meshlib.distributed import job

    names = tuple(names or dm.mesh_dim_names or ())
    if len(names) != dm.ndim or len(set(names)) != len(names):
        raise MeshError(
            f"from_device_mesh: {dm.ndim} dims need as many names, got {names or 'none'}; "
            "pass names=, or make it with init_device_mesh(..., mesh_dim_names=...)"
        )
    odd = [name for name in names if not name.isidentifier()]
    if odd:
        raise MeshError(
            f"from_device_mesh: {odd[0]!r} is no axis name (an identifier); pass names="
        )
    current = job(dm.device_type)
    ranks = tuple(dm.mesh.flatten().tolist())
    return Mesh(dict(zip(names, dm.mesh.shape, strict=True)), "distributed", current.device, ranks)
