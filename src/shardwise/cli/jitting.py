"""`run.jit`: whether the step of a run is compiled, and what a compiled step cannot have."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..meshlib.mesh import Mesh
from .reader import ConfigError

if TYPE_CHECKING:
    from ..ops.transforms.jit import Jitted
    from .config import Config
    from .step import Step

# Keys that stand against a compiled step, the values that do not, and why.
_DATA = "depends on a count that is read while the step runs"
_MOVES = "moves tensors between memories while the step runs"
NEEDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("memory.optimizer", lambda where: where == "device", _MOVES),
    ("memory.parameters", lambda where: where == "device", _MOVES),
    ("memory.activations", lambda where: where == "device", _MOVES),
    ("precision.rounding", lambda how: how == "nearest", _DATA),
    ("optimizer.name", lambda name: name != "galore", _DATA),
    ("run.check", lambda check: not check, "compares collectives while the step runs"),
)


OPTIONS: dict[str, Any] = {}  # of `jit`, for all runs


def against(config: Config) -> list[str]:
    """What of a file stands against a compiled step, a line each."""
    found = []
    for name, fits, why in NEEDS:
        table, key = name.split(".")
        value = getattr(getattr(config, table), key)
        if not fits(value):
            shown = str(value).lower() if isinstance(value, bool) else f'"{value}"'
            found.append(f"{name} = {shown} {why}")
    return found


def refused(config: Config) -> list[str]:
    """Problems of a file that asks for a compiled step, or for what only such a step has."""
    found = against(config) if config.run.jit == "true" else []
    if config.run.jit == "false" and config.memory.budget is not None:
        return ["memory.budget: only a compiled step keeps to it: set run.jit = true"]
    return [f"run.jit: a compiled step is not for this file: {text}" for text in found]


def is_wanted(config: Config, mesh: Mesh) -> tuple[bool, str]:
    """Whether the step is compiled, and a line that says so.

    Raises:
        ConfigError: there is a budget of memory, and the step is not compiled.
    """
    reasons = against(config)
    is_gpu = mesh.device.type == "cuda"
    wanted = config.run.jit == "true" or (config.run.jit == "auto" and is_gpu and not reasons)
    if config.memory.budget is not None and not wanted:
        why = "; ".join(reasons) or 'run.jit = "auto" compiles on a GPU only'
        raise ConfigError([f"memory.budget: only a compiled step keeps to it: {why}"])
    if wanted:
        return True, "the step is compiled"
    told = f": {'; '.join(reasons)}" if reasons and config.run.jit == "auto" and is_gpu else ""
    return False, f"the step runs op by op{told}"


def compiled(step: Step, budget: str | None) -> Jitted:
    """The step compiled, parameters and state given up to it.

    Args:
        step: (params, state, batch, key) -> (params, state, loss).
        budget: bytes per device for the peak of the step, as "70GiB"; None: no value is computed
            twice to save memory.
    """
    from ..ops.transforms.jit import jit  # the file is read without it

    options = {} if budget is None else {"memory_budget": budget}
    return jit(step, donate_argnums=(0, 1), options={**OPTIONS, **options})


def told(step: Jitted, budget: str | None) -> str:
    """What the latest program took to compile, and what was decided to keep to a budget."""
    text = f"compiled the step in {step.compile_seconds:.1f} s"
    if len(step.programs) > 1:
        text += f", program {len(step.programs)}: the types of its arguments have changed"
    if budget is not None:
        again = sum("recomputed" in node.meta for node in step.graph.module.graph.nodes)
        how = f"{again:,} ops run twice" if again else "nothing is computed twice"
        text += f"; to stay within {budget} a device {how}"
    return text
