"""An `nn.Module` as a pure function of its parameters: its own forward runs on ShardedTensors.

Parameters keep torch's names and its order of dims, [out in]: the tree is a flat dict by the names
of `module.named_parameters()`, which are the roles that a strategy's rows are found by
(`"*.q_proj.weight" = "out/tensor in"`). For the time of a call they stand in the module where its
own were, tied weights in all their places.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layouts.place import shard
from ..layouts.rows import rest_layout
from ..layouts.sharded import ShardedTensor, no_rule
from ..layouts.strategy import Strategy
from ..meshlib.errors import LayoutError, nearest
from ..meshlib.mesh import Mesh
from ..meshlib.source import user_line
from ..ops.dispatch import export

_COMPARED = 64  # numbers of each parameter that processes compare


class _Slot(NamedTuple):
    """Where a tensor hangs in a module: its dict of parameters or buffers, and the key."""

    holder: dict[str, Any]
    key: str


def module_params(module: nn.Module, mesh: Mesh, strategy: Strategy) -> dict[str, ShardedTensor]:
    """A module's parameters, cut as a strategy's `rest` rows say, by torch's names.

    Args:
        module: its parameters must be equal in every process; a few numbers of each are compared.
            On an abstract mesh they may be on the meta device.
        mesh: where to.
        strategy: rows by name, in torch's order of dims. Floating parameters get its param dtype.
            The module knows nothing of `compute` rows: `strategy.use(params)` before the call.

    Returns:
        Name to tensor; tied parameters once, by their first name.

    Raises:
        LayoutError: rows that do not fit, all of them, by name.
        MeshError: an axis that the mesh has not; or (torchrun) parameters that differ between
            processes, as after another seed in each.

    >>> import torch, shardwise as sw
    >>> s = sw.strategies.rows({"weight": "out/tensor in", "bias": "out/tensor"})
    >>> for name, p in module_params(
    ...     torch.nn.Linear(3, 4), sw.make_mesh({"tensor": 2}), s
    ... ).items():
    ...     print(name, p)
    weight f32[4/tensor 3]
    bias f32[4/tensor]
    """
    strategy.check({}, mesh)
    found: dict[str, Any] = {}
    layouts: dict[str, Any] = {}
    problems: list[str] = []
    for name, p in module.named_parameters():
        try:
            layouts[name] = rest_layout(strategy.rest_row(name), p.shape, mesh, "rest row")
            layouts[name].check(p.shape, mesh, "rest row")
        except LayoutError as error:
            problems.append(f"{name}: {error}")
            continue
        if p.is_meta and mesh.shard_device.type != "meta":
            problems.append(f"{name}: the parameter is on the meta device and has no value")
        value = p.detach()
        found[name] = value.to(strategy.precision.param) if value.is_floating_point() else value
    if problems:
        raise LayoutError("module_params: " + "\n".join(problems), kind="indivisible")
    if mesh.transport == "distributed":
        _compare(found, mesh)
    return shard(found, mesh, layouts)


def functional_call(module: nn.Module, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """What `module(*args, **kwargs)` gives with these parameters in the place of its own.

    Pure: the module is as before afterwards, also after an exception. Dropout must be off
    (`module.eval()`): keys are explicit here. One thread at a time may call a module.

    Args:
        module: any module whose forward uses ops that the library has rules for.
        params: by name, from `module_params` or a step. Buffers may be given too; those that are
            not are constants, and so is a frozen parameter.
        *args: of its forward: ShardedTensors, or plain tensors that are equal everywhere.
        **kwargs: likewise.

    Returns:
        What the forward returns.

    Raises:
        ValueError: names that the module has not; trainable parameters that are missing.
        LayoutError: an op without a rule, a choice that only a layout can settle.
        TypeError: a forward that writes into a buffer (batch norm in training).

    >>> import torch, shardwise as sw
    >>> module, mesh = torch.nn.Linear(3, 4), sw.make_mesh({"data": 2})
    >>> params = module_params(module, mesh, sw.strategies.data())
    >>> functional_call(module, params, sw.shard(torch.ones(6, 3), mesh, "b/data in"))
    f32[6/data 4] local[3 4] on mesh(data=2)
    """
    with _swapped(module, params):
        return module(*args, **kwargs)


def load_module(module: nn.Module, params: Mapping[str, Any]) -> None:
    """Copy parameters back into a module, in its own dtypes and on its own devices.

    Nothing is written unless all names and shapes fit. A collective: every process must call it.

    Args:
        module: the one that `module_params` read, or one of the same names and shapes.
        params: by name; buffers may be among them.

    Raises:
        ValueError: names that the module has not, trainable parameters that are missing, another
            shape.

    Cost: an all_gather of each cut parameter, one at a time.

    >>> import torch, shardwise as sw
    >>> module = torch.nn.Linear(3, 4)
    >>> params = module_params(module, sw.make_mesh({"data": 2}), sw.strategies.fsdp())
    >>> load_module(module, {name: 2 * p for name, p in params.items()})
    """
    targets, _ = _tensors(module)
    _check_names(targets, params)
    for name, p in params.items():
        if tuple(p.shape) != tuple(targets[name].shape):
            raise ValueError(
                f"load_module: {name} has shape {tuple(p.shape)}, "
                f"the module's is {tuple(targets[name].shape)}"
            )
    with torch.no_grad():
        for name, p in params.items():
            targets[name].copy_(p.full_tensor() if isinstance(p, ShardedTensor) else p)


def _compare(values: Mapping[str, Tensor], mesh: Mesh) -> None:
    """All processes of the mesh were given the same parameters, or all raise."""
    from ..meshlib.distributed import agree

    digest = hashlib.blake2b(digest_size=16)
    for name, value in values.items():
        flat = value.reshape(-1)
        some = flat[:: max(1, flat.numel() // _COMPARED)].cpu().contiguous()
        digest.update(repr((name, tuple(value.shape), value.dtype)).encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    agree(mesh.comm, digest.digest(), f"module_params at {user_line()}: the parameters")


@export(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
def _dropout_that_is_off(
    x: ShardedTensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> ShardedTensor:
    """The dropout of a module in evaluation, or of rate 0; torch's others have no key."""
    return no_rule("dropout", [x]) if training and p else x


@contextmanager
def _swapped(module: nn.Module, params: Mapping[str, Any]) -> Iterator[None]:
    """The module with these tensors in it, for a while."""
    own, slots = _tensors(module)
    _check_names(own, params)
    new: dict[int, Any] = {}
    for name, p in params.items():
        if new.setdefault(id(own[name]), p) is not p:
            raise ValueError(f"{name} is tied to another name that was given too; give one")
    versions = _versions(own, new)
    try:
        for key, p in new.items():
            for slot in slots[key]:
                slot.holder[slot.key] = p
        yield
    finally:
        by_id = {id(value): value for value in own.values()}
        for key in new:
            for slot in slots[key]:
                slot.holder[slot.key] = by_id[key]
    written = [name for name, count in _versions(own, new).items() if count != versions[name]]
    if written:
        raise TypeError(
            f"functional_call: the forward wrote into the buffer {written[0]!r}, so it is no "
            "function; module.eval() keeps batch norms from it"
        )


def _tensors(module: nn.Module) -> tuple[dict[str, Any], dict[int, list[_Slot]]]:
    """Every parameter and buffer by all its names, and by its id the slots that hold it."""
    named: dict[str, Any] = {}
    slots: dict[int, dict[tuple[int, str], _Slot]] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        for holder in (part._parameters, part._buffers):
            for key, value in holder.items():
                if value is not None:
                    named[f"{prefix}.{key}" if prefix else key] = value
                    slots.setdefault(id(value), {})[id(holder), key] = _Slot(holder, key)
    return named, {key: list(found.values()) for key, found in slots.items()}


def _check_names(own: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    """Refuse unknown names and trainable parameters that are missing."""
    for name in params:
        if name not in own:
            raise ValueError(f"the module has no parameter {name!r}{nearest(name, own)}")
    given = {id(own[name]) for name in params}
    missing = [name for name, v in own.items() if v.requires_grad and id(v) not in given]
    if missing:
        raise ValueError(
            f"{len(missing)} trainable parameters of the module are missing: "
            f"{', '.join(missing[:5])}{', ...' if missing[5:] else ''}; give them, or freeze them "
            "with requires_grad_(False)"
        )


def _versions(own: Mapping[str, Any], new: Mapping[int, Any]) -> dict[str, int]:
    """How often each of the module's own tensors that stay in it was written."""
    return {
        name: value._version
        for name, value in own.items()
        if id(value) not in new and isinstance(value, Tensor) and not value.is_inference()
    }
