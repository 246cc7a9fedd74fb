"""Elementwise updates over whole trees: one pass over all local tensors, few launches.

Where the update of an element needs that element alone and all operands have one layout, local
arithmetic is global arithmetic: the layout drops out, on any mesh. `elementwise` brings the
operands to the parameters' layouts, hands lists of local tensors (`Many`) to a kernel, one call per
group of equal dtypes, and wraps what comes out in the parameters' types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import optree
import torch
from torch import Tensor

from ..layouts import tree
from ..layouts.reshard import reshard_one
from ..layouts.sharded import ShardedTensor, make_type
from ..layouts.tree import Mask, matches
from .many import Many

Kernel = Callable[..., tuple[Many, ...]]
ON_HOST = ("cpu",)  # devices whose scalars are read as numbers, since that waits for nothing


def elementwise(
    kernel: Kernel,
    trees: Sequence[Any],
    params: Any,
    *,
    olds: Sequence[int | None],
    scalars: Mapping[str, Any] | None = None,
    marks: Sequence[Any] | None = None,
    donate: Sequence[int] = (),
) -> tuple[Any, ...]:
    """A kernel on all leaves of some trees.

    Args:
        kernel: (scalars, mark, *one Many per tree) -> as many Many as `olds` is long; among the
            scalars, `members` has the numbers of the leaves.
        trees: of one structure; the first decides which leaves take part: None is left out.
        params: decides the layouts of operands and results.
        olds: per result the tree whose leaf stands in where the first is None, or None.
        scalars: name to a number, a scalar tensor or a schedule of the scalar "step".
        marks: per leaf, what kernels must tell apart (decayed or not).
        donate: indices of trees whose buffers may be written into.

    Returns:
        One tree per result, in the parameters' layouts.

    Cost: one launch per operation and group; communication only where a layout differs from the
    parameter's.
    """
    likes, spec = optree.tree_flatten(params, none_is_leaf=True)
    columns: list[list[Any]] = [spec.flatten_up_to(each) for each in trees]
    groups: dict[Any, list[int]] = {}
    for i, like in enumerate(likes):
        if columns[0][i] is None or like is None:
            continue
        check_meets(columns[0][i], like, params, i)
        kind = like._type
        layout, shape = kind.layout, kind.shape
        for column in columns:
            if column[i]._type.shape != shape:
                check_meets(column[i], like, params, i)
            if column[i]._type.layout is not layout:
                column[i] = aligned(column[i], like)
        key = (
            tuple(column[i]._type.dtype for column in columns),
            like._shards[0].device,
            marks[i] if marks is not None else None,
        )
        groups.setdefault(key, []).append(i)
    out: list[list[Any]] = [
        [None] * len(likes) if old is None else list(columns[old]) for old in olds
    ]
    with torch.no_grad():
        for (_, device, mark), members in groups.items():
            lists = [Many([s for i in members for s in column[i]._shards]) for column in columns]
            if donate and _are_apart(lists):
                for k in donate:
                    lists[k].free = True
            s = here(scalars or {}, device)
            s.members = members
            results = kernel(s, mark, *lists)
            for target, result in zip(out, results, strict=True):
                _wrap(target, result, members, likes)
    return tuple(spec.unflatten(target) for target in out)


def _are_apart(lists: Sequence[Many]) -> bool:
    """Whether each tensor owns its memory: replicas of a simulated mesh often share it."""
    every = [s for column in lists for s in column.each]
    if any(s.is_meta for s in every):
        return False
    stores = [s.untyped_storage() for s in every]
    return len({store.data_ptr() for store in stores}) == len(every) and all(
        store.nbytes() == s.numel() * s.element_size()
        for store, s in zip(stores, every, strict=True)
    )


def _wrap(target: list[Any], result: Many, members: Sequence[int], likes: Sequence[Any]) -> None:
    at, dtype = 0, result.dtype
    for i in members:
        kind = likes[i]._type
        held = len(likes[i]._shards)
        if kind.dtype is not dtype or kind.grad:
            kind = make_type(kind.mesh, kind.layout, kind.shape, dtype, False)
        target[i] = ShardedTensor(tuple(result.each[at : at + held]), kind)
        at += held


class Active:
    """The leaves of a tree that have a gradient, for transforms that go leaf by leaf.

    Args:
        params: the parameters.
        grads: gradients, None where a leaf takes no part; brought to the parameters' layouts.

    Attributes:
        params, grads: lists of leaves.
        paths: their paths.
    """

    def __init__(self, params: Any, grads: Any) -> None:
        likes, self._spec = optree.tree_flatten(params, none_is_leaf=True)
        given: list[Any] = self._spec.flatten_up_to(grads)
        self._at = [
            i
            for i, (p, g) in enumerate(zip(likes, given, strict=True))
            if not (p is None or g is None)
        ]
        self._size = len(likes)
        paths = [path for path, _ in tree.items(params)]
        self.paths = [paths[i] for i in self._at]
        self.params: list[ShardedTensor] = [likes[i] for i in self._at]
        for i in self._at:
            check_meets(given[i], likes[i], params, i)
        self.grads = [aligned(given[i], likes[i]) for i in self._at]

    def of(self, values: Any) -> list[Any]:
        """The active leaves of another tree like the parameters."""
        leaves = self._spec.flatten_up_to(values)
        return [leaves[i] for i in self._at]

    def tree(self, values: Sequence[Any], old: Any = None) -> Any:
        """A tree with these active leaves; the others are those of `old`, or None."""
        out = [None] * self._size if old is None else list(self._spec.flatten_up_to(old))
        for i, value in zip(self._at, values, strict=True):
            out[i] = value
        return self._spec.unflatten(out)

    def takes(self, mask: Mask | None) -> list[bool]:
        """Per active leaf, whether a mask takes it; None takes none."""
        return [
            mask is not None and matches(mask, path, p)
            for path, p in zip(self.paths, self.params, strict=True)
        ]


def check_meets(x: Any, like: Any, params: Any, i: int) -> None:
    """Raise unless leaf number i of the parameters can be updated by `x`.

    Broadcasting is for people who ask for it: a gradient of another shape is a mistake.

    Raises:
        TypeError: for plain tensors, and parameters that are not floating point numbers.
        ValueError: for a gradient of another shape.
    """
    if isinstance(x, ShardedTensor) and isinstance(like, ShardedTensor):
        kind = like._type
        if x._type.shape == kind.shape and (kind.dtype.is_floating_point or kind.dtype.is_complex):
            return
    path = tree.items(params)[i][0]
    check_sharded(like, path)
    if not isinstance(x, ShardedTensor):
        raise TypeError(
            f"{path}: the gradient is a {type(x).__name__}, its parameter the sharded tensor {like}"
            "; take gradients by sw.value_and_grad"
        )
    if x._type.shape != like._type.shape:
        raise ValueError(
            f"{path}: a gradient of shape {tuple(x.shape)} for a parameter of shape "
            f"{tuple(like.shape)}"
        )
    raise TypeError(
        f"{path} is {like}: optimizers update floating point numbers; leave its gradient None, or "
        "take it out of the parameters"
    )


def check_sharded(p: Any, path: str) -> None:
    """Raise a TypeError for a parameter that is no sharded tensor."""
    if not isinstance(p, ShardedTensor):
        raise TypeError(
            f"{path}: a parameter is a ShardedTensor, got a {type(p).__name__}; place it first: "
            f"sw.shard({path}, mesh, layout)"
        )


def aligned(x: ShardedTensor, like: ShardedTensor) -> ShardedTensor:
    """`x` in the layout of `like`: owed sums are taken, blocks are moved."""
    return x if x.layout is like.layout else reshard_one(x, like.layout)


def here(scalars: Mapping[str, Any], device: torch.device) -> SimpleNamespace:
    """The scalars as a kernel on this device reads them.

    Numbers where the value lies in host memory; 0-d tensors on an accelerator, which would have to
    be waited for, and under a tracer, which must not bake them in. Schedules are evaluated at the
    scalar "step", which counts from 0.
    """
    found = {k: local(v, device) for k, v in scalars.items() if not callable(v)}
    for name, value in scalars.items():
        if callable(value):
            found[name] = value(found["step"])
    return SimpleNamespace(**{k: _number(v) for k, v in found.items()})


def _number(x: Any) -> Any:
    if (
        isinstance(x, Tensor)
        and x.device.type in ON_HOST
        and not torch._C._len_torch_dispatch_stack()
    ):
        return x.item()
    # Kernels compute with scalars in float64; lists cast them to their own dtype.
    return x.double() if isinstance(x, Tensor) else x


def local(x: Any, device: torch.device) -> Any:
    """A scalar's local value; a meta tensor where this process does not hold it."""
    if not isinstance(x, ShardedTensor):
        return x
    shard: Tensor = x._shards[0]
    if shard.device == device:
        return shard
    return (
        torch.empty((), dtype=x.dtype, device="meta") if device.type == "meta" else shard.to(device)
    )
