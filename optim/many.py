"""`Many`: a list of local tensors with the arithmetic of one, a few launches for all of them.

Each operation is one `torch._foreach_*` call. A plain method makes new tensors. A method that ends
with `_` *consumes* its first operand: where nobody else reads its buffers (results of other
operations, donated arguments) it writes into them, else it makes new ones; either way the old value
must not be used again.

    m = m.lerp_(g, 1 - b1)          new buffers, or m's own if they were donated
    root = v.sqrt().add_(eps)       one new buffer, used twice

Scalars are numbers or 0-d tensors, so that what changes from step to step is never compiled in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Number = float | Tensor


class Many:
    """Tensors that go through the same arithmetic, each with its partner of the other lists.

    Args:
        each: the tensors; dtypes are equal within a list.
        free: whether their buffers may be written into.

    >>> x = Many([torch.ones(2), torch.zeros(3)])
    >>> (x * 2 + 1).each
    [tensor([3., 3.]), tensor([1., 1., 1.])]
    """

    __slots__ = ("each", "free")

    def __init__(self, each: Sequence[Tensor], free: bool = False) -> None:
        self.each = list(each)
        self.free = free

    @property
    def dtype(self) -> torch.dtype:
        """The one dtype of the list."""
        return self.each[0].dtype

    def map(self, f: Callable[..., Tensor], *others: Many) -> Many:
        """`f` on each tensor and its partners: for what has no foreach form."""
        return Many([f(*xs) for xs in zip(self.each, *(o.each for o in others), strict=True)], True)

    def to(self, dtype: torch.dtype) -> Many:
        """In another dtype; itself where it has it."""
        return self if self.dtype is dtype else Many([x.to(dtype) for x in self.each], True)

    def _bare(self, x: Any) -> Any:
        """An operand as torch takes it; a 0-d tensor of another dtype would cost a launch each."""
        if isinstance(x, Many):
            return x.each
        return x.to(self.dtype) if isinstance(x, Tensor) else x

    def _new(self, name: str, *args: Any, **keywords: Any) -> Many:
        return Many(_PLAIN[name](self.each, *map(self._bare, args), **keywords), True)

    def _used(self, name: str, *args: Any, **keywords: Any) -> Many:
        keeps = all(not isinstance(a, Many) or _fits(a.dtype, self.dtype) for a in args)
        if not (self.free and keeps):
            return self._new(name, *args, **keywords)
        _WRITING[name](self.each, *map(self._bare, args), **keywords)
        return self

    def __add__(self, other: Many | Number) -> Many:
        return self._new("add", other)

    def __sub__(self, other: Many | Number) -> Many:
        return self._new("sub", other) if isinstance(other, Many) else self._new("add", -other)

    def __mul__(self, other: Many | Number) -> Many:
        return self._new("mul", other)

    def __truediv__(self, other: Many | Number) -> Many:
        return self._new("div", other)

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> Many:
        return self._new("neg")

    def sqrt(self) -> Many:
        """The roots."""
        return self._new("sqrt")

    def abs(self) -> Many:
        """The absolute values."""
        return self._new("abs")

    def sign(self) -> Many:
        """-1, 0 or 1."""
        return self._new("sign")

    def clamp(self, low: Number, high: Number) -> Many:
        """Cut to [low, high]."""
        if isinstance(low, Tensor) or isinstance(high, Tensor):  # no foreach form takes these
            low, high = (torch.as_tensor(self._bare(x)) for x in (low, high))
            return self.map(lambda x: torch.clamp(x, low.to(x), high.to(x)))
        return self._new("clamp_min", low)._used("clamp_max", high)

    def add_(self, other: Many | Number) -> Many:
        """The sum; consumes the first."""
        return self._used("add", other)

    def sub_(self, other: Many) -> Many:
        """The difference; consumes the first."""
        return self._used("sub", other)

    def mul_(self, other: Many | Number) -> Many:
        """The product; consumes the first."""
        return self._used("mul", other)

    def div_(self, other: Many | Number) -> Many:
        """The quotient; consumes the first."""
        return self._used("div", other)

    def sqrt_(self) -> Many:
        """The roots; consumes."""
        return self._used("sqrt")

    def sign_(self) -> Many:
        """The signs; consumes."""
        return self._used("sign")

    def lerp(self, end: Many, weight: Number) -> Many:
        """`self + weight * (end - self)`."""
        if isinstance(weight, Tensor):
            return (end.to(self.dtype) - self).mul_(weight).add_(self)
        return self._new("lerp", end.to(self.dtype), weight)

    def lerp_(self, end: Many, weight: Number) -> Many:
        """`lerp`; consumes the first."""
        if isinstance(weight, Tensor):
            return self.add_((end.to(self.dtype) - self).mul_(weight))
        return self._used("lerp", end.to(self.dtype), weight)

    def addcmul_(self, a: Many, b: Many, value: Number) -> Many:
        """`self + value * a * b`; consumes the first."""
        if isinstance(value, Tensor):
            return self.add_((a * b).mul_(value))
        return self._used("addcmul", a, b, value=value)

    def addcdiv_(self, a: Many, b: Many, value: Number) -> Many:
        """`self + value * a / b`; consumes the first."""
        if isinstance(value, Tensor):
            return self.add_((a / b).mul_(value))
        return self._used("addcdiv", a, b, value=value)


_NAMES = (
    "add", "sub", "mul", "div", "neg", "sqrt", "abs", "sign", "clamp_min", "clamp_max", "lerp",
    "addcmul", "addcdiv",
)  # fmt: skip
_PLAIN: dict[str, Callable[..., Any]] = {n: getattr(torch, f"_foreach_{n}") for n in _NAMES}
_WRITING: dict[str, Callable[..., Any]] = {n: getattr(torch, f"_foreach_{n}_") for n in _NAMES}


def norms(tensors: Sequence[Tensor], order: float = 2.0) -> Sequence[Tensor]:
    """The norm of each tensor, in few launches; inf and NaN stay what they are."""
    return torch._foreach_norm(list(tensors), order)  # pyright: ignore


def _fits(dtype: torch.dtype, into: torch.dtype) -> bool:
    return dtype is into or torch.promote_types(dtype, into) is into
