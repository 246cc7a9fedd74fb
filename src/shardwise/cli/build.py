"""From a configuration to what it names: mesh, strategy, model, optimizer, data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layouts.strategy import Precision, Strategy
from ..meshlib.errors import nearest
from ..meshlib.mesh import Mesh, make_mesh
from ..models import GPT2Config, Model, gpt2
from ..ops.nn import strategies
from ..optim import Transform, adamw, chain, clip_by_global_norm, schedules
from . import text
from .config import Config, ModelTable, OptimizerTable, PrecisionTable, Preset, StrategyTable

FAMILIES: dict[str, tuple[type, Callable[[Any, Strategy], Model]]] = {"gpt2": (GPT2Config, gpt2)}
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


def build_model(table: ModelTable, seq: int, strategy: Strategy) -> Model:
    """The family's model, with bytes as vocabulary and the data's length as positions."""
    kind, make = FAMILIES[table.family]
    return make(kind(**{"vocab": text.VOCAB, "position": seq, **table.fields}), strategy)


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
