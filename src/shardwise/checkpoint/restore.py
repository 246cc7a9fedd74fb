"""Reading a checkpoint onto whatever mesh and layout the reader asks for.

`like` says what, where, in which layout; the checkpoint says nothing about that. Names, shapes and
dtypes of all leaves are compared before anything is read, every block is checked against its hash
before the tree is returned, and in a job all processes succeed or all raise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import optree
import torch
from torch import Tensor

from ..layouts.layout import make as make_layout
from ..layouts.reshard import reshard
from ..layouts.sharded import ShardedTensor, make_type, wrap
from ..layouts.tree import items
from ..meshlib.mesh import Mesh, make_mesh
from . import files, steps
from .errors import CheckpointError
from .files import Files
from .manifest import Manifest
from .match import matched
from .ranks import Ranks, acting
from .read import Box, Reader, Target, check_contents


def latest(path: Any) -> int | None:
    """The newest step whose manifest is right and whose files have their lengths; None: no such.

    What is in the file `latest` does not matter.

    >>> import tempfile, shardwise as sw
    >>> folder = tempfile.mkdtemp()
    >>> sw.checkpoint.latest(folder)
    >>> _ = sw.checkpoint.save(folder, {"seen": 7}, step=3)
    >>> sw.checkpoint.latest(folder)
    3
    """
    return steps.newest(files.CURRENT, Path(path).absolute())


def inspect(path: Any, step: int | None = None) -> Manifest:
    """The manifest of a checkpoint; prints as a table. Reads no tensor.

    Args:
        path: the directory of checkpoints.
        step: which; None takes the newest.

    Raises:
        CheckpointError: there is none, or it is damaged.

    >>> import tempfile, torch, shardwise as sw
    >>> folder, mesh = tempfile.mkdtemp(), sw.make_mesh({"data": 2})
    >>> w = sw.shard(torch.zeros(4, 2), mesh, "n/data d")
    >>> _ = sw.checkpoint.save(folder, {"w": w, "lr": 0.1}, step=3)
    >>> print(sw.checkpoint.inspect(folder))
    step 3: 1 tensors, 8 elements, 32 B in 2 files
      w   f32[4, 2]  32 B  2 blocks  _/data _
      lr  float                      0.1
    """
    disk, root = files.CURRENT, Path(path).absolute()
    asked = step is not None
    with _entered(disk, root, _chosen(disk, root, step), is_asked=asked) as (manifest, _, _):
        return manifest


def verify(path: Any, step: int | None = None) -> None:
    """Read every byte of a checkpoint and compare it with the hashes.

    Args:
        path: the directory of checkpoints.
        step: which; None takes the newest.

    Raises:
        CheckpointError: naming the file, the tensor, and both hashes.
    """
    disk, root = files.CURRENT, Path(path).absolute()
    asked, chosen = step is not None, _chosen(disk, root, step)
    with (
        _entered(disk, root, chosen, is_asked=asked) as found,
        _offering(disk, root, chosen, is_asked=asked),
    ):
        check_contents(disk, *found)


def restore(
    path: Any, like: Any, *, step: int | None = None, rename: Mapping[str, str] | None = None
) -> Any:
    """A tree from a checkpoint, placed as another tree is.

    Args:
        path: the directory of checkpoints.
        like: what to read: a tree whose leaves say shape, dtype, mesh and layout; their values are
            not used. It may leave out any part of what is stored. ShardedTensors of an abstract
            mesh (`eval_shape`) come back on the real mesh with the same axes: one that occurs in
            `like`, else `make_mesh(axes)`. Plain tensors come back whole, a meta tensor on the CPU.
        step: which; None takes the newest, and raises if that is damaged.
        rename: stored path to the path in `like`, of a leaf or of a whole sub-tree; "" is the root.

    Returns:
        A new tree of the structure of `like`. Nothing of `like` is changed.

    Cost: each process reads the blocks that its shards touch, and holds 16 MiB (or one row of a
    block) beside them.

    Raises:
        CheckpointError: naming the file, the tensor and both values: names, shapes, dtypes or kinds
            that differ (all of them listed), damaged or missing files, a manifest that lies.

    >>> import tempfile, torch, shardwise as sw
    >>> folder, old, new = tempfile.mkdtemp(), sw.make_mesh({"x": 4}), sw.make_mesh({"y": 3})
    >>> w = sw.shard(torch.arange(12.0), old, "n/x")
    >>> _ = sw.checkpoint.save(folder, {"w": w}, step=1)
    >>> sw.checkpoint.restore(folder, {"w": sw.zeros((12,), new, "n/y")})["w"].shards[1]
    tensor([4., 5., 6., 7.])
    """
    disk, root = files.CURRENT, Path(path).absolute()
    values, spec = optree.tree_flatten(like, none_is_leaf=True)  # pyright: ignore
    leaves = list(zip((path for path, _ in items(like)), _on_real_meshes(values), strict=True))
    ranks = acting([leaf for _, leaf in leaves])
    try:
        chosen = _agreed_step(disk, root, step, ranks)
        with (
            _entered(disk, root, chosen, is_asked=step is not None) as (manifest, directory, where),
            Reader(disk, manifest, directory, where) as reader,
        ):
            stored = matched(manifest, leaves, dict(rename or {}), where)
            with _offering(disk, root, chosen, is_asked=step is not None):
                made = [_leaf(reader, stored[i], leaf) for i, (_, leaf) in enumerate(leaves)]
    except BaseException as error:
        _end(ranks, error)
        raise
    _end(ranks, None)
    return spec.unflatten(made)


def _chosen(disk: Files, root: Path, step: int | None) -> int:
    """The step asked for, else the newest, sound or not."""
    if step is not None:
        return step
    found = steps.committed(disk, root)
    if not found:
        raise CheckpointError("no checkpoint here", file=root)
    return found[-1]


@contextmanager
def _entered(
    disk: Files, root: Path, step: int, *, is_asked: bool
) -> Iterator[tuple[Manifest, int, Path]]:
    """A commit; if it is damaged and nobody asked for it, the error offers an older one."""
    with ExitStack() as stack:
        with _offering(disk, root, step, is_asked=is_asked):
            found = stack.enter_context(steps.entered(disk, root, step))
        yield found


@contextmanager
def _offering(disk: Files, root: Path, step: int, *, is_asked: bool) -> Iterator[None]:
    """Mark errors inside as damage of the commit; if nobody asked for it, offer an older one.

    Contents of the older one are not read for that, as they may be large and on all processes.
    """
    try:
        yield
    except CheckpointError as error:
        error.is_damage = True
        if not is_asked:
            found = reversed(steps.committed(disk, root))
            older = (s for s in found if s < step and steps.damage(disk, root, s) is None)
            sound = next(older, None)
            offer = "none is sound" if sound is None else f"the newest sound one: step={sound}"
            error.args = (f"{error}\n  {offer}",)
        raise


def _agreed_step(disk: Files, root: Path, step: int | None, ranks: Ranks) -> int:
    """Rank 0's choice, so that a commit made meanwhile does not divide the job."""
    if ranks.is_first:
        chosen = _chosen(disk, root, step)
        ranks.tell("step", {"step": chosen})
        return chosen
    (message,) = ranks.hear("step")
    if "error" in message:
        raise CheckpointError(f"rank 0 could not restore: {message['error']}")
    return message["step"]


def _end(ranks: Ranks, error: BaseException | None) -> None:
    """All processes have read their parts, or all raise."""
    if ranks.store is None:
        return
    mine = {} if error is None else {"error": f"{type(error).__name__}: {error}"}
    if getattr(error, "is_damage", False):
        mine["damage"] = "yes"
    if error is not None:
        for topic in ("step", "end") if ranks.is_first else ("read",):
            ranks.tell(topic, mine)
        return
    if not ranks.is_first:
        ranks.tell("read", mine)
        _raise_told(ranks.hear("end"), [0])
        return
    others = range(1, ranks.size)
    try:
        _raise_told(ranks.hear("read", others), others)
    except CheckpointError as failed:
        damage = {"damage": "yes"} if failed.is_damage else {}
        ranks.tell("end", {"error": str(failed), **damage})
        raise
    ranks.tell("end", {})


def _raise_told(messages: Iterable[Mapping[str, Any]], ranks: Iterable[int]) -> None:
    for rank, message in zip(ranks, messages, strict=True):
        if "error" in message:
            failed = CheckpointError(f"rank {rank} could not restore: {message['error']}")
            failed.is_damage = "damage" in message
            raise failed


def _on_real_meshes(leaves: list[Any]) -> list[Any]:
    """The leaves, those of an abstract mesh moved (without numbers) to a real one."""
    real: dict[tuple[Any, ...], Mesh] = {}
    for x in leaves:
        if isinstance(x, ShardedTensor) and x.mesh.transport != "abstract":
            real.setdefault(tuple(x.mesh.axes.items()), x.mesh)
    found = []
    for x in leaves:
        if isinstance(x, ShardedTensor) and x.mesh.transport == "abstract":
            axes = tuple(x.mesh.axes.items())
            if axes not in real:
                real[axes] = make_mesh(x.mesh.axes, device=x.mesh.device)
            kind = make_type(real[axes], x.layout, x.shape, x.dtype)
            found.append(ShardedTensor((), kind))
        else:
            found.append(x)
    return found


def _leaf(reader: Reader, path: str, like: Any) -> Any:
    """One leaf of the result."""
    if isinstance(like, ShardedTensor):
        return _sharded(reader, path, like)
    if isinstance(like, Tensor):
        target = Target(tuple((0, n) for n in like.shape), like.dtype)
        reader.fill(path, [target])
        return target.tensor.to("cpu" if like.device.type == "meta" else like.device)
    return reader.manifest.values[path]


def _sharded(reader: Reader, path: str, like: ShardedTensor) -> ShardedTensor:
    mesh, layout, shape = like.mesh, like.layout, tuple(like.shape)
    on_device = make_layout(layout.dims, layout.unreduced, layout.reduced, at=layout.at)
    if mesh.is_outside:
        empty = torch.empty(like.local_shape, dtype=like.dtype, device="meta")
        return wrap([empty], mesh, layout, shape)
    boxes: list[Box] = [
        tuple((s.start, s.stop) for s in layout.index(shape, mesh, coord)) for coord in mesh.coords
    ]
    targets = {box: Target(box, like.dtype) for box in boxes}
    reader.fill(path, list(targets.values()))
    placed = {box: target.tensor.to(mesh.device) for box, target in targets.items()}
    places = mesh.positions(tuple(sorted(layout.unreduced)))
    shards = [  # a sum that is owed has its value on the first device, zeros elsewhere
        placed[box].view_as(placed[box]) if place == 0 else torch.zeros_like(placed[box])
        for box, place in zip(boxes, places, strict=True)
    ]
    made = wrap(shards, mesh, on_device, shape)
    return made if layout is on_device else reshard(made, layout)
