"""AdamW in one pass over its four lists: a launch on a GPU, torch's own loop on a CPU.

It is for eager steps. Under a tracer plain operations are better, since the compiler fuses them
with what comes before.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import adamw as kernels
from ..layouts.sharded import Type
from .many import Many

# Of stochastic rounding: the device -> the key of each tensor, and where each lies globally.
Draw = Callable[[torch.device], tuple[Tensor, Sequence[int]] | None]
Results = tuple[Many, Many, Many]
ON_GPU = (torch.float32, torch.bfloat16)
WHOLE = torch.contiguous_format
VECTOR = 16  # float32 numbers of the widest registers; threads' shares are multiples of it
_KEYS = torch._C._TorchDispatchModeKey
_TRACERS = (_KEYS.PROXY, _KEYS.FAKE, _KEYS.FUNCTIONAL)
_ORDINARY = (Tensor, torch.nn.Parameter)


def corrections(s: Any) -> tuple[Any, Any]:
    """What the means must be divided by, since they started at zero; s.step counts from 0."""
    count = s.step + 1
    return 1 - s.b1**count, 1 - s.b2**count


def one_pass(
    s: Any, decay: Any, g: Many, mu: Many, nu: Many, p: Many, draw: Draw | None = None
) -> Results | None:
    """New parameters and means; None where no one pass serves: it would trace, or cannot compute.

    Args:
        s: scalars b1, b2, eps, lr and step, as `elementwise` gives them.
        decay: of the parameters, 0.0 for none.
        g: gradients.
        mu: means of gradients.
        nu: means of their squares.
        p: parameters; written over, as the means are, where all three may be.
        draw: for parameters that are rounded stochastically.

    On a GPU sums are float32 and rounded once: for means in bfloat16 that is what `stepped` does
    too. On a CPU float32 alone is torch's, which differs from ours by a rounding in its sums.
    """
    lists = (p, g, mu, nu)
    if _is_traced() or not all(type(t) in _ORDINARY for each in lists for t in each.each):
        return None
    kind = p.each[0].device.type
    if kind == "cuda" and all(each.dtype in ON_GPU for each in lists):
        whole = all(t.is_contiguous() for each in lists for t in each.each)
        return _on_gpu(s, decay, lists, draw) if whole else None
    if kind == "cpu" and draw is None and all(each.dtype is torch.float32 for each in lists):
        return _on_cpu(s, decay, lists)
    return None


def _is_traced() -> bool:
    """Whether operations are written down or transformed. Modes that only watch do not count."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore
        or any(torch._C._get_dispatch_mode(key) is not None for key in _TRACERS)
    )


def _written(lists: Sequence[Many], copied: bool) -> Results:
    """Where results go: over the operands, or new tensors, copies where the pass is in place."""
    p, _, mu, nu = lists
    if p.free and mu.free and nu.free:
        return p, mu, nu
    made = [
        Many(
            [
                t.clone(memory_format=WHOLE) if copied else torch.empty_like(t, memory_format=WHOLE)
                for t in each.each
            ],
            True,
        )
        for each in (p, mu, nu)
    ]
    return made[0], made[1], made[2]


def _on_cpu(s: Any, decay: Any, lists: Sequence[Many]) -> Results:
    new = _written(lists, True)
    columns = [new[0].each, lists[1].each, new[1].each, new[2].each]
    parts = [_Vectors(column) for column in columns]
    each = [part.each for part in parts]
    count = torch.tensor(float(s.step + 1))
    torch._fused_adamw_(  # pyright: ignore
        *each, [], [count] * len(each[0]), lr=float(s.lr), beta1=float(s.b1), beta2=float(s.b2),
        weight_decay=float(decay), eps=float(s.eps), amsgrad=False, maximize=False,
    )  # fmt: skip
    for k in (0, 2, 3):
        parts[k].write_back()
    return new


class _Vectors:
    """A list as flat tensors of whole vectors: what is left over of each comes last, together.

    Torch's loop rounds the elements behind the last whole vector otherwise than those before it. A
    tensor that is cut in other places, on another mesh, would give other bits.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.each: list[Tensor] = []
        self.to: list[Tensor] = []  # what results are copied to, where they are not in place,
        self.of: list[Tensor] = []  # and from, in this order
        tails: list[Tensor] = []
        for t in tensors:
            size = t.numel()
            if t.is_contiguous() and not size % VECTOR:
                self.each.append(t)
                continue
            flat = t.reshape(-1)
            if not t.is_contiguous():
                self.to.append(t)
                self.of.append(flat.view(t.shape))
            cut = size - size % VECTOR
            if cut:
                self.each.append(flat[:cut])
            if cut < size:
                tails.append(flat[cut:] if cut else flat)
        if tails:
            sizes = [t.numel() for t in tails]
            padding = -sum(sizes) % VECTOR
            rest = torch.cat([*tails, tails[0].new_zeros(padding)])
            self.each.append(rest)
            self.to = tails + self.to
            self.of = [*rest.split([*sizes, padding])[:-1], *self.of]

    def write_back(self) -> None:
        """Copy results from where they were computed to where they belong."""
        for to, of in zip(self.to, self.of, strict=True):
            to.copy_(of)


def _on_gpu(s: Any, decay: Any, lists: Sequence[Many], draw: Draw | None) -> Results | None:
    launcher = _launcher()
    if launcher is None or any(isinstance(x, Tensor) for x in (s.b1, s.b2, s.eps)):
        return None
    device = lists[0].each[0].device
    keys, places = None, ()
    if draw is not None:
        found = draw(device)
        if found is None:
            return None
        keys, places = found
    first, second = corrections(s)
    values = [
        x if isinstance(x, Tensor) else torch.full((), x, dtype=torch.float64, device=device)
        for x in (second**0.5, -s.lr / first, 1 - s.lr * decay)
    ]
    factors = torch.stack(values).to(torch.float32)
    new = _written(lists, False)
    launcher.run(
        [each.each for each in lists], [each.each for each in new],
        factors, s.b1, s.b2, s.eps, keys, places,
    )  # fmt: skip
    return new


@functools.cache
def _launcher() -> Any:
    try:
        return importlib.import_module("..kernels.adamw_triton", __package__)
    except ImportError:
        return None


@functools.lru_cache(maxsize=4096)
def places(kind: Type) -> tuple[tuple[int, ...] | None, ...]:
    """Where each shard held here lies in its global tensor, as `kernels.numbers` writes it."""
    found = []
    for coord in kind.mesh.held:
        index = kind.layout.index(kind.shape, kind.mesh, coord)
        start = tuple(part.start for part in index)
        found.append(kernels.numbers(tuple(kind.shape), start, tuple(kind.local_shape)))
    return tuple(found)


@functools.lru_cache(maxsize=64)
def names(paths: tuple[str, ...], device: torch.device) -> Tensor:
    """The words of leaves' names, on a device."""
    return torch.tensor([kernels.name_words(path) for path in paths], device=device)


@functools.lru_cache(maxsize=64)
def key_words(words: tuple[int, int], device: torch.device) -> Tensor:
    """A key on a device."""
    return torch.tensor(words, device=device)
