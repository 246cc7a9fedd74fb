"""How many floating-point operations training takes, per token: what MFU is counted in."""

from __future__ import annotations

import math
from typing import Any

import optree

from .model import Model


def multiplied(model: Model) -> int:
    """Elements of the parameters that every token is multiplied by, without padding.

    Weights, and the table of the head; not gains, biases and tables that are only looked up. A tied
    table is the head's.

    Raises:
        TypeError: the model does not decode: of an encoder's heads some see one token only.
    """
    if model.decode is None:
        raise TypeError("FLOPs per token are known of models that decode")
    head = "head" if "head" in model.declaration else "embed"
    paths, params, _ = optree.tree_flatten_with_path(model.declaration)
    sizes = getattr(model.config, "true_sizes", model.config)
    return sum(
        math.prod(param.shape(sizes))
        for path, param in zip(paths, params, strict=True)
        if "->" in param.dims or path == (head,)
    )


def flops_per_token(model: Model, seq: int, *, causal: bool = True) -> int:
    """FLOPs of the products of a forward and a backward pass, per token.

    6 N for N multiplied parameters (2 in the forward, 4 in the backward), and for attention 12
    layer heads head_dim seq, every pair of tokens counted, or half of that: the pairs that a causal
    mask leaves. What a pass computes twice to save memory, the optimizer and everything pointwise
    are not counted.

    Args:
        model: one that decodes.
        seq: tokens in a sequence.
        causal: whether attention counts half of the pairs.

    Raises:
        TypeError: the model does not decode.

    >>> from shardwise import models, strategies
    >>> config = models.GPT2Config(layer=2, embed=8, heads=2, vocab=16, position=4)
    >>> model = models.gpt2(config, strategies.data())
    >>> flops_per_token(model, seq=4), flops_per_token(model, seq=4, causal=False)
    (10368, 10752)
    """
    sizes: Any = getattr(model.config, "true_sizes", model.config)
    pairs = sizes["layer"] * sizes["heads"] * sizes["head_dim"] * seq
    return 6 * multiplied(model) + (6 if causal else 12) * pairs
