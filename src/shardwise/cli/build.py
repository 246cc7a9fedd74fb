"""From a configuration to what it names: mesh, strategy, model, data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
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
from . import text
from .config import Config, ModelTable, Preset


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


def build_strategy(config: Config) -> Strategy:
    """Presets joined left to right, then the file's own rows and options.

    Stage 3 of ZeRO puts `fsdp` in the place of `data` over its axes.

    Raises:
        ValueError: stage 3, and neither preset is there for an axis; fp8 with a matmul method that
            has none.
    """
    table, precision = config.strategy, config.precision
    presets = table.preset
    if config.zero.stage == 3:
        presets = _cut_parameters(presets, config.zero.axes)
    found = Strategy({"*": "..."}, {"*": "..."}, {"*": "..."})
    for preset in presets:
        found = found * _preset(preset, table.matmul)
    dtypes = Precision(
        *(getattr(torch, getattr(precision, name)) for name in ("param", "compute", "reduce")),
        fp8=precision.fp8,
    )
    made = found.replace(
        rest=table.rest,
        compute=table.compute,
        activations=table.activations,
        precision=dtypes,
        **table.options,
        saved=config.memory.activations,
    )
    method = made.option("matmul")
    if precision.fp8 and method != "direct":
        raise ValueError(f'precision.fp8: needs strategy.matmul = "direct", not "{method}"')
    if config.memory.parameters == "host":
        return made.replace(rest={role: f"{row} @host" for role, row in made.rest.items()})
    return made


def _cut_parameters(presets: Sequence[Preset], axes: Sequence[str]) -> list[Preset]:
    """The presets, with fsdp in the place of data over these axes."""
    over = [
        (preset.axes or ("data",))[0] if preset.name in ("data", "fsdp") else ""
        for preset in presets
    ]
    for axis in axes:
        if axis not in over:
            raise ValueError(
                f"zero.stage: 3 puts fsdp({axis}) in the place of data({axis}), which is not in "
                f"strategy.preset"
            )
    return [
        replace(preset, name="fsdp") if axis in axes else preset
        for preset, axis in zip(presets, over, strict=True)
    ]


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
    if fields["vocab"] < text.VOCAB:
        raise ValueError(
            f"model.vocab = {fields['vocab']}: data.tokenizer 'bytes' has {text.VOCAB} tokens"
        )
    if table.preset is None:
        return family.make(family.config(**fields), strategy), None
    if table.preset not in family.sizes:
        hint = nearest(table.preset, family.sizes)
        raise ValueError(f"model.preset: {table.family} has no size {table.preset!r}{hint}")
    return family.make(replace(family.sizes[table.preset], **fields), strategy), None


def build_corpus(config: Config) -> Corpus:
    """The text, read and cut."""
    raw = text.read_text(config.data.text)
    train, validation = text.split_text(raw, config.data.split)
    return Corpus(text.encode(train), text.encode(validation), train, validation)
