"""Text from a model of bytes: one byte at a time, all sequences of a batch at once."""

from __future__ import annotations

from typing import Any

import torch

from ..layouts.place import shard
from ..meshlib.mesh import Mesh
from ..models import Model
from ..ops import random
from . import text


def sample(
    model: Model,
    params: Any,
    mesh: Mesh,
    prompt: str,
    *,
    length: int,
    rows: int,
    seed: int,
    temperature: float = 0.8,
) -> list[str]:
    """`rows` continuations of a prompt.

    Args:
        model: a decoder over bytes.
        params: its parameters.
        mesh: where they lie.
        prompt: the beginning of each.
        length: bytes to add.
        rows: how many; a multiple of what cuts the batch.
        seed: of the draws, which are the same on every mesh.
        temperature: divides the logits.

    Cost: one forward over at most `position` bytes per byte; there is no cache.
    """
    window = model.config.position
    tokens = text.encode(prompt).to(torch.int64).repeat(rows, 1)
    key = random.key(seed)
    with torch.no_grad():
        for number in range(length):
            context = tokens[:, -window:]
            used = context.shape[1]
            padded = torch.nn.functional.pad(context, (0, window - used))
            logits = model.apply(params, shard(padded, mesh, model.strategy["tokens"]))
            last = logits[:, used - 1] / temperature
            drawn = random.categorical(random.fold_in(key, number), last)
            tokens = torch.cat([tokens, drawn.full_tensor().cpu()[:, None]], 1)
    return [text.decode(row.to(torch.uint8)) for row in tokens]
