"""Gradients: `value_and_grad`, `grad` and `vjp` over trees of ShardedTensors.

The law: a gradient's layout is the dual of its parameter's. It is asserted, not arranged: leaves are the
shards, every op and conversion keeps the law, so what autograd returns for a shard already is a shard of the
gradient. Two engines share one meaning: at top level `torch.autograd.grad` over the flat shards, inside `vmap` and
`jvp`, where autograd raises, `torch.func.vjp` over the same shards.

The loss is a scalar in any state but sharded. Its seed is ones, or, where it is reduced, ones on one device of
the axis. The value comes back replicated: one scalar all_reduce per unreduced axis, in the phase "report".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import optree
import torch
from torch import Tensor

from ...layouts import saving
from ...layouts.convert import convert
from ...layouts.layout import Layout, LayoutLike, resolve, with_state
from ...layouts.reshard import reshard_one
from ...layouts.sharded import ShardedTensor, Type, make_type
from ...layouts.tree import items
from ...meshlib import record
from ...meshlib.errors import LayoutError, word
from ...meshlib.source import user_line

Grads = LayoutLike | Any | Callable[[Any], Any] | None
_DEPTH: ContextVar[int] = ContextVar("depth", default=0)
_functorch = torch._C._are_functorch_transforms_active


@contextmanager
def nested() -> Any:
    """Inside, gradients keep their own graph, so that an outer transform can differentiate them."""
    token = _DEPTH.set(_DEPTH.get() + 1)
    try:
        yield
    finally:
        _DEPTH.reset(token)


def is_nested() -> bool:
    """Whether a gradient transform is already open around this call."""
    return _DEPTH.get() > 0


class Inputs:
    """The differentiated leaves of some arguments: taken apart, made into fresh leaves, put together again."""

    def __init__(self, tree: Any, names: str = "", layouts: Sequence[Layout | None] | None = None) -> None:
        self.values, self.spec = optree.tree_flatten(tree, none_is_leaf=True)
        self.paths = [path for path, _ in items(tree)]
        self.live = [i for i, v in enumerate(self.values) if is_differentiable(v)]
        self.layouts = layouts or [None] * len(self.values)

    @property
    def shards(self) -> list[Tensor]:
        """The flat shards of all differentiated leaves."""
        return [s for i in self.live for s in flat(self.values[i])]

    def fresh(self) -> list[Tensor]:
        """Leaves of a new graph; still part of the old one where that needs a gradient."""
        return [s.view_as(s) if s.requires_grad else s.detach().requires_grad_() for s in self.shards]

    def typed(self, shards: Sequence[Tensor]) -> Any:
        """The arguments again, with these shards for the differentiated leaves."""
        values = list(self.values)
        at = iter(shards)
        for i in self.live:
            old = values[i]
            if isinstance(old, Tensor):
                values[i] = next(at)
                continue
            layout = self.layouts[i] or old.layout
            kind = make_type(old.mesh, layout, old.shape, old.dtype, True)
            new = ShardedTensor(tuple(next(at) for _ in old._shards), kind)
            new._path = self.paths[i]
            values[i] = new
        return self.spec.unflatten(values)

    def gradients(self, shards: Sequence[Tensor], keep: bool) -> list[Any]:
        """One gradient per leaf, None for leaves that have none; layouts are the duals."""
        found: list[Any] = [None] * len(self.values)
        at = iter(shards)
        for i in self.live:
            old = self.values[i]
            if isinstance(old, Tensor):
                found[i] = next(at)
                continue
            layout = (self.layouts[i] or old.layout).dual
            mine = tuple(next(at) for _ in old._shards)
            if mine[0].shape != old.local_shape:
                raise LayoutError(
                    f"gradient of {self.paths[i]} has local shape {tuple(mine[0].shape)}, "
                    f"expected {tuple(old.local_shape)} of {old}"
                )
            kind = make_type(old.mesh, layout, old.shape, mine[0].dtype, keep and mine[0].requires_grad)
            found[i] = ShardedTensor(mine, kind)
            found[i]._path = self.paths[i]
        return found


def is_differentiable(x: Any) -> bool:
    """Floating tensors, sharded or plain."""
    return isinstance(x, ShardedTensor | Tensor) and (x.dtype.is_floating_point or x.dtype.is_complex)


def flat(x: ShardedTensor | Tensor) -> tuple[Tensor, ...]:
    """The shards of a value."""
    return x._shards if isinstance(x, ShardedTensor) else (x,)


def seeds(loss: ShardedTensor | Tensor) -> list[Tensor]:
    """The cotangent 1 of a scalar: ones; where it is reduced, on one device of the axis only."""
    shards = flat(loss)
    if isinstance(loss, Tensor) or not loss.layout.reduced:
        return [torch.ones_like(s) for s in shards]
    places = loss.mesh.positions(tuple(sorted(loss.layout.reduced)))
    return [
        torch.ones_like(s) if place == 0 else torch.zeros_like(s)
        for s, place in zip(shards, places, strict=True)
    ]


def backward(outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], *, keep: bool, retain: bool = False) -> list[Tensor]:  # fmt: skip  # noqa: E501
    """autograd.grad on one thread, so that collectives run in one order everywhere; zeros where unused."""
    live = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not live or not inputs:
        return [torch.zeros_like(i) for i in inputs]
    with torch.autograd.set_multithreading_enabled(False):
        return list(
            torch.autograd.grad(
                [o for o, _ in live],
                inputs,
                [c for _, c in live],
                create_graph=keep,
                retain_graph=keep or retain,
                allow_unused=True,
                materialize_grads=True,
            )
        )


def check_loss(loss: Any, name: str) -> None:
    """Raise unless the loss is one real number that no axis cuts."""
    if not isinstance(loss, ShardedTensor | Tensor):
        raise TypeError(f"{name}: the function must return a scalar tensor, got {type(loss).__name__}")
    if loss.numel() != 1 or loss.ndim != 0:
        raise LayoutError(
            word(
                f"the loss must be a scalar, got shape {tuple(loss.shape)}\nreduce it: loss.mean() or loss.sum()",
                op=name,
                source=user_line(),
                operands=[("loss", str(loss) if isinstance(loss, ShardedTensor) else str(loss.dtype))],
            ),
            op=name,
        )
    if not loss.dtype.is_floating_point:
        raise TypeError(f"{name}: the loss must be a real floating number, got {loss.dtype}")


def reported(loss: Any, keep: bool) -> Any:
    """The loss value, replicated: the scalar all_reduce of what is still owed."""
    value = loss if keep else loss.detach()
    if isinstance(value, Tensor):
        return value
    with record.acting(why="value"), record.phase("report"):
        if value.layout.unreduced:
            value = convert(value, tuple(a for a in value.mesh.axes if a in value.layout.unreduced), "replicated")
        if value.layout.reduced:
            value = convert(value, tuple(sorted(value.layout.reduced)), "replicated")
    return value


def value_and_grad(
    f: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    grads: Grads = None,
    dtype: torch.dtype | None = None,
) -> Callable[..., Any]:
    """A function that gives the value of `f` and its gradients.

    Args:
        f: returns a scalar loss, or (loss, aux) with `has_aux`.
        argnums: which arguments to differentiate; each a tree. Leaves that are not floats give None.
        has_aux: `f` also returns something that is not differentiated.
        grads: the gradients' layouts: None gives the dual of each parameter's; else a layout for all ("..."
            is relative to the parameter's), a tree of them, or a function of the arguments that gives such a tree.
            Where it leaves a sum owed, or scatters it, over an axis on which the parameter is replicated, the
            parameter enters reduced over that axis, so that nothing is all_reduced first.
        dtype: of the gradients; None is the parameters'.

    Returns:
        A function of the same arguments: (value, gradients), or ((value, aux), gradients). The value is replicated.

    Raises:
        LayoutError: a loss that is no scalar.

    >>> import torch, shardwise as sw
    >>> mesh = sw.make_mesh({"data": 2})
    >>> x = sw.shard(torch.arange(4.0).reshape(4, 1), mesh, "b/data d")
    >>> w = sw.shard(torch.ones(1), mesh)
    >>> value, g = sw.value_and_grad(lambda w: (x @ w).sum())(w)
    >>> value.item(), g.full_tensor()
    (6.0, tensor([6.]))
    """

    def differentiated(*args: Any, **kwargs: Any) -> Any:
        picked = args[argnums] if isinstance(argnums, int) else tuple(args[i] for i in argnums)
        asked = asked_layouts(picked, grads)
        entry = [_entry(v, to) for v, to in zip(optree.tree_leaves(picked, none_is_leaf=True), asked, strict=True)]
        inputs = Inputs(picked, layouts=entry)
        keep = is_nested() or any(s.requires_grad for s in inputs.shards)

        def call(*shards: Tensor) -> tuple[Any, Any]:
            with nested(), torch.enable_grad(), saving.scope():
                full = list(args)
                back = inputs.typed(shards)
                for i, value in [(argnums, back)] if isinstance(argnums, int) else zip(argnums, back, strict=True):
                    full[i] = value
                result = f(*full, **kwargs)
            loss, aux = result if has_aux else (result, None)
            check_loss(loss, "value_and_grad")
            return loss, aux

        if _functorch():
            box: list[Any] = []

            def traced(*shards: Tensor) -> tuple[Tensor, ...]:
                loss, aux = call(*shards)
                box[:] = [loss, aux]
                return flat(loss)

            _, pull, box_aux = torch.func.vjp(lambda *s: (traced(*s), None), *inputs.shards, has_aux=True)
            del box_aux
            loss, aux = box
            raw = list(pull(tuple(seeds(_outside(loss)))))
            loss = _outside(loss)
            aux = optree.tree_map(lambda v: _outside(v) if isinstance(v, ShardedTensor | Tensor) else v, aux, none_is_leaf=True)  # fmt: skip  # noqa: E501
        else:
            leaves = inputs.fresh()
            loss, aux = call(*leaves)
            with nested() if keep else _unnested():
                raw = backward(flat(loss), leaves, seeds(loss), keep=keep)
            if not keep:
                aux = optree.tree_map(lambda v: v.detach() if isinstance(v, ShardedTensor | Tensor) else v, aux, none_is_leaf=True)  # fmt: skip  # noqa: E501
        value = reported(loss, keep)
        found = [
            _asked(g, to, dtype) for g, to in zip(inputs.gradients(raw, keep), asked, strict=True)
        ]
        gradient = inputs.spec.unflatten(found)
        return ((value, aux), gradient) if has_aux else (value, gradient)

    return differentiated


@contextmanager
def _unnested() -> Any:
    yield


def _outside(x: Any) -> Any:
    """A value from inside a closed functorch level, one level up."""
    unwrap = torch._C._functorch.get_unwrapped
    if isinstance(x, ShardedTensor):
        return ShardedTensor(
            tuple(unwrap(s) if torch._C._functorch.is_gradtrackingtensor(s) else s for s in x._shards), x._type
        )
    return unwrap(x) if torch._C._functorch.is_gradtrackingtensor(x) else x


def _asked(g: Any, to: Layout | None, dtype: torch.dtype | None) -> Any:
    """A gradient in the dtype and layout that were asked for."""
    if g is None:
        return None
    if dtype is not None and g.dtype != dtype:
        g = _cast(g, dtype)
    if to is not None and isinstance(g, ShardedTensor):
        with record.acting(why="gradient", path=getattr(g, "_path", None)):
            g = reshard_one(g, to)
    return g


def _cast(g: Any, dtype: torch.dtype) -> Any:
    if isinstance(g, Tensor):
        return g.to(dtype)
    return ShardedTensor(
        tuple(s.to(dtype) for s in g._shards),
        make_type(g.mesh, g.layout, g.shape, dtype, g._type.grad),
    )


def asked_layouts(params: Any, grads: Grads) -> list[Layout | None]:
    """The layout asked for each leaf's gradient, None where it is the dual."""
    values = optree.tree_leaves(params, none_is_leaf=True)
    if callable(grads) and not isinstance(grads, Layout):
        grads = grads(params)
    if grads is None:
        return [None] * len(values)
    if isinstance(grads, str | Layout):
        wanted: list[Any] = [grads] * len(values)
    else:
        wanted = optree.tree_leaves(grads, none_is_leaf=True)
        if len(wanted) != len(values):
            raise ValueError(f"grads= has {len(wanted)} leaves, the arguments have {len(values)}")
    return [
        resolve(to, v.ndim, v.layout.dual, v.shape, v.mesh)
        if to is not None and isinstance(v, ShardedTensor) and is_differentiable(v)
        else None
        for v, to in zip(values, wanted, strict=True)
    ]


def _entry(value: Any, to: Layout | None) -> Layout | None:
    """The layout in which a parameter enters: reduced where its gradient's sum is left or scattered."""
    if to is None or not isinstance(value, ShardedTensor):
        return None
    layout = value.layout
    for axis in value.mesh.axes:
        if layout.state(axis) == "replicated" and (
            to.state(axis) == "unreduced" or isinstance(to.state(axis), int)
        ):
            layout = with_state(layout, axis, "reduced")
    return layout


def grad(
    f: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    grads: Grads = None,
    dtype: torch.dtype | None = None,
) -> Callable[..., Any]:
    """As `value_and_grad`, without the value: gradients, or (gradients, aux).

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.arange(4.0), sw.make_mesh({"data": 2}), "n/data")
    >>> sw.grad(lambda x: (x * x).sum())(x).full_tensor()
    tensor([0., 2., 4., 6.])
    """
    both = value_and_grad(f, argnums, has_aux=has_aux, grads=grads, dtype=dtype)

    def differentiated(*args: Any, **kwargs: Any) -> Any:
        value, gradient = both(*args, **kwargs)
        return (gradient, value[1]) if has_aux else gradient

    return differentiated


def vjp(f: Callable[..., Any], *primals: Any, has_aux: bool = False) -> Any:
    """The value of `f` and its pullback.

    Args:
        f: any outputs, a tree.
        *primals: its arguments, trees; all are differentiated.
        has_aux: `f` returns (outputs, aux).

    Returns:
        (outputs, pullback) or (outputs, pullback, aux). The pullback takes cotangents with the duals of the
        outputs' layouts and gives a tuple of gradients with the duals of the primals'; it may be called again.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.arange(4.0), sw.make_mesh({"data": 2}), "n/data")
    >>> y, pull = sw.vjp(lambda x: x * x, x)
    >>> pull(sw.shard(torch.ones(4), x.mesh, "n/data"))[0].full_tensor()
    tensor([0., 2., 4., 6.])
    """
    inputs = Inputs(primals)
    keep = is_nested() or any(s.requires_grad for s in inputs.shards)
    if _functorch():
        kept: list[Any] = []

        def traced(*shards: Tensor) -> tuple[Tensor, ...]:
            with nested(), torch.enable_grad():
                kept[:] = [f(*inputs.typed(shards))]
            result = kept[0][0] if has_aux else kept[0]
            return tuple(s for v in optree.tree_leaves(result) if is_differentiable(v) for s in flat(v))

        _, pull_flat = torch.func.vjp(traced, *inputs.shards)
        outer = optree.tree_map(_outside, kept[0])
        result, aux = outer if has_aux else (outer, None)
        pull_raw: Callable[[list[Tensor]], Sequence[Tensor]] = lambda cts: pull_flat(tuple(cts))  # noqa: E731
    else:
        leaves = inputs.fresh()
        with nested(), torch.enable_grad():
            made = f(*inputs.typed(leaves))
        result, aux = made if has_aux else (made, None)
        outputs = [s for v in optree.tree_leaves(result) if is_differentiable(v) for s in flat(v)]

        def pull_raw(cotangents: list[Tensor]) -> Sequence[Tensor]:
            return backward(outputs, leaves, cotangents, keep=keep, retain=True)

    def pullback(cotangents: Any) -> Any:
        expected = [v for v in optree.tree_leaves(result) if is_differentiable(v)]
        given = [c for c in optree.tree_leaves(cotangents)]
        if len(given) != len(expected):
            raise ValueError(f"vjp: {len(given)} cotangents for {len(expected)} outputs")
        for v, c in zip(expected, given, strict=True):
            if isinstance(v, ShardedTensor) and (c.layout is not v.layout.dual or c.shape != v.shape):
                raise LayoutError(
                    f"vjp: the cotangent of {v} must be {make_type(v.mesh, v.layout.dual, v.shape, v.dtype)}, got {c}"
                )
        raw = pull_raw([s for c in given for s in flat(c)])
        return inputs.spec.unflatten(inputs.gradients(raw, keep))

    shown = result if keep else optree.tree_map(lambda v: v.detach() if isinstance(v, ShardedTensor | Tensor) else v, result)  # fmt: skip  # noqa: E501
    return (shown, pullback, aux) if has_aux else (shown, pullback)


def typed_like(shards: Sequence[Tensor], kind: Type) -> ShardedTensor:
    """Shards read as a type; their dtype wins."""
    return ShardedTensor(tuple(shards), make_type(kind.mesh, kind.layout, kind.shape, shards[0].dtype, kind.grad))
