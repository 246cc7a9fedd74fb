"""Pointwise ops: one rule for all, "..., ... -> ...", and a table of which are linear in what.

Unary functions are non-linear but for the few in LINEAR. Addition is linear in all its operands
together, so a sum that is still owed passes through it and constants count once; multiplication in
each operand alone; division in the first.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layouts.layout import LayoutLike
from ..layouts.place import constant
from ..layouts.sharded import TORCH, ShardedTensor, install
from .dispatch import Info, Local, Op, binary, export, unary
from .rules import Rule, make, pointwise

# Unary functions of torch that act on each element alone.
UNARY = [
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "ceil", "cos", "cosh", "deg2rad",
    "digamma", "erf", "erfc", "erfinv", "exp", "exp2", "expm1", "floor", "frac", "isfinite",
    "isinf", "isnan", "lgamma", "log", "log10", "log1p", "log2", "logical_not", "neg",
    "positive", "rad2deg", "reciprocal", "round", "rsqrt", "sigmoid", "sign", "signbit", "sgn",
    "sin", "sinc", "sinh", "sqrt", "square", "tan", "tanh", "trunc", "bitwise_not", "i0",
    "logit", "relu", "isreal",
]  # fmt: skip
LINEAR = {"neg", "positive", "deg2rad", "rad2deg"}  # f(x + y) = f(x) + f(y)
FLAT = {"ceil", "floor", "round", "sign", "signbit", "trunc", "isfinite", "isinf", "isnan",
        "isreal", "logical_not", "bitwise_not"}  # fmt: skip  # no gradient, or zero

# Activations of torch.nn.functional, with the names of their positional parameters.
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "celu": ("alpha", "inplace"),
    "elu": ("alpha", "inplace"),
    "gelu": ("approximate",),
    "hardshrink": ("lambd",),
    "hardsigmoid": ("inplace",),
    "hardswish": ("inplace",),
    "hardtanh": ("min_val", "max_val", "inplace"),
    "leaky_relu": ("negative_slope", "inplace"),
    "logsigmoid": (),
    "mish": ("inplace",),
    "relu6": ("inplace",),
    "selu": ("inplace",),
    "silu": ("inplace",),
    "softplus": ("beta", "threshold"),
    "softshrink": ("lambd",),
    "softsign": (),
    "tanhshrink": (),
    "threshold": ("threshold", "value", "inplace"),
}


def _rule(linear: tuple[int, ...] = (), joint: bool = False) -> Callable[..., Rule]:
    def rule(shapes: Any, *keywords: Any) -> Rule:
        rounds = any(key == "rounding_mode" and mode for key, mode in keywords)
        return make(
            pointwise([len(s) for s in shapes]),
            shapes,
            linear=() if rounds else linear,
            joint=joint,
        )

    return rule


def _plain(function: Callable[..., Any]) -> Callable[[Info], Local]:
    """The torch function itself, with static keyword arguments bound."""

    def local(info: Info) -> Local:
        if not info.static:
            return function
        keywords = dict(info.static)
        return lambda *tensors: function(*tensors, **keywords)

    return local


def _define_unary(name: str, function: Callable[..., Any]) -> Callable[..., ShardedTensor]:
    op = Op(
        name,
        _rule((0,) if name in LINEAR else ()),
        _plain(function),
        differentiable=name not in FLAT,
    )
    fast = unary(op)

    def call(
        x: ShardedTensor,
        *,
        out: LayoutLike | None = None,
        over: Mapping[str, str] | None = None,
        **keywords: Any,
    ) -> ShardedTensor:
        if out is None and over is None and not keywords:
            return fast(x)
        return op((x,), tuple(sorted(keywords.items())), out, over)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = (
        f"`torch.{name}` of each element; the layout is kept. Free, unless a sum is owed."
    )
    return call


def _define_activation(name: str, function: Callable[..., Any]) -> Callable[..., ShardedTensor]:
    op = Op(name, _rule(), _plain(function))
    fast = unary(op)
    defaults = ACTIVATIONS[name]

    def call(
        x: ShardedTensor,
        *args: Any,
        out: LayoutLike | None = None,
        over: Mapping[str, str] | None = None,
        **keywords: Any,
    ) -> ShardedTensor:
        if not args and not keywords and out is None and over is None:
            return fast(x)
        keywords.update(zip(defaults, args))  # noqa: B905 - trailing ones keep their defaults
        if keywords.pop("inplace", False):
            raise TypeError(f"{name}: nothing is written in place")
        return op((x,), tuple(sorted(keywords.items())), out, over)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"`torch.nn.functional.{name}` of each element; the layout is kept."
    return call


for _name in UNARY:
    _call = _define_unary(_name, getattr(torch, _name))
    globals()[_name] = export(getattr(torch, _name), methods=[_name])(_call)
for _name in ACTIVATIONS:
    _call = _define_activation(_name, getattr(F, _name))
    globals()[_name] = export(getattr(F, _name))(_call)
export(F.relu)(lambda x, inplace=False: globals()["relu"](x))
export(F.sigmoid, torch.special.expit)(globals()["sigmoid"])
export(F.tanh)(globals()["tanh"])
export(torch.absolute, methods=["absolute"])(globals()["abs"])
export(torch.negative, methods=["negative"])(globals()["neg"])
for _operator, _name in {
    "__neg__": "neg",
    "__abs__": "abs",
    "__invert__": "bitwise_not",
    "__pos__": "positive",
}.items():
    install(_operator, globals()[_name])


# Binary: name -> (linear in, jointly linear, differentiable).
BINARY: dict[str, tuple[tuple[int, ...], bool, bool]] = {
    "add": ((), True, True),
    "sub": ((), True, True),
    "mul": ((0, 1), False, True),
    "div": ((0,), False, True),
    "pow": ((), False, True),
    "maximum": ((), False, True),
    "minimum": ((), False, True),
    "fmax": ((), False, True),
    "fmin": ((), False, True),
    "atan2": ((), False, True),
    "hypot": ((), False, True),
    "logaddexp": ((), False, True),
    "logaddexp2": ((), False, True),
    "copysign": ((), False, True),
    "xlogy": ((), False, True),
    "remainder": ((), False, True),
    "fmod": ((), False, True),
    "floor_divide": ((), False, False),
    "eq": ((), False, False),
    "ne": ((), False, False),
    "lt": ((), False, False),
    "le": ((), False, False),
    "gt": ((), False, False),
    "ge": ((), False, False),
    "logical_and": ((), False, False),
    "logical_or": ((), False, False),
    "logical_xor": ((), False, False),
    "bitwise_and": ((), False, False),
    "bitwise_or": ((), False, False),
    "bitwise_xor": ((), False, False),
    "isclose": ((), False, False),
}
OPS: dict[str, Op] = {}
FAST: dict[str, Callable[..., Any]] = {}  # the operators' own way in, without keywords


def _define_binary(name: str, function: Callable[..., Any]) -> Callable[..., ShardedTensor]:
    linear, joint, differentiable = BINARY[name]
    op = OPS[name] = Op(name, _rule(linear, joint), _plain(function), differentiable=differentiable)
    fast = FAST[name] = binary(op, lambda x, y: call(x, y))

    def call(
        x: Any,
        y: Any,
        *,
        out: LayoutLike | None = None,
        over: Mapping[str, str] | None = None,
        **keywords: Any,
    ) -> ShardedTensor:
        if (
            type(x) is ShardedTensor
            and type(y) is ShardedTensor
            and out is None
            and over is None
            and not keywords
        ):
            return fast(x, y)
        if joint:
            alpha = keywords.pop("alpha", 1)  # as an operand it may vary without a new plan
            x, y = _counted_once(x, y if alpha == 1 else y * alpha)
        elif y is None and name in ("eq", "ne"):
            return name == "ne"  # pyright: ignore  # as torch does
        return op((x, y), tuple(sorted(keywords.items())), out, over)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"`torch.{name}`, with broadcasting. Layouts combine as in `docs/layouts.md`."
    return call


def _counted_once(x: Any, y: Any) -> tuple[Any, Any]:
    """A number beside an unreduced tensor becomes an operand, which one device of the axis adds."""
    for one, other in ((x, y), (y, x)):
        if (
            isinstance(one, ShardedTensor)
            and one.layout.unreduced
            and not isinstance(other, ShardedTensor)
        ):
            if not isinstance(other, Tensor):
                other = torch.as_tensor(
                    other, dtype=one.dtype if isinstance(other, int | float) else None
                )
            other = constant(other, one)
            return (one, other) if one is x else (other, one)
    return x, y


for _name in BINARY:
    _call = _define_binary(_name, getattr(torch, _name))
    globals()[_name] = export(getattr(torch, _name), methods=[_name])(_call)
_ALIASES = {
    "subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div", "not_equal": "ne",
    "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "arctan2": "atan2",
}  # fmt: skip
for _alias, _name in _ALIASES.items():
    export(getattr(torch, _alias), methods=[_alias])(globals()[_name])
_OPERATORS = {
    "add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "pow": "pow", "mod": "remainder",
    "floordiv": "floor_divide", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
}  # fmt: skip
for _operator, _name in _OPERATORS.items():
    _call = globals()[_name]
    _reversed = lambda x, y, call=_call: call(y, x)  # noqa: E731
    for _method, _function in (
        (f"__{_operator}__", FAST[_name]),
        (f"__r{_operator}__", _reversed),
    ):
        install(_method, _function)
        TORCH.setdefault(getattr(Tensor, _method, None), _function)
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    install(f"__{_name}__", FAST[_name])
ShardedTensor.__hash__ = object.__hash__  # __eq__ is elementwise, as in torch

_WHERE = Op(
    "where",
    lambda shapes, *_: make(pointwise([len(s) for s in shapes]), shapes),
    lambda _: torch.where,
)
_WHERE_MASKED = Op(
    "where",
    lambda shapes, *_: make(pointwise([len(s) for s in shapes]), shapes, linear=(1, 2)),
    lambda _: torch.where,
)


@export(torch.where, methods=[])
def where(
    condition: Any,
    x: Any,
    y: Any,
    *,
    out: LayoutLike | None = None,
    over: Mapping[str, str] | None = None,
) -> ShardedTensor:
    """`torch.where`, with broadcasting.

    A sum that is owed passes through where the other branch is zero: `where(mask, u, 0)`.

    >>> import torch, shardwise as sw
    >>> x = sw.shard(torch.arange(4.0), sw.make_mesh({"data": 2}), "n/data")
    >>> torch.where(x > 1, x, 0.0).full_tensor()
    tensor([0., 0., 2., 3.])
    """
    is_zero = any(isinstance(v, int | float) and v == 0 for v in (x, y))
    return (_WHERE_MASKED if is_zero else _WHERE)((condition, x, y), (), out, over)


install("where", lambda x, condition, other: where(condition, x, other))


@export(torch.masked_fill, methods=["masked_fill"])
def masked_fill(x: ShardedTensor, mask: Any, value: float) -> ShardedTensor:
    """`x` with `value` where the mask is true."""
    return where(mask, value, x)


_CLAMP = Op("clamp", _rule(), lambda _: torch.clamp)  # bounds are operands: they may vary


@export(torch.clamp, torch.clip, methods=["clamp", "clip"])
def clamp(
    x: ShardedTensor,
    min: Any = None,
    max: Any = None,
    *,
    out: LayoutLike | None = None,
    over: Mapping[str, str] | None = None,
) -> ShardedTensor:
    """`torch.clamp`; bounds are numbers or tensors."""
    if isinstance(min, ShardedTensor | Tensor) or isinstance(max, ShardedTensor | Tensor):
        if min is not None:
            x = globals()["maximum"](x, min)
        return x if max is None else globals()["minimum"](x, max, out=out, over=over)
    return _CLAMP((x, min, max), (), out, over)


export(torch.clamp_min, methods=["clamp_min"])(lambda x, min: clamp(x, min))
export(torch.clamp_max, methods=["clamp_max"])(lambda x, max: clamp(x, None, max))

_LERP = Op("lerp", _rule(), lambda _: torch.lerp)


@export(torch.lerp, methods=["lerp"])
def lerp(x: Any, end: Any, weight: Any) -> ShardedTensor:
    """`x + weight * (end - x)`."""
    if isinstance(weight, int | float):
        return _LERP_SCALAR((x, end, float(weight)))
    return _LERP((x, end, weight))


_LERP_SCALAR = Op("lerp", _rule(joint=True), lambda _: torch.lerp)


def _fused(name: str, combine: Callable[..., Any]) -> Any:
    function = getattr(torch, name)

    def call(x: Any, a: Any, b: Any, *, value: float = 1) -> ShardedTensor:
        return globals()["add"](x, globals()["mul"](combine(a, b), value))

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"`torch.{name}`."
    return export(function, methods=[name])(call)


addcmul = _fused("addcmul", operator.mul)
addcdiv = _fused("addcdiv", operator.truediv)


def _cast_rule(shapes: Any, dtype: torch.dtype) -> Rule:
    rounds = not (
        dtype.is_floating_point or dtype.is_complex
    )  # parts rounded to integers do not add up
    return make("... -> ...", shapes, linear=() if rounds else (0,))


_CAST = Op("to", _cast_rule, lambda info: lambda x: x.to(info.static[0]))


@export(methods=["to", "type"])
def to(x: ShardedTensor, dtype: torch.dtype, *, out: LayoutLike | None = None) -> ShardedTensor:
    """`x` in another dtype; sums that are owed stay owed."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(
            f"to: expected a dtype, got {dtype!r}; a mesh has one device, use sw.reshard to move"
        )
    return x if x.dtype == dtype and out is None else _CAST((x,), (dtype,), out)


for _name in ("float", "double", "half", "bfloat16", "int", "long", "bool"):
    _dtype = getattr(torch, _name)
    install(_name, lambda x, dtype=_dtype: to(x, dtype))
install("type_as", lambda x, other: to(x, other.dtype))

_CLONE = Op("clone", _rule(linear=(0,)), lambda _: torch.clone)


@export(torch.clone, methods=["clone", "contiguous"])
def clone(x: ShardedTensor, *, memory_format: Any = None) -> ShardedTensor:
    """A copy; values are immutable, so it is rarely needed."""
    return _CLONE((x,))


export(torch.detach)(lambda x: x.detach())


def _fill(name: str, value: float) -> Any:
    def like(x: ShardedTensor, *, dtype: torch.dtype | None = None) -> ShardedTensor:
        from ..layouts.place import full

        layout = "..." if x.layout.unreduced or x.layout.varying else x.layout
        return full(x.shape, value, x.mesh, layout, dtype=dtype or x.dtype)

    like.__name__ = like.__qualname__ = name
    like.__doc__ = f"`torch.{name}`: the same shape, mesh and cut dims."
    return export(getattr(torch, name))(like)


zeros_like = _fill("zeros_like", 0.0)
ones_like = _fill("ones_like", 1.0)
