"""The TOML file of a run: one frozen dataclass a table, one field a key.

Types, checks and defaults are in the annotations; `reader` does the reading and words the problems.
A new key is a new field here and nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from ..layouts.strategy import OPTIONS
from .hyper import OPTIMIZERS, SCHEDULES
from .jitting import refused
from .reader import Check, ConfigError, Known, Rest, Rules, read_toml
from .values import (
    OFF,
    AxisName,
    AxisNames,
    AxisSize,
    Bytes,
    Count,
    Device,
    Dtype,
    Fraction,
    LayoutText,
    Natural,
    NotNegative,
    Positive,
    Seed,
    Switch,
)

__all__ = ["Config", "ConfigError", "read_config"]


@dataclass(frozen=True)
class LossScale:
    """A factor of the loss: a number, or "dynamic" for one that moves."""

    initial: float = 2.0**15
    is_dynamic: bool = False

    PARSES = (str, int, float)

    @staticmethod
    def parse(value: str | float) -> LossScale:
        """Read "dynamic" or a number."""
        if value == "dynamic":
            return LossScale(is_dynamic=True)
        if isinstance(value, str) or not 0 < value < float("inf"):
            raise ValueError(f'expected "dynamic" or a number above 0, found {json.dumps(value)}')
        return LossScale(float(value))


@dataclass(frozen=True)
class Preset:
    """A strategy preset by name, with axes and options where they are not the preset's own.

    >>> Preset.parse("tensor_2d(row, col)")
    Preset(name='tensor_2d', axes=('row', 'col'), options=())
    >>> Preset.parse("tensor_1d(kv=replicate)").options
    (('kv', 'replicate'),)
    """

    name: Annotated[str, Known("presets")]
    axes: tuple[str, ...] = ()
    options: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def parse(text: str) -> Preset:
        """Read "name" or "name(axis, ..., option=value)"."""
        found = re.fullmatch(r"\s*(\w+)\s*(?:\(([\w\s,=]*)\))?\s*", text)
        inside = found[2] if found else None
        parts = () if inside is None else tuple(part.strip() for part in inside.split(","))
        axes = tuple(part for part in parts if "=" not in part)
        given = [part.split("=") for part in parts if "=" in part]
        words = [*axes, *(word.strip() for pair in given for word in pair)]
        if found is None or any(len(pair) != 2 for pair in given):
            words = [""]
        if not all(word.isidentifier() for word in words):
            raise ValueError(f"{text!r} is no preset; write name or name(axis, ..., option=value)")
        options = tuple((key.strip(), value.strip()) for key, value in given)
        return Preset(found[1], axes, options)  # pyright: ignore


@dataclass(frozen=True)
class RunTable:
    """[run]: how long, where, how often to report, whether compiled; `<file>`: its name's stem."""

    steps: Count
    seed: Seed = 0
    out: str = "runs/<file>"
    log_every: Count = 10
    eval_every: Count = 200
    device: Device = "auto"
    check: bool = False
    jit: Annotated[Switch, Check('true, false or "auto"', lambda _: True)] = OFF


@dataclass(frozen=True)
class MeshTable:
    """[mesh]: axis name to size, major to minor."""

    axes: Annotated[
        Mapping[AxisName, AxisSize],
        Rest(),
        Check(
            "one axis or more, at most one of them -1",
            lambda axes: axes and list(axes.values()).count(-1) < 2,
        ),
    ]


@dataclass(frozen=True)
class StrategyTable:
    """[strategy]: presets, joined left to right; rows that replace theirs; options.

    An option that is not given is the presets' own.
    """

    preset: tuple[Preset, ...] = ()
    save: Annotated[str, Known(OPTIONS["save"])] | None = None
    matmul: Annotated[str, Known(OPTIONS["matmul"])] | None = None
    attention: Annotated[str, Known(OPTIONS["attention"])] | None = None
    order: Annotated[str, Known(OPTIONS["order"])] | None = None
    tied: Annotated[str, Known(OPTIONS["tied"])] | None = None
    recompute: Annotated[str, Known(OPTIONS["recompute"])] | None = None
    rest: Mapping[str, LayoutText] = field(default_factory=dict)
    compute: Mapping[str, LayoutText] = field(default_factory=dict)
    activations: Mapping[str, LayoutText] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, str]:
        """Options that were given, by name: what `Strategy.replace` takes."""
        given = ((name, getattr(self, name, None)) for name in OPTIONS)
        return {name: value for name, value in given if value is not None}


@dataclass(frozen=True)
class PrecisionTable:
    """[precision]: dtypes of parameters, of arithmetic, of sums over devices.

    `master` keeps float32 copies that the optimizer updates; `rounding` says how a new bfloat16
    parameter is rounded where there is no copy. With `fp8` wide layers of the blocks multiply in
    8 bits.
    """

    param: Dtype = "float32"
    compute: Dtype = "float32"
    reduce: Dtype = "float32"
    master: bool = False
    rounding: Literal["nearest", "stochastic"] = "nearest"
    fp8: bool = False

    def __post_init__(self) -> None:
        if self.rounding == "stochastic" and self.param != "bfloat16":
            raise ValueError(f'rounding = "stochastic" is for param = "bfloat16", not {self.param}')
        if self.rounding == "stochastic" and self.master:
            raise ValueError(
                'master = true rounds its copies, which lose nothing: drop rounding = "stochastic"'
            )


@dataclass(frozen=True)
class ModelTable:
    """[model]: a family with fields of its config, a named size of it, or a folder to load.

    `preset` is a size of the family, over which the fields go; `load` is a Hugging Face folder,
    whose config says the rest; `pad` rounds dims up to multiples.
    """

    family: Annotated[str, Known("families")] | None = None
    preset: str | None = None
    load: Path | None = None
    pad: Mapping[str, Count] = field(default_factory=dict)
    fields: Annotated[Mapping[str, Any], Rest(schema="family")] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.family is None) == (self.load is None):
            raise ValueError("name a family to start from nothing, or a folder to load, not both")
        if self.preset is not None and self.family is None:
            raise ValueError("preset is a size of a family: name the family")


@dataclass(frozen=True)
class DataTable:
    """[data]: the text, and how it is cut.

    `text` is relative to the file (in an override: to the shell); `seq` is in tokens; `batch`
    in sequences, over all devices; `split` is the part for training.
    """

    text: Path
    seq: Count
    batch: Count
    tokenizer: Literal["bytes"] = "bytes"
    micro_batches: Count = 1
    split: Fraction = 0.9


@dataclass(frozen=True)
class Part:
    """One part of a joined schedule: `steps` long, but for the last; counts from its own start."""

    lr: Positive
    steps: Count | None = None
    schedule: Annotated[str, Known("schedules")] = "constant"
    end: NotNegative | None = None
    power: Positive | None = None
    factors: Mapping[str, Positive] | None = None

    def __post_init__(self) -> None:
        if self.schedule in ("wsd", "join"):
            raise ValueError(f"a part is no {self.schedule}: write its parts one after another")
        _check_schedule(self, ("end", "power", "factors"))


@dataclass(frozen=True)
class OptimizerTable:
    """[optimizer]: a transformation and its own keys, the rate by step, and what goes around it.

    `warmup` and `decay` are in steps. The rate falls over `decay` steps from the beginning (without
    it until the end of the run), for "wsd" over the last ones; to `end`. `skip_nonfinite = 0` stops
    at the first loss that is not finite.
    """

    lr: Positive
    name: Annotated[str, Known("optimizers")] = "adamw"
    schedule: Annotated[str, Known("schedules")] = "cosine"
    warmup: Natural = 0
    decay: Count | None = None
    end: NotNegative | None = None
    power: Positive | None = None
    factors: Mapping[str, Positive] | None = None
    parts: tuple[Part, ...] = ()
    clip_norm: Positive | None = None
    clip_value: Positive | None = None
    ema: Fraction | None = None
    skip_nonfinite: Natural | None = None
    loss_scale: (
        Annotated[LossScale, Check('"dynamic" or a number above 0', lambda _: True)] | None
    ) = None
    hyper: Annotated[Mapping[str, Any], Rest(schema="name")] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_schedule(self, ("decay", "end", "power", "factors", "parts"))
        if self.schedule == "wsd" and self.decay is None:
            raise ValueError('schedule = "wsd" needs decay, the number of steps of its fall')
        if self.schedule == "join":
            if len(self.parts) < 2:
                raise ValueError('schedule = "join" needs two parts or more')
            if any(part.steps is None for part in self.parts[:-1]):
                raise ValueError("only the last part may go without steps")
        if self.loss_scale is not None and self.skip_nonfinite:
            raise ValueError("loss_scale skips steps by itself: drop skip_nonfinite")


def _check_schedule(table: Any, keys: Sequence[str]) -> None:
    """Refuse keys that the schedule does not take."""
    takes = SCHEDULES.get(table.schedule, keys)  # an unknown name is told by itself
    for key in keys:
        if getattr(table, key) not in (None, ()) and key not in takes:
            owners = " or ".join(name for name, own in SCHEDULES.items() if key in own)
            raise ValueError(f"{key} belongs to schedule {owners}, not to {table.schedule}")
    if "factors" in takes and "factors" in keys:
        factors = table.factors
        if not factors or not all(step.isdecimal() for step in factors):
            raise ValueError('schedule = "piecewise" needs factors = { <step> = <factor>, ... }')


@dataclass(frozen=True)
class ZeroTable:
    """[zero]: the stage, and the axis, or axes as in "data/depth", that what it cuts is cut over.

    Stage 3 puts the preset `fsdp` in the place of `data`.
    """

    stage: Annotated[int, Check("0, 1, 2 or 3", lambda n: n in (0, 1, 2, 3))] = 0
    axis: AxisNames = "data"

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes."""
        return tuple(self.axis.split("/"))


@dataclass(frozen=True)
class MemoryTable:
    """[memory]: where things lie while nothing reads them.

    `optimizer` is its state; `parameters` come to the device layer by layer, and their optimizer
    runs on the host; `activations` are what a layer saves for its backward; `budget` is for the
    peak of a compiled step, per device.
    """

    optimizer: Literal["device", "host", "disk"] = "device"
    parameters: Literal["device", "host"] = "device"
    activations: Literal["device", "host"] = "device"
    budget: Bytes | None = None


@dataclass(frozen=True)
class CheckpointTable:
    """[checkpoint]: `path` is "checkpoints" in the run's folder unless given; `every` in steps."""

    path: str | None = None
    every: Count = 200
    keep: Count = 3
    async_: bool = True


@dataclass(frozen=True)
class Config:
    """A whole file, one field a table; without [checkpoint] nothing is saved."""

    run: RunTable
    mesh: MeshTable
    strategy: StrategyTable
    precision: PrecisionTable
    model: ModelTable
    data: DataTable
    optimizer: OptimizerTable
    zero: ZeroTable
    memory: MemoryTable
    checkpoint: CheckpointTable | None = None


# Tables and keys of the file format that this version cannot honour.
LATER = frozenset({"pipeline", "hardware", "strategy.layer"})

# What must hold between keys: the keys, the condition, what to say (the first key is blamed).
TOGETHER: tuple[tuple[str, str, Callable[[Any, Any], bool], str], ...] = (
    ("data.batch", "data.micro_batches", lambda b, m: b % m == 0, "{} is no multiple of {}, {}"),
    (
        "memory.optimizer",
        "optimizer.skip_nonfinite",
        lambda memory, limit: memory != "disk" or not limit,
        "a state on {} cannot take a step back: {} must be 0, not {}",
    ),
    (
        "memory.optimizer",
        "optimizer.loss_scale",
        lambda memory, _: memory != "disk",
        "a state on {} cannot take a step back, which {} needs",
    ),
)


def read_config(
    path: str | Path,
    *,
    families: Mapping[str, type],
    presets: Collection[str],
    derived: Collection[str] = (),
    overrides: Sequence[str] = (),
) -> Config:
    """Read and check a TOML file.

    Args:
        path: the file.
        families: model family to its config dataclass; the keys of [model] are its fields.
        presets: names of the strategy presets that exist.
        derived: fields of a family's config that need not be in the file, since the data decides
            them.
        overrides: "table.key=value" each, put over the file in order. The value is TOML, or else a
            string; a value that is a table replaces the whole table.

    Raises:
        ConfigError: with all problems, in the file's order.
    """
    known = {
        "families": families,
        "presets": presets,
        "optimizers": OPTIMIZERS,
        "schedules": tuple(SCHEDULES),
    }
    config = read_toml(Path(path), Config, Rules(known, derived, LATER, TOGETHER), overrides)
    problems = [f"{path}: {text}" for text in _between(config)]
    if problems:
        raise ConfigError(problems)
    return config


def _between(config: Config) -> list[str]:
    """What does not hold between several tables, each of which is right by itself."""
    axes, table, found = config.mesh.axes, config.optimizer, refused(config)
    missing = [axis for axis in config.zero.axes if axis not in axes]
    if config.zero.stage and missing:
        found.append(f"zero.axis: no axis {missing[0]!r} in [mesh]; its axes: {', '.join(axes)}")
    if table.schedule == "wsd" and table.warmup + (table.decay or 0) > config.run.steps:
        found.append(
            f"optimizer.decay: optimizer.warmup, {table.warmup}, and decay, {table.decay}, are "
            f"more than run.steps, {config.run.steps}"
        )
    return found
