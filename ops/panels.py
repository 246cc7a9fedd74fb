"""Panel products: matmuls that move their operands panel by panel instead of gathering them whole.

A product is seen as a form in three tensors, A and B and C = A.B, of which any two give the third:
the two backward products are the same form with another tensor as result. One factor `f` is worked
on in q panels. Some of the tensors *move*: each is cut on f by a mesh axis of q devices. A tensor
that stays and has f is read, or written, one slice at a time; a result that stays and lacks f is a
running sum.

    streamed   moving operand: its owner broadcasts panel l in step l
    (SUMMA)    moving result:  the parts are reduced to the owner of panel l in step l
    ring       moving operand: every device works on the panel at hand and passes it on
               moving result:  the sum of a panel travels, and each device adds its part

Streamed moves A and B along two axes (C stays), ring one tensor along one axis. Only the local
blocks are saved for backward, and no more than one panel of each moving tensor is held at a time:
1/q of what a gather would receive.

Running sums of half precision are float32 and rounded once; what travels is rounded on the way,
unless `reduce_dtype` is wider, as in a reduce_scatter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..layouts.convert import in_front
from ..meshlib import record
from ..meshlib.mesh import Mesh
from .kept import kept
from .product import Letters, added, lowered, product, raised, sizes

Shards = Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class Form:
    """A panel product: the letters of A, B and C, the axis along which each moves, the result."""

    mesh: Mesh
    letters: tuple[Letters, Letters, Letters]
    factor: str
    axes: tuple[str | None, str | None, str | None]  # None: that tensor stays
    ring: bool
    result: int = 2
    wide: torch.dtype | None = None  # in which sums are taken

    @property
    def steps(self) -> int:
        """Number of panels: devices on each axis."""
        return self.mesh.axes[next(a for a in self.axes if a is not None)]

    @property
    def operands(self) -> tuple[int, int]:
        """Which two of the three tensors are given."""
        first, second = (i for i in range(3) if i != self.result)
        return first, second

    @property
    def names(self) -> tuple[Letters, Letters, Letters]:
        """Letters of the two that are given and of the result."""
        first, second = self.operands
        return self.letters[first], self.letters[second], self.letters[self.result]

    def panels(self, step: int) -> Sequence[int]:
        """Number of the panel that each held shard works on.

        In a ring its own comes first; where the result travels, last.
        """
        if not self.ring:
            return [step] * len(self.mesh.held)
        axis = next(a for a in self.axes if a is not None)
        ahead = step + (self.axes[self.result] is not None)
        return [(p + ahead) % self.steps for p in self.mesh.positions((axis,))]

    def total(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which the products of panels are summed; no sum keeps theirs."""
        if self.axes[self.result] is not None:
            return self.wide or dtype
        if self.factor in self.letters[self.result]:
            return dtype
        return torch.promote_types(dtype, self.wide or torch.float32)

    def mapped(self, which: Sequence[bool]) -> Form:
        """The form with one more letter, in front, on these tensors (vmap)."""
        new = f"*{sum(len(x) for x in self.letters)}"
        letters = tuple(
            (new, *have) if has else have for have, has in zip(self.letters, which, strict=True)
        )
        return replace(self, letters=letters)


class _Run:
    """One product as it runs: its collectives, each on the record, and its steps."""

    def __init__(self, form: Form, by: record.Context | None, backward: bool) -> None:
        self.form, self.by, self.backward = form, by, backward
        self.comm = form.mesh.comm
        self.size: dict[str, int] = {}  # of each letter, within one panel

    def noted(self, kind: Any, axis: str, shards: Shards) -> tuple[Shards, tuple[str]]:
        """Arguments of a collective, which is put on the record."""
        if record.LOGS:
            sums = "sum" if kind == "reduce" else None
            mesh = self.form.mesh
            record.collective(kind, mesh, (axis,), shards[0], self.by, sums, self.backward)
        return shards, (axis,)

    def passed_on(self, shards: Shards, axis: str) -> Shards:
        """To the device before, which then has the panel after the one that it had."""
        q = self.form.steps
        pairs = [(p, (p - 1) % q) for p in range(q)]
        return self.comm.permute(*self.noted("permute", axis, shards), pairs)

    def panels(self, number: int, own: Shards) -> Iterator[Shards]:
        """What each step needs of an operand; nothing that arrives is held longer than needed."""
        form, axis, letters = self.form, self.form.axes[number], self.form.letters[number]
        hand = own
        for step in range(form.steps):
            if axis is None and form.factor in letters:
                yield self.slices(own, letters.index(form.factor), step)
            elif axis is None:
                yield own
            elif not form.ring:
                yield self.comm.broadcast(*self.noted("broadcast", axis, own), step)
            else:
                hand = self.passed_on(hand, axis) if step else own
                yield hand

    def slices(self, shards: Shards, dim: int, step: int) -> list[Tensor]:
        """The panels that a step works on, of tensors that stay."""
        size = shards[0].shape[dim] // self.form.steps
        at = self.form.panels(step)
        return [x.narrow(dim, p * size, size) for x, p in zip(shards, at, strict=True)]

    def products(self, given: Sequence[Shards]) -> Iterator[Callable[[Shards | None], Shards]]:
        """Per step a function that multiplies its panels, onto a running sum if there is one."""
        form = self.form
        da, db, out = form.names
        left, right = (self.panels(i, x) for i, x in zip(form.operands, given, strict=True))
        dtype = form.total(given[0][0].dtype)

        def multiply(onto: Shards | None) -> Shards:
            a, b = next(left), next(right)
            self.size = sizes(a[0], b[0], da, db)
            pairs = [lowered(x, y, da, db, out) for x, y in zip(a, b, strict=True)]
            if onto is None:
                return [product(x, y, dtype) for x, y in pairs]
            return [added(total, x, y) for total, (x, y) in zip(onto, pairs, strict=True)]

        return (multiply for _ in range(form.steps))

    def raised(self, products: Shards) -> list[Tensor]:
        """Products with the result's own dims."""
        return [raised(x, *self.form.names, self.size) for x in products]

    def summed(self, given: Sequence[Shards]) -> list[Tensor]:
        """A result that stays and lacks the factor."""
        total = None
        for multiply in self.products(given):
            total = multiply(total)
        return self.raised(total or ())

    def sliced(self, given: Sequence[Shards]) -> list[Tensor]:
        """A result that stays and has the factor."""
        out, f, q = self.form.letters[self.form.result], self.form.factor, self.form.steps
        whole: list[Tensor] = []
        for step, multiply in enumerate(self.products(given)):
            parts = self.raised(multiply(None))
            if not step:
                shape = [self.size[c] * (q if c == f else 1) for c in out]
                whole = [part.new_empty(shape) for part in parts]
            _write(self.slices(whole, out.index(f), step), parts)
            del parts  # before the next arrive
        return whole

    def travelled(self, given: Sequence[Shards]) -> list[Tensor]:
        """A result that moves in a ring: sums are passed on, and each device adds its part."""
        axis = self.form.axes[self.form.result]
        assert axis is not None
        total = None
        for multiply in self.products(given):
            total = multiply(total and self.passed_on(total, axis))
        return self.raised(total or ())

    def reduced(self, given: Sequence[Shards]) -> list[Tensor]:
        """A result that moves in a stream: each panel's parts are reduced to its owner."""
        axis = self.form.axes[self.form.result]
        assert axis is not None
        places = self.form.mesh.positions((axis,))
        mine: list[Tensor] = []
        for step, multiply in enumerate(self.products(given)):
            sums = self.comm.reduce(*self.noted("reduce", axis, multiply(None)), step)
            mine = [
                new if p == step else old
                for new, old, p in zip(sums, mine or sums, places, strict=True)
            ]
            del sums  # before the next panels arrive
        return self.raised(mine)


def _write(slots: Shards, parts: Shards) -> None:
    for slot, part in zip(slots, parts, strict=True):
        slot.copy_(part)


def run(
    form: Form, given: Sequence[Shards], by: record.Context | None, backward: bool
) -> list[Tensor]:
    """The product of the two given tensors, on the shards held here."""
    moves = form.axes[form.result] is not None
    has = form.factor in form.letters[form.result]
    way = ("travelled" if form.ring else "reduced") if moves else ("sliced" if has else "summed")

    def computed() -> list[Tensor]:
        out = getattr(_Run(form, by, backward), way)(given)
        dtype = given[0][0].dtype
        return out if out[0].dtype == dtype else [x.to(dtype) for x in out]

    return kept(computed)


class Panels(torch.autograd.Function):
    """A panel product on all shards of this process; its derivatives are panel products too."""

    @staticmethod
    def forward(form: Form, by: Any, backward: bool, *shards: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        return tuple(run(form, _halves(shards), by, backward))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: D102
        ctx.form, ctx.by = inputs[0], inputs[1]
        ctx.save_for_backward(*inputs[3:])
        ctx.save_for_forward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # noqa: D102
        form = ctx.form
        first, second = form.operands
        a, b = _halves(ctx.saved_tensors)
        needs = _halves(ctx.needs_input_grad[3:])
        found: list[Any] = []
        for number, other, values, need in (
            (first, second, b, needs[0]),
            (second, first, a, needs[1]),
        ):
            if not any(need):
                found += [None] * len(grads)
                continue
            known = {other: [x.conj().resolve_conj() for x in values], form.result: grads}
            to = replace(form, result=number)
            found += multiplied(to, [known[i] for i in to.operands], ctx.by, True)
        return None, None, None, *found

    @staticmethod
    def jvp(ctx: Any, _form: Any, _by: Any, _backward: Any, *tangents: Tensor) -> Any:  # noqa: D102
        (a, b), (da, db) = _halves(ctx.saved_tensors), _halves(tangents)
        left = multiplied(ctx.form, [da, b], None)
        right = multiplied(ctx.form, [a, db], None)
        return tuple(x + y for x, y in zip(left, right, strict=True))

    @staticmethod
    def vmap(info: Any, dims: Any, form: Form, by: Any, backward: bool, *shards: Tensor) -> Any:  # noqa: D102
        sides = []
        mapped = [False] * 3
        for number, xs, at in zip(form.operands, _halves(shards), _halves(dims[3:]), strict=True):
            mapped[number] = any(d is not None for d in at)
            sides.append(in_front(xs, at, info.batch_size) if mapped[number] else xs)
        mapped[form.result] = True
        out = multiplied(form.mapped(mapped), sides, by, backward)
        return tuple(out), (0,) * len(out)


def _halves(both: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    half = len(both) // 2
    return both[:half], both[half:]


# the C apply: no signature binding
_apply = super(torch.autograd.Function, Panels).apply  # pyright: ignore
_functorch = torch._C._are_functorch_transforms_active
_forward_ad = torch.autograd.forward_ad


def multiplied(
    form: Form, given: Sequence[Shards], by: record.Context | None, backward: bool = False
) -> Sequence[Tensor]:
    """A differentiable panel product."""
    shards = [*given[0], *given[1]]
    if _functorch():
        return Panels.apply(form, by, backward, *shards)
    if (
        torch.is_grad_enabled() and any(s.requires_grad for s in shards)
    ) or _forward_ad._current_level >= 0:
        return _apply(form, by, backward, *shards)
    return run(form, given, by, backward)
