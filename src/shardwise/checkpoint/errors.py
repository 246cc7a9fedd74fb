"""The error class of checkpoints: which file, which tensor, what was expected and what found."""

from __future__ import annotations

from typing import Any


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or must not be read.

    Attributes:
        file: the file or directory at fault, "" where none is.
        tensor: the tree path at fault, "" where none is.
        expected: what should be there; None where nothing was compared.
        found: what is there.
        is_damage: whether a checkpoint is not as it was written, or cannot be read.

    >>> print(CheckpointError("wrong size", file="a.safetensors", expected=8, found=7))
    a.safetensors: wrong size: expected 8, found 7
    """

    def __init__(
        self,
        problem: str,
        *,
        file: Any = "",
        tensor: str = "",
        expected: Any = None,
        found: Any = None,
    ) -> None:
        self.file = str(file)
        self.tensor = tensor
        self.expected = expected
        self.found = found
        self.is_damage = False
        where = [self.file] if self.file else []
        where += [f"tensor {tensor!r}"] if tensor else []
        values = "" if expected is None else f": expected {expected}, found {found}"
        super().__init__(": ".join([*where, problem]) + values)


def from_os(error: OSError, doing: str, file: Any, tensor: str = "") -> CheckpointError:
    """The CheckpointError of a failed system call."""
    reason = error.strerror or str(error)
    return CheckpointError(f"{doing}: {reason}", file=file, tensor=tensor)
