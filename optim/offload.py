"""Offload: the state of an optimizer, and its arithmetic, in host memory or on disk.

    device   gradients --out-->                                   --back--> parameters
    host                        the update, a group at a time
    disk                        state read a group ahead          state written back

A step cuts the parameters into groups of some megabytes. Of each group the gradients and the
parameters go to the host, the update runs there, and the new parameters come back; with disk, a
thread reads the state of the next group meanwhile, so that the states of two groups are in host
memory. Results are those of the resident optimizer, bit for bit on one kind of processor. The state
is that of the transform inside, with its names: only the memory in its layouts differs.

Source: Ren et al. 2021 (arXiv 2101.06840), section 4; Rajbhandari et al. 2021 (arXiv 2104.07857),
section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import optree
import torch

from ..layouts import memory as memories
from ..layouts import tree
from ..layouts.reshard import reshard_one
from ..layouts.sharded import ShardedTensor
from ..meshlib import record
from ..ops.plan import abstract
from .base import Transform, settled

GROUP = 64 << 20


def offload(
    t: Transform, memory: Literal["host", "disk"] = "host", *, group: int = GROUP
) -> Transform:
    """A transform whose state lies in host memory or on disk, and which computes on the host.

    Args:
        t: the transform. Around `zero`, offload works inside it: gradients are scattered and
            parameters gathered on the devices, and only each device's part goes to its host.
        memory: where the state lies: "host", pinned beside a GPU, or "disk", in private files.
        group: bytes of parameters per device that are updated at a time.

    State: that of `t`, `@host` or `@disk`; scalars `@host`.

    Cost: per step, gradients to the host, parameters there (not with `master`, whose copies are
    part of the state) and back; with disk, the state is read and written once. Transforms whose
    update of one tensor hangs on others or on sums are given all parameters at once: put clipping
    outside, `chain(clip_by_global_norm(1.0), offload(adamw(lr)))`.

    Raises:
        ValueError: another memory.
        layouts.spill.SpillError: the disk is full, or a file is damaged.

    >>> import shardwise as sw
    >>> p = {"w": sw.full((4,), 1.0, sw.make_mesh({"data": 2}), "n/data")}
    >>> opt = offload(sw.optim.adam(0.1))
    >>> state = opt.init(p)
    >>> with sw.record() as plan:
    ...     new, state = opt.step(p, state, p)
    >>> print(state["mu"]["w"], new["w"])
    f32[4/data]@host f32[4/data]
    >>> [(c.kind, c.bytes) for c in plan.copies]
    [('to_host', 8), ('to_host', 8), ('to_device', 8)]
    """
    if memory not in ("host", "disk"):
        raise ValueError(f"offload: memory is 'host' or 'disk', got {memory!r}")
    known: dict[Any, list[list[int]]] = {}

    def groups(params: Any, grads: Any) -> list[list[int]]:
        leaves, spec = optree.tree_flatten(params, none_is_leaf=True)
        key = (
            *(None if x is None else x._type for x in leaves),
            *(g is None for g in spec.flatten_up_to(grads)),
        )
        if key not in known:
            known[key] = _groups(t, params, grads, group)
        return known[key]

    if t.inside is not None:
        return t.inside(lambda inner: offload(inner, memory, group=group))

    def init(params: Any) -> Any:
        made: list[Any] = []
        with torch.no_grad():
            for members in groups(params, params):
                there = _only(params, members, lambda _, p: memories.to_memory(p, "host"))
                state = t.init(there)
                made.append(_kept(state, _columns(state, there), memory))
        return _merged(made)

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return _Step(t, grads, state, params, groups(params, grads), False).run(
            t.update, keep=False
        )

    def fused(grads: Any, state: Any, params: Any, *, donate: bool = False) -> tuple[Any, Any]:
        step = _Step(t, grads, state, params, groups(params, grads), donate)
        return step.run(lambda g, s, p: t.step(g, s, p, donate=step.is_owned), keep=True)

    return Transform(t.name, init, update, t.needs, t.grads, fused)


class _Step:
    """One step: groups of leaves go to the host, are updated, and come back.

    Attributes:
        is_owned: whether the step inside may write over what it is given.
    """

    def __init__(
        self, t: Transform, grads: Any, state: Any, params: Any, groups: Any, donate: bool
    ) -> None:
        self.t, self.params, self.state, self.donate = t, params, state, donate
        self.likes, self.spec = optree.tree_flatten(params, none_is_leaf=True)
        self.paths = [path for path, _ in tree.items(params)]
        self.grads: list[Any] = self.spec.flatten_up_to(grads)
        self.olds, self.shape = optree.tree_flatten(state, none_is_leaf=True)
        self.columns = _columns(state, params)
        self.groups: list[list[int]] = groups
        self.on_disk = any(_memory(x) == "disk" for x in self.olds)
        # What was copied to the host is ours; what was there already is the caller's.
        read = [x for x, k in zip(self.olds, self.columns, strict=True) if k is not None]
        ours = all(_memory(x) == "disk" for x in read if x is not None)
        ours = ours and all(_memory(p) == "device" for p in self.likes if p is not None)
        self.is_owned = donate or ours

    def run(self, step: Callable[[Any, Any, Any], tuple[Any, Any]], *, keep: bool) -> Any:
        """New parameters (`keep`) or updates, and the state after."""
        out: list[Any] = list(self.likes) if keep else [None] * len(self.likes)
        after: list[Any] = list(self.olds)
        with torch.no_grad():
            for members, state in self._states():
                done, new = step(self._gradients(members), state, self._parameters(members))
                del state
                values: list[Any] = self.spec.flatten_up_to(done)
                for i in members:
                    if values[i] is not None and self.grads[i] is not None:
                        out[i] = self._back(values[i], i, keep and self.donate)
                self._store(after, new, members)
                del done, new, values
        return self.spec.unflatten(out), self.shape.unflatten(after)

    def _gradients(self, members: Sequence[int]) -> Any:
        """The gradients of a group on the host, scattered and reduced before they go."""

        def one(i: int, p: Any) -> Any:
            g = self.grads[i]
            if g is None:
                return None
            with record.acting("step", "gradient", self.paths[i]):
                if self.t.grads is settled:
                    g = reshard_one(g, memories.with_memory(p.layout, g.layout.memory))
                return memories.to_memory(g, "host")

        return _only(self.params, members, one)

    def _parameters(self, members: Sequence[int]) -> Any:
        """The parameters of a group on the host; only their types if the state holds the values."""

        def one(i: int, p: Any) -> Any:
            if self.t.holds_params and _memory(p) == "device":
                kind = p._type.with_layout(memories.with_memory(p.layout, "host"), False)
                where = "meta" if p._shards[0].is_meta else "cpu"
                one = torch.zeros((), dtype=p.dtype, device=where).expand(p.local_shape)
                return ShardedTensor((memories.away(one),) * len(p._shards), kind)
            with record.acting("step", "reshard", self.paths[i]):
                return memories.to_memory(p, "host")

        return _only(self.params, members, one)

    def _states(self) -> Iterator[tuple[Sequence[int], Any]]:
        """Each group with its state on the host; a thread reads one group ahead from disk."""
        ahead = self.on_disk and len(self.groups) > 1 and not _is_planned(self.likes)
        with ThreadPoolExecutor(1, "spill") as pool:
            waiting = pool.submit(self._load, self.groups[0]) if ahead else None
            for number, members in enumerate(self.groups):
                loaded = waiting.result() if waiting is not None else self._load(members)
                waiting = None
                if ahead and number + 1 < len(self.groups):
                    waiting = pool.submit(self._load, self.groups[number + 1])
                self._record("read", members)
                yield members, self.shape.unflatten(loaded)
                del loaded

    def _load(self, members: Sequence[int]) -> list[Any]:
        """The state's leaves of a group, on the host; None for those of other groups."""
        found: list[Any] = [None] * len(self.olds)
        for k, (x, column) in enumerate(zip(self.olds, self.columns, strict=True)):
            if column is not None and column not in members:
                continue
            found[k] = x
            if isinstance(x, ShardedTensor):  # its own object: the step inside may give it up
                found[k] = memories.fetched(x) if _memory(x) == "disk" else _again(x)
        return found

    def _store(self, after: list[Any], new: Any, members: Sequence[int]) -> None:
        """The new state of a group, where the old one lies."""
        self._record("write", members)
        for k, x in enumerate(self.shape.flatten_up_to(new)):
            old = self.olds[k]
            if self.columns[k] is not None and self.columns[k] not in members:
                continue
            if isinstance(x, ShardedTensor) and isinstance(old, ShardedTensor):
                over = old if self.donate else None
                if _memory(old) == "disk":
                    column = self.columns[k]
                    x = memories.stored(x, over, self.paths[column] if column is not None else "")
                else:
                    x = memories.to_memory(x, _memory(old))
            after[k] = x

    def _record(self, kind: Literal["read", "write"], members: Sequence[int]) -> None:
        """Write what the disk moves for a group to the open records."""
        if not record.LOGS:
            return
        for x, column in zip(self.olds, self.columns, strict=True):
            if column is not None and column in members and _memory(x) == "disk":
                with record.acting("step", "reshard", self.paths[column]):
                    size = x.local_shape.numel() * x.element_size()
                    record.copied(kind, size, x.mesh, record.context())

    def _back(self, x: ShardedTensor, i: int, over: bool) -> ShardedTensor:
        """A result in its parameter's memory, in the parameter's own buffers if it was given up."""
        like = self.likes[i]
        with record.acting("step", "reshard", self.paths[i]):
            if over and x.dtype == like.dtype and _memory(like) == "device" and _owns(like):
                return memories.copied_into(x, like)
            return memories.to_memory(x, _memory(like))


def _memory(x: Any) -> str:
    return x.layout.memory if isinstance(x, ShardedTensor) else "host"


def _again(x: ShardedTensor) -> ShardedTensor:
    return ShardedTensor(x._shards, x._type)


def _owns(x: ShardedTensor) -> bool:
    """Whether nothing but this tensor lies in its shards' memory, as far as sizes tell."""
    return not any(
        s.is_meta or s.untyped_storage().nbytes() != s.numel() * s.element_size() for s in x._shards
    )


def _is_planned(leaves: Sequence[Any]) -> bool:
    return any(isinstance(x, ShardedTensor) and x._shards[0].is_meta for x in leaves)


def _only(params: Any, members: Sequence[int], f: Callable[[int, Any], Any]) -> Any:
    """`f(number, leaf)` of some leaves; None elsewhere."""
    leaves, spec = optree.tree_flatten(params, none_is_leaf=True)
    taken = set(members)
    return spec.unflatten([f(i, x) if i in taken else None for i, x in enumerate(leaves)])


def _groups(t: Transform, params: Any, grads: Any, size: int) -> list[list[int]]:
    """Numbers of the leaves that are updated together; those without a gradient are in none.

    A leaf is cut off from the others only where its update hangs on itself alone, and where the
    transform takes a part of the parameters.
    """
    likes, spec = optree.tree_flatten(params, none_is_leaf=True)
    given = spec.flatten_up_to(grads)
    live = [i for i, g in enumerate(given) if g is not None and likes[i] is not None]
    groups: list[list[int]] = [[]]
    filled = 0
    for i in live:
        mine = likes[i].local_shape.numel() * likes[i].element_size()
        if groups[-1] and filled + mine > size:
            groups.append([])
            filled = 0
        groups[-1].append(i)
        filled += mine
    every = [i for i, p in enumerate(likes) if p is not None]
    for some in (groups, [live]) if t.needs == "elementwise" else ([live],):
        if some == [every] or all(_stands_alone(t, params, g) for g in some):
            return some
    return [every]


def _stands_alone(t: Transform, params: Any, members: Sequence[int]) -> bool:
    """Whether the transform takes a part of the parameters; `multi` wants some for each glob."""
    try:
        t.init(abstract(_only(params, members, lambda _, p: p)))
    except ValueError:
        return False
    return True


def _columns(state: Any, params: Any) -> list[int | None]:
    """Per leaf of the state the number of the parameter that it belongs to; None for scalars."""
    spec = optree.tree_structure(params, none_is_leaf=True)
    found: list[int | None] = []

    def visit(node: Any) -> None:
        try:
            parts = spec.flatten_up_to(node)
        except ValueError:
            parts = None
        if parts is not None:
            for number, part in enumerate(parts):
                found.extend([number] * len(optree.tree_leaves(part, none_is_leaf=True)))
            return
        children = (
            optree.tree_flatten_one_level(node, none_is_leaf=True)[0] if _is_node(node) else None
        )
        if children is None:
            found.append(None)
            return
        for child in children:
            visit(child)

    visit(state)
    return found


def _is_node(x: Any) -> bool:
    return not optree.tree_is_leaf(x, none_is_leaf=True)


def _kept(state: Any, columns: Sequence[int | None], memory: str) -> Any:
    """A new state in its memory; what belongs to no parameter, and single numbers, on the host."""
    leaves, spec = optree.tree_flatten(state, none_is_leaf=True)
    out = []
    for x, column in zip(leaves, columns, strict=True):
        if isinstance(x, ShardedTensor):
            to = "host" if column is None or not x.ndim else memory
            x = memories.to_memory(x, to)
        out.append(x)
    return spec.unflatten(out)


def _merged(states: Sequence[Any]) -> Any:
    """States of groups as one: each leaf from the group that has it."""
    first, *others = states
    leaves, spec = optree.tree_flatten(first, none_is_leaf=True)
    for other in others:
        theirs = spec.flatten_up_to(other)
        leaves = [b if a is None else a for a, b in zip(leaves, theirs, strict=True)]
    return spec.unflatten(leaves)
