"""From a configuration to what it names: mesh, strategy, model, optimizer, data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import models
from ..layouts.strategy import Precision, Strategy
from ..meshlib.errors import nearest
from ..meshlib.mesh import Mesh, make_mesh
from ..models import Model
from ..models.gpt2 import PRESETS as GPT2
from ..models.llama import PRESETS as LLAMA
from ..models.opt import PRESETS as OPT
from ..models.palm import PRESETS as PALM
from ..ops.nn import strategies
from ..optim import Transform, adamw, chain, clip_by_global_norm, schedules
from . import text
from .config import Config, ModelTable, OptimizerTable, PrecisionTable, Preset, StrategyTable


class Family(NamedTuple):
    """A family of decoders: its config, the model of one, and configs by the names of sizes."""

    config: type[Any]
    make: Callable[[Any, Strategy], Model]
    sizes: Mapping[str, Any]


FAMILIES: dict[str, Family] = {
    "gpt2": Family(models.GPT2Config, models.gpt2, GPT2),
    "llama": Family(models.LlamaConfig, models.llama, LLAMA),
    "opt": Family(models.OPTConfig, models.opt, OPT),
    "palm": Family(models.PaLMConfig, models.palm, PALM),
}
PRESETS: dict[str, Callable[..., Strategy]] = {
    "data": strategies.data,
    "fsdp": strategies.fsdp,
    "tensor_1d": strategies.tensor_1d,
    "sequence_parallel": strategies.sequence_parallel,
    "tensor_2d": strategies.tensor_2d,
    "tensor_2p5d": strategies.tensor_2p5d,
    "tensor_3d": strategies.tensor_3d,
}
DERIVED = ("vocab", "position")  # fields of a model's config that the data decides
IS_DECAYED = (
    "w_",
    "embed",
)  # roles that decay: matrices and tables, not gains, biases or positions


@dataclass(frozen=True)
class Corpus:
    """The text in two parts, as tokens uint8[n] and as bytes."""

    train: Tensor
    validation: Tensor
    train_bytes: bytes
    validation_bytes: bytes


def build_mesh(config: Config) -> Mesh:
    """The mesh of the file; distributed under torchrun, else simulated."""
    device = None if config.run.device == "auto" else config.run.device
    return make_mesh(config.mesh.axes, device=device, check=config.run.check)


def build_strategy(table: StrategyTable, precision: PrecisionTable) -> Strategy:
    """Presets joined left to right, then the file's own rows and options."""
    found = Strategy({"*": "..."}, {"*": "..."}, {"*": "..."})
    for preset in table.preset:
        found = found * _preset(preset, table.matmul)
    dtypes = Precision(
        *(getattr(torch, getattr(precision, name)) for name in ("param", "compute", "reduce"))
    )
    return found.replace(
        rest=table.rest,
        compute=table.compute,
        activations=table.activations,
        precision=dtypes,
        **table.options,
    )


def _preset(preset: Preset, matmul: str | None) -> Strategy:
    """One preset; the file's matmul method is its own where it has one."""
    make = PRESETS[preset.name]
    takes = inspect.signature(make).parameters
    axes = [name for name, p in takes.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    own = {name: p.annotation for name, p in takes.items() if p.kind is p.KEYWORD_ONLY}
    if len(preset.axes) > len(axes):
        raise ValueError(
            f"strategy.preset: {preset.name} takes {len(axes)} axes ({', '.join(axes)}), "
            f"got {', '.join(preset.axes)}"
        )
    for name, _ in preset.options:
        if name not in own:
            raise ValueError(f"strategy.preset: {preset.name}: unknown option {name!r}{nearest(name, own)}")  # fmt: skip  # noqa: E501
    options: dict[str, Any] = dict(preset.options)
    if matmul is not None and "method" in own:
        options.setdefault("method", matmul)
    return make(*preset.axes, **options)


def build_model(
    table: ModelTable, seq: int, strategy: Strategy, mesh: Mesh
) -> tuple[Model, Any | None]:
    """The file's model, and its parameters where a folder has them.

    Bytes are the vocabulary and the data's length the positions, unless the file says otherwise or
    the folder does.
    """
    if table.load is not None:
        return models.load(
            table.load, mesh, strategy, dtype=strategy.precision.param, pad=table.pad
        )
    assert table.family is not None
    family = FAMILIES[table.family]
    fields = {"vocab": text.VOCAB, "position": seq, "pad": table.pad, **table.fields}
    if table.preset is None:
        return family.make(family.config(**fields), strategy), None
    if table.preset not in family.sizes:
        hint = nearest(table.preset, family.sizes)
        raise ValueError(f"model.preset: {table.family} has no size {table.preset!r}{hint}")
    return family.make(replace(family.sizes[table.preset], **fields), strategy), None


def build_optimizer(table: OptimizerTable, steps: int) -> Transform:
    """AdamW behind an optional clipping of the global norm."""
    end = table.decay or steps
    rates: Mapping[str, Callable[[], Any]] = {
        "constant": lambda: schedules.warm(schedules.constant(table.lr), table.warmup),
        "linear": lambda: schedules.warm(schedules.linear(table.lr, 0.0, end), table.warmup),
        "cosine": lambda: schedules.warmup_cosine(table.lr, warmup=table.warmup, steps=end),
    }
    step = adamw(
        rates[table.schedule](),
        b1=table.b1,
        b2=table.b2,
        eps=table.eps,
        weight_decay=table.weight_decay,
        mask=lambda path, _: path.split(".")[-1].startswith(IS_DECAYED),
    )
    return chain(clip_by_global_norm(table.clip_norm), step) if table.clip_norm else step


def build_corpus(config: Config) -> Corpus:
    """The text, read and cut."""
    raw = text.read_text(config.data.text)
    train, validation = text.split_text(raw, config.data.split)
    return Corpus(text.encode(train), text.encode(validation), train, validation)
