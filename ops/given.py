"""What a function was given: one TypeError where an argument is not on a mesh."""

from __future__ import annotations

from typing import Any

from ..layouts.sharded import ShardedTensor


def check_sharded(function: str, **arguments: Any) -> None:
    """Raise unless every argument is a ShardedTensor.

    Args:
        function: its name, for the error.
        **arguments: by the names of its parameters.

    Raises:
        TypeError: naming the function and the argument.
    """
    for name, x in arguments.items():
        if not isinstance(x, ShardedTensor):
            raise TypeError(
                f"{function}: {name} must be a ShardedTensor, got {type(x).__name__}; "
                f"place it on a mesh: sw.shard({name}, mesh, layout)"
            )


def check_operands(function: str, operands: Any) -> None:
    """Raise unless one of the operands is a ShardedTensor; plain tensors beside it are constants.

    Raises:
        TypeError: naming the function and what was given.
    """
    if any(isinstance(x, ShardedTensor) for x in operands):
        return
    given = ", ".join(type(x).__name__ for x in operands) or "no operands"
    raise TypeError(
        f"{function}: an operand must be a ShardedTensor, got {given}; "
        "place one on a mesh: sw.shard(x, mesh, layout)"
    )
