"""Gradients: `value_and_grad`, `grad` and `vjp` over trees of ShardedTensors.

The law: a gradient's layout is the dual of its parameter's. It is asserted, not arranged: leaves
are the shards, every op and conversion keeps the law, so what autograd returns for a shard already
is a shard of the gradient. Two engines share one meaning: at top level `torch.autograd.grad` over
the flat shards, inside `vmap` and `jvp`, where autograd raises, `torch.func.vjp` over the same
shards.

The loss is a scalar in any state but sharded. Its seed is ones, or, where it is reduced, ones on
one device of the axis. The value comes back replicated: one scalar all_reduce per unreduced axis,
in the phase "report".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import optree
import torch
from torch import Tensor

from ...layouts import saving
from ...layouts.convert import convert
from ...layouts.layout import Layout, LayoutLike, resolve, with_state
from ...layouts.reshard import reshard_one
from ...layouts.sharded import ShardedTensor, make_type
from ...meshlib import record
from ...meshlib.errors import LayoutError, word
from ...meshlib.source import user_line
from ..plan import local_bytes
from .leaves import (
    Inputs,
    carrying_path,
    detached,
    entering,
    flat,
    floats,
    is_differentiable,
    nested,
    outside,
    under_functorch,
    without_hooks,
)

Grads = LayoutLike | Any | Callable[[Any], Any] | None


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
    """autograd.grad on one thread: collectives run in one order everywhere; zeros where unused."""
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
        raise TypeError(
            f"{name}: the function must return a scalar tensor, got {type(loss).__name__}"
        )
    if loss.numel() != 1 or loss.ndim != 0:
        raise LayoutError(
            word(
                f"the loss must be a scalar, got shape {tuple(loss.shape)}"
                "\nreduce it: loss.mean() or loss.sum()",
                op=name,
                source=user_line(),
                operands=[
                    ("loss", str(loss) if isinstance(loss, ShardedTensor) else str(loss.dtype))
                ],
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
    with record.acting("value_and_grad", "value"), record.phase("report"):
        if value.layout.unreduced:
            value = convert(
                value,
                tuple(a for a in value.mesh.axes if a in value.layout.unreduced),
                "replicated",
            )
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
        argnums: which arguments to differentiate; each a tree. Leaves that are not floats give
            None.
        has_aux: `f` also returns something that is not differentiated.
        grads: the gradients' layouts: None gives the dual of each parameter's; else a layout for
            all ("..." is relative to the parameter's), a tree of them, or a function of the
            arguments that gives such a tree. Where it leaves a sum owed, or scatters it, over an
            axis on which the parameter is replicated, the parameter enters reduced over that axis,
            so that nothing is all_reduced first.
        dtype: of the gradients; None is the parameters'.

    Returns:
        A function of the same arguments: (value, gradients), or ((value, aux), gradients). The
        value is replicated.

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
        picked = entering(
            args[argnums] if isinstance(argnums, int) else tuple(args[i] for i in argnums)
        )
        asked = asked_layouts(picked, grads)
        leaves = optree.tree_leaves(picked, none_is_leaf=True)
        inputs = Inputs(
            picked, [_inside(v, to) for v, to in zip(leaves, asked, strict=True)], asked, dtype
        )
        keep = inputs.keep

        def call(shards: Sequence[Tensor]) -> tuple[Any, Any]:
            full = list(args)
            with nested(), torch.enable_grad(), saving.scope():
                back = inputs.typed(shards)
                for i, value in (
                    [(argnums, back)]
                    if isinstance(argnums, int)
                    else zip(argnums, back, strict=True)
                ):
                    full[i] = value
                result = f(*full, **kwargs)
            loss, aux = _pair(result) if has_aux else (result, None)
            check_loss(loss, "value_and_grad")
            return loss, aux

        loss, aux, raw = (_pulled if under_functorch() else _backpropagated)(call, inputs, keep)
        value = reported(loss, keep)
        found = [
            _asked(g, to, dtype) for g, to in zip(inputs.gradients(raw, keep), asked, strict=True)
        ]
        gradient = inputs.spec.unflatten(found)
        if record.LOGS:
            record.holds("parameters", local_bytes(picked))
            record.holds("gradients", local_bytes(gradient))
        return ((value, aux), gradient) if has_aux else (value, gradient)

    return differentiated


Called = Callable[[Sequence[Tensor]], tuple[Any, Any]]


def _backpropagated(call: Called, inputs: Inputs, keep: bool) -> tuple[Any, Any, list[Tensor]]:
    """Loss, aux and the shards' gradients, by torch.autograd.grad."""
    leaves = inputs.fresh()
    loss, aux = call(leaves)
    with nested() if keep else nullcontext():
        raw = backward(flat(loss), leaves, seeds(loss), keep=keep)
    return loss, aux if keep else detached(aux), raw


def _pulled(call: Called, inputs: Inputs, keep: bool) -> tuple[Any, Any, list[Tensor]]:
    """The same by torch.func.vjp, inside vmap and jvp."""
    box: list[Any] = []

    def traced(*shards: Tensor) -> tuple[Tensor, ...]:
        box[:] = call(shards)
        return flat(box[0])

    with without_hooks():
        made: Any = torch.func.vjp(traced, *inputs.shards)
    pull = made[1]
    loss, aux = outside(box[0]), outside(box[1])
    return loss, aux, list(pull(tuple(seeds(loss))))


def _pair(result: Any) -> tuple[Any, Any]:
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            "value_and_grad: with has_aux the function returns (loss, aux), "
            f"got {type(result).__name__}"
        )
    return result


def _asked(g: Any, to: Layout | None, dtype: torch.dtype | None) -> Any:
    """A gradient in the dtype and layout that were asked for."""
    if g is None:
        return None
    if dtype is not None and g.dtype != dtype:
        g = _cast(g, dtype)
    if to is not None and isinstance(g, ShardedTensor):
        with (
            record.acting("value_and_grad", "gradient", getattr(g, "_path", None)),
            record.phase("backward"),
        ):
            g = carrying_path(reshard_one(g, to), g)
    return g


def _cast(g: Any, dtype: torch.dtype) -> Any:
    if isinstance(g, Tensor):
        return g.to(dtype)
    kind = make_type(g.mesh, g.layout, g.shape, dtype, g._type.grad)
    return carrying_path(ShardedTensor(tuple(s.to(dtype) for s in g._shards), kind), g)


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
        tree: Any = grads
        wanted = optree.tree_leaves(tree, none_is_leaf=True)
        if len(wanted) != len(values):
            raise ValueError(f"grads= has {len(wanted)} leaves, the arguments have {len(values)}")
    return [
        resolve(to, v.ndim, v.layout.dual, v.shape, v.mesh)
        if to is not None and isinstance(v, ShardedTensor) and is_differentiable(v)
        else None
        for v, to in zip(values, wanted, strict=True)
    ]


def _inside(value: Any, to: Layout | None) -> Layout | None:
    """How a parameter enters: reduced where the sum of its gradient is left or scattered."""
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
        (outputs, pullback) or (outputs, pullback, aux). The pullback takes cotangents with the
        duals of the outputs' layouts and gives a tuple of gradients with the duals of the primals';
        it may be called again.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.arange(4.0), sw.make_mesh({"data": 2}), "n/data")
    >>> y, pull = sw.vjp(lambda x: x * x, x)
    >>> pull(sw.shard(torch.ones(4), x.mesh, "n/data"))[0].full_tensor()
    tensor([0., 2., 4., 6.])
    """
    inputs = Inputs(entering(primals))
    keep = inputs.keep
    if under_functorch():
        box: list[Any] = []

        def traced(*shards: Tensor) -> tuple[Tensor, ...]:
            with nested(), torch.enable_grad():
                box[:] = [f(*inputs.typed(shards))]
            return tuple(s for v in floats(box[0][0] if has_aux else box[0]) for s in flat(v))

        with without_hooks():
            pulled: Any = torch.func.vjp(traced, *inputs.shards)
        pull_flat = pulled[1]
        made: Any = outside(box[0])
        result, aux = made if has_aux else (made, None)

        def pull_raw(cotangents: list[Tensor]) -> Sequence[Tensor]:
            return pull_flat(tuple(cotangents))
    else:
        leaves = inputs.fresh()
        with nested(), torch.enable_grad(), saving.scope():
            made = f(*inputs.typed(leaves))
        result, aux = made if has_aux else (made, None)
        outputs = [s for v in floats(result) for s in flat(v)]

        def pull_raw(cotangents: list[Tensor]) -> Sequence[Tensor]:
            return backward(outputs, leaves, cotangents, keep=keep, retain=True)

    def pullback(cotangents: Any) -> Any:
        expected, given = floats(result), optree.tree_leaves(cotangents)
        if len(given) != len(expected):
            raise ValueError(f"vjp: {len(given)} cotangents for {len(expected)} outputs")
        for v, c in zip(expected, given, strict=True):
            if isinstance(v, ShardedTensor) and (
                c.layout is not v.layout.dual or c.shape != v.shape
            ):
                want = make_type(v.mesh, v.layout.dual, v.shape, v.dtype)
                raise LayoutError(f"vjp: the cotangent of {v} must be {want}, got {c}")
        raw = pull_raw([s for c in given for s in flat(c)])
        return inputs.spec.unflatten(inputs.gradients(raw, keep))

    shown, aux = (result, aux) if keep else (detached(result), detached(aux))
    return (shown, pullback, aux) if has_aux else (shown, pullback)
