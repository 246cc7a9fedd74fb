"""`generate`: tokens after a prompt, one by one, greedy or drawn; every device gets the same."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import optree
import torch
from torch import Tensor

from ..layouts.layout import resolve
from ..layouts.place import shard
from ..layouts.sharded import ShardedTensor
from ..layouts.strategy import Strategy
from ..meshlib.mesh import Mesh
from ..ops import random
from ..ops.random import Key
from .model import Model


def generate(
    model: Model,
    params: Any,
    tokens: Tensor | ShardedTensor,
    *,
    max_new_tokens: int,
    key: Key | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | Collection[int] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Prompts continued token by token, with a cache.

    Args:
        model: a causal one; its strategy leaves the sequence uncut.
        params: its parameters.
        tokens: prompts [batch prompt], the global value, the same in every process. A batch that
            the strategy's axes do not divide is filled up with copies, which are dropped again.
        max_new_tokens: how many to add.
        key: of the draws; needed where temperature > 0. Draws are equal on every mesh.
        temperature: divides the logits; 0 takes the most probable token.
        top_k: draw among so many most probable tokens (and those that equal the last of them).
        top_p: draw among the most probable tokens whose probabilities together reach it.
        stop: token or tokens that end a sequence; its rest is filled with the first of them.
        mask: [batch prompt]: false at padding, to the left of shorter prompts; None is all true.

    Returns:
        [batch prompt + new], a plain tensor on the CPU; fewer new ones if all sequences end.

    Cost: one forward over the prompts, then one over a single token per step, each of which reads
        the whole cache; top_k and top_p gather the last logits [batch vocab].

    Raises:
        TypeError: the model does not decode.
        ValueError: no key, numbers or tokens out of range; more tokens than learned positions.

    >>> import torch, shardwise as sw
    >>> from shardwise import models, strategies
    >>> config = models.GPT2Config(layer=1, embed=8, heads=2, vocab=16, position=8)
    >>> model = models.gpt2(config, strategies.tensor_1d())
    >>> params = model.init(sw.random.key(0), sw.make_mesh({"tensor": 2}))
    >>> models.generate(model, params, torch.zeros(1, 3, dtype=torch.int64), max_new_tokens=4).shape
    torch.Size([1, 7])
    """
    if isinstance(tokens, ShardedTensor):
        tokens = tokens.full_tensor()
    tokens = tokens.detach().cpu()
    _check(model, tokens, max_new_tokens, key, temperature, top_k, top_p, mask)
    assert model.decode is not None
    mesh: Mesh = optree.tree_leaves(params)[0].mesh
    rows, prompt = tokens.shape
    extra = -rows % _batch_multiple(model.strategy, mesh)
    new = torch.cat([tokens, tokens[-1:].expand(extra, -1)])
    if mask is not None:
        mask = torch.cat([mask, mask[-1:].expand(extra, -1)]).cpu()
    ends = [stop] if isinstance(stop, int) else list(stop or ())
    ended = torch.zeros(rows + extra, dtype=torch.bool)
    made = [new]
    cache = model.cache(rows + extra, prompt + max_new_tokens, mesh)
    with torch.no_grad():
        for step in range(max_new_tokens):
            given = shard(new, mesh, model.strategy["tokens"])
            logits, cache = model.decode(params, given, cache, mask=mask, only_last=True)
            own = None if key is None else random.fold_in(key, step)
            last = logits[:, 0]
            chosen = choose(last, own, model.config.vocab, temperature, top_k, top_p)
            new = chosen.full_tensor().cpu()[:, None]
            mask = None
            if ends:
                new = torch.where(ended[:, None], ends[0], new)
                ended |= torch.isin(new[:, 0], torch.tensor(ends))
            made.append(new)
            if ends and bool(ended[:rows].all()):
                break
    return torch.cat(made, 1)[:rows]


def _check(
    model: Model,
    tokens: Tensor,
    new: int,
    key: Key | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    mask: Tensor | None,
) -> None:
    if model.decode is None:
        raise TypeError("generate: this model does not decode: it has no next token")
    if tokens.ndim != 2 or not tokens.numel():
        raise ValueError(f"generate: tokens {tuple(tokens.shape)} must be [batch prompt]")
    wrong = tokens[(tokens < 0) | (tokens >= model.config.vocab)]
    if wrong.numel():
        raise ValueError(
            f"generate: token {int(wrong[0])} is out of range; the vocabulary has "
            f"{model.config.vocab} tokens"
        )
    if mask is not None and (mask.shape != tokens.shape or not bool((mask[:, -1] != 0).all())):
        raise ValueError("generate: the mask is [batch prompt] and true at each last token")
    if new < 0 or temperature < 0:
        raise ValueError(f"generate: max_new_tokens {new}, temperature {temperature} are negative")
    if temperature > 0 and key is None:
        raise ValueError("generate: drawing needs a key: key=sw.random.key(0)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k = {top_k}; expected at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p = {top_p}; expected in (0, 1]")
    longest = getattr(model.config, "position", None)
    if longest is not None and tokens.shape[1] + new > longest:
        raise ValueError(
            f"generate: {tokens.shape[1]} + {new} tokens, but the model has {longest} positions"
        )
    s = model.strategy
    for role in ("hidden", "block_in", "heads", "kv"):
        dims = resolve(s[role], 3 if role in ("hidden", "block_in") else 4).dims
        if dims[1]:
            raise ValueError(
                f"generate: the row {role} = {s[role]!r} cuts the sequence, but a step has one "
                "token: use the strategy without it (tensor_1d for sequence_parallel; parameters "
                "lie the same)"
            )


def _batch_multiple(s: Strategy, mesh: Mesh) -> int:
    """What the batch must be a multiple of under the strategy's activation rows."""
    ndims = {"tokens": 2, "hidden": 3, "block_in": 3, "heads": 4, "kv": 4, "ffn": 3, "logits": 3}
    rows = (resolve(s[role], ndim) for role, ndim in ndims.items())
    return math.lcm(*(mesh.group_size(row.dims[0]) for row in rows))


def choose(
    logits: ShardedTensor,
    key: Key | None,
    classes: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> ShardedTensor:
    """One token per row of logits [batch vocab], of which the first `classes` are true tokens."""
    t: Any = torch
    is_true = torch.arange(logits.shape[1], device=logits.mesh.shard_device) < classes
    scores = t.where(is_true, logits.to(torch.float32), -math.inf)
    if temperature == 0 or key is None:
        return t.argmax(scores, -1)
    scores = scores / temperature
    if top_k is not None and top_k < classes:
        least = t.topk(scores, top_k, -1)[0][:, -1:]
        scores = t.where(scores < least, -math.inf, scores)
    if top_p is not None and top_p < 1:
        ranked = t.sort(scores, -1, descending=True)[0]
        p = t.softmax(ranked, -1)
        kept = t.cumsum(p, -1) - p < top_p  # tokens before it do not reach top_p
        least = t.where(kept, ranked, math.inf).amin(-1, keepdim=True)
        scores = t.where(scores < least, -math.inf, scores)
    return random.categorical(key, scores, classes=classes)
