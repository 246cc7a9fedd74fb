"""`reshard`: the cheapest sequence of conversions from one layout to another.

A shortest-path search over layouts. Edges are the rows of the conversion table, each over one axis
or a joint set; a path's length is (elements moved per device, number of steps). No layout on the
way may hold more per device than the larger of the two ends, unless no such path exists. Routes are
cached on the type.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

from ..meshlib import record
from ..meshlib.errors import LayoutError, MeshError, word
from ..meshlib.mesh import Mesh
from ..meshlib.source import user_line
from ..meshlib.transport import Axes
from .convert import LETTER, TABLE, Save, convert
from .layout import Layout, LayoutLike, State, make, resolve, with_state
from .memory import settled, to_memory, with_memory
from .sharded import DTYPES, HELPERS, ShardedTensor, Type, make_type

Move = tuple[Axes, State]
Route = tuple[Move, ...]


def moved(kind: Type, move: Move) -> float:
    """Elements that one device moves in a conversion (ring convention); 0 where nothing moves."""
    axes, to = move
    verb = TABLE.get((LETTER.get(kind.layout.state(axes[0]), "S"), LETTER.get(to, "S")))
    if verb in ("all_gather", "all_to_all", "reduce_scatter", "all_reduce"):
        return record.volume(verb, kind.local_shape.numel(), kind.mesh.group_size(axes))
    return 0


def find_route(kind: Type, target: Layout) -> Route | None:
    """The cheapest route, or None where no row of the table leads there; cached."""
    if kind.layout is target:
        return ()
    key = ("route", target)
    if key not in kind.moves:
        kind.moves[key] = _single(kind, target) or _search(kind, target)
    return kind.moves[key]


def _single(kind: Type, target: Layout) -> Route | None:
    """The route of one conversion over one axis, which nothing can undercut."""
    now = kind.layout
    changed = [a for a in {**now.axes, **target.axes} if now.state(a) != target.state(a)]
    if len(changed) != 1:
        return None
    axis, to = changed[0], target.state(changed[0])
    before = now.state(axis)
    if isinstance(before, int) and now.dims[before][-1] != axis:
        return None
    if with_state(now, axis, to) is not target:
        return None
    row = (LETTER.get(before, "S"), LETTER.get(to, "S"))
    return (((axis,), to),) if row in TABLE else None


def _search(kind: Type, target: Layout) -> Route | None:
    small = max(kind.local_shape.numel(), math.prod(target.local_shape(kind.shape, kind.mesh)))
    return _shortest(kind, target, small) or _shortest(kind, target, None)


def _shortest(kind: Type, target: Layout, limit: int | None) -> Route | None:
    """Dijkstra over layouts; ties by number of steps, then by order of discovery."""
    active = _active(kind.layout, target, kind.mesh)
    shape, sizes = kind.shape, kind.mesh.axes
    count = itertools.count()
    queue: list[tuple[float, int, int, Layout, Route]] = [(0, 0, next(count), kind.layout, ())]
    best: dict[Layout, tuple[float, int]] = {}
    while queue:
        cost, steps, _, layout, route = heapq.heappop(queue)
        if layout is target:
            return route
        if layout in best and best[layout] <= (cost, steps):
            continue
        best[layout] = (cost, steps)
        here = _numel(layout, shape, sizes)
        for axes, to, row in _moves(layout, target, active):
            after = layout
            for axis in axes if isinstance(to, int) else reversed(axes):
                after = with_state(after, axis, to)
            if isinstance(to, int) and shape[to] % math.prod(sizes[a] for a in after.dims[to]):
                continue
            if limit is not None and _numel(after, shape, sizes) > limit:
                continue
            verb = TABLE[row]
            n = math.prod(sizes[a] for a in axes)
            step = record.volume(verb, here, n) if verb in record.VOLUME else 0
            reached = (cost + step, steps + 1)
            if after not in best or reached < best[after]:
                move: Move = (axes, to)
                heapq.heappush(queue, (*reached, next(count), after, (*route, move)))
    return None


def _numel(layout: Layout, shape: Sequence[int], sizes: Any) -> int:
    return math.prod(shape) // math.prod(sizes[a] for axes in layout.dims for a in axes)


def _active(now: Layout, target: Layout, mesh: Mesh) -> frozenset[str]:
    """Axes that must change: another state, or behind one that leaves the same dim."""
    active = {a for a in mesh.axes if now.state(a) != target.state(a)}
    for have, want in zip(now.dims, target.dims, strict=True):
        same = 0
        while same < min(len(have), len(want)) and have[same] == want[same]:
            same += 1
        active.update(have[same:], want[same:])
    return frozenset(active)


def _moves(
    layout: Layout, target: Layout, active: frozenset[str]
) -> Iterator[tuple[Axes, State, tuple[str, str]]]:
    """Conversions worth trying here: over one active axis, or over a joint set with one end."""
    for dim, here in enumerate(layout.dims):
        for take in range(1, len(here) + 1):
            axes = here[-take:]
            if axes[0] not in active:
                break
            wanted: set[State] = {target.state(a) for a in axes}
            for to in wanted - {dim}:
                if not isinstance(to, int):
                    yield axes, to, ("S", LETTER[to])
            if "replicated" not in wanted and "reduced" not in wanted:
                yield axes, "replicated", ("S", "I")
            for other in range(layout.ndim):
                if other != dim:
                    yield axes, other, ("S", "S")
    groups: dict[tuple[State, State], list[str]] = {}
    for axis in sorted(active):
        before, to = layout.state(axis), target.state(axis)
        if not isinstance(before, int) and before != to:
            groups.setdefault((before, to), []).append(axis)
    for (before, to), members in groups.items():
        row = (LETTER[before], LETTER.get(to, "S"))
        if row not in TABLE:
            continue
        if isinstance(to, int):
            members = [a for a in target.dims[to] if a in members]
            for start, stop in itertools.combinations(range(len(members) + 1), 2):
                yield tuple(members[start:stop]), to, row
        else:
            yield tuple(members), to, row
            if len(members) > 1:
                for axis in members:
                    yield (axis,), to, row


def follow(
    x: ShardedTensor,
    route: Route,
    save: Save = "gathered",
    reduce_dtype: torch.dtype | None = None,
) -> ShardedTensor:
    """Do the conversions of a route."""
    for axes, to in route:
        x = convert(x, axes, to, save=save, reduce_dtype=reduce_dtype)
    return x


def reshard_one(
    x: ShardedTensor,
    layout: LayoutLike,
    *,
    mesh: Mesh | None = None,
    save: Save = "gathered",
    reduce_dtype: torch.dtype | None = None,
) -> ShardedTensor:
    """`reshard` of one tensor."""
    if not isinstance(x, ShardedTensor):
        raise TypeError(f"reshard takes ShardedTensors, got {type(x).__name__}; use sw.shard")
    if mesh is not None and mesh is not x.mesh:
        return _remesh(x, resolve(layout, x.ndim, None, x.shape, mesh), mesh)
    target = resolve(layout, x.ndim, x.layout, x.shape, x.mesh)
    if target is x.layout:
        return x
    target.check(x.shape, x.mesh, "reshard")
    check_dtype(x.dtype, target, "reshard")
    if with_memory(x.layout, target.memory) is target:  # another memory, and nothing else
        return to_memory(x, target.memory)
    device = with_memory(target, "device")
    x = to_memory(x, "device")
    route = find_route(x._type, device)
    if route is None:
        raise LayoutError(
            word(
                f"no conversion leads from '{x.layout}' to '{target}'",
                op="reshard",
                source=user_line(),
                operands=[("x", str(x))],
                mesh=x.mesh,
            )
        )
    if route:
        if record.LOGS:
            with record.acting("reshard", "reshard"):
                x = follow(x, route, save, reduce_dtype)
        else:
            x = follow(x, route, save, reduce_dtype)
    return to_memory(x, target.memory)


def check_dtype(dtype: torch.dtype, layout: Layout, what: str) -> None:
    """Raise for integers of which a sum is owed: no op would ever take it."""
    if layout.unreduced and not (dtype.is_floating_point or dtype.is_complex):
        raise LayoutError(
            f"{what}: {DTYPES.get(dtype, dtype)} tensors are replicated or sharded only, "
            f"but layout '{layout}' is unreduced over {', '.join(sorted(layout.unreduced))}"
        )


def reshard(
    x: Any,
    layout: Any,
    *,
    mesh: Mesh | None = None,
    save: Save = "gathered",
    reduce_dtype: torch.dtype | None = None,
) -> Any:
    """The same global values in another layout, by the cheapest conversions.

    Args:
        x: a ShardedTensor or a tree of them.
        layout: a layout for all leaves, or a tree of layouts. "..." keeps the dims that it stands
            for and the states of axes that nobody names.
        mesh: another mesh to move to; None stays.
        save: what a gather keeps for backward: "gathered" the whole, "shard" the block (it gathers
            again).
        reduce_dtype: in which sums are taken on the way, forward and backward.

    Cost: the fewest bytes, then the fewest steps, among all sequences of conversions that hold no
    more per device than the larger end. Gradient: the dual route.

    Raises:
        LayoutError: an indivisible dim, a wrong number of dims, a bad string.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"data": 2, "tensor": 2})
    >>> x = sw.shard(torch.zeros(4, 8), mesh, "b/data d/tensor")
    >>> sw.reshard(x, "... d")
    f32[4/data 8] local[2 8] on mesh(data=2, tensor=2)
    >>> sw.reshard(x, "b/tensor d")
    f32[4/tensor 8] local[2 8] on mesh(data=2, tensor=2)
    """
    options: dict[str, Any] = {"mesh": mesh, "save": save, "reduce_dtype": reduce_dtype}
    if isinstance(x, ShardedTensor):
        return reshard_one(x, layout, **options)
    if isinstance(layout, str | Layout):
        return optree.tree_map(lambda leaf: _leaf(leaf, layout, options), x, none_is_leaf=True)
    return optree.tree_map(lambda leaf, to: _leaf(leaf, to, options), x, layout, none_is_leaf=True)


def _leaf(leaf: Any, layout: Any, options: dict[str, Any]) -> Any:
    return leaf if leaf is None or layout is None else reshard_one(leaf, layout, **options)


class _Remesh(torch.autograd.Function):
    """The global value on another mesh; the derivative is the way back between the dual layouts."""

    @staticmethod
    def forward(before: Type, after: Type, *shards: Tensor) -> tuple[Tensor, ...]:
        blocks = cut(whole(ShardedTensor(shards, before)), after.mesh, after.layout)
        return tuple(settled(blocks, after.mesh, after.layout))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.before, ctx.after = inputs[0], inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        source = ctx.after.with_layout(ctx.after.layout.dual)
        return (
            None,
            None,
            *_Remesh.apply(source, ctx.before.with_layout(ctx.before.layout.dual), *grads),
        )


def _remesh(x: ShardedTensor, layout: Layout, mesh: Mesh) -> ShardedTensor:
    if mesh.transport != x.mesh.transport:
        raise MeshError(f"reshard: {x.mesh} is {x.mesh.transport}, {mesh} is {mesh.transport}")
    if x.mesh.is_outside or mesh.is_outside or set(mesh.ranks) - set(x.mesh.ranks):
        raise MeshError(
            f"reshard: {mesh} has devices that {x.mesh} has not; "
            "move through a mesh that holds both"
        )
    after = make_type(mesh, layout, x.shape, x.dtype, x._type.grad and torch.is_grad_enabled())
    return ShardedTensor(tuple(_Remesh.apply(x._type, after, *x._shards)), after)


def whole(x: ShardedTensor) -> Tensor:
    """The global value, gathered without gradient; replicas held by one process must agree."""
    layout = x.layout
    if layout.varying:
        raise LayoutError(f"{x} differs over {sorted(layout.varying)}: it has no global value")
    target = make(((),) * x.ndim)
    kind = x._type.with_layout(
        make(layout.dims, layout.unreduced, layout.reduced, memory="device"), False
    )
    shards: Sequence[Tensor] = to_memory(x.detach(), "device")._shards
    route = find_route(kind, target)
    assert route is not None
    y = follow(ShardedTensor(tuple(shards), kind), route)
    first = y._shards[0]
    for coord, other in zip(y.mesh.held[1:], y._shards[1:], strict=True):
        if other.data_ptr() != first.data_ptr() and not _agree(first, other):
            raise LayoutError(
                f"{x} is typed replicated, but the device at {dict(coord)} holds another value "
                f"(largest difference {float((first - other).abs().max()):.3g})"
                if first.dtype != torch.bool
                else f"{x} is typed replicated, but the device at {dict(coord)} holds another value"
            )
    return first


def _agree(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding that another order of a sum makes."""
    if a.is_meta:
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    if a.dtype.itemsize == 1:  # float8 has no arithmetic
        return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    eps = torch.finfo(a.dtype).eps
    scale = float(a.abs().nan_to_num(0, 0, 0).max()) if a.numel() else 1.0
    return torch.allclose(a, b, rtol=64 * eps, atol=64 * eps * max(scale, 1e-30), equal_nan=True)


def cut(value: Tensor, mesh: Mesh, layout: Layout) -> list[Tensor]:
    """This process's blocks of a global value; zeros off the first device of unreduced axes."""
    shape = tuple(value.shape)
    owed = tuple(sorted(layout.unreduced))
    places = mesh.positions(owed)
    shards = []
    for coord, place in zip(mesh.held, places, strict=True):
        block = value[layout.index(shape, mesh, coord)] if layout.ndim else value.view_as(value)
        shards.append(block if place == 0 else torch.zeros_like(block))
    return shards


class _Whole(torch.autograd.Function):
    """The global value as one plain tensor; the derivative cuts it again, in the dual layout."""

    @staticmethod
    def forward(ctx: Any, kind: Type, *shards: Tensor) -> Tensor:
        ctx.kind = kind
        value = whole(ShardedTensor(shards, kind))
        return value.clone() if any(value.data_ptr() == s.data_ptr() for s in shards) else value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        layout = ctx.kind.layout.dual
        return None, *settled(cut(grad, ctx.kind.mesh, layout), ctx.kind.mesh, layout)


def full_tensor(x: ShardedTensor) -> Tensor:
    """See `ShardedTensor.full_tensor`."""
    if x.mesh.is_outside:
        raise MeshError(f"full_tensor: this process holds no device of {x.mesh}")
    with record.acting("full_tensor", "value"):
        return _Whole.apply(x._type, *x._shards) if x._type.grad else whole(x)


HELPERS["full_tensor"] = full_tensor
