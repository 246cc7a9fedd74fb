"""From [optimizer], [precision], [zero] and [memory] to one transform.

From the inside out:

    the optimizer, with its schedule; stochastic rounding; master copies; the mean of parameters
    offload
    clipping by value, then by the global norm
    skipped steps, or loss scaling
    ZeRO

Clipping and skipping read all gradients, so they stay outside of offload, which then moves a group
of parameters at a time. ZeRO is outermost: everything inside works on a device's part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import optree
import torch

from .. import optim
from ..optim import Transform, schedules
from .config import Config, OptimizerTable, Part
from .hyper import FACTORIES, RENAMED, takes

IS_DECAYED = ("w_", "embed")  # roles that decay: matrices and tables; no gains, biases, positions
NARROW = ("bfloat16", "float16")  # in which a running mean stands still
SKIPS = 10  # steps in a row that may be skipped, where the file does not say

Function = schedules.Function


def build_optimizer(config: Config, declaration: Any) -> Transform:
    """The whole transform of a file.

    Args:
        config: of the run.
        declaration: of the model's parameters; it says which dims of a matrix are contracted.
    """
    table, precision = config.optimizer, config.precision
    made = _core(config, declaration)
    if precision.master:
        made = optim.master(made)
    if table.ema is not None:
        dtype = torch.float32 if precision.param in NARROW else None
        made = optim.ema(made, table.ema, dtype=dtype)
    if config.memory.optimizer != "device":
        made = optim.offload(made, config.memory.optimizer)
    clips = []
    if table.clip_value is not None:
        clips.append(optim.clip_by_value(table.clip_value))
    if table.clip_norm is not None:
        clips.append(optim.clip_by_global_norm(table.clip_norm))
    if clips:
        made = optim.chain(*clips, made)
    if table.loss_scale is not None:
        scale = table.loss_scale
        made = optim.loss_scale(made, initial=scale.initial, dynamic=scale.is_dynamic)
    elif skips(config):
        # A compiled step cannot read a count: there the run reads it together with the losses.
        limit = skips(config) if config.run.jit == "false" else None
        made = optim.skip_nonfinite(made, limit=limit)
    return optim.zero(made, config.zero.stage, axis=config.zero.axes)


def skips(config: Config) -> int:
    """How many steps in a row may be skipped; 0: none is, and a bad loss ends the run.

    A state on disk is not kept twice, so there a step cannot be taken back.
    """
    asked = config.optimizer.skip_nonfinite
    if asked is not None:
        return asked
    return 0 if config.memory.optimizer == "disk" else SKIPS


def _core(config: Config, declaration: Any) -> Transform:
    """The optimizer itself."""
    table, hyper = config.optimizer, dict(config.optimizer.hyper)
    rate = schedule(table, config.run.steps)
    if table.name != "muon":
        return _made(table.name, rate, hyper, config)
    beside = {key: hyper[key] for key in ("weight_decay",) if key in hyper}
    matrices = _made("muon", rate, hyper, config, fold=_folds(declaration))
    return optim.multi({"blocks.w_*": matrices, "*": _made("adamw", rate, beside, config)})


def _made(
    name: str, rate: Function, hyper: Mapping[str, Any], config: Config, **given: Any
) -> Transform:
    """One of the optimizers, with the masks that it takes."""
    make = FACTORIES[name]
    back = {key: keyword for keyword, key in RENAMED.items()}
    found = {back.get(key, key): value for key, value in hyper.items()}
    for key in ("state_dtype", "dtype"):
        if key in found:
            found[key] = getattr(torch, found[key])
    masks = {"mask": _is_decayed, "stacked": "blocks.*"}
    found |= {key: mask for key, mask in masks.items() if takes(make, key)}
    made = make(rate, **found, **given)
    if config.precision.rounding == "stochastic":
        made = optim.stochastic(made, seed=config.run.seed)
    return made


def _is_decayed(path: str, _leaf: Any) -> bool:
    return path.split(".")[-1].startswith(IS_DECAYED)


def _folds(declaration: Any) -> Callable[[str, Any], tuple[int, int]]:
    """Stacked and contracted dims of a parameter: batch and rows of its matrix."""
    paths, params, _ = optree.tree_flatten_with_path(declaration)
    known = {
        ".".join(map(str, path)): (len(p.stacked), len(p.dims.split("->")[0].split()))
        for path, p in zip(paths, params, strict=True)
    }
    return lambda path, _leaf: known[path]


def schedule(table: OptimizerTable, steps: int) -> Function:
    """The learning rate as a function of the step."""
    end, fall = table.end or 0.0, table.decay or steps
    if table.schedule == "cosine":
        last = max(fall, table.warmup)  # a run that is cut short, to try it, only rises
        return schedules.warmup_cosine(table.lr, warmup=table.warmup, steps=last, end=end)
    if table.schedule == "wsd":
        return schedules.wsd(table.lr, warmup=table.warmup, steps=steps, decay=fall, end=end)
    if table.schedule == "join":
        return schedules.warm(_joined(table.parts, steps), table.warmup)
    return schedules.warm(_plain(table, fall), table.warmup)


def _plain(table: OptimizerTable | Part, steps: int) -> Function:
    """A schedule that counts from its own start and ends after `steps`."""
    lr, end = table.lr, table.end or 0.0
    factors = {int(at): factor for at, factor in (table.factors or {}).items()}
    make: Mapping[str, Callable[[], Function]] = {
        "constant": lambda: schedules.constant(lr),
        "linear": lambda: schedules.linear(lr, end, steps),
        "cosine": lambda: schedules.cosine(lr, steps, end=end),
        "polynomial": lambda: schedules.polynomial(lr, end, steps, power=table.power or 1.0),
        "piecewise": lambda: schedules.piecewise(lr, factors),
    }
    return make[table.schedule]()


def _joined(parts: tuple[Part, ...], steps: int) -> Function:
    ends: list[int] = []
    made: list[Function] = []
    for part in parts:
        begin = ends[-1] if ends else 0
        length = part.steps or max(1, steps - begin)
        made.append(_plain(part, length))
        ends.append(begin + length)
    return schedules.join(made, ends[:-1])
