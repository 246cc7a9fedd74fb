"""One training step and one evaluation, as functions of a model, a transform and a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .. import optim
from ..layouts import tree
from ..layouts.layout import resolve
from ..layouts.place import shard
from ..layouts.reshard import reshard
from ..layouts.sharded import ShardedTensor
from ..meshlib.mesh import Mesh
from ..models import Model
from ..ops import random
from ..ops.random import Key
from ..ops.transforms.accumulate import accumulate
from ..ops.transforms.grad import value_and_grad
from ..optim import Transform
from ..optim.base import settled
from . import build, text
from .config import Config

Step = Callable[..., tuple[Any, Any, ShardedTensor]]


def make_step(
    model: Model,
    optimizer: Transform,
    micro_batches: int = 1,
    *,
    is_scaled: bool = False,
    donate: bool = False,
) -> Step:
    """A training step as a pure function: (params, state, batch, key) -> (params, state, loss).

    Args:
        model: whose loss falls.
        optimizer: its `grads` say in which layouts gradients come.
        micro_batches: into which the batch is cut; each has a key of its own.
        is_scaled: whether the state holds a `scale` that the loss is multiplied by.
        donate: whether parameters and state are given up to the step.
    """

    def scaled(params: Any, batch: Any, keys: Any, scale: Any) -> ShardedTensor:
        loss = model.loss(params, batch, key=next(keys))
        return loss if scale is None else loss * scale

    wanted = None if optimizer.grads is settled else optimizer.grads
    gradient = value_and_grad(scaled, grads=wanted)
    if micro_batches > 1:
        gradient = accumulate(gradient, micro_batches, argnum=1)

    def step(
        params: Any, state: Any, batch: Any, key: Key | None = None
    ) -> tuple[Any, Any, ShardedTensor]:
        scale = optim.get(state, "scale") if is_scaled else None
        loss, grads = gradient(params, batch, iter(_keys(key, micro_batches)), scale)
        if scale is not None:
            loss = loss / scale
        params, state = optimizer.step(grads, state, params, donate=donate)
        return params, state, loss

    return step


def _keys(key: Key | None, count: int) -> list[Key | None]:
    if key is None or count == 1:
        return [key] * count
    return [random.fold_in(key, number) for number in range(count)]


def place(raw: dict[str, torch.Tensor], model: Model, mesh: Mesh) -> dict[str, ShardedTensor]:
    """A global batch on the mesh, as the strategy's `tokens` row says."""
    return shard(raw, mesh, model.strategy["tokens"])


def evaluate(
    model: Model,
    params: Any,
    corpus: build.Corpus,
    config: Config,
    mesh: Mesh,
    most: int | None = None,
) -> float:
    """Validation loss in bits per byte: of the whole text, or of `most` batches spread over it."""
    every = list(
        text.validation_batches(corpus.validation, seq=config.data.seq, batch=config.data.batch)
    )
    chosen = every if most is None else every[:: max(1, len(every) // most)][:most]
    total, count = 0.0, 0
    with torch.no_grad():
        for raw in chosen:
            counted = int((raw["labels"] != text.IGNORE).sum())
            loss = model.loss(params, place(raw, model, mesh))
            total += float(loss.full_tensor()) * counted
            count += counted
    return total / count / math.log(2)


def rows(model: Model, mesh: Mesh) -> int:
    """The smallest batch that the strategy can cut."""
    return mesh.group_size(resolve(model.strategy["tokens"], 2).dims[0])


def averaged(params: Any, state: Any) -> Any:
    """The running mean of the parameters, where the state has one, in their layouts and dtypes."""
    mean = _mean(state)
    if mean is None:
        return params
    with torch.no_grad():
        return tree.map(lambda p, m: reshard(m.to(p.dtype), p.layout), params, mean)


def _mean(state: Any) -> Any:
    """What the state holds under "ema"; wrappers are dicts in dicts."""
    if not isinstance(state, dict):
        return None
    if "ema" in state:
        return state["ema"]
    found = (_mean(inner) for inner in state.values())
    return next((mean for mean in found if mean is not None), None)
