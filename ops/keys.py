"""Random keys: two words of 32 bits, or, inside a compiled step, the tensor of them.

A key that is an argument of a `jit`ted function opens into an int64 tensor, so it is an input of
the program and one program serves all keys; keys made of it are computed in the program.
"""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor

from ..meshlib import philox
from ..meshlib.traced import CAPTURES


class Key:
    """A random key of 64 bits; a leaf of trees, kept in checkpoints.

    Attributes:
        data: the words as an int64 tensor [2], where they are data of a program; else None.
    """

    __slots__ = ("_words", "data")

    def __init__(self, words: tuple[int, int] | Tensor) -> None:
        self.data = words if isinstance(words, Tensor) else None
        self._words = None if isinstance(words, Tensor) else words

    @property
    def words(self) -> tuple[int, int]:
        """The two words as numbers, low first.

        Raises:
            TypeError: inside `jit`, where the program does not depend on them.
        """
        if self._words is None:
            assert self.data is not None
            if is_fake(self.data):
                raise TypeError("inside jit a key is data: draw from it, split it, or fold in")
            low, high = self.data.tolist()
            self._words, self.data = (low, high), None
        return self._words

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self.words == other.words

    def __hash__(self) -> int:
        return hash(self.words)

    def __repr__(self) -> str:
        return f"Key(words={'data' if self._words is None else self._words})"

    def __str__(self) -> str:
        return f"key({self.words[0]:08x}{self.words[1]:08x})"


def _open(key: Key) -> tuple[tuple[Tensor], None]:
    """A key's tensor: memory of its own, which a program may take."""
    if key.data is not None:
        return (key.data.clone(),), None
    opened = torch.tensor(key.words)
    opened.is_key = True  # pyright: ignore[reportAttributeAccessIssue]
    return (opened,), None


def _closed(_: None, words: Any) -> Key:
    """The key of a tensor; one that a program on the CPU gave back is numbers again."""
    (opened,) = words
    is_known = type(opened) is Tensor and opened.device.type == "cpu"
    low_high = opened.tolist() if is_known else None
    return Key(opened if low_high is None else (low_high[0], low_high[1]))


optree.register_pytree_node(Key, _open, _closed, namespace="shardwise")  # pyright: ignore


def beside(leaves: list[Any]) -> list[Any]:
    """Leaves of arguments, tensors of keys on the GPU where the other tensors are."""
    integers = (i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.dtype == torch.int64)
    opened = [i for i in integers if getattr(leaves[i], "is_key", False)]
    device = next((x.device for x in leaves if isinstance(x, Tensor) and x.is_cuda), None)
    if opened and device is not None:
        leaves = list(leaves)
        for i in opened:
            leaves[i] = sent(leaves[i], device)
    return leaves


def is_fake(x: Tensor) -> bool:
    """Whether a program is being written down, in which x has no numbers."""
    return isinstance(x, torch._subclasses.FakeTensor)


def sent(key: Tensor, device: torch.device) -> Tensor:
    """A key's tensor on a device, without waiting for what the device still has to do."""
    if device.type != "cuda" or key.is_cuda or is_fake(key):
        return key.to(device)
    return key.pin_memory().to(device, non_blocking=True)


def tensor_of(key: Key, device: torch.device) -> Tensor:
    """The key's words on a device."""
    return sent(torch.tensor(key.words) if key.data is None else key.data, device)


def key(seed: int) -> Key:
    """The key of a seed.

    >>> from shardwise import random
    >>> random.key(0) == random.key(0), random.key(0) == random.key(1)
    (True, False)
    """
    return Key(philox.seed(seed))


def drawable(key: Key) -> Key:
    """The key, as data while `jit` writes a program down: plain torch would write in place."""
    return Key(torch.tensor(key.words)) if CAPTURES and key.data is None else key
