"""One way to define an op on local tensors, so that every transform sees the same derivative.

`define` makes a dispatcher op in the namespace `shardwise`. A CPU tensor runs the *twin*, plain
torch that is differentiable to any order; a CUDA tensor runs the Triton kernel; fake and meta
tensors run shapes only. torch.compile and make_fx see one opaque node, and so does autograd: the
op has its own kernel under the Autograd key, whose backward is made of defined ops and plain torch.
Forward mode runs the twin.

The usual ways do not work here (torch 2.11 to 2.13): `register_autograd` raises under torch.func,
and Dynamo drops the backward of an `autograd.Function` under torch.func.grad without a word.
The names of torch that are private are all in this file, and tests/kernel_tests/test_torture.py
fails loudly where one of them means something else.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

NAMESPACE = "shardwise"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

Derivative = Callable[..., Sequence[Tensor | None]]


@dataclass(frozen=True)
class Kernel:
    """A defined op with what it is made of; tests walk over all of them."""

    name: str
    op: torch._ops.OpOverload
    twin: Callable[..., Any]
    cuda: Callable[..., Any] | None
    backward: Derivative | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tensors: tuple[int, ...]  # which inputs may be tensors


KERNELS: dict[str, Kernel] = {}  # name -> kernel, in order of definition


def define(
    schema: str,
    *,
    twin: Callable[..., Any],
    cuda: str | Callable[..., Any] | None = None,
    backward: Derivative | None = None,
    fake: Callable[..., Any] | None = None,
    vmap: Callable[..., Any] | None = None,
) -> torch._ops.OpOverload:
    """Define the op `shardwise::<schema>` and return it; call it like a function, by position.

    Args:
        schema: "name(Tensor x, float eps) -> (Tensor y, Tensor rstd)"; every result is named. An op
            changes none of its inputs, and no result shares memory with an input or another result
            (inductor computes wrong numbers where one does). Lists of tensors (`Tensor[] x`) may
            stand for arguments and results; such an op has no derivative.
        twin: the op in plain torch: what a CPU tensor runs, what the tests compare with, and the
            derivative in forward mode. Contiguous results, differentiable to any order.
        cuda: what a CUDA tensor runs: a function, or "module:function" of this package, imported at
            the first call so that the package imports without Triton. None: the twin.
        backward: `backward(grad_y, grad_rstd, x, eps, rstd) -> gradients of the tensor inputs`, in
            the schema's order. The parameters are named after inputs, results and "grad_" results,
            in any order; only what is named is kept for the backward. A result that nothing uses
            has the gradient None, and None may be returned; an optional tensor that was None
            gets None. A parameter `**kept` receives all inputs. Made of defined ops and plain
            torch, so it is itself differentiable. None: a backward through the op raises.
        fake: shapes and dtypes of the results, from tensors without data. None: the twin.
        vmap: the rule `vmap(info, in_dims, *args) -> (results, out_dims)`, such as `rows(...)`.
            None: a loop over the batch.

    Raises:
        ValueError: a result has no name, an input has a default value, the backward's parameters
            name nothing of the schema, or an op on lists has a backward.

    >>> from shardwise.kernels.registry import define
    >>> cube = define("doc_cube(Tensor x) -> Tensor y", twin=lambda x: x**3,
    ...               backward=lambda grad_y, x: (3 * x * x * grad_y,))
    >>> torch.func.grad(torch.func.grad(cube))(torch.tensor(2.0))
    tensor(12.)
    """
    parsed = torch._C.parse_schema(schema)
    name, inputs = parsed.name, tuple(a.name for a in parsed.arguments)
    outputs = tuple(r.name or "" for r in parsed.returns)
    if not all(outputs):
        raise ValueError(f"{name}: every result needs a name: {schema!r}")
    if any(a.has_default_value() for a in parsed.arguments):
        raise ValueError(f"{name}: defaults belong to the function around the op: {schema!r}")
    lists = any("List[Tensor]" in str(a.type) for a in (*parsed.arguments, *parsed.returns))
    if lists and backward is not None:
        raise ValueError(f"{name}: an op on lists of tensors has no backward: {schema!r}")
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    cuda = _lazily(cuda) if isinstance(cuda, str) else cuda
    _LIBRARY.impl(name, twin, "CPU")
    _LIBRARY.impl(name, cuda or twin, "CUDA")
    derived = _underived(op) if lists else _autograd(op, twin, backward, inputs, outputs)
    _LIBRARY.impl(name, derived, "Autograd", with_keyset=True)
    torch.library.register_fake(op, fake or twin, lib=_LIBRARY)
    torch.library.register_vmap(op, vmap or looped(op), lib=_LIBRARY)
    tensors = tuple(i for i, a in enumerate(parsed.arguments) if "Tensor" in str(a.type))
    KERNELS[name] = Kernel(name, op, twin, cuda, backward, inputs, outputs, tensors)
    return op


def by_twin(name: str) -> Derivative:
    """The derivative of op `name` by autograd through its twin: exact, slower, for rare paths.

    It is what second derivatives use: the backward of a backward op.
    """

    def backward(**kept: Any) -> Sequence[Tensor | None]:
        kernel = KERNELS[name]
        values = [kept[i] for i in kernel.inputs]
        places = [i for i, v in enumerate(values) if _is_real(v)]

        def of_reals(*reals: Tensor) -> tuple[Tensor, ...]:
            filled = list(values)
            for place, real in zip(places, reals, strict=True):
                filled[place] = real
            return _tuple(kernel.twin(*filled))

        results, pull = torch.func.vjp(of_reals, *(values[p] for p in places))[:2]
        wanted = [kept[f"grad_{o}"] for o in kernel.outputs]
        cotangents = tuple(
            torch.zeros_like(r) if w is None else w for r, w in zip(results, wanted, strict=True)
        )
        found = dict(zip(places, pull(cotangents), strict=True))
        return [found.get(i) for i in kernel.tensors]

    return backward


def rows(op: Callable[[], torch._ops.OpOverload], *names: str) -> Callable[..., Any]:
    """Rule for vmap of an op whose inputs `names` and whose results all have leading row dims.

    A batch over those inputs alone is one more leading dim; over any other it is a loop.

    Args:
        op: a function that returns the op: the rule is written before the op exists.
        names: the inputs that have rows.
    """

    def rule(info: Any, dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        kernel = KERNELS[op()._schema.name.split("::")[1]]
        batched = [d is not None for d in dims]
        whole = all(n in names for n, b in zip(kernel.inputs, batched, strict=False) if b)
        if not whole:
            return looped(op())(info, dims, *args)
        moved = [
            _leading(a, d, info.batch_size) if n in names and isinstance(a, Tensor) else a
            for n, a, d in zip(kernel.inputs, args, dims, strict=False)
        ]
        results = op()(*moved)
        return results, (0,) * len(results) if isinstance(results, tuple) else 0

    return rule


def looped(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The rule for vmap that is right for every op: one call for each element of the batch."""

    def rule(info: Any, dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        each = [
            _tuple(op(*(_select(a, d, i) for a, d in zip(args, dims, strict=True))))
            for i in range(info.batch_size)
        ]
        stacked = tuple(_stack(column) for column in zip(*each, strict=True))
        places = tuple([0] * len(r) if isinstance(r, list) else 0 for r in stacked)
        return (stacked, places) if len(op._schema.returns) > 1 else (stacked[0], places[0])

    return rule


def _select(a: Any, dim: Any, i: int) -> Any:
    """Element i of the batch, of a tensor or of each in a list."""
    if isinstance(dim, list | tuple):
        return [_select(b, d, i) for b, d in zip(a, dim, strict=True)]
    return a if dim is None else a.select(dim, i)


def _stack(column: Sequence[Any]) -> Any:
    if isinstance(column[0], list):
        return [torch.stack(list(each)) for each in zip(*column, strict=True)]
    return torch.stack(list(column))


def _leading(x: Tensor, dim: int | None, size: int) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _autograd(
    op: torch._ops.OpOverload,
    twin: Callable[..., Any],
    backward: Derivative | None,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
) -> Callable[..., Any]:
    """The kernel of the Autograd key: called at every level of grad, with that level's tensors."""
    name = op._schema.name
    tensors = [i for i, a in enumerate(op._schema.arguments) if "Tensor" in str(a.type)]
    known = (*inputs, *outputs, *(f"grad_{o}" for o in outputs))
    kept = _wanted(backward, (*inputs, *known[len(inputs) + len(outputs) :]))
    strange = [k for k in kept if k not in known]
    if strange:
        raise ValueError(f"{name}: the backward wants {strange}; the schema has {list(known)}")
    kept_inputs = [i for i, n in enumerate(inputs) if n in kept]
    kept_outputs = [i for i, n in enumerate(outputs) if n in kept]

    class Node(_SingleLevelFunction):
        @staticmethod
        def forward(keys: Any, *args: Any) -> Any:
            # Grad mode and forward mode are off in here; the levels below need them on, or their
            # derivatives (the second ones, seen from outside) are zero without a word.
            with (
                torch._C._AutoDispatchBelowAutograd(),
                torch.enable_grad(),
                forward_ad._set_fwd_grad_enabled(True),
            ):
                return op.redispatch(keys & torch._C._after_autograd_keyset, *args)

        @staticmethod
        def setup_context(ctx: Any, args: tuple[Any, ...], output: Any) -> None:
            args, results = args[1:], _tuple(output)
            ctx.set_materialize_grads(False)
            ctx.static = {
                inputs[i]: args[i] for i in kept_inputs if not isinstance(args[i], Tensor)
            }
            named = [(inputs[i], args[i]) for i in kept_inputs if isinstance(args[i], Tensor)]
            named += [(outputs[i], results[i]) for i in kept_outputs]
            ctx.names = [n for n, _ in named]
            ctx.save_for_backward(*(value for _, value in named))
            ctx.mark_non_differentiable(*(r for r in results if not _is_real(r)))

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            if backward is None:
                raise RuntimeError(f"{name} has no derivative: detach its inputs")
            values = {**ctx.static, **dict(zip(ctx.names, ctx.saved_tensors, strict=True))}
            values |= {f"grad_{o}": g for o, g in zip(outputs, grads, strict=True)}
            wanted = backward(**{k: values[k] for k in kept})
            found = dict(zip(tensors, wanted, strict=True))
            return (None, *(found.get(i) for i in range(len(inputs))))

    node: Any = Node  # what `apply` is, torch's stubs do not say of a single-level function

    def call(keys: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(
            _has_tangent(args[i]) for i in tensors[: len(args)]
        ):
            return twin(*args)
        with enable_single_level_autograd_function():
            return node.apply(keys, *args)

    return call


def _underived(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The Autograd kernel of an op on lists, which has no derivative and says so at once."""

    def call(keys: Any, *args: Any) -> Any:
        held = [t for a in args for t in (a if isinstance(a, list | tuple) else (a,))]
        forward = forward_ad._current_level >= 0 and any(_has_tangent(t) for t in held)
        wanted = torch.is_grad_enabled() and any(
            isinstance(t, Tensor) and t.requires_grad for t in held
        )
        if forward or wanted:
            raise RuntimeError(f"{op._schema.name} has no derivative: detach its inputs")
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *args)

    return call


def _wanted(backward: Derivative | None, everything: tuple[str, ...]) -> tuple[str, ...]:
    """What the backward asks for by the names of its parameters."""
    if backward is None:
        return ()
    parameters = inspect.signature(backward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return everything
    return tuple(parameters)


def _tuple(results: Any) -> tuple[Any, ...]:
    return tuple(results) if isinstance(results, tuple | list) else (results,)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def _lazily(place: str) -> Callable[..., Any]:
    module, function = place.split(":")

    @functools.cache
    def found() -> Callable[..., Any]:
        return getattr(importlib.import_module(f".{module}", __package__), function)

    return lambda *args: found()(*args)
