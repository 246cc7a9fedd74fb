"""The TOML file of a run: one frozen dataclass a table, one field a key.

Types, checks and defaults are in the annotations; `reader` does the reading and words the problems.
A new key is a new field here and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from ..layouts.notation import parse
from ..layouts.strategy import OPTIONS
from .reader import Check, ConfigError, Known, Rest, Rules, read_toml

__all__ = ["Config", "ConfigError", "read_config"]


def _is_layout(text: str) -> bool:
    parse(text)
    return True


Count = Annotated[int, Check("an integer of at least 1", lambda n: n >= 1)]
Natural = Annotated[int, Check("an integer of at least 0", lambda n: n >= 0)]
Seed = Annotated[int, Check("an integer of at least 0, below 2**63", lambda n: 0 <= n < 2**63)]
Positive = Annotated[float, Check("a number above 0", lambda x: x > 0)]
NotNegative = Annotated[float, Check("a number of at least 0", lambda x: x >= 0)]
Fraction = Annotated[float, Check("a number between 0 and 1", lambda x: 0 < x < 1)]
Momentum = Annotated[float, Check("a number of at least 0, below 1", lambda x: 0 <= x < 1)]
Device = Annotated[
    str, Check('"auto", "cpu", "cuda" or "cuda:N"', re.compile(r"auto|cpu|cuda(:\d+)?").fullmatch)
]
AxisName = Annotated[str, Check("the name of an axis", str.isidentifier)]
AxisSize = Annotated[
    int, Check("a size of at least 1, or -1 for what is left", lambda n: n >= 1 or n == -1)
]
LayoutText = Annotated[str, Check("a layout string", _is_layout)]
Dtype = Literal["float32", "float64", "bfloat16", "float16"]


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
    """[run]: how long, where, how often to report; `<file>` is the file's name without suffix."""

    steps: Count
    seed: Seed = 0
    out: str = "runs/<file>"
    log_every: Count = 10
    eval_every: Count = 200
    device: Device = "auto"
    check: bool = False


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
    """[precision]: dtypes of parameters, of arithmetic, of sums over devices."""

    param: Dtype = "float32"
    compute: Dtype = "float32"
    reduce: Dtype = "float32"


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
class OptimizerTable:
    """[optimizer]: `warmup` and `decay` in steps; without `decay` the rate falls until the end."""

    lr: Positive
    name: Literal["adamw"] = "adamw"
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Natural = 0
    decay: Count | None = None
    weight_decay: NotNegative = 0.01
    b1: Momentum = 0.9
    b2: Momentum = 0.999
    eps: Positive = 1e-8
    clip_norm: Positive | None = None


@dataclass(frozen=True)
class Config:
    """A whole file, one field a table."""

    run: RunTable
    mesh: MeshTable
    strategy: StrategyTable
    precision: PrecisionTable
    model: ModelTable
    data: DataTable
    optimizer: OptimizerTable


# Tables and keys of the file format that this version cannot honour.
LATER = frozenset(
    {
        "zero",
        "memory",
        "pipeline",
        "checkpoint",
        "hardware",
        "strategy.layer",
        "precision.master",
        "precision.rounding",
        "precision.fp8",
        "optimizer.clip_value",
        "optimizer.ema",
        "optimizer.skip_nonfinite",
        "optimizer.loss_scale",
    }
)

# What must hold between keys: the keys, the condition, what to say (the first key is blamed).
TOGETHER: tuple[tuple[str, str, Callable[[Any, Any], bool], str], ...] = (
    ("data.batch", "data.micro_batches", lambda b, m: b % m == 0, "{} is no multiple of {}, {}"),
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
    known = {"families": families, "presets": presets}
    return read_toml(Path(path), Config, Rules(known, derived, LATER, TOGETHER), overrides)
