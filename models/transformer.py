"""Pieces of transformers, each written once; a model is a table of parameters and one block.

Legend: batch, seq, embed, heads, kv_heads, head_dim, ffn, vocab, position, layer are the dims of
the roles' rows. In every piece `p` holds one layer's parameters at use, `s` is the strategy, and
the stream `x` is [batch seq embed] in the row `hidden`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ..kernels import fp8
from ..layouts import notation
from ..layouts.layout import Layout, make
from ..layouts.reshard import reshard, reshard_one
from ..layouts.sharded import ShardedTensor
from ..layouts.strategy import Strategy
from ..ops import nn, random
from ..ops.contract import einsum
from ..ops.random import Key
from ..ops.transforms.scan import scan
from .cache import Cache, advance, run_cached
from .model import Model, expect_tokens
from .names import Source

Params = Mapping[str, Any]
Unary = Callable[[Any], Any]
LINEAR_LOSS_ON = ("cuda",)  # kinds of devices; on a CPU all logits at once are faster
WIDE = 512  # the least size of a weight's dims for an 8-bit product


class Place(NamedTuple):
    """What a block may depend on besides its parameters and the stream.

    Attributes:
        positions: of the tokens, [seq] or [batch seq].
        key: of this layer's dropout; None is evaluation.
        recall: (keys, values) -> (keys, values, their positions): a cache that remembers; None
            where the sequence is all there is.
        mask: which keys are there, boolean [batch keys] cut as heads are; None is all.
        is_ordered: whether positions count from 0, so that causal masks need not compare them.
    """

    positions: Any
    key: Key | None = None
    recall: Callable[[Any, Any], tuple[Any, Any, Any]] | None = None
    mask: Any = None
    is_ordered: bool = True


Block = Callable[[Params, ShardedTensor, Place], ShardedTensor]


def attend(
    p: Params,
    h: ShardedTensor,
    s: Strategy,
    place: Place,
    *,
    rotate: Callable[[Any, Any], tuple[Any, Any]] | None = None,
    causal: bool = True,
    config: Any = None,
    **options: Any,
) -> ShardedTensor:
    """Multi-head attention without its output projection.

    Args:
        p: w_q, w_k, w_v and, where the model has them, b_q, b_k, b_v.
        h: the block's input, in the row `block_in`.
        s: the strategy.
        place: positions, and the cache if there is one.
        rotate: (queries, keys) -> the same with their positions in them, before the cache.
        causal: a query sees keys at its own position and before.
        config: of the model, where it may pad heads but not key-value heads.
        **options: of `nn.attention`.

    Returns:
        [batch seq heads head_dim] in the row `attended`.
    """
    q, k, v = nn.dense(
        h,
        (p["w_q"], p["w_k"], p["w_v"]),
        (p.get("b_q"), p.get("b_k"), p.get("b_v")),
        out=(s["heads"], s["kv"], s["kv"]),
        **product(s, p["w_q"], p["w_k"], p["w_v"]),
    )
    if rotate is not None:
        q, k = rotate(q, k)
    if place.recall is not None:
        k, v, seen = place.recall(k, v)
        options |= {"positions": place.positions, "kv_positions": seen}
    elif causal and not place.is_ordered:
        options |= {"positions": place.positions}
    if place.mask is not None:
        options |= {"mask": place.mask[:, None, None, :]}
    options |= {"causal": causal, "out": s["attended"]}
    if config is not None and q.shape[2] != config.group * k.shape[2]:
        return _silenced(nn.attention(q, k, v, group=config.group, **options), config)
    return nn.attention(q, k, v, **options)


def _silenced(a: ShardedTensor, config: Any) -> ShardedTensor:
    """Zeros in padded heads: they read true keys and values, and w_o's padding must stay zero."""
    is_true = torch.arange(a.shape[2], device=a.mesh.shard_device) < config.heads
    return a * is_true[:, None].to(a.dtype)


def product(s: Strategy, *weights: ShardedTensor, inputs: int = 1) -> dict[str, Any]:
    """How `nn.dense` multiplies by weights of a block: method and precision.

    In fp8 where the strategy says so and the contracted size and the results' together are wide:
    below, quantising costs more than the faster product gives.
    """
    width = math.prod(weights[0].shape[:inputs])
    sizes = (width, sum(math.prod(w.shape[inputs:]) for w in weights))
    fits = min(sizes) >= WIDE and not any(n % fp8.MULTIPLE for n in sizes)
    precision = "fp8" if s.precision.fp8 and fits else "default"
    return {"method": s.option("matmul"), "precision": precision}


def project(p: Params, a: ShardedTensor, s: Strategy) -> ShardedTensor:
    """Attention's output projection: [batch seq heads head_dim] -> the stream."""
    how = product(s, p["w_o"], inputs=2)
    return nn.dense(a, p["w_o"], p.get("b_o"), out=s["hidden"], inputs=2, **how)


def mlp(p: Params, h: ShardedTensor, s: Strategy, activate: Unary) -> ShardedTensor:
    """Up, activation, down: the block's input [batch seq embed] -> the stream."""
    up = activate(nn.dense(h, p["w_up"], p.get("b_up"), out=s["ffn"], **product(s, p["w_up"])))
    return nn.dense(up, p["w_down"], p.get("b_down"), out=s["hidden"], **product(s, p["w_down"]))


def gated_mlp(p: Params, h: ShardedTensor, s: Strategy, activate: Unary) -> ShardedTensor:
    """SwiGLU (activate = silu), GeGLU (gelu): activate(gate) * up, then down -> the stream."""
    mixed = gated(p, h, s, activate)
    how = product(s, p["w_down"])
    return nn.dense(mixed, p["w_down"], p.get("b_down"), out=s["hidden"], **how)


def gated(p: Params, h: ShardedTensor, s: Strategy, activate: Unary) -> ShardedTensor:
    """activate(gate) * up of the block's input: [batch seq embed] -> [batch seq ffn]."""
    gate, up = nn.dense(
        h,
        (p["w_gate"], p["w_up"]),
        (p.get("b_gate"), p.get("b_up")),
        out=(s["ffn"], s["ffn"]),
        **product(s, p["w_gate"], p["w_up"]),
    )
    return activate(gate) * up


def project_both(p: Params, a: ShardedTensor, mixed: ShardedTensor, s: Strategy) -> ShardedTensor:
    """Attention's and the MLP's results -> the stream, summed before one reduction."""
    weights = (p["w_o"], p["w_down"])
    both = [product(s, w, inputs=n) for w, n in zip(weights, (2, 1), strict=True)]
    how = min(both, key=lambda one: one["precision"] == "fp8")  # fp8 where both are wide
    return nn.dense((a, mixed), weights, out=s["hidden"], inputs=(2, 1), **how)


def head(h: ShardedTensor, table: ShardedTensor, s: Strategy) -> ShardedTensor:
    """Logits: [batch seq embed] and [vocab embed] -> [batch seq vocab]."""
    method: Any = s.option("matmul")
    pattern = "batch seq embed, vocab embed -> batch seq vocab"
    return einsum(pattern, h, table, out=s["logits"], method=method)


def first_token(x: ShardedTensor, s: Strategy) -> ShardedTensor:
    """The stream [batch seq embed] -> its first token [batch embed], cut as `labels` are.

    Cost: nothing where seq is whole; else an all_reduce of the result, as only its owner has it.
    """
    select: Any = torch.index_select  # looks a cut dim up, where x[:, 0] would need it whole
    found = select(x, 1, torch.zeros(1, dtype=torch.int64, device=x.mesh.shard_device))
    return reshard(found[:, 0], make((*Layout(s["labels"], 1).dims, ())))


def run_blocks(
    block: Block, x: ShardedTensor, stacked: Params, s: Strategy, place: Place
) -> ShardedTensor:
    """The stream through all layers; each layer's parameters are brought to use on their slice."""

    def layer(carry: tuple[ShardedTensor, int], p: Any) -> tuple[Any, None]:
        x, number = carry
        own = random.fold_in(place.key, number) if place.key is not None else None
        return (block(p, x, place._replace(key=own)), number + 1), None

    recompute: Any = s.option("recompute")
    offload = s.option("saved") == "host"
    (x, _), _ = scan(layer, (x, 0), stacked, use=s.use, recompute=recompute, offload=offload)
    return x


def seen_keys(mask: Any, s: Strategy) -> Any:
    """A mask of tokens [batch seq] as one of keys: boolean, its batch cut as that of heads."""
    if mask is None:
        return None
    seen = mask != 0
    batch = notation.parse(s["heads"]).dims[:1] or ((),)
    return reshard_one(seen, make((*batch, ()))) if isinstance(seen, ShardedTensor) else seen


def causal_model(
    config: Any,
    s: Strategy,
    declaration: Mapping[str, Any],
    *,
    embed: Callable[[Params, ShardedTensor, Any], ShardedTensor],
    block: Block,
    last: Callable[[Params, ShardedTensor], ShardedTensor],
    names: Mapping[str, Source],
    positions_of: Unary | None = None,
    scale: float = 1.0,
) -> Model:
    """A decoder that predicts the next token.

    Args:
        config: of the model.
        s: the strategy.
        declaration: with embed, blocks and, where it is not tied, head.
        embed: (params, tokens, positions) -> the stream; params are at rest.
        block: one layer.
        last: (params, x) -> the head's input before it is converted to `block_in`.
        names: parameter path to its place in a Hugging Face checkpoint.
        positions_of: the mask [batch seq] -> positions; None counts from 0 whatever is masked.
        scale: of the logits.

    `apply` and `loss` (as `batch["mask"]`) take which tokens are there, [batch seq] cut as the
    tokens: no query sees the others.
    """

    def apply(
        params: Params,
        tokens: ShardedTensor,
        *,
        positions: Any = None,
        mask: Any = None,
        key: Key | None = None,
    ) -> ShardedTensor:
        return predict(*streamed(params, tokens, positions, mask, key))

    def streamed(
        params: Params, tokens: ShardedTensor, positions: Any, mask: Any, key: Key | None
    ) -> tuple[Params, ShardedTensor]:
        is_ordered = positions is None
        expect_tokens(tokens, config.position if is_ordered and "pos" in declaration else None)
        if positions is None and mask is not None and positions_of is not None:
            positions = positions_of(mask)
        elif positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.mesh.shard_device)
        place = Place(positions, key, None, seen_keys(mask, s), is_ordered)
        if s.option("tied") == "once":
            params = {**params, "embed": s.use({"embed": params["embed"]})["embed"]}
        x = embed(params, tokens, positions)
        return params, run_blocks(block, x, params["blocks"], s, place)

    def ending(params: Params, x: ShardedTensor) -> tuple[ShardedTensor, ShardedTensor]:
        h = reshard(last(params, x), s["block_in"])
        role = "head" if "head" in declaration else "embed"
        return h, s.use({role: params[role]})[role]

    def predict(params: Params, x: ShardedTensor) -> ShardedTensor:
        logits = head(*ending(params, x), s)
        return logits if scale == 1 else logits * scale

    def decode(
        params: Params,
        tokens: ShardedTensor,
        cache: Cache,
        *,
        mask: Any = None,
        only_last: bool = False,
    ) -> tuple[ShardedTensor, Cache]:
        cache, positions = advance(cache, tokens.shape[0], tokens.shape[1], mask)

        def run(p: Any, x: ShardedTensor, recall: Any) -> ShardedTensor:
            return block(s.use(p), x, Place(positions, recall=recall))

        x = embed(params, tokens, positions)
        x, cache = run_cached(run, x, params["blocks"], cache, s)
        return predict(params, x[:, -1:] if only_last else x), cache

    def loss(params: Params, batch: Mapping[str, Any], *, key: Key | None = None) -> Any:
        given = batch["tokens"], batch.get("positions"), batch.get("mask")
        params, x = streamed(params, *given, key)
        if scale == 1 and x.mesh.device.type in LINEAR_LOSS_ON:
            options: Any = {"out": s["logits"], "method": s.option("matmul")}
            operands = (*ending(params, x), batch["labels"])
            return nn.linear_cross_entropy(*operands, classes=config.vocab, **options)
        return nn.cross_entropy(predict(params, x), batch["labels"], classes=config.vocab)

    return Model(config, s, declaration, apply, loss, names, decode)
